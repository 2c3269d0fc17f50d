//! Captured tables: the change and its event in one transaction, dirty keys that coalesce, snapshots of what was there, and a
//! model that a page of code can hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, Rule, Verdict};
use onewrite::redb::{MultimapTableDefinition, ReadableTable, TableDefinition};
use onewrite::{
    BacklogQuota, Capture, CaptureMode, CaptureStats, Change, Error, Event, Operation, RecordedEvent, Relay,
    Retention, Store, StoreBuilder, Transaction,
};
use proptest::prelude::*;

use crate::scratch::{broker, events, until};

const SOON: Duration = Duration::from_secs(20);
const TABLE: TableDefinition<'_, u16, u64> = TableDefinition::new("table");

/// A change as the tests' codec writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reported {
    operation: Operation,
    key: u16,
    new: Option<u64>,
    old: Option<u64>,
}

fn number(operation: Operation) -> u8 {
    [Operation::Insert, Operation::Update, Operation::Remove, Operation::Snapshot]
        .iter()
        .position(|known| *known == operation)
        .unwrap() as u8
}

#[expect(clippy::unnecessary_wraps, reason = "it is a codec")]
fn encode(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
    assert_eq!(change.table, "table");
    let mut payload = vec![number(change.operation)];
    payload.extend(change.key.to_le_bytes());
    for value in [change.new, change.old] {
        payload.push(u8::from(value.is_some()));
        payload.extend(value.unwrap_or_default().to_le_bytes());
    }
    Ok(Event::bytes("changed", payload).key(change.key.to_string()))
}

fn decode(payload: &[u8]) -> Reported {
    let value = |at: usize| {
        (payload[at] == 1).then(|| u64::from_le_bytes(payload[at + 1..at + 9].try_into().unwrap()))
    };
    let operation = match payload[0] {
        0 => Operation::Insert,
        1 => Operation::Update,
        2 => Operation::Remove,
        _ => Operation::Snapshot,
    };
    let key = u16::from_le_bytes(payload[1..3].try_into().unwrap());
    Reported { operation, key, new: value(3), old: value(12) }
}

fn reported(events: &[RecordedEvent]) -> Vec<Reported> {
    let of_table = events.iter().filter(|event| event.event_type() == "changed");
    of_table.map(|event| decode(event.payload())).collect()
}

/// What a follower holds that applies events in order.
fn follow(reported: impl IntoIterator<Item = Reported>) -> BTreeMap<u16, u64> {
    let mut table = BTreeMap::new();
    for change in reported {
        match change.new {
            Some(value) => table.insert(change.key, value),
            None => table.remove(&change.key),
        };
    }
    table
}

fn rows(store: &Store) -> BTreeMap<u16, u64> {
    match store.read().unwrap().open_table(TABLE) {
        Ok(table) => {
            let rows = table.iter().unwrap().map(Result::unwrap);
            rows.map(|(key, value)| (key.value(), value.value())).collect()
        }
        Err(_) => BTreeMap::new(),
    }
}

fn capture(mode: CaptureMode) -> Capture<u16, u64> {
    Capture::with(TABLE, encode).to("e", "r").mode(mode)
}

fn builder() -> StoreBuilder {
    Store::builder().cache_bytes(4 << 20).retention(Retention::forever())
}

fn open(mode: CaptureMode) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = builder().capture(capture(mode)).open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn relay(store: &Store, broker: &MemoryBroker) -> Relay {
    store
        .relay("r")
        .backoff(Duration::from_millis(2), Duration::from_millis(20))
        .spawn(broker.publisher())
        .unwrap()
}

fn put(store: &Store, key: u16, value: u64) {
    store.write(move |tx| tx.captured_table(TABLE)?.insert(key, value).map(drop)).unwrap();
}

fn remove(store: &Store, key: u16) {
    store.write(move |tx| tx.captured_table(TABLE)?.remove(key).map(drop)).unwrap();
}

fn stats(store: &Store) -> CaptureStats {
    store.stats().unwrap().captures["table"]
}

/// Every dirty key is in the log, and everything in the log is with the broker.
fn drained(store: &Store) {
    until("everything is published", || {
        let stats = store.stats().unwrap();
        stats.captures["table"].waiting == 0
            && stats.captures["table"].snapshot_done
            && stats.relays["r"].running.as_ref().is_some_and(|running| running.position == stats.next_seq)
    });
}

/// What the broker got, repeats left out.
fn published(broker: &MemoryBroker) -> Vec<Reported> {
    let mut seen = std::collections::HashSet::new();
    let tap = broker.tap();
    let first = tap.iter().filter(|tapped| seen.insert(tapped.message.message_id.clone()));
    first.map(|tapped| decode(&tapped.message.payload)).collect()
}

/// What would be there had the process died now. The write lock is held meanwhile: a copy of a file that is being written would
/// be torn in a way that no crash tears it.
fn crash_copy(store: &Store, folder: &Path) -> std::path::PathBuf {
    let tx = store.begin().unwrap();
    let copy = crate::scratch::crash_copy(store, folder);
    drop(tx);
    copy
}

// --- every change -------------------------------------------------------------------------------------------------------

/// Goal: each operation leaves its change in the log, with key, new and old value, in order; what changes nothing leaves
/// none. Method: every way to write, within one transaction and across several.
#[test]
fn every_operation_is_an_event() {
    let (_folder, store) = open(CaptureMode::EveryChange);
    let receipt = store
        .write(|tx| {
            let mut table = tx.captured_table(TABLE)?;
            assert!(table.insert(1, 10)?.is_none());
            assert_eq!(table.insert(1, 11)?.map(|old| old.value()), Some(10));
            assert_eq!(table.insert(1, 11)?.map(|old| old.value()), Some(11));
            table.insert(2, 20)?;
            table.insert(3, 30)?;
            assert!(table.remove(9)?.is_none());
            assert_eq!(table.remove(2)?.map(|old| old.value()), Some(20));
            assert_eq!((table.len()?, table.is_empty()?), (2, false));
            assert_eq!(table.read().range(2..)?.count(), 1);
            Ok(())
        })
        .unwrap();
    assert_eq!(receipt.seqs(), [0, 1, 2, 3, 4, 5]);
    store.write(|tx| tx.captured_table(TABLE)?.retain(|key, value| key == 3 && value == 30)).unwrap();
    let change = |operation, key, new, old| Reported { operation, key, new, old };
    let expected = [
        change(Operation::Insert, 1, Some(10), None),
        change(Operation::Update, 1, Some(11), Some(10)),
        change(Operation::Update, 1, Some(11), Some(11)),
        change(Operation::Insert, 2, Some(20), None),
        change(Operation::Insert, 3, Some(30), None),
        change(Operation::Remove, 2, None, Some(20)),
        change(Operation::Remove, 1, None, Some(11)),
    ];
    let events = events(&store.read().unwrap());
    assert_eq!(reported(&events), expected);
    assert!(events.iter().all(|event| event.lane().is_some()), "they have the capture's destination");
    assert_eq!(rows(&store), BTreeMap::from([(3, 30)]));
    assert_eq!(stats(&store).waiting, 0);
}

/// Goal: JSON as documented: type, payload, key; the old value only if asked for; composite keys.
#[cfg(feature = "json")]
#[test]
fn json_is_as_documented() {
    const SEATS: TableDefinition<'_, (u32, &str), Option<bool>> = TableDefinition::new("seats");
    const NAMES: TableDefinition<'_, &str, &str> = TableDefinition::new("names");
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .capture(Capture::json(SEATS).to("e", "seats"))
        .capture(Capture::json(NAMES).unpublished().old_values(true))
        .open(folder.path().join("a.redb"))
        .unwrap();
    let tx = store.begin().unwrap();
    tx.captured_table(SEATS).unwrap().insert((7, "A"), Some(true)).unwrap();
    let mut names = tx.captured_table(NAMES).unwrap();
    names.insert("ann", "Ann \"the\" first").unwrap();
    names.insert("ann", "Ann").unwrap();
    names.remove("ann").unwrap();
    names.insert("k".repeat(300).as_str(), "").unwrap();
    drop(names);
    tx.commit().unwrap();
    let events = events(&store.read().unwrap());
    let json = |at: usize| String::from_utf8(events[at].payload().to_vec()).unwrap();
    assert_eq!(json(0), r#"{"table":"seats","key":[7,"A"],"operation":"insert","new":true}"#);
    assert_eq!(events[0].event_type(), "seats.changed");
    assert_eq!(events[0].content_type(), Some(onewrite::codec::JSON));
    assert_eq!(events[0].key(), Some(r#"[7,"A"]"#));
    assert_eq!(
        json(1),
        r#"{"table":"names","key":"ann","operation":"insert","new":"Ann \"the\" first","old":null}"#
    );
    let update =
        r#"{"table":"names","key":"ann","operation":"update","new":"Ann","old":"Ann \"the\" first"}"#;
    assert_eq!(json(2), update);
    assert_eq!(json(3), r#"{"table":"names","key":"ann","operation":"remove","new":null,"old":"Ann"}"#);
    assert_eq!(events[3].key(), Some("ann"));
    assert!(events[4].key().unwrap().starts_with("crc32-"));
    assert!(json(4).contains(&"k".repeat(300)));
}

/// P1. Goal: a rollback takes row and event, or row and dirty key, and a failing closure in a group only its own. Method: both
/// modes; an exclusive transaction that is dropped; a group of three, the middle one of which fails after it wrote.
#[test]
fn row_and_event_are_one() {
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let (folder, store) = open(mode);
        let tx = store.begin().unwrap();
        tx.captured_table(TABLE).unwrap().insert(1, 1).unwrap();
        drop(tx);
        assert_eq!((rows(&store).len(), store.stats().unwrap().next_seq, stats(&store).waiting), (0, 0, 0));

        let tx = store.begin().unwrap();
        let writers: Vec<_> = (0..3)
            .map(|n: u16| {
                let store = store.clone();
                std::thread::spawn(move || {
                    let written = store.write(move |tx| {
                        tx.captured_table(TABLE)?.insert(n, u64::from(n))?;
                        if n == 1 { Err(Error::app("no")) } else { Ok(()) }
                    });
                    assert_eq!(written.is_err(), n == 1);
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(50));
        drop(tx);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(rows(&store), BTreeMap::from([(0, 0), (2, 2)]));
        let expected = if mode == CaptureMode::EveryChange { (2, 0) } else { (0, 2) };
        assert_eq!((store.stats().unwrap().next_seq, stats(&store).waiting), expected);

        // The same is found in the file.
        let crashed = crash_copy(&store, folder.path());
        let store = builder().capture(capture(mode)).open(crashed).unwrap();
        assert_eq!(rows(&store), BTreeMap::from([(0, 0), (2, 2)]));
        assert_eq!((store.stats().unwrap().next_seq, stats(&store).waiting), expected);
    }
}

/// Goal: a codec that fails, fails the write before anything is changed, so that a closure that goes on all the same commits
/// no row without its event. Method: a codec that refuses one value, in insert, remove and retain; a quota that is reached.
#[test]
fn a_failing_codec_fails_the_write() {
    let folder = tempfile::tempdir().unwrap();
    let picky = |change: &Change<'_, u16, u64>| {
        if change.new == Some(13) || change.old == Some(26) {
            return Err(Error::app("unlucky"));
        }
        encode(change)
    };
    let quota = BacklogQuota::events(5).and_bytes(1 << 20);
    let builder = builder().backlog_quota(quota).capture(Capture::with(TABLE, picky).to("e", "r"));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let refused = store.write(|tx| tx.captured_table(TABLE)?.insert(1, 13).map(drop)).unwrap_err();
    assert_eq!(refused.to_string(), "unlucky");
    assert_eq!(rows(&store), BTreeMap::new());
    store
        .write(|tx| {
            let mut table = tx.captured_table(TABLE)?;
            table.insert(1, 26)?;
            table.insert(2, 2)?;
            assert!(table.insert(2, 13).is_err());
            assert!(table.remove(1).is_err());
            table.insert(0, 0)?;
            // Row 0 goes before the one that cannot, row 2 is not reached.
            assert!(table.retain(|_, _| false).is_err());
            table.insert(5, 5)?;
            assert!(matches!(table.insert(6, 6), Err(Error::BacklogFull { .. })));
            Ok(())
        })
        .unwrap();
    assert_eq!(rows(&store), BTreeMap::from([(1, 26), (2, 2), (5, 5)]));
    assert_eq!(follow(reported(&events(&store.read().unwrap()))), rows(&store));
}

// --- no way around ------------------------------------------------------------------------------------------------------

/// Goal: nobody writes a captured table around the capture: not by another method, not from a process that does not know
/// of it, until the capture is ended for good. Method: each way to open or delete it; reading stays free.
#[test]
fn writing_around_is_refused() {
    const MULTI: MultimapTableDefinition<'_, u16, u64> = MultimapTableDefinition::new("table");
    fn refused<T>(opened: onewrite::Result<T>) {
        assert!(matches!(opened, Err(Error::CapturedTable { name }) if name == "table"));
    }
    fn all_refused(tx: &Transaction) {
        refused(tx.open_table(TABLE));
        refused(tx.open_multimap_table(MULTI));
        refused(tx.delete_table(TABLE));
    }
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let (folder, store) = open(mode);
        put(&store, 1, 1);
        all_refused(&store.begin().unwrap());
        assert!(matches!(store.end_capture("table"), Err(Error::CapturedTable { .. })));
        assert!(matches!(store.end_capture("other"), Err(Error::NotCaptured { name }) if name == "other"));

        // Another process, which has not registered it.
        let crashed = crash_copy(&store, folder.path());
        let other = builder().open(crashed).unwrap();
        let tx = other.begin().unwrap();
        all_refused(&tx);
        assert!(matches!(tx.captured_table(TABLE), Err(Error::NotCaptured { .. })));
        drop(tx);
        assert_eq!(rows(&other), BTreeMap::from([(1, 1)]));
        assert_eq!(stats(&other).waiting, u64::from(mode == CaptureMode::NewestValue));
        other.end_capture("table").unwrap();
        assert!(matches!(other.end_capture("table"), Err(Error::NotCaptured { .. })));
        other.write(|tx| Ok(tx.open_table(TABLE)?.insert(1, 2).map(drop)?)).unwrap();
        assert!(other.stats().unwrap().captures.is_empty());
        let path = other.path().to_owned();
        other.close().unwrap();
        // It is as if it had never been captured: no dirty key is left, and it may be captured anew.
        builder().capture(capture(mode)).open(&path).unwrap().close().unwrap();
        let again = builder().capture(capture(mode)).open(&path).unwrap();
        assert_eq!(stats(&again).waiting, 0);
    }
}

/// Goal: types and settings that cannot work are reported at once, naming the table.
#[test]
fn wrong_registrations_are_refused() {
    const AS_TEXT: TableDefinition<'_, &str, u64> = TableDefinition::new("table");
    let (_folder, store) = open(CaptureMode::EveryChange);
    put(&store, 1, 1);
    let tx = store.begin().unwrap();
    let error = tx.captured_table(AS_TEXT).unwrap_err();
    assert_eq!(
        error.to_string(),
        "table `table` is captured as <u16, u64>, and was asked for as <&str, u64>"
    );
    drop(tx);
    let path = store.path().to_owned();
    store.close().unwrap();

    let setting = |builder: StoreBuilder| match builder.open(&path) {
        Err(Error::Setting(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let other_types = Capture::with(AS_TEXT, |_| Ok(Event::bytes("t", "")));
    assert!(setting(builder().capture(other_types)).contains("table"));
    let twice =
        builder().capture(capture(CaptureMode::EveryChange)).capture(capture(CaptureMode::EveryChange));
    assert_eq!(setting(twice), "setting `capture`: table `table` is registered twice");
    let ours: TableDefinition<'_, u16, u64> = TableDefinition::new("onewrite.log");
    assert!(setting(builder().capture(Capture::with(ours, encode))).contains("onewrite.log"));
    #[cfg(feature = "json")]
    {
        assert!(setting(builder().capture(Capture::json(TABLE))).contains("`table`"));
        let old = Capture::json(TABLE).unpublished().old_values(true).mode(CaptureMode::NewestValue);
        assert!(setting(builder().capture(old)).contains("old values"));
        let long = "n".repeat(250);
        let long: TableDefinition<'_, u16, u64> = TableDefinition::new(&long);
        assert!(setting(builder().capture(Capture::json(long).unpublished())).contains("event type"));
    }
    // After all those refusals the file can still be opened.
    builder().capture(capture(CaptureMode::EveryChange)).open(&path).unwrap();
}

// --- newest value -------------------------------------------------------------------------------------------------------

/// Goal: a key that changes a thousand times while the broker is away is published once, with its newest value; a removed
/// one is published as removed; afterwards nothing waits. Method: the broker's own tap.
#[test]
fn an_outage_is_one_event_per_key() {
    let (_folder, store) = open(CaptureMode::NewestValue);
    let broker = broker();
    let relay = relay(&store, &broker);
    put(&store, 1, 0);
    drained(&store);
    broker.go_down();
    until("the relay has heard", || relay.status().state != onewrite::RelayState::Connected);
    for value in 1..=1000 {
        put(&store, 1, value);
    }
    put(&store, 2, 5);
    remove(&store, 2);
    assert_eq!(stats(&store).waiting, 2);
    assert_eq!(store.stats().unwrap().next_seq, 1, "nothing is appended while the broker is away");
    broker.come_up();
    drained(&store);
    let change = |operation, key, new| Reported { operation, key, new, old: None };
    let expected = [
        change(Operation::Update, 1, Some(0)),
        // A pass goes on behind the key that the last one ended with.
        change(Operation::Remove, 2, None),
        change(Operation::Update, 1, Some(1000)),
    ];
    assert_eq!(published(&broker), expected);
    assert!(relay.stop(SOON).clean);
}

/// Goal: a key that changes all the time does not keep others from being published. Method: threads change few low keys
/// without pause while 3,000 others, behind them in key order, wait: more than ten passes.
#[test]
fn a_hot_key_starves_nobody() {
    let (_folder, store) = open(CaptureMode::NewestValue);
    store
        .write(|tx| {
            let mut table = tx.captured_table(TABLE)?;
            (1000..4000).try_for_each(|key| table.insert(key, 1).map(drop))
        })
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let hot: Vec<_> = (0..2_u64)
        .map(|thread| {
            let (store, stop) = (store.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut value = 0;
                while !stop.load(SeqCst) {
                    value += 1;
                    let write = move |tx: &Transaction| {
                        let mut table = tx.captured_table(TABLE)?;
                        let first = u16::try_from(thread * 300).unwrap();
                        (first..first + 300).try_for_each(|key| table.insert(key, value).map(drop))
                    };
                    store.write(write).unwrap();
                }
            })
        })
        .collect();
    let broker = broker();
    let relay = relay(&store, &broker);
    until("the others are published", || {
        published(&broker).iter().filter(|reported| reported.key >= 1000).count() >= 3000
    });
    stop.store(true, SeqCst);
    hot.into_iter().for_each(|hot| hot.join().unwrap());
    drained(&store);
    assert_eq!(follow(published(&broker)), rows(&store));
    assert!(relay.stop(SOON).clean);
}

/// Goal: while the broker takes its time, dirty keys wait and coalesce; only half a window of them is in the log. Method: a broker
/// that is there and confirms nothing, and many more dirty keys than a window.
#[test]
fn passes_keep_to_the_relay_s_pace() {
    let (_folder, store) = open(CaptureMode::NewestValue);
    let broker = broker();
    broker.script(Rule::any().always().then(Verdict::HoldConfirm));
    let relay = store.relay("r").window_events(100).spawn(broker.publisher()).unwrap();
    let all = |value: u64| {
        let write = move |tx: &Transaction| {
            let mut table = tx.captured_table(TABLE)?;
            (0..2000).try_for_each(|key| table.insert(key, value).map(drop))
        };
        store.write(write).unwrap();
    };
    all(1);
    until("a pass has come", || store.stats().unwrap().next_seq > 0);
    std::thread::sleep(Duration::from_millis(100));
    let next_seq = store.stats().unwrap().next_seq;
    assert!(
        next_seq <= 50 + crate::support::tuning::CAPTURE_PASS_KEYS as u64,
        "{next_seq} events are in the log"
    );
    all(2);
    broker.clear_script();
    broker.release_confirms();
    drained(&store);
    assert_eq!(follow(published(&broker)), rows(&store));
    assert_eq!(published(&broker).len(), 2000 + usize::try_from(next_seq).unwrap());
    assert!(relay.stop(SOON).clean);
}

/// Goal: dirty keys outlive the process, and without a relay they wait. Method: a crash and a clean end with dirty keys waiting; the
/// relay starts after that.
#[test]
fn dirty_keys_wait_for_a_relay_and_outlive_the_process() {
    let (folder, store) = open(CaptureMode::NewestValue);
    put(&store, 1, 1);
    put(&store, 2, 2);
    let crashed = crash_copy(&store, folder.path());
    let store = builder().capture(capture(CaptureMode::NewestValue)).open(crashed).unwrap();
    put(&store, 2, 3);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((stats(&store).waiting, store.stats().unwrap().next_seq), (2, 0));
    let path = store.path().to_owned();
    store.close().unwrap();
    // The snapshot of another table needs no relay, and does not change that.
    const OTHER: TableDefinition<'_, u16, u64> = TableDefinition::new("other");
    let other = Capture::with(OTHER, |_| Ok(Event::bytes("other", "").unpublished())).snapshot(true);
    let store = builder().capture(capture(CaptureMode::NewestValue)).capture(other).open(path).unwrap();
    until("the other is backfilled", || store.stats().unwrap().captures["other"].snapshot_done);
    assert_eq!((stats(&store).waiting, store.stats().unwrap().next_seq), (2, 0));
    let broker = broker();
    let relay = relay(&store, &broker);
    drained(&store);
    assert_eq!(follow(published(&broker)), BTreeMap::from([(1, 1), (2, 3)]));
    assert_eq!(published(&broker).len(), 2);
    assert!(relay.stop(SOON).clean);
}

/// Goal: a key whose codec errs or panics stays dirty and is counted; all others are published; once the codec works,
/// so is it. Method: a codec that is told which keys to fail on, among more keys than a pass takes.
#[test]
fn a_failing_codec_holds_nobody() {
    static BROKEN: AtomicBool = AtomicBool::new(true);
    static TRIES: AtomicU64 = AtomicU64::new(0);
    fn fragile(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
        if BROKEN.load(SeqCst) && change.key == 3 {
            TRIES.fetch_add(1, SeqCst);
            return Err(Error::app("not today"));
        }
        if BROKEN.load(SeqCst) && change.key == 5 {
            std::panic::resume_unwind(Box::new("not today"));
        }
        encode(change)
    }
    let folder = tempfile::tempdir().unwrap();
    let fragile = Capture::with(TABLE, fragile).to("e", "r").mode(CaptureMode::NewestValue);
    let store = builder().capture(fragile).open(folder.path().join("a.redb")).unwrap();
    store
        .write(|tx| {
            let mut table = tx.captured_table(TABLE)?;
            (0..600).try_for_each(|key| table.insert(key, 1).map(drop))
        })
        .unwrap();
    let broker = broker();
    let began = Instant::now();
    let relay = relay(&store, &broker);
    until("all others are published", || published(&broker).len() == 598);
    until("both are counted", || (stats(&store).failed, stats(&store).waiting) == (2, 2));
    // Writes go on, and so do passes; what failed waits for its time, it is not tried with every pass.
    for value in 2..20 {
        put(&store, 7, value);
        until("key 7 is published", || published(&broker).iter().any(|reported| reported.new == Some(value)));
    }
    // After 1 s, 2 s more, 4 s more, and so on; one more for the try that may have begun just now.
    let allowed = 2 + u64::from((began.elapsed().as_secs() + 1).ilog2());
    assert!(TRIES.load(SeqCst) <= allowed, "it was tried {} times", TRIES.load(SeqCst));
    BROKEN.store(false, SeqCst);
    drained(&store);
    // What has been mended is noted a little after the commit.
    until("none is counted", || stats(&store).failed == 0);
    assert_eq!(follow(published(&broker)), rows(&store));
    assert!(relay.stop(SOON).clean);
}

/// Goal: a key whose codec has failed is tried again though nothing else happens: no commit, no confirm. Method: it is the
/// only one.
#[test]
fn a_lone_failing_key_is_tried_again() {
    static BROKEN: AtomicBool = AtomicBool::new(true);
    fn fragile(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
        if BROKEN.load(SeqCst) { Err(Error::app("not today")) } else { encode(change) }
    }
    let folder = tempfile::tempdir().unwrap();
    let fragile = Capture::with(TABLE, fragile).to("e", "r").mode(CaptureMode::NewestValue);
    let store = builder().capture(fragile).open(folder.path().join("a.redb")).unwrap();
    put(&store, 1, 1);
    let broker = broker();
    let relay = relay(&store, &broker);
    until("it has failed", || stats(&store).failed == 1);
    BROKEN.store(false, SeqCst);
    drained(&store);
    assert_eq!(follow(published(&broker)), rows(&store));
    assert!(relay.stop(SOON).clean);
}

/// Goal: under a backlog quota dirty keys are never lost, and writes go on: only passes wait for room. Method: a quota smaller
/// than what is dirty, and a broker that comes up late.
#[test]
fn a_quota_holds_passes_not_writes() {
    let folder = tempfile::tempdir().unwrap();
    let quota = BacklogQuota::events(10).and_bytes(1 << 20);
    let builder = Store::builder().backlog_quota(quota).capture(capture(CaptureMode::NewestValue));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    for key in 0..50 {
        put(&store, key, 1);
    }
    let broker = broker();
    let relay = relay(&store, &broker);
    until("some are published", || {
        let stats = stats(&store);
        assert_eq!(stats.failed, 0, "a full backlog is no fault of a codec");
        stats.waiting < 30
    });
    drained(&store);
    assert_eq!(published(&broker).len(), 50);
    assert_eq!(follow(published(&broker)), rows(&store));
    assert!(relay.stop(SOON).clean);
}

/// Goal: the mode may change with dirty keys waiting; none is lost. Method: dirty keys under `NewestValue`, then `EveryChange` from the
/// next opening on, with writes on dirty keys before a relay comes.
#[test]
fn a_change_of_mode_loses_no_dirty_key() {
    let (_folder, store) = open(CaptureMode::NewestValue);
    for key in 0..4 {
        put(&store, key, 1);
    }
    let path = store.path().to_owned();
    store.close().unwrap();
    let store = builder().capture(capture(CaptureMode::EveryChange)).open(&path).unwrap();
    assert_eq!((stats(&store).mode, stats(&store).waiting), (CaptureMode::EveryChange, 4));
    put(&store, 1, 2);
    remove(&store, 2);
    assert_eq!(store.stats().unwrap().next_seq, 2);
    let broker = broker();
    let relay = relay(&store, &broker);
    drained(&store);
    assert_eq!(follow(published(&broker)), BTreeMap::from([(0, 1), (1, 2), (3, 1)]));
    assert!(relay.stop(SOON).clean);
    let path = store.path().to_owned();
    store.close().unwrap();
    let store = builder().open(&path).unwrap();
    assert_eq!(stats(&store).mode, CaptureMode::EveryChange, "the file remembers");
}

// --- the first switch-on ------------------------------------------------------------------------------------------------

/// A store that knows no capture yet, with so many rows of value 1.
fn filled(path: &Path, rows: u16) {
    let store = builder().open(path).unwrap();
    store
        .write(move |tx| {
            let mut table = tx.open_table(TABLE)?;
            (0..rows).try_for_each(|key| Ok(table.insert(key, 1).map(drop)?))
        })
        .unwrap();
    store.close().unwrap();
}

/// Goal: what is there at switch-on is published, marked as such, between the writes of others; whoever applies the log in
/// order ends with the table; through crashes nothing is skipped and nothing of the snapshot is repeated; a second opening
/// publishes none. Method: both modes; writers change, remove and add rows all the while; several copies of the file as a crash
/// would leave them, each brought to its end.
#[test]
fn a_snapshot_under_writers_and_crashes_is_the_table() {
    for (round, mode) in [CaptureMode::EveryChange, CaptureMode::NewestValue].into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        filled(&path, 4000);
        let open = |path: &Path| builder().capture(capture(mode).snapshot(true)).open(path).unwrap();
        let store = open(&path);
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..2)
            .map(|seed: u64| {
                let (store, stop) = (store.clone(), Arc::clone(&stop));
                let mut random = crate::scratch::Random(seed + 10 * round as u64);
                std::thread::spawn(move || {
                    while !stop.load(SeqCst) {
                        let (key, value) = (random.below(4500) as u16, random.next());
                        if value % 3 == 0 { remove(&store, key) } else { put(&store, key, value) }
                    }
                })
            })
            .collect();
        let mut crashed = Vec::new();
        while crashed.len() < 4 && !stats(&store).snapshot_done {
            crashed.push(crash_copy(&store, folder.path()));
        }
        until("the snapshot is done", || stats(&store).snapshot_done);
        stop.store(true, SeqCst);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let mut unfinished = 0;
        let mut judge = |store: &Store| {
            let broker = broker();
            unfinished += usize::from(!stats(store).snapshot_done);
            let relay = relay(store, &broker);
            drained(store);
            let reported = reported(&events(&store.read().unwrap()));
            assert_eq!(follow(reported.iter().copied()), rows(store));
            let mut snapshots = BTreeMap::new();
            for reported in reported.iter().filter(|reported| reported.operation == Operation::Snapshot) {
                *snapshots.entry(reported.key).or_insert(0) += 1;
            }
            assert!(snapshots.values().all(|times| *times == 1), "a row of the snapshot is repeated");
            assert!(snapshots.len() > 1000, "only {} rows were reported as a snapshot", snapshots.len());
            assert!(relay.stop(SOON).clean);
        };
        judge(&store);
        for path in crashed {
            judge(&open(&path));
        }
        assert!(unfinished > 0, "no copy caught the snapshot on its way");
        // It was the first switch-on once.
        let next_seq = store.stats().unwrap().next_seq;
        store.close().unwrap();
        let store = open(&path);
        assert!(stats(&store).snapshot_done);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(store.stats().unwrap().next_seq, next_seq);
    }
}

/// Goal: a row that has changed before the snapshot comes to it is reported once, by that change. Method: a full backlog makes
/// the snapshot wait. All rows change before the relay makes room; one pass takes them all.
#[test]
fn a_changed_row_is_reported_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path, 100);
    let broker = broker();
    let store = builder().open(&path).unwrap();
    relay(&store, &broker).stop(SOON); // from now on what is appended is backlog
    let other = || Event::bytes("other", "").to("e", "r");
    store.write(move |tx| (0..200).try_for_each(|_| tx.append(other()).map(drop))).unwrap();
    store.close().unwrap();
    let quota = BacklogQuota::events(200);
    let capture = capture(CaptureMode::NewestValue).snapshot(true);
    let store = builder().backlog_quota(quota).capture(capture).open(&path).unwrap();
    for key in 0..100 {
        put(&store, key, 2);
    }
    assert_eq!((stats(&store).waiting, stats(&store).snapshot_done), (100, false));
    let relay = relay(&store, &broker);
    drained(&store);
    let published = reported(&events(&store.read().unwrap()));
    assert_eq!(published.len(), 100);
    assert!(
        published.iter().all(|reported| reported.operation == Operation::Update && reported.new == Some(2))
    );
    assert!(relay.stop(SOON).clean);
}

/// Goal: a row whose codec fails during a snapshot is not lost: it is reported as a snapshot once the codec works, with the value
/// it has then, unless it is gone. Method: three such rows, one of which is removed meanwhile, one changed.
#[test]
fn a_snapshot_row_whose_codec_fails_is_reported_later() {
    static BROKEN: AtomicBool = AtomicBool::new(true);
    fn fragile(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
        if BROKEN.load(SeqCst) && change.operation == Operation::Snapshot && change.key % 100 == 7 {
            return Err(Error::app("not today"));
        }
        encode(change)
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path, 300);
    let fragile = Capture::with(TABLE, fragile).to("e", "r").snapshot(true);
    let store = builder().capture(fragile).open(&path).unwrap();
    until("the snapshot is done", || stats(&store).snapshot_done);
    assert_eq!((stats(&store).waiting, stats(&store).failed), (3, 3));
    remove(&store, 107);
    put(&store, 207, 2);
    BROKEN.store(false, SeqCst);
    let broker = broker();
    let relay = relay(&store, &broker);
    drained(&store);
    let published = published(&broker);
    assert_eq!(follow(published.iter().copied()), rows(&store));
    let reported = |key| -> Vec<_> {
        published
            .iter()
            .filter(|reported| reported.key == key)
            .map(|reported| (reported.operation, reported.new))
            .collect()
    };
    assert_eq!(reported(7), [(Operation::Snapshot, Some(1))]);
    assert_eq!(reported(107), [(Operation::Remove, None)]);
    assert_eq!(reported(207), [(Operation::Update, Some(2)), (Operation::Snapshot, Some(2))]);
    assert!(relay.stop(SOON).clean);
}

// --- the model ----------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
enum Step {
    Insert(u16, u64),
    Remove(u16),
    /// Keeps keys below.
    Retain(u16),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Commit,
    Fail,
    /// An exclusive transaction that is dropped.
    Drop,
}

#[derive(Debug, Clone)]
enum Op {
    Write(Vec<Step>, End),
    Exclusive(Vec<Step>, End),
    Down,
    Up,
    Drain,
    Reopen,
    Crash,
    /// From the next opening on.
    ChangeMode,
    /// The relay stops, or is started again.
    Relay,
    /// The codec fails on rows of some keys, or is mended: then those rows are written again.
    Codec,
}

fn op() -> impl Strategy<Value = Op> {
    let step = prop_oneof![
        6 => (0..8_u16, 0..100_u64).prop_map(|(key, value)| Step::Insert(key, value)),
        3 => (0..8_u16).prop_map(Step::Remove),
        1 => (0..8_u16).prop_map(Step::Retain),
    ];
    let steps = prop::collection::vec(step, 0..6);
    let end = prop_oneof![4 => Just(End::Commit), 1 => Just(End::Fail), 1 => Just(End::Drop)];
    prop_oneof![
        10 => (steps.clone(), end.clone()).prop_map(|(steps, end)| Op::Write(steps, end)),
        3 => (steps, end).prop_map(|(steps, end)| Op::Exclusive(steps, end)),
        1 => Just(Op::Down),
        1 => Just(Op::Up),
        1 => Just(Op::Drain),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
        1 => Just(Op::ChangeMode),
        2 => Just(Op::Relay),
        2 => Just(Op::Codec),
    ]
}

fn take_steps(tx: &Transaction, steps: &[Step], end: End) -> onewrite::Result<()> {
    let mut table = tx.captured_table(TABLE)?;
    for step in steps {
        match step {
            Step::Insert(key, value) => drop(table.insert(key, value)?),
            Step::Remove(key) => drop(table.remove(key)?),
            Step::Retain(below) => table.retain(|key, _| key < *below)?,
        }
    }
    if end == End::Commit { Ok(()) } else { Err(Error::app("no")) }
}

#[derive(Debug, Clone, Default)]
struct Model {
    table: BTreeMap<u16, u64>,
    changes: Vec<Reported>,
}

impl Model {
    fn take_steps(&mut self, steps: &[Step]) {
        for step in steps {
            match *step {
                Step::Insert(key, value) => {
                    let old = self.table.insert(key, value);
                    let operation = if old.is_some() { Operation::Update } else { Operation::Insert };
                    self.changes.push(Reported { operation, key, new: Some(value), old });
                }
                Step::Remove(key) => self.remove(key),
                Step::Retain(below) => {
                    let gone: Vec<_> = self.table.range(below..).map(|(key, _)| *key).collect();
                    gone.into_iter().for_each(|key| self.remove(key));
                }
            }
        }
    }

    fn remove(&mut self, key: u16) {
        if let Some(old) = self.table.remove(&key) {
            self.changes.push(Reported { operation: Operation::Remove, key, new: None, old: Some(old) });
        }
    }
}

/// Keys that a broken codec fails on.
fn is_fragile(key: u16) -> bool {
    key % 3 == 1
}

/// Mends the codec. A new write of a row ends the wait of its key, so nothing waits for a next try afterwards.
fn mend(store: &Store, model: &mut Model, broken: &AtomicBool) {
    if broken.swap(false, SeqCst) {
        let keys = model.table.iter().filter(|(key, _)| is_fragile(**key));
        let steps: Vec<_> = keys.map(|(key, value)| Step::Insert(*key, *value)).collect();
        let written = steps.clone();
        store.write(move |tx| take_steps(tx, &written, End::Commit)).unwrap();
        model.take_steps(&steps);
    }
}

fn play(ops: &[Op], mut mode: CaptureMode, changes_mode: bool) {
    let folder = tempfile::tempdir().unwrap();
    let mut path = folder.path().join("a.redb");
    let broker = broker();
    let broken = Arc::new(AtomicBool::new(false));
    let open = |path: &Path, mode| {
        let broken = Arc::clone(&broken);
        let codec = move |change: &Change<'_, u16, u64>| match broken.load(SeqCst) {
            true if is_fragile(change.key) && change.new.is_some() => Err(Error::app("not today")),
            _ => encode(change),
        };
        builder().capture(Capture::with(TABLE, codec).to("e", "r").mode(mode)).open(path).unwrap()
    };
    let mut store = open(&path, mode);
    let mut running = Some(relay(&store, &broker));
    let mut model = Model::default();
    let mut active = mode;
    for op in ops {
        match op {
            Op::Write(steps, end) => {
                let (written, end) = (steps.clone(), *end);
                let answer = store.write(move |tx| take_steps(tx, &written, end));
                assert_eq!(answer.is_ok(), end == End::Commit);
                if end == End::Commit {
                    model.take_steps(steps);
                }
            }
            Op::Exclusive(steps, end) => {
                let tx = store.begin().unwrap();
                let _ = take_steps(&tx, steps, *end);
                match end {
                    End::Commit => {
                        tx.commit().unwrap();
                        model.take_steps(steps);
                    }
                    End::Fail => tx.rollback().unwrap(),
                    End::Drop => drop(tx),
                }
            }
            Op::Down => broker.go_down(),
            Op::Up => broker.come_up(),
            Op::Drain => {
                broker.come_up();
                mend(&store, &mut model, &broken);
                running.get_or_insert_with(|| relay(&store, &broker));
                drained(&store);
                let reported = reported(&events(&store.read().unwrap()));
                assert_eq!(follow(reported), model.table);
            }
            Op::Reopen => {
                if mode == CaptureMode::EveryChange {
                    mend(&store, &mut model, &broken);
                }
                let runs = running.take().map(|relay| relay.stop(Duration::from_secs(1))).is_some();
                store.close().unwrap();
                (store, active) = (open(&path, mode), mode);
                running = runs.then(|| relay(&store, &broker));
            }
            Op::Crash => {
                if mode == CaptureMode::EveryChange {
                    mend(&store, &mut model, &broken);
                }
                path = crash_copy(&store, folder.path());
                let runs = running.take().map(|relay| relay.stop(Duration::from_secs(1))).is_some();
                (store, active) = (open(&path, mode), mode);
                running = runs.then(|| relay(&store, &broker));
            }
            Op::Relay => match running.take() {
                Some(relay) => drop(relay.stop(Duration::from_secs(1))),
                None => running = Some(relay(&store, &broker)),
            },
            // With an event for each change, a codec that fails makes writes fail.
            Op::Codec if active == CaptureMode::EveryChange => {}
            Op::Codec if broken.load(SeqCst) => mend(&store, &mut model, &broken),
            Op::Codec => broken.store(true, SeqCst),
            Op::ChangeMode if changes_mode => {
                mode = match mode {
                    CaptureMode::EveryChange => CaptureMode::NewestValue,
                    _ => CaptureMode::EveryChange,
                };
            }
            Op::ChangeMode => {}
        }
    }
    broker.come_up();
    mend(&store, &mut model, &broken);
    let running = running.unwrap_or_else(|| relay(&store, &broker));
    drained(&store);
    assert_eq!(rows(&store), model.table);
    let log = reported(&events(&store.read().unwrap()));
    assert_eq!(follow(log.iter().copied()), model.table);
    assert_eq!(follow(published(&broker)), model.table);
    if changes_mode {
        return;
    }
    if mode == CaptureMode::EveryChange {
        assert_eq!(log, model.changes);
        return;
    }
    let count = |reported: &[Reported], key| reported.iter().filter(|reported| reported.key == key).count();
    for key in 0..8 {
        assert!(count(&log, key) <= count(&model.changes, key), "key {key} has more events than changes");
    }
    running.stop(Duration::from_secs(1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: under `EveryChange` the log is exactly the changes that were committed. Method: random writes, rollbacks, outages,
    /// clean and unclean ends, on the store and on a model.
    #[test]
    fn every_change_is_the_model_s(ops in prop::collection::vec(op(), 1..24)) {
        play(&ops, CaptureMode::EveryChange, false);
    }

    /// Goal: under `NewestValue`, once everything has drained, the events applied in order give the table, and no key has more
    /// of them than changes. Method: the same.
    #[test]
    fn newest_values_are_the_table(ops in prop::collection::vec(op(), 1..24)) {
        play(&ops, CaptureMode::NewestValue, false);
    }

    /// Goal: the same table, however often the mode changes on the way.
    #[test]
    fn a_mixture_of_modes_is_the_table(ops in prop::collection::vec(op(), 1..24)) {
        play(&ops, CaptureMode::NewestValue, true);
    }
}
