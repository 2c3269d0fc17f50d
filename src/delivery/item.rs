//! One event in the machine's memory, and its state.

use super::poison::closes_channel;
use super::silence::Destination;
use super::types::{Entry, Exception, ExceptionState, Key};
use crate::message::{Fault, Ticket};

/// The row that settles an event's place on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// No row: the position moves past the event.
    Log,
    /// An exception row.
    Exception,
    /// A parked row.
    Parked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ItemState {
    /// The event is sent as soon as the window allows.
    Ready,
    /// The event waits behind an earlier event of its key.
    Queued,
    /// The event is in flight. A `trial` finds out whether the destination answers again.
    InFlight { ticket: Ticket, isolated: bool, trial: bool },
    /// The event waits until its destination answers again, or until it is the next trial.
    Suspended,
    /// The event waits until this monotonic time. `deferred`: its counters are on disk, and it
    /// counts against `retrying_max` instead of the lookahead.
    Waiting { due_ms: u64, deferred: bool },
}

/// An event in memory.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) key: Option<Key>,
    pub(super) exchange: Key,
    pub(super) routing_key: Key,
    pub(super) bytes: usize,
    pub(super) expires_ms: Option<u64>,
    pub(super) home: Home,
    pub(super) state: ItemState,
    pub(super) attempts: u32,
    pub(super) destination_attempts: u32,
    /// Nacks in a row.
    pub(super) nacks: u32,
    pub(super) fault: Option<Fault>,
    /// Whether the event may have been published before.
    pub(super) sent: bool,
    /// Whether the event was in flight when one message made the broker close the channel. It is
    /// then published alone until it has an outcome.
    pub(super) suspect: bool,
    /// Whether the event is a likely suspect, which is tried first.
    pub(super) likely: bool,
    /// Whether the event was the poison message. It is then never published among others again.
    pub(super) poison: bool,
    /// How often a publish of the event was reported silent. `late` is the last such publish while
    /// its answer may still come.
    pub(super) silences: u32,
    pub(super) late: Option<Ticket>,
    /// Whether the event is in flight without taking room of the window.
    pub(super) lingers: bool,
}

impl Item {
    pub(crate) fn new(entry: &Entry, home: Home) -> Self {
        Self {
            key: entry.key.clone(),
            exchange: Key::clone(&entry.exchange),
            routing_key: Key::clone(&entry.routing_key),
            bytes: entry.bytes,
            expires_ms: entry.expires_ms,
            home,
            state: ItemState::Queued,
            attempts: 0,
            destination_attempts: 0,
            nacks: 0,
            fault: None,
            sent: false,
            suspect: false,
            likely: false,
            poison: false,
            silences: 0,
            late: None,
            lingers: false,
        }
    }

    /// Makes an item of an event that was tried before, with its counters, and isolated if it was a
    /// poison message.
    pub(crate) fn again(entry: &Entry, exception: Exception) -> Self {
        let poison = exception.fault.as_ref().is_some_and(closes_channel);
        Self {
            attempts: exception.attempts,
            destination_attempts: exception.destination_attempts,
            fault: exception.fault,
            suspect: poison,
            poison,
            ..Self::new(entry, Home::Exception)
        }
    }

    /// Whether the event waits for a retry with its counters on disk. Such an event does not count
    /// against the lookahead.
    pub(crate) fn is_retrying(&self) -> bool {
        matches!(self.state, ItemState::Waiting { deferred: true, .. })
    }

    pub(crate) fn destination(&self) -> Destination {
        (Key::clone(&self.exchange), Key::clone(&self.routing_key))
    }

    pub(crate) fn is_trial(&self) -> bool {
        matches!(self.state, ItemState::InFlight { trial: true, .. })
    }

    pub(crate) fn is_alone(&self) -> bool {
        matches!(self.state, ItemState::InFlight { isolated: true, .. })
    }

    pub(crate) fn exception(&self, state: ExceptionState) -> Exception {
        Exception {
            state,
            attempts: self.attempts,
            destination_attempts: self.destination_attempts,
            fault: self.fault.clone(),
        }
    }
}
