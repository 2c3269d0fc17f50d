//! Rounds of captured tables when something goes wrong or is slow: each test is a fault that a review has found.

use std::time::{Duration, Instant};

use onewrite::publish::{ExchangeKind, MemoryBroker, QueueOptions};
use onewrite::redb::{StorageError, TableDefinition};
use onewrite::{Capture, CaptureMode, Change, Error, Event, Store};

const A: TableDefinition<'_, u16, u64> = TableDefinition::new("a");
const B: TableDefinition<'_, u16, u64> = TableDefinition::new("b");
const SOON: Duration = Duration::from_secs(20);

fn broker() -> MemoryBroker {
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("e", ExchangeKind::Fanout);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "").unwrap();
    broker
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn waiting(store: &Store, table: &str) -> u64 {
    store.stats().unwrap().captures[table].waiting
}

fn event(change: &Change<'_, u16, u64>) -> Event {
    Event::bytes("c", change.key.to_string()).key(change.key.to_string()).to("e", "r")
}

// --- codecs that fail ---------------------------------------------------------------------------------------------------

/// Goal: an error of a codec is about its key alone, whatever its kind. Method: the errors that a round has a meaning of its
/// own for, from a codec that looks something up in another file; every other key of both tables is published.
#[test]
fn no_error_of_a_codec_stops_a_round() {
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
        let relay = store.relay("r").publish_to(broker.publisher()).unwrap();
        until("all others are published", || waiting(&store, "a") + waiting(&store, "b") == 1);
        let captures = store.stats().unwrap().captures;
        assert_eq!((captures["a"].waiting, captures["a"].failed), (1, 1));
        relay.stop(Duration::from_secs(1));
    }
}
