//! Destinations that give no word while they hold the window.
//!
//! Silence is known only at the publisher's deadline, which is long. Until then messages for one destination must not take the window from
//! the others. So whenever the window is full, the destinations in it are noted; those without a word a second later are *slow*: what is in
//! flight for them lingers beside the window, and nothing more is sent to them until they speak. That is no verdict, and
//! nothing is published again.
//!
//! **Invariant.** No more lingers than a window holds.

use std::collections::BTreeSet;

use super::silence::Destination;
use super::types::PublishOrder;
use super::{ItemState, Machine};
use crate::time::Now;
use crate::tuning::SLOW_MS;

/// The look at the destinations in a full window.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Slow {
    /// Whether the last step has left something unsent for want of room.
    pub(super) window_is_full: bool,
    /// When the full window was looked at, and what was in it that has had no word since.
    looked_ms: Option<u64>,
    wordless: BTreeSet<Destination>,
    /// In flight beside the window.
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
    /// After publishing: looks for destinations that hold the window and say nothing. Returns whether there is room now.
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

    /// What is in flight and takes room of the window.
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

    /// What lingers for a destination that speaks again takes room of the window again.
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
