//! The delivery machine: which event to publish, when, and when again.
//!
//! The machine is pure: `(state, input, now) -> actions`. It knows nothing of a file, a broker, a
//! thread or a clock, so tests can check its decisions by the million.
//!
//! **Invariants.**
//! - Everything below the position is settled, except events with a row on disk (an exception, or
//!   parked).
//! - Under [`PublishOrder::PerKey`] at most one event of a key is unconfirmed; under
//!   [`PublishOrder::Total`] one in all.
//! - The window bounds the events in flight. The lookahead and `retrying_max` bound the events in
//!   memory.
//! - An outage consumes no event's attempts.
//! - Every loaded event is forgotten exactly once.
//!
//! **Terms.** A destination that is silent, slow or refusing is *suspended*: its events wait in
//! memory. An event that waits on disk for its next try is *deferred*. *Exceptions* are the rows of
//! deferred, quarantined and discarded events. A message that is published alone is *isolated*. A
//! *poison message* makes the broker close the channel.

mod backoff;
#[cfg(test)]
mod exhaustive_tests;
mod expiry;
mod flow;
mod item;
mod keys;
mod loading;
#[cfg(test)]
mod model_tests;
mod outcomes;
mod poison;
pub(crate) mod rate;
mod silence;
mod slow;
#[cfg(test)]
mod story_tests;
pub(crate) mod types;

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

use self::backoff::Jitter;
use self::expiry::ExpiryScan;
use self::item::{Home, Item, ItemState};
use self::keys::{KeyState, Keys};
use self::poison::Learnt;
use self::rate::Bucket;
use self::silence::Silence;
pub(crate) use self::silence::SuspendedFigures;
use self::slow::Slow;
use self::types::{Action, Change, Figures, Input, Key, PublishOrder, Recovered, Settings};
use crate::broker::Epoch;
use crate::message::{Fault, FaultClass, Ticket};
use crate::time::Now;

/// The times at which the machine next needs a `Tick`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Wake {
    /// The monotonic time.
    pub(crate) mono_ms: Option<u64>,
    /// The wall time.
    pub(crate) wall_ms: Option<u64>,
}

/// The machine's knowledge of an event for which a caller waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SeqState {
    /// Not settled. `Confirmed` or `Quarantined` will follow.
    Pending,
    /// Settled, or a row on disk says what the event waits for.
    AskDisk,
    /// Like `Pending`, unless the event has an exception on disk.
    AskRow,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Machine {
    settings: Settings,
    jitter: Jitter,
    rate: Option<Bucket>,
    /// When the rate limit allows a ready event that has room in the window.
    rate_wake_ms: Option<u64>,
    epoch: Option<Epoch>,
    blocked: bool,
    paused: bool,
    position: u64,
    /// Everything below this number has been loaded.
    loaded_to: u64,
    tail: u64,
    /// Events that the log will still bring, although they are settled or parked already. They are
    /// redriven events that a scan had taken out.
    ahead: BTreeSet<u64>,
    /// No event from here on has an exception.
    rows_to: u64,
    scan: ExpiryScan,
    /// The number of requested events, while the answer is out.
    load_out: usize,
    due_out: usize,
    /// Where the reading of due exceptions continues.
    due_resume: Option<(u64, u64)>,
    next_due_ms: Option<u64>,
    items: FxHashMap<u64, Item>,
    /// Those items that hold the position back.
    open: BTreeSet<u64>,
    ready: BTreeSet<u64>,
    suspects: BTreeSet<u64>,
    learnt: Learnt,
    silence: Silence,
    slow: Slow,
    timers: BTreeSet<(u64, u64)>,
    in_flight: BTreeMap<Ticket, u64>,
    in_flight_bytes: usize,
    isolated_out: usize,
    keys: Keys,
    /// The bytes of the items that count against the lookahead. `retrying` is the number of items
    /// that do not count.
    memory_bytes: usize,
    retrying: usize,
    /// Since when nothing can be sent although the log has more.
    starved_since_ms: Option<u64>,
    last_ticket: u64,
    confirmed: u64,
    retried: u64,
    quarantined: u64,
    saved_position: u64,
}

impl Machine {
    pub(crate) fn new(settings: Settings, recovered: Recovered, now: Now, out: &mut Vec<Action>) -> Self {
        let mut machine = Self {
            jitter: Jitter::new(settings.seed),
            rate: settings.rate_limit.map(Bucket::new),
            rate_wake_ms: None,
            settings,
            epoch: None,
            blocked: false,
            paused: false,
            position: recovered.position,
            loaded_to: recovered.position,
            tail: recovered.tail.max(recovered.position),
            ahead: BTreeSet::new(),
            rows_to: recovered.tail,
            scan: ExpiryScan::default(),
            load_out: 0,
            due_out: 0,
            due_resume: None,
            next_due_ms: recovered.next_due_ms,
            items: FxHashMap::default(),
            open: BTreeSet::new(),
            ready: BTreeSet::new(),
            suspects: BTreeSet::new(),
            learnt: Learnt::default(),
            silence: Silence::default(),
            slow: Slow::default(),
            timers: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            in_flight_bytes: 0,
            isolated_out: 0,
            keys: Keys::default(),
            memory_bytes: 0,
            retrying: 0,
            starved_since_ms: None,
            last_ticket: 0,
            confirmed: 0,
            retried: 0,
            quarantined: 0,
            saved_position: recovered.position,
        };
        for (seq, key) in recovered.holding {
            machine.keys.with(&key, |state| state.held_by.insert(seq));
        }
        for key in recovered.parked_keys {
            machine.keys.with(&key, |state| state.parked = true);
        }
        for (key, seq) in recovered.parked_ahead {
            out.push(Action::Save(Change::Unpark { key, seq }));
        }
        for (loaded, exception) in recovered.retrying {
            machine.resume_retry(loaded, exception, now, out);
        }
        machine.settle_step(now, out);
        machine
    }

    /// Takes one input and appends the resulting actions.
    pub(crate) fn step(&mut self, input: Input, now: Now, out: &mut Vec<Action>) {
        match input {
            Input::Tail(tail) => self.tail = self.tail.max(tail),
            Input::Loaded { to, events } => self.loaded(to, events, now, out),
            Input::LoadedDue { due, resume, next_due_ms } => {
                self.due_out = 0;
                self.due_resume = resume;
                // The answer may lack due times that were noted while it was out.
                self.next_due_ms = self.next_due_ms.into_iter().chain(next_due_ms).min();
                self.loaded_due(due, now, out);
            }
            Input::LoadedParked { key, events, more } => self.loaded_parked(&key, events, more, now, out),
            Input::Up { epoch } => {
                self.end_epoch(None);
                self.epoch = Some(epoch);
            }
            Input::Down { fault } => {
                self.end_epoch(Some(&fault));
            }
            Input::Blocked(blocked) => self.blocked = blocked,
            Input::Outcomes(outcomes) => {
                for (ticket, outcome) in outcomes {
                    self.outcome(ticket, outcome, now, out);
                }
            }
            Input::Redriven(loaded, fault) => self.redriven(loaded, fault, now, out),
            Input::Discarded { seq, key } => self.discarded(seq, key),
            Input::LetExpiredGo => self.let_expired_go(now, out),
            Input::FoundExpired { found, next, to, earliest_ms } => {
                self.found_expired(found, next, (to, earliest_ms), now, out);
            }
            Input::Pause => self.paused = true,
            Input::Resume => self.paused = false,
            Input::Tick => {}
        }
        self.settle_step(now, out);
    }

    pub(crate) fn next_wake(&self) -> Wake {
        let timer = self.timers.first().map(|(due_ms, _)| *due_ms);
        let starved = self.starved_since_ms.map(|since| since.saturating_add(flow::SPILL_TIMEOUT_MS));
        Wake {
            mono_ms: timer
                .into_iter()
                .chain(starved)
                .chain(self.rate_wake_ms)
                .chain(self.trial_wake_ms())
                .chain(self.slow.wake_ms())
                .min(),
            wall_ms: self.next_due_ms.filter(|_| self.may_read() && self.due_out == 0 && self.has_room()),
        }
    }

    pub(crate) fn figures(&self) -> Figures {
        Figures {
            position: self.position,
            tail: self.tail,
            in_flight: self.in_flight.len(),
            in_flight_bytes: self.in_flight_bytes,
            in_memory: self.items.len(),
            retrying: self.retrying,
            held_keys: self.keys.held(),
            confirmed: self.confirmed,
            retried: self.retried,
            quarantined: self.quarantined,
            stalled: self.keys.held() >= self.settings.held_keys_max,
        }
    }

    pub(crate) fn seq_state(&self, seq: u64) -> SeqState {
        match () {
            () if self.items.contains_key(&seq) => SeqState::Pending,
            () if seq < self.loaded_to || self.ahead.contains(&seq) => SeqState::AskDisk,
            () if seq < self.rows_to => SeqState::AskRow,
            () => SeqState::Pending,
        }
    }

    /// Whether the whole log is loaded and at most half a window of it is unconfirmed. Then a
    /// coalescing pass may come.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.has_loaded_all() && self.items.len() * 2 <= self.settings.window_events
    }

    pub(crate) fn has_loaded_all(&self) -> bool {
        self.loaded_to >= self.tail
    }

    /// Returns how many events the broker has confirmed. The number only rises.
    pub(crate) fn confirmed(&self) -> u64 {
        self.confirmed
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Checks the derived figures against a slow recomputation.
    #[cfg(test)]
    fn check(&self) {
        let suspended = self.items.values().filter(|item| item.state == ItemState::Suspended).count();
        let waits = |seq: u64, of: &silence::Destination| {
            let item = self.items.get(&seq);
            item.is_some_and(|item| item.state == ItemState::Suspended && item.destination() == *of)
        };
        let lingering = self.items.values().filter(|item| item.lingers);
        assert_eq!(self.slow.lingering, lingering.clone().count());
        assert_eq!(self.slow.lingering_bytes, lingering.map(|item| item.bytes).sum::<usize>());
        self.silence.check(waits, suspended, self.items.values().filter(|item| item.is_trial()).count());
        let retrying = self.items.values().filter(|item| item.is_retrying());
        assert_eq!(self.retrying, retrying.count());
        let in_lookahead = self.items.values().filter(|item| !item.is_retrying());
        assert_eq!(self.memory_bytes, in_lookahead.map(|item| item.bytes).sum::<usize>());
        let open = self.items.iter().filter(|(_, item)| item.home == Home::Log).map(|(seq, _)| *seq);
        assert_eq!(self.open, open.collect());
        self.keys.check();
    }

    // --- bookkeeping ---

    fn is_strict(&self) -> bool {
        self.settings.ordering != PublishOrder::Relaxed
    }

    /// Notes that the log will bring this event, although no exception describes it.
    fn note_ahead(&mut self, seq: u64) {
        if seq >= self.loaded_to {
            self.ahead.insert(seq);
        }
    }

    fn note_due(&mut self, due_ms: u64) {
        self.next_due_ms = Some(self.next_due_ms.map_or(due_ms, |earliest| earliest.min(due_ms)));
    }

    fn insert(&mut self, seq: u64, item: Item) {
        if item.home == Home::Log {
            debug_assert!(seq >= self.position, "what is below the position is settled or has a row");
            self.open.insert(seq);
        }
        self.memory_bytes += item.bytes;
        self.count_in_key(item.key.as_ref(), 1);
        let before = self.items.insert(seq, item);
        debug_assert!(before.is_none(), "an event is in memory once");
    }

    /// Takes an event out of memory, in any state.
    fn remove(&mut self, seq: u64) -> Option<Item> {
        self.unqueue(seq);
        let mut item = self.items.remove(&seq)?;
        self.memory_bytes -= item.bytes;
        self.open.remove(&seq);
        if let Some(ticket) = item.late.take() {
            self.silence.forget_ticket(ticket);
        }
        self.count_in_key(item.key.as_ref(), -1);
        Some(item)
    }

    /// Counts events of a key under relaxed ordering, where they are in memory without being active
    /// or queued.
    fn count_in_key(&mut self, key: Option<&Key>, change: isize) {
        if !self.is_strict()
            && let Some(key) = key
        {
            self.keys.with(key, |state| state.relaxed = state.relaxed.saturating_add_signed(change));
        }
    }

    /// Takes an event out of the set of its state.
    fn unqueue(&mut self, seq: u64) {
        let Some(item) = self.items.get_mut(&seq) else { return };
        match item.state {
            ItemState::Ready => {
                self.ready.remove(&seq);
                self.suspects.remove(&seq);
            }
            ItemState::Queued => {}
            ItemState::InFlight { ticket, isolated, trial } => {
                self.in_flight.remove(&ticket);
                self.in_flight_bytes -= item.bytes;
                if std::mem::take(&mut item.lingers) {
                    self.slow.lingering -= 1;
                    self.slow.lingering_bytes -= item.bytes;
                }
                if trial {
                    self.silence.trial_ended(&item.destination(), seq, item.bytes);
                } else {
                    self.isolated_out -= usize::from(isolated);
                }
            }
            ItemState::Suspended => self.silence.leave(&item.destination(), seq),
            ItemState::Waiting { due_ms, deferred } => {
                self.timers.remove(&(due_ms, seq));
                if deferred {
                    self.retrying -= 1;
                    self.memory_bytes += item.bytes;
                }
            }
        }
        item.state = ItemState::Queued;
    }

    /// Ends the event's publish, with any outcome.
    fn land(&mut self, seq: u64) {
        self.unqueue(seq);
    }

    fn make_ready(&mut self, seq: u64) {
        self.unqueue(seq);
        let Some(item) = self.items.get_mut(&seq) else { return };
        item.state = ItemState::Ready;
        if item.suspect {
            self.suspects.insert(seq)
        } else {
            self.ready.insert(seq)
        };
    }

    fn wait(&mut self, seq: u64, due_ms: u64) {
        self.unqueue(seq);
        let Some(item) = self.items.get_mut(&seq) else { return };
        let deferred = item.home == Home::Exception && self.retrying < self.settings.retrying_max;
        item.state = ItemState::Waiting { due_ms, deferred };
        self.timers.insert((due_ms, seq));
        if deferred {
            self.retrying += 1;
            self.memory_bytes -= item.bytes;
        }
    }

    /// Releases events that wait behind a key, as far as the key is free after this change.
    fn free<T>(&mut self, key: &Key, change: impl FnOnce(&mut KeyState) -> T) {
        let strict = self.is_strict();
        let freed = self.keys.with(key, |state| {
            change(state);
            let mut freed = Vec::new();
            while let Some(seq) = state.take_next() {
                if strict {
                    state.active.insert(seq);
                }
                freed.push(seq);
            }
            freed
        });
        for seq in freed {
            self.make_ready(seq);
        }
    }
}

fn is_expired(expires_ms: Option<u64>, now: Now) -> bool {
    expires_ms.is_some_and(|expires_ms| expires_ms <= now.wall_ms)
}

fn expired() -> Fault {
    Fault::new(FaultClass::Expired, "its time ran out before it was confirmed")
}
