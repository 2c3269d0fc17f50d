//! The seam between this library and a broker: [`Publisher`] for the relay, [`Source`] for the consumer.
//!
//! A [`Publisher`] takes messages without blocking and tells, over a channel, what became of each. It owns its
//! connection: connecting, waiting between attempts and reconnecting are its work, and each new connection is a new
//! *epoch*. The relay decides what to publish, when, and again; a publisher decides nothing.
//!
//! **Invariants of a publisher.**
//! - A message published under an epoch that is over is dropped without a word.
//! - Within an epoch each ticket gets exactly one [`Outcome`], or the epoch ends with [`PublisherEvent::Down`], after
//!   which none of its tickets gets one: the relay takes them for unknown. Isolated messages are outside this: each
//!   gets exactly one outcome, whatever happens to the epoch.
//! - Messages that are not isolated leave in the order of the calls.
//! - [`Outcome::Confirmed`] is said only of what the broker has confirmed and did not return.
//! - No call blocks, and no text in an event holds a payload or a credential.

mod memory;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;

use std::fmt;
use std::time::Duration;

use crossbeam_channel::Sender;

use crate::error::SettingError;
use crate::message::{Fault, Message, Outcome, Outgoing, Ticket};

pub use memory::*;
#[cfg(feature = "rabbitmq")]
pub use rabbitmq::*;

/// Numbers the connections of one publisher or source, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// What a publisher tells the relay.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PublisherEvent {
    /// A new connection is ready.
    Up {
        /// Its epoch.
        epoch: Epoch,
    },
    /// The connection ended, or an attempt to connect failed. The publisher goes on trying by itself.
    Down {
        /// The epoch that ended, or the one that could not begin.
        epoch: Epoch,
        /// Why. [`FaultClass::Message`](crate::FaultClass::Message) or [`FaultClass::Destination`](crate::FaultClass::Destination)
        /// says that one of the messages in flight made the broker close the channel.
        fault: Fault,
    },
    /// The broker blocks publishers (`connection.blocked`), or no longer does.
    Blocked {
        /// Whether it blocks now.
        blocked: bool,
    },
    /// What became of messages, in the order in which it became known.
    Outcomes(Vec<(Ticket, Outcome)>),
}

/// Where a publisher tells what happens. Cheap to clone; never blocks.
#[derive(Debug, Clone)]
pub struct PublisherEvents(Sender<PublisherEvent>);

impl PublisherEvents {
    /// Wraps the sending half of an unbounded channel. What is in it is bounded by the relay's window.
    #[must_use]
    pub fn new(sender: Sender<PublisherEvent>) -> Self {
        Self(sender)
    }

    /// Tells the relay. Returns `false` when the relay is gone, upon which the publisher should end.
    pub fn send(&self, event: PublisherEvent) -> bool {
        self.0.send(event).is_ok()
    }
}

/// A broker, as the relay sees it. See the [module's invariants](self).
pub trait Publisher: Send + fmt::Debug + 'static {
    /// Begins connecting, in the background. Called once.
    ///
    /// # Errors
    /// A setting that cannot work. That the broker is away is no error: it is told as [`PublisherEvent::Down`].
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError>;

    /// Hands one message over for the connection `epoch`.
    fn publish(&mut self, epoch: Epoch, outgoing: Outgoing);

    /// Ends the connection and whatever runs in the background, waiting `deadline` at most.
    fn stop(&mut self, deadline: Duration);
}

/// Names one delivery on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag {
    /// The connection it came over. A settlement for an epoch that is over is dropped: the broker redelivers.
    pub epoch: Epoch,
    /// The broker's own number on that connection.
    pub tag: u64,
}

/// A message that a broker delivered.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// For settling it.
    pub tag: DeliveryTag,
    /// The exchange it was published to.
    pub exchange: String,
    /// The routing key it was published with.
    pub routing_key: String,
    /// The broker's hint that it may have been delivered before. Never rely on it.
    pub redelivered: bool,
    /// Properties, headers and payload.
    pub message: Message,
}

/// What a consumer says of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// Done with it.
    Acknowledge,
    /// Put it back on its queue.
    Requeue,
    /// Never again: to the queue's dead-letter exchange, if it has one.
    Reject,
}

/// What a source tells the consumer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum SourceEvent {
    /// A new connection is ready and consuming.
    Up {
        /// Its epoch.
        epoch: Epoch,
    },
    /// The connection ended, or an attempt failed. Everything unsettled on it will be delivered again.
    Down {
        /// The epoch that ended, or the one that could not begin.
        epoch: Epoch,
        /// Why.
        fault: Fault,
    },
    /// A message.
    Delivery(Box<Delivery>),
}

/// Where a source hands over deliveries. Cheap to clone; never blocks: the prefetch bounds what is in it.
#[derive(Debug, Clone)]
pub struct SourceEvents(Sender<SourceEvent>);

impl SourceEvents {
    /// Wraps the sending half of an unbounded channel.
    #[must_use]
    pub fn new(sender: Sender<SourceEvent>) -> Self {
        Self(sender)
    }

    /// Tells the consumer. Returns `false` when the consumer is gone, upon which the source should end.
    pub fn send(&self, event: SourceEvent) -> bool {
        self.0.send(event).is_ok()
    }
}

/// A queue on a broker, as the consumer sees it: manual acknowledgement, bounded prefetch.
pub trait Source: Send + fmt::Debug + 'static {
    /// Begins connecting and consuming, in the background, with at most `prefetch` unsettled deliveries. Called once.
    ///
    /// # Errors
    /// A setting that cannot work. That the broker is away is no error: it is told as [`SourceEvent::Down`].
    fn start(&mut self, events: SourceEvents, prefetch: u16) -> Result<(), SettingError>;

    /// Settles deliveries, in order. Those of an epoch that is over are dropped.
    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>);

    /// Ends the connection and whatever runs in the background, waiting `deadline` at most. Unsettled deliveries go back.
    fn stop(&mut self, deadline: Duration);
}
