//! Projections that change: their version, their tables, their name; and what a rebuild leaves behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{MultimapTableDefinition, ReadableTable, TableDefinition};
use onewrite::{Error, Event, FailurePolicy, Projection, Store};

const ROWS: TableDefinition<'_, u64, u64> = TableDefinition::new("rows");
/// Of the same name, and of the other kind.
const MULTI_ROWS: MultimapTableDefinition<'_, u64, u64> = MultimapTableDefinition::new("rows");
const TIMEOUT: Duration = Duration::from_secs(20);

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().progress_delay(Duration::from_millis(5));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn append(store: &Store, events: u64) {
    for _ in 0..events {
        store.write(|tx| tx.append(Event::bytes("counted", "1").unpublished()).map(drop)).unwrap();
    }
}

fn rows(store: &Store) -> Vec<(u64, u64)> {
    let Ok(table) = store.read().unwrap().open_table(ROWS) else { return Vec::new() };
    table.iter().unwrap().map(|row| row.unwrap()).map(|(seq, row)| (seq.value(), row.value())).collect()
}

/// Writes its version at each event; fails for good at those that `fails` says.
fn run(store: &Store, version: u32, fails: impl Fn(u64) -> bool + Send + Sync + 'static) -> Projection {
    let builder = store.projection("p").table(ROWS).version(version);
    builder
        .on_failure(FailurePolicy::Stop { attempts: 1 })
        .spawn(move |event, tx| {
            if fails(event.seq()) {
                return Err(Error::app("it cannot be applied"));
            }
            tx.open_table(ROWS)?.insert(event.seq(), u64::from(version))?;
            Ok(())
        })
        .unwrap()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {TIMEOUT:?} for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Goal: a version that was tried and taken back leaves nothing that the log waits for. Method: version 2 stands still in its
/// rebuild; version 1 runs again, and what a relay confirms is trimmed.
#[test]
fn a_version_that_is_taken_back_holds_nothing() {
    let (_folder, store) = open();
    append(&store, 1);
    let first = run(&store, 1, |_| false);
    first.wait_until_live(TIMEOUT).unwrap();
    first.stop(TIMEOUT);
    let second = run(&store, 2, |_| true);
    assert!(second.wait_until_live(TIMEOUT).is_err());
    second.stop(TIMEOUT);
    assert_eq!(store.stats().unwrap().projections["p"].rebuilding, Some(0));
    let first = run(&store, 1, |_| false);
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    for _ in 0..600 {
        store.write(|tx| tx.append(Event::bytes("counted", "1").to("", "q")).map(drop)).unwrap();
    }
    first.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(store.stats().unwrap().projections["p"].rebuilding, None);
    until("what is confirmed and applied is trimmed", || store.stats().unwrap().trimmed_to > 500);
    let _ = relay.stop(TIMEOUT);
}

/// Goal: a table is declared once: a rebuild that puts it in its place twice would lose it. Method: twice of one kind, and once
/// of each; the error names it.
#[test]
fn a_table_is_declared_once() {
    let (_folder, store) = open();
    let twice = store.projection("p").table(ROWS).table(ROWS).spawn(|_, _| Ok(()));
    let both = store.projection("p").table(ROWS).multimap_table(MULTI_ROWS).spawn(|_, _| Ok(()));
    for refused in [twice, both] {
        let Err(Error::Setting(error)) = refused else { panic!("it runs") };
        assert!(error.setting == "table" && error.reason.contains("`rows`"), "{error}");
    }
}

/// Goal: a handler writes only tables of its own version. Method: version 1 gives an event up; version 2 stands still in its
/// rebuild; the event is not given to version 2 until its tables are the live ones.
#[test]
fn a_redrive_does_not_mix_versions() {
    let (_folder, store) = open();
    append(&store, 5);
    let first = store.projection("p").table(ROWS).on_failure(FailurePolicy::Quarantine { attempts: 1 });
    let first = first
        .spawn(|event, tx| {
            if event.seq() == 1 {
                return Err(Error::app("it cannot be applied"));
            }
            tx.open_table(ROWS)?.insert(event.seq(), 1)?;
            Ok(())
        })
        .unwrap();
    first.wait_until_live(TIMEOUT).unwrap();
    first.stop(TIMEOUT);
    let second = run(&store, 2, |seq| seq == 3);
    assert!(second.wait_until_live(TIMEOUT).is_err());
    let refused = second.failures().redrive(1);
    assert!(matches!(refused, Err(Error::ProjectionStopped { .. })), "{refused:?}");
    assert_eq!(rows(&store), [(0, 1), (2, 1), (3, 1), (4, 1)]);
    assert_eq!(second.failures().list(None, 10).unwrap().len(), 1);
}

/// Goal: a table may be of another kind in the next version. Method: plain, then multimap, then plain again.
#[test]
fn a_table_may_change_its_kind() {
    let (_folder, store) = open();
    append(&store, 5);
    let plain = |version: u32| {
        let projection = run(&store, version, |_| false);
        projection.wait_until_live(TIMEOUT).unwrap();
        projection.stop(TIMEOUT);
    };
    plain(1);
    let multi = store.projection("p").multimap_table(MULTI_ROWS).version(2).spawn(|event, tx| {
        tx.open_multimap_table(MULTI_ROWS)?.insert(event.seq(), 2)?;
        Ok(())
    });
    let multi = multi.unwrap();
    multi.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(store.read().unwrap().open_multimap_table(MULTI_ROWS).unwrap().get(4).unwrap().len(), 1);
    multi.stop(TIMEOUT);
    plain(3);
    assert_eq!(rows(&store).len(), 5);
}

/// Goal: a rebuild that stood still can be asked for again and waited for. Method: event 3 fails for good once; then it takes
/// its time.
#[test]
fn a_rebuild_can_be_asked_for_again() {
    let (_folder, store) = open();
    append(&store, 5);
    let first = run(&store, 1, |_| false);
    first.wait_until_live(TIMEOUT).unwrap();
    first.stop(TIMEOUT);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let second = run(&store, 2, move |seq| {
        if seq == 3 && !is_broken.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(300));
        }
        seq == 3 && is_broken.load(Ordering::SeqCst)
    });
    assert!(second.wait_until_live(TIMEOUT).is_err());
    broken.store(false, Ordering::SeqCst);
    second.rebuild();
    second.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(rows(&store), (0..5).map(|seq| (seq, 2)).collect::<Vec<_>>());
}

/// Goal: two projections cannot write one table: a rebuild of one would delete what the other has written. Method: declare it
/// twice; once the first has ended it is free.
#[test]
fn a_table_is_one_projections() {
    let (_folder, store) = open();
    let first = store.projection("a").table(ROWS).spawn(|_, _| Ok(())).unwrap();
    let second = store.projection("b").table(ROWS).spawn(|_, _| Ok(()));
    assert!(
        matches!(&second, Err(Error::ProjectionTable { name, projection }) if name == "rows" && projection == "a"),
        "{second:?}"
    );
    first.stop(TIMEOUT);
    store.projection("b").table(ROWS).spawn(|_, _| Ok(())).unwrap().stop(TIMEOUT);
}

/// Goal: no table of a rebuild is left over that a later start of the same version does not declare any more. Method: a rebuild of
/// two tables that stands still, gone on with by one that declares one.
#[test]
fn a_rebuild_leaves_no_table_behind() {
    const AUX: TableDefinition<'_, u64, u64> = TableDefinition::new("aux");
    let (_folder, store) = open();
    append(&store, 5);
    run(&store, 1, |_| false).wait_until_live(TIMEOUT).unwrap();
    let both = store.projection("p").table(ROWS).table(AUX).version(2).batch(1);
    let both = both.on_failure(FailurePolicy::Stop { attempts: 1 }).spawn(|event, tx| {
        if event.seq() == 3 {
            return Err(Error::app("it cannot be applied"));
        }
        tx.open_table(ROWS)?.insert(event.seq(), 2)?;
        tx.open_table(AUX)?.insert(event.seq(), 2)?;
        Ok(())
    });
    let both = both.unwrap();
    assert!(both.wait_until_live(TIMEOUT).is_err());
    both.stop(TIMEOUT);
    run(&store, 2, |_| false).wait_until_live(TIMEOUT).unwrap();
    let began = std::time::Instant::now();
    while store.stats().unwrap().cleanup_tasks > 0 {
        assert!(began.elapsed() < TIMEOUT, "the clean-up does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    let path = store.path().to_owned();
    store.close().unwrap();
    let db = onewrite::redb::Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    let tables = tx.list_tables().unwrap();
    let names: Vec<_> = tables.map(|table| onewrite::redb::TableHandle::name(&table).to_owned()).collect();
    assert!(!names.iter().any(|name| name.contains("rebuild") || name.contains("replaced")), "{names:?}");
}

/// Goal: a projection that is done with what its filter lets pass shows no lag, and holds the log no longer than a while. Method:
/// events that it does not want; figures at once, and the durable position after some rest.
#[test]
fn what_is_let_pass_is_no_lag() {
    let (_folder, store) = open();
    let filter = onewrite::EventFilter::all().event_type("wanted");
    let projection = store.projection("p").filter(filter).spawn(|_, _| Ok(())).unwrap();
    append(&store, 50);
    projection.wait_until_live(TIMEOUT).unwrap();
    let stats = store.stats().unwrap().projections["p"].clone();
    assert_eq!((stats.position, stats.lag_events, stats.lag_ms), (50, 0, None));
    std::thread::sleep(Duration::from_millis(1500));
    // Not by an orderly end: it has written it when nothing else was to be done.
    let copy = crate::scratch::crash_copy(&store, store.path().parent().unwrap());
    assert_eq!(Store::open(&copy).unwrap().stats().unwrap().projections["p"].position, 50);
}

/// Goal: that a group could not be committed is no event's fault. Method: writes that spoil their
/// transaction, beside the projection's own, until one of these has shared a commit; one attempt is all that an event has.
#[test]
fn a_commit_that_fails_is_no_event_s_fault() {
    let (_folder, store) = open();
    append(&store, 1);
    let builder = store.projection("p").table(ROWS).on_failure(FailurePolicy::Quarantine { attempts: 1 });
    let builder = builder.batch_delay(Duration::ZERO);
    let tries = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let tried = Arc::clone(&tries);
    let projection = builder
        .spawn(move |event, tx| {
            tried.fetch_add(1, Ordering::SeqCst);
            tx.open_table(ROWS)?.insert(event.seq(), 1)?;
            Ok(())
        })
        .unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    // Until one has shared a commit with a spoiler: more events, and a spoiler for each.
    let end = Instant::now() + TIMEOUT;
    let mut events = 1;
    while tries.load(Ordering::SeqCst) <= events && Instant::now() < end {
        let spoil = |tx: &onewrite::Transaction| {
            let mut table = tx.open_table(TableDefinition::<u8, u8>::new("x"))?;
            table.insert(1, 1)?;
            let unwind = || table.retain(|_, _| std::panic::resume_unwind(Box::new(())));
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(unwind));
            Ok(())
        };
        append(&store, 1);
        events += 1;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| store.write(spoil).map(drop));
            }
        });
    }
    assert!(tries.load(Ordering::SeqCst) > events, "no group was spoilt");
    projection.wait_until_live(TIMEOUT).unwrap();
    assert!(projection.failures().list(None, 10).unwrap().is_empty());
    assert_eq!(rows(&store).len() as u64, events);
}
