//! Applies the progress of relays: their positions and their rows.

use std::sync::PoisonError;

use redb::{ReadableTable, WriteTransaction};

use crate::delivery::types::{Change, ExceptionState};
use crate::error::Result;
use crate::log::keys;
use crate::storage::tables::exception::{ExceptionRow, due_of};
use crate::storage::tables::schema::{CURSORS, DUE, EXCEPTIONS, LOG, PARKED};
use crate::store::shared::cursor::Cursor;
use crate::store::shared::parked::{Parked, ParkedChanges};
use crate::store::shared::progress::{CursorProgress, Leave};

/// Writes the gathered progress of one cursor; the caller commits. Returns sequence numbers whose
/// record may no longer be needed, and the changes of the parked events.
pub(crate) fn apply(
    tx: &WriteTransaction,
    name: &str,
    cursor: &mut Cursor,
    progress: &CursorProgress,
    parked: &Parked,
    offset_of: impl FnOnce(u64) -> Result<u64>,
) -> Result<(Vec<u64>, ParkedChanges)> {
    let mut moved = ParkedChanges::default();
    let mut released = if progress.changes.is_empty() {
        Vec::new()
    } else {
        apply_rows(tx, cursor, &progress.changes, &mut moved)?
    };
    for leave in &progress.leaves {
        if leaves(tx, cursor, leave)? {
            let (seq, key, exception) = (leave.seq, leave.key.clone(), leave.exception.clone());
            released.extend(apply_rows(
                tx,
                cursor,
                &[Change::PutException { seq, key, exception }],
                &mut moved,
            )?);
        }
    }
    if let Some(position) = progress.position.filter(|position| *position > cursor.position) {
        pass_rows(tx, cursor, position)?;
        let (rows, bytes) = moved.pass(parked, position);
        cursor.rows.passed(rows, bytes);
        cursor.position = position;
        cursor.position_offset = offset_of(position)?;
    }
    if cursor.rows.discarded > 0 {
        released.extend(drop_passed(tx, cursor)?);
    }
    cursor.confirmed += progress.confirmed;
    tx.open_table(CURSORS)?.insert(name, cursor.to_bytes().as_slice())?;
    Ok((released, moved))
}

/// Whether the event is still in quarantine. Also notes the answer for the caller that takes the
/// event out of quarantine.
fn leaves(tx: &WriteTransaction, cursor: &Cursor, leave: &Leave) -> Result<bool> {
    let exceptions = tx.open_table(EXCEPTIONS)?;
    let row = exceptions.get(&keys::exception(cursor.id, leave.seq)[..])?;
    let row = row.map(|row| ExceptionRow::from_bytes(row.value())).transpose()?;
    let leaves = row.is_some_and(|row| matches!(row.exception.state, ExceptionState::Quarantined { .. }));
    let mut left = leave.left.lock().unwrap_or_else(PoisonError::into_inner);
    // A transaction that was rolled back may have noted something else.
    if leaves {
        left.insert(leave.seq)
    } else {
        left.remove(&leave.seq)
    };
    Ok(leaves)
}

fn apply_rows(
    tx: &WriteTransaction,
    cursor: &mut Cursor,
    changes: &[Change],
    moved: &mut ParkedChanges,
) -> Result<Vec<u64>> {
    let mut exceptions = tx.open_table(EXCEPTIONS)?;
    let mut due = tx.open_table(DUE)?;
    let mut parked = tx.open_table(PARKED)?;
    let log = tx.open_table(LOG)?;
    let mut released = Vec::new();
    for change in changes {
        match change {
            Change::Position(_) => debug_assert!(false, "kept separately by `PendingProgress::add`"),
            Change::PutException { seq, key, exception } => {
                let row = ExceptionRow { key: key.clone(), exception: exception.clone() };
                let at = keys::exception(cursor.id, *seq);
                let old =
                    exceptions.insert(&at[..], row.to_bytes().as_slice())?.map(|old| old.value().to_vec());
                let bytes = record_bytes(&log, *seq)?;
                if let Some(old) = old {
                    forget_row(&mut due, cursor, *seq, bytes, &ExceptionRow::from_bytes(&old)?)?;
                }
                cursor.rows.count(exception.state, *seq, *seq >= cursor.position, bytes);
                if let Some(due_ms) = due_of(exception.state) {
                    due.insert(&keys::due(cursor.id, due_ms, *seq)[..], &[][..])?;
                }
            }
            Change::DropException { seq } => {
                let at = keys::exception(cursor.id, *seq);
                let old = exceptions.remove(&at[..])?.map(|old| old.value().to_vec());
                if let Some(old) = old {
                    let bytes = record_bytes(&log, *seq)?;
                    forget_row(&mut due, cursor, *seq, bytes, &ExceptionRow::from_bytes(&old)?)?;
                }
                released.push(*seq);
            }
            Change::Park { key, seq } => {
                if parked.insert(keys::parked(cursor.id, key, *seq).as_slice(), &[][..])?.is_none() {
                    let bytes = record_bytes(&log, *seq)?;
                    cursor.rows.parked += 1;
                    cursor.rows.waiting_bytes += bytes;
                    cursor.rows.bytes += bytes;
                    moved.touch(key);
                    if *seq >= cursor.position {
                        cursor.rows.ahead += 1;
                        cursor.rows.ahead_bytes += bytes;
                        moved.ahead(*seq, Some(bytes));
                    }
                }
            }
            Change::Unpark { key, seq } => {
                if parked.remove(keys::parked(cursor.id, key, *seq).as_slice())?.is_some() {
                    cursor.rows.parked -= 1;
                    let bytes = record_bytes(&log, *seq)?;
                    cursor.rows.waiting_bytes = cursor.rows.waiting_bytes.saturating_sub(bytes);
                    cursor.rows.bytes = cursor.rows.bytes.saturating_sub(bytes);
                    moved.touch(key);
                    if *seq >= cursor.position {
                        cursor.rows.passed(1, bytes);
                        moved.ahead(*seq, None);
                    }
                }
                released.push(*seq);
            }
        }
    }
    moved.find_firsts(&parked, cursor.id)?;
    Ok(released)
}

/// Returns the length of a record, or 0 for a record that is gone.
pub(in crate::store) fn record_bytes(log: &impl ReadableTable<u64, &'static [u8]>, seq: u64) -> Result<u64> {
    Ok(log.get(seq)?.map_or(0, |frame| frame.value().len() as u64))
}

/// Counts the rows that the position is about to pass: they are no longer ahead of it.
fn pass_rows(tx: &WriteTransaction, cursor: &mut Cursor, position: u64) -> Result<()> {
    if cursor.rows.ahead == 0 {
        return Ok(());
    }
    let (exceptions, log) = (tx.open_table(EXCEPTIONS)?, tx.open_table(LOG)?);
    let (from, to) = (keys::exception(cursor.id, cursor.position), keys::exception(cursor.id, position));
    for row in exceptions.range(&from[..]..&to[..])? {
        if let Some(seq) = keys::split_exception(row?.0.value()) {
            cursor.rows.passed(1, record_bytes(&log, seq)?);
        }
    }
    Ok(())
}

/// Drops the rows of discarded events that the position has passed.
fn drop_passed(tx: &WriteTransaction, cursor: &mut Cursor) -> Result<Vec<u64>> {
    let mut exceptions = tx.open_table(EXCEPTIONS)?;
    let (from, to) = (keys::exception(cursor.id, 0), keys::exception(cursor.id, cursor.position));
    let mut passed = Vec::new();
    exceptions.retain_in(&from[..]..&to[..], |at, row| {
        let row = ExceptionRow::from_bytes(row);
        let drop = row.is_ok_and(|row| row.exception.state == ExceptionState::Discarded);
        let seq = keys::split_exception(at).filter(|_| drop);
        passed.extend(seq);
        seq.is_none()
    })?;
    cursor.rows.discarded = cursor.rows.discarded.saturating_sub(passed.len() as u64);
    Ok(passed)
}

fn forget_row(
    due: &mut redb::Table<'_, &'static [u8], &'static [u8]>,
    cursor: &mut Cursor,
    seq: u64,
    bytes: u64,
    row: &ExceptionRow,
) -> Result<()> {
    cursor.rows.uncount(row.exception.state, seq >= cursor.position, bytes);
    if let Some(due_ms) = due_of(row.exception.state) {
        due.remove(&keys::due(cursor.id, due_ms, seq)[..])?;
    }
    Ok(())
}
