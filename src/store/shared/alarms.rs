//! Alarms wake futures that wait for a time: a future has no thread that could look at the clock.
//!
//! **Invariants.** There is one alarm per living future at most. The thread starts with the first
//! alarm and sleeps until the next alarm is due. The thread ends with the store, after the last
//! alarm: a stop may wait for its deadline while the store is being closed. A waker is foreign
//! code: the thread calls it without the lock.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use crate::time::Deadline;

/// How long the thread, without an alarm, sleeps with a timeout before it sleeps without one. So
/// the alarm of a new future need not wake the thread each time.
const GRACE: Duration = Duration::from_secs(1);

/// The name of one alarm.
pub(crate) type Alarm = (Deadline, u64);

#[derive(Debug)]
struct State {
    next: u64,
    set: BTreeMap<Alarm, Waker>,
    has_thread: bool,
    /// When the thread next looks without being notified.
    looks_at: Deadline,
    over: bool,
}

#[derive(Debug)]
pub(crate) struct Alarms {
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Alarms {
    fn default() -> Self {
        let state = State {
            next: 0,
            set: BTreeMap::new(),
            has_thread: false,
            looks_at: Deadline::Never,
            over: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Alarms {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets an alarm that wakes the task at that moment, and removes the task's earlier alarm.
    /// Fails if the thread cannot be started.
    pub(crate) fn set(
        self: &Arc<Self>,
        alarm: &mut Option<Alarm>,
        at: Deadline,
        waker: Waker,
    ) -> std::io::Result<()> {
        let mut state = self.lock();
        let earlier = alarm.take().and_then(|alarm| state.set.remove(&alarm));
        let name = (at, state.next);
        state.next += 1;
        state.set.insert(name, waker);
        *alarm = Some(name);
        let is_first = !std::mem::replace(&mut state.has_thread, true);
        let is_earlier = at < state.looks_at;
        drop(state);
        drop(earlier);
        if is_first {
            let alarms = Arc::clone(self);
            let started =
                std::thread::Builder::new().name("onewrite-alarms".into()).spawn(move || alarms.run());
            if let Err(error) = started {
                self.lock().has_thread = false;
                return Err(error);
            }
        } else if is_earlier {
            self.changed.notify_one();
        }
        Ok(())
    }

    pub(crate) fn cancel(&self, alarm: Option<Alarm>) {
        let waker = alarm.and_then(|alarm| {
            let mut state = self.lock();
            let waker = state.set.remove(&alarm);
            if state.over {
                self.changed.notify_one();
            }
            waker
        });
        drop(waker);
    }

    /// Ends the thread, once no alarm is set.
    pub(crate) fn end(&self) {
        self.lock().over = true;
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut state = self.lock();
        let mut idle = false;
        while !state.over || !state.set.is_empty() {
            let first = state.set.keys().next().copied();
            match first {
                Some((at, _)) if at.is_over() => {
                    let due = state.set.pop_first();
                    drop(state);
                    if let Some((_, waker)) = due
                        && catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err()
                    {
                        tracing::error!("the waker of a write panicked");
                    }
                    state = self.lock();
                    continue;
                }
                Some((at, _)) => state.looks_at = at,
                None if idle => state.looks_at = Deadline::Never,
                None => state.looks_at = Deadline::after(GRACE),
            }
            idle = first.is_none();
            state = state.looks_at.wait(&self.changed, state);
        }
        state.has_thread = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::task::Wake;

    use super::*;

    struct Notify(mpsc::SyncSender<u32>, u32);

    impl Wake for Notify {
        fn wake(self: Arc<Self>) {
            self.0.send(self.1).unwrap();
        }
    }

    /// Goal: each alarm wakes its task at its time, also an earlier alarm that is set later. A
    /// cancelled alarm wakes no task. Method: three alarms, set in the wrong order; the thread ends
    /// when the test ends it.
    #[test]
    fn alarms_go_off_in_order_and_not_when_cancelled() {
        let alarms = Arc::new(Alarms::default());
        let (notifier, notified) = mpsc::sync_channel(8);
        let waker = |number| Waker::from(Arc::new(Notify(notifier.clone(), number)));
        let (mut late, mut early, mut gone) = (None, None, None);
        alarms.set(&mut late, Deadline::after(Duration::from_millis(200)), waker(1)).unwrap();
        alarms.set(&mut gone, Deadline::after(Duration::from_millis(100)), waker(2)).unwrap();
        alarms.set(&mut early, Deadline::after(Duration::from_millis(50)), waker(3)).unwrap();
        alarms.cancel(gone);
        let limit = Duration::from_secs(20);
        assert_eq!((notified.recv_timeout(limit), notified.recv_timeout(limit)), (Ok(3), Ok(1)));
        assert!(alarms.lock().set.is_empty());
        alarms.end();
        let deadline = Deadline::after(limit);
        while Arc::strong_count(&alarms) > 1 {
            assert!(!deadline.is_over(), "the thread has not ended");
            std::thread::yield_now();
        }
    }

    /// Goal: an alarm goes off also while the store is being closed. The thread ends after the last
    /// alarm, or once that alarm is cancelled. Method: one alarm is set before the end, one after
    /// the end, and one is cancelled.
    #[test]
    fn alarms_go_off_after_the_end() {
        let alarms = Arc::new(Alarms::default());
        let (notifier, notified) = mpsc::sync_channel(8);
        let waker = |number| Waker::from(Arc::new(Notify(notifier.clone(), number)));
        let [mut before, mut after, mut gone] = [None; 3];
        alarms.set(&mut before, Deadline::after(Duration::from_millis(50)), waker(1)).unwrap();
        alarms.end();
        alarms.set(&mut after, Deadline::after(Duration::from_millis(100)), waker(2)).unwrap();
        alarms.set(&mut gone, Deadline::after(Duration::from_secs(3_600)), waker(3)).unwrap();
        let limit = Duration::from_secs(20);
        assert_eq!((notified.recv_timeout(limit), notified.recv_timeout(limit)), (Ok(1), Ok(2)));
        alarms.cancel(gone);
        let deadline = Deadline::after(limit);
        while Arc::strong_count(&alarms) > 1 {
            assert!(!deadline.is_over(), "the thread has not ended");
            std::thread::yield_now();
        }
    }

    /// Goal: alarms of one moment are distinguished: each wakes its own task. Method: three alarms
    /// of the same deadline, one of them cancelled.
    #[test]
    fn alarms_of_one_moment_wake_each_their_own_task() {
        let alarms = Arc::new(Alarms::default());
        let (notifier, notified) = mpsc::sync_channel(8);
        let at = Deadline::after(Duration::from_millis(50));
        let [mut first, mut second, mut third] = [None; 3];
        for (alarm, number) in [(&mut first, 1), (&mut second, 2), (&mut third, 3)] {
            alarms.set(alarm, at, Waker::from(Arc::new(Notify(notifier.clone(), number)))).unwrap();
        }
        alarms.cancel(second);
        let limit = Duration::from_secs(20);
        assert_eq!((notified.recv_timeout(limit), notified.recv_timeout(limit)), (Ok(1), Ok(3)));
        alarms.end();
    }
}
