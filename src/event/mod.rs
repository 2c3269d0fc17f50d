//! The events that an application appends and reads back.
//!
//! Append checks an [`Event`] against AMQP 0-9-1 and the store's limits. So the caller learns at
//! append what the broker would refuse at publication.

mod destination;
mod ids;
mod lane;
mod properties;
mod recorded;

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::codec;
use crate::error::{EventError, SettingError};
use crate::limits::{HEADERS_BYTES_MAX, HEADERS_MAX, KEY_BYTES_MAX, SHORT_STRING_BYTES_MAX};
use crate::message::HeaderValue;
use crate::text::Text;
use crate::time::as_ms;

use self::properties::HeaderCheck;

pub use self::properties::Properties;

pub use self::destination::Destination;
pub(crate) use self::ids::{fresh_secret, fresh_uuid, fresh_uuid_text, uuid_from_text, uuid_text};
pub use self::lane::Lane;
pub(crate) use self::lane::LaneOf;
pub use self::recorded::RecordedEvent;
pub(crate) use self::recorded::category_of;

/// Header names that the library writes itself, or that RabbitMQ treats specially.
const RESERVED_NAMES: [&str; 4] = ["traceparent", "tracestate", "CC", "BCC"];
/// Prefixes of reserved names: CloudEvents in its three spellings, and our own.
const RESERVED_PREFIXES: [&str; 4] = ["cloudEvents_", "cloudEvents:", "ce-", "onewrite-"];

impl Destination {
    /// Makes a destination of this exchange and routing key.
    ///
    /// ```
    /// use onewrite::Destination;
    /// let there = Destination::exchange("payments", "payment.completed");
    /// assert!(matches!(there, Destination::Exchange { exchange, .. } if exchange == "payments"));
    /// ```
    pub fn exchange(exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        Self::Exchange { exchange: exchange.into(), routing_key: routing_key.into() }
    }

    /// Makes a destination of this queue, over AMQP's default exchange.
    ///
    /// ```
    /// use onewrite::Destination;
    /// assert_eq!(Destination::queue("payments"), Destination::exchange("", "payments"));
    /// ```
    #[must_use]
    pub fn queue(queue: impl Into<String>) -> Self {
        Self::exchange("", queue)
    }
}

/// An event to append: a type, a payload, a destination, and optionally a key, an id, headers and
/// times.
///
/// | part | limit | default |
/// |---|---|---|
/// | type, exchange, routing key, content type, id, correlation id, subject, header names | 255 bytes each | |
/// | key | 255 bytes | none: not ordered |
/// | headers | 128, 64 KiB together; 4,096 values, 16 levels deep | none |
/// | further AMQP properties, see [`Properties`] | 255 bytes each | none |
/// | payload | the store's cap, 1 MiB unless set | |
/// | id | | a UUIDv7, given at append |
///
/// ```
/// use onewrite::Event;
/// let event = Event::bytes("payment.completed", b"100".to_vec())
///     .key("alice")
///     .to("payments", "payment.completed")
///     .header("region", "eu");
/// assert!(event.validate().is_ok());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Event {
    pub(crate) id: Option<Text>,
    pub(crate) event_type: Text,
    /// The stream sets it at append.
    pub(crate) stream: Option<String>,
    pub(crate) key: Option<Text>,
    pub(crate) destination: Option<Destination>,
    pub(crate) content_type: Option<Text>,
    pub(crate) subject: Option<Text>,
    pub(crate) correlation_id: Option<Text>,
    pub(crate) traceparent: Option<Text>,
    pub(crate) tracestate: Option<Text>,
    pub(crate) not_before_ms: Option<u64>,
    pub(crate) expires_ms: Option<u64>,
    /// The version of the payload's form.
    pub(crate) version: u32,
    pub(crate) headers: Vec<(String, HeaderValue)>,
    /// Boxed, because few events have any.
    pub(crate) properties: Option<Box<Properties>>,
    pub(crate) payload: Vec<u8>,
}

impl Event {
    fn new(event_type: impl Into<String>, payload: Vec<u8>, content_type: &'static str) -> Self {
        Self {
            id: None,
            event_type: owned(event_type),
            stream: None,
            key: None,
            destination: None,
            content_type: Some(Text::from_static(content_type)),
            subject: None,
            correlation_id: None,
            traceparent: None,
            tracestate: None,
            not_before_ms: None,
            expires_ms: None,
            version: 1,
            headers: Vec::new(),
            properties: None,
            payload,
        }
    }

    /// Makes an event whose payload is raw bytes (`application/octet-stream`).
    ///
    /// ```
    /// let event = onewrite::Event::bytes("sensor.read", vec![1, 2, 3]).to("", "readings");
    /// ```
    pub fn bytes(event_type: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self::new(event_type, payload.into(), codec::BYTES)
    }

    /// Makes an event whose payload is `value` as JSON (`application/json`).
    ///
    /// # Errors
    /// [`EventError::Encode`] if JSON would lose a part of the value. JSON would lose NaN, an
    /// infinity, a map key that is neither string nor number, and a key that comes twice in a map.
    /// The error names the place in the value, and no key of a map.
    ///
    /// JSON has one `null` for `None`, `()` and `Some(None)`. A `serde_json::Value` that was made
    /// from NaN already holds `null`.
    ///
    /// ```
    /// use onewrite::Event;
    /// let event = Event::json("payment.completed", &("alice", 100))?.to("payments", "payment.completed");
    /// let error = Event::json("rate.changed", &[1.5, f64::NAN]).unwrap_err();
    /// assert_eq!(error.to_string(), "the payload cannot be encoded as JSON: `[1]` is NaN, and the format has no number for it");
    /// # Ok::<(), onewrite::EventError>(())
    /// ```
    #[cfg(feature = "json")]
    pub fn json<T: serde::Serialize + ?Sized>(
        event_type: impl Into<String>,
        value: &T,
    ) -> Result<Self, EventError> {
        Ok(Self::new(event_type, codec::to_json(value)?, codec::JSON))
    }

    /// Makes an event whose payload is `value` as bincode 2, standard configuration
    /// (`application/x-bincode`).
    ///
    /// # Errors
    /// [`EventError::Encode`] if bincode cannot write the value, or could not read it again. The
    /// latter holds for a field that is left out (`skip_serializing_if`) and for a flattened
    /// structure.
    ///
    /// bincode does not describe itself. A type whose reader looks at the data (`untagged`, an
    /// internal `tag`) can be written but not read. bincode keeps NaN and the infinities.
    ///
    /// ```
    /// let event = onewrite::Event::bincode("payment.completed", &("alice", 100))?.to("payments", "payment.completed");
    /// # Ok::<(), onewrite::EventError>(())
    /// ```
    #[cfg(feature = "bincode")]
    pub fn bincode<T: serde::Serialize + ?Sized>(
        event_type: impl Into<String>,
        value: &T,
    ) -> Result<Self, EventError> {
        Ok(Self::new(event_type, codec::to_bincode(value)?, codec::BINCODE))
    }

    /// Sets the event's destination. The empty exchange is AMQP's default exchange, where the
    /// routing key names a queue.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Destination;
    /// let event = onewrite::Event::bytes("paid", "1").to("payments", "payment.completed");
    /// # store.write(move |tx| tx.append(event.clone()))?;
    /// # let recorded = store.read()?.event(0)?.expect("appended above");
    /// let to = Destination::Exchange { exchange: "payments".into(), routing_key: "payment.completed".into() };
    /// assert_eq!(recorded.destination(), &to);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn to(mut self, exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        self.destination =
            Some(Destination::Exchange { exchange: exchange.into(), routing_key: routing_key.into() });
        self
    }

    /// Sends the event to this queue, over AMQP's default exchange. It equals [`to`](Self::to) with
    /// the empty exchange.
    ///
    /// ```
    /// use onewrite::{Destination, Event};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.destination(), &Destination::queue("payments"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn to_queue(self, queue: impl Into<String>) -> Self {
        self.to("", queue)
    }

    /// Sends the event to this exchange with this routing key. It equals [`to`](Self::to).
    ///
    /// ```
    /// use onewrite::{Destination, Event};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to_exchange("payments", "completed")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.destination(), &Destination::exchange("payments", "completed"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn to_exchange(self, exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        self.to(exchange, routing_key)
    }

    /// Keeps the event in the log only. No relay publishes it.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let event = onewrite::Event::bytes("paid", "1").unpublished();
    /// # store.write(move |tx| tx.append(event.clone()))?;
    /// # let recorded = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(recorded.lane(), None); // no relay takes it
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn unpublished(mut self) -> Self {
        self.destination = Some(Destination::Unpublished);
        self
    }

    /// Sets the ordering key. Events of one key are published in commit order; events without a key
    /// have no order.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let event = onewrite::Event::bytes("paid", "1").key("alice").to("", "payments");
    /// # store.write(move |tx| tx.append(event.clone()))?;
    /// # let recorded = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(recorded.key(), Some("alice"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(owned(key));
        self
    }

    /// Sets the event's id, its name for ever. A second append of the id with the same content does
    /// nothing, and with other content returns an error. Without this call the event gets a UUIDv7.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Error, Event};
    /// let pay = |amount: &'static str| {
    ///     store.write(move |tx| tx.append(Event::bytes("paid", amount).id("payment-1").to("", "payments")))
    /// };
    /// assert!(!pay("1")?.value().repeated);
    /// assert!(pay("1")?.value().repeated);
    /// assert!(matches!(pay("2"), Err(Error::Conflict { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(owned(id));
        self
    }

    /// Sets the payload's content type.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let event = onewrite::Event::bytes("paid", "1").content_type("text/plain").to("", "payments");
    /// # store.write(move |tx| tx.append(event.clone()))?;
    /// # let recorded = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(recorded.content_type(), Some("text/plain"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = Some(owned(content_type));
        self
    }

    /// Sets the CloudEvents `subject`: the thing that the event is about, within its source.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("paid", "1").subject("transfer-1").to("", "payments").validate().is_ok());
    /// assert!(Event::bytes("paid", "1").subject("x".repeat(256)).to("", "payments").validate().is_err());
    /// ```
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(owned(subject));
        self
    }

    /// Sets the AMQP `correlation_id`.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("paid", "1").correlation_id("request-17").to("", "payments").validate().is_ok());
    /// assert!(Event::bytes("paid", "1").correlation_id("x".repeat(256)).to("", "payments").validate().is_err());
    /// ```
    #[must_use]
    pub fn correlation_id(mut self, correlation_id: impl Into<String>) -> Self {
        self.correlation_id = Some(owned(correlation_id));
        self
    }

    /// Sets the W3C trace context that travels as `traceparent` and `tracestate`.
    ///
    /// ```
    /// use onewrite::Event;
    /// let event = Event::bytes("paid", "1")
    ///     .trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None)
    ///     .to("", "payments");
    /// assert!(event.validate().is_ok());
    /// ```
    #[must_use]
    pub fn trace(mut self, traceparent: impl Into<String>, tracestate: Option<String>) -> Self {
        self.traceparent = Some(owned(traceparent));
        self.tracestate = tracestate.map(Text::from);
        self
    }

    /// Adds a header. Names are unique within an event, and within a table. [`HeaderValue`] has
    /// each type of AMQP. RabbitMQ has no NaN and no infinity.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let event = onewrite::Event::bytes("paid", "1").header("region", "eu").header("tries", 2).to("", "payments");
    /// # store.write(move |tx| tx.append(event.clone()))?;
    /// # let recorded = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(recorded.headers()[0], ("region".to_owned(), "eu".into()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<HeaderValue>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Publishes the event no earlier than this time. A waiting event delays no other event. It
    /// takes its place in its key's order when it becomes due.
    ///
    /// ```
    /// use std::time::{Duration, SystemTime};
    /// use onewrite::Event;
    /// let tomorrow = SystemTime::now() + Duration::from_secs(24 * 3600);
    /// assert!(Event::bytes("remind", "1").not_before(tomorrow).to("", "mails").validate().is_ok());
    /// ```
    #[must_use]
    pub fn not_before(mut self, time: SystemTime) -> Self {
        self.not_before_ms = Some(unix_ms_rounded_up(time));
        self
    }

    /// Sets the version of the payload's form, for [upcasts](crate::StoreBuilder::upcast). It is 1
    /// unless set. A version other than 1 travels as the header `onewrite-version`.
    ///
    /// ```
    /// let event = onewrite::Event::bytes("paid", "1 EUR").version(2).to("", "payments");
    /// assert!(event.validate().is_ok());
    /// ```
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Publishes the event no later than this time. An event that is not confirmed by then goes to
    /// quarantine as *expired*.
    ///
    /// ```
    /// use std::time::{Duration, SystemTime};
    /// use onewrite::{Event, EventError};
    /// let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    /// assert!(Event::bytes("quote", "1").expires(now + hour).to("", "quotes").validate().is_ok());
    /// let never = Event::bytes("quote", "1").not_before(now + hour).expires(now).to("", "quotes");
    /// assert!(matches!(never.validate(), Err(EventError::ExpiresBeforeDue { .. })));
    /// ```
    #[must_use]
    pub fn expires(mut self, time: SystemTime) -> Self {
        self.expires_ms = Some(unix_ms(time));
        self
    }

    /// Checks everything that append checks, except the store's cap on the payload.
    ///
    /// # Errors
    /// The first problem, with the name of its field.
    ///
    /// ```
    /// use onewrite::Event;
    /// let error = Event::bytes("t", b"".to_vec()).to("e", "k").header("ce-id", "mine").validate().unwrap_err();
    /// assert_eq!(error.to_string(), "header `ce-id` is reserved");
    /// ```
    pub fn validate(&self) -> Result<(), EventError> {
        if self.event_type.is_empty() {
            return Err(EventError::Empty { field: "type" });
        }
        short("type", &self.event_type)?;
        // The stream comes before the key: without a key of the application, the key is the
        // stream's name.
        if let Some(stream) = &self.stream {
            short("stream", stream)?;
        }
        self.destination.as_ref().ok_or(EventError::NoDestination)?.validate()?;
        for (field, value) in [
            ("id", &self.id),
            ("key", &self.key),
            ("content_type", &self.content_type),
            ("subject", &self.subject),
            ("correlation_id", &self.correlation_id),
            ("traceparent", &self.traceparent),
        ] {
            if let Some(value) = value {
                short(field, value)?;
            }
        }
        for (field, value) in [("id", &self.id), ("key", &self.key)] {
            if value.as_ref().is_some_and(|text| text.is_empty()) {
                return Err(EventError::Empty { field });
            }
        }
        if let Some(state) = &self.tracestate {
            sized("tracestate", state, 512)?;
        }
        if let (Some(not_before_ms), Some(expires_ms)) = (self.not_before_ms, self.expires_ms)
            && expires_ms <= not_before_ms
        {
            return Err(EventError::ExpiresBeforeDue { not_before_ms, expires_ms });
        }
        if let Some(properties) = &self.properties {
            properties.validate()?;
        }
        self.validate_headers()
    }

    /// Returns the bytes of the content, without its containers.
    pub(crate) fn content_bytes(&self) -> u64 {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.encoded_len());
        self.payload.len() as u64 + headers.map(|bytes| bytes as u64).sum::<u64>()
    }

    fn validate_headers(&self) -> Result<(), EventError> {
        let mut bytes = 0;
        let mut check = HeaderCheck::default();
        for (index, (name, value)) in self.headers.iter().enumerate() {
            if name.is_empty() {
                return Err(EventError::Empty { field: "header name" });
            }
            short(name, name)?;
            if RESERVED_NAMES.contains(&name.as_str())
                || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            {
                return Err(EventError::ReservedHeader { name: name.clone() });
            }
            if self.headers.iter().take(index).any(|(earlier, _)| earlier == name) {
                return Err(EventError::DuplicateHeader { name: name.clone() });
            }
            // The value is checked before its length is computed, because that recurses as deep as
            // the value.
            check.value(name, value)?;
            bytes += 2 + name.len() + value.encoded_len();
        }
        if self.headers.len() > HEADERS_MAX || bytes > HEADERS_BYTES_MAX {
            return Err(EventError::HeadersTooLarge {
                count: self.headers.len(),
                len: bytes,
                count_max: HEADERS_MAX,
                len_max: HEADERS_BYTES_MAX,
            });
        }
        Ok(())
    }
}

/// Shows names and lengths only, so that the payload never reaches an application's log.
impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("id", &self.id)
            .field("event_type", &self.event_type)
            .field("key", &self.key)
            .field("destination", &self.destination)
            .field("headers", &self.headers)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl Destination {
    /// Checks that a message can carry the destination.
    pub(crate) fn validate(&self) -> Result<(), EventError> {
        if let Self::Exchange { exchange, routing_key } = self {
            short("exchange", exchange)?;
            short("routing_key", routing_key)?;
        }
        Ok(())
    }
}

fn owned(text: impl Into<String>) -> Text {
    Text::from(text.into())
}

const _: () = assert!(KEY_BYTES_MAX == SHORT_STRING_BYTES_MAX, "`short` serves both");

fn short(field: &str, value: &str) -> Result<(), EventError> {
    sized(field, value, SHORT_STRING_BYTES_MAX)
}

fn sized(field: &str, value: &str, max: usize) -> Result<(), EventError> {
    if value.len() > max {
        // The header's name can itself be too long, so the error names its beginning.
        let field = field.chars().take(64).collect();
        return Err(EventError::TooLong { field, len: value.len(), max });
    }
    if value.chars().any(char::is_control) {
        return Err(EventError::ControlCharacter { field: field.escape_debug().collect() });
    }
    Ok(())
}

/// Refuses a name that no stream, category or event type can have, because it would never match.
pub(crate) fn check_setting_name(setting: &'static str, what: &str, name: &str) -> Result<(), SettingError> {
    let fail = |reason: String| Err(SettingError::new(setting, reason));
    match short(what, name) {
        _ if name.is_empty() => fail(format!("{what} is empty")),
        Ok(()) => Ok(()),
        Err(EventError::TooLong { len, max, .. }) => {
            fail(format!("{what} is {len} bytes long; at most {max} are allowed"))
        }
        Err(_) => fail(format!("{what} `{}` holds a control character", name.escape_debug())),
    }
}

/// Refuses a category that holds a `-`. A stream's category ends before the first `-`, so no stream
/// has such a category.
pub(crate) fn check_category(setting: &'static str, category: &str) -> Result<(), SettingError> {
    check_setting_name(setting, "the category", category)?;
    if !category.contains('-') {
        return Ok(());
    }
    let found = category_of(category);
    let reason =
        format!("`{category}` holds a `-`: the category of its streams is the part before it, `{found}`");
    Err(SettingError::new(setting, reason))
}

fn unix_ms(time: SystemTime) -> u64 {
    as_ms(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Returns a time rounded up, because a millisecond that has only begun would be too early.
fn unix_ms_rounded_up(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    as_ms(since.saturating_add(Duration::from_nanos(999_999)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Event {
        Event::bytes("t", b"x".to_vec()).to("e", "k")
    }

    /// Goal: each thing that AMQP would refuse is refused by name.
    #[test]
    fn names_what_is_wrong() {
        let long = "a".repeat(256);
        let cases: Vec<(Event, &str)> = vec![
            (Event::bytes("", vec![]).to("e", "k"), "event field `type` is empty"),
            (
                Event::bytes(long.clone(), vec![]).to("e", "k"),
                "event field `type` is 256 bytes long; at most 255 are allowed",
            ),
            (
                Event::bytes("t", vec![]),
                "the event has no destination: call `to(exchange, routing_key)`, or `unpublished()` to keep it in the log only",
            ),
            (
                Event::bytes("t", vec![]).to(long.clone(), "k"),
                "event field `exchange` is 256 bytes long; at most 255 are allowed",
            ),
            (
                Event::bytes("t", vec![]).to("e", long.clone()),
                "event field `routing_key` is 256 bytes long; at most 255 are allowed",
            ),
            (good().id(""), "event field `id` is empty"),
            (good().key(""), "event field `key` is empty"),
            (good().id("a\nb"), "event field `id` holds a control character"),
            (
                good().content_type(long.clone()),
                "event field `content_type` is 256 bytes long; at most 255 are allowed",
            ),
            (good().header("", 1), "event field `header name` is empty"),
            (good().header("CC", "q"), "header `CC` is reserved"),
            (good().header("cloudEvents_id", "q"), "header `cloudEvents_id` is reserved"),
            (good().header("onewrite-lane", "q"), "header `onewrite-lane` is reserved"),
            (good().header("a", 1).header("a", 2), "header `a` is given twice"),
            (
                good().header("a", "x".repeat(HEADERS_BYTES_MAX)),
                "the event has 1 headers of 65543 bytes together; at most 128 headers and 65536 bytes are allowed",
            ),
        ];
        for (event, text) in cases {
            assert_eq!(event.validate().unwrap_err().to_string(), text);
        }
    }

    /// Goal: rounding to milliseconds makes no event due too early, and none expire too late.
    #[test]
    fn due_is_rounded_up_and_expiry_down() {
        let time = UNIX_EPOCH + Duration::from_nanos(1_000_001);
        let event = good().not_before(time).expires(time);
        assert_eq!((event.not_before_ms, event.expires_ms), (Some(2), Some(1)));
        assert_eq!(good().not_before(UNIX_EPOCH + Duration::from_millis(2)).not_before_ms, Some(2));
    }

    #[test]
    fn uuid_text_is_the_usual_one() {
        let bytes = [0x01, 0x8f, 0, 0, 0, 0, 0x70, 0, 0x80, 0, 0, 0, 0, 0, 0, 0xff];
        assert_eq!(uuid_text(bytes), "018f0000-0000-7000-8000-0000000000ff");
        assert_eq!(uuid_from_text(&uuid_text(bytes)), Some(bytes));
    }

    /// Goal: `Debug` never shows a payload.
    #[test]
    fn debug_shows_no_payload() {
        let event = Event::bytes("t", b"canary".to_vec()).to("e", "k").header("h", "canary");
        assert!(!format!("{event:?}").contains("canary"));
    }
}
