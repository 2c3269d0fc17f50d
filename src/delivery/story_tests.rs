//! One short story per promise of the machine.

mod refusal_stories;
mod silence_stories;

use super::types::{
    Action, Change, Entry, Exception, ExceptionState, Input, Key, Loaded, PublishOrder, QuarantinePolicy,
    Recovered, Settings,
};
use super::{Machine, flow};
use crate::broker::Epoch;
use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::time::Now;

/// A machine with its log, which gets its inputs one by one. Reads of the log are answered at once;
/// the story answers the rest.
struct Story {
    machine: Machine,
    now: Now,
    log: Vec<Loaded>,
    epoch: u64,
    /// The actions since the story last took them, except reads of the log.
    did: Vec<Action>,
    loads: Vec<(u64, usize, usize)>,
    answers_loads: bool,
}

fn settings() -> Settings {
    Settings {
        ordering: PublishOrder::PerKey,
        on_quarantine: QuarantinePolicy::HoldKey,
        window_events: 8,
        window_bytes: 1000,
        lookahead_events: 32,
        lookahead_bytes: 10_000,
        load_events: 16,
        attempts_max: 2,
        destination_attempts_max: 2,
        backoff_first_ms: 100,
        backoff_max_ms: 10_000,
        retrying_max: 4,
        held_keys_max: 8,
        rate_limit: None,
        seed: 7,
    }
}

fn fault(class: FaultClass) -> Fault {
    Fault::new(class, "as the story goes")
}

fn refused() -> Outcome {
    Outcome::Refused(fault(FaultClass::Message))
}

fn key(name: &str) -> Key {
    Key::from(name)
}

fn entry(seq: u64, key: &str) -> Entry {
    let key = Some(Key::from(key)).filter(|key| !key.is_empty());
    let (exchange, routing_key) = ("e".into(), "".into());
    Entry { seq, key, exchange, routing_key, bytes: 10, not_before_ms: None, expires_ms: None }
}

fn retry(attempts: u32) -> Exception {
    let state = ExceptionState::Retry { due_ms: 0 };
    Exception { state, attempts, destination_attempts: 0, fault: None }
}

impl Story {
    fn new(settings: Settings) -> Self {
        Self::recovered(settings, Recovered::default(), Vec::new())
    }

    fn recovered(settings: Settings, recovered: Recovered, log: Vec<Loaded>) -> Self {
        let now = Now { mono_ms: 0, wall_ms: 1_000_000 };
        let mut did = Vec::new();
        let machine = Machine::new(settings, recovered, now, &mut did);
        Self { machine, now, log, epoch: 0, did, loads: Vec::new(), answers_loads: true }
    }

    /// Makes a connected machine with events of these keys in its log; "" is no key.
    fn with(settings: Settings, keys: &[&str]) -> Self {
        let mut story = Self::new(settings);
        story.up();
        story.append(keys);
        story
    }

    fn append(&mut self, keys: &[&str]) {
        for key in keys {
            self.log.push(Loaded::Event(entry(self.log.len() as u64, key)));
        }
        self.tail();
    }

    fn append_entry(&mut self, change: impl FnOnce(&mut Entry)) {
        let mut entry = entry(self.log.len() as u64, "");
        change(&mut entry);
        self.log.push(Loaded::Event(entry));
        self.tail();
    }

    fn tail(&mut self) {
        self.handle(Input::Tail(self.log.len() as u64));
    }

    fn handle(&mut self, input: Input) {
        let mut out = Vec::new();
        self.machine.step(input, self.now, &mut out);
        self.machine.check();
        for action in out {
            if let Action::Load { from, events_max, bytes_max } = action {
                self.loads.push((from, events_max, bytes_max));
                if self.answers_loads {
                    self.answer_load(from, events_max);
                }
            } else {
                self.did.push(action);
            }
        }
    }

    fn answer_load(&mut self, from: u64, events_max: usize) {
        let skip = usize::try_from(from).unwrap();
        let events: Vec<_> = self.log.iter().skip(skip).take(events_max).cloned().collect();
        self.handle(Input::Loaded { to: from + events.len() as u64, events });
    }

    fn up(&mut self) {
        self.epoch += 1;
        self.handle(Input::Up { epoch: Epoch(self.epoch) });
    }

    fn down(&mut self, class: FaultClass) {
        self.handle(Input::Down { fault: fault(class) });
    }

    fn pass(&mut self, ms: u64) {
        self.now.mono_ms += ms;
        self.now.wall_ms += ms;
        self.handle(Input::Tick);
    }

    /// Passes the time until the next timer.
    fn pass_to_timer(&mut self) {
        let due_ms = self.machine.next_wake().mono_ms.expect("a timer runs");
        self.pass(due_ms - self.now.mono_ms);
    }

    /// Returns the newest ticket of this event in flight.
    fn ticket(&self, seq: u64) -> Ticket {
        let mut flights = self.machine.in_flight.iter();
        *flights.find(|(_, flying)| **flying == seq).unwrap_or_else(|| panic!("{seq} is in flight")).0
    }

    fn outcome(&mut self, seq: u64, outcome: Outcome) {
        let ticket = self.ticket(seq);
        self.handle(Input::Outcomes(vec![(ticket, outcome)]));
    }

    fn confirm(&mut self, seq: u64) {
        self.outcome(seq, Outcome::Confirmed);
    }

    fn in_flight(&self) -> Vec<u64> {
        self.machine.in_flight.values().copied().collect()
    }

    /// Returns what was published since the last call: (seq, resend, isolated).
    fn published_how(&mut self) -> Vec<(u64, bool, bool)> {
        let publish = |action| match action {
            Action::Publish { seq, resend, isolated, .. } => Some((seq, resend, isolated)),
            _ => None,
        };
        std::mem::take(&mut self.did).into_iter().filter_map(publish).collect()
    }

    fn published(&mut self) -> Vec<u64> {
        self.published_how().into_iter().map(|(seq, ..)| seq).collect()
    }

    fn saved(&self) -> Vec<Change> {
        let saved = |action: &Action| match action {
            Action::Save(change) => Some(change.clone()),
            _ => None,
        };
        self.did.iter().filter_map(saved).collect()
    }

    fn was_quarantined(&self, seq: u64) -> bool {
        self.did.iter().any(|action| matches!(action, Action::Quarantined { seq: s, .. } if *s == seq))
    }

    fn was_parked(&self, seq: u64) -> bool {
        self.saved().iter().any(|change| matches!(change, Change::Park { seq: s, .. } if *s == seq))
    }

    /// Refuses the event until it is in quarantine.
    fn refuse_to_the_end(&mut self, seq: u64) {
        self.outcome(seq, refused());
        self.pass_to_timer();
        self.outcome(seq, refused());
    }

    fn asked_parked(&mut self) -> Vec<Key> {
        let asked = |action: &Action| match action {
            Action::LoadParked { key, .. } => Some(key.clone()),
            _ => None,
        };
        self.did.iter().filter_map(asked).collect()
    }

    fn events(&self, seqs: &[u64]) -> Vec<Loaded> {
        seqs.iter().map(|seq| self.log[usize::try_from(*seq).unwrap()].clone()).collect()
    }
}

#[test]
fn one_of_each_key_at_a_time_and_keys_beside_each_other() {
    let mut story = Story::with(settings(), &["a", "a", "b", "", "a", ""]);
    assert_eq!(story.published(), [0, 2, 3, 5]);
    story.confirm(2);
    assert_eq!(story.published(), Vec::<u64>::new());
    story.confirm(0);
    assert_eq!(story.published(), [1]);
    story.confirm(1);
    assert_eq!(story.published(), [4]);
    for seq in [5, 4, 3] {
        story.confirm(seq);
    }
    assert_eq!(story.machine.figures().position, 6);
    assert_eq!(story.saved().last(), Some(&Change::Position(6)));
    assert_eq!(story.machine.next_wake(), super::Wake::default());
}

#[test]
fn a_nacked_event_goes_again_first_and_nothing_is_spent() {
    let mut story = Story::with(settings(), &["a", "a"]);
    for _ in 0..5 {
        story.published();
        story.outcome(0, Outcome::Nacked);
        assert!(story.saved().is_empty(), "nothing is written down");
        story.pass_to_timer();
        assert_eq!(story.published_how(), [(0, true, false)]);
    }
    story.confirm(0);
    assert_eq!(story.published_how(), [(1, false, false)]);
}

#[test]
fn an_unknown_outcome_is_sent_again_and_spends_nothing() {
    let mut story = Story::with(settings(), &["a"]);
    story.published();
    story.outcome(0, Outcome::Unknown(fault(FaultClass::Outage)));
    assert!(story.saved().is_empty());
    assert_eq!(story.published_how(), [(0, true, false)]);
}

#[test]
fn refusals_end_in_quarantine_which_holds_the_key_until_it_is_redriven() {
    let mut story = Story::with(settings(), &["a", "a", "a", "b"]);
    story.published();
    story.outcome(0, refused());
    assert!(
        matches!(&story.saved()[..], [Change::PutException { seq: 0, exception, .. }, Change::Position(1)] if exception.attempts == 1)
    );
    story.pass_to_timer();
    assert_eq!(story.published_how(), [(0, true, false)], "the same event first");
    story.outcome(0, refused());
    assert!(story.was_quarantined(0) && story.was_parked(1) && story.was_parked(2));
    story.append(&["a"]);
    assert!(story.was_parked(4), "later ones wait on disk at once");
    assert_eq!(story.published(), Vec::<u64>::new());

    story.handle(Input::Redriven(Loaded::Event(entry(0, "a")), fault(FaultClass::Message)));
    assert_eq!(story.published(), [0]);
    story.confirm(0);
    assert_eq!(story.asked_parked(), [key("a")]);
    let events = story.events(&[1, 2]);
    story.handle(Input::LoadedParked { key: key("a"), events, more: true });
    story.append(&["a"]);
    assert!(story.was_parked(5), "what is behind the parked is parked");
    assert_eq!(story.published(), [1]);
    story.confirm(1);
    assert!(story.saved().contains(&Change::Unpark { key: key("a"), seq: 1 }));
    story.confirm(2);
    assert_eq!(story.asked_parked(), [key("a")], "the others, once these are done");
    let events = story.events(&[4, 5]);
    story.handle(Input::LoadedParked { key: key("a"), events, more: false });
    story.append(&["a"]);
    story.confirm(4);
    story.confirm(5);
    assert_eq!(story.published(), [2, 4, 5, 6]);
}

#[test]
fn a_discarded_event_frees_its_key() {
    let mut story = Story::with(settings(), &["a", "a"]);
    story.refuse_to_the_end(0);
    story.published();
    story.handle(Input::Discarded { seq: 0, key: Some(key("a")) });
    assert_eq!(story.asked_parked(), [key("a")]);
    let events = story.events(&[1]);
    story.handle(Input::LoadedParked { key: key("a"), events, more: false });
    assert_eq!(story.published(), [1]);
}

#[test]
fn returns_spend_the_destination_attempts_with_longer_waits() {
    let mut story = Story::with(settings(), &["a"]);
    story.outcome(0, Outcome::Returned(fault(FaultClass::Destination)));
    assert!(story.machine.next_wake().mono_ms.unwrap() >= 500, "half of ten times the first wait at least");
    story.pass_to_timer();
    story.outcome(0, Outcome::Returned(fault(FaultClass::Destination)));
    assert!(story.was_quarantined(0));
}

#[test]
fn skipping_lets_later_events_go_on() {
    let mut story =
        Story::with(Settings { on_quarantine: QuarantinePolicy::SkipEvent, ..settings() }, &["a", "a"]);
    story.published();
    story.refuse_to_the_end(0);
    assert!(story.was_quarantined(0));
    assert_eq!(story.published(), [0, 1]);
}

#[test]
fn a_scheduled_event_holds_nobody_and_comes_when_it_is_due() {
    let mut story = Story::new(settings());
    story.up();
    let due_ms = story.now.wall_ms + 500;
    story.append_entry(|entry| (entry.key, entry.not_before_ms) = (Some(key("a")), Some(due_ms)));
    story.append(&["a"]);
    assert_eq!(story.published(), [1]);
    story.confirm(1);
    assert_eq!(story.machine.figures().position, 2);
    assert_eq!(story.machine.next_wake().wall_ms, Some(due_ms));
    story.did.clear();
    story.pass(500);
    assert!(matches!(&story.did[..], [Action::LoadDue { until_ms, .. }] if *until_ms == due_ms));
    let exception = Exception { state: ExceptionState::Scheduled { due_ms }, ..retry(0) };
    let due = vec![(story.log[0].clone(), exception)];
    story.handle(Input::LoadedDue { due, resume: None, next_due_ms: None });
    assert_eq!(story.published_how(), [(0, false, false)]);
    story.confirm(0);
    assert_eq!(story.saved(), [Change::DropException { seq: 0 }]);
}

#[test]
fn expired_and_undecodable_events_are_quarantined_and_hold_nobody() {
    let mut story = Story::new(settings());
    let expires_ms = story.now.wall_ms + 10;
    story.up();
    story.handle(Input::Blocked(true));
    story.append_entry(|entry| (entry.key, entry.expires_ms) = (Some(key("a")), Some(expires_ms)));
    story.log.push(Loaded::Undecodable { seq: 1, fault: fault(FaultClass::Undecodable) });
    story.log.push(Loaded::Unpublished { seq: 2 });
    story.append(&["a"]);
    assert!(story.was_quarantined(1));
    story.pass(10);
    story.handle(Input::Blocked(false));
    assert!(story.was_quarantined(0));
    assert_eq!(story.published(), [3]);
}

#[test]
fn after_a_closed_channel_the_suspects_go_alone_one_at_a_time() {
    let mut story = Story::with(settings(), &["a", "b", ""]);
    story.published();
    story.down(FaultClass::Destination);
    story.append(&["c", "a"]);
    assert_eq!(story.published(), Vec::<u64>::new());
    story.up();
    assert_eq!(story.published_how(), [(0, true, true), (3, false, false)], "others flow");
    story.outcome(0, Outcome::Refused(fault(FaultClass::Destination)));
    assert_eq!(story.published_how(), [(1, true, true)]);
    story.confirm(1);
    assert_eq!(story.published_how(), [(2, true, true)]);
    story.outcome(2, Outcome::Unknown(fault(FaultClass::Outage)));
    assert_eq!(story.published_how(), [(2, true, true)], "that was no answer");
}

#[test]
fn an_isolated_event_keeps_its_ticket_when_the_main_channel_closes() {
    let mut story = Story::with(settings(), &["a", ""]);
    story.down(FaultClass::Message);
    story.up();
    story.published();
    let ticket = story.ticket(0);
    story.down(FaultClass::Outage);
    assert_eq!(story.in_flight(), [0]);
    story.handle(Input::Outcomes(vec![(ticket, Outcome::Confirmed)]));
    assert_eq!(story.in_flight(), Vec::<u64>::new());
    story.up();
    assert_eq!(story.published_how(), [(1, true, true)]);
}

#[test]
fn after_an_outage_all_is_sent_again_in_order() {
    let mut story = Story::with(settings(), &["a", "b", "", "a"]);
    story.published();
    let late = story.ticket(1);
    story.down(FaultClass::Outage);
    assert_eq!(story.in_flight(), Vec::<u64>::new());
    story.up();
    assert!(story.saved().is_empty());
    assert_eq!(story.published_how(), [(0, true, false), (1, true, false), (2, true, false)]);
    story.handle(Input::Outcomes(vec![(late, Outcome::Confirmed)]));
    assert_eq!(story.in_flight(), [0, 1, 2], "a late word on an old ticket says nothing");
}

#[test]
fn nothing_is_published_while_blocked_or_paused() {
    let mut story = Story::with(settings(), &[]);
    story.handle(Input::Blocked(true));
    story.append(&[""]);
    assert_eq!(story.published(), Vec::<u64>::new());
    story.handle(Input::Blocked(false));
    assert_eq!(story.published(), [0]);
    story.handle(Input::Pause);
    story.append(&[""]);
    assert_eq!(story.published(), Vec::<u64>::new());
    story.confirm(0);
    story.handle(Input::Resume);
    assert_eq!(story.published(), [1]);
}

#[test]
fn under_total_order_one_goes_at_a_time_and_the_others_wait() {
    let mut story =
        Story::with(Settings { ordering: PublishOrder::Total, ..settings() }, &["a", "b", "", "a"]);
    assert_eq!(story.published(), [0]);
    story.outcome(0, Outcome::Nacked);
    assert_eq!(story.published(), Vec::<u64>::new());
    story.pass_to_timer();
    story.outcome(0, refused());
    story.pass_to_timer();
    story.confirm(0);
    story.confirm(1);
    story.confirm(2);
    assert_eq!(story.published(), [0, 0, 1, 2, 3]);
}

#[test]
fn relaxed_order_pipelines_a_key_until_one_fails() {
    let mut story = Story::with(Settings { ordering: PublishOrder::Relaxed, ..settings() }, &["a", "a", "a"]);
    assert_eq!(story.published(), [0, 1, 2]);
    story.outcome(1, Outcome::Nacked);
    story.append(&["a"]);
    assert_eq!(story.published(), Vec::<u64>::new(), "held behind the nacked one");
    story.pass_to_timer();
    story.confirm(1);
    assert_eq!(story.published(), [1, 3]);
}

#[test]
fn the_window_holds_in_events_and_in_bytes() {
    let mut story =
        Story::with(Settings { window_events: 2, window_bytes: 100, ..settings() }, &["", "", ""]);
    assert_eq!(story.published(), [0, 1]);
    story.append_entry(|entry| entry.bytes = 500);
    story.append(&[""]);
    story.confirm(0);
    assert_eq!(story.published(), [2]);
    story.confirm(1);
    assert_eq!(story.published(), Vec::<u64>::new(), "the large one waits until it is alone");
    story.confirm(2);
    assert_eq!(story.published(), [3]);
    story.confirm(3);
    assert_eq!(story.published(), [4]);
}

#[test]
fn the_next_read_is_asked_for_when_memory_is_half_empty_and_never_more_than_fits() {
    let mut story =
        Story::new(Settings { window_events: 100, lookahead_events: 8, load_events: 8, ..settings() });
    story.answers_loads = false;
    story.up();
    story.append(&[""; 40]);
    assert_eq!(story.loads, [(0, 8, 10_000)]);
    story.answer_load(0, 8);
    assert_eq!(story.published().len(), 8);
    for seq in 0..3 {
        story.confirm(seq);
    }
    assert_eq!(story.loads.len(), 1, "more than half full");
    story.confirm(3);
    assert_eq!(story.loads.last(), Some(&(8, 4, 9_960)), "four are still in flight");
    story.answer_load(8, 4);
    assert_eq!(story.machine.figures().in_memory, 8);
}

#[test]
fn a_hot_key_that_fails_does_not_stop_the_others() {
    let mut story = Story::new(Settings { lookahead_events: 8, load_events: 8, ..settings() });
    story.up();
    story.append(&["hot"; 20]);
    story.append(&["b"]);
    story.outcome(0, Outcome::Nacked);
    assert_eq!(story.published(), [0]);
    story.handle(Input::Tick);
    assert!(story.machine.next_wake().mono_ms.unwrap() <= flow::SPILL_TIMEOUT_MS);
    for _ in 0..100 {
        if story.in_flight() == [0] {
            story.outcome(0, Outcome::Nacked);
        }
        if story.in_flight().contains(&20) {
            assert!(story.was_parked(1) && story.was_parked(19));
            return;
        }
        story.pass_to_timer();
    }
    panic!("b never goes");
}

#[test]
fn retries_beyond_what_memory_holds_wait_on_disk_and_return() {
    let mut story = Story::with(Settings { retrying_max: 1, ..settings() }, &["a", "b", "b"]);
    story.outcome(0, refused());
    story.did.clear();
    story.outcome(1, refused());
    assert!(story.did.contains(&Action::Forget { seq: 1 }) && story.was_parked(2));
    assert_eq!(story.machine.figures().in_memory, 1);
    let due_ms = story.machine.next_wake().wall_ms.expect("it is due one day");
    story.did.clear();
    story.pass(due_ms - story.now.wall_ms);
    assert!(story.did.iter().any(|action| matches!(action, Action::LoadDue { .. })));
    story.did.clear();
    // The event in memory has a row as well, and comes with the second event.
    let due = vec![(story.log[0].clone(), retry(1)), (story.log[1].clone(), retry(1))];
    story.handle(Input::LoadedDue { due, resume: None, next_due_ms: None });
    assert_eq!(story.published_how(), [(1, true, false)]);
    story.outcome(1, refused());
    assert!(story.was_quarantined(1), "its attempts were remembered");
}

#[test]
fn too_many_held_keys_stall_the_reading() {
    let mut story = Story::with(Settings { held_keys_max: 1, attempts_max: 1, ..settings() }, &["a"]);
    story.outcome(0, refused());
    story.loads.clear();
    story.append(&["b"]);
    assert!(story.loads.is_empty() && story.machine.figures().stalled);
    story.handle(Input::Discarded { seq: 0, key: Some(key("a")) });
    assert_eq!(story.published().last(), Some(&1));
    assert!(!story.machine.figures().stalled);
}

#[test]
fn a_restart_goes_on_where_the_disk_says() {
    // Event 0 is retried, 1 is quarantined and holds the key, 2 and 3 are parked behind them.
    let log: Vec<_> =
        (0..).zip(["a", "b", "a", "b"]).map(|(seq, key)| Loaded::Event(entry(seq, key))).collect();
    let recovered = Recovered {
        position: 4,
        tail: 4,
        holding: vec![(1, key("b"))],
        retrying: vec![(log[0].clone(), retry(1))],
        parked_keys: vec![key("a"), key("b")],
        ..Recovered::default()
    };
    let mut story = Story::recovered(settings(), recovered, log);
    story.up();
    story.append(&["a", "b", "c"]);
    assert!(story.was_parked(4) && story.was_parked(5));
    assert_eq!(story.published(), [6]);
    story.pass_to_timer();
    assert_eq!(story.published_how(), [(0, true, false)]);
    story.confirm(0);
    assert_eq!(story.asked_parked(), [key("a")]);
    let events = story.events(&[2, 4]);
    story.handle(Input::LoadedParked { key: key("a"), events, more: false });
    assert_eq!(story.published(), [2]);
}

/// Goal: a row ahead of the position makes no new event. Another event held the position back, so
/// the log brings the event again after a restart. No parked event may pass the event that it
/// waited for.
#[test]
fn rows_ahead_of_the_position_are_not_taken_for_new_events() {
    let log = vec![Loaded::Event(entry(0, "a")), Loaded::Exception { seq: 1 }, Loaded::Event(entry(2, "a"))];
    // Event 0 was in flight, 1 is quarantined, 2 is parked behind 0.
    let recovered = Recovered {
        tail: 3,
        holding: vec![(1, key("b"))],
        parked_ahead: vec![(key("a"), 2)],
        ..Recovered::default()
    };
    let mut story = Story::recovered(settings(), recovered, log);
    assert_eq!(story.saved(), [Change::Unpark { key: key("a"), seq: 2 }]);
    story.up();
    assert_eq!(story.published(), [0]);
    story.confirm(0);
    assert_eq!(story.published(), [2]);
    story.confirm(2);
    assert_eq!(story.machine.figures().position, 3);
}

/// Goal: a retry that waits on disk frees its key if its record becomes unreadable. Otherwise
/// nothing would ever free the key.
#[test]
fn a_record_that_rots_while_it_holds_its_key_frees_it() {
    let recovered = Recovered {
        position: 1,
        tail: 1,
        holding: vec![(0, key("a"))],
        next_due_ms: Some(0),
        ..Recovered::default()
    };
    let mut story = Story::recovered(settings(), recovered, vec![Loaded::Event(entry(0, "a"))]);
    story.up();
    story.append(&["a"]);
    assert!(story.was_parked(1));
    story.did.clear();
    let rotten = Loaded::Undecodable { seq: 0, fault: fault(FaultClass::Undecodable) };
    story.handle(Input::LoadedDue { due: vec![(rotten, retry(1))], resume: None, next_due_ms: None });
    assert!(story.was_quarantined(0));
    assert_eq!(story.asked_parked(), [key("a")]);
}

/// Goal: parked events that arrive too late go back to disk. After the request for them, an earlier
/// event of their key had to wait on disk for room. If they had stayed in memory and filled it, the
/// earlier event would never have come.
#[test]
fn parked_events_that_come_too_late_go_back_to_disk() {
    let small = Settings { lookahead_events: 1, retrying_max: 1, attempts_max: 1, ..settings() };
    let log: Vec<_> = (0..).zip(["a", "a", ""]).map(|(seq, key)| Loaded::Event(entry(seq, key))).collect();
    let recovered = Recovered { position: 2, tail: 2, parked_keys: vec![key("a")], ..Recovered::default() };
    let mut story = Story::recovered(small, recovered, log);
    story.up();
    assert_eq!(story.asked_parked(), [key("a")]);
    // The event has not held its key until now, for example because it had expired.
    story.handle(Input::Redriven(Loaded::Event(entry(0, "a")), fault(FaultClass::Message)));
    story.did.clear();
    let events = story.events(&[1]);
    story.handle(Input::LoadedParked { key: key("a"), events, more: false });
    assert!(story.did.contains(&Action::Forget { seq: 1 }));
    assert!(story.did.iter().any(|action| matches!(action, Action::LoadDue { .. })), "there is room for it");
}

#[test]
fn what_is_parked_while_the_answer_is_out_is_asked_for_afterwards() {
    let mut story = Story::with(settings(), &["a", "a"]);
    story.refuse_to_the_end(0);
    story.handle(Input::Discarded { seq: 0, key: Some(key("a")) });
    assert_eq!(story.asked_parked(), [key("a")]);
    story.append(&["a"]);
    assert!(story.was_parked(2));
    // The worker read the events before that.
    let events = story.events(&[1]);
    story.handle(Input::LoadedParked { key: key("a"), events, more: false });
    story.did.clear();
    story.confirm(1);
    assert_eq!(story.asked_parked(), [key("a")]);
}

#[test]
fn several_retries_of_a_key_go_one_by_one_after_a_restart() {
    let log: Vec<_> = (0..).zip(["a", "a", "a"]).map(|(seq, key)| Loaded::Event(entry(seq, key))).collect();
    let retrying = log[..2].iter().map(|loaded| (loaded.clone(), retry(0))).collect();
    let recovered = Recovered { position: 2, tail: 3, retrying, ..Recovered::default() };
    let mut story = Story::recovered(settings(), recovered, log);
    story.up();
    story.pass(1000);
    assert_eq!(story.published(), [0]);
    story.confirm(0);
    story.confirm(1);
    assert_eq!(story.published(), [1, 2]);
}

#[test]
fn redriving_more_than_memory_holds_leaves_the_rest_on_disk() {
    let small = Settings { lookahead_events: 2, attempts_max: 1, retrying_max: 1, ..settings() };
    let mut story = Story::with(small, &["", "", "", "", ""]);
    for seq in 0..5 {
        story.outcome(seq, refused());
    }
    story.down(FaultClass::Outage);
    for seq in 0..5 {
        story.handle(Input::Redriven(Loaded::Event(entry(seq, "")), fault(FaultClass::Message)));
    }
    assert_eq!(story.machine.figures().in_memory, 2);
    story.did.clear();
    story.up();
    assert_eq!(story.in_flight(), [0, 1]);
    story.confirm(0);
    assert!(story.did.iter().any(|action| matches!(action, Action::LoadDue { .. })));
}

fn missing() -> Fault {
    Fault::with_code(FaultClass::Destination, 404, "NOT_FOUND - no exchange 'gone' in vhost '/'")
}

/// Goal: one close has one poison message, which stays isolated. If it were retried among others,
/// the broker would close the channel again, with all of them. The remaining events in flight then
/// are innocent.
#[test]
fn one_close_has_one_poison_message_which_stays_alone() {
    let mut story = Story::new(Settings { attempts_max: 3, destination_attempts_max: 3, ..settings() });
    story.up();
    story.append(&["a", "b"]);
    story.append_entry(|entry| (entry.key, entry.exchange) = (Some(key("c")), "gone".into()));
    story.append(&["d"]);
    assert_eq!(story.published(), [0, 1, 2, 3]);
    story.handle(Input::Down { fault: missing() });
    story.up();
    assert_eq!(story.published_how(), [(2, true, true)], "the likeliest first");
    story.outcome(2, Outcome::Refused(missing()));
    assert_eq!(
        story.published_how(),
        [(0, true, false), (1, true, false), (3, true, false)],
        "the others are cleared"
    );
    story.pass_to_timer();
    assert_eq!(story.published_how(), [(2, true, true)], "alone, also the next time");
    story.outcome(2, Outcome::Unknown(fault(FaultClass::Outage)));
    assert_eq!(story.published_how(), [(2, true, true)], "nothing was said of it");
    story.outcome(2, Outcome::Confirmed);
    for seq in [0, 1, 3] {
        story.confirm(seq);
    }
    assert_eq!(story.machine.figures().position, 4);
}

/// Goal: a missing exchange is probed by one event at a time, on behalf of all, because each event
/// for it costs the broker a channel.
#[test]
fn a_missing_exchange_is_asked_for_by_one_event_at_a_time() {
    let to_gone = |story: &mut Story, name: &str| {
        story.append_entry(|entry| (entry.key, entry.exchange) = (Some(key(name)), "gone".into()));
    };
    let mut story = Story::new(Settings { destination_attempts_max: 9, ..settings() });
    story.up();
    to_gone(&mut story, "a");
    story.handle(Input::Down { fault: missing() });
    story.up();
    story.outcome(0, Outcome::Refused(missing()));
    story.did.clear();
    to_gone(&mut story, "b");
    to_gone(&mut story, "c");
    story.append(&["d"]);
    let exception = |change: &Change| match change {
        Change::PutException { seq, exception, .. } => {
            Some((*seq, exception.destination_attempts, exception.fault.clone()))
        }
        _ => None,
    };
    let put: Vec<_> = story.saved().iter().filter_map(exception).collect();
    assert_eq!(put, [(1, 1, Some(missing())), (2, 1, Some(missing()))], "they fail with their exchange");
    assert_eq!(story.published(), [3]);
    // The first due event probes again. After a confirm, all events go.
    story.pass_to_timer();
    let probe = story.published_how();
    assert!(matches!(probe[..], [(_, _, true)]), "{probe:?}");
    story.confirm(probe[0].0);
    story.pass(2000);
    let all: Vec<_> = story.published_how().into_iter().map(|(seq, _, alone)| (seq, alone)).collect();
    assert_eq!(all.len(), 2, "{all:?}");
}

/// Goal: a new event probes an exchange that was missing. Once the probing event failed by the
/// probe itself, so nothing was published and the exchange stayed closed for ever.
#[test]
fn a_new_event_asks_for_an_exchange_that_was_missing() {
    let mut story = Story::new(Settings { destination_attempts_max: 1, ..settings() });
    let to_gone = |story: &mut Story, name: &str| {
        story.append_entry(|entry| (entry.key, entry.exchange) = (Some(key(name)), "gone".into()));
    };
    story.up();
    to_gone(&mut story, "a");
    story.handle(Input::Down { fault: missing() });
    story.up();
    story.outcome(0, Outcome::Refused(missing()));
    story.did.clear();
    story.pass(60_000);
    to_gone(&mut story, "b");
    to_gone(&mut story, "c");
    assert_eq!(story.published_how(), [(1, false, true)], "one asks, the other waits for the answer");
    // Neither a missing answer nor a wait fails an event.
    let unknown = || Outcome::Unknown(Fault::new(FaultClass::Outage, "no confirm"));
    story.outcome(1, unknown());
    story.pass(60_000);
    assert_eq!(story.published_how().iter().map(|(_, _, alone)| *alone).collect::<Vec<_>>(), [true]);
    assert_eq!(
        story.saved().iter().filter(|change| matches!(change, Change::PutException { .. })).count(),
        0
    );
    story.outcome(1, Outcome::Confirmed);
    assert_eq!(story.published_how(), [(2, false, false)], "the others go among the rest");
}

/// Goal: a forbidden routing key of an exchange does not close its other routing keys.
#[test]
fn one_forbidden_topic_does_not_close_its_exchange() {
    let mut story = Story::new(settings());
    let to_exchange = |story: &mut Story, name: &str| {
        story.append_entry(|entry| (entry.key, entry.exchange) = (Some(key(name)), "x".into()));
    };
    story.up();
    to_exchange(&mut story, "a");
    let text =
        "ACCESS_REFUSED - write access to topic 'a.b' in exchange 'x' in vhost '/' refused for user 'u'";
    let forbidden = Fault::with_code(FaultClass::Destination, 403, text);
    story.handle(Input::Down { fault: forbidden.clone() });
    story.up();
    story.outcome(0, Outcome::Refused(forbidden));
    story.did.clear();
    to_exchange(&mut story, "b");
    assert_eq!(story.published_how(), [(1, false, false)]);
}

/// Goal: an event as large as a message that was too large goes alone.
#[test]
fn what_is_as_large_as_what_was_too_large_goes_alone() {
    let mut story = Story::with(settings(), &["a"]);
    story.append_entry(|entry| entry.bytes = 900);
    story.published();
    story.down(FaultClass::Message);
    story.up();
    assert_eq!(story.published_how(), [(1, true, true)], "the largest is the likeliest");
    let too_large = Fault::with_code(FaultClass::Message, 406, "PRECONDITION_FAILED - message size");
    story.outcome(1, Outcome::Refused(too_large));
    assert_eq!(story.published_how(), [(0, true, false)]);
    story.append_entry(|entry| entry.bytes = 900);
    assert_eq!(story.published_how(), [(2, false, true)]);
    story.append(&[""]);
    assert_eq!(story.published_how(), [(3, false, false)]);
    story.confirm(2);
    story.append_entry(|entry| entry.bytes = 900);
    assert_eq!(story.published_how(), [(4, false, false)], "the broker takes it now");
}

/// Goal: the position does not stay behind for a waiting event. One event for a full queue once
/// held the position. It also held trimming, the backlog's figure, and everything that a crash
/// would have published again.
#[test]
fn the_position_does_not_stay_behind_for_an_event_that_waits() {
    let small = Settings { lookahead_events: 4, load_events: 4, backoff_first_ms: 5000, ..settings() };
    let mut story = Story::new(small);
    story.up();
    story.append(&["full", "full"]);
    story.append(&[""; 40]);
    story.outcome(0, Outcome::Nacked);
    for _ in 0..100 {
        story.in_flight().first().copied().into_iter().for_each(|seq| story.confirm(seq));
    }
    assert_eq!(story.machine.figures().position, 42);
    assert!(story.was_parked(1));
    let row = story.saved().into_iter().find_map(|change| match change {
        Change::PutException { seq: 0, exception, .. } => Some(exception),
        _ => None,
    });
    let row = row.expect("it has a row");
    assert_eq!((row.attempts, row.destination_attempts), (0, 0), "nothing is spent");
    story.did.clear();
    story.pass_to_timer();
    assert_eq!(story.published(), [0]);
}

/// Goal: the rate limit holds resends too, wakes only while something is ready, and never delays a
/// stop.
#[test]
fn a_rate_limit_counts_resends_and_wakes_nobody_for_nothing() {
    let mut story = Story::new(Settings { rate_limit: Some(20), ..settings() }); // two at once, then one each 50 ms
    story.up();
    story.append(&["", "", ""]);
    assert_eq!(story.published(), [0, 1]);
    let wake = |story: &Story| story.machine.next_wake().mono_ms;
    assert_eq!(wake(&story), Some(50));
    story.outcome(0, Outcome::Unknown(fault(FaultClass::Outage)));
    story.pass(49);
    assert_eq!(story.published(), Vec::<u64>::new());
    story.pass(1);
    assert_eq!(story.published_how(), [(0, true, false)]);
    story.handle(Input::Pause);
    assert_eq!(wake(&story), None, "paused");
    story.handle(Input::Resume);
    story.pass(50);
    assert_eq!(story.published(), [2]);
    for seq in 0..3 {
        story.confirm(seq);
    }
    assert_eq!(story.machine.next_wake(), super::Wake::default(), "idle");
}

/// Goal: a high rate costs few wake-ups. Method: far more is ready than a burst. The machine wakes
/// once half a burst may go, and later for the few remaining events.
#[test]
fn a_rate_limit_wakes_for_half_a_burst() {
    let many = Settings {
        window_events: 400,
        window_bytes: 100_000,
        lookahead_events: 400,
        load_events: 400,
        ..settings()
    };
    let mut story = Story::new(Settings { rate_limit: Some(1_000), ..many }); // a hundred at once, then one each millisecond
    story.up();
    story.append(&[""; 190]);
    assert_eq!(story.published().len(), 100);
    for (wakes_at_ms, goes) in [(50, 50), (90, 40)] {
        assert_eq!(story.machine.next_wake().mono_ms, Some(wakes_at_ms));
        story.pass_to_timer();
        assert_eq!(story.published().len(), goes);
    }
}

/// Goal: expired events go at once when room is wanted, wherever they wait. Events in flight stay,
/// and a second search looks only at new events. Method: one event in flight, one behind its key,
/// one in the log, one parked.
#[test]
fn a_scan_takes_out_what_has_expired() {
    use super::types::{ExpiredEvent, ExpiredPlace, ScanAt};
    let mut story = Story::new(settings());
    story.up();
    let expires = |story: &mut Story, name: &str, at: u64| {
        story.append_entry(|entry| (entry.key, entry.expires_ms) = (Some(key(name)), Some(1_000_000 + at)));
    };
    expires(&mut story, "a", 50);
    expires(&mut story, "a", 50);
    expires(&mut story, "a", 500);
    story.pass(100);
    story.did.clear();
    story.handle(Input::LetExpiredGo);
    assert!(story.was_quarantined(1) && !story.was_quarantined(0) && !story.was_quarantined(2));
    let until_ms = 1_000_100;
    let find = |at| Action::FindExpired { at, until_ms, events_max: 16 };
    assert_eq!(story.did.last(), Some(&find(ScanAt::Due(None))));
    story.handle(Input::LetExpiredGo);
    assert_eq!(story.did.iter().filter(|action| matches!(action, Action::FindExpired { .. })).count(), 1);
    let event = |seq, place| ExpiredEvent { seq, key: Some(key("z")), place };
    let found = vec![event(7, ExpiredPlace::Log), event(0, ExpiredPlace::Log), event(1, ExpiredPlace::Log)];
    let answer = |found, next, to| Input::FoundExpired { found, next, to, earliest_ms: None };
    story.handle(answer(Vec::new(), Some(ScanAt::Log(0)), 0));
    assert_eq!(story.did.last(), Some(&find(ScanAt::Log(3))), "what the log has brought is known");
    story.did.clear();
    story.handle(answer(found, None, 8));
    assert!(story.was_quarantined(7) && !story.was_quarantined(0) && !story.was_quarantined(1));
    assert_eq!(story.did.last(), Some(&Action::Scanned { to: 8, earliest_ms: Some(1_000_050) }));
    story.confirm(0);
    story.confirm(2);
    story.handle(Input::LetExpiredGo);
    assert_eq!(
        story.did.last(),
        Some(&find(ScanAt::Due(None))),
        "what was in flight had expired: looked for again"
    );
    story.handle(answer(Vec::new(), None, 8));
    story.handle(Input::LetExpiredGo);
    assert_eq!(story.did.last(), Some(&find(ScanAt::Log(8))));
}
