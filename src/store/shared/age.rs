//! Ages of events and ids, measured by the time that has passed while the store was open.
//!
//! The wall clock of an edge device starts in 1970 and jumps by decades, so a difference of two of
//! its readings is no duration. The *store age* grows with the monotonic clock while the store is
//! open, and the file keeps it. Inbox entries carry the store age. Events have no room for it:
//! *milestones* say which events had been appended by which age.
//!
//! **Invariants.** The store age never goes back, and is never ahead of the time that has passed. A
//! crash may lose a part of the store age: that makes everything younger, never older. A milestone
//! never says that an event is older than it is.

use std::sync::atomic::{AtomicU64, Ordering};

use redb::WriteTransaction;

use crate::error::Result;
use crate::storage::tables::schema::{META, META_AGE};
use crate::time::Now;
use crate::tuning::{AGE_MILESTONES_MAX, AGE_SAVE_MS, AGE_SAVE_MS_MIN, AGE_STEP_MS_MIN, AGE_STEPS};

/// The store age while it grows.
#[derive(Debug)]
pub(crate) struct Age {
    /// The age in the file at the open, and the time of the monotonic clock at the open.
    opened_ms: u64,
    mono_ms: u64,
    /// The highest age so far: a foreign clock may go back.
    newest_ms: AtomicU64,
}

impl Age {
    pub(crate) fn new(opened_ms: u64, now: Now) -> Self {
        Self { opened_ms, mono_ms: now.mono_ms, newest_ms: AtomicU64::new(opened_ms) }
    }

    /// The store age now, in milliseconds.
    pub(crate) fn at(&self, now: Now) -> u64 {
        let passed_ms = now.mono_ms.saturating_sub(self.mono_ms);
        let age_ms = self.opened_ms.saturating_add(passed_ms);
        self.newest_ms.fetch_max(age_ms, Ordering::Relaxed).max(age_ms)
    }

    /// The store age at the last look at the clock, which is that of the last commit.
    pub(crate) fn newest_ms(&self) -> u64 {
        self.newest_ms.load(Ordering::Relaxed)
    }
}

/// A pair of store age and sequence number: at this age, all events below the number had been
/// appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Milestone {
    age_ms: u64,
    next_seq: u64,
}

/// A sparse index from store ages to sequence numbers: what the file holds, and the newest
/// milestone in memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct AgeIndex {
    saved_ms: u64,
    /// Sorted by age and by sequence number.
    milestones: Vec<Milestone>,
    /// The milestone of the last commit that appended something; in memory alone.
    newest: Option<Milestone>,
}

impl AgeIndex {
    /// Encodes the row: the store age, and the milestones.
    pub(in crate::store) fn to_bytes(&self) -> Vec<u8> {
        let milestones = self.milestones.iter().flat_map(|milestone| [milestone.age_ms, milestone.next_seq]);
        std::iter::once(self.saved_ms).chain(milestones).flat_map(u64::to_le_bytes).collect()
    }

    /// Decodes a row. A row that cannot be read, or is missing, counts as that of a new store:
    /// everything is as young as can be.
    pub(in crate::store) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (numbers, odd) = bytes.as_chunks::<8>();
        let mut numbers = numbers.iter().map(|number| u64::from_le_bytes(*number));
        let saved_ms = numbers.next().filter(|_| odd.is_empty())?;
        let mut milestones = Vec::new();
        while let Some(age_ms) = numbers.next() {
            milestones.push(Milestone { age_ms, next_seq: numbers.next()? });
        }
        let sorted = milestones.is_sorted_by(|a, b| a.age_ms <= b.age_ms && a.next_seq <= b.next_seq);
        let sane = sorted && milestones.last().is_none_or(|last| last.age_ms <= saved_ms);
        sane.then_some(Self { saved_ms, milestones, newest: None })
    }

    /// The index of a file that is being opened. Events that no milestone covers count as appended
    /// now.
    pub(in crate::store) fn opened(row: Option<Self>, next_seq: u64) -> Self {
        let mut index = row.unwrap_or_default();
        // A log that has lost its end may have given these numbers to other events since.
        index.milestones.retain(|milestone| milestone.next_seq <= next_seq);
        index.newest = Some(Milestone { age_ms: index.saved_ms, next_seq });
        index
    }

    pub(crate) fn saved_ms(&self) -> u64 {
        self.saved_ms
    }

    /// Returns the sequence number below which all events are at least `keep_ms` old.
    pub(in crate::store) fn old_below(&self, age_ms: u64, keep_ms: u64) -> u64 {
        let milestones = self.milestones.iter().chain(&self.newest);
        let old = milestones.filter(|milestone| milestone.age_ms.saturating_add(keep_ms) <= age_ms);
        old.map(|milestone| milestone.next_seq).max().unwrap_or(0)
    }

    /// Returns the index after a commit at this age, if the commit is to write the index.
    /// `closing`: the commit may be the last one.
    pub(in crate::store) fn after(
        &self,
        age_ms: u64,
        next_seq: u64,
        keep_ms: u64,
        closing: bool,
    ) -> Option<Self> {
        let grown_ms = age_ms.saturating_sub(self.saved_ms);
        let step_ms = AGE_STEP_MS_MIN.max(keep_ms / AGE_STEPS);
        let last = self.milestones.last();
        let is_new = keep_ms > 0 && last.is_none_or(|last| last.next_seq < next_seq);
        let step_due = is_new && last.is_none_or(|last| age_ms.saturating_sub(last.age_ms) >= step_ms);
        if !step_due && grown_ms < AGE_SAVE_MS && !(closing && grown_ms >= AGE_SAVE_MS_MIN) {
            return None;
        }
        let mut next = Self { saved_ms: age_ms.max(self.saved_ms), ..self.clone() };
        if step_due || (closing && is_new) {
            // Events before a pause keep their age; they are not as young as the events after the
            // pause.
            let now = Milestone { age_ms: next.saved_ms, next_seq };
            for milestone in self.newest.into_iter().chain([now]) {
                if next.milestones.last().is_none_or(|last| last.next_seq < milestone.next_seq) {
                    next.milestones.push(milestone);
                }
            }
        }
        let is_old = |milestone: &Milestone| milestone.age_ms.saturating_add(keep_ms) <= age_ms;
        let old = next.milestones.iter().take_while(|milestone| is_old(milestone)).count();
        let surplus = next.milestones.len().saturating_sub(AGE_MILESTONES_MAX);
        // Of the milestones that are old enough, the newest one suffices.
        next.milestones.drain(..old.saturating_sub(1).max(surplus));
        if keep_ms == 0 {
            next.milestones.clear();
        }
        Some(next)
    }

    /// Notes that a commit at this age is durable, after which the log ends before `next_seq`.
    pub(in crate::store) fn committed(&mut self, written: Option<Self>, age_ms: u64, next_seq: u64) {
        if let Some(written) = written {
            *self = written;
        }
        if self.newest.is_none_or(|newest| newest.next_seq < next_seq) {
            self.newest = Some(Milestone { age_ms, next_seq });
        }
    }
}

/// Writes the index, if this commit is to write it.
pub(in crate::store) fn save(tx: &WriteTransaction, index: Option<&AgeIndex>) -> Result<()> {
    if let Some(index) = index {
        tx.open_table(META)?.insert(META_AGE, index.to_bytes().as_slice())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mono(mono_ms: u64) -> Now {
        Now { mono_ms, wall_ms: 0 }
    }

    #[test]
    fn the_store_age_never_goes_back() {
        let age = Age::new(1_000, mono(70));
        assert_eq!([70, 80, 75, 0, 90].map(|at| age.at(mono(at))), [1_000, 1_010, 1_010, 1_010, 1_020]);
        assert_eq!(age.at(mono(u64::MAX)), u64::MAX);
    }

    #[test]
    fn a_row_is_read_as_it_was_written_or_not_at_all() {
        let index = AgeIndex::default().after(9_000, 5, 60_000, false).unwrap();
        assert_eq!(AgeIndex::from_bytes(&index.to_bytes()), Some(index.clone()));
        assert_eq!(AgeIndex::from_bytes(&[]), None);
        assert_eq!(AgeIndex::from_bytes(&index.to_bytes()[1..]), None);
        assert_eq!(AgeIndex::from_bytes(&index.to_bytes()[..16]), None);
        let ahead = [5, 9, 1].map(u64::to_le_bytes).concat();
        assert_eq!(AgeIndex::from_bytes(&ahead), None, "a milestone beyond the age");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Append(u64),
        Pass(u64),
        Close,
        Crash,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1_u64..5).prop_map(Step::Append),
            4 => prop_oneof![0_u64..100, 0_u64..20_000, 0_u64..5_000_000].prop_map(Step::Pass),
            1 => Just(Step::Close),
            1 => Just(Step::Crash),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal: an event is called old only once it has been in an open store for `keep`. Without
        /// a crash the event is called old not much later, through any number of closes. The row
        /// stays small. Method: any sequence of appends, passing time, closes and crashes, checked
        /// against the true age of each event. Each commit may be the last one before a crash.
        #[test]
        fn nothing_is_old_too_early_and_everything_is_old_in_time(
            keep_ms in prop_oneof![1_u64..10, 1_000_u64..100_000, Just(7 * 24 * 3_600_000), Just(u64::MAX)],
            steps in proptest::collection::vec(step(), 1..80),
        ) {
            let (mut index, mut age) = (AgeIndex::opened(None, 0), Age::new(0, mono(0)));
            // The true time that the store was open, and when each event came by that time.
            let (mut true_ms, mut came, mut crashes, mut closes) = (0_u64, Vec::new(), 0_u64, 0_u64);
            for step in steps {
                let commit = |index: &mut AgeIndex, age: &Age, at: u64, next_seq: u64, closing: bool| {
                    let age_ms = age.at(mono(at));
                    let written = index.after(age_ms, next_seq, keep_ms, closing);
                    index.committed(written, age_ms, next_seq);
                };
                match step {
                    Step::Append(count) => {
                        came.extend(std::iter::repeat_n(true_ms, count as usize));
                        commit(&mut index, &age, true_ms, came.len() as u64, false);
                    }
                    Step::Pass(ms) => true_ms += ms,
                    Step::Close | Step::Crash => {
                        if matches!(step, Step::Close) {
                            commit(&mut index, &age, true_ms, came.len() as u64, true);
                            closes += 1;
                        } else {
                            crashes += 1;
                        }
                        let row = AgeIndex::from_bytes(&index.to_bytes());
                        prop_assert!(row.is_some());
                        index = AgeIndex::opened(row, came.len() as u64);
                        age = Age::new(index.saved_ms(), mono(true_ms));
                    }
                }
                prop_assert!(index.to_bytes().len() <= 8 + 16 * (AGE_MILESTONES_MAX + 2));
                let old_below = index.old_below(age.at(mono(true_ms)), keep_ms);
                for (seq, came_ms) in (0_u64..).zip(&came) {
                    let true_age_ms = true_ms - came_ms;
                    prop_assert!(seq >= old_below || true_age_ms >= keep_ms, "event {} is old after {} ms", seq, true_age_ms);
                    let slack_ms = AGE_STEP_MS_MIN.max(keep_ms / AGE_STEPS).saturating_add(closes * AGE_SAVE_MS_MIN);
                    let late = crashes == 0 && true_age_ms >= keep_ms.saturating_add(slack_ms);
                    prop_assert!(seq < old_below || !late, "event {} is young after {} ms of {}", seq, true_age_ms, keep_ms);
                }
            }
        }
    }
}
