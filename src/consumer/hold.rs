//! Deliveries that wait, lane by lane, for a gap before them to be filled. Knows nothing of a
//! store, a broker or a clock.
//!
//! **Invariants.** Only deliveries with a gap before them are held, lane by lane, in the order of
//! numbers. Nothing is held longer than its own deadline.

use std::collections::{BTreeMap, HashMap};

use super::waiting::{Load, Member};
use crate::event::LaneOf;
use crate::time::{Due, Look};

/// The held deliveries of all lanes.
#[derive(Debug)]
pub(super) struct Held<T> {
    lanes: HashMap<LaneOf, Lane<T>>,
    /// Distinguishes two deliveries of one number.
    arrivals: u64,
    len: usize,
    /// The load of the deliveries that hold the prefetch.
    load: Load,
}

type Lane<T> = BTreeMap<(u64, u64), (T, Due)>;

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self { lanes: HashMap::new(), arrivals: 0, len: 0, load: Load::default() }
    }
}

impl<T: Member> Held<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The load of the deliveries that hold the prefetch.
    pub(super) fn load(&self) -> Load {
        self.load
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.lanes.values().flat_map(BTreeMap::values).map(|(item, _)| item)
    }

    /// Replaces each held item, or lets it go.
    pub(super) fn change(&mut self, mut change: impl FnMut(T) -> Option<T>) {
        (self.len, self.load) = (0, Load::default());
        for items in self.lanes.values_mut() {
            for (place, (item, until)) in std::mem::take(items) {
                if let Some(item) = change(item) {
                    self.len += 1;
                    self.load.add(&item);
                    items.insert(place, (item, until));
                }
            }
        }
        self.lanes.retain(|_, items| !items.is_empty());
    }

    /// Takes an item in. [`release`](Self::release) returns the items that may go on.
    pub(super) fn put(&mut self, lane: LaneOf, number: u64, item: T, until: Due) {
        self.arrivals += 1;
        self.len += 1;
        self.load.add(&item);
        let items = self.lanes.entry(lane).or_default();
        // Items behind this one that came before it may not wait longer for it. So deadlines rise
        // with numbers.
        let behind = items.range((number, 0)..).next().map(|(_, (_, until))| *until);
        items.insert((number, self.arrivals), (item, behind.map_or(until, |behind| behind.min(until))));
    }

    /// Lets go, in order, of items without a gap before them, or past their deadline. The number
    /// `next` is the lane's first that has not come yet. It moves with the released items.
    pub(super) fn release(&mut self, lane: LaneOf, next: &mut u64, look: Look) -> Vec<T> {
        let mut released = Vec::new();
        let Some(items) = self.lanes.get_mut(&lane) else { return released };
        while let Some(first) = items.first_entry() {
            let number = first.key().0;
            if number > *next && !first.get().1.has_come(look) {
                break;
            }
            *next = (*next).max(number.saturating_add(1));
            released.push(first.remove().0);
        }
        if items.is_empty() {
            self.lanes.remove(&lane);
        }
        self.len -= released.len();
        released.iter().for_each(|item| self.load.subtract(item));
        released
    }

    /// The time of the next deadline.
    pub(super) fn deadline(&self) -> Option<Due> {
        self.firsts().map(|(_, until)| until).min()
    }

    /// Lanes whose first item has reached its deadline.
    pub(super) fn due(&self, look: Look) -> Vec<LaneOf> {
        self.firsts().filter(|(_, until)| until.has_come(look)).map(|(lane, _)| lane).collect()
    }

    /// Lanes with held items.
    pub(super) fn lanes(&self) -> impl Iterator<Item = LaneOf> + '_ {
        self.lanes.keys().copied()
    }

    /// Lanes whose first item no longer has a gap before it.
    pub(super) fn filled(&self, next: impl Fn(LaneOf) -> u64) -> Vec<LaneOf> {
        let firsts =
            self.lanes.iter().filter_map(|(lane, items)| Some((*lane, items.first_key_value()?.0.0)));
        firsts.filter(|(lane, number)| *number <= next(*lane)).map(|(lane, _)| lane).collect()
    }

    /// Ends the wait of the lane that has waited longest, since nothing that could fill a gap can
    /// come.
    pub(super) fn give_up_one(&mut self, look: Look) {
        let Some((lane, _)) = self.firsts().min_by_key(|(_, until)| *until) else { return };
        if let Some(mut first) = self.lanes.get_mut(&lane).and_then(|items| items.first_entry()) {
            first.get_mut().1 = look.now();
        }
    }

    fn firsts(&self) -> impl Iterator<Item = (LaneOf, Due)> {
        self.lanes.iter().filter_map(|(lane, items)| Some((*lane, items.first_key_value()?.1.1)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::time::ManualClock;

    impl Member for u64 {
        fn holds_prefetch(&self) -> bool {
            !self.is_multiple_of(2)
        }

        fn bytes(&self) -> usize {
            1
        }
    }

    const LANE: LaneOf = LaneOf { store: [1; 16], epoch: 1, id: 0 };

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A look at a clock that has run for this many seconds.
    fn at(seconds: u64) -> Look {
        let clock = ManualClock::new();
        clock.advance(s(seconds));
        Look::at(&clock)
    }

    /// Takes `numbers` in, in this order, each with a timeout of a minute. Returns what goes on
    /// after each.
    fn arrive(held: &mut Held<u64>, next: &mut u64, numbers: &[u64], now: Look) -> Vec<Vec<u64>> {
        let mut arrive = |number: &u64| {
            held.put(LANE, *number, *number, now.after(s(60)));
            held.release(LANE, next, now)
        };
        numbers.iter().map(&mut arrive).collect()
    }

    #[test]
    fn order_is_restored_and_repeats_pass() {
        let (mut held, mut next, now) = (Held::default(), 0, at(0));
        let went = arrive(&mut held, &mut next, &[0, 3, 2, 0, 3, 1, 4], now);
        let expected: [&[u64]; 7] = [&[0], &[], &[], &[0], &[], &[1, 2, 3, 3], &[4]];
        assert_eq!(went, expected);
        assert_eq!((held.len(), next, held.deadline()), (0, 5, None));
    }

    #[test]
    fn what_has_waited_long_enough_goes_and_takes_its_successors_along() {
        let (mut held, mut next, now) = (Held::default(), 0, at(0));
        arrive(&mut held, &mut next, &[2, 3, 7], now);
        assert!(held.due(now).is_empty());
        held.put(LANE, 9, 9, at(59).after(s(60)));
        let later = at(60);
        assert_eq!((held.deadline(), held.due(later)), (Some(now.after(s(60))), vec![LANE]));
        assert_eq!(held.release(LANE, &mut next, later), [2, 3, 7]);
        assert_eq!((held.len(), next), (1, 8));
    }

    /// Goal: a later arrival with a lower number does not make others wait longer.
    #[test]
    fn nothing_waits_longer_than_its_own_time() {
        let mut held = Held::default();
        let (early, late) = (at(0).after(s(5)), at(0).after(s(9)));
        held.put(LANE, 7, 7, early);
        held.put(LANE, 2, 2, late);
        held.put(LANE, 9, 9, late);
        assert_eq!(held.deadline(), Some(early));
        assert_eq!(held.release(LANE, &mut 0, at(5)), [2, 7]);
        assert_eq!(held.deadline(), Some(late));
    }

    #[test]
    fn one_that_is_given_up_goes_at_once() {
        let (mut held, mut next, now) = (Held::default(), 0, at(0));
        arrive(&mut held, &mut next, &[5, 9], now);
        held.give_up_one(now);
        assert_eq!(held.due(now), [LANE]);
        assert_eq!(held.release(LANE, &mut next, now), [5]);
        assert_eq!((held.len(), held.load().count), (1, 1));
        held.change(|_| None);
        assert_eq!((held.len(), held.load().count, held.deadline()), (0, 0, None));
    }
}
