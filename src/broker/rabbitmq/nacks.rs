//! Detects nacks that a new channel may end. Pure: no clock.
//!
//! RabbitMQ may open a channel while a quorum queue has just lost its leader. Such a channel asks
//! the dead leader for ever (seen on 3.10.8). It nacks every message for that queue until that node
//! is back. Meanwhile the queue has a new leader, and other channels publish to it.
//!
//! A full queue nacks too, and a new connection does not help. Each new connection makes the
//! outcomes of everything in flight unknown. So a new connection needs evidence.
//!
//! **The evidence.** If a destination nacks everything, the relay tries it with one message at a
//! time, each on a channel of its own. If such a channel acks what the window's channel has just
//! nacked, that is one *contradiction*. A full queue that gets a free place gives a contradiction
//! now and then, and then acks in the window as well. So the publisher reconnects after some
//! contradictions in a row without an ack in the window. Each connection that did not help doubles
//! the number of contradictions.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// The number of contradictions that lead to a new connection.
const CONTRADICTIONS: u32 = 3;

/// The most times that this number doubles: up to 192.
const DOUBLINGS_MAX: u32 = 6;

/// The most destinations that are tracked on one connection.
const DESTINATIONS_MAX: usize = 1024;

/// A hash of a destination. Two destinations with one hash would share their evidence, nothing
/// else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Destination(u64);

/// The answers of the window's channel for a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// The channel has acked: another connection would not be better.
    Acked,
    /// The channel has only nacked. `since_isolated`: it has nacked since the last ack of an
    /// isolated channel.
    Nacked { contradictions: u32, since_isolated: bool },
}

/// The evidence about all destinations.
#[derive(Debug, Default)]
pub(super) struct Nacks {
    hasher: RandomState,
    /// The answers on this connection.
    heard: HashMap<Destination, Heard>,
    /// Answers the common case without a look at the table.
    acked_last: Option<Destination>,
    /// The destination that led to the last reconnect, and the number of such reconnects in a row.
    suspect: Option<(Destination, u32)>,
}

impl Nacks {
    pub(super) fn destination(&self, exchange: &str, routing_key: &str) -> Destination {
        Destination(self.hasher.hash_one((exchange, routing_key)))
    }

    /// Notes a new connection, which gives every destination a new chance.
    pub(super) fn connected(&mut self) {
        self.heard.clear();
        self.acked_last = None;
    }

    /// Notes that the window's channel has acked a message.
    pub(super) fn acked(&mut self, destination: Destination) {
        if self.acked_last == Some(destination) {
            return;
        }
        self.acked_last = Some(destination);
        if self.has_room_for(destination) {
            self.heard.insert(destination, Heard::Acked);
        }
        if self.suspect.is_some_and(|(suspect, _)| suspect == destination) {
            self.suspect = None;
        }
    }

    /// Notes that the window's channel has nacked a message.
    pub(super) fn nacked(&mut self, destination: Destination) {
        if !self.has_room_for(destination) {
            return;
        }
        let first = Heard::Nacked { contradictions: 0, since_isolated: true };
        if let Heard::Nacked { since_isolated, .. } = self.heard.entry(destination).or_insert(first) {
            *since_isolated = true;
        }
    }

    /// Notes that a channel beside the window's has acked a message. Returns whether it is time for
    /// a new connection.
    pub(super) fn acked_isolated(&mut self, destination: Destination) -> bool {
        let Some(Heard::Nacked { contradictions, since_isolated }) = self.heard.get_mut(&destination) else {
            return false;
        };
        *contradictions += u32::from(std::mem::take(since_isolated));
        // All such connections in a row count, for any destination: several full queues must not
        // take turns.
        let times = self.suspect.map_or(0, |(_, times)| times);
        let enough = *contradictions >= CONTRADICTIONS << times.min(DOUBLINGS_MAX);
        if enough {
            self.suspect = Some((destination, times.saturating_add(1)));
        }
        enough
    }

    fn has_room_for(&self, destination: Destination) -> bool {
        self.heard.len() < DESTINATIONS_MAX || self.heard.contains_key(&destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the contradictions until a new connection is requested.
    fn contradictions(nacks: &mut Nacks, destination: Destination) -> u32 {
        nacks.connected();
        (1..).find(|_| contradicts(nacks, destination)).unwrap()
    }

    fn contradicts(nacks: &mut Nacks, destination: Destination) -> bool {
        nacks.nacked(destination);
        nacks.acked_isolated(destination)
    }

    /// Goal: nacks alone, however many, request no new connection; nor do acks of other channels
    /// alone.
    #[test]
    fn nacks_alone_are_no_evidence() {
        let mut nacks = Nacks::default();
        let full = nacks.destination("", "full");
        for _ in 0..1_000_000 {
            nacks.nacked(full);
        }
        assert!(!nacks.acked_isolated(full));
        assert!((0..1_000).all(|_| !nacks.acked_isolated(full)), "no nack stands between them");
        nacks.connected();
        assert!((0..1_000).all(|_| !nacks.acked_isolated(full)), "nothing was nacked on this connection");
    }

    /// Goal: a channel that nacks what other channels ack is given up; a channel that has acked
    /// once is not.
    #[test]
    fn contradictions_ask_for_a_new_connection() {
        let mut nacks = Nacks::default();
        let [stuck, well] = ["stuck", "well"].map(|name| nacks.destination("", name));
        assert!(!contradicts(&mut nacks, stuck));
        nacks.acked(well);
        assert!(!contradicts(&mut nacks, stuck));
        assert!(contradicts(&mut nacks, stuck), "another destination's acks do not count");
        nacks.connected();
        assert!(!contradicts(&mut nacks, stuck));
        nacks.acked(stuck);
        assert!((0..1_000).all(|_| !contradicts(&mut nacks, stuck)));
    }

    /// Goal: if a new connection does not help, the next ones become rarer, until the destination
    /// acks in the window.
    #[test]
    fn what_a_new_connection_does_not_help_needs_ever_more() {
        let mut nacks = Nacks::default();
        let full = nacks.destination("orders", "new");
        let needed: Vec<_> = (0..9).map(|_| contradictions(&mut nacks, full)).collect();
        assert_eq!(needed, [3, 6, 12, 24, 48, 96, 192, 192, 192]);
        nacks.acked(full);
        assert_eq!(contradictions(&mut nacks, full), 3, "it has recovered in between");
    }

    /// Goal: several full destinations do not take turns.
    #[test]
    fn several_that_are_full_share_the_limit() {
        let mut nacks = Nacks::default();
        let full: Vec<_> = (0..3).map(|n| nacks.destination("orders", &n.to_string())).collect();
        let needed: Vec<_> = (0..5).map(|n| contradictions(&mut nacks, full[n % 3])).collect();
        assert_eq!(needed, [3, 6, 12, 24, 48]);
    }

    /// Goal: the table is bounded, and what is not in it is left alone.
    #[test]
    fn destinations_are_bounded() {
        let mut nacks = Nacks::default();
        let all: Vec<_> = (0..2 * DESTINATIONS_MAX).map(|n| nacks.destination("e", &n.to_string())).collect();
        for destination in &all {
            nacks.nacked(*destination);
            nacks.acked(*destination);
        }
        assert_eq!(nacks.heard.len(), DESTINATIONS_MAX);
        assert!(!contradicts(&mut nacks, all[2 * DESTINATIONS_MAX - 1]));
    }
}
