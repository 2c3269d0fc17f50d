//! The bounds of the protocol, and the bounds and defaults of settings, by name.
//!
//! Nothing here grows with the backlog. A bound that a user may move is the default of a setting; the setting's
//! own documentation links back here. Units stand last in the name.
//!
//! ```
//! use onewrite::{Event, limits};
//! let keyed = |len| Event::bytes("paid", "1").key("k".repeat(len)).to("", "payments").validate();
//! assert!(keyed(limits::KEY_BYTES_MAX).is_ok());
//! assert!(keyed(limits::KEY_BYTES_MAX + 1).is_err());
//! assert!(limits::WINDOW_EVENTS_DEFAULT <= limits::WINDOW_EVENTS_MAX);
//! ```

/// Longest value of an AMQP short string, in bytes: exchange, routing key, type, content type, message id,
/// correlation id, header names. The protocol gives it one length byte.
pub const SHORT_STRING_BYTES_MAX: usize = 255;

/// Longest ordering key of an event, in bytes. It travels as the header `partitionkey`.
pub const KEY_BYTES_MAX: usize = 255;

/// Default cap on one event's payload, in bytes. See [`StoreBuilder::payload_bytes_max`](crate::StoreBuilder::payload_bytes_max).
pub const PAYLOAD_BYTES_DEFAULT: usize = 1 << 20;

/// Highest cap on one event's payload that can be set: 16 MiB (RabbitMQ 4's default message limit) less the room
/// that headers may take.
pub const PAYLOAD_BYTES_MAX: usize = (16 << 20) - HEADERS_BYTES_MAX;

/// All headers of one event together, names and values, in bytes. It leaves half of the pinned `frame_max` to the
/// headers that the library adds itself.
pub const HEADERS_BYTES_MAX: usize = 64 << 10;

/// Most headers on one event.
pub const HEADERS_MAX: usize = 128;

/// The `frame_max` that is asked of the broker, in bytes. Pinned: a hostile `tune` otherwise makes the client
/// allocate whatever the server says.
pub const FRAME_BYTES_MAX: u32 = 128 << 10;

/// The smallest `frame_max` of a broker that a publisher or a source takes, in bytes. AMQP would allow 4,096; the client library does
/// not.
#[cfg(feature = "rabbitmq")]
pub const FRAME_BYTES_MIN: u32 = 8192;

/// Tables and arrays that may stand inside each other in the headers of a message; the headers are the first. An event that holds a
/// deeper one is refused. In a delivery, what stands deeper is given as bytes: the AMQP client's decoder would overflow its stack.
pub const TABLE_NESTING_MAX: usize = 16;

/// Values in the headers of one event, those in tables and arrays included. Each takes memory, be it one byte on the wire.
pub const HEADER_VALUES_MAX: usize = 4096;

/// Longest frame with a message's properties that is taken from the broker, in bytes. RabbitMQ sends them in one frame however long
/// they are; what does not fit into the agreed frame is left out, and said.
pub const CONTENT_HEADER_BYTES_MAX: usize = 1 << 20;

/// Largest body that a broker may announce, in bytes: 512 MiB, the most that RabbitMQ can be set to. Beyond, the connection ends.
pub const BODY_BYTES_ANNOUNCED_MAX: u64 = 512 << 20;

/// Default cap on the body of a delivery, in bytes: what RabbitMQ 3.10 takes unless set (RabbitMQ 4 takes 16 MiB). See
/// [`RabbitMqSource::body_bytes_max`](crate::broker::RabbitMqSource::body_bytes_max).
#[cfg(feature = "rabbitmq")]
pub const BODY_BYTES_DEFAULT: u64 = 128 << 20;

/// Bytes of deliveries that are not settled, beyond which a RabbitMQ source reads nothing more, unless set. See
/// [`RabbitMqSource::prefetch_bytes`](crate::broker::RabbitMqSource::prefetch_bytes).
#[cfg(feature = "rabbitmq")]
pub const PREFETCH_BYTES_DEFAULT: u64 = 64 << 20;

/// Default page cache of the store, in bytes. redb's own default of 1 GiB is too much for an edge device.
pub const CACHE_BYTES_DEFAULT: usize = 32 << 20;

/// Smallest journal of a store, in bytes.
pub const JOURNAL_BYTES_MIN: usize = 1 << 20;

/// Largest journal of a store, in bytes.
pub const JOURNAL_BYTES_MAX: usize = 256 << 20;

/// Longest name of a file, in bytes. Longer names of a store's side files are made short.
pub const FILE_NAME_BYTES_MAX: usize = 255;

/// Writes that may wait for the writer thread. A further one blocks its caller.
pub const WRITE_QUEUE_MAX: usize = 1024;

/// Events that one transaction appends at most, unless set; and entries that it makes at most, in the inbox and for captured tables.
/// See [`StoreBuilder::transaction_events_max`](crate::StoreBuilder::transaction_events_max).
pub const TRANSACTION_EVENTS_DEFAULT: u64 = 65_536;

/// Bytes of records and entries that one transaction gathers at most, unless set. See
/// [`StoreBuilder::transaction_bytes_max`](crate::StoreBuilder::transaction_bytes_max).
pub const TRANSACTION_BYTES_DEFAULT: u64 = 64 << 20;

/// Longest id of a request or of an inbox entry, in bytes.
pub const INBOX_ID_BYTES_MAX: usize = 512;

/// Gaps of one lane that are remembered at most.
pub const LANE_GAPS_MAX: u64 = 16_384;

/// Gaps that each lane may have, however many [others have](crate::StoreBuilder::gaps_max).
pub const LANE_GAPS_MIN: u64 = 64;

/// How long a lane is idle before it may be forgotten for a new one, unless set, in milliseconds: a day.
pub const LANE_IDLE_MS_DEFAULT: u64 = 24 * 3600 * 1000;

/// Shortest secret that a producer may sign with, in bytes. Take 32 random ones.
pub const SIGNING_KEY_BYTES_MIN: usize = 16;

/// Keys of one producer that a consumer believes at most: while keys rotate there are two.
pub const PRODUCER_KEYS_MAX: usize = 8;

/// Default age after which an inbox entry (the id of a request, delivery or event) may be forgotten, in milliseconds: 7 days.
pub const INBOX_AGE_MS_DEFAULT: u64 = 7 * 24 * 3600 * 1000;

/// No event has a greater sequence number, and no stream a greater revision: one that is in a file was not counted up to. What is added to numbers does
/// not overflow then.
pub const NUMBER_MAX: u64 = 1 << 62;

/// How long a relay's progress may wait for a commit before it gets one of its own, in milliseconds.
pub const PROGRESS_DELAY_MS_DEFAULT: u64 = 250;

/// Unconfirmed events in flight, by default.
pub const WINDOW_EVENTS_DEFAULT: usize = 512;

/// Most unconfirmed events in flight that can be set.
pub const WINDOW_EVENTS_MAX: usize = 16_384;

/// Unconfirmed payload bytes in flight, by default.
pub const WINDOW_BYTES_DEFAULT: usize = 8 << 20;

/// Highest rate limit of a relay that can be set, in events per second.
pub const RATE_LIMIT_MAX: u32 = 1_000_000;

/// Tries of an event that the broker itself refuses (a message fault) before it is quarantined.
pub const ATTEMPTS_DEFAULT: u32 = 5;

/// Tries of a delivery whose handler fails before it is rejected, unless set.
pub const HANDLER_ATTEMPTS_DEFAULT: u32 = 10;

/// Tries of an event whose destination is missing, closed or routes nowhere before it is quarantined.
pub const DESTINATION_ATTEMPTS_DEFAULT: u32 = 10;

/// First and longest wait between tries of one event, in milliseconds.
pub const BACKOFF_MS_DEFAULT: (u64, u64) = (100, 30_000);

/// First and longest wait between connection attempts, in milliseconds.
pub const RECONNECT_MS_DEFAULT: (u64, u64) = (100, 30_000);

/// Brokers in one list.
pub const BROKERS_MAX: usize = 64;

/// Deadline of a connection attempt to one broker, in milliseconds: TCP, handshake, channel, confirm mode.
pub const CONNECT_MS_MAX: u64 = 10_000;

/// Deadline of a publisher confirm, in milliseconds. After it the message is silent, and its destination is suspended.
pub const CONFIRM_MS_DEFAULT: u64 = 60_000;

/// AMQP heartbeat, in seconds. A dead peer is noticed within twice that.
pub const HEARTBEAT_S_DEFAULT: u16 = 10;

/// Unacknowledged deliveries that a consumer asks for, by default.
pub const PREFETCH_DEFAULT: u16 = 256;

/// Deliveries that the consumer of one scope parks in its store at most, unless set. See
/// [`ConsumerBuilder::parked_max`](crate::ConsumerBuilder::parked_max).
pub const PARKED_ROWS_DEFAULT: u64 = 16_384;

/// Bytes that these take at most, unless set.
pub const PARKED_BYTES_DEFAULT: u64 = 64 << 20;

/// Returns to its queue after which a consumer takes a delivery into its store before trying it, unless set. See
/// [`ConsumerBuilder::take_in_after`](crate::ConsumerBuilder::take_in_after).
pub const RETURNS_DEFAULT: u32 = 1;

/// Rows of one relay that [`Store::stats`](crate::Store::stats) reads at most to find the oldest event of one kind.
pub const STATS_ROWS_MAX: usize = 4096;

/// How long something may hold the log or the file before the store logs a warning, unless set, in milliseconds. See
/// [`StoreBuilder::holder_warn_after`](crate::StoreBuilder::holder_warn_after).
pub const HOLDER_WARN_MS_DEFAULT: u64 = 60_000;

/// Events that one commit of a projection applies, unless set.
pub const PROJECTION_BATCH_DEFAULT: usize = 256;

/// How long a projection lets events gather after the first, unless set, in milliseconds.
pub const PROJECTION_DELAY_MS_DEFAULT: u64 = 5;

/// How long a consumer may hold back what is behind a gap in its lane, in milliseconds: half of RabbitMQ's default
/// `consumer_timeout`, after which the broker closes the channel.
pub const HOLD_MS_MAX: u64 = 15 * 60 * 1000;

/// The reason that is kept with a rejected delivery, in bytes.
pub const REASON_BYTES_MAX: usize = 512;

/// Rejected deliveries that a consumer keeps in its scope's quarantine at most, unless set. See
/// [`ConsumerBuilder::rejected_max`](crate::ConsumerBuilder::rejected_max).
pub const REJECTED_ROWS_DEFAULT: u64 = 65_536;

/// Bytes that these take at most, unless set.
pub const REJECTED_BYTES_DEFAULT: u64 = 256 << 20;

/// Bytes that a consumer leaves free on the disk of its store, unless set; on a small disk one part of [`FREE_SPACE_PART`], if that is
/// less. See [`ConsumerBuilder::free_space_min`](crate::ConsumerBuilder::free_space_min).
pub const FREE_SPACE_DEFAULT: u64 = 64 << 20;

/// The part of a small disk that a consumer leaves free, unless set: one of so many.
pub const FREE_SPACE_PART: u64 = 8;

const _: () = assert!(HEADERS_BYTES_MAX * 2 <= FRAME_BYTES_MAX as usize);
const _: () = assert!(crate::tuning::BATCH_WRITES_MAX <= WRITE_QUEUE_MAX);
const _: () = assert!(WINDOW_EVENTS_DEFAULT <= WINDOW_EVENTS_MAX);
const _: () = assert!(PAYLOAD_BYTES_DEFAULT <= PAYLOAD_BYTES_MAX);
const _: () = assert!(KEY_BYTES_MAX <= u16::MAX as usize);
/// How often an aggregate decides at most when others are faster.
pub const CONFLICT_ATTEMPTS_DEFAULT: u32 = 10;

/// A stream's snapshot, in bytes: 16 MiB, as the largest payload.
pub const SNAPSHOT_BYTES_MAX: usize = 16 << 20;
