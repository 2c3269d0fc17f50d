//! Cursors on disk: a position, and the sparse rows of what stands apart from it.
//!
//! ```text
//! exception row:  state u8 │ time ms u64 │ holds key u8 │ attempts u32 │ destination attempts u32 │
//!                 has key u8 │ [key t8] │ has fault u8 │ [class u8 │ code u16 (0: none) │ text t16]
//! ```
//!
//! State 0 is *retry* (time: due), 1 *scheduled* (time: due), 2 *quarantined* (time: since), 3 *discarded* (until the
//! position is past it). Rows of state 0 and 1 have a row in the due table too.

use std::sync::PoisonError;

use redb::{ReadableTable, WriteTransaction};

use super::progress::{CursorProgress, Leave};
use super::waiting::{Bounds, Parked, ParkedChanges};
use crate::delivery::types::{Change, Exception, ExceptionState, Key};
use crate::error::Result;
use crate::log::keys::{self, CursorId};
use crate::log::wire_bytes::{Malformed, Reader, put_text8, put_text16};
use crate::message::{Fault, FaultClass};
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{CURSORS, DUE, EXCEPTIONS, LOG, PARKED, read_u64s, u64s};

/// Longest text of a fault that is kept, in bytes.
const FAULT_TEXT_BYTES_MAX: usize = 1024;

/// How many rows a cursor has, by kind, and what they mean for the backlog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RowCounts {
    pub(crate) retrying: u64,
    pub(crate) scheduled: u64,
    pub(crate) quarantined: u64,
    pub(crate) discarded: u64,
    pub(crate) parked: u64,
    /// Records of those that are still to be published.
    pub(crate) waiting_bytes: u64,
    /// Exceptions, of whatever kind, and parked events at or past the position: the distance to the end of the log counts them too.
    pub(crate) ahead: u64,
    pub(crate) ahead_bytes: u64,
    /// Records of all rows.
    pub(crate) bytes: u64,
    pub(crate) bounds: Bounds,
}

impl RowCounts {
    /// Those that are still to be published.
    pub(crate) fn waiting(&self) -> u64 {
        self.retrying + self.scheduled + self.parked
    }

    /// Rows, of whatever kind, that stand before the position, and the bytes of their records.
    pub(crate) fn behind(&self) -> (u64, u64) {
        let rows = self.waiting() + self.quarantined + self.discarded;
        (rows.saturating_sub(self.ahead), self.bytes.saturating_sub(self.ahead_bytes))
    }

    /// Whether any event stands apart from the log with a row of its own.
    pub(crate) fn any_exception(&self) -> bool {
        self.retrying + self.scheduled + self.quarantined + self.discarded > 0
    }

    fn count(&mut self, state: ExceptionState, seq: u64, is_ahead: bool, bytes: u64) {
        *self.of(state) += 1;
        let is_alone = *self.of(state) == 1;
        self.bounds.put(state, seq, is_alone);
        self.waiting_bytes += if due_of(state).is_some() { bytes } else { 0 };
        self.bytes += bytes;
        self.ahead += u64::from(is_ahead);
        self.ahead_bytes += if is_ahead { bytes } else { 0 };
    }

    fn uncount(&mut self, state: ExceptionState, is_ahead: bool, bytes: u64) {
        let count = self.of(state);
        *count = count.saturating_sub(1);
        let waiting = if due_of(state).is_some() { bytes } else { 0 };
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting);
        self.bytes = self.bytes.saturating_sub(bytes);
        if is_ahead {
            self.passed(1, bytes);
        }
    }

    fn passed(&mut self, rows: u64, bytes: u64) {
        self.ahead = self.ahead.saturating_sub(rows);
        self.ahead_bytes = self.ahead_bytes.saturating_sub(bytes);
    }

    fn of(&mut self, state: ExceptionState) -> &mut u64 {
        match state {
            ExceptionState::Retry { .. } => &mut self.retrying,
            ExceptionState::Scheduled { .. } => &mut self.scheduled,
            ExceptionState::Quarantined { .. } => &mut self.quarantined,
            ExceptionState::Discarded => &mut self.discarded,
        }
    }
}

/// A cursor, as it stands on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) id: CursorId,
    pub(crate) position: u64,
    pub(crate) position_offset: u64,
    pub(crate) confirmed: u64,
    pub(crate) rows: RowCounts,
}

impl Cursor {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        u64s([u64::from(self.id), self.position, self.position_offset, self.confirmed])
    }

    /// Reads the row; the counts are counted apart.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let [id, position, position_offset, confirmed] = read_u64s(bytes)?;
        let id = CursorId::try_from(id).ok()?;
        Some(Self { id, position, position_offset, confirmed, rows: RowCounts::default() })
    }
}

/// An exception with the key of its event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExceptionRow {
    pub(crate) key: Option<Key>,
    pub(crate) exception: Exception,
}

impl ExceptionRow {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let (state, time_ms, holds_key) = match self.exception.state {
            ExceptionState::Retry { due_ms } => (0, due_ms, false),
            ExceptionState::Scheduled { due_ms } => (1, due_ms, false),
            ExceptionState::Quarantined { at_ms, holds_key } => (2, at_ms, holds_key),
            ExceptionState::Discarded => (3, 0, false),
        };
        let mut out = vec![state];
        out.extend_from_slice(&time_ms.to_le_bytes());
        out.push(u8::from(holds_key));
        out.extend_from_slice(&self.exception.attempts.to_le_bytes());
        out.extend_from_slice(&self.exception.destination_attempts.to_le_bytes());
        out.push(u8::from(self.key.is_some()));
        if let Some(key) = &self.key {
            put_text8(&mut out, key);
        }
        out.push(u8::from(self.exception.fault.is_some()));
        if let Some(fault) = &self.exception.fault {
            out.push(class_number(fault.class));
            out.extend_from_slice(&fault.code.unwrap_or(0).to_le_bytes());
            put_text16(&mut out, head(&fault.text, FAULT_TEXT_BYTES_MAX));
        }
        out
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::read(bytes).map_err(|_| damaged_row("exception"))
    }

    fn read(bytes: &[u8]) -> std::result::Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let (state, time_ms, holds_key) = (reader.u8()?, reader.u64()?, reader.u8()? != 0);
        let state = match state {
            0 => ExceptionState::Retry { due_ms: time_ms },
            1 => ExceptionState::Scheduled { due_ms: time_ms },
            2 => ExceptionState::Quarantined { at_ms: time_ms, holds_key },
            3 => ExceptionState::Discarded,
            _ => return Err(Malformed("its state is unknown")),
        };
        let (attempts, destination_attempts) = (reader.u32()?, reader.u32()?);
        let key = if reader.u8()? != 0 { Some(Key::from(reader.text8()?)) } else { None };
        let fault = if reader.u8()? != 0 {
            let class = class_of(reader.u8()?).ok_or(Malformed("its fault class is unknown"))?;
            let code = Some(reader.u16()?).filter(|code| *code != 0);
            Some(Fault { class, code, text: reader.text16()?.to_owned() })
        } else {
            None
        };
        reader.end()?;
        Ok(Self { key, exception: Exception { state, attempts, destination_attempts, fault } })
    }
}

const CLASSES: [FaultClass; 6] = [
    FaultClass::Message,
    FaultClass::Destination,
    FaultClass::Outage,
    FaultClass::Config,
    FaultClass::Expired,
    FaultClass::Undecodable,
];

fn class_number(class: FaultClass) -> u8 {
    CLASSES.iter().position(|known| *known == class).and_then(|at| u8::try_from(at).ok()).unwrap_or(0)
}

fn class_of(number: u8) -> Option<FaultClass> {
    CLASSES.get(usize::from(number)).copied()
}

/// The beginning of a text, cut between characters.
pub(crate) fn head(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

fn due_of(state: ExceptionState) -> Option<u64> {
    match state {
        ExceptionState::Retry { due_ms } | ExceptionState::Scheduled { due_ms } => Some(due_ms),
        ExceptionState::Quarantined { .. } | ExceptionState::Discarded => None,
    }
}

/// Writes what one cursor has gathered; the caller commits. Returns sequence numbers whose record may no longer be needed, and what
/// becomes true of the parked events.
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

/// Whether the event is in quarantine still, which its caller is told.
fn leaves(tx: &WriteTransaction, cursor: &Cursor, leave: &Leave) -> Result<bool> {
    let exceptions = tx.open_table(EXCEPTIONS)?;
    let row = exceptions.get(&keys::exception(cursor.id, leave.seq)[..])?;
    let row = row.map(|row| ExceptionRow::from_bytes(row.value())).transpose()?;
    let leaves = row.is_some_and(|row| matches!(row.exception.state, ExceptionState::Quarantined { .. }));
    let mut left = leave.left.lock().unwrap_or_else(PoisonError::into_inner);
    // A transaction that was rolled back may have said otherwise.
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
            Change::Position(_) => debug_assert!(false, "kept apart by `PendingProgress::add`"),
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

/// The length of a record; nothing for one that is gone.
pub(super) fn record_bytes(log: &impl ReadableTable<u64, &'static [u8]>, seq: u64) -> Result<u64> {
    Ok(log.get(seq)?.map_or(0, |frame| frame.value().len() as u64))
}

/// The position is about to pass these rows: they no longer stand before it.
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

/// Counts a cursor's rows, once, when the store opens.
pub(crate) fn count_rows(
    exceptions: &impl ReadableTable<&'static [u8], &'static [u8]>,
    parked: &impl ReadableTable<&'static [u8], &'static [u8]>,
    log: &impl ReadableTable<u64, &'static [u8]>,
    cursor: &Cursor,
) -> Result<RowCounts> {
    let mut counts = RowCounts::default();
    let (from, to) = (cursor.id.to_be_bytes(), keys::after_prefix(&cursor.id.to_be_bytes()));
    for row in exceptions.range(&from[..]..to.as_slice())? {
        let (at, row) = row?;
        let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
        let state = ExceptionRow::from_bytes(row.value())?.exception.state;
        counts.count(state, seq, seq >= cursor.position, record_bytes(log, seq)?);
    }
    for row in parked.range(&from[..]..to.as_slice())? {
        let (at, _) = row?;
        let (_, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
        let bytes = record_bytes(log, seq)?;
        counts.parked += 1;
        counts.waiting_bytes += bytes;
        counts.bytes += bytes;
        if seq >= cursor.position {
            counts.ahead += 1;
            counts.ahead_bytes += bytes;
        }
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip_with_a_cut_text() {
        let fault = Fault::with_code(FaultClass::Destination, 404, "ä".repeat(1000));
        for state in [
            ExceptionState::Retry { due_ms: 5 },
            ExceptionState::Scheduled { due_ms: 6 },
            ExceptionState::Quarantined { at_ms: 7, holds_key: true },
            ExceptionState::Discarded,
        ] {
            let exception =
                Exception { state, attempts: 1, destination_attempts: 2, fault: Some(fault.clone()) };
            let row = ExceptionRow { key: Some("alice".into()), exception };
            let back = ExceptionRow::from_bytes(&row.to_bytes()).unwrap();
            assert_eq!(back.exception.state, state);
            assert_eq!(back.exception.fault.unwrap().text, "ä".repeat(512));
            assert_eq!(back.key.as_deref(), Some("alice"));
        }
        assert!(ExceptionRow::from_bytes(&[9; 30]).is_err());
    }
}
