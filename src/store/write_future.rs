//! The future of `Store::write_async`.

use std::sync::Arc;
use std::task::{Context, Poll};

use crossbeam_channel::TrySendError;

use super::alarms::Alarm;
use super::groups;
use super::handle::Store;
use super::receipt::Receipt;
use super::write_wait::Wait;
use super::writer::Job;
use crate::error::{Error, Result};
use crate::oneshot;

/// A write on its way. See [`Store::write_async`].
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
    pub(super) store: Store,
    pub(super) job: Option<Job>,
    pub(super) answer: oneshot::Receiver<Result<Receipt<T>>>,
    pub(super) wait: Wait,
    pub(super) alarm: Option<Alarm>,
}

impl<T> WriteFuture<T> {
    /// It is not done yet. Fails once the limit has passed; else it is woken when there is something to do about the wait.
    fn pending(&mut self, context: &mut Context<'_>) -> Result<()> {
        let core = Arc::clone(self.store.core());
        let is_alone = || core.turns.is_free() && core.queue.company() <= 1;
        if !self.wait.has_begun() && !self.wait.has_limit() && is_alone() {
            return Ok(());
        }
        if self.wait.is_over() {
            if self.job.take().is_some() || self.answer.withdraw() {
                return Err(core.write_timeout(&mut self.wait));
            }
            self.wait.forget_limit();
        }
        core.tell_wait(&mut self.wait);
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
            core.refuse_inside("Store::write_async")?;
            self.store.ready()?;
            // Ask to be woken before trying: room may appear between the two.
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
        // Queued before a fork, it has no answer in the forked process.
        self.store.core().owner.check()?;
        let answer = std::pin::Pin::new(&mut self.answer).poll(context);
        if answer.is_pending() {
            self.pending(context)?;
        }
        answer.map(|answer| answer.unwrap_or_else(|oneshot::Abandoned| Err(self.store.gone())))
    }
}
