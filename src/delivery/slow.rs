//! Destinations that give no answer while they hold the window.
//!
//! Silence is known only at the publisher's deadline, which is long. Until then, messages for one
//! destination must not take the window from other destinations. So whenever the window is full,
//! the machine notes the destinations in it. Those without an answer a second later are *slow*.
//! Their events in flight linger beside the window, and nothing more is sent to them until they
//! answer. That is no verdict, and nothing is published again.
//!
//! **Invariant.** At most one window's worth of events lingers.

use std::collections::BTreeSet;

use super::silence::Destination;
use super::types::PublishOrder;
use super::{ItemState, Machine};
use crate::time::Now;
use crate::tuning::SLOW_MS;

/// The watch on the destinations in a full window.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Slow {
    /// Whether the last step left something unsent for want of room.
    pub(super) window_is_full: bool,
    /// When the watch began, and the destinations in the window that have not answered since then.
    looked_ms: Option<u64>,
    wordless: BTreeSet<Destination>,
    /// The events in flight beside the window, and their bytes.
    pub(super) lingering: usize,
    pub(super) lingering_bytes: usize,
}

impl Slow {
    pub(super) fn is_watching(&self) -> bool {
        !self.wordless.is_empty()
    }

    pub(super) fn spoke(&mut self, destination: &Destination) {
        self.wordless.remove(destination);
    }

    pub(super) fn wake_ms(&self) -> Option<u64> {
        self.looked_ms.map(|looked_ms| looked_ms.saturating_add(SLOW_MS))
    }

    fn rest(&mut self) {
        self.looked_ms = None;
        self.wordless.clear();
    }

    #[cfg(test)]
    pub(super) fn hash_for_test(&self, now: Now, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        (self.looked_ms.map(|at_ms| now.mono_ms - at_ms), &self.wordless).hash(hasher);
    }
}

impl Machine {
    /// Looks, after publishing, for silent destinations that hold the window. Returns whether there
    /// is room now.
    pub(super) fn look_for_slow(&mut self, now: Now) -> bool {
        if !self.slow.window_is_full || self.settings.ordering == PublishOrder::Total {
            self.slow.rest();
            return false;
        }
        let before = self.slow.lingering;
        match self.slow.looked_ms {
            Some(looked_ms) if now.mono_ms < looked_ms.saturating_add(SLOW_MS) => return false,
            Some(_) => self.suspend_slow(),
            None => {}
        }
        self.slow.looked_ms = Some(now.mono_ms);
        self.slow.wordless = self.in_window().map(|(_, destination)| destination).collect();
        self.slow.lingering > before
    }

    /// Iterates over the events in flight that take room of the window.
    fn in_window(&self) -> impl Iterator<Item = (u64, Destination)> {
        self.in_flight.values().filter_map(|seq| {
            let item = self.items.get(seq)?;
            let is_alone = matches!(item.state, ItemState::InFlight { isolated: true, .. });
            let counts = !is_alone && !item.lingers;
            counts.then(|| (*seq, item.destination()))
        })
    }

    fn suspend_slow(&mut self) {
        let wordless = std::mem::take(&mut self.slow.wordless);
        let lingering: Vec<(u64, Destination)> =
            self.in_window().filter(|(_, destination)| wordless.contains(destination)).collect();
        for (seq, destination) in lingering {
            let Some(item) = self.items.get_mut(&seq) else { continue };
            let bytes = self.slow.lingering_bytes + item.bytes;
            if self.slow.lingering >= self.settings.window_events || bytes > self.settings.window_bytes {
                return;
            }
            item.lingers = true;
            self.slow.lingering += 1;
            self.slow.lingering_bytes = bytes;
            self.silence.set_slow(&destination);
        }
    }

    /// Returns lingering events to the window once their destination answers again.
    pub(super) fn lingers_no_more(&mut self, destination: &Destination) {
        for seq in self.in_flight.values() {
            if let Some(item) = self.items.get_mut(seq)
                && item.lingers
                && item.destination() == *destination
            {
                item.lingers = false;
                self.slow.lingering -= 1;
                self.slow.lingering_bytes -= item.bytes;
            }
        }
    }
}
