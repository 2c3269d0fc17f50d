//! The byte form of a delivery that a consumer has rejected.
//!
//! ```text
//! since ms u64 │ attempts u32 │ flags u8 │ reason t32 │ exchange t32 │ routing key t32 │
//! [message id t32] │ [type t32] │ [content type t32] │ [correlation id t32] │ [app id t32] │ [timestamp u64] │
//! [more u16 │ [content encoding t32] │ [reply to t32] │ [expiration t32] │ [user id t32] │ [cluster id t32] │
//!  [delivery mode u8] │ [priority u8]] │
//! count u32 │ { name t32, kind u8, value }… │ payload u32 + bytes │ crc32 u32
//! ```
//!
//! Little-endian; `t32` is UTF-8 behind a length of four bytes, because a foreign producer's texts
//! keep to no limit of ours. Each `[…]` is there if its flag is set. The CRC-32 (IEEE) covers the
//! row's key and everything before it. A row that fails its check is reported by its number, and
//! never handed to a handler. `values.rs` describes values. The properties behind `more`, and
//! values other than text, i64, boolean and bytes, came with format 5.
//!
//! **Invariant.** Decoding never panics, and takes memory only for what it has read, whatever the
//! bytes.

use std::borrow::Cow;

use super::dedup::{sealed, unsealed};
use super::values::{put_value, read_value};
use super::wire_bytes::{Malformed, Reader};
use crate::message::{HeaderValue, Message};
use crate::text::Text;

const RECHECK: u8 = 1;
/// The flag for further properties.
const MORE: u8 = 0b1000_0000;
const DELIVERY_MODE: u16 = 1 << 5;
const PRIORITY: u16 = 1 << 6;
const MORE_KNOWN: u16 = (1 << 7) - 1;

/// A rejected delivery, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RejectedRow {
    pub(crate) since_ms: u64,
    pub(crate) attempts: u32,
    /// Whether the delivery was rejected before it was recorded for deduplication. A redrive then
    /// checks whether it was recorded since.
    pub(crate) recheck: bool,
    pub(crate) reason: String,
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
    pub(crate) message: Message,
}

impl RejectedRow {
    pub(crate) fn to_bytes(&self, key: &[u8]) -> Vec<u8> {
        let message = &self.message;
        let mut out = Vec::with_capacity(256 + message.payload.len());
        out.extend_from_slice(&self.since_ms.to_le_bytes());
        out.extend_from_slice(&self.attempts.to_le_bytes());
        let bit = |(at, there): (usize, bool)| u8::from(there) << (at + 1);
        let there =
            texts(message).map(|text| text.is_some()).into_iter().chain([message.timestamp_s.is_some()]);
        let flags =
            there.enumerate().map(bit).fold(if self.recheck { RECHECK } else { 0 }, |all, bit| all | bit);
        let more = more(message);
        out.push(flags | if more == 0 { 0 } else { MORE });
        for text in [self.reason.as_str(), &self.exchange, &self.routing_key]
            .into_iter()
            .chain(texts(message).into_iter().flatten())
        {
            put(&mut out, text.as_bytes());
        }
        if let Some(timestamp_s) = message.timestamp_s {
            out.extend_from_slice(&timestamp_s.to_le_bytes());
        }
        if more != 0 {
            out.extend_from_slice(&more.to_le_bytes());
            more_texts(message).into_iter().flatten().for_each(|text| put(&mut out, text.as_bytes()));
            out.extend(message.delivery_mode);
            out.extend(message.priority);
        }
        out.extend_from_slice(&len(message.headers.len()));
        for (name, value) in &message.headers {
            put(&mut out, name.as_bytes());
            put_value(&mut out, value);
        }
        put(&mut out, &message.payload);
        let row = sealed(key, out);
        debug_assert!(Self::from_bytes(key, &row).is_ok(), "what is written can be read");
        row
    }

    /// Checks a row and reads it, or returns what is wrong with it.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Result<Self, &'static str> {
        let row = unsealed(key, bytes).ok_or("its checksum does not match")?;
        read(&mut Reader(row)).map_err(|Malformed(what)| what)
    }
}

fn texts(message: &Message) -> [Option<&str>; 5] {
    let Message { message_id, event_type, content_type, correlation_id, app_id, .. } = message;
    [message_id, event_type, content_type, correlation_id, app_id].map(|text| text.as_deref())
}

/// Returns the flags of the properties that came with format 5: the texts in their order, then the
/// numbers.
fn more(message: &Message) -> u16 {
    let texts = more_texts(message).map(|text| text.is_some());
    let there = texts.into_iter().chain([message.delivery_mode.is_some(), message.priority.is_some()]);
    there.enumerate().map(|(at, there)| u16::from(there) << at).fold(0, |all, bit| all | bit)
}

fn more_texts(message: &Message) -> [Option<&str>; 5] {
    let Message { content_encoding, reply_to, expiration, user_id, cluster_id, .. } = message;
    [content_encoding, reply_to, expiration, user_id, cluster_id].map(|text| text.as_deref())
}

fn len(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("a message of 4 GiB is carried by no broker").to_le_bytes()
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&len(bytes.len()));
    out.extend_from_slice(bytes);
}

fn read(reader: &mut Reader<'_>) -> Result<RejectedRow, Malformed> {
    let (since_ms, attempts, flags) = (reader.u64()?, reader.u32()?, reader.u8()?);
    let (reason, exchange, routing_key) = (text32(reader)?, text32(reader)?, text32(reader)?);
    let has = |at: u8| flags >> (at + 1) & 1 == 1;
    let mut optional = |at| has(at).then(|| text32(reader).map(Text::from)).transpose();
    let (message_id, event_type, content_type) = (optional(0)?, optional(1)?, optional(2)?);
    let (correlation_id, app_id) = (optional(3)?, optional(4)?);
    let timestamp_s = has(5).then(|| reader.u64()).transpose()?;
    let more = if flags & MORE != 0 { reader.u16()? } else { 0 };
    if more & !MORE_KNOWN != 0 {
        return Err(Malformed("it has a property that is unknown"));
    }
    let mut optional = |at: u16| (more >> at & 1 == 1).then(|| text32(reader).map(Text::from)).transpose();
    let (content_encoding, reply_to, expiration) = (optional(0)?, optional(1)?, optional(2)?);
    let (user_id, cluster_id) = (optional(3)?, optional(4)?);
    let delivery_mode = (more & DELIVERY_MODE != 0).then(|| reader.u8()).transpose()?;
    let priority = (more & PRIORITY != 0).then(|| reader.u8()).transpose()?;
    let headers = read_headers(reader)?;
    let payload = bytes32(reader)?.to_vec();
    reader.end()?;
    let message = Message {
        message_id,
        event_type,
        content_type,
        content_encoding,
        delivery_mode,
        priority,
        correlation_id,
        reply_to,
        expiration,
        user_id,
        app_id,
        cluster_id,
        timestamp_s,
        headers,
        payload,
    };
    Ok(RejectedRow {
        since_ms,
        attempts,
        recheck: flags & RECHECK != 0,
        reason,
        exchange,
        routing_key,
        message,
    })
}

fn read_headers(reader: &mut Reader<'_>) -> Result<Vec<(Cow<'static, str>, HeaderValue)>, Malformed> {
    let count = reader.u32()? as usize;
    // A corrupt count cannot ask for more than the row has bytes.
    let mut headers =
        Vec::with_capacity(count.min(reader.0.len() / size_of::<(Cow<'_, str>, HeaderValue)>()));
    for _ in 0..count {
        let name = text32(reader)?;
        headers.push((name.into(), read_value(reader)?));
    }
    Ok(headers)
}

fn bytes32<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], Malformed> {
    let len = reader.u32()? as usize;
    reader.take(len)
}

fn text32(reader: &mut Reader<'_>) -> Result<String, Malformed> {
    let len = reader.u32()? as usize;
    reader.text(len).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::log::values::samples::any_value;

    fn any_row() -> impl Strategy<Value = RejectedRow> {
        let text = || prop::option::of(".{0,9}".prop_map(Text::from));
        let message = (
            (text(), text(), text(), text(), text()),
            (text(), text(), text(), text(), text()),
            any::<(Option<u64>, Option<u8>, Option<u8>)>(),
            prop::collection::vec((".{0,300}".prop_map(Cow::Owned), any_value()), 0..4),
            prop::collection::vec(any::<u8>(), 0..50),
        );
        let message = message.prop_map(|(texts, more, numbers, headers, payload)| Message {
            message_id: texts.0,
            event_type: texts.1,
            content_type: texts.2,
            correlation_id: texts.3,
            app_id: texts.4,
            content_encoding: more.0,
            reply_to: more.1,
            expiration: more.2,
            user_id: more.3,
            cluster_id: more.4,
            timestamp_s: numbers.0,
            delivery_mode: numbers.1,
            priority: numbers.2,
            headers,
            payload,
        });
        let rest = (any::<u64>(), any::<u32>(), any::<bool>(), ".{0,20}", ".{0,20}", ".{0,20}");
        (rest, message).prop_map(|((since_ms, attempts, recheck, reason, exchange, routing_key), message)| {
            RejectedRow { since_ms, attempts, recheck, reason, exchange, routing_key, message }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_read_back(row in any_row(), at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let mut bytes = row.to_bytes(b"key");
            prop_assert_eq!(&RejectedRow::from_bytes(b"key", &bytes), &Ok(row));
            prop_assert!(RejectedRow::from_bytes(b"other", &bytes).is_err());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(RejectedRow::from_bytes(b"key", &bytes).is_err());
        }

        /// Goal: decoding ends without a panic for any bytes, also with a right checksum.
        #[test]
        fn hostile_bytes_do_not_panic(row in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = RejectedRow::from_bytes(b"key", &row);
            let _ = RejectedRow::from_bytes(b"key", &sealed(b"key", row));
        }
    }
}
