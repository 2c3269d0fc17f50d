//! What a caller says of exchanges and queues, and what it is shown of their content.

use std::sync::Arc;

use crate::broker::Epoch;
use crate::message::Message;

/// How an exchange routes.
///
/// ```
/// # use onewrite::broker::{ExchangeKind, MemoryBroker};
/// MemoryBroker::new().declare_exchange("audit", ExchangeKind::Fanout);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExchangeKind {
    /// To queues whose binding equals the routing key.
    Direct,
    /// To every bound queue.
    Fanout,
    /// To queues whose pattern matches the routing key, word by word: `*` is one word, `#` any number of words.
    Topic,
}

/// What a queue at its [`max_length`](QueueOptions::max_length) does with one more message.
///
/// ```
/// # use onewrite::broker::{Overflow, QueueOptions};
/// let options = QueueOptions::default().max_length(10).overflow(Overflow::RejectPublish);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Overflow {
    /// Takes and confirms it, and drops (or dead-letters) its oldest one. RabbitMQ's default.
    #[default]
    DropHead,
    /// Refuses it: the publisher gets a nack, although other queues may have taken the message.
    RejectPublish,
}

/// What a queue is like. Unbounded and without dead-lettering by default.
///
/// ```
/// # use onewrite::broker::{Overflow, QueueOptions};
/// let options = QueueOptions::default()
///     .max_length(1000)
///     .overflow(Overflow::RejectPublish)
///     .dead_letter("", "credit.dead");
/// # let _ = options;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueueOptions {
    pub(super) max_length: Option<usize>,
    pub(super) overflow: Overflow,
    pub(super) dead_letter: Option<(Arc<str>, Arc<str>)>,
}

impl QueueOptions {
    /// Most messages that may wait in the queue; unsettled deliveries do not count.
    ///
    /// ```
    /// # use onewrite::broker::QueueOptions;
    /// let options = QueueOptions::default().max_length(1000);
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn max_length(self, messages: usize) -> Self {
        Self { max_length: Some(messages), ..self }
    }

    /// What happens at the maximum.
    ///
    /// ```
    /// # use onewrite::broker::{Overflow, QueueOptions};
    /// let options = QueueOptions::default().max_length(1).overflow(Overflow::RejectPublish);
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Where rejected messages, and those dropped at the maximum, are published to. Without it, or when that leads
    /// nowhere, they are gone. No `x-death` header is added.
    ///
    /// ```
    /// # use onewrite::broker::QueueOptions;
    /// let options = QueueOptions::default().dead_letter("", "credit.dead");
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn dead_letter(self, exchange: &str, routing_key: &str) -> Self {
        Self { dead_letter: Some((exchange.into(), routing_key.into())), ..self }
    }
}

/// A message that waits in a queue. See [`MemoryBroker::messages`](crate::broker::memory::MemoryBroker::messages).
///
/// ```
/// # use onewrite::Message;
/// # use onewrite::broker::{MemoryBroker, QueueOptions};
/// let broker = MemoryBroker::new();
/// broker.declare_queue("inbox", QueueOptions::default());
/// broker.publish("", "inbox", Message { payload: b"hi".to_vec(), ..Message::default() })?;
/// let stored = &broker.messages("inbox")[0];
/// assert_eq!((&*stored.message.payload, stored.redelivered), (&b"hi"[..], false));
/// # Ok::<(), onewrite::Fault>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stored {
    /// The exchange it came through.
    pub exchange: Arc<str>,
    /// The routing key it came with.
    pub routing_key: Arc<str>,
    /// Properties, headers and payload.
    pub message: Arc<Message>,
    /// Whether it was out with a consumer before.
    pub redelivered: bool,
}

/// A publish that a queue took. See [`MemoryBroker::tap`](crate::broker::memory::MemoryBroker::tap).
///
/// ```
/// # use onewrite::Message;
/// # use onewrite::broker::{Epoch, MemoryBroker, QueueOptions};
/// let broker = MemoryBroker::with_tap();
/// broker.declare_queue("inbox", QueueOptions::default());
/// broker.publish("", "inbox", Message::default())?;
/// assert_eq!(broker.tap()[0].epoch, Epoch(0));
/// # Ok::<(), onewrite::Fault>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tapped {
    /// The exchange.
    pub exchange: Arc<str>,
    /// The routing key.
    pub routing_key: Arc<str>,
    /// Properties, headers and payload.
    pub message: Arc<Message>,
    /// The publisher's epoch; 0 for [`MemoryBroker::publish`](crate::broker::memory::MemoryBroker::publish).
    pub epoch: Epoch,
}
