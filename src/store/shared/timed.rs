//! An answer that a future waits for, until a deadline at most. No runtime is needed: the store's
//! alarms wake the future.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::oneshot::{Abandoned, Receiver};
use crate::store::shared::alarms::{Alarm, Alarms};
use crate::store::shared::owner::Owner;
use crate::time::Deadline;

/// The alarms that wake such a future, and the owner check. A forked process must not take a lock
/// of the owner's.
#[derive(Debug, Clone)]
pub(crate) struct Waking {
    alarms: Arc<Alarms>,
    owner: Owner,
}

impl Waking {
    pub(crate) fn new(alarms: &Arc<Alarms>, owner: &Owner) -> Self {
        Self { alarms: Arc::clone(alarms), owner: owner.clone() }
    }

    /// Whether this is a forked process, where neither `set` nor `cancel` may be called.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.owner.is_elsewhere()
    }

    /// As [`Alarms::set`].
    pub(crate) fn set(&self, alarm: &mut Option<Alarm>, at: Deadline, waker: Waker) -> std::io::Result<()> {
        self.alarms.set(alarm, at, waker)
    }

    pub(crate) fn cancel(&self, alarm: Option<Alarm>) {
        self.alarms.cancel(alarm);
    }
}

/// The answer; `None` once the deadline is over, or in a forked process.
#[derive(Debug)]
pub(crate) struct Timed<T> {
    answer: Receiver<T>,
    deadline: Deadline,
    waking: Waking,
    alarm: Option<Alarm>,
}

impl<T> Timed<T> {
    pub(crate) fn new(answer: Receiver<T>, deadline: Deadline, waking: &Waking) -> Self {
        Self { answer, deadline, waking: waking.clone(), alarm: None }
    }
}

impl<T> Future for Timed<T> {
    type Output = Option<Result<T, Abandoned>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.waking.is_elsewhere() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(answer) = Pin::new(&mut self.answer).poll(context) {
            return Poll::Ready(Some(answer));
        }
        if self.deadline.is_over() {
            return Poll::Ready(None);
        }
        if self.deadline == Deadline::Never {
            return Poll::Pending;
        }
        let Self { deadline, waking, alarm, .. } = &mut *self;
        match waking.set(alarm, *deadline, context.waker().clone()) {
            Ok(()) => Poll::Pending,
            Err(error) => {
                tracing::error!(%error, "no thread can be started that looks at the clock: nothing is waited for");
                Poll::Ready(None)
            }
        }
    }
}

impl<T> Drop for Timed<T> {
    fn drop(&mut self) {
        if self.alarm.is_some() && !self.waking.is_elsewhere() {
            self.waking.cancel(self.alarm.take());
        }
    }
}
