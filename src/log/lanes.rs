//! Which number comes next in each lane.
//!
//! A row per lane, written at every append, would cost a random page write per keyed event. So the book keeps what
//! has changed since the last bulk write in memory; the table on disk is true up to `written_through`, and opening a
//! store replays the records from there. **Invariant:** records at or above `written_through` are not trimmed.

use std::collections::HashMap;

use crate::event::Lane;
use crate::limits::LANE_CACHE_MAX;

/// A lane's id and its next number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneState {
    pub(crate) id: u64,
    pub(crate) next: u64,
}

impl LaneState {
    /// The lane that begins with the event at `seq`.
    pub(crate) fn beginning_at(seq: u64) -> Self {
        Self { id: seq, next: 0 }
    }

    /// Takes the next number.
    pub(crate) fn take(&mut self) -> Lane {
        let number = self.next;
        self.next += 1;
        Lane { id: self.id, number }
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes.first_chunk_mut::<8>().expect("16 bytes").copy_from_slice(&self.id.to_le_bytes());
        bytes.last_chunk_mut::<8>().expect("16 bytes").copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (id, next) = bytes.split_first_chunk::<8>()?;
        Some(Self { id: u64::from_le_bytes(*id), next: u64::from_le_bytes(next.try_into().ok()?) })
    }
}

/// What has changed since the last bulk write, and a cache of the rest.
#[derive(Debug, Default)]
pub(crate) struct LaneBook {
    changed: HashMap<Box<[u8]>, LaneState>,
    cached: HashMap<Box<[u8]>, LaneState>,
    /// The table on disk is true for all records below this sequence number.
    pub(crate) written_through: u64,
}

impl LaneBook {
    /// A book over a table that is true for all records below `written_through`.
    pub(crate) fn new(written_through: u64) -> Self {
        Self { written_through, ..Self::default() }
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<LaneState> {
        self.changed.get(key).or_else(|| self.cached.get(key)).copied()
    }

    /// Notes a lane as a committed transaction left it.
    pub(crate) fn change(&mut self, key: Box<[u8]>, state: LaneState) {
        self.changed.insert(key, state);
    }

    /// Notes a lane as read from the table.
    pub(crate) fn cache(&mut self, key: Box<[u8]>, state: LaneState) {
        if self.cached.len() >= LANE_CACHE_MAX {
            self.cached.clear();
        }
        self.cached.insert(key, state);
    }

    /// What a bulk write must write.
    pub(crate) fn changed(&self) -> impl Iterator<Item = (&[u8], LaneState)> {
        self.changed.iter().map(|(key, state)| (&**key, *state))
    }

    /// The bulk write is durable.
    pub(crate) fn written(&mut self, through: u64) {
        debug_assert!(through >= self.written_through);
        self.written_through = through;
        for (key, state) in std::mem::take(&mut self.changed) {
            self.cache(key, state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_win_over_the_cache_and_survive_it() {
        let mut book = LaneBook::default();
        let key: Box<[u8]> = (*b"lane").into();
        book.cache(key.clone(), LaneState { id: 1, next: 4 });
        book.change(key.clone(), LaneState { id: 1, next: 5 });
        for n in 0..=LANE_CACHE_MAX {
            book.cache(n.to_le_bytes().into(), LaneState::beginning_at(0));
        }
        assert_eq!(book.get(&key), Some(LaneState { id: 1, next: 5 }));
        book.written(9);
        assert_eq!(book.get(&key), Some(LaneState { id: 1, next: 5 }));
        assert_eq!(book.changed().count(), 0);
        assert_eq!(
            LaneState::from_bytes(&LaneState { id: 3, next: 8 }.to_bytes()),
            Some(LaneState { id: 3, next: 8 })
        );
    }
}
