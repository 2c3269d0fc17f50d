//! What travels: the message, and what the broker said of it.
//!
//! These types know nothing of a broker's client library, of the log or of a thread. A [`Message`] is what an
//! AMQP 0-9-1 publish carries besides its exchange and routing key; an [`Outcome`] is the broker's word on one
//! publish; a [`Fault`] says what kind of wrong it was, which decides who pays for it.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::printable::escaped;
use crate::text::Text;

/// A header's value. The AMQP types that every client can read.
///
/// ```
/// use onewrite::HeaderValue;
/// assert_eq!(HeaderValue::from("eu"), HeaderValue::Text("eu".into()));
/// assert_eq!(HeaderValue::from(true), HeaderValue::Bool(true));
/// assert_eq!(format!("{:?}", HeaderValue::from("secret")), "Text(6 bytes)");
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HeaderValue {
    /// UTF-8 text (AMQP long string).
    Text(Text),
    /// A signed 64-bit integer.
    Int(i64),
    /// A boolean.
    Bool(bool),
    /// Raw bytes (AMQP byte array).
    Bytes(Vec<u8>),
}

impl HeaderValue {
    /// The text, if it is text.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::from("eu").as_text(), Some("eu"));
    /// assert_eq!(HeaderValue::from(7).as_text(), None);
    /// ```
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The integer, if it is one.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::from(7).as_int(), Some(7));
    /// assert_eq!(HeaderValue::from("7").as_int(), None);
    /// ```
    #[must_use]
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(int) => Some(*int),
            _ => None,
        }
    }

    /// Bytes that the value takes on the wire, without its name and type tag.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::from(7).encoded_len(), 8);
    /// assert_eq!(HeaderValue::from("eu").encoded_len(), 4 + 2);
    /// ```
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Text(text) => 4 + text.len(),
            Self::Int(_) => 8,
            Self::Bool(_) => 1,
            Self::Bytes(bytes) => 4 + bytes.len(),
        }
    }
}

/// Shows the kind and length only: header values may be personal data.
impl fmt::Debug for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
            Self::Int(_) => f.write_str("Int"),
            Self::Bool(_) => f.write_str("Bool"),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

impl From<&str> for HeaderValue {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}
impl From<String> for HeaderValue {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}
impl From<Text> for HeaderValue {
    fn from(text: Text) -> Self {
        Self::Text(text)
    }
}
impl From<i64> for HeaderValue {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}
impl From<bool> for HeaderValue {
    fn from(bool: bool) -> Self {
        Self::Bool(bool)
    }
}
impl From<Vec<u8>> for HeaderValue {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

/// A message as AMQP 0-9-1 carries it: properties, headers, payload. Always persistent (`delivery_mode` 2).
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
    /// `correlation_id`.
    pub correlation_id: Option<Text>,
    /// `app_id`.
    pub app_id: Option<Text>,
    /// `timestamp`, in whole seconds since the Unix epoch.
    pub timestamp_s: Option<u64>,
    /// Headers, in the order they were added. The names that this library gives to what it publishes are borrowed.
    pub headers: Vec<(Cow<'static, str>, HeaderValue)>,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Message {
    /// The first header of this name.
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
}

/// Shows names and lengths only; payload and header values never reach a log this way.
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

/// Names one publish of one event. Never reused in the life of a relay, so that a late word is not taken for another's.
///
/// ```
/// use onewrite::Ticket;
/// assert!(Ticket(1) < Ticket(2)); // the later publish has the higher one
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// One publish: where to, what, and under which ticket its outcome is to be told.
///
/// ```
/// use std::sync::Arc;
/// use onewrite::{Message, Outgoing, Ticket};
/// let message = Arc::new(Message { payload: b"100".to_vec(), ..Message::default() });
/// let outgoing =
///     Outgoing { ticket: Ticket(1), exchange: "".into(), routing_key: "payments".into(), message, isolated: false };
/// assert_eq!(&*outgoing.routing_key, "payments");
/// ```
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Under which the outcome is told.
    pub ticket: Ticket,
    /// The exchange; empty for the default exchange.
    pub exchange: Arc<str>,
    /// The routing key.
    pub routing_key: Arc<str>,
    /// Properties, headers and payload.
    pub message: Arc<Message>,
    /// Publish apart from the others, on a channel of its own: this message was in flight when a channel was closed
    /// for a fault of one message, and may be the one.
    pub isolated: bool,
}

/// Whose fault a failure is, which decides who pays.
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
    /// The broker refuses this very message: too large, malformed. Spends the event's attempts.
    Message,
    /// The destination is missing, closed to us, or routes nowhere. Spends the event's destination attempts, with long waits.
    Destination,
    /// The broker is away, unreachable or overloaded. Spends nothing.
    Outage,
    /// The broker refuses us: password, vhost, TLS. Spends nothing; retried slowly.
    Config,
    /// The event's time ran out before it could be published.
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

/// What went wrong, for a person and for a decision.
///
/// ```
/// use onewrite::{Fault, FaultClass};
/// let fault = Fault::with_code(FaultClass::Destination, 404, "no exchange 'payments'");
/// assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(404)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{class} fault{}: {text}", code.map(|c| format!(" {c}")).unwrap_or_default())]
pub struct Fault {
    /// Whose fault it is.
    pub class: FaultClass,
    /// The AMQP reply code, where there was one.
    pub code: Option<u16>,
    /// What the broker or the operating system said. Holds no payload and no credentials.
    pub text: String,
}

impl Fault {
    /// A fault without a reply code. Control characters in the text are escaped: it may be another's.
    ///
    /// ```
    /// # use onewrite::{Fault, FaultClass};
    /// let fault = Fault::new(FaultClass::Outage, "connection refused");
    /// assert_eq!(fault.to_string(), "outage fault: connection refused");
    /// ```
    pub fn new(class: FaultClass, text: impl Into<String>) -> Self {
        Self { class, code: None, text: escaped(text.into()) }
    }

    /// A fault with the AMQP reply code. Control characters in the text are escaped.
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

/// The broker's word on one publish. Nothing is inferred from silence: what was neither confirmed nor refused is `Unknown`.
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
    /// The broker has it.
    Confirmed,
    /// The broker says it could not take it (a full queue with `reject-publish`, an internal error).
    Nacked,
    /// No queue took it (`basic.return`).
    Returned(Fault),
    /// The broker closed the channel on this very message, or it could not be encoded at all.
    Refused(Fault),
    /// The connection ended, or the deadline passed, before the broker said anything.
    Unknown(Fault),
}
