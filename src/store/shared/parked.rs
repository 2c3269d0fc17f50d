//! What memory knows of the parked rows of a relay: the first event of each key, and the rows ahead of its position.

use std::collections::{BTreeMap, BTreeSet};

use redb::ReadableTable;

use crate::delivery::types::{ExceptionState, Key};
use crate::error::Result;
use crate::log::keys::{self, CursorId};

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
