//! One value from one thread to another, waited for by a thread or by a future. No runtime.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// Who is to be told. Nobody yet is the common case where the answer is there first, and costs no system call.
#[derive(Debug)]
enum Waiter {
    Nobody,
    Thread(Thread),
    Task(Waker),
}

#[derive(Debug)]
enum State<T> {
    Empty(Waiter),
    Full(T),
    /// Taken, or the sender went away without sending.
    Gone,
}

#[derive(Debug)]
struct Shared<T>(Mutex<State<T>>);

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, next: State<T>) {
        let before = std::mem::replace(&mut *self.lock(), next);
        match before {
            State::Empty(Waiter::Thread(thread)) => thread.unpark(),
            State::Empty(Waiter::Task(waker)) => waker.wake(),
            _ => {}
        }
    }

    /// What there is to take; `None` if nothing yet, and then `waiter` is told of it.
    fn take(&self, waiter: impl FnOnce() -> Waiter) -> Option<Result<T, Abandoned>> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Gone) {
            State::Full(value) => Some(Ok(value)),
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
    let shared = Arc::new(Shared(Mutex::new(State::Empty(Waiter::Nobody))));
    (Sender(Some(Arc::clone(&shared))), Receiver(shared))
}

impl<T> Sender<T> {
    pub(crate) fn send(mut self, value: T) {
        if let Some(shared) = self.0.take() {
            shared.fill(State::Full(value));
        }
    }
}

impl<T> Sender<T> {
    /// Nobody waits any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| Arc::strong_count(shared) == 1)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.fill(State::Gone);
        }
    }
}

fn this_thread() -> Waiter {
    Waiter::Thread(thread::current())
}

impl<T> Receiver<T> {
    /// Waits as long as it takes.
    pub(crate) fn wait(self) -> Result<T, Abandoned> {
        loop {
            if let Some(taken) = self.0.take(this_thread) {
                return taken;
            }
            thread::park();
        }
    }

    /// Waits until `deadline` at most; `None` when it passes first.
    pub(crate) fn wait_until(self, deadline: Instant) -> Option<Result<T, Abandoned>> {
        loop {
            if let Some(taken) = self.0.take(this_thread) {
                return Some(taken);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return None;
            }
            thread::park_timeout(left);
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
        assert_eq!(receiver.wait_until(Instant::now()), None);
    }
}
