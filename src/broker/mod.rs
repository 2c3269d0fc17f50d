//! The seam between this library and a broker: [`Publisher`] for the relay, [`Source`] for the
//! consumer.
//!
//! A [`Publisher`] takes messages without blocking and reports, over a channel, what became of each
//! message. A publisher owns its connection: it connects, waits between attempts and reconnects.
//! Each new connection is a new *epoch*. The relay decides what to publish, when, and whether
//! again; a publisher decides nothing.
//!
//! **Invariants of a publisher.**
//! - A message published under an epoch that is over is dropped silently.
//! - Within an epoch each ticket gets exactly one [`Outcome`], or the epoch ends with
//!   [`PublisherEvent::Down`]. After `Down` no ticket of that epoch gets an outcome: the relay
//!   treats these tickets as unknown.
//! - Isolated messages are an exception: each gets exactly one outcome, even if the epoch ends.
//! - Only [`Outcome::Silent`] may be followed by one more outcome.
//! - A message without an outcome delays no other message's outcome. Isolated messages do not wait
//!   for each other.
//! - Messages that are not isolated leave in the order of the calls.
//! - [`Outcome::Confirmed`] is reported only if the broker confirmed the message and did not return
//!   it.
//! - No call blocks, and no text in an event holds a payload or a credential.

mod events;
mod memory;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;

use std::fmt;
use std::time::Duration;

pub use self::events::{EventReceiver, PublisherEvents, SourceEvents};
pub use self::memory::*;
#[cfg(all(feature = "rabbitmq", fuzzing))]
pub(crate) use self::rabbitmq::frames_of_a_broker;
#[cfg(feature = "rabbitmq")]
pub use self::rabbitmq::*;
pub use crate::error::SettingError;
pub use crate::message::{Fault, FaultClass, HeaderValue, Message, Outcome, Outgoing, Ticket};

/// Numbers the connections of one publisher or source, from 1.
///
/// ```
/// use onewrite::broker::Epoch;
/// assert!(Epoch(1) < Epoch(2)); // the later connection
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// A publisher's report to the relay.
///
/// ```
/// use onewrite::{Fault, FaultClass};
/// use onewrite::broker::{Epoch, PublisherEvent};
/// let event = PublisherEvent::Down { epoch: Epoch(1), fault: Fault::new(FaultClass::Outage, "connection reset") };
/// assert!(matches!(event, PublisherEvent::Down { epoch: Epoch(1), .. }));
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PublisherEvent {
    /// A new connection is ready.
    Up {
        /// The epoch of the new connection.
        epoch: Epoch,
    },
    /// The connection ended, or an attempt to connect failed. The publisher keeps trying to
    /// connect.
    Down {
        /// The epoch that ended, or the epoch that could not begin.
        epoch: Epoch,
        /// The reason. [`FaultClass::Message`] or [`FaultClass::Destination`] means that one of the
        /// messages in flight made the broker close the channel.
        fault: Fault,
    },
    /// The broker blocks publishers (`connection.blocked`), or has stopped blocking them.
    Blocked {
        /// Whether the broker blocks now.
        blocked: bool,
    },
    /// Outcomes of messages, in the order in which the publisher learned them.
    Outcomes(Vec<(Ticket, Outcome)>),
    /// A fault that ends no epoch and that no message's outcome reports.
    Trouble(Fault),
}

/// A broker, as the relay sees it. See the [module's invariants](self).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// use onewrite::broker::{Epoch, Publisher, PublisherEvent, PublisherEvents};
/// use onewrite::{Event, Outcome, Outgoing, SettingError};
///
/// /// Takes everything, keeps nothing.
/// #[derive(Debug, Default)]
/// struct Void(Option<PublisherEvents>);
///
/// impl Publisher for Void {
///     fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
///         events.send(PublisherEvent::Up { epoch: Epoch(1) });
///         self.0 = Some(events);
///         Ok(())
///     }
///     fn publish(&mut self, _epoch: Epoch, outgoing: Outgoing) {
///         if let Some(events) = &self.0 {
///             events.send(PublisherEvent::Outcomes(vec![(outgoing.ticket, Outcome::Confirmed)]));
///         }
///     }
///     fn stop(&mut self, _deadline: Duration) {}
/// }
///
/// let relay = store.relay("void").spawn(Void::default())?;
/// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
/// receipt.wait_confirmed(Duration::from_secs(5))?;
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Publisher: Send + fmt::Debug + 'static {
    /// Begins connecting, in the background. The relay calls it once.
    ///
    /// # Errors
    /// A setting that cannot work. An unreachable broker is no error: the publisher reports
    /// [`PublisherEvent::Down`].
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError>;

    /// Publishes one message on the connection `epoch`.
    fn publish(&mut self, epoch: Epoch, outgoing: Outgoing);

    /// Ends the connection and all background work. Waits at most `deadline`.
    ///
    /// `deadline` may be `Duration::MAX`, which means for ever. No `Instant` can be added to that
    /// value.
    fn stop(&mut self, deadline: Duration);
}

/// The name of one delivery on one connection.
///
/// ```
/// use onewrite::broker::{DeliveryTag, Epoch};
/// let tag = |epoch| DeliveryTag { epoch: Epoch(epoch), tag: 1 };
/// assert_ne!(tag(1), tag(2)); // the same number on another connection is another delivery
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag {
    /// The connection that the delivery came over. A settlement for an epoch that is over is
    /// dropped: the broker redelivers.
    pub epoch: Epoch,
    /// The broker's own number of the delivery on that connection.
    pub tag: u64,
}

/// A message that a broker delivered.
///
/// ```
/// # use onewrite::broker::{Source, SourceEvent, SourceEvents};
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("inbox", Default::default());
/// # broker.publish("", "inbox", onewrite::Message { payload: b"hello".to_vec(), ..Default::default() })?;
/// # let (sender, received) = SourceEvents::channel();
/// # let mut source = broker.source("inbox");
/// # source.start(sender, 1)?;
/// # let delivery = received.iter().find_map(|event| match event {
/// #     SourceEvent::Delivery(delivery) => Some(delivery),
/// #     _ => None,
/// # }).expect("it is in the queue");
/// assert_eq!(delivery.routing_key, "inbox");
/// assert_eq!(delivery.message.payload, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Delivery {
    /// The tag by which the delivery is settled.
    pub tag: DeliveryTag,
    /// The exchange that the message was published to.
    pub exchange: String,
    /// The routing key that the message was published with.
    pub routing_key: String,
    /// The broker's hint that the message may have been delivered before. Never rely on the hint.
    pub redelivered: bool,
    /// Properties, headers and payload.
    pub message: Message,
}

impl Delivery {
    /// Returns a delivery that is not marked as redelivered.
    ///
    /// ```
    /// use onewrite::Message;
    /// use onewrite::broker::{Delivery, DeliveryTag, Epoch};
    /// let tag = DeliveryTag { epoch: Epoch(1), tag: 1 };
    /// let delivery = Delivery::new(tag, "", "payments", Message::default());
    /// assert!(!delivery.redelivered);
    /// ```
    #[must_use]
    pub fn new(
        tag: DeliveryTag,
        exchange: impl Into<String>,
        routing_key: impl Into<String>,
        message: Message,
    ) -> Self {
        let (exchange, routing_key) = (exchange.into(), routing_key.into());
        Self { tag, exchange, routing_key, redelivered: false, message }
    }
}

/// A consumer's answer to a delivery.
///
/// ```
/// use onewrite::broker::Settlement;
/// # use onewrite::broker::{Source, SourceEvent, SourceEvents};
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("inbox", Default::default());
/// # broker.publish("", "inbox", onewrite::Message { payload: b"hello".to_vec(), ..Default::default() })?;
/// # let (sender, received) = SourceEvents::channel();
/// # let mut source = broker.source("inbox");
/// # source.start(sender, 1)?;
/// # let delivery = received.iter().find_map(|event| match event {
/// #     SourceEvent::Delivery(delivery) => Some(delivery),
/// #     _ => None,
/// # }).expect("it is in the queue");
/// source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
/// assert_eq!(broker.unsettled_len("inbox"), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// The delivery is done: the broker forgets the message.
    Acknowledge,
    /// The broker puts the message back on its queue.
    Requeue,
    /// The broker does not deliver the message again. The message goes to the queue's dead-letter
    /// exchange, if the queue has one.
    Reject,
}

/// A source's report to the consumer.
///
/// ```
/// use onewrite::broker::{Source, SourceEvent, SourceEvents};
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("inbox", Default::default());
/// # broker.publish("", "inbox", onewrite::Message { payload: b"hello".to_vec(), ..Default::default() })?;
/// # let (sender, received) = SourceEvents::channel();
/// # let mut source = broker.source("inbox");
/// # source.start(sender, 1)?;
/// let delivery = received.iter().find_map(|event| match event {
///     SourceEvent::Delivery(delivery) => Some(delivery),
///     _ => None,
/// }).expect("it is in the queue");
/// assert_eq!(delivery.message.payload, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum SourceEvent {
    /// A new connection is ready and consuming.
    Up {
        /// The epoch of the new connection.
        epoch: Epoch,
    },
    /// The connection ended, or an attempt to connect failed. The broker delivers again everything
    /// that was unsettled on the connection.
    Down {
        /// The epoch that ended, or the epoch that could not begin.
        epoch: Epoch,
        /// The reason.
        fault: Fault,
    },
    /// The broker delivered a message.
    Delivery(Box<Delivery>),
}

/// A queue on a broker, as the consumer sees it, with manual acknowledgement and bounded prefetch.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// use onewrite::SettingError;
/// use onewrite::broker::{DeliveryTag, Epoch, Settlement, Source, SourceEvent, SourceEvents};
///
/// /// A queue that is always empty.
/// #[derive(Debug, Default)]
/// struct Empty;
///
/// impl Source for Empty {
///     fn start(&mut self, events: SourceEvents, _prefetch: u16) -> Result<(), SettingError> {
///         events.send(SourceEvent::Up { epoch: Epoch(1) });
///         Ok(())
///     }
///     fn settle(&mut self, _settlements: Vec<(DeliveryTag, Settlement)>) {}
///     fn stop(&mut self, _deadline: Duration) {}
/// }
///
/// let consumer = store.consumer("credit-service").spawn(Empty, |_, _| Ok(()))?;
/// assert_eq!(consumer.stop(Duration::from_secs(5)).applied, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Source: Send + fmt::Debug + 'static {
    /// Begins connecting and consuming, in the background, with at most `prefetch` unsettled
    /// deliveries. The consumer calls it once.
    ///
    /// # Errors
    /// A setting that cannot work. An unreachable broker is no error: the source reports
    /// [`SourceEvent::Down`].
    fn start(&mut self, events: SourceEvents, prefetch: u16) -> Result<(), SettingError>;

    /// The bytes of unsettled deliveries beyond which the source delivers nothing more. The default
    /// is `u64::MAX`, which means no bound.
    ///
    /// The consumer asks once, after [`start`](Self::start). The consumer then parks waiting
    /// deliveries before they use up all these bytes.
    fn unsettled_bytes_max(&self) -> u64 {
        u64::MAX
    }

    /// Settles deliveries, in order. A settlement of an epoch that is over is dropped.
    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>);

    /// Ends the connection and all background work. Waits at most `deadline`. Unsettled deliveries
    /// go back to the queue.
    ///
    /// `deadline` may be `Duration::MAX`, which means for ever. No `Instant` can be added to that
    /// value.
    fn stop(&mut self, deadline: Duration);
}
