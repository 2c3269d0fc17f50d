//! What goes wrong for one key or destination stops nobody else: against a real RabbitMQ, judged by what lies in its queues.
//!
//! Rates are measured in `benches/offline.rs`; here is what does not depend on the clock: who has arrived while the others still
//! wait, how many connections it took, and that everything arrives once the fault has healed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lapin::ExchangeKind;
use onewrite::broker::RabbitMq;
use onewrite::{Event, FaultClass, Relay, RelayBuilder, Store};

use crate::support::rabbit::{MESSAGE_BYTES_MAX, RabbitNode, shared_node};
use crate::support::tap::{Raw, Tap};

const SOON: Duration = Duration::from_secs(60);
const EVENTS: u64 = 6000;
/// One event in so many is disturbed.
const SHARE: u64 = 10;

/// A store with a backlog of mixed events, a queue for those that nothing disturbs, and a broker.
struct Scene {
    name: &'static str,
    store: Store,
    tap: Tap,
    _folder: tempfile::TempDir,
}

fn node() -> &'static RabbitNode {
    shared_node()
}

fn is_disturbed(n: u64) -> bool {
    n % SHARE == 3
}

impl Scene {
    /// `disturbed` gives every event of a share its key and destination; the rest has 50 keys, and goes to a queue of its own.
    fn new(name: &'static str, disturbed: impl Fn(Event, u64) -> Event + Send + Clone + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::builder()
            .payload_bytes_max(MESSAGE_BYTES_MAX * 2)
            .progress_delay(Duration::from_millis(50))
            .open(folder.path().join("a.redb"))
            .unwrap();
        let tap = Tap::connect(&node().url());
        tap.queue(&format!("{name}.rest"), &[]);
        for first in (0..EVENTS).step_by(1000) {
            let disturbed = disturbed.clone();
            store
                .write(move |tx| {
                    for n in first..first + 1000 {
                        let event = Event::bytes("t", n.to_string()).id(format!("{name}-{n}"));
                        let rest = format!("{name}.rest");
                        tx.append(if is_disturbed(n) {
                            disturbed(event, n)
                        } else {
                            event.key(format!("k{}", n % 50)).to("", rest)
                        })?;
                    }
                    Ok(())
                })
                .unwrap();
        }
        Self { name, store, tap, _folder: folder }
    }

    fn start(&self, change: impl FnOnce(RelayBuilder) -> RelayBuilder) -> Relay {
        change(self.store.relay("r")).spawn(RabbitMq::new(&node().url()).unwrap()).unwrap()
    }

    /// Waits until all of the rest has arrived, in the order of its keys.
    fn await_rest(&self, relay: &Relay) {
        let rest = (0..EVENTS).filter(|n| !is_disturbed(*n)).collect();
        let numbers = await_all(&self.tap, &format!("{}.rest", self.name), &rest, relay);
        assert_in_order(&numbers, |n| n % 50);
    }

    fn backlog(&self) -> u64 {
        self.store.stats().unwrap().backlog_events
    }

    /// Within 60 s after the last fault nothing waits any more.
    fn await_end(&self, relay: &Relay) {
        until(|| format!("the end: {} left; {:?}", self.backlog(), relay.status()), || self.backlog() == 0);
    }
}

fn number(raw: &Raw) -> u64 {
    String::from_utf8_lossy(&raw.body).parse().unwrap()
}

/// Takes from a queue until just these have come out of it, and reports them as they came. What was under way when a channel ended comes twice:
/// a count would not show whether all are there.
fn await_all(tap: &Tap, queue: &str, all: &BTreeSet<u64>, relay: &Relay) -> Vec<u64> {
    let (mut numbers, mut left) = (Vec::new(), all.clone());
    let missing = |left: &BTreeSet<u64>| {
        format!(
            "{queue}: {} of {} to come, first {:?}; {:?}",
            left.len(),
            all.len(),
            left.first(),
            relay.status()
        )
    };
    let deadline = Instant::now() + SOON;
    while !left.is_empty() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for {}", missing(&left));
        for raw in tap.take(queue) {
            let n = number(&raw);
            assert!(all.contains(&n), "{n} does not belong into {queue}");
            left.remove(&n);
            numbers.push(n);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    numbers
}

/// The first arrivals of each key ascend.
fn assert_in_order(numbers: &[u64], key: impl Fn(u64) -> u64) {
    let (mut seen, mut last) = (BTreeSet::new(), BTreeMap::new());
    for n in numbers.iter().filter(|n| seen.insert(**n)) {
        let before = last.insert(key(*n), *n);
        assert!(before.is_none_or(|before| before < *n), "{n} comes after {before:?}");
    }
}

fn until(what: impl Fn() -> String, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for {}", what());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn all_disturbed() -> BTreeSet<u64> {
    (0..EVENTS).filter(|n| is_disturbed(*n)).collect()
}

/// Goal: a missing exchange stops only what goes there, and closes the window's channel hardly ever; once it is there, all
/// arrives. Method: a tenth of the backlog goes to an exchange that does not exist, on 20 keys; it is declared when the rest has arrived.
#[test]
fn a_missing_exchange_stops_only_its_own() {
    let scene =
        Scene::new("fair-missing", |event, n| event.key(format!("m{}", n % 200)).to("fair-missing.e", "r"));
    let relay = scene.start(|relay| relay.backoff(Duration::from_millis(100), Duration::from_secs(5)));
    scene.await_rest(&relay);
    assert!(scene.backlog() >= EVENTS / SHARE, "the disturbed wait: {}", scene.backlog());
    let status = relay.status();
    assert!(
        status.reconnects <= 3,
        "600 events of a missing exchange closed the channel {} times",
        status.reconnects
    );
    assert_eq!(status.quarantined, 0, "{status:?}");
    scene.tap.queue("fair-missing.q", &[]);
    scene.tap.exchange("fair-missing.e", ExchangeKind::Fanout);
    scene.tap.bind("fair-missing.q", "fair-missing.e", "");
    scene.await_end(&relay);
    let numbers = await_all(&scene.tap, "fair-missing.q", &all_disturbed(), &relay);
    assert_in_order(&numbers, |n| n % 200);
    assert!(relay.stop(SOON).clean);
}

/// Goal: what nobody is bound to stops only itself, and arrives once somebody is. Method: as above, with an exchange without a
/// queue.
#[test]
fn unroutable_events_stop_only_their_own() {
    let scene =
        Scene::new("fair-unbound", |event, n| event.key(format!("m{}", n % 200)).to("fair-unbound.e", "r"));
    scene.tap.exchange("fair-unbound.e", ExchangeKind::Fanout);
    let relay = scene.start(|relay| relay.backoff(Duration::from_millis(100), Duration::from_secs(5)));
    scene.await_rest(&relay);
    assert!(scene.backlog() >= EVENTS / SHARE, "the disturbed wait: {}", scene.backlog());
    assert_eq!((relay.status().reconnects, relay.status().quarantined), (0, 0));
    scene.tap.queue("fair-unbound.q", &[]);
    scene.tap.bind("fair-unbound.q", "fair-unbound.e", "");
    scene.await_end(&relay);
    let numbers = await_all(&scene.tap, "fair-unbound.q", &all_disturbed(), &relay);
    assert_in_order(&numbers, |n| n % 200);
    assert!(relay.stop(SOON).clean);
}

/// Goal: a full queue stops only what goes there; nobody's attempts are spent; the position is not held back by it; and all arrives once
/// there is room. Method: a tenth goes, on 20 keys and without key by turns, to a queue of five that refuses what exceeds it; it takes all once the rest has arrived.
#[test]
fn a_full_queue_stops_only_its_own() {
    let scene = Scene::new("fair-full", |event, n| {
        let event = event.to("", "fair-full.q");
        if n % 20 == 3 { event } else { event.key(format!("m{}", n % 200)) }
    });
    scene.tap.queue("fair-full.q", &[]);
    let limit = r#"{"max-length": 5, "overflow": "reject-publish"}"#;
    node().ctl(&["set_policy", "fair-full", "^fair-full.q$", limit, "--apply-to", "queues"]);
    let relay = scene.start(|relay| relay.backoff(Duration::from_millis(100), Duration::from_secs(2)));
    scene.await_rest(&relay);
    assert!(scene.backlog() >= EVENTS / SHARE - 50, "the disturbed wait: {}", scene.backlog());
    assert_eq!((relay.status().reconnects, relay.status().quarantined), (0, 0));
    node().ctl(&["clear_policy", "fair-full"]);
    scene.await_end(&relay);
    let numbers = await_all(&scene.tap, "fair-full.q", &all_disturbed(), &relay);
    let keyed: Vec<u64> = numbers.iter().copied().filter(|n| n % 20 != 3).collect();
    assert_in_order(&keyed, |n| n % 200);
    assert_eq!(relay.status().quarantined, 0);
    assert!(relay.stop(SOON).clean);
}

/// Goal: events that the broker itself refuses stop only what is behind them in their key, and close the window's channel once, not once
/// each and for each try. Method: five bodies larger than the broker takes, among the disturbed; all others of the disturbed have one of their keys.
#[test]
fn poison_events_stop_only_their_keys() {
    let poison = |n: u64| n < 500 && n % 100 == 3;
    let scene = Scene::new("fair-poison", move |event, n| {
        let event = event.key(format!("p{}", n % 500));
        if poison(n) {
            let body = vec![b'9'; MESSAGE_BYTES_MAX + 1];
            Event::bytes("t", body).key(format!("p{}", n % 500)).to("", "fair-poison.q")
        } else {
            event.to("", "fair-poison.q")
        }
    });
    scene.tap.queue("fair-poison.q", &[]);
    let relay =
        scene.start(|relay| relay.attempts(4).backoff(Duration::from_millis(50), Duration::from_secs(2)));
    scene.await_rest(&relay);
    until(|| format!("{:?}", relay.status()), || relay.status().quarantined == 5);
    assert!(relay.status().reconnects <= 2, "five poison events, four tries each: {:?}", relay.status());
    let held = |n: u64| !poison(n) && n % 100 == 3;
    let waiting = (0..EVENTS).filter(|n| held(*n)).count() as u64;
    until(|| format!("{} left, {waiting} are held", scene.backlog()), || scene.backlog() == waiting);
    let entries = scene.store.quarantine("r").unwrap().list(None, 10).unwrap();
    assert!(entries.iter().all(|entry| entry.fault.class == FaultClass::Message && entry.attempts == 4));
    let numbers: BTreeSet<u64> = scene.tap.drain("fair-poison.q").iter().map(number).collect();
    assert_eq!(numbers, (0..EVENTS).filter(|n| is_disturbed(*n) && !held(*n) && !poison(*n)).collect());
    // What is held goes on when a person decides.
    entries.iter().for_each(|entry| scene.store.quarantine("r").unwrap().discard(entry.seq).unwrap());
    scene.await_end(&relay);
    let numbers: BTreeSet<u64> = scene.tap.drain("fair-poison.q").iter().map(number).collect();
    assert_eq!(numbers, (0..EVENTS).filter(|n| held(*n)).collect());
    assert!(relay.stop(SOON).clean);
}

/// Goal: a key with most of the events does not make the others wait for it. Method: nine tenths have one key (one unconfirmed at a time); when all others have
/// arrived, most of the hot ones have not; then they all do, in order.
#[test]
fn a_hot_key_stops_only_itself() {
    let name = "fair-hot";
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let tap = Tap::connect(&node().url());
    tap.queue("fair-hot.hot", &[]);
    tap.queue("fair-hot.rest", &[]);
    let hot = |n: u64| n % 10 != 3;
    for first in (0..EVENTS).step_by(1000) {
        store
            .write(move |tx| {
                for n in first..first + 1000 {
                    let event = Event::bytes("t", n.to_string());
                    let (key, queue) =
                        if hot(n) { ("hot".to_owned(), "hot") } else { (format!("k{}", n % 70), "rest") };
                    tx.append(event.key(key).to("", format!("{name}.{queue}")))?;
                }
                Ok(())
            })
            .unwrap();
    }
    let relay = store.relay("r").spawn(RabbitMq::new(&node().url()).unwrap()).unwrap();
    let rest = usize::try_from(EVENTS / 10).unwrap();
    until(|| format!("{:?}", relay.status()), || tap.count("fair-hot.rest") == rest);
    let arrived = tap.count("fair-hot.hot");
    assert!(arrived < rest * 6, "{arrived} hot events came before the last of the others");
    let numbers: Vec<u64> = tap.drain("fair-hot.rest").iter().map(number).collect();
    assert_in_order(&numbers, |n| n % 70);
    until(|| format!("{:?}", relay.status()), || store.stats().unwrap().backlog_events == 0);
    let numbers: Vec<u64> = tap.drain("fair-hot.hot").iter().map(number).collect();
    assert_eq!(numbers, (0..EVENTS).filter(|n| hot(*n)).collect::<Vec<_>>());
    assert!(relay.stop(SOON).clean);
}
