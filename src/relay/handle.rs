//! The handle of a running relay.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use crate::oneshot;
use crate::process::keep;
use crate::say::in_drop;
use crate::store::shared::owner::Owner;
use crate::store::shared::relays::RelayRequest;
use crate::store::shared::timed::{Timed, Waking};
use crate::store::shared::write_lock::WriteLock;
use crate::store::{RelayState, RelayStatus, Store};
use crate::time::Deadline;

/// Frees the relay's name when dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) store: Store,
    pub(crate) name: String,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.store.core().relays.remove(&self.name);
        self.store.core().forget_expiry_requests(&self.name);
        // The relay sets no pace any more. The writer thread takes over what the relay held back.
        self.store.core().nudge_writer();
    }
}

/// A running relay. Dropping the handle stops the relay and waits for 5 s at most.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// use std::time::Duration;
/// use onewrite::{Event, Relay};
/// let relay: Relay = store.relay("rabbit").spawn(broker.publisher())?;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?.wait_confirmed(Duration::from_secs(5))?;
/// assert_eq!(relay.stop(Duration::from_secs(5)).confirmed, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping a relay stops it"]
pub struct Relay {
    pub(super) owner: Owner,
    pub(super) write_lock: Arc<WriteLock>,
    /// The relay's thread.
    pub(super) thread: ThreadId,
    pub(super) name: String,
    pub(super) requests: crossbeam_channel::Sender<RelayRequest>,
    pub(super) waking: Waking,
    pub(super) ended: Option<oneshot::Receiver<StopReport>>,
    pub(super) status: Arc<Mutex<RelayStatus>>,
}

/// The report of a stopped relay.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// use std::time::Duration;
/// let report: onewrite::StopReport = relay.stop(Duration::from_secs(5));
/// assert!(report.clean);
/// assert_eq!((report.backlog_events, report.unknown), (0, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct StopReport {
    /// Whether every event in flight had an outcome and the progress was written.
    pub clean: bool,
    /// Events still to be published. They stay in the log.
    pub backlog_events: u64,
    /// Events in flight whose outcome is not known. They will be published again.
    pub unknown: usize,
    /// Confirms since the relay was started.
    pub confirmed: u64,
}

impl Relay {
    /// Pauses the relay until [`resume`](Self::resume): it publishes nothing new. Events in flight
    /// still get their outcome.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// # use std::time::Duration;
    /// # use onewrite::Event;
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// relay.pause();
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?; // writes go on
    /// assert_eq!(relay.stop(Duration::from_secs(5)).unknown, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pause(&self) {
        if self.owner.is_elsewhere() {
            return;
        }
        let _ = self.requests.send(RelayRequest::Pause);
    }

    /// Goes on after [`pause`](Self::pause).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// # use std::time::Duration;
    /// # use onewrite::Event;
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// relay.pause();
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?; // writes go on
    /// relay.resume();
    /// receipt.wait_confirmed(Duration::from_secs(5))?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn resume(&self) {
        if self.owner.is_elsewhere() {
            return;
        }
        let _ = self.requests.send(RelayRequest::Resume);
    }

    /// Returns the state and figures of the relay.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// let status = relay.status();
    /// assert_eq!(status.in_flight, 0);
    /// assert_eq!(status.last_fault, None);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn status(&self) -> RelayStatus {
        if self.owner.is_elsewhere() {
            let state = RelayState::Failed(self.owner.refusal().to_string());
            return RelayStatus { state, ..RelayStatus::default() };
        }
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops the relay within `timeout`, even if the broker hangs. Nothing is lost either way.
    ///
    /// Events in flight get their outcome if it comes in time. If the broker is away or blocks,
    /// there is nothing to wait for. `Duration::MAX` waits for ever.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use std::time::Duration;
    /// # use onewrite::Event;
    /// broker.go_down();
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// assert_eq!(relay.stop(Duration::from_secs(5)).backlog_events, 1); // it stays in the log
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(mut self, timeout: Duration) -> StopReport {
        self.end(timeout)
    }

    /// Stops the relay as [`stop`](Self::stop) does, without blocking a thread. Needs no runtime.
    ///
    /// Dropping the future before its first poll drops the relay, which blocks for 5 s at most.
    /// Dropping it later leaves the relay to end by itself.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use std::time::Duration;
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// # runtime.block_on(async {
    /// let report = relay.stop_async(Duration::from_secs(5)).await;
    /// assert!(report.clean);
    /// # });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn stop_async(mut self, timeout: Duration) -> StopReport {
        match self.ask_to_end(timeout) {
            Ok((ended, deadline)) => {
                let report = Timed::new(ended, deadline, &self.waking).await;
                self.reported(report)
            }
            Err(report) => report,
        }
    }

    fn end(&mut self, timeout: Duration) -> StopReport {
        match self.ask_to_end(timeout) {
            Ok((ended, deadline)) => self.reported(ended.wait_until(deadline)),
            Err(report) => report,
        }
    }

    /// Asks the thread to end. Returns the signal of its end and the deadline for the wait, or the
    /// report if no wait is possible.
    fn ask_to_end(
        &mut self,
        timeout: Duration,
    ) -> Result<(oneshot::Receiver<StopReport>, Deadline), StopReport> {
        let Some(ended) = self.ended.take() else { return Err(StopReport::default()) };
        if self.owner.is_elsewhere() {
            // The relay's thread is not in this process.
            keep(&self.requests);
            return Err(StopReport::default());
        }
        let deadline = Deadline::after(timeout);
        // The thread gives up a little earlier, so that its report comes in time.
        let margin = (timeout / 5).min(Duration::from_millis(200));
        let _ = self.requests.send(RelayRequest::Stop { deadline: deadline.earlier_by(margin) });
        if self.write_lock.must_not_wait() || self.thread == thread::current().id() {
            // The thread writes its progress before it ends, and that write would wait for this
            // very thread.
            in_drop(|| {
                tracing::warn!(relay = %self.name, "a thread that the relay waits for has stopped it; it ends by itself");
            });
            let unknown = self.status().in_flight;
            return Err(StopReport { unknown, ..StopReport::default() });
        }
        Ok((ended, deadline))
    }

    fn reported(&self, report: Option<Result<StopReport, oneshot::Abandoned>>) -> StopReport {
        if let Some(report) = report {
            return report.unwrap_or_default();
        }
        in_drop(
            || tracing::warn!(relay = %self.name, "the relay did not end by its deadline; it ends by itself"),
        );
        let status = self.status();
        StopReport { unknown: status.in_flight, confirmed: status.confirmed, ..StopReport::default() }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.end(Duration::from_secs(5));
    }
}
