//! The write lock: one thread at a time holds it, and may write.
//!
//! redb has one write transaction at a time, but what memory holds about the log must change
//! together with the file. So a thread begins a write transaction, commits it and notes its effects
//! under one hold of the write lock. Threads acquire the lock in the order in which they asked for
//! it.
//!
//! **Invariants.** A waiter that gives up hands its ticket on. No foreign code runs while the
//! tickets are locked. So the report of a long wait, which runs the application's logger, runs
//! without that lock.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Instant;

use crate::say::in_drop;
use crate::store::shared::reentrancy::{NO_THREAD, this_thread};
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::time::as_ms;

#[derive(Debug, Default)]
struct Tickets {
    next: u64,
    serving: u64,
    /// Tickets whose waiters have given up.
    given_up: BTreeSet<u64>,
    holder: Option<Holder>,
}

/// The thread that holds the write lock, since when, and what for.
#[derive(Debug, Clone)]
pub(crate) struct Holder {
    thread: Thread,
    since: Instant,
    purpose: Purpose,
}

impl Holder {
    pub(crate) fn held_ms(&self) -> u64 {
        as_ms(self.since.elapsed())
    }

    /// The thread, by name and id.
    pub(crate) fn thread(&self) -> String {
        let id = self.thread.id();
        self.thread.name().map_or_else(|| format!("{id:?}"), |name| format!("`{name}`, {id:?}"))
    }

    pub(crate) fn purpose(&self) -> &Purpose {
        &self.purpose
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} for {} ms, in {}", self.thread(), self.held_ms(), self.purpose)
    }
}

/// A lock that serves its waiters in the order of their tickets (first in, first out).
#[derive(Debug, Default)]
pub(crate) struct WriteLock {
    tickets: Mutex<Tickets>,
    over: Condvar,
    /// The number of the thread that holds the lock.
    holder: AtomicU64,
    /// The number of the writer thread.
    writer: AtomicU64,
}

/// Holds the write lock; dropping it releases the lock.
#[derive(Debug)]
pub(crate) struct WriteLockGuard {
    lock: Arc<WriteLock>,
    since: Instant,
}

impl WriteLock {
    fn tickets(&self) -> MutexGuard<'_, Tickets> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the lock; `None` once the limit of the wait has passed. Calls `report` whenever a
    /// warning of the wait is due.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        wait: &mut Wait,
        report: impl Fn(&mut Wait),
    ) -> Option<WriteLockGuard> {
        let mut tickets = self.tickets();
        let mine = tickets.next;
        tickets.next += 1;
        while tickets.serving != mine {
            if wait.next().is_over() {
                if wait.is_over() {
                    tickets.given_up.insert(mine);
                    return None;
                }
                drop(tickets);
                // A logger that panics must not keep the ticket from being handed on.
                in_drop(|| report(wait));
                tickets = self.tickets();
                continue;
            }
            tickets = wait.next().wait(&self.over, tickets);
        }
        let since = Instant::now();
        tickets.holder = Some(Holder { thread: thread::current(), since, purpose: wait.purpose.clone() });
        self.holder.store(this_thread(), Ordering::Relaxed);
        Some(WriteLockGuard { lock: Arc::clone(self), since })
    }

    /// Whether the calling thread holds the lock. Another thread may change the number meanwhile,
    /// but never to or from this thread's number.
    pub(crate) fn is_mine(&self) -> bool {
        self.holder.load(Ordering::Relaxed) == this_thread()
    }

    /// Notes that the calling thread is the writer thread.
    pub(crate) fn set_writer(&self) {
        self.writer.store(this_thread(), Ordering::Relaxed);
    }

    /// Whether a wait of the calling thread keeps all writes waiting: the thread holds the lock, or
    /// is the writer thread.
    pub(crate) fn must_not_wait(&self) -> bool {
        let this = this_thread();
        self.holder.load(Ordering::Relaxed) == this || self.writer.load(Ordering::Relaxed) == this
    }

    /// Returns the holder of the lock now.
    pub(crate) fn holder(&self) -> Option<Holder> {
        self.tickets().holder.clone()
    }

    /// Whether no thread holds the lock or waits for it.
    pub(crate) fn is_free(&self) -> bool {
        let tickets = self.tickets();
        tickets.next == tickets.serving
    }
}

impl WriteLockGuard {
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// Changes what the lock is held for, from now on.
    pub(crate) fn set_purpose(&self, purpose: &Purpose) {
        let purpose = purpose.clone();
        if let Some(holder) = &mut self.lock.tickets().holder {
            holder.purpose = purpose;
        }
    }
}

impl Drop for WriteLockGuard {
    fn drop(&mut self) {
        let mut tickets = self.lock.tickets();
        self.lock.holder.store(NO_THREAD, Ordering::Relaxed);
        let holder = tickets.holder.take();
        tickets.serving += 1;
        while let serving = tickets.serving
            && tickets.given_up.remove(&serving)
        {
            tickets.serving += 1;
        }
        if tickets.next > tickets.serving {
            self.lock.over.notify_all();
        }
        drop(tickets);
        drop(holder);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn wait(limit: Option<Duration>) -> Wait {
        Wait::new(Purpose::Own("a test"), limit)
    }

    fn take(lock: &Arc<WriteLock>) -> WriteLockGuard {
        lock.acquire(&mut wait(None), |_| {}).unwrap()
    }

    #[test]
    fn one_at_a_time_in_order() {
        let lock = Arc::new(WriteLock::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        let first = take(&lock);
        let mut waiters = Vec::new();
        for n in 0..4 {
            let (lock, order) = (Arc::clone(&lock), Arc::clone(&order));
            let before = lock.tickets().next;
            waiters.push(thread::spawn({
                let lock = Arc::clone(&lock);
                move || {
                    let _guard = take(&lock);
                    order.lock().unwrap().push(n);
                }
            }));
            while lock.tickets().next == before {
                thread::yield_now();
            }
        }
        assert!(order.lock().unwrap().is_empty());
        drop(first);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3]);
    }

    /// Goal: a ticket that was given up is handed on, at any place among the tickets. Method: of
    /// five that wait behind the holder, the first, the third and the last give up at once. The
    /// other two get the lock, and then it is free.
    #[test]
    fn a_waiter_that_gives_up_hands_its_ticket_on() {
        let lock = Arc::new(WriteLock::default());
        let first = take(&lock);
        let mut waiters = Vec::new();
        for n in 0..5 {
            if n % 2 == 0 {
                assert!(lock.acquire(&mut wait(Some(Duration::ZERO)), |_| {}).is_none());
                continue;
            }
            let before = lock.tickets().next;
            let waiting = Arc::clone(&lock);
            waiters.push(thread::spawn(move || drop(take(&waiting))));
            while lock.tickets().next == before {
                thread::yield_now();
            }
        }
        drop(first);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        assert!(lock.is_free() && lock.holder().is_none());
        drop(lock.acquire(&mut wait(Some(Duration::ZERO)), |_| {}).expect("it is free"));
        assert!(lock.tickets().given_up.is_empty());
    }
}
