//! Messages, and the broker's answers to them.
//!
//! These types know nothing of a broker's client library, of the log or of a thread. A [`Message`]
//! is what an AMQP 0-9-1 publish carries besides its exchange and routing key. An [`Outcome`] is
//! the broker's answer to one publish. A [`Fault`] names the kind of failure, which decides which
//! retry budget it consumes.

mod value;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::printable::escaped;
use crate::text::Text;

pub use self::value::HeaderValue;
pub(crate) use self::value::VALUE_BYTES;

/// A message as AMQP 0-9-1 carries it: the payload and all fourteen properties, headers included.
/// It is persistent unless it says otherwise.
///
/// The RabbitMQ publisher refuses what AMQP cannot carry, with a message fault that names the
/// field. A [`MemoryBroker`](crate::broker::MemoryBroker) carries all properties and acts on none.
/// There nothing expires, and no message overtakes another.
///
/// ```
/// use onewrite::{HeaderValue, Message};
/// let message = Message { message_id: Some("m-1".into()), payload: b"hello".to_vec(), ..Message::default() };
/// assert_eq!(message.header("cloudEvents_source"), None);
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// `message_id`: the event's id.
    pub message_id: Option<Text>,
    /// `type`: the event's type.
    pub event_type: Option<Text>,
    /// `content_type` of the payload.
    pub content_type: Option<Text>,
    /// `content_encoding` of the payload, such as `gzip`. The library neither encodes nor decodes.
    pub content_encoding: Option<Text>,
    /// `delivery_mode`: 2 is persistent, 1 is not. `None` is published as 2.
    pub delivery_mode: Option<u8>,
    /// `priority`, for queues with `x-max-priority`.
    pub priority: Option<u8>,
    /// `correlation_id`.
    pub correlation_id: Option<Text>,
    /// `reply_to`: where the sender expects an answer.
    pub reply_to: Option<Text>,
    /// `expiration`: how long the message may wait in a queue, in milliseconds, as text. RabbitMQ
    /// refuses a text that is no number.
    pub expiration: Option<Text>,
    /// `user_id`. RabbitMQ refuses a message whose user is not the publishing user.
    pub user_id: Option<Text>,
    /// `app_id`.
    pub app_id: Option<Text>,
    /// `cluster_id`, which AMQP 0-9-1 has deprecated and RabbitMQ carries.
    pub cluster_id: Option<Text>,
    /// `timestamp`, in whole seconds since the Unix epoch.
    pub timestamp_s: Option<u64>,
    /// Headers, in the order in which they were added. The names that this library sets are
    /// borrowed.
    pub headers: Vec<(Cow<'static, str>, HeaderValue)>,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Message {
    /// Returns the first header of this name.
    ///
    /// ```
    /// # use onewrite::Message;
    /// let message = Message { headers: vec![("region".into(), "eu".into())], ..Message::default() };
    /// assert_eq!(message.header("region").and_then(|value| value.as_text()), Some("eu"));
    /// ```
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&HeaderValue> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value)
    }

    /// Iterates over the properties that are texts.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &Text> {
        let texts = [
            &self.message_id,
            &self.event_type,
            &self.content_type,
            &self.content_encoding,
            &self.correlation_id,
            &self.reply_to,
            &self.expiration,
            &self.user_id,
            &self.app_id,
            &self.cluster_id,
        ];
        texts.into_iter().flatten()
    }

    /// Returns the bytes of the header entries, as AMQP encodes them.
    pub(crate) fn headers_len(&self) -> usize {
        self.headers.iter().map(|(name, value)| 1 + name.len() + 1 + value.encoded_len()).sum()
    }
}

/// Shows names and lengths only, so that payload and header values never reach a log.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("message_id", &self.message_id)
            .field("event_type", &self.event_type)
            .field("content_type", &self.content_type)
            .field("timestamp_s", &self.timestamp_s)
            .field("headers", &self.headers)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// The name of one publish of one event. A relay never reuses a ticket, so a late answer cannot be
/// taken for another publish's.
///
/// ```
/// use onewrite::Ticket;
/// assert!(Ticket(1) < Ticket(2)); // the later publish has the higher one
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// One publish: a destination, a message, and the ticket of its outcome.
///
/// ```
/// use std::sync::Arc;
/// use onewrite::{Message, Outgoing, Ticket};
/// let message = Arc::new(Message { payload: b"100".to_vec(), ..Message::default() });
/// let outgoing = Outgoing::new(Ticket(1), "", "payments", message);
/// assert_eq!(&*outgoing.routing_key, "payments");
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outgoing {
    /// The ticket under which the publisher reports the outcome.
    pub ticket: Ticket,
    /// The exchange; empty for AMQP's default exchange.
    pub exchange: Arc<str>,
    /// The routing key.
    pub routing_key: Arc<str>,
    /// Properties, headers and payload.
    pub message: Arc<Message>,
    /// Whether the broker is to return the message if no queue takes it. Otherwise the broker drops
    /// and confirms it.
    pub mandatory: bool,
    /// Whether to publish the message alone, on a channel of its own. It was in flight when one
    /// message's fault closed a channel, and may be that message.
    pub isolated: bool,
}

impl Outgoing {
    /// Makes a publish that is mandatory and not isolated.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use onewrite::{Message, Outgoing, Ticket};
    /// let message = Arc::new(Message { payload: b"hello".to_vec(), ..Message::default() });
    /// let outgoing = Outgoing::new(Ticket(1), "", "payments", message);
    /// assert!(outgoing.mandatory && !outgoing.isolated);
    /// ```
    #[must_use]
    pub fn new(
        ticket: Ticket,
        exchange: impl Into<Arc<str>>,
        routing_key: impl Into<Arc<str>>,
        message: Arc<Message>,
    ) -> Self {
        Self {
            ticket,
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            message,
            mandatory: true,
            isolated: false,
        }
    }
}

/// The class of a fault, which decides which retry budget the fault consumes.
///
/// ```
/// use onewrite::FaultClass;
/// fn spends_attempts(class: FaultClass) -> bool {
///     matches!(class, FaultClass::Message | FaultClass::Destination)
/// }
/// assert!(!spends_attempts(FaultClass::Outage));
/// assert_eq!(FaultClass::Outage.to_string(), "outage");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultClass {
    /// The broker refuses this very message, as too large or malformed. It consumes the event's
    /// attempts.
    Message,
    /// The destination is missing, forbidden to us, or routes nowhere. It consumes the event's
    /// destination attempts, with long waits.
    Destination,
    /// The broker is away, unreachable or overloaded. It consumes nothing.
    Outage,
    /// The broker refuses us: password, vhost, TLS. It consumes nothing, and the relay retries
    /// slowly.
    Config,
    /// The event expired before it could be published.
    Expired,
    /// The record in the log fails its check.
    Undecodable,
}

impl fmt::Display for FaultClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Message => "message",
            Self::Destination => "destination",
            Self::Outage => "outage",
            Self::Config => "config",
            Self::Expired => "expired",
            Self::Undecodable => "undecodable",
        })
    }
}

/// A fault: a class for decisions and a text for people.
///
/// ```
/// use onewrite::{Fault, FaultClass};
/// let fault = Fault::with_code(FaultClass::Destination, 404, "no exchange 'payments'");
/// assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(404)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{class} fault{}: {text}", code.map(|c| format!(" {c}")).unwrap_or_default())]
#[non_exhaustive]
pub struct Fault {
    /// The class of the fault.
    pub class: FaultClass,
    /// The AMQP reply code, if the broker gave one.
    pub code: Option<u16>,
    /// The message of the broker or the operating system. It holds no payload and no credentials.
    pub text: String,
}

impl Fault {
    /// Makes a fault without a reply code. Control characters in the text are escaped, because the
    /// text may be foreign.
    ///
    /// ```
    /// # use onewrite::{Fault, FaultClass};
    /// let fault = Fault::new(FaultClass::Outage, "connection refused");
    /// assert_eq!(fault.to_string(), "outage fault: connection refused");
    /// ```
    pub fn new(class: FaultClass, text: impl Into<String>) -> Self {
        Self { class, code: None, text: escaped(text.into()) }
    }

    /// Makes a fault with the AMQP reply code. Control characters in the text are escaped.
    ///
    /// ```
    /// # use onewrite::{Fault, FaultClass};
    /// let fault = Fault::with_code(FaultClass::Destination, 312, "NO_ROUTE");
    /// assert_eq!(fault.to_string(), "destination fault 312: NO_ROUTE");
    /// ```
    pub fn with_code(class: FaultClass, code: u16, text: impl Into<String>) -> Self {
        Self { class, code: Some(code), text: escaped(text.into()) }
    }
}

/// The broker's answer to one publish. Nothing is inferred from silence: a publish that was neither
/// confirmed nor refused is `Unknown`.
///
/// ```
/// use onewrite::{Fault, FaultClass, Outcome};
/// fn may_be_there(outcome: &Outcome) -> bool {
///     matches!(outcome, Outcome::Confirmed | Outcome::Unknown(_))
/// }
/// assert!(may_be_there(&Outcome::Unknown(Fault::new(FaultClass::Outage, "connection reset"))));
/// assert!(!may_be_there(&Outcome::Nacked));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The broker has the message.
    Confirmed,
    /// The broker could not take the message: a full queue with `reject-publish`, or an internal
    /// error.
    Nacked,
    /// No queue took the message (`basic.return`).
    Returned(Fault),
    /// The broker closed the channel on this very message, or the message could not be encoded.
    Refused(Fault),
    /// The connection ended before the broker answered.
    Unknown(Fault),
    /// The deadline passed without an answer, though the connection lives. The relay suspends the
    /// destination. The broker's answer may still come: this is the one outcome that a second
    /// outcome may follow.
    Silent(Fault),
}
