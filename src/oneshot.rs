//! One value from one thread to another, waited for by a thread or by a future. No runtime.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Debug)]
enum State<T> {
    Empty(Option<Waker>),
    Full(T),
    /// Taken, or the sender went away without sending.
    Gone,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, next: State<T>) {
        let before = std::mem::replace(&mut *self.lock(), next);
        self.filled.notify_all();
        if let State::Empty(Some(waker)) = before {
            waker.wake();
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
    let shared = Arc::new(Shared { state: Mutex::new(State::Empty(None)), filled: Condvar::new() });
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

impl<T> Receiver<T> {
    /// Waits as long as it takes.
    pub(crate) fn wait(self) -> Result<T, Abandoned> {
        let mut state = self.0.lock();
        loop {
            match std::mem::replace(&mut *state, State::Gone) {
                State::Full(value) => return Ok(value),
                State::Gone => return Err(Abandoned),
                empty @ State::Empty(_) => {
                    *state = empty;
                    state = self.0.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Waits until `deadline` at most; `None` when it passes first.
    pub(crate) fn wait_until(self, deadline: Instant) -> Option<Result<T, Abandoned>> {
        let mut state = self.0.lock();
        loop {
            match std::mem::replace(&mut *state, State::Gone) {
                State::Full(value) => return Some(Ok(value)),
                State::Gone => return Some(Err(Abandoned)),
                empty @ State::Empty(_) => {
                    *state = empty;
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left == Duration::ZERO {
                        return None;
                    }
                    let waited = self.0.filled.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Result<T, Abandoned>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Gone) {
            State::Full(value) => Poll::Ready(Ok(value)),
            State::Gone => Poll::Ready(Err(Abandoned)),
            State::Empty(_) => {
                *state = State::Empty(Some(context.waker().clone()));
                Poll::Pending
            }
        }
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
