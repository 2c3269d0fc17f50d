//! How much deliveries may still write before the disk has less free than the application's
//! reserve. Pure.
//!
//! A look at the disk gives a budget: the free bytes beyond the reserve. Each delivery takes twice
//! its length from the budget, for the pages that a commit writes anew. The consumer looks at the
//! disk again after a while, or when the budget does not suffice.
//!
//! **Credit.** Discarding frees pages inside the file. The disk does not show that, since the file
//! keeps its length. So as many bytes as were discarded during a shortage may be written again, as
//! long as half of the reserve is free.

use std::time::Duration;

use crate::limits::{FREE_SPACE_DEFAULT, FREE_SPACE_PART};
use crate::storage::free_space::Space;
use crate::time::Deadline;
use crate::tuning::PARKING_STEP_BYTES;

/// How long a look at the disk counts.
const LOOK_AFTER: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy)]
pub(super) struct SpaceLeft {
    /// The reserve as set; otherwise the size of the disk decides.
    reserve: Option<u64>,
    /// The bytes that a journal has yet to bring to their place.
    journal: u64,
    left: u64,
    /// Whether there was too little, and is not clearly enough yet.
    low: bool,
    /// The highest cost that was refused since deliveries last found room.
    refused: u64,
    look_at: Option<Deadline>,
    /// How much of the discarded bytes since the open is no credit any more.
    credited: u64,
    on_credit: bool,
}

impl SpaceLeft {
    pub(super) fn new(reserve: Option<u64>, journal: u64) -> Self {
        Self {
            reserve,
            journal,
            left: 0,
            low: false,
            refused: 0,
            look_at: None,
            credited: 0,
            on_credit: false,
        }
    }

    fn reserve(&self, space: Space) -> u64 {
        let reserve = self.reserve.unwrap_or_else(|| FREE_SPACE_DEFAULT.min(space.total / FREE_SPACE_PART));
        if reserve == 0 { 0 } else { reserve.saturating_add(self.journal) }
    }

    /// Notes the disk as it is now. After a shortage, going on takes an eighth of the reserve more,
    /// or the refused bytes if those are more. `discarded` is in bytes since the open.
    fn note(&mut self, space: Option<Space>, discarded: u64) {
        self.look_at = Some(Deadline::after(LOOK_AFTER));
        self.on_credit = false;
        let Some(space) = space else {
            (self.left, self.low) = (u64::MAX, false);
            return;
        };
        let reserve = self.reserve(space);
        let wanted = if self.low { reserve.saturating_add(self.refused.max(reserve / 8)) } else { reserve };
        if space.free >= wanted {
            self.low = false;
            self.left = if reserve == 0 { u64::MAX } else { space.free - reserve };
            self.credited = discarded;
            return;
        }
        let credit = discarded.saturating_sub(self.credited);
        self.left = credit.min(space.free.saturating_sub(reserve / 2));
        self.on_credit = self.left > 0 && self.left >= self.refused;
        self.low = !self.on_credit;
    }

    /// Forgets the refused bytes, because their delivery is not in hand any more.
    pub(super) fn forget_refused(&mut self) {
        self.refused = 0;
    }

    /// Looks at the disk if the last look is too old.
    pub(super) fn refresh(&mut self, discarded: u64, look: impl FnOnce() -> Option<Space>) {
        if self.look_at.is_none_or(|at| at.is_over()) {
            self.note(look(), discarded);
        }
    }

    /// The bytes that one step may hold at most: a part of the budget, so that the last steps
    /// before the reserve are small.
    pub(super) fn step_bytes(&self) -> usize {
        usize::try_from(self.left / 4).unwrap_or(usize::MAX).clamp(1, PARKING_STEP_BYTES)
    }

    /// Whether deliveries of this many bytes may be written. `look` asks the disk. Uses no credit:
    /// see [`spend`](Self::spend).
    pub(super) fn take(&mut self, bytes: u64, discarded: u64, look: impl FnOnce() -> Option<Space>) -> bool {
        let cost = bytes.saturating_mul(2);
        let fresh = self.look_at.is_some_and(|at| !at.is_over());
        if !fresh || (cost > self.left && !self.low) {
            self.note(look(), discarded);
        }
        self.low |= cost > self.left;
        if self.low {
            self.refused = self.refused.max(cost);
            return false;
        }
        (self.left, self.refused) = (self.left - cost, 0);
        true
    }

    /// Uses up credit for deliveries that are tried: each has its effects, or is quarantined, or is
    /// parked.
    pub(super) fn spend(&mut self, bytes: u64) {
        if self.on_credit {
            self.credited = self.credited.saturating_add(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(free: u64) -> Option<Space> {
        Some(Space { free, total: 80_000 })
    }

    #[test]
    fn a_budget_is_what_is_free_beyond_the_reserve() {
        let mut left = SpaceLeft::new(None, 0);
        assert!(left.take(0, 0, || space(10_001)));
        assert!(left.take(500, 0, || space(11_000)), "twice its length, after another look");
        assert!(left.take(0, 0, || space(9_999)), "a look counts for a while");
        assert!(!left.take(1, 0, || space(10_001)), "the budget is used up");
        for bytes in [0, 1, 500] {
            assert!(!left.take(bytes, 0, || panic!("no look at each delivery while there is too little")));
        }
        left.look_at = None;
        assert!(!left.take(0, 0, || space(11_000)), "not clearly enough");
        left.look_at = None;
        assert!(left.take(0, 0, || space(11_250)));
    }

    /// Goal: a large delivery that finds no room does not make the consumer go on and stop at each
    /// look.
    #[test]
    fn what_was_refused_has_room_once_it_goes_on() {
        let mut left = SpaceLeft::new(None, 0);
        assert!(!left.take(1_000, 0, || space(11_500)));
        for (free, goes_on) in [(11_500, false), (11_999, false), (12_000, true)] {
            left.look_at = None;
            assert_eq!(left.take(0, 0, || space(free)), goes_on, "{free}");
        }
        assert!(left.take(1_000, 0, || panic!("it counts for a while")));
        // A delivery that is not in hand any more needs no room.
        assert!(!left.take(1_000, 0, || space(9_000)));
        left.forget_refused();
        left.look_at = None;
        assert!(left.take(0, 0, || space(11_250)));
        // The same holds on credit.
        assert!(!left.take(1_000, 0, || space(9_000)));
        for (discarded, goes_on) in [(1_999, false), (2_000, true)] {
            left.look_at = None;
            assert_eq!(left.take(0, discarded, || space(9_000)), goes_on, "{discarded}");
        }
    }

    /// Goal: a step follows the budget of now, not that of an old look.
    #[test]
    fn steps_follow_the_disk() {
        let mut left = SpaceLeft::new(None, 0);
        left.refresh(0, || space(60_000));
        assert_eq!(left.step_bytes(), 50_000 / 4);
        left.refresh(0, || panic!("it counts for a while"));
        left.look_at = None;
        left.refresh(0, || space(10_400));
        assert_eq!(left.step_bytes(), 100);
    }

    #[test]
    fn a_reserve_of_none_and_a_disk_that_says_nothing_stop_nothing() {
        assert!(SpaceLeft::new(Some(0), 1 << 20).take(u64::MAX / 4, 0, || space(0)));
        assert!(SpaceLeft::new(Some(1), 0).take(u64::MAX / 4, 0, || None));
        assert!(!SpaceLeft::new(Some(1), 9_999).take(0, 0, || space(9_999)), "what a journal holds counts");
    }

    #[test]
    fn what_was_discarded_may_be_written_again() {
        let mut left = SpaceLeft::new(None, 0);
        assert!(left.take(0, 700, || space(10_000)), "what was discarded before is in the figure");
        left.look_at = None;
        assert!(!left.take(0, 700, || space(9_000)));
        left.look_at = None;
        assert!(left.take(400, 1_500, || space(9_000)));
        left.spend(800);
        assert!(!left.take(1, 1_500, || space(9_000)), "all of it is written");
        left.look_at = None;
        assert!(!left.take(0, 1_500, || space(9_000)));
        left.look_at = None;
        assert!(!left.take(0, 99_999, || space(5_000)), "half of the reserve stays, whatever was discarded");
    }
}
