//! Where all sides are measured: a plain lapin consumer on a thread of its own, prefetch 2,048, acknowledging by batches. What it gets is stamped
//! with its writer, its number and its moment; each writer's numbers must come in order, none missing, none twice.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{Either, FutureExt, select};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties, Consumer};
use tokio::sync::oneshot;

pub(crate) const PAYLOAD_BYTES: usize = 256;

const PREFETCH: u16 = 2048;
/// Deliveries acknowledged together at most.
const BATCH: usize = 256;

/// One clock for who writes and who reads.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What an event carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) writer: usize,
    /// From 0 on, for each writer.
    pub(crate) number: u64,
    pub(crate) at: Instant,
}

impl Stamp {
    pub(crate) fn payload(self) -> [u8; PAYLOAD_BYTES] {
        let mut payload = [8; PAYLOAD_BYTES];
        let nanos = self.at.saturating_duration_since(*START).as_nanos() as u64;
        for (place, value) in payload.chunks_exact_mut(8).zip([self.writer as u64, self.number, nanos]) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        payload
    }

    fn read(payload: &[u8]) -> Option<Self> {
        let mut values =
            payload.chunks_exact(8).filter_map(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let (writer, number) = (usize::try_from(values.next()?).ok()?, values.next()?);
        Some(Self { writer, number, at: *START + Duration::from_nanos(values.next()?) })
    }
}

/// A running consumer.
pub(crate) struct Tap {
    shared: Arc<Shared>,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), String>>,
}

#[derive(Default)]
struct Shared {
    delivered: AtomicU64,
    /// Seconds from an event's moment to its delivery.
    latencies: Mutex<Vec<f64>>,
}

impl Tap {
    /// When this returns `Ok` the broker knows the consumer.
    pub(crate) fn start(url: &str, queue: &'static str) -> Result<Self, Box<dyn Error>> {
        LazyLock::force(&START);
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let (url, for_thread) = (url.to_owned(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| error.to_string())?;
            let listening = listen(&url, queue, &for_thread, &ready, stopped);
            runtime.block_on(listening).map_err(|error| format!("the consumer: {error}"))
        });
        let tap = Self { shared, stop, thread };
        // Its end, without a word, says that it failed.
        if is_ready.recv().is_err() {
            return Err(tap.stop().err().unwrap_or_else(|| "the consumer has ended".into()));
        }
        Ok(tap)
    }

    /// Events delivered since it began, each counted only if it came in its writer's order.
    pub(crate) fn delivered(&self) -> u64 {
        self.shared.delivered.load(Ordering::Relaxed)
    }

    /// Those since the last time, in seconds.
    pub(crate) fn take_latencies(&self) -> Vec<f64> {
        std::mem::take(&mut self.shared.latencies.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until so many are delivered; `false` if they do not come.
    pub(crate) fn wait_for(&self, events: u64, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        while self.delivered() < events && Instant::now() < end && !self.thread.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.delivered() >= events
    }

    /// Ends it, and reports what went wrong for it.
    pub(crate) fn stop(self) -> Result<(), Box<dyn Error>> {
        // One that has failed does not listen any more.
        let _ = self.stop.send(());
        Ok(self.thread.join().map_err(|_| "the consumer panicked")??)
    }
}

async fn listen(
    url: &str,
    queue: &str,
    shared: &Shared,
    ready: &mpsc::Sender<()>,
    mut stopped: oneshot::Receiver<()>,
) -> Result<(), Box<dyn Error>> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let consume = BasicConsumeOptions::default();
    let mut consumer = channel.basic_consume(queue.into(), "".into(), consume, FieldTable::default()).await?;
    ready.send(())?;
    let mut next_numbers = Vec::new();
    while let Either::Left((delivery, _)) = select(consumer.next(), &mut stopped).await {
        let delivery = delivery.ok_or("it was cancelled")??;
        take_batch(&mut consumer, delivery, &mut next_numbers, shared).await?;
    }
    Ok(connection.close(200, "done".into()).await?)
}

/// Takes this delivery and what is there behind it.
async fn take_batch(
    consumer: &mut Consumer,
    first: lapin::message::Delivery,
    next_numbers: &mut Vec<u64>,
    shared: &Shared,
) -> Result<(), Box<dyn Error>> {
    let mut batch = vec![];
    let mut delivery = first;
    let last = loop {
        batch.push(note(&delivery.data, next_numbers)?);
        shared.delivered.fetch_add(1, Ordering::Relaxed);
        if batch.len() == BATCH {
            break delivery;
        }
        match consumer.next().now_or_never() {
            Some(next) => delivery = next.ok_or("it was cancelled")??,
            None => break delivery,
        }
    };
    shared.latencies.lock().unwrap_or_else(PoisonError::into_inner).append(&mut batch);
    if !last.acker.ack(BasicAckOptions { multiple: true }).await? {
        return Err("an acknowledgement was not taken".into());
    }
    Ok(())
}

/// How long this one took, in seconds.
fn note(payload: &[u8], next_numbers: &mut Vec<u64>) -> Result<f64, Box<dyn Error>> {
    let now = Instant::now();
    let Stamp { writer, number, at } = Stamp::read(payload).ok_or("a payload is too short")?;
    if next_numbers.len() <= writer {
        next_numbers.resize(writer + 1, 0);
    }
    if next_numbers[writer] != number {
        return Err(format!("writer {writer}: number {number} came, not {}", next_numbers[writer]).into());
    }
    next_numbers[writer] += 1;
    Ok(now.saturating_duration_since(at).as_secs_f64())
}
