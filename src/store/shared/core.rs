//! Core: what the threads of one store share. That is the database, the write lock, the end of the
//! log in memory, the pending progress, and whether the store is poisoned.
//!
//! **Invariants.** [`Tail`] changes only under the write lock, and only after the commit that makes
//! the change true. All reads of the log go through redb's committed state, so no reader sees what
//! is not durable. The store keeps the first failure of a durable write, and refuses everything
//! after it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::task::Waker;
use std::time::Instant;

use redb::{Database, ReadableDatabase, StorageBackend};

use crate::error::{Error, Result};
use crate::say::in_drop;
use crate::storage::errors::{caught, panic_text, unless_it_panics};
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
    /// Durable commits that carried progress alone, without a write of the application.
    pub(crate) commits_alone: AtomicU64,
    /// Write closures that were committed.
    pub(crate) writes: AtomicU64,
    /// How often a batch was run again without a closure that had failed.
    pub(crate) reruns: AtomicU64,
}

/// The moment of the open. It divides the events that were in the log from later ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenedAt {
    /// The time, by the monotonic clock.
    pub(crate) mono_ms: u64,
    /// The end of the log at that time.
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
    /// A failure of the medium that a closure has met. redb reports the details only to its first
    /// caller after the failure. If the failed file is this store's, the next transaction cannot
    /// begin, and this is the reason.
    suspected: Mutex<Option<String>>,
    pub(crate) relays: Relays,
    pub(crate) notifier: Arc<Notifier>,
    pub(crate) projections: Projections,
    pub(crate) passes: CoalescingPasses,
    pub(crate) cleaning: Cleaning,
    /// Signals to consumers that rejected deliveries are to be redriven.
    pub(crate) redrives: RedriveSignals,
    /// Parked deliveries that a consumer of this process has taken up.
    pub(crate) parked: Claims,
    /// Bytes of rejected deliveries that were discarded since the open.
    pub(crate) discarded: AtomicU64,
    pub(crate) idle_search: IdleSearch,
    pub(crate) jumped: Jumped,
    progress: Mutex<PendingProgress>,
    /// Notified when the backlog shrinks, and when it may not shrink any more.
    pub(in crate::store) backlog_shrank: Condvar,
    /// Requests to relays to drop expired events.
    pub(in crate::store) expiry_requests: ExpiryRequests,
    pub(crate) counters: Counters,
    pub(crate) queue: Queue,
    /// Commands that take turns after a conflict.
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

    /// The reentrancy guard: fails if the calling thread holds the write lock, since the thread
    /// would wait for itself. In a process that was forked from the owner, the guard fails before
    /// any lock is taken.
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
        // A wait without a limit cannot fail.
        let _ = self.acquire_write_lock(&mut Wait::new(Purpose::Own(work), None));
    }

    /// Logs what a wait is for and what holds it up, if a warning is due. No lock is held.
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

    /// Reads the clock, which is the application's code. A panic of the clock becomes an error.
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

    /// Poisons the store: from here on it accepts nothing. Keeps the first cause.
    pub(crate) fn poison(&self, cause: &str) -> Arc<str> {
        let cause = self.poison.get_or_init(|| {
            // This may run while a transaction is dropped.
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

    /// Keeps the failure of a closure. The failure may be about another file, so it alone does not
    /// poison the store.
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

    /// Reads what is committed, and runs none of the application's code. A panic of the storage
    /// engine on a damaged page becomes an error.
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

    /// Closes the file; every later call fails with [`Error::Closed`].
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

    /// Returns when the writer thread is to look at the names of the files. `None` if no commit has
    /// come since the last look.
    pub(crate) fn look_due_at(&self) -> Option<Deadline> {
        self.watch.due_at(self.written())
    }

    /// Looks at the names of the files. If a name is lost, the store is poisoned, and poisoning
    /// logs it.
    pub(crate) fn look(&self) {
        let _ = self.unless_lost(self.watch.look(self.written()));
    }

    /// Lets go of the file. An exclusive transaction that still lives closes the file when the
    /// transaction ends.
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

    /// Announces a durable commit: notifies all threads and futures that wait for the log to grow
    /// or for the backlog to shrink.
    pub(crate) fn announce_commit(&self) {
        self.relays.notify_all();
        self.notifier.notify_all();
        if self.settings.quota.is_some() {
            self.backlog_shrank.notify_all();
        }
    }

    /// Announces that the clock has jumped: every thread that waits for a time of the clock looks
    /// again.
    pub(crate) fn clock_jumped(&self) {
        self.jumped.set();
        self.relays.notify_all();
        self.notifier.notify_all();
        self.redrives.notify_all();
        // A nudge that the writer thread has not taken yet says the same.
        let _ = self.queue.nudges.0.try_send(());
    }

    /// Announces that a commit has ended, well or not. Notifies the writer thread if work is left
    /// that it does not wait for.
    pub(crate) fn announce_rest(&self, now: Now) {
        let is_look_due = self.holders.note_commit(now.mono_ms);
        let waits = self.queue.writer_waits.load(Ordering::SeqCst);
        if waits == Waits::Timed as u8 {
            return;
        }
        let unsaved = waits == Waits::Untimed as u8 && self.settings.quick_repair_idle.is_some();
        let unlooked = !self.queue.look_awaited.load(Ordering::SeqCst) && self.look_due_at().is_some();
        if is_look_due || unsaved || unlooked || self.tail().trim_left || !self.progress().is_empty() {
            // A nudge that the writer thread has not taken yet says the same.
            let _ = self.queue.nudges.0.try_send(());
        }
    }

    /// Notes that a relay has durably dropped every event before `to` that had expired.
    pub(crate) fn scanned(&self, relay: &str, to: u64, earliest_ms: Option<u64>) {
        self.expiry_requests.done(relay, to, earliest_ms);
        // A write that looks at both the tail and the requests holds this lock.
        let _tail = self.tail();
        self.backlog_shrank.notify_all();
    }

    /// Makes the writer thread look at the waiting work. A nudge that it has not taken yet says the
    /// same.
    pub(crate) fn nudge_writer(&self) {
        let _ = self.queue.nudges.0.try_send(());
    }

    /// Forgets the requests to a relay, which begins or ends.
    pub(crate) fn forget_expiry_requests(&self, relay: &str) {
        self.expiry_requests.forget(relay);
        let _tail = self.tail();
        self.backlog_shrank.notify_all();
    }

    /// Returns the refusal if the quota is reached by the durable backlog and the pending events
    /// and bytes.
    pub(crate) fn over_quota(tail: &Tail, quota: &BacklogQuota, pending: (u64, u64)) -> Option<Error> {
        let (events, bytes) = tail.backlog();
        quota.is_over((events, bytes), pending).then_some(Error::BacklogFull {
            events: events + pending.0,
            bytes: bytes + pending.1,
            events_max: quota.events_max,
            bytes_max: quota.bytes_max,
        })
    }

    /// Announces that the store is about to be closed: threads and futures that would wait in vain
    /// look again.
    pub(crate) fn announce_closing(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.notifier.notify_all();
        self.backlog_shrank.notify_all();
    }

    /// Asks the relays to drop expired events where the quota's policy says so, without waiting for
    /// the answers. The caller has read the clock before it took the lock on `tail`.
    pub(crate) fn ask_for_expiry(&self, tail: &Tail, added: (u64, u64), now_ms: u64) -> Option<Wanted> {
        let quota = self.settings.quota.as_ref();
        let quota = quota.filter(|quota| quota.policy == QuotaPolicy::DropExpired)?;
        Some(self.expiry_requests.ask(tail, quota, added, now_ms, &self.relays))
    }

    /// Returns what wakes a future of this store.
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

/// Runs `write`, which writes to the file, and poisons the store if `write` panics. The storage
/// engine may panic on damaged pages: how much it has written is then unknown.
pub(in crate::store) fn or_poison(core: &Core, write: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(write)).unwrap_or_else(|panic| {
        let cause = format!("the storage engine panicked: {}", panic_text(&*panic));
        Err(Error::CommitUnknown { cause: core.poison(&cause) })
    })
}
