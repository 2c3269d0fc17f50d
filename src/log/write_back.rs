//! A cache for rows that are derived from the log and written in bulk.
//!
//! A row per lane or stream, written at every append, would cost a random page write per event. So
//! a write-back cache keeps the changes since the last bulk write in memory. The table on disk is
//! true for the records below a watermark. Opening a store replays the records from there.
//! **Invariant:** records at or above the watermark are not trimmed.

use std::collections::HashMap;

use crate::tuning::WRITE_BACK_CACHE_MAX;

/// A write-back cache: the changes since the last bulk write, and rows that were read.
#[derive(Debug)]
pub(crate) struct WriteBackCache<S> {
    changed: HashMap<Box<[u8]>, S>,
    cached: HashMap<Box<[u8]>, S>,
}

impl<S> Default for WriteBackCache<S> {
    fn default() -> Self {
        Self { changed: HashMap::new(), cached: HashMap::new() }
    }
}

impl<S: Copy> WriteBackCache<S> {
    pub(crate) fn get(&self, key: &[u8]) -> Option<S> {
        self.changed.get(key).or_else(|| self.cached.get(key)).copied()
    }

    /// Notes a state from a committed transaction.
    pub(crate) fn change(&mut self, key: Box<[u8]>, state: S) {
        self.changed.insert(key, state);
    }

    /// Notes a state that was read from the table.
    pub(crate) fn cache(&mut self, key: Box<[u8]>, state: S) {
        if self.cached.len() >= WRITE_BACK_CACHE_MAX {
            self.cached.clear();
        }
        self.cached.insert(key, state);
    }

    /// Returns the rows that a bulk write must write.
    pub(crate) fn changed(&self) -> impl Iterator<Item = (&[u8], S)> {
        self.changed.iter().map(|(key, state)| (&**key, *state))
    }

    /// Notes that the bulk write is durable.
    pub(crate) fn written(&mut self) {
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
        let mut lanes = WriteBackCache::default();
        let key: Box<[u8]> = (*b"lane").into();
        lanes.cache(key.clone(), 4);
        lanes.change(key.clone(), 5);
        for n in 0..=WRITE_BACK_CACHE_MAX {
            lanes.cache(n.to_le_bytes().into(), 0);
        }
        assert_eq!(lanes.get(&key), Some(5));
        lanes.written();
        assert_eq!(lanes.get(&key), Some(5));
        assert_eq!(lanes.changed().count(), 0);
    }
}
