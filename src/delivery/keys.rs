//! The order of events within one key: which event waits for which.
//!
//! **Invariants.** Under strict ordering, at most one event of a key is active: to be sent, in
//! flight, or waiting for its next try. No event in memory waits for an event on disk. While a key
//! has parked rows that are not in memory, no newer event of the key is admitted to memory.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};

use super::types::Key;

/// The place of a reloaded event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The event is to be sent.
    Goes,
    /// The event waits behind an event in memory.
    Queued,
    /// The event waits behind an event on disk, and so goes to disk as well.
    Held,
}

/// The state of one key. It exists only while there is something to remember.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone, Hash))]
pub(crate) struct KeyState {
    /// Events in memory that block later events of the key.
    pub(crate) active: BTreeSet<u64>,
    /// Events on disk that block later events: quarantined and holding, or waiting for a try beyond
    /// what memory holds.
    pub(crate) held_by: BTreeSet<u64>,
    /// Events in memory that wait behind the active events, in order.
    pub(crate) queue: VecDeque<u64>,
    /// Under relaxed ordering: the number of events of the key in memory.
    pub(crate) relaxed: usize,
    /// Whether the disk has parked rows that are not in memory.
    pub(crate) parked: bool,
    /// The number of requested parked rows; 0 while no answer is out.
    pub(crate) loading: usize,
    /// Whether more events were parked since the request.
    pub(crate) parked_since: bool,
}

impl KeyState {
    /// Whether an event that arrives now may be active at once.
    pub(crate) fn is_free(&self) -> bool {
        self.takes_one() && self.held_by.is_empty() && self.queue.is_empty() && !self.parked
    }

    /// Whether one more event may be active beside the active ones.
    fn takes_one(&self) -> bool {
        #[cfg(onewrite_mutations)]
        if crate::mutations::mutated("two-of-a-key") {
            return self.active.len() < 2;
        }
        self.active.is_empty()
    }

    /// Whether this event may become active. It does not wait for a later event that is held on
    /// disk: after a restart the log may bring earlier events again.
    pub(crate) fn lets_go(&self, seq: u64) -> bool {
        self.takes_one() && !self.is_held_before(seq)
    }

    /// Whether an earlier event on disk holds this event.
    pub(crate) fn is_held_before(&self, seq: u64) -> bool {
        self.held_by.first().is_some_and(|holder| *holder < seq)
    }

    /// Takes the first waiting event if it may become active.
    pub(crate) fn take_next(&mut self) -> Option<u64> {
        let next = self.queue.front().copied().filter(|seq| self.lets_go(*seq))?;
        self.queue.pop_front();
        Some(next)
    }

    /// Places a reloaded event before all later events of its key. Puts it into the queue if that
    /// is its place.
    pub(crate) fn place(&mut self, seq: u64) -> Place {
        if self.is_held_before(seq) {
            return Place::Held;
        }
        if self.lets_go(seq) {
            return Place::Goes;
        }
        let at = self.queue.iter().position(|other| *other > seq).unwrap_or(self.queue.len());
        self.queue.insert(at, seq);
        Place::Queued
    }

    /// Whether parked rows should be read, because nothing of the key is in memory and nothing
    /// holds the key.
    pub(crate) fn wants_parked(&self) -> bool {
        let nothing_holds = self.active.is_empty() && self.held_by.is_empty();
        self.parked && self.loading == 0 && nothing_holds && self.queue.is_empty() && self.relaxed == 0
    }

    /// Whether the key counts against the limit of held keys.
    pub(crate) fn is_held(&self) -> bool {
        self.parked || !self.held_by.is_empty()
    }

    fn is_forgettable(&self) -> bool {
        self.is_free() && self.active.is_empty() && self.loading == 0 && self.relaxed == 0
    }
}

/// All keys with something to remember.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Keys {
    states: HashMap<Key, KeyState>,
    held: usize,
    /// Requested parked events of all keys.
    pub(crate) loading: usize,
    /// Keys whose parked rows should be read.
    pub(crate) wanting: BTreeSet<Key>,
}

impl Keys {
    /// Changes one key's state, and updates what is derived from all keys.
    pub(crate) fn with<T>(&mut self, key: &Key, change: impl FnOnce(&mut KeyState) -> T) -> T {
        let mut entry = match self.states.entry(Key::clone(key)) {
            Entry::Occupied(entry) => entry,
            Entry::Vacant(entry) => entry.insert_entry(KeyState::default()),
        };
        let state = entry.get_mut();
        let (before, loading) = (state.is_held(), state.loading);
        let result = change(state);
        self.loading = self.loading - loading + state.loading;
        match (before, state.is_held()) {
            (false, true) => self.held += 1,
            (true, false) => self.held -= 1,
            _ => {}
        }
        if state.wants_parked() {
            self.wanting.insert(Key::clone(key));
        } else {
            self.wanting.remove(key);
        }
        if state.is_forgettable() {
            entry.remove();
        }
        result
    }

    /// Returns the key that this event holds from disk. It walks over all keys, which is enough for
    /// the rare unreadable record.
    pub(crate) fn held_by(&self, seq: u64) -> Option<Key> {
        let holds = |(_, state): &(&Key, &KeyState)| state.held_by.contains(&seq);
        self.states.iter().find(holds).map(|(key, _)| Key::clone(key))
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        for (key, state) in &self.states {
            let waits = state.queue.iter().find(|seq| state.is_held_before(**seq));
            assert_eq!(waits, None, "{key}: waits in memory for an event on disk");
        }
        assert_eq!(self.held, self.states.values().filter(|state| state.is_held()).count());
        assert_eq!(self.loading, self.states.values().map(|state| state.loading).sum::<usize>());
    }

    /// Hashes the keys in one order, which does not depend on the map's.
    #[cfg(test)]
    pub(super) fn hash_for_test(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        let mut states: Vec<_> = self.states.iter().collect();
        states.sort_unstable_by_key(|(key, _)| *key);
        states.hash(hasher);
        self.wanting.hash(hasher);
    }

    /// Returns the number of keys that are blocked on disk or parked.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Returns the keys with the longest queues in memory, longest first.
    pub(crate) fn longest_queues(&self) -> Vec<(usize, Key)> {
        let mut queues: Vec<_> = self
            .states
            .iter()
            .filter(|(_, state)| !state.queue.is_empty())
            .map(|(key, state)| (state.queue.len(), Key::clone(key)))
            .collect();
        queues.sort_by(|a, b| b.cmp(a));
        queues
    }
}
