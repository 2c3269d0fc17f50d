//! Whose turn it is to write.
//!
//! redb has one write transaction at a time, but what we keep in memory about the log must change together with it.
//! So a write transaction is begun, committed and its effects noted within one turn. Turns are given in the order in
//! which they were asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::inside::{NO_THREAD, this_thread};

#[derive(Debug, Default)]
struct Tickets {
    next: u64,
    serving: u64,
}

/// Hands out turns.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    tickets: Mutex<Tickets>,
    over: Condvar,
    /// The number of the thread that has the turn.
    holder: AtomicU64,
}

/// A turn; over when dropped.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Turns>);

impl Turns {
    /// Waits for its turn.
    pub(crate) fn take(self: &Arc<Self>) -> Turn {
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = tickets.next;
        tickets.next += 1;
        while tickets.serving != mine {
            tickets = self.over.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
        self.holder.store(this_thread(), Ordering::Relaxed);
        Turn(Arc::clone(self))
    }

    /// The calling thread has the turn. What another thread changes meanwhile is not this thread's number.
    pub(crate) fn is_mine(&self) -> bool {
        self.holder.load(Ordering::Relaxed) == this_thread()
    }

    /// Nobody has it, and nobody waits for it.
    pub(crate) fn is_free(&self) -> bool {
        let tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.next == tickets.serving
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut tickets = self.0.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.holder.store(NO_THREAD, Ordering::Relaxed);
        tickets.serving += 1;
        if tickets.next > tickets.serving {
            self.0.over.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_in_order() {
        let turns = Arc::new(Turns::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        let first = turns.take();
        let mut waiters = Vec::new();
        for n in 0..4 {
            let (turns, order) = (Arc::clone(&turns), Arc::clone(&order));
            let before = turns.tickets.lock().unwrap().next;
            waiters.push(std::thread::spawn({
                let turns = Arc::clone(&turns);
                move || {
                    let _turn = turns.take();
                    order.lock().unwrap().push(n);
                }
            }));
            while turns.tickets.lock().unwrap().next == before {
                std::thread::yield_now();
            }
        }
        assert!(order.lock().unwrap().is_empty());
        drop(first);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3]);
    }
}
