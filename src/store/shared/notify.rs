//! Notifies threads and futures that the log has grown, or that the store is lost. Relays have a
//! channel of their own in [`relays`](super::relays).
//!
//! **Invariant.** A signal keeps a notification that comes while no listener waits. So a waiter
//! that looks at the log first misses nothing.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use crate::process::Process;
use crate::time::Deadline;

#[derive(Debug, Default)]
struct State {
    notified: bool,
    waker: Option<Waker>,
}

/// A signal for one thread or future that waits.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Signal {
    /// Notifies the listener. Notifications that the listener has not taken yet count as one.
    pub(crate) fn notify(&self) {
        let waker = {
            let mut state = lock(&self.state);
            state.notified = true;
            state.waker.take()
        };
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for a notification, until `deadline` at most. Returns whether a notification came.
    pub(crate) fn wait_until(&self, deadline: Deadline) -> bool {
        let mut state = lock(&self.state);
        while !state.notified {
            if deadline.is_over() {
                return false;
            }
            state = deadline.wait(&self.changed, state);
        }
        state.notified = false;
        true
    }

    /// Ready once a notification has come; else the next notification wakes the task.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.notified) {
            return Poll::Ready(());
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

/// All listeners, and the records that they still want to read.
#[derive(Debug, Default)]
pub(crate) struct Notifier {
    subscribed: Mutex<Subscribed>,
}

#[derive(Debug, Default)]
struct Subscribed {
    next: u64,
    subscribers: BTreeMap<u64, Subscriber>,
}

/// A registered listener.
#[derive(Debug)]
struct Subscriber {
    signal: Weak<Signal>,
    /// Records from this number on are not trimmed.
    wants: Option<u64>,
    /// The place in the application's code that subscribed.
    at: &'static Location<'static>,
}

/// A listener's registration; dropping it ends the registration.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) signal: Arc<Signal>,
    number: u64,
    notifier: Weak<Notifier>,
    process: Process,
}

impl Notifier {
    /// Registers a listener. While it is registered, records from `wants` on are not trimmed.
    #[track_caller]
    pub(crate) fn subscribe(self: &Arc<Self>, wants: Option<u64>) -> Listener {
        let signal = Arc::new(Signal::default());
        let mut subscribed = lock(&self.subscribed);
        let number = subscribed.next;
        subscribed.next += 1;
        subscribed
            .subscribers
            .insert(number, Subscriber { signal: Arc::downgrade(&signal), wants, at: Location::caller() });
        Listener { signal, number, notifier: Arc::downgrade(self), process: Process::current() }
    }

    pub(crate) fn notify_all(&self) {
        let notified: Vec<_> =
            lock(&self.subscribed).subscribers.values().filter_map(|owner| owner.signal.upgrade()).collect();
        notified.iter().for_each(|signal| signal.notify());
    }

    /// The first record that a listener still wants.
    pub(crate) fn wanted_from(&self) -> Option<u64> {
        lock(&self.subscribed).subscribers.values().filter_map(|owner| owner.wants).min()
    }

    /// The listeners that want records: a number that names the listener, the first wanted record,
    /// and the place in the code that subscribed.
    pub(crate) fn wanted(&self) -> Vec<(u64, u64, &'static Location<'static>)> {
        let wanted = |(number, owner): (&u64, &Subscriber)| Some((*number, owner.wants?, owner.at));
        lock(&self.subscribed).subscribers.iter().filter_map(wanted).collect()
    }
}

impl Listener {
    /// Says that the listener wants only records from this number on.
    pub(crate) fn want_from(&self, seq: u64) {
        let Some(notifier) = self.notifier.upgrade() else { return };
        if let Some(owner) = lock(&notifier.subscribed).subscribers.get_mut(&self.number) {
            owner.wants = Some(seq);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.process.is_elsewhere() {
            return;
        }
        if let Some(notifier) = self.notifier.upgrade() {
            lock(&notifier.subscribed).subscribers.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_that_nobody_waits_for_is_kept_once() {
        let notifier = Arc::new(Notifier::default());
        let one = notifier.subscribe(Some(7));
        let other = notifier.subscribe(None);
        notifier.notify_all();
        notifier.notify_all();
        assert!(one.signal.wait_until(Deadline::now()));
        assert!(!one.signal.wait_until(Deadline::now()));
        assert!(other.signal.poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert!(other.signal.poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(notifier.wanted_from(), Some(7));
        one.want_from(9);
        assert_eq!(notifier.wanted_from(), Some(9));
        drop(one);
        assert_eq!(notifier.wanted_from(), None);
    }
}
