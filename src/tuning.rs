//! The library's tuning: steps, paces and bounds that no setting moves. They may change in any
//! release.
//!
//! Units stand last in a name. `limits` holds the bounds of settings and of the protocol.

/// Most queues that a publisher queries to learn why RabbitMQ has returned a message.
#[cfg(feature = "rabbitmq")]
pub(crate) const CAUSE_QUEUES_MAX: usize = 8;

/// How long a connecting publisher or source waits for each answer about a queue that it declares,
/// in milliseconds. RabbitMQ 4 answers after a minute if the queue's node is down.
#[cfg(feature = "rabbitmq")]
pub(crate) const QUEUE_AWAY_MS: u64 = 2_000;

/// Longest wait of a publisher for the reason why RabbitMQ has returned a message, in milliseconds.
#[cfg(feature = "rabbitmq")]
pub(crate) const CAUSE_MS_MAX: u64 = 10_000;

/// How long such a reason holds for further messages to the same destination, in milliseconds.
#[cfg(feature = "rabbitmq")]
pub(crate) const CAUSE_KNOWN_MS: u64 = 1_000;

/// Most checksums that opening computes for each byte of a journal, on average. Frames overlap only
/// where a newer frame has partly overwritten an older one.
pub(crate) const JOURNAL_CHECKS_MAX: usize = 4;

/// Most bytes behind the end of a store's file that its journal may write to. The file is made
/// longer before a frame needs the bytes.
pub(crate) const JOURNAL_REACH_BYTES_MAX: u64 = 8 << 30;

/// Most checks of a path by opening, while other processes change the path at the same moment.
pub(crate) const OPEN_ROUNDS_MAX: usize = 8;

/// Wait between two checks of an empty file that another process may be about to fill, in
/// milliseconds.
pub(crate) const EMPTY_FILE_MS: u64 = 5;

/// Most commits after which a store checks that its path still leads to its file. The check comes
/// before the next commit begins.
pub(crate) const NAME_COMMITS_MAX: u64 = 64;

/// Most events after which a store checks that its path still leads to its file. The check comes
/// before the next commit begins.
pub(crate) const NAME_EVENTS_MAX: u64 = 2_048;

/// Time after which a store checks that its path still leads to its file, in milliseconds. The
/// check comes before the next commit begins, or once the store is idle.
pub(crate) const NAME_MS_MAX: u64 = 1_000;

/// Most folders that cannot be synced for which a process logs a warning, one warning each.
pub(crate) const UNSYNCED_FOLDERS_MAX: usize = 64;

/// How long a caller waits for the write transaction before it logs what holds the transaction, in
/// milliseconds. The caller logs again when it has waited twice as long, and so on.
pub(crate) const WRITE_WAIT_WARN_MS: u64 = 1000;

/// The longest time from one such warning to the next, in milliseconds.
pub(crate) const WRITE_WAIT_WARN_MS_MAX: u64 = 60_000;

/// Most writes that share one commit.
pub(crate) const BATCH_WRITES_MAX: usize = 256;

/// How long the closures of one group run, in milliseconds. The closure that exceeds this is the
/// group's last. Further writes go to the next group.
pub(crate) const GROUP_MS_MAX: u64 = 50;

/// The same for a group in which handlers of consumers or projections run, in milliseconds.
pub(crate) const HANDLERS_MS_MAX: u64 = 10;

/// Most runs of a write closure, however many closures of its group fail.
pub(crate) const RUNS_MAX: u8 = 3;

/// Chunks of 64 numbers of a producer's lane for which a consumer keeps the hashes of contents.
/// This covers at least 16,384 numbers, as many as a relay may have in flight. A consumer rejects a
/// message with an older number: the consumer can no longer know whether the message is a repeat.
pub(crate) const LANE_CHUNKS_MAX: u64 = 257;

/// Rows that are searched for a lane to forget, each time a new lane finds no room.
pub(crate) const LANES_LOOK: usize = 64;

/// How far a producer's clock may be ahead of this store's clock, in milliseconds, where times are
/// compared.
pub(crate) const CLOCK_TOLERANCE_MS: u64 = 5 * 60 * 1000;

/// Most inbox entries that one commit examines while it forgets old ones.
pub(crate) const INBOX_PRUNE_STEP: usize = 64;

/// Growth after which a commit that happens anyway writes the store age, in milliseconds. A crash
/// loses at most this much of the age, or the time since the last commit. The store age is the time
/// that has passed while the store was open.
pub(crate) const AGE_SAVE_MS: u64 = 5_000;

/// Growth after which closing the store writes the store age, in milliseconds.
pub(crate) const AGE_SAVE_MS_MIN: u64 = 1_000;

/// Shortest step in which retention by age is computed, in milliseconds.
pub(crate) const AGE_STEP_MS_MIN: u64 = 1_000;

/// Steps of the kept age in which retention by age is computed.
pub(crate) const AGE_STEPS: u64 = 64;

/// Most milestones of ages that the file keeps, two to a step.
pub(crate) const AGE_MILESTONES_MAX: usize = 136;

/// Events between two bulk writes of the derived indexes: lanes and the stream index. Records
/// younger than the last bulk write are not trimmed.
pub(crate) const DERIVED_FLUSH_EVENTS: u64 = 4096;

/// Most lanes, and most streams, held in memory beside those that changed since the last bulk
/// write.
pub(crate) const WRITE_BACK_CACHE_MAX: usize = 16_384;

/// Most stream revisions with a missing or damaged record for which opening keeps a place in memory
/// (8 bytes each).
pub(crate) const REVISION_GAPS_MAX: u64 = 1 << 20;

/// Bytes of records between two such bulk writes.
pub(crate) const DERIVED_FLUSH_BYTES: u64 = 64 << 20;

/// Most records that one commit removes, once they are confirmed and past retention. If the commit
/// appends more than half as many, it may remove twice as many as it appends.
pub(crate) const TRIM_STEP: u64 = 512;

/// Most bytes of records that one commit removes, except for the last record. If the commit appends
/// more than half as much, it may remove twice as much as it appends.
pub(crate) const TRIM_STEP_BYTES: u64 = 16 << 20;

/// Trimming is deferred until this many records can go, until the store is idle, or until one of
/// the next two bounds is reached.
pub(crate) const TRIM_BATCH_MIN: u64 = 256;

/// Most bytes of records in the file that can go. Beyond this, the next commit removes them.
pub(crate) const TRIM_DEFER_BYTES_MAX: u64 = 4 << 20;

/// Longest deferral of trimming while writes flow, in milliseconds. The next commit after that
/// trims.
pub(crate) const TRIM_DEFER_MS_MAX: u64 = 1_000;

/// How long a write waits for a relay to release expired events, under
/// [`QuotaPolicy::DropExpired`](crate::QuotaPolicy::DropExpired), in milliseconds.
pub(crate) const QUOTA_SCAN_MS_MAX: u64 = 1_000;

/// How long a relay's thread may take to report its state at the end of a wait for confirms, in
/// milliseconds. See [`Receipt::wait_confirmed`](crate::Receipt::wait_confirmed).
pub(crate) const ANSWER_MS_MAX: u64 = 1_000;

/// Events that a relay holds in memory beyond the window, per event of the window.
pub(crate) const LOOKAHEAD_PER_WINDOW: usize = 4;

/// Most events read from the log in one short read transaction.
pub(crate) const LOAD_EVENTS_MAX: usize = 1024;

/// Most events waiting for their next try that a relay keeps in memory. Further events wait in the
/// file.
pub(crate) const RETRYING_MAX: usize = 4096;

/// Most keys that quarantined events may hold at once. A relay that meets more keys stops reading
/// and reports that.
pub(crate) const HELD_KEYS_MAX: usize = 65_536;

/// Wait between connection attempts after a refusal that waiting will not heal (wrong password,
/// missing vhost), in milliseconds.
#[cfg(feature = "rabbitmq")]
pub(crate) const CONFIG_RETRY_MS: u64 = 30_000;

/// How long a destination may hold a full window without an answer, in milliseconds. After that,
/// the relay sends nothing more to the destination until it answers.
pub(crate) const SLOW_MS: u64 = 1_000;

/// Most silent destinations on trial at once, each on a channel of its own.
pub(crate) const SILENT_TRIALS_MAX: usize = 16;

/// Most channels on which the relay waits for late answers.
#[cfg(feature = "rabbitmq")]
pub(crate) const SILENT_CHANNELS_MAX: usize = 64;

/// First and longest wait before the next trial of a silent destination, in milliseconds. Each
/// trial leaves one more message of the relay with the destination.
pub(crate) const SILENT_BACKOFF_MS: (u64, u64) = (1_000, 60_000);

/// Most suspended destinations that a relay's status shows.
pub(crate) const SUSPENDED_SHOWN_MAX: usize = 16;

/// Deadline of closing a connection, in milliseconds. After the deadline, the socket is dropped.
#[cfg(feature = "rabbitmq")]
pub(crate) const CLOSE_MS_MAX: u64 = 2_000;

/// Most deliveries that one commit of a consumer applies.
pub(crate) const CONSUMER_BATCH_MAX: usize = 256;

/// The share of the prefetch that waiting deliveries may take: one part of this many. Beyond it,
/// the consumer parks them in its store.
pub(crate) const WAITING_SHARE: u16 = 4;

/// Most deliveries whose tries the consumer of one scope remembers in its store, besides parked
/// deliveries. The consumer forgets the oldest first.
pub(crate) const TRIES_ROWS_MAX: usize = 16_384;

/// Most bytes of bodies that a consumer writes into its store, or reads from its store, in one
/// step, except for the last body.
pub(crate) const PARKING_STEP_BYTES: usize = 4 << 20;

/// While deliveries come, one of this many batches takes up those that wait for their next try.
pub(crate) const RETRY_ITERATIONS: u64 = 8;

/// Number of times that the store checks for holders within the time of a warning, while commits
/// happen.
pub(crate) const HOLDER_LOOKS: u64 = 8;

/// Length of the list of snapshots from which on the store removes ended snapshots.
pub(crate) const SNAPSHOTS_PRUNED_MIN: usize = 64;

/// Pages between two reports of the progress of
/// [`Store::verify_pages_with`](crate::Store::verify_pages_with).
pub(crate) const PAGES_PER_PROGRESS: u64 = 64;

/// Most findings that a verification lists. Further findings are only counted.
pub(crate) const FINDINGS_MAX: usize = 1000;

/// Most warnings of one kind that one relay, consumer or projection logs within [`LOG_WINDOW_MS`].
/// Further warnings are logged at DEBUG, and the next warning says how many they were.
pub(crate) const LOG_BURST_MAX: u32 = 16;

/// The window of [`LOG_BURST_MAX`], in milliseconds.
pub(crate) const LOG_WINDOW_MS: u64 = 10_000;

/// Most events that a subscription holds in memory.
pub(crate) const SUBSCRIPTION_EVENTS_MAX: usize = 256;

/// Most payload bytes that a subscription holds in memory, except for the last event that it read.
pub(crate) const SUBSCRIPTION_BYTES_MAX: usize = 1 << 20;

/// Most payload bytes that one commit of a projection applies, except for the last event.
pub(crate) const PROJECTION_BATCH_BYTES_MAX: usize = 4 << 20;

/// Events that a projection's filter may skip before the projection writes its position for them
/// alone.
pub(crate) const PROJECTION_SKIP_MAX: u64 = 4096;

/// Most deleted or forgotten rows that one transaction removes: records of streams, rows of a
/// relay, failures of a projection, dirty keys of a captured table. Later transactions remove the
/// rest.
pub(crate) const CLEAN_STEP: usize = 512;

/// Wait between two pieces of clean-up, in milliseconds.
pub(crate) const CLEAN_PAUSE_MS: u64 = 1;

/// First and longest wait after a failed piece of clean-up, in milliseconds.
pub(crate) const CLEAN_RETRY_MS: (u64, u64) = (1_000, 60_000);

/// Most records that the last transaction of a rebuild applies. The first limit is one batch. The
/// limit doubles each time that a batch has not brought the rebuild nearer to the end of the log.
/// So a rebuild ends, up to this bound, even beside writers that never pause.
pub(crate) const REBUILD_REACH_MAX: usize = 65_536;

/// Most keys of captured tables that one pass turns into events: half of a default window.
pub(crate) const CAPTURE_PASS_KEYS: usize = 256;

/// Keys of a pass that a relay with a full window requests, so that steady traffic starves no dirty
/// key.
pub(crate) const CAPTURE_SMALL_PASS_KEYS: usize = 32;

/// How long captured tables wait with something to publish before a relay requests such a pass, in
/// milliseconds.
pub(crate) const CAPTURE_PASS_TIMEOUT_MS: u64 = 1_000;

/// Most bytes of keys and values that one pass reads. The pass ends after the key that exceeds
/// this.
pub(crate) const CAPTURE_PASS_BYTES: usize = 1 << 20;

/// Most keys with a failed codec that are remembered, each with a delay of its own. Beyond this,
/// passes slow down instead.
pub(crate) const CAPTURE_FAILED_MAX: usize = 1024;

/// First and longest wait before a key with a failed codec is tried again, in milliseconds.
pub(crate) const CAPTURE_RETRY_MS: (u64, u64) = (1_000, 60_000);

/// Longest time that dirty keys gather if the events of their table stay in the log, in
/// milliseconds. No relay requests passes for these keys.
pub(crate) const CAPTURE_OWN_MS: u64 = 250;

/// Wait after a pass that could not go on, in milliseconds: the backlog quota is reached, or too
/// many codecs fail.
pub(crate) const CAPTURE_PAUSE_MS: u64 = 250;

/// Time between two checks of a consumer that waits for room, in milliseconds.
pub(crate) const ROOM_LOOK_MS: u64 = 1_000;

/// Most rejected deliveries that one commit marks for redrive.
pub(crate) const REDRIVE_STEP: usize = 256;

/// How long a command on an aggregate may keep the commands behind it in line waiting, in
/// milliseconds. Then the next command begins.
pub(crate) const LINE_MS_MAX: u64 = 2_000;

/// Most streams whose left-out snapshots are remembered, with one warning each. Those of further
/// streams are only counted.
pub(crate) const LEFT_OUT_STREAMS_MAX: usize = 1024;

/// Most names of lanes that a relay keeps in memory.
pub(crate) const NAMES_MAX: usize = 1024;
