//! The handle of an open store: writing, reading, closing.

pub(crate) mod cancelled;
pub(crate) mod end_capture;
pub(crate) mod jumps;
pub(crate) mod once;
pub(crate) mod write_future;

use std::panic::Location;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{SendTimeoutError, Sender, TrySendError};

use crate::error::{Error, Result};
use crate::event::uuid_text;
use crate::oneshot;
use crate::process::keep;
use crate::say::in_drop;
use crate::store::handle::jumps::Jumps;
use crate::store::read::snapshot::Snapshot;
use crate::store::shared::core::Core;
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::store::transaction::Transaction;
use crate::store::transaction::receipt::Receipt;
use crate::store::transaction::write::{Closure, Write};
use crate::store::writer::groups;
use crate::store::writer::thread::Job;
use crate::time::Deadline;

/// One redb file that holds a service's state and its event log. A handle is cheap to clone, and
/// one process owns the file.
///
/// **Fork.** The process that opened the store owns it. In a process that was forked from the
/// owner, a call on the store, or on anything that came from the store, fails with
/// [`Error::Forked`]. Dropping a handle in the forked process does nothing: that process keeps the
/// memory and the descriptors until it ends or runs another program. An iterator, and a write
/// closure that forks, may go on for up to 64 steps before the error. Nothing of these steps is
/// ever written. Objects of redb itself (tables, ranges, guards) do not check the process: do not
/// use them across a fork. The file stays locked until the owner has closed it, or until the owner
/// and the forked process have both ended.
///
/// ```
/// use onewrite::{Event, Store, redb::{ReadableTable, TableDefinition}};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// # let folder = tempfile::tempdir()?;
/// let store = Store::open(folder.path().join("payments.redb"))?;
/// let receipt = store.write(|tx| {
///     let mut accounts = tx.open_table(ACCOUNTS)?;
///     let balance = accounts.get("alice")?.map_or(0, |row| row.value());
///     accounts.insert("alice", balance + 100)?;
///     tx.append(Event::json("payment.completed", &100)?.key("alice").to("payments", "payment.completed"))?;
///     Ok(balance + 100)
/// })?;
/// assert_eq!(receipt.value(), &100);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Store {
    pub(in crate::store) shared: Arc<Shared>,
}

/// The shared part of all handles. Ends the writer thread when the last handle is dropped.
#[derive(Debug)]
pub(in crate::store) struct Shared {
    pub(in crate::store) core: Arc<Core>,
    pub(in crate::store) jobs: Sender<Job>,
    /// The writer thread, and the signal that the thread has ended.
    pub(in crate::store) writer: std::sync::Mutex<Option<(JoinHandle<()>, oneshot::Receiver<()>)>>,
    /// Keeps the subscription at the clock.
    pub(in crate::store) _jumps: Jumps,
}

impl Store {
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.shared.core
    }

    /// The store's id, which its messages carry in the header
    /// [`onewrite-store`](crate::wire::STORE). The id is chosen when the file is created, and never
    /// changes. A copy of the file has the same id.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.id().len(), 36); // a UUID
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn id(&self) -> String {
        uuid_text(self.core().identity.store_id).into()
    }

    /// The file's path: the path given to `open`, made absolute with the working directory of that
    /// time.
    ///
    /// The process may change its working directory later. `open` followed symbolic links to
    /// folders once; the path still shows them as they were given.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.path(), folder.path().join("a.redb"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.core().path
    }

    /// Runs `write` in a transaction and commits it, together with other waiting writes, with one
    /// fsync.
    ///
    /// When this call returns `Ok`, the closure's changes and events are durable, together. On
    /// `Err` none of them is, except with [`Error::CommitUnknown`]. Closures run one after another,
    /// in order of arrival. They run on the store's writer thread, or on the caller's thread if
    /// there is no other writer. **A closure may run more than once**: when another closure of its
    /// group fails, the store rolls the group back and runs it again without that closure. So a
    /// closure must have no effects outside the transaction. A closure that fails or panics leaves
    /// no trace and harms no other closure.
    ///
    /// **What a closure must not wait for.** While a closure runs, all other writes of the store
    /// wait. So a closure must not wait for anything that needs a write to this store:
    ///
    /// - a thread, task or channel whose other end writes;
    /// - a relay, consumer or projection of this store;
    /// - a write to another store whose closures write to this store.
    ///
    /// A wait that the store can detect fails at once. For the rest, the store logs what holds the
    /// write transaction when a caller has waited for a second.
    /// [`StoreBuilder::write_wait_max`](crate::StoreBuilder::write_wait_max) limits the wait.
    ///
    /// # Errors
    /// - the closure's own error ([`Error::app`] wraps the application's);
    /// - [`Error::Panicked`], [`Error::Poisoned`] and [`Error::CommitUnknown`];
    /// - [`Error::WriteTimeout`] if a limit is set;
    /// - [`Error::InsideTransaction`] if the call comes from inside a transaction of the same
    ///   store.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Error, Event};
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// assert_eq!(receipt.seqs(), [0]); // durable
    ///
    /// let refused = store.write(|tx| {
    ///     tx.append(Event::bytes("paid", "2").to("", "payments"))?;
    ///     Err::<(), _>(Error::app("insufficient funds"))
    /// });
    /// assert!(refused.is_err());
    /// assert_eq!(store.stats()?.next_seq, 1); // no trace of the second
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn write<T, F>(&self, write: F) -> Result<Receipt<T>>
    where
        F: FnMut(&Transaction) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        self.core().refuse_reentrant("Store::write")?;
        self.ready()?;
        let mut wait = self.wait_at("Store::write", Location::caller());
        self.core().wait_for_room(&wait.purpose);
        let (closure, answer) = Self::closure(write, wait.purpose.clone());
        self.run_or_enqueue(closure, &mut wait)?;
        self.await_answer(&answer, &mut wait)
    }

    /// The wait of a call of the application.
    fn wait_at(&self, call: &'static str, at: &'static Location<'static>) -> Wait {
        Wait::new(Purpose::Call(call, at), self.core().settings.write_wait_max)
    }

    /// Waits for the answer of the writer thread, and logs a long wait.
    fn await_answer<T>(&self, answer: &oneshot::Receiver<Result<T>>, wait: &mut Wait) -> Result<T> {
        if let Some(answer) = answer.try_take() {
            return answer.unwrap_or_else(|oneshot::Abandoned| Err(self.gone()));
        }
        loop {
            if let Some(answer) = answer.wait_until(wait.next()) {
                return answer.unwrap_or_else(|oneshot::Abandoned| Err(self.gone()));
            }
            if wait.is_over() {
                if answer.withdraw() {
                    return Err(self.core().write_timeout(wait));
                }
                // The closure runs already, so the call waits for its outcome.
                wait.forget_limit();
            }
            self.core().report_wait(wait);
        }
    }

    /// Queues a write and returns the channel of its answer. The calling thread must not run
    /// transactions of this store.
    pub(crate) fn submit<T, F>(&self, purpose: &Purpose, write: F) -> Result<Submitted<T>>
    where
        F: FnMut(&Transaction) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        self.ready()?;
        let mut wait = Wait::new(purpose.clone(), None);
        let (closure, answer) = Self::closure(write, purpose.clone());
        self.enqueue(closure, &mut wait)?;
        Ok(Submitted { answer, wait })
    }

    /// Waits for the outcome of a write.
    pub(crate) fn answer<T>(&self, Submitted { answer, mut wait }: Submitted<T>) -> Result<Receipt<T>> {
        self.await_answer(&answer, &mut wait)
    }

    fn enqueue(&self, closure: Box<dyn Write>, wait: &mut Wait) -> Result<()> {
        let queue = &self.core().queue;
        queue.enter();
        if queue.is_writer() {
            // A `Drop` of the application writes behind a commit. Queued, this write would wait for
            // its own thread.
            groups::run_alone(self.core(), closure, wait);
            return Ok(());
        }
        self.send(Job::Write(closure), wait).inspect_err(|_| queue.leave(1))
    }

    /// Waits for a place in the queue, and logs a long wait.
    fn send(&self, job: Job, wait: &mut Wait) -> Result<()> {
        let mut job = match self.shared.jobs.try_send(job) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(job)) => job,
            Err(TrySendError::Disconnected(_)) => return Err(self.gone()),
        };
        loop {
            job = match self.shared.jobs.send_timeout(job, wait.next().left_or_max()) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(job)) => job,
                Err(SendTimeoutError::Disconnected(_)) => return Err(self.gone()),
            };
            if wait.is_over() {
                return Err(self.core().write_timeout(wait));
            }
            self.core().report_wait(wait);
        }
    }

    /// Runs a write on this thread if there is no other writer. Otherwise queues the write.
    fn run_or_enqueue(&self, closure: Box<dyn Write>, wait: &mut Wait) -> Result<()> {
        let core = self.core();
        let Some(_skipping) = core.queue.skip() else { return self.enqueue(closure, wait) };
        if core.is_closing() {
            core.queue.leave(1);
            return Err(self.gone());
        }
        groups::run_alone(core, closure, wait);
        Ok(())
    }

    fn closure<T, F>(write: F, purpose: Purpose) -> (Box<dyn Write>, oneshot::Receiver<Result<Receipt<T>>>)
    where
        F: FnMut(&Transaction) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        (Box::new(Closure { f: write, result: None, reply, purpose }), answer)
    }

    /// Begins an exclusive transaction on the calling thread. All other writes wait until the
    /// transaction ends.
    ///
    /// Use it for work that cannot be a closure. The transaction pays for its own fsync.
    ///
    /// # Errors
    /// [`Error::Poisoned`], or [`Error::InsideTransaction`] if this thread is inside a transaction
    /// already.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let tx = store.begin()?;
    /// tx.append(Event::bytes("paid", "1").to("", "payments"))?;
    /// assert_eq!(tx.commit()?.seqs(), [0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn begin(&self) -> Result<Transaction> {
        self.core().refuse_reentrant("Store::begin")?;
        self.ready()?;
        let mut wait = self.wait_at("Store::begin", Location::caller());
        self.core().wait_for_room(&wait.purpose);
        Transaction::begin_exclusive(self.core(), &mut wait)
    }

    /// Returns the state and the log as of the last commit.
    ///
    /// # Errors
    /// Errors of redb, or [`Error::Closed`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let before = store.read()?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// assert!(before.event(0)?.is_none()); // as of its own moment
    /// assert!(store.read()?.event(0)?.is_some());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn read(&self) -> Result<Snapshot> {
        Ok(Snapshot::new(self.core().begin_read()?, self.core()))
    }

    /// Finishes the queued writes, writes pending progress, and closes the file.
    ///
    /// Other handles of this store then fail with [`Error::Closed`]. Stop relays and consumers
    /// first; otherwise they find the store closed too.
    ///
    /// # Errors
    /// Errors of the storage engine while closing. Every commit is durable all the same.
    /// [`Error::Poisoned`] if the file, or its [journal](crate::StoreBuilder::journal_bytes), was
    /// deleted, moved or replaced while it was open. Then possibly no path leads to the commits.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// let other = store.clone();
    /// store.close()?;
    /// assert!(matches!(other.write(|_| Ok(())), Err(Error::Closed { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn close(self) -> Result<()> {
        self.core().refuse_reentrant("Store::close")?;
        if self.core().queue.is_writer() {
            // The call would wait for its own thread to end.
            return Err(Error::InsideTransaction { operation: "Store::close" });
        }
        self.shared.end_writer();
        self.core().close()
    }

    /// As [`close`](Self::close), on a thread of its own, so the task does not block.
    ///
    /// Nothing happens before the first poll. If the future is dropped after the first poll, the
    /// store is closed all the same.
    ///
    /// # Errors
    /// As [`close`](Self::close); [`Error::Thread`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// runtime.block_on(store.close_async())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn close_async(self) -> Result<()> {
        self.core().refuse_reentrant("Store::close")?;
        if self.core().queue.is_writer() {
            // The call would wait for its own thread to end.
            return Err(Error::InsideTransaction { operation: "Store::close" });
        }
        let (reply, closed) = oneshot::channel();
        let gone = Error::Closed { path: self.core().path.clone() };
        std::thread::Builder::new()
            .name("onewrite-close".into())
            .spawn(move || reply.send(self.close()))
            .map_err(|cause| Error::Thread { what: "close", cause })?;
        // If the thread ends without an answer, the storage engine has panicked.
        closed.await.unwrap_or(Err(gone))
    }

    /// Fails once the store is poisoned, closed or being closed.
    pub(crate) fn ready(&self) -> Result<()> {
        if self.core().is_closing() { Err(self.gone()) } else { self.core().check() }
    }

    /// The error that says why the store answers no more.
    pub(crate) fn gone(&self) -> Error {
        match self.core().check() {
            Err(error) => error,
            Ok(()) => Error::Closed { path: self.core().path.clone() },
        }
    }

    /// Asks the writer thread for a coalescing pass over `keys` keys, unless a request is pending.
    pub(crate) fn ask_for_pass(&self, keys: usize) {
        if self.core().passes.ask(keys) {
            // If the queue is full, the writer thread is at work, and checks before it waits.
            let _ = self.shared.jobs.try_send(Job::Progress);
        }
    }

    /// Notifies the writer thread that there is new pending progress.
    pub(crate) fn announce_progress(&self) {
        // If the queue is full, a commit is near anyway.
        let _ = self.shared.jobs.try_send(Job::Progress);
    }

    /// Writes pending progress now, and waits for that commit.
    pub(crate) fn flush_progress(&self, deadline: Deadline) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let mut wait = Wait::new(Purpose::Own("writing what waits for a commit"), None);
        self.send(Job::Flush(reply), &mut wait)?;
        if deadline == Deadline::Never {
            return self.await_answer(&answer, &mut wait);
        }
        match answer.wait_until(deadline) {
            Some(flushed) => flushed.unwrap_or_else(|oneshot::Abandoned| Err(self.gone())),
            // The writer thread still writes the progress. Events whose progress is not written are
            // published again.
            None => Ok(()),
        }
    }
}

impl Shared {
    fn end_writer(&self) {
        self.core.announce_closing();
        self.core.alarms.end();
        let mut wait = Wait::new(Purpose::Own("closing the store"), None);
        self.core.queue.await_skipping(|| {
            if wait.next().is_over() {
                in_drop(|| self.core.report_wait(&mut wait));
            }
        });
        let writer = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some((writer, ended)) = writer else { return };
        let _ = self.jobs.send(Job::Stop);
        while ended.wait_until(wait.next()).is_none() {
            in_drop(|| self.core.report_wait(&mut wait));
        }
        if writer.join().is_err() {
            in_drop(|| tracing::error!("the writer thread panicked"));
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.core.owner.is_elsewhere() {
            // The writer thread is not in this process. The owner holds the file, its locks and its
            // journal.
            keep(&self.core);
            keep(&self.jobs);
            std::mem::forget(self.writer.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).take());
            return;
        }
        if self.core.write_lock.must_not_wait() {
            self.core.alarms.end();
            // The writer thread may wait for the write lock, which this very thread holds. The
            // writer thread ends by itself once the queue is closed and empty. The last holder of
            // `core`, the writer thread or the transaction, closes the file.
            return;
        }
        self.end_writer();
        self.core.release();
    }
}

/// A write that was queued, and the caller's wait for its answer.
pub(crate) struct Submitted<T> {
    answer: oneshot::Receiver<Result<Receipt<T>>>,
    wait: Wait,
}
