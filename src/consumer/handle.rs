//! A running consumer as the application sees it: its figures, and how to stop it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use crossbeam_channel::Sender;

use crate::message::Fault;
use crate::oneshot;
use crate::process::keep;
use crate::say::in_drop;
use crate::store::shared::owner::Owner;
use crate::store::shared::timed::{Timed, Waking};
use crate::store::shared::write_lock::WriteLock;
use crate::time::Deadline;

/// The reason why a consumer takes nothing from its queue: [`ConsumerStatus::waits_for`].
///
/// ```
/// use onewrite::ConsumerWait;
/// assert_eq!(ConsumerWait::Quarantine.to_string(), "room in its quarantine");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsumerWait {
    /// Room in its [quarantine](crate::Store::rejected), which holds as many rejected deliveries as
    /// [`rejected_max`](crate::ConsumerBuilder::rejected_max) allows.
    Quarantine,
    /// Free space on the disk of its store. Less is free than
    /// [`free_space_min`](crate::ConsumerBuilder::free_space_min) keeps for the application.
    FreeSpace,
}

impl fmt::Display for ConsumerWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quarantine => "room in its quarantine",
            Self::FreeSpace => "free space on the disk of its store",
        })
    }
}

/// The figures of a consumer since it began.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
/// let stats: onewrite::ConsumerStatus = consumer.stop(std::time::Duration::from_secs(5));
/// assert_eq!((stats.applied, stats.rejected), (0, 0));
/// assert_eq!(stats.failed, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ConsumerStatus {
    /// Deliveries whose effects were committed.
    pub applied: u64,
    /// Deliveries recognised as repeats and only acknowledged.
    pub repeated: u64,
    /// Tries that failed and were deferred.
    pub retried: u64,
    /// Deliveries rejected, to any place.
    pub rejected: u64,
    /// Deliveries put durably into the consumer's own quarantine.
    pub quarantined: u64,
    /// Deliveries whose number or id was seen before with another message. They also count as
    /// rejected.
    pub conflicts: u64,
    /// Deliveries from quarantine whose effects were committed. They also count as applied.
    pub redriven: u64,
    /// Deliveries that now wait for a gap in their lane.
    pub held: u64,
    /// Deliveries that now wait in the store for their next try or for a gap. The broker no longer
    /// holds them.
    pub parked: u64,
    /// Bytes that the parked deliveries take.
    pub parked_bytes: u64,
    /// Rejected deliveries that made way for later ones:
    /// [`RejectedFull::DropOldest`](crate::RejectedFull::DropOldest).
    pub dropped: u64,
    /// Whether the consumer is [paused](Consumer::pause).
    pub paused: bool,
    /// The room that the consumer waits for, if it takes nothing from its queue for lack of room.
    pub waits_for: Option<ConsumerWait>,
    /// How often the consumer began to wait for room.
    pub waits: u64,
    /// How often the connection was set up.
    pub connections: u64,
    /// Why there is no connection now.
    pub disconnected: Option<Fault>,
    /// Why the consumer can no longer do anything.
    pub failed: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) applied: AtomicU64,
    pub(super) repeated: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) rejected: AtomicU64,
    pub(super) quarantined: AtomicU64,
    pub(super) conflicts: AtomicU64,
    pub(super) redriven: AtomicU64,
    pub(super) held: AtomicU64,
    pub(super) parked: AtomicU64,
    pub(super) parked_bytes: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) paused: AtomicBool,
    pub(super) waits_for: Mutex<Option<ConsumerWait>>,
    pub(super) connections: AtomicU64,
    pub(super) disconnected: Mutex<Option<Fault>>,
    pub(super) failed: Mutex<Option<String>>,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A running consumer. Dropping the handle stops the consumer and waits for 5 s at most.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// use std::time::Duration;
/// use onewrite::Consumer;
/// let consumer: Consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
/// assert_eq!(consumer.stop(Duration::from_secs(5)).failed, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping a consumer stops it"]
pub struct Consumer {
    pub(super) owner: Owner,
    pub(super) write_lock: Arc<WriteLock>,
    /// The consumer's thread.
    pub(super) thread: ThreadId,
    pub(super) scope: String,
    pub(super) stop: Sender<Deadline>,
    /// Makes the consumer's thread look for changes.
    pub(super) signal: Sender<()>,
    pub(super) waking: Waking,
    pub(super) ended: Option<oneshot::Receiver<()>>,
    pub(super) shared: Arc<Shared>,
}

impl Consumer {
    /// Returns the state and figures of the consumer.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// assert_eq!(consumer.status().applied, 0);
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn status(&self) -> ConsumerStatus {
        if self.owner.is_elsewhere() {
            return ConsumerStatus {
                failed: Some(self.owner.refusal().to_string()),
                ..ConsumerStatus::default()
            };
        }
        let shared = &self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConsumerStatus {
            applied: get(&shared.applied),
            repeated: get(&shared.repeated),
            retried: get(&shared.retried),
            rejected: get(&shared.rejected),
            quarantined: get(&shared.quarantined),
            conflicts: get(&shared.conflicts),
            redriven: get(&shared.redriven),
            held: get(&shared.held),
            parked: get(&shared.parked),
            parked_bytes: get(&shared.parked_bytes),
            dropped: get(&shared.dropped),
            paused: shared.paused.load(Ordering::Acquire),
            waits_for: *shared.waits_for.lock().unwrap_or_else(PoisonError::into_inner),
            waits: get(&shared.waits),
            connections: get(&shared.connections),
            disconnected: shared.disconnected.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            failed: shared.failed.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Pauses the consumer until [`resume`](Self::resume), once the batch in progress is applied.
    ///
    /// A paused consumer hands nothing to the handler. Deliveries that come meanwhile, within
    /// the prefetch, stay unsettled. The call does not block. A consumer that is spawned anew is
    /// not paused.
    ///
    /// **Limit.** RabbitMQ closes the channel of a consumer that leaves deliveries unsettled for longer
    /// than `consumer_timeout` (30 minutes by default). A longer pause then costs a connection each time.
    /// The consumer parks deliveries in the store that a quorum queue might drop. Stop the consumer
    /// instead if you need a pause of hours.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// consumer.pause();
    /// assert!(consumer.status().paused);
    /// consumer.resume();
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pause(&self) {
        self.ask_for_pause(true);
    }

    /// Goes on after [`pause`](Self::pause).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// consumer.pause();
    /// consumer.resume();
    /// assert!(!consumer.status().paused);
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn resume(&self) {
        self.ask_for_pause(false);
    }

    fn ask_for_pause(&self, pause: bool) {
        if !self.owner.is_elsewhere() {
            self.shared.paused.store(pause, Ordering::Release);
            // A full channel has notified the thread already.
            let _ = self.signal.try_send(());
        }
    }

    /// Stops the consumer within `timeout`. Applied deliveries are acknowledged; the rest go back
    /// to the broker.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use std::time::Duration;
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// let stats = consumer.stop(Duration::from_secs(5));
    /// assert_eq!(stats.rejected, 0);
    /// assert_eq!(broker.unsettled_len("credit"), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(mut self, timeout: Duration) -> ConsumerStatus {
        self.end(timeout);
        self.status()
    }

    /// Stops the consumer as [`stop`](Self::stop) does, without blocking a thread. Needs no
    /// runtime.
    ///
    /// Dropping the future before its first poll drops the consumer, which blocks for 5 s at most.
    /// Dropping it later leaves the consumer to end by itself.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use std::time::Duration;
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # runtime.block_on(async {
    /// let status = consumer.stop_async(Duration::from_secs(5)).await;
    /// assert_eq!(status.failed, None);
    /// # });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn stop_async(mut self, timeout: Duration) -> ConsumerStatus {
        if let Some((ended, deadline)) = self.ask_to_end(timeout) {
            let ended = Timed::new(ended, deadline, &self.waking).await;
            self.ended_or_not(ended.is_some());
        }
        self.status()
    }

    fn end(&mut self, timeout: Duration) {
        if let Some((ended, deadline)) = self.ask_to_end(timeout) {
            self.ended_or_not(ended.wait_until(deadline).is_some());
        }
    }

    /// Asks the thread to end. Returns the signal of its end, and the deadline for the wait.
    fn ask_to_end(&mut self, timeout: Duration) -> Option<(oneshot::Receiver<()>, Deadline)> {
        let ended = self.ended.take()?;
        if self.owner.is_elsewhere() {
            // The consumer's thread is not in this process.
            keep(&self.stop);
            return None;
        }
        let deadline = Deadline::after(timeout);
        let _ = self.stop.try_send(deadline);
        if self.write_lock.must_not_wait() || self.thread == thread::current().id() {
            // The consumer waits for its writes before it ends, and the writes wait for this very
            // thread.
            in_drop(|| {
                tracing::warn!(consumer = %self.scope, "a thread that the consumer waits for has stopped it; it ends by itself");
            });
            return None;
        }
        Some((ended, deadline))
    }

    fn ended_or_not(&self, ended: bool) {
        if !ended {
            in_drop(
                || tracing::warn!(consumer = %self.scope, "the consumer did not end by its deadline; it ends by itself"),
            );
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.end(Duration::from_secs(5));
    }
}
