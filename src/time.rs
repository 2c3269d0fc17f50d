//! The clock, as a parameter.
//!
//! Two clocks, never mixed: the monotonic one measures every wait, the wall clock is data (an event's time, its
//! `not_before` and `expires`). A wall clock that jumps a day moves no wait of ours.

use std::fmt::Debug;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One reading of both clocks.
///
/// ```
/// use onewrite::time::Now;
/// let (earlier, later) = (Now { mono_ms: 5, wall_ms: 2_000 }, Now { mono_ms: 9, wall_ms: 1_000 }); // the wall clock was set back
/// assert!(earlier.mono_ms < later.mono_ms);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Now {
    /// Milliseconds since some fixed point of this process; never goes back.
    pub mono_ms: u64,
    /// Milliseconds since the Unix epoch, as the machine believes.
    pub wall_ms: u64,
}

/// Where the library gets its time from.
///
/// ```
/// use onewrite::time::{Clock, SystemClock};
/// let clock = SystemClock::new();
/// let (a, b) = (clock.now(), clock.now());
/// assert!(a.mono_ms <= b.mono_ms);
/// ```
pub trait Clock: Debug + Send + Sync + 'static {
    /// Reads both clocks.
    fn now(&self) -> Now;
}

/// The operating system's clocks. The default.
///
/// ```
/// use onewrite::time::{Clock, SystemClock};
/// assert!(SystemClock::default().now().wall_ms > 0);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic side starts at zero now.
    ///
    /// ```
    /// use onewrite::time::{Clock, SystemClock};
    /// let clock = SystemClock::new();
    /// assert!(clock.now().mono_ms < 60_000);
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { mono_ms: as_ms(self.start.elapsed()), wall_ms: as_ms(wall) }
    }
}

/// A duration in whole milliseconds, saturating.
pub(crate) fn as_ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
