//! A channel for one value, on which a thread or a future waits. It needs no runtime.
//!
//! A [`WakeChain`] delivers many answers at once: each woken thread wakes two more before it
//! continues.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};

use crate::time::Deadline;

/// The listener to notify. `Nobody` is the common case: the answer is there first, and costs no
/// system call.
#[derive(Debug)]
enum Waiter {
    Nobody,
    Thread(Thread),
    Task(Waker),
}

#[derive(Debug)]
enum State<T> {
    Empty(Waiter),
    /// The answer, and the wake chain that its receiver continues.
    Full(T, Option<Arc<WakeChain>>),
    /// The answer was taken, or the sender was dropped without sending.
    Gone,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    /// Whether the work for the answer has begun, or was withdrawn.
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

/// How many threads a woken thread wakes.
const CHAIN_WAKES: usize = 2;

/// The wake chain: threads that have an answer and are still to be woken.
///
/// Waking a thread is a system call of several microseconds. A sender with many answers wakes the
/// first thread ([`wake`](Self::wake)) and continues. Each thread that takes its answer wakes two
/// more. It does so inside `Receiver::wait`, before it returns, so all threads are woken as long as
/// each gets a processor. The sender keeps the chain, and wakes the remaining threads after a
/// while.
#[derive(Debug, Default)]
pub(crate) struct WakeChain(Mutex<VecDeque<Thread>>);

impl WakeChain {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Thread>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes up to `threads_max` of the remaining threads.
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

    /// Sets the state and returns the listener to notify.
    fn fill(&self, next: State<T>) -> Waiter {
        match std::mem::replace(&mut *self.lock(), next) {
            State::Empty(waiter) => waiter,
            State::Full(..) | State::Gone => Waiter::Nobody,
        }
    }

    /// Takes the answer. If there is none yet, returns `None` and keeps `waiter` for the
    /// notification.
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

/// The sending end.
#[derive(Debug)]
pub(crate) struct Sender<T>(Option<Arc<Shared<T>>>);

/// The receiving end.
#[derive(Debug)]
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

/// The sender was dropped without sending.
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

    /// Sends the value. A waiting thread is left to `wake_chain`. A task is woken at once, because
    /// that only puts it into a queue.
    pub(crate) fn send_among(mut self, value: T, wake_chain: &Arc<WakeChain>) {
        let Some(shared) = self.0.take() else { return };
        let mut state = shared.lock();
        // The thread joins the chain before it can take its answer and continue the chain.
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
    /// Begins the work for the answer. Returns `false` if the receiver has withdrawn; the work must
    /// then not be done.
    pub(crate) fn begin(&self) -> bool {
        let Some(shared) = &self.0 else { return false };
        let claimed = shared.claim.compare_exchange(OPEN, BEGUN, Ordering::AcqRel, Ordering::Acquire);
        !matches!(claimed, Err(WITHDRAWN))
    }

    /// Whether the receiver is gone.
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
    /// Waits without a deadline.
    #[cfg(test)]
    pub(crate) fn wait(self) -> Result<T, Abandoned> {
        loop {
            if let Some(taken) = self.0.take(this_thread) {
                return taken;
            }
            thread::park();
        }
    }

    /// Returns the answer if it is there.
    pub(crate) fn try_take(&self) -> Option<Result<T, Abandoned>> {
        self.0.take(|| Waiter::Nobody)
    }

    /// Withdraws the request. Returns `false` if the work has begun; the answer then comes.
    pub(crate) fn withdraw(&self) -> bool {
        let claimed = self.0.claim.compare_exchange(OPEN, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire);
        !matches!(claimed, Err(BEGUN))
    }

    /// Waits until `deadline` at most. Returns `None` if the deadline passes first.
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

    /// Goal: a chain wakes every thread that waits, and tasks are woken at once. Method: a hundred
    /// waiting threads, of which one is woken. Among them are a polled task, a future that was not
    /// polled, and one that is gone.
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

    /// Goal: no thread waits for ever for a thread that does not continue the chain. Method: the
    /// first thread of a chain has given up.
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
