//! Which events of a cursor have waited longest.
//!
//! Parked rows are sorted by key, so their oldest is the least of each key's first; those firsts are kept in memory. There are as
//! many as held keys, which a relay bounds (`HELD_KEYS_MAX`). Exception rows are sorted by
//! sequence number, and rows of all states stand among each other: memory keeps a lower bound for each state, and a search
//! from the bound finds the row.

use std::collections::{BTreeMap, BTreeSet};

use redb::{ReadTransaction, ReadableTable};

use super::core::Core;
use super::cursor::{Cursor, ExceptionRow};
use crate::delivery::types::{ExceptionState, Key};
use crate::error::Result;
use crate::limits::STATS_ROWS_MAX;
use crate::log::keys::{self, CursorId};
use crate::log::record;
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{EXCEPTIONS, LOG, PARKED};
use crate::time::Now;

/// The parked events of one cursor, as far as memory must know them.
#[derive(Debug, Default)]
pub(crate) struct Parked {
    /// The first of each key.
    first_of: BTreeMap<Key, u64>,
    /// Those firsts, in order.
    firsts: BTreeSet<u64>,
    /// Those at or past the cursor's position, with the bytes of their records. A relay's lookahead bounds them.
    ahead: BTreeMap<u64, u64>,
}

/// What one commit changes in it.
#[derive(Debug, Default)]
pub(crate) struct ParkedChanges {
    first_of: BTreeMap<Key, Option<u64>>,
    /// Bytes of what is parked ahead of the position now; `None` for what no longer is.
    ahead: BTreeMap<u64, Option<u64>>,
    position: Option<u64>,
}

impl Parked {
    /// The oldest.
    pub(crate) fn first(&self) -> Option<u64> {
        self.firsts.first().copied()
    }

    /// The commit is durable.
    pub(crate) fn settle(&mut self, changes: ParkedChanges) {
        for (key, first) in changes.first_of {
            if let Some(earlier) = self.first_of.remove(&key) {
                self.firsts.remove(&earlier);
            }
            if let Some(first) = first {
                self.first_of.insert(key, first);
                self.firsts.insert(first);
            }
        }
        for (seq, bytes) in changes.ahead {
            match bytes {
                Some(bytes) => _ = self.ahead.insert(seq, bytes),
                None => _ = self.ahead.remove(&seq),
            }
        }
        if let Some(position) = changes.position.filter(|_| !self.ahead.is_empty()) {
            self.ahead = self.ahead.split_off(&position);
        }
    }

    /// Counts one row, when the store opens.
    pub(crate) fn count(&mut self, key: &str, seq: u64, position: u64, bytes: u64) {
        // Rows of a key come in order.
        if !self.first_of.contains_key(key) {
            self.first_of.insert(key.into(), seq);
            self.firsts.insert(seq);
        }
        if seq >= position {
            self.ahead.insert(seq, bytes);
        }
    }
}

impl ParkedChanges {
    /// A row of this key was written or removed.
    pub(crate) fn touch(&mut self, key: &Key) {
        if !self.first_of.contains_key(key) {
            self.first_of.insert(Key::clone(key), None);
        }
    }

    /// An event ahead of the position was parked, with a record of so many bytes, or no longer is.
    pub(crate) fn ahead(&mut self, seq: u64, bytes: Option<u64>) {
        self.ahead.insert(seq, bytes);
    }

    /// Looks up which row is each touched key's first now.
    pub(crate) fn find_firsts(
        &mut self,
        parked: &impl ReadableTable<&'static [u8], &'static [u8]>,
        cursor: CursorId,
    ) -> Result<()> {
        for (key, first) in &mut self.first_of {
            let (from, to) = (keys::parked(cursor, key, 0), keys::parked(cursor, key, u64::MAX));
            let row = parked.range(from.as_slice()..=to.as_slice())?.next().transpose()?;
            *first = row.and_then(|(at, _)| Some(keys::split_parked(at.value())?.1));
        }
        Ok(())
    }

    /// The position passes what is parked below it: how many rows, and their bytes.
    pub(crate) fn pass(&mut self, known: &Parked, position: u64) -> (u64, u64) {
        let unchanged = known.ahead.range(..position).filter(|(seq, _)| !self.ahead.contains_key(seq));
        let changed = self.ahead.range(..position).filter_map(|(_, bytes)| bytes.as_ref());
        let passed = unchanged.map(|(_, bytes)| bytes).chain(changed);
        let passed = passed.fold((0, 0), |(rows, sum), bytes| (rows + 1, sum + bytes));
        self.position = Some(position);
        passed
    }
}

/// Lower bounds: below, no row of the cursor is in that state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Bounds {
    pub(crate) retrying: u64,
    pub(crate) scheduled: u64,
    /// Below, every event past the position is settled.
    pub(crate) ahead: u64,
    /// Rises when a row is written: what was found before may not be the oldest any more.
    pub(crate) generation: u64,
}

impl Bounds {
    /// A row is written. `alone`: it is the only one of its state.
    pub(crate) fn put(&mut self, state: ExceptionState, seq: u64, alone: bool) {
        self.generation += 1;
        let bound = match state {
            ExceptionState::Retry { .. } => &mut self.retrying,
            ExceptionState::Scheduled { .. } => &mut self.scheduled,
            ExceptionState::Quarantined { .. } | ExceptionState::Discarded => return,
        };
        self.ahead = self.ahead.min(seq);
        *bound = if alone { seq } else { seq.min(*bound) };
    }
}

/// The sequence numbers of the events of a cursor that have waited longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Oldest {
    pub(crate) retrying: Option<u64>,
    pub(crate) scheduled: Option<u64>,
    pub(crate) parked: Option<u64>,
    /// Of all that is neither confirmed nor taken out, whatever it waits for.
    pub(crate) unsettled: Option<u64>,
    bounds: Bounds,
}

/// Finds them, where the log ends at `next_seq`. Reads [`STATS_ROWS_MAX`] rows for each state at most; what stands behind more rows of
/// other states is told too old until later calls have gone past those.
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
    /// Keeps how far the search has come, unless the rows have changed since the cursor was looked at.
    pub(crate) fn note(&self, searched: &Cursor, now: &mut Cursor) {
        let is_same = (now.id, now.rows.bounds) == (searched.id, searched.rows.bounds);
        if is_same && now.position == searched.position {
            now.rows.bounds = self.bounds;
        }
    }
}

/// The first row from `from` on that is in such a state, or the place up to which there is none.
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

/// The first event from `from` on that is not quarantined or discarded, or the place up to which there is none.
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

/// The age of an event, in milliseconds. An event's time is the wall clock's, which may have jumped: of an event that was appended since
/// the store was opened the age is at most the time since then, of an older one at least.
pub(crate) fn age_ms(core: &Core, tx: &ReadTransaction, seq: u64, now: Now) -> Result<u64> {
    /// Records read, where the first are damaged or gone.
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

/// Counts the parked rows of a cursor, when the store opens.
pub(crate) fn count_parked(tx: &ReadTransaction, cursor: &Cursor) -> Result<Parked> {
    let (from, to) = (cursor.id.to_be_bytes(), keys::after_prefix(&cursor.id.to_be_bytes()));
    let mut counted = Parked::default();
    let log = tx.open_table(LOG)?;
    for row in tx.open_table(PARKED)?.range(&from[..]..to.as_slice())? {
        let (at, _) = row?;
        let (key, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
        let bytes = if seq < cursor.position { 0 } else { super::cursor::record_bytes(&log, seq)? };
        counted.count(key, seq, cursor.position, bytes);
    }
    Ok(counted)
}
