//! The words that the delivery machine and its worker exchange.
//!
//! The machine is given *inputs* and answers with *actions*. It holds sequence numbers and keys, never payloads; the
//! worker holds the records, the file, the publisher and the clock.

use std::sync::Arc;

use crate::broker::Epoch;
use crate::message::{Fault, Outcome, Ticket};

/// Destination faults wait this many times longer.
pub(super) const DESTINATION_BACKOFF_FACTOR: u64 = 10;

/// Events between the position and what has been read, per event of the lookahead, before what waits gets a row.
const SPAN_PER_LOOKAHEAD: u64 = 4;

/// The ordering key of an event.
pub(crate) type Key = Arc<str>;

/// How far apart events may overtake each other.
///
/// ```
/// use onewrite::PublishOrder;
/// assert_eq!(PublishOrder::default(), PublishOrder::PerKey);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PublishOrder {
    /// At most one unconfirmed event per key; events of different keys, and events without a key, overtake freely. The default.
    #[default]
    PerKey,
    /// At most one unconfirmed event in all, in commit order. What is put into quarantine, or scheduled for later, holds its own key
    /// alone: it is passed by, and so is what waits behind it.
    Total,
    /// Events of one key are pipelined in order. A nack, a return or a lost connection may reorder them.
    Relaxed,
}

/// What happens to later events of a key when one of them is quarantined.
///
/// ```
/// use onewrite::QuarantinePolicy;
/// assert_eq!(QuarantinePolicy::default(), QuarantinePolicy::HoldKey);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QuarantinePolicy {
    /// They wait until it is redriven or discarded: order per key is kept. The default.
    #[default]
    HoldKey,
    /// They go on without it.
    SkipEvent,
}

/// The reason why a relay has suspended a destination.
///
/// ```
/// assert_eq!(onewrite::SuspendCause::Nacks.to_string(), "the broker nacks every message");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SuspendCause {
    /// The broker has confirmed nothing within the confirm deadline. Most often a queue hangs, or has lost its majority.
    Silence,
    /// The broker nacks every message. Most often a queue is full and has `x-overflow: reject-publish`.
    Nacks,
    /// The broker returns every message, and says that a queue behind the destination exists and cannot be reached now. Most
    /// often the queue's node is down.
    Away,
}

impl std::fmt::Display for SuspendCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Silence => "no confirm within the deadline",
            Self::Nacks => "the broker nacks every message",
            Self::Away => "a queue exists and cannot be reached",
        })
    }
}

/// The machine's settings.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) ordering: PublishOrder,
    pub(crate) on_quarantine: QuarantinePolicy,
    /// Unconfirmed events at most.
    pub(crate) window_events: usize,
    /// Unconfirmed payload bytes at most (one event may exceed it alone).
    pub(crate) window_bytes: usize,
    /// Events held in memory at most, in flight ones included.
    pub(crate) lookahead_events: usize,
    /// Bytes of events held in memory at most (one event may exceed it alone).
    pub(crate) lookahead_bytes: usize,
    /// Events asked for in one `Load` at most.
    pub(crate) load_events: usize,
    pub(crate) attempts_max: u32,
    pub(crate) destination_attempts_max: u32,
    pub(crate) backoff_first_ms: u64,
    pub(crate) backoff_max_ms: u64,
    /// Events waiting for a retry in memory at most.
    pub(crate) retrying_max: usize,
    /// Keys blocked or parked at most.
    pub(crate) held_keys_max: usize,
    /// Publishes per second at most.
    pub(crate) rate_limit: Option<u32>,
    /// Seed of the jitter.
    pub(crate) seed: u64,
}

impl Settings {
    /// For so long a missing exchange is not asked for again: the shortest wait of an event that it has failed, so that the first of
    /// them to be due asks.
    pub(crate) fn probe_wait_ms(&self) -> u64 {
        self.backoff_first_ms.saturating_mul(DESTINATION_BACKOFF_FACTOR).min(self.backoff_max_ms) / 2
    }

    /// How far the position may stay behind what has been read for the sake of events that wait.
    pub(crate) fn span_events(&self) -> u64 {
        self.lookahead_events as u64 * SPAN_PER_LOOKAHEAD
    }
}

/// What the machine knows of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) seq: u64,
    pub(crate) key: Option<Key>,
    pub(crate) exchange: Arc<str>,
    pub(crate) routing_key: Arc<str>,
    pub(crate) bytes: usize,
    /// Earliest publication, Unix milliseconds.
    pub(crate) not_before_ms: Option<u64>,
    /// Latest publication, Unix milliseconds.
    pub(crate) expires_ms: Option<u64>,
}

/// One position of the log, as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// An event to publish.
    Event(Entry),
    /// A record that stays in the log only.
    Unpublished { seq: u64 },
    /// A record that fails its check. Quarantined; its key is unknown, so it holds nobody.
    Undecodable { seq: u64, fault: Fault },
    /// An exception says what becomes of it. Only the log brings such; nothing of it is held.
    Exception { seq: u64 },
}

impl Loaded {
    pub(crate) fn seq(&self) -> u64 {
        match self {
            Self::Event(entry) => entry.seq,
            Self::Unpublished { seq } | Self::Undecodable { seq, .. } | Self::Exception { seq } => *seq,
        }
    }
}

/// Why an event is an exception to the position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exception {
    pub(crate) state: ExceptionState,
    /// Message attempts spent.
    pub(crate) attempts: u32,
    /// Destination attempts spent.
    pub(crate) destination_attempts: u32,
    /// The last fault, if any.
    pub(crate) fault: Option<Fault>,
}

/// The kinds of exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExceptionState {
    /// To be tried again, at this wall time when it is found on disk after a restart.
    Retry { due_ms: u64 },
    /// Not to be published before this wall time.
    Scheduled { due_ms: u64 },
    /// Taken out, at this wall time, until a person redrives or discards it. `holds_key`: later events of its key wait.
    Quarantined { at_ms: u64, holds_key: bool },
    /// Given up by a person before the position was past it: kept until it is, so that a restart does not take it for new.
    Discarded,
}

/// A durable change of the cursor. The worker keeps them in order. What one step leaves is written together or not at all (but for a
/// step that quarantines: what stands before an [`Action::Quarantined`] may be written without what comes after it): a row that replaces
/// another must not be found beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Everything below is settled, but for the exceptions and the parked.
    Position(u64),
    /// The event becomes an exception, in this state.
    PutException { seq: u64, key: Option<Key>, exception: Exception },
    /// It is one no longer.
    DropException { seq: u64 },
    /// The event waits, on disk, behind an earlier one of its key.
    Park { key: Key, seq: u64 },
    /// It no longer does.
    Unpark { key: Key, seq: u64 },
}

/// Where the search for expired events goes on: first what has a row, then what the log has still to bring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ScanAt {
    /// Exceptions that are due at some time, after this (due time, seq).
    Due(Option<(u64, u64)>),
    /// Parked events, after this one.
    Parked(Option<(Key, u64)>),
    /// The log, from here on.
    Log(u64),
}

/// An expired event that is not in memory, and where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpiredEvent {
    pub(crate) seq: u64,
    pub(crate) key: Option<Key>,
    pub(crate) place: ExpiredPlace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ExpiredPlace {
    /// Without a row.
    Log,
    Parked,
    /// With this exception.
    Exception(Exception),
}

/// What the machine is given.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// The log ends (exclusively) here now. Rises only.
    Tail(u64),
    /// Answers `Load`: every position in `from..to`.
    Loaded { to: u64, events: Vec<Loaded> },
    /// Answers `LoadDue`: exceptions that are due, each with its event, in order of (due time, seq). If there are more of
    /// them, `resume` is the last one read; else `next_due_ms` is when the next one on disk will be due. An exception
    /// whose record fails its check comes as `Undecodable`.
    LoadedDue { due: Vec<(Loaded, Exception)>, resume: Option<(u64, u64)>, next_due_ms: Option<u64> },
    /// Answers `LoadParked`: parked events of this key in order; `more` if others are left behind them.
    LoadedParked { key: Key, events: Vec<Loaded>, more: bool },
    /// The publisher is connected.
    Up { epoch: Epoch },
    /// The publisher is not.
    Down { fault: Fault },
    /// The broker blocks us, or no longer does.
    Blocked(bool),
    /// What became of publishes.
    Outcomes(Vec<(Ticket, Outcome)>),
    /// A quarantined event was durably turned into `Retry`, due now, by a person, its counters cleared. It
    /// comes as `Undecodable` where it cannot be published any more. With the fault that it had gone there for.
    Redriven(Loaded, Fault),
    /// Room is wanted: what has expired and is not in flight goes to quarantine now, wherever it stands.
    LetExpiredGo,
    /// Answers `FindExpired`. `next` is where the search goes on; without it everything before `to` has been looked at.
    /// `earliest_ms`: when the first of the others expires.
    FoundExpired { found: Vec<ExpiredEvent>, next: Option<ScanAt>, to: u64, earliest_ms: Option<u64> },
    /// A quarantined event was durably removed by a person.
    Discarded { seq: u64, key: Option<Key> },
    /// Publish nothing new until `Resume`.
    Pause,
    /// Go on.
    Resume,
    /// Time has passed.
    Tick,
}

/// What the machine wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Publish this event under this ticket. `resend`: it may have been published before.
    Publish { epoch: Epoch, ticket: Ticket, seq: u64, resend: bool, isolated: bool },
    /// Read `from..` up to the tail, at most this much (but at least one). One is out at a time.
    Load { from: u64, events_max: usize, bytes_max: usize },
    /// Read exceptions (retries, scheduled events) due at or before this wall time, after this (due time, seq), at most
    /// this many. Some may be in memory already. One is out at a time.
    LoadDue { after: Option<(u64, u64)>, until_ms: u64, events_max: usize },
    /// Read the first parked events of this key, at most this many. One per key is out at a time.
    LoadParked { key: Key, events_max: usize },
    /// Find events that have expired by this wall time, looking at this many at most. Events that have an exception are
    /// passed over in the log; nothing of what is found is held. One is out at a time.
    FindExpired { at: ScanAt, until_ms: u64, events_max: usize },
    /// Of the events before `to`, none waits any more that had expired; the first of the others does at `earliest_ms`. (The
    /// `Save`s stand before.)
    Scanned { to: u64, earliest_ms: Option<u64> },
    /// Write this down.
    Save(Change),
    /// The broker has it. (Its `Save`s stand before.)
    Confirmed { seq: u64 },
    /// It went to quarantine. (Its `Save`s stand before.)
    Quarantined { seq: u64, fault: Fault },
    /// The machine no longer holds this event; the worker may drop its record. Said once for every event loaded (one that
    /// is loaded again while it is held is not held twice).
    Forget { seq: u64 },
}

/// What was found on disk when the relay starts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recovered {
    pub(crate) position: u64,
    /// The log ends (exclusively) here.
    pub(crate) tail: u64,
    /// Events that hold their key from disk: quarantined ones, and retries beyond `retrying`.
    pub(crate) holding: Vec<(u64, Key)>,
    /// Events in state `Retry`, which hold their key too: at most `retrying_max`, lowest first.
    pub(crate) retrying: Vec<(Loaded, Exception)>,
    /// Keys that have parked events below the position.
    pub(crate) parked_keys: Vec<Key>,
    /// Parked events at or past the position. The log brings them again, in order, so their rows are dropped.
    pub(crate) parked_ahead: Vec<(Key, u64)>,
    /// The earliest due time on disk among exceptions that are not in `retrying`.
    pub(crate) next_due_ms: Option<u64>,
}

/// Figures for `status` and `stats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Figures {
    pub(crate) position: u64,
    pub(crate) tail: u64,
    pub(crate) in_flight: usize,
    pub(crate) in_flight_bytes: usize,
    pub(crate) in_memory: usize,
    pub(crate) retrying: usize,
    pub(crate) held_keys: usize,
    pub(crate) confirmed: u64,
    pub(crate) retried: u64,
    pub(crate) quarantined: u64,
    /// `held_keys_max` is reached: nothing more is read.
    pub(crate) stalled: bool,
}
