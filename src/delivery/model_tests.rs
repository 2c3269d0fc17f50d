//! The machine against a simulated world. A crash loses the disk's unflushed writes. The broker
//! confirms out of order, refuses, closes the channel and keeps ghosts. Clocks jump. Whatever the
//! world does, nothing is lost, the order per key holds, and every bound holds. Once the world is
//! healed, everything settles.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use proptest::prelude::*;

use super::types::{
    Action, Change, Entry, Exception, ExceptionState, ExpiredEvent, ExpiredPlace, Input, Key, Loaded,
    PublishOrder, QuarantinePolicy, Recovered, ScanAt, Settings,
};
use super::{ItemState, Machine, Wake};
use crate::broker::Epoch;
use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::time::Now;

const WALL_START_MS: u64 = 1_000_000;
/// The steps within which a healed world must be quiet.
const QUIET_STEPS_MAX: usize = 20_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Event,
    Unpublished,
    Undecodable,
}

/// What an event does to the broker until the world is healed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Poison {
    No,
    /// The event closes the channel, and is refused when isolated.
    Message,
    /// The same, as a fault of the destination.
    Destination,
}

#[derive(Debug, Clone)]
struct LogEntry {
    entry: Entry,
    kind: Kind,
    poison: Poison,
}

#[derive(Debug, Clone)]
struct Row {
    key: Option<Key>,
    exception: Exception,
}

#[derive(Debug, Default)]
struct Disk {
    log: Vec<LogEntry>,
    position: u64,
    rows: BTreeMap<u64, Row>,
    parked: BTreeSet<(Key, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScriptedOutcome {
    Confirmed,
    Nacked,
    Returned,
    Refused(FaultClass),
    Unknown,
    Silent,
    ClosesChannel(FaultClass),
}

#[derive(Debug)]
struct Flight {
    seq: u64,
    isolated: bool,
    scripted: ScriptedOutcome,
    /// Whether the broker has the message.
    stored: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Append {
        key: Option<u8>,
        bytes: usize,
        not_before: Option<i64>,
        expires: Option<i64>,
        kind: Kind,
        poison: Poison,
    },
    Advance {
        ms: u64,
        wall_jump_ms: i64,
    },
    Land(usize, usize),
    LateWord(usize),
    StaleOutcome,
    Down(FaultClass),
    Up,
    Blocked(bool),
    Pause,
    Resume,
    Redrive(usize),
    Discard(usize),
    Rot(usize),
    Answer(usize),
    LetExpiredGo,
    Flush,
    Crash,
    Tick,
}

#[derive(Debug, Clone)]
struct Scenario {
    settings: Settings,
    seed: u64,
    keep_poison: bool,
    ops: Vec<Op>,
}

/// A running scan.
#[derive(Debug)]
struct ExpiryScan {
    /// The end of the log when the scan began.
    tail: u64,
    /// The earliest time of the wall clock since then.
    wall_ms: u64,
    /// Events that were in flight since, or were redriven. They are left to their outcome, or to
    /// the next scan.
    exempt: BTreeSet<u64>,
}

struct World {
    settings: Settings,
    disk: Disk,
    pending: Vec<Change>,
    machine: Machine,
    now: Now,
    up: bool,
    blocked: bool,
    paused: bool,
    epoch: u64,
    random: u64,
    healed: bool,
    keep_poison: bool,
    // Fields of the machine's present life.
    last_ticket: u64,
    /// The time of each publish.
    published_ms: Vec<u64>,
    /// Exchanges that refused an isolated event, and have taken none since.
    closed: BTreeSet<Key>,
    /// Events that were refused when isolated.
    refused_alone: BTreeSet<u64>,
    flights: BTreeMap<u64, Flight>,
    /// Silent events whose answer may still come, and whether the broker has them.
    late: BTreeMap<u64, (u64, bool)>,
    requests: VecDeque<Action>,
    live: BTreeSet<u64>,
    scan: Option<ExpiryScan>,
    // Fields that outlive the machine.
    tap: Vec<u64>,
    confirmed: BTreeSet<u64>,
    discarded: BTreeSet<u64>,
    left_order: BTreeSet<u64>,
    attempts: HashMap<u64, (u32, u32)>,
    spent: HashMap<u64, (u32, u32)>,
}

impl World {
    fn new(scenario: &Scenario) -> Self {
        let now = Now { mono_ms: 0, wall_ms: WALL_START_MS };
        let disk = Disk::default();
        let mut out = Vec::new();
        let machine = Machine::new(scenario.settings.clone(), Recovered::default(), now, &mut out);
        assert!(out.is_empty());
        Self {
            settings: scenario.settings.clone(),
            disk,
            pending: Vec::new(),
            machine,
            now,
            up: false,
            blocked: false,
            paused: false,
            epoch: 0,
            random: scenario.seed,
            healed: false,
            keep_poison: scenario.keep_poison,
            last_ticket: 0,
            published_ms: Vec::new(),
            closed: BTreeSet::new(),
            refused_alone: BTreeSet::new(),
            flights: BTreeMap::new(),
            late: BTreeMap::new(),
            requests: VecDeque::new(),
            live: BTreeSet::new(),
            scan: None,
            tap: Vec::new(),
            confirmed: BTreeSet::new(),
            discarded: BTreeSet::new(),
            left_order: BTreeSet::new(),
            attempts: HashMap::new(),
            spent: HashMap::new(),
        }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn tail(&self) -> u64 {
        self.disk.log.len() as u64
    }

    fn log(&self, seq: u64) -> &LogEntry {
        &self.disk.log[usize::try_from(seq).unwrap()]
    }

    fn read(&self, seq: u64) -> Loaded {
        let found = self.log(seq);
        match found.kind {
            Kind::Event => Loaded::Event(found.entry.clone()),
            Kind::Unpublished => Loaded::Unpublished { seq },
            Kind::Undecodable => {
                Loaded::Undecodable { seq, fault: Fault::new(FaultClass::Undecodable, "rotten") }
            }
        }
    }

    // --- disk ---

    fn flush(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            self.apply(change);
        }
        for seq in 0..self.disk.position {
            assert!(self.is_accounted_for(seq), "{seq} is below the position, unsettled, and has no row");
        }
    }

    fn is_accounted_for(&self, seq: u64) -> bool {
        let found = self.log(seq);
        found.kind == Kind::Unpublished
            || self.confirmed.contains(&seq)
            || self.discarded.contains(&seq)
            || self.disk.rows.contains_key(&seq)
            || self.is_parked(seq)
    }

    fn is_parked(&self, seq: u64) -> bool {
        self.log(seq).entry.key.clone().is_some_and(|key| self.disk.parked.contains(&(key, seq)))
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Position(position) => {
                assert!(position > self.disk.position, "the position rises");
                assert!(position <= self.tail());
                self.disk.position = position;
                self.drop_passed();
            }
            Change::PutException { seq, key, exception } => {
                self.disk.rows.insert(seq, Row { key, exception });
            }
            Change::DropException { seq } => {
                assert!(self.disk.rows.remove(&seq).is_some(), "{seq} has an exception to drop");
            }
            Change::Park { key, seq } => {
                self.disk.parked.insert((key, seq));
            }
            Change::Unpark { key, seq } => {
                assert!(self.disk.parked.remove(&(key, seq)), "{seq} is parked");
            }
        }
    }

    fn recover(&mut self) {
        self.pending.clear();
        (self.up, self.blocked, self.paused) = (false, false, false);
        self.flights.clear();
        self.late.clear();
        self.published_ms.clear();
        self.closed.clear();
        self.refused_alone.clear();
        self.requests.clear();
        self.live.clear();
        self.scan = None;
        self.last_ticket = 0;
        // The monotonic clock of a new process starts anywhere.
        self.now.mono_ms = self.draw(1000);
        let mut found = Recovered { position: self.disk.position, tail: self.tail(), ..Recovered::default() };
        let note_due =
            |due: &mut Option<u64>, due_ms: u64| *due = Some(due.map_or(due_ms, |d| d.min(due_ms)));
        for (seq, row) in &self.disk.rows {
            match (row.exception.state, row.key.clone()) {
                (ExceptionState::Retry { .. }, _) if found.retrying.len() < self.settings.retrying_max => {
                    found.retrying.push((self.read(*seq), row.exception.clone()));
                }
                (ExceptionState::Retry { due_ms }, key) => {
                    found.holding.extend(key.map(|key| (*seq, key)));
                    note_due(&mut found.next_due_ms, due_ms);
                }
                (ExceptionState::Scheduled { due_ms }, _) => note_due(&mut found.next_due_ms, due_ms),
                (ExceptionState::Quarantined { holds_key: true, .. }, Some(key)) => {
                    found.holding.push((*seq, key));
                }
                (ExceptionState::Quarantined { .. } | ExceptionState::Discarded, _) => {}
            }
        }
        let position = self.disk.position;
        let (below, ahead): (Vec<_>, Vec<_>) =
            self.disk.parked.iter().cloned().partition(|(_, seq)| *seq < position);
        found.parked_ahead = ahead;
        let keys: BTreeSet<Key> = below.into_iter().map(|(key, _)| key).collect();
        found.parked_keys = keys.into_iter().collect();
        self.live = found.retrying.iter().map(|(loaded, _)| loaded.seq()).collect();
        self.attempts = self
            .disk
            .rows
            .iter()
            .map(|(seq, row)| (*seq, (row.exception.attempts, row.exception.destination_attempts)))
            .collect();
        self.spent = self.attempts.clone();
        let mut out = Vec::new();
        self.machine = Machine::new(self.settings.clone(), found, self.now, &mut out);
        self.perform(out);
    }

    // --- machine ---

    fn step(&mut self, input: Input) {
        let mut out = Vec::new();
        self.machine.step(input, self.now, &mut out);
        self.perform(out);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.perform_one(action);
        }
        self.check();
    }

    fn perform_one(&mut self, action: Action) {
        match action {
            Action::Publish { epoch, ticket, seq, resend, isolated } => {
                assert!(self.up && !self.blocked && !self.paused, "publishes only when it may");
                assert_eq!(epoch, Epoch(self.epoch));
                assert!(!self.discarded.contains(&seq), "{seq} was given up");
                self.publish(ticket, seq, resend, isolated);
            }
            Action::Save(change) => {
                if let Change::PutException { seq, exception, .. } = &change {
                    self.check_attempts(*seq, exception);
                }
                // A parked row has no room for what the machine learnt of the event.
                if let Change::Park { seq, .. } = &change {
                    self.refused_alone.remove(seq);
                }
                self.pending.push(change);
            }
            Action::Confirmed { seq } => {
                assert!(self.tap.contains(&seq), "{seq} is confirmed but was never stored");
                self.confirmed.insert(seq);
            }
            Action::Quarantined { seq, fault } => {
                // An expired event holds no key. If it is redriven, or unwritten with the clock set
                // back, it may come after later events.
                if fault.class == FaultClass::Expired {
                    self.left_order.insert(seq);
                }
            }
            Action::Forget { seq } => assert!(self.live.remove(&seq), "{seq} is forgotten once"),
            Action::Load { .. } => {
                assert!(!self.requests.iter().any(|other| matches!(other, Action::Load { .. })));
                self.requests.push_back(action);
            }
            Action::LoadDue { .. } => {
                assert!(!self.requests.iter().any(|other| matches!(other, Action::LoadDue { .. })));
                self.requests.push_back(action);
            }
            Action::FindExpired { .. } => {
                assert!(!self.requests.iter().any(|other| matches!(other, Action::FindExpired { .. })));
                self.requests.push_back(action);
            }
            Action::Scanned { to, .. } => self.check_scanned(to),
            Action::LoadParked { ref key, .. } => {
                let same = |other: &Action| matches!(other, Action::LoadParked { key: k, .. } if k == key);
                assert!(!self.requests.iter().any(same));
                self.requests.push_back(action);
            }
        }
    }

    /// Checks attempts. They rise only with a return, or with a refusal that is the message's or
    /// the destination's own.
    fn check_attempts(&mut self, seq: u64, exception: &Exception) {
        let said = (exception.attempts, exception.destination_attempts);
        let known = self.attempts.get(&seq).copied().unwrap_or_default();
        if self.closed.contains(&self.log(seq).entry.exchange) && said.1 == known.1 + 1 {
            // The event fails with its exchange, without being published.
            self.spent.entry(seq).or_insert(known).1 = said.1;
        }
        let spent = self.spent.get(&seq).copied().unwrap_or_default();
        assert!(said.0 <= spent.0 && said.1 <= spent.1, "{seq}: {said:?} attempts, spent were {spent:?}");
        assert!(said.0 <= self.settings.attempts_max && said.1 <= self.settings.destination_attempts_max);
        self.attempts.insert(seq, said);
    }

    /// Checks that everything expired when the scan began was let go.
    fn check_scanned(&mut self, to: u64) {
        self.flush();
        let Some(ExpiryScan { tail, wall_ms, exempt }) = self.scan.take() else { return };
        assert!(to >= tail, "all of the log was looked at");
        for seq in (0..tail).filter(|seq| !exempt.contains(seq)) {
            let found = self.log(seq);
            if found.kind != Kind::Event || found.entry.expires_ms.is_none_or(|at| at > wall_ms) {
                continue;
            }
            let state = self.disk.rows.get(&seq).map(|row| row.exception.state);
            let let_go = self.confirmed.contains(&seq)
                || self.discarded.contains(&seq)
                || matches!(state, Some(ExceptionState::Quarantined { .. }));
            assert!(let_go, "{seq} has expired and still waits: {state:?}");
        }
    }

    fn publish(&mut self, ticket: Ticket, seq: u64, resend: bool, isolated: bool) {
        assert!(ticket.0 > self.last_ticket, "tickets rise");
        self.last_ticket = ticket.0;
        self.check_rate();
        assert!(self.live.contains(&seq), "{seq} is published, so its record is needed");
        let found = self.log(seq).clone();
        assert!(resend || !self.flights.values().any(|flight| flight.seq == seq));
        assert!(!self.flights.values().any(|flight| flight.seq == seq), "{seq} is in flight once");
        match self.settings.ordering {
            PublishOrder::PerKey => {
                if let Some(key) = &found.entry.key {
                    let same = |flight: &Flight| self.log(flight.seq).entry.key.as_ref() == Some(key);
                    assert!(!self.flights.values().any(same), "two of {key} in flight");
                }
            }
            PublishOrder::Total => assert!(self.flights.is_empty(), "one in flight in all"),
            PublishOrder::Relaxed => {}
        }
        let alone = found.poison == Poison::No || isolated || !self.refused_alone.contains(&seq);
        assert!(alone, "{seq} was refused alone, and is published among others");
        let is_trial = self.is_trial(seq);
        if isolated && !is_trial {
            let mut alone = self.flights.values().filter(|flight| flight.isolated);
            assert!(alone.all(|flight| self.is_trial(flight.seq)), "one alone at a time");
        }
        if is_trial {
            let of = |seq| (self.log(seq).entry.exchange.clone(), self.log(seq).entry.routing_key.clone());
            let mut trials = self.flights.values().filter(|flight| self.is_trial(flight.seq));
            assert!(trials.all(|flight| of(flight.seq) != of(seq)), "one trial of a destination at a time");
        }
        assert!(found.entry.expires_ms.is_none_or(|expires_ms| expires_ms > self.now.wall_ms));
        let (scripted, stored) = self.script(&found, isolated);
        if stored {
            self.tap.push(seq);
        }
        if let Some(scan) = &mut self.scan {
            scan.exempt.insert(seq);
        }
        self.flights.insert(ticket.0, Flight { seq, isolated, scripted, stored });
        if !is_trial {
            let counts = |seq: &u64| !self.is_trial(*seq) && !self.machine.items[seq].lingers;
            let flying: Vec<u64> = self.flights.values().map(|flight| flight.seq).filter(counts).collect();
            let bytes: usize = flying.iter().map(|seq| self.log(*seq).entry.bytes).sum();
            assert!(flying.len() <= self.settings.window_events);
            assert!(bytes <= self.settings.window_bytes || flying.len() == 1, "the window holds");
        }
    }

    /// Checks that no period up to now has seen more publishes than burst and rate allow.
    fn check_rate(&mut self) {
        self.published_ms.push(self.now.mono_ms);
        let Some(rate) = self.settings.rate_limit else { return };
        let burst = super::rate::Bucket::burst(rate);
        for (count, from_ms) in (1..).zip(self.published_ms.iter().rev()) {
            let allowed = burst + u64::from(rate) * (self.now.mono_ms - from_ms) / 1000;
            assert!(count <= allowed, "{count} publishes since {from_ms}, {allowed} allowed");
        }
    }

    fn script(&mut self, found: &LogEntry, isolated: bool) -> (ScriptedOutcome, bool) {
        let ill = !self.healed || self.keep_poison;
        match found.poison {
            Poison::Message if ill && isolated => {
                return (ScriptedOutcome::Refused(FaultClass::Message), false);
            }
            Poison::Message if ill => return (ScriptedOutcome::ClosesChannel(FaultClass::Message), false),
            Poison::Destination if ill && isolated => {
                return (ScriptedOutcome::Refused(FaultClass::Destination), false);
            }
            Poison::Destination if ill => {
                return (ScriptedOutcome::ClosesChannel(FaultClass::Destination), false);
            }
            _ => {}
        }
        if self.healed {
            return (ScriptedOutcome::Confirmed, true);
        }
        let ghost = self.draw(2) == 0;
        match self.draw(16) {
            0 | 1 => (ScriptedOutcome::Nacked, ghost),
            2 => (ScriptedOutcome::Returned, false),
            3 => (ScriptedOutcome::Refused(FaultClass::Message), false),
            4 => (ScriptedOutcome::Refused(FaultClass::Destination), false),
            5 => (ScriptedOutcome::Refused(FaultClass::Outage), ghost),
            6 => (ScriptedOutcome::Unknown, ghost),
            7 | 8 => (ScriptedOutcome::Silent, ghost),
            _ => (ScriptedOutcome::Confirmed, true),
        }
    }

    fn check(&self) {
        let figures = self.machine.figures();
        assert_eq!(figures.in_flight, self.flights.len());
        let flying: usize = self.flights.values().map(|flight| self.log(flight.seq).entry.bytes).sum();
        assert_eq!(figures.in_flight_bytes, flying);

        assert_eq!(
            figures.in_memory,
            self.live.len(),
            "a record is kept for what is in memory, and only for it"
        );
        assert!(figures.retrying <= self.settings.retrying_max);
        assert!(
            figures.in_memory
                <= self.settings.lookahead_events + self.settings.retrying_max + self.settings.window_events,
            "{figures:?} is within bounds"
        );
        self.machine.check();
    }

    // --- answers ---

    fn answer(&mut self, index: usize) {
        if self.requests.is_empty() {
            return;
        }
        let request = self.requests.remove(index % self.requests.len()).unwrap();
        match request {
            Action::Load { from, events_max, bytes_max } => self.answer_load(from, events_max, bytes_max),
            Action::LoadDue { after, until_ms, events_max } => self.answer_due(after, until_ms, events_max),
            Action::LoadParked { key, events_max } => self.answer_parked(&key, events_max),
            Action::FindExpired { at, until_ms, events_max } => self.answer_expired(at, until_ms, events_max),
            _ => unreachable!(),
        }
    }

    fn answer_load(&mut self, from: u64, events_max: usize, bytes_max: usize) {
        // Rows of events that the log has still to bring are written before it does.
        let is_ahead = |change: &Change| matches!(change, Change::PutException { seq, .. } if *seq >= from);
        if self.pending.iter().any(is_ahead) {
            self.flush();
        }
        let (mut events, mut bytes, mut to) = (Vec::new(), 0, from);
        for seq in from..self.tail() {
            bytes += self.log(seq).entry.bytes;
            if events.len() >= events_max || (bytes > bytes_max && !events.is_empty()) {
                break;
            }
            let is_exception = self.disk.rows.contains_key(&seq);
            events.push(if is_exception { Loaded::Exception { seq } } else { self.read(seq) });
            to = seq + 1;
        }
        let held = events.iter().filter(|loaded| !matches!(loaded, Loaded::Exception { .. }));
        self.live.extend(held.map(Loaded::seq));
        self.step(Input::Loaded { to, events });
    }

    fn answer_expired(&mut self, at: ScanAt, until_ms: u64, events_max: usize) {
        self.flush();
        let mut to = 0;
        // The candidates, and where the search continues.
        let (candidates, next): (Vec<(u64, ExpiredPlace)>, _) = match at {
            ScanAt::Due(after) => {
                let due_of = |(seq, row): (&u64, &Row)| match row.exception.state {
                    ExceptionState::Retry { due_ms } | ExceptionState::Scheduled { due_ms } => {
                        Some(((due_ms, *seq), row.exception.clone()))
                    }
                    _ => None,
                };
                let mut rows: Vec<_> = self.disk.rows.iter().filter_map(due_of).collect();
                rows.sort_unstable_by_key(|(at, _)| *at);
                rows.retain(|(at, _)| after.is_none_or(|after| *at > after));
                let more = rows.len() > events_max;
                rows.truncate(events_max);
                let next =
                    if more { ScanAt::Due(rows.last().map(|(at, _)| *at)) } else { ScanAt::Parked(None) };
                let place = |((_, seq), exception)| (seq, ExpiredPlace::Exception(exception));
                (rows.into_iter().map(place).collect(), Some(next))
            }
            ScanAt::Parked(after) => {
                let after = |row: &&(Key, u64)| after.as_ref().is_none_or(|after| *row > after);
                let mut rows: Vec<_> = self.disk.parked.iter().filter(after).cloned().collect();
                let more = rows.len() > events_max;
                rows.truncate(events_max);
                let next = if more { ScanAt::Parked(rows.last().cloned()) } else { ScanAt::Log(0) };
                (rows.into_iter().map(|(_, seq)| (seq, ExpiredPlace::Parked)).collect(), Some(next))
            }
            ScanAt::Log(from) => {
                to = self.tail().min(from + events_max as u64);
                let next = (to < self.tail()).then_some(ScanAt::Log(to));
                let free = (from..to).filter(|seq| !self.disk.rows.contains_key(seq));
                (free.map(|seq| (seq, ExpiredPlace::Log)).collect(), next)
            }
        };
        let (mut found, mut earliest_ms) = (Vec::new(), None);
        for (seq, place) in candidates {
            let LogEntry { entry, kind: Kind::Event, .. } = self.log(seq) else { continue };
            match entry.expires_ms {
                Some(at) if at <= until_ms => found.push(ExpiredEvent { seq, key: entry.key.clone(), place }),
                expires_ms => earliest_ms = earliest_ms.into_iter().chain(expires_ms).min(),
            }
        }
        self.step(Input::FoundExpired { found, next, to, earliest_ms });
    }

    fn answer_due(&mut self, after: Option<(u64, u64)>, until_ms: u64, events_max: usize) {
        self.flush();
        let mut rows: Vec<(u64, u64)> = Vec::new();
        for (seq, row) in &self.disk.rows {
            match row.exception.state {
                ExceptionState::Retry { due_ms } | ExceptionState::Scheduled { due_ms } => {
                    rows.push((due_ms, *seq))
                }
                ExceptionState::Quarantined { .. } | ExceptionState::Discarded => {}
            }
        }
        rows.sort_unstable();
        let (mut due, mut resume, mut next_due_ms, mut last) = (Vec::new(), None, None, None);
        for (due_ms, seq) in rows.into_iter().filter(|row| after.is_none_or(|after| *row > after)) {
            if due_ms > until_ms {
                next_due_ms = Some(due_ms);
                break;
            }
            if due.len() >= events_max {
                resume = last;
                break;
            }
            due.push((self.read(seq), self.disk.rows[&seq].exception.clone()));
            last = Some((due_ms, seq));
        }
        self.live.extend(due.iter().map(|(loaded, _)| loaded.seq()));
        self.step(Input::LoadedDue { due, resume, next_due_ms });
    }

    fn answer_parked(&mut self, key: &Key, events_max: usize) {
        self.flush();
        let seqs: Vec<u64> = self.disk.parked.iter().filter(|(k, _)| k == key).map(|(_, seq)| *seq).collect();
        let events: Vec<Loaded> = seqs.iter().take(events_max).map(|seq| self.read(*seq)).collect();
        self.live.extend(events.iter().map(Loaded::seq));
        let more = seqs.len() > events_max;
        self.step(Input::LoadedParked { key: key.clone(), events, more });
    }

    // --- broker ---

    /// Reports up to `count` outcomes in one batch, if there are as many and none closes the
    /// channel before.
    fn land(&mut self, index: usize, count: usize) {
        let mut batch = Vec::new();
        while batch.len() < count {
            let Some(ticket) = self.flights.keys().copied().nth(index % self.flights.len().max(1)) else {
                break;
            };
            match self.flights[&ticket].scripted {
                ScriptedOutcome::ClosesChannel(class) if batch.is_empty() => return self.down(class),
                ScriptedOutcome::ClosesChannel(_) => break,
                _ => batch.push((Ticket(ticket), self.outcome_of(ticket))),
            }
        }
        if !batch.is_empty() {
            self.step(Input::Outcomes(batch));
        }
    }

    fn outcome_of(&mut self, ticket: u64) -> Outcome {
        let Flight { seq, scripted, isolated, stored } = self.flights.remove(&ticket).unwrap();
        let exchange = Key::clone(&self.log(seq).entry.exchange);
        if isolated {
            match scripted {
                ScriptedOutcome::Refused(class @ (FaultClass::Message | FaultClass::Destination)) => {
                    self.refused_alone.insert(seq);
                    if class == FaultClass::Destination {
                        self.closed.insert(Key::clone(&exchange));
                    }
                }
                ScriptedOutcome::Unknown | ScriptedOutcome::Silent => {}
                _ => {
                    self.closed.remove(&exchange);
                    self.refused_alone.remove(&seq);
                }
            }
        }
        let spent =
            self.spent.entry(seq).or_insert_with(|| self.attempts.get(&seq).copied().unwrap_or_default());
        let fault = |class| Fault::with_code(class, 404, format!("no exchange '{exchange}'"));
        match scripted {
            ScriptedOutcome::Confirmed => Outcome::Confirmed,
            ScriptedOutcome::Nacked => Outcome::Nacked,
            ScriptedOutcome::Returned => {
                spent.1 += 1;
                Outcome::Returned(fault(FaultClass::Destination))
            }
            ScriptedOutcome::Refused(class) => {
                spent.0 += u32::from(class == FaultClass::Message);
                spent.1 += u32::from(class == FaultClass::Destination);
                Outcome::Refused(fault(class))
            }
            ScriptedOutcome::Unknown => Outcome::Unknown(fault(FaultClass::Outage)),
            ScriptedOutcome::Silent => {
                self.late.insert(ticket, (seq, stored));
                Outcome::Silent(fault(FaultClass::Outage))
            }
            ScriptedOutcome::ClosesChannel(_) => unreachable!(),
        }
    }

    /// Delivers the late answer to a silent publish.
    fn late_word(&mut self, index: usize) {
        let Some(ticket) = self.late.keys().nth(index % self.late.len().max(1)).copied() else { return };
        let (seq, stored) = self.late.remove(&ticket).unwrap();
        let outcome = match index % 2 {
            _ if stored => Outcome::Confirmed,
            0 => Outcome::Nacked,
            _ => {
                let spent = self
                    .spent
                    .entry(seq)
                    .or_insert_with(|| self.attempts.get(&seq).copied().unwrap_or_default());
                spent.1 += 1;
                Outcome::Returned(Fault::with_code(FaultClass::Destination, 312, "NO_ROUTE"))
            }
        };
        // If the broker has the event, the late answer decides it, and a newer publish does not
        // count.
        if outcome == Outcome::Confirmed && self.live.contains(&seq) && self.waits_late(ticket) {
            self.flights.retain(|_, flight| flight.seq != seq);
        }
        self.step(Input::Outcomes(vec![(Ticket(ticket), outcome)]));
    }

    fn waits_late(&self, ticket: u64) -> bool {
        self.machine.items.values().any(|item| item.late == Some(Ticket(ticket)))
    }

    fn is_trial(&self, seq: u64) -> bool {
        let state = self.machine.items.get(&seq).map(|item| item.state);
        matches!(state, Some(ItemState::InFlight { trial: true, .. }))
    }

    fn down(&mut self, class: FaultClass) {
        self.up = false;
        self.blocked = false;
        self.late.clear();
        // What was on the channel gets no outcome.
        self.flights.retain(|_, flight| flight.isolated);
        self.step(Input::Down { fault: Fault::with_code(class, 404, "no exchange 'missing'") });
    }

    fn come_up(&mut self) {
        self.epoch += 1;
        self.late.clear();
        if self.up {
            self.flights.retain(|_, flight| flight.isolated);
        }
        self.up = true;
        self.blocked = false;
        self.step(Input::Up { epoch: Epoch(self.epoch) });
    }

    // --- operators ---

    fn quarantined(&self) -> Vec<u64> {
        let state = |row: &Row| matches!(row.exception.state, ExceptionState::Quarantined { .. });
        self.disk.rows.iter().filter(|(_, row)| state(row)).map(|(seq, _)| *seq).collect()
    }

    fn redrive(&mut self, index: usize) {
        self.flush();
        let quarantined = self.quarantined();
        let Some(seq) = quarantined.get(index % quarantined.len().max(1)).copied() else { return };
        let loaded = self.read(seq);
        let Loaded::Event(entry) = &loaded else { return };
        let row = self.disk.rows.get_mut(&seq).unwrap();
        row.key = entry.key.clone();
        row.exception = Exception {
            state: ExceptionState::Retry { due_ms: self.now.wall_ms },
            attempts: 0,
            destination_attempts: 0,
            ..row.exception.clone()
        };
        let fault = row.exception.fault.clone().unwrap();
        self.attempts.remove(&seq);
        self.spent.remove(&seq);
        self.live.insert(seq);
        if let Some(scan) = &mut self.scan {
            scan.exempt.insert(seq);
        }
        self.step(Input::Redriven(loaded, fault));
    }

    fn discard(&mut self, index: usize) {
        self.flush();
        let quarantined = self.quarantined();
        let Some(seq) = quarantined.get(index % quarantined.len().max(1)).copied() else { return };
        let row = self.disk.rows.get_mut(&seq).unwrap();
        row.exception.state = ExceptionState::Discarded;
        let key = row.key.take();
        self.drop_passed();
        self.discarded.insert(seq);
        self.step(Input::Discarded { seq, key });
    }

    /// Removes the rows of discarded events that the position has passed.
    fn drop_passed(&mut self) {
        let position = self.disk.position;
        let passed = |seq: u64, row: &Row| seq < position && row.exception.state == ExceptionState::Discarded;
        self.disk.rows.retain(|seq, row| !passed(*seq, row));
    }

    // --- the world turns ---

    fn run(&mut self, op: &Op) {
        match op {
            Op::Append { key, bytes, not_before, expires, kind, poison } => {
                let at = |offset: &i64| self.now.wall_ms.saturating_add_signed(*offset);
                let entry = Entry {
                    seq: self.tail(),
                    key: key.map(|key| Key::from(format!("k{key}"))),
                    exchange: exchange_of(*poison),
                    routing_key: Key::from(if bytes % 3 == 0 { "a" } else { "b" }),
                    bytes: *bytes,
                    not_before_ms: not_before.as_ref().map(at),
                    expires_ms: expires.as_ref().map(at),
                };
                self.disk.log.push(LogEntry { entry, kind: *kind, poison: *poison });
                let tail = self.tail();
                self.step(Input::Tail(tail));
            }
            Op::Advance { ms, wall_jump_ms } => {
                self.now.mono_ms += ms;
                self.now.wall_ms = (self.now.wall_ms + ms).saturating_add_signed(*wall_jump_ms);
                if let Some(scan) = &mut self.scan {
                    scan.wall_ms = scan.wall_ms.min(self.now.wall_ms);
                }
                self.step(Input::Tick);
            }
            Op::Land(index, count) => self.land(*index, *count),
            Op::LateWord(index) => self.late_word(*index),
            Op::StaleOutcome => {
                let ticket = self.draw(self.last_ticket + 2);
                if !self.flights.contains_key(&ticket) && !self.late.contains_key(&ticket) {
                    self.step(Input::Outcomes(vec![(Ticket(ticket), Outcome::Confirmed)]));
                }
            }
            Op::Down(class) => self.down(*class),
            Op::Up => self.come_up(),
            Op::Blocked(blocked) if self.up => {
                self.blocked = *blocked;
                self.step(Input::Blocked(*blocked));
            }
            Op::Blocked(_) => {}
            Op::Pause => {
                self.paused = true;
                self.step(Input::Pause);
            }
            Op::Resume => {
                self.paused = false;
                self.step(Input::Resume);
            }
            Op::Redrive(index) => self.redrive(*index),
            Op::Discard(index) => self.discard(*index),
            Op::Rot(index) => {
                if !self.disk.log.is_empty() {
                    let index = index % self.disk.log.len();
                    let found = &mut self.disk.log[index];
                    if found.kind == Kind::Event {
                        found.kind = Kind::Undecodable;
                    }
                }
            }
            Op::Answer(index) => self.answer(*index),
            Op::LetExpiredGo => self.let_expired_go(),
            Op::Flush => self.flush(),
            Op::Crash => self.recover(),
            Op::Tick => self.step(Input::Tick),
        }
    }

    fn let_expired_go(&mut self) {
        if self.scan.is_none() {
            let exempt = self.flights.values().map(|flight| flight.seq).collect();
            self.scan = Some(ExpiryScan { tail: self.tail(), wall_ms: self.now.wall_ms, exempt });
        }
        self.step(Input::LetExpiredGo);
    }

    /// Heals the world, and runs until nothing is left to happen.
    fn heal(&mut self) {
        self.healed = true;
        for flight in self.flights.values_mut() {
            if !matches!(flight.scripted, ScriptedOutcome::Confirmed) && flight.isolated && !self.keep_poison
            {
                flight.scripted = ScriptedOutcome::Nacked;
            }
        }
        self.paused = false;
        self.step(Input::Resume);
        self.come_up();
        self.run_until_quiet();
    }

    fn run_until_quiet(&mut self) {
        for _ in 0..QUIET_STEPS_MAX {
            if !self.up {
                self.come_up();
            } else if !self.requests.is_empty() {
                self.answer(0);
            } else if !self.flights.is_empty() {
                let index = usize::try_from(self.draw(1000)).unwrap();
                self.land(index, 1);
            } else if let Some(ms) = self.until_wake() {
                self.now.mono_ms += ms;
                self.now.wall_ms += ms;
                self.step(Input::Tick);
            } else {
                self.flush();
                return;
            }
        }
        panic!("not quiet after {QUIET_STEPS_MAX} steps: {:?}", self.machine.figures());
    }

    fn until_wake(&self) -> Option<u64> {
        let Wake { mono_ms, wall_ms } = self.machine.next_wake();
        let mono = mono_ms.map(|at| at.saturating_sub(self.now.mono_ms));
        let wall = wall_ms.map(|at| at.saturating_sub(self.now.wall_ms));
        mono.into_iter().chain(wall).min()
    }

    // --- the end ---

    fn check_settled(&mut self) {
        let quarantined: BTreeSet<u64> = self.quarantined().into_iter().collect();
        let held: BTreeSet<Key> = self.disk.rows.values().filter_map(|row| row.key.clone()).collect();
        if !self.machine.figures().stalled {
            for seq in 0..self.tail() {
                let waits =
                    self.is_parked(seq) && self.log(seq).entry.key.as_ref().is_some_and(|k| held.contains(k));
                let settled = self.log(seq).kind == Kind::Unpublished
                    || self.confirmed.contains(&seq)
                    || self.discarded.contains(&seq)
                    || quarantined.contains(&seq);
                assert!(settled || waits, "{seq} is neither settled nor waits for a person");
            }
        }
        for _ in 0..QUIET_STEPS_MAX {
            if self.quarantined().is_empty() {
                break;
            }
            self.discard(0);
            self.run_until_quiet();
        }
        for seq in 0..self.tail() {
            let settled = self.log(seq).kind == Kind::Unpublished
                || self.confirmed.contains(&seq)
                || self.discarded.contains(&seq);
            assert!(settled, "{seq} is lost");
        }
        assert_eq!(self.disk.position, self.tail());
        assert!(self.disk.rows.is_empty() && self.disk.parked.is_empty(), "no row is left");
        assert!(self.live.is_empty() && self.machine.figures().held_keys == 0);
    }

    /// Checks that the first deliveries of a key's events ascend, except scheduled, expired and
    /// discarded events.
    fn check_order(&self) {
        let mut seen = BTreeSet::new();
        let mut last: HashMap<Key, u64> = HashMap::new();
        for seq in self.tap.iter().copied().filter(|seq| seen.insert(*seq)) {
            let found = self.log(seq);
            let Some(key) = found.entry.key.clone().filter(|_| found.entry.not_before_ms.is_none()) else {
                continue;
            };
            if self.left_order.contains(&seq) || self.discarded.contains(&seq) {
                continue;
            }
            let last = last.entry(key).or_insert(seq);
            assert!(seq >= *last, "{seq} comes after {last}: {:?}", self.tap);
            *last = seq;
        }
    }
}

// --- what may happen ---

fn settings(ordering: PublishOrder, on_quarantine: QuarantinePolicy) -> impl Strategy<Value = Settings> {
    (
        (1..6_usize, 20..300_usize, 2..16_usize, 50..600_usize, 1..9_usize),
        (1..4_u32, 1..4_u32, 1..100_u64, 1..4_usize, 1..6_usize, any::<u64>(), rate_limit()),
    )
        .prop_map(
            move |((window_events, window_bytes, lookahead_events, lookahead_bytes, load_events), rest)| {
                let (
                    attempts_max,
                    destination_attempts_max,
                    backoff_first_ms,
                    retrying_max,
                    held_keys_max,
                    seed,
                    rate_limit,
                ) = rest;
                Settings {
                    ordering,
                    on_quarantine,
                    window_events,
                    window_bytes,
                    lookahead_events,
                    lookahead_bytes,
                    load_events,
                    attempts_max,
                    destination_attempts_max,
                    backoff_first_ms,
                    backoff_max_ms: backoff_first_ms * 20,
                    retrying_max,
                    held_keys_max,
                    rate_limit,
                    seed,
                }
            },
        )
}

fn exchange_of(poison: Poison) -> Key {
    if poison == Poison::Destination { "missing".into() } else { "there".into() }
}

fn rate_limit() -> impl Strategy<Value = Option<u32>> {
    prop_oneof![3 => Just(None), 1 => (1..200_u32).prop_map(Some)]
}

fn append() -> impl Strategy<Value = Op> {
    (
        prop_oneof![1 => Just(None), 4 => (0..4_u8).prop_map(Some)],
        prop_oneof![8 => 1..60_usize, 1 => 60..500_usize],
        prop_oneof![9 => Just(None), 1 => (-50..400_i64).prop_map(Some)],
        prop_oneof![8 => Just(None), 1 => (-50..900_i64).prop_map(Some)],
        prop_oneof![20 => Just(Kind::Event), 1 => Just(Kind::Unpublished), 1 => Just(Kind::Undecodable)],
        prop_oneof![20 => Just(Poison::No), 1 => Just(Poison::Message), 1 => Just(Poison::Destination)],
    )
        .prop_map(|(key, bytes, not_before, expires, kind, poison)| Op::Append {
            key,
            bytes,
            not_before,
            expires,
            kind,
            poison,
        })
}

fn fault_class() -> impl Strategy<Value = FaultClass> {
    prop_oneof![
        3 => Just(FaultClass::Outage),
        1 => Just(FaultClass::Config),
        1 => Just(FaultClass::Message),
        1 => Just(FaultClass::Destination),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        30 => append(),
        12 => (0..400_u64, prop_oneof![6 => Just(0), 1 => -2000..2000_i64])
            .prop_map(|(ms, wall_jump_ms)| Op::Advance { ms, wall_jump_ms }),
        40 => (0..8_usize, 1..5_usize).prop_map(|(index, count)| Op::Land(index, count)),
        1 => Just(Op::StaleOutcome),
        3 => (0..16_usize).prop_map(Op::LateWord),
        2 => fault_class().prop_map(Op::Down),
        8 => Just(Op::Up),
        2 => any::<bool>().prop_map(Op::Blocked),
        1 => Just(Op::Pause),
        2 => Just(Op::Resume),
        3 => (0..8_usize).prop_map(Op::Redrive),
        2 => (0..8_usize).prop_map(Op::Discard),
        1 => (0..100_usize).prop_map(Op::Rot),
        40 => (0..8_usize).prop_map(Op::Answer),
        3 => Just(Op::LetExpiredGo),
        5 => Just(Op::Flush),
        2 => Just(Op::Crash),
        2 => Just(Op::Tick),
    ]
}

fn scenario(ordering: PublishOrder, on_quarantine: QuarantinePolicy) -> impl Strategy<Value = Scenario> {
    (settings(ordering, on_quarantine), any::<u64>(), any::<bool>(), prop::collection::vec(op(), 1..150))
        .prop_map(|(settings, seed, keep_poison, ops)| Scenario { settings, seed, keep_poison, ops })
}

fn live_through(scenario: &Scenario) -> World {
    let mut world = World::new(scenario);
    for op in &scenario.ops {
        world.run(op);
    }
    world.heal();
    world.check_settled();
    world
}

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn per_key_and_hold(scenario in scenario(PublishOrder::PerKey, QuarantinePolicy::HoldKey)) {
        live_through(&scenario).check_order();
    }

    #[test]
    fn total_and_hold(scenario in scenario(PublishOrder::Total, QuarantinePolicy::HoldKey)) {
        live_through(&scenario).check_order();
    }

    #[test]
    fn per_key_and_skip(scenario in scenario(PublishOrder::PerKey, QuarantinePolicy::SkipEvent)) {
        live_through(&scenario);
    }

    #[test]
    fn relaxed(scenario in scenario(PublishOrder::Relaxed, QuarantinePolicy::HoldKey)) {
        live_through(&scenario);
    }
}
