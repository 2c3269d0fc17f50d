//! The options of exchanges and queues, and the views of their content.

use std::sync::Arc;

use crate::broker::Epoch;
use crate::message::Message;

/// The way in which an exchange routes.
///
/// ```
/// # use onewrite::broker::{ExchangeKind, MemoryBroker};
/// MemoryBroker::new().declare_exchange("audit", ExchangeKind::Fanout);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExchangeKind {
    /// Routes to queues whose binding equals the routing key.
    Direct,
    /// Routes to every bound queue.
    Fanout,
    /// Routes to queues whose pattern matches the routing key, word by word: `*` is one word, `#`
    /// any number of words.
    Topic,
}

/// The behaviour of a queue that is at its [`max_length`](QueueOptions::max_length) and gets one
/// more message.
///
/// ```
/// # use onewrite::broker::{Overflow, QueueOptions};
/// let options = QueueOptions::default().max_length(10).overflow(Overflow::RejectPublish);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Overflow {
    /// Takes and confirms the new message, and drops (or dead-letters) the oldest message.
    /// RabbitMQ's default.
    #[default]
    DropHead,
    /// Refuses the new message: the publisher gets a nack, although other queues may have taken the
    /// message.
    RejectPublish,
}

/// The options of a queue. By default a queue is unbounded and has no dead-lettering.
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
    /// The most messages that may wait in the queue. Unsettled deliveries do not count.
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

    /// The queue's behaviour at the maximum.
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

    /// The exchange and routing key for rejected messages and for messages dropped at the maximum.
    ///
    /// Without this setting, or if no queue takes them, these messages are lost. No `x-death`
    /// header is added.
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

/// A message that waits in a queue. See
/// [`MemoryBroker::messages`](crate::broker::memory::MemoryBroker::messages).
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
    /// The exchange that the message came through.
    pub exchange: Arc<str>,
    /// The routing key that the message came with.
    pub routing_key: Arc<str>,
    /// Properties, headers and payload.
    pub message: Arc<Message>,
    /// Whether the message was delivered before.
    pub redelivered: bool,
}

/// A publish that a queue took. See
/// [`MemoryBroker::tap`](crate::broker::memory::MemoryBroker::tap).
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
    /// The publisher's epoch; 0 for
    /// [`MemoryBroker::publish`](crate::broker::memory::MemoryBroker::publish).
    pub epoch: Epoch,
}
