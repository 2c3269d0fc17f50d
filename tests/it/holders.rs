//! What keeps the log or the file from shrinking is reported: by `Stats` at any time, by one warning after a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::time::ManualClock;
use onewrite::{Event, Holder, HolderKind, Retention, Store, StoreBuilder};

const SOON: Duration = Duration::from_secs(30);
const WARN_AFTER: Duration = Duration::from_secs(3600);

fn builder(clock: &ManualClock) -> StoreBuilder {
    Store::builder().clock(Arc::new(clock.clone())).holder_warn_after(WARN_AFTER)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn append(store: &Store, events: usize) {
    let event = || Event::bytes("a", vec![7; 100]).to("", "q");
    store.write(move |tx| (0..events).try_for_each(|_| tx.append(event()).map(drop))).unwrap();
}

fn of(store: &Store, kind: HolderKind) -> Option<Holder> {
    store.stats().unwrap().holders.into_iter().find(|holder| holder.kind == kind)
}

/// A store whose file knows a relay and a projection that no longer run; another relay does all the work.
fn renamed(path: &std::path::Path, clock: &ManualClock, broker: &MemoryBroker) -> (Store, onewrite::Relay) {
    let store = builder(clock).open(path).unwrap();
    let _ = store.relay("rabbit").spawn(broker.publisher()).unwrap().stop(SOON);
    let _ = store.projection("balances").spawn(|_, _| Ok(())).unwrap().stop(SOON);
    store.close().unwrap();
    let store = builder(clock).open(path).unwrap();
    let relay = store.relay("rabbitmq").spawn(broker.publisher()).unwrap();
    append(&store, 300);
    until("the confirms", || store.stats().unwrap().relays["rabbitmq"].position == 300);
    (store, relay)
}

fn broker() -> MemoryBroker {
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    broker
}

/// Goal: the figures name a relay and a projection of an earlier release, what they hold and since when; forgetting them frees the log.
/// Method: a file in which both have run under another name.
#[test]
fn a_forgotten_name_is_listed_with_what_it_holds() {
    let (folder, clock, broker) = (tempfile::tempdir().unwrap(), ManualClock::new(), broker());
    let (store, relay) = renamed(&folder.path().join("a.redb"), &clock, &broker);
    let _ = store.stats().unwrap();
    clock.advance(Duration::from_secs(90));
    let (rabbit, balances) =
        (of(&store, HolderKind::Relay).unwrap(), of(&store, HolderKind::Projection).unwrap());
    for (holder, name) in [(&rabbit, "rabbit"), (&balances, "balances")] {
        assert_eq!((&*holder.name, holder.position, holder.events, holder.runs), (name, 0, 300, false));
        assert_eq!(holder.held_ms, 90_000);
        assert!(holder.bytes.unwrap() > 300 * 100, "{holder:?}");
    }
    assert_eq!(store.stats().unwrap().holders.len(), 2, "the relay that has done its work holds nothing");
    assert_eq!(store.stats().unwrap().trimmed_to, 0);
    store.forget_relay("rabbit").unwrap();
    store.forget_projection("balances").unwrap();
    assert!(store.stats().unwrap().holders.is_empty());
    until("trimming", || store.stats().unwrap().trimmed_to == 300);
    let _ = relay.stop(SOON);
}

/// Goal: the one that holds most stands first; subscriptions, retention, and events kept one by one are listed too. Method: one of each, at
/// different positions.
#[test]
fn every_kind_is_listed_and_the_largest_is_first() {
    let (folder, clock, broker) = (tempfile::tempdir().unwrap(), ManualClock::new(), broker());
    let retention = Retention::until_confirmed().keep_events(2);
    let store = builder(&clock).retention(retention).open(folder.path().join("a.redb")).unwrap();
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    store.write(|tx| tx.append(Event::bytes("a", "1").to("", "missing"))).unwrap();
    append(&store, 3);
    let mut subscription = store.subscribe(4).unwrap();
    append(&store, 6);
    until("the relay", || {
        let stats = store.stats().unwrap();
        stats.quarantined == 1 && stats.relays["r"].position == 10
    });
    let (snapshot, line) = (store.read().unwrap(), line!());
    append(&store, 1);
    until("the relay", || store.stats().unwrap().relays["r"].position == 11);
    let stats = store.stats().unwrap();
    let at = |kind| stats.holders.iter().find(|holder| holder.kind == kind).unwrap();
    assert_eq!((at(HolderKind::RelayRows).position, at(HolderKind::RelayRows).events), (0, 1));
    assert_eq!((at(HolderKind::Subscription).position, at(HolderKind::Subscription).events), (4, 7));
    assert_eq!((at(HolderKind::Retention).position, at(HolderKind::Retention).events), (9, 2));
    assert_eq!((at(HolderKind::Snapshot).position, at(HolderKind::Snapshot).events), (10, 1));
    assert!(at(HolderKind::Snapshot).name.contains(&format!("holders.rs:{line}:")), "{stats:?}");
    assert!(at(HolderKind::Subscription).name.contains("holders.rs:"), "{stats:?}");
    assert!(stats.holders.is_sorted_by_key(|holder| std::cmp::Reverse(holder.bytes)), "{stats:?}");
    assert_eq!(stats.holders[0].kind, HolderKind::Subscription);
    while subscription.try_next().transpose().unwrap().is_some() {}
    drop(snapshot);
    assert!(of(&store, HolderKind::Subscription).is_none(), "it has read all");
    assert!(of(&store, HolderKind::Snapshot).is_none());
    let _ = relay.stop(SOON);
}

std::thread_local! {
    static LAST: std::cell::RefCell<Option<onewrite::Snapshot>> = const { std::cell::RefCell::new(None) };
}

/// Goal: read transactions that live are counted, with the age of the oldest, whatever keeps them: a snapshot, an iterator that outlives
/// it, a thread-local. Method: each of them, ended in turn.
#[test]
fn living_snapshots_are_counted_with_their_age() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), ManualClock::new());
    let store = builder(&clock).open(folder.path().join("a.redb")).unwrap();
    append(&store, 3);
    let figures = || {
        let stats = store.stats().unwrap();
        (stats.snapshots, stats.snapshots_age_ms)
    };
    assert_eq!(figures(), (0, None));
    let first = store.read().unwrap();
    clock.advance(Duration::from_millis(5));
    let second = store.read().unwrap();
    clock.advance(Duration::from_millis(2));
    assert_eq!(figures(), (2, Some(7)));
    let (events, replay) = (first.events(0).unwrap(), first.replay(0).unwrap());
    drop(first);
    assert_eq!(figures(), (2, Some(7)), "its iterators hold it");
    drop(events);
    assert_eq!(figures(), (2, Some(7)));
    drop(replay);
    assert_eq!(figures(), (1, Some(2)));
    assert!(store.verify().unwrap().is_whole());
    drop(second);
    let snapshot = store.read().unwrap();
    let thread = std::thread::spawn(move || {
        LAST.with_borrow_mut(|last| *last = Some(snapshot));
    });
    thread.join().unwrap();
    assert_eq!(figures(), (0, None), "the thread's end has ended it");
}

#[cfg(unix)]
mod warned {
    use super::*;
    use crate::logs::at_run_time::{Lines, run};
    use crate::scratch::task;

    /// How often was warned of this holder.
    fn warnings(lines: &Lines, field: &str, text: &str) -> Vec<String> {
        let loud = lines.loud().into_iter().filter(|line| line.text().contains(text));
        loud.filter_map(|line| line.fields.get(field).cloned()).collect()
    }

    /// Goal: each holder is warned of once, by name and with the way to let go; again only after it has moved and stood still anew. One
    /// that works is not warned of. Method: a process that collects what it logs, and a clock that the test moves; a renamed relay
    /// and projection, a sleeping subscription, a snapshot.
    #[test]
    fn a_holder_is_warned_of_once() {
        run("holders::warned::child_with_holders");
    }

    #[test]
    fn child_with_holders() {
        let Some((folder, _)) = task() else { return };
        let lines = Lines::install();
        let (clock, broker) = (ManualClock::new(), broker());
        let (store, relay) = renamed(&folder.join("a.redb"), &clock, &broker);
        let mut subscription = store.subscribe(0).unwrap();
        let snapshot = store.read().unwrap();
        let reported = || {
            let of = |field, text| warnings(&lines, field, text);
            [
                of("relay", "`Store::forget_relay`"),
                of("projection", "`Store::forget_projection`"),
                of("subscription", "holds the log"),
                of("snapshot", "held for long"),
            ]
        };
        let counts = || reported().map(|reported| reported.len());
        // The store knows where each stands.
        let _ = store.stats().unwrap();
        clock.advance(WARN_AFTER / 2);
        clock.advance(WARN_AFTER / 2);
        until("the warnings", || counts() == [1; 4]);
        let [rabbit, balances, subscribed, taken] = reported();
        assert_eq!((&*rabbit[0], &*balances[0]), ("rabbit", "balances"));
        assert!(
            subscribed[0].contains("holders.rs:") && taken[0].contains("holders.rs:"),
            "{:?}",
            reported()
        );
        for line in lines.loud().iter().filter(|line| line.fields.contains_key("held_s")) {
            assert_eq!(line.fields["held_s"], WARN_AFTER.as_secs().to_string(), "{line:?}");
        }
        clock.advance(WARN_AFTER * 3);
        // The subscription moves and sleeps again; the snapshot is another.
        for _ in 0..300 {
            assert!(subscription.try_next().transpose().unwrap().is_some());
        }
        append(&store, 1);
        drop(snapshot);
        let again = store.read().unwrap();
        let _ = store.stats().unwrap();
        clock.advance(WARN_AFTER);
        until("two more", || counts() == [1, 1, 2, 2]);
        clock.advance(WARN_AFTER);
        drop(again);
        let _third = store.read().unwrap();
        clock.advance(WARN_AFTER);
        // The looks before this one have reported nothing.
        until("the third snapshot", || counts()[3] == 3);
        assert_eq!(counts(), [1, 1, 2, 3], "{:?}", reported());
        drop(subscription);
        let _ = relay.stop(SOON);
        println!("all well");
    }

    /// Goal: a store at which nobody writes any more warns all the same. Method: the same with the system's clock and a short time.
    #[test]
    fn an_idle_store_warns_too() {
        run("holders::warned::child_that_is_idle");
    }

    #[test]
    fn child_that_is_idle() {
        let Some((folder, _)) = task() else { return };
        let lines = Lines::install();
        let builder = Store::builder().holder_warn_after(Duration::from_millis(300));
        let store = builder.open(folder.join("a.redb")).unwrap();
        let broker = broker();
        let _ = store.relay("rabbit").spawn(broker.publisher()).unwrap().stop(SOON);
        append(&store, 1);
        until("the warning", || !warnings(&lines, "relay", "`Store::forget_relay`").is_empty());
        println!("all well");
    }
}
