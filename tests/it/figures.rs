//! The figures of a store say what they are called, also where something stands in the way.

use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::{Event, Stats, Store};

const SOON: Duration = Duration::from_secs(30);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn append(store: &Store, to: &'static str) {
    store.write(move |tx| tx.append(Event::bytes("a", "1").key("k").to("", to))).unwrap();
}

/// What waits, of a store or of a relay: events, and whether bytes and ages agree with them.
fn backlog(stats: &Stats) -> u64 {
    assert_eq!(stats.backlog_events > 0, stats.backlog_bytes > 0, "{stats:?}");
    assert_eq!(stats.backlog_events > 0, stats.backlog_age_ms.is_some(), "{stats:?}");
    assert_eq!(stats.parked > 0, stats.parked_age_ms.is_some(), "{stats:?}");
    assert_eq!(stats.retrying > 0, stats.retrying_age_ms.is_some(), "{stats:?}");
    assert_eq!(stats.scheduled > 0, stats.scheduled_age_ms.is_some(), "{stats:?}");
    stats.backlog_events
}

/// Goal: events that wait behind a quarantined one of their key are in the backlog with their age; the quarantined one is not. The same
/// holds while the relay does not run, after the store was opened again, and once nothing waits. Method: ten events behind one
/// whose queue does not exist.
#[test]
fn what_waits_behind_a_quarantined_event_has_an_age() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let store = Store::open(&path).unwrap();
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    assert_eq!(backlog(&store.stats().unwrap()), 0);
    append(&store, "missing");
    until("the quarantine", || store.stats().unwrap().quarantined == 1);
    let stats = store.stats().unwrap();
    assert_eq!((backlog(&stats), stats.relays["r"].backlog_first), (0, None), "all is quarantined");
    (0..10).for_each(|_| append(&store, "q"));
    until("the parked events", || store.stats().unwrap().parked == 10);
    let stats = store.stats().unwrap();
    assert_eq!((backlog(&stats), stats.relays["r"].backlog_first), (10, Some(1)));
    assert_eq!(stats.backlog_age_ms, stats.parked_age_ms);
    let bytes = stats.backlog_bytes;
    let _ = relay.stop(SOON);
    store.close().unwrap();

    let store = Store::open(&path).unwrap();
    let stats = store.stats().unwrap();
    assert_eq!((backlog(&stats), stats.parked, stats.backlog_bytes), (10, 10, bytes), "no relay runs");
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    broker.declare_queue("missing", QueueOptions::default());
    store.quarantine("r").unwrap().redrive(0).unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    let stats = store.stats().unwrap();
    assert_eq!((backlog(&stats), stats.backlog_bytes, stats.backlog_age_ms), (0, 0, None));
    assert_eq!((stats.parked, stats.quarantined, stats.relays["r"].confirmed), (0, 0, 11));
    let _ = relay.stop(SOON);
}

/// Goal: with several relays, events and bytes of the backlog are of one and the same relay, the age is that of the oldest event of any, and
/// what is deferred is added up. Method: a relay that has done everything, one that holds scheduled events, one that has never run
/// since.
#[test]
fn the_figures_of_several_relays_agree() {
    let folder = tempfile::tempdir().unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let start = |name: &str| store.relay(name).spawn(broker.publisher()).unwrap();
    let _ = start("idle").stop(SOON);
    let (one, two) = (start("one"), start("two"));
    let later = std::time::SystemTime::now() + Duration::from_secs(3600);
    let scheduled = move |tx: &onewrite::Transaction| {
        tx.append(Event::bytes("a", "1").to("", "q").not_before(later)).map(drop)
    };
    store.write(scheduled).unwrap();
    append(&store, "q");
    until("both", || {
        let stats = store.stats().unwrap();
        ["one", "two"]
            .iter()
            .all(|name| stats.relays[*name].confirmed == 1 && stats.relays[*name].position == 2)
    });
    let stats = store.stats().unwrap();
    assert_eq!((backlog(&stats), stats.scheduled), (2, 2));
    let of = |name: &str| {
        let relay = &stats.relays[name];
        (relay.backlog_events, relay.scheduled, relay.backlog_first)
    };
    assert_eq!([of("idle"), of("one"), of("two")], [(2, 0, Some(0)), (1, 1, Some(0)), (1, 1, Some(0))]);
    assert_eq!(stats.backlog_bytes, stats.relays["idle"].backlog_bytes);
    assert!(stats.relays["one"].backlog_bytes < stats.backlog_bytes);
    assert!(stats.relays["idle"].running.is_none());
    let _ = (one.stop(SOON), two.stop(SOON));
}
