//! The outcomes of events: the broker's answer, the end of a connection, an operator's decision.

use super::Machine;
use super::item::{Home, Item};
use super::keys::Place;
use super::types::{
    Action, Change, DESTINATION_BACKOFF_FACTOR, Exception, ExceptionState, Key, Loaded, QuarantinePolicy,
    SuspendCause,
};
use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::time::Now;

impl Machine {
    /// Ends a connection. What was in flight is lost and will be sent again; alone, if one message
    /// made the broker close the channel.
    pub(super) fn end_epoch(&mut self, fault: Option<&Fault>) {
        self.epoch = None;
        self.blocked = false;
        for seq in self.silence.forget_late() {
            if let Some(item) = self.items.get_mut(&seq) {
                item.late = None;
            }
        }
        self.slow_have_a_new_chance();
        self.lost(fault);
    }

    pub(super) fn outcome(&mut self, ticket: Ticket, outcome: Outcome, now: Now, out: &mut Vec<Action>) {
        let Some(seq) = self.in_flight.get(&ticket).copied() else {
            return self.late_word(ticket, outcome, now, out);
        };
        if matches!(outcome, Outcome::Silent(_)) {
            return self.fell_silent(seq, ticket, now);
        }
        let item = self.items.get(&seq);
        let isolated = item.is_some_and(|item| item.is_alone());
        if (self.silence.listens() || self.slow.is_watching())
            && !matches!(outcome, Outcome::Unknown(_))
            && let Some(destination) = item.map(Item::destination)
        {
            self.heard_of(&destination, &outcome, now);
        }
        let was_trial = self.items.get(&seq).is_some_and(Item::is_trial);
        self.land(seq);
        self.learn(seq, isolated, &outcome, now);
        self.takes(seq, outcome, was_trial, now, out);
    }

    /// Takes the outcome of an event that is not in flight any more.
    pub(super) fn takes(
        &mut self,
        seq: u64,
        outcome: Outcome,
        was_trial: bool,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        if let Some(item) = self.items.get_mut(&seq) {
            item.nacks *= u32::from(super::silence::is_retried_later(&outcome));
            item.silences *= u32::from(matches!(outcome, Outcome::Unknown(_)));
        }
        match outcome {
            Outcome::Confirmed => self.settle(seq, out),
            Outcome::Unknown(_) | Outcome::Silent(_) => {
                if let Some(destination) = self.items.get(&seq).map(Item::destination) {
                    self.slow_has_a_new_chance(&destination);
                    if was_trial {
                        // The outcome is unknown, so the destination is not tried again at once.
                        self.trial_waits(&destination, now);
                    }
                }
                if !self.waits_for_destination(seq) {
                    self.make_ready(seq);
                }
            }
            Outcome::Nacked => self.suspend_or_retry_later(seq, SuspendCause::Nacks, was_trial, now),
            Outcome::Returned(fault) if fault.class == FaultClass::Outage => {
                self.suspend_or_retry_later(seq, SuspendCause::Away, was_trial, now);
            }
            Outcome::Returned(fault) => self.failed(seq, FaultClass::Destination, fault, now, out),
            Outcome::Refused(fault) => match fault.class {
                FaultClass::Message | FaultClass::Destination => {
                    self.failed(seq, fault.class, fault, now, out);
                }
                _ => self.retry_later(seq, now),
            },
        }
    }

    /// Takes a redriven event. Without room in memory, it waits on disk, where it is due.
    pub(super) fn redriven(&mut self, loaded: Loaded, fault: Fault, now: Now, out: &mut Vec<Action>) {
        let seq = loaded.seq();
        if self.items.contains_key(&seq) {
            return;
        }
        let entry = &match loaded {
            Loaded::Event(entry) => entry,
            // The event goes back to quarantine; otherwise it would be neither there nor tried. Its
            // key is unknown now, so it holds no key.
            Loaded::Undecodable { seq, fault } => {
                self.quarantine_unread(seq, fault, now, out);
                self.release(seq);
                return;
            }
            Loaded::Unpublished { seq } | Loaded::Exception { seq } => {
                debug_assert!(false, "an unpublished event has no exception");
                out.push(Action::Forget { seq });
                return;
            }
        };
        // The next scan looks at all rows again, including this event's row.
        self.scan.note_expiry(entry.expires_ms);
        self.probe_again(&entry.exchange);
        if self.has_room() {
            let state = ExceptionState::Retry { due_ms: now.wall_ms };
            let exception = Exception { state, attempts: 0, destination_attempts: 0, fault: Some(fault) };
            let mut item = Item::again(entry, exception);
            item.sent = true;
            self.reload(entry, item, out);
            return;
        }
        out.push(Action::Forget { seq });
        self.note_due(now.wall_ms);
        if let Some(key) = &entry.key {
            self.keys.with(key, |state| state.held_by.insert(seq));
            self.park_queue(key, out);
        }
    }

    pub(super) fn discarded(&mut self, seq: u64, key: Option<Key>) {
        if let Some(key) = key {
            self.free(&key, |state| state.held_by.remove(&seq));
        }
    }

    /// Resumes a retry that was found on disk at the start. It is due soon, and its key is held
    /// until then.
    pub(super) fn resume_retry(
        &mut self,
        loaded: Loaded,
        exception: Exception,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        match loaded {
            Loaded::Event(entry) => {
                let mut item = Item::again(&entry, exception);
                item.sent = true;
                self.insert(entry.seq, item);
                // One event at a time, even if several were redriven past each other.
                let place = entry.key.as_ref().map_or(Place::Goes, |key| {
                    self.keys.with(key, |state| {
                        let place = state.place(entry.seq);
                        if place == Place::Goes {
                            state.active.insert(entry.seq);
                        }
                        place
                    })
                });
                match (place, &entry.key) {
                    (Place::Held, Some(key)) => self.park(key, entry.seq, out),
                    (Place::Goes, _) => {
                        let (first_ms, max_ms) =
                            (self.settings.backoff_first_ms, self.settings.backoff_max_ms);
                        let wait = self.jitter.wait_ms(first_ms, max_ms, 0);
                        self.wait(entry.seq, now.mono_ms.saturating_add(wait));
                    }
                    _ => {}
                }
            }
            Loaded::Undecodable { seq, fault } => self.quarantine_unread(seq, fault, now, out),
            Loaded::Unpublished { seq } | Loaded::Exception { seq } => {
                debug_assert!(false, "an unpublished event has no exception");
                out.push(Action::Forget { seq });
            }
        }
    }

    /// Settles an event that the broker has.
    pub(super) fn settle(&mut self, seq: u64, out: &mut Vec<Action>) {
        let Some(item) = self.remove(seq) else { return };
        self.drop_row(seq, &item, out);
        self.note_ahead(seq);
        self.confirmed += 1;
        out.push(Action::Confirmed { seq });
        out.push(Action::Forget { seq });
        self.leave_key(seq, item.key.as_ref());
    }

    pub(super) fn drop_row(&self, seq: u64, item: &Item, out: &mut Vec<Action>) {
        match (item.home, &item.key) {
            (Home::Log, _) => {}
            (Home::Exception, _) => out.push(Action::Save(Change::DropException { seq })),
            (Home::Parked, Some(key)) => {
                out.push(Action::Save(Change::Unpark { key: Key::clone(key), seq }));
            }
            (Home::Parked, None) => debug_assert!(false, "what is parked has a key"),
        }
    }

    /// Stops the event from blocking its key.
    pub(super) fn leave_key(&mut self, seq: u64, key: Option<&Key>) {
        if let Some(key) = key {
            self.free(key, |state| state.active.remove(&seq));
        }
    }

    /// Handles a message fault or destination fault. The event consumes an attempt, then waits or
    /// goes to quarantine.
    pub(super) fn failed(
        &mut self,
        seq: u64,
        class: FaultClass,
        fault: Fault,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let (attempts_max, destination_max) =
            (self.settings.attempts_max, self.settings.destination_attempts_max);
        let Some(item) = self.items.get_mut(&seq) else { return };
        let (spent, factor) = if class == FaultClass::Message {
            item.attempts += 1;
            (item.attempts, 1)
        } else {
            item.destination_attempts += 1;
            (item.destination_attempts, DESTINATION_BACKOFF_FACTOR)
        };
        item.fault = Some(fault.clone());
        if item.attempts >= attempts_max || item.destination_attempts >= destination_max {
            self.quarantine(seq, fault, now, out);
            return;
        }
        let first_ms = self.settings.backoff_first_ms.saturating_mul(factor);
        let wait = self.jitter.wait_ms(first_ms, self.settings.backoff_max_ms, spent - 1);
        self.defer(seq, wait, now, out);
    }

    /// Defers the event for `wait_ms`, with its counters on disk. The position may pass the event.
    pub(super) fn defer(&mut self, seq: u64, wait_ms: u64, now: Now, out: &mut Vec<Action>) {
        let Some(mut item) = self.remove(seq) else { return };
        let due_ms = now.wall_ms.saturating_add(wait_ms);
        let exception = item.exception(ExceptionState::Retry { due_ms });
        let key = item.key.clone();
        out.push(Action::Save(Change::PutException { seq, key: key.clone(), exception }));
        if item.home == Home::Parked {
            self.drop_row(seq, &item, out);
        }
        item.home = Home::Exception;
        if let Some(key) = &key {
            // Under relaxed ordering too, a failed event holds later events of its key.
            self.keys.with(key, |state| state.active.insert(seq));
        }
        if self.retrying < self.settings.retrying_max {
            self.insert(seq, item);
            self.wait(seq, now.mono_ms.saturating_add(wait_ms));
            return;
        }
        out.push(Action::Forget { seq });
        self.note_due(due_ms);
        if let Some(key) = &key {
            self.keys.with(key, |state| {
                state.active.remove(&seq);
                state.held_by.insert(seq);
            });
            self.park_queue(key, out);
        }
    }

    /// Makes the event wait in memory before it is tried again. It consumes no attempt.
    pub(super) fn retry_later(&mut self, seq: u64, now: Now) {
        let Some(item) = self.items.get_mut(&seq) else { return };
        let nacks = item.nacks;
        item.nacks += 1;
        if let Some(key) = item.key.clone() {
            self.keys.with(&key, |state| state.active.insert(seq));
        }
        let wait = self.jitter.wait_ms(self.settings.backoff_first_ms, self.settings.backoff_max_ms, nacks);
        self.wait(seq, now.mono_ms.saturating_add(wait));
    }

    /// Takes an event out until an operator decides.
    pub(super) fn quarantine(&mut self, seq: u64, fault: Fault, now: Now, out: &mut Vec<Action>) {
        let Some(mut item) = self.remove(seq) else { return };
        let of_its_own = matches!(fault.class, FaultClass::Message | FaultClass::Destination);
        let holds_key =
            of_its_own && item.key.is_some() && self.settings.on_quarantine == QuarantinePolicy::HoldKey;
        item.fault = Some(fault.clone());
        let state = ExceptionState::Quarantined { at_ms: now.wall_ms, holds_key };
        let (key, exception) = (item.key.clone(), item.exception(state));
        out.push(Action::Save(Change::PutException { seq, key, exception }));
        if item.home == Home::Parked {
            self.drop_row(seq, &item, out);
        }
        self.quarantined += 1;
        out.push(Action::Quarantined { seq, fault });
        out.push(Action::Forget { seq });
        match &item.key {
            Some(key) if holds_key => {
                self.keys.with(key, |state| {
                    state.active.remove(&seq);
                    state.held_by.insert(seq);
                });
                self.park_queue(key, out);
            }
            key => self.leave_key(seq, key.as_ref()),
        }
    }

    /// Quarantines an unreadable record. Its key is unknown, so it holds no key.
    pub(super) fn quarantine_unread(&mut self, seq: u64, fault: Fault, now: Now, out: &mut Vec<Action>) {
        let state = ExceptionState::Quarantined { at_ms: now.wall_ms, holds_key: false };
        let exception = Exception { state, attempts: 0, destination_attempts: 0, fault: Some(fault.clone()) };
        out.push(Action::Save(Change::PutException { seq, key: None, exception }));
        self.quarantined += 1;
        out.push(Action::Quarantined { seq, fault });
        out.push(Action::Forget { seq });
    }

    /// Sends one event from memory to wait on disk behind its key.
    pub(super) fn park(&mut self, key: &Key, seq: u64, out: &mut Vec<Action>) {
        let Some(item) = self.remove(seq) else { return };
        if item.home != Home::Parked {
            out.push(Action::Save(Change::Park { key: Key::clone(key), seq }));
        }
        if item.home == Home::Exception {
            out.push(Action::Save(Change::DropException { seq }));
        }
        self.note_ahead(seq);
        out.push(Action::Forget { seq });
        self.keys.with(key, |state| {
            state.parked = true;
            state.parked_since |= state.loading > 0;
        });
    }

    pub(super) fn park_queue(&mut self, key: &Key, out: &mut Vec<Action>) {
        let queue = self.keys.with(key, |state| std::mem::take(&mut state.queue));
        for seq in queue {
            self.park(key, seq, out);
        }
    }
}
