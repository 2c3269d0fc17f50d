//! A [`Source`] of our own: deliveries come over a socket, and settlements go back. Another broker
//! can feed a consumer in the same way, because the trait is public.
//!
//! One thread connects, reads, and connects again. That thread alone sends `Up`, `Delivery` and
//! `Down`, so nothing is delivered in an epoch after its end. A second thread per connection
//! writes, so that `settle` never blocks.

use std::io::{self, BufReader, BufWriter, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use onewrite::broker::{Delivery, DeliveryTag, Epoch, Settlement, Source, SourceEvent, SourceEvents};
use onewrite::{Fault, FaultClass, SettingError};

use crate::consuming::{News, Settle, Subscribe, Verdict};
use crate::frames;

/// First and longest wait between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// The longest time of one attempt.
const CONNECT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct SocketSource {
    address: SocketAddr,
    queue: String,
    link: Arc<Mutex<Link>>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    /// Dropped to end the thread.
    stop: Sender<()>,
    ended: Receiver<()>,
}

/// The connection that is up, if one is.
#[derive(Debug, Default)]
struct Link {
    epoch: Epoch,
    up: Option<(TcpStream, Sender<Settle>)>,
    stopped: bool,
}

impl SocketSource {
    pub(crate) fn new(address: SocketAddr, queue: &str) -> Self {
        Self { address, queue: queue.into(), link: Arc::default(), running: None }
    }
}

impl Source for SocketSource {
    fn start(&mut self, events: SourceEvents, prefetch: u16) -> Result<(), SettingError> {
        let (stop, stopped) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let (queue, link) = (self.queue.clone(), Arc::clone(&self.link));
        let connector = Connector { address: self.address, queue, prefetch, link, events };
        thread::spawn(move || {
            connector.run(&stopped);
            let _ = end.send(());
        });
        self.running = Some(Running { stop, ended });
        Ok(())
    }

    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>) {
        let link = lock(&self.link);
        let Some((_, writer)) = &link.up else { return };
        // If the epoch is over, the broker has taken the deliveries back: nothing is to settle.
        let current = settlements.into_iter().filter(|(tag, _)| tag.epoch == link.epoch);
        let settled = current.map(|(tag, settlement)| (tag.tag, verdict(settlement))).collect();
        let _ = writer.send(Settle(settled));
    }

    fn stop(&mut self, deadline: Duration) {
        let Some(Running { stop, ended }) = self.running.take() else { return };
        drop(stop);
        let mut link = lock(&self.link);
        link.stopped = true;
        // Without its sender, the writing thread writes the last settlements and ends the
        // connection.
        if let Some((_, writer)) = link.up.take() {
            drop(writer);
        }
        drop(link);
        let _ = ended.recv_timeout(deadline);
    }
}

fn verdict(settlement: Settlement) -> Verdict {
    match settlement {
        Settlement::Acknowledge => Verdict::Acknowledge,
        Settlement::Reject => Verdict::Reject,
        // This covers kinds that a later release may add: nothing is lost by another try.
        _ => Verdict::Requeue,
    }
}

/// The thread that owns the connection.
struct Connector {
    address: SocketAddr,
    queue: String,
    prefetch: u16,
    link: Arc<Mutex<Link>>,
    events: SourceEvents,
}

impl Connector {
    fn run(&self, stopped: &Receiver<()>) {
        let mut wait = BACKOFF.0;
        for number in 1.. {
            let epoch = Epoch(number);
            let mut was_up = false;
            let text = match self.connect(epoch, &mut was_up) {
                Ok(()) => "the connection ended".into(),
                Err(error) => error.to_string(),
            };
            if let Some((stream, _)) = lock(&self.link).up.take() {
                let _ = stream.shutdown(Shutdown::Both);
            }
            let fault = Fault::new(FaultClass::Outage, text);
            if !self.events.send(SourceEvent::Down { epoch, fault }) {
                return;
            }
            wait = if was_up { BACKOFF.0 } else { (wait * 2).min(BACKOFF.1) };
            if stopped.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    /// One connection, from its beginning to its end.
    fn connect(&self, epoch: Epoch, was_up: &mut bool) -> io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&self.address, CONNECT)?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        frames::write(&mut stream, &Subscribe { queue: self.queue.clone(), prefetch: self.prefetch })?;
        let News::Consuming = frames::read(&mut reader)? else {
            return Err(io::Error::other("the broker did not greet"));
        };
        let (writer, settled) = mpsc::channel();
        let to = stream.try_clone()?;
        {
            let mut link = lock(&self.link);
            if link.stopped {
                return Ok(());
            }
            link.epoch = epoch;
            link.up = Some((stream, writer));
        }
        thread::spawn(move || {
            let _ = write(&to, &settled);
            let _ = to.shutdown(Shutdown::Both); // the reading thread ends the epoch
        });
        *was_up = true;
        self.events.send(SourceEvent::Up { epoch });
        loop {
            let News::Delivery { tag, exchange, routing_key, redelivered, letter } =
                frames::read(&mut reader)?
            else {
                continue;
            };
            let tag = DeliveryTag { epoch, tag };
            let mut delivery = Delivery::new(tag, exchange, routing_key, letter.into_message());
            delivery.redelivered = redelivered;
            if !self.events.send(SourceEvent::Delivery(Box::new(delivery))) {
                return Ok(());
            }
        }
    }
}

/// Writes settlements until the connection or the source ends. Flushes when no settlement waits.
fn write(stream: &TcpStream, settled: &Receiver<Settle>) -> io::Result<()> {
    let mut to = BufWriter::new(stream);
    while let Ok(first) = settled.recv() {
        let mut waiting = std::iter::once(first).chain(settled.try_iter());
        waiting.try_for_each(|settle| frames::write(&mut to, &settle))?;
        to.flush()?;
    }
    Ok(())
}

fn lock(link: &Mutex<Link>) -> MutexGuard<'_, Link> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}
