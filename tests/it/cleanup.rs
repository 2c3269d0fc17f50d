//! What is deleted or forgotten is gone at once; the store removes it from the file in bounded pieces, also after a crash.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::tuning::CLEAN_STEP;
use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};
use onewrite::redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableHandle};
use onewrite::{
    Capture, CaptureMode, Error, Event, ExpectedRevision, FailurePolicy, Relay, Stats, Store, Transaction,
};

use crate::scratch::{crash_copy, events, until_within};

const SOON: Duration = Duration::from_secs(60);
const EVENTS: u64 = 20_000;
const ROWS: TableDefinition<'_, u64, u64> = TableDefinition::new("rows");

fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(SOON, what, holds);
}

fn stats(store: &Store) -> Stats {
    store.stats().unwrap()
}

fn cleaned(store: &Store) {
    until("all is cleaned up", || (stats(store).cleanup_tasks, stats(store).cleanup_events) == (0, 0));
}

fn relay(store: &Store) -> Relay {
    let broker = MemoryBroker::new();
    broker.declare_exchange("e", ExchangeKind::Fanout);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "").unwrap();
    store.relay("r").spawn(broker.publisher()).unwrap()
}

fn event() -> Event {
    Event::bytes("counted", "").unpublished()
}

/// Appends so many events to a stream, in several transactions.
fn append(store: &Store, stream: &'static str, events: u64) {
    for _ in 0..events / 1000 {
        store
            .write(move |tx| {
                tx.stream(stream).append((0..1000).map(|_| event()), ExpectedRevision::Any).map(drop)
            })
            .unwrap();
    }
}

/// A store with a long stream that trimming has passed, and one short one beside it.
fn trimmed(path: &Path) -> Store {
    let store = Store::open(path).unwrap();
    append(&store, "kept", 1000);
    append(&store, "long", EVENTS);
    let relay = relay(&store);
    until("the log is trimmed", || stats(&store).trimmed_to == EVENTS + 1000);
    relay.stop(SOON);
    store
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    (folder, path)
}

/// Tables of ours in the file whose names begin so.
fn tables(path: &Path, prefix: &str) -> Vec<String> {
    let db = Database::open(path).unwrap();
    let tx = db.begin_read().unwrap();
    let names = tx.list_tables().unwrap().map(|table| table.name().to_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// A way to let go of the events of a stream.
type LetGo = fn(&Transaction) -> onewrite::Result<()>;

const WAYS: [(LetGo, u64); 2] =
    [(|tx| tx.stream("long").tombstone(), 0), (|tx| tx.stream("long").truncate_before(EVENTS - 5), 5)];

// --- streams ------------------------------------------------------------------------------------------------------------

/// Goal: no transaction removes more than a piece, whatever the length of the stream; other writes come between the pieces; no
/// reader sees what is deleted. Method: count what is left beside the commits, from the deletion to the end.
#[test]
fn a_long_stream_is_removed_in_pieces() {
    for (let_go, kept) in WAYS {
        let (_folder, path) = scratch();
        let store = trimmed(&path);
        let before = stats(&store).io;
        let tx = store.begin().unwrap();
        let_go(&tx).unwrap();
        tx.commit().unwrap();
        let written = stats(&store).io.bytes_written - before.bytes_written;
        // 20,000 records in leaves of 4 KiB are more than 300 pages.
        assert!(written < 100 * 4096, "{written} bytes in the transaction that deletes");
        let mut last = stats(&store);
        assert!(last.cleanup_events > EVENTS / 2, "{} left", last.cleanup_events);
        let snapshot = store.read().unwrap();
        assert_eq!(snapshot.stream("long").unwrap().events(0).count() as u64, kept);
        assert_eq!(events(&snapshot).len() as u64, 1000 + kept, "a reader of the log sees deleted events");
        drop(snapshot);
        let mut between = 0;
        while last.cleanup_events > 0 {
            store.write(|tx| tx.append(event())).unwrap();
            let now = stats(&store);
            // The figures are of two moments: one commit may lie between them.
            let pieces = (now.commits - last.commits + 1) * CLEAN_STEP as u64;
            assert!(last.cleanup_events - now.cleanup_events <= pieces, "{last:?}, then {now:?}");
            between += u64::from(now.cleanup_events > 0);
            last = now;
        }
        assert!(between > 0, "no write came between two pieces");
        cleaned(&store);
        let left = store.read().unwrap();
        assert_eq!(left.stream("long").unwrap().events(0).count() as u64, kept);
        assert_eq!(left.stream("kept").unwrap().events(0).count(), 1000);
        let verified = store.verify().unwrap();
        assert!(verified.findings.is_empty(), "{verified:?}");
    }
}

/// Goal: a crash in the middle loses neither the deletion nor the clean-up, and another release of the handle sees no deleted
/// event. Method: copies of the file at several moments of the clean-up, opened again.
#[test]
fn a_crash_in_the_middle_of_a_clean_up_is_resumed() {
    for (let_go, kept) in WAYS {
        let (folder, path) = scratch();
        let store = trimmed(&path);
        store.write(let_go).unwrap();
        let mut seen = 0;
        for copy in 0..4 {
            let into = folder.path().join(copy.to_string());
            std::fs::create_dir(&into).unwrap();
            let tx = store.begin().unwrap();
            let left = stats(&store).cleanup_events;
            let copy = crash_copy(&store, &into);
            drop(tx);
            let copied = Store::open(copy).unwrap();
            seen += u64::from(left > 0);
            assert!(stats(&copied).cleanup_events <= left);
            assert_eq!(events(&copied.read().unwrap()).len() as u64, 1000 + kept);
            cleaned(&copied);
            assert_eq!(events(&copied.read().unwrap()).len() as u64, 1000 + kept);
            let verified = copied.verify().unwrap();
            assert!(verified.findings.is_empty(), "{verified:?}");
            copied.close().unwrap();
        }
        assert!(seen > 0, "no copy was of the middle");
        // A close in the middle is resumed too.
        store.close().unwrap();
        cleaned(&Store::open(&path).unwrap());
    }
}

/// Goal: the stream goes on beside the clean-up as ever. Method: appends to a truncated stream, truncated again and again while
/// the first piece of the work is under way.
#[test]
fn a_truncated_stream_goes_on_beside_its_clean_up() {
    let (_folder, path) = scratch();
    let store = trimmed(&path);
    for step in 1..=10 {
        store.write(move |tx| tx.stream("long").truncate_before(EVENTS / 10 * step)).unwrap();
        let revisions = store
            .write(|tx| tx.stream("long").append([event()], ExpectedRevision::StreamExists))
            .unwrap()
            .into_value()
            .revisions;
        assert_eq!(revisions, EVENTS + step - 1..EVENTS + step);
        let snapshot = store.read().unwrap();
        let left = EVENTS - EVENTS / 10 * step + step;
        assert_eq!(snapshot.stream("long").unwrap().events(0).count() as u64, left);
    }
    cleaned(&store);
    let snapshot = store.read().unwrap();
    assert_eq!(snapshot.stream("long").unwrap().events(0).count(), 10);
    assert!(store.verify().unwrap().findings.is_empty());
}

// --- relays, captures, projections --------------------------------------------------------------------------------------

/// Goal: what is deferred for a relay and a projection's failures are removed in pieces; the records that stood for them alone go
/// with them. Method: 3,000 of each.
#[test]
fn what_relays_and_projections_leave_is_removed_in_pieces() {
    const MANY: u64 = 3000;
    let (_folder, path) = scratch();
    let store = Store::open(&path).unwrap();
    store.write(|tx| (0..MANY).try_for_each(|_| tx.append(event().to("", "nowhere")).map(drop))).unwrap();
    let policy = FailurePolicy::Quarantine { attempts: 1 };
    let projection = store.projection("p").on_failure(policy);
    let projection = projection.spawn(|_, _| Err(Error::app("it cannot be applied"))).unwrap();
    let broker = MemoryBroker::new();
    let relay = store.relay("lost").destination_attempts(1).spawn(broker.publisher()).unwrap();
    until("all are in quarantine", || stats(&store).quarantined == MANY);
    projection.wait_for_position(MANY - 1, SOON).unwrap();
    projection.stop(SOON);
    relay.stop(SOON);
    until("the log is trimmed but for them", || stats(&store).trimmed_to == MANY);
    for what in ["forget_relay", "forget_projection"] {
        let before = stats(&store).commits;
        match what {
            "forget_relay" => store.forget_relay("lost").unwrap(),
            _ => store.forget_projection("p").unwrap(),
        }
        cleaned(&store);
        let commits = stats(&store).commits - before;
        assert!(commits >= MANY / CLEAN_STEP as u64, "{what}: only {commits} commits");
    }
    assert_eq!(events(&store.read().unwrap()).len(), 0, "records stay that nobody needs");
    assert!(store.verify().unwrap().findings.is_empty());
}

/// Goal: a table that is captured anew, while dirty keys of its earlier capture are left, has none of them. Method: it is opened with
/// the capture again at once.
#[test]
fn a_new_capture_has_no_dirty_keys_of_an_earlier_one() {
    let (_folder, path) = scratch();
    let capture = || Capture::json(ROWS).to("e", "r").mode(CaptureMode::NewestValue);
    let store = Store::builder().capture(capture()).open(&path).unwrap();
    store
        .write(|tx| {
            let mut rows = tx.captured_table(ROWS)?;
            (0..20_000).try_for_each(|row| rows.insert(row, row).map(drop))
        })
        .unwrap();
    store.close().unwrap();
    let store = Store::open(&path).unwrap();
    store.end_capture("rows").unwrap();
    assert_eq!(stats(&store).cleanup_tasks, 1, "all dirty keys went in one transaction");
    store.close().unwrap();
    let store = Store::builder().capture(capture()).open(&path).unwrap();
    assert_eq!(stats(&store).captures["rows"].waiting, 0);
    store.write(|tx| tx.captured_table(ROWS)?.insert(7, 7).map(drop)).unwrap();
    cleaned(&store);
    assert_eq!(stats(&store).captures["rows"].waiting, 1);
}

// --- rebuilds -----------------------------------------------------------------------------------------------------------

const TABLES: [&str; 40] = {
    let mut names = [""; 40];
    const ALL: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let mut at = 0;
    while at < 40 {
        names[at] = ALL.split_at(at).1.split_at(1).0;
        at += 1;
    }
    names
};

/// A projection with many tables, each with a row for each event; version 2 meets poison, if it is to.
fn run(store: &Store, version: u32, poison: bool) -> onewrite::Projection {
    let policy = FailurePolicy::Stop { attempts: 1 };
    let mut builder = store.projection("p").version(version).on_failure(policy);
    for name in TABLES {
        builder = builder.table(TableDefinition::<u64, u64>::new(name));
    }
    builder
        .spawn(move |event, tx| {
            if poison && event.seq() == 5 {
                return Err(Error::app("it cannot be applied"));
            }
            for name in TABLES {
                let table = TableDefinition::<u64, u64>::new(name);
                tx.open_table(table)?.insert(event.seq(), u64::from(version))?;
            }
            Ok(())
        })
        .unwrap()
}

fn rows(store: &Store, table: &'static str) -> Vec<u64> {
    let table = store.read().unwrap().open_table(TableDefinition::<u64, u64>::new(table)).unwrap();
    table.iter().unwrap().map(|row| row.unwrap().1.value()).collect()
}

/// Goal: a crash between the cancelling of a rebuild and the removal of its tables is resumed at the next opening, whether or not
/// the projection starts. Method: a copy of the file in between, opened without the projection.
#[test]
fn a_cancelled_rebuild_is_removed_after_a_crash() {
    let (folder, path) = scratch();
    let store = Store::open(&path).unwrap();
    store.write(|tx| (0..9).try_for_each(|_| tx.append(event()).map(drop))).unwrap();
    run(&store, 1, false).wait_until_live(SOON).unwrap();
    let second = run(&store, 2, true);
    assert!(second.wait_until_live(SOON).is_err());
    second.stop(SOON);
    let cancels = {
        let store = store.clone();
        std::thread::spawn(move || store.cancel_rebuild("p").unwrap())
    };
    let copy = loop {
        let tx = store.begin().unwrap();
        if stats(&store).projections["p"].rebuilding.is_none() {
            let copy = crash_copy(&store, folder.path());
            drop(tx);
            break copy;
        }
    };
    assert!(cancels.join().unwrap());
    let copied = Store::open(&copy).unwrap();
    assert!(stats(&copied).cleanup_tasks > 0, "the copy is not of the middle");
    assert_eq!(stats(&copied).projections["p"].cancelled, Some(2));
    cleaned(&copied);
    for name in TABLES {
        assert_eq!(rows(&copied, name), [1; 9]);
    }
    copied.close().unwrap();
    assert_eq!(tables(&copy, "onewrite.rebuild."), Vec::<String>::new());
    cleaned(&store);
    store.close().unwrap();
    assert_eq!(tables(&path, "onewrite.rebuild."), Vec::<String>::new());
}

/// Goal: the swap of a rebuild frees no table: the old ones are removed afterwards, one in a transaction, also after a crash.
/// Method: a copy of the file right after the swap.
#[test]
fn tables_that_a_rebuild_has_replaced_are_removed_one_by_one() {
    let (folder, path) = scratch();
    let store = Store::open(&path).unwrap();
    store.write(|tx| (0..9).try_for_each(|_| tx.append(event()).map(drop))).unwrap();
    run(&store, 1, false).wait_until_live(SOON).unwrap();
    let second = run(&store, 2, false);
    let copy = loop {
        let tx = store.begin().unwrap();
        if stats(&store).projections["p"].version == 2 {
            let copy = crash_copy(&store, folder.path());
            drop(tx);
            break copy;
        }
    };
    second.wait_until_live(SOON).unwrap();
    cleaned(&store);
    second.stop(SOON);
    let copied = Store::open(&copy).unwrap();
    assert!(stats(&copied).cleanup_tasks > 0, "the copy is not of the middle");
    cleaned(&copied);
    for (store, path) in [(store, path), (copied, copy)] {
        for name in TABLES {
            assert_eq!(rows(&store, name), [2; 9]);
        }
        store.close().unwrap();
        for prefix in ["onewrite.rebuild.", "onewrite.replaced."] {
            assert_eq!(tables(&path, prefix), Vec::<String>::new());
        }
    }
}
