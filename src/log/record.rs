//! The byte form of one record of the log.
//!
//! ```text
//!  0      2   3   4        8              16          24         32         40        44
//!  ┌──────┬───┬───┬────────┬──────────────┬───────────┬──────────┬──────────┬─────────┬────────────┬────────┐
//!  │ "OW" │ver│fl.│ crc32  │ end offset   │ time      │ lane id  │ lane no. │ body    │ [revision] │ body … │
//!  │      │ 1 │   │        │ u64          │ ms u64    │ u64      │ u64      │ len u32 │  u64       │        │
//!  └──────┴───┴───┴────────┴──────────────┴───────────┴──────────┴──────────┴─────────┴────────────┴────────┘
//! ```
//!
//! All integers are little-endian. The CRC-32 (IEEE) covers the record's sequence number (u64) and
//! bytes 8 to the end. So a record fails its check at any position other than its own. *End offset*
//! counts the bytes of all records up to and including this one since the store began, so a
//! backlog's size is one subtraction. Lane id is `u64::MAX` for an unpublished event. Bit 0 of the
//! flags says that a revision follows, because the event is of a stream. The revision is outside
//! the body, because the same event appended again has the same content whatever its revision.
//!
//! ```text
//! body: flags u16 │ id │ type t8 │ [stream t8] │ [key t8] │ [exchange t8, routing key t8] │ [content type t8] │ [subject t8] │
//!       [correlation id t8] │ [traceparent t8] │ [tracestate t16] │ [not before u64] │ [expires u64] │
//!       [version u32] │ [count u16, { name t8, kind u8, value }…] │ [properties] │ payload to the end
//! ```
//!
//! `t8` and `t16` are UTF-8 behind a length of one or two bytes. The id is 16 raw bytes if flag 0
//! is set (a UUID that the library gave), otherwise `t8`. Each `[…]` is there if its flag is set.
//! `values.rs` describes values and properties. Properties, and values other than text, i64,
//! boolean and bytes, came with format 5.
//!
//! **Invariant.** Decoding never panics, and takes memory only for what it has read, whatever the
//! bytes.

use super::checksum::checksum;
use super::values::{put_properties, put_value, read_properties, read_value};
use super::wire_bytes::{Malformed, Reader, put_text8, put_text16};
use crate::codec;
use crate::error::CorruptError;
use crate::event::{Destination, Event, Lane, RecordedEvent, uuid_text};
use crate::message::HeaderValue;
use crate::text::Text;

const MAGIC: [u8; 2] = *b"OW";
const VERSION: u8 = 1;
pub(super) const FRAME_BYTES: usize = 44;
pub(super) const CHECKED_FROM: usize = 8;
pub(super) const TIME_AT: usize = 16;
const NO_LANE: u64 = u64::MAX;
/// Frame flag: a revision follows.
pub(super) const REVISION: u8 = 1;
const REVISION_BYTES: usize = 8;

pub(super) const UUID: u16 = 1 << 0;
pub(super) const KEY: u16 = 1 << 1;
pub(super) const PUBLISHED: u16 = 1 << 2;
pub(super) const CONTENT_TYPE: u16 = 1 << 3;
pub(super) const SUBJECT: u16 = 1 << 4;
pub(super) const CORRELATION: u16 = 1 << 5;
pub(super) const TRACEPARENT: u16 = 1 << 6;
pub(super) const TRACESTATE: u16 = 1 << 7;
pub(super) const NOT_BEFORE: u16 = 1 << 8;
pub(super) const EXPIRES: u16 = 1 << 9;
pub(super) const HEADERS: u16 = 1 << 10;
pub(super) const STREAM: u16 = 1 << 11;
/// The payload's version is not 1.
pub(super) const EVENT_VERSION: u16 = 1 << 12;
/// AMQP properties that few events have.
pub(super) const PROPERTIES: u16 = 1 << 13;
pub(super) const KNOWN_FLAGS: u16 = (1 << 14) - 1;

/// The id in a record.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RecordId<'a> {
    /// An id that the library gave.
    Uuid([u8; 16]),
    /// An id that the application gave.
    Text(&'a str),
}

/// Writes the body of a valid event: its content, apart from where and when it was appended.
pub(crate) fn encode_body(event: &Event, id: RecordId<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(96 + event.payload.len());
    out.extend_from_slice(&flags(event, id).to_le_bytes());
    match id {
        RecordId::Uuid(bytes) => out.extend_from_slice(&bytes),
        RecordId::Text(text) => put_text8(&mut out, text),
    }
    put_text8(&mut out, &event.event_type);
    if let Some(stream) = &event.stream {
        put_text8(&mut out, stream);
    }
    if let Some(key) = &event.key {
        put_text8(&mut out, key);
    }
    if let Some(Destination::Exchange { exchange, routing_key }) = &event.destination {
        put_text8(&mut out, exchange);
        put_text8(&mut out, routing_key);
    }
    let texts = [&event.content_type, &event.subject, &event.correlation_id, &event.traceparent];
    texts.into_iter().flatten().for_each(|text| put_text8(&mut out, text));
    if let Some(text) = &event.tracestate {
        put_text16(&mut out, text);
    }
    for time in [event.not_before_ms, event.expires_ms].into_iter().flatten() {
        out.extend_from_slice(&time.to_le_bytes());
    }
    if event.version != 1 {
        out.extend_from_slice(&event.version.to_le_bytes());
    }
    if !event.headers.is_empty() {
        put_headers(&mut out, &event.headers);
    }
    if let Some(properties) = &event.properties {
        put_properties(&mut out, properties);
    }
    out.extend_from_slice(&event.payload);
    out
}

fn flags(event: &Event, id: RecordId<'_>) -> u16 {
    let published = matches!(event.destination, Some(Destination::Exchange { .. }));
    [
        (matches!(id, RecordId::Uuid(_)), UUID),
        (event.key.is_some(), KEY),
        (published, PUBLISHED),
        (event.content_type.is_some(), CONTENT_TYPE),
        (event.subject.is_some(), SUBJECT),
        (event.correlation_id.is_some(), CORRELATION),
        (event.traceparent.is_some(), TRACEPARENT),
        (event.tracestate.is_some(), TRACESTATE),
        (event.not_before_ms.is_some(), NOT_BEFORE),
        (event.expires_ms.is_some(), EXPIRES),
        (!event.headers.is_empty(), HEADERS),
        (event.stream.is_some(), STREAM),
        (event.version != 1, EVENT_VERSION),
        (event.properties.is_some(), PROPERTIES),
    ]
    .into_iter()
    .filter_map(|(set, flag)| set.then_some(flag))
    .fold(0, |flags, flag| flags | flag)
}

fn put_headers(out: &mut Vec<u8>, headers: &[(String, HeaderValue)]) {
    let count = u16::try_from(headers.len()).expect("validated: at most HEADERS_MAX");
    out.extend_from_slice(&count.to_le_bytes());
    for (name, value) in headers {
        put_text8(out, name);
        put_value(out, value);
    }
}

/// The place and time of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) seq: u64,
    /// The bytes of all records before this one.
    pub(crate) start_offset: u64,
    pub(crate) time_ms: u64,
    pub(crate) lane: Option<Lane>,
    /// The revision of an event of a stream.
    pub(crate) revision: Option<u64>,
}

impl Position {
    /// Returns the length of a record with this body at this position.
    fn frame_len(self, body: &[u8]) -> usize {
        let revision = if self.revision.is_some() { REVISION_BYTES } else { 0 };
        FRAME_BYTES + revision + body.len()
    }
}

/// Puts the frame around a body.
pub(crate) fn encode(position: Position, body: &[u8]) -> Vec<u8> {
    let out = framed(position, body);
    debug_assert!(decode(position.seq, &out).is_ok(), "what is written can be read");
    out
}

fn framed(position: Position, body: &[u8]) -> Vec<u8> {
    let body_len = u32::try_from(body.len()).expect("validated: a payload is at most PAYLOAD_BYTES_MAX");
    let (lane_id, lane_number) = position.lane.map_or((NO_LANE, 0), |lane| (lane.id, lane.number));
    let frame_len = position.frame_len(body);
    let flags = if position.revision.is_some() { REVISION } else { 0 };
    let mut out = Vec::with_capacity(frame_len);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[VERSION, flags, 0, 0, 0, 0]);
    out.extend_from_slice(&(position.start_offset + frame_len as u64).to_le_bytes());
    out.extend_from_slice(&position.time_ms.to_le_bytes());
    out.extend_from_slice(&lane_id.to_le_bytes());
    out.extend_from_slice(&lane_number.to_le_bytes());
    out.extend_from_slice(&body_len.to_le_bytes());
    if let Some(revision) = position.revision {
        out.extend_from_slice(&revision.to_le_bytes());
    }
    out.extend_from_slice(body);
    let crc = checksum(position.seq, out.get(CHECKED_FROM..).unwrap_or_default());
    if let Some(slot) = out.get_mut(4..CHECKED_FROM) {
        slot.copy_from_slice(&crc.to_le_bytes());
    }
    out
}

/// Returns the checksum of a body alone. It shows whether two events with one id have the same
/// content.
pub(crate) fn body_checksum(body: &[u8]) -> u32 {
    crc32fast::hash(body)
}

/// Checks a record and reads it.
pub(crate) fn decode(seq: u64, bytes: &[u8]) -> Result<RecordedEvent, CorruptError> {
    let corrupt = |what| CorruptError { seq, what };
    let (header, body) = check(seq, bytes)?;
    decode_body(header, body).map_err(|Malformed(what)| corrupt(what))
}

/// Checks a record and returns the offset at which it ends.
pub(crate) fn end_offset(seq: u64, bytes: &[u8]) -> Result<u64, CorruptError> {
    check(seq, bytes).map(|(header, _)| header.end_offset)
}

const NO_MAGIC: &str = "it does not begin with the record magic";

pub(super) struct Header {
    seq: u64,
    crc: u32,
    end_offset: u64,
    time_ms: u64,
    lane: Option<Lane>,
    pub(super) revision: Option<u64>,
}

/// Checks magic, version, checksum and lengths in this order, so that nothing unchecked is ever
/// believed.
#[inline]
pub(super) fn check(seq: u64, bytes: &[u8]) -> Result<(Header, &[u8]), CorruptError> {
    let corrupt = |what| CorruptError { seq, what };
    // One check of the length lets what follows be plain loads.
    let Some((frame, body)) = bytes.split_first_chunk::<FRAME_BYTES>() else {
        return Err(corrupt(if MAGIC.starts_with(bytes) || bytes.starts_with(&MAGIC) {
            "it ends too early"
        } else {
            NO_MAGIC
        }));
    };
    let &[magic_0, magic_1, version, flags, ..] = frame;
    if [magic_0, magic_1] != MAGIC {
        return Err(corrupt(NO_MAGIC));
    }
    if version != VERSION {
        return Err(corrupt("its record version is unknown"));
    }
    if flags & !REVISION != 0 {
        return Err(corrupt("its frame has a flag that is unknown"));
    }
    let crc = le_u32(frame, 4);
    if crc != checksum(seq, bytes.get(CHECKED_FROM..).unwrap_or_default()) {
        return Err(corrupt("its checksum does not match"));
    }
    let (end_offset, time_ms) = (le_u64(frame, 8), le_u64(frame, TIME_AT));
    let (id, number) = (le_u64(frame, 24), le_u64(frame, 32));
    let lane = (id != NO_LANE).then_some(Lane { id, number });
    let body_len = le_u32(frame, 40);
    let (revision, body) = if flags & REVISION == 0 {
        (None, body)
    } else {
        let (revision, body) = body.split_first_chunk().ok_or_else(|| corrupt("it ends too early"))?;
        (Some(u64::from_le_bytes(*revision)), body)
    };
    if usize::try_from(body_len) != Ok(body.len()) {
        return Err(corrupt("its length does not match"));
    }
    Ok((Header { seq, crc, end_offset, time_ms, lane, revision }, body))
}

#[inline]
pub(super) fn le_u64(frame: &[u8; FRAME_BYTES], at: usize) -> u64 {
    let bytes = frame.get(at..).and_then(|rest| rest.first_chunk());
    u64::from_le_bytes(*bytes.expect("every field lies in the frame"))
}

#[inline]
fn le_u32(frame: &[u8; FRAME_BYTES], at: usize) -> u32 {
    let bytes = frame.get(at..).and_then(|rest| rest.first_chunk());
    u32::from_le_bytes(*bytes.expect("every field lies in the frame"))
}

fn decode_body(header: Header, body: &[u8]) -> Result<RecordedEvent, Malformed> {
    let mut reader = Reader(body);
    let flags = reader.u16()?;
    if flags & !KNOWN_FLAGS != 0 {
        return Err(Malformed("it has a flag that is unknown"));
    }
    let has = |flag| flags & flag != 0;
    let id = if has(UUID) {
        (uuid_text(reader.bytes16()?), None)
    } else {
        let text = Text::from(reader.text8()?);
        (text.clone(), Some(text))
    };
    let event_type = reader.text8()?.into();
    let mut optional8 = |flag| has(flag).then(|| reader.text8()).transpose();
    let stream = optional8(STREAM)?.map(str::to_owned);
    if stream.is_some() != header.revision.is_some() {
        return Err(Malformed("it has a stream without a revision, or the other way round"));
    }
    let key = optional8(KEY)?.map(Text::from);
    let (exchange, routing_key) = (optional8(PUBLISHED)?, optional8(PUBLISHED)?);
    let destination = match (exchange, routing_key) {
        (Some(exchange), Some(routing_key)) => Destination::exchange(exchange, routing_key),
        _ => Destination::Unpublished,
    };
    let content_type = optional8(CONTENT_TYPE)?.map(content_type);
    let subject = optional8(SUBJECT)?.map(Text::from);
    let correlation_id = optional8(CORRELATION)?.map(Text::from);
    let traceparent = optional8(TRACEPARENT)?.map(Text::from);
    let tracestate = has(TRACESTATE).then(|| reader.text16()).transpose()?.map(Text::from);
    let not_before_ms = has(NOT_BEFORE).then(|| reader.u64()).transpose()?;
    let expires_ms = has(EXPIRES).then(|| reader.u64()).transpose()?;
    let version = has(EVENT_VERSION).then(|| reader.u32()).transpose()?.unwrap_or(1);
    let headers = if has(HEADERS) { read_headers(&mut reader)? } else { Vec::new() };
    let properties = has(PROPERTIES).then(|| read_properties(&mut reader).map(Box::new)).transpose()?;
    let event = Event {
        id: id.1,
        event_type,
        stream,
        key,
        destination: Some(destination),
        content_type,
        subject,
        correlation_id,
        traceparent,
        tracestate,
        not_before_ms,
        expires_ms,
        version,
        headers,
        properties,
        payload: reader.0.to_vec(),
    };
    Ok(RecordedEvent {
        seq: header.seq,
        time_ms: header.time_ms,
        end_offset: header.end_offset,
        lane: header.lane,
        revision: header.revision,
        id: id.0,
        crc: header.crc,
        event,
    })
}

/// The content types of nearly every event.
fn content_type(text: &str) -> Text {
    let known = [codec::JSON, codec::BINCODE, codec::BYTES].into_iter().find(|known| *known == text);
    known.map_or_else(|| text.into(), Text::from_static)
}

pub(super) fn read_headers(reader: &mut Reader<'_>) -> Result<Vec<(String, HeaderValue)>, Malformed> {
    let count = usize::from(reader.u16()?);
    // Each header takes at least three bytes, so a corrupt count cannot ask for more than the
    // record holds.
    let mut headers = Vec::with_capacity(count.min(reader.0.len() / 3));
    for _ in 0..count {
        let name = reader.text8()?.to_owned();
        headers.push((name, read_value(reader)?));
    }
    Ok(headers)
}

/// Reads a body of any bytes in both ways. They must agree on the parts that both check.
#[cfg(any(test, fuzzing))]
fn read_both_ways(body: &[u8], revision: Option<u64>) {
    use crate::log::view::view;
    let position = Position { seq: 5, start_offset: 0, time_ms: 17, lane: None, revision };
    let frame = framed(position, body);
    match (decode(5, &frame), view(5, &frame)) {
        (Ok(decoded), Ok(viewed)) => {
            assert_eq!(viewed.seq, decoded.seq);
            assert_eq!(viewed.time_ms(&frame), decoded.time_ms);
            assert_eq!(viewed.revision(&frame), decoded.revision);
            assert_eq!(viewed.version, decoded.event.version);
            assert_eq!(viewed.event_type(&frame), decoded.event_type());
            assert_eq!((viewed.stream(&frame), viewed.key(&frame)), (decoded.stream(), decoded.key()));
            assert_eq!(viewed.payload(&frame), decoded.payload());
        }
        // The view does not check texts that it does not show.
        (Err(error), Ok(_)) => assert_eq!(error.what, "a text in it is not UTF-8"),
        (decoded, viewed) => assert!(decoded.is_err(), "{:?}", viewed.err()),
    }
}

/// Ways in for the fuzz targets.
#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    pub(crate) fn record(seq: u64, bytes: &[u8]) {
        let _ = (super::decode(seq, bytes), crate::log::view::view(seq, bytes));
    }

    pub(crate) fn body(body: &[u8]) {
        [None, Some(0)].into_iter().for_each(|revision| super::read_both_ways(body, revision));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::log::values::samples::{any_properties, any_value};
    use crate::log::view::view;

    fn position(seq: u64) -> Position {
        Position {
            seq,
            start_offset: 1000,
            time_ms: 17,
            lane: Some(Lane { id: 3, number: 9 }),
            revision: None,
        }
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let text = || proptest::option::of("[a-zäß0-9]{1,40}".prop_map(Text::from));
        let times = (proptest::option::of(0..1000u64), proptest::option::of(1000..2000u64));
        (
            (text(), "[a-z.]{1,60}", text(), proptest::option::of(("[a-z]{0,20}", "[a-z]{0,20}"))),
            (text(), text(), text(), text(), text()),
            (times, text(), prop_oneof![Just(1), any::<u32>()]),
            (proptest::collection::vec(any_value(), 0..5), prop::option::of(any_properties())),
            proptest::collection::vec(any::<u8>(), 0..200),
        )
            .prop_map(|(first, second, (times, stream, version), (values, properties), payload)| {
                let (id, event_type, key, to) = first;
                let mut event = Event::bytes(event_type, payload);
                event.destination = Some(to.map_or(Destination::Unpublished, |(exchange, routing_key)| {
                    Destination::Exchange { exchange, routing_key }
                }));
                (event.id, event.key, event.stream) = (id, key, stream.map(String::from));
                (
                    event.content_type,
                    event.subject,
                    event.correlation_id,
                    event.traceparent,
                    event.tracestate,
                ) = second;
                (event.not_before_ms, event.expires_ms) = times;
                event.version = version;
                event.properties = properties.map(Box::new);
                event.headers = values.into_iter().enumerate().map(|(i, v)| (format!("h{i}"), v)).collect();
                event
            })
    }

    /// Goal: files of format 4 stay readable, and their events keep their content. An event without
    /// newer parts is recorded as before. Method: the bytes, by hand.
    #[test]
    fn an_event_without_newer_parts_is_recorded_as_ever() {
        let event = Event::bytes("t", "p").key("k").to("e", "r").header("h", 7).header("x", vec![9]);
        let mut bytes =
            [&[0x0f, 0x04][..], &[7; 16], b"\x01t\x01k\x01e\x01r\x18application/octet-stream"].concat();
        bytes.extend_from_slice(b"\x02\0\x01h\x01\x07\0\0\0\0\0\0\0\x01x\x03\x01\0\0\0\x09p");
        assert_eq!(encode_body(&event, RecordId::Uuid([7; 16])), bytes);
    }

    proptest! {
        /// Goal: a record is read as it was written, at its own position and at no other.
        #[test]
        fn round_trip(event in any_event(), seq in any::<u64>(), other in any::<u64>()) {
            let id = event.id.as_deref().map_or(RecordId::Uuid([7; 16]), RecordId::Text);
            let revision = event.stream.as_ref().map(|_| seq / 2);
            let bytes = encode(Position { revision, ..position(seq) }, &encode_body(&event, id));
            let back = decode(seq, &bytes).unwrap();
            prop_assert_eq!(&back.event, &event);
            prop_assert_eq!(back.revision, revision);
            prop_assert!(view(seq, &bytes).is_ok());
            read_both_ways(&encode_body(&event, id), revision);
            prop_assert_eq!(back.lane, Some(Lane { id: 3, number: 9 }));
            prop_assert_eq!(back.end_offset, 1000 + bytes.len() as u64);
            if other != seq {
                prop_assert!(decode(other, &bytes).is_err());
            }
        }

        /// Goal: no single changed byte goes unnoticed.
        #[test]
        fn a_flipped_byte_is_noticed(event in any_event(), at in any::<prop::sample::Index>(), flip in 1..=255u8) {
            let revision = event.stream.as_ref().map(|_| 3);
            let position = Position { revision, ..position(5) };
            let mut bytes = encode(position, &encode_body(&event, RecordId::Uuid([7; 16])));
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(5, &bytes).is_err());
        }

        /// Goal: decoding ends without a panic for any bytes, also with a right checksum.
        #[test]
        fn hostile_bytes_do_not_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(0, &body).is_err() && view(0, &body).is_err());
            [None, Some(3)].into_iter().for_each(|revision| read_both_ways(&body, revision));
        }
    }
}
