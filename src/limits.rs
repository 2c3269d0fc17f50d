//! Every bound of the library, by name.
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

/// Queues that a publisher asks for at most to learn why RabbitMQ has returned a message.
#[cfg(feature = "rabbitmq")]
pub const CAUSE_QUEUES_MAX: usize = 8;

/// How long a publisher or source waits, while it connects, for each answer about a queue that it declares, in milliseconds. RabbitMQ 4
/// answers after a minute if the queue's node is down.
#[cfg(feature = "rabbitmq")]
pub const QUEUE_AWAY_MS: u64 = 2_000;

/// How long a publisher waits at most for the answer why RabbitMQ has returned a message, in milliseconds.
#[cfg(feature = "rabbitmq")]
pub const CAUSE_MS_MAX: u64 = 10_000;

/// How long such an answer holds for further messages to the same destination, in milliseconds.
#[cfg(feature = "rabbitmq")]
pub const CAUSE_KNOWN_MS: u64 = 1_000;

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

/// How often opening computes the checksum of each byte of a journal at most, on average. Frames do not overlap, but for one that a newer one has partly
/// written over.
pub const JOURNAL_CHECKS_MAX: usize = 4;

/// Bytes behind the end of a store's file that its journal may write to at most. The file is made longer before a frame needs it.
pub const JOURNAL_REACH_BYTES_MAX: u64 = 8 << 30;

/// Longest name of a file, in bytes. Longer names of a store's side files are made short.
pub const FILE_NAME_BYTES_MAX: usize = 255;

/// Looks that opening takes at a path which other processes change at the same moment, at most.
pub const OPEN_ROUNDS_MAX: usize = 8;

/// Wait between two looks at an empty file that another process may be about to fill, in milliseconds.
pub const EMPTY_FILE_MS: u64 = 5;

/// Commits after which a store has looked whether its path still leads to its file, before the next begins.
pub const NAME_COMMITS_MAX: u64 = 64;

/// Events after which a store has looked whether its path still leads to its file, before the next commit begins.
pub const NAME_EVENTS_MAX: u64 = 2_048;

/// Time after which a store looks whether its path still leads to its file, before the next commit begins or once it is idle, in milliseconds.
pub const NAME_MS_MAX: u64 = 1_000;

/// Folders that cannot be synced of which a process warns, at most, each once.
pub const UNSYNCED_FOLDERS_MAX: usize = 64;

/// Writes that may wait for the writer thread. A further one blocks its caller.
pub const WRITE_QUEUE_MAX: usize = 1024;

/// How long a caller waits for the write transaction before it logs what holds it, in milliseconds. It logs again when it has waited
/// for twice as long, and so on.
pub const WRITE_WAIT_WARN_MS: u64 = 1000;

/// The longest time from one such warning to the next, in milliseconds.
pub const WRITE_WAIT_WARN_MS_MAX: u64 = 60_000;

/// Writes that share one commit at most.
pub const BATCH_WRITES_MAX: usize = 256;

/// How long the closures of one group run, in milliseconds: the one that exceeds it is the last. Further writes are the next group's.
pub const GROUP_MS_MAX: u64 = 50;

/// The same where handlers of consumers or projections run in it, in milliseconds.
pub const HANDLERS_MS_MAX: u64 = 10;

/// Times that a write closure runs at most, however many of its group fail.
pub const RUNS_MAX: u8 = 3;

/// Events that one transaction appends at most, unless set; and marks of the inbox and of captured tables that it makes at most.
/// See [`StoreBuilder::transaction_events_max`](crate::StoreBuilder::transaction_events_max).
pub const TRANSACTION_EVENTS_DEFAULT: u64 = 65_536;

/// Bytes of records and marks that one transaction gathers at most, unless set. See
/// [`StoreBuilder::transaction_bytes_max`](crate::StoreBuilder::transaction_bytes_max).
pub const TRANSACTION_BYTES_DEFAULT: u64 = 64 << 20;

/// Longest id of a request or of an inbox entry, in bytes.
pub const INBOX_ID_BYTES_MAX: usize = 512;

/// Chunks of 64 numbers of a producer's lane of which a consumer keeps the hashes of contents: at least 16,384 numbers, as many as a
/// relay may have in flight. A consumer sets a message aside that has an older number: it does not know any more whether the message
/// is a repeat.
pub const LANE_CHUNKS_MAX: u64 = 257;

/// Gaps of one lane that are remembered at most.
pub const LANE_GAPS_MAX: u64 = 16_384;

/// Gaps that each lane may have, however many [others have](crate::StoreBuilder::gaps_max).
pub const LANE_GAPS_MIN: u64 = 64;

/// How long a lane is idle before it may be forgotten for a new one, unless set, in milliseconds: a day.
pub const LANE_IDLE_MS_DEFAULT: u64 = 24 * 3600 * 1000;

/// Rows that are looked at for a lane to forget, each time a new one finds no room.
pub const LANES_LOOK: usize = 64;

/// Shortest secret that a producer may sign with, in bytes. Take 32 random ones.
pub const SIGNING_KEY_BYTES_MIN: usize = 16;

/// Keys of one producer that a consumer believes at most: while keys rotate there are two.
pub const PRODUCER_KEYS_MAX: usize = 8;

/// How far a producer's clock may be ahead of this store's, in milliseconds, where times are compared.
pub const CLOCK_TOLERANCE_MS: u64 = 5 * 60 * 1000;

/// Default age after which an inbox entry (a seen request, delivery or event id) may be forgotten, in milliseconds: 7 days.
pub const INBOX_AGE_MS_DEFAULT: u64 = 7 * 24 * 3600 * 1000;

/// Inbox entries that one commit looks at while forgetting old ones.
pub const INBOX_PRUNE_STEP: usize = 64;

/// The store age (the time that has passed while the store was open) is written by a commit that happens anyway once it has grown by
/// so much, in milliseconds. A crash loses at most that, or the time since the last commit.
pub const AGE_SAVE_MS: u64 = 5_000;

/// The store age is written at the close if it has grown by so much, in milliseconds.
pub const AGE_SAVE_MS_MIN: u64 = 1_000;

/// Retention by age is told in steps of this many milliseconds at least.
pub const AGE_STEP_MS_MIN: u64 = 1_000;

/// Retention by age is told in so many steps of the age that is kept.
pub const AGE_STEPS: u64 = 64;

/// Milestones of ages that the file keeps at most; two to a step.
pub const AGE_MILESTONES_MAX: usize = 136;

/// Events between two bulk writes of what is derived from the log: lanes and the stream index. Records younger than the
/// last bulk write are not trimmed.
pub const DERIVED_FLUSH_EVENTS: u64 = 4096;

/// Lanes, and streams, held in memory at most beside those that changed since the last bulk write.
pub const BOOK_CACHE_MAX: usize = 16_384;

/// No event has a greater sequence number, and no stream a greater revision: one that is in a file was not counted up to. What is added to numbers does
/// not overflow then.
pub const NUMBER_MAX: u64 = 1 << 62;

/// Revisions of streams whose records are missing or damaged, and for which opening keeps a place in memory (8 bytes each), at most.
pub const REVISION_HOLES_MAX: u64 = 1 << 20;

/// Bytes of records between two such bulk writes.
pub const DERIVED_FLUSH_BYTES: u64 = 64 << 20;

/// Records that one commit removes at most, once they are confirmed and past retention; twice as many as the commit
/// appends, if that is more.
pub const TRIM_STEP: u64 = 512;

/// Bytes of records that one commit removes at most, but for the last one; twice what the commit appends, if that is more.
pub const TRIM_STEP_BYTES: u64 = 16 << 20;

/// Trimming is put off until this many records can go, until the store is idle, or until one of the next two bounds is reached.
pub const TRIM_BATCH_MIN: u64 = 256;

/// Bytes of records that can go and are still in the file at most: the next commit removes them.
pub const TRIM_DEFER_BYTES_MAX: u64 = 4 << 20;

/// How long trimming is put off at most while writes flow, in milliseconds: the next commit after that does it.
pub const TRIM_DEFER_MS_MAX: u64 = 1_000;

/// How long a relay's progress may wait for a commit before it gets one of its own, in milliseconds.
pub const PROGRESS_DELAY_MS_DEFAULT: u64 = 250;

/// How long a write waits for a relay to let expired events go, under
/// [`QuotaPolicy::DropExpired`](crate::QuotaPolicy::DropExpired), in milliseconds.
pub const QUOTA_SCAN_MS_MAX: u64 = 1_000;

/// How long a relay's thread may take to say what it knows, at the end of a wait for confirms, in milliseconds.
/// See [`Receipt::wait_confirmed`](crate::Receipt::wait_confirmed).
pub const ANSWER_MS_MAX: u64 = 1_000;

/// Unconfirmed events in flight, by default.
pub const WINDOW_EVENTS_DEFAULT: usize = 512;

/// Most unconfirmed events in flight that can be set.
pub const WINDOW_EVENTS_MAX: usize = 16_384;

/// Unconfirmed payload bytes in flight, by default.
pub const WINDOW_BYTES_DEFAULT: usize = 8 << 20;

/// Highest rate limit of a relay that can be set, in events per second.
pub const RATE_LIMIT_MAX: u32 = 1_000_000;

/// Events that a relay holds in memory beyond the window, per event of the window.
pub const LOOKAHEAD_PER_WINDOW: usize = 4;

/// Events read from the log in one short read transaction at most.
pub const LOAD_EVENTS_MAX: usize = 1024;

/// Tries of an event that the broker itself refuses (a message fault) before it is quarantined.
pub const ATTEMPTS_DEFAULT: u32 = 5;

/// Tries of an event whose destination is missing, closed or routes nowhere before it is quarantined.
pub const DESTINATION_ATTEMPTS_DEFAULT: u32 = 10;

/// Events waiting for their next try that a relay keeps in memory. Further ones wait in the file.
pub const RETRYING_MAX: usize = 4096;

/// Keys that may be held behind a quarantined event at once. A relay that meets more stops reading and says so.
pub const HELD_KEYS_MAX: usize = 65_536;

/// First and longest wait between tries of one event, in milliseconds.
pub const BACKOFF_MS_DEFAULT: (u64, u64) = (100, 30_000);

/// First and longest wait between connection attempts, in milliseconds.
pub const RECONNECT_MS_DEFAULT: (u64, u64) = (100, 30_000);

/// Wait between connection attempts after a refusal that waiting will not heal (wrong password, missing vhost), in milliseconds.
pub const CONFIG_RETRY_MS: u64 = 30_000;

/// Brokers in one list.
pub const BROKERS_MAX: usize = 64;

/// Deadline of a connection attempt to one broker, in milliseconds: TCP, handshake, channel, confirm mode.
pub const CONNECT_MS_MAX: u64 = 10_000;

/// Deadline of a publisher confirm, in milliseconds. After it the message is silent, and its destination is set apart.
pub const CONFIRM_MS_DEFAULT: u64 = 60_000;

/// How long a destination may hold a full window without a word, in milliseconds. Then nothing more goes to it until it speaks.
pub const SLOW_MS: u64 = 1_000;

/// Destinations without a word that are asked at once, each on a channel of its own.
pub const SILENT_TRIALS_MAX: usize = 16;

/// Channels on which a word that is late is waited for.
pub const SILENT_CHANNELS_MAX: usize = 64;

/// First and longest wait before a destination without a word is asked again, in milliseconds. Each time it has one more message of
/// ours in hand.
pub const SILENT_BACKOFF_MS: (u64, u64) = (1_000, 60_000);

/// Suspended destinations that a relay's status shows.
pub const SUSPENDED_SHOWN_MAX: usize = 16;

/// Deadline of closing a connection, in milliseconds; after it the socket is dropped.
pub const CLOSE_MS_MAX: u64 = 2_000;

/// AMQP heartbeat, in seconds. A dead peer is noticed within twice that.
pub const HEARTBEAT_S_DEFAULT: u16 = 10;

/// Unacknowledged deliveries that a consumer asks for, by default.
pub const PREFETCH_DEFAULT: u16 = 256;

/// Deliveries that one commit of a consumer applies at most.
pub const CONSUMER_BATCH_MAX: usize = 256;

/// The share of the prefetch that deliveries which wait may take: one part of so many. Beyond it a consumer parks them in its store.
pub const WAITING_SHARE: u16 = 4;

/// Deliveries that the consumer of one scope parks in its store at most, unless set. See
/// [`ConsumerBuilder::parked_max`](crate::ConsumerBuilder::parked_max).
pub const PARKED_ROWS_DEFAULT: u64 = 16_384;

/// Bytes that these take at most, unless set.
pub const PARKED_BYTES_DEFAULT: u64 = 64 << 20;

/// Deliveries whose tries the consumer of one scope remembers in its store at most, besides parked ones. It forgets the oldest first.
pub const TRIES_ROWS_MAX: usize = 16_384;

/// Returns to its queue after which a consumer takes a delivery into its store before trying it, unless set. See
/// [`ConsumerBuilder::take_in_after`](crate::ConsumerBuilder::take_in_after).
pub const RETURNS_DEFAULT: u32 = 1;

/// Bodies that a consumer writes into its store, or reads from there, in one step at most, in bytes, but for the last one.
pub const PARKING_STEP_BYTES: usize = 4 << 20;

/// While deliveries come, those that wait for their next try are taken up in one of so many batches.
pub const RETRY_TURNS: u64 = 8;

/// Rows of one relay that [`Store::stats`](crate::Store::stats) reads at most to find the oldest event of one kind.
pub const STATS_ROWS_MAX: usize = 4096;

/// How long something may hold the log or the file before the store logs a warning, unless set, in milliseconds. See
/// [`StoreBuilder::holder_warn_after`](crate::StoreBuilder::holder_warn_after).
pub const HOLDER_WARN_MS_DEFAULT: u64 = 60_000;

/// Times that the store looks for such holders within that time, while something is committed.
pub const HOLDER_LOOKS: u64 = 8;

/// Snapshots that have ended are taken out of the list of living ones once it is this long.
pub const SNAPSHOTS_PRUNED_MIN: usize = 64;

/// Pages between two reports of how far [`Store::verify_pages_with`](crate::Store::verify_pages_with) has come.
pub const PAGES_PER_PROGRESS: u64 = 64;

/// Findings that a verification lists at most; the others are counted.
pub const FINDINGS_MAX: usize = 1000;

/// Most warnings of one kind that one relay, consumer or projection logs within [`LOG_WINDOW_MS`]. It logs further ones at DEBUG, and
/// the next warning says how many they were.
pub const LOG_BURST_MAX: u32 = 16;

/// The window of [`LOG_BURST_MAX`], in milliseconds.
pub const LOG_WINDOW_MS: u64 = 10_000;

/// Events that a subscription holds in memory at most.
pub const SUBSCRIPTION_EVENTS_MAX: usize = 256;

/// Payload bytes that a subscription holds in memory at most, but for the last event it read.
pub const SUBSCRIPTION_BYTES_MAX: usize = 1 << 20;

/// Events that one commit of a projection applies, unless set.
pub const PROJECTION_BATCH_DEFAULT: usize = 256;

/// Payload bytes that one commit of a projection applies at most, but for the last event.
pub const PROJECTION_BATCH_BYTES_MAX: usize = 4 << 20;

/// Events that a projection's filter lets pass by before its position is written for their sake alone.
pub const PROJECTION_SKIP_MAX: u64 = 4096;

/// Rows that one transaction removes at most of what was deleted or forgotten: records of streams, rows of a relay, failures of
/// a projection, marks of a captured table. The rest is removed in later transactions.
pub const CLEAN_STEP: usize = 512;

/// Wait between two pieces of clean-up, in milliseconds.
pub const CLEAN_PAUSE_MS: u64 = 1;

/// First and longest wait after a piece of clean-up that has failed, in milliseconds.
pub const CLEAN_RETRY_MS: (u64, u64) = (1_000, 60_000);

/// Records that the last transaction of a rebuild applies at most: as many as one batch at first, and twice as many each time
/// that a batch has not brought the rebuild nearer to the end of the log. Up to here a rebuild ends beside writers that never
/// pause.
pub const REBUILD_REACH_MAX: usize = 65_536;

/// How long a projection lets events gather after the first, unless set, in milliseconds.
pub const PROJECTION_DELAY_MS_DEFAULT: u64 = 5;

/// Keys of captured tables that one round turns into events at most: half of a default window.
pub const CAPTURE_ROUND_KEYS: usize = 256;

/// Keys of a round that a relay with a full window asks for, so that steady traffic starves no mark.
pub const CAPTURE_SMALL_ROUND_KEYS: usize = 32;

/// How long something waits before a relay asks for such a round, in milliseconds.
pub const CAPTURE_PATIENCE_MS: u64 = 1_000;

/// Keys and values that one round reads, in bytes; it ends behind the key that exceeds it.
pub const CAPTURE_ROUND_BYTES: usize = 1 << 20;

/// Keys whose codec has failed that are remembered, each with a delay of its own. Beyond them rounds slow down instead.
pub const CAPTURE_FAILED_MAX: usize = 1024;

/// First and longest wait before a key whose codec has failed is tried again, in milliseconds.
pub const CAPTURE_RETRY_MS: (u64, u64) = (1_000, 60_000);

/// How long marks of a table whose events stay in the log gather at most, in milliseconds: no relay asks for them.
pub const CAPTURE_OWN_MS: u64 = 250;

/// Wait after a round that could not go on, because the backlog quota is reached or too many codecs fail, in milliseconds.
pub const CAPTURE_PAUSE_MS: u64 = 250;

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

/// How often a consumer that waits for room looks whether there is some, in milliseconds.
pub const ROOM_LOOK_MS: u64 = 1_000;

/// Rejected deliveries that one commit marks to be driven again at most.
pub const REDRIVE_STEP: usize = 256;

const _: () = assert!(HEADERS_BYTES_MAX * 2 <= FRAME_BYTES_MAX as usize);
const _: () = assert!(BATCH_WRITES_MAX <= WRITE_QUEUE_MAX);
const _: () = assert!(WINDOW_EVENTS_DEFAULT <= WINDOW_EVENTS_MAX);
const _: () = assert!(PAYLOAD_BYTES_DEFAULT <= PAYLOAD_BYTES_MAX);
const _: () = assert!(KEY_BYTES_MAX <= u16::MAX as usize);

/// How often an aggregate decides at most when others are faster.
pub const CONFLICT_ATTEMPTS_DEFAULT: u32 = 10;

/// How long a command on an aggregate may keep those behind it in their line waiting, in milliseconds. Then the next begins.
pub const LINE_MS_MAX: u64 = 2_000;

/// Streams whose left-out snapshots are remembered, and warned of once each. Those of further streams are counted alone.
pub const LEFT_OUT_STREAMS_MAX: usize = 1024;

/// A stream's snapshot, in bytes: 16 MiB, as the largest payload.
pub const SNAPSHOT_BYTES_MAX: usize = 16 << 20;
