//! Destinations that give no answer, or nack everything.
//!
//! A message without an answer says nothing of the connection, and little of itself. Most often a
//! queue behind its destination hangs, or has lost its majority. So the machine suspends the
//! destination, and its events wait for it in memory. One event at a time is published alone as a
//! trial. Each trial without an answer makes the wait for the next trial longer. The first answer
//! releases the destination. Silence consumes no attempts.
//!
//! **Invariants.** One trial of a destination is out at a time, and [`SILENT_TRIALS_MAX`] in all.
//! Trials take no room of the window. An event that waits for its destination is in `waiting` of
//! that destination, and nowhere else.

use std::collections::{BTreeMap, BTreeSet};

use super::types::{Action, Key, PublishOrder, SuspendCause};
use super::{ItemState, Machine, is_expired};
use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::time::Now;
use crate::tuning::{SILENT_BACKOFF_MS, SILENT_TRIALS_MAX};

/// How long the machine remembers a destination for which nothing waits.
const REMEMBERED_MS: u64 = 2 * SILENT_BACKOFF_MS.1;

/// After so many nacks in a row, without any other answer, the machine suspends the destination.
const NACKS_MAX: u32 = 8;

/// The most destinations whose nacks are counted.
const NACKING_MAX: usize = 1024;

/// The longest wait after nacks, in longest backoffs: 5 minutes unless set.
pub(super) const NACK_BACKOFF_FACTOR: u64 = 10;

/// The shortest wait before an event without room in memory is reloaded.
const SPILLED_MS: u64 = 30_000;

/// Exchange and routing key.
pub(super) type Destination = (Key, Key);

/// All suspended destinations.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Silence {
    destinations: BTreeMap<Destination, Silent>,
    /// When the destinations are due. Each destination without a trial in flight has one entry.
    due: BTreeSet<(u64, Destination)>,
    /// The number of trials in flight, and their bytes.
    pub(super) trials: usize,
    pub(super) trial_bytes: usize,
    /// The nacks in a row of destinations that are not suspended.
    nacks: BTreeMap<Destination, u32>,
    /// Publishes that were reported silent and may still get an answer.
    late: BTreeMap<Ticket, u64>,
}

/// One suspended destination.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
struct Silent {
    waiting: BTreeSet<u64>,
    trial: Option<u64>,
    /// The last event that was tried. The next trial takes the event behind it.
    tried: Option<u64>,
    /// Trials without an answer.
    tries: u32,
    /// When the next trial may go.
    due_ms: u64,
    why: Why,
}

/// Why a destination is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Why {
    /// No answer came within the deadline.
    #[default]
    Silent,
    /// The destination's messages hold the window without an answer (see `slow`). That is no
    /// verdict yet, so the destination has no trials.
    Slow,
    /// The destination answers with nacks, or with returns that an outage causes. If one queue of
    /// several refuses, each try leaves one more copy in the remaining queues.
    Refuses(SuspendCause),
}

/// Returns the cause of a suspension if the broker did not take the message and that consumes no
/// attempts.
pub(super) fn refusal(outcome: &Outcome) -> Option<SuspendCause> {
    match outcome {
        Outcome::Nacked => Some(SuspendCause::Nacks),
        Outcome::Returned(fault) if fault.class == FaultClass::Outage => Some(SuspendCause::Away),
        _ => None,
    }
}

/// Whether the event waits by itself, each time longer.
pub(super) fn is_retried_later(outcome: &Outcome) -> bool {
    let of_its_own = |fault: &Fault| matches!(fault.class, FaultClass::Message | FaultClass::Destination);
    refusal(outcome).is_some() || matches!(outcome, Outcome::Refused(fault) if !of_its_own(fault))
}

impl Silent {
    fn entry(&self, destination: &Destination) -> (u64, Destination) {
        let at_ms =
            if self.waiting.is_empty() { self.due_ms.saturating_add(REMEMBERED_MS) } else { self.due_ms };
        (at_ms, destination.clone())
    }
}

impl Silence {
    /// Changes one destination, and updates what is derived.
    fn with<T>(&mut self, destination: &Destination, change: impl FnOnce(&mut Silent) -> T) -> Option<T> {
        let silent = self.destinations.get_mut(destination)?;
        if silent.trial.is_none() {
            self.due.remove(&silent.entry(destination));
        }
        let result = change(silent);
        if silent.trial.is_none() {
            self.due.insert(silent.entry(destination));
        }
        Some(result)
    }

    /// Suspends a destination. `trial` is an earlier trial that is still in flight.
    fn suspend(&mut self, destination: &Destination, trial: Option<u64>, now: Now) {
        self.with(destination, |silent| {
            if std::mem::take(&mut silent.why) != Why::Silent {
                silent.due_ms = now.mono_ms;
            }
        });
        if !self.destinations.contains_key(destination) {
            let silent = Silent { due_ms: now.mono_ms, trial, ..Silent::default() };
            if trial.is_none() {
                self.due.insert(silent.entry(destination));
            }
            self.destinations.insert(destination.clone(), silent);
        }
    }

    fn forget(&mut self, destination: &Destination) -> Option<Silent> {
        let silent = self.destinations.remove(destination)?;
        self.due.remove(&silent.entry(destination));
        Some(silent)
    }

    /// Forgets destinations for which nothing has waited for a while.
    fn forget_idle(&mut self, now: Now) {
        while let Some((at_ms, destination)) = self.due.first().cloned()
            && at_ms <= now.mono_ms
            && self.destinations.get(&destination).is_none_or(|silent| silent.waiting.is_empty())
        {
            self.due.remove(&(at_ms, destination.clone()));
            self.destinations.remove(&destination);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.destinations.is_empty()
    }

    /// Whether an answer may change anything here.
    pub(super) fn listens(&self) -> bool {
        !self.destinations.is_empty() || !self.nacks.is_empty()
    }

    fn refuses(&self, destination: &Destination) -> bool {
        self.destinations.get(destination).is_some_and(|silent| matches!(silent.why, Why::Refuses(_)))
    }

    /// Counts one more nack. Returns whether the destination now refuses everything.
    fn nacked(&mut self, destination: &Destination) -> bool {
        if self.refuses(destination) {
            return true;
        }
        if self.nacks.len() >= NACKING_MAX && !self.nacks.contains_key(destination) {
            // Destinations that were nacked only once make room.
            self.nacks.clear();
        }
        let nacks = self.nacks.entry(destination.clone()).or_default();
        *nacks += 1;
        *nacks >= NACKS_MAX
    }

    /// Suspends a destination until it answers, or is silent.
    pub(super) fn set_slow(&mut self, destination: &Destination) {
        if !self.destinations.contains_key(destination) {
            let silent = Silent { due_ms: u64::MAX, why: Why::Slow, ..Silent::default() };
            self.due.insert(silent.entry(destination));
            self.destinations.insert(destination.clone(), silent);
        }
    }

    /// Returns the slow destinations. After a reconnect nothing is known of them.
    fn slow(&self) -> Vec<Destination> {
        let slow = self.destinations.iter().filter(|(_, silent)| silent.why == Why::Slow);
        slow.map(|(destination, _)| destination.clone()).collect()
    }

    /// Whether an earlier event than this one waits for a destination.
    pub(super) fn waits_before(&self, seq: u64) -> bool {
        self.destinations.values().any(|silent| silent.waiting.first().is_some_and(|first| *first < seq))
    }

    /// Removes an event from the events that wait for a destination.
    pub(super) fn leave(&mut self, destination: &Destination, seq: u64) {
        self.with(destination, |silent| silent.waiting.remove(&seq));
    }

    pub(super) fn trial_ended(&mut self, destination: &Destination, seq: u64, bytes: usize) {
        self.trials -= 1;
        self.trial_bytes -= bytes;
        self.with(destination, |silent| {
            if silent.trial == Some(seq) {
                silent.trial = None;
            }
        });
    }

    /// Forgets the publishes whose late answer a closed connection can no longer bring.
    pub(super) fn forget_late(&mut self) -> impl Iterator<Item = u64> + use<> {
        std::mem::take(&mut self.late).into_values()
    }

    pub(super) fn forget_ticket(&mut self, ticket: Ticket) {
        self.late.remove(&ticket);
    }

    #[cfg(test)]
    pub(super) fn check(
        &self,
        is_waiting: impl Fn(u64, &Destination) -> bool,
        waiting: usize,
        trials: usize,
    ) {
        let mut due = BTreeSet::new();
        for (destination, silent) in &self.destinations {
            for seq in &silent.waiting {
                assert!(is_waiting(*seq, destination), "{seq} waits for {destination:?}");
            }
            if silent.trial.is_none() {
                due.insert(silent.entry(destination));
            }
        }
        assert_eq!(self.due, due);
        assert_eq!(self.trials, trials);
        assert_eq!(self.destinations.values().map(|silent| silent.waiting.len()).sum::<usize>(), waiting);
    }

    /// Hashes the parts that decide future steps.
    #[cfg(test)]
    pub(super) fn hash_for_test(&self, now: Now, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        for (destination, silent) in &self.destinations {
            let rest_ms = silent.due_ms.saturating_sub(now.mono_ms);
            (destination, &silent.waiting, silent.trial, silent.tries, rest_ms, silent.why).hash(hasher);
        }
        self.late.values().collect::<Vec<_>>().hash(hasher);
    }
}

/// A suspended destination, as `status` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SuspendedFigures<'a> {
    pub(crate) exchange: &'a Key,
    pub(crate) routing_key: &'a Key,
    pub(crate) cause: SuspendCause,
    /// Events in memory that wait for the destination.
    pub(crate) waiting: usize,
    /// Failed trials.
    pub(crate) trials: u32,
}

impl Machine {
    /// Iterates over the suspended destinations.
    pub(crate) fn suspended(&self) -> impl Iterator<Item = SuspendedFigures<'_>> {
        self.silence.destinations.iter().filter_map(|((exchange, routing_key), silent)| {
            let cause = match silent.why {
                Why::Silent => SuspendCause::Silence,
                Why::Refuses(cause) => cause,
                Why::Slow => return None,
            };
            let waiting = silent.waiting.len() + usize::from(silent.trial.is_some());
            Some(SuspendedFigures { exchange, routing_key, cause, waiting, trials: silent.tries })
        })
    }

    /// Makes the event wait if its destination is suspended. Returns whether it waits.
    pub(super) fn waits_for_destination(&mut self, seq: u64) -> bool {
        if self.silence.is_empty() {
            return false;
        }
        let Some(destination) = self.items.get(&seq).map(|item| item.destination()) else { return false };
        if !self.silence.destinations.contains_key(&destination) {
            return false;
        }
        self.hold_suspended(seq, &destination);
        true
    }

    fn hold_suspended(&mut self, seq: u64, destination: &Destination) {
        self.unqueue(seq);
        let Some(item) = self.items.get_mut(&seq) else { return };
        item.state = ItemState::Suspended;
        self.silence.with(destination, |silent| silent.waiting.insert(seq));
    }

    /// Handles a publish that has had no answer for too long.
    pub(super) fn fell_silent(&mut self, seq: u64, ticket: Ticket, now: Now) {
        let Some(item) = self.items.get(&seq) else { return };
        let destination = item.destination();
        let was_trial = item.is_trial();
        self.unqueue(seq);
        if let Some(item) = self.items.get_mut(&seq) {
            item.silences += 1;
            if let Some(before) = item.late.replace(ticket) {
                self.silence.late.remove(&before);
            }
            self.silence.late.insert(ticket, seq);
        }
        // An earlier trial may still be in flight.
        let trial = match self.silence.destinations.contains_key(&destination) {
            true => None,
            false => self.trial_out(&destination),
        };
        self.silence.suspend(&destination, trial, now);
        if was_trial {
            self.trial_failed(&destination, now);
        }
        self.hold_suspended(seq, &destination);
    }

    fn trial_out(&self, destination: &Destination) -> Option<u64> {
        let trials = self.in_flight.values().copied().filter(|seq| {
            let item = self.items.get(seq);
            item.is_some_and(|item| item.is_trial() && item.destination() == *destination)
        });
        trials.min()
    }

    /// Handles a trial without an answer: the wait for the next trial grows.
    fn trial_failed(&mut self, destination: &Destination, now: Now) {
        self.trial_waits(destination, now);
        self.silence.with(destination, |silent| silent.tries = silent.tries.saturating_add(1));
    }

    /// Makes the next trial wait as long as the last one did.
    pub(super) fn trial_waits(&mut self, destination: &Destination, now: Now) {
        let (first_ms, max_ms) = SILENT_BACKOFF_MS;
        let jitter = &mut self.jitter;
        self.silence.with(destination, |silent| {
            silent.due_ms = now.mono_ms.saturating_add(jitter.wait_ms(first_ms, max_ms, silent.tries));
        });
    }

    /// Handles a nack. If the broker nacks everything for a destination, one event at a time tries
    /// the destination.
    pub(super) fn suspend_or_retry_later(
        &mut self,
        seq: u64,
        cause: SuspendCause,
        was_trial: bool,
        now: Now,
    ) {
        let Some(item) = self.items.get_mut(&seq) else { return };
        let (nacks, destination) = (item.nacks, item.destination());
        item.nacks += 1;
        if let Some(key) = item.key.clone() {
            self.keys.with(&key, |state| state.active.insert(seq));
        }
        let (first_ms, max_ms) = match cause {
            SuspendCause::Nacks | SuspendCause::Silence => self.nack_backoff_ms(),
            // A try leaves no copy.
            SuspendCause::Away => (self.settings.backoff_first_ms, self.settings.backoff_max_ms),
        };
        if !self.silence.nacked(&destination) {
            let wait = self.jitter.wait_ms(first_ms, max_ms, nacks);
            return self.wait(seq, now.mono_ms.saturating_add(wait));
        }
        if !self.silence.refuses(&destination) {
            self.silence.nacks.remove(&destination);
            self.silence.suspend(&destination, None, now);
        }
        let jitter = &mut self.jitter;
        self.silence.with(&destination, |silent| {
            silent.why = Why::Refuses(cause);
            if was_trial || silent.tries == 0 {
                silent.due_ms = now.mono_ms.saturating_add(jitter.wait_ms(first_ms, max_ms, silent.tries));
                silent.tries = silent.tries.saturating_add(1);
            }
        });
        self.hold_suspended(seq, &destination);
    }

    fn nack_backoff_ms(&self) -> (u64, u64) {
        let max_ms = self.settings.backoff_max_ms.saturating_mul(NACK_BACKOFF_FACTOR);
        (self.settings.backoff_first_ms, max_ms)
    }

    /// Handles the broker's answer on a message for this destination. Any answer but another
    /// refusal releases the destination.
    pub(super) fn heard_of(&mut self, destination: &Destination, outcome: &Outcome, now: Now) {
        if refusal(outcome).is_some() {
            self.slow.spoke(destination);
            if self.silence.refuses(destination) {
                return;
            }
        } else {
            self.silence.nacks.remove(destination);
        }
        self.spoke(destination, now);
    }

    /// Releases the destination after the broker's answer.
    fn spoke(&mut self, destination: &Destination, now: Now) {
        self.slow.spoke(destination);
        // Events linger for such destinations only. A search at each answer would walk the whole
        // window.
        let Some(silent) = self.silence.forget(destination) else { return };
        self.lingers_no_more(destination);
        let (first_ms, max_ms) = SILENT_BACKOFF_MS;
        for seq in silent.waiting {
            let Some(item) = self.items.get_mut(&seq) else { continue };
            item.state = ItemState::Queued;
            let (silences, nacks) = (item.silences, item.nacks);
            if silences == 0 && nacks == 0 {
                self.make_ready(seq);
                continue;
            }
            if silences == 0 {
                // The message itself may be refused, and each try of it leaves a copy.
                let (first_ms, max_ms) = self.nack_backoff_ms();
                let wait = self.jitter.wait_ms(first_ms, max_ms, nacks - 1);
                self.wait(seq, now.mono_ms.saturating_add(wait));
                continue;
            }
            // The event's own answer may be on its way, which spares a repeat. If the answer never
            // comes although the destination answers, the event stays isolated, because its headers
            // may lead elsewhere.
            item.suspect |= silences > 1;
            let wait = self.jitter.wait_ms(first_ms, max_ms, silences - 1);
            self.wait(seq, now.mono_ms.saturating_add(wait));
        }
    }

    /// Releases the slow destinations when the connection has ended.
    pub(super) fn slow_have_a_new_chance(&mut self) {
        self.silence.nacks.clear();
        for destination in self.silence.slow() {
            self.slow_has_a_new_chance(&destination);
        }
    }

    /// Releases a slow destination. Nothing is due for it, so without an outcome in sight it would
    /// wait for ever.
    pub(super) fn slow_has_a_new_chance(&mut self, destination: &Destination) {
        if self.silence.destinations.get(destination).is_none_or(|silent| silent.why != Why::Slow) {
            return;
        }
        let waiting = self.silence.forget(destination).map(|silent| silent.waiting).unwrap_or_default();
        self.lingers_no_more(destination);
        for seq in waiting {
            if let Some(item) = self.items.get_mut(&seq) {
                item.state = ItemState::Queued;
            }
            self.make_ready(seq);
        }
    }

    /// Handles an answer to a publish that was reported silent.
    pub(super) fn late_word(&mut self, ticket: Ticket, outcome: Outcome, now: Now, out: &mut Vec<Action>) {
        let Some(seq) = self.silence.late.remove(&ticket) else { return };
        let Some(item) = self.items.get_mut(&seq) else { return };
        item.late = None;
        if matches!(outcome, Outcome::Unknown(_) | Outcome::Silent(_)) {
            return;
        }
        let destination = item.destination();
        let is_out = matches!(item.state, ItemState::InFlight { .. });
        self.heard_of(&destination, &outcome, now);
        // A newer publish of the same event is in flight. Unless the broker has the event, the
        // newer publish decides.
        if !is_out || matches!(outcome, Outcome::Confirmed) {
            self.land(seq);
            self.takes(seq, outcome, false, now, out);
        }
    }

    /// Returns the destination that is tried next, and when. Under total order it is the
    /// destination of the first event of all, if nothing else comes before it.
    pub(super) fn next_due(&self) -> Option<(u64, Destination)> {
        if self.settings.ordering != PublishOrder::Total {
            return self.silence.due.first().cloned();
        }
        let waiting = self.silence.destinations.iter();
        let (seq, destination, silent) = waiting
            .filter_map(|(destination, silent)| Some((*silent.waiting.first()?, destination, silent)))
            .min_by_key(|(seq, ..)| *seq)?;
        let others = self.timers.iter().map(|(_, seq)| seq).chain(&self.ready).chain(&self.suspects);
        let is_first = self.in_flight.is_empty() && others.min().is_none_or(|first| *first > seq);
        is_first.then(|| (silent.due_ms, destination.clone()))
    }

    /// Publishes the trials that are due.
    pub(super) fn send_trials(&mut self, now: Now, out: &mut Vec<Action>) {
        self.silence.forget_idle(now);
        while self.can_publish()
            && self.silence.trials < SILENT_TRIALS_MAX
            && let Some((at_ms, destination)) = self.next_due()
            && at_ms <= now.mono_ms
        {
            let silent = self.silence.destinations.get(&destination);
            let is_total = self.settings.ordering == PublishOrder::Total;
            let next = silent
                .and_then(|silent| if is_total { silent.waiting.first().copied() } else { silent.next() });
            let Some(seq) = next else {
                self.silence.forget(&destination);
                continue;
            };
            let Some(item) = self.items.get(&seq) else { return };
            if is_expired(item.expires_ms, now) {
                self.quarantine(seq, super::expired(), now, out);
                continue;
            }
            if !self.may_send(now) {
                return;
            }
            self.unqueue(seq);
            self.silence.with(&destination, |silent| (silent.trial, silent.tried) = (Some(seq), Some(seq)));
            self.send_as(seq, true, out);
        }
    }

    /// Moves events that wait for silent destinations to disk, except one per destination.
    pub(super) fn spill_silent(&mut self, now: Now, out: &mut Vec<Action>) {
        let waiting: Vec<(u64, u64)> = self
            .silence
            .destinations
            .values()
            .flat_map(|silent| {
                let due_ms = if silent.why == Why::Slow { 0 } else { silent.due_ms };
                silent.waiting.iter().skip(1).map(move |seq| (*seq, due_ms))
            })
            .collect();
        for (seq, due_ms) in waiting {
            if self.wants_more() {
                return;
            }
            self.spill_one_silent(seq, due_ms, now, out);
        }
    }

    /// Moves the remaining events too, except those that are tried next, so that many destinations
    /// do not fill the memory.
    pub(super) fn spill_silent_firsts(&mut self, now: Now, out: &mut Vec<Action>) {
        let waits = |destination: &Destination| {
            self.silence.destinations.get(destination).is_some_and(|silent| !silent.waiting.is_empty())
        };
        let due = self.silence.due.iter().map(|(_, destination)| destination);
        let next: BTreeSet<&Destination> =
            due.filter(|destination| waits(destination)).take(SILENT_TRIALS_MAX).collect();
        let others = self.silence.destinations.iter().filter(|(destination, _)| !next.contains(destination));
        let waiting: Vec<u64> = others.flat_map(|(_, silent)| silent.waiting.iter().copied()).collect();
        for seq in waiting {
            if self.wants_more() {
                return;
            }
            self.spill_silent_one(seq, now, out);
        }
    }

    fn spill_one_silent(&mut self, seq: u64, due_ms: u64, now: Now, out: &mut Vec<Action>) {
        self.defer(seq, due_ms.saturating_sub(now.mono_ms).max(SPILLED_MS), now, out);
    }

    /// Moves one event to disk that holds the position back.
    pub(super) fn spill_silent_one(&mut self, seq: u64, now: Now, out: &mut Vec<Action>) {
        let destination = self.items.get(&seq).map(|item| item.destination());
        let silent = destination.and_then(|destination| self.silence.destinations.get(&destination));
        let due_ms = silent.filter(|silent| silent.why != Why::Slow).map_or(0, |silent| silent.due_ms);
        self.spill_one_silent(seq, due_ms, now, out);
    }
}

impl Silent {
    /// Returns the next event to try. Trials go in rounds, because one event may be silent for a
    /// reason of its own.
    fn next(&self) -> Option<u64> {
        let after = self.tried.map_or(0, |tried| tried + 1);
        self.waiting.range(after..).next().or(self.waiting.first()).copied()
    }
}
