//! What a projection writes besides its own tables: its position, and the events that it has given
//! up.
//!
//! ```text
//! onewrite.failures     (id u32, seq u64) → at ms u64, attempts u32, text t16
//! ```
//!
//! **Invariant.** A position is written in the transaction that applies the events below it.

use std::sync::Arc;

use super::transaction::ProjectionTransaction;
use crate::error::{Error, Result};
use crate::event::{Destination, RecordedEvent};
use crate::log::keys;
use crate::log::wire_bytes::{Malformed, Reader, put_text16};
use crate::storage::errors::damaged_row;
use crate::storage::tables::cleanup::Task;
use crate::storage::tables::exception::head;
use crate::storage::tables::projection::{ProjectionRow, Track, Which};
use crate::storage::tables::schema::{FAILURES, PROJECTIONS, u64s};
use crate::store::Store;
use crate::store::read::wanted::{Looked, Wanted};
use crate::store::settings::start_at::StartAt;
use crate::store::shared::projections::{OwnedTables, replaced_prefix, shadow_prefix};
use crate::store::transaction::Transaction;
use crate::store::transaction::cursor_ids::{check_position, next_cursor_id, warn_trimmed};

/// An event that a projection has given up, and why.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// use onewrite::{Error, Event, FailurePolicy, ProjectionFailure};
/// store.write(|tx| tx.append(Event::bytes("paid", "not a number").unpublished()))?;
/// let projection = store.projection("balances").on_failure(FailurePolicy::Quarantine { attempts: 1 })
///     .spawn(|_, _| Err(Error::app("not a number")))?;
/// projection.wait_for_position(0, Duration::from_secs(5))?;
/// let failure: ProjectionFailure = projection.failures().list(None, 10)?.remove(0);
/// assert_eq!((failure.seq, &*failure.reason), (0, "not a number"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionFailure {
    /// The event.
    pub seq: u64,
    /// When the event was given up, in Unix milliseconds by the wall clock.
    pub since_ms: u64,
    /// Tries.
    pub attempts: u32,
    /// The handler's error, or the damage of the record.
    pub reason: String,
    /// The event's type; `None` if its record cannot be read.
    pub event_type: Option<String>,
    /// Where the event is published to; `None` if its record cannot be read.
    pub destination: Option<Destination>,
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
            Ok(Self { seq, since_ms, attempts, reason, event_type: None, destination: None })
        };
        read(bytes).map_err(|_| damaged_row("failure"))
    }
}

/// The longest text of a failure that is kept, in bytes.
const TEXT_BYTES_MAX: usize = 1024;

/// The error for a handler whose tables are of another version.
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

    /// Fails if the live tables are of another version.
    pub(crate) fn require_version(&self, name: &str, version: u32) -> Result<()> {
        let live = self.projection_row(name)?.live;
        if live.version == version { Ok(()) } else { Err(not_rebuilt(name, live)) }
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
        let reason = reason.to_owned();
        let failure =
            ProjectionFailure { seq, since_ms, attempts, reason, event_type: None, destination: None };
        self.redb()
            .open_table(FAILURES)?
            .insert(&keys::exception(track.id, seq)[..], failure.to_bytes().as_slice())?;
        // Never beyond the log: the next open would believe that the log had lost its end.
        self.move_projection(name, which, (seq + 1).min(self.next_seq()))
    }

    /// Begins a rebuild from the beginning of the log. A rebuild that was under way is forgotten.
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

    /// Forgets the rebuild that is under way, if there is one.
    pub(crate) fn cancel_rebuild(&self, name: &str) -> Result<()> {
        let mut row = self.projection_row(name)?;
        let Some(old) = row.rebuild.take() else { return Ok(()) };
        self.touch();
        self.drop_rebuild(old)?;
        self.write_projection_row(name, row)
    }

    /// Puts the rebuild in the place of the live track, with its tables.
    pub(crate) fn finish_rebuild(&self, name: &str, owned: &OwnedTables) -> Result<()> {
        let row = self.projection_row(name)?;
        let Some(rebuild) = row.rebuild else { return Ok(()) };
        self.touch();
        owned.swap(self.redb(), rebuild.id)?;
        self.leave(&Task::Tables(replaced_prefix(rebuild.id)))?;
        // Tables that the projection once declared and no longer does.
        self.leave(&Task::Tables(shadow_prefix(rebuild.id)))?;
        self.leave(&Task::Failures(row.live.id))?;
        self.write_projection_row(name, ProjectionRow { live: rebuild, rebuild: None })
    }

    /// Removes an event from the failures. Returns an error if the event is not there.
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
    /// Returns the projection of this name. Creates it durably if there is none.
    pub(crate) fn projection_row(&self, name: &str, version: u32, start: StartAt) -> Result<ProjectionRow> {
        let core = self.core();
        if let Some(row) = core.tail().projections.get(name) {
            return Ok(*row);
        }
        let mut tx = Transaction::begin(core, "the start of a projection")?;
        let position = match start {
            // Not the position that trimming has reached: events that streams still need stand
            // below it.
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

    /// Lists events that the projection has given up, by sequence number, after `after`, at most
    /// `limit`.
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

    /// Forgets a projection: its position and the events that it had given up.
    ///
    /// The tables stay as they are, and then belong to the application. A new projection over them
    /// would write everything a second time, so delete the tables before. The log no longer waits
    /// for the projection.
    ///
    /// # Errors
    /// [`Error::NoSuchProjection`], or [`Error::ProjectionRunning`] while it runs.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::Error;
    /// let projection = store.projection("old").spawn(|_, _| Ok(()))?;
    /// assert!(matches!(store.forget_projection("old"), Err(Error::ProjectionRunning { .. })));
    /// projection.stop(Duration::from_secs(5));
    /// store.forget_projection("old")?;
    /// assert!(store.stats()?.projections.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forget_projection(&self, name: &str) -> Result<()> {
        let core = self.core();
        core.refuse_reentrant("Store::forget_projection")?;
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
        self.announce_progress();
        Ok(())
    }
}

/// A piece of the log, as a projection reads it.
#[derive(Debug, Default)]
pub(crate) struct Stretch {
    /// The events that its filter takes.
    pub(crate) events: Vec<Arc<RecordedEvent>>,
    /// The position behind these events, and behind events that the filter lets pass.
    pub(crate) position: u64,
    /// Whether the position is the end of the log at the time of reading.
    pub(crate) at_end: bool,
    /// The record behind these events that cannot be read, and its error.
    pub(crate) damaged: Option<(u64, Error)>,
}

/// Reads one piece from `from` on, up to a number of events, in a read transaction of its own.
/// `None` means that there is nothing more.
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
            // Trimming has removed what stood between the last record and here.
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
                // A record out of order belongs to another place, so the record that belongs here
                // is missing.
                stretch.damaged = Some((seq.max(stretch.position), error));
                break;
            }
        }
        looked_at += 1;
        if stretch.events.len() >= events_max
            || bytes >= bytes_max
            || looked_at >= crate::tuning::LOAD_EVENTS_MAX
        {
            break;
        }
    }
    stretch.at_end = stretch.position >= end && stretch.damaged.is_none();
    Ok((stretch.position > from || stretch.damaged.is_some()).then_some(stretch))
}
