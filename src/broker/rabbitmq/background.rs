//! One thread with one runtime, and a stop that cannot hang.
//!
//! **Invariants.** The thread's whole life is one `block_on`, so lapin's tasks and heartbeats
//! always make progress. Dropping the handle stops the thread as `stop` does. The thread is never
//! joined, because it may be inside a system call.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use futures_util::future::{Either, select};
use tokio::sync::watch;

use crate::error::SettingError;
use crate::process::{Process, keep};
use crate::time::Deadline;
use crate::tuning::CLOSE_MS_MAX;

/// The owner's handle of the thread.
#[derive(Debug)]
pub(super) struct Background {
    stop: watch::Sender<Option<Deadline>>,
    /// Carries no messages; disconnected when the thread has ended.
    ended: Receiver<Infallible>,
    process: Process,
}

impl Background {
    /// Starts the thread. `body` makes the future that the thread runs to its end.
    pub(super) fn spawn<F, B>(name: &str, body: B) -> Result<Self, SettingError>
    where
        F: Future<Output = ()>,
        B: FnOnce(Stop) -> F + Send + 'static,
    {
        let cannot =
            |error: std::io::Error| SettingError::new("thread", format!("cannot start {name}: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
        let (stop, receiver) = watch::channel(None);
        let (alive, ended) = crossbeam_channel::bounded(0);
        // The thread's log lines belong to the relay or consumer that starts it.
        let span = tracing::Span::current();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _entered = span.enter();
                runtime.block_on(body(Stop(receiver)));
                // A plain drop would wait for a name lookup that hangs.
                runtime.shutdown_background();
                drop(alive);
            })
            .map_err(cannot)?;
        Ok(Self { stop, ended, process: Process::current() })
    }

    /// Whether this is a forked process, which does not have the thread.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.process.is_elsewhere()
    }

    /// Asks the thread to end and waits for at most `deadline`. After that the thread is left to
    /// end alone.
    pub(super) fn stop(&self, deadline: Duration) {
        if self.is_elsewhere() {
            return;
        }
        let at = Deadline::after(deadline);
        self.stop.send_replace(Some(at));
        let ended = match at.instant() {
            Some(at) => self.ended.recv_deadline(at),
            None => self.ended.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match ended {
            Ok(never) => match never {},
            Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                tracing::debug!(
                    "the AMQP thread has not ended by the deadline of its stop; it is left to itself"
                );
            }
        }
    }
}

/// In a forked process the channels are leaked: closing them would wake a thread that does not
/// exist there.
impl Drop for Background {
    fn drop(&mut self) {
        if self.is_elsewhere() {
            keep(&self.stop);
            keep(&self.ended);
        }
    }
}

/// The thread's end of a stop.
#[derive(Debug, Clone)]
pub(super) struct Stop(watch::Receiver<Option<Deadline>>);

impl Stop {
    /// Resolves once a stop was requested or the handle is gone.
    pub(super) async fn asked(&mut self) {
        // An error means that the handle was dropped.
        let _ = self.0.wait_for(Option::is_some).await;
    }

    /// Runs `future` unless a stop comes first.
    pub(super) async fn or<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        match select(pin!(self.asked()), pin!(future)).await {
            Either::Left(_) => None,
            Either::Right((value, _)) => Some(value),
        }
    }

    /// The time that closing a connection may take now.
    pub(super) fn time_to_close(&self) -> Duration {
        let most = Duration::from_millis(CLOSE_MS_MAX);
        match *self.0.borrow() {
            // The rest of the time is for the thread itself to end.
            Some(at) => at.left_or_max().mul_f64(0.8).min(most),
            None => most,
        }
    }
}
