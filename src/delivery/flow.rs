//! The steps after every input: timers, publishes, reads, and the position.

use super::poison::Dispatch;
use super::types::{Action, Change, PublishOrder};
use super::{Home, Item, ItemState, Machine, expired, is_expired};
use crate::message::{FaultClass, Ticket};
use crate::time::Now;
use crate::tuning::SILENT_TRIALS_MAX;

/// How long nothing must be sendable, with more in the log, before events that wait behind others
/// move to disk. Without this wait, events of a hot key that flows would be written and read back
/// for nothing.
pub(crate) const SPILL_TIMEOUT_MS: u64 = 250;

/// The most isolated messages in flight.
const ISOLATED_MAX: usize = 1;

impl Machine {
    /// Runs the end of every step.
    pub(super) fn settle_step(&mut self, now: Now, out: &mut Vec<Action>) {
        self.fire_timers(now);
        self.rate_wake_ms = None;
        self.send_trials(now, out);
        self.publish(now, out);
        if self.look_for_slow(now) {
            self.publish(now, out);
        }
        self.let_position_pass(now, out);
        self.spill_if_starved(now, out);
        self.ask_for_more(now, out);
        self.save_position(out);
    }

    fn fire_timers(&mut self, now: Now) {
        while let Some((due_ms, seq)) = self.timers.first().copied()
            && due_ms <= now.mono_ms
        {
            self.make_ready(seq);
        }
    }

    pub(super) fn can_publish(&self) -> bool {
        self.epoch.is_some() && !self.blocked && !self.paused
    }

    fn window_has_room(&self, bytes: usize) -> bool {
        let total = self.settings.ordering == PublishOrder::Total;
        let events_max = if total { 1 } else { self.settings.window_events };
        // Trials take no room of the window. Under total order, one event in all is in flight,
        // trials included.
        let beside = if total { 0 } else { self.silence.trials + self.slow.lingering };
        let in_flight = self.in_flight.len() - beside;
        let in_flight_bytes = self.in_flight_bytes - self.silence.trial_bytes - self.slow.lingering_bytes;
        in_flight < events_max && (in_flight == 0 || in_flight_bytes + bytes <= self.settings.window_bytes)
    }

    fn publish(&mut self, now: Now, out: &mut Vec<Action>) {
        self.slow.window_is_full = false;
        while self.can_publish() {
            let Some(seq) = self.next_to_send() else { return };
            let Some(item) = self.items.get(&seq) else { return };
            if is_expired(item.expires_ms, now) {
                self.quarantine(seq, expired(), now, out);
                continue;
            }
            let bytes = item.bytes;
            if self.waits_for_destination(seq) {
                continue;
            }
            match self.dispatch_of(seq, now) {
                Dispatch::Goes => {}
                Dispatch::Alone => {
                    self.suspect(seq);
                    continue;
                }
                Dispatch::Fails(fault) => {
                    self.failed(seq, FaultClass::Destination, fault, now, out);
                    continue;
                }
            }
            if !self.window_has_room(bytes) {
                self.slow.window_is_full = true;
                return;
            }
            if !self.may_send(now) {
                return;
            }
            self.send(seq, out);
            #[cfg(onewrite_mutations)]
            if crate::mutations::mutated("mark-before-confirm") && seq % 16 == 0 {
                self.outcome(Ticket(self.last_ticket), crate::message::Outcome::Confirmed, now, out);
            }
        }
    }

    /// Whether the rate limit allows one more publish now. If not, notes when it will.
    pub(super) fn may_send(&mut self, now: Now) -> bool {
        let Some(rate) = &mut self.rate else { return true };
        let goes = rate.take(now.mono_ms);
        if !goes {
            self.rate_wake_ms = Some(rate.wake_at_ms((self.ready.len() + self.suspects.len()).max(1)));
        }
        goes
    }

    /// Returns when a silent destination is due for a trial.
    pub(super) fn trial_wake_ms(&self) -> Option<u64> {
        // While the rate limit holds everything back, its own wake-up is enough.
        let may_go = self.can_publish() && self.rate_wake_ms.is_none();
        if !may_go || self.silence.trials >= SILENT_TRIALS_MAX {
            return None;
        }
        self.next_due().map(|(at_ms, _)| at_ms).filter(|at_ms| *at_ms < u64::MAX)
    }

    /// Whether as many isolated messages are in flight as allowed.
    pub(super) fn is_alone_taken(&self) -> bool {
        self.isolated_out >= ISOLATED_MAX
    }

    /// Returns the lowest event that may go: a suspect if none is in flight, otherwise a ready
    /// event.
    fn next_to_send(&self) -> Option<u64> {
        let suspect = (!self.is_alone_taken()).then(|| self.next_suspect()).flatten();
        if self.settings.ordering == PublishOrder::Total {
            return self.first_in_total_order(suspect);
        }
        suspect.or_else(|| self.ready.first().copied())
    }

    /// Returns the first event under total order. Any earlier event that waits holds it back.
    fn first_in_total_order(&self, suspect: Option<u64>) -> Option<u64> {
        let first = suspect.into_iter().chain(self.ready.first().copied()).min()?;
        let waits_before =
            self.timers.iter().any(|(_, seq)| *seq < first) || self.silence.waits_before(first);
        (!waits_before).then_some(first)
    }

    fn send(&mut self, seq: u64, out: &mut Vec<Action>) {
        self.send_as(seq, false, out);
    }

    pub(super) fn send_as(&mut self, seq: u64, trial: bool, out: &mut Vec<Action>) {
        let Some(epoch) = self.epoch else { return };
        self.unqueue(seq);
        let Some(item) = self.items.get_mut(&seq) else { return };
        self.last_ticket += 1;
        let (ticket, isolated, resend) = (Ticket(self.last_ticket), item.suspect || trial, item.sent);
        item.state = ItemState::InFlight { ticket, isolated, trial };
        item.sent = true;
        self.in_flight.insert(ticket, seq);
        self.in_flight_bytes += item.bytes;
        if trial {
            self.silence.trials += 1;
            self.silence.trial_bytes += item.bytes;
        } else {
            self.isolated_out += usize::from(isolated);
        }
        self.retried += u64::from(resend);
        out.push(Action::Publish { epoch, ticket, seq, resend, isolated });
    }

    /// Counts the events in memory that count against the lookahead.
    fn in_lookahead(&self) -> usize {
        self.items.len() - self.retrying - self.slow.lingering
    }

    fn lookahead_bytes(&self) -> usize {
        self.memory_bytes - self.slow.lingering_bytes
    }

    /// Returns how many more events may be requested. Requested events already count.
    fn room(&self) -> usize {
        let asked = self.load_out + self.due_out + self.keys.loading;
        self.settings.lookahead_events.saturating_sub(self.in_lookahead() + asked)
    }

    pub(super) fn has_room(&self) -> bool {
        self.room() > 0 && self.lookahead_bytes() < self.settings.lookahead_bytes
    }

    /// Whether the lookahead is half empty. That is early enough for the window never to drain, and
    /// late enough to read many events at once.
    pub(super) fn wants_more(&self) -> bool {
        self.in_lookahead() <= self.settings.lookahead_events / 2
            && self.lookahead_bytes() <= self.settings.lookahead_bytes / 2
    }

    pub(super) fn may_read(&self) -> bool {
        self.epoch.is_some() && !self.paused
    }

    fn ask_for_more(&mut self, now: Now, out: &mut Vec<Action>) {
        if !self.may_read() {
            return;
        }
        let stalled = self.keys.held() >= self.settings.held_keys_max;
        let more = self.loaded_to < self.tail && self.wants_more() && self.has_room();
        if self.load_out == 0 && more && !stalled {
            self.load_out = self.room().min(self.settings.load_events);
            out.push(Action::Load {
                from: self.loaded_to,
                events_max: self.load_out,
                bytes_max: self.settings.lookahead_bytes - self.lookahead_bytes(),
            });
        }
        self.ask_for_due(now, out);
        self.ask_for_parked(out);
    }

    fn ask_for_due(&mut self, now: Now, out: &mut Vec<Action>) {
        let due = self.due_resume.is_some() || self.next_due_ms.is_some_and(|due_ms| due_ms <= now.wall_ms);
        if self.due_out > 0 || !due || !self.has_room() {
            return;
        }
        let after = self.due_resume.take();
        if after.is_none() {
            self.next_due_ms = None;
        }
        self.due_out = self.room().min(self.settings.load_events);
        out.push(Action::LoadDue { after, until_ms: now.wall_ms, events_max: self.due_out });
    }

    /// Reads the parked events of keys that are free again, some at a time.
    fn ask_for_parked(&mut self, out: &mut Vec<Action>) {
        while self.has_room() {
            let Some(key) = self.keys.wanting.pop_first() else { return };
            let events_max = self.room().min(self.settings.load_events / 4).max(1);
            self.keys.with(&key, |state| state.loading = events_max);
            out.push(Action::LoadParked { key, events_max });
        }
    }

    /// Makes room if memory is full of events that wait behind others, nothing can be sent, and the
    /// log has more.
    fn spill_if_starved(&mut self, now: Now, out: &mut Vec<Action>) {
        let waits_to_go_alone = self.suspects.is_empty() || self.is_alone_taken();
        let idle = self.ready.is_empty() && waits_to_go_alone && self.window_has_room(0);
        let starved = self.can_publish()
            && idle
            && self.settings.ordering != PublishOrder::Total
            && self.loaded_to < self.tail
            && self.load_out == 0
            && !self.wants_more();
        if !starved {
            self.starved_since_ms = None;
            return;
        }
        // An event that waits for its next try frees no room by itself. An event behind a key that
        // flows soon does. An event that was reloaded from a row, and would go back there, stays;
        // otherwise it would come and go at full speed.
        self.spill_waiting(Some(Home::Log), now, out);
        self.spill_silent(now, out);
        if self.wants_more() {
            self.starved_since_ms = None;
            return;
        }
        let since = *self.starved_since_ms.get_or_insert(now.mono_ms);
        if now.mono_ms < since.saturating_add(SPILL_TIMEOUT_MS) {
            return;
        }
        self.starved_since_ms = None;
        for (_, key) in self.keys.longest_queues() {
            if self.wants_more() {
                return;
            }
            self.park_queue(&key, out);
        }
        self.spill_waiting(None, now, out);
        self.spill_suspects(now, out);
        self.spill_silent_firsts(now, out);
    }

    /// Moves suspects to disk, so that they do not fill memory while the suspect before them has no
    /// answer.
    fn spill_suspects(&mut self, now: Now, out: &mut Vec<Action>) {
        for seq in self.suspects.iter().rev().copied().collect::<Vec<_>>() {
            if self.wants_more() {
                return;
            }
            self.defer(seq, self.settings.probe_wait_ms(), now, out);
        }
    }

    /// Gives events in nack backoff rows of their own, so that they hold neither the position nor
    /// the lookahead.
    fn spill_waiting(&mut self, from: Option<Home>, now: Now, out: &mut Vec<Action>) {
        let holds_lookahead = |item: &Item| !item.is_retrying() && from.is_none_or(|home| item.home == home);
        let waiting: Vec<(u64, u64)> = self
            .timers
            .iter()
            .filter(|(_, seq)| self.items.get(seq).is_some_and(holds_lookahead))
            .copied()
            .collect();
        for (due_ms, seq) in waiting {
            if self.wants_more() {
                return;
            }
            self.defer(seq, due_ms.saturating_sub(now.mono_ms), now, out);
        }
    }

    fn save_position(&mut self, out: &mut Vec<Action>) {
        self.position = self.open.first().copied().unwrap_or(self.loaded_to);
        debug_assert!(self.position >= self.saved_position, "the position never goes back");
        if self.position > self.saved_position {
            self.saved_position = self.position;
            out.push(Action::Save(Change::Position(self.position)));
        }
    }
}
