//! Passes of captured tables when something goes wrong or is slow: each test is a fault that a review has found.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{Rule, Verdict};
use onewrite::redb::{ReadableTable, StorageError, TableDefinition};
use onewrite::{Capture, CaptureMode, Change, Error, Event, Store, Transaction};

use crate::scratch::{broker, until};

const A: TableDefinition<'_, u16, u64> = TableDefinition::new("a");
const B: TableDefinition<'_, u16, u64> = TableDefinition::new("b");
const BAD: TableDefinition<'_, u16, Unlucky> = TableDefinition::new("a");

/// A number of which one value cannot be read for a while.
#[derive(Debug)]
struct Unlucky;

static CURED: AtomicBool = AtomicBool::new(false);

impl redb::Value for Unlucky {
    type SelfType<'a> = u64;
    type AsBytes<'a> = [u8; 8];

    fn fixed_width() -> Option<usize> {
        Some(8)
    }

    fn from_bytes<'a>(data: &'a [u8]) -> u64
    where
        Self: 'a,
    {
        let value = u64::from_le_bytes(data.try_into().unwrap());
        assert!(value != 13 || CURED.load(SeqCst));
        value
    }

    fn as_bytes<'a, 'b: 'a>(value: &'a u64) -> [u8; 8]
    where
        Self: 'b,
    {
        value.to_le_bytes()
    }

    fn type_name() -> redb::TypeName {
        redb::TypeName::new("unlucky")
    }
}

fn waiting(store: &Store, table: &str) -> u64 {
    store.stats().unwrap().captures[table].waiting
}

fn event(change: &Change<'_, u16, u64>) -> Event {
    Event::bytes("c", change.key.to_string()).key(change.key.to_string()).to("e", "r")
}

/// A file with these rows, before there was a capture.
fn filled(path: &Path, name: &'static str, rows: u16) {
    let store = Store::open(path).unwrap();
    let fill = move |tx: &Transaction| {
        let mut table = tx.open_table(TableDefinition::<u16, u64>::new(name))?;
        (0..rows).try_for_each(|key| Ok(table.insert(key, 1).map(drop)?))
    };
    store.write(fill).unwrap();
    store.close().unwrap();
}

fn snapshot_done(store: &Store, table: &str) -> bool {
    store.stats().unwrap().captures[table].snapshot_done
}

// --- codecs that fail ---------------------------------------------------------------------------------------------------

/// Goal: an error of a codec is about its key alone, whatever its kind. Method: the errors that a pass has a meaning of its
/// own for, from a codec that looks something up in another file; every other key of both tables is published.
#[test]
fn no_error_of_a_codec_stops_a_pass() {
    let full = || Error::BacklogFull { events: 1, bytes: 1, events_max: 1, bytes_max: 1 };
    let errors: [fn() -> Error; 2] = [|| StorageError::ValueTooLarge(1).into(), full];
    for error in errors {
        let folder = tempfile::tempdir().unwrap();
        let a =
            Capture::with(A, move |change| if change.key == 3 { Err(error()) } else { Ok(event(change)) });
        let b = Capture::with(B, |change| Ok(event(change)));
        let (a, b) = (a.mode(CaptureMode::NewestValue), b.mode(CaptureMode::NewestValue));
        let store = Store::builder().capture(a).capture(b).open(folder.path().join("a.redb")).unwrap();
        store
            .write(|tx| {
                (0..10).try_for_each(|key| tx.captured_table(A)?.insert(key, 1).map(drop))?;
                (0..10).try_for_each(|key| tx.captured_table(B)?.insert(key, 1).map(drop))
            })
            .unwrap();
        let broker = broker();
        let relay = store.relay("r").spawn(broker.publisher()).unwrap();
        until("all others are published", || waiting(&store, "a") + waiting(&store, "b") == 1);
        // What has failed is noted a little after the commit.
        until("the failed key is counted", || store.stats().unwrap().captures["a"].failed == 1);
        assert_eq!(waiting(&store, "a"), 1);
        relay.stop(Duration::from_secs(1));
    }
}

// --- the relay's pace ---------------------------------------------------------------------------------------------------

/// Goal: traffic that never lets the window become half empty starves no dirty key, as long as the broker keeps up. Method: a
/// broker that confirms each event after a second, and 400 of a window of 512 on their way all the time; the dirty key is
/// published while that goes on.
#[test]
fn steady_traffic_starves_no_dirty_key() {
    let folder = tempfile::tempdir().unwrap();
    let a = Capture::with(A, |change| Ok(event(change))).mode(CaptureMode::NewestValue);
    let store = Store::builder().capture(a).open(folder.path().join("a.redb")).unwrap();
    let broker = broker();
    broker.script(Rule::any().always().then(Verdict::DelayConfirm(Duration::from_secs(1))));
    let relay = store.relay("r").window_events(512).spawn(broker.publisher()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let traffic = {
        let (store, stop) = (store.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut next = Instant::now();
            while !stop.load(SeqCst) {
                let event = || Event::bytes("x", "").to("e", "r");
                store.write(move |tx| (0..4).try_for_each(|_| tx.append(event()).map(drop))).unwrap();
                next += Duration::from_millis(10);
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        })
    };
    let in_flight = || store.stats().unwrap().relays["r"].running.as_ref().map_or(0, |r| r.in_flight);
    until("more than half of the window is on its way", || in_flight() > 350);
    store.write(|tx| tx.captured_table(A)?.insert(1, 1).map(drop)).unwrap();
    until("the dirty key is published", || waiting(&store, "a") == 0);
    stop.store(true, SeqCst);
    traffic.join().unwrap();
    relay.stop(Duration::from_secs(1));
}

/// Goal: a broker that confirms nothing gets no passes, however long dirty keys wait. Method: it takes over half of a window, and
/// two seconds go by; then it confirms one event, and a small pass comes, once.
#[test]
fn a_silent_broker_gets_no_pass() {
    let folder = tempfile::tempdir().unwrap();
    let a = Capture::with(A, |change| Ok(event(change))).mode(CaptureMode::NewestValue);
    let store = Store::builder().capture(a).open(folder.path().join("a.redb")).unwrap();
    let broker = broker();
    broker.script(Rule::any().times(1).then(Verdict::DelayConfirm(Duration::from_secs(4))));
    broker.script(Rule::any().always().then(Verdict::HoldConfirm));
    let relay = store.relay("r").window_events(100).spawn(broker.publisher()).unwrap();
    let event = || Event::bytes("x", "").to("e", "r");
    store.write(move |tx| (0..80).try_for_each(|_| tx.append(event()).map(drop))).unwrap();
    let next_seq = || store.stats().unwrap().next_seq;
    until("they are on their way", || broker.tap().len() == 80);
    store
        .write(|tx| {
            let mut table = tx.captured_table(A)?;
            (0..1000).try_for_each(|key| table.insert(key, 1).map(drop))
        })
        .unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(next_seq(), 80);
    until("one confirm has come, and a small pass", || next_seq() > 80);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(next_seq(), 80 + crate::support::tuning::CAPTURE_SMALL_PASS_KEYS as u64);
    broker.clear_script();
    broker.release_confirms();
    until("all is published", || waiting(&store, "a") == 0);
    relay.stop(Duration::from_secs(1));
}

// --- snapshots ----------------------------------------------------------------------------------------------------------

/// Goal: the writer ends once the last handle is gone, also in the middle of a snapshot. Method: a write drops that handle on
/// the writer thread while a large table is backfilled slowly; the file can be opened again at once.
#[test]
fn the_writer_ends_with_the_last_handle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    // All of them take 4 s at least.
    filled(&path, "a", 20_000);
    let a = Capture::with(A, |_| {
        std::thread::sleep(Duration::from_micros(200));
        Ok(Event::bytes("c", "").unpublished())
    });
    let store = Store::builder().capture(a.snapshot(true)).open(&path).unwrap();
    let slot: Arc<Mutex<Option<Store>>> = Arc::default();
    let gone = Arc::new(AtomicBool::new(false));
    let (in_write, reported) = (Arc::clone(&slot), Arc::clone(&gone));
    let mut write = Box::pin(store.write_async(move |_| {
        until("this is the last handle", || in_write.lock().unwrap().is_some());
        std::thread::sleep(Duration::from_millis(20));
        drop(in_write.lock().unwrap().take());
        reported.store(true, SeqCst);
        Ok(())
    }));
    let waker = std::task::Waker::noop();
    assert!(write.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
    drop(write);
    *slot.lock().unwrap() = Some(store);
    until("the last handle is gone", || gone.load(SeqCst));
    let began = Instant::now();
    until("the file is free", || Store::open(&path).is_ok());
    assert!(began.elapsed() < Duration::from_secs(2), "only after {:?}", began.elapsed());
}

/// Goal: without a relay, a pass that has failed is repeated. Method: while a table is backfilled, writes that leave their group
/// unable to commit, the pass in it included; the snapshot comes to its end, and no row is told twice.
#[test]
fn a_snapshot_without_a_relay_survives_failed_commits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path, "a", 20_000);
    let a = Capture::with(A, |change| {
        std::thread::sleep(Duration::from_micros(20));
        Ok(Event::bytes("c", change.key.to_string()).unpublished())
    });
    let store = Store::builder().capture(a.snapshot(true)).open(&path).unwrap();
    let failed = (0..10).filter(|_| {
        // redb refuses to commit once a table was left in the middle of this.
        let write = store.write(|tx| {
            let mut table = tx.open_table(TableDefinition::<u8, u8>::new("x"))?;
            table.insert(1, 1)?;
            let unwind = || table.retain(|_, _| std::panic::resume_unwind(Box::new(())));
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(unwind));
            Ok(())
        });
        write.is_err()
    });
    assert!(failed.count() > 0);
    until("the snapshot is done", || snapshot_done(&store, "a"));
    assert_eq!(store.stats().unwrap().next_seq, 20_000);
}

/// Goal: a snapshot does not depend on a relay that the file knows. Method: the store's only relay does not run. It is
/// forgotten during the first pass of the snapshot.
#[test]
fn a_snapshot_goes_on_when_the_relay_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path, "a", 1000);
    let store = Store::open(&path).unwrap();
    store.relay("r").spawn(broker().publisher()).unwrap().stop(Duration::from_secs(1));
    store.close().unwrap();
    let begun = Arc::new(AtomicBool::new(false));
    let in_codec = Arc::clone(&begun);
    let a = Capture::with(A, move |change| {
        in_codec.store(true, SeqCst);
        Ok(event(change))
    });
    let store = Store::builder().capture(a.snapshot(true)).open(&path).unwrap();
    until("it has begun", || begun.load(SeqCst));
    store.forget_relay("r").unwrap();
    until("the snapshot is done", || snapshot_done(&store, "a"));
    assert_eq!(store.stats().unwrap().next_seq, 1000);
}

/// Goal: dirty keys leave a snapshot its half of a pass in bytes as in keys. Method: two writers that change large rows all the
/// time, more than a pass takes, next to a snapshot of small ones.
#[test]
fn large_hot_rows_starve_no_snapshot() {
    const BIG: TableDefinition<'_, u16, &[u8]> = TableDefinition::new("big");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path, "a", 1000);
    let a = Capture::with(A, |change| Ok(event(change))).snapshot(true);
    let big = Capture::with(BIG, |c| Ok(Event::bytes("big", "").key(c.key.to_string()).to("e", "r")));
    let big = big.mode(CaptureMode::NewestValue);
    let store = Store::builder().capture(a).capture(big).open(&path).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers = [(); 2].map(|()| {
        let (store, stop) = (store.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(SeqCst) {
                let heat = |tx: &Transaction| {
                    let mut table = tx.captured_table(BIG)?;
                    let value = vec![7; 64 << 10];
                    (0..40).try_for_each(|key| table.insert(key, value.as_slice()).map(drop))
                };
                store.write(heat).unwrap();
            }
        })
    });
    until("more waits than a pass takes", || waiting(&store, "big") == 40);
    let relay = store.relay("r").spawn(broker().publisher()).unwrap();
    until("the snapshot is done", || snapshot_done(&store, "a"));
    stop.store(true, SeqCst);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    relay.stop(Duration::from_secs(1));
}

/// Goal: a row that cannot be read holds no other row and no other table, and not for ever: it waits as a row whose codec
/// fails. Method: such a row in the table that is backfilled first, with a relay and without one; then it can be read.
#[test]
fn an_unreadable_row_holds_no_other_table() {
    for with_relay in [true, false] {
        CURED.store(false, SeqCst);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        store.write(|tx| Ok(tx.open_table(BAD)?.insert(1, 13).map(drop)?)).unwrap();
        store.close().unwrap();
        filled(&path, "b", 1000);
        let a = Capture::with(BAD, |_| Ok(Event::bytes("c", "").to("e", "r"))).snapshot(true);
        let b = Capture::with(B, |change| Ok(event(change))).snapshot(true);
        let store = Store::builder().capture(a).capture(b).open(&path).unwrap();
        let broker = broker();
        let mut relay = with_relay.then(|| store.relay("r").spawn(broker.publisher()).unwrap());
        until("both snapshots are done", || snapshot_done(&store, "a") && snapshot_done(&store, "b"));
        until("the row is counted", || store.stats().unwrap().captures["a"].failed == 1);
        assert_eq!(waiting(&store, "a"), 1);
        CURED.store(true, SeqCst);
        // A dirty key is published for a relay.
        relay.get_or_insert_with(|| store.relay("r").spawn(broker.publisher()).unwrap());
        until("it is tried again", || waiting(&store, "a") == 0);
    }
}

// --- panics -------------------------------------------------------------------------------------------------------------

/// Goal: a panic in `retain` that the closure catches hurts nobody: its neighbours in the group commit, and rows and log stay
/// one. Method: a codec that panics at the fourth of five rows, in a group of three writes; then a `keep` that does.
#[test]
fn a_caught_panic_in_retain_hurts_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let a = Capture::with(A, |change| {
        assert_ne!(change.old, Some(13));
        Ok(event(change))
    });
    let store = Store::builder().capture(a).open(folder.path().join("a.redb")).unwrap();
    let fill = |tx: &Transaction| {
        let mut table = tx.captured_table(A)?;
        (0..5).try_for_each(|key| table.insert(key, 10 + u64::from(key)).map(drop))
    };
    store.write(fill).unwrap();
    let holding = store.begin().unwrap();
    let writers = [0, 1, 2].map(|n: u16| {
        let store = store.clone();
        std::thread::spawn(move || {
            let write = move |tx: &Transaction| {
                let mut table = tx.captured_table(A)?;
                if n != 1 {
                    return table.insert(100 + n, 1).map(drop);
                }
                let mut caught = |keep: fn() -> bool| {
                    let retain = || table.retain(|key, _| key >= 100 || keep());
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(retain)).is_err()
                };
                assert!(caught(|| false));
                assert!(caught(|| std::panic::resume_unwind(Box::new(()))));
                Ok(())
            };
            store.write(write).map(drop)
        })
    });
    std::thread::sleep(Duration::from_millis(50));
    drop(holding);
    writers.into_iter().for_each(|writer| writer.join().unwrap().unwrap());
    let keys = |tx: &Transaction| {
        let table = tx.captured_table(A)?;
        let keys: Result<Vec<_>, _> =
            table.read().iter()?.map(|row| row.map(|(key, _)| key.value())).collect();
        Ok(keys?)
    };
    let left = store.write(keys).unwrap();
    assert_eq!(left.value(), &[3, 4, 100, 102]);
    // Five inserts, three removes, two inserts.
    assert_eq!(store.stats().unwrap().next_seq, 10);
}
