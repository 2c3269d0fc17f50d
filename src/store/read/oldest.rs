//! Finds the events of a cursor that have waited longest.
//!
//! Parked rows are sorted by key, so the oldest parked event is the least of the first events of
//! all keys. Memory keeps these first events: one per held key, which a relay bounds
//! (`HELD_KEYS_MAX`). Exception rows are sorted by sequence number, with rows of all states mixed.
//! Memory keeps a lower bound for each state, and a search from the bound finds the row.

use redb::{ReadTransaction, ReadableTable};

use crate::delivery::types::ExceptionState;
use crate::error::Result;
use crate::limits::STATS_ROWS_MAX;
use crate::log::keys::CursorId;
use crate::log::{keys, record};
use crate::storage::errors::damaged_row;
use crate::storage::tables::exception::ExceptionRow;
use crate::storage::tables::schema::{EXCEPTIONS, LOG};
use crate::store::shared::core::Core;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::parked::Bounds;
use crate::time::Now;

/// The sequence numbers of the events of a cursor that have waited longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Oldest {
    pub(crate) retrying: Option<u64>,
    pub(crate) scheduled: Option<u64>,
    pub(crate) parked: Option<u64>,
    /// The oldest event that is neither confirmed nor quarantined or discarded, for any reason.
    pub(crate) unsettled: Option<u64>,
    bounds: Bounds,
}

/// Finds the oldest events of a cursor, where the log ends at `next_seq`. Reads at most
/// [`STATS_ROWS_MAX`] rows for each state. An event behind more rows of other states is reported as
/// too old, until later calls have gone past these rows.
pub(crate) fn find_oldest(
    tx: &ReadTransaction,
    cursor: &Cursor,
    parked: Option<u64>,
    next_seq: u64,
) -> Result<Oldest> {
    let exceptions = tx.open_table(EXCEPTIONS)?;
    let rows = &cursor.rows;
    let mut bounds = rows.bounds;
    let retry = |state| matches!(state, ExceptionState::Retry { .. });
    let retrying = (rows.retrying > 0)
        .then(|| first_in(&exceptions, cursor.id, bounds.retrying, retry))
        .transpose()?
        .inspect(|seq| bounds.retrying = *seq);
    let is_scheduled = |state| matches!(state, ExceptionState::Scheduled { .. });
    let scheduled = (rows.scheduled > 0)
        .then(|| first_in(&exceptions, cursor.id, bounds.scheduled, is_scheduled))
        .transpose()?
        .inspect(|seq| bounds.scheduled = *seq);
    bounds.ahead = bounds.ahead.max(cursor.position);
    if rows.ahead > 0 {
        bounds.ahead = first_unsettled(&exceptions, cursor.id, bounds.ahead)?;
    }
    let ahead = Some(bounds.ahead).filter(|seq| *seq < next_seq);
    let unsettled = [retrying, scheduled, parked, ahead].into_iter().flatten().min();
    Ok(Oldest { retrying, scheduled, parked, unsettled, bounds })
}

impl Oldest {
    /// Keeps the progress of the search, unless the rows have changed since the search began.
    pub(crate) fn note(&self, searched: &Cursor, now: &mut Cursor) {
        let is_same = (now.id, now.rows.bounds) == (searched.id, searched.rows.bounds);
        if is_same && now.position == searched.position {
            now.rows.bounds = self.bounds;
        }
    }
}

/// Returns the first row from `from` on in this state, or the place before which there is none.
fn first_in(
    exceptions: &impl ReadableTable<&'static [u8], &'static [u8]>,
    id: CursorId,
    from: u64,
    wanted: impl Fn(ExceptionState) -> bool,
) -> Result<u64> {
    let (at, to) = (keys::exception(id, from), keys::exception(id, u64::MAX));
    let mut reached = from;
    for row in exceptions.range(&at[..]..=&to[..])?.take(STATS_ROWS_MAX) {
        let (at, row) = row?;
        reached = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
        if wanted(ExceptionRow::from_bytes(row.value())?.exception.state) {
            break;
        }
    }
    Ok(reached)
}

/// Returns the first event from `from` on that is not quarantined or discarded, or the place before
/// which there is none.
fn first_unsettled(
    exceptions: &impl ReadableTable<&'static [u8], &'static [u8]>,
    id: CursorId,
    from: u64,
) -> Result<u64> {
    let (at, to) = (keys::exception(id, from), keys::exception(id, u64::MAX));
    let mut candidate = from;
    for row in exceptions.range(&at[..]..=&to[..])?.take(STATS_ROWS_MAX) {
        let (at, row) = row?;
        let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
        let state = ExceptionRow::from_bytes(row.value())?.exception.state;
        let is_settled = matches!(state, ExceptionState::Quarantined { .. } | ExceptionState::Discarded);
        if seq != candidate || !is_settled {
            break;
        }
        candidate += 1;
    }
    Ok(candidate)
}

/// Returns the age of an event, in milliseconds. An event's time is the wall clock's, which may
/// have jumped, so the age is bounded by the time since the open. An event appended since the open
/// is at most that old, and an older event at least that old.
pub(crate) fn age_ms(core: &Core, tx: &ReadTransaction, seq: u64, now: Now) -> Result<u64> {
    /// How many records are read if the first ones are damaged or gone.
    const TRIES: usize = 16;
    let open_ms = now.mono_ms.saturating_sub(core.opened.mono_ms);
    let mut by_wall = None;
    for row in tx.open_table(LOG)?.range(seq..)?.take(TRIES) {
        let (at, frame) = row?;
        if let Ok(recorded) = record::decode(at.value(), frame.value()) {
            by_wall = Some(now.wall_ms.saturating_sub(recorded.time_ms()));
            break;
        }
    }
    let is_younger = seq >= core.opened.next_seq;
    Ok(if is_younger { by_wall.unwrap_or(0).min(open_ms) } else { by_wall.unwrap_or(0).max(open_ms) })
}
