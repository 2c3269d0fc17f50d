//! Who waits for whom within one key.
//!
//! **Invariants.** Under strict ordering at most one event of a key is active (to be sent, in flight, or waiting for its
//! next try). While rows of a key are parked on disk and not in memory, nothing newer of it is admitted in memory.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::types::Key;

/// One key's state; kept only while there is something to remember.
#[derive(Debug, Default)]
pub(crate) struct KeyState {
    /// Events in memory that block later ones of the key.
    pub(crate) active: BTreeSet<u64>,
    /// Events on disk that do: quarantined and holding, or waiting for a try beyond what memory holds.
    pub(crate) held_by: BTreeSet<u64>,
    /// Events in memory that wait behind those, in order.
    pub(crate) queue: VecDeque<u64>,
    /// Under relaxed ordering: all events of the key in memory.
    pub(crate) relaxed: usize,
    /// Parked rows exist on disk that are not in memory.
    pub(crate) parked: bool,
    /// They have been asked for.
    pub(crate) loading: bool,
    /// More were parked since they were asked for.
    pub(crate) parked_since: bool,
}

impl KeyState {
    /// Whether an event that arrives now may be active at once.
    pub(crate) fn is_free(&self) -> bool {
        self.active.is_empty() && self.held_by.is_empty() && self.queue.is_empty() && !self.parked
    }

    /// Whether the first that waits may become active.
    pub(crate) fn lets_next_go(&self) -> bool {
        self.active.is_empty() && self.held_by.is_empty()
    }

    /// Whether parked rows should be read: nothing of the key is in memory and nothing holds it.
    pub(crate) fn wants_parked(&self) -> bool {
        self.parked && !self.loading && self.lets_next_go() && self.queue.is_empty() && self.relaxed == 0
    }

    /// Whether the key counts against the limit of held keys.
    pub(crate) fn is_held(&self) -> bool {
        self.parked || !self.held_by.is_empty()
    }

    fn is_forgettable(&self) -> bool {
        self.is_free() && !self.loading && self.relaxed == 0
    }
}

/// All keys of which there is something to remember.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    states: HashMap<Key, KeyState>,
    held: usize,
    /// Keys whose parked rows should be read.
    pub(crate) wanting: BTreeSet<Key>,
}

impl Keys {
    pub(crate) fn get(&self, key: &str) -> Option<&KeyState> {
        self.states.get(key)
    }

    /// Changes one key's state, and keeps what is derived from all of them.
    pub(crate) fn with<T>(&mut self, key: &Key, change: impl FnOnce(&mut KeyState) -> T) -> T {
        let state = self.states.entry(Key::clone(key)).or_default();
        let before = state.is_held();
        let result = change(state);
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
            self.states.remove(key);
        }
        result
    }

    /// Keys blocked on disk or parked.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// The keys with the longest queues in memory, longest first.
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
