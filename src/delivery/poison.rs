//! Poison messages: the message that made the broker close the channel, and messages that would do
//! the same.
//!
//! A close names no message. So every message in flight is suspect, and the relay publishes the
//! suspects alone, one at a time. One close has one poison message: once it is found, the remaining
//! suspects are cleared.
//!
//! Three lessons spare the window further closes. A poison message is retried alone. So is an event
//! as large as a message that was too large. For a missing exchange, one event at a time probes on
//! behalf of all.

use std::collections::HashMap;

use super::types::{Action, Key, PublishOrder};
use super::{ItemState, Machine};
use crate::message::{Fault, FaultClass, Outcome};
use crate::time::Now;

/// The most closed exchanges that the machine remembers. Beyond that number it forgets all and
/// learns them again.
const CLOSED_MAX: usize = 1024;

/// The lessons from refusals of isolated events.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Learnt {
    closed: HashMap<Key, Closed>,
    /// The size of the smallest message that the broker refused as too large.
    large_bytes: Option<usize>,
}

/// An exchange that is missing, or forbidden to us.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Closed {
    fault: Fault,
    /// From this time on, the next event for the exchange probes it again.
    probe_ms: u64,
}

/// How to dispatch the next event.
pub(super) enum Dispatch {
    Goes,
    /// Publish the event alone.
    Alone,
    /// Do not publish the event, because its exchange has just failed an earlier event.
    Fails(Fault),
}

/// Whether this refusal closes the channel for the messages published with it. A return does not.
pub(super) fn closes_channel(fault: &Fault) -> bool {
    let of_its_own = matches!(fault.class, FaultClass::Message | FaultClass::Destination);
    of_its_own && fault.code.is_some_and(|code| !(310..320).contains(&code))
}

#[cfg(test)]
impl Learnt {
    /// Hashes the parts that decide future steps.
    pub(super) fn hash_for_test(&self, now: Now, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        let mut closed: Vec<_> = self
            .closed
            .iter()
            .map(|(exchange, closed)| (exchange, closed.probe_ms.saturating_sub(now.mono_ms)))
            .collect();
        closed.sort_unstable();
        (closed, self.large_bytes).hash(hasher);
    }
}

impl Machine {
    /// Handles a lost connection, with everything in flight on it. If one message is to blame, all
    /// of them become suspects.
    pub(super) fn lost(&mut self, fault: Option<&Fault>) {
        let of_window =
            |item: &super::Item| matches!(item.state, ItemState::InFlight { isolated: false, .. });
        let in_flight = self.in_flight.values().copied();
        let lost: Vec<u64> = in_flight.filter(|seq| self.items.get(seq).is_some_and(of_window)).collect();
        let of_poison = |fault: &&Fault| matches!(fault.class, FaultClass::Message | FaultClass::Destination);
        let fault = fault.filter(of_poison);
        let largest = lost.iter().filter_map(|seq| self.items.get(seq)).map(|item| item.bytes).max();
        for seq in lost {
            self.land(seq);
            if let (Some(fault), Some(item)) = (fault, self.items.get_mut(&seq)) {
                item.suspect = true;
                item.likely = match fault.class {
                    FaultClass::Destination => names(fault, &item.exchange),
                    _ => Some(item.bytes) == largest,
                };
            }
            self.make_ready(seq);
        }
    }

    /// Returns how to dispatch the next event.
    pub(super) fn dispatch_of(&mut self, seq: u64, now: Now) -> Dispatch {
        let Some(item) = self.items.get(&seq) else { return Dispatch::Goes };
        if let Some(closed) = self.learnt.closed.get(&item.exchange) {
            // Only an answer fails an event. Until an answer comes, the next event waits to be
            // published alone.
            return match (now.mono_ms < closed.probe_ms, item.suspect) {
                (true, _) => Dispatch::Fails(closed.fault.clone()),
                (false, true) => Dispatch::Goes,
                (false, false) => Dispatch::Alone,
            };
        }
        let is_large = self.learnt.large_bytes.is_some_and(|bytes| item.bytes >= bytes);
        if is_large && !item.suspect { Dispatch::Alone } else { Dispatch::Goes }
    }

    /// Makes an event a suspect, which is published alone.
    pub(super) fn suspect(&mut self, seq: u64) {
        if let Some(item) = self.items.get_mut(&seq) {
            item.suspect = true;
        }
        self.make_ready(seq);
    }

    /// Makes the next event probe this exchange. An operator may have repaired it, or the last
    /// probe got no answer.
    pub(super) fn probe_again(&mut self, exchange: &Key) {
        if let Some(closed) = self.learnt.closed.get_mut(exchange) {
            closed.probe_ms = 0;
        }
    }

    /// Learns from the outcome of an event. An isolated event that was refused stays isolated, and
    /// clears the other suspects.
    pub(super) fn learn(&mut self, seq: u64, isolated: bool, outcome: &Outcome, now: Now) {
        let probe_ms = now.mono_ms.saturating_add(self.settings.probe_wait_ms());
        let Some(item) = self.items.get_mut(&seq) else { return };
        let poison = match outcome {
            Outcome::Refused(fault) if isolated && closes_channel(fault) => Some(fault),
            _ => None,
        };
        let known = item.poison;
        let says_nothing = matches!(outcome, Outcome::Unknown(_));
        item.poison = poison.is_some() || (known && says_nothing);
        // The event stays a suspect until an answer comes.
        item.suspect = item.poison || (says_nothing && item.suspect);
        item.likely &= says_nothing;
        let (exchange, bytes) = (Key::clone(&item.exchange), item.bytes);
        let Some(fault) = poison else {
            if says_nothing {
                // A missing answer fails no event.
                self.probe_again(&exchange);
            }
            if isolated && !says_nothing {
                if self.learnt.closed.remove(&exchange).is_some() {
                    self.clear(|item| item.exchange == exchange);
                }
                self.learnt.large_bytes = self.learnt.large_bytes.filter(|large| bytes < *large);
            }
            return;
        };
        if fault.class == FaultClass::Message {
            let before = self.learnt.large_bytes;
            self.learnt.large_bytes = before.into_iter().chain([bytes]).min();
        } else if names(fault, &exchange) {
            if self.learnt.closed.len() >= CLOSED_MAX {
                self.learnt.closed.clear();
            }
            self.learnt.closed.insert(exchange, Closed { fault: fault.clone(), probe_ms });
        }
        if !known {
            // One close has one poison message.
            self.clear(|_| true);
        }
    }

    /// Returns suspects to normal dispatch, except poison messages.
    fn clear(&mut self, is_cleared: impl Fn(&super::Item) -> bool) {
        let is_cleared = |item: &super::Item| !item.poison && is_cleared(item);
        let cleared: Vec<u64> =
            self.suspects.iter().copied().filter(|seq| self.items.get(seq).is_some_and(is_cleared)).collect();
        for seq in cleared {
            if let Some(item) = self.items.get_mut(&seq) {
                (item.suspect, item.likely) = (false, false);
            }
            self.suspects.remove(&seq);
            self.ready.insert(seq);
        }
    }

    /// Returns the most likely suspect, which goes next.
    pub(super) fn next_suspect(&self) -> Option<u64> {
        let likely = |seq: &&u64| self.items.get(seq).is_some_and(|item| item.likely);
        // Under total order the suspects go in log order, because only one event is in flight.
        let first = self.suspects.first();
        if self.settings.ordering == PublishOrder::Total {
            return first.copied();
        }
        self.suspects.iter().find(likely).or(first).copied()
    }

    /// Gives waiting events a row if the position is too far behind what has been read. Events that
    /// are confirmed beyond the position would be published again after a crash. They are also not
    /// trimmed, and take memory.
    pub(super) fn let_position_pass(&mut self, now: Now, out: &mut Vec<Action>) {
        if self.settings.ordering == PublishOrder::Total {
            return;
        }
        while let Some(seq) = self.open.first().copied()
            && self.loaded_to - seq > self.settings.span_events()
            && let Some(item) = self.items.get(&seq)
        {
            match (item.state, item.key.clone()) {
                (ItemState::Waiting { due_ms, .. }, _) => {
                    self.defer(seq, due_ms.saturating_sub(now.mono_ms), now, out);
                }
                (ItemState::Suspended, _) => self.spill_silent_one(seq, now, out),
                (ItemState::Queued, Some(key)) => self.park_queue(&key, out),
                // The event waits behind a suspect that has no answer yet.
                (ItemState::Ready, _) if item.suspect && self.is_alone_taken() => {
                    self.defer(seq, self.settings.probe_wait_ms(), now, out);
                }
                // A ready event goes first, and an event in flight has a deadline.
                _ => return,
            }
            if self.open.first() == Some(&seq) {
                return;
            }
        }
    }
}

/// Whether the broker's text is about this exchange, and not about one of its routing keys (*access
/// to topic 'a.b' in exchange 'x'*).
fn names(fault: &Fault, exchange: &str) -> bool {
    fault.text.contains(&format!("'{exchange}'")) && !fault.text.contains("access to topic '")
}
