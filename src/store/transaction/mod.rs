//! A write transaction: the application's own tables, and the log.
//!
//! Events and inbox entries gather in memory. The commit writes them all together, in order. So a
//! closure that only appended can be rolled back without touching redb. A closure that opened a
//! table for writing cannot, since redb has no savepoint inside a transaction.
//! [`Transaction::is_dirty_since`] distinguishes the two.

mod append;
pub(crate) mod apply_progress;
pub(crate) mod captures;
pub(crate) mod cleanup;
pub(crate) mod cleanup_pieces;
pub(crate) mod commit;
pub(crate) mod cursor_ids;
pub(crate) mod gathered;
mod inbox;
pub(crate) mod pending;
pub(crate) mod projections;
pub(crate) mod receipt;
pub(crate) mod stream_index;
pub(crate) mod trim;
pub(crate) mod write;

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use redb::{Key, MultimapTable, MultimapTableDefinition, Table, TableDefinition, Value, WriteTransaction};

use crate::error::{Error, Result};
use crate::process::keep;
use crate::say::in_drop;
use crate::storage::errors::{engine_panicked, unless_it_panics};
use crate::storage::tables::capture::{CaptureRow, DirtyKind};
use crate::storage::tables::schema::RESERVED_PREFIX;
use crate::store::shared::core::{Core, or_poison};
use crate::store::shared::write_lock::WriteLockGuard;
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::store::transaction::gathered::{Amount, Gathered};
use crate::store::transaction::pending::{Pending, Savepoint, Undo};
use crate::store::transaction::receipt::Receipt;
use crate::tuning::CLEAN_STEP;

/// The inbox scope of event ids that the application gave.
pub(crate) const EVENT_SCOPE: &str = "onewrite.event";
/// The inbox scope of request ids.
pub(crate) const REQUEST_SCOPE: &str = "onewrite.request";

/// The inbox scope of deliveries that were rejected without being recorded for deduplication.
pub(crate) const REJECT_SCOPE: &str = "onewrite.rejected";

/// How many calls on a transaction that is lent to a closure share one check of the process.
const CALLS_PER_LOOK: u32 = 64;

/// An exclusive transaction that is held for longer than this causes a warning: all other writes
/// wait for it.
const HELD_TOO_LONG: Duration = Duration::from_secs(1);

/// The place where an event was appended.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::Event;
/// let tx = store.begin()?;
/// let pay = || tx.append(Event::bytes("paid", "1").id("payment-1").to("", "payments"));
/// let (first, second) = (pay()?, pay()?);
/// assert_eq!((first.seq, first.repeated), (0, false));
/// assert_eq!((second.seq, second.repeated), (0, true));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Appended {
    /// The event's sequence number: commit order, without a gap.
    pub seq: u64,
    /// An event with this id and content was there already. Nothing was written, and `seq` is the
    /// number of the first append.
    pub repeated: bool,
}

/// A write transaction on the state and the log of one store.
///
/// In [`Store::write`](crate::Store::write) the store lends the transaction to the closure, and the
/// transaction commits with its group. From [`Store::begin`](crate::Store::begin) the caller gets a
/// transaction of its own, which is exclusive. Its [`commit`](Self::commit) makes everything
/// durable at once; a drop rolls everything back. A transaction belongs to one thread.
///
/// ```
/// use onewrite::{Event, Store, redb::{ReadableTable, TableDefinition}};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// # let folder = tempfile::tempdir()?;
/// # let store = Store::open(folder.path().join("bank.redb"))?;
/// let tx = store.begin()?;
/// tx.open_table(ACCOUNTS)?.insert("alice", 100)?;
/// tx.append(Event::bytes("account.opened", b"alice".to_vec()).key("alice").to("accounts", "opened"))?;
/// let receipt = tx.commit()?; // state and event are durable here, together
/// assert_eq!(receipt.seqs(), [0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Transaction {
    pub(crate) core: Arc<Core>,
    /// `None` once the transaction has ended.
    tx: Option<TxDebug>,
    pub(crate) pending: RefCell<Pending>,
    /// The events of the current closure, or of the whole exclusive transaction.
    seqs: RefCell<Vec<u64>>,
    tables_opened: Cell<u64>,
    gathered: Gathered,
    /// How many more rows this transaction may remove itself, of the data that it deletes.
    pub(in crate::store) cleaning_budget: Cell<usize>,
    began: Instant,
    /// The application began the transaction, and may fork between two calls on it.
    exclusive: bool,
    /// Calls since the transaction began.
    calls: Cell<u32>,
    /// The storage engine has panicked in the transaction: it can only be rolled back.
    engine_failed: Cell<bool>,
    // Fields drop in order: the write lock is released only once the transaction has ended.
    guard: Option<WriteLockGuard>,
    _one_thread: PhantomData<*const ()>,
}

/// redb's transaction has no `Debug`.
pub(crate) struct TxDebug(pub(crate) WriteTransaction);

impl std::fmt::Debug for TxDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WriteTransaction")
    }
}

impl Transaction {
    /// Waits for the write lock and begins a transaction for the library's own work. The caller has
    /// made sure that its thread is not in a transaction already.
    pub(crate) fn begin(core: &Arc<Core>, work: &'static str) -> Result<Self> {
        Self::begin_after(core, &mut Wait::new(Purpose::Own(work), None))
    }

    /// Works as [`begin`](Self::begin), after this wait.
    pub(crate) fn begin_after(core: &Arc<Core>, wait: &mut Wait) -> Result<Self> {
        let guard = core.acquire_write_lock(wait)?;
        Self::begin_locked(core, guard).map_err(|(error, _)| error)
    }

    /// Works as [`begin_after`](Self::begin_after), for the application.
    pub(crate) fn begin_exclusive(core: &Arc<Core>, wait: &mut Wait) -> Result<Self> {
        let mut tx = Self::begin_after(core, wait)?;
        tx.exclusive = true;
        Ok(tx)
    }

    /// Sets the purpose for which the transaction is held from here on.
    pub(crate) fn set_purpose(&self, purpose: &Purpose) {
        if let Some(guard) = &self.guard {
            guard.set_purpose(purpose);
        }
    }

    pub(crate) fn begin_locked(
        core: &Arc<Core>,
        guard: WriteLockGuard,
    ) -> std::result::Result<Self, (Error, WriteLockGuard)> {
        let tx = match core.begin_write() {
            Ok(tx) => tx,
            Err(error) => return Err((error, guard)),
        };
        let (next_seq, end_offset) = {
            let tail = core.tail();
            (tail.next_seq, tail.end_offset)
        };
        Ok(Self {
            core: Arc::clone(core),
            tx: Some(TxDebug(tx)),
            pending: RefCell::new(Pending { next_seq, end_offset, ..Pending::default() }),
            seqs: RefCell::default(),
            tables_opened: Cell::new(0),
            gathered: Gathered::default(),
            cleaning_budget: Cell::new(CLEAN_STEP),
            began: guard.since(),
            exclusive: false,
            calls: Cell::new(0),
            engine_failed: Cell::new(false),
            guard: Some(guard),
            _one_thread: PhantomData,
        })
    }

    pub(crate) fn redb(&self) -> &WriteTransaction {
        &self.tx.as_ref().expect("it is taken only by `commit` and `drop`, which consume").0
    }

    /// Opens a table of the application for reading and writing, and creates it if there is none.
    ///
    /// # Errors
    /// Returns an error of redb (another type under this name, opened twice),
    /// [`Error::ReservedTable`] or [`Error::CapturedTable`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::redb::{ReadableTable, TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let tx = store.begin()?;
    /// tx.open_table(ACCOUNTS)?.insert("alice", 100)?;
    /// assert_eq!(tx.open_table(ACCOUNTS)?.get("alice")?.map(|row| row.value()), Some(100));
    /// tx.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_table<K: Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<'_, K, V>,
    ) -> Result<Table<'_, K, V>> {
        self.open(redb::TableHandle::name(&definition))?;
        self.engine(|| Ok(self.redb().open_table(definition)?))
    }

    /// Opens a multimap table of the application for reading and writing, and creates it if there
    /// is none.
    ///
    /// # Errors
    /// As [`open_table`](Self::open_table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::redb::{MultimapTableDefinition, ReadableMultimapTable};
    /// const OWNERS: MultimapTableDefinition<&str, u64> = MultimapTableDefinition::new("owners");
    /// let tx = store.begin()?;
    /// tx.open_multimap_table(OWNERS)?.insert("alice", 1)?;
    /// tx.open_multimap_table(OWNERS)?.insert("alice", 2)?;
    /// assert_eq!(tx.open_multimap_table(OWNERS)?.get("alice")?.len(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_multimap_table<K: Key + 'static, V: Key + 'static>(
        &self,
        definition: MultimapTableDefinition<'_, K, V>,
    ) -> Result<MultimapTable<'_, K, V>> {
        self.open(redb::MultimapTableHandle::name(&definition))?;
        self.engine(|| Ok(self.redb().open_multimap_table(definition)?))
    }

    /// Deletes a table of the application. Returns `false` if there was none.
    ///
    /// # Errors
    /// As [`open_table`](Self::open_table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::redb::TableDefinition;
    /// const OLD: TableDefinition<&str, u64> = TableDefinition::new("old");
    /// let tx = store.begin()?;
    /// tx.open_table(OLD)?;
    /// assert!(tx.delete_table(OLD)?);
    /// assert!(!tx.delete_table(OLD)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn delete_table(&self, definition: impl redb::TableHandle) -> Result<bool> {
        self.open(definition.name())?;
        self.engine(|| Ok(self.redb().delete_table(definition)?))
    }

    /// Fails in a process other than the one that began the transaction. The check is a system
    /// call, about a tenth of an append. On a transaction that is lent to a closure, one call in
    /// [`CALLS_PER_LOOK`] makes the check, and so does the commit.
    pub(crate) fn owned(&self) -> Result<()> {
        let calls = self.calls.get();
        self.calls.set(calls.wrapping_add(1));
        if self.exclusive || calls.is_multiple_of(CALLS_PER_LOOK) { self.core.owner.check() } else { Ok(()) }
    }

    fn open(&self, name: &str) -> Result<()> {
        self.owned()?;
        if name.starts_with(RESERVED_PREFIX) {
            return Err(Error::ReservedTable { name: name.to_owned() });
        }
        if self.core.tail().captures.holds(name) {
            return Err(Error::CapturedTable { name: name.to_owned() });
        }
        self.touch();
        Ok(())
    }

    /// Adds an amount to what gathers in memory, or refuses it.
    pub(crate) fn admit(&self, more: Amount) -> Result<()> {
        self.gathered.add(more, self.core.settings.transaction_max)
    }

    /// Refuses an amount that would be too much together with the rest, before it gathers.
    pub(in crate::store) fn foresee(&self, more: Amount) -> Result<()> {
        self.gathered.check(more, self.core.settings.transaction_max)
    }

    /// Fails if the running write is too large, even if its closure returned `Ok`.
    pub(in crate::store) fn check_size(&self) -> Result<()> {
        self.gathered.was_refused(self.core.settings.transaction_max)?;
        if self.engine_failed.get() {
            return Err(engine_panicked(&"in this transaction, which can only be rolled back"));
        }
        Ok(())
    }

    /// Runs work of the storage engine, and nothing of the application's. A panic of the engine on
    /// a damaged page becomes an error. Then the transaction does not commit, even if its closure
    /// returns `Ok`.
    #[inline]
    pub(crate) fn engine<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            self.touch();
            self.engine_failed.set(true);
            Err(engine_panicked(&*panic))
        })
    }

    /// The next write of a group begins.
    pub(in crate::store) fn begin_write(&self) {
        self.gathered.begin_write();
    }

    /// Whether no further write should join the group.
    pub(in crate::store) fn is_full(&self) -> bool {
        self.gathered.is_full(self.core.settings.transaction_max)
    }

    /// Runs work of the library, which has its own bounds.
    pub(in crate::store) fn within_own_bounds<T>(&self, work: impl FnOnce() -> T) -> T {
        self.gathered.set_unlimited(true);
        let done = work();
        self.gathered.set_unlimited(false);
        done
    }

    /// Records a key of a captured table as dirty. The caller has touched the transaction.
    pub(in crate::store) fn note_dirty_key(&self, dirty: Vec<u8>, kind: DirtyKind) -> Result<()> {
        self.admit(Amount::entry(dirty.len()))?;
        self.pending.borrow_mut().captures.dirty_keys.insert(dirty, Some(kind));
        Ok(())
    }

    /// Notes that a dirty row has another value, in an event of its own. The caller has touched the
    /// transaction.
    pub(in crate::store) fn note_written(&self, dirty: Vec<u8>) {
        self.pending.borrow_mut().captures.written.insert(dirty);
    }

    /// Notes that a coalescing pass runs in this transaction.
    pub(in crate::store) fn note_pass(&self) {
        self.pending.borrow_mut().captures.has_pass = true;
    }

    /// Takes a key out of the dirty ones. The caller has touched the transaction.
    pub(in crate::store) fn drop_dirty_key(&self, dirty: Vec<u8>) -> Result<()> {
        self.admit(Amount::entry(dirty.len()))?;
        self.pending.borrow_mut().captures.dirty_keys.insert(dirty, None);
        Ok(())
    }

    /// What this transaction has pending for a dirty key, if anything. `Some(None)`: the key is to
    /// go.
    pub(in crate::store) fn pending_dirty_key(&self, dirty: &[u8]) -> Option<Option<DirtyKind>> {
        self.pending.borrow().captures.dirty_keys.get(dirty).copied()
    }

    /// Changes what the file knows of a captured table. The caller has touched the transaction.
    pub(in crate::store) fn note_capture(&self, name: &str, row: CaptureRow) {
        self.pending.borrow_mut().captures.rows.insert(name.to_owned(), row);
    }

    /// Returns the sequence number that the next event appended here would get.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let tx = store.begin()?;
    /// assert_eq!(tx.next_seq(), 0);
    /// tx.append(Event::bytes("paid", "1").to("", "payments"))?;
    /// assert_eq!(tx.next_seq(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.pending.borrow().next_seq
    }

    /// Commits an exclusive transaction. When this returns `Ok`, its state and events are durable,
    /// together.
    ///
    /// # Errors
    /// On [`Error::CommitUnknown`] the change may be durable or not, and the store is poisoned. On
    /// any other error, nothing of the change is durable.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let tx = store.begin()?;
    /// tx.append(Event::bytes("paid", "1").to("", "payments"))?;
    /// let receipt = tx.commit()?;
    /// assert_eq!(receipt.seqs(), [0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn commit(mut self) -> Result<Receipt> {
        self.check_size()?;
        let seqs = self.take_seqs();
        let core = Arc::clone(&self.core);
        self.finish(1)?;
        Ok(Receipt::new((), seqs, &core))
    }

    /// Rolls back: nothing of the transaction remains. A drop does the same, but cannot report an
    /// error.
    ///
    /// # Errors
    /// Any error of redb. Even then, nothing is durable.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let tx = store.begin()?;
    /// tx.append(Event::bytes("paid", "1").to("", "payments"))?;
    /// tx.rollback()?;
    /// assert_eq!(store.stats()?.next_seq, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rollback(mut self) -> Result<()> {
        self.abort()
    }

    pub(crate) fn abort(&mut self) -> Result<()> {
        self.core.owner.check()?;
        match self.tx.take() {
            // This also runs in `drop`, while a panic unwinds.
            Some(tx) => unless_it_panics(|| tx.0.abort().map_err(|error| self.core.note(error.into()))),
            None => Ok(()),
        }
    }

    /// Ends the transaction by a commit of everything that has gathered. `writes` is the number of
    /// the application's closures in it.
    pub(crate) fn finish(&mut self, writes: u64) -> Result<()> {
        // The clock is read before the transaction is taken: if the clock fails, the drop still
        // rolls back.
        let now = self.core.now()?;
        // The closure is foreign code and may have forked. Nothing has been locked since.
        self.core.owner.check()?;
        let tx = self.tx.take().expect("a transaction is finished once").0;
        or_poison(&self.core, || {
            crate::store::transaction::commit::commit(&self.core, tx, &self.pending.borrow(), writes, now)
        })
    }

    /// Marks that this commit may be the store's last.
    pub(crate) fn set_closing(&mut self) {
        self.pending.borrow_mut().closing = true;
    }

    /// Makes the commit save where the free pages are, and what is derived from the log. An open
    /// after an unclean end then need not look for either.
    pub(crate) fn set_quick_repair(&mut self) {
        self.pending.borrow_mut().flush_derived = true;
        if let Some(TxDebug(tx)) = &mut self.tx {
            tx.set_quick_repair(true);
        }
    }

    /// Counts events that were there already among this closure's own.
    pub(in crate::store) fn note_seqs(&self, seqs: &[u64]) -> Result<()> {
        self.admit(Amount::entries(seqs.len()))?;
        self.seqs.borrow_mut().extend(seqs);
        Ok(())
    }

    /// Removes the newest of the closure's events: it is not the closure's own after all.
    pub(in crate::store) fn forget_newest_seq(&self) {
        self.seqs.borrow_mut().pop();
    }

    /// Notes a write that only a rollback of the whole transaction takes back.
    pub(crate) fn touch(&self) {
        self.tables_opened.set(self.tables_opened.get() + 1);
    }

    pub(crate) fn take_seqs(&self) -> Vec<u64> {
        std::mem::take(&mut self.seqs.borrow_mut())
    }

    /// Whether the commit would write nothing at all.
    pub(crate) fn is_empty(&self) -> bool {
        let pending = self.pending.borrow();
        self.tables_opened.get() == 0 && pending.frames.is_empty() && pending.inbox.is_empty()
    }

    pub(crate) fn savepoint(&self) -> Savepoint {
        let pending = self.pending.borrow();
        Savepoint {
            next_seq: pending.next_seq,
            end_offset: pending.end_offset,
            frames: pending.frames.len(),
            undo: pending.undo.len(),
            tables_opened: self.tables_opened.get(),
            gathered: self.gathered.point(),
        }
    }

    /// Whether something since the savepoint can only be rolled back together with everything else.
    pub(crate) fn is_dirty_since(&self, savepoint: &Savepoint) -> bool {
        self.tables_opened.get() != savepoint.tables_opened
    }

    /// Rolls back everything that has gathered in memory since the savepoint.
    pub(crate) fn roll_back_to(&self, savepoint: &Savepoint) {
        let mut pending = self.pending.borrow_mut();
        pending.next_seq = savepoint.next_seq;
        pending.end_offset = savepoint.end_offset;
        pending.frames.truncate(savepoint.frames);
        while pending.undo.len() > savepoint.undo {
            match pending.undo.pop() {
                Some(Undo::Lane(key, Some(before))) => drop(pending.lanes.insert(key, before)),
                Some(Undo::Lane(key, None)) => drop(pending.lanes.remove(&key)),
                Some(Undo::Inbox(key, earlier)) => {
                    match earlier {
                        Some(row) => pending.inbox.insert(key, row),
                        None => pending.inbox.remove(&key),
                    };
                }
                Some(Undo::Stream(name, None)) => drop(pending.streams.remove(&name)),
                Some(Undo::Stream(name, Some((state, events)))) => {
                    if let Some(stream) = pending.streams.get_mut(&name) {
                        stream.state = state;
                        stream.run.seqs.truncate(events);
                    }
                }
                None => {}
            }
        }
        self.gathered.roll_back_to(savepoint.gathered);
        self.seqs.borrow_mut().clear();
    }
}

/// Rolls back explicitly. If redb's transaction were dropped while a panic unwinds, redb would
/// instead give up the clean close of the whole database.
impl Drop for Transaction {
    fn drop(&mut self) {
        if self.tx.is_some() && self.core.owner.is_elsewhere() {
            // The owner's transaction goes on. The forked copy leaks its parts: ending the
            // transaction would take locks.
            std::mem::forget((self.tx.take(), self.guard.take()));
            keep(&self.core);
            return;
        }
        if let Err(error) = self.abort() {
            in_drop(|| tracing::warn!(%error, "rolling back failed; nothing was committed"));
        }
        let held = self.began.elapsed();
        if held > HELD_TOO_LONG {
            let held_ms = held.as_millis();
            in_drop(|| {
                tracing::warn!(
                    held_ms,
                    "a write transaction was held for long; all other writes waited for it"
                );
            });
        }
    }
}
