//! How the library is tuned: steps, paces and bounds that no setting moves. They may change in any release.
//!
//! Units stand last in a name. What a setting or the protocol bounds stands in `limits`.

/// Queues that a publisher asks for at most to learn why RabbitMQ has returned a message.
#[cfg(feature = "rabbitmq")]
pub(crate) const CAUSE_QUEUES_MAX: usize = 8;

/// How long a publisher or source waits, while it connects, for each answer about a queue that it declares, in milliseconds. RabbitMQ 4
/// answers after a minute if the queue's node is down.
#[cfg(feature = "rabbitmq")]
pub(crate) const QUEUE_AWAY_MS: u64 = 2_000;

/// How long a publisher waits at most for the answer why RabbitMQ has returned a message, in milliseconds.
#[cfg(feature = "rabbitmq")]
pub(crate) const CAUSE_MS_MAX: u64 = 10_000;

/// How long such an answer holds for further messages to the same destination, in milliseconds.
#[cfg(feature = "rabbitmq")]
pub(crate) const CAUSE_KNOWN_MS: u64 = 1_000;

/// How often opening computes the checksum of each byte of a journal at most, on average. Frames do not overlap, but for one that a newer one has partly
/// written over.
pub(crate) const JOURNAL_CHECKS_MAX: usize = 4;

/// Bytes behind the end of a store's file that its journal may write to at most. The file is made longer before a frame needs it.
pub(crate) const JOURNAL_REACH_BYTES_MAX: u64 = 8 << 30;

/// Looks that opening takes at a path which other processes change at the same moment, at most.
pub(crate) const OPEN_ROUNDS_MAX: usize = 8;

/// Wait between two looks at an empty file that another process may be about to fill, in milliseconds.
pub(crate) const EMPTY_FILE_MS: u64 = 5;

/// Commits after which a store has looked whether its path still leads to its file, before the next begins.
pub(crate) const NAME_COMMITS_MAX: u64 = 64;

/// Events after which a store has looked whether its path still leads to its file, before the next commit begins.
pub(crate) const NAME_EVENTS_MAX: u64 = 2_048;

/// Time after which a store looks whether its path still leads to its file, before the next commit begins or once it is idle, in milliseconds.
pub(crate) const NAME_MS_MAX: u64 = 1_000;

/// Folders that cannot be synced of which a process warns, at most, each once.
pub(crate) const UNSYNCED_FOLDERS_MAX: usize = 64;

/// How long a caller waits for the write transaction before it logs what holds it, in milliseconds. It logs again when it has waited
/// for twice as long, and so on.
pub(crate) const WRITE_WAIT_WARN_MS: u64 = 1000;

/// The longest time from one such warning to the next, in milliseconds.
pub(crate) const WRITE_WAIT_WARN_MS_MAX: u64 = 60_000;

/// Writes that share one commit at most.
pub(crate) const BATCH_WRITES_MAX: usize = 256;

/// How long the closures of one group run, in milliseconds: the one that exceeds it is the last. Further writes are the next group's.
pub(crate) const GROUP_MS_MAX: u64 = 50;

/// The same where handlers of consumers or projections run in it, in milliseconds.
pub(crate) const HANDLERS_MS_MAX: u64 = 10;

/// Times that a write closure runs at most, however many of its group fail.
pub(crate) const RUNS_MAX: u8 = 3;

/// Chunks of 64 numbers of a producer's lane of which a consumer keeps the hashes of contents: at least 16,384 numbers, as many as a
/// relay may have in flight. A consumer rejects a message that has an older number: it does not know any more whether the message
/// is a repeat.
pub(crate) const LANE_CHUNKS_MAX: u64 = 257;

/// Rows that are looked at for a lane to forget, each time a new one finds no room.
pub(crate) const LANES_LOOK: usize = 64;

/// How far a producer's clock may be ahead of this store's, in milliseconds, where times are compared.
pub(crate) const CLOCK_TOLERANCE_MS: u64 = 5 * 60 * 1000;

/// Inbox entries that one commit looks at while forgetting old ones.
pub(crate) const INBOX_PRUNE_STEP: usize = 64;

/// The store age (the time that has passed while the store was open) is written by a commit that happens anyway once it has grown by
/// so much, in milliseconds. A crash loses at most that, or the time since the last commit.
pub(crate) const AGE_SAVE_MS: u64 = 5_000;

/// The store age is written at the close if it has grown by so much, in milliseconds.
pub(crate) const AGE_SAVE_MS_MIN: u64 = 1_000;

/// Retention by age is computed in steps of this many milliseconds at least.
pub(crate) const AGE_STEP_MS_MIN: u64 = 1_000;

/// Retention by age is computed in so many steps of the age that is kept.
pub(crate) const AGE_STEPS: u64 = 64;

/// Milestones of ages that the file keeps at most; two to a step.
pub(crate) const AGE_MILESTONES_MAX: usize = 136;

/// Events between two bulk writes of what is derived from the log: lanes and the stream index. Records younger than the
/// last bulk write are not trimmed.
pub(crate) const DERIVED_FLUSH_EVENTS: u64 = 4096;

/// Lanes, and streams, held in memory at most beside those that changed since the last bulk write.
pub(crate) const WRITE_BACK_CACHE_MAX: usize = 16_384;

/// Revisions of streams whose records are missing or damaged, and for which opening keeps a place in memory (8 bytes each), at most.
pub(crate) const REVISION_GAPS_MAX: u64 = 1 << 20;

/// Bytes of records between two such bulk writes.
pub(crate) const DERIVED_FLUSH_BYTES: u64 = 64 << 20;

/// Records that one commit removes at most, once they are confirmed and past retention; twice as many as the commit
/// appends, if that is more.
pub(crate) const TRIM_STEP: u64 = 512;

/// Bytes of records that one commit removes at most, but for the last one; twice what the commit appends, if that is more.
pub(crate) const TRIM_STEP_BYTES: u64 = 16 << 20;

/// Trimming is deferred until this many records can go, until the store is idle, or until one of the next two bounds is reached.
pub(crate) const TRIM_BATCH_MIN: u64 = 256;

/// Bytes of records that can go and are still in the file at most: the next commit removes them.
pub(crate) const TRIM_DEFER_BYTES_MAX: u64 = 4 << 20;

/// How long trimming is deferred at most while writes flow, in milliseconds: the next commit after that does it.
pub(crate) const TRIM_DEFER_MS_MAX: u64 = 1_000;

/// How long a write waits for a relay to let expired events go, under
/// [`QuotaPolicy::DropExpired`](crate::QuotaPolicy::DropExpired), in milliseconds.
pub(crate) const QUOTA_SCAN_MS_MAX: u64 = 1_000;

/// How long a relay's thread may take to say what it knows, at the end of a wait for confirms, in milliseconds.
/// See [`Receipt::wait_confirmed`](crate::Receipt::wait_confirmed).
pub(crate) const ANSWER_MS_MAX: u64 = 1_000;

/// Events that a relay holds in memory beyond the window, per event of the window.
pub(crate) const LOOKAHEAD_PER_WINDOW: usize = 4;

/// Events read from the log in one short read transaction at most.
pub(crate) const LOAD_EVENTS_MAX: usize = 1024;

/// Events waiting for their next try that a relay keeps in memory. Further ones wait in the file.
pub(crate) const RETRYING_MAX: usize = 4096;

/// Keys that may be held behind a quarantined event at once. A relay that meets more stops reading and says so.
pub(crate) const HELD_KEYS_MAX: usize = 65_536;

/// Wait between connection attempts after a refusal that waiting will not heal (wrong password, missing vhost), in milliseconds.
#[cfg(feature = "rabbitmq")]
pub(crate) const CONFIG_RETRY_MS: u64 = 30_000;

/// How long a destination may hold a full window without a word, in milliseconds. Then nothing more goes to it until it speaks.
pub(crate) const SLOW_MS: u64 = 1_000;

/// Destinations without a word that are asked at once, each on a channel of its own.
pub(crate) const SILENT_TRIALS_MAX: usize = 16;

/// Channels on which a word that is late is waited for.
#[cfg(feature = "rabbitmq")]
pub(crate) const SILENT_CHANNELS_MAX: usize = 64;

/// First and longest wait before a destination without a word is asked again, in milliseconds. Each time it has one more message of
/// ours in hand.
pub(crate) const SILENT_BACKOFF_MS: (u64, u64) = (1_000, 60_000);

/// Suspended destinations that a relay's status shows.
pub(crate) const SUSPENDED_SHOWN_MAX: usize = 16;

/// Deadline of closing a connection, in milliseconds; after it the socket is dropped.
#[cfg(feature = "rabbitmq")]
pub(crate) const CLOSE_MS_MAX: u64 = 2_000;

/// Deliveries that one commit of a consumer applies at most.
pub(crate) const CONSUMER_BATCH_MAX: usize = 256;

/// The share of the prefetch that deliveries which wait may take: one part of so many. Beyond it a consumer parks them in its store.
pub(crate) const WAITING_SHARE: u16 = 4;

/// Deliveries whose tries the consumer of one scope remembers in its store at most, besides parked ones. It forgets the oldest first.
pub(crate) const TRIES_ROWS_MAX: usize = 16_384;

/// Bodies that a consumer writes into its store, or reads from there, in one step at most, in bytes, but for the last one.
pub(crate) const PARKING_STEP_BYTES: usize = 4 << 20;

/// While deliveries come, those that wait for their next try are taken up in one of so many batches.
pub(crate) const RETRY_ITERATIONS: u64 = 8;

/// Times that the store looks for such holders within that time, while something is committed.
pub(crate) const HOLDER_LOOKS: u64 = 8;

/// Snapshots that have ended are taken out of the list of living ones once it is this long.
pub(crate) const SNAPSHOTS_PRUNED_MIN: usize = 64;

/// Pages between two reports of how far [`Store::verify_pages_with`](crate::Store::verify_pages_with) has come.
pub(crate) const PAGES_PER_PROGRESS: u64 = 64;

/// Findings that a verification lists at most; the others are counted.
pub(crate) const FINDINGS_MAX: usize = 1000;

/// Most warnings of one kind that one relay, consumer or projection logs within [`LOG_WINDOW_MS`]. It logs further ones at DEBUG, and
/// the next warning says how many they were.
pub(crate) const LOG_BURST_MAX: u32 = 16;

/// The window of [`LOG_BURST_MAX`], in milliseconds.
pub(crate) const LOG_WINDOW_MS: u64 = 10_000;

/// Events that a subscription holds in memory at most.
pub(crate) const SUBSCRIPTION_EVENTS_MAX: usize = 256;

/// Payload bytes that a subscription holds in memory at most, but for the last event it read.
pub(crate) const SUBSCRIPTION_BYTES_MAX: usize = 1 << 20;

/// Payload bytes that one commit of a projection applies at most, but for the last event.
pub(crate) const PROJECTION_BATCH_BYTES_MAX: usize = 4 << 20;

/// Events that a projection's filter lets pass by before its position is written for their sake alone.
pub(crate) const PROJECTION_SKIP_MAX: u64 = 4096;

/// Rows that one transaction removes at most of what was deleted or forgotten: records of streams, rows of a relay, failures of
/// a projection, dirty keys of a captured table. The rest is removed in later transactions.
pub(crate) const CLEAN_STEP: usize = 512;

/// Wait between two pieces of clean-up, in milliseconds.
pub(crate) const CLEAN_PAUSE_MS: u64 = 1;

/// First and longest wait after a piece of clean-up that has failed, in milliseconds.
pub(crate) const CLEAN_RETRY_MS: (u64, u64) = (1_000, 60_000);

/// Records that the last transaction of a rebuild applies at most: as many as one batch at first, and twice as many each time
/// that a batch has not brought the rebuild nearer to the end of the log. Up to here a rebuild ends beside writers that never
/// pause.
pub(crate) const REBUILD_REACH_MAX: usize = 65_536;

/// Keys of captured tables that one pass turns into events at most: half of a default window.
pub(crate) const CAPTURE_PASS_KEYS: usize = 256;

/// Keys of a pass that a relay with a full window asks for, so that steady traffic starves no dirty key.
pub(crate) const CAPTURE_SMALL_PASS_KEYS: usize = 32;

/// How long something waits before a relay asks for such a pass, in milliseconds.
pub(crate) const CAPTURE_PASS_TIMEOUT_MS: u64 = 1_000;

/// Keys and values that one pass reads, in bytes; it ends behind the key that exceeds it.
pub(crate) const CAPTURE_PASS_BYTES: usize = 1 << 20;

/// Keys whose codec has failed that are remembered, each with a delay of its own. Beyond them passes slow down instead.
pub(crate) const CAPTURE_FAILED_MAX: usize = 1024;

/// First and longest wait before a key whose codec has failed is tried again, in milliseconds.
pub(crate) const CAPTURE_RETRY_MS: (u64, u64) = (1_000, 60_000);

/// How long dirty keys of a table whose events stay in the log gather at most, in milliseconds: no relay asks for them.
pub(crate) const CAPTURE_OWN_MS: u64 = 250;

/// Wait after a pass that could not go on, because the backlog quota is reached or too many codecs fail, in milliseconds.
pub(crate) const CAPTURE_PAUSE_MS: u64 = 250;

/// How often a consumer that waits for room looks whether there is some, in milliseconds.
pub(crate) const ROOM_LOOK_MS: u64 = 1_000;

/// Rejected deliveries that one commit marks to be driven again at most.
pub(crate) const REDRIVE_STEP: usize = 256;

/// How long a command on an aggregate may keep those behind it in their line waiting, in milliseconds. Then the next begins.
pub(crate) const LINE_MS_MAX: u64 = 2_000;

/// Streams whose left-out snapshots are remembered, and warned of once each. Those of further streams are counted alone.
pub(crate) const LEFT_OUT_STREAMS_MAX: usize = 1024;

/// Names of lanes that a relay keeps in memory at most.
pub(crate) const NAMES_MAX: usize = 1024;
