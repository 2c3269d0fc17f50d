//! Projections: each event in the tables exactly once, whatever stops, fails or is rebuilt in between.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::MemoryBroker;
use onewrite::redb::{Database, ReadableTable, ReadableTableMetadata, TableDefinition};
use onewrite::{
    Error, Event, EventFilter, ExpectedRevision, FailurePolicy, Projection, ProjectionState, Receipt, Result,
    StartAt, Store,
};
use proptest::prelude::*;

use crate::scratch::crash_copy;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
/// By payload: the sum of the factors of all versions that applied it.
const SUMS: TableDefinition<'_, u64, u64> = TableDefinition::new("sums");
/// Sequence number to how often it was applied.
const TIMES: TableDefinition<'_, u64, u64> = TableDefinition::new("times");

const TIMEOUT: Duration = Duration::from_secs(20);

fn append(store: &Store, n: u8) -> Receipt {
    store.write(move |tx| tx.append(Event::bytes("counted", [n]).unpublished()).map(drop)).unwrap()
}

/// Where a handler is to be stopped for a while.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<(Option<u64>, bool)>,
    changed: Condvar,
}

impl Gate {
    /// In the handler: stands here for as long as the gate is shut for this event.
    fn pass(&self, seq: u64) {
        let mut state = self.state.lock().unwrap();
        while state.0 == Some(seq) {
            state.1 = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap();
        }
    }

    fn shut_at(&self, seq: u64) {
        *self.state.lock().unwrap() = (Some(seq), false);
    }

    fn await_reached(&self) {
        let mut state = self.state.lock().unwrap();
        while !state.1 {
            let (next, timeout) = self.changed.wait_timeout(state, TIMEOUT).unwrap();
            assert!(!timeout.timed_out(), "the handler never came to the gate");
            state = next;
        }
    }

    fn open(&self) {
        self.state.lock().unwrap().0 = None;
        self.changed.notify_all();
    }
}

/// Sums, with the version as factor, and counts how often each event came.
fn summing(store: &Store, version: u32, gate: &Arc<Gate>) -> Projection {
    let gate = Arc::clone(gate);
    let builder = store.projection("sums").table(SUMS).table(TIMES).version(version).batch(3);
    let builder = builder.batch_delay(Duration::ZERO);
    builder
        .spawn(move |event, tx| {
            gate.pass(event.seq());
            let n = u64::from(event.payload()[0]);
            let (mut sums, mut times) = (tx.open_table(SUMS)?, tx.open_table(TIMES)?);
            let sum = sums.get(n)?.map_or(0, |row| row.value());
            sums.insert(n, sum + u64::from(version))?;
            let seen = times.get(event.seq())?.map_or(0, |row| row.value());
            times.insert(event.seq(), seen + 1)?;
            Ok(())
        })
        .unwrap()
}

fn table(store: &Store, definition: TableDefinition<'_, u64, u64>) -> BTreeMap<u64, u64> {
    let Ok(table) = store.read().unwrap().open_table(definition) else { return BTreeMap::new() };
    table.iter().unwrap().map(|row| row.unwrap()).map(|(key, value)| (key.value(), value.value())).collect()
}

/// The tables as the model has them.
fn agree(store: &Store, events: &[u8], version: u32) {
    let mut sums = BTreeMap::new();
    for n in events {
        *sums.entry(u64::from(*n)).or_default() += u64::from(version);
    }
    assert_eq!(table(store, SUMS), sums);
    assert_eq!(table(store, TIMES), (0..events.len() as u64).map(|seq| (seq, 1)).collect());
}

#[derive(Debug, Clone)]
enum Op {
    Append(Vec<u8>),
    /// Wait until it has caught up, and look.
    CatchUp,
    Rebuild,
    /// A rebuild is asked for and cancelled at once; where the tables are of an earlier version, another is asked for. The process may
    /// die in between.
    Cancel {
        dies: bool,
    },
    /// A rebuild beside a writer that does not pause until it has ended.
    RebuildUnderLoad,
    /// Stop and start, with the version so much higher.
    Restart(u32),
    Reopen(u32),
    /// The process dies while the handler is at the newest event but so many.
    Crash {
        back: u64,
        during_rebuild: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop::collection::vec(0..4_u8, 1..9).prop_map(Op::Append),
        3 => Just(Op::CatchUp),
        1 => Just(Op::Rebuild),
        1 => any::<bool>().prop_map(|dies| Op::Cancel { dies }),
        1 => Just(Op::RebuildUnderLoad),
        1 => (0..2_u32).prop_map(Op::Restart),
        1 => (0..2_u32).prop_map(Op::Reopen),
        2 => (0..6_u64, any::<bool>()).prop_map(|(back, during_rebuild)| Op::Crash { back, during_rebuild }),
    ]
}

struct Running {
    store: Store,
    projection: Projection,
    gate: Arc<Gate>,
    version: u32,
}

impl Running {
    fn start(path: &Path, version: u32) -> Self {
        let store = Store::open(path).unwrap();
        let gate = Arc::<Gate>::default();
        let projection = summing(&store, version, &gate);
        Self { store, projection, gate, version }
    }

    fn cancel(self, folder: &Path, dies: bool) -> Self {
        self.projection.rebuild();
        self.projection.cancel_rebuild().unwrap();
        let running = if dies {
            let copy = crash_copy(&self.store, folder);
            self.projection.stop(TIMEOUT);
            Self::start(&copy, self.version)
        } else {
            self
        };
        // What was cancelled may have been the version that runs.
        if running.store.stats().unwrap().projections["sums"].cancelled.is_some() {
            running.projection.rebuild();
        }
        running
    }

    /// What was appended meanwhile.
    fn rebuild_under_load(&self) -> Vec<u8> {
        let stop = Arc::new(AtomicBool::new(false));
        let (store, stops) = (self.store.clone(), Arc::clone(&stop));
        let writer = std::thread::spawn(move || {
            let mut appended = Vec::new();
            while !stops.load(Ordering::SeqCst) {
                append(&store, 1);
                appended.push(1);
            }
            appended
        });
        self.projection.rebuild();
        let ended = self.projection.wait_until_live(TIMEOUT);
        stop.store(true, Ordering::SeqCst);
        let appended = writer.join().unwrap();
        ended.unwrap();
        appended
    }

    fn crash(self, folder: &Path, events: &mut Vec<u8>, back: u64, during_rebuild: bool) -> Self {
        self.projection.wait_until_live(TIMEOUT).unwrap();
        let at = if during_rebuild && !events.is_empty() {
            let at = (events.len() as u64 - 1).saturating_sub(back);
            self.gate.shut_at(at);
            self.projection.rebuild();
            at
        } else {
            let at = events.len() as u64 + back;
            self.gate.shut_at(at);
            let store = self.store.clone();
            // All in one: the projection holds the pen while the gate is shut.
            store
                .write(move |tx| {
                    for _ in 0..=back {
                        tx.append(Event::bytes("counted", [7]).unpublished())?;
                    }
                    Ok(())
                })
                .unwrap();
            events.extend((0..=back).map(|_| 7));
            at
        };
        assert!(at < events.len() as u64);
        self.gate.await_reached();
        let copy = crash_copy(&self.store, folder);
        self.gate.open();
        self.projection.stop(TIMEOUT);
        Self::start(&copy, self.version)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Goal: whatever comes, once it has caught up the tables are those of a fold over all events. Method: random
    /// appends, rebuilds, new versions, clean restarts, and deaths in the middle of a batch, live or of a rebuild.
    #[test]
    fn the_tables_are_a_fold_of_the_log(ops in prop::collection::vec(op(), 1..14)) {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Vec::new();
        let mut running = Running::start(&folder.path().join("a.redb"), 1);
        for op in ops {
            match op {
                Op::Append(batch) => for n in batch {
                    append(&running.store, n);
                    events.push(n);
                },
                Op::CatchUp => {
                    running.projection.wait_until_live(TIMEOUT).unwrap();
                    agree(&running.store, &events, running.version);
                }
                Op::Rebuild => running.projection.rebuild(),
                Op::Cancel { dies } => running = running.cancel(folder.path(), dies),
                Op::RebuildUnderLoad => events.extend(running.rebuild_under_load()),
                Op::Restart(up) => {
                    running.projection.stop(TIMEOUT);
                    running.version += up;
                    running.projection = summing(&running.store, running.version, &running.gate);
                }
                Op::Reopen(up) => {
                    running.projection.stop(TIMEOUT);
                    let path = running.store.path().to_owned();
                    running.store.close().unwrap();
                    running = Running::start(&path, running.version + up);
                }
                Op::Crash { back, during_rebuild } => {
                    running = running.crash(folder.path(), &mut events, back, during_rebuild);
                }
            }
        }
        running.projection.wait_until_live(TIMEOUT).unwrap();
        agree(&running.store, &events, running.version);
    }
}

/// Goal: a filter lets pass what it does not take, without a commit for it, and the position passes it all the same, also
/// over a restart. Method: 5,000 events of which three are wanted; count commits.
#[test]
fn what_the_filter_lets_pass_costs_no_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let wanted = |n: u64| n % 2000 == 7;
    for chunk in 0..50 {
        store
            .write(move |tx| {
                for n in chunk * 100..(chunk + 1) * 100 {
                    let event_type = if wanted(n) { "wanted" } else { "other" };
                    tx.append(Event::bytes(event_type, "").unpublished())?;
                }
                Ok(())
            })
            .unwrap();
    }
    let seen = Arc::new(Mutex::new(Vec::new()));
    let run = || {
        let seen = Arc::clone(&seen);
        let filter = EventFilter::all().event_type("wanted");
        store
            .projection("wanted")
            .table(TIMES)
            .filter(filter)
            .spawn(move |event, _| {
                seen.lock().unwrap().push(event.seq());
                Ok(())
            })
            .unwrap()
    };
    let before = store.stats().unwrap().commits;
    let projection = run();
    projection.wait_until_live(TIMEOUT).unwrap();
    let commits = store.stats().unwrap().commits - before;
    assert!(commits <= 1 + 3 + 3, "made, three events, every 4,096 that pass, and once when idle: {commits}");
    assert_eq!(*seen.lock().unwrap(), [7, 2007, 4007]);
    projection.stop(TIMEOUT);
    assert_eq!(store.stats().unwrap().projections["wanted"].position, 5000, "written at the end");
    run().wait_until_live(TIMEOUT).unwrap();
    assert_eq!(seen.lock().unwrap().len(), 3, "nothing was given a second time");
}

/// Goal: batches. Method: 1,000 events at once make four commits of 256, not 1,000.
#[test]
fn a_batch_is_one_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    store
        .write(|tx| {
            (0..1000_u64)
                .try_for_each(|n| tx.append(Event::bytes("counted", [n as u8]).unpublished()).map(drop))
        })
        .unwrap();
    let before = store.stats().unwrap().commits;
    let projection = store
        .projection("times")
        .table(TIMES)
        .spawn(|event, tx| {
            tx.open_table(TIMES)?.insert(event.seq(), 1)?;
            Ok(())
        })
        .unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(store.stats().unwrap().commits - before, 1 + 4);
    assert_eq!(table(&store, TIMES).len(), 1000);
}

/// Goal: a handler that fails leaves nothing of that event, everything before it is applied, and it is tried again until it
/// succeeds. Method: event 5 fails three times, by error and by panic; its half-done write must not be seen.
#[test]
fn a_failing_event_waits_and_the_ones_before_it_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (0..10).for_each(|n| drop(append(&store, n)));
    let (tries, heal) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (seen, healed) = (Arc::clone(&tries), Arc::clone(&heal));
    let projection = store
        .projection("times")
        .table(TIMES)
        .backoff(Duration::from_millis(1), Duration::from_millis(20))
        .on_failure(FailurePolicy::Stop { attempts: 1_000_000 })
        .spawn(move |event, tx| {
            tx.open_table(TIMES)?.insert(event.seq(), 1)?;
            if event.seq() == 5 && !healed.load(Ordering::SeqCst) {
                if seen.fetch_add(1, Ordering::SeqCst) == 1 {
                    panic!("on purpose");
                }
                return Err(Error::app("not now"));
            }
            Ok(())
        })
        .unwrap();
    projection.wait_for_position(4, TIMEOUT).unwrap();
    let behind = projection.wait_for_position(5, Duration::from_millis(200));
    assert!(matches!(behind, Err(Error::ProjectionBehind { position: 5, .. })), "{behind:?}");
    let end = Instant::now() + TIMEOUT;
    while tries.load(Ordering::SeqCst) < 4 {
        assert!(Instant::now() < end, "it is not tried again");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(matches!(projection.status().state, ProjectionState::Retrying { seq: 5, .. }));
    assert_eq!(table(&store, TIMES).keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    heal.store(true, Ordering::SeqCst);
    projection.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(table(&store, TIMES).len(), 10);
}

/// Goal: by default it stands still before an event that fails for good, says so to whoever waits, and tries again when it
/// is started again; its position holds the log. Method: as above, with a repaired handler the second time.
#[test]
fn it_stands_still_rather_than_leave_one_out() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (0..4).for_each(|n| drop(append(&store, n)));
    let run = |broken: bool| {
        let builder = store
            .projection("times")
            .table(TIMES)
            .backoff(Duration::from_millis(1), Duration::from_millis(2));
        builder
            .on_failure(FailurePolicy::Stop { attempts: 3 })
            .spawn(move |event, tx| {
                if broken && event.seq() == 2 {
                    return Err(Error::app("an account that is not there"));
                }
                tx.open_table(TIMES)?.insert(event.seq(), 1)?;
                Ok(())
            })
            .unwrap()
    };
    let projection = run(true);
    let stopped = projection.wait_until_live(TIMEOUT).unwrap_err();
    assert_eq!(
        stopped.to_string(),
        "projection `times` stands still at 2: event 2: an account that is not there"
    );
    append(&store, 9);
    std::thread::sleep(Duration::from_millis(50));
    let status = projection.stop(TIMEOUT);
    assert_eq!((status.position, status.failed_tries), (2, 3));
    let projection = run(false);
    projection.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(table(&store, TIMES).len(), 5);
}

/// Goal: by policy a failing event is written down with its reason and the projection goes on; it can be tried again or given
/// up, and its record is kept for as long, though everybody is done with it. Method: a relay confirms and trims everything.
#[test]
fn an_event_that_is_given_up_is_kept_and_can_be_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::builder().progress_delay(Duration::from_millis(5)).open(&path).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let broken = Arc::new(AtomicBool::new(true));
    let run = |store: &Store| {
        let broken = Arc::clone(&broken);
        let builder = store
            .projection("times")
            .table(TIMES)
            .backoff(Duration::from_millis(1), Duration::from_millis(2));
        builder
            .on_failure(FailurePolicy::Quarantine { attempts: 2 })
            .spawn(move |event, tx| {
                tx.open_table(TIMES)?.insert(event.seq(), 1)?;
                let bad = event.payload() == [7] && broken.load(Ordering::SeqCst);
                if bad { Err(Error::app("bad luck")) } else { Ok(()) }
            })
            .unwrap()
    };
    let projection = run(&store);
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    for n in 0..1000_u64 {
        let n = if n == 3 || n == 4 { 7 } else { 0 };
        store.write(move |tx| tx.append(Event::bytes("counted", [n]).to("", "q")).map(drop)).unwrap();
    }
    projection.wait_until_live(TIMEOUT).unwrap();
    let failures = projection.failures().list(None, 10).unwrap();
    let reported: Vec<_> = failures.iter().map(|f| (f.seq, f.attempts, &*f.reason)).collect();
    assert_eq!(reported, [(3, 2, "bad luck"), (4, 2, "bad luck")]);
    assert_eq!(projection.failures().list(Some(3), 10).unwrap().len(), 1);
    let end = Instant::now() + TIMEOUT;
    while store.stats().unwrap().trimmed_to < 900 {
        assert!(Instant::now() < end, "the log is not trimmed: {:?}", store.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    let kept = |store: &Store, seq| store.read().unwrap().event(seq).unwrap().is_some();
    assert!(kept(&store, 3) && kept(&store, 4) && !kept(&store, 2));
    assert!(projection.failures().redrive(3).is_err(), "it still fails");
    assert_eq!(projection.failures().list(None, 10).unwrap().len(), 2);
    // Also over a restart.
    projection.stop(TIMEOUT);
    relay.stop(TIMEOUT);
    store.close().unwrap();
    let store = Store::open(&path).unwrap();
    let projection = run(&store);
    broken.store(false, Ordering::SeqCst);
    projection.failures().redrive(3).unwrap();
    projection.failures().discard(4).unwrap();
    assert!(matches!(projection.failures().redrive(3), Err(Error::NoSuchFailure { seq: 3, .. })));
    assert!(projection.failures().list(None, 10).unwrap().is_empty());
    let times = table(&store, TIMES);
    assert_eq!((times.len(), times.contains_key(&3), times.contains_key(&4)), (999, true, false));
    assert!(!kept(&store, 3) && !kept(&store, 4), "nobody needs them any more");
}

/// Goal: a damaged record is never given to a handler: it stands still before it, or by policy gives it up with the number.
/// Method: flip a byte of record 1 by plain redb.
#[test]
fn a_damaged_record_is_reported_and_not_applied() {
    for quarantine in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        (0..3).for_each(|n| drop(append(&store, n)));
        store.close().unwrap();
        let db = Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        let mut frame = tx.open_table(LOG).unwrap().get(1).unwrap().unwrap().value().to_vec();
        *frame.last_mut().unwrap() ^= 1;
        tx.open_table(LOG).unwrap().insert(1, frame.as_slice()).unwrap();
        tx.commit().unwrap();
        drop(db);
        let store = Store::open(&path).unwrap();
        let policy = match quarantine {
            true => FailurePolicy::Quarantine { attempts: 5 },
            false => FailurePolicy::Stop { attempts: 5 },
        };
        let projection = store
            .projection("times")
            .table(TIMES)
            .on_failure(policy)
            .spawn(|event, tx| {
                tx.open_table(TIMES)?.insert(event.seq(), 1)?;
                Ok(())
            })
            .unwrap();
        let caught_up = projection.wait_until_live(TIMEOUT);
        if quarantine {
            caught_up.unwrap();
            let failures = projection.failures().list(None, 10).unwrap();
            assert_eq!((failures[0].seq, failures[0].attempts), (1, 1));
            assert!(matches!(projection.failures().redrive(1), Err(Error::Corrupt(_))));
            assert_eq!(table(&store, TIMES).keys().copied().collect::<Vec<_>>(), [0, 2]);
        } else {
            assert!(matches!(caught_up, Err(Error::ProjectionStopped { position: 1, .. })), "{caught_up:?}");
            assert_eq!(table(&store, TIMES).len(), 1);
        }
    }
}

/// No table of a rebuild is in the file.
fn nothing_is_left_over(store: Store) {
    let path = store.path().to_owned();
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    let tables = tx.list_tables().unwrap();
    let names: Vec<_> = tables.map(|table| onewrite::redb::TableHandle::name(&table).to_owned()).collect();
    assert!(!names.iter().any(|name| name.contains("rebuild")), "{names:?}");
}

/// Goal: while tables are rebuilt for a new version the old ones are read as they were, and the new ones take their place all
/// at once. Method: hold the rebuild before its last event; look; let it go on.
#[test]
fn a_new_version_is_built_beside_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(&folder.path().join("a.redb"), 1);
    let events: Vec<u8> = (0..20).map(|n| n % 4).collect();
    events.iter().for_each(|n| drop(append(&running.store, *n)));
    running.projection.wait_until_live(TIMEOUT).unwrap();
    running.projection.stop(TIMEOUT);
    append(&running.store, 0);
    running.gate.shut_at(19);
    let projection = summing(&running.store, 2, &running.gate);
    running.gate.await_reached();
    agree(&running.store, &events, 1);
    let (status, stats) = (projection.status(), running.store.stats().unwrap().projections["sums"].clone());
    assert_eq!((status.state, status.rebuilding), (ProjectionState::Rebuilding, Some(18)));
    assert_eq!((stats.version, stats.rebuilding), (1, Some(18)));
    assert!(
        matches!(projection.failures().redrive(0), Err(Error::ProjectionStopped { .. })),
        "the handler is of another version"
    );
    running.gate.open();
    projection.wait_until_live(TIMEOUT).unwrap();
    let events = [&events[..], &[0]].concat();
    agree(&running.store, &events, 2);
    assert_eq!(running.store.stats().unwrap().projections["sums"].version, 2);
    projection.stop(TIMEOUT);
    nothing_is_left_over(running.store);
}

/// Goal: a rebuild by the same handler leaves the live tables alive; one that fails is reported and changes nothing; another
/// rebuild, asked for after that, succeeds. Method: the handler fails at event 3 in a rebuild only, for as long as it is asked to.
#[test]
fn a_rebuild_that_fails_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (0..6).for_each(|n| drop(append(&store, n)));
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let builder =
        store.projection("times").table(TIMES).backoff(Duration::from_millis(1), Duration::from_millis(1));
    let projection = builder
        .on_failure(FailurePolicy::Stop { attempts: 2 })
        .spawn(move |event, tx| {
            if tx.is_rebuild() && event.seq() == 3 && is_broken.load(Ordering::SeqCst) {
                return Err(Error::app("no"));
            }
            let mut times = tx.open_table(TIMES)?;
            let seen = times.get(event.seq())?.map_or(0, |row| row.value());
            times.insert(event.seq(), seen + 1)?;
            Ok(())
        })
        .unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    projection.rebuild();
    let failed = projection.wait_until_live(TIMEOUT).unwrap_err();
    assert!(failed.to_string().contains("event 3: no"), "{failed}");
    let receipt = append(&store, 6);
    projection.wait_for_position(receipt.seqs()[0], TIMEOUT).unwrap();
    assert_eq!(table(&store, TIMES), (0..7).map(|seq| (seq, 1)).collect(), "the live tables are kept");
    broken.store(false, Ordering::SeqCst);
    projection.rebuild();
    projection.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(table(&store, TIMES), (0..7).map(|seq| (seq, 1)).collect());
    assert_eq!(projection.status().rebuilding, None);
}

/// Goal: the log waits for a projection, and no longer once that is forgotten; without one it is trimmed. Lag is shown.
/// Method: a relay confirms everything while the projection is not running.
#[test]
fn the_log_waits_for_a_projection() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::builder().progress_delay(Duration::from_millis(5)).open(&path).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    store.projection("late").spawn(|_, _| Ok(())).unwrap().stop(TIMEOUT);
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    for _ in 0..600 {
        store.write(|tx| tx.append(Event::bytes("counted", [1]).to("", "q")).map(drop)).unwrap();
    }
    let end = Instant::now() + TIMEOUT;
    while store.stats().unwrap().backlog_events > 0 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    let stats = store.stats().unwrap();
    assert_eq!(stats.trimmed_to, 0, "it would miss them");
    assert_eq!(stats.projections["late"].lag_events, 600);
    assert!(stats.projections["late"].lag_ms.is_some());
    store.forget_projection("late").unwrap();
    assert!(matches!(store.forget_projection("late"), Err(Error::NoSuchProjection { .. })));
    while store.stats().unwrap().trimmed_to < 600 {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    relay.stop(TIMEOUT);
}

/// Goal: what cannot work is refused by name, and nothing runs. Method: one wrong setting each.
#[test]
fn wrong_settings_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let nothing = |_: &onewrite::RecordedEvent, _: &onewrite::ProjectionTransaction<'_>| Ok(());
    let reported = |result: Result<Projection>| result.map(drop).unwrap_err().to_string();
    assert!(reported(store.projection("").spawn(nothing)).contains("name"));
    assert!(reported(store.projection("x".repeat(256)).spawn(nothing)).contains("name"));
    assert!(reported(store.projection("a").batch(0).spawn(nothing)).contains("batch"));
    let none = FailurePolicy::Quarantine { attempts: 0 };
    assert!(reported(store.projection("a").on_failure(none).spawn(nothing)).contains("on_failure"));
    assert!(reported(store.projection("a").table(LOG).spawn(nothing)).contains("onewrite."));
    assert!(store.stats().unwrap().projections.is_empty());
    let reentrant = store.clone();
    let started = store.write(move |_| reentrant.projection("a").spawn(nothing).map(drop));
    assert!(matches!(started, Err(Error::InsideTransaction { .. })), "{started:?}");
    store.projection("a").spawn(nothing).unwrap().stop(TIMEOUT);
}

/// Goal: a table that the projection has not declared cannot be written by its handler. Method: try.
#[test]
fn only_declared_tables_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    append(&store, 1);
    let builder = store.projection("a").table(TIMES).on_failure(FailurePolicy::Stop { attempts: 1 });
    let projection = builder.spawn(|_, tx| tx.open_table(SUMS).map(drop)).unwrap();
    let stopped = projection.wait_until_live(TIMEOUT).unwrap_err().to_string();
    assert!(stopped.contains("`sums` is not declared"), "{stopped}");
}

/// Goal: a projection over streams is whole also where the outbox's events were trimmed long ago. Method: streams and outbox
/// events through a relay that confirms and trims, then a new projection.
#[test]
fn streams_are_there_for_a_late_projection() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::builder().progress_delay(Duration::from_millis(5)).open(&path).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    for n in 0..600_u64 {
        store
            .write(move |tx| {
                if n % 10 == 0 {
                    tx.stream("a-1")
                        .append([Event::bytes("counted", [1]).to("", "q")], ExpectedRevision::Any)?;
                } else {
                    tx.append(Event::bytes("counted", [2]).to("", "q"))?;
                }
                Ok(())
            })
            .unwrap();
    }
    let end = Instant::now() + TIMEOUT;
    while store.stats().unwrap().trimmed_to < 600 {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    let projection = summing(&store, 1, &Arc::default());
    projection.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(table(&store, SUMS), BTreeMap::from([(1, 60)]));
    let newest = store.projection("newest").start_at(StartAt::Newest).spawn(|_, _| Ok(())).unwrap();
    assert_eq!(newest.status().position, 600);
    relay.stop(TIMEOUT);
}

/// Goal: stop is prompt in the middle of a long backoff, and a store that is closed ends the projection with a word.
#[test]
fn it_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    append(&store, 1);
    let projection = store
        .projection("a")
        .backoff(Duration::from_secs(60), Duration::from_secs(60))
        .spawn(|_, _| Err(Error::app("no")))
        .unwrap();
    assert!(projection.wait_until_live(Duration::from_millis(100)).is_err());
    let began = Instant::now();
    assert_eq!(projection.stop(TIMEOUT).state, ProjectionState::Ended);
    assert!(began.elapsed() < Duration::from_secs(5));
    let projection = store.projection("b").spawn(|_, _| Ok(())).unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    store.close().unwrap();
    let reported = projection.wait_for_position(99, TIMEOUT).unwrap_err();
    assert!(reported.to_string().contains("closed"), "{reported}");
}

/// Goal: the tables of a projection are ordinary tables. Method: an empty rebuild leaves the tables empty, not absent or old.
#[test]
fn an_empty_rebuild_empties_the_tables() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    append(&store, 1);
    let run = |version, filter: EventFilter| {
        let builder = store.projection("a").table(TIMES).version(version).filter(filter);
        builder
            .spawn(|event, tx| {
                tx.open_table(TIMES)?.insert(event.seq(), 1)?;
                Ok(())
            })
            .unwrap()
    };
    run(1, EventFilter::all()).wait_until_live(TIMEOUT).unwrap();
    assert_eq!(store.read().unwrap().open_table(TIMES).unwrap().len().unwrap(), 1);
    run(2, EventFilter::all().event_type("other")).wait_until_live(TIMEOUT).unwrap();
    assert!(table(&store, TIMES).is_empty());
}

/// Goal: a rebuild for one version is of no use to another: it begins anew. Method: stop a rebuild for version 2 half way, and
/// start version 3.
#[test]
fn a_rebuild_for_another_version_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(&folder.path().join("a.redb"), 1);
    let events: Vec<u8> = (0..20).map(|n| n % 4).collect();
    events.iter().for_each(|n| drop(append(&running.store, *n)));
    running.projection.wait_until_live(TIMEOUT).unwrap();
    running.projection.stop(TIMEOUT);
    running.gate.shut_at(13);
    let second = summing(&running.store, 2, &running.gate);
    running.gate.await_reached();
    let stopping = std::thread::spawn(move || second.stop(TIMEOUT));
    std::thread::sleep(Duration::from_millis(50));
    running.gate.open();
    let left = stopping.join().unwrap().rebuilding.unwrap();
    assert!((12..20).contains(&left), "{left}");
    let third = summing(&running.store, 3, &running.gate);
    third.wait_until_live(TIMEOUT).unwrap();
    agree(&running.store, &events, 3);
    third.stop(TIMEOUT);
    nothing_is_left_over(running.store);
}

/// Goal: what the old tables had given up says nothing of the new ones. Method: a handler that is repaired in its next version,
/// and one that is broken in another place.
#[test]
fn a_rebuild_has_its_own_failures() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (0..5).for_each(|n| drop(append(&store, n)));
    let failures_of = |version: u32, broken: Option<u64>| {
        let policy = FailurePolicy::Quarantine { attempts: 1 };
        let builder = store.projection("a").table(TIMES).version(version).on_failure(policy);
        let projection = builder
            .spawn(move |event, tx| {
                if Some(event.seq()) == broken {
                    return Err(Error::app("broken"));
                }
                tx.open_table(TIMES)?.insert(event.seq(), u64::from(version))?;
                Ok(())
            })
            .unwrap();
        projection.wait_until_live(TIMEOUT).unwrap();
        projection.failures().list(None, 10).unwrap().iter().map(|failure| failure.seq).collect::<Vec<_>>()
    };
    assert_eq!(failures_of(1, Some(2)), [2]);
    assert_eq!(failures_of(2, Some(3)), [3]);
    assert_eq!(table(&store, TIMES).keys().copied().collect::<Vec<_>>(), [0, 1, 2, 4]);
    assert!(failures_of(3, None).is_empty());
    assert_eq!(table(&store, TIMES).len(), 5);
    store.forget_projection("a").unwrap();
    let path = store.path().to_owned();
    store.close().unwrap();
    let tx = Database::open(&path).unwrap();
    let failures = TableDefinition::<&[u8], &[u8]>::new("onewrite.failures");
    let tx = onewrite::redb::ReadableDatabase::begin_read(&tx).unwrap();
    assert_eq!(tx.open_table(failures).unwrap().len().unwrap(), 0, "rows of tracks that are gone");
}

/// Goal: a position that is damaged is not believed: events would be left out, or applied twice. Method: one bit of the row.
#[test]
fn a_damaged_position_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    append(&store, 1);
    let projection = store.projection("sums").spawn(|_, _| Ok(())).unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    projection.stop(TIMEOUT);
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut rows = tx.open_table(TableDefinition::<&str, &[u8]>::new("onewrite.projections")).unwrap();
        let mut row = rows.get("sums").unwrap().unwrap().value().to_vec();
        row[16] ^= 1; // of the position
        rows.insert("sums", row.as_slice()).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    let reported = Store::open(&path).unwrap_err().to_string();
    assert!(reported.contains("projection"), "{reported}");
}

/// Goal: a projection cannot write around a capture, nor take a captured table away by a rebuild. Method: declare one.
#[test]
fn a_captured_table_is_nobodys_projection() {
    let folder = tempfile::tempdir().unwrap();
    let capture = onewrite::Capture::with(TIMES, |_| Ok(Event::bytes("t", "")));
    let store = Store::builder().capture(capture.unpublished()).open(folder.path().join("a.redb")).unwrap();
    let refused = store.projection("a").table(TIMES).spawn(|_, _| Ok(()));
    assert!(matches!(refused, Err(Error::CapturedTable { .. })), "{refused:?}");
    assert!(store.stats().unwrap().projections.is_empty());
}
