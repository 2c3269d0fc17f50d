//! Deferred work (trimming, writing what is derived from the log) has bounds that nothing moves: time, bytes, number.
//!
//! The progress of relays never gets a commit of its own here, so that trimming has the application's commits alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::tuning::{PROJECTION_SKIP_MAX, TRIM_DEFER_BYTES_MAX, TRIM_DEFER_MS_MAX};
use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::time::{Clock, Now};
use onewrite::{Event, EventFilter, Relay, Retention, Store, StoreBuilder};

const SOON: Duration = Duration::from_secs(60);

/// A clock that stands still unless it is moved.
#[derive(Debug, Default)]
struct Moved(AtomicU64);

impl Clock for Moved {
    fn now(&self) -> Now {
        let ms = self.0.load(Ordering::SeqCst);
        Now { mono_ms: ms, wall_ms: 1_800_000_000_000 + ms }
    }
}

/// A store whose writer thread commits nothing by itself, and a relay of it.
fn draining(folder: &tempfile::TempDir, clock: &Arc<Moved>, retention: Retention) -> (Store, Relay) {
    let builder: StoreBuilder = Store::builder().progress_delay(Duration::from_secs(3600));
    let builder = builder.clock(Arc::clone(clock) as Arc<dyn Clock>).retention(retention);
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default().max_length(1));
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    (store, relay)
}

fn put(store: &Store, events: usize, bytes: usize) {
    let receipt = store.write(move |tx| {
        let event = || Event::bytes("t", vec![7; bytes]).to("", "q");
        (0..events).try_for_each(|_| tx.append(event()).map(drop))
    });
    receipt.unwrap().wait_confirmed(SOON).unwrap();
}

/// Goal: large events that come without a pause leave the file soon after they are confirmed, within a bound in bytes. Method:
/// 200 events of 256 KiB, each confirmed before the next, with a clock that stands still; the file and the log are looked at
/// after each.
#[test]
fn large_events_without_a_pause_are_trimmed() {
    const BYTES: u64 = 256 << 10;
    let folder = tempfile::tempdir().unwrap();
    let (store, relay) = draining(&folder, &Arc::default(), Retention::until_confirmed());
    let left_max = TRIM_DEFER_BYTES_MAX / BYTES + 8;
    for n in 0..200 {
        put(&store, 1, BYTES as usize);
        let stats = store.stats().unwrap();
        assert!(stats.next_seq - stats.trimmed_to <= left_max, "event {n}: {stats:?}");
        let file_bytes = std::fs::metadata(store.path()).unwrap().len();
        assert!(file_bytes <= 32 << 20, "event {n}: the file has {file_bytes} bytes");
    }
    relay.stop(SOON);
}

/// Goal: small events that come without a pause leave the log soon after they are confirmed, within a bound in time. Method:
/// one each 10 ms of virtual time, each confirmed before the next; the log is looked at after each.
#[test]
fn small_events_without_a_pause_are_trimmed() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::<Moved>::default();
    let (store, relay) = draining(&folder, &clock, Retention::until_confirmed());
    for n in 0..500_u64 {
        clock.0.fetch_add(10, Ordering::SeqCst);
        put(&store, 1, 10);
        let stats = store.stats().unwrap();
        assert!(stats.next_seq - stats.trimmed_to <= 2 * TRIM_DEFER_MS_MAX / 10 + 10, "event {n}: {stats:?}");
    }
    relay.stop(SOON);
}

/// Goal: the same where retention keeps the newest: what it lets go leaves as soon. Method: as above, with retention by number.
#[test]
fn what_retention_lets_go_is_trimmed_without_a_pause() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::<Moved>::default();
    for retention in [Retention::default().keep_events(50), Retention::default().keep_bytes(50 * 20_000)] {
        let folder = tempfile::tempdir_in(folder.path()).unwrap();
        let (store, relay) = draining(&folder, &clock, retention);
        for n in 0..600_u64 {
            put(&store, 1, 20_000);
            let stats = store.stats().unwrap();
            let left_max = 50 + TRIM_DEFER_BYTES_MAX / 20_000 + 10;
            assert!(stats.next_seq - stats.trimmed_to <= left_max, "event {n}: {stats:?}");
        }
        relay.stop(SOON);
    }
}

/// Goal: trimming keeps pace with transactions of more events than one step of it removes. Method: 20 transactions of 2,000 events,
/// each confirmed before the next, with a clock that stands still.
#[test]
fn trimming_keeps_pace_with_large_transactions() {
    let folder = tempfile::tempdir().unwrap();
    let (store, relay) = draining(&folder, &Arc::default(), Retention::until_confirmed());
    for n in 0..20 {
        put(&store, 2_000, 10);
        let stats = store.stats().unwrap();
        assert!(stats.next_seq - stats.trimmed_to <= 4 * 4_096, "transaction {n}: {stats:?}");
    }
    relay.stop(SOON);
}

/// Goal: what a projection's filter lets pass holds the log for a bounded time, also while events come without a pause. Method: a
/// projection that takes none of them, and fewer events than it lets pass before it writes its position for their number.
#[test]
fn a_filter_that_takes_nothing_holds_the_log_for_a_bounded_time() {
    let folder = tempfile::tempdir().unwrap();
    let (store, relay) = draining(&folder, &Arc::default(), Retention::until_confirmed());
    let projection = store.projection("none").filter(EventFilter::all().event_type("another"));
    let projection = projection.spawn(|_, _| Ok(())).unwrap();
    let trimmed = (0..PROJECTION_SKIP_MAX / 2).any(|_| {
        put(&store, 1, 20_000);
        std::thread::sleep(Duration::from_millis(2));
        store.stats().unwrap().trimmed_to > 0
    });
    assert!(trimmed, "{:?}", store.stats());
    projection.stop(SOON);
    relay.stop(SOON);
}
