//! Nacks that a new channel may end.
//!
//! A channel of RabbitMQ that was opened while a quorum queue had just lost its leader asks the dead one for ever (seen on
//! 3.10.8): it nacks every message for that queue until that node is back, though the queue has a new leader, and other
//! channels publish to it. A queue that is full nacks too, and a new connection does not help it. Each new connection makes
//! the outcomes of everything in flight unknown, so it needs evidence.
//!
//! **The evidence.** The relay asks a destination that nacks everything by one message at a time, each on a channel of its
//! own. If such a channel acks what the window's channel has nacked just before, that is one *contradiction*. A full queue in
//! which a place gets free gives one now and then, and then acks in the window as well. So the connection is made anew after
//! some contradictions in a row without an ack in the window. Each connection that did not help doubles their number.
//!
//! Pure: no clock.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// So many contradictions, and the connection is made anew.
const CONTRADICTIONS: u32 = 3;

/// Their number doubles this often at most: to 192.
const DOUBLINGS_MAX: u32 = 6;

/// Of further destinations on one connection nothing is known.
const DESTINATIONS_MAX: usize = 1024;

/// A destination, shortened. Two that share a number would share their evidence, no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Destination(u64);

/// What the window's channel says of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// It has acked: this connection is as good as another.
    Acked,
    /// Nothing but nacks. `since_isolated`: one has come since a channel beside it acked last.
    Nacked { contradictions: u32, since_isolated: bool },
}

/// What was heard of destinations.
#[derive(Debug, Default)]
pub(super) struct Nacks {
    hasher: RandomState,
    /// On this connection.
    heard: HashMap<Destination, Heard>,
    /// The common case, without a look at the table.
    acked_last: Option<Destination>,
    /// Why the connection was last made anew, and how often in a row.
    suspect: Option<(Destination, u32)>,
}

impl Nacks {
    pub(super) fn destination(&self, exchange: &str, routing_key: &str) -> Destination {
        Destination(self.hasher.hash_one((exchange, routing_key)))
    }

    /// A new connection, with a new chance for everybody.
    pub(super) fn connected(&mut self) {
        self.heard.clear();
        self.acked_last = None;
    }

    /// The window's channel has acked a message.
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

    /// The window's channel has nacked a message.
    pub(super) fn nacked(&mut self, destination: Destination) {
        if !self.has_room_for(destination) {
            return;
        }
        let first = Heard::Nacked { contradictions: 0, since_isolated: true };
        if let Heard::Nacked { since_isolated, .. } = self.heard.entry(destination).or_insert(first) {
            *since_isolated = true;
        }
    }

    /// A channel beside the window's has acked a message. Whether it is time for a new connection.
    pub(super) fn acked_isolated(&mut self, destination: Destination) -> bool {
        let Some(Heard::Nacked { contradictions, since_isolated }) = self.heard.get_mut(&destination) else {
            return false;
        };
        *contradictions += u32::from(std::mem::take(since_isolated));
        // All connections in a row count, for whatever destination: several that are full must not take turns.
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

    /// Contradictions until a new connection is asked for.
    fn contradictions(nacks: &mut Nacks, destination: Destination) -> u32 {
        nacks.connected();
        (1..).find(|_| contradicts(nacks, destination)).unwrap()
    }

    fn contradicts(nacks: &mut Nacks, destination: Destination) -> bool {
        nacks.nacked(destination);
        nacks.acked_isolated(destination)
    }

    /// Goal: nacks alone, however many, ask for no new connection; nor do acks of other channels alone.
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

    /// Goal: a channel that nacks what others ack is given up; one that has acked once is not.
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

    /// Goal: what a new connection does not help makes new ones ever rarer, until the destination acks in the window.
    #[test]
    fn what_a_new_connection_does_not_help_needs_ever_more() {
        let mut nacks = Nacks::default();
        let full = nacks.destination("orders", "new");
        let needed: Vec<_> = (0..9).map(|_| contradictions(&mut nacks, full)).collect();
        assert_eq!(needed, [3, 6, 12, 24, 48, 96, 192, 192, 192]);
        nacks.acked(full);
        assert_eq!(contradictions(&mut nacks, full), 3, "it has recovered in between");
    }

    /// Goal: several that are full do not take turns.
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
