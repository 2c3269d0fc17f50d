//! What a relay reads from the file, in short read transactions. None is held from one batch to the
//! next.

use std::collections::BTreeSet;

use redb::ReadableTable;

use crate::delivery::types::{Exception, ExceptionState, Key};
use crate::error::{Error, Result};
use crate::log::keys::CursorId;
use crate::log::{keys, record};
use crate::storage::errors::damaged_row;
use crate::storage::tables::cleanup::Task;
use crate::storage::tables::exception::ExceptionRow;
use crate::storage::tables::schema::{CURSORS, DUE, EXCEPTIONS, LOG, PARKED};
use crate::store::Store;
use crate::store::settings::start_at::StartAt;
use crate::store::shared::core::Core;
use crate::store::shared::cursor::Cursor;
use crate::store::transaction::Transaction;
use crate::store::transaction::cursor_ids::{check_position, next_cursor_id, warn_trimmed};

impl Store {
    /// Returns the cursor of this name. Creates the cursor durably if there is none.
    pub(crate) fn cursor(&self, name: &str, start: StartAt) -> Result<Cursor> {
        let core = self.core();
        core.refuse_reentrant("RelayBuilder::spawn")?;
        let mut tx = Transaction::begin(core, "the start of a relay")?;
        if let Some(cursor) = core.tail().cursors.get(name) {
            return Ok(cursor.clone());
        }
        let id = next_cursor_id(&tx)?;
        let cursor = {
            let tail = core.tail();
            if let StartAt::Position(position) = start {
                check_position("start_at", position, tail.next_seq)?;
                warn_trimmed(name, position, tail.trimmed_to);
            }
            let (position, position_offset) = match start {
                StartAt::Oldest => (tail.trimmed_to, tail.trimmed_offset),
                StartAt::Newest => (tail.next_seq, tail.end_offset),
                StartAt::Position(position) => {
                    let pending = tx.pending.borrow();
                    let offset = tx.engine(|| {
                        crate::store::transaction::trim::offset_at(tx.redb(), &tail, &pending, position)
                    })?;
                    (position, offset)
                }
            };
            Cursor {
                id,
                position,
                position_offset,
                confirmed: 0,
                rows: crate::store::shared::cursor::RowCounts::default(),
            }
        };
        tx.engine(|| {
            tx.redb().open_table(CURSORS)?.insert(name, cursor.to_bytes().as_slice())?;
            Ok(())
        })?;
        tx.finish(1)?;
        // The write lock is still held: nothing commits between the row and this entry.
        core.tail().cursors.insert(name.to_owned(), cursor.clone());
        Ok(cursor)
    }

    /// Forgets a relay: its position, its waiting events and its quarantined events. The log no
    /// longer waits for the relay.
    ///
    /// # Errors
    /// [`Error::NoSuchRelay`], or [`Error::RelayRunning`] while it runs.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use std::time::Duration;
    /// use onewrite::Error;
    /// let relay = store.relay("old").spawn(broker.publisher())?;
    /// assert!(matches!(store.forget_relay("old"), Err(Error::RelayRunning { .. })));
    /// relay.stop(Duration::from_secs(5));
    /// store.forget_relay("old")?;
    /// assert!(store.stats()?.relays.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forget_relay(&self, name: &str) -> Result<()> {
        let core = self.core();
        core.refuse_reentrant("Store::forget_relay")?;
        if core.relays.port(name).is_some() {
            return Err(Error::RelayRunning { name: name.to_owned() });
        }
        let mut tx = Transaction::begin(core, "`Store::forget_relay`")?;
        let cursor = core.tail().cursors.get(name).cloned();
        let cursor = cursor.ok_or_else(|| Error::NoSuchRelay { name: name.to_owned() })?;
        tx.engine(|| {
            tx.leave(&Task::Relay(cursor.id))?;
            tx.redb().open_table(CURSORS)?.remove(name)?;
            Ok(())
        })?;
        // Progress of this relay that still waits would write the row anew.
        core.progress().cursors.remove(name);
        tx.finish(1)?;
        {
            let mut tail = core.tail();
            tail.cursors.remove(name);
            tail.parked.remove(&cursor.id);
            // Events that only this relay still needed can be trimmed.
            tail.trim_left = true;
        }
        // If it was the last relay, a snapshot goes on without one. The writer thread sees that too
        // when it wakes.
        self.announce_progress();
        Ok(())
    }
}

/// What a starting relay finds in the file, besides its position.
#[derive(Debug, Default)]
pub(crate) struct FoundRows {
    pub(crate) holding: Vec<(u64, Key)>,
    pub(crate) retrying: Vec<(u64, Exception)>,
    pub(crate) parked_keys: Vec<Key>,
    pub(crate) parked_ahead: Vec<(Key, u64)>,
    pub(crate) next_due_ms: Option<u64>,
}

/// Reads all exceptions to the cursor's position. `Recovered` says what each part means.
pub(crate) fn find_rows(core: &Core, cursor: &Cursor, retrying_max: usize) -> Result<FoundRows> {
    let id = cursor.id;
    core.reading(|tx| {
        let (from, to) = (id.to_be_bytes(), keys::after_prefix(&id.to_be_bytes()));
        let mut found = FoundRows::default();
        for row in tx.open_table(EXCEPTIONS)?.range(&from[..]..to.as_slice())? {
            let (at, row) = row?;
            let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
            let row = ExceptionRow::from_bytes(row.value())?;
            match (row.exception.state, row.key) {
                (ExceptionState::Retry { .. }, _) if found.retrying.len() < retrying_max => {
                    found.retrying.push((seq, row.exception));
                }
                (ExceptionState::Retry { due_ms } | ExceptionState::Scheduled { due_ms }, key) => {
                    // A retry holds its key, also while it is on disk.
                    let holds = matches!(row.exception.state, ExceptionState::Retry { .. });
                    found.holding.extend(key.filter(|_| holds).map(|key| (seq, key)));
                    found.next_due_ms =
                        Some(found.next_due_ms.map_or(due_ms, |earliest| earliest.min(due_ms)));
                }
                (ExceptionState::Quarantined { holds_key: true, .. }, Some(key)) => {
                    found.holding.push((seq, key))
                }
                (ExceptionState::Quarantined { .. } | ExceptionState::Discarded, _) => {}
            }
        }
        find_parked(&tx.open_table(PARKED)?, cursor, &mut found)?;
        Ok(found)
    })
}

/// Goes from each parked key to the next.
fn find_parked(
    parked: &impl ReadableTable<&'static [u8], &'static [u8]>,
    cursor: &Cursor,
    found: &mut FoundRows,
) -> Result<()> {
    let mut from = cursor.id.to_be_bytes().to_vec();
    let end = keys::after_prefix(&from);
    while let Some(row) = parked.range(from.as_slice()..end.as_slice())?.next() {
        let (at, _) = row?;
        let (key, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
        let key = Key::from(key);
        if seq < cursor.position {
            found.parked_keys.push(Key::clone(&key));
        }
        let ahead = keys::parked(cursor.id, &key, cursor.position);
        let last = keys::parked(cursor.id, &key, u64::MAX);
        for row in parked.range(ahead.as_slice()..last.as_slice())? {
            let (at, _) = row?;
            let (_, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
            found.parked_ahead.push((Key::clone(&key), seq));
        }
        from = last;
    }
    Ok(())
}

/// The result of `read_due`.
#[derive(Debug, Default)]
pub(crate) struct FoundDue {
    pub(crate) due: Vec<(u64, Exception)>,
    /// The last one read, if more are due.
    pub(crate) resume: Option<(u64, u64)>,
    /// When the next one will be due.
    pub(crate) next_due_ms: Option<u64>,
}

/// Whether the file says that this event is to be tried again.
pub(crate) fn is_to_be_tried(core: &Core, id: CursorId, seq: u64) -> Result<bool> {
    core.reading(|tx| {
        let row = tx.open_table(EXCEPTIONS)?.get(&keys::exception(id, seq)[..])?;
        let row = row.map(|row| ExceptionRow::from_bytes(row.value())).transpose()?;
        Ok(row.is_some_and(|row| matches!(row.exception.state, ExceptionState::Retry { .. })))
    })
}

/// Reads exceptions due by `until_ms`, in order of (due time, seq), after `after`, up to a limit.
pub(crate) fn read_due(
    core: &Core,
    id: CursorId,
    after: Option<(u64, u64)>,
    until_ms: u64,
    events_max: usize,
) -> Result<FoundDue> {
    core.reading(|tx| {
        let exceptions = tx.open_table(EXCEPTIONS)?;
        let from =
            after.map_or(keys::due(id, 0, 0), |(due_ms, seq)| keys::due(id, due_ms, seq.saturating_add(1)));
        let to = keys::after_prefix(&id.to_be_bytes());
        let mut found = FoundDue::default();
        let mut last = None;
        for row in tx.open_table(DUE)?.range(&from[..]..to.as_slice())? {
            let (at, _) = row?;
            let (due_ms, seq) = keys::split_due(at.value()).ok_or_else(|| damaged_row("due"))?;
            if due_ms > until_ms {
                found.next_due_ms = Some(due_ms);
                break;
            }
            if found.due.len() >= events_max {
                found.resume = last;
                break;
            }
            let row = exceptions.get(&keys::exception(id, seq)[..])?.ok_or_else(|| damaged_row("due"))?;
            found.due.push((seq, ExceptionRow::from_bytes(row.value())?.exception));
            last = Some((due_ms, seq));
        }
        Ok(found)
    })
}

/// Reads the first parked events of a key, up to a limit, and whether there are more.
pub(crate) fn read_parked(
    core: &Core,
    id: CursorId,
    key: &str,
    events_max: usize,
) -> Result<(Vec<u64>, bool)> {
    core.reading(|tx| {
        let from = keys::parked(id, key, 0);
        let to = keys::parked(id, key, u64::MAX);
        let mut seqs = Vec::new();
        for row in tx.open_table(PARKED)?.range(from.as_slice()..to.as_slice())? {
            if seqs.len() >= events_max {
                return Ok((seqs, true));
            }
            let (at, _) = row?;
            seqs.push(keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?.1);
        }
        Ok((seqs, false))
    })
}

/// The events of `from..to` that have an exception.
pub(crate) fn exceptions_between(core: &Core, id: CursorId, from: u64, to: u64) -> Result<BTreeSet<u64>> {
    core.reading(|tx| exceptions_in(tx, id, from, to))
}

pub(crate) fn exceptions_in(
    tx: &redb::ReadTransaction,
    id: CursorId,
    from: u64,
    to: u64,
) -> Result<BTreeSet<u64>> {
    let (from, to) = (keys::exception(id, from), keys::exception(id, to));
    let mut found = BTreeSet::new();
    for row in tx.open_table(EXCEPTIONS)?.range(&from[..]..&to[..])? {
        found.extend(keys::split_exception(row?.0.value()));
    }
    Ok(found)
}

/// What the file says about one event below a cursor's position.
pub(crate) enum RowState {
    /// No row: the event was confirmed, or expired from the log after that.
    Settled,
    /// The event waits for its next try, its time, or an earlier event of its key.
    Waiting,
    Quarantined(Exception),
}

pub(crate) fn row_state(core: &Core, id: CursorId, seq: u64) -> Result<RowState> {
    core.reading(|tx| {
        if let Some(row) = tx.open_table(EXCEPTIONS)?.get(&keys::exception(id, seq)[..])? {
            let row = ExceptionRow::from_bytes(row.value())?;
            return Ok(match row.exception.state {
                ExceptionState::Quarantined { .. } | ExceptionState::Discarded => {
                    RowState::Quarantined(row.exception)
                }
                _ => RowState::Waiting,
            });
        }
        let Some(frame) = tx.open_table(LOG)?.get(seq)? else { return Ok(RowState::Settled) };
        let recorded = record::decode(seq, frame.value())?;
        let Some(key) = recorded.key() else { return Ok(RowState::Settled) };
        let parked = tx.open_table(PARKED)?.get(keys::parked(id, key, seq).as_slice())?.is_some();
        Ok(if parked { RowState::Waiting } else { RowState::Settled })
    })
}
