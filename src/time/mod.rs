//! The clock, as a parameter.
//!
//! The library never mixes its two clocks. The monotonic clock measures every wait. The wall clock
//! is data: an event's time, its `not_before` and `expires`. A jump of the wall clock moves no wait
//! of the library.

mod deadline;
mod due;
mod manual;

use std::fmt::Debug;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub(crate) use self::deadline::Deadline;
pub(crate) use self::due::{Due, Look};
pub use self::manual::ManualClock;

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
    /// Milliseconds since the Unix epoch, by the machine's wall clock.
    pub wall_ms: u64,
}

/// The source of the library's time.
///
/// **Times of the clock** follow this clock:
/// - the next try of a publish, a delivery, a projection or a capture;
/// - `not_before` and `expires`;
/// - the gap timeout of a consumer;
/// - the ages of inbox ids and of kept events.
///
/// **Waits of real time** ignore this clock:
/// - a timeout that a caller passes (`stop`, `confirmed`, `next_timeout`, `QuotaPolicy::Wait`);
/// - deadlines and pauses of a connection to a broker, including
///   [`MemoryBroker`](crate::broker::MemoryBroker);
/// - the short delays that gather work for one commit. A clock that notifies its listeners of a
///   jump ends these delays.
///
/// A clock is the application's code. The library calls it outside of the library's locks, but also
/// inside transactions. So the clock must not write to the store.
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

    /// Whether time passes by itself, about as fast as real time; `true` by default.
    ///
    /// If `false`, no thread of the library sleeps for a time of this clock. Such a thread waits
    /// until the clock notifies its [listeners](Self::subscribe). So the clock must notify them of
    /// each move.
    ///
    /// ```
    /// use onewrite::time::{Clock, ManualClock, SystemClock};
    /// assert!(SystemClock::new().runs_by_itself());
    /// assert!(!ManualClock::new().runs_by_itself());
    /// ```
    fn runs_by_itself(&self) -> bool {
        true
    }

    /// Keeps a listener, and notifies it after each jump of the clock. A store subscribes once,
    /// when it is opened.
    ///
    /// The default does nothing. Sleeping threads then wake by the clock as it ran when they fell
    /// asleep. Notify listeners outside of locks that [`now`](Self::now) takes.
    ///
    /// ```
    /// use onewrite::time::{Clock, ClockListener, ManualClock, Now};
    ///
    /// /// A clock of the application, on top of another one.
    /// #[derive(Debug)]
    /// struct Shifted(ManualClock);
    ///
    /// impl Clock for Shifted {
    ///     fn now(&self) -> Now {
    ///         Now { wall_ms: self.0.now().wall_ms + 3_600_000, ..self.0.now() }
    ///     }
    ///     fn runs_by_itself(&self) -> bool {
    ///         self.0.runs_by_itself()
    ///     }
    ///     fn subscribe(&self, listener: ClockListener) {
    ///         self.0.subscribe(listener);
    ///     }
    /// }
    /// ```
    fn subscribe(&self, listener: ClockListener) {
        drop(listener);
    }
}

/// A listener that a clock notifies of a jump. It is cheap to clone, and keeps nothing alive.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use onewrite::time::{Clock, ClockListener, ManualClock};
/// let jumps = Arc::new(AtomicUsize::new(0));
/// let count = Arc::clone(&jumps);
/// let on_jump: Arc<dyn Fn() + Send + Sync> = Arc::new(move || _ = count.fetch_add(1, Ordering::SeqCst));
/// let clock = ManualClock::new();
/// clock.subscribe(ClockListener::new(&on_jump));
/// clock.advance(std::time::Duration::from_secs(1));
/// assert_eq!(jumps.load(Ordering::SeqCst), 1);
/// ```
#[derive(Clone)]
pub struct ClockListener(Weak<dyn Fn() + Send + Sync>);

impl ClockListener {
    /// Makes a listener that calls `on_jump` as long as `on_jump` lives elsewhere.
    ///
    /// ```
    /// use onewrite::time::ClockListener;
    /// let on_jump: std::sync::Arc<dyn Fn() + Send + Sync> = std::sync::Arc::new(|| {});
    /// assert!(ClockListener::new(&on_jump).notify());
    /// ```
    #[must_use]
    pub fn new(on_jump: &Arc<dyn Fn() + Send + Sync>) -> Self {
        Self(Arc::downgrade(on_jump))
    }

    /// Notifies the listener of a jump. Returns `false` if the listener is gone, so that the clock
    /// can forget it.
    ///
    /// A store's listener wakes the store's threads. It takes a few short locks, and runs no code
    /// of the application but wakers of futures. The clock may call it from anywhere.
    ///
    /// ```
    /// use onewrite::time::ClockListener;
    /// let on_jump: std::sync::Arc<dyn Fn() + Send + Sync> = std::sync::Arc::new(|| {});
    /// let listener = ClockListener::new(&on_jump);
    /// drop(on_jump);
    /// assert!(!listener.notify());
    /// ```
    pub fn notify(&self) -> bool {
        let on_jump = self.0.upgrade();
        on_jump.iter().for_each(|on_jump| on_jump());
        on_jump.is_some()
    }

    /// Whether the listener still lives.
    ///
    /// ```
    /// use onewrite::time::ClockListener;
    /// let on_jump: std::sync::Arc<dyn Fn() + Send + Sync> = std::sync::Arc::new(|| {});
    /// assert!(ClockListener::new(&on_jump).is_alive());
    /// ```
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Debug for ClockListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClockListener").field("is_alive", &self.is_alive()).finish()
    }
}

/// Returns when a thread looks again that waits for `wait` of a clock's time. If the clock does not
/// run by itself, its notification wakes the thread instead.
pub(crate) fn wake_after(clock: &dyn Clock, wait: Duration) -> Deadline {
    if wait.is_zero() || clock.runs_by_itself() { Deadline::after(wait) } else { Deadline::Never }
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
    /// Makes a clock whose monotonic side starts at zero now.
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

/// Returns a wall time from milliseconds since the Unix epoch. A time that a `SystemTime` cannot
/// hold is the epoch.
pub(crate) fn wall_time(wall_ms: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_millis(wall_ms)).unwrap_or(UNIX_EPOCH)
}

/// Returns a fraction of a duration. `Duration::MAX` if it is too long for a duration.
#[cfg(feature = "rabbitmq")]
pub(crate) fn part_of(duration: Duration, part: f64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * part).unwrap_or(Duration::MAX)
}

/// Returns a duration in whole milliseconds, saturating.
pub(crate) fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
