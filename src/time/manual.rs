//! A clock for tests.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Clock, ClockListener, Now, as_ms};

/// A clock that stands still until it is moved, for tests of what takes hours.
///
/// Clones are the same clock. A move wakes every store that was opened with the clock: its relays,
/// consumers, projections and captures, and the trimming of the log. Work that is due by the
/// new time happens at once. A move returns without waiting for these threads.
///
/// With this clock no thread of the library sleeps for a time of the clock: nothing becomes due
/// before a move makes it due. The waits of real time, which [`Clock`] lists, stay as they are.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
/// use onewrite::time::ManualClock;
/// use onewrite::{Event, Store};
/// # let folder = tempfile::tempdir()?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("reminders", Default::default());
/// let clock = ManualClock::new();
/// let store = Store::builder().clock(Arc::new(clock.clone())).open(folder.path().join("a.redb"))?;
/// let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// let tomorrow = clock.wall() + Duration::from_secs(24 * 3600);
/// let receipt = store.write(move |tx| {
///     tx.append(Event::bytes("reminder", "").not_before(tomorrow).to("", "reminders"))
/// })?;
/// assert!(receipt.wait_confirmed(Duration::from_millis(50)).is_err()); // it waits for tomorrow
/// clock.advance(Duration::from_secs(24 * 3600));
/// receipt.wait_confirmed(Duration::from_secs(5))?; // in milliseconds
/// # let _ = relay.stop(Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ManualClock {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    time: Mutex<Time>,
    listeners: Mutex<Vec<ClockListener>>,
}

/// The times of both clocks. They are durations, so that many small steps lose nothing.
#[derive(Debug)]
struct Time {
    mono: Duration,
    /// Since the Unix epoch.
    wall: Duration,
}

impl Default for Time {
    fn default() -> Self {
        Self { mono: Duration::ZERO, wall: since_epoch(SystemTime::now()) }
    }
}

/// Returns the time since 1970. A time before 1970 is 1970.
fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ManualClock {
    /// Makes a clock that stands at the machine's wall time, and at zero of its monotonic time.
    ///
    /// ```
    /// use onewrite::time::{Clock, ManualClock};
    /// assert_eq!(ManualClock::new().now().mono_ms, 0);
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a clock whose wall time stands at `wall`. A time before 1970 is 1970.
    ///
    /// ```
    /// use std::time::{Duration, UNIX_EPOCH};
    /// use onewrite::time::{Clock, ManualClock};
    /// assert_eq!(ManualClock::at(UNIX_EPOCH + Duration::from_secs(7)).now().wall_ms, 7_000);
    /// ```
    #[must_use]
    pub fn at(wall: SystemTime) -> Self {
        let clock = Self::default();
        lock(&clock.shared.time).wall = since_epoch(wall);
        clock
    }

    /// Moves the monotonic and the wall time forward by `duration`, and wakes all threads that may
    /// have work.
    ///
    /// A time beyond the representable range stops at its end, so `Duration::MAX` makes everything
    /// due. A call costs a lock, and a notification for each store. It is allowed everywhere, also
    /// inside a transaction.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::time::{Clock, ManualClock};
    /// let clock = ManualClock::new();
    /// let before = clock.now();
    /// clock.advance(Duration::from_secs(3600));
    /// let passed = (clock.now().mono_ms - before.mono_ms, clock.now().wall_ms - before.wall_ms);
    /// assert_eq!(passed, (3_600_000, 3_600_000));
    /// ```
    pub fn advance(&self, duration: Duration) {
        {
            let mut time = lock(&self.shared.time);
            time.mono = time.mono.saturating_add(duration);
            time.wall = time.wall.saturating_add(duration);
        }
        self.notify();
    }

    /// Sets the wall time alone, forward or back, as an operator or NTP does. Wakes all threads
    /// that may have work.
    ///
    /// ```
    /// use std::time::{Duration, UNIX_EPOCH};
    /// use onewrite::time::{Clock, ManualClock, Now};
    /// let clock = ManualClock::new();
    /// clock.set_wall(UNIX_EPOCH + Duration::from_secs(7));
    /// assert_eq!(clock.now(), Now { mono_ms: 0, wall_ms: 7_000 });
    /// ```
    pub fn set_wall(&self, wall: SystemTime) {
        lock(&self.shared.time).wall = since_epoch(wall);
        self.notify();
    }

    /// Returns the wall time. A clock beyond the range of `SystemTime` returns the end of that
    /// range.
    ///
    /// ```
    /// use std::time::{Duration, UNIX_EPOCH};
    /// use onewrite::time::ManualClock;
    /// let clock = ManualClock::at(UNIX_EPOCH);
    /// clock.advance(Duration::from_millis(5));
    /// assert_eq!(clock.wall(), UNIX_EPOCH + Duration::from_millis(5));
    /// ```
    #[must_use]
    pub fn wall(&self) -> SystemTime {
        let mut since_epoch = lock(&self.shared.time).wall;
        loop {
            match UNIX_EPOCH.checked_add(since_epoch) {
                Some(wall) => return wall,
                None => since_epoch /= 2,
            }
        }
    }

    /// Notifies the listeners, outside of every lock.
    fn notify(&self) {
        let listeners = lock(&self.shared.listeners).clone();
        if listeners.iter().filter(|listener| !listener.notify()).count() > 0 {
            lock(&self.shared.listeners).retain(ClockListener::is_alive);
        }
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Now {
        let time = lock(&self.shared.time);
        // The wall time is rounded up, so that a time is due once the wall time is set to this very
        // time.
        let wall = time.wall.saturating_add(Duration::from_nanos(999_999));
        Now { mono_ms: as_ms(time.mono), wall_ms: as_ms(wall) }
    }

    fn runs_by_itself(&self) -> bool {
        false
    }

    fn subscribe(&self, listener: ClockListener) {
        let mut listeners = lock(&self.shared.listeners);
        listeners.retain(ClockListener::is_alive);
        listeners.push(listener);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Goal: each move notifies every listener that still lives; the others are forgotten. A
    /// listener may call the clock. Method: a listener that moves the clock once more, and one that
    /// is dropped.
    #[test]
    fn every_move_notifies_all_and_who_is_gone_is_forgotten() {
        let (clock, heard) = (ManualClock::new(), Arc::new(AtomicUsize::new(0)));
        let listener = |f: Box<dyn Fn() + Send + Sync>| -> Arc<dyn Fn() + Send + Sync> { Arc::from(f) };
        let mover = {
            let (clock, heard) = (clock.clone(), Arc::clone(&heard));
            listener(Box::new(move || {
                if heard.fetch_add(1, Ordering::SeqCst) == 0 {
                    clock.advance(Duration::from_micros(500));
                }
            }))
        };
        let gone = listener(Box::new(|| unreachable!("it is gone")));
        for listener in [&mover, &gone] {
            clock.subscribe(ClockListener::new(listener));
        }
        drop(gone);
        clock.advance(Duration::from_micros(500));
        assert_eq!((heard.load(Ordering::SeqCst), clock.now().mono_ms), (2, 1));
        assert_eq!(lock(&clock.shared.listeners).len(), 1);
        clock.set_wall(SystemTime::now());
        assert_eq!(heard.load(Ordering::SeqCst), 3);
    }

    /// Goal: no move is too far. Method: the furthest, twice.
    #[test]
    fn time_stands_still_at_its_end() {
        let clock = ManualClock::new();
        (0..2).for_each(|_| clock.advance(Duration::MAX));
        assert_eq!(clock.now(), Now { mono_ms: u64::MAX, wall_ms: u64::MAX });
        assert!(clock.wall() > SystemTime::now());
    }
}
