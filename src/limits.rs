//! The bounds of the protocol, and the bounds and defaults of settings, by name.
//!
//! Nothing here grows with the backlog. A bound that an application may move is the default of a
//! setting, and the setting's documentation links back here. Units stand last in the name.
//!
//! ```
//! use onewrite::{Event, limits};
//! let keyed = |len| Event::bytes("paid", "1").key("k".repeat(len)).to("", "payments").validate();
//! assert!(keyed(limits::KEY_BYTES_MAX).is_ok());
//! assert!(keyed(limits::KEY_BYTES_MAX + 1).is_err());
//! assert!(limits::WINDOW_EVENTS_DEFAULT <= limits::WINDOW_EVENTS_MAX);
//! ```

/// Longest value of an AMQP short string, in bytes: exchange, routing key, type, content type,
/// message id, correlation id and header names. The protocol gives such a string one length byte.
pub const SHORT_STRING_BYTES_MAX: usize = 255;

/// Longest ordering key of an event, in bytes. The key travels as the header `partitionkey`.
pub const KEY_BYTES_MAX: usize = 255;

/// Default cap on one event's payload, in bytes. See
/// [`StoreBuilder::payload_bytes_max`](crate::StoreBuilder::payload_bytes_max).
pub const PAYLOAD_BYTES_DEFAULT: usize = 1 << 20;

/// Highest cap on one event's payload that an application can set, in bytes. The value is 16 MiB,
/// RabbitMQ 4's default message limit, less the room for headers.
pub const PAYLOAD_BYTES_MAX: usize = (16 << 20) - HEADERS_BYTES_MAX;

/// Most bytes of all headers of one event together, names and values. This leaves half of the
/// pinned `frame_max` to the headers that the library adds.
pub const HEADERS_BYTES_MAX: usize = 64 << 10;

/// Most headers on one event.
pub const HEADERS_MAX: usize = 128;

/// The `frame_max` that the client requests from the broker, in bytes. The value is pinned:
/// otherwise a hostile `tune` makes the client allocate as much as the server says.
pub const FRAME_BYTES_MAX: u32 = 128 << 10;

/// The smallest `frame_max` of a broker that a publisher or a source accepts, in bytes. AMQP would
/// allow 4,096; the client library does not.
#[cfg(feature = "rabbitmq")]
pub const FRAME_BYTES_MIN: u32 = 8192;

/// Most tables and arrays inside each other in the headers of a message. The headers themselves
/// count as the first. An event with deeper nesting is refused. In a delivery, deeper values are
/// given as bytes: the AMQP client's decoder would overflow its stack.
pub const TABLE_NESTING_MAX: usize = 16;

/// Most values in the headers of one event, those in tables and arrays included. Each value takes
/// memory, even if it is one byte on the wire.
pub const HEADER_VALUES_MAX: usize = 4096;

/// Longest frame with a message's properties that the client accepts from the broker, in bytes.
/// RabbitMQ sends the properties in one frame of any length. The library leaves out what does not
/// fit into the agreed frame, and reports that.
pub const CONTENT_HEADER_BYTES_MAX: usize = 1 << 20;

/// Largest body that a broker may announce, in bytes: 512 MiB, the highest limit of RabbitMQ. A
/// larger one ends the connection.
pub const BODY_BYTES_ANNOUNCED_MAX: u64 = 512 << 20;

/// Default cap on the body of a delivery, in bytes: the default limit of RabbitMQ 3.10 (RabbitMQ 4
/// accepts 16 MiB). See
/// [`RabbitMqSource::body_bytes_max`](crate::broker::RabbitMqSource::body_bytes_max).
#[cfg(feature = "rabbitmq")]
pub const BODY_BYTES_DEFAULT: u64 = 128 << 20;

/// Default bound on the unsettled deliveries of a RabbitMQ source, in bytes. Beyond the bound, the
/// source reads nothing more. See
/// [`RabbitMqSource::prefetch_bytes`](crate::broker::RabbitMqSource::prefetch_bytes).
#[cfg(feature = "rabbitmq")]
pub const PREFETCH_BYTES_DEFAULT: u64 = 64 << 20;

/// Default page cache of the store, in bytes. redb's own default of 1 GiB is too much for an edge
/// device.
pub const CACHE_BYTES_DEFAULT: usize = 32 << 20;

/// Smallest journal of a store, in bytes.
pub const JOURNAL_BYTES_MIN: usize = 1 << 20;

/// Largest journal of a store, in bytes.
pub const JOURNAL_BYTES_MAX: usize = 256 << 20;

/// Longest name of a file, in bytes. Longer names of a store's side files are made short.
pub const FILE_NAME_BYTES_MAX: usize = 255;

/// Most writes that may wait for the writer thread. A further write blocks its caller.
pub const WRITE_QUEUE_MAX: usize = 1024;

/// Most events that one transaction appends, unless set. The same bound holds for the entries that
/// a transaction makes in the inbox and for captured tables. See
/// [`StoreBuilder::transaction_events_max`](crate::StoreBuilder::transaction_events_max).
pub const TRANSACTION_EVENTS_DEFAULT: u64 = 65_536;

/// Most bytes of records and entries that one transaction gathers, unless set. See
/// [`StoreBuilder::transaction_bytes_max`](crate::StoreBuilder::transaction_bytes_max).
pub const TRANSACTION_BYTES_DEFAULT: u64 = 64 << 20;

/// Longest id of a request or of an inbox entry, in bytes.
pub const INBOX_ID_BYTES_MAX: usize = 512;

/// Most gaps of one lane that a consumer remembers.
pub const LANE_GAPS_MAX: u64 = 16_384;

/// Gaps that each lane may have, however many gaps [other lanes
/// have](crate::StoreBuilder::gaps_max).
pub const LANE_GAPS_MIN: u64 = 64;

/// How long a lane is idle before it may be forgotten for a new lane, unless set, in milliseconds:
/// a day.
pub const LANE_IDLE_MS_DEFAULT: u64 = 24 * 3600 * 1000;

/// Shortest secret that a producer may sign with, in bytes. Take 32 random bytes.
pub const SIGNING_KEY_BYTES_MIN: usize = 16;

/// Most keys of one producer that a consumer accepts. While keys rotate, there are two.
pub const PRODUCER_KEYS_MAX: usize = 8;

/// Default age after which an inbox entry (the id of a request, delivery or event) may be
/// forgotten, in milliseconds: 7 days.
pub const INBOX_AGE_MS_DEFAULT: u64 = 7 * 24 * 3600 * 1000;

/// Highest sequence number of an event, and highest revision of a stream. A greater number in a
/// file was never reached by counting, so it is damage. The bound keeps sums from overflowing.
pub const NUMBER_MAX: u64 = 1 << 62;

/// How long a relay's progress may wait for a commit of the application before it gets a commit of
/// its own, in milliseconds.
pub const PROGRESS_DELAY_MS_DEFAULT: u64 = 250;

/// Default number of unconfirmed events in flight.
pub const WINDOW_EVENTS_DEFAULT: usize = 512;

/// Most unconfirmed events in flight that an application can set.
pub const WINDOW_EVENTS_MAX: usize = 16_384;

/// Default number of unconfirmed payload bytes in flight.
pub const WINDOW_BYTES_DEFAULT: usize = 8 << 20;

/// Highest rate limit of a relay that an application can set, in events per second.
pub const RATE_LIMIT_MAX: u32 = 1_000_000;

/// Attempts of an event that the broker itself refuses (a message fault), before the event is
/// quarantined.
pub const ATTEMPTS_DEFAULT: u32 = 5;

/// Attempts of a delivery whose handler fails, before the delivery is rejected, unless set.
pub const HANDLER_ATTEMPTS_DEFAULT: u32 = 10;

/// Attempts of an event whose destination is missing, closed or routes nowhere, before the event is
/// quarantined.
pub const DESTINATION_ATTEMPTS_DEFAULT: u32 = 10;

/// First and longest wait between attempts of one event, in milliseconds.
pub const BACKOFF_MS_DEFAULT: (u64, u64) = (100, 30_000);

/// First and longest wait between connection attempts, in milliseconds.
pub const RECONNECT_MS_DEFAULT: (u64, u64) = (100, 30_000);

/// Most brokers in one list.
pub const BROKERS_MAX: usize = 64;

/// Deadline of a connection attempt to one broker, in milliseconds: TCP, handshake, channel and
/// confirm mode.
pub const CONNECT_MS_MAX: u64 = 10_000;

/// Deadline of a publisher confirm, in milliseconds. After the deadline, the message counts as
/// silent, and the relay suspends its destination.
pub const CONFIRM_MS_DEFAULT: u64 = 60_000;

/// AMQP heartbeat, in seconds. A dead peer is noticed within twice that time.
pub const HEARTBEAT_S_DEFAULT: u16 = 10;

/// Default number of unacknowledged deliveries that a consumer requests.
pub const PREFETCH_DEFAULT: u16 = 256;

/// Most deliveries that the consumer of one scope parks in its store, unless set. See
/// [`ConsumerBuilder::parked_max`](crate::ConsumerBuilder::parked_max).
pub const PARKED_ROWS_DEFAULT: u64 = 16_384;

/// Most bytes of the parked deliveries of one scope, unless set.
pub const PARKED_BYTES_DEFAULT: u64 = 64 << 20;

/// Returns to its queue after which a consumer stores a delivery before trying it, unless set. See
/// [`ConsumerBuilder::take_in_after`](crate::ConsumerBuilder::take_in_after).
pub const RETURNS_DEFAULT: u32 = 1;

/// Most rows of one relay that [`Store::stats`](crate::Store::stats) reads to find the oldest event
/// of one kind.
pub const STATS_ROWS_MAX: usize = 4096;

/// How long something may hold the log or the file before the store logs a warning, unless set, in
/// milliseconds. See [`StoreBuilder::holder_warn_after`](crate::StoreBuilder::holder_warn_after).
pub const HOLDER_WARN_MS_DEFAULT: u64 = 60_000;

/// Most events that one commit of a projection applies, unless set.
pub const PROJECTION_BATCH_DEFAULT: usize = 256;

/// How long a projection lets events gather after the first event, unless set, in milliseconds.
pub const PROJECTION_DELAY_MS_DEFAULT: u64 = 5;

/// How long a consumer may hold back deliveries behind a gap in their lane, in milliseconds. The
/// value is half of RabbitMQ's default `consumer_timeout`, after which the broker closes the
/// channel.
pub const HOLD_MS_MAX: u64 = 15 * 60 * 1000;

/// Longest reason that is kept with a rejected delivery, in bytes.
pub const REASON_BYTES_MAX: usize = 512;

/// Most rejected deliveries that a consumer keeps in its scope's quarantine, unless set. See
/// [`ConsumerBuilder::rejected_max`](crate::ConsumerBuilder::rejected_max).
pub const REJECTED_ROWS_DEFAULT: u64 = 65_536;

/// Most bytes of the rejected deliveries of one scope, unless set.
pub const REJECTED_BYTES_DEFAULT: u64 = 256 << 20;

/// Bytes that a consumer leaves free on the disk of its store, unless set. On a small disk, the
/// consumer leaves one part of [`FREE_SPACE_PART`] free, if that is less. See
/// [`ConsumerBuilder::free_space_min`](crate::ConsumerBuilder::free_space_min).
pub const FREE_SPACE_DEFAULT: u64 = 64 << 20;

/// The part of a small disk that a consumer leaves free, unless set: one part of this many.
pub const FREE_SPACE_PART: u64 = 8;

const _: () = assert!(HEADERS_BYTES_MAX * 2 <= FRAME_BYTES_MAX as usize);
const _: () = assert!(crate::tuning::BATCH_WRITES_MAX <= WRITE_QUEUE_MAX);
const _: () = assert!(WINDOW_EVENTS_DEFAULT <= WINDOW_EVENTS_MAX);
const _: () = assert!(PAYLOAD_BYTES_DEFAULT <= PAYLOAD_BYTES_MAX);
const _: () = assert!(KEY_BYTES_MAX <= u16::MAX as usize);
/// Most times that an aggregate decides on one command while other writers are faster.
pub const CONFLICT_ATTEMPTS_DEFAULT: u32 = 10;

/// Longest snapshot of a stream, in bytes: 16 MiB, as the largest payload.
pub const SNAPSHOT_BYTES_MAX: usize = 16 << 20;
