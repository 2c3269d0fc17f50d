//! The figures of a relay against a naive computation over every event's state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::Stats;
use crate::delivery::types::{Change, Exception, ExceptionState, Key};
use crate::event::Event;
use crate::storage::tables::schema::LOG;
use crate::store::{Retention, StartAt, Store};
use crate::time::{Clock, Deadline, Now};

#[derive(Debug)]
struct Hands {
    mono_ms: AtomicU64,
    wall_ms: AtomicU64,
}

impl Hands {
    fn at(wall_ms: u64) -> Arc<Self> {
        Arc::new(Self { mono_ms: AtomicU64::new(7), wall_ms: AtomicU64::new(wall_ms) })
    }

    fn pass(&self, ms: u64) {
        self.mono_ms.fetch_add(ms, Relaxed);
        self.wall_ms.fetch_add(ms, Relaxed);
    }
}

impl Clock for Hands {
    fn now(&self) -> Now {
        Now { mono_ms: self.mono_ms.load(Relaxed), wall_ms: self.wall_ms.load(Relaxed) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// No row: the event is to be published if the position has not passed it. Otherwise it is
    /// confirmed.
    Plain,
    Retrying,
    Scheduled,
    Parked,
    Quarantined,
    Discarded,
}

struct Model {
    random: u64,
    clock: Arc<Hands>,
    store: Store,
    position: u64,
    states: Vec<State>,
    times: Vec<u64>,
    changes: Vec<Change>,
}

const RELAY: &str = "r";

fn key_of(seq: u64) -> Key {
    Key::from(format!("k{}", seq % 3))
}

fn put(seq: u64, state: ExceptionState) -> Change {
    let exception = Exception { state, attempts: 1, destination_attempts: 0, fault: None };
    Change::PutException { seq, key: Some(key_of(seq)), exception }
}

impl Model {
    fn below(&mut self, end: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % end
    }

    fn len(&self) -> u64 {
        self.states.len() as u64
    }

    fn append(&mut self) {
        let seq = self.len();
        let payload = vec![7; usize::try_from(self.below(300)).unwrap()];
        let event = Event::bytes("t", payload).key(&*key_of(seq)).to("e", "r");
        self.store.write(move |tx| tx.append(event.clone())).unwrap();
        self.states.push(State::Plain);
        self.times.push(self.clock.now().wall_ms);
    }

    /// Moves one event to another state, as the machine might.
    fn change_one(&mut self) {
        let seq = self.below(self.len());
        let at = usize::try_from(seq).unwrap();
        let due_ms = self.below(1_000_000);
        let (state, choice) = (self.states[at], self.below(6));
        if state == State::Discarded || (state == State::Plain && seq < self.position) {
            return;
        }
        let next = match choice {
            0 if state == State::Quarantined => State::Discarded,
            0 => State::Quarantined,
            1 => State::Retrying,
            2 => State::Scheduled,
            3 if state != State::Quarantined => State::Parked,
            4 if state != State::Quarantined => State::Plain,
            _ => return,
        };
        let has_row = matches!(state, State::Retrying | State::Scheduled | State::Quarantined);
        match next {
            State::Retrying => self.changes.push(put(seq, ExceptionState::Retry { due_ms })),
            State::Scheduled => self.changes.push(put(seq, ExceptionState::Scheduled { due_ms })),
            State::Discarded => self.changes.push(put(seq, ExceptionState::Discarded)),
            State::Quarantined => {
                self.changes.push(put(seq, ExceptionState::Quarantined { at_ms: due_ms, holds_key: true }));
            }
            State::Parked if state != State::Parked => {
                self.changes.push(Change::Park { key: key_of(seq), seq });
                self.changes.extend(has_row.then_some(Change::DropException { seq }));
            }
            State::Plain if has_row => self.changes.push(Change::DropException { seq }),
            State::Parked | State::Plain => {}
        }
        if state == State::Parked && next != State::Parked {
            self.changes.push(Change::Unpark { key: key_of(seq), seq });
        }
        self.states[at] = next;
    }

    fn flush(&mut self) {
        let confirmed = self.below(3);
        self.store.core().progress().add(RELAY, &mut self.changes, confirmed);
        self.store.flush_progress(Deadline::Never).unwrap();
    }

    /// Moves the position; discarded events below it have no row any more.
    fn move_on(&mut self) {
        self.position += self.below(self.len() - self.position + 1);
        self.changes.push(Change::Position(self.position));
        self.flush();
        for state in &mut self.states[..usize::try_from(self.position).unwrap()] {
            *state = if *state == State::Discarded { State::Plain } else { *state };
        }
    }

    fn reopen(self, path: &std::path::Path) -> Self {
        let (store, clock) = (self.store, Arc::clone(&self.clock));
        store.close().unwrap();
        clock.pass(10);
        Self { store: open(path, &clock), ..self }
    }

    fn check(&self) {
        let stats = self.store.stats().unwrap();
        let now_ms = self.clock.now().wall_ms;
        let tx = self.store.core().begin_read().unwrap();
        let log = tx.open_table(LOG).unwrap();
        let bytes = |seq: u64| log.get(seq).unwrap().unwrap().value().len() as u64;
        let waits = |(at, state): (usize, &State)| {
            let waits = matches!(state, State::Retrying | State::Scheduled | State::Parked);
            let seq = at as u64;
            (waits || (*state == State::Plain && seq >= self.position)).then_some(seq)
        };
        let backlog: Vec<_> = self.states.iter().enumerate().filter_map(waits).collect();
        let of = |wanted: State| -> Vec<u64> {
            (0..self.len()).filter(|seq| self.states[usize::try_from(*seq).unwrap()] == wanted).collect()
        };
        let figures = |seqs: &[u64]| {
            let first = seqs.first().copied();
            (seqs.len() as u64, first.map(|seq| now_ms - self.times[usize::try_from(seq).unwrap()]))
        };
        let relay = &stats.relays[RELAY];
        assert_eq!((relay.backlog_events, relay.backlog_age_ms), figures(&backlog));
        assert_eq!(relay.backlog_first, backlog.first().copied());
        assert_eq!(relay.backlog_bytes, backlog.iter().map(|seq| bytes(*seq)).sum::<u64>());
        assert_eq!((relay.retrying, relay.retrying_age_ms), figures(&of(State::Retrying)));
        assert_eq!((relay.scheduled, relay.scheduled_age_ms), figures(&of(State::Scheduled)));
        assert_eq!((relay.parked, relay.parked_age_ms), figures(&of(State::Parked)));
        assert_eq!(relay.quarantined, of(State::Quarantined).len() as u64);
        assert_eq!((stats.backlog_events, stats.backlog_bytes), (relay.backlog_events, relay.backlog_bytes));
        assert_eq!(stats.backlog_age_ms, relay.backlog_age_ms);
    }
}

fn open(path: &std::path::Path, clock: &Arc<Hands>) -> Store {
    let builder = Store::builder().clock(Arc::clone(clock) as _).retention(Retention::forever());
    builder.open(path).unwrap()
}

/// Goal: backlog, ages and the figures of what waits equal a computation over all events, whatever
/// the order of changes, and after another opening. The changes are: parked, deferred, quarantined,
/// redriven, discarded and confirmed. Method: random changes of one cursor.
#[test]
fn the_figures_are_those_of_a_naive_computation() {
    for seed in 0..12 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let clock = Hands::at(1_700_000_000_000);
        let store = open(&path, &clock);
        store.cursor(RELAY, StartAt::Oldest).unwrap();
        let (states, times, changes) = (Vec::new(), Vec::new(), Vec::new());
        let mut model = Model { random: seed, clock, store, position: 0, states, times, changes };
        for _ in 0..60 {
            model.clock.pass(1 + seed);
            model.append();
            for _ in 0..model.below(5) {
                model.change_one();
            }
            model.flush();
            if model.below(4) == 0 {
                model.move_on();
            }
            if model.below(20) == 0 {
                model = model.reopen(&path);
            }
            model.check();
        }
    }
}

/// Goal: an age is neither missing nor absurd when the wall clock jumps, in either direction.
/// Method: events stamped in 2099 and in 1970, the clock set right, time that passes, and a second
/// opening.
#[test]
fn an_age_survives_a_jump_of_the_wall_clock() {
    const NOW: u64 = 1_800_000_000_000;
    let age = |store: &Store| store.stats().unwrap().backlog_age_ms;
    for stamped in [4_070_908_800_000, 0] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let clock = Hands::at(stamped);
        let store = open(&path, &clock);
        assert_eq!(age(&store), None, "nothing waits");
        store.write(|tx| tx.append(Event::bytes("t", "1").to("e", "r"))).unwrap();
        clock.wall_ms.store(NOW, Relaxed);
        clock.pass(5_000);
        let reported = age(&store).unwrap();
        assert!(reported <= 5_000, "{reported} ms of an event that is 5 s old");
        store.close().unwrap();
        let store = open(&path, &clock);
        clock.pass(3_000);
        assert!(age(&store).unwrap() >= 3_000, "it is older than the opening");
    }
}

/// Goal: what `stats` reads is bounded, and the age is exact once later calls have passed the rows
/// in the way. Method: the only event that is tried again stands behind more quarantined events
/// than one call reads.
#[test]
fn a_search_for_the_oldest_is_bounded_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Hands::at(1_800_000_000_000);
    let store = open(&folder.path().join("a.redb"), &clock);
    store.cursor(RELAY, StartAt::Oldest).unwrap();
    let rows = crate::limits::STATS_ROWS_MAX as u64 * 2;
    store
        .write(move |tx| {
            (0..=rows).try_for_each(|_| tx.append(Event::bytes("t", "1").to("e", "r")).map(drop))
        })
        .unwrap();
    let quarantined = ExceptionState::Quarantined { at_ms: 1, holds_key: false };
    let mut changes: Vec<_> = (1..rows).map(|seq| put(seq, quarantined)).collect();
    for seq in [0, rows] {
        changes.push(put(seq, ExceptionState::Retry { due_ms: 1 }));
    }
    changes.push(Change::Position(rows + 1));
    store.core().progress().add(RELAY, &mut changes, 0);
    store.flush_progress(Deadline::Never).unwrap();
    let first = |stats: Stats| stats.relays[RELAY].backlog_first;
    assert_eq!(first(store.stats().unwrap()), Some(0));
    store.core().progress().add(RELAY, &mut vec![Change::DropException { seq: 0 }], 1);
    store.flush_progress(Deadline::Never).unwrap();
    let found: BTreeMap<_, _> = (0..4).map(|call| (call, first(store.stats().unwrap()).unwrap())).collect();
    assert!(found[&0] < rows, "the first call stops on its way: {found:?}");
    assert_eq!(found[&3], rows, "{found:?}");
}
