//! Clean-up: what was deleted or forgotten is marked at once, and its rows are removed in bounded pieces.
//!
//! ```text
//! onewrite.cleanup  1, stream name        → next revision u64, end u64    records and index of a truncated or deleted stream
//!                   2, track id u32 BE    → ()                            failures of a projection
//!                   3, cursor id u32 BE   → ()                            exceptions, due times and parked events of a relay
//!                   4, capture id u32 BE  → ()                            marks of a captured table
//!                   5, prefix             → ()                            tables whose names begin so
//! ```
//!
//! The transaction that deletes something writes a row, a *task*. It removes the first piece itself, so a small deletion
//! leaves no task. The writer thread does the rest, a piece in each group, and pieces by themselves while the store is
//! idle. A task is in the file until it is done: after a crash or a close the next opening goes on with it.
//!
//! **Invariants.** One transaction removes `CLEAN_STEP` rows at most, or one table. No task names a thing
//! that can be made anew. A deleted stream takes no events, and a truncated stream gives no revision twice. A new capture gets
//! no id that a task names.

mod hidden;
mod pieces;
mod work;

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableError};

pub(crate) use self::hidden::Hidden;
pub(crate) use self::work::{CleanUp, Cleaning};
use super::capture::rows::CaptureId;
use super::core::Tail;
use super::projections::shadow_prefix;
use super::transaction::Transaction;
use crate::error::Result;
use crate::log::keys::CursorId;
use crate::storage::tables::schema::{CLEANUP, META, read_u64s, u64s};

/// Something to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Task {
    Stream(Vec<u8>),
    Failures(CursorId),
    Relay(CursorId),
    Marks(CaptureId),
    Tables(String),
}

impl Task {
    fn key(&self) -> Vec<u8> {
        let (kind, name): (u8, &[u8]) = match self {
            Self::Stream(name) => (1, name),
            Self::Failures(id) => (2, &id.to_be_bytes()),
            Self::Relay(id) => (3, &id.to_be_bytes()),
            Self::Marks(id) => (4, &id.to_be_bytes()),
            Self::Tables(prefix) => (5, prefix.as_bytes()),
        };
        [&[kind][..], name].concat()
    }

    fn from_key(key: &[u8]) -> Option<Self> {
        let (kind, name) = key.split_first()?;
        let id = || name.try_into().ok().map(u32::from_be_bytes);
        match kind {
            1 => Some(Self::Stream(name.to_vec())),
            2 => id().map(Self::Failures),
            3 => id().map(Self::Relay),
            4 => id().map(Self::Marks),
            5 => String::from_utf8(name.to_vec()).ok().map(Self::Tables),
            _ => None,
        }
    }
}

/// The revisions of a stream that are to be removed: the next one, and the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Revisions {
    next: u64,
    end: u64,
}

impl Revisions {
    fn to_bytes(self) -> Vec<u8> {
        u64s([self.next, self.end])
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        read_u64s(bytes).map(|[next, end]| Self { next, end })
    }

    fn len(self) -> u64 {
        self.end.saturating_sub(self.next)
    }
}

/// How much is left to be cleaned up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Left {
    pub(crate) tasks: u64,
    /// Events of streams.
    pub(crate) events: u64,
}

/// How a transaction changes what is left.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeftChange {
    tasks: i64,
    events: i64,
}

impl Left {
    pub(super) fn settle(&mut self, change: LeftChange) {
        self.tasks = self.tasks.saturating_add_signed(change.tasks);
        self.events = self.events.saturating_add_signed(change.events);
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// What the file says.
fn left(tx: &ReadTransaction) -> Result<Left> {
    let mut left = Left::default();
    let table = match tx.open_table(CLEANUP) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(left),
        table => table?,
    };
    for row in table.iter()? {
        let (key, row) = row?;
        if Task::from_key(key.value()).is_none() {
            tracing::error!("a row of the clean-up is of an unknown kind; it stays");
            continue;
        }
        left.tasks += 1;
        let events = Revisions::from_bytes(row.value()).map_or(0, Revisions::len);
        left.events = left.events.saturating_add(events);
    }
    Ok(left)
}

/// The largest id of a capture whose marks are left: no new capture may take it.
pub(super) fn last_capture(tx: &ReadTransaction) -> Result<CaptureId> {
    let table = match tx.open_table(CLEANUP) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(0),
        table => table?,
    };
    let (from, to) = (Task::Marks(0).key(), Task::Marks(CaptureId::MAX).key());
    let last = table.range(from.as_slice()..=to.as_slice())?.next_back().transpose()?;
    Ok(match last.and_then(|(key, _)| Task::from_key(key.value())) {
        Some(Task::Marks(id)) => id,
        _ => 0,
    })
}

/// Finds what is left at an opening.
///
/// A release without clean-up kept the number of a cancelled rebuild until the next start of its projection: such a rebuild becomes
/// a task here.
pub(super) fn recover(db: &Database, tail: &mut Tail) -> Result<()> {
    let tx = db.begin_read()?;
    let mut cancelled = Vec::new();
    for row in tx.open_table(META)?.range("cancelled."..)? {
        let (name, row) = row?;
        if !name.value().starts_with("cancelled.") {
            break;
        }
        if let Some([version, id]) = read_u64s(row.value()).filter(|[_, id]| *id != 0) {
            cancelled.push((name.value().to_owned(), version, CursorId::try_from(id).ok()));
        }
    }
    tail.cleanup = left(&tx)?;
    drop(tx);
    if cancelled.is_empty() {
        return Ok(());
    }
    let tx = db.begin_write()?;
    {
        let (mut meta, mut tasks) = (tx.open_table(META)?, tx.open_table(CLEANUP)?);
        for (name, version, id) in &cancelled {
            meta.insert(name.as_str(), u64s([*version, 0]).as_slice())?;
            for task in id.iter().flat_map(|id| rebuild_tasks(*id)) {
                tasks.insert(task.key().as_slice(), &[][..])?;
            }
        }
    }
    tx.commit()?;
    tail.cleanup = left(&db.begin_read()?)?;
    Ok(())
}

/// What a rebuild leaves that nobody goes on with.
pub(crate) fn rebuild_tasks(id: CursorId) -> [Task; 2] {
    [Task::Failures(id), Task::Tables(shadow_prefix(id))]
}

impl Transaction {
    /// Marks something as to be removed, and removes a first piece of it.
    pub(crate) fn leave(&self, task: &Task) -> Result<()> {
        self.touch();
        let was_there = self.redb().open_table(CLEANUP)?.insert(task.key().as_slice(), &[][..])?.is_some();
        self.pending.borrow_mut().cleanup.tasks += i64::from(!was_there);
        // A table is removed as a whole, in a transaction of its own.
        if matches!(task, Task::Tables(_)) { Ok(()) } else { self.clean_within_budget(task) }
    }

    /// As [`leave`](Self::leave), of these revisions of a stream.
    pub(super) fn leave_revisions(&self, stream: &[u8], gone: std::ops::Range<u64>) -> Result<()> {
        self.touch();
        let task = Task::Stream(stream.to_vec());
        {
            let mut table = self.redb().open_table(CLEANUP)?;
            let key = task.key();
            let before = table.get(key.as_slice())?.map(|row| Revisions::from_bytes(row.value()));
            let known = before.flatten();
            let next = known.map_or(gone.start, |known| known.next);
            let left = Revisions { next, end: known.map_or(0, |known| known.end).max(gone.end) };
            table.insert(key.as_slice(), left.to_bytes().as_slice())?;
            let change = &mut self.pending.borrow_mut().cleanup;
            change.tasks += i64::from(before.is_none());
            change.events += signed(left.len()) - signed(known.map_or(0, Revisions::len));
        }
        self.clean_within_budget(&task)
    }

    /// What a transaction of the application removes by itself is bounded too.
    fn clean_within_budget(&self, task: &Task) -> Result<()> {
        let mut budget = self.cleaning_budget.get();
        if budget > 0 {
            self.clean(task, &mut budget)?;
            self.cleaning_budget.set(budget);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_round_trip() {
        let tasks = [
            Task::Stream(b"account-7".to_vec()),
            Task::Failures(7),
            Task::Relay(u32::MAX),
            Task::Marks(0),
            Task::Tables("onewrite.rebuild.7.".into()),
        ];
        for task in tasks {
            assert_eq!(Task::from_key(&task.key()), Some(task));
        }
        for odd in [&[][..], &[9], &[2, 0, 0], &[5, 0xff]] {
            assert_eq!(Task::from_key(odd), None);
        }
        let left = Revisions { next: 7, end: 9 };
        assert_eq!(Revisions::from_bytes(&left.to_bytes()), Some(left));
        assert_eq!((left.len(), Revisions { next: 9, end: 7 }.len()), (2, 0));
        assert_eq!(Revisions::from_bytes(&[]), None);
    }
}
