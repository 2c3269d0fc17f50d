//! The types that the delivery machine and its worker exchange.
//!
//! The worker gives the machine *inputs*, and the machine answers with *actions*. The machine holds
//! sequence numbers and keys, never payloads. The worker holds the records, the file, the publisher
//! and the clock.

use std::sync::Arc;

use crate::broker::Epoch;
use crate::message::{Fault, Outcome, Ticket};

/// The factor by which the wait after a destination fault is longer.
pub(super) const DESTINATION_BACKOFF_FACTOR: u64 = 10;

/// The span that the position may stay behind the read events, per event of the lookahead. Beyond
/// this span, waiting events get a row.
const SPAN_PER_LOOKAHEAD: u64 = 4;

/// The ordering key of an event.
pub(crate) type Key = Arc<str>;

/// How far events may overtake each other.
///
/// ```
/// use onewrite::PublishOrder;
/// assert_eq!(PublishOrder::default(), PublishOrder::PerKey);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PublishOrder {
    /// At most one unconfirmed event per key, the default. Events of different keys, and events
    /// without a key, overtake freely.
    #[default]
    PerKey,
    /// At most one unconfirmed event in all, in commit order. A quarantined or scheduled event
    /// holds its own key alone: later events pass it and the events that wait behind it.
    Total,
    /// Events of one key are pipelined in order. A nack, a return or a lost connection may reorder
    /// them.
    Relaxed,
}

/// What happens to later events of a key whose earlier event is quarantined.
///
/// ```
/// use onewrite::QuarantinePolicy;
/// assert_eq!(QuarantinePolicy::default(), QuarantinePolicy::HoldKey);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QuarantinePolicy {
    /// Later events wait until the quarantined event is redriven or discarded, so the order per key
    /// is kept. The default.
    #[default]
    HoldKey,
    /// Later events continue without the quarantined event.
    SkipEvent,
}

/// The reason for which a relay has suspended a destination.
///
/// ```
/// assert_eq!(onewrite::SuspendCause::Nacks.to_string(), "the broker nacks every message");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SuspendCause {
    /// The broker has confirmed nothing within the confirm deadline. Most often a queue hangs, or
    /// has lost its majority.
    Silence,
    /// The broker nacks every message. Most often a queue is full and has `x-overflow:
    /// reject-publish`.
    Nacks,
    /// The broker returns every message, and reports that a queue behind the destination exists but
    /// is unreachable now. Most often the queue's node is down.
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
    /// Most unconfirmed events.
    pub(crate) window_events: usize,
    /// Most unconfirmed payload bytes. One event alone may exceed it.
    pub(crate) window_bytes: usize,
    /// Most events in memory, including those in flight.
    pub(crate) lookahead_events: usize,
    /// Most bytes of events in memory. One event alone may exceed it.
    pub(crate) lookahead_bytes: usize,
    /// Most events that one `Load` asks for.
    pub(crate) load_events: usize,
    pub(crate) attempts_max: u32,
    pub(crate) destination_attempts_max: u32,
    pub(crate) backoff_first_ms: u64,
    pub(crate) backoff_max_ms: u64,
    /// Most events in memory that wait for a retry.
    pub(crate) retrying_max: usize,
    /// Most keys that are blocked or parked.
    pub(crate) held_keys_max: usize,
    /// Most publishes per second.
    pub(crate) rate_limit: Option<u32>,
    /// The seed of the jitter.
    pub(crate) seed: u64,
}

impl Settings {
    /// How long the machine does not probe a missing exchange again. It is the shortest wait of an
    /// event that failed at the exchange, so the first such event to be due probes.
    pub(crate) fn probe_wait_ms(&self) -> u64 {
        self.backoff_first_ms.saturating_mul(DESTINATION_BACKOFF_FACTOR).min(self.backoff_max_ms) / 2
    }

    /// How far waiting events may keep the position behind the read events.
    pub(crate) fn span_events(&self) -> u64 {
        self.lookahead_events as u64 * SPAN_PER_LOOKAHEAD
    }
}

/// The machine's knowledge of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) seq: u64,
    pub(crate) key: Option<Key>,
    pub(crate) exchange: Arc<str>,
    pub(crate) routing_key: Arc<str>,
    pub(crate) bytes: usize,
    /// The earliest publication, Unix milliseconds.
    pub(crate) not_before_ms: Option<u64>,
    /// The latest publication, Unix milliseconds.
    pub(crate) expires_ms: Option<u64>,
}

/// One position of the log, as the worker read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// An event to publish.
    Event(Entry),
    /// A record that stays in the log only.
    Unpublished { seq: u64 },
    /// A record that fails its check. It goes to quarantine. Its key is unknown, so it holds no
    /// key.
    Undecodable { seq: u64, fault: Fault },
    /// An event whose exception row decides its fate. Only the log brings such an event, and the
    /// machine holds nothing of it.
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

/// The state of an event that is an exception to the position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exception {
    pub(crate) state: ExceptionState,
    /// Message attempts that the event has consumed.
    pub(crate) attempts: u32,
    /// Destination attempts that the event has consumed.
    pub(crate) destination_attempts: u32,
    /// The last fault, if any.
    pub(crate) fault: Option<Fault>,
}

/// The kinds of exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExceptionState {
    /// A retry. After a restart, it is due at this wall time.
    Retry { due_ms: u64 },
    /// A scheduled event, which must not be published before this wall time.
    Scheduled { due_ms: u64 },
    /// Quarantined at this wall time, until an operator redrives or discards the event. With
    /// `holds_key`, later events of its key wait.
    Quarantined { at_ms: u64, holds_key: bool },
    /// Discarded by an operator before the position passed the event. The row stays until the
    /// position passes, so that a restart does not treat the event as new.
    Discarded,
}

/// A durable change of the cursor. The worker keeps the changes in order.
///
/// The changes of one step are written together or not at all, because a row that replaces another
/// row must not be found beside it. A step that quarantines is the exception: the changes before an
/// [`Action::Quarantined`] may be written without the later ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// The position: every event below is settled, except exceptions and parked events.
    Position(u64),
    /// The event becomes an exception, in this state.
    PutException { seq: u64, key: Option<Key>, exception: Exception },
    /// The event is no exception any more.
    DropException { seq: u64 },
    /// The event waits on disk behind an earlier event of its key.
    Park { key: Key, seq: u64 },
    /// The event is not parked any more.
    Unpark { key: Key, seq: u64 },
}

/// Where the search for expired events continues. The search covers the rows first, then the rest
/// of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ScanAt {
    /// Exceptions with a due time, after this (due time, seq).
    Due(Option<(u64, u64)>),
    /// Parked events, after this event.
    Parked(Option<(Key, u64)>),
    /// The log, from this number on.
    Log(u64),
}

/// An expired event that is not in memory, and the place where the search found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpiredEvent {
    pub(crate) seq: u64,
    pub(crate) key: Option<Key>,
    pub(crate) place: ExpiredPlace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ExpiredPlace {
    /// In the log, without a row.
    Log,
    Parked,
    /// In the log, with this exception.
    Exception(Exception),
}

/// An input of the machine.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// The log now ends (exclusively) here. The tail only rises.
    Tail(u64),
    /// The answer to `Load`: every position in `from..to`.
    Loaded { to: u64, events: Vec<Loaded> },
    /// The answer to `LoadDue`: due exceptions, each with its event, in order of (due time, seq).
    /// If more are due, `resume` is the last one read. Otherwise `next_due_ms` is the next due time
    /// on disk. An exception whose record fails its check comes as `Undecodable`.
    LoadedDue { due: Vec<(Loaded, Exception)>, resume: Option<(u64, u64)>, next_due_ms: Option<u64> },
    /// The answer to `LoadParked`: parked events of this key, in order. `more` says that further
    /// parked events remain.
    LoadedParked { key: Key, events: Vec<Loaded>, more: bool },
    /// The publisher is connected.
    Up { epoch: Epoch },
    /// The publisher is not connected.
    Down { fault: Fault },
    /// Whether the broker blocks the connection.
    Blocked(bool),
    /// The outcomes of publishes.
    Outcomes(Vec<(Ticket, Outcome)>),
    /// An operator durably turned a quarantined event into `Retry`, due now, with its counters
    /// cleared. The event comes as `Undecodable` if it cannot be published any more. The fault is
    /// the one that had quarantined it.
    Redriven(Loaded, Fault),
    /// The log needs room: expired events that are not in flight go to quarantine now, wherever
    /// they wait.
    LetExpiredGo,
    /// The answer to `FindExpired`. `next` is where the search continues; without it, the search
    /// has covered everything before `to`. `earliest_ms` is when the first of the remaining events
    /// expires.
    FoundExpired { found: Vec<ExpiredEvent>, next: Option<ScanAt>, to: u64, earliest_ms: Option<u64> },
    /// An operator durably removed a quarantined event.
    Discarded { seq: u64, key: Option<Key> },
    /// Publish nothing new until `Resume`.
    Pause,
    /// Publish again.
    Resume,
    /// Time has passed.
    Tick,
}

/// An action that the machine asks of the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Publish this event under this ticket. `resend`: the event may have been published before.
    Publish { epoch: Epoch, ticket: Ticket, seq: u64, resend: bool, isolated: bool },
    /// Read from `from` up to the tail, at most this much but at least one event. One read is out
    /// at a time.
    Load { from: u64, events_max: usize, bytes_max: usize },
    /// Read exceptions (retries, scheduled events) that are due at or before this wall time, after
    /// this (due time, seq). Read at most this many. Some may be in memory already. One read is out
    /// at a time.
    LoadDue { after: Option<(u64, u64)>, until_ms: u64, events_max: usize },
    /// Read the first parked events of this key, at most this many. One read per key is out at a
    /// time.
    LoadParked { key: Key, events_max: usize },
    /// Find events that have expired by this wall time, and look at this many at most. In the log,
    /// events that have an exception are skipped. The worker holds none of the found events. One
    /// search is out at a time.
    FindExpired { at: ScanAt, until_ms: u64, events_max: usize },
    /// No expired event before `to` waits any more. The first of the remaining events expires at
    /// `earliest_ms`. (The `Save`s come before.)
    Scanned { to: u64, earliest_ms: Option<u64> },
    /// Write this change.
    Save(Change),
    /// The broker has the event. (Its `Save`s come before.)
    Confirmed { seq: u64 },
    /// The event went to quarantine. (Its `Save`s come before.)
    Quarantined { seq: u64, fault: Fault },
    /// The machine no longer holds this event, so the worker may drop its record. The machine sends
    /// this once for every loaded event. A repeated load of a held event does not count.
    Forget { seq: u64 },
}

/// The state that the relay finds on disk when it starts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recovered {
    pub(crate) position: u64,
    /// The log ends (exclusively) here.
    pub(crate) tail: u64,
    /// Events that hold their key from disk: quarantined events, and retries beyond `retrying`.
    pub(crate) holding: Vec<(u64, Key)>,
    /// Events in state `Retry`, which hold their key too. They are at most `retrying_max`, lowest
    /// first.
    pub(crate) retrying: Vec<(Loaded, Exception)>,
    /// Keys that have parked events below the position.
    pub(crate) parked_keys: Vec<Key>,
    /// Parked events at or past the position. The log brings them again, in order, so their rows
    /// are dropped.
    pub(crate) parked_ahead: Vec<(Key, u64)>,
    /// The earliest due time on disk among exceptions that are not in `retrying`.
    pub(crate) next_due_ms: Option<u64>,
}

/// The figures for `status` and `stats`.
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
    /// Whether `held_keys_max` is reached. The machine then reads nothing more.
    pub(crate) stalled: bool,
}
