//! What the threads of one store share: the database, the write lock, the end of the log as it stands in memory,
//! the progress that waits for a commit, and whether the store is still good.
//!
//! **Invariants.** [`Tail`] changes only under the write lock, and only after the commit that makes the change true. Nothing
//! reads the log but through redb's committed state, so what is not durable is seen by nobody. The first failure of a
//! durable write is kept and refuses everything after it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::task::Waker;
use std::time::Instant;

use redb::{Database, ReadableDatabase, StorageBackend};

use crate::error::{Error, Result};
use crate::say::in_drop;
use crate::storage::errors::panic_text;
use crate::storage::errors::{caught, unless_it_panics};
use crate::storage::file::Opened;
use crate::storage::metered::IoCounters;
use crate::storage::watch::{Watch, Written};
use crate::store::settings::{BacklogQuota, QuotaPolicy, Settings};
use crate::store::shared::age::Age;
use crate::store::shared::alarms::Alarms;
use crate::store::shared::capture_schedule::CoalescingPasses;
use crate::store::shared::cleaning::Cleaning;
use crate::store::shared::consumers::{Claims, IdleSearch};
use crate::store::shared::expiry_requests::{ExpiryRequests, Wanted};
use crate::store::shared::holders::Holders;
use crate::store::shared::jumps::Jumped;
use crate::store::shared::left_out::LeftOut;
use crate::store::shared::lines::Lines;
use crate::store::shared::log_pace::LogPace;
use crate::store::shared::notify::Notifier;
use crate::store::shared::owner::Owner;
use crate::store::shared::progress::PendingProgress;
use crate::store::shared::projections::Projections;
use crate::store::shared::redrive_signal::RedriveSignals;
use crate::store::shared::relays::Relays;
use crate::store::shared::tail::{Identity, Tail};
use crate::store::shared::timed::Waking;
use crate::store::shared::write_lock::{WriteLock, WriteLockGuard};
use crate::store::shared::write_queue::{Queue, Waits};
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::time::{Deadline, Now, as_ms};

/// Counters that only rise.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Durable commits.
    pub(crate) commits: AtomicU64,
    /// Those among them that carried no write of the application: progress alone.
    pub(crate) commits_alone: AtomicU64,
    /// Write closures that were committed.
    pub(crate) writes: AtomicU64,
    /// Times a batch was run again without a closure that had failed.
    pub(crate) reruns: AtomicU64,
}

/// What divides the events that were there from those that came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenedAt {
    /// By the monotonic clock.
    pub(crate) mono_ms: u64,
    /// The end of the log then.
    pub(crate) next_seq: u64,
}

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) path: PathBuf,
    pub(crate) owner: Owner,
    db: RwLock<Option<Database>>,
    pub(crate) io: Arc<IoCounters>,
    watch: Watch,
    pages: Weak<dyn StorageBackend>,
    /// The open had to verify every page.
    pub(crate) verified_at_open: bool,
    pub(crate) opened: OpenedAt,
    pub(crate) holders: Holders,
    /// How long the store has been open in all.
    pub(crate) age: Age,
    pub(crate) settings: Settings,
    pub(crate) identity: Identity,
    pub(crate) write_lock: Arc<WriteLock>,
    tail: Mutex<Tail>,
    poison: OnceLock<Arc<str>>,
    /// A failure of the medium that a closure has met. redb reports only to its first user what it was; should this file be the
    /// one that failed, the next transaction cannot begin, and this is why.
    suspected: Mutex<Option<String>>,
    pub(crate) relays: Relays,
    pub(crate) notifier: Arc<Notifier>,
    pub(crate) projections: Projections,
    pub(crate) passes: CoalescingPasses,
    pub(crate) cleaning: Cleaning,
    /// Rejected deliveries are to be driven again.
    pub(crate) redrives: RedriveSignals,
    /// Parked deliveries that a consumer of this process has taken up.
    pub(crate) parked: Claims,
    /// Bytes of rejected deliveries that were discarded since the open.
    pub(crate) discarded: AtomicU64,
    pub(crate) idle_search: IdleSearch,
    pub(crate) jumped: Jumped,
    progress: Mutex<PendingProgress>,
    /// Notified when the backlog shrinks, or could not.
    pub(in crate::store) backlog_shrank: Condvar,
    /// Searches for expired events.
    pub(in crate::store) expiry_requests: ExpiryRequests,
    pub(crate) counters: Counters,
    pub(crate) queue: Queue,
    /// Commands that run one after another.
    pub(crate) lines: Lines,
    pub(crate) left_out: LeftOut,
    /// Futures that wait for room in the write queue.
    queue_waiters: Mutex<Vec<Waker>>,
    pub(crate) closing: AtomicBool,
    /// Wakes futures that wait.
    pub(crate) alarms: Arc<Alarms>,
    born: Instant,
    /// How often long waits are logged.
    wait_pace: Mutex<LogPace>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(crate) fn new(
        path: PathBuf,
        opened: Opened,
        settings: Settings,
        identity: Identity,
        tail: Tail,
    ) -> Self {
        let cleaning = Cleaning::default();
        cleaning.note_left(tail.cleanup.tasks);
        Self {
            owner: Owner::of(&path),
            path,
            db: RwLock::new(Some(opened.db)),
            io: opened.io,
            watch: opened.watch,
            pages: opened.pages,
            verified_at_open: opened.unclean,
            holders: Holders::new(settings.holder_warn_ms, tail.next_seq, tail.end_offset),
            age: Age::new(tail.ages.saved_ms(), settings.clock.now()),
            opened: OpenedAt { mono_ms: settings.clock.now().mono_ms, next_seq: tail.next_seq },
            settings,
            identity,
            write_lock: Arc::default(),
            tail: Mutex::new(tail),
            poison: OnceLock::new(),
            suspected: Mutex::default(),
            relays: Relays::default(),
            notifier: Arc::default(),
            projections: Projections::default(),
            passes: CoalescingPasses::default(),
            cleaning,
            redrives: RedriveSignals::default(),
            parked: Claims::default(),
            discarded: AtomicU64::new(0),
            idle_search: IdleSearch::default(),
            jumped: Jumped::default(),
            progress: Mutex::default(),
            backlog_shrank: Condvar::new(),
            expiry_requests: ExpiryRequests::default(),
            counters: Counters::default(),
            queue: Queue::default(),
            lines: Lines::default(),
            left_out: LeftOut::default(),
            queue_waiters: Mutex::default(),
            closing: AtomicBool::new(false),
            alarms: Arc::default(),
            born: Instant::now(),
            wait_pace: Mutex::default(),
        }
    }

    /// The reentrancy guard: fails if the calling thread holds the write lock, since it would wait for itself. Fails in a process
    /// that was forked from the owner, before any lock is taken there.
    pub(crate) fn refuse_reentrant(&self, operation: &'static str) -> Result<()> {
        self.owner.check()?;
        if self.write_lock.is_mine() { Err(Error::InsideTransaction { operation }) } else { Ok(()) }
    }

    /// Waits for the write lock. Fails once the limit of the wait has passed.
    pub(crate) fn acquire_write_lock(&self, wait: &mut Wait) -> Result<WriteLockGuard> {
        match self.write_lock.acquire(wait, |wait| self.report_wait(wait)) {
            Some(guard) => Ok(guard),
            None => Err(self.write_timeout(wait)),
        }
    }

    /// Waits until the transaction that is under way has ended.
    pub(crate) fn await_write_lock(&self, work: &'static str) {
        // Without a limit it cannot fail.
        let _ = self.acquire_write_lock(&mut Wait::new(Purpose::Own(work), None));
    }

    /// Logs what a wait is for and what holds it up, if that is due. No lock is held.
    pub(crate) fn report_wait(&self, wait: &mut Wait) {
        if !wait.take_warning() {
            return;
        }
        let waited_ms = wait.waited_ms();
        let Some(held_back) = lock(&self.wait_pace).admit(as_ms(self.born.elapsed())) else { return };
        let (waiting, writes, path) = (&wait.purpose, self.queue.company(), self.path.display());
        match self.write_lock.holder() {
            Some(holder) => {
                let (thread, held_ms, purpose) = (holder.thread(), holder.held_ms(), holder.purpose());
                tracing::warn!(
                    %path, %waiting, waited_ms, writes, held_back, holder = thread, held_ms, held_by = %purpose,
                    "a write waits long for the write transaction, which another thread holds"
                );
            }
            None => tracing::warn!(
                %path, %waiting, waited_ms, writes, held_back,
                "a write waits long, though no thread holds the write transaction now"
            ),
        }
    }

    /// The error of a wait that has been given up.
    pub(crate) fn write_timeout(&self, wait: &mut Wait) -> Error {
        let holder =
            self.write_lock.holder().map_or_else(|| "no thread now".into(), |holder| holder.to_string());
        Error::WriteTimeout { path: self.path.clone(), waited_ms: wait.waited_ms(), holder }
    }

    pub(crate) fn tail(&self) -> MutexGuard<'_, Tail> {
        lock(&self.tail)
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, PendingProgress> {
        lock(&self.progress)
    }

    /// Reads the clock, which is the application's: that it panics there is an error.
    pub(crate) fn now(&self) -> Result<Now> {
        let reading = caught(|| self.settings.clock.now());
        reading.map_err(|text| Error::Panicked { message: format!("the clock: {text}") })
    }

    /// Fails if the store is poisoned.
    pub(crate) fn check(&self) -> Result<()> {
        match self.poison.get() {
            Some(cause) => Err(Error::Poisoned { path: self.path.clone(), cause: Arc::clone(cause) }),
            None => Ok(()),
        }
    }

    pub(crate) fn poisoned(&self) -> Option<Arc<str>> {
        self.poison.get().cloned()
    }

    /// Keeps the first cause. From here on the store accepts nothing.
    pub(crate) fn poison(&self, cause: &str) -> Arc<str> {
        let cause = self.poison.get_or_init(|| {
            // A transaction that is dropped may be what finds it out.
            in_drop(|| {
                tracing::error!(path = %self.path.display(), cause, "the store is poisoned; it must be opened again");
            });
            Arc::from(cause)
        });
        self.relays.notify_all();
        self.notifier.notify_all();
        self.backlog_shrank.notify_all();
        Arc::clone(cause)
    }

    /// Poisons the store if this error says that the medium failed; hands the error back.
    pub(crate) fn note(&self, error: Error) -> Error {
        if let Error::Storage(failure) = &error
            && failure.fatal
        {
            let first = lock(&self.suspected).take();
            self.poison(&first.unwrap_or_else(|| failure.to_string()));
        }
        error
    }

    /// Keeps what a closure has failed with. It may be about another file: that alone poisons nothing.
    pub(crate) fn suspect(&self, error: &Error) {
        if let Error::Storage(failure) = error
            && failure.fatal
        {
            lock(&self.suspected).get_or_insert_with(|| failure.to_string());
        }
    }

    fn with_db<T>(&self, f: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        match &*db {
            Some(db) => unless_it_panics(|| f(db)).map_err(|error| self.note(error)),
            None => Err(Error::Closed { path: self.path.clone() }),
        }
    }

    pub(crate) fn begin_read(&self) -> Result<redb::ReadTransaction> {
        self.owner.check()?;
        self.with_db(|db| Ok(db.begin_read()?))
    }

    /// Reads what is committed, and runs nothing of the application's: where the storage engine panics on a damaged page, that is an error.
    pub(crate) fn reading<T>(&self, read: impl FnOnce(&redb::ReadTransaction) -> Result<T>) -> Result<T> {
        unless_it_panics(|| read(&self.begin_read()?))
    }

    pub(crate) fn begin_write(&self) -> Result<redb::WriteTransaction> {
        self.check()?;
        self.unless_lost(self.watch.look_if_due(self.written()))?;
        let tx = self.with_db(|db| Ok(db.begin_write()?))?;
        lock(&self.suspected).take();
        Ok(tx)
    }

    /// Closes the file; everything after fails with [`Error::Closed`].
    pub(crate) fn close(&self) -> Result<()> {
        let db = self.db.write().unwrap_or_else(PoisonError::into_inner).take();
        let Some(db) = db else { return Ok(()) };
        let named = self.unless_lost(self.watch.look(self.written()));
        let closed = crate::storage::file::close(db).map_err(|source| {
            let action = "closing the file";
            Error::Storage(crate::error::StorageFailure { action, cause: source, fatal: true })
        });
        named.and(closed)
    }

    /// The file behind the engine, while the store is open.
    pub(crate) fn pages(&self) -> Option<Arc<dyn StorageBackend>> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        db.as_ref().and_then(|_| self.pages.upgrade())
    }

    fn written(&self) -> Written {
        Written { commits: self.counters.commits.load(Ordering::Relaxed), next_seq: self.tail().next_seq }
    }

    /// Poisons the store if a look has found that no name leads to its file any more.
    fn unless_lost(&self, looked: std::result::Result<(), String>) -> Result<()> {
        looked.map_err(|found| Error::Poisoned { path: self.path.clone(), cause: self.poison(&found) })
    }

    /// When the writer thread is to look at the names of the files, if a commit has come since the last look.
    pub(crate) fn look_due_at(&self) -> Option<Deadline> {
        self.watch.due_at(self.written())
    }

    /// Looks at the names of the files. A loss poisons the store, which logs it.
    pub(crate) fn look(&self) {
        let _ = self.unless_lost(self.watch.look(self.written()));
    }

    /// Lets go of the file; an exclusive transaction that still lives ends first, by itself.
    pub(crate) fn release(&self) {
        let db = self.db.write().unwrap_or_else(PoisonError::into_inner).take();
        if db.is_some() {
            in_drop(|| self.look());
        }
        if let Some(Err(error)) = db.map(crate::storage::file::close) {
            in_drop(|| {
                tracing::warn!(%error, path = %self.path.display(), "the file is not closed, or not cleanly; if no living transaction closes it, the next open verifies it");
            });
        }
    }

    /// A commit is durable: whoever waits for the log to grow or for the backlog to shrink is notified.
    pub(crate) fn announce_commit(&self) {
        self.relays.notify_all();
        self.notifier.notify_all();
        if self.settings.quota.is_some() {
            self.backlog_shrank.notify_all();
        }
    }

    /// The clock has jumped: every thread that waits for a time of the clock looks again.
    pub(crate) fn clock_jumped(&self) {
        self.jumped.set();
        self.relays.notify_all();
        self.notifier.notify_all();
        self.redrives.notify_all();
        // A nudge that is not taken yet says the same.
        let _ = self.queue.nudges.0.try_send(());
    }

    /// A commit has ended, either way: the writer thread is notified if something is left for it to do in a while.
    pub(crate) fn announce_rest(&self, now: Now) {
        let is_look_due = self.holders.note_commit(now.mono_ms);
        let waits = self.queue.writer_waits.load(Ordering::SeqCst);
        if waits == Waits::Timed as u8 {
            return;
        }
        let unsaved = waits == Waits::Untimed as u8 && self.settings.quick_repair_idle.is_some();
        let unlooked = !self.queue.look_awaited.load(Ordering::SeqCst) && self.look_due_at().is_some();
        if is_look_due || unsaved || unlooked || self.tail().trim_left || !self.progress().is_empty() {
            // One that is not taken yet says the same.
            let _ = self.queue.nudges.0.try_send(());
        }
    }

    /// A relay has let everything go that had expired before `to`; it is durable.
    pub(crate) fn scanned(&self, relay: &str, to: u64, earliest_ms: Option<u64>) {
        self.expiry_requests.done(relay, to, earliest_ms);
        // Whoever looks at both holds this lock.
        let _tail = self.tail();
        self.backlog_shrank.notify_all();
    }

    /// The writer thread looks at what waits. A nudge that is not taken yet says the same.
    pub(crate) fn nudge_writer(&self) {
        let _ = self.queue.nudges.0.try_send(());
    }

    /// A relay begins or ends.
    pub(crate) fn forget_expiry_requests(&self, relay: &str) {
        self.expiry_requests.forget(relay);
        let _tail = self.tail();
        self.backlog_shrank.notify_all();
    }

    /// The refusal, if the quota is reached by what is durable and by so many events and bytes that are not yet.
    pub(crate) fn over_quota(tail: &Tail, quota: &BacklogQuota, pending: (u64, u64)) -> Option<Error> {
        let (events, bytes) = tail.backlog();
        quota.is_over((events, bytes), pending).then_some(Error::BacklogFull {
            events: events + pending.0,
            bytes: bytes + pending.1,
            events_max: quota.events_max,
            bytes_max: quota.bytes_max,
        })
    }

    /// The store is about to be closed: those who wait for something that will not come any more look again.
    pub(crate) fn announce_closing(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.notifier.notify_all();
        self.backlog_shrank.notify_all();
    }

    /// Asks the relays to let expired events go, where the quota's policy says so, without waiting for it. The caller has read
    /// the clock before it took the lock on `tail`.
    pub(crate) fn ask_for_expiry(&self, tail: &Tail, added: (u64, u64), now_ms: u64) -> Option<Wanted> {
        let quota = self.settings.quota.as_ref();
        let quota = quota.filter(|quota| quota.policy == QuotaPolicy::DropExpired)?;
        Some(self.expiry_requests.ask(tail, quota, added, now_ms, &self.relays))
    }

    /// What wakes a future of this store.
    pub(crate) fn waking(&self) -> Waking {
        Waking::new(&self.alarms, &self.owner)
    }

    pub(crate) fn await_queue_room(&self, waker: &Waker) {
        let mut waiters = lock(&self.queue_waiters);
        if !waiters.iter().any(|waiter| waiter.will_wake(waker)) {
            waiters.push(waker.clone());
        }
    }

    pub(crate) fn announce_queue_room(&self) {
        let waiters = std::mem::take(&mut *lock(&self.queue_waiters));
        waiters.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

/// In a forked process the database is leaked: the storage engine would close the owner's file.
impl Drop for Core {
    fn drop(&mut self) {
        if self.owner.is_elsewhere() {
            std::mem::forget(self.db.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

/// Runs what writes to the file. The storage engine may panic on damaged pages: nobody then knows how far it came.
pub(in crate::store) fn or_poison(core: &Core, write: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(write)).unwrap_or_else(|panic| {
        let cause = format!("the storage engine panicked: {}", panic_text(&*panic));
        Err(Error::CommitUnknown { cause: core.poison(&cause) })
    })
}
