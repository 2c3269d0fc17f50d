//! What the threads of one store share: the database, whose turn it is, the end of the log as it stands in memory,
//! the progress that waits for a commit to ride on, and whether the store is still good.
//!
//! **Invariants.** [`Tail`] changes only within a turn, and only after the commit that makes the change true. Nothing
//! reads the log but through redb's committed state, so what is not durable is seen by nobody. The first failure of a
//! durable write is kept and refuses everything after it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError, Weak,
};
use std::task::Waker;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use redb::{Database, ReadableDatabase, StorageBackend};

use super::age::{Age, AgeBook};
use super::alarms::Alarms;
use super::bells::Bells;
use super::capture::rounds::Rounds;
use super::capture::rows::CaptureBook;
use super::cleanup::{Cleaning, Left};
use super::consumers::{Claims, IdleSearch};
use super::cursor::Cursor;
use super::doorbells::Doorbells;
use super::holders::Holders;
use super::jumps::Jumped;
use super::left_out::LeftOut;
use super::lines::Lines;
use super::log_pace::LogPace;
use super::owner::Owner;
use super::projections::Projections;
use super::relays::Relays;
use super::ride::Ride;
use super::settings::{BacklogQuota, QuotaPolicy, Settings};
use super::sweeps::{Sweeps, Wanted};
use super::trim::Deferred;
use super::turn::{Turn, Turns};
use super::waiting::Parked;
use super::write_wait::{Purpose, Wait};
use crate::error::{Error, Result};
use crate::log::book::Book;
use crate::log::keys::CursorId;
use crate::log::lanes::LaneState;
use crate::log::streams::StreamBook;
use crate::say::in_drop;
use crate::storage::errors::{caught, unless_it_panics};
use crate::storage::file::Opened;
use crate::storage::metered::IoCounters;
use crate::storage::tables::projection::ProjectionRow;
use crate::storage::watch::{Watch, Written};
use crate::time::{Deadline, Now, as_ms};
use crate::wire::ContentKey;

/// Who this store is, on the wire too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) store_id: [u8; 16],
    /// The sequence number at which each epoch after the first begins. What was appended in an earlier epoch is published under
    /// that one's name, also when it is published again.
    pub(crate) epoch_starts: Vec<u64>,
    /// What contents of deliveries are hashed with.
    pub(crate) content_key: ContentKey,
    /// What lanes had shown before there was such a key is no later than this, in Unix milliseconds. `None` if there always was
    /// one.
    pub(crate) seen_before_ms: Option<u64>,
}

impl Identity {
    /// The epoch of what is appended now. The first is 1.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch_starts.len() as u64 + 1
    }
}

/// The end of the log, and what is kept in memory about it.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    pub(crate) next_seq: u64,
    pub(crate) end_offset: u64,
    pub(crate) trimmed_to: u64,
    pub(crate) trimmed_offset: u64,
    pub(crate) lanes: Book<LaneState>,
    pub(crate) streams: StreamBook,
    /// The tables that are derived from the log are true for all records below.
    pub(crate) derived_through: u64,
    /// Ages of events, and of the store.
    pub(crate) ages: AgeBook,
    /// The end offset of the record before `derived_through`.
    pub(crate) derived_offset: u64,
    pub(crate) cursors: BTreeMap<String, Cursor>,
    /// What is parked, by cursor.
    pub(crate) parked: BTreeMap<CursorId, Parked>,
    pub(crate) projections: BTreeMap<String, ProjectionRow>,
    /// The tables that are captured.
    pub(crate) captures: CaptureBook,
    /// What is left to be cleaned up.
    pub(crate) cleanup: Left,
    /// Inbox rows added since the last sweep step, and where the next one begins.
    pub(crate) inbox_added: usize,
    pub(crate) sweep_after: Vec<u8>,
    /// Records can go, but the last commit had done its share, or put it off until the store is idle.
    pub(crate) trim_left: bool,
    /// Since when it has been put off.
    pub(crate) deferred: Option<Deferred>,
}

impl Tail {
    /// Events and bytes that some relay still has to publish, the most of each. Without a relay, all that is in the log.
    pub(crate) fn backlog(&self) -> (u64, u64) {
        self.cursors
            .values()
            .map(|cursor| self.backlog_of(cursor))
            .reduce(|a, b| (a.0.max(b.0), a.1.max(b.1)))
            .unwrap_or((
                self.next_seq.saturating_sub(self.trimmed_to),
                self.end_offset.saturating_sub(self.trimmed_offset),
            ))
    }

    /// What lies between a cursor's position and the end of the log and has no exception, and what waits with a row.
    /// Quarantined and discarded events are not in it, wherever they stand. What is confirmed behind an event that is not
    /// counts until the position passes it: how far a relay reads ahead bounds that.
    pub(crate) fn backlog_of(&self, cursor: &Cursor) -> (u64, u64) {
        let rows = &cursor.rows;
        let events = self.next_seq.saturating_sub(cursor.position).saturating_sub(rows.ahead);
        let bytes = self.end_offset.saturating_sub(cursor.position_offset).saturating_sub(rows.ahead_bytes);
        (events + rows.waiting(), bytes + rows.waiting_bytes)
    }
}

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

/// Whether a write may skip the queue.
///
/// A lone writer gains nothing from the writer thread and would pay two changes of threads per commit, so it commits on
/// its own thread. With company the queue is what makes groups.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Writes that were accepted and have no outcome yet, queued or not.
    outstanding: AtomicUsize,
    /// The last group from the queue held more than one write.
    crowded: AtomicBool,
    /// What the writer thread waits for beside its queue, or is about to: what is left to do, and it does not wait for, must be told it.
    writer_waits: AtomicU8,
    /// It will look at the names of the files when that is due.
    look_awaited: AtomicBool,
    /// Tells it.
    nudges: (Sender<()>, Receiver<()>),
    /// Held for reading by a write that skips the queue; closing waits for it.
    skipping: RwLock<()>,
    /// The writer thread, once it runs.
    writer: OnceLock<ThreadId>,
}

/// What the writer thread waits for beside its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    /// It is at work, or looks at what is left when that is due.
    Timed = 0,
    /// For the store to have been idle for long enough, which may be hours.
    UntilIdle = 1,
    Untimed = 2,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            outstanding: AtomicUsize::default(),
            crowded: AtomicBool::default(),
            writer_waits: AtomicU8::new(Waits::Timed as u8),
            look_awaited: AtomicBool::default(),
            nudges: bounded(1),
            skipping: RwLock::default(),
            writer: OnceLock::new(),
        }
    }
}

impl Queue {
    /// The current thread is the writer thread.
    pub(crate) fn begin_writer(&self) {
        self.writer.get_or_init(|| std::thread::current().id());
    }

    /// Whether the current thread is the writer thread, where nothing may wait for the writer thread. What a closure captured, and
    /// what it returned, is dropped there, and a `Drop` may write.
    pub(crate) fn is_writer(&self) -> bool {
        self.writer.get() == Some(&std::thread::current().id())
    }

    /// Said before what is left is looked at: who commits elsewhere changes that first and looks at this then.
    pub(crate) fn writer_waits(&self, waits: Waits) {
        self.writer_waits.store(waits as u8, Ordering::SeqCst);
    }

    /// Said after what is left was looked at, and taken back before.
    pub(crate) fn awaits_look(&self, awaits: bool) {
        self.look_awaited.store(awaits, Ordering::SeqCst);
    }

    /// What nudges the writer thread.
    pub(crate) fn nudges(&self) -> &Receiver<()> {
        &self.nudges.1
    }

    /// A write goes into the queue.
    pub(crate) fn enter(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    /// Writes in the queue and in the group that is being committed.
    pub(crate) fn company(&self) -> usize {
        self.outstanding.load(Ordering::Acquire)
    }

    /// So many writes have their outcome, or did not get in.
    pub(crate) fn leave(&self, writes: usize) {
        self.outstanding.fetch_sub(writes, Ordering::AcqRel);
    }

    /// Notes the size of a group from the queue.
    pub(crate) fn note_group(&self, writes: usize) {
        self.crowded.store(writes > 1, Ordering::Relaxed);
    }

    /// Lets a write skip the queue if none is before it and none is likely to join it. It then counts as entered.
    pub(crate) fn skip(&self) -> Option<RwLockReadGuard<'_, ()>> {
        if self.crowded.load(Ordering::Relaxed) {
            return None;
        }
        let guard = self.skipping.try_read().ok()?;
        self.outstanding.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(guard)
    }

    /// Waits for a write that has skipped the queue. Afterwards `closing` keeps others from it.
    pub(crate) fn await_skipping(&self, mut tell: impl FnMut()) {
        let mut pause = Duration::from_millis(1);
        while let Err(TryLockError::WouldBlock) = self.skipping.try_write() {
            // Only a closing store comes here, once, and only beside a write that began before.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
            tell();
        }
    }
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
    pub(crate) turns: Arc<Turns>,
    tail: Mutex<Tail>,
    poison: OnceLock<Arc<str>>,
    /// A failure of the medium that a closure has met. redb tells only its first user what it was; should this file be the
    /// one that failed, the next transaction cannot begin, and this is why.
    suspected: Mutex<Option<String>>,
    pub(crate) relays: Relays,
    pub(crate) bells: Arc<Bells>,
    pub(crate) projections: Projections,
    pub(crate) rounds: Rounds,
    pub(crate) cleaning: Cleaning,
    /// Rejected deliveries are to be driven again.
    pub(crate) redrives: Doorbells,
    /// Parked deliveries that a consumer of this process has taken up.
    pub(crate) parked: Claims,
    /// Bytes of rejected deliveries that were discarded since the open.
    pub(crate) discarded: AtomicU64,
    pub(crate) idle_search: IdleSearch,
    pub(crate) jumped: Jumped,
    ride: Mutex<Ride>,
    /// Rings when the backlog shrinks, or could not.
    pub(super) backlog_shrank: Condvar,
    /// Searches for expired events.
    pub(super) sweeps: Sweeps,
    pub(crate) counters: Counters,
    pub(crate) queue: Queue,
    /// Commands that take turns.
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
            turns: Arc::default(),
            tail: Mutex::new(tail),
            poison: OnceLock::new(),
            suspected: Mutex::default(),
            relays: Relays::default(),
            bells: Arc::default(),
            projections: Projections::default(),
            rounds: Rounds::default(),
            cleaning,
            redrives: Doorbells::default(),
            parked: Claims::default(),
            discarded: AtomicU64::new(0),
            idle_search: IdleSearch::default(),
            jumped: Jumped::default(),
            ride: Mutex::default(),
            backlog_shrank: Condvar::new(),
            sweeps: Sweeps::default(),
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

    /// Fails if the calling thread is inside a write transaction of this store: it would wait for itself. Fails in a process
    /// that was forked from the owner, before any lock is taken there.
    pub(crate) fn refuse_inside(&self, operation: &'static str) -> Result<()> {
        self.owner.check()?;
        if self.turns.is_mine() { Err(Error::InsideTransaction { operation }) } else { Ok(()) }
    }

    /// Waits for the turn to write. Fails once the limit of the wait has passed.
    pub(crate) fn take_turn(&self, wait: &mut Wait) -> Result<Turn> {
        match self.turns.take(wait, |wait| self.tell_wait(wait)) {
            Some(turn) => Ok(turn),
            None => Err(self.write_timeout(wait)),
        }
    }

    /// Waits until the transaction that is under way has ended.
    pub(crate) fn await_turn(&self, work: &'static str) {
        // Without a limit it cannot fail.
        let _ = self.take_turn(&mut Wait::new(Purpose::Own(work), None));
    }

    /// Logs what a wait is for and what holds it up, if that is due. No lock is held.
    pub(crate) fn tell_wait(&self, wait: &mut Wait) {
        if !wait.take_warning() {
            return;
        }
        let waited_ms = wait.waited_ms();
        let Some(held_back) = lock(&self.wait_pace).admit(as_ms(self.born.elapsed())) else { return };
        let (waiting, writes, path) = (&wait.purpose, self.queue.company(), self.path.display());
        match self.turns.holder() {
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
        let holder = self.turns.holder().map_or_else(|| "no thread now".into(), |holder| holder.to_string());
        Error::WriteTimeout { path: self.path.clone(), waited_ms: wait.waited_ms(), holder }
    }

    pub(crate) fn tail(&self) -> MutexGuard<'_, Tail> {
        lock(&self.tail)
    }

    pub(crate) fn ride(&self) -> MutexGuard<'_, Ride> {
        lock(&self.ride)
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
        self.relays.ring_all();
        self.bells.ring_all();
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
            Error::Storage(crate::error::StorageFailure { action, source, fatal: true })
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

    /// A commit is durable: whoever waits for the log to grow or for the backlog to shrink is told.
    pub(crate) fn announce_commit(&self) {
        self.relays.ring_all();
        self.bells.ring_all();
        if self.settings.quota.is_some() {
            self.backlog_shrank.notify_all();
        }
    }

    /// The clock has jumped: every thread that waits for a time of the clock looks again.
    pub(crate) fn clock_jumped(&self) {
        self.jumped.set();
        self.relays.ring_all();
        self.bells.ring_all();
        self.redrives.ring_all();
        // A nudge that is not taken yet tells the same.
        let _ = self.queue.nudges.0.try_send(());
    }

    /// A commit has ended, either way: the writer thread is told if something is left for it to do in a while.
    pub(crate) fn announce_rest(&self, now: Now) {
        let is_look_due = self.holders.note_commit(now.mono_ms);
        let waits = self.queue.writer_waits.load(Ordering::SeqCst);
        if waits == Waits::Timed as u8 {
            return;
        }
        let unsaved = waits == Waits::Untimed as u8 && self.settings.quick_repair_idle.is_some();
        let unlooked = !self.queue.look_awaited.load(Ordering::SeqCst) && self.look_due_at().is_some();
        if is_look_due || unsaved || unlooked || self.tail().trim_left || !self.ride().is_empty() {
            // One that is not taken yet tells the same.
            let _ = self.queue.nudges.0.try_send(());
        }
    }

    /// A relay has let everything go that had expired before `to`; it is durable.
    pub(crate) fn swept(&self, relay: &str, to: u64, earliest_ms: Option<u64>) {
        self.sweeps.done(relay, to, earliest_ms);
        // Whoever looks at both holds this lock.
        let _tail = self.tail();
        self.backlog_shrank.notify_all();
    }

    /// The writer thread looks at what waits. A nudge that is not taken yet tells the same.
    pub(crate) fn nudge_writer(&self) {
        let _ = self.queue.nudges.0.try_send(());
    }

    /// A relay begins or ends.
    pub(crate) fn forget_sweeps(&self, relay: &str) {
        self.sweeps.forget(relay);
        let _tail = self.tail();
        self.backlog_shrank.notify_all();
    }

    /// The refusal, if the quota is reached by what is durable and by so many events and bytes that are not yet.
    pub(crate) fn over_quota(tail: &Tail, quota: &BacklogQuota, pending: (u64, u64)) -> Option<Error> {
        let (events, bytes) = tail.backlog();
        Self::is_over(quota, (events, bytes), pending).then_some(Error::BacklogFull {
            events: events + pending.0,
            bytes: bytes + pending.1,
            events_max: quota.events_max,
            bytes_max: quota.bytes_max,
        })
    }

    pub(crate) fn is_over(quota: &BacklogQuota, backlog: (u64, u64), added: (u64, u64)) -> bool {
        backlog.0 + added.0 >= quota.events_max || backlog.1 + added.1 >= quota.bytes_max
    }

    /// The store is about to be closed: those who wait for something that will not come any more look again.
    pub(crate) fn announce_closing(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.bells.ring_all();
        self.backlog_shrank.notify_all();
    }

    /// Asks the relays to let expired events go, where the quota's policy says so, without waiting for it. The caller has read
    /// the clock before it took the lock on `tail`.
    pub(crate) fn ask_for_sweeps(&self, tail: &Tail, added: (u64, u64), now_ms: u64) -> Option<Wanted> {
        let quota = self.settings.quota.as_ref();
        let quota = quota.filter(|quota| quota.policy == QuotaPolicy::DropExpired)?;
        Some(self.sweeps.ask(tail, quota, added, now_ms, &self.relays))
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
