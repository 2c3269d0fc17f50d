//! Decides when trimming is due, and how much of it one commit does.
//!
//! Removing a record costs page writes, so records that can go gather until a commit can remove
//! many of them.
//!
//! **Invariant.** The next commit removes the records once they have gathered for
//! [`TRIM_DEFER_MS_MAX`](crate::tuning::TRIM_DEFER_MS_MAX), or once they hold
//! [`TRIM_DEFER_BYTES_MAX`] bytes. Neither bound moves when something is written, when a relay
//! makes progress, or when a thread wakes.

use redb::{ReadableTable, WriteTransaction};

use crate::error::Result;
use crate::log::record;
use crate::storage::tables::schema::LOG;
use crate::store::shared::core::Core;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::parked::ParkedChanges;
use crate::store::shared::tail::Tail;
use crate::store::transaction::pending::Pending;
use crate::time::Now;
use crate::tuning::{
    DERIVED_FLUSH_BYTES, DERIVED_FLUSH_EVENTS, TRIM_BATCH_MIN, TRIM_DEFER_BYTES_MAX, TRIM_STEP,
    TRIM_STEP_BYTES,
};

/// How one commit trims the log.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Plan {
    /// Every relay is done with every record below that has no exception, and retention wants none
    /// of these records.
    pub(in crate::store) floor: u64,
    /// This commit trims all it can: the application writes nothing now, or trimming has been
    /// deferred for long enough.
    pub(in crate::store) thorough: bool,
    /// This commit writes the tables that are derived from the log.
    pub(in crate::store) flush: bool,
    /// This commit removes records if any can go. Otherwise it removes them once [`TRIM_BATCH_MIN`]
    /// can go.
    pub(in crate::store) trim: bool,
    /// The most records to remove, and the most bytes.
    pub(in crate::store) step: (u64, u64),
}

impl Plan {
    /// Decides how this commit trims. `alone`: the commit carries no write of the application.
    pub(in crate::store) fn new(
        core: &Core,
        (tx, tail, pending): (&WriteTransaction, &Tail, &Pending),
        moved: &[(String, Cursor, ParkedChanges)],
        floor: u64,
        (alone, now): (bool, Now),
    ) -> Result<Self> {
        let thorough = alone || tail.deferred.is_some_and(|deferred| deferred.is_overdue(now));
        let offset = match known_offset(tail, pending, moved, floor) {
            Some(offset) => offset,
            None => offset_at(tx, tail, pending, floor)?,
        };
        let offset = offset.min(pending.end_offset.saturating_sub(core.settings.retention.bytes_min));
        let appended = pending.end_offset - tail.end_offset;
        let step =
            (TRIM_STEP.max(2 * pending.frames.len() as u64), TRIM_STEP_BYTES.max(appended.saturating_mul(2)));
        // Records from `derived_through` on cannot go before the tables derived from them are
        // written.
        let within_reach = floor.min(tail.derived_through).saturating_sub(tail.trimmed_to);
        let beyond_reach = offset.saturating_sub(tail.derived_offset.max(tail.trimmed_offset));
        // Retention by bytes alone may hold records below the floor. Then writing the derived
        // tables would let none of them go.
        let is_held = core.settings.retention.bytes_min > 0 && beyond_reach == 0;
        let would_help = floor > tail.derived_through && !is_held;
        let flush = pending.next_seq - tail.derived_through >= DERIVED_FLUSH_EVENTS
            || pending.end_offset.saturating_sub(tail.derived_offset) >= DERIVED_FLUSH_BYTES
            || beyond_reach >= TRIM_DEFER_BYTES_MAX
            || (would_help && (alone || thorough && within_reach < step.0))
            || (pending.flush_derived && pending.next_seq > tail.derived_through);
        let trim = thorough || offset.saturating_sub(tail.trimmed_offset) >= TRIM_DEFER_BYTES_MAX;
        Ok(Self { floor, thorough, flush, trim, step })
    }

    /// Whether it is worthwhile to remove this many records.
    pub(in crate::store) fn removes(&self, records: u64) -> bool {
        records > 0 && (self.trim || records >= TRIM_BATCH_MIN)
    }
}

/// Returns the offset at which the record before `floor` ends, if memory knows it.
fn known_offset(
    tail: &Tail,
    pending: &Pending,
    moved: &[(String, Cursor, ParkedChanges)],
    floor: u64,
) -> Option<u64> {
    if floor <= tail.trimmed_to {
        return Some(tail.trimmed_offset);
    }
    let ends = [(pending.next_seq, pending.end_offset), (tail.next_seq, tail.end_offset)];
    let cursors = moved.iter().map(|(_, cursor, _)| cursor).chain(tail.cursors.values());
    let positions = cursors.map(|cursor| (cursor.position, cursor.position_offset));
    ends.into_iter().chain(positions).find_map(|(at, offset)| (at == floor).then_some(offset))
}

/// Returns the offset at which the record before `position` ends.
pub(crate) fn offset_at(tx: &WriteTransaction, tail: &Tail, pending: &Pending, position: u64) -> Result<u64> {
    if position <= tail.trimmed_to {
        return Ok(tail.trimmed_offset);
    }
    if position >= pending.next_seq {
        return Ok(pending.end_offset);
    }
    let log = tx.open_table(LOG)?;
    let before = position - 1;
    let offset = log.get(before)?.map(|frame| record::end_offset(before, frame.value()));
    // Reading a damaged record reports it. Until the next step, the figure of the backlog is off by
    // the record's length.
    Ok(offset.and_then(|offset| offset.ok()).unwrap_or(tail.trimmed_offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use crate::limits::PAYLOAD_BYTES_MAX;
    use crate::store::Store;

    /// Goal: how much of the log an open has to read for the derived tables is bounded in bytes
    /// too. Method: a few of the largest events; after each, and after opening again, look at how
    /// far the derived tables are behind the log.
    #[test]
    fn what_is_derived_is_never_far_behind_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            let builder = Store::builder().payload_bytes_max(PAYLOAD_BYTES_MAX);
            builder.open(folder.path().join("a.redb")).unwrap()
        };
        let behind = |store: &Store| {
            let tail = store.core().tail();
            tail.end_offset - tail.derived_offset
        };
        let store = open();
        let event = || Event::bytes("t", vec![7; PAYLOAD_BYTES_MAX]).unpublished();
        for _ in 0..7 {
            store.write(move |tx| tx.append(event())).unwrap();
            assert!(behind(&store) < DERIVED_FLUSH_BYTES, "{} bytes", behind(&store));
        }
        let before = behind(&store);
        assert!(before > 0);
        store.close().unwrap();
        assert_eq!(behind(&open()), before);
    }
}
