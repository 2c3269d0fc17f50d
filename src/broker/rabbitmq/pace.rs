//! The waits between connection attempts.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use crate::message::FaultClass;
use crate::time::part_of;
use crate::tuning::CONFIG_RETRY_MS;

/// A connection that lived this long has proved itself, even if nothing was published over it.
pub(super) const STABLE: Duration = Duration::from_secs(5);

/// Jittered exponential backoff. After a refusal that waiting does not heal, attempts are rare.
#[derive(Debug)]
pub(super) struct Pace {
    first: Duration,
    max: Duration,
    failures: u32,
}

impl Pace {
    pub(super) fn new((first, max): (Duration, Duration)) -> Self {
        Self { first, max, failures: 0 }
    }

    /// Notes the end of a connection, which lived for `lived` and may have `worked`. Returns
    /// whether the connection had proved itself.
    pub(super) fn had_connection(&mut self, lived: Duration, worked: bool) -> bool {
        let proved = worked || lived >= STABLE;
        if proved {
            self.failures = 0;
        }
        proved
    }

    /// Returns the wait before the next attempt.
    pub(super) fn next_wait(&mut self, class: FaultClass) -> Duration {
        self.wait_with(class, random_unit())
    }

    /// Returns the wait for a random `unit` in `0.0..1.0`.
    fn wait_with(&mut self, class: FaultClass, unit: f64) -> Duration {
        if class == FaultClass::Config {
            return Duration::from_millis(CONFIG_RETRY_MS).mul_f64(0.8 + 0.4 * unit);
        }
        let doubled = self.first.saturating_mul(1 << self.failures.min(20));
        self.failures = self.failures.saturating_add(1);
        part_of(doubled.min(self.max), 0.5 + 0.5 * unit)
    }
}

/// A random number that is good enough for jitter and needs no dependency: each `RandomState` is
/// seeded anew.
fn random_unit() -> f64 {
    let bits = RandomState::new().hash_one(0_u8) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_over_once_stable() {
        let mut pace = Pace::new((Duration::from_millis(100), Duration::from_secs(30)));
        let mut last = Duration::ZERO;
        for _ in 0..9 {
            let wait = pace.wait_with(FaultClass::Outage, 0.999_999);
            assert!(wait > last && wait <= Duration::from_secs(30));
            last = wait;
        }
        for _ in 0..200 {
            let wait = pace.next_wait(FaultClass::Outage);
            assert!(wait >= Duration::from_secs(15) && wait <= Duration::from_secs(30), "{wait:?}");
        }
        pace.had_connection(Duration::from_secs(1), false);
        assert!(pace.wait_with(FaultClass::Outage, 0.0) >= Duration::from_secs(15));
        pace.had_connection(Duration::from_secs(1), true);
        assert_eq!(pace.wait_with(FaultClass::Outage, 0.0), Duration::from_millis(50));
        pace.had_connection(Duration::from_secs(5), false);
        assert_eq!(pace.wait_with(FaultClass::Outage, 0.0), Duration::from_millis(50));
    }

    /// Goal: even the longest wait is jittered. Method: the longest wait, at both ends of the
    /// random range.
    #[test]
    fn the_longest_wait_is_spread_too() {
        let mut pace = Pace::new((Duration::MAX, Duration::MAX));
        for unit in [0.0, 0.5, 1.0 - f64::EPSILON / 2.0, 1.0] {
            assert!(pace.wait_with(FaultClass::Outage, unit) >= Duration::MAX / 2 - Duration::from_secs(1));
        }
    }

    #[test]
    fn a_refusal_is_asked_about_slowly_and_costs_the_backoff_nothing() {
        let mut pace = Pace::new((Duration::from_millis(100), Duration::from_secs(30)));
        for _ in 0..100 {
            let wait = pace.next_wait(FaultClass::Config);
            assert!(wait >= Duration::from_secs(24) && wait <= Duration::from_secs(36), "{wait:?}");
        }
        assert_eq!(pace.wait_with(FaultClass::Outage, 0.0), Duration::from_millis(50));
    }
}
