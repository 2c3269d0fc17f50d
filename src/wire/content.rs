//! The keyed hash of a message's content, which distinguishes messages that claim to be the same.
//! It covers everything that all copies of one message share.
//!
//! The key is random and stays in the store. So an outsider can neither make two messages of one
//! hash nor learn a message's hash. SipHash-2-4 is designed for that.
//!
//! **What the hash covers.** The payload and these properties: id, type, content type and encoding,
//! correlation id, reply to, priority, user id, cluster id. Each header with its kind, and the
//! whole content of tables and arrays. For a foreign message also `app_id` and the CloudEvents
//! `source`.
//!
//! **What the hash leaves out** differs between copies of one message:
//!
//! | left out | why |
//! |---|---|
//! | for messages of a onewrite store: `app_id`, CloudEvents `source`, the spelling of CloudEvents headers | a relay's settings determine them, and may change between two publishes |
//! | `onewrite-resend` | it marks the second publish |
//! | `onewrite-store`, `onewrite-epoch`, `onewrite-lane`, `onewrite-lane-number` | they claim an identity, and are no content |
//! | `expiration`, `CC`, `BCC` | RabbitMQ takes them out of a message that it dead-letters |
//! | `delivery_mode` | a shovel sets it; it is for the broker alone |
//! | `timestamp`, `timestamp_in_ms` | RabbitMQ may write them where a message comes in |
//! | `x-death`, `x-delivery-count` and the others of [`BROKERS`] | RabbitMQ writes them |
//! | `traceparent`, `tracestate`, `baggage` | each hop may write them anew |
//! | the part behind `amq.rabbitmq.reply-to` | RabbitMQ writes the publishing channel there |

use std::hash::Hasher;

use super::{CRC, EPOCH, HeaderSpelling, LANE, LANE_NUMBER, MENDED, SIGNATURE, STORE, UNREADABLE, VERSION};
use crate::message::{HeaderValue, Message};

/// Headers that name the producer and the number of this message, and prove them.
const CLAIMS: [&str; 5] = [STORE, EPOCH, LANE, LANE_NUMBER, SIGNATURE];

/// Headers that RabbitMQ writes. A producer's own header may begin with `x-` as well, so each name
/// is listed.
const BROKERS: [&str; 11] = [
    "x-death",
    "x-delivery-count",
    "x-acquired-count",
    "x-received-from",
    "x-shovelled",
    "x-shovelled-timestamp",
    "x-routed-by",
    "x-stream-offset",
    // A delayed-message exchange changes its sign.
    "x-delay",
    "timestamp_in_ms",
    "BCC",
];

/// The prefixes of headers that RabbitMQ writes.
const BROKERS_PREFIXES: [&str; 3] = ["x-first-death-", "x-last-death-", "x-opt-"];

/// Headers that a hop on the way may write or remove.
const HOPS: [&str; 4] = ["traceparent", "tracestate", "baggage", "CC"];

/// The queue that carries answers back to the channel that asked.
const DIRECT_REPLY: &str = "amq.rabbitmq.reply-to";

#[expect(deprecated, reason = "std prefers another hash for its maps; this one is SipHash-2-4, and stays it")]
type Sip = std::hash::SipHasher;

/// The secret of a store, with which it hashes contents.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentKey([u8; 16]);

/// Shows nothing.
impl std::fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ContentKey")
    }
}

impl ContentKey {
    pub(crate) fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    fn hasher(&self) -> Sip {
        let (first, second) = self.0.split_at(8);
        let number = |half: &[u8]| half.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        #[expect(deprecated, reason = "as `Sip`")]
        Sip::new_with_keys(number(first), number(second))
    }

    /// Hashes the whole content of a message.
    pub(crate) fn hash(&self, message: &Message) -> u64 {
        let mut hasher = self.hasher();
        let is_ours = message.headers.iter().any(|(name, _)| name == STORE);
        self.message(&mut hasher, message, is_ours);
        hasher.finish()
    }

    /// Hashes the lane and the number that a message claims, even if incomplete, and its signature.
    /// So a forged copy differs from the genuine message.
    pub(crate) fn claims(&self, message: &Message) -> u64 {
        let mut hasher = self.hasher();
        let claims = message.headers.iter().filter(|(name, _)| CLAIMS.contains(&name.as_ref()));
        self.unordered(&mut hasher, claims.map(|(name, value)| (b'h', name.as_ref(), value)));
        hasher.finish()
    }

    /// Hashes the destination of a message. The result is never 0.
    pub(crate) fn route(&self, exchange: &str, routing_key: &str) -> u32 {
        let mut hasher = self.hasher();
        put(&mut hasher, b'e', exchange.as_bytes());
        put(&mut hasher, b'r', routing_key.as_bytes());
        ((hasher.finish() >> 32) as u32).max(1)
    }
}

impl Canonical for ContentKey {
    type Sink = Sip;

    fn unordered<'a>(
        &self,
        sink: &mut Self::Sink,
        entries: impl Iterator<Item = (u8, &'a str, &'a HeaderValue)>,
    ) {
        let (mut count, mut sum) = (0_u64, 0_u64);
        for (kind, name, value) in entries {
            let mut hasher = self.hasher();
            put(&mut hasher, kind, name.as_bytes());
            self.value(&mut hasher, value);
            count += 1;
            // A sum does not depend on the encoder's order.
            sum = sum.wrapping_add(hasher.finish());
        }
        sink.write(&count.to_le_bytes());
        sink.write(&sum.to_le_bytes());
    }
}

/// Writes a message's content as bytes that are equal for all copies, and different for every other
/// message.
pub(super) trait Canonical {
    type Sink: Hasher;

    /// Writes entries of a table, or headers, in any order.
    fn unordered<'a>(
        &self,
        sink: &mut Self::Sink,
        entries: impl Iterator<Item = (u8, &'a str, &'a HeaderValue)>,
    );

    /// `but_settings` leaves out what a relay's settings determine.
    fn message(&self, sink: &mut Self::Sink, message: &Message, but_settings: bool) {
        let reply_to = message.reply_to.as_deref().map(|queue| match queue.strip_prefix(DIRECT_REPLY) {
            Some(channel) if channel.starts_with('.') => DIRECT_REPLY,
            _ => queue,
        });
        let texts = [
            message.message_id.as_deref(),
            message.event_type.as_deref(),
            message.content_type.as_deref(),
            message.content_encoding.as_deref(),
            message.correlation_id.as_deref(),
            reply_to,
            message.user_id.as_deref(),
            message.cluster_id.as_deref(),
            message.app_id.as_deref().filter(|_| !but_settings),
        ];
        for text in texts {
            put(sink, u8::from(text.is_some()), text.unwrap_or_default().as_bytes());
        }
        put(sink, u8::from(message.priority.is_some()), &[message.priority.unwrap_or_default()]);
        put(sink, u8::from(but_settings), &message.payload);
        let headers = message.headers.iter();
        self.unordered(
            sink,
            headers.filter_map(|(name, value)| {
                let (kind, name) = kept(name, but_settings)?;
                Some((kind, name, value))
            }),
        );
    }

    /// The kind bytes are AMQP's.
    fn value(&self, sink: &mut Self::Sink, value: &HeaderValue) {
        match value {
            HeaderValue::Text(text) => put(sink, b'S', text.as_bytes()),
            HeaderValue::Bytes(bytes) => put(sink, b'x', bytes),
            HeaderValue::Int(int) => put(sink, b'l', &int.to_le_bytes()),
            HeaderValue::Bool(value) => put(sink, b't', &[u8::from(*value)]),
            HeaderValue::I8(int) => put(sink, b'b', &int.to_le_bytes()),
            HeaderValue::U8(int) => put(sink, b'B', &[*int]),
            HeaderValue::I16(int) => put(sink, b's', &int.to_le_bytes()),
            HeaderValue::U16(int) => put(sink, b'u', &int.to_le_bytes()),
            HeaderValue::I32(int) => put(sink, b'I', &int.to_le_bytes()),
            HeaderValue::U32(int) => put(sink, b'i', &int.to_le_bytes()),
            HeaderValue::Float(float) => put(sink, b'f', &float.to_bits().to_le_bytes()),
            HeaderValue::Double(float) => put(sink, b'd', &float.to_bits().to_le_bytes()),
            HeaderValue::Decimal { scale, unscaled } => {
                put(sink, b'D', &(u64::from(*scale) << 32 | u64::from(*unscaled)).to_le_bytes());
            }
            HeaderValue::Timestamp(seconds) => put(sink, b'T', &seconds.to_le_bytes()),
            HeaderValue::Table(entries) => {
                sink.write(b"F");
                self.unordered(sink, entries.iter().map(|(name, value)| (b'h', name.as_str(), value)));
            }
            HeaderValue::Array(values) => {
                sink.write(b"A");
                sink.write(&(values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| self.value(sink, value));
            }
            HeaderValue::Void => sink.write(b"V"),
        }
    }
}

pub(super) fn put(sink: &mut impl Hasher, kind: u8, bytes: &[u8]) {
    sink.write(&[kind]);
    sink.write(&(bytes.len() as u64).to_le_bytes());
    sink.write(bytes);
}

/// Returns the kind and the name of a header that is the same in each copy; `None` for another
/// header.
pub(super) fn kept(name: &str, but_settings: bool) -> Option<(u8, &str)> {
    let is_the_brokers =
        BROKERS.contains(&name) || BROKERS_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    if is_the_brokers || HOPS.contains(&name) {
        return None;
    }
    if name.starts_with("onewrite-") {
        // The note of a mended delivery names the original form.
        return matches!(name, CRC | VERSION | MENDED | UNREADABLE).then_some((b'h', name));
    }
    let attribute = HeaderSpelling::ALL.iter().find_map(|spelling| name.strip_prefix(spelling.prefix()));
    match attribute {
        Some("source") if but_settings => None,
        Some(attribute) => Some((b'c', attribute)),
        None => Some((b'h', name)),
    }
}

#[cfg(test)]
mod tests;
