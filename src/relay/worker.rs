//! The relay's thread: does what the machine decides.
//!
//! **Invariants.** The worker writes waiting rows before it reads rows, so the machine's view of
//! the disk is never older than its own words. No read transaction is held from one batch to the
//! next. The thread sleeps unless something has happened.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, never, select};
use rustc_hash::FxHashMap;

use super::prepare::{Held, Met, hold};
use super::rows;
use super::waiters::Waiters;
use super::{Registered, StopReport};
use crate::broker::{Epoch, Publisher, PublisherEvent};
use crate::delivery::types::{Action, Change, Input, Recovered, ScanAt, Settings};
use crate::delivery::{Machine, SuspendedFigures};
use crate::error::{Error, Result};
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};
use crate::printable::printable;
use crate::storage::errors::engine_panicked;
use crate::store::read::records;
use crate::store::shared::capture_schedule::CoalescingPasses;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::log_pace::LogPace;
use crate::store::shared::relays::RelayRequest;
use crate::store::{RelayState, RelayStatus, SuspendedDestination};
use crate::time::{Deadline, Now, wake_after};
use crate::tuning::{
    CAPTURE_PASS_KEYS, CAPTURE_PASS_TIMEOUT_MS, CAPTURE_SMALL_PASS_KEYS, SUSPENDED_SHOWN_MAX,
};
use crate::wire;

pub(crate) use super::prepare::Form;

/// The number of row changes that may wait for a commit. More ask for a commit of their own.
const WAITING_ROWS_MAX: usize = 8192;

/// How often the worker checks the wall clock, which may jump, while an event waits for a wall time.
const WALL_CHECK: Duration = Duration::from_secs(30);

/// Publisher events taken in one iteration at most, so that commits and requests get their turn.
const EVENTS_PER_ITERATION: usize = 256;

/// The channels on which other threads reach the worker.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) notified: Receiver<()>,
    pub(crate) requested: Receiver<RelayRequest>,
    pub(crate) published: Receiver<PublisherEvent>,
}

#[derive(Debug)]
pub(crate) struct Worker {
    pub(super) registered: Registered,
    pub(super) cursor: Cursor,
    pub(super) machine: Machine,
    pub(super) form: Form,
    publisher: Box<dyn Publisher>,
    pub(super) inputs: Inputs,
    pub(super) status: Arc<Mutex<RelayStatus>>,
    pub(super) held: FxHashMap<u64, Held>,
    /// Exchanges and routing keys, one copy each.
    pub(super) names: HashMap<Box<str>, Arc<str>>,
    pub(super) waiters: Waiters,
    /// Actions that are still to be done.
    pub(super) todo: VecDeque<Action>,
    pub(super) scratch: Vec<Action>,
    pub(super) changes: Vec<Change>,
    /// Confirms that no crash can undo: below the position saved with them, or of events with rows.
    pub(super) confirmed: u64,
    /// Confirmed events that wait for the position to pass them. They count only then: a crash would
    /// publish them again. The machine bounds how far the position stays behind, and so their number.
    pub(super) confirmed_ahead: BTreeSet<u64>,
    /// The newest position that was handed over.
    pub(super) position: u64,
    /// Rows were changed since the last flush.
    pub(super) rows_waiting: bool,
    /// Some of these rows belong to events that the log has yet to bring.
    pub(super) rows_ahead_waiting: bool,
    /// The next piece of a search for expired events. Each iteration does one piece.
    pub(super) search: Option<Search>,
    /// The next piece of the log to read: from, events, bytes.
    pub(super) load: Option<(u64, usize, usize)>,
    pub(super) state: RelayState,
    pub(super) connections: u64,
    pub(super) paused: bool,
    pub(super) blocked: bool,
    pub(super) last_fault: Option<Fault>,
    pub(super) stop_at: Option<Deadline>,
    pass_timeout: Option<PassTimeout>,
    pub(super) pace: LogPace,
}

/// The time since which captured tables have had something to publish, without a pass.
#[derive(Debug, Clone, Copy)]
struct PassTimeout {
    /// By the monotonic clock.
    since_ms: u64,
    /// Confirms, and ended passes, up to that time.
    confirmed: u64,
    passes: u64,
}

impl Worker {
    pub(crate) fn new(
        registered: Registered,
        cursor: Cursor,
        settings: Settings,
        mut form: Form,
        publisher: Box<dyn Publisher>,
        inputs: Inputs,
        status: Arc<Mutex<RelayStatus>>,
    ) -> Result<Self> {
        let core = registered.store.core();
        let found = rows::find_rows(core, &cursor, settings.retrying_max)?;
        let mut held = FxHashMap::default();
        let mut names = HashMap::new();
        let records = records::read_records(core, found.retrying.iter().map(|(seq, _)| *seq))?;
        let retrying = records
            .into_iter()
            .zip(found.retrying)
            .map(|(read, (_, exception))| {
                (hold(read, Met::Again, &mut form, &mut names, &mut held), exception)
            })
            .collect();
        let recovered = Recovered {
            position: cursor.position,
            tail: core.tail().next_seq,
            holding: found.holding,
            retrying,
            parked_keys: found.parked_keys,
            parked_ahead: found.parked_ahead,
            next_due_ms: found.next_due_ms,
        };
        let now = core.settings.clock.now();
        let mut scratch = Vec::new();
        let machine = Machine::new(settings, recovered, now, &mut scratch);
        Ok(Self {
            position: cursor.position,
            registered,
            cursor,
            machine,
            form,
            publisher,
            inputs,
            status,
            held,
            names,
            waiters: Waiters::default(),
            todo: scratch.drain(..).collect(),
            scratch,
            changes: Vec::new(),
            confirmed: 0,
            confirmed_ahead: BTreeSet::new(),
            rows_waiting: false,
            rows_ahead_waiting: false,
            search: None,
            load: None,
            state: RelayState::Connecting,
            connections: 0,
            paused: false,
            blocked: false,
            last_fault: None,
            stop_at: None,
            pass_timeout: None,
            pace: LogPace::default(),
        })
    }

    /// The thread's whole life.
    pub(crate) fn run(mut self) -> StopReport {
        let name = self.registered.name.clone();
        let failure = loop {
            // The storage engine panics on some damaged pages.
            let ended = catch_unwind(AssertUnwindSafe(|| self.iterate()));
            if let Err(error) = ended.unwrap_or_else(|panic| Err(engine_panicked(&*panic))) {
                break Some(error);
            }
            if self.stop_at.is_some() && self.may_end() {
                break None;
            }
        };
        if let Some(error) = &failure {
            tracing::error!(%error, "the relay can do nothing more");
            self.state = RelayState::Failed(error.to_string());
            self.show_status();
            // No expiry request waits any longer for this search.
            self.registered.store.core().forget_expiry_requests(&name);
            // The relay sets no pace any more.
            self.registered.store.core().nudge_writer();
            self.await_stop();
        }
        self.end(failure.is_none())
    }

    /// Waits for an input, notifies the machine, and does what the machine decides.
    fn iterate(&mut self) -> Result<()> {
        self.work()?;
        self.search()?;
        // One load in each iteration: a stretch with nothing to do must not delay all other work.
        if let Some((from, events_max, bytes_max)) = self.load.take() {
            self.load(from, events_max, bytes_max)?;
            self.work()?;
        }
        self.ask_for_pass();
        self.show_status();
        match self.wait() {
            Woken::Grown => self.report_tail(),
            Woken::Request(request) => self.request(request)?,
            Woken::Publisher(event) => self.on_events(event),
            Woken::Timer => self.step(Input::Tick),
            Woken::PublisherGone => {
                return Err(Error::app("the publisher has ended by itself"));
            }
            // The handle is gone without a request: end soon.
            Woken::HandleGone => self.stop_at = Some(Deadline::now()),
        }
        self.registered.store.core().check()
    }

    pub(crate) fn report_tail(&mut self) {
        let tail = self.registered.store.core().tail().next_seq;
        self.step(Input::Tail(tail));
    }

    fn wait(&self) -> Woken {
        let is_busy = self.search.is_some() || self.load.is_some();
        let wake = if is_busy { Deadline::now() } else { self.timer() };
        let timer = wake.instant().map_or_else(never, crossbeam_channel::at);
        let Inputs { notified, requested, published } = &self.inputs;
        select! {
            recv(published) -> event => event.map_or(Woken::PublisherGone, Woken::Publisher),
            recv(notified) -> _ => Woken::Grown,
            recv(requested) -> request => request.map_or(Woken::HandleGone, Woken::Request),
            recv(timer) -> _ => Woken::Timer,
        }
    }

    /// When to wake without a notification.
    fn timer(&self) -> Deadline {
        let core = self.registered.store.core();
        let now = self.now();
        let wake = self.machine.next_wake();
        let mono = wake.mono_ms.map(|at| Duration::from_millis(at.saturating_sub(now.mono_ms)));
        let wall =
            wake.wall_ms.map(|at| Duration::from_millis(at.saturating_sub(now.wall_ms)).min(WALL_CHECK));
        let pass = self.pass_due().filter(|_| !core.passes.is_asked());
        let pass = pass.map(|(at, _)| Duration::from_millis(at.saturating_sub(now.mono_ms)));
        let next = mono.into_iter().chain(wall).chain(pass).min();
        let next = next.map(|wait| wake_after(&*core.settings.clock, wait));
        next.into_iter().chain(self.stop_at).min().unwrap_or(Deadline::Never)
    }

    /// When a coalescing pass is due for this relay, and with how many keys. A pass takes many keys
    /// once the relay has little left to do, and a few once they have waited long enough. While the
    /// broker is away or does not keep up, keys keep gathering.
    fn pass_due(&self) -> Option<(u64, usize)> {
        if !self.flows() {
            return None;
        }
        let due_ms = CoalescingPasses::due_ms(self.registered.store.core())?;
        if self.machine.is_caught_up() {
            return Some((due_ms, CAPTURE_PASS_KEYS));
        }
        // With much traffic and slow confirms, more than half a window is always in flight,
        // although the broker keeps up. A broker that confirms nothing does not keep up.
        let pass_timeout =
            self.pass_timeout.filter(|pass_timeout| self.machine.confirmed() > pass_timeout.confirmed)?;
        let due_ms = due_ms.max(pass_timeout.since_ms.saturating_add(CAPTURE_PASS_TIMEOUT_MS));
        self.machine.has_loaded_all().then_some((due_ms, CAPTURE_SMALL_PASS_KEYS))
    }

    fn flows(&self) -> bool {
        matches!(self.state, RelayState::Connected) && !self.paused && !self.blocked && self.stop_at.is_none()
    }

    fn ask_for_pass(&mut self) {
        self.note_pass_timeout();
        let now_ms = self.now().mono_ms;
        if let Some((_, keys)) = self.pass_due().filter(|(due_ms, _)| *due_ms <= now_ms) {
            self.registered.store.ask_for_pass(keys);
        }
    }

    /// Commits and the ends of passes notify the worker, so it sees at once when a wait begins.
    fn note_pass_timeout(&mut self) {
        let core = self.registered.store.core();
        if !self.flows() || CoalescingPasses::due_ms(core).is_none() {
            self.pass_timeout = None;
            return;
        }
        let passes = core.passes.ended();
        if self.pass_timeout.is_none_or(|pass_timeout| pass_timeout.passes != passes) {
            let since_ms = core.settings.clock.now().mono_ms;
            self.pass_timeout = Some(PassTimeout { since_ms, confirmed: self.machine.confirmed(), passes });
        }
    }

    fn now(&self) -> Now {
        self.registered.store.core().settings.clock.now()
    }

    pub(crate) fn step(&mut self, input: Input) {
        let now = self.now();
        self.machine.step(input, now, &mut self.scratch);
        self.todo.extend(self.scratch.drain(..));
    }

    /// Does all actions, and the actions that follow from them.
    pub(crate) fn work(&mut self) -> Result<()> {
        while let Some(action) = self.todo.pop_front() {
            self.act(action)?;
        }
        self.hand_over_changes()
    }

    fn act(&mut self, action: Action) -> Result<()> {
        match action {
            Action::Publish { epoch, ticket, seq, resend, isolated } => {
                self.publish(epoch, ticket, seq, resend, isolated);
            }
            Action::Load { from, events_max, bytes_max } => self.load = Some((from, events_max, bytes_max)),
            Action::LoadDue { after, until_ms, events_max } => self.load_due(after, until_ms, events_max)?,
            Action::LoadParked { key, events_max } => self.load_parked(key, events_max)?,
            Action::FindExpired { at, until_ms, events_max } => {
                self.search = Some(Search { at, until_ms, events_max });
            }
            Action::Scanned { to, earliest_ms } => {
                self.flush_rows()?;
                self.registered.store.core().scanned(&self.registered.name, to, earliest_ms);
            }
            Action::Save(change) => {
                match change {
                    Change::Position(position) => self.pass(position),
                    _ => self.rows_waiting = true,
                }
                self.changes.push(change);
            }
            Action::Confirmed { seq } => {
                if seq < self.position {
                    self.confirmed += 1;
                } else {
                    self.confirmed_ahead.insert(seq);
                }
                self.waiters.confirmed(seq);
            }
            Action::Quarantined { seq, fault } => {
                self.warn_of_quarantine(seq, &fault);
                // A notified caller looks at the quarantine next: the row must be on its way before.
                self.hand_over_changes()?;
                self.waiters.quarantined(seq, &fault);
            }
            Action::Forget { seq } => _ = self.held.remove(&seq),
        }
        Ok(())
    }

    /// Limits the warnings: one missing exchange may quarantine a million events.
    fn warn_of_quarantine(&mut self, seq: u64, fault: &Fault) {
        let now_ms = self.now().mono_ms;
        match self.pace.admit(now_ms) {
            Some(held_back) => tracing::warn!(seq, %fault, held_back, "an event goes to quarantine"),
            None => tracing::debug!(seq, %fault, "an event goes to quarantine"),
        }
    }

    fn pass(&mut self, position: u64) {
        self.position = position;
        let ahead = self.confirmed_ahead.split_off(&position);
        let passed = std::mem::replace(&mut self.confirmed_ahead, ahead);
        self.confirmed += passed.len() as u64;
    }

    fn publish(&mut self, epoch: Epoch, ticket: Ticket, seq: u64, resend: bool, isolated: bool) {
        let Some(held) = self.held.get(&seq) else {
            debug_assert!(false, "what is published has been loaded and not forgotten");
            return;
        };
        let message = if resend { Arc::new(wire::resend(&held.message)) } else { Arc::clone(&held.message) };
        let (exchange, routing_key) = (Arc::clone(&held.exchange), Arc::clone(&held.routing_key));
        let mandatory = held.mandatory;
        self.publisher
            .publish(epoch, Outgoing { ticket, exchange, routing_key, message, mandatory, isolated });
    }

    // --- progress ----------------------------------------------------------------------------

    /// Hands the changes over to wait for a commit.
    fn hand_over_changes(&mut self) -> Result<()> {
        if self.changes.is_empty() && self.confirmed == 0 {
            return Ok(());
        }
        let Registered { store, name } = &self.registered;
        let confirmed = std::mem::take(&mut self.confirmed);
        let (first, waiting) = {
            let mut progress = store.core().progress();
            (progress.add(name, &mut self.changes, confirmed), progress.len(name))
        };
        if first {
            store.announce_progress();
        }
        if waiting > WAITING_ROWS_MAX {
            self.flush_rows()?;
        }
        Ok(())
    }

    /// Writes rows that wait, and waits for that write.
    pub(crate) fn flush_rows(&mut self) -> Result<()> {
        if !self.rows_waiting {
            return Ok(());
        }
        self.rows_waiting = false;
        self.rows_ahead_waiting = false;
        self.hand_over_changes()?;
        self.registered.store.flush_progress(Deadline::Never)
    }

    // --- hearing -----------------------------------------------------------------------------

    fn on_events(&mut self, first: PublisherEvent) {
        self.on_event(first);
        for _ in 1..EVENTS_PER_ITERATION {
            let Ok(event) = self.inputs.published.try_recv() else { return };
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: PublisherEvent) {
        match event {
            PublisherEvent::Up { epoch } => {
                tracing::info!(epoch = epoch.0, "connected");
                self.connections += 1;
                self.blocked = false;
                self.state = RelayState::Connected;
                self.step(Input::Up { epoch });
            }
            PublisherEvent::Down { epoch, fault } => {
                if fault.class == FaultClass::Config {
                    tracing::error!(epoch = epoch.0, %fault, "refused by the broker");
                } else {
                    tracing::warn!(epoch = epoch.0, %fault, "disconnected");
                }
                self.blocked = false;
                self.state = RelayState::Disconnected(fault.clone());
                self.last_fault = Some(fault.clone());
                self.step(Input::Down { fault });
            }
            PublisherEvent::Blocked { blocked } => {
                if blocked {
                    tracing::warn!("the broker blocks publishers");
                } else {
                    tracing::info!("the broker no longer blocks publishers");
                }
                self.blocked = blocked;
                self.step(Input::Blocked(blocked));
            }
            PublisherEvent::Outcomes(outcomes) => {
                self.note_faults(&outcomes);
                self.step(Input::Outcomes(outcomes));
            }
            PublisherEvent::Trouble(fault) => {
                tracing::warn!(%fault, "the publisher is in trouble");
                self.last_fault = Some(fault);
            }
        }
    }

    /// Shows faults of a connection or a destination. Other returns are shown with their event.
    fn note_faults(&mut self, outcomes: &[(Ticket, Outcome)]) {
        for (_, outcome) in outcomes {
            match outcome {
                Outcome::Unknown(fault) | Outcome::Silent(fault) | Outcome::Refused(fault) => {
                    self.last_fault = Some(fault.clone());
                }
                // An outage spends no attempt, so no event shows it.
                Outcome::Returned(fault) if fault.class == FaultClass::Outage => {
                    self.last_fault = Some(fault.clone());
                }
                _ => {}
            }
        }
    }

    // --- ending ------------------------------------------------------------------------------

    /// Whether nothing in flight can still get an outcome, or the time is up.
    fn may_end(&self) -> bool {
        let nothing_comes =
            self.machine.in_flight() == 0 || self.blocked || !matches!(self.state, RelayState::Connected);
        nothing_comes || self.stop_at.is_some_and(Deadline::is_over)
    }

    /// After a failure, only reacts to a request to stop or to the end of the handle.
    fn await_stop(&mut self) {
        while let Ok(request) = self.inputs.requested.recv() {
            match request {
                RelayRequest::Stop { deadline } => {
                    self.stop_at = Some(deadline);
                    return;
                }
                // Dropping the reply notifies the waiter that the relay has ended.
                RelayRequest::Await { .. } => {}
                // This keeps callers from waiting for an answer.
                RelayRequest::LetExpiredGo => {
                    self.registered.store.core().forget_expiry_requests(&self.registered.name);
                }
                _ => {}
            }
        }
    }

    fn end(mut self, alive: bool) -> StopReport {
        let deadline = self.stop_at.unwrap_or_else(Deadline::now);
        let unknown = self.machine.in_flight();
        let mut clean = alive && unknown == 0;
        if alive {
            let written = self.work().and_then(|()| self.registered.store.flush_progress(deadline));
            if let Err(error) = &written {
                tracing::warn!(%error, "the last progress was not written; it will be repeated");
                clean = false;
            }
        }
        self.publisher.stop(deadline.left_or_max());
        self.state = RelayState::Stopped;
        self.show_status();
        let backlog_events = {
            let tail = self.registered.store.core().tail();
            let cursor = tail.cursors.get(&self.registered.name);
            cursor.map_or(0, |cursor| tail.backlog_of(cursor).0)
        };
        let report =
            StopReport { clean, backlog_events, unknown, confirmed: self.machine.figures().confirmed };
        tracing::info!(?report, "stopped");
        report
    }

    fn show_status(&self) {
        let figures = self.machine.figures();
        let state = match &self.state {
            RelayState::Connected if self.paused => RelayState::Paused,
            RelayState::Connected if self.blocked => RelayState::Blocked,
            state => state.clone(),
        };
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = RelayStatus {
            state,
            position: figures.position,
            in_flight: figures.in_flight,
            in_flight_bytes: figures.in_flight_bytes,
            in_memory: figures.in_memory,
            retrying: figures.retrying,
            held_keys: figures.held_keys,
            stalled: figures.stalled,
            confirmed: figures.confirmed,
            retried: figures.retried,
            quarantined: figures.quarantined,
            reconnects: self.connections.saturating_sub(1),
            suspended: self.machine.suspended().take(SUSPENDED_SHOWN_MAX).map(shown).collect(),
            last_fault: self.last_fault.clone(),
        };
    }
}

fn shown(suspended: SuspendedFigures<'_>) -> SuspendedDestination {
    SuspendedDestination {
        exchange: printable(suspended.exchange).to_string(),
        routing_key: printable(suspended.routing_key).to_string(),
        cause: suspended.cause,
        waiting: suspended.waiting,
        trials: suspended.trials,
    }
}

/// The place where a search for expired events goes on.
#[derive(Debug)]
pub(crate) struct Search {
    pub(super) at: ScanAt,
    pub(super) until_ms: u64,
    pub(super) events_max: usize,
}

/// The event that woke the worker.
enum Woken {
    Grown,
    Request(RelayRequest),
    Publisher(PublisherEvent),
    Timer,
    PublisherGone,
    HandleGone,
}
