//! A relay's cursor, as memory knows it: its position, and how many rows it has.

use crate::delivery::types::ExceptionState;
use crate::log::keys::CursorId;
use crate::storage::tables::exception::due_of;
use crate::storage::tables::schema::{read_u64s, u64s};
use crate::store::shared::parked::Bounds;

/// The number of rows of a cursor, by kind, and their share of the backlog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RowCounts {
    pub(crate) retrying: u64,
    pub(crate) scheduled: u64,
    pub(crate) quarantined: u64,
    pub(crate) discarded: u64,
    pub(crate) parked: u64,
    /// Bytes of the records that are still to be published.
    pub(crate) waiting_bytes: u64,
    /// Exceptions of any kind, and parked events, at or past the position: the distance to the end
    /// of the log counts them too.
    pub(crate) ahead: u64,
    pub(crate) ahead_bytes: u64,
    /// Bytes of the records of all rows.
    pub(crate) bytes: u64,
    pub(crate) bounds: Bounds,
}

impl RowCounts {
    /// The number of rows that are still to be published.
    pub(crate) fn waiting(&self) -> u64 {
        self.retrying + self.scheduled + self.parked
    }

    /// The number of rows of any kind before the position, and the bytes of their records.
    pub(crate) fn behind(&self) -> (u64, u64) {
        let rows = self.waiting() + self.quarantined + self.discarded;
        (rows.saturating_sub(self.ahead), self.bytes.saturating_sub(self.ahead_bytes))
    }

    /// Whether any event is an exception, with a row of its own.
    pub(crate) fn any_exception(&self) -> bool {
        self.retrying + self.scheduled + self.quarantined + self.discarded > 0
    }

    pub(crate) fn count(&mut self, state: ExceptionState, seq: u64, is_ahead: bool, bytes: u64) {
        *self.of(state) += 1;
        let is_alone = *self.of(state) == 1;
        self.bounds.put(state, seq, is_alone);
        self.waiting_bytes += if due_of(state).is_some() { bytes } else { 0 };
        self.bytes += bytes;
        self.ahead += u64::from(is_ahead);
        self.ahead_bytes += if is_ahead { bytes } else { 0 };
    }

    pub(crate) fn uncount(&mut self, state: ExceptionState, is_ahead: bool, bytes: u64) {
        let count = self.of(state);
        *count = count.saturating_sub(1);
        let waiting = if due_of(state).is_some() { bytes } else { 0 };
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting);
        self.bytes = self.bytes.saturating_sub(bytes);
        if is_ahead {
            self.passed(1, bytes);
        }
    }

    pub(crate) fn passed(&mut self, rows: u64, bytes: u64) {
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

/// A cursor as stored on disk.
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

    /// Reads the row. The row counts are not in it: they are counted separately.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let [id, position, position_offset, confirmed] = read_u64s(bytes)?;
        let id = CursorId::try_from(id).ok()?;
        Some(Self { id, position, position_offset, confirmed, rows: RowCounts::default() })
    }
}
