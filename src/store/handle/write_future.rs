//! The future of `Store::write_async`.

use std::panic::Location;
use std::sync::Arc;
use std::task::{Context, Poll};

use crossbeam_channel::TrySendError;

use crate::error::{Error, Result};
use crate::oneshot;
use crate::store::handle::Store;
use crate::store::shared::alarms::Alarm;
use crate::store::shared::write_wait::Wait;
use crate::store::transaction::Transaction;
use crate::store::transaction::receipt::Receipt;
use crate::store::writer::groups;
use crate::store::writer::thread::Job;

/// A pending write. See [`Store::write_async`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::WriteFuture;
/// let write: WriteFuture<u32> = store.write_async(|_| Ok(7)); // nothing happens before it is polled
/// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
/// assert_eq!(runtime.block_on(write)?.into_value(), 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a future does nothing until it is polled"]
pub struct WriteFuture<T> {
    pub(in crate::store) store: Store,
    pub(in crate::store) job: Option<Job>,
    pub(in crate::store) answer: oneshot::Receiver<Result<Receipt<T>>>,
    pub(in crate::store) wait: Wait,
    pub(in crate::store) alarm: Option<Alarm>,
}

impl<T> WriteFuture<T> {
    /// Handles a poll while the write is not done. Fails once the limit has passed. Otherwise sets
    /// an alarm, which wakes the future when the wait must be reported or has reached its limit.
    fn pending(&mut self, context: &mut Context<'_>) -> Result<()> {
        let core = Arc::clone(self.store.core());
        let is_alone = || core.write_lock.is_free() && core.queue.company() <= 1;
        if !self.wait.has_begun() && !self.wait.has_limit() && is_alone() {
            return Ok(());
        }
        if self.wait.is_over() {
            if self.job.take().is_some() || self.answer.withdraw() {
                return Err(core.write_timeout(&mut self.wait));
            }
            self.wait.forget_limit();
        }
        core.report_wait(&mut self.wait);
        let at = self.wait.next();
        let set = core.alarms.set(&mut self.alarm, at, context.waker().clone());
        set.map_err(|source| Error::Thread { what: "alarms", cause: source })
    }
}

/// A future that is dropped needs no alarm any more.
impl<T> Drop for WriteFuture<T> {
    fn drop(&mut self) {
        let core = self.store.core();
        if self.alarm.is_some() && !core.owner.is_elsewhere() {
            core.alarms.cancel(self.alarm.take());
        }
    }
}

impl<T> std::fmt::Debug for WriteFuture<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteFuture").field("queued", &self.job.is_none()).finish_non_exhaustive()
    }
}

impl<T> Future for WriteFuture<T> {
    type Output = Result<Receipt<T>>;

    fn poll(mut self: std::pin::Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(job) = self.job.take() {
            let core = Arc::clone(self.store.core());
            core.refuse_reentrant("Store::write_async")?;
            self.store.ready()?;
            // Register for the wake-up before trying: room may appear between the two.
            core.await_queue_room(context.waker());
            core.queue.enter();
            let sent = match job {
                // As in `enqueue`.
                Job::Write(closure) if core.queue.is_writer() => {
                    groups::run_alone(&core, closure, &mut self.wait);
                    Ok(())
                }
                job => self.store.shared.jobs.try_send(job),
            };
            match sent {
                Ok(()) => {}
                Err(TrySendError::Full(job)) => {
                    core.queue.leave(1);
                    self.job = Some(job);
                    self.pending(context)?;
                    return Poll::Pending;
                }
                Err(TrySendError::Disconnected(_)) => {
                    core.queue.leave(1);
                    return Poll::Ready(Err(self.store.gone()));
                }
            }
        }
        // In a forked process, a write that was queued before the fork gets no answer.
        self.store.core().owner.check()?;
        let answer = std::pin::Pin::new(&mut self.answer).poll(context);
        if answer.is_pending() {
            self.pending(context)?;
        }
        answer.map(|answer| answer.unwrap_or_else(|oneshot::Abandoned| Err(self.store.gone())))
    }
}

impl Store {
    /// As [`write`](Self::write), as a future. The future needs no runtime: poll it from any
    /// executor.
    ///
    /// The store logs a long wait, and limits the wait, as with `write`. A thread of the store
    /// wakes the future for that.
    ///
    /// The first poll queues the closure. Dropping the future after that does not cancel the write.
    /// To make a retry safe, give the request an id ([`write_once`](Self::write_once)), or give the
    /// event one. The waiting policy of a backlog quota does not apply: `append` fails at once.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
    /// let receipt = store.write_async(|tx| tx.append(Event::bytes("paid", "1").to("", "payments"))).await?;
    /// assert_eq!(receipt.seqs(), [0]);
    /// # Ok::<(), onewrite::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn write_async<T, F>(&self, write: F) -> WriteFuture<T>
    where
        F: FnMut(&Transaction) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let wait = self.wait_at("Store::write_async", Location::caller());
        let (closure, answer) = Self::closure(write, wait.purpose.clone());
        WriteFuture { store: self.clone(), job: Some(Job::Write(closure)), answer, wait, alarm: None }
    }
}
