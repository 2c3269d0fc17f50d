//! The messages that the broker has returned, by channel, in the order in which they came.
//!
//! The broker sends a return before the confirm of the same message. Whoever reads these after a confirm was heard finds the return
//! that belongs to it, if there is one: what the transport has put here it has put before the client library saw the confirm.
//! The client library itself sees no return: it would give it to whichever confirm completes next, and keep it with its body until then.
//!
//! **Invariant.** No more than a window's worth wait here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::limits::WINDOW_EVENTS_MAX;
use crate::message::{Fault, FaultClass};

/// A message that no queue took, without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::broker::rabbitmq) struct Returned {
    /// The message's own id.
    pub(in crate::broker::rabbitmq) id: String,
    /// Where it was to go. Text that is not UTF-8 is replaced.
    pub(in crate::broker::rabbitmq) exchange: String,
    pub(in crate::broker::rabbitmq) routing_key: String,
    /// What the broker says of it.
    pub(in crate::broker::rabbitmq) fault: Fault,
}

impl Returned {
    pub(super) fn new(code: u16, text: &[u8], exchange: &[u8], routing_key: &[u8]) -> Self {
        let [text, exchange, routing_key] =
            [text, exchange, routing_key].map(|text| String::from_utf8_lossy(text).into_owned());
        let text = format!("{text}: exchange `{exchange}`, routing key `{routing_key}`");
        let fault = Fault::with_code(FaultClass::Destination, code, text);
        Self { id: String::new(), exchange, routing_key, fault }
    }
}

/// Shared by the transport of one connection and by those that publish over it.
#[derive(Debug, Clone)]
pub(in crate::broker::rabbitmq) struct Returns(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// So that the common case costs no lock.
    any: AtomicBool,
    max: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    count: usize,
    by_channel: HashMap<u16, Vec<Returned>>,
}

impl Returns {
    /// Of a connection that publishes.
    pub(in crate::broker::rabbitmq) fn of_a_publisher() -> Self {
        Self::with_room_for(WINDOW_EVENTS_MAX)
    }

    /// Of a connection over which nothing is published.
    pub(in crate::broker::rabbitmq) fn of_a_consumer() -> Self {
        Self::with_room_for(0)
    }

    fn with_room_for(max: usize) -> Self {
        Self(Arc::new(Shared { any: AtomicBool::new(false), max, waiting: Mutex::default() }))
    }

    /// An error says that more have been returned than can be in flight.
    pub(super) fn push(&self, channel: u16, returned: Returned) -> Result<(), ()> {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.count >= self.0.max {
            return Err(());
        }
        waiting.count += 1;
        waiting.by_channel.entry(channel).or_default().push(returned);
        self.0.any.store(true, Ordering::Release);
        Ok(())
    }

    /// Those of one channel that have come since they were last taken.
    pub(in crate::broker::rabbitmq) fn take(&self, channel: u16) -> Vec<Returned> {
        if !self.0.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = waiting.by_channel.remove(&channel).unwrap_or_default();
        waiting.count -= taken.len();
        self.0.any.store(waiting.count > 0, Ordering::Release);
        taken
    }
}
