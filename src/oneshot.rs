//! One value from one thread to another, waited for by a thread or by a future. No runtime.
//!
//! Many answers at once ([`WakeChain`]): whoever is woken wakes two others before it goes on.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};

use crate::time::Deadline;

/// Who is to be notified. Nobody yet is the common case where the answer is there first, and costs no system call.
#[derive(Debug)]
enum Waiter {
    Nobody,
    Thread(Thread),
    Task(Waker),
}

#[derive(Debug)]
enum State<T> {
    Empty(Waiter),
    /// The answer, and whom its taker helps to wake.
    Full(T, Option<Arc<WakeChain>>),
    /// Taken, or the sender went away without sending.
    Gone,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    /// Whether the work that leads to the answer has begun, or is not wanted any more.
    claim: AtomicU8,
}

const OPEN: u8 = 0;
const BEGUN: u8 = 1;
const WITHDRAWN: u8 = 2;

impl Waiter {
    fn notify(self) {
        match self {
            Self::Thread(thread) => thread.unpark(),
            Self::Task(waker) => waker.wake(),
            Self::Nobody => {}
        }
    }
}

/// How many others a thread wakes that has got its answer.
const CHAIN_WAKES: usize = 2;

/// The wake chain: threads whose answers are there and that are still to be woken.
///
/// Waking a thread is a system call of several microseconds. Whoever has many to wake wakes the first ([`wake`](Self::wake)) and goes
/// on; each that takes its answer wakes two more. Such a thread is inside `Receiver::wait` and does so before it returns, so all are
/// woken as long as each is given a processor. Who began keeps hold of it, and wakes who is left after a while.
#[derive(Debug, Default)]
pub(crate) struct WakeChain(Mutex<VecDeque<Thread>>);

impl WakeChain {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Thread>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes so many of those who are left.
    pub(crate) fn wake(&self, threads_max: usize) {
        for _ in 0..threads_max {
            let Some(thread) = self.lock().pop_front() else { return };
            thread.unpark();
        }
    }

    pub(crate) fn wake_all(&self) {
        self.wake(usize::MAX);
    }

    pub(crate) fn is_done(&self) -> bool {
        self.lock().is_empty()
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns who is to be notified.
    fn fill(&self, next: State<T>) -> Waiter {
        match std::mem::replace(&mut *self.lock(), next) {
            State::Empty(waiter) => waiter,
            State::Full(..) | State::Gone => Waiter::Nobody,
        }
    }

    /// What there is to take; `None` if nothing yet, and then `waiter` is notified of it.
    fn take(&self, waiter: impl FnOnce() -> Waiter) -> Option<Result<T, Abandoned>> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Gone) {
            State::Full(value, wake_chain) => {
                drop(state);
                if let Some(wake_chain) = wake_chain {
                    wake_chain.wake(CHAIN_WAKES);
                }
                Some(Ok(value))
            }
            State::Gone => Some(Err(Abandoned)),
            State::Empty(_) => {
                *state = State::Empty(waiter());
                None
            }
        }
    }
}

/// The end that sends.
#[derive(Debug)]
pub(crate) struct Sender<T>(Option<Arc<Shared<T>>>);

/// The end that waits.
#[derive(Debug)]
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

/// The sender went away without sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abandoned;

pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared =
        Arc::new(Shared { state: Mutex::new(State::Empty(Waiter::Nobody)), claim: AtomicU8::new(OPEN) });
    (Sender(Some(Arc::clone(&shared))), Receiver(shared))
}

impl<T> Sender<T> {
    pub(crate) fn send(mut self, value: T) {
        if let Some(shared) = self.0.take() {
            shared.fill(State::Full(value, None)).notify();
        }
    }

    /// Sends. A thread that waits for it is left to `wake_chain`; a task is woken, which only puts it into a queue.
    pub(crate) fn send_among(mut self, value: T, wake_chain: &Arc<WakeChain>) {
        let Some(shared) = self.0.take() else { return };
        let mut state = shared.lock();
        // It is among them before it can take its answer, and wake others in its turn.
        let task = match std::mem::replace(&mut *state, State::Gone) {
            State::Empty(Waiter::Thread(thread)) => {
                wake_chain.lock().push_back(thread);
                Waiter::Nobody
            }
            State::Empty(other) => other,
            State::Full(..) | State::Gone => Waiter::Nobody,
        };
        *state = State::Full(value, Some(Arc::clone(wake_chain)));
        drop(state);
        task.notify();
    }
}

impl<T> Sender<T> {
    /// Begins the work that leads to the answer. `false` if the other end has withdrawn: then it must not be done.
    pub(crate) fn begin(&self) -> bool {
        let Some(shared) = &self.0 else { return false };
        let claimed = shared.claim.compare_exchange(OPEN, BEGUN, Ordering::AcqRel, Ordering::Acquire);
        !matches!(claimed, Err(WITHDRAWN))
    }

    /// Nobody waits any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| Arc::strong_count(shared) == 1)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.fill(State::Gone).notify();
        }
    }
}

fn this_thread() -> Waiter {
    Waiter::Thread(thread::current())
}

impl<T> Receiver<T> {
    /// Waits as long as it takes.
    #[cfg(test)]
    pub(crate) fn wait(self) -> Result<T, Abandoned> {
        loop {
            if let Some(taken) = self.0.take(this_thread) {
                return taken;
            }
            thread::park();
        }
    }

    /// The answer, if it is there.
    pub(crate) fn try_take(&self) -> Option<Result<T, Abandoned>> {
        self.0.take(|| Waiter::Nobody)
    }

    /// Takes the wish back. `false` if the work has begun: then the answer comes.
    pub(crate) fn withdraw(&self) -> bool {
        let claimed = self.0.claim.compare_exchange(OPEN, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire);
        !matches!(claimed, Err(BEGUN))
    }

    /// Waits until `deadline` at most; `None` when it passes first.
    pub(crate) fn wait_until(&self, deadline: Deadline) -> Option<Result<T, Abandoned>> {
        loop {
            if let Some(taken) = self.0.take(this_thread) {
                return Some(taken);
            }
            if deadline.is_over() {
                return None;
            }
            deadline.park();
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Result<T, Abandoned>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.take(|| Waiter::Task(context.waker().clone())).map_or(Poll::Pending, Poll::Ready)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::task::Wake;
    use std::time::Duration;

    use super::*;

    #[test]
    fn sends_once_or_says_that_it_never_will() {
        let (sender, receiver) = channel();
        let waiter = std::thread::spawn(move || receiver.wait());
        sender.send(7);
        assert_eq!(waiter.join().unwrap(), Ok(7));

        let (sender, receiver) = channel::<u8>();
        drop(sender);
        assert_eq!(receiver.wait(), Err(Abandoned));

        let (_sender, receiver) = channel::<u8>();
        assert_eq!(receiver.wait_until(Deadline::now()), None);
    }

    /// Goal: work is either begun or withdrawn, never both. Method: each end first.
    #[test]
    fn work_that_was_withdrawn_does_not_begin() {
        let (sender, receiver) = channel::<u8>();
        assert!(sender.begin() && sender.begin(), "the same work may run again");
        assert!(!receiver.withdraw(), "it has begun");
        let (sender, receiver) = channel::<u8>();
        assert!(receiver.withdraw() && receiver.withdraw());
        assert!(!sender.begin() && !sender.begin());
        sender.send(7);
    }

    struct Notified(AtomicU32);

    impl Wake for Notified {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Goal: a chain wakes every thread that waits, and tasks are woken at once. Method: a hundred threads that all wait, of whom one is woken;
    /// a task that was polled, a future that was not, and one that is gone among them.
    #[test]
    fn whoever_is_woken_wakes_two_others() {
        let wake_chain = Arc::new(WakeChain::default());
        let (senders, waiters): (Vec<_>, Vec<_>) = (0..100)
            .map(|n| {
                let (sender, receiver) = channel();
                let waits = Arc::clone(&receiver.0);
                let waiter = std::thread::spawn(move || receiver.wait());
                while matches!(*waits.lock(), State::Empty(Waiter::Nobody)) {
                    std::thread::yield_now();
                }
                ((n, sender), (n, waiter))
            })
            .unzip();
        let (gone, unpolled, mut task) = (channel(), channel(), channel());
        drop(gone.1);
        gone.0.send_among(1000, &wake_chain);
        let notified = Arc::new(Notified(AtomicU32::new(0)));
        let waker = Waker::from(Arc::clone(&notified));
        assert_eq!(Pin::new(&mut task.1).poll(&mut Context::from_waker(&waker)), Poll::Pending);
        for (n, sender) in senders {
            sender.send_among(n, &wake_chain);
        }
        unpolled.0.send_among(1001, &wake_chain);
        task.0.send_among(1002, &wake_chain);
        assert_eq!(notified.0.load(Ordering::SeqCst), 1, "a task is woken at once");
        assert_eq!(wake_chain.lock().len(), 100, "only threads that wait are left to it");
        wake_chain.wake(1);
        for (n, waiter) in waiters {
            assert_eq!(waiter.join().unwrap(), Ok(n));
        }
        assert!(wake_chain.is_done());
        assert_eq!((unpolled.1.wait(), task.1.wait()), (Ok(1001), Ok(1002)));
    }

    /// Goal: nobody waits for ever for one who does not go on. Method: the first of a chain is one who has given up.
    #[test]
    fn who_began_a_chain_can_end_it() {
        let wake_chain = Arc::new(WakeChain::default());
        let (sender, receiver) = channel();
        let waits = Arc::clone(&receiver.0);
        let waiter = std::thread::spawn(move || receiver.wait());
        while matches!(*waits.lock(), State::Empty(Waiter::Nobody)) {
            std::thread::yield_now();
        }
        let quitter = channel();
        let quits = Arc::clone(&quitter.1.0);
        assert_eq!(quitter.1.wait_until(Deadline::after(Duration::from_millis(1))), None);
        assert!(matches!(*quits.lock(), State::Empty(Waiter::Thread(_))));
        quitter.0.send_among(6, &wake_chain);
        sender.send_among(7, &wake_chain);
        wake_chain.wake(1);
        assert!(!wake_chain.is_done());
        wake_chain.wake_all();
        assert_eq!(waiter.join().unwrap(), Ok(7));
    }
}
