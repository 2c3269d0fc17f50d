//! The backlog quota that lets expired events go first: what it frees, what becomes of them, and what it cannot do.
//!
//! Judged from the broker's tap, the quarantine's list and the store's figures.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};
use onewrite::time::{Clock, Now, SystemClock};
use onewrite::{
    BacklogQuota, ConfirmError, Error, Event, FaultClass, QuotaPolicy, Receipt, Relay, Store, StoreBuilder,
};

const SOON: Duration = Duration::from_secs(20);
const HOUR: Duration = Duration::from_secs(3600);

/// A clock that a test sets forward.
#[derive(Debug)]
struct Ahead(SystemClock, AtomicU64);

impl Ahead {
    fn new() -> Arc<Self> {
        Arc::new(Self(SystemClock::new(), AtomicU64::new(0)))
    }

    fn pass(&self, time: Duration) {
        self.1.fetch_add(u64::try_from(time.as_millis()).unwrap(), Relaxed);
    }

    /// So long after what it shows.
    fn after(&self, time: Duration) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.now().wall_ms) + time
    }
}

impl Clock for Ahead {
    fn now(&self) -> Now {
        let now = self.0.now();
        Now { wall_ms: now.wall_ms + self.1.load(Relaxed), ..now }
    }
}

fn builder(clock: &Arc<Ahead>, events_max: u64) -> StoreBuilder {
    let quota = BacklogQuota::events(events_max).policy(QuotaPolicy::DropExpired);
    Store::builder().clock(Arc::clone(clock) as _).backlog_quota(quota)
}

/// A broker with an exchange `e` that leads to a queue `q`.
fn broker() -> MemoryBroker {
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("e", ExchangeKind::Topic);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "#").unwrap();
    broker
}

fn event(n: u64) -> Event {
    Event::bytes("t", n.to_string()).to("e", "r")
}

fn append(store: &Store, event: Event) -> onewrite::Result<Receipt<onewrite::Appended>> {
    store.write(move |tx| tx.append(event.clone()))
}

fn tapped(broker: &MemoryBroker) -> Vec<u64> {
    broker
        .tap()
        .iter()
        .map(|tapped| String::from_utf8_lossy(&tapped.message.payload).parse().unwrap())
        .collect()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn backlog(store: &Store) -> (u64, u64) {
    let stats = store.stats().unwrap();
    (stats.backlog_events, stats.backlog_bytes)
}

fn expired(store: &Store) -> BTreeSet<u64> {
    let entries = store.quarantine("r").unwrap().list(None, 10_000).unwrap();
    entries.iter().filter(|entry| entry.fault.class == FaultClass::Expired).map(|entry| entry.seq).collect()
}

fn stop(relay: Relay) {
    assert!(relay.stop(SOON).clean);
}

/// Goal: while the broker is away and the quota is reached, a write makes room of what has expired, and of nothing else; each is
/// reported in the quarantine and to whoever waits for it; the figure of the backlog is exact, also after the store was opened
/// again; and what has not expired arrives, in order, once. Method: 3,000 events without a broker (three pieces of a search),
/// every third with an hour to live; two hours pass.
#[test]
fn expired_events_make_room_while_the_broker_is_away() {
    let (folder, clock, broker) = (tempfile::tempdir().unwrap(), Ahead::new(), broker());
    let path = folder.path().join("a.redb");
    let store = builder(&clock, 3000).open(&path).unwrap();
    broker.go_down();
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let lives = clock.after(HOUR);
    let receipt = store
        .write(move |tx| {
            for n in 0..3000 {
                let event = event(n).key(format!("k{}", n % 7));
                tx.append(if n % 3 == 1 { event.expires(lives) } else { event })?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(backlog(&store).0, 3000);
    let (_, full_bytes) = backlog(&store);

    // Nothing has expired: refused, and nobody waits for a second time.
    let began = Instant::now();
    for _ in 0..30 {
        let refused = append(&store, event(9999));
        assert!(matches!(refused, Err(Error::BacklogFull { events: 3000, .. })), "{refused:?}");
    }
    assert!(began.elapsed() < SOON, "a search that can find nothing is not repeated");
    assert!(expired(&store).is_empty());

    clock.pass(2 * HOUR);
    let reported = std::thread::spawn(move || receipt.wait_confirmed(SOON));
    append(&store, event(3000)).unwrap();
    until("the whole search", || expired(&store).len() == 1000);
    assert_eq!(expired(&store), (0..3000).filter(|n| n % 3 == 1).collect());
    let (events, bytes) = backlog(&store);
    assert_eq!(events, 2001);
    assert!(bytes < full_bytes * 7 / 10 && bytes > full_bytes * 6 / 10, "{bytes} of {full_bytes}");
    let error = reported.join().unwrap().unwrap_err();
    assert!(matches!(error, ConfirmError::Quarantined { seq: 1, .. }), "{error:?}");

    // The position has not moved: what was let go is known by its row alone.
    assert_eq!(store.stats().unwrap().relays["r"].position, 0);
    assert_eq!(relay.stop(SOON).backlog_events, 2001);
    drop(store);
    let store = builder(&clock, 3000).open(&path).unwrap();
    assert_eq!(backlog(&store), (events, bytes), "counted anew");
    broker.come_up();
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    append(&store, event(3001)).unwrap().wait_confirmed(SOON).unwrap();
    until("the drain", || backlog(&store) == (0, 0));
    stop(relay);
    let mut arrived = tapped(&broker);
    for key in 0..7 {
        let of_key: Vec<_> = arrived.iter().filter(|n| **n < 3000 && **n % 7 == key).collect();
        assert!(of_key.is_sorted(), "key {key}");
    }
    arrived.sort_unstable();
    assert_eq!(arrived, (0..3002).filter(|n| *n >= 3000 || n % 3 != 1).collect::<Vec<_>>());
    assert_eq!(expired(&store).len(), 1000, "until somebody discards them");
}

/// Goal: room is also made of what is deferred: in memory, parked behind a quarantined event of its key, and scheduled; an
/// event in flight is left to its outcome. Method: a broker that keeps one event in flight and another in quarantine; the
/// quota is reached with two of each kind, one of which expires.
#[test]
fn what_is_deferred_expires_too() {
    use onewrite::broker::{Rule, Verdict};
    let (folder, clock, broker) = (tempfile::tempdir().unwrap(), Ahead::new(), broker());
    let store = builder(&clock, 8).open(folder.path().join("a.redb")).unwrap();
    broker.script(Rule::any().always().then(Verdict::HoldConfirm));
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    let (lives, later) = (clock.after(HOUR), clock.after(HOUR / 2));
    append(&store, event(0).key("gone").to("e2", "r")).unwrap();
    until("quarantine", || store.stats().unwrap().relays["r"].quarantined == 1);
    append(&store, event(1).key("gone").expires(lives)).unwrap();
    append(&store, event(2).key("gone")).unwrap();
    append(&store, event(3).not_before(later).expires(lives)).unwrap();
    append(&store, event(4).not_before(later)).unwrap();
    append(&store, event(5).key("a").expires(lives)).unwrap();
    append(&store, event(6).key("a").expires(lives)).unwrap();
    append(&store, event(7).key("a")).unwrap();
    append(&store, event(8).key("b")).unwrap();
    until("two in flight", || relay.status().in_flight == 2);
    // Parked twice at most until the position is past them: the quarantined one is not counted.
    until("the quota", || matches!(append(&store, event(9)), Err(Error::BacklogFull { .. })));
    assert!(backlog(&store).0 >= 8);
    clock.pass(2 * HOUR);
    append(&store, event(9)).unwrap();
    until("the search", || expired(&store) == BTreeSet::from([1, 3, 6]));
    broker.clear_script();
    broker.release_confirms();
    append(&store, event(10)).unwrap().wait_confirmed(SOON).unwrap();
    until("the drain", || backlog(&store).0 == 1);
    stop(relay);
    let arrived: BTreeSet<_> = tapped(&broker).into_iter().collect();
    assert_eq!(arrived, BTreeSet::from([4, 5, 7, 8, 9, 10]), "2 is held behind 0");
}

/// Goal: without its relay a cursor lets nothing go, and a write is refused without waiting; one that cannot wait is refused at
/// first and finds room at its next try. Method: a relay that is stopped, then runs; futures.
#[test]
fn only_a_running_relay_lets_go() {
    let (folder, clock, broker) = (tempfile::tempdir().unwrap(), Ahead::new(), broker());
    let store = builder(&clock, 2).open(folder.path().join("a.redb")).unwrap();
    broker.go_down();
    stop(store.relay("r").spawn(broker.publisher()).unwrap());
    let lives = clock.after(HOUR);
    (0..2).for_each(|n| drop(append(&store, event(n).expires(lives)).unwrap()));
    clock.pass(2 * HOUR);
    assert!(matches!(append(&store, event(2)), Err(Error::BacklogFull { .. })));
    assert!(expired(&store).is_empty());

    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let write = || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(store.write_async(|tx| tx.append(event(2))))
    };
    assert!(matches!(write(), Err(Error::BacklogFull { .. })), "it does not wait");
    until("room", || expired(&store).len() == 2);
    write().unwrap();
    assert_eq!(backlog(&store).0, 1);
    drop(relay);
}

/// Goal: a redriven event that was let go before the log had brought it is published once, and whoever asks about it is notified.
/// Method: two expired events without a broker; the clock goes back, one is redriven, the broker comes.
#[test]
fn what_was_let_go_can_be_redriven() {
    let (folder, clock, broker) = (tempfile::tempdir().unwrap(), Ahead::new(), broker());
    let store = builder(&clock, 3).open(folder.path().join("a.redb")).unwrap();
    broker.go_down();
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let lives = clock.after(HOUR);
    append(&store, event(0)).unwrap();
    let one = append(&store, event(1).expires(lives)).unwrap();
    let two = append(&store, event(2).expires(lives)).unwrap();
    clock.pass(2 * HOUR);
    append(&store, event(3)).unwrap();
    until("room", || expired(&store).len() == 2);
    assert!(
        matches!(two.wait_confirmed(SOON), Err(ConfirmError::Quarantined { seq: 2, .. })),
        "reported though not loaded"
    );
    clock.1.store(0, Relaxed);
    store.quarantine("r").unwrap().redrive(1).unwrap();
    broker.come_up();
    one.wait_confirmed(SOON).unwrap();
    until("the drain", || backlog(&store).0 == 0);
    stop(relay);
    let mut arrived = tapped(&broker);
    arrived.sort_unstable();
    assert_eq!(arrived, [0, 1, 3]);
    assert_eq!(expired(&store), BTreeSet::from([2]));
}
