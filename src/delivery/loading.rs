//! Loaded events: those in log order, those that are due, and those that were parked.

use super::item::{Home, Item};
use super::keys::Place;
use super::types::{Action, Change, Entry, Exception, ExceptionState, Key, Loaded};
use super::{Machine, expired, is_expired};
use crate::time::Now;

impl Machine {
    pub(super) fn loaded(&mut self, to: u64, events: Vec<Loaded>, now: Now, out: &mut Vec<Action>) {
        self.load_out = 0;
        self.loaded_to = self.loaded_to.max(to);
        for loaded in events {
            let settled = !self.ahead.is_empty() && self.ahead.remove(&loaded.seq());
            match loaded {
                Loaded::Exception { .. } => {}
                _ if settled => self.forget_again(loaded.seq(), out),
                Loaded::Unpublished { seq } => out.push(Action::Forget { seq }),
                Loaded::Undecodable { seq, fault } => self.quarantine_unread(seq, fault, now, out),
                Loaded::Event(entry) => self.arrived(&entry, now, out),
            }
        }
    }

    /// Forgets a loaded event that is not wanted. If the event is in memory already, its record
    /// stays.
    pub(super) fn forget_again(&self, seq: u64, out: &mut Vec<Action>) {
        if !self.items.contains_key(&seq) {
            out.push(Action::Forget { seq });
        }
    }

    /// Takes a new event of the log.
    pub(super) fn arrived(&mut self, entry: &Entry, now: Now, out: &mut Vec<Action>) {
        self.scan.note_expiry(entry.expires_ms);
        let lives = !is_expired(entry.expires_ms, now);
        if let Some(due_ms) = entry.not_before_ms.filter(|due_ms| lives && *due_ms > now.wall_ms) {
            let state = ExceptionState::Scheduled { due_ms };
            let exception = Exception { state, attempts: 0, destination_attempts: 0, fault: None };
            let (seq, key) = (entry.seq, entry.key.clone());
            out.push(Action::Save(Change::PutException { seq, key, exception }));
            out.push(Action::Forget { seq });
            self.note_due(due_ms);
            return;
        }
        self.admit(entry, Item::new(entry, Home::Log), now, out);
    }

    /// Lets an event into memory as ready or behind its key. If its key waits on disk, the event
    /// goes to disk at once.
    pub(super) fn admit(&mut self, entry: &Entry, item: Item, now: Now, out: &mut Vec<Action>) {
        if is_expired(item.expires_ms, now) {
            self.insert(entry.seq, item);
            self.quarantine(entry.seq, expired(), now, out);
            return;
        }
        let home = item.home;
        self.insert(entry.seq, item);
        let Some(key) = entry.key.clone() else {
            self.make_ready(entry.seq);
            return;
        };
        let strict = self.is_strict();
        let place = self.keys.with(&key, |state| {
            // No event in memory waits for an event on disk. Otherwise memory might be full of
            // waiting events, with no room for the awaited one.
            if state.is_held_before(entry.seq) || (state.parked && home != Home::Parked) {
                return Place::Held;
            }
            if !state.lets_go(entry.seq) || !state.queue.is_empty() {
                state.queue.push_back(entry.seq);
                return Place::Queued;
            }
            if strict {
                state.active.insert(entry.seq);
            }
            Place::Goes
        });
        match place {
            Place::Goes => self.make_ready(entry.seq),
            Place::Queued => {}
            Place::Held => self.park(&key, entry.seq, out),
        }
    }

    pub(super) fn loaded_due(&mut self, due: Vec<(Loaded, Exception)>, now: Now, out: &mut Vec<Action>) {
        for (loaded, exception) in due {
            if self.items.contains_key(&loaded.seq()) {
                continue;
            }
            let entry = match loaded {
                Loaded::Event(entry) => entry,
                Loaded::Undecodable { seq, fault } => {
                    self.quarantine_unread(seq, fault, now, out);
                    self.release(seq);
                    continue;
                }
                Loaded::Unpublished { seq } | Loaded::Exception { seq } => {
                    debug_assert!(false, "an unpublished event has no exception");
                    out.push(Action::Save(Change::DropException { seq }));
                    out.push(Action::Forget { seq });
                    continue;
                }
            };
            let state = exception.state;
            let mut item = Item::again(&entry, exception);
            match state {
                ExceptionState::Retry { .. } => {
                    item.sent = true;
                    self.reload(&entry, item, out);
                }
                ExceptionState::Scheduled { .. } => self.admit(&entry, item, now, out),
                ExceptionState::Quarantined { .. } | ExceptionState::Discarded => {
                    debug_assert!(false, "neither is due");
                    out.push(Action::Forget { seq: entry.seq });
                }
            }
        }
    }

    /// Reloads an event that was taken out, to try it again before the events behind it.
    pub(super) fn reload(&mut self, entry: &Entry, item: Item, out: &mut Vec<Action>) {
        let seq = entry.seq;
        self.insert(seq, item);
        let Some(key) = &entry.key else {
            self.make_ready(seq);
            return;
        };
        let strict = self.is_strict();
        let place = self.keys.with(key, |state| {
            let held_it = state.held_by.remove(&seq);
            let place = state.place(seq);
            if place == Place::Goes && (strict || held_it) {
                state.active.insert(seq);
            }
            place
        });
        match place {
            Place::Goes => self.make_ready(seq),
            Place::Queued => {}
            Place::Held => self.park(key, seq, out),
        }
    }

    /// Releases the key of an event that will never hold it from disk again.
    pub(super) fn release(&mut self, seq: u64) {
        let key = self.keys.held_by(seq);
        self.discarded(seq, key);
    }

    pub(super) fn loaded_parked(
        &mut self,
        key: &Key,
        events: Vec<Loaded>,
        more: bool,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        self.keys.with(key, |state| {
            state.loading = 0;
            state.parked = more || state.parked_since;
            state.parked_since = false;
        });
        for loaded in events {
            if self.items.contains_key(&loaded.seq()) {
                continue;
            }
            match loaded {
                Loaded::Event(entry) => self.admit(&entry, Item::new(&entry, Home::Parked), now, out),
                Loaded::Undecodable { seq, fault } => {
                    out.push(Action::Save(Change::Unpark { key: Key::clone(key), seq }));
                    self.quarantine_unread(seq, fault, now, out);
                }
                Loaded::Unpublished { seq } | Loaded::Exception { seq } => {
                    debug_assert!(false, "an unpublished event is not parked");
                    out.push(Action::Save(Change::Unpark { key: Key::clone(key), seq }));
                    out.push(Action::Forget { seq });
                }
            }
        }
        self.free(key, |_| ());
    }
}
