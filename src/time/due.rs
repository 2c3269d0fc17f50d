//! The moment at which something is due by the store's clock.

use std::time::{Duration, Instant};

use super::{Clock, Deadline, as_ms};

/// One reading of a clock's monotonic time and of real time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    mono_ms: u64,
    real: Instant,
    runs_by_itself: bool,
}

/// A moment of the clock's monotonic time.
///
/// The moment has come once the clock shows it. For a clock that runs by itself, it has also come
/// once as much real time has passed. Such a clock may stand still for a test's sake, and waits
/// must end all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Due {
    real: Deadline,
    at_ms: u64,
}

impl Look {
    pub(crate) fn at(clock: &dyn Clock) -> Self {
        let (mono_ms, runs_by_itself) = (clock.now().mono_ms, clock.runs_by_itself());
        Self { mono_ms, real: Instant::now(), runs_by_itself }
    }

    /// Returns the moment `wait` of the clock's time from now.
    pub(crate) fn after(self, wait: Duration) -> Due {
        let due = self.delayed(wait);
        if self.runs_by_itself || wait.is_zero() { due } else { Due { real: Deadline::Never, ..due } }
    }

    /// Returns the moment `wait` of real time from now, or earlier if the clock jumps as far.
    pub(crate) fn delayed(self, wait: Duration) -> Due {
        Due { real: Deadline::from(self.real, wait), at_ms: self.mono_ms.saturating_add(as_ms(wait)) }
    }

    pub(crate) fn now(self) -> Due {
        self.after(Duration::ZERO)
    }
}

impl Due {
    pub(crate) fn has_come(self, look: Look) -> bool {
        self.at_ms <= look.mono_ms || self.real.instant().is_some_and(|at| at <= look.real)
    }

    /// Returns when a thread wakes to look again, unless a jump of the clock wakes it before.
    pub(crate) fn wake_at(self) -> Deadline {
        self.real
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{ManualClock, Now};

    #[derive(Debug)]
    struct Frozen;

    impl Clock for Frozen {
        fn now(&self) -> Now {
            Now::default()
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    /// Goal: with a clock that stands still, nothing comes before the clock is moved, but a short
    /// delay still ends. Method: real time passes, then the clock's.
    #[test]
    fn a_manual_clock_alone_says_what_is_due() {
        let clock = ManualClock::new();
        let look = Look::at(&clock);
        let (due, delay) = (look.after(HOUR), look.delayed(HOUR));
        let later = Look { real: look.real + HOUR, ..look };
        assert!(!due.has_come(later) && due.wake_at() == Deadline::Never && delay.has_come(later));
        clock.advance(HOUR);
        assert!(due.has_come(Look::at(&clock)) && delay.has_come(Look::at(&clock)));
        assert!(look.now().has_come(look) && !look.after(Duration::MAX).has_come(Look::at(&clock)));
    }

    /// Goal: an application's clock that stands still and implements only `now` delays no try for
    /// ever.
    #[test]
    fn real_time_is_enough_for_a_clock_that_says_it_runs() {
        let look = Look::at(&Frozen);
        let due = look.after(HOUR);
        assert!(!due.has_come(look) && due.wake_at() == Deadline::At(look.real + HOUR));
        assert!(due.has_come(Look { real: look.real + HOUR, ..look }));
        assert!(due.has_come(Look { mono_ms: 3_600_000, ..look }));
    }
}
