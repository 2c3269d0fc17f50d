//! Only a relay that runs sets the pace of captured tables, and a table that waits says why.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use onewrite::broker::{Epoch, MemoryBroker, Publisher, PublisherEvents};
use onewrite::redb::TableDefinition;
use onewrite::{
    BacklogQuota, Capture, CaptureMode, CaptureStats, CaptureWait, Change, Event, Outgoing, Relay,
    RelayState, Store, StoreBuilder,
};

use crate::scratch::{broker, pause, until};

const TABLE: TableDefinition<'_, u16, u64> = TableDefinition::new("table");
const SOON: Duration = Duration::from_secs(30);
const MODES: [CaptureMode; 2] = [CaptureMode::EveryChange, CaptureMode::NewestValue];

fn relay(store: &Store, broker: &MemoryBroker) -> Relay {
    store.relay("r").spawn(broker.publisher()).unwrap()
}

#[expect(clippy::unnecessary_wraps, reason = "it is a codec")]
fn encode(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
    Ok(Event::bytes("changed", change.key.to_string()).key(change.key.to_string()))
}

fn capture(mode: CaptureMode) -> Capture<u16, u64> {
    Capture::with(TABLE, encode).to("e", "r").mode(mode).snapshot(true)
}

fn unpublished(mode: CaptureMode) -> Capture<u16, u64> {
    Capture::with(TABLE, encode).unpublished().mode(mode).snapshot(true)
}

/// Makes a file with so many rows and no capture. A relay has run on it once.
fn filled(path: &Path, rows: u16) {
    let store = Store::open(path).unwrap();
    store
        .write(move |tx| {
            let mut table = tx.open_table(TABLE)?;
            (0..rows).try_for_each(|key| Ok(table.insert(key, 1).map(drop)?))
        })
        .unwrap();
    relay(&store, &broker()).stop(SOON);
    assert!(store.stats().unwrap().relays.contains_key("r"));
    store.close().unwrap();
}

/// As [`filled`], in a new folder that lives as long as its handle.
fn file(rows: u16) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path, rows);
    (folder, path)
}

fn put(store: &Store, key: u16, value: u64) {
    store.write(move |tx| tx.captured_table(TABLE)?.insert(key, value).map(drop)).unwrap();
}

fn figures(store: &Store) -> CaptureStats {
    store.stats().unwrap().captures["table"]
}

fn next_seq(store: &Store) -> u64 {
    store.stats().unwrap().next_seq
}

fn open(builder: StoreBuilder, path: &Path) -> Store {
    builder.open(path).unwrap()
}

/// Opens a store whose codec takes 0.1 ms a row: a snapshot of 5,000 rows lasts half a second at least.
fn slow(mode: CaptureMode, path: &Path) -> Store {
    let codec = |change: &Change<'_, u16, u64>| {
        std::thread::sleep(Duration::from_micros(100));
        encode(change)
    };
    let capture = Capture::with(TABLE, codec).to("e", "r").mode(mode).snapshot(true);
    open(Store::builder().capture(capture), path)
}

/// Goal: a relay that once ran and is not started delays no snapshot. Once started, it publishes the whole snapshot.
#[test]
fn a_relay_that_is_not_started_holds_no_snapshot() {
    for mode in MODES {
        let (_folder, path) = file(1000);
        let store = open(Store::builder().capture(capture(mode)), &path);
        until("the snapshot is done", || figures(&store).snapshot_done);
        assert_eq!((next_seq(&store), figures(&store).waits_for), (1000, None));
        let broker = broker();
        let relay = relay(&store, &broker);
        until("all is published", || broker.tap().len() == 1000);
        relay.stop(SOON);
    }
}

/// Goal: of several relays that the file knows, only those that run count. Method: one relay is not started. Another is
/// started during the snapshot, without its broker, and delays the rest. Then it stops, and the snapshot ends.
#[test]
fn a_relay_that_stops_lets_the_snapshot_go() {
    for mode in MODES {
        let (_folder, path) = file(5000);
        let broker = broker();
        broker.go_down();
        let store = slow(mode, &path);
        let other = store.relay("other").spawn(broker.publisher()).unwrap();
        until("it waits for the broker", || figures(&store).waits_for == Some(CaptureWait::Broker));
        assert!(!figures(&store).snapshot_done);
        other.stop(SOON);
        until("the snapshot is done", || figures(&store).snapshot_done);
        assert_eq!(next_seq(&store), 5000);
    }
}

/// A publisher that ends at once: its relay fails, and its handle is still there.
#[derive(Debug)]
struct Gone;

impl Publisher for Gone {
    fn start(&mut self, _: PublisherEvents) -> Result<(), onewrite::SettingError> {
        Ok(())
    }

    fn publish(&mut self, _: Epoch, _: Outgoing) {}

    fn stop(&mut self, _: Duration) {}
}

/// Goal: a relay that has failed does not run, though its handle lives.
#[test]
fn a_relay_that_has_failed_holds_nothing() {
    for mode in MODES {
        let (_folder, path) = file(5000);
        let store = slow(mode, &path);
        let failed = store.relay("r").spawn(Gone).unwrap();
        until("it has failed", || matches!(failed.status().state, RelayState::Failed(_)));
        until("the snapshot is done", || figures(&store).snapshot_done);
        assert_eq!(next_seq(&store), 5000);
        drop(failed);
    }
}

/// Goal: a relay that runs sets the pace, and the figures name what a table waits for. Method: dirty keys of a published table
/// wait for a relay, for the broker, and for a paused relay in turn. They are published when the wait ends.
#[test]
fn a_wait_says_what_it_waits_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = open(Store::builder().capture(capture(CaptureMode::NewestValue)), &path);
    until("an empty table is backfilled", || figures(&store).snapshot_done);
    assert_eq!(figures(&store).waits_for, None);
    put(&store, 1, 1);
    assert_eq!(figures(&store).waits_for, Some(CaptureWait::Relay));
    let broker = broker();
    broker.go_down();
    let relay = relay(&store, &broker);
    until("it waits for the broker", || figures(&store).waits_for == Some(CaptureWait::Broker));
    broker.come_up();
    until("it is published", || broker.tap().len() == 1);
    pause(&relay);
    put(&store, 1, 2);
    assert_eq!(figures(&store).waits_for, Some(CaptureWait::PausedRelay));
    broker.go_down();
    until("it waits for the broker", || figures(&store).waits_for == Some(CaptureWait::Broker));
    broker.come_up();
    until("it waits for the relay", || figures(&store).waits_for == Some(CaptureWait::PausedRelay));
    assert_eq!((figures(&store).waiting, next_seq(&store)), (1, 1));
    relay.resume();
    until("it is published", || broker.tap().len() == 2);
    until("nothing waits", || figures(&store).waiting == 0);
    assert_eq!(figures(&store).waits_for, None);
    relay.stop(SOON);
    put(&store, 1, 3);
    assert_eq!(figures(&store).waits_for, Some(CaptureWait::Relay));
    store.close().unwrap();
    let store = open(Store::builder(), &path);
    assert_eq!(figures(&store).waits_for, Some(CaptureWait::Registration));
    assert!(CaptureWait::Registration.to_string().contains("registered"));
}

/// Goal: a table of which only failed rows wait says so.
#[test]
fn a_table_of_rows_that_fail_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let sick = |_: &Change<'_, u16, u64>| Err(onewrite::Error::app("sick"));
    let capture = Capture::with(TABLE, sick).unpublished().mode(CaptureMode::NewestValue);
    let store = open(Store::builder().capture(capture), &folder.path().join("a.redb"));
    put(&store, 1, 1);
    until("it has failed", || figures(&store).waits_for == Some(CaptureWait::Retry));
    assert_eq!((figures(&store).waiting, figures(&store).failed), (1, 1));
}

/// Goal: the backlog quota bounds a snapshot without a relay, and the figures say so. Writes of state go on. The snapshot
/// goes on once a relay publishes.
#[test]
fn a_quota_bounds_a_snapshot_without_a_relay() {
    let (_folder, path) = file(300);
    let quota = BacklogQuota::events(100);
    let builder = Store::builder().backlog_quota(quota).capture(capture(CaptureMode::NewestValue));
    let store = open(builder, &path);
    until("it is full", || figures(&store).waits_for == Some(CaptureWait::Quota));
    assert_eq!((next_seq(&store), figures(&store).snapshot_done), (100, false));
    put(&store, 1000, 1);
    let broker = broker();
    let relay = relay(&store, &broker);
    until("all is published", || figures(&store).snapshot_done && figures(&store).waiting == 0);
    let reported =
        || broker.tap().iter().map(|tapped| tapped.message.payload.to_vec()).collect::<BTreeSet<_>>();
    until("all is with the broker", || reported().len() == 301);
    relay.stop(SOON);
}

/// Goal: a table whose events stay in the log needs no relay. Its snapshot ends and its dirty keys become events while no relay
/// runs, while a relay is paused, and while its broker is away.
#[test]
fn an_unpublished_table_needs_no_relay() {
    for mode in MODES {
        for (runs, pauses) in [(false, false), (true, false), (true, true)] {
            let (_folder, path) = file(500);
            let broker = broker();
            if !pauses {
                broker.go_down();
            }
            let store = open(Store::builder().capture(unpublished(mode)), &path);
            let relay = runs.then(|| relay(&store, &broker));
            if let Some(relay) = relay.as_ref().filter(|_| pauses) {
                pause(relay);
            }
            put(&store, 1, 2);
            until("the snapshot is done", || figures(&store).snapshot_done);
            put(&store, 2, 3);
            until("nothing waits", || figures(&store).waiting == 0);
            assert_eq!(figures(&store).waits_for, None);
            assert!((501..=502).contains(&next_seq(&store)), "{}", next_seq(&store));
            drop(relay);
        }
    }
}

/// Goal: dirty keys of such a table coalesce, also after an idle time. Method: a key changes 300 times. The log gets its last
/// value, and far fewer events than changes.
#[test]
fn dirty_keys_of_an_unpublished_table_coalesce() {
    let folder = tempfile::tempdir().unwrap();
    let capture = Capture::with(TABLE, |change: &Change<'_, u16, u64>| {
        Ok(Event::bytes("changed", change.new.unwrap_or_default().to_string()))
    });
    let capture = capture.unpublished().mode(CaptureMode::NewestValue);
    let store = open(Store::builder().capture(capture), &folder.path().join("a.redb"));
    for burst in 1..=2 {
        let began = Instant::now();
        let before = next_seq(&store);
        (0..300).for_each(|n| put(&store, 1, burst * 1000 + n));
        until("nothing waits", || figures(&store).waiting == 0);
        let last = crate::scratch::events(&store.read().unwrap()).pop().unwrap();
        assert_eq!(last.payload(), (burst * 1000 + 299).to_string().as_bytes());
        // One when it begins, one for each quarter of a second, one at the end.
        let allowed = 3 + began.elapsed().as_millis() as u64 / crate::support::tuning::CAPTURE_OWN_MS;
        assert!(next_seq(&store) - before <= allowed, "{} events", next_seq(&store) - before);
    }
}
