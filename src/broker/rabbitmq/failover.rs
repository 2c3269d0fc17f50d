//! Decides which broker of the list comes next, and when. Pure: the time is a parameter.
//!
//! **Rules.**
//! - The brokers are tried in the order of the list, round and round. A connected broker is kept
//!   until it fails.
//! - After a broker fails, the next broker is tried at once. A wait comes only after a whole round
//!   has failed.
//! - A wait also comes if a connection that worked was lost soon. The published message may be the
//!   reason; the next broker would then drop the publisher too.
//! - A broker that refused the publisher (wrong password, unknown authority) rests for about 30 s;
//!   the other brokers are tried meanwhile.

use std::time::{Duration, Instant};

use crate::message::FaultClass;
use crate::time::Deadline;

use super::pace::{Pace, STABLE};

/// The order of attempts over one list of brokers.
#[derive(Debug)]
pub(super) struct Failover {
    pace: Pace,
    at: usize,
    /// Brokers of this round that have failed or are resting.
    failed: usize,
    /// The end of each broker's rest.
    rests: Vec<Option<Instant>>,
}

impl Failover {
    /// Starts at the first broker. `brokers` is not 0.
    pub(super) fn new(brokers: usize, backoff: (Duration, Duration)) -> Self {
        Self { pace: Pace::new(backoff), at: 0, failed: 0, rests: vec![None; brokers] }
    }

    /// The index of the broker to try.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Notes a failed attempt. Returns the wait before the next attempt; zero while the round has
    /// brokers left.
    pub(super) fn refused(&mut self, class: FaultClass, now: Instant) -> Duration {
        let rest = (class == FaultClass::Config).then(|| self.pace.next_wait(class));
        let rest = rest.and_then(|rest| Deadline::from(now, rest).instant());
        if let Some(own) = self.rests.get_mut(self.at) {
            *own = rest;
        }
        self.advance();
        while self.failed < self.rests.len() {
            if self.rested_at(self.at).is_none_or(|at| at <= now) {
                return Duration::ZERO;
            }
            self.advance();
        }
        self.failed = 0;
        self.wait_for_a_round(now)
    }

    /// Notes a lost connection, which lived for `lived` and may have `worked`. Returns the wait, as
    /// [`refused`](Self::refused) does. A broker that only refuses a message or a destination is
    /// kept.
    pub(super) fn lost(
        &mut self,
        class: FaultClass,
        lived: Duration,
        worked: bool,
        now: Instant,
    ) -> Duration {
        if self.pace.had_connection(lived, worked) {
            self.failed = 0;
        }
        match class {
            FaultClass::Message | FaultClass::Destination => self.pace.next_wait(class),
            _ => {
                let soon = worked && lived < STABLE;
                let wait = self.refused(class, now);
                if soon && wait.is_zero() { self.pace.next_wait(class) } else { wait }
            }
        }
    }

    /// Notes that the broker has answered: every broker of the list has a new chance.
    pub(super) fn answered(&mut self) {
        self.pace.had_connection(Duration::ZERO, true);
        self.failed = 0;
    }

    fn advance(&mut self) {
        self.failed += 1;
        self.at = (self.at + 1) % self.rests.len();
    }

    /// Returns the end of this broker's rest. If the time is past, or `None`, the broker is not
    /// resting.
    fn rested_at(&self, broker: usize) -> Option<Instant> {
        self.rests.get(broker).copied().flatten()
    }

    /// Chooses the first broker that is not resting, or the broker whose rest ends first. Returns
    /// the wait.
    fn wait_for_a_round(&mut self, now: Instant) -> Duration {
        let count = self.rests.len();
        let in_order = (0..count).map(|n| (self.at + n) % count);
        let rest_of = |broker: &usize| self.rested_at(*broker).filter(|at| *at > now);
        let Some(first) = in_order.clone().min_by_key(rest_of) else { return Duration::ZERO };
        let wait = match rest_of(&first) {
            Some(at) => at.saturating_duration_since(now),
            None => self.pace.next_wait(FaultClass::Outage),
        };
        self.at = first;
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FaultClass::{Config, Destination, Outage};

    fn failover(brokers: usize) -> Failover {
        Failover::new(brokers, (Duration::from_millis(100), Duration::from_secs(30)))
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn each_of_a_round_is_asked_at_once_and_then_there_is_a_wait() {
        let (mut failover, now) = (failover(3), Instant::now());
        let mut last_longest = Duration::ZERO;
        for round in 0..6 {
            for broker in 0..2 {
                assert_eq!(failover.at(), broker, "round {round}");
                assert_eq!(failover.refused(Outage, now), Duration::ZERO);
            }
            let wait = failover.refused(Outage, now);
            let longest = Duration::from_millis(100 << round);
            assert!(wait > last_longest / 2 && wait <= longest, "round {round}: {wait:?}");
            last_longest = longest;
        }
        assert_eq!(failover.at(), 0);
    }

    #[test]
    fn who_is_connected_to_is_kept_and_handed_over_when_it_fails() {
        let (mut failover, now) = (failover(3), Instant::now());
        assert_eq!(failover.refused(Outage, now), Duration::ZERO);
        assert_eq!(failover.at(), 1);
        // The connection worked: the first broker's failure is forgotten, and all three are tried.
        assert_eq!(failover.lost(Outage, LONG, true, now), Duration::ZERO);
        assert_eq!(failover.at(), 2);
        assert_eq!(failover.refused(Outage, now), Duration::ZERO);
        assert_eq!(failover.at(), 0);
        assert!(failover.refused(Outage, now) > Duration::ZERO);
        assert_eq!(failover.at(), 1);
    }

    /// Goal: brokers that take a connection and drop it at once are not tried in a tight loop.
    #[test]
    fn connections_that_prove_nothing_count_as_failures() {
        let (mut failover, now) = (failover(2), Instant::now());
        for round in 0..5 {
            assert_eq!(failover.lost(Outage, Duration::ZERO, false, now), Duration::ZERO);
            let wait = failover.lost(Outage, Duration::ZERO, false, now);
            assert!(wait >= Duration::from_millis(50 << round), "{wait:?}");
        }
    }

    /// Goal: a message that makes each broker drop the publisher is not tried on all brokers in a
    /// tight loop, even if other messages are confirmed before it.
    #[test]
    fn who_works_and_soon_drops_us_is_waited_for() {
        let (mut failover, now) = (failover(2), Instant::now());
        for n in 0..5 {
            assert_eq!(failover.at(), n % 2);
            let wait = failover.lost(Outage, Duration::from_millis(300), true, now);
            assert!(wait >= Duration::from_millis(50), "{wait:?}");
        }
    }

    /// Goal: a fault of a message or a destination does not change the broker.
    #[test]
    fn a_destination_fault_keeps_the_broker() {
        let (mut failover, now) = (failover(2), Instant::now());
        for _ in 0..3 {
            assert!(failover.lost(Destination, LONG, true, now) > Duration::ZERO);
            assert_eq!(failover.at(), 0);
        }
        // If such a fault already prevents the connection, the broker may change.
        assert_eq!(failover.refused(Destination, now), Duration::ZERO);
        assert_eq!(failover.at(), 1);
    }

    #[test]
    fn one_that_refuses_us_rests_while_the_others_go_on() {
        let (mut failover, began) = (failover(3), Instant::now());
        assert_eq!(failover.refused(Config, began), Duration::ZERO);
        let mut now = began;
        for _ in 0..4 {
            for broker in 1..=2 {
                assert_eq!(failover.at(), broker);
                let wait = failover.refused(Outage, now);
                assert!((wait == Duration::ZERO) == (broker == 1), "{wait:?}");
                now += wait;
            }
        }
        assert!(now < began + Duration::from_secs(2));
        // The rest has ended.
        now += Duration::from_secs(36);
        assert_eq!(failover.refused(Outage, now), Duration::ZERO);
        assert_eq!(failover.refused(Outage, now), Duration::ZERO);
        assert_eq!(failover.at(), 0);
    }

    #[test]
    fn where_all_refuse_us_each_is_asked_every_thirty_seconds() {
        let (mut failover, mut now) = (failover(3), Instant::now());
        let mut asked = [0; 3];
        let end = now + Duration::from_secs(3600);
        while now < end {
            asked[failover.at()] += 1;
            now += failover.refused(Config, now);
        }
        assert!(asked.iter().all(|times| (100..=150).contains(times)), "{asked:?}");
    }

    #[test]
    fn a_single_broker_is_asked_as_its_own_list() {
        let (mut failover, now) = (failover(1), Instant::now());
        let wait = failover.refused(Outage, now);
        assert!(wait >= Duration::from_millis(50) && wait <= Duration::from_millis(100), "{wait:?}");
        let wait = failover.refused(Config, now);
        assert!(wait >= Duration::from_secs(24) && wait <= Duration::from_secs(36), "{wait:?}");
        let wait = failover.lost(Outage, LONG, true, now);
        assert!(wait >= Duration::from_millis(50) && wait <= Duration::from_millis(100), "{wait:?}");
    }
}
