//! Who polls an outbox table: reads a batch, publishes it with pipelined confirms, deletes it in one transaction; again at once, or after
//! the interval when there was nothing.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::lapin::{Client, plain};
use super::shared::Shared;
use super::sqlite::{Outboxed, Sqlite};

/// Events of one batch, all of which may be unconfirmed at once.
const BATCH: usize = 1024;

/// Runs until it is stopped.
pub(crate) struct Poller {
    stop: Arc<AtomicBool>,
    /// Times it has found nothing, and waited.
    rests: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

impl Poller {
    /// `deleting` is the writers' own connection, or one for this alone.
    pub(crate) fn start(
        path: &Path,
        deleting: Arc<Shared>,
        url: &str,
        queue: &'static str,
        interval: Duration,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let reading = Sqlite::open(path)?;
        let client = Client::connect(url)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let rests = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&rests);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let found = poll_once(&reading, &deleting, &client, queue);
                if !found.map_err(|error| format!("the poller: {error}"))? {
                    counted.fetch_add(1, Ordering::Relaxed);
                    client.idle(interval);
                }
            }
            client.close().map_err(|error| error.to_string())
        });
        Ok(Self { stop, rests, thread })
    }

    /// How often it has found nothing, and waited.
    pub(crate) fn rests(&self) -> u64 {
        self.rests.load(Ordering::Relaxed)
    }

    pub(crate) fn stop(self) -> Result<(), Box<dyn std::error::Error>> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(self.thread.join().map_err(|_| "the poller panicked")??)
    }
}

/// Whether there was something.
fn poll_once(
    reading: &Sqlite,
    deleting: &Shared,
    client: &Client,
    queue: &str,
) -> Result<bool, Box<dyn std::error::Error>> {
    let batch = reading.poll(BATCH)?;
    let Some(last) = batch.last().map(|event| event.seq) else { return Ok(false) };
    let payloads = batch.iter().map(|Outboxed { payload, .. }| &payload[..]);
    client.publish_all(queue, &plain(), BATCH, payloads)?;
    deleting.delete(|sqlite| sqlite.delete_through(last))?;
    Ok(true)
}
