//! A delivery that a consumer has rejected, to bytes and back.
//!
//! ```text
//! since ms u64 │ attempts u32 │ flags u8 │ reason t32 │ exchange t32 │ routing key t32 │
//! [message id t32] │ [type t32] │ [content type t32] │ [correlation id t32] │ [app id t32] │ [timestamp u64] │
//! count u32 │ { name t32, kind u8, value }… │ payload u32 + bytes │ crc32 u32
//! ```
//!
//! Little-endian; `t32` is UTF-8 behind a length of four bytes: what a foreign producer sends keeps to no limit of ours.
//! Each `[…]` is there if its flag is set. The CRC-32 (IEEE) is over the row's key and all before it: a row that fails it
//! is reported by its number, and never handed to a handler.
//!
//! **Invariant.** Decoding never panics and never allocates more than the row is long, whatever the bytes.

use std::borrow::Cow;

use super::seen::{sealed, unsealed};
use super::wire_bytes::{Malformed, Reader};
use crate::message::{HeaderValue, Message};
use crate::text::Text;

const RECHECK: u8 = 1;
const TEXT: u8 = 0;
const INT: u8 = 1;
const BOOL: u8 = 2;
const BYTES: u8 = 3;

/// A rejected delivery, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RejectedRow {
    pub(crate) since_ms: u64,
    pub(crate) attempts: u32,
    /// It was rejected before it was marked as seen: whoever drives it again looks whether it was.
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
        out.push(flags);
        for text in [self.reason.as_str(), &self.exchange, &self.routing_key]
            .into_iter()
            .chain(texts(message).into_iter().flatten())
        {
            put(&mut out, text.as_bytes());
        }
        if let Some(timestamp_s) = message.timestamp_s {
            out.extend_from_slice(&timestamp_s.to_le_bytes());
        }
        out.extend_from_slice(&len(message.headers.len()));
        for (name, value) in &message.headers {
            put(&mut out, name.as_bytes());
            match value {
                HeaderValue::Text(text) => put_kind(&mut out, TEXT, text.as_bytes()),
                HeaderValue::Bytes(bytes) => put_kind(&mut out, BYTES, bytes),
                HeaderValue::Int(int) => {
                    out.push(INT);
                    out.extend_from_slice(&int.to_le_bytes());
                }
                HeaderValue::Bool(bool) => out.extend_from_slice(&[BOOL, u8::from(*bool)]),
            }
        }
        put(&mut out, &message.payload);
        let row = sealed(key, out);
        debug_assert_eq!(Self::from_bytes(key, &row).as_ref(), Ok(self), "what is written can be read");
        row
    }

    /// Checks a row and reads it; else says what is wrong with it.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Result<Self, &'static str> {
        let row = unsealed(key, bytes).ok_or("its checksum does not match")?;
        read(&mut Reader(row)).map_err(|Malformed(what)| what)
    }
}

fn texts(message: &Message) -> [Option<&str>; 5] {
    let Message { message_id, event_type, content_type, correlation_id, app_id, .. } = message;
    [message_id, event_type, content_type, correlation_id, app_id].map(|text| text.as_deref())
}

fn len(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("a message of 4 GiB is carried by no broker").to_le_bytes()
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&len(bytes.len()));
    out.extend_from_slice(bytes);
}

fn put_kind(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    out.push(kind);
    put(out, bytes);
}

fn read(reader: &mut Reader<'_>) -> Result<RejectedRow, Malformed> {
    let (since_ms, attempts, flags) = (reader.u64()?, reader.u32()?, reader.u8()?);
    if flags & 0b1000_0000 != 0 {
        return Err(Malformed("it has a flag that is unknown"));
    }
    let (reason, exchange, routing_key) = (text32(reader)?, text32(reader)?, text32(reader)?);
    let has = |at: u8| flags >> (at + 1) & 1 == 1;
    let mut optional = |at| has(at).then(|| text32(reader).map(Text::from)).transpose();
    let (message_id, event_type, content_type) = (optional(0)?, optional(1)?, optional(2)?);
    let (correlation_id, app_id) = (optional(3)?, optional(4)?);
    let timestamp_s = has(5).then(|| reader.u64()).transpose()?;
    let headers = read_headers(reader)?;
    let payload = bytes32(reader)?.to_vec();
    reader.end()?;
    let message = Message {
        message_id,
        event_type,
        content_type,
        correlation_id,
        app_id,
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
    // Each takes at least six bytes: a corrupt count cannot ask for more than the row holds.
    let mut headers = Vec::with_capacity(count.min(reader.0.len() / 6));
    for _ in 0..count {
        let name = text32(reader)?;
        let value = match reader.u8()? {
            TEXT => HeaderValue::Text(text32(reader)?.into()),
            BYTES => HeaderValue::Bytes(bytes32(reader)?.to_vec()),
            INT => HeaderValue::Int(reader.u64()?.cast_signed()),
            BOOL => HeaderValue::Bool(reader.u8()? != 0),
            _ => return Err(Malformed("a header in it has an unknown kind")),
        };
        headers.push((name.into(), value));
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

    fn any_row() -> impl Strategy<Value = RejectedRow> {
        let text = || prop::option::of(".{0,9}".prop_map(Text::from));
        let value = prop_oneof![
            ".{0,9}".prop_map(HeaderValue::from),
            any::<i64>().prop_map(HeaderValue::Int),
            any::<bool>().prop_map(HeaderValue::Bool),
            prop::collection::vec(any::<u8>(), 0..9).prop_map(HeaderValue::Bytes),
        ];
        let message = (
            (text(), text(), text(), text(), text()),
            prop::option::of(any::<u64>()),
            prop::collection::vec((".{0,300}".prop_map(Cow::Owned), value), 0..4),
            prop::collection::vec(any::<u8>(), 0..50),
        );
        let message = message.prop_map(|(texts, timestamp_s, headers, payload)| Message {
            message_id: texts.0,
            event_type: texts.1,
            content_type: texts.2,
            correlation_id: texts.3,
            app_id: texts.4,
            timestamp_s,
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

        /// Whatever the bytes, also with a right checksum, decoding ends without a panic.
        #[test]
        fn hostile_bytes_do_not_panic(row in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = RejectedRow::from_bytes(b"key", &row);
            let _ = RejectedRow::from_bytes(b"key", &sealed(b"key", row));
        }
    }
}
