//! The handle of a running projection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ThreadId};
use std::time::Duration;

use super::{CANCELLED, Handler};
use crate::error::{Error, Result};
use crate::oneshot;
use crate::say::in_drop;
use crate::store::shared::notify::Signal;
use crate::store::shared::projections::{OwnedTables, RunningProjection};
use crate::store::shared::timed::Timed;
use crate::store::{ProjectionState, ProjectionStatus, Store};
use crate::time::Deadline;

/// Frees the projection's name when dropped.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) store: Store,
    pub(super) name: String,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.store.core().projections.remove(&self.name);
    }
}

/// The requests of the handle to the worker.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) stop: AtomicBool,
    pub(crate) pause: AtomicBool,
    pub(crate) rebuild: AtomicBool,
}

/// A running projection. Dropping the handle stops the projection and waits for 5 s at most.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// let projection: onewrite::Projection = store.projection("counts").spawn(|_, _| Ok(()))?;
/// assert_eq!(projection.stop(Duration::from_secs(5)).position, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping a projection stops it"]
pub struct Projection {
    pub(super) store: Store,
    pub(super) name: String,
    pub(super) version: u32,
    pub(super) owned: OwnedTables,
    pub(super) handler: Arc<Handler>,
    pub(super) shared: Arc<RunningProjection>,
    pub(super) asked: Arc<Asked>,
    pub(super) signal: Arc<Signal>,
    pub(super) ended: Option<oneshot::Receiver<()>>,
    /// The projection's thread.
    pub(super) thread: ThreadId,
}

impl std::fmt::Debug for Projection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Projection").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Decides whether a wait is over.
struct Judge {
    name: String,
    asked: Arc<Asked>,
}

impl Judge {
    /// `done` is the result if the awaited state has come, or cannot come.
    fn judge(&self, status: &ProjectionStatus, done: Option<Result<(), String>>) -> Option<Result<()>> {
        let stands = |reason: String| {
            let (name, position) = (self.name.clone(), status.position);
            Err(Error::ProjectionStopped { name, position, reason })
        };
        if let Some(done) = done {
            return Some(done.or_else(stands));
        }
        let asked = self.asked.rebuild.load(Ordering::Acquire);
        let mends = asked || (status.rebuilding.is_some() && status.rebuild_stopped.is_none());
        match &status.state {
            // A rebuild that goes on may lead past the event.
            ProjectionState::Stopped { .. } if mends => None,
            ProjectionState::Stopped { seq, reason } => Some(stands(format!("event {seq}: {reason}"))),
            ProjectionState::Cancelled if !asked => Some(stands(CANCELLED.into())),
            ProjectionState::Failed(reason) => Some(stands(reason.clone())),
            ProjectionState::Ended => Some(stands("it was ended".into())),
            _ => None,
        }
    }
}

impl Projection {
    /// Returns the state and figures of the projection.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert_eq!(projection.status().failed_tries, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn status(&self) -> ProjectionStatus {
        let owner = &self.store.core().owner;
        if owner.is_elsewhere() {
            let state = ProjectionState::Failed(owner.refusal().to_string());
            return ProjectionStatus { state, ..ProjectionStatus::default() };
        }
        self.shared.status().clone()
    }

    /// Waits until event `seq` is done with: in the tables, let pass by the filter, or among the
    /// failures. Use it to read your own write.
    ///
    /// `Duration::MAX` waits for ever. `Duration::ZERO` does not wait: it returns `Ok` if the event
    /// is done with already.
    ///
    /// # Errors
    /// [`Error::ProjectionBehind`] if the event takes longer; [`Error::ProjectionStopped`] if the
    /// projection stands still before it.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::{Error, Event};
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// projection.wait_for_position(receipt.seqs()[0], Duration::from_secs(5))?;
    /// let early = projection.wait_for_position(receipt.seqs()[0] + 1, Duration::from_millis(10));
    /// assert!(matches!(early, Err(Error::ProjectionBehind { position: 1, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_for_position(&self, seq: u64, timeout: Duration) -> Result<()> {
        self.wait(timeout, |status| (status.position > seq).then_some(Ok(())))
    }

    /// Waits until the projection has done with all events that are in the log now, and no rebuild
    /// is under way.
    ///
    /// # Errors
    /// As [`wait_for_position`](Self::wait_for_position).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// projection.wait_until_live(Duration::from_secs(5))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_until_live(&self, timeout: Duration) -> Result<()> {
        self.store.core().owner.check()?;
        let asked = Arc::clone(&self.asked);
        let end = self.store.core().tail().next_seq;
        self.wait(timeout, move |status| {
            if asked.rebuild.load(Ordering::Acquire) {
                return None; // What is said of a rebuild is about an earlier one.
            }
            match &status.rebuild_stopped {
                Some(reason) => Some(Err(reason.clone())),
                None => (status.position >= end && status.rebuilding.is_none()).then_some(Ok(())),
            }
        })
    }

    /// Waits as [`wait_for_position`](Self::wait_for_position) does, without blocking a thread, for
    /// as long as it takes. It needs no runtime. For a limit, use your runtime's timeout.
    ///
    /// # Errors
    /// [`Error::ProjectionStopped`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use onewrite::Event;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// # runtime.block_on(async {
    /// let receipt = store.write_async(|tx| tx.append(Event::bytes("paid", "1").unpublished())).await?;
    /// projection.reached(receipt.seqs()[0]).await?;
    /// # Ok::<(), onewrite::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reached(&self, seq: u64) -> impl Future<Output = Result<()>> + Send + use<> {
        let (judge, owner) = (self.judge(), self.store.core().owner.clone());
        let reached =
            move |status: &ProjectionStatus| judge.judge(status, (status.position > seq).then_some(Ok(())));
        let until = self.shared.until(owner.clone(), reached);
        async move { until.await.unwrap_or_else(|| Err(owner.refusal())) }
    }

    fn judge(&self) -> Judge {
        Judge { name: self.name.clone(), asked: Arc::clone(&self.asked) }
    }

    fn wait(
        &self,
        timeout: Duration,
        done: impl Fn(&ProjectionStatus) -> Option<Result<(), String>>,
    ) -> Result<()> {
        self.store.core().owner.check()?;
        let judge = self.judge();
        let deadline = Deadline::after(timeout);
        self.shared.wait(deadline, |status| judge.judge(status, done(status))).unwrap_or_else(|| {
            let position = self.status().position;
            Err(Error::ProjectionBehind { name: self.name.clone(), position })
        })
    }

    /// Pauses the projection until [`resume`](Self::resume), once the batch in progress is applied.
    ///
    /// The tables stay as they are and may be read; the log keeps events that are not applied. A
    /// rebuild pauses too. The call does not block. A projection that is spawned anew is not
    /// paused.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::{Event, ProjectionState};
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// projection.pause();
    /// while projection.status().state != ProjectionState::Paused {
    ///     std::thread::yield_now();
    /// }
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?; // writes go on
    /// projection.resume();
    /// projection.wait_for_position(receipt.seqs()[0], Duration::from_secs(5))?;
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
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// projection.resume(); // it was not paused: nothing happens
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn resume(&self) {
        self.ask_for_pause(false);
    }

    fn ask_for_pause(&self, pause: bool) {
        if !self.store.core().owner.is_elsewhere() {
            self.asked.pause.store(pause, Ordering::Release);
            self.signal.notify();
        }
    }

    /// Rebuilds the tables from the beginning of the log.
    ///
    /// The rebuild writes new tables beside the present ones, which are kept up to date and read
    /// meanwhile. Once at most a batch is missing, one transaction applies the rest and swaps the
    /// tables. That transaction takes more if the rebuild does not gain on the writers: see
    /// [`batch`](crate::ProjectionBuilder::batch). So the rebuild ends even beside writers that
    /// never pause. It goes on in the background, also after a restart.
    ///
    /// **Cost.** The rebuild reads the whole log, and takes the space of the tables a second time.
    ///
    /// **Limit.** Events that the log has let go are not in the new tables. Such an event had no
    /// stream and was trimmed after its confirm, or its stream was truncated. Keep the log for as
    /// long as it has to be read ([`Retention`](crate::Retention)).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// projection.rebuild();
    /// projection.wait_until_live(Duration::from_secs(5))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rebuild(&self) {
        if self.store.core().owner.is_elsewhere() {
            return;
        }
        self.asked.rebuild.store(true, Ordering::Release);
        self.signal.notify();
    }

    /// Cancels the rebuild that is under way. Returns whether there was one. See
    /// [`Store::cancel_rebuild`].
    ///
    /// # Errors
    /// As [`Store::cancel_rebuild`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(!projection.cancel_rebuild()?); // none is under way
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cancel_rebuild(&self) -> Result<bool> {
        self.store.cancel_rebuild(&self.name)
    }

    /// Stops the projection within `timeout`. Events applied by then are durable with their
    /// position.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::ProjectionState;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert_eq!(projection.stop(Duration::from_secs(5)).state, ProjectionState::Ended);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(mut self, timeout: Duration) -> ProjectionStatus {
        self.end(timeout);
        self.status()
    }

    /// Stops the projection as [`stop`](Self::stop) does, without blocking a thread. Needs no
    /// runtime.
    ///
    /// Dropping the future before its first poll drops the projection, which blocks for 5 s at most.
    /// Dropping it later leaves the projection to end by itself.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use std::time::Duration;
    /// use onewrite::ProjectionState;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// # runtime.block_on(async {
    /// assert_eq!(projection.stop_async(Duration::from_secs(5)).await.state, ProjectionState::Ended);
    /// # });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn stop_async(mut self, timeout: Duration) -> ProjectionStatus {
        if let Some(ended) = self.ask_to_end() {
            let deadline = Deadline::after(timeout);
            let ended = Timed::new(ended, deadline, &self.store.core().waking()).await;
            self.ended_or_not(ended.is_some());
        }
        self.status()
    }

    fn end(&mut self, timeout: Duration) {
        if let Some(ended) = self.ask_to_end() {
            self.ended_or_not(ended.wait_until(Deadline::after(timeout)).is_some());
        }
    }

    /// Asks the thread to end. Returns the signal of its end.
    fn ask_to_end(&mut self) -> Option<oneshot::Receiver<()>> {
        let ended = self.ended.take()?;
        if self.store.core().owner.is_elsewhere() {
            // The projection's thread is not in this process.
            return None;
        }
        self.asked.stop.store(true, Ordering::Release);
        self.signal.notify();
        if self.store.core().write_lock.must_not_wait() || self.thread == thread::current().id() {
            // The projection waits for its writes before it ends, and the writes wait for this very
            // thread.
            in_drop(|| {
                tracing::warn!(projection = %self.name, "a thread that the projection waits for has stopped it; it ends by itself");
            });
            return None;
        }
        Some(ended)
    }

    fn ended_or_not(&self, ended: bool) {
        if !ended {
            in_drop(
                || tracing::warn!(projection = %self.name, "the projection did not end by its deadline; it ends by itself"),
            );
        }
    }
}

impl Drop for Projection {
    fn drop(&mut self) {
        self.end(Duration::from_secs(5));
    }
}
