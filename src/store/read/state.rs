//! The state row of the log, and checks against it.

use redb::ReadTransaction;

use crate::error::{CorruptError, Result};
use crate::event::RecordedEvent;
use crate::log::streams::StreamState;
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{META, META_STATE, StateRow};

pub(crate) fn read_state(tx: &ReadTransaction) -> Result<StateRow> {
    let meta = tx.open_table(META)?;
    let row = meta.get(META_STATE)?;
    row.and_then(|row| StateRow::from_bytes(row.value())).ok_or_else(|| damaged_row("state"))
}

/// Refuses numbers that no event at this place can have: each event of a lane or a stream has a
/// sequence number of its own. Only where the newest events were lost may a stream be ahead of the
/// log, and then the stream's row says so.
pub(in crate::store) fn plausible(
    recorded: RecordedEvent,
    known: StreamState,
) -> Result<RecordedEvent, CorruptError> {
    let seq = recorded.seq();
    let refused = |what| Err(CorruptError { seq, what });
    if recorded.lane.is_some_and(|lane| lane.number > seq || lane.id > seq) {
        return refused("its number in its lane cannot be");
    }
    if recorded.revision().is_some_and(|revision| revision > seq.max(known.next)) {
        return refused("its revision cannot be");
    }
    Ok(recorded)
}
