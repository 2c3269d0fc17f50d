//! Who is told that the log has grown, or that the store is lost: relays have a doorbell of their own in
//! [`relays`](super::relays); everybody else waits at one of these.
//!
//! **Invariant.** A ring that comes while nobody waits is kept: who looks at the log first and waits then misses nothing.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use crate::time::Deadline;

use crate::process::Process;

#[derive(Debug, Default)]
struct State {
    rung: bool,
    waker: Option<Waker>,
}

/// One doorbell: for a thread that waits, or for a future.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    state: Mutex<State>,
    ringing: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bell {
    /// Rings. Rings that nobody has heard yet are one.
    pub(crate) fn ring(&self) {
        let waker = {
            let mut state = lock(&self.state);
            state.rung = true;
            state.waker.take()
        };
        self.ringing.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for a ring, until `deadline` at most; whether it rang.
    pub(crate) fn wait_until(&self, deadline: Deadline) -> bool {
        let mut state = lock(&self.state);
        while !state.rung {
            if deadline.is_over() {
                return false;
            }
            state = deadline.wait(&self.ringing, state);
        }
        state.rung = false;
        true
    }

    /// Ready once it has rung; else the task is woken by the next ring.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.rung) {
            return Poll::Ready(());
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

/// All doorbells that are hung up, and what their owners still want to read.
#[derive(Debug, Default)]
pub(crate) struct Bells {
    hung: Mutex<Hung>,
}

#[derive(Debug, Default)]
struct Hung {
    next: u64,
    bells: BTreeMap<u64, Hanging>,
}

/// Whose a doorbell is.
#[derive(Debug)]
struct Hanging {
    bell: Weak<Bell>,
    /// Records from here on are not trimmed.
    wants: Option<u64>,
    /// The place in the application's code that hung it up.
    at: &'static Location<'static>,
}

/// A doorbell that is hung up; it comes down when this is dropped.
#[derive(Debug)]
pub(crate) struct HungBell {
    pub(crate) bell: Arc<Bell>,
    number: u64,
    bells: Weak<Bells>,
    process: Process,
}

impl Bells {
    /// Hangs up a doorbell. While it hangs, records from `wants` on are not trimmed.
    #[track_caller]
    pub(crate) fn hang(self: &Arc<Self>, wants: Option<u64>) -> HungBell {
        let bell = Arc::new(Bell::default());
        let mut hung = lock(&self.hung);
        let number = hung.next;
        hung.next += 1;
        hung.bells.insert(number, Hanging { bell: Arc::downgrade(&bell), wants, at: Location::caller() });
        HungBell { bell, number, bells: Arc::downgrade(self), process: Process::current() }
    }

    pub(crate) fn ring_all(&self) {
        let rung: Vec<_> = lock(&self.hung).bells.values().filter_map(|owner| owner.bell.upgrade()).collect();
        rung.iter().for_each(|bell| bell.ring());
    }

    /// The first record that one of them still wants.
    pub(crate) fn wanted_from(&self) -> Option<u64> {
        lock(&self.hung).bells.values().filter_map(|owner| owner.wants).min()
    }

    /// Those that want records: a number that names each, from where on, and the place in the code that hung it up.
    pub(crate) fn wanted(&self) -> Vec<(u64, u64, &'static Location<'static>)> {
        let wanted = |(number, owner): (&u64, &Hanging)| Some((*number, owner.wants?, owner.at));
        lock(&self.hung).bells.iter().filter_map(wanted).collect()
    }
}

impl HungBell {
    /// From now on only records from here on are wanted.
    pub(crate) fn want_from(&self, seq: u64) {
        let Some(bells) = self.bells.upgrade() else { return };
        if let Some(owner) = lock(&bells.hung).bells.get_mut(&self.number) {
            owner.wants = Some(seq);
        }
    }
}

impl Drop for HungBell {
    fn drop(&mut self) {
        if self.process.is_elsewhere() {
            return;
        }
        if let Some(bells) = self.bells.upgrade() {
            lock(&bells.hung).bells.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_nobody_waits_for_is_kept_once() {
        let bells = Arc::new(Bells::default());
        let hung = bells.hang(Some(7));
        let other = bells.hang(None);
        bells.ring_all();
        bells.ring_all();
        assert!(hung.bell.wait_until(Deadline::now()));
        assert!(!hung.bell.wait_until(Deadline::now()));
        assert!(other.bell.poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert!(other.bell.poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(bells.wanted_from(), Some(7));
        hung.want_from(9);
        assert_eq!(bells.wanted_from(), Some(9));
        drop(hung);
        assert_eq!(bells.wanted_from(), None);
    }
}
