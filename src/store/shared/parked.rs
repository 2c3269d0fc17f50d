//! The parked rows of a relay, as far as memory knows them: the first event of each key, and the
//! rows ahead of the position.

use std::collections::{BTreeMap, BTreeSet};

use redb::ReadableTable;

use crate::delivery::types::{ExceptionState, Key};
use crate::error::Result;
use crate::log::keys::{self, CursorId};

/// The parked events of one cursor, as far as memory must know them.
#[derive(Debug, Default)]
pub(crate) struct Parked {
    /// The first parked event of each key.
    first_of: BTreeMap<Key, u64>,
    /// The same first events, in order.
    firsts: BTreeSet<u64>,
    /// The parked events at or past the cursor's position, with the bytes of their records. A
    /// relay's lookahead bounds them.
    ahead: BTreeMap<u64, u64>,
}

/// The changes of one commit to the parked events.
#[derive(Debug, Default)]
pub(crate) struct ParkedChanges {
    first_of: BTreeMap<Key, Option<u64>>,
    /// Bytes of events that are now parked ahead of the position; `None` for events that no longer
    /// are.
    ahead: BTreeMap<u64, Option<u64>>,
    position: Option<u64>,
}

impl Parked {
    /// The oldest parked event.
    pub(crate) fn first(&self) -> Option<u64> {
        self.firsts.first().copied()
    }

    /// Applies the changes of a durable commit.
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
    /// Notes that a row of this key was written or removed.
    pub(crate) fn touch(&mut self, key: &Key) {
        if !self.first_of.contains_key(key) {
            self.first_of.insert(Key::clone(key), None);
        }
    }

    /// Notes that an event ahead of the position was parked, with a record of this many bytes.
    /// `None`: the event is no longer parked.
    pub(crate) fn ahead(&mut self, seq: u64, bytes: Option<u64>) {
        self.ahead.insert(seq, bytes);
    }

    /// Looks up the first row of each touched key.
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

    /// Moves the position past the rows below it. Returns their number and their bytes.
    pub(crate) fn pass(&mut self, known: &Parked, position: u64) -> (u64, u64) {
        let unchanged = known.ahead.range(..position).filter(|(seq, _)| !self.ahead.contains_key(seq));
        let changed = self.ahead.range(..position).filter_map(|(_, bytes)| bytes.as_ref());
        let passed = unchanged.map(|(_, bytes)| bytes).chain(changed);
        let passed = passed.fold((0, 0), |(rows, sum), bytes| (rows + 1, sum + bytes));
        self.position = Some(position);
        passed
    }
}

/// Lower bounds: below each bound, no row of the cursor is in that state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Bounds {
    pub(crate) retrying: u64,
    pub(crate) scheduled: u64,
    /// Below this bound, every event past the position is settled.
    pub(crate) ahead: u64,
    /// Rises when a row is written, since an earlier result may not be the oldest any more.
    pub(crate) generation: u64,
}

impl Bounds {
    /// Notes that a row is written. `alone`: the row is the only one of its state.
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
