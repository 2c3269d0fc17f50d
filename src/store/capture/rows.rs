//! What the file keeps of captures, and what of it is in memory.
//!
//! ```text
//! onewrite.captures    table name → id u32 │ mode u8 │ snapshot u8 │ last key walked …
//! onewrite.changes     id u32 BE │ the row's key, as redb stores it → kind u8
//! ```
//!
//! A mark is one row however often its key has changed. What has gathered in a transaction is written by its commit, and
//! the figures in memory follow once that is durable.

use std::collections::{BTreeMap, BTreeSet};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, WriteTransaction};

use super::{CaptureMode, Captures};
use crate::error::{Error, Result, SettingError};
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{CAPTURES, CHANGES};
use crate::store::Store;
use crate::store::cleanup::{self, Task};
use crate::store::core::Tail;
use crate::store::transaction::Transaction;

/// Names a captured table in the keys of marks.
pub(crate) type CaptureId = u32;

/// How far the first switch-on is with what was there already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SnapshotState {
    /// None was asked for.
    None,
    /// No row has been walked.
    ToBegin,
    /// This key was the last.
    Behind(Vec<u8>),
    Done,
}

impl SnapshotState {
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::ToBegin | Self::Behind(_))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CaptureRow {
    pub(crate) id: CaptureId,
    pub(crate) mode: CaptureMode,
    pub(crate) snapshot: SnapshotState,
}

impl CaptureRow {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.push(match self.mode {
            CaptureMode::EveryChange => 0,
            CaptureMode::NewestValue => 1,
        });
        let (state, after): (u8, &[u8]) = match &self.snapshot {
            SnapshotState::None => (0, &[]),
            SnapshotState::ToBegin => (1, &[]),
            SnapshotState::Behind(key) => (2, key),
            SnapshotState::Done => (3, &[]),
        };
        bytes.push(state);
        bytes.extend_from_slice(after);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk::<4>()?;
        let (&[mode, state], after) = rest.split_first_chunk::<2>()?;
        let mode = match mode {
            0 => CaptureMode::EveryChange,
            1 => CaptureMode::NewestValue,
            _ => return None,
        };
        let snapshot = match (state, after) {
            (0, []) => SnapshotState::None,
            (1, []) => SnapshotState::ToBegin,
            (2, key) => SnapshotState::Behind(key.to_vec()),
            (3, []) => SnapshotState::Done,
            _ => return None,
        };
        Some(Self { id: u32::from_le_bytes(*id), mode, snapshot })
    }
}

/// Why a key is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MarkKind {
    /// It has changed.
    Change,
    /// It was there at switch-on, and its codec failed.
    Snapshot,
}

impl MarkKind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Change => 0,
            Self::Snapshot => 1,
        }
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0] => Some(Self::Change),
            [1] => Some(Self::Snapshot),
            _ => None,
        }
    }
}

/// The key of a mark.
pub(crate) fn mark_key(id: CaptureId, key: &[u8]) -> Vec<u8> {
    [&id.to_be_bytes()[..], key].concat()
}

/// What a transaction would change; the newest word on a key is the one that is written.
#[derive(Debug, Default)]
pub(crate) struct PendingCaptures {
    /// `None`: its mark goes.
    pub(crate) marks: BTreeMap<Vec<u8>, Option<MarkKind>>,
    pub(crate) rows: BTreeMap<String, CaptureRow>,
    /// Rows with a mark from before that have been written, each with an event of its own.
    pub(crate) written: BTreeSet<Vec<u8>>,
    /// A round is in this transaction, behind all writes.
    pub(crate) has_round: bool,
}

impl PendingCaptures {
    /// The marks of rows that the application has written.
    pub(crate) fn written(&self) -> impl Iterator<Item = &Vec<u8>> {
        let marked = self.marks.iter().filter(|(_, kind)| matches!(kind, Some(MarkKind::Change)));
        marked.map(|(mark, _)| mark).chain(&self.written)
    }
}

/// How many marks more (or fewer) each capture has.
pub(crate) type MarkCounts = BTreeMap<CaptureId, i64>;

/// Writes it; nothing where nothing has changed.
pub(crate) fn write(tx: &WriteTransaction, pending: &PendingCaptures) -> Result<MarkCounts> {
    let mut counts = MarkCounts::new();
    if !pending.marks.is_empty() {
        let mut changes = tx.open_table(CHANGES)?;
        for (key, kind) in &pending.marks {
            let was_there = match kind {
                Some(kind) => changes.insert(key.as_slice(), &[kind.to_byte()][..])?.is_some(),
                None => changes.remove(key.as_slice())?.is_some(),
            };
            let count = counts.entry(capture_of(key)?).or_default();
            *count += i64::from(kind.is_some()) - i64::from(was_there);
        }
    }
    if !pending.rows.is_empty() {
        let mut captures = tx.open_table(CAPTURES)?;
        for (name, row) in &pending.rows {
            captures.insert(name.as_str(), row.to_bytes().as_slice())?;
        }
    }
    Ok(counts)
}

pub(super) fn capture_of(mark: &[u8]) -> Result<CaptureId> {
    mark.first_chunk::<4>().map(|id| u32::from_be_bytes(*id)).ok_or_else(|| damaged_row("mark"))
}

/// A table that the file knows as captured.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) row: CaptureRow,
    /// Its marks.
    pub(crate) waiting: u64,
}

/// All of them, by name: registered in this process or not.
#[derive(Debug, Default)]
pub(crate) struct CaptureBook(BTreeMap<String, Known>);

impl CaptureBook {
    pub(crate) fn get(&self, name: &str) -> Option<&Known> {
        self.0.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Known)> {
        self.0.iter()
    }

    pub(crate) fn holds(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A commit has made this true.
    pub(crate) fn settle(&mut self, pending: &PendingCaptures, counts: &MarkCounts) {
        for (name, row) in &pending.rows {
            if let Some(known) = self.0.get_mut(name) {
                known.row = row.clone();
            }
        }
        for known in self.0.values_mut().filter(|_| !counts.is_empty()) {
            let more = counts.get(&known.row.id).copied().unwrap_or_default();
            known.waiting = known.waiting.saturating_add_signed(more);
        }
    }
}

/// What the file knows.
pub(crate) fn recover(tx: &ReadTransaction) -> Result<CaptureBook> {
    let mut book = CaptureBook::default();
    let changes = tx.open_table(CHANGES)?;
    for entry in tx.open_table(CAPTURES)?.iter()? {
        let (name, row) = entry?;
        let row = CaptureRow::from_bytes(row.value()).ok_or_else(|| damaged_row("capture"))?;
        let from = row.id.to_be_bytes();
        let to = keys::after_prefix(&from);
        let mut waiting = 0;
        for mark in changes.range(&from[..]..to.as_slice())? {
            mark?;
            waiting += 1;
        }
        book.0.insert(name.value().to_owned(), Known { row, waiting });
    }
    Ok(book)
}

/// Makes what this process has registered known to the file, if it is new to it or has another mode.
pub(crate) fn switch_on(
    db: &Database,
    captures: &Captures,
    tail: &mut Tail,
) -> Result<Result<(), SettingError>> {
    let book = &mut tail.captures;
    let mut changed = PendingCaptures::default();
    let tx = db.begin_read()?;
    let known = book.0.values().map(|known| known.row.id).max().unwrap_or_default();
    let mut next_id = known.max(cleanup::last_capture(&tx)?) + 1;
    for capture in captures.iter() {
        if let Err(error) = capture.check_table(&tx)? {
            return Ok(Err(error));
        }
        let row = match book.get(capture.name()) {
            Some(known) if known.row.mode == capture.mode() => continue,
            Some(known) => CaptureRow { mode: capture.mode(), ..known.row.clone() },
            None => {
                let begins = capture.wants_snapshot();
                let snapshot = if begins { SnapshotState::ToBegin } else { SnapshotState::None };
                let row = CaptureRow { id: next_id, mode: capture.mode(), snapshot };
                next_id += 1;
                book.0.insert(capture.name().to_owned(), Known { row: row.clone(), waiting: 0 });
                row
            }
        };
        changed.rows.insert(capture.name().to_owned(), row);
    }
    drop(tx);
    if !changed.rows.is_empty() {
        let tx = db.begin_write()?;
        let counts = write(&tx, &changed)?;
        tx.commit()?;
        book.settle(&changed, &counts);
    }
    Ok(Ok(()))
}

impl Store {
    /// Forgets that a table is captured: its changes no longer become events, and it may be opened like any other. When this
    /// returns `Ok`, that is durable. Marks that still wait are dropped; what is in the log stays there.
    ///
    /// # Errors
    /// [`Error::CapturedTable`] where this process has registered it: open the store without it first;
    /// [`Error::NotCaptured`] if the file does not know it as captured.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("a.redb");
    /// use onewrite::{Capture, Error, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).unpublished();
    /// Store::builder().capture(accounts).open(&path)?.close()?;
    ///
    /// let store = Store::open(&path)?; // a version of the application that captures no more
    /// let write = || store.write(|tx| Ok(tx.open_table(ACCOUNTS)?.insert("alice", 100).map(drop)?));
    /// assert!(matches!(write(), Err(Error::CapturedTable { name }) if name == "accounts")); // nobody would hear of it
    /// store.end_capture("accounts")?;
    /// write()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn end_capture(&self, name: &str) -> Result<()> {
        let core = self.core();
        core.refuse_inside("Store::end_capture")?;
        if core.settings.captures.get(name).is_some() {
            return Err(Error::CapturedTable { name: name.to_owned() });
        }
        let mut tx = Transaction::begin(core, "`Store::end_capture`")?;
        let id = core.tail().captures.get(name).map(|known| known.row.id);
        let id = id.ok_or_else(|| Error::NotCaptured { name: name.to_owned() })?;
        tx.engine(|| {
            tx.leave(&Task::Marks(id))?;
            tx.redb().open_table(CAPTURES)?.remove(name)?;
            Ok(())
        })?;
        tx.finish(1)?;
        // Within the same turn: nobody writes between the row's end and its being known.
        core.tail().captures.0.remove(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip() {
        let states =
            [SnapshotState::None, SnapshotState::ToBegin, SnapshotState::Behind(vec![]), SnapshotState::Done];
        for snapshot in states.into_iter().chain([SnapshotState::Behind(vec![7, 0])]) {
            for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
                let row = CaptureRow { id: 7, mode, snapshot: snapshot.clone() };
                assert_eq!(CaptureRow::from_bytes(&row.to_bytes()), Some(row));
            }
        }
        for damaged in
            [&[][..], &[1, 0, 0, 0, 0], &[1, 0, 0, 0, 2, 0], &[1, 0, 0, 0, 0, 4], &[1, 0, 0, 0, 0, 3, 1]]
        {
            assert_eq!(CaptureRow::from_bytes(damaged), None);
        }
        assert_eq!(MarkKind::from_bytes(&[MarkKind::Snapshot.to_byte()]), Some(MarkKind::Snapshot));
        assert_eq!(MarkKind::from_bytes(&[2]), None);
        assert_eq!(capture_of(&mark_key(9, b"k")).unwrap(), 9);
    }
}
