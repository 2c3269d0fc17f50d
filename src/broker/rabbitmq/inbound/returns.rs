//! The messages that the broker has returned, by channel, in the order in which they came.
//!
//! The broker sends a return before the confirm of the same message. The transport stores the
//! return here before the client library sees the confirm. So a publisher that reads the returns
//! after a confirm finds the return that belongs to the confirm, if there is one. The client
//! library itself sees no return. It would give the return to the confirm that completes next, and
//! would keep the return with its body until then.
//!
//! **Invariant.** At most a window's worth of returns wait here.

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
    /// The message's exchange and routing key. Text that is not UTF-8 is replaced.
    pub(in crate::broker::rabbitmq) exchange: String,
    pub(in crate::broker::rabbitmq) routing_key: String,
    /// The broker's reason.
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

/// The returns that the transport of one connection shares with its publishers.
#[derive(Debug, Clone)]
pub(in crate::broker::rabbitmq) struct Returns(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Saves the lock in the common case.
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
    /// Returns an empty list for a connection that publishes.
    pub(in crate::broker::rabbitmq) fn of_a_publisher() -> Self {
        Self::with_room_for(WINDOW_EVENTS_MAX)
    }

    /// Returns an empty list for a connection over which nothing is published.
    pub(in crate::broker::rabbitmq) fn of_a_consumer() -> Self {
        Self::with_room_for(0)
    }

    fn with_room_for(max: usize) -> Self {
        Self(Arc::new(Shared { any: AtomicBool::new(false), max, waiting: Mutex::default() }))
    }

    /// Adds a return. An error means that more messages were returned than can be in flight.
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

    /// Takes the returns of one channel since the last call.
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
