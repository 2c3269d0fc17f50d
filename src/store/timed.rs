//! An answer that a future waits for, until a deadline at most. No runtime: the store's alarms wake it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::alarms::{Alarm, Alarms};
use crate::oneshot::{Abandoned, Receiver};
use crate::time::Deadline;

/// The answer; `None` once the deadline is over.
#[derive(Debug)]
pub(crate) struct Timed<T> {
    answer: Receiver<T>,
    deadline: Deadline,
    alarms: Arc<Alarms>,
    alarm: Option<Alarm>,
}

impl<T> Timed<T> {
    pub(crate) fn new(answer: Receiver<T>, deadline: Deadline, alarms: &Arc<Alarms>) -> Self {
        Self { answer, deadline, alarms: Arc::clone(alarms), alarm: None }
    }
}

impl<T> Future for Timed<T> {
    type Output = Option<Result<T, Abandoned>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(answer) = Pin::new(&mut self.answer).poll(context) {
            return Poll::Ready(Some(answer));
        }
        if self.deadline.is_over() {
            return Poll::Ready(None);
        }
        let Self { deadline, alarms, alarm, .. } = &mut *self;
        match alarms.set(alarm, *deadline, context.waker().clone()) {
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
        self.alarms.cancel(self.alarm.take());
    }
}
