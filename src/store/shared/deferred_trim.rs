//! Since when trimming has been deferred.

use crate::time::Now;
use crate::tuning::TRIM_DEFER_MS_MAX;

/// Records that can be trimmed and are still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deferred {
    /// Since when, by the monotonic clock.
    since_ms: u64,
    /// The first record that came later than the records the time began with.
    to: u64,
}

impl Deferred {
    pub(crate) fn is_overdue(self, now: Now) -> bool {
        now.mono_ms.saturating_sub(self.since_ms) >= TRIM_DEFER_MS_MAX
    }

    /// Returns what is deferred after a commit that has left records below `floor`, from
    /// `trimmed_to` on. The time runs on until all records that it began with are trimmed.
    pub(in crate::store) fn after(earlier: Option<Self>, trimmed_to: u64, floor: u64, now: Now) -> Self {
        earlier.filter(|earlier| trimmed_to < earlier.to).unwrap_or(Self { since_ms: now.mono_ms, to: floor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the time that work has been deferred runs on while parts of the work are done. It
    /// begins anew with later work.
    #[test]
    fn a_deadline_is_moved_by_nothing_but_the_work() {
        let at = |mono_ms| Now { mono_ms, wall_ms: 0 };
        let first = Deferred::after(None, 0, 10, at(100));
        assert!(
            !first.is_overdue(at(99 + TRIM_DEFER_MS_MAX)) && first.is_overdue(at(100 + TRIM_DEFER_MS_MAX))
        );
        // More can be trimmed, and a part has been trimmed.
        let later = Deferred::after(Some(first), 9, 50, at(900));
        assert_eq!(later, first);
        // All records that the time began with are trimmed.
        let anew = Deferred::after(Some(later), 10, 50, at(900));
        assert_eq!(anew, Deferred { since_ms: 900, to: 50 });
        // A clock that goes back makes nothing overdue.
        assert!(!anew.is_overdue(at(0)));
    }
}
