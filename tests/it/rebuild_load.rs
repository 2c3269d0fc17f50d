//! Rebuilds beside writers that never pause: each ends, and each event is in the new tables once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Error, Event, FailurePolicy, Projection, ProjectionState, Store};
use proptest::prelude::*;

use crate::scratch::crash_copy;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Sequence number → (how often it was applied, by which version).
const TIMES: TableDefinition<'_, u64, (u64, u64)> = TableDefinition::new("times");

fn append(store: &Store, events: u64) {
    let write = move |tx: &onewrite::Transaction| {
        (0..events).try_for_each(|_| tx.append(Event::bytes("counted", "x").unpublished()).map(drop))
    };
    store.write(write).unwrap();
}

/// Threads that append without a pause, until they are asked to stop or have written so often.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
    writes_max: u64,
}

impl Load {
    fn start(store: &Store, threads: u64, events: u64, writes_max: u64) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let thread = || {
            let (store, stop) = (store.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut writes = 0;
                while !stop.load(Ordering::SeqCst) && writes < writes_max {
                    append(&store, events);
                    writes += 1;
                }
                writes
            })
        };
        let threads = (0..threads).map(|_| thread()).collect();
        Self { stop, threads, writes_max }
    }

    /// Whether none of them has come to its end before it was asked to stop.
    fn end(self) -> bool {
        let going_on = !self.threads.iter().any(JoinHandle::is_finished);
        self.stop.store(true, Ordering::SeqCst);
        let writes = self.threads.into_iter().map(|thread| thread.join().unwrap()).max();
        going_on && writes < Some(self.writes_max)
    }
}

type Fails = dyn Fn(u64) -> bool + Send + Sync;

fn run(store: &Store, version: u32, batch: usize, policy: FailurePolicy, fails: Arc<Fails>) -> Projection {
    let builder = store.projection("p").table(TIMES).version(version).batch(batch).on_failure(policy);
    builder
        .backoff(Duration::from_millis(1), Duration::from_millis(2))
        .spawn(move |event, tx| {
            let mut times = tx.open_table(TIMES)?;
            let seen = times.get(event.seq())?.map_or(0, |row| row.value().0);
            times.insert(event.seq(), (seen + 1, version.into()))?;
            if fails(event.seq()) {
                if event.seq() % 2 == 0 {
                    return Err(Error::app("it fails"));
                }
                std::panic::resume_unwind(Box::new("it panics"));
            }
            Ok(())
        })
        .unwrap()
}

fn times(store: &Store) -> BTreeMap<u64, (u64, u64)> {
    let Ok(table) = store.read().unwrap().open_table(TIMES) else { return BTreeMap::new() };
    table.iter().unwrap().map(|row| row.unwrap()).map(|(seq, times)| (seq.value(), times.value())).collect()
}

fn once_by(store: &Store, version: u64, without: impl Fn(u64) -> bool) {
    let end = store.stats().unwrap().next_seq;
    let expected: BTreeMap<_, _> =
        (0..end).filter(|seq| !without(*seq)).map(|seq| (seq, (1, version))).collect();
    let seen = times(store);
    let wrong =
        expected.iter().chain(&seen).find(|(seq, times)| expected.get(seq) != seen.get(seq) || times.0 != 1);
    assert!(wrong.is_none(), "{wrong:?} of {end}");
}

const STOPS: FailurePolicy = FailurePolicy::Stop { attempts: 100 };

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !holds() {
        assert!(Instant::now() < end, "waited {TIMEOUT:?} for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Goal: a rebuild ends beside writers that never pause, also where each write appends more than a batch. Method: eight threads,
/// batches of 1 and 16, writes of 1 and 40 events; the threads may write a bounded number of times, and must not have come to
/// that end when the new tables stand in their place.
#[test]
fn a_rebuild_ends_beside_writers_that_never_pause() {
    for (batch, events, writes_max) in [(1, 1, 6_000), (16, 40, 1_500)] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        append(&store, 500);
        let first = run(&store, 1, 256, STOPS, Arc::new(|_| false));
        first.wait_until_live(TIMEOUT).unwrap();
        first.stop(TIMEOUT);
        let load = Load::start(&store, 8, events, writes_max);
        let second = run(&store, 2, batch, STOPS, Arc::new(|_| false));
        let mut going_on = true;
        until("the swap", || {
            going_on = !load.threads.iter().any(JoinHandle::is_finished);
            !going_on || second.status().rebuilding.is_none()
        });
        assert!(
            going_on && load.end(),
            "batch {batch}: it waited for the writers to pause: {:?}",
            second.status()
        );
        second.wait_until_live(TIMEOUT).unwrap();
        once_by(&store, 2, |_| false);
    }
}

/// Goal: an event on which the handler fails is treated in the last transaction as anywhere else: nothing of it stays, and the
/// policy says what comes of it. Method: the newest events fail for good, or panic; by policy they are given up, or stood at.
#[test]
fn a_handler_that_fails_in_the_last_transaction_is_rolled_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    append(&store, 40);
    let fails = |seq: u64| (36..39).contains(&seq);
    let policy = FailurePolicy::Quarantine { attempts: 2 };
    let first = run(&store, 1, 8, policy, Arc::new(|_| false));
    first.wait_until_live(TIMEOUT).unwrap();
    first.stop(TIMEOUT);
    let second = run(&store, 2, 64, policy, Arc::new(fails));
    second.wait_until_live(TIMEOUT).unwrap();
    once_by(&store, 2, fails);
    let failures = second.failures().list(None, 10).unwrap();
    assert_eq!(
        failures.iter().map(|it| (it.seq, it.attempts)).collect::<Vec<_>>(),
        [(36, 2), (37, 2), (38, 2)]
    );
    second.stop(TIMEOUT);
    let third = run(&store, 3, 64, FailurePolicy::Stop { attempts: 2 }, Arc::new(fails));
    assert!(third.wait_until_live(TIMEOUT).is_err());
    assert!(third.status().rebuild_stopped.is_some_and(|reported| reported.contains("event 36")));
    once_by(&store, 2, fails);
}

/// Goal: a projection says that it is live though its writers never pause. Method: eight threads; the state is seen while they
/// write.
#[test]
fn a_projection_is_live_beside_writers_that_never_pause() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let load = Load::start(&store, 8, 1, 50_000);
    let projection = run(&store, 1, 256, STOPS, Arc::new(|_| false));
    until("the state", || projection.status().state == ProjectionState::Live);
    assert!(load.end());
    projection.wait_until_live(TIMEOUT).unwrap();
    once_by(&store, 1, |_| false);
}

#[derive(Debug, Clone)]
enum Life {
    /// A later version, with batches of so many, until its tables are the live ones.
    Rebuilt(usize),
    /// The same, stopped after so many milliseconds.
    Stopped(usize, u64),
    /// The process dies after so many.
    Crashed(usize, u64),
}

fn life() -> impl Strategy<Value = Life> {
    let batch = || prop_oneof![Just(1_usize), Just(7), Just(256)];
    prop_oneof![
        batch().prop_map(Life::Rebuilt),
        (batch(), 0..20_u64).prop_map(|(batch, ms)| Life::Stopped(batch, ms)),
        (batch(), 0..20_u64).prop_map(|(batch, ms)| Life::Crashed(batch, ms)),
    ]
}

fn lives(path: &Path, lives: &[Life], every: u64, threads: u64) {
    let mut store = Store::open(path).unwrap();
    let mut version = 1;
    run(&store, version, 256, STOPS, Arc::new(|_| false)).wait_until_live(TIMEOUT).unwrap();
    for life in lives {
        version += 1;
        // Some of the newest fail at their first try, so many in each life.
        let (from, tried) = (store.stats().unwrap().next_seq.saturating_sub(20), Mutex::new(BTreeSet::new()));
        let fails: Arc<Fails> = Arc::new(move |seq| {
            let mut tried = tried.lock().unwrap();
            seq >= from && seq % every == 0 && tried.len() < 20 && tried.insert(seq)
        });
        let load = Load::start(&store, threads, 2, 20_000);
        let (Life::Rebuilt(batch) | Life::Stopped(batch, _) | Life::Crashed(batch, _)) = life;
        let projection = run(&store, version, *batch, STOPS, fails);
        match life {
            Life::Rebuilt(_) => {
                until("the swap", || projection.status().rebuilding.is_none());
                assert!(load.end(), "{life:?}: it waited for the writers to pause");
                projection.wait_until_live(TIMEOUT).unwrap();
                once_by(&store, version.into(), |_| false);
            }
            Life::Stopped(_, ms) => {
                std::thread::sleep(Duration::from_millis(*ms));
                projection.stop(TIMEOUT);
                load.end();
            }
            Life::Crashed(_, ms) => {
                std::thread::sleep(Duration::from_millis(*ms));
                let copy = crash_copy(&store, path.parent().unwrap());
                projection.stop(TIMEOUT);
                load.end();
                store = Store::open(&copy).unwrap();
            }
        }
        assert!(times(&store).values().all(|(times, _)| *times == 1), "{life:?}");
    }
    run(&store, version, 256, STOPS, Arc::new(|_| false)).wait_until_live(TIMEOUT).unwrap();
    once_by(&store, version.into(), |_| false);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 20, failure_persistence: None, ..ProptestConfig::default() })]
    /// Goal: whatever stops, fails or dies in the middle of rebuilds under load, each event is in the tables once, by one
    /// version. Method: lives of several versions by chance, beside writers that never pause. The handler fails or panics at the
    /// first try of up to 20 of the newest events in each life.
    #[test]
    fn each_event_once_through_rebuilds_under_load(
        all in prop::collection::vec(life(), 1..5), every in 5..60_u64, threads in 1..5_u64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        lives(&folder.path().join("a.redb"), &all, every, threads);
    }
}
