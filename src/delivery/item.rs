//! One event that the machine has in memory, and where it stands.

use super::poison::closes_channel;
use super::silence::Destination;
use super::types::{Entry, Exception, ExceptionState, Key};
use crate::message::{Fault, Ticket};

/// What settles an event's place on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// None: the position moves past it.
    Log,
    /// An exception row.
    Exception,
    /// A parked row.
    Parked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ItemState {
    /// To be sent as soon as the window lets it.
    Ready,
    /// Behind an earlier one of its key.
    Queued,
    /// `trial`: to find out whether its destination speaks again.
    InFlight { ticket: Ticket, isolated: bool, trial: bool },
    /// Until its destination speaks again, or it is the next to ask it.
    Suspended,
    /// Until this monotonic time. `deferred`: its counters are on disk, and it counts against `retrying_max` instead of the
    /// lookahead.
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
    /// It may have been published before.
    pub(super) sent: bool,
    /// It was in flight when one message made the broker close the channel: it is published alone until it has an outcome.
    pub(super) suspect: bool,
    /// The first to be tried among those.
    pub(super) likely: bool,
    /// It was the poison message: it is never published among others again.
    pub(super) poison: bool,
    /// Publishes of it that were reported silent, and the last of them if its word may still come.
    pub(super) silences: u32,
    pub(super) late: Option<Ticket>,
    /// In flight, and it takes no room of the window.
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

    /// One that has been tried before: with its counters, and alone if it was a poison message.
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

    /// Waits for a retry with its counters on disk: not counted in the lookahead.
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
