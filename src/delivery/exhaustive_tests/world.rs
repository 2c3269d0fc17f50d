//! The world around the machine: a disk, a broker, connections, operators, and what each of them
//! may do next.
//!
//! **Invariants.** Everything is small and has one order, so that equal worlds look equal. The
//! machine's jitter begins anew before each step, so no state depends on how many waits were drawn
//! before it.

use std::collections::{BTreeMap, BTreeSet};

use super::Log;
use crate::broker::Epoch;
use crate::delivery::backoff::Jitter;
use crate::delivery::types::{
    Action, Change, Entry, Exception, ExceptionState, Input, Key, Loaded, PublishOrder, Recovered, Settings,
};
use crate::delivery::{Machine, Wake};
use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::time::Now;

const WALL_START_MS: u64 = 1_000_000;
const QUIET_STEPS_MAX: usize = 2000;

/// How often each move may still happen.
#[derive(Debug, Clone, Copy, Hash)]
pub(super) struct Budget {
    pub(super) connections: u8,
    pub(super) nacks: u8,
    pub(super) returns: u8,
    /// Publishes without an answer within the deadline.
    pub(super) silences: u8,
    /// Closes of the channel for the fault of one message.
    pub(super) closes: u8,
    pub(super) crashes: u8,
    pub(super) redrives: u8,
    pub(super) discards: u8,
    /// Messages that are stored without a report.
    pub(super) ghosts: u8,
}

/// One move of the world.
#[derive(Debug, Clone)]
pub(super) enum Move {
    Up,
    Down(FaultClass),
    Land(Ticket, ScriptedOutcome),
    /// A message of a lost connection reaches its queue after all.
    Ghost(usize),
    Answer(usize),
    /// The next step's changes are on disk.
    Flush,
    /// Time passes until the machine's next timer.
    Wait,
    Crash,
    Redrive(u64),
    Discard(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScriptedOutcome {
    Confirmed,
    Nacked,
    /// One queue stored the message, and another refused it.
    NackedAndStored,
    Returned,
    /// The event was isolated, and its exchange is missing.
    Refused,
    /// The trial's own connection broke, so the outcome is unknown.
    Unknown,
    /// No answer came within the deadline.
    Silent,
}

#[derive(Debug, Clone, Copy, Hash)]
pub(super) struct Flight {
    pub(super) seq: u64,
    pub(super) isolated: bool,
}

#[derive(Clone)]
pub(super) struct World {
    pub(super) log: Log,
    settings: Settings,
    pub(super) budget: Budget,
    pub(super) machine: Machine,
    pub(super) now: Now,
    pub(super) up: bool,
    epoch: u64,
    pub(super) flights: BTreeMap<Ticket, Flight>,
    /// The messages that dead connections still hold, each in its order.
    pub(super) ghosts: Vec<Vec<u64>>,
    pub(super) requests: Vec<Action>,
    /// The unwritten changes of each step, or of its part up to a quarantine. They are written
    /// together or not at all.
    pub(super) pending: Vec<Vec<Change>>,
    pub(super) position: u64,
    pub(super) rows: BTreeMap<u64, Exception>,
    pub(super) parked: BTreeSet<u64>,
    /// Bits by sequence number: in the queue, confirmed, once on disk because of a quarantine,
    /// discarded.
    pub(super) stored: u8,
    pub(super) confirmed: u8,
    pub(super) passed_by: u8,
    pub(super) discarded: u8,
}

type Check = Result<(), String>;

const EXCHANGE: &str = "x";

fn missing_exchange(class: FaultClass) -> Fault {
    Fault::with_code(class, 404, format!("no exchange '{EXCHANGE}'"))
}

fn bit(seq: u64) -> u8 {
    1 << seq
}

fn require(holds: bool, text: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(text()) }
}

impl World {
    pub(super) fn new(log: Log, settings: Settings, budget: Budget) -> Self {
        let now = Now { mono_ms: 0, wall_ms: WALL_START_MS };
        let recovered = Recovered { tail: log.len() as u64, ..Recovered::default() };
        let machine = Machine::new(settings.clone(), recovered, now, &mut Vec::new());
        Self {
            log,
            settings,
            budget,
            machine,
            now,
            up: false,
            epoch: 0,
            flights: BTreeMap::new(),
            ghosts: Vec::new(),
            requests: Vec::new(),
            pending: Vec::new(),
            position: 0,
            rows: BTreeMap::new(),
            parked: BTreeSet::new(),
            stored: 0,
            confirmed: 0,
            passed_by: 0,
            discarded: 0,
        }
    }

    fn tail(&self) -> u64 {
        self.log.len() as u64
    }

    fn key(&self, seq: u64) -> Option<Key> {
        let key = self.log[usize::try_from(seq).unwrap()]?;
        Some(Key::from(if key == 0 { "a" } else { "b" }))
    }

    fn have_one_key(&self, a: u64, b: u64) -> bool {
        self.key(a).is_some() && self.key(a) == self.key(b)
    }

    /// Whether the earlier event must come first. Under total order, too, a quarantined event holds
    /// its own key alone, and later events pass it and what waits behind it.
    fn are_ordered(&self, earlier: u64, later: u64) -> bool {
        let total = self.settings.ordering == PublishOrder::Total && self.passed_by & bit(earlier) == 0;
        total || self.have_one_key(earlier, later)
    }

    fn read(&self, seq: u64) -> Loaded {
        let (key, exchange) = (self.key(seq), Key::from(EXCHANGE));
        let routing_key = Key::from("");
        Loaded::Event(Entry {
            seq,
            key,
            exchange,
            routing_key,
            bytes: 1,
            not_before_ms: None,
            expires_ms: None,
        })
    }

    // --- what may happen ---

    pub(super) fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::with_capacity(16);
        let budget = &self.budget;
        if !self.up && budget.connections > 0 {
            moves.push(Move::Up);
        }
        if self.up {
            moves.push(Move::Down(FaultClass::Outage));
            if budget.closes > 0 && self.flights.values().any(|flight| !flight.isolated) {
                moves.push(Move::Down(FaultClass::Destination));
            }
        }
        for (ticket, flight) in &self.flights {
            moves.extend(
                self.scripted_outcomes(*flight).into_iter().map(|scripted| Move::Land(*ticket, scripted)),
            );
        }
        if budget.ghosts > 0 {
            moves.extend((0..self.ghosts.len()).map(Move::Ghost));
        }
        moves.extend((0..self.requests.len()).map(Move::Answer));
        if !self.pending.is_empty() {
            moves.push(Move::Flush);
        }
        if self.until_wake().is_some() {
            moves.push(Move::Wait);
        }
        if budget.crashes > 0 {
            moves.push(Move::Crash);
        }
        // An operator acts on what is on disk, and the store writes pending changes before.
        if self.pending.is_empty() {
            let quarantined = || self.quarantined().into_iter();
            if budget.redrives > 0 {
                moves.extend(quarantined().map(Move::Redrive));
            }
            if budget.discards > 0 {
                moves.extend(quarantined().map(Move::Discard));
            }
        }
        moves
    }

    fn scripted_outcomes(&self, flight: Flight) -> Vec<ScriptedOutcome> {
        let budget = &self.budget;
        let mut outcomes = vec![ScriptedOutcome::Confirmed];
        if budget.nacks > 0 {
            outcomes.push(ScriptedOutcome::Nacked);
            if budget.ghosts > 0 {
                outcomes.push(ScriptedOutcome::NackedAndStored);
            }
        }
        if budget.returns > 0 {
            outcomes.push(ScriptedOutcome::Returned);
        }
        if budget.silences > 0 {
            outcomes.push(ScriptedOutcome::Silent);
        }
        if flight.isolated {
            outcomes.push(ScriptedOutcome::Unknown);
            if budget.closes > 0 {
                outcomes.push(ScriptedOutcome::Refused);
            }
        }
        outcomes
    }

    fn quarantined(&self) -> Vec<u64> {
        let state = |row: &Exception| matches!(row.state, ExceptionState::Quarantined { .. });
        self.rows.iter().filter(|(_, row)| state(row)).map(|(seq, _)| *seq).collect()
    }

    // --- what happens ---

    pub(super) fn take(&mut self, next: &Move) -> Check {
        match next {
            Move::Up => {
                self.budget.connections -= 1;
                self.come_up()
            }
            Move::Down(class) => {
                self.budget.closes -= u8::from(*class == FaultClass::Destination);
                self.up = false;
                self.lose_flights(|flight| !flight.isolated);
                self.step(Input::Down { fault: missing_exchange(*class) })
            }
            Move::Land(ticket, scripted) => self.land(*ticket, *scripted),
            Move::Ghost(index) => {
                self.budget.ghosts -= 1;
                let seq = self.ghosts[*index].remove(0);
                self.ghosts.retain(|ghosts| !ghosts.is_empty());
                self.store(seq)
            }
            Move::Answer(index) => self.answer(*index),
            Move::Flush => self.flush_one(),
            Move::Wait => self.wait(),
            Move::Crash => {
                self.budget.crashes -= 1;
                self.crash()
            }
            Move::Redrive(seq) => {
                self.budget.redrives -= 1;
                self.redrive(*seq)
            }
            Move::Discard(seq) => {
                self.budget.discards -= 1;
                self.discard(*seq)
            }
        }
    }

    fn come_up(&mut self) -> Check {
        self.epoch += 1;
        self.up = true;
        self.step(Input::Up { epoch: Epoch(self.epoch) })
    }

    /// Ends the connection of these flights. Their messages may reach the broker at any later time,
    /// or never.
    fn lose_flights(&mut self, is_lost: impl Fn(&Flight) -> bool) {
        let lost: Vec<u64> =
            self.flights.values().filter(|flight| is_lost(flight)).map(|flight| flight.seq).collect();
        self.flights.retain(|_, flight| !is_lost(flight));
        if !lost.is_empty() {
            self.ghosts.push(lost);
            self.ghosts.sort_unstable();
        }
    }

    fn land(&mut self, ticket: Ticket, scripted: ScriptedOutcome) -> Check {
        let Flight { seq, .. } = self.flights.remove(&ticket).unwrap();
        let outcome = match scripted {
            ScriptedOutcome::Confirmed => {
                self.store(seq)?;
                Outcome::Confirmed
            }
            ScriptedOutcome::Nacked => {
                self.budget.nacks -= 1;
                Outcome::Nacked
            }
            ScriptedOutcome::NackedAndStored => {
                self.budget.nacks -= 1;
                self.budget.ghosts -= 1;
                self.store(seq)?;
                Outcome::Nacked
            }
            ScriptedOutcome::Returned => {
                self.budget.returns -= 1;
                Outcome::Returned(Fault::new(FaultClass::Destination, ""))
            }
            ScriptedOutcome::Refused => {
                self.budget.closes -= 1;
                Outcome::Refused(missing_exchange(FaultClass::Destination))
            }
            ScriptedOutcome::Silent => {
                self.budget.silences -= 1;
                self.may_come_later(seq);
                Outcome::Silent(Fault::new(FaultClass::Outage, ""))
            }
            ScriptedOutcome::Unknown => {
                self.may_come_later(seq);
                Outcome::Unknown(Fault::new(FaultClass::Outage, ""))
            }
        };
        self.step(Input::Outcomes(vec![(ticket, outcome)]))
    }

    /// Lets a message arrive later, once. Once shows every consequence, and a world without an end
    /// could not be searched.
    fn may_come_later(&mut self, seq: u64) {
        let ghost = vec![seq];
        if !self.ghosts.contains(&ghost) {
            self.ghosts.push(ghost);
            self.ghosts.sort_unstable();
        }
    }

    /// Stores the message in the broker's queue. The earlier events of its order must be there, or
    /// discarded.
    fn store(&mut self, seq: u64) -> Check {
        let missing = |earlier: &u64| {
            self.are_ordered(*earlier, seq) && (self.stored | self.discarded) & bit(*earlier) == 0
        };
        if let Some(earlier) = (0..seq).find(missing).filter(|_| self.stored & bit(seq) == 0) {
            return Err(format!("{seq} is stored before {earlier}"));
        }
        self.stored |= bit(seq);
        Ok(())
    }

    fn until_wake(&self) -> Option<u64> {
        let Wake { mono_ms, wall_ms } = self.machine.next_wake();
        let mono = mono_ms.map(|at| at.saturating_sub(self.now.mono_ms));
        let wall = wall_ms.map(|at| at.saturating_sub(self.now.wall_ms));
        mono.into_iter().chain(wall).min()
    }

    fn wait(&mut self) -> Check {
        let ms = self.until_wake().unwrap_or(0);
        self.now.mono_ms += ms;
        self.now.wall_ms += ms;
        self.step(Input::Tick)
    }

    fn redrive(&mut self, seq: u64) -> Check {
        let state = ExceptionState::Retry { due_ms: self.now.wall_ms };
        let row = self.rows.get_mut(&seq).unwrap();
        *row = Exception { state, attempts: 0, destination_attempts: 0, ..row.clone() };
        let fault = row.fault.clone().unwrap();
        self.step(Input::Redriven(self.read(seq), fault))
    }

    fn discard(&mut self, seq: u64) -> Check {
        self.rows.get_mut(&seq).unwrap().state = ExceptionState::Discarded;
        self.drop_passed();
        self.discarded |= bit(seq);
        self.step(Input::Discarded { seq, key: self.key(seq) })
    }

    // --- the disk ---

    fn flush_one(&mut self) -> Check {
        for change in self.pending.remove(0) {
            self.write(change)?;
        }
        for seq in 0..self.position {
            let known = self.is_settled(seq) || self.rows.contains_key(&seq) || self.parked.contains(&seq);
            require(known, || format!("{seq} is below the position, unsettled, and has no row"))?;
        }
        Ok(())
    }

    fn write(&mut self, change: Change) -> Check {
        match change {
            Change::Position(position) => {
                require(position > self.position, || "the position does not rise".into())?;
                self.position = position;
                self.drop_passed();
            }
            Change::PutException { seq, exception, .. } => _ = self.rows.insert(seq, exception),
            Change::DropException { seq } => {
                require(self.rows.remove(&seq).is_some(), || format!("{seq} has no exception to drop"))?;
            }
            Change::Park { seq, .. } => _ = self.parked.insert(seq),
            Change::Unpark { seq, .. } => {
                require(self.parked.remove(&seq), || format!("{seq} is not parked"))?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Check {
        while !self.pending.is_empty() {
            self.flush_one()?;
        }
        Ok(())
    }

    fn is_settled(&self, seq: u64) -> bool {
        (self.confirmed | self.discarded) & bit(seq) != 0
    }

    /// Removes the rows of discarded events that the position has passed.
    fn drop_passed(&mut self) {
        let position = self.position;
        self.rows.retain(|seq, row| *seq >= position || row.state != ExceptionState::Discarded);
    }

    fn crash(&mut self) -> Check {
        self.pending.clear();
        self.requests.clear();
        self.up = false;
        self.lose_flights(|_| true);
        let mut found = Recovered { position: self.position, tail: self.tail(), ..Recovered::default() };
        for (seq, row) in &self.rows {
            let held = || self.key(*seq).map(|key| (*seq, key));
            match row.state {
                ExceptionState::Retry { .. } if found.retrying.len() < self.settings.retrying_max => {
                    found.retrying.push((self.read(*seq), row.clone()));
                }
                ExceptionState::Retry { due_ms } => {
                    found.holding.extend(held());
                    found.next_due_ms = found.next_due_ms.into_iter().chain([due_ms]).min();
                }
                ExceptionState::Quarantined { holds_key: true, .. } => found.holding.extend(held()),
                _ => {}
            }
        }
        for seq in &self.parked {
            let key = self.key(*seq).unwrap();
            if *seq >= self.position {
                found.parked_ahead.push((key, *seq));
            } else if !found.parked_keys.contains(&key) {
                found.parked_keys.push(key);
            }
        }
        let mut out = Vec::new();
        self.machine = Machine::new(self.settings.clone(), found, self.now, &mut out);
        self.perform(out)
    }

    // --- the machine ---

    fn step(&mut self, input: Input) -> Check {
        let mut out = Vec::new();
        self.machine.jitter = Jitter::new(0);
        self.machine.step(input, self.now, &mut out);
        self.perform(out)
    }

    fn perform(&mut self, actions: Vec<Action>) -> Check {
        let mut changes = Vec::new();
        for action in actions {
            match action {
                Action::Publish { ticket, seq, isolated, .. } => self.publish(ticket, seq, isolated)?,
                Action::Save(change) => {
                    if let Change::Park { seq, .. } = change {
                        self.passed_by |= bit(seq);
                    }
                    changes.push(change);
                }
                Action::Confirmed { seq } => {
                    require(self.stored & bit(seq) != 0, || {
                        format!("{seq} is confirmed but was never stored")
                    })?;
                    self.confirmed |= bit(seq);
                }
                Action::Quarantined { seq, .. } => {
                    self.hand_over(&mut changes);
                    self.passed_by |= bit(seq);
                }
                Action::Forget { .. } => {}
                Action::FindExpired { .. } | Action::Scanned { .. } => unreachable!("nothing expires here"),
                Action::Load { .. } | Action::LoadDue { .. } | Action::LoadParked { .. } => {
                    self.requests.push(action)
                }
            }
        }
        self.hand_over(&mut changes);
        self.machine.check();
        Ok(())
    }

    fn hand_over(&mut self, changes: &mut Vec<Change>) {
        if !changes.is_empty() {
            self.pending.push(std::mem::take(changes));
        }
    }

    fn publish(&mut self, ticket: Ticket, seq: u64, isolated: bool) -> Check {
        require(self.up, || format!("{seq} is published while the broker is away"))?;
        require(self.discarded & bit(seq) == 0, || format!("{seq} is published, but was given up"))?;
        let strict = self.settings.ordering != PublishOrder::Relaxed;
        let total = self.settings.ordering == PublishOrder::Total;
        for other in self.flights.values().map(|flight| flight.seq) {
            let independent = other != seq && !total && !(strict && self.have_one_key(other, seq));
            require(independent, || format!("{seq} is published while {other} is in flight"))?;
        }
        self.flights.insert(ticket, Flight { seq, isolated });
        require(self.flights.len() <= self.settings.window_events, || "the window is not kept".into())
    }

    fn answer(&mut self, index: usize) -> Check {
        match self.requests.remove(index) {
            Action::Load { from, events_max, .. } => {
                // Rows of events that the log has still to bring are written before it does.
                let is_ahead =
                    |change: &Change| matches!(change, Change::PutException { seq, .. } if *seq >= from);
                if self.pending.iter().flatten().any(is_ahead) {
                    self.flush()?;
                }
                let to = self.tail().min(from + events_max as u64);
                let read = |seq| {
                    if self.rows.contains_key(&seq) { Loaded::Exception { seq } } else { self.read(seq) }
                };
                let events = (from..to).map(read).collect();
                self.step(Input::Loaded { to, events })
            }
            Action::LoadDue { after, until_ms, events_max } => {
                self.flush()?;
                self.answer_due(after, until_ms, events_max)
            }
            Action::LoadParked { key, events_max } => {
                self.flush()?;
                let of_key = |seq: &&u64| self.key(**seq).as_ref() == Some(&key);
                let seqs: Vec<u64> = self.parked.iter().filter(of_key).copied().collect();
                let events = seqs.iter().take(events_max).map(|seq| self.read(*seq)).collect();
                self.step(Input::LoadedParked { events, more: seqs.len() > events_max, key })
            }
            _ => unreachable!("only these are requests"),
        }
    }

    fn answer_due(&mut self, after: Option<(u64, u64)>, until_ms: u64, events_max: usize) -> Check {
        let due_ms = |row: &Exception| match row.state {
            ExceptionState::Retry { due_ms } => Some(due_ms),
            _ => None,
        };
        let mut rows: Vec<(u64, u64)> =
            self.rows.iter().filter_map(|(seq, row)| Some((due_ms(row)?, *seq))).collect();
        rows.sort_unstable();
        rows.retain(|row| after.is_none_or(|after| *row > after));
        let next_due_ms = rows.iter().map(|(due_ms, _)| *due_ms).find(|due_ms| *due_ms > until_ms);
        rows.retain(|(due_ms, _)| *due_ms <= until_ms);
        let resume = (rows.len() > events_max).then(|| rows[events_max - 1]);
        rows.truncate(events_max);
        let due = rows.iter().map(|(_, seq)| (self.read(*seq), self.rows[seq].clone())).collect();
        self.step(Input::LoadedDue { due, next_due_ms: next_due_ms.filter(|_| resume.is_none()), resume })
    }

    // --- the end ---

    /// Heals the world. The operators discard what is in quarantine. Nothing may be left.
    pub(super) fn heal(mut self) -> Check {
        self.budget.ghosts = 0;
        for _ in 0..QUIET_STEPS_MAX {
            if !self.up {
                self.come_up()?;
            } else if let Some(ticket) = self.flights.keys().next().copied() {
                self.land(ticket, ScriptedOutcome::Confirmed)?;
            } else if !self.requests.is_empty() {
                self.answer(0)?;
            } else if self.until_wake().is_some() {
                self.wait()?;
            } else {
                self.flush()?;
                let Some(seq) = self.quarantined().first().copied() else { return self.check_settled() };
                self.discard(seq)?;
            }
        }
        Err(format!("not quiet after {QUIET_STEPS_MAX} steps"))
    }

    fn check_settled(&self) -> Check {
        for seq in 0..self.tail() {
            require(self.is_settled(seq), || format!("{seq} is lost"))?;
        }
        require(self.position == self.tail(), || format!("the position stays at {}", self.position))?;
        require(self.rows.is_empty() && self.parked.is_empty(), || "rows are left".into())
    }
}
