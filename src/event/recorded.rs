//! An event as the log holds it.

use std::fmt;
use std::time::SystemTime;

use super::Event;
use super::destination::Destination;
use super::lane::Lane;
use crate::message::HeaderValue;
use crate::text::Text;
use crate::time::wall_time;

/// An event as the log holds it.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
/// let event: onewrite::RecordedEvent = store.read()?.event(0)?.expect("appended above");
/// assert_eq!((event.seq(), event.event_type(), event.key()), (0, "payment.completed", Some("alice")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct RecordedEvent {
    pub(crate) seq: u64,
    pub(crate) time_ms: u64,
    pub(crate) end_offset: u64,
    pub(crate) lane: Option<Lane>,
    pub(crate) revision: Option<u64>,
    pub(crate) id: Text,
    pub(crate) crc: u32,
    pub(crate) event: Event,
}

impl RecordedEvent {
    /// Returns the event's sequence number: its number in commit order, from 0, without a gap.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.seq(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Returns the time of the append by the wall clock, in Unix milliseconds.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert!(event.time_ms() > 1_700_000_000_000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// Returns the time of the append by the wall clock. [`time_ms`](Self::time_ms) is the same as
    /// a number.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// store.write(move |tx| tx.append(Event::bytes("paid", "1").to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert!(event.time() <= std::time::SystemTime::now());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn time(&self) -> SystemTime {
        wall_time(self.time_ms)
    }

    /// Returns the event's subject, as CloudEvents defines it.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// store.write(move |tx| tx.append(Event::bytes("paid", "1").subject("account-7").to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.subject(), Some("account-7"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        self.event.subject.as_deref()
    }

    /// Returns the `traceparent` of the W3C trace context that the append gave.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// store.write(move |tx| tx.append(Event::bytes("paid", "1").trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None).to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert!(event.traceparent().is_some_and(|parent| parent.starts_with("00-0af7")));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.event.traceparent.as_deref()
    }

    /// Returns the `tracestate` of the W3C trace context that the append gave.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// store.write(move |tx| tx.append(Event::bytes("paid", "1").trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some("a=b".into())).to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.tracestate(), Some("a=b"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn tracestate(&self) -> Option<&str> {
        self.event.tracestate.as_deref()
    }

    /// Returns the time before which no relay publishes the event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// # use std::time::{Duration, SystemTime, UNIX_EPOCH};
    /// let at = UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    /// store.write(move |tx| tx.append(Event::bytes("paid", "1").not_before(at).to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.not_before(), Some(at));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn not_before(&self) -> Option<SystemTime> {
        self.event.not_before_ms.map(wall_time)
    }

    /// Returns the time after which no relay publishes the event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// # use std::time::{Duration, SystemTime, UNIX_EPOCH};
    /// let at = UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    /// store.write(move |tx| tx.append(Event::bytes("paid", "1").expires(at).to_queue("payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.expires(), Some(at));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn expires(&self) -> Option<SystemTime> {
        self.event.expires_ms.map(wall_time)
    }

    /// Returns the event's id.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.id().len(), 36); // a UUIDv7: no id was given
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the event's type.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.event_type(), "payment.completed");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn event_type(&self) -> &str {
        &self.event.event_type
    }

    /// Returns the event's ordering key.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.key(), Some("alice"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.event.key.as_deref()
    }

    /// Returns the event's destination.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert!(matches!(event.destination(), onewrite::Destination::Exchange { routing_key, .. } if routing_key == "payments"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn destination(&self) -> &Destination {
        self.event.destination.as_ref().unwrap_or(&Destination::Unpublished)
    }

    /// Returns the event's stream; `None` for an event that is in the outbox only.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("deposited", "100").unpublished()], ExpectedRevision::NoStream)
    /// })?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.stream(), Some("account-7"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn stream(&self) -> Option<&str> {
        self.event.stream.as_deref()
    }

    /// Returns the category of the event's stream: the part of the name before the first `-`, or
    /// the whole name.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("deposited", "100").unpublished()], ExpectedRevision::NoStream)
    /// })?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.category(), Some("account"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn category(&self) -> Option<&str> {
        self.stream().map(category_of)
    }

    /// Returns the event's revision: its number in its stream, from 0, without a gap.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("deposited", "100").unpublished()], ExpectedRevision::NoStream)
    /// })?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.revision(), Some(0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn revision(&self) -> Option<u64> {
        self.revision
    }

    /// Returns the event's place in its lane; `None` for an unpublished event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.lane().map(|lane| lane.number), Some(0)); // the first of its lane
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lane(&self) -> Option<Lane> {
        self.lane
    }

    /// Returns the payload's content type.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.content_type(), Some(onewrite::codec::BYTES));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.event.content_type.as_deref()
    }

    /// Returns the application's headers.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert!(event.headers().is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn headers(&self) -> &[(String, HeaderValue)] {
        &self.event.headers
    }

    /// Returns the payload.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.payload(), b"100");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.event.payload
    }

    /// Returns the version of the payload; 1 unless the event set another. An older payload is
    /// upcast to the newest version that an [upcast](crate::StoreBuilder::upcast) leads to.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::builder().event_version("paid", 2).open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1 EUR").version(2).unpublished()))?;
    /// assert_eq!(store.read()?.event(0)?.expect("appended above").version(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn version(&self) -> u32 {
        self.event.version
    }

    /// Returns the checksum of the event's record (CRC-32, IEEE).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.crc(), store.read()?.event(0)?.expect("appended above").crc()); // it is the record's, not the reader's
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn crc(&self) -> u32 {
        self.crc
    }
}

/// Shows names and lengths only.
impl fmt::Debug for RecordedEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorded")
            .field("seq", &self.seq)
            .field("id", &self.id)
            .field("event_type", &self.event.event_type)
            .field("key", &self.event.key)
            .field("destination", &self.event.destination)
            .field("payload_bytes", &self.event.payload.len())
            .finish_non_exhaustive()
    }
}

pub(crate) fn category_of(stream: &str) -> &str {
    stream.split_once('-').map_or(stream, |(category, _)| category)
}
