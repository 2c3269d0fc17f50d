//! One write as the writer thread runs it: a closure of the application, or work of the store.
//!
//! **Invariant.** A panic of a closure, or of its value's `Drop`, reaches no other write.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::oneshot::{self, WakeChain};
use crate::storage::errors::caught;
use crate::store::shared::core::Core;
use crate::store::shared::write_wait::Purpose;
use crate::store::transaction::Transaction;
use crate::store::transaction::receipt::Receipt;

/// A write in the queue.
pub(crate) trait Write: Send {
    /// Runs the write. Returns `true` if the write succeeded. May be called again after the write's
    /// effects were rolled back.
    fn run(&mut self, tx: &Transaction) -> bool;
    /// Reports the end. The write's effects are durable, or the write itself failed and left none.
    /// This call wakes the waiting caller, or leaves that to `wake_chain`.
    fn done(self: Box<Self>, core: &Arc<Core>, wake_chain: Option<&Arc<WakeChain>>);
    /// Reports that the group could not be committed.
    fn failed(self: Box<Self>, error: Error);
    /// The purpose of the write.
    fn purpose(&self) -> &Purpose;
    /// Whether a handler runs in the write. A handler may take any time, so the writes of others do
    /// not wait for many handlers.
    fn is_handler(&self) -> bool {
        matches!(self.purpose(), Purpose::Handler(..))
    }
    /// Begins the write. Returns `false` if its caller has given up: then the write must not run.
    fn claim(&self) -> bool {
        true
    }
}

/// A closure, its latest result, and the channel to its waiting caller.
pub(crate) struct Closure<F, T> {
    pub(crate) f: F,
    pub(crate) result: Option<Result<(T, Vec<u64>)>>,
    pub(crate) reply: oneshot::Sender<Result<Receipt<T>>>,
    pub(crate) purpose: Purpose,
}

impl<F, T> Write for Closure<F, T>
where
    F: FnMut(&Transaction) -> Result<T> + Send,
    T: Send,
{
    fn run(&mut self, tx: &Transaction) -> bool {
        let earlier = self.result.take();
        quietly(|| drop(earlier));
        // After a panic the closure's captures may be half-changed: the closure is not run again.
        let result = caught(|| {
            let value = (self.f)(tx)?;
            tx.check_size()?;
            Ok(value)
        });
        let result = result.unwrap_or_else(|message| Err(Error::Panicked { message }));
        if let Err(error) = &result {
            tx.core.suspect(error);
        }
        self.result = Some(result.map(|value| (value, tx.take_seqs())));
        matches!(self.result, Some(Ok(_)))
    }

    fn done(self: Box<Self>, core: &Arc<Core>, wake_chain: Option<&Arc<WakeChain>>) {
        let result = self.result.unwrap_or_else(|| Err(Error::Closed { path: core.path.clone() }));
        let answer = result.map(|(value, seqs)| Receipt::new(value, seqs, core));
        match wake_chain {
            Some(wake_chain) => self.reply.send_among(answer, wake_chain),
            None => self.reply.send(answer),
        }
    }

    fn failed(self: Box<Self>, error: Error) {
        self.reply.send(Err(error));
    }

    fn purpose(&self) -> &Purpose {
        &self.purpose
    }

    fn claim(&self) -> bool {
        self.reply.begin()
    }
}

/// Runs code that drops something of the application's. A panic there must not end the writer
/// thread.
pub(in crate::store) fn quietly(f: impl FnOnce()) {
    if let Err(panic) = caught(f) {
        tracing::error!(panic, "a write closure or its value panicked while it was dropped");
    }
}
