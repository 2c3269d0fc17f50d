//! The end of a wait of real time.
//!
//! **Invariant.** This file alone adds a `Duration` to an `Instant`. A wait so long that its end
//! cannot be computed never ends.

use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The end of a wait of real time, by the operating system's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Deadline {
    /// The wait ends at this moment.
    At(Instant),
    /// The wait has no end. It is later than every moment.
    Never,
}

impl Deadline {
    /// Returns the moment `wait` from now. `Never` if no `Instant` is that late.
    pub(crate) fn after(wait: Duration) -> Self {
        Self::from(Instant::now(), wait)
    }

    /// Returns the moment `wait` after `begin`. `Never` if no `Instant` is that late.
    pub(crate) fn from(begin: Instant, wait: Duration) -> Self {
        begin.checked_add(wait).map_or(Self::Never, Self::At)
    }

    /// Returns this moment. A wait with this deadline asks once and does not sleep.
    pub(crate) fn now() -> Self {
        Self::At(Instant::now())
    }

    /// Returns the moment, or `None` for a wait without end.
    pub(crate) fn instant(self) -> Option<Instant> {
        match self {
            Self::At(at) => Some(at),
            Self::Never => None,
        }
    }

    /// Returns the remaining time; `None` for a wait without end.
    pub(crate) fn left(self) -> Option<Duration> {
        self.instant().map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Returns [`left`](Self::left) for callees that need a `Duration`; `Duration::MAX` for a wait
    /// without end.
    pub(crate) fn left_or_max(self) -> Duration {
        self.left().unwrap_or(Duration::MAX)
    }

    /// Whether the moment has come.
    pub(crate) fn is_over(self) -> bool {
        self.left() == Some(Duration::ZERO)
    }

    /// Moves the deadline forward by `margin`. A moment before the process began is now.
    pub(crate) fn earlier_by(self, margin: Duration) -> Self {
        match self {
            Self::At(at) => at.checked_sub(margin).map_or_else(Self::now, Self::At),
            Self::Never => Self::Never,
        }
    }

    /// Parks the thread until it is unparked, or until the deadline. It may return earlier.
    pub(crate) fn park(self) {
        match self.left() {
            Some(left) => std::thread::park_timeout(left),
            None => std::thread::park(),
        }
    }

    /// Waits at a condition variable, until it is notified or until the deadline. It may return
    /// earlier.
    pub(crate) fn wait<'a, T>(self, condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        match self.left() {
            Some(left) => condition.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0,
            None => condition.wait(guard).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no wait is too long for a deadline. Method: the longest, the shortest, and one
    /// between.
    #[test]
    fn a_wait_that_is_too_long_for_the_clock_never_ends() {
        let never = Deadline::after(Duration::MAX);
        assert_eq!(
            (never, never.instant(), never.left(), never.is_over()),
            (Deadline::Never, None, None, false)
        );
        assert_eq!((never.left_or_max(), never.earlier_by(Duration::MAX)), (Duration::MAX, Deadline::Never));
        let hour = Deadline::after(Duration::from_secs(3600));
        assert!(
            hour < never && Deadline::now() < hour && !hour.is_over() && hour.left() > Some(Duration::ZERO)
        );
        assert!(
            hour.earlier_by(Duration::from_secs(3600)).is_over() && hour.earlier_by(Duration::MAX).is_over()
        );
        assert!(Deadline::after(Duration::ZERO).is_over() && Deadline::now().is_over());
    }
}
