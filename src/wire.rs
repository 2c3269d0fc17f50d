//! Turns a recorded event into the message on the wire, and reads the message's headers back.
//!
//! | on the wire | from |
//! |---|---|
//! | `message_id`, CloudEvents `id` | the event's id |
//! | `type`, CloudEvents `type` | the event's type |
//! | `content_type` | the payload's content type |
//! | `timestamp` (seconds), CloudEvents `time` (RFC 3339) | the time of its append |
//! | `correlation_id` | the event |
//! | `app_id` | the event, else the relay's setting |
//! | `content_encoding`, `priority`, `reply_to`, `expiration`, `user_id`, `cluster_id` | the event |
//! | `delivery_mode` | 2; 1 for an event that is transient |
//! | CloudEvents `source`, `specversion`, `subject` | the relay's setting, `1.0`, the event |
//! | CloudEvents `partitionkey` | the event's key |
//! | CloudEvents `sequence` | the sequence number, 20 digits, so that text order is number order |
//! | `traceparent`, `tracestate` | the event |
//! | `onewrite-store`, `onewrite-epoch` | the store that numbered the lanes, and its epoch |
//! | `onewrite-lane`, `onewrite-lane-number` | the event's lane and its gapless number there |
//! | `onewrite-crc` | the record's checksum |
//! | `onewrite-signature` | the proof of its producer, if the relay signs |
//! | `onewrite-version` | the version of the payload, if it is not 1 |
//! | `onewrite-resend` | `true`, if the message may have been published before |
//!
//! The application's own headers follow.

#[cfg(feature = "json")]
mod cloud_event;
mod content;
#[cfg(fuzzing)]
mod fuzzing;
mod signed;

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use crate::error::{Error, Result};
use crate::event::{LaneOf, RecordedEvent, uuid_from_text};
use crate::message::{HeaderValue, Message};
use crate::text::Text;
use crate::time::{as_ms, wall_time};

#[cfg(feature = "json")]
pub use self::cloud_event::CloudEvent;
pub(crate) use self::content::ContentKey;
#[cfg(fuzzing)]
pub(crate) use self::fuzzing::message as fuzzing;
pub use self::signed::{ProducerKeys, SIGNATURE, SigningKey};

/// The spelling of the CloudEvents attributes as AMQP headers.
///
/// ```
/// use onewrite::HeaderSpelling;
/// assert_eq!(HeaderSpelling::Underscore.prefix(), "cloudEvents_");
/// assert_eq!(HeaderSpelling::Colon.prefix(), "cloudEvents:");
/// assert_eq!(HeaderSpelling::Dash.prefix(), "ce-");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum HeaderSpelling {
    /// `cloudEvents_id`, the default. The binding recommends it since 1.0.1, and brokers' filters
    /// can name it.
    #[default]
    Underscore,
    /// `cloudEvents:id`: the binding's first spelling.
    Colon,
    /// `ce-id`: as over HTTP.
    Dash,
}

/// An attribute's name in each spelling, so that no message allocates a name.
macro_rules! spelt {
    ($attribute:literal) => {
        [concat!("cloudEvents_", $attribute), concat!("cloudEvents:", $attribute), concat!("ce-", $attribute)]
    };
}

type Spelt = [&'static str; 3];

const PARTITION_KEY: Spelt = spelt!("partitionkey");
const TIME: Spelt = spelt!("time");

impl HeaderSpelling {
    /// Returns the prefix of an attribute's name.
    ///
    /// ```
    /// assert_eq!(onewrite::HeaderSpelling::default().prefix(), "cloudEvents_");
    /// ```
    #[must_use]
    pub fn prefix(self) -> &'static str {
        self.of(spelt!(""))
    }

    fn of(self, [underscore, colon, dash]: Spelt) -> &'static str {
        match self {
            Self::Underscore => underscore,
            Self::Colon => colon,
            Self::Dash => dash,
        }
    }

    /// All spellings, for readers.
    pub(crate) const ALL: [Self; 3] = [Self::Underscore, Self::Colon, Self::Dash];
}

/// Header: the store that numbered the lanes.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let header = message.header(onewrite::wire::STORE);
/// assert_eq!(header.and_then(|value| value.as_text()).map(str::len), Some(36)); // a UUID
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const STORE: &str = "onewrite-store";

/// The header of a delivery that says which parts came in changed form. Such parts are a header
/// name or a property that was not UTF-8, and tables that were nested too deep.
///
/// The handler gets the delivery all the same. The receiving side adds the header; no producer can
/// set it.
///
/// ```
/// use onewrite::{HeaderValue, Message, wire};
/// let note = HeaderValue::from("its user_id `\\xff` is not UTF-8");
/// let message = Message { headers: vec![(wire::MENDED.into(), note)], ..Message::default() };
/// assert!(message.header(wire::MENDED).is_some());
/// ```
pub const MENDED: &str = "onewrite-mended";

/// The header of a delivery that says why the delivery is unreadable. A message id, type or routing
/// key was not UTF-8, the headers were unreadable or did not fit into a frame, or the body was too
/// large.
///
/// A consumer rejects the delivery ([`Error::Unreadable`]). The receiving side adds the header; no
/// producer can set it.
///
/// ```
/// use onewrite::{Error, HeaderValue, Message, wire};
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let note = HeaderValue::from("its message_id `\\xff` is not UTF-8");
/// let message = Message { headers: vec![(wire::UNREADABLE.into(), note)], ..Message::default() };
/// let tx = store.begin()?;
/// assert!(matches!(tx.first_delivery("credit", &message), Err(Error::Unreadable { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const UNREADABLE: &str = "onewrite-unreadable";
/// Header: the store's epoch at the append. The epoch rises when lane numbers begin anew.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let header = message.header(onewrite::wire::EPOCH);
/// assert!(header.and_then(|value| value.as_int()).is_some());
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const EPOCH: &str = "onewrite-epoch";
/// Header: the event's lane.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let header = message.header(onewrite::wire::LANE);
/// assert_eq!(header.and_then(|value| value.as_int()), Some(0)); // the sequence number of its first event
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const LANE: &str = "onewrite-lane";
/// Header: the event's number in its lane.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let header = message.header(onewrite::wire::LANE_NUMBER);
/// assert_eq!(header.and_then(|value| value.as_int()), Some(0)); // the first of its lane
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const LANE_NUMBER: &str = "onewrite-lane-number";
/// Header: the checksum of the event's record (CRC-32, IEEE).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let header = message.header(onewrite::wire::CRC);
/// assert!(header.and_then(|value| value.as_int()).is_some());
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const CRC: &str = "onewrite-crc";
/// Header: the version of the payload, if it is not 1.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::builder().event_version("paid", 2).open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1 EUR").version(2).to("", "payments")))?
///     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message;
/// assert_eq!(message.header(onewrite::wire::VERSION).and_then(|value| value.as_int()), Some(2));
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const VERSION: &str = "onewrite-version";
/// Header: the message may have been published before.
///
/// An earlier copy without this header may still arrive later: a half-open link delivers what it
/// held once it recovers.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let header = message.header(onewrite::wire::RESEND);
/// assert!(header.is_none()); // published once only
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const RESEND: &str = "onewrite-resend";

/// The `delivery_mode` values.
const TRANSIENT: u8 = 1;
pub(crate) const PERSISTENT: u8 = 2;

/// The settings that a relay adds to every message.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    pub(crate) spelling: HeaderSpelling,
    pub(crate) source: Text,
    pub(crate) app_id: Option<Text>,
    pub(crate) store: Text,
    /// The sequence number at which each epoch after the first begins.
    pub(crate) epoch_starts: Vec<u64>,
    /// A second, and a time in that second in text form.
    pub(crate) second: Option<(u64, [u8; 24])>,
    pub(crate) signing: Option<SigningKey>,
}

type Header = (Cow<'static, str>, HeaderValue);

/// The last millisecond of the year 9999, because RFC 3339 has four digits for the year. No clock
/// reaches it, but a forged file may.
const LATEST_MS: u64 = 253_402_300_799_999;

impl Wire {
    /// Returns the message of an event that, as far as is known, has not been published before. The
    /// library's headers are in the order of their names, as on the wire, so a table of them needs
    /// no sorting.
    pub(crate) fn message(&mut self, recorded: RecordedEvent) -> Message {
        let mut headers = Vec::with_capacity(14 + recorded.event.headers.len());
        let time = self.time(recorded.time_ms);
        self.cloud_events(&recorded, time, &mut headers);
        self.ours(&recorded, &mut headers);
        let event = recorded.event;
        let properties = event.properties.map(|properties| *properties).unwrap_or_default();
        for (name, value) in [("traceparent", event.traceparent), ("tracestate", event.tracestate)] {
            if let Some(value) = value {
                headers.push((name.into(), HeaderValue::Text(value)));
            }
        }
        headers.extend(event.headers.into_iter().map(|(name, value)| (name.into(), value)));
        let message = Message {
            message_id: Some(recorded.id),
            event_type: Some(event.event_type),
            content_type: event.content_type,
            content_encoding: properties.content_encoding,
            delivery_mode: Some(if properties.transient { TRANSIENT } else { PERSISTENT }),
            priority: properties.priority,
            correlation_id: event.correlation_id,
            reply_to: properties.reply_to,
            expiration: properties.expiration_ms.map(|ms| ms.to_string().into()),
            user_id: properties.user_id,
            app_id: properties.app_id.or_else(|| self.app_id.clone()),
            cluster_id: properties.cluster_id,
            timestamp_s: Some(recorded.time_ms / 1000),
            headers,
            payload: event.payload,
        };
        self.signed(message)
    }

    /// Adds the producer's signature in its place among the headers.
    fn signed(&self, mut message: Message) -> Message {
        if let Some(key) = &self.signing {
            let signature = key.sign(&message);
            let at = message.headers.iter().position(|(name, _)| name == STORE).unwrap_or_default();
            message.headers.insert(at, (SIGNATURE.into(), signature));
        }
        message
    }

    /// Returns the time in RFC 3339, with milliseconds. The part before the milliseconds is
    /// formatted only when the second changes.
    fn time(&mut self, time_ms: u64) -> Text {
        let time_ms = time_ms.min(LATEST_MS);
        let second = time_ms / 1000;
        if self.second.is_none_or(|(known, _)| known != second) {
            let time = humantime::format_rfc3339_millis(wall_time(time_ms)).to_string();
            self.second = time.as_bytes().try_into().ok().map(|digits| (second, digits));
        }
        let (_, mut digits) = self.second.expect("as long until the year 9999, the last that can be written");
        let [.., hundreds, tens, ones, _] = &mut digits;
        let digit = |of: u64| b'0' + (time_ms / of % 10) as u8;
        (*hundreds, *tens, *ones) = (digit(100), digit(10), digit(1));
        str::from_utf8(&digits).expect("a time is ASCII").into()
    }

    fn cloud_events(&self, recorded: &RecordedEvent, time: Text, headers: &mut Vec<Header>) {
        let mut put = |name: Spelt, value: Text| {
            headers.push((self.spelling.of(name).into(), HeaderValue::Text(value)));
        };
        put(spelt!("id"), recorded.id.clone());
        if let Some(key) = &recorded.event.key {
            put(PARTITION_KEY, key.clone());
        }
        put(spelt!("sequence"), twenty_digits(recorded.seq));
        put(spelt!("source"), self.source.clone());
        put(spelt!("specversion"), Text::from_static("1.0"));
        if let Some(subject) = &recorded.event.subject {
            put(spelt!("subject"), subject.clone());
        }
        put(TIME, time);
        put(spelt!("type"), recorded.event.event_type.clone());
    }

    fn ours(&self, recorded: &RecordedEvent, headers: &mut Vec<Header>) {
        let int = |number: u64| HeaderValue::Int(number.cast_signed());
        headers.push((CRC.into(), HeaderValue::Int(i64::from(recorded.crc))));
        let epoch = 1 + self.epoch_starts.iter().filter(|start| **start <= recorded.seq).count() as u64;
        headers.push((EPOCH.into(), int(epoch)));
        if let Some(lane) = recorded.lane {
            headers.push((LANE.into(), int(lane.id)));
            headers.push((LANE_NUMBER.into(), int(lane.number)));
        }
        headers.push((STORE.into(), HeaderValue::Text(self.store.clone())));
        if recorded.event.version != 1 {
            headers.push((VERSION.into(), HeaderValue::Int(i64::from(recorded.event.version))));
        }
    }
}

/// Formats a number as `{:020}` does, digit by digit, without the overhead of the formatter.
fn twenty_digits(mut number: u64) -> Text {
    let mut digits = [b'0'; 20];
    for digit in digits.iter_mut().rev() {
        *digit += (number % 10) as u8;
        number /= 10;
    }
    str::from_utf8(&digits).expect("digits are ASCII").into()
}

/// Returns the same message, marked as possibly published before.
pub(crate) fn resend(message: &Message) -> Message {
    let mut message = message.clone();
    message.headers.push((RESEND.into(), HeaderValue::Bool(true)));
    message
}

/// Returns the ordering key of a message, in any spelling.
pub(crate) fn ordering_key(message: &Message) -> Option<&str> {
    cloud_event(message, PARTITION_KEY)
}

fn cloud_event(message: &Message, name: Spelt) -> Option<&str> {
    HeaderSpelling::ALL.iter().find_map(|spelling| message.header(spelling.of(name))?.as_text())
}

/// Returns the earliest and the latest possible time of the event's append, in Unix milliseconds.
/// The AMQP timestamp has whole seconds only.
pub(crate) fn time_ms(message: &Message) -> Option<(u64, u64)> {
    let exact = cloud_event(message, TIME).and_then(|time| humantime::parse_rfc3339(time).ok());
    match exact.and_then(|time| time.duration_since(UNIX_EPOCH).ok()) {
        Some(since) => Some((as_ms(since), as_ms(since))),
        None => message.timestamp_s.map(|seconds| {
            let ms = seconds.saturating_mul(1000);
            (ms, ms.saturating_add(999))
        }),
    }
}

/// Returns the lane of the store that produced the message, and the message's number in that lane.
/// A foreign message and an event without a lane give `None`.
///
/// # Errors
/// [`Error::LaneHeader`] if some of the headers are missing, come twice, or are not in this
/// library's form. Such a message cannot be distinguished from a repeat, nor taken for a foreign
/// message.
pub(crate) fn lane_of(message: &Message) -> Result<Option<(LaneOf, u64)>> {
    let all = [one(message, STORE)?, one(message, EPOCH)?, one(message, LANE)?, one(message, LANE_NUMBER)?];
    let [store, epoch, lane, number] = all;
    // A relay's rule can publish an event that was recorded as unpublished and has no lane. Its
    // message names the store and no lane.
    if lane.is_none() && number.is_none() {
        return Ok(None);
    }
    let store = store.map(|store| store.as_text().and_then(uuid_from_text));
    let store = needed(STORE, store, "is not the UUID of a store")?;
    let int = |name, value: Option<&HeaderValue>| {
        let int = value.map(|value| value.as_int().and_then(|int| u64::try_from(int).ok()));
        needed(name, int, "is not a number from 0 on")
    };
    let lane = LaneOf { store, epoch: int(EPOCH, epoch)?, id: int(LANE, lane)? };
    Ok(Some((lane, int(LANE_NUMBER, number)?)))
}

fn needed<T>(header: &'static str, value: Option<Option<T>>, otherwise: &'static str) -> Result<T> {
    let problem = if value.is_some() { otherwise } else { "is missing, while others of its kind are there" };
    value.flatten().ok_or(Error::LaneHeader { header, problem })
}

fn one<'a>(message: &'a Message, header: &'static str) -> Result<Option<&'a HeaderValue>> {
    let mut values = message.headers.iter().filter(|(name, _)| name == header).map(|(_, value)| value);
    let first = values.next();
    if values.next().is_some() {
        return Err(Error::LaneHeader { header, problem: "is given twice" });
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    fn recorded() -> RecordedEvent {
        let event = Event::bytes("payment.completed", b"100".to_vec())
            .key("alice")
            .to("payments", "done")
            .subject("transfer-1")
            .correlation_id("c-1")
            .trace("00-aa-bb-01", Some("x=y".into()))
            .header("region", "eu");
        RecordedEvent {
            seq: 42,
            time_ms: 1_700_000_000_123,
            end_offset: 100,
            lane: Some(crate::event::Lane { id: 2, number: 7 }),
            revision: None,
            id: "e-1".into(),
            crc: 9,
            event,
        }
    }

    /// Goal: a message has the wire form of design §6, in each of its three spellings.
    #[test]
    fn carries_what_it_should() {
        for (spelling, prefix) in HeaderSpelling::ALL.into_iter().zip(["cloudEvents_", "cloudEvents:", "ce-"])
        {
            let mut wire = Wire {
                spelling,
                source: "/bank".into(),
                app_id: Some("bank".into()),
                store: "s".into(),
                epoch_starts: vec![7, 42],
                second: None,
                signing: None,
            };
            let message = wire.message(recorded());
            assert_eq!(message.message_id.as_deref(), Some("e-1"));
            assert_eq!(message.event_type.as_deref(), Some("payment.completed"));
            assert_eq!(message.timestamp_s, Some(1_700_000_000));
            assert_eq!(message.payload, b"100");
            let attributes = [
                ("id", "e-1"),
                ("source", "/bank"),
                ("type", "payment.completed"),
                ("specversion", "1.0"),
                ("time", "2023-11-14T22:13:20.123Z"),
                ("subject", "transfer-1"),
                ("partitionkey", "alice"),
                ("sequence", "00000000000000000042"),
            ];
            for (name, value) in attributes {
                let header = message.header(&format!("{prefix}{name}"));
                assert_eq!(header.and_then(HeaderValue::as_text), Some(value), "{name}");
            }
            for (name, value) in [(EPOCH, 3), (LANE, 2), (LANE_NUMBER, 7)] {
                assert_eq!(message.header(name).and_then(HeaderValue::as_int), Some(value), "{name}");
            }
            assert_eq!(message.header("traceparent").and_then(HeaderValue::as_text), Some("00-aa-bb-01"));
            assert_eq!(message.header("region").and_then(HeaderValue::as_text), Some("eu"));
            let names: Vec<_> =
                message.headers.iter().map(|(name, _)| name).take_while(|name| *name != "region").collect();
            assert!(names.len() == 15 && names.is_sorted(), "nothing is left to sort: {names:?}");
            assert_eq!(message.header(RESEND), None);
            assert_eq!(resend(&message).header(RESEND), Some(&HeaderValue::Bool(true)));
            assert_eq!(ordering_key(&message), Some("alice"));
        }
    }

    #[test]
    fn digits_are_the_formatters() {
        for number in [0, 9, 10, 1_000_000_007, u64::MAX] {
            assert_eq!(twenty_digits(number), format!("{number:020}").as_str());
        }
    }

    /// Goal: each event has its own time, though the second is formatted once. Method: the same
    /// time, others of its second, another second, and the first again.
    #[test]
    fn the_time_is_the_events() {
        let mut wire = wire(UUID);
        for time_ms in [0, 0, 999, 1_700_000_000_123, 1_700_000_000_007, 1_700_000_001_000, 1] {
            let message = wire.message(RecordedEvent { time_ms, ..recorded() });
            assert_eq!(super::time_ms(&message), Some((time_ms, time_ms)));
        }
        for time_ms in [LATEST_MS, LATEST_MS + 1, u64::MAX] {
            let message = wire.message(RecordedEvent { time_ms, ..recorded() });
            let time = message.header("cloudEvents_time").and_then(HeaderValue::as_text);
            assert_eq!(time, Some("9999-12-31T23:59:59.999Z"));
        }
    }

    fn wire(store: &str) -> Wire {
        let spelling = HeaderSpelling::default();
        Wire {
            spelling,
            source: "/bank".into(),
            app_id: None,
            store: store.into(),
            epoch_starts: vec![7, 42],
            second: None,
            signing: None,
        }
    }

    const UUID: &str = "018f0000-0000-7000-8000-0000000000ff";

    /// Goal: the lane that was written is read back.
    #[test]
    fn a_lane_is_read_back() {
        let message = wire(UUID).message(recorded());
        let store = uuid_from_text(UUID).unwrap();
        assert_eq!(lane_of(&message).unwrap(), Some((LaneOf { store, epoch: 3, id: 2 }, 7)));
        assert_eq!(time_ms(&message), Some((1_700_000_000_123, 1_700_000_000_123)));
        let coarse = Message { headers: Vec::new(), ..message };
        assert_eq!(lane_of(&coarse).unwrap(), None);
        assert_eq!(time_ms(&coarse), Some((1_700_000_000_000, 1_700_000_000_999)));
        assert_eq!(time_ms(&Message::default()), None);
    }

    /// Goal: each way in which a lane's headers can be wrong is an error that names the header.
    /// Method: one wrong thing at a time in a good message.
    #[test]
    fn lane_headers_by_half_are_named() {
        let good = wire(UUID).message(recorded());
        let array = HeaderValue::Array(vec![1.into()]);
        let wrong: [HeaderValue; 7] = [
            "x".into(),
            true.into(),
            (-1).into(),
            vec![1_u8].into(),
            HeaderValue::Double(1.0),
            HeaderValue::Timestamp(1),
            array,
        ];
        for name in [STORE, EPOCH, LANE, LANE_NUMBER] {
            let refused = |message: &Message| match lane_of(message) {
                Err(Error::LaneHeader { header, problem }) => {
                    assert_eq!(header, name);
                    problem
                }
                other => panic!("{name}: {other:?}"),
            };
            let mut missing = good.clone();
            missing.headers.retain(|(header, _)| header != name);
            assert_eq!(refused(&missing), "is missing, while others of its kind are there");
            let mut twice = good.clone();
            twice.headers.push((name.into(), good.header(name).unwrap().clone()));
            assert_eq!(refused(&twice), "is given twice");
            for value in &wrong {
                let mut other = good.clone();
                other
                    .headers
                    .iter_mut()
                    .filter(|(header, _)| header == name)
                    .for_each(|at| at.1 = value.clone());
                assert!(refused(&other).starts_with("is not "));
            }
        }
        let mut without = good.clone();
        without.headers.retain(|(header, _)| header != LANE && header != LANE_NUMBER);
        assert_eq!(lane_of(&without).unwrap(), None, "published after the fact");
        for other in ["018f00000000700080000000000000ff", "{018f0000-0000-7000-8000-0000000000ff}"] {
            assert!(
                lane_of(&wire(other).message(recorded())).is_err(),
                "{other}: one store has one spelling"
            );
        }
    }
}
