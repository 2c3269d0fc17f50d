//! A whole side at work: writers who commit, somebody who publishes, and the consumer at the end.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use onewrite::broker::RabbitMq;
use onewrite::redb::TableDefinition;
use onewrite::{Event, Relay, Store};

use crate::node::Node;
use crate::peer::disk::Disk;
use crate::peer::lapin::{Client, Kind, plain};
use crate::peer::poller::Poller;
use crate::peer::shared::Shared;
use crate::peer::sqlite::Sqlite;
use crate::tap::{PAYLOAD_BYTES, Stamp, Tap};

pub(crate) const WRITERS: usize = 16;

const QUEUE: &str = "versus.flow";
const STATE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("state");
const ROW: [u8; 100] = [7; 100];
/// Events that may be written and not delivered: beyond it writers wait. It bounds every side alike.
const BACKLOG_MAX: u64 = 10_000;
/// What all that is under way may need to arrive.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How threads share SQLite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// One connection behind a mutex.
    Mutex,
    /// A connection for each.
    Each,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The store and its relay.
    Ours,
    /// An outbox table that is polled.
    Polled(Duration, Sharing),
    /// `fdatasync` of a page and a bare publish on the same thread: no store at all.
    Limit,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours => f.pad("onewrite"),
            Self::Polled(interval, _) => f.pad(&format!("SQLite, {} ms", interval.as_millis())),
            Self::Limit => f.pad("fsync + publish"),
        }
    }
}

type Writing = Box<dyn FnMut(u64, &[u8; PAYLOAD_BYTES]) -> Result<(), Box<dyn Error>> + Send>;

enum Publishing {
    Ours(Store, Relay),
    Polled(Poller),
    Limit,
}

/// A side that runs.
pub(crate) struct Flow {
    writers: Vec<Writing>,
    publishing: Publishing,
    pub(crate) tap: Tap,
    folder: tempfile::TempDir,
}

impl Flow {
    pub(crate) fn start(
        side: Side,
        writers: usize,
        node: &Node,
        folder: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        let folder = tempfile::tempdir_in(folder)?;
        let client = Client::connect(&node.url)?;
        client.renew(QUEUE, Kind::Classic)?;
        client.close()?;
        let tap = Tap::start(&node.url, QUEUE)?;
        let (writers, publishing) = match side {
            Side::Ours => ours(folder.path(), node, writers)?,
            Side::Polled(interval, sharing) => {
                polled(&folder.path().join("a.sqlite"), node, writers, interval, sharing)?
            }
            Side::Limit => (limit(folder.path(), node, writers)?, Publishing::Limit),
        };
        Ok(Self { writers, publishing, tap, folder })
    }

    /// How often whoever polls has found nothing, and waited for its interval.
    pub(crate) fn rests(&self) -> Option<u64> {
        match &self.publishing {
            Publishing::Polled(poller) => Some(poller.rests()),
            _ => None,
        }
    }

    /// The store, if it is ours.
    pub(crate) fn store(&self) -> Option<&Store> {
        match &self.publishing {
            Publishing::Ours(store, _) => Some(store),
            _ => None,
        }
    }

    /// Lets all writers write at their pace while `watch` looks on; then waits until everything has been delivered. An error if it
    /// is not, or not in order, or more comes than was written.
    pub(crate) fn run<T>(
        mut self,
        pace: Pace,
        watch: impl FnOnce(&Self) -> Result<T, Box<dyn Error>>,
    ) -> Result<T, Box<dyn Error>> {
        let gate = Gate { written: AtomicU64::new(0), over: AtomicBool::new(false) };
        let writers = std::mem::take(&mut self.writers);
        let (tap, for_writers) = (&self.tap, &gate);
        let watched = std::thread::scope(|scope| {
            let threads: Vec<_> = writers
                .into_iter()
                .enumerate()
                .map(|(number, writing)| {
                    scope.spawn(move || {
                        let written = write(number, writing, pace, for_writers, tap);
                        written.map_err(|error| format!("writer {number}: {error}"))
                    })
                })
                .collect();
            let watched = watch(&self).map_err(|error| error.to_string());
            gate.over.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().map_err(|_| "a writer panicked")??;
            }
            watched
        });
        self.end(gate.written.into_inner(), watched)
    }

    /// What went wrong is reported by who knows most: the consumer, the publisher, the writers.
    fn end<T>(self, written: u64, watched: Result<T, String>) -> Result<T, Box<dyn Error>> {
        let all = watched.is_ok() && self.tap.wait_for(written, TIMEOUT);
        let delivered = self.tap.delivered();
        let Self { tap, publishing, folder, .. } = self;
        let published = match publishing {
            Publishing::Ours(store, relay) => {
                let report = relay.stop(Duration::from_secs(10));
                let fault = (report.backlog_events > 0).then(|| format!("the relay has stopped: {report:?}"));
                fault.map_or(Ok(()), |fault| Err(fault.into())).and(store.close().map_err(Into::into))
            }
            Publishing::Polled(poller) => poller.stop(),
            Publishing::Limit => Ok(()),
        };
        tap.stop()?;
        published?;
        let watched = watched?;
        if !all || delivered != written {
            return Err(format!("{written} events were written, {delivered} delivered").into());
        }
        folder.close()?;
        Ok(watched)
    }
}

fn ours(folder: &Path, node: &Node, writers: usize) -> Result<(Vec<Writing>, Publishing), Box<dyn Error>> {
    let store = Store::open(folder.join("a.redb"))?;
    let relay = store.relay("versus").spawn(RabbitMq::new(&node.url)?)?;
    let end = Instant::now() + TIMEOUT;
    while !matches!(relay.status().state, onewrite::RelayState::Connected) {
        if Instant::now() > end {
            return Err(format!("the relay does not connect: {:?}", relay.status()).into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let writing = |_| -> Writing {
        let store = store.clone();
        Box::new(move |id, payload| {
            let payload = *payload;
            store.write(move |tx| {
                tx.open_table(STATE)?.insert(id, &ROW[..])?;
                tx.append(Event::bytes("payment.completed", payload).to("", QUEUE))
            })?;
            Ok(())
        })
    };
    Ok(((0..writers).map(writing).collect(), Publishing::Ours(store.clone(), relay)))
}

fn polled(
    path: &Path,
    node: &Node,
    writers: usize,
    interval: Duration,
    sharing: Sharing,
) -> Result<(Vec<Writing>, Publishing), Box<dyn Error>> {
    let shared = Arc::new(Shared::new(Sqlite::open(path)?));
    let connection = || match sharing {
        Sharing::Mutex => Ok(Arc::clone(&shared)),
        Sharing::Each => Sqlite::open(path).map(|sqlite| Arc::new(Shared::new(sqlite))),
    };
    let mut writing = Vec::with_capacity(writers);
    for _ in 0..writers {
        let sqlite = connection()?;
        writing.push(Box::new(move |id, payload: &[u8; PAYLOAD_BYTES]| {
            Ok(sqlite.write(|sqlite| sqlite.write(id, &ROW, QUEUE, payload))?)
        }) as Writing);
    }
    let poller = Poller::start(path, connection()?, &node.url, QUEUE, interval)?;
    Ok((writing, Publishing::Polled(poller)))
}

fn limit(folder: &Path, node: &Node, writers: usize) -> Result<Vec<Writing>, Box<dyn Error>> {
    let mut writing = Vec::with_capacity(writers);
    for number in 0..writers {
        let disk = Disk::create(&folder.join(number.to_string()))?;
        let client = Client::connect(&node.url)?;
        let properties = plain();
        writing.push(Box::new(move |id, payload: &[u8; PAYLOAD_BYTES]| {
            disk.write(id, &ROW, payload)?;
            client.publish(QUEUE, &properties, payload)
        }) as Writing);
    }
    Ok(writing)
}

impl Pace {
    /// So many per second of all writers together.
    pub(crate) fn per_second(rate: f64, writers: usize) -> Self {
        Self::Every(Duration::from_secs_f64(writers as f64 / rate))
    }
}

/// When a writer writes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pace {
    /// As fast as it can.
    Full,
    /// Each writer every so often, at uneven distances.
    Every(Duration),
}

struct Gate {
    written: AtomicU64,
    over: AtomicBool,
}

fn write(
    writer: usize,
    mut writing: Writing,
    pace: Pace,
    gate: &Gate,
    tap: &Tap,
) -> Result<(), Box<dyn Error>> {
    let mut beats = Beats::new(writer, pace);
    for number in 0.. {
        let at = beats.wait();
        while gate.written.load(Ordering::Relaxed) > tap.delivered() + BACKLOG_MAX && !gate.is_over() {
            std::thread::sleep(Duration::from_micros(500));
        }
        if gate.is_over() {
            break;
        }
        // No two writers have an id in common.
        writing(number << 8 | writer as u64, &Stamp { writer, number, at }.payload())?;
        gate.written.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

impl Gate {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// The moments at which one writer writes.
struct Beats {
    due: Instant,
    mean: Option<Duration>,
    random: u64,
}

impl Beats {
    fn new(writer: usize, pace: Pace) -> Self {
        let mean = match pace {
            Pace::Full => None,
            Pace::Every(mean) => Some(mean),
        };
        Self { due: Instant::now(), mean, random: writer as u64 + 1 }
    }

    /// The moment from which this event counts: its due time if the writer is late, else when it woke up.
    fn wait(&mut self) -> Instant {
        let Some(mean) = self.mean else { return Instant::now() };
        // Half to one and a half of the mean: nothing beats in time with whoever polls.
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.due += mean.mul_f64(0.5 + (self.random >> 40) as f64 / (1 << 24) as f64);
        match self.due.checked_duration_since(Instant::now()) {
            Some(wait) => {
                std::thread::sleep(wait);
                Instant::now()
            }
            None => self.due,
        }
    }
}
