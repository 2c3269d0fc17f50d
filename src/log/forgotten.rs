//! The forgotten lanes of a producer: the rule, and the bytes of its row. Pure.
//!
//! A lane's id is the sequence number of its first event, so ids of one producer rise. Forgotten
//! ids are kept as a bounded number of ranges: near ranges are merged. A lane without rows whose id
//! lies in a range may have been seen, so nothing of it is applied unasked. A lane with rows uses
//! its rows, wherever its id lies. Far ranges stay apart, so forged ids do not take genuine ids
//! with them.
//!
//! ```text
//! (first id u64, last id u64) × ranges │ crc32 u32
//! ```

use super::dedup::{sealed, unsealed};
use super::wire_bytes::Reader;

/// The most ranges that a row keeps.
const RANGES_MAX: usize = 32;

/// The ranges, in order and apart from each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Forgotten(Vec<(u64, u64)>);

impl Forgotten {
    pub(crate) fn contains(&self, id: u64) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&id))
    }

    pub(crate) fn add(&mut self, id: u64) {
        if self.contains(id) {
            return;
        }
        self.0.push((id, id));
        self.0.sort_unstable();
        self.join(|gap| gap <= 1);
        while self.0.len() > RANGES_MAX {
            let Some(least) = self.gaps().min() else { return };
            self.join(|gap| gap <= least);
        }
    }

    /// Iterates over the distances from the end of each range to the beginning of the next.
    fn gaps(&self) -> impl Iterator<Item = u64> {
        self.0.windows(2).filter_map(|pair| match pair {
            [(_, end), (start, _)] => Some(start.saturating_sub(*end)),
            _ => None,
        })
    }

    fn join(&mut self, is_near: impl Fn(u64) -> bool) {
        let mut joined: Vec<(u64, u64)> = Vec::with_capacity(self.0.len());
        for (first, last) in self.0.drain(..) {
            match joined.last_mut() {
                Some((_, end)) if is_near(first.saturating_sub(*end)) => *end = last.max(*end),
                _ => joined.push((first, last)),
            }
        }
        self.0 = joined;
    }

    pub(crate) fn to_bytes(&self, key: &[u8]) -> Vec<u8> {
        let numbers = self.0.iter().flat_map(|(first, last)| [*first, *last]);
        sealed(key, numbers.flat_map(u64::to_le_bytes).collect())
    }

    /// Reads a row; `None` if it is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(unsealed(key, bytes)?);
        let mut ranges = Vec::new();
        while !reader.0.is_empty() {
            let (first, last) = (reader.u64().ok()?, reader.u64().ok()?);
            if first > last || ranges.len() == RANGES_MAX {
                return None;
            }
            ranges.push((first, last));
        }
        Some(Self(ranges))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Goal: forged ids far away widen no range over genuine ids. Method: many forged ids beside
    /// few genuine ones.
    #[test]
    fn ids_far_apart_stay_apart() {
        let mut forgotten = Forgotten::default();
        (0..1_000).for_each(|n| forgotten.add((1 << 60) + n * 1_000_000));
        (0..1_000).for_each(|n| forgotten.add(n * 100));
        assert!(forgotten.contains(99_900) && !forgotten.contains(1 << 59) && !forgotten.contains(200_000));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal: forgotten ids stay forgotten, in a row of bounded length that is read as it was
        /// written. Method: random ids.
        #[test]
        fn what_is_forgotten_stays_forgotten(ids in prop::collection::vec(any::<u64>(), 0..200)) {
            let mut forgotten = Forgotten::default();
            for id in &ids {
                forgotten.add(*id);
                prop_assert!(forgotten.0.len() <= RANGES_MAX);
                prop_assert!(forgotten.0.is_sorted());
            }
            prop_assert!(ids.iter().all(|id| forgotten.contains(*id)));
            if ids.len() <= RANGES_MAX {
                let near = |id: u64| forgotten.contains(id) == ids.contains(&id);
                prop_assert!(ids.iter().all(|id| near(id.wrapping_add(7)) && near(id.wrapping_sub(7))));
            }
            let bytes = forgotten.to_bytes(b"key");
            prop_assert_eq!(Forgotten::from_bytes(b"key", &bytes), Some(forgotten));
            prop_assert_eq!(Forgotten::from_bytes(b"other", &bytes), None);
        }

        #[test]
        fn hostile_bytes_do_not_panic(row in prop::collection::vec(any::<u8>(), 0..700)) {
            let _ = Forgotten::from_bytes(b"key", &row);
            let _ = Forgotten::from_bytes(b"key", &sealed(b"key", row));
        }
    }
}
