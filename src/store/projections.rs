//! Projections in the file: their positions, the tables that they own, the events that they have given up.
//!
//! ```text
//! onewrite.projections  name → id u64, version u64, position u64, rebuild id u64 (0: none), rebuild version u64,
//!                              rebuild position u64, crc32 u64 (of the name and the six before)
//! onewrite.failures     (id u32, seq u64) → at ms u64, attempts u32, text t16
//! ```
//!
//! **Invariants.** A position is written in the transaction that applies what it passes. The tables of a rebuild carry
//! another name until it has caught up; one transaction then puts them in the place of the old ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use redb::{
    Key, MultimapTable, MultimapTableDefinition, MultimapTableHandle, Table, TableDefinition, TableHandle,
    Value, WriteTransaction,
};

use super::Store;
use super::cleanup::{Task, rebuild_tasks};
use super::cursor::head;
use super::start_at::{StartAt, check_position, next_cursor_id, warn_trimmed};
use super::transaction::Transaction;
use super::wanted::{Looked, Wanted};
use crate::error::{Error, Result};
use crate::event::Recorded;
use crate::log::keys::{self, CursorId};
use crate::log::record;
use crate::log::wire_bytes::{Malformed, Reader, put_text16};
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{FAILURES, PROJECTIONS, read_u64s, u64s};
use crate::time::Deadline;

/// What a table is called while it is being rebuilt. Reserved, so that no application's table is called so.
const REBUILD_PREFIX: &str = "onewrite.rebuild.";

/// What a table is called that a rebuild has replaced, until it is removed.
const REPLACED_PREFIX: &str = "onewrite.replaced.";

/// Longest text of a failure that is kept, in bytes.
const TEXT_BYTES_MAX: usize = 1024;

/// One line of progress through the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Track {
    pub(crate) id: CursorId,
    pub(crate) version: u32,
    pub(crate) position: u64,
}

/// A projection, as it stands on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProjectionRow {
    pub(crate) live: Track,
    pub(crate) rebuild: Option<Track>,
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Live,
    Rebuild,
}

impl ProjectionRow {
    pub(crate) fn track(&self, which: Which) -> Option<Track> {
        match which {
            Which::Live => Some(self.live),
            Which::Rebuild => self.rebuild,
        }
    }

    pub(super) fn tracks(&self) -> impl Iterator<Item = Track> {
        std::iter::once(self.live).chain(self.rebuild)
    }

    /// No record from here on may be trimmed.
    pub(crate) fn wants_from(&self) -> u64 {
        self.tracks().map(|track| track.position).min().unwrap_or(0)
    }

    fn numbers(&self) -> [u64; 6] {
        let numbers = |track: Track| [u64::from(track.id), u64::from(track.version), track.position];
        let [a, b, c] = numbers(self.live);
        let [d, e, f] = self.rebuild.map(numbers).unwrap_or_default();
        [a, b, c, d, e, f]
    }

    fn checksum(name: &str, numbers: [u64; 6]) -> u64 {
        record::body_checksum(&[name.as_bytes(), &u64s(numbers)].concat()).into()
    }

    pub(crate) fn to_bytes(self, name: &str) -> Vec<u8> {
        let numbers = self.numbers();
        [u64s(numbers), u64s([Self::checksum(name, numbers)])].concat()
    }

    pub(crate) fn from_bytes(name: &str, bytes: &[u8]) -> Option<Self> {
        let [id, version, position, rebuild_id, rebuild_version, rebuild_position, crc] = read_u64s(bytes)?;
        let row = Self {
            live: Track { id: id.try_into().ok()?, version: version.try_into().ok()?, position },
            rebuild: match CursorId::try_from(rebuild_id).ok()? {
                0 => None,
                id => {
                    let version = rebuild_version.try_into().ok()?;
                    Some(Track { id, version, position: rebuild_position })
                }
            },
        };
        (Self::checksum(name, row.numbers()) == crc).then_some(row)
    }
}

/// An event that a projection has given up, and why.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// use onewrite::{Error, Event, FailurePolicy, ProjectionFailure};
/// store.write(|tx| tx.append(Event::bytes("paid", "not a number").unpublished()))?;
/// let projection = store.projection("balances").on_failure(FailurePolicy::Quarantine { attempts: 1 })
///     .run(|_, _| Err(Error::app("not a number")))?;
/// projection.await_position(0, Duration::from_secs(5))?;
/// let failure: ProjectionFailure = projection.failures(None, 10)?.remove(0);
/// assert_eq!((failure.seq, &*failure.reason), (0, "not a number"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionFailure {
    /// The event.
    pub seq: u64,
    /// Since when, Unix milliseconds by the wall clock.
    pub since_ms: u64,
    /// Tries.
    pub attempts: u32,
    /// What the handler said, or what is wrong with the record.
    pub reason: String,
}

impl ProjectionFailure {
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = u64s([self.since_ms]);
        out.extend_from_slice(&self.attempts.to_le_bytes());
        put_text16(&mut out, head(&self.reason, TEXT_BYTES_MAX));
        out
    }

    fn from_bytes(seq: u64, bytes: &[u8]) -> Result<Self> {
        let read = |bytes| -> std::result::Result<Self, Malformed> {
            let mut reader = Reader(bytes);
            let (since_ms, attempts) = (reader.u64()?, reader.u32()?);
            let reason = reader.text16()?.to_owned();
            reader.end()?;
            Ok(Self { seq, since_ms, attempts, reason })
        };
        read(bytes).map_err(|_| damaged_row("failure"))
    }
}

/// How a projection is.
///
/// ```
/// use onewrite::ProjectionState;
/// assert_eq!(ProjectionState::default(), ProjectionState::CatchingUp);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ProjectionState {
    /// It has not reached the end of the log yet.
    #[default]
    CatchingUp,
    /// It has applied everything that was in the log when it last looked.
    Live,
    /// Its tables are of an earlier version and stay as they are until the rebuild has caught up.
    Rebuilding,
    /// Its tables are of an earlier version, and the rebuild for its own was [cancelled](crate::Store::cancel_rebuild): they stay
    /// as they are until a rebuild is asked for.
    Cancelled,
    /// The handler failed on this event; it is tried again after a while.
    Retrying {
        /// The event.
        seq: u64,
        /// What the handler said.
        reason: String,
    },
    /// The handler fails on this event for good, and the policy says to stop there. Started again, it tries again.
    Stopped {
        /// The event.
        seq: u64,
        /// What the handler said, or what is wrong with the record.
        reason: String,
    },
    /// It can do nothing any more: its store is closed, poisoned or cannot be read.
    Failed(String),
    /// Ended by the application.
    Ended,
}

/// A projection's state and figures.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let projection = store.projection("balances").run(|_, _| Ok(()))?;
/// let status: onewrite::ProjectionStatus = projection.status();
/// assert_eq!((status.position, status.applied, status.rebuilding), (0, 0, None));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ProjectionStatus {
    /// How it is.
    pub state: ProjectionState,
    /// Everything below is in its tables, was let pass by its filter, or is among its failures.
    pub position: u64,
    /// How far a rebuild has come, if one is under way.
    pub rebuilding: Option<u64>,
    /// Why a rebuild stands still, if one does: the event, and what the handler said of it.
    pub rebuild_stopped: Option<String>,
    /// Events applied since it was started, a rebuild's included.
    pub applied: u64,
    /// Tries that failed since it was started.
    pub failed_tries: u64,
    /// Events given up since it was started.
    pub quarantined: u64,
}

/// What a running projection shares with others.
#[derive(Debug, Default)]
pub(crate) struct RunningProjection {
    status: Mutex<ProjectionStatus>,
    changed: Condvar,
}

impl RunningProjection {
    pub(crate) fn status(&self) -> MutexGuard<'_, ProjectionStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the status, and tells who waits for that.
    pub(crate) fn change(&self, change: impl FnOnce(&mut ProjectionStatus)) {
        change(&mut self.status());
        self.changed.notify_all();
    }

    /// Waits until `done` says so, or until the deadline; what it said last.
    pub(crate) fn wait<T>(
        &self,
        deadline: Deadline,
        done: impl Fn(&ProjectionStatus) -> Option<T>,
    ) -> Option<T> {
        let mut status = self.status();
        loop {
            if let Some(done) = done(&status) {
                return Some(done);
            }
            if deadline.is_over() {
                return None;
            }
            status = deadline.wait(&self.changed, status);
        }
    }
}

/// The projections that run in this process.
#[derive(Debug, Default)]
pub(crate) struct Projections {
    running: Mutex<BTreeMap<String, Running>>,
}

/// One of them, and the tables that are its own.
#[derive(Debug)]
struct Running {
    shared: Arc<RunningProjection>,
    owned: OwnedTables,
}

impl Projections {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the name, and the tables: a rebuild of one would delete what another has written.
    pub(crate) fn register(&self, name: &str, owned: &OwnedTables) -> Result<Arc<RunningProjection>> {
        let mut running = self.lock();
        if running.contains_key(name) {
            return Err(Error::ProjectionRunning { name: name.to_owned() });
        }
        for (projection, other) in running.iter() {
            if let Some(table) = owned.names().find(|table| other.owned.names().any(|its| its == *table)) {
                return Err(Error::ProjectionTable { name: table.clone(), projection: projection.clone() });
            }
        }
        let shared = Arc::<RunningProjection>::default();
        running.insert(name.to_owned(), Running { shared: Arc::clone(&shared), owned: owned.clone() });
        Ok(shared)
    }

    pub(crate) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<RunningProjection>> {
        self.lock().get(name).map(|running| Arc::clone(&running.shared))
    }
}

/// The tables that a projection owns, by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnedTables {
    pub(crate) plain: Vec<String>,
    pub(crate) multimap: Vec<String>,
}

pub(super) fn shadow_prefix(track: CursorId) -> String {
    format!("{REBUILD_PREFIX}{track}.")
}

/// What stands before the names of the tables that this rebuild has replaced.
fn replaced_prefix(rebuild: CursorId) -> String {
    format!("{REPLACED_PREFIX}{rebuild}.")
}

/// A name is all that deleting and renaming look at.
fn plain(name: &str) -> TableDefinition<'_, u64, u64> {
    TableDefinition::new(name)
}

fn multimap(name: &str) -> MultimapTableDefinition<'_, u64, u64> {
    MultimapTableDefinition::new(name)
}

/// Deletes a table of this name, of whichever kind: that of an earlier version may have been another.
pub(super) fn delete_any(tx: &WriteTransaction, name: &str) -> Result<()> {
    match tx.delete_table(plain(name)) {
        Err(redb::TableError::TableIsMultimap(_)) => tx.delete_multimap_table(multimap(name))?,
        deleted => deleted?,
    };
    Ok(())
}

/// Renames a table, of whichever kind, if there is one of this name.
fn rename_any(tx: &WriteTransaction, from: &str, to: &str) -> Result<()> {
    let renamed = match tx.rename_table(plain(from), plain(to)) {
        Err(redb::TableError::TableIsMultimap(_)) => tx.rename_multimap_table(multimap(from), multimap(to)),
        renamed => renamed,
    };
    match renamed {
        Ok(()) | Err(redb::TableError::TableDoesNotExist(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl OwnedTables {
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.plain.iter().chain(&self.multimap)
    }

    /// A name that is declared more than once, of one kind or of both.
    pub(crate) fn twice(&self) -> Option<&String> {
        let mut seen = BTreeSet::new();
        self.names().find(|name| !seen.insert(*name))
    }

    /// Puts the tables of a rebuild in the place of the old ones. A table that the rebuild has not opened is gone then. The old
    /// tables are renamed: freeing their pages in this transaction would take as long as they are large.
    fn swap(&self, tx: &WriteTransaction, rebuild: CursorId) -> Result<()> {
        let (new, old) = (shadow_prefix(rebuild), replaced_prefix(rebuild));
        for name in self.names() {
            rename_any(tx, name, &format!("{old}{name}"))?;
            rename_any(tx, &format!("{new}{name}"), name)?;
        }
        Ok(())
    }
}

/// What a projection's handler writes into: the tables that the projection owns, and no others.
///
/// While the projection is rebuilt the same handler writes the tables that will take their place.
///
/// ```
/// use std::time::Duration;
/// use onewrite::{Event, ProjectionTransaction, redb::{ReadableTable, TableDefinition}};
/// const COUNTS: TableDefinition<&str, u64> = TableDefinition::new("counts");
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
/// let counts = store.projection("counts").table(COUNTS).run(|event, tx: &ProjectionTransaction<'_>| {
///     let mut counts = tx.open_table(COUNTS)?;
///     let count = counts.get(event.event_type())?.map_or(0, |row| row.value());
///     counts.insert(event.event_type(), count + 1)?;
///     Ok(())
/// })?;
/// counts.await_position(0, Duration::from_secs(5))?;
/// assert_eq!(store.read()?.open_table(COUNTS)?.get("paid")?.map(|row| row.value()), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ProjectionTransaction<'tx> {
    tx: &'tx Transaction,
    owned: &'tx OwnedTables,
    /// What stands before the names of the tables, if it is a rebuild.
    prefix: Option<String>,
}

impl<'tx> ProjectionTransaction<'tx> {
    /// Opens one of the projection's tables for reading and writing, creating it if there is none.
    ///
    /// # Errors
    /// [`Error::UndeclaredTable`] for a table that the projection has not [declared](crate::ProjectionBuilder::table); what redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// use onewrite::{Event, FailurePolicy, redb::TableDefinition};
    /// const OTHER: TableDefinition<&str, u64> = TableDefinition::new("other");
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let counts = store.projection("counts").on_failure(FailurePolicy::Stop { attempts: 1 })
    ///     .run(|_, tx| tx.open_table(OTHER).map(drop))?;
    /// let error = counts.await_position(0, Duration::from_secs(5)).unwrap_err();
    /// assert!(error.to_string().contains("other"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_table<K: Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<'_, K, V>,
    ) -> Result<Table<'tx, K, V>> {
        let name = self.name(TableHandle::name(&definition), &self.owned.plain)?;
        self.tx.touch();
        Ok(self.tx.redb().open_table(TableDefinition::<K, V>::new(&name))?)
    }

    /// Opens one of the projection's multimap tables for reading and writing, creating it if there is none.
    ///
    /// # Errors
    /// As [`open_table`](Self::open_table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// use onewrite::{Event, redb::MultimapTableDefinition};
    /// const BY_TYPE: MultimapTableDefinition<&str, u64> = MultimapTableDefinition::new("by type");
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let by_type = store.projection("by type").multimap_table(BY_TYPE).run(|event, tx| {
    ///     tx.open_multimap_table(BY_TYPE)?.insert(event.event_type(), event.seq())?;
    ///     Ok(())
    /// })?;
    /// by_type.await_position(0, Duration::from_secs(5))?;
    /// assert_eq!(store.read()?.open_multimap_table(BY_TYPE)?.get("paid")?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_multimap_table<K: Key + 'static, V: Key + 'static>(
        &self,
        definition: MultimapTableDefinition<'_, K, V>,
    ) -> Result<MultimapTable<'tx, K, V>> {
        let name = self.name(MultimapTableHandle::name(&definition), &self.owned.multimap)?;
        self.tx.touch();
        Ok(self.tx.redb().open_multimap_table(MultimapTableDefinition::<K, V>::new(&name))?)
    }

    /// Whether this writes the tables of a rebuild, which nobody reads yet.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// # use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let projection = store.projection("counts").run(|_, tx| {
    ///     assert!(!tx.is_rebuild());
    ///     Ok(())
    /// })?;
    /// projection.await_position(0, Duration::from_secs(5))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_rebuild(&self) -> bool {
        self.prefix.is_some()
    }

    fn name(&self, name: &str, owned: &[String]) -> Result<String> {
        self.tx.owned()?;
        if !owned.iter().any(|table| table == name) {
            return Err(Error::UndeclaredTable { name: name.to_owned() });
        }
        if self.tx.core.tail().captures.holds(name) {
            return Err(Error::CapturedTable { name: name.to_owned() });
        }
        Ok(format!("{}{name}", self.prefix.as_deref().unwrap_or_default()))
    }
}

// --- what the worker does -----------------------------------------------------------------------------------------

/// What a handler is told whose tables are of another version.
pub(crate) fn not_rebuilt(name: &str, live: Track) -> Error {
    let reason = format!("its tables are of version {} and not rebuilt yet", live.version);
    Error::ProjectionStopped { name: name.to_owned(), position: live.position, reason }
}

impl Transaction {
    /// The tables of one track.
    pub(crate) fn projecting<'tx>(
        &'tx self,
        name: &str,
        owned: &'tx OwnedTables,
        which: Which,
    ) -> Result<ProjectionTransaction<'tx>> {
        let prefix = match which {
            Which::Live => None,
            Which::Rebuild => Some(shadow_prefix(self.track(name, which)?.id)),
        };
        Ok(ProjectionTransaction { tx: self, owned, prefix })
    }

    fn track(&self, name: &str, which: Which) -> Result<Track> {
        let track = self.projection_row(name)?.track(which);
        track.ok_or_else(|| Error::NoSuchProjection { name: name.to_owned() })
    }

    /// Fails where the live tables are of another version.
    pub(crate) fn require_version(&self, name: &str, version: u32) -> Result<()> {
        let live = self.projection_row(name)?.live;
        if live.version == version { Ok(()) } else { Err(not_rebuilt(name, live)) }
    }

    fn projection_row(&self, name: &str) -> Result<ProjectionRow> {
        if let Some(row) = self.pending.borrow().projections.get(name) {
            return Ok(*row);
        }
        let row = self.core.tail().projections.get(name).copied();
        row.ok_or_else(|| Error::NoSuchProjection { name: name.to_owned() })
    }

    fn write_projection_row(&self, name: &str, row: ProjectionRow) -> Result<()> {
        // Only a rollback of the whole transaction takes it back, and what is pending goes with it.
        self.touch();
        self.redb().open_table(PROJECTIONS)?.insert(name, row.to_bytes(name).as_slice())?;
        self.pending.borrow_mut().projections.insert(name.to_owned(), row);
        Ok(())
    }

    /// Moves a track on.
    pub(crate) fn move_projection(&self, name: &str, which: Which, position: u64) -> Result<()> {
        let mut row = self.projection_row(name)?;
        match (which, &mut row.rebuild) {
            (Which::Live, _) => row.live.position = position,
            (Which::Rebuild, Some(rebuild)) => rebuild.position = position,
            (Which::Rebuild, None) => return Err(Error::NoSuchProjection { name: name.to_owned() }),
        }
        self.write_projection_row(name, row)
    }

    /// Moves a track past an event that it gives up.
    pub(crate) fn give_up_event(
        &self,
        name: &str,
        which: Which,
        seq: u64,
        attempts: u32,
        reason: &str,
    ) -> Result<()> {
        let track = self.track(name, which)?;
        let since_ms = self.core.settings.clock.now().wall_ms;
        let failure = ProjectionFailure { seq, since_ms, attempts, reason: reason.to_owned() };
        self.redb()
            .open_table(FAILURES)?
            .insert(&keys::exception(track.id, seq)[..], failure.to_bytes().as_slice())?;
        // Never beyond the log: the next open would take it for one that has lost its end.
        self.move_projection(name, which, (seq + 1).min(self.next_seq()))
    }

    /// Begins a rebuild from the beginning of the log; one that was under way is forgotten.
    pub(crate) fn begin_rebuild(&self, name: &str, version: u32) -> Result<()> {
        let mut row = self.projection_row(name)?;
        self.touch();
        if let Some(old) = row.rebuild {
            self.drop_rebuild(old)?;
        }
        self.forget_cancelled(name)?;
        let id = next_cursor_id(self)?;
        row.rebuild = Some(Track { id, version, position: 0 });
        self.write_projection_row(name, row)
    }

    /// Takes the rebuild from the projection, and leaves its tables and failures where they are.
    pub(super) fn take_rebuild(&self, name: &str) -> Result<Option<Track>> {
        let mut row = self.projection_row(name)?;
        let taken = row.rebuild.take();
        if taken.is_some() {
            self.write_projection_row(name, row)?;
        }
        Ok(taken)
    }

    /// Forgets the rebuild that is under way, if there is one.
    pub(crate) fn cancel_rebuild(&self, name: &str) -> Result<()> {
        let mut row = self.projection_row(name)?;
        let Some(old) = row.rebuild.take() else { return Ok(()) };
        self.touch();
        self.drop_rebuild(old)?;
        self.write_projection_row(name, row)
    }

    /// The rebuild takes the place of the live one, tables and all.
    pub(crate) fn finish_rebuild(&self, name: &str, owned: &OwnedTables) -> Result<()> {
        let row = self.projection_row(name)?;
        let Some(rebuild) = row.rebuild else { return Ok(()) };
        self.touch();
        owned.swap(self.redb(), rebuild.id)?;
        self.leave(&Task::Tables(replaced_prefix(rebuild.id)))?;
        // What it had declared once, and does no longer.
        self.leave(&Task::Tables(shadow_prefix(rebuild.id)))?;
        self.leave(&Task::Failures(row.live.id))?;
        self.write_projection_row(name, ProjectionRow { live: rebuild, rebuild: None })
    }

    /// Forgets a rebuild that nobody goes on with: its failures and its tables, whose names tell that they are its.
    pub(super) fn drop_rebuild(&self, rebuild: Track) -> Result<()> {
        rebuild_tasks(rebuild.id).iter().try_for_each(|task| self.leave(task))
    }

    pub(super) fn release(&self, seqs: &[u64]) -> Result<()> {
        let tail = self.core.tail();
        super::commit::drop_released(self.redb(), &tail, &self.pending.borrow(), tail.trimmed_to, seqs)
    }

    /// Takes an event from among the failures; an error if it is not there.
    pub(crate) fn drop_failure(&self, name: &str, seq: u64) -> Result<()> {
        let id = self.projection_row(name)?.live.id;
        self.touch();
        let removed = self.redb().open_table(FAILURES)?.remove(&keys::exception(id, seq)[..])?.is_some();
        if !removed {
            return Err(Error::NoSuchFailure { name: name.to_owned(), seq });
        }
        self.release(&[seq])
    }
}

impl Store {
    /// The projection of this name; made, durably, if there is none.
    pub(crate) fn projection_row(&self, name: &str, version: u32, start: StartAt) -> Result<ProjectionRow> {
        let core = self.core();
        if let Some(row) = core.tail().projections.get(name) {
            return Ok(*row);
        }
        let mut tx = Transaction::begin(core, "the start of a projection")?;
        let position = match start {
            // Not where trimming has come to: what streams still want stands below.
            StartAt::Oldest => 0,
            StartAt::Newest => tx.next_seq(),
            StartAt::Position(position) => {
                check_position("start_at", position, tx.next_seq())?;
                warn_trimmed(name, position, core.tail().trimmed_to);
                position
            }
        };
        let row =
            ProjectionRow { live: Track { id: next_cursor_id(&tx)?, version, position }, rebuild: None };
        tx.engine(|| tx.write_projection_row(name, row))?;
        tx.finish(1)?;
        Ok(row)
    }

    /// Events that the projection has given up, by sequence number, after `after`, at most `limit`.
    pub(crate) fn failures(
        &self,
        name: &str,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<ProjectionFailure>> {
        let row = self.core().tail().projections.get(name).copied();
        let id = row.ok_or_else(|| Error::NoSuchProjection { name: name.to_owned() })?.live.id;
        let from = keys::exception(id, after.map_or(0, |seq| seq.saturating_add(1)));
        let to = keys::after_prefix(&id.to_be_bytes());
        self.core().reading(|tx| {
            let failures = tx.open_table(FAILURES)?;
            let rows = failures.range(&from[..]..to.as_slice())?.take(limit);
            rows.map(|row| {
                let (at, row) = row?;
                let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("failure"))?;
                ProjectionFailure::from_bytes(seq, row.value())
            })
            .collect()
        })
    }

    /// Forgets a projection: its position and the events that it had given up. Its tables stay as they are, and are the
    /// application's then: a new projection over them would write everything a second time, so delete them before. The log no
    /// longer waits for it.
    ///
    /// # Errors
    /// [`Error::NoSuchProjection`], or [`Error::ProjectionRunning`] while it runs.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::Error;
    /// let projection = store.projection("old").run(|_, _| Ok(()))?;
    /// assert!(matches!(store.forget_projection("old"), Err(Error::ProjectionRunning { .. })));
    /// projection.stop(Duration::from_secs(5));
    /// store.forget_projection("old")?;
    /// assert!(store.stats()?.projections.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forget_projection(&self, name: &str) -> Result<()> {
        let core = self.core();
        core.refuse_inside("Store::forget_projection")?;
        if core.projections.get(name).is_some() {
            return Err(Error::ProjectionRunning { name: name.to_owned() });
        }
        let mut tx = Transaction::begin(core, "`Store::forget_projection`")?;
        tx.engine(|| {
            let row = tx.projection_row(name)?;
            tx.leave(&Task::Failures(row.live.id))?;
            if let Some(rebuild) = row.rebuild {
                tx.drop_rebuild(rebuild)?;
            }
            tx.forget_cancelled(name)?;
            tx.redb().open_table(PROJECTIONS)?.remove(name)?;
            Ok(())
        })?;
        tx.finish(1)?;
        {
            let mut tail = core.tail();
            tail.projections.remove(name);
            tail.trim_left = true;
        }
        self.announce_ride();
        Ok(())
    }
}

/// One stretch of the log, as a projection reads it.
#[derive(Debug, Default)]
pub(crate) struct Stretch {
    /// The events that its filter takes.
    pub(crate) events: Vec<Arc<Recorded>>,
    /// The position behind them, and behind what the filter lets pass.
    pub(crate) position: u64,
    /// The position is the end of the log as of now.
    pub(crate) at_end: bool,
    /// The record behind them that cannot be read, and what is wrong with it.
    pub(crate) damaged: Option<(u64, Error)>,
}

/// Reads on from `from`: so many events at most, in a read transaction of its own. `None`: there is nothing more.
pub(crate) fn read_stretch(
    store: &Store,
    from: u64,
    wanted: &Wanted,
    events_max: usize,
    bytes_max: usize,
) -> Result<Option<Stretch>> {
    let end = store.core().tail().next_seq;
    if from >= end {
        return Ok(None);
    }
    let mut stretch = Stretch { position: from, ..Stretch::default() };
    let (mut looked_at, mut bytes) = (0, 0);
    let mut events = store.read()?.events_to(from, end)?;
    loop {
        let Some(looked) = events.look(wanted) else {
            // What trimming has taken stands between the last record and here.
            stretch.position = stretch.position.max(end);
            break;
        };
        match looked {
            Ok(Looked { seq, event }) => {
                stretch.position = seq + 1;
                bytes += event.as_ref().map_or(0, |event| event.payload().len());
                stretch.events.extend(event.map(Arc::new));
            }
            Err(error) => {
                let Some(seq) = error.unreadable() else { return Err(error) };
                // One that stands out of order is another place's: the one that belongs here is missing.
                stretch.damaged = Some((seq.max(stretch.position), error));
                break;
            }
        }
        looked_at += 1;
        if stretch.events.len() >= events_max
            || bytes >= bytes_max
            || looked_at >= crate::limits::LOAD_EVENTS_MAX
        {
            break;
        }
    }
    stretch.at_end = stretch.position >= end && stretch.damaged.is_none();
    Ok((stretch.position > from || stretch.damaged.is_some()).then_some(stretch))
}
