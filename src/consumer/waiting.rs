//! Deliveries that wait for their next try, in lines: one for each key, and one for each delivery
//! without a key. Knows nothing of a store, a broker or a clock.
//!
//! **Invariants.** A line keeps its members in order of arrival, also when some are put back. A
//! line has one time for its next try, that of its first member. After a failure, the first member
//! is tried without the members behind it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::time::{Due, Look};

/// An item that waits in a line.
pub(super) trait Member {
    /// Whether the broker counts the item against the prefetch.
    fn holds_prefetch(&self) -> bool;
    /// The bytes that a try of the item takes.
    fn bytes(&self) -> usize;
}

/// The load of deliveries that hold the prefetch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) count: usize,
    pub(super) bytes: u64,
}

impl Load {
    pub(super) fn add(&mut self, item: &impl Member) {
        if item.holds_prefetch() {
            *self = self.plus(Self { count: 1, bytes: item.bytes() as u64 });
        }
    }

    pub(super) fn subtract(&mut self, item: &impl Member) {
        if item.holds_prefetch() {
            self.count = self.count.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(item.bytes() as u64);
        }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self { count: self.count.saturating_add(other.count), bytes: self.bytes.saturating_add(other.bytes) }
    }

    /// Whether the load is more than `share`, in number or in bytes.
    pub(super) fn exceeds(self, share: Self) -> bool {
        self.count > share.count || self.bytes > share.bytes
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Name {
    Key(Arc<str>),
    /// A delivery without a key, by its place in the order of arrival.
    Alone(u64),
}

#[derive(Debug)]
struct Line<T> {
    members: BTreeMap<u64, T>,
    /// When the first member may be tried. `None` while members that stood before it are being
    /// tried.
    due: Option<(Due, u64)>,
    failed: bool,
}

/// All lines.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    lines: HashMap<Name, Line<T>>,
    due: BTreeMap<(Due, u64), Name>,
    scheduled: u64,
    /// Lines of which some members are being tried, and others wait.
    taken: Vec<Name>,
    /// Places of the items that hold the prefetch.
    holding: BTreeMap<u64, Name>,
    load: Load,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            lines: HashMap::new(),
            due: BTreeMap::new(),
            scheduled: 0,
            taken: Vec::new(),
            holding: BTreeMap::new(),
            load: Load::default(),
        }
    }
}

fn name_of(key: Option<&Arc<str>>, place: u64) -> Name {
    key.map_or(Name::Alone(place), |key| Name::Key(Arc::clone(key)))
}

impl<T: Member> Waiting<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Whether deliveries of this key wait.
    pub(super) fn has(&self, key: &Arc<str>) -> bool {
        !self.lines.is_empty() && self.lines.contains_key(&Name::Key(Arc::clone(key)))
    }

    /// The load of the items that hold the prefetch.
    pub(super) fn load(&self) -> Load {
        self.load
    }

    /// Puts a delivery into its line. `due` counts if the delivery is the first of the line.
    /// `failed` means that its try has failed.
    pub(super) fn put(&mut self, key: Option<&Arc<str>>, place: u64, item: T, due: Due, failed: bool) {
        let name = name_of(key, place);
        if item.holds_prefetch() {
            self.holding.insert(place, name.clone());
            self.load.add(&item);
        }
        let line = self.lines.entry(name.clone()).or_insert_with(|| Line {
            members: BTreeMap::new(),
            due: None,
            failed: false,
        });
        let is_first = line.members.first_key_value().is_none_or(|(first, _)| place < *first);
        line.members.insert(place, item);
        if is_first {
            line.failed = failed;
            self.schedule(name, due);
        }
    }

    fn schedule(&mut self, name: Name, due: Due) {
        let Some(line) = self.lines.get_mut(&name) else { return };
        if let Some(before) = line.due.take() {
            self.due.remove(&before);
        }
        self.scheduled += 1;
        line.due = Some((due, self.scheduled));
        self.due.insert((due, self.scheduled), name);
    }

    /// When the next item may be tried.
    pub(super) fn next_due(&self) -> Option<Due> {
        self.due.first_key_value().map(|((due, _), _)| *due)
    }

    /// Takes out due items, `room` deliveries and about `bytes` at most, each line in its order.
    pub(super) fn take(&mut self, look: Look, mut room: usize, bytes: usize) -> Vec<(u64, T)> {
        let (mut taken, mut left) = (Vec::new(), bytes);
        while room > 0
            && left > 0
            && let Some(entry) = self.due.first_entry()
            && entry.key().0.has_come(look)
        {
            let name = entry.remove();
            let Some(line) = self.lines.get_mut(&name) else { continue };
            line.due = None;
            let most = if std::mem::take(&mut line.failed) { 1 } else { room };
            for _ in 0..most {
                let Some((place, item)) = line.members.pop_first() else { break };
                self.holding.remove(&place);
                self.load.subtract(&item);
                left = left.saturating_sub(item.bytes());
                room -= 1;
                taken.push((place, item));
                if left == 0 {
                    break;
                }
            }
            if line.members.is_empty() {
                self.lines.remove(&name);
            } else {
                self.taken.push(name);
            }
        }
        taken
    }

    /// Notes that the items taken out have been tried. The items behind them are due, unless a
    /// failed item was put back before them.
    pub(super) fn tried(&mut self, now: Due) {
        for name in std::mem::take(&mut self.taken) {
            if self.lines.get(&name).is_some_and(|line| line.due.is_none()) {
                self.schedule(name, now);
            }
        }
    }

    /// Removes the items that `keeps` does not keep.
    pub(super) fn retain(&mut self, keeps: impl Fn(&T) -> bool) {
        let (due, holding, load) = (&mut self.due, &mut self.holding, &mut self.load);
        self.lines.retain(|_, line| {
            line.members.retain(|place, item| {
                let stays = keeps(item);
                if !stays {
                    holding.remove(place);
                    load.subtract(item);
                }
                stays
            });
            if line.members.is_empty()
                && let Some(before) = line.due.take()
            {
                due.remove(&before);
            }
            !line.members.is_empty()
        });
    }

    /// The place of the first item of this key.
    pub(super) fn first_of(&self, key: &Arc<str>) -> Option<u64> {
        let line = self.lines.get(&Name::Key(Arc::clone(key)))?;
        line.members.first_key_value().map(|(place, _)| *place)
    }

    pub(super) fn is_holding(&self, place: u64) -> bool {
        self.holding.contains_key(&place)
    }

    /// The items that hold the prefetch, in the order of arrival.
    pub(super) fn holding(&self) -> impl Iterator<Item = (u64, &T)> {
        let find = |(place, name): (&u64, &Name)| {
            Some((*place, self.lines.get(name).and_then(|line| line.members.get(place))?))
        };
        self.holding.iter().filter_map(find)
    }

    /// Takes out an item that holds the prefetch because it is done with, regardless of the items
    /// behind it.
    pub(super) fn remove(&mut self, place: u64) -> Option<T> {
        let name = self.holding.remove(&place)?;
        let line = self.lines.get_mut(&name)?;
        let item = line.members.remove(&place)?;
        self.load.subtract(&item);
        if line.members.is_empty() {
            if let Some(before) = line.due.take() {
                self.due.remove(&before);
            }
            self.lines.remove(&name);
        }
        Some(item)
    }

    /// Replaces an item that holds the prefetch.
    pub(super) fn replace(&mut self, place: u64, change: impl FnOnce(T) -> T) {
        let Some(name) = self.holding.remove(&place) else { return };
        let Some(line) = self.lines.get_mut(&name) else { return };
        if let Some(item) = line.members.remove(&place) {
            self.load.subtract(&item);
            let item = change(item);
            if item.holds_prefetch() {
                self.holding.insert(place, name);
                self.load.add(&item);
            }
            line.members.insert(place, item);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::time::ManualClock;

    /// The number of its key, and whether the broker holds it.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct One(u8, bool);

    impl Member for One {
        fn holds_prefetch(&self) -> bool {
            self.1
        }

        fn bytes(&self) -> usize {
            10
        }
    }

    fn places(taken: &[(u64, One)]) -> Vec<u64> {
        taken.iter().map(|(place, _)| *place).collect()
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_failed_one_is_tried_without_those_behind_it() {
        let clock = ManualClock::new();
        let (now, key) = (Look::at(&clock), Arc::from("k"));
        let mut waiting = Waiting::default();
        waiting.put(Some(&key), 1, One(0, true), now.after(s(5)), true);
        for place in 2..5 {
            waiting.put(Some(&key), place, One(0, true), now.now(), false);
        }
        assert_eq!(places(&waiting.take(now, 9, 999)), [0; 0]);
        clock.advance(s(5));
        let now = Look::at(&clock);
        assert_eq!(places(&waiting.take(now, 9, 999)), [1]);
        assert!(waiting.has(&key), "those behind it wait for what becomes of it");
        assert_eq!(places(&waiting.take(now, 9, 999)), [0; 0]);
        waiting.tried(now.now());
        assert_eq!(places(&waiting.take(now, 9, 20)), [2, 3], "and then as many as there is room for");
        waiting.put(Some(&key), 3, One(0, true), now.after(s(1)), true);
        waiting.tried(now.now());
        assert_eq!(places(&waiting.take(now, 9, 999)), [0; 0], "one time per key");
        clock.advance(s(1));
        let now = Look::at(&clock);
        assert_eq!(places(&waiting.take(now, 9, 999)), [3]);
        waiting.tried(now.now());
        assert_eq!(places(&waiting.take(now, 9, 999)), [4]);
        assert!(waiting.is_empty() && waiting.next_due().is_none());
    }

    #[test]
    fn what_does_not_hold_the_prefetch_outlives_the_connection() {
        let clock = ManualClock::new();
        let (now, key) = (Look::at(&clock), Arc::from("k"));
        let mut waiting = Waiting::default();
        for place in 1..4 {
            waiting.put(Some(&key), place, One(0, true), now.now(), false);
            waiting.put(None, place + 10, One(0, true), now.now(), false);
        }
        waiting.replace(1, |_| One(7, false));
        waiting.replace(12, |_| One(7, false));
        assert_eq!(waiting.remove(11), Some(One(0, true)));
        assert_eq!(waiting.holding().map(|(place, _)| place).collect::<Vec<_>>(), [2, 3, 13]);
        waiting.retain(|one| !one.1);
        assert_eq!(waiting.load(), Load::default());
        assert_eq!(waiting.take(now, 9, 999), [(1, One(7, false)), (12, One(7, false))]);
        assert!(waiting.is_empty() && waiting.next_due().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal: with any failures and any room, each key's members end in the order in which they
        /// arrived. None is lost, and none waits behind a key that does not. Method: random
        /// failures; the clock jumps to the next due time.
        #[test]
        fn order_per_key_holds(
            keys in prop::collection::vec(0..4_u8, 1..40),
            failures in prop::collection::vec(0..3_u8, 40),
            room in 1..6_usize,
        ) {
            let clock = ManualClock::new();
            let names: Vec<Arc<str>> = (0..4).map(|key| Arc::from(format!("k{key}"))).collect();
            let name = |one: &One| names.get(usize::from(one.0)).filter(|_| one.0 > 0); // 0: without a key
            let mut waiting = Waiting::default();
            let mut failures: BTreeMap<u64, u8> = (0..).zip(failures).collect();
            let mut arrivals = (0_u64..).zip(keys.iter().map(|key| One(*key, *key % 2 == 0)));
            let mut done: Vec<(u64, u8)> = Vec::new();
            loop {
                let now = Look::at(&clock);
                let mut batch = waiting.take(now, room, 1000);
                for (place, one) in arrivals.by_ref().take(room) {
                    match name(&one) {
                        Some(key) if waiting.has(key) => waiting.put(Some(key), place, one, now.now(), false),
                        _ => batch.push((place, one)),
                    }
                }
                let mut failed: Vec<u8> = Vec::new();
                for (place, one) in batch {
                    let left = failures.get_mut(&place).unwrap();
                    if one.0 > 0 && failed.contains(&one.0) {
                        waiting.put(name(&one), place, one, now.now(), false);
                    } else if *left > 0 {
                        *left -= 1;
                        failed.push(one.0);
                        waiting.put(name(&one), place, one.clone(), now.after(s(u64::from(one.0) + 1)), true);
                    } else {
                        done.push((place, one.0));
                    }
                }
                waiting.tried(now.now());
                if waiting.is_empty() && done.len() == keys.len() {
                    break;
                }
                prop_assert!(!waiting.is_empty() || done.len() < keys.len());
                clock.advance(s(1));
            }
            for key in 1..4 {
                let of_key: Vec<u64> = done.iter().filter(|(_, of)| *of == key).map(|(place, _)| *place).collect();
                prop_assert!(of_key.is_sorted(), "{of_key:?}");
            }
            prop_assert_eq!(waiting.load(), Load::default());
        }
    }
}
