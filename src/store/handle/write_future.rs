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
    pub(in crate::store) store: Store,
    pub(in crate::store) job: Option<Job>,
    pub(in crate::store) answer: oneshot::Receiver<Result<Receipt<T>>>,
    pub(in crate::store) wait: Wait,
    pub(in crate::store) alarm: Option<Alarm>,
}

impl<T> WriteFuture<T> {
    /// It is not done yet. Fails once the limit has passed; else it is woken when there is something to do about the wait.
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

impl Store {
    /// As [`write`](Self::write), as a future. It needs no runtime: poll it from any executor.
    ///
    /// A wait that takes long is logged, and limited, as that of `write`; a thread of the store's own wakes the future for it.
    ///
    /// The closure is queued at the first poll. Dropping the future after that does not take it back: give the
    /// request an id ([`write_once`](Self::write_once)) or the event one, and a retry is safe. A backlog quota's
    /// waiting policy does not apply; `append` fails at once.
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
