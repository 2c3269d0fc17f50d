//! Nacks that a new channel may end.
//!
//! A channel of RabbitMQ that was opened while a quorum queue had just lost its leader asks the dead one for ever (seen on 3.10.8):
//! it nacks every message for that queue until that node is back, though the queue has a new leader and other channels
//! publish to it. So where a destination was never acked on a connection, and nacked for a while, the connection is made anew. A queue
//! that is full nacks too, and a new connection does not help it: each that did not makes the next one wait twice as long.
//!
//! Pure: the time is a parameter.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// Nothing but nacks for this long, and the connection is made anew.
const PATIENCE: Duration = Duration::from_secs(5);

/// It doubles this often at most: to 320 s.
const DOUBLINGS_MAX: u32 = 6;

/// Of further destinations on one connection nothing is known.
const DESTINATIONS_MAX: usize = 1024;

/// A destination, shortened. Two that share a number would share their patience, no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Destination(u64);

/// What was heard of destinations.
#[derive(Debug, Default)]
pub(super) struct Nacks {
    hasher: RandomState,
    /// On this connection: since when nothing but nacks was heard, or none if there was an ack.
    heard: HashMap<Destination, Option<Instant>>,
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

    pub(super) fn acked(&mut self, destination: Destination) {
        if self.acked_last == Some(destination) {
            return;
        }
        self.acked_last = Some(destination);
        if self.has_room_for(destination) {
            self.heard.insert(destination, None);
        }
        if self.suspect.is_some_and(|(suspect, _)| suspect == destination) {
            self.suspect = None;
        }
    }

    /// Whether it is time for a new connection.
    pub(super) fn nacked(&mut self, destination: Destination, now: Instant) -> bool {
        if !self.has_room_for(destination) {
            return false;
        }
        let Some(since) = *self.heard.entry(destination).or_insert(Some(now)) else { return false };
        // Whoever it was for: several that are full must not take turns.
        let times = self.suspect.map_or(0, |(_, times)| times);
        let over = now.duration_since(since) >= PATIENCE * (1 << times.min(DOUBLINGS_MAX));
        if over {
            self.suspect = Some((destination, times.saturating_add(1)));
        }
        over
    }

    fn has_room_for(&self, destination: Destination) -> bool {
        self.heard.len() < DESTINATIONS_MAX || self.heard.contains_key(&destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn nothing_but_nacks_for_a_while_asks_for_a_new_connection() {
        let (mut nacks, now) = (Nacks::default(), Instant::now());
        let [full, well] = ["full", "well"].map(|name| nacks.destination("", name));
        assert!(!nacks.nacked(full, now));
        nacks.acked(well);
        assert!(!nacks.nacked(full, now + s(4)), "too soon");
        assert!(nacks.nacked(full, now + s(5)), "another destination's acks do not count");
        // One ack, before or after, and this connection is as good as another.
        nacks.connected();
        assert!(!nacks.nacked(full, now + s(6)));
        nacks.acked(full);
        assert!(!nacks.nacked(full, now + s(60)));
        assert!(!nacks.nacked(full, now + s(600)));
    }

    #[test]
    fn what_a_new_connection_does_not_help_waits_ever_longer() {
        let (mut nacks, mut now) = (Nacks::default(), Instant::now());
        let full = nacks.destination("orders", "new");
        let mut waits = Vec::new();
        for _ in 0..9 {
            nacks.connected();
            let began = now;
            while !nacks.nacked(full, now) {
                now += s(1);
            }
            waits.push((now - began).as_secs());
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 320, 320]);
        nacks.acked(full);
        nacks.connected();
        assert!(!nacks.nacked(full, now));
        assert!(nacks.nacked(full, now + s(5)), "it has recovered in between");
    }

    #[test]
    fn several_that_are_full_do_not_take_turns() {
        let (mut nacks, mut now) = (Nacks::default(), Instant::now());
        let full: Vec<_> = (0..5).map(|n| nacks.destination("orders", &n.to_string())).collect();
        let began = now;
        for n in 0..7 {
            nacks.connected();
            while !full.iter().cycle().skip(n).take(full.len()).any(|full| nacks.nacked(*full, now)) {
                now += s(1);
            }
        }
        assert_eq!(now - began, s(5 + 10 + 20 + 40 + 80 + 160 + 320));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut nacks, now) = (Nacks::default(), Instant::now());
        for n in 0..3 * DESTINATIONS_MAX {
            let destination = nacks.destination("", &n.to_string());
            assert!(!nacks.nacked(destination, now));
        }
        assert_eq!(nacks.heard.len(), DESTINATIONS_MAX);
    }
}
