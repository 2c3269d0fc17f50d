//! The delivery machine: what to publish, when, and again.
//!
//! Pure: `(state, input, now) -> actions`. It knows nothing of a file, a broker, a thread or a clock, so that its
//! decisions can be tested by the million.
//!
//! **Invariants.**
//! - Everything below the position is settled, but for events that have a row on disk (an exception, or parked).
//! - Under [`Ordering::PerKey`] at most one event of a key is unconfirmed; under [`Ordering::Total`] one in all.
//! - What is in flight is bounded by the window, what is in memory by the lookahead and by `retrying_max`.
//! - An outage spends nobody's attempts.
//! - Every event loaded is forgotten exactly once.

mod backoff;
mod culprit;
#[cfg(test)]
mod exhaustive_tests;
mod flow;
mod keys;
#[cfg(test)]
mod model_tests;
pub(crate) mod rate;
mod silence;
mod slow;
#[cfg(test)]
mod story_tests;
mod sweep;
pub(crate) mod types;

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

use self::backoff::Jitter;
use self::culprit::{Learnt, closes_channel};
use self::keys::{KeyState, Keys, Place};
use self::rate::Bucket;
pub(crate) use self::silence::SuspendedFigures;
use self::silence::{Destination, Silence};
use self::slow::Slow;
use self::sweep::Sweep;
use self::types::{
    Action, Change, DESTINATION_BACKOFF_FACTOR, Entry, Exception, ExceptionState, Figures, Input, Key,
    Loaded, Ordering, QuarantinePolicy, Recovered, Settings, SuspendCause,
};
use crate::broker::Epoch;
use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::time::Now;

/// What settles an event's place on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Home {
    /// None: the position moves past it.
    Log,
    /// An exception row.
    Exception,
    /// A parked row.
    Parked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ItemState {
    /// To be sent as soon as the window lets it.
    Ready,
    /// Behind an earlier one of its key.
    Queued,
    /// `trial`: to find out whether its destination speaks again.
    InFlight { ticket: Ticket, isolated: bool, trial: bool },
    /// Until its destination speaks again, or the turn to ask it comes.
    Apart,
    /// Until this monotonic time. `apart`: its counters are on disk, and it counts against `retrying_max` instead of the
    /// lookahead.
    Waiting { due_ms: u64, apart: bool },
}

/// An event in memory.
#[derive(Debug, Clone)]
struct Item {
    key: Option<Key>,
    exchange: Key,
    routing_key: Key,
    bytes: usize,
    expires_ms: Option<u64>,
    home: Home,
    state: ItemState,
    attempts: u32,
    destination_attempts: u32,
    /// Nacks in a row.
    nacks: u32,
    fault: Option<Fault>,
    /// It may have been published before.
    sent: bool,
    /// It was in flight when one message made the broker close the channel: it is published alone until it has an outcome.
    suspect: bool,
    /// The first to be tried among those.
    likely: bool,
    /// It was the one: it is never published among others again.
    culprit: bool,
    /// Publishes of it that were told to be silent, and the last of them if its word may still come.
    silences: u32,
    late: Option<Ticket>,
    /// In flight, and it takes no room of the window.
    lingers: bool,
}

impl Item {
    fn new(entry: &Entry, home: Home) -> Self {
        Self {
            key: entry.key.clone(),
            exchange: Key::clone(&entry.exchange),
            routing_key: Key::clone(&entry.routing_key),
            bytes: entry.bytes,
            expires_ms: entry.expires_ms,
            home,
            state: ItemState::Queued,
            attempts: 0,
            destination_attempts: 0,
            nacks: 0,
            fault: None,
            sent: false,
            suspect: false,
            likely: false,
            culprit: false,
            silences: 0,
            late: None,
            lingers: false,
        }
    }

    /// One that has been tried before: with its counters, and alone if it was a culprit.
    fn again(entry: &Entry, exception: Exception) -> Self {
        let culprit = exception.fault.as_ref().is_some_and(closes_channel);
        Self {
            attempts: exception.attempts,
            destination_attempts: exception.destination_attempts,
            fault: exception.fault,
            suspect: culprit,
            culprit,
            ..Self::new(entry, Home::Exception)
        }
    }

    /// Waits for a retry with its counters on disk: counted apart from the lookahead.
    fn is_retrying(&self) -> bool {
        matches!(self.state, ItemState::Waiting { apart: true, .. })
    }

    fn destination(&self) -> Destination {
        (Key::clone(&self.exchange), Key::clone(&self.routing_key))
    }

    fn is_trial(&self) -> bool {
        matches!(self.state, ItemState::InFlight { trial: true, .. })
    }

    fn is_alone(&self) -> bool {
        matches!(self.state, ItemState::InFlight { isolated: true, .. })
    }

    fn exception(&self, state: ExceptionState) -> Exception {
        Exception {
            state,
            attempts: self.attempts,
            destination_attempts: self.destination_attempts,
            fault: self.fault.clone(),
        }
    }
}

/// When the machine wants to be told the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Wake {
    /// At this monotonic time.
    pub(crate) mono_ms: Option<u64>,
    /// At this wall time.
    pub(crate) wall_ms: Option<u64>,
}

/// What the machine knows of an event that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SeqState {
    /// Not settled: `Confirmed` or `Quarantined` will be said of it.
    Pending,
    /// Settled, or a row on disk says what it waits for.
    AskDisk,
    /// As `Pending`, unless it has an exception on disk.
    AskRow,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Machine {
    settings: Settings,
    jitter: Jitter,
    rate: Option<Bucket>,
    /// When it lets go what is ready and would have room in the window.
    rate_wake_ms: Option<u64>,
    epoch: Option<Epoch>,
    blocked: bool,
    paused: bool,
    position: u64,
    /// Everything below has been loaded.
    loaded_to: u64,
    tail: u64,
    /// Events that the log will bring although they are settled, or parked, already: redriven ones that a sweep had
    /// taken out.
    ahead: BTreeSet<u64>,
    /// From here on nothing has an exception.
    rows_to: u64,
    sweep: Sweep,
    /// Events asked for, while the answer is out.
    load_out: usize,
    due_out: usize,
    /// Where reading what is due goes on.
    due_resume: Option<(u64, u64)>,
    next_due_ms: Option<u64>,
    items: FxHashMap<u64, Item>,
    /// Those among them that hold the position back.
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
    /// Bytes of the items that count against the lookahead, and how many do not.
    memory_bytes: usize,
    retrying: usize,
    /// Since when nothing can be sent although more is in the log.
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
            sweep: Sweep::default(),
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

    /// Takes one input and appends what is to be done.
    pub(crate) fn step(&mut self, input: Input, now: Now, out: &mut Vec<Action>) {
        match input {
            Input::Tail(tail) => self.tail = self.tail.max(tail),
            Input::Loaded { to, events } => self.loaded(to, events, now, out),
            Input::LoadedDue { due, resume, next_due_ms } => {
                self.due_out = 0;
                self.due_resume = resume;
                // What was noted while the answer was out may not be in it.
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
        let starved = self.starved_since_ms.map(|since| since.saturating_add(flow::SPILL_PATIENCE_MS));
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

    /// The whole log is loaded, and at most half a window of it is unconfirmed: a round of what waits elsewhere may come.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.has_loaded_all() && self.items.len() * 2 <= self.settings.window_events
    }

    pub(crate) fn has_loaded_all(&self) -> bool {
        self.loaded_to >= self.tail
    }

    /// Events that the broker has confirmed. It only rises.
    pub(crate) fn confirmed(&self) -> u64 {
        self.confirmed
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// What the derived figures must agree with, by the slow way.
    #[cfg(test)]
    fn check(&self) {
        let apart = self.items.values().filter(|item| item.state == ItemState::Apart).count();
        let waits = |seq: u64, of: &Destination| {
            let item = self.items.get(&seq);
            item.is_some_and(|item| item.state == ItemState::Apart && item.destination() == *of)
        };
        let lingering = self.items.values().filter(|item| item.lingers);
        assert_eq!(self.slow.lingering, lingering.clone().count());
        assert_eq!(self.slow.lingering_bytes, lingering.map(|item| item.bytes).sum::<usize>());
        self.silence.check(waits, apart, self.items.values().filter(|item| item.is_trial()).count());
        let retrying = self.items.values().filter(|item| item.is_retrying());
        assert_eq!(self.retrying, retrying.count());
        let in_lookahead = self.items.values().filter(|item| !item.is_retrying());
        assert_eq!(self.memory_bytes, in_lookahead.map(|item| item.bytes).sum::<usize>());
        let open = self.items.iter().filter(|(_, item)| item.home == Home::Log).map(|(seq, _)| *seq);
        assert_eq!(self.open, open.collect());
        self.keys.check();
    }

    // --- inputs -----------------------------------------------------------------------------------------------------

    fn loaded(&mut self, to: u64, events: Vec<Loaded>, now: Now, out: &mut Vec<Action>) {
        self.load_out = 0;
        self.loaded_to = self.loaded_to.max(to);
        for loaded in events {
            let settled = !self.ahead.is_empty() && self.ahead.remove(&loaded.seq());
            match loaded {
                Loaded::Apart { .. } => {}
                _ if settled => self.forget_again(loaded.seq(), out),
                Loaded::Unpublished { seq } => out.push(Action::Forget { seq }),
                Loaded::Undecodable { seq, fault } => self.quarantine_unread(seq, fault, now, out),
                Loaded::Event(entry) => self.arrived(&entry, now, out),
            }
        }
    }

    /// An event was read that is not wanted; if it is in memory already, its record still is.
    fn forget_again(&self, seq: u64, out: &mut Vec<Action>) {
        if !self.items.contains_key(&seq) {
            out.push(Action::Forget { seq });
        }
    }

    /// A new event of the log.
    fn arrived(&mut self, entry: &Entry, now: Now, out: &mut Vec<Action>) {
        self.sweep.note_expiry(entry.expires_ms);
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

    /// Lets an event into memory: ready, behind its key, or (where its key waits on disk) to disk at once.
    fn admit(&mut self, entry: &Entry, item: Item, now: Now, out: &mut Vec<Action>) {
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
            // Nothing in memory waits for what is on disk: memory might be full of it, and what it waits for not fit in.
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

    fn loaded_due(&mut self, due: Vec<(Loaded, Exception)>, now: Now, out: &mut Vec<Action>) {
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
                Loaded::Unpublished { seq } | Loaded::Apart { seq } => {
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
                    self.comes_back(&entry, item, out);
                }
                ExceptionState::Scheduled { .. } => self.admit(&entry, item, now, out),
                ExceptionState::Quarantined { .. } | ExceptionState::Discarded => {
                    debug_assert!(false, "neither is due");
                    out.push(Action::Forget { seq: entry.seq });
                }
            }
        }
    }

    /// An event that has been taken out is to be tried again, and goes before those behind it.
    fn comes_back(&mut self, entry: &Entry, item: Item, out: &mut Vec<Action>) {
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

    /// An event that holds its key from disk never will again.
    fn release(&mut self, seq: u64) {
        let key = self.keys.held_by(seq);
        self.discarded(seq, key);
    }

    fn loaded_parked(&mut self, key: &Key, events: Vec<Loaded>, more: bool, now: Now, out: &mut Vec<Action>) {
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
                Loaded::Unpublished { seq } | Loaded::Apart { seq } => {
                    debug_assert!(false, "an unpublished event is not parked");
                    out.push(Action::Save(Change::Unpark { key: Key::clone(key), seq }));
                    out.push(Action::Forget { seq });
                }
            }
        }
        self.free(key, |_| ());
    }

    /// What was in flight is lost, and will be sent again; alone, if one of them made the broker close the channel.
    fn end_epoch(&mut self, fault: Option<&Fault>) {
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

    fn outcome(&mut self, ticket: Ticket, outcome: Outcome, now: Now, out: &mut Vec<Action>) {
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

    /// An event that is not in flight any more has its outcome.
    fn takes(&mut self, seq: u64, outcome: Outcome, was_trial: bool, now: Now, out: &mut Vec<Action>) {
        if let Some(item) = self.items.get_mut(&seq) {
            item.nacks *= u32::from(silence::is_put_off(&outcome));
            item.silences *= u32::from(matches!(outcome, Outcome::Unknown(_)));
        }
        match outcome {
            Outcome::Confirmed => self.settle(seq, out),
            Outcome::Unknown(_) | Outcome::Silent(_) => {
                if let Some(destination) = self.items.get(&seq).map(Item::destination) {
                    self.slow_has_a_new_chance(&destination);
                    if was_trial {
                        // Nobody knows what became of it: not at once again.
                        self.trial_waits(&destination, now);
                    }
                }
                if !self.waits_for_destination(seq) {
                    self.make_ready(seq);
                }
            }
            Outcome::Nacked => self.put_off_refused(seq, SuspendCause::Nacks, was_trial, now),
            Outcome::Returned(fault) if fault.class == FaultClass::Outage => {
                self.put_off_refused(seq, SuspendCause::Away, was_trial, now);
            }
            Outcome::Returned(fault) => self.failed(seq, FaultClass::Destination, fault, now, out),
            Outcome::Refused(fault) => match fault.class {
                FaultClass::Message | FaultClass::Destination => {
                    self.failed(seq, fault.class, fault, now, out);
                }
                _ => self.put_off(seq, now),
            },
        }
    }

    /// Without room for it, it waits on disk, where it is due.
    fn redriven(&mut self, loaded: Loaded, fault: Fault, now: Now, out: &mut Vec<Action>) {
        let seq = loaded.seq();
        if self.items.contains_key(&seq) {
            return;
        }
        let entry = &match loaded {
            Loaded::Event(entry) => entry,
            // Back to where it was, or it would be neither there nor tried. Its key is unknown now: it holds nobody.
            Loaded::Undecodable { seq, fault } => {
                self.quarantine_unread(seq, fault, now, out);
                self.release(seq);
                return;
            }
            Loaded::Unpublished { seq } | Loaded::Apart { seq } => {
                debug_assert!(false, "an unpublished event has no exception");
                out.push(Action::Forget { seq });
                return;
            }
        };
        // The next sweep looks at all rows again, this one's too.
        self.sweep.note_expiry(entry.expires_ms);
        self.probe_again(&entry.exchange);
        if self.has_room() {
            let state = ExceptionState::Retry { due_ms: now.wall_ms };
            let exception = Exception { state, attempts: 0, destination_attempts: 0, fault: Some(fault) };
            let mut item = Item::again(entry, exception);
            item.sent = true;
            self.comes_back(entry, item, out);
            return;
        }
        out.push(Action::Forget { seq });
        self.note_due(now.wall_ms);
        if let Some(key) = &entry.key {
            self.keys.with(key, |state| state.held_by.insert(seq));
            self.park_queue(key, out);
        }
    }

    fn discarded(&mut self, seq: u64, key: Option<Key>) {
        if let Some(key) = key {
            self.free(&key, |state| state.held_by.remove(&seq));
        }
    }

    /// A retry found on disk at the start: soon again, its key held until then.
    fn resume_retry(&mut self, loaded: Loaded, exception: Exception, now: Now, out: &mut Vec<Action>) {
        match loaded {
            Loaded::Event(entry) => {
                let mut item = Item::again(&entry, exception);
                item.sent = true;
                self.insert(entry.seq, item);
                // One at a time, also where several were redriven past each other.
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
            Loaded::Unpublished { seq } | Loaded::Apart { seq } => {
                debug_assert!(false, "an unpublished event has no exception");
                out.push(Action::Forget { seq });
            }
        }
    }

    // --- what becomes of an event -------------------------------------------------------------------------------------

    /// The broker has it.
    fn settle(&mut self, seq: u64, out: &mut Vec<Action>) {
        let Some(item) = self.remove(seq) else { return };
        self.drop_row(seq, &item, out);
        self.note_ahead(seq);
        self.confirmed += 1;
        out.push(Action::Confirmed { seq });
        out.push(Action::Forget { seq });
        self.leave_key(seq, item.key.as_ref());
    }

    fn drop_row(&self, seq: u64, item: &Item, out: &mut Vec<Action>) {
        match (item.home, &item.key) {
            (Home::Log, _) => {}
            (Home::Exception, _) => out.push(Action::Save(Change::DropException { seq })),
            (Home::Parked, Some(key)) => {
                out.push(Action::Save(Change::Unpark { key: Key::clone(key), seq }));
            }
            (Home::Parked, None) => debug_assert!(false, "what is parked has a key"),
        }
    }

    /// The event blocks its key no longer.
    fn leave_key(&mut self, seq: u64, key: Option<&Key>) {
        if let Some(key) = key {
            self.free(key, |state| state.active.remove(&seq));
        }
    }

    /// A message or destination fault: spends an attempt, then waits or goes to quarantine.
    fn failed(&mut self, seq: u64, class: FaultClass, fault: Fault, now: Now, out: &mut Vec<Action>) {
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
        self.set_aside(seq, wait, now, out);
    }

    /// Puts the event aside with its counters on disk, for `wait_ms`; the position may pass it.
    fn set_aside(&mut self, seq: u64, wait_ms: u64, now: Now, out: &mut Vec<Action>) {
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
            // Also under relaxed ordering a failed event holds those behind it.
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

    /// The same event first, after a while; nothing is spent.
    fn put_off(&mut self, seq: u64, now: Now) {
        let Some(item) = self.items.get_mut(&seq) else { return };
        let nacks = item.nacks;
        item.nacks += 1;
        if let Some(key) = item.key.clone() {
            self.keys.with(&key, |state| state.active.insert(seq));
        }
        let wait = self.jitter.wait_ms(self.settings.backoff_first_ms, self.settings.backoff_max_ms, nacks);
        self.wait(seq, now.mono_ms.saturating_add(wait));
    }

    /// Takes an event out until a person decides.
    fn quarantine(&mut self, seq: u64, fault: Fault, now: Now, out: &mut Vec<Action>) {
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

    /// A record that cannot be read: its key is unknown, so it holds nobody.
    fn quarantine_unread(&mut self, seq: u64, fault: Fault, now: Now, out: &mut Vec<Action>) {
        let state = ExceptionState::Quarantined { at_ms: now.wall_ms, holds_key: false };
        let exception = Exception { state, attempts: 0, destination_attempts: 0, fault: Some(fault.clone()) };
        out.push(Action::Save(Change::PutException { seq, key: None, exception }));
        self.quarantined += 1;
        out.push(Action::Quarantined { seq, fault });
        out.push(Action::Forget { seq });
    }

    /// Sends one event in memory to wait on disk behind its key.
    fn park(&mut self, key: &Key, seq: u64, out: &mut Vec<Action>) {
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

    fn park_queue(&mut self, key: &Key, out: &mut Vec<Action>) {
        let queue = self.keys.with(key, |state| std::mem::take(&mut state.queue));
        for seq in queue {
            self.park(key, seq, out);
        }
    }

    // --- bookkeeping --------------------------------------------------------------------------------------------------

    fn is_strict(&self) -> bool {
        self.settings.ordering != Ordering::Relaxed
    }

    /// The log will bring this one, though no exception tells it apart.
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

    /// Takes an event out of memory, whatever its state.
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

    /// Under relaxed ordering events of a key are in memory without being active or queued.
    fn count_in_key(&mut self, key: Option<&Key>, change: isize) {
        if !self.is_strict()
            && let Some(key) = key
        {
            self.keys.with(key, |state| state.relaxed = state.relaxed.saturating_add_signed(change));
        }
    }

    /// Takes an event out of whichever set its state has put it in.
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
            ItemState::Apart => self.silence.leave(&item.destination(), seq),
            ItemState::Waiting { due_ms, apart } => {
                self.timers.remove(&(due_ms, seq));
                if apart {
                    self.retrying -= 1;
                    self.memory_bytes += item.bytes;
                }
            }
        }
        item.state = ItemState::Queued;
    }

    /// Its publish has ended, one way or another.
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
        let apart = item.home == Home::Exception && self.retrying < self.settings.retrying_max;
        item.state = ItemState::Waiting { due_ms, apart };
        self.timers.insert((due_ms, seq));
        if apart {
            self.retrying += 1;
            self.memory_bytes -= item.bytes;
        }
    }

    /// Lets those that wait behind a key go, as far as it is free after this change.
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
