//! A clock that is moved by hand is heard: hours of the clock's time take milliseconds of real time.
//!
//! Method of all tests: something waits for an hour of the clock. Real time passes and nothing happens; then the
//! clock is moved, and what waited happens at once. "At once" is far less than any wait of real time that the
//! library knows of; the bound is generous, because machines that run tests are busy.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions, Rule, Verdict};
use onewrite::redb::TableDefinition;
use onewrite::time::{Clock, ClockListener, ManualClock, Now};
use onewrite::{
    Capture, CaptureMode, Error, Event, FailurePolicy, GapPolicy, HeaderValue, Message, ProjectionState,
    Retention, Store, StoreBuilder,
};

use crate::scratch::pause;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(20);
/// Real time in which nothing may happen.
const A_WHILE: Duration = Duration::from_millis(60);

const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("table");

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn setup() -> (tempfile::TempDir, ManualClock, MemoryBroker) {
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    (tempfile::tempdir().unwrap(), ManualClock::new(), broker)
}

fn builder(clock: &ManualClock) -> StoreBuilder {
    Store::builder().clock(Arc::new(clock.clone()))
}

fn open(folder: &tempfile::TempDir, builder: StoreBuilder) -> Store {
    builder.open(folder.path().join("a.redb")).unwrap()
}

fn event() -> Event {
    Event::bytes("t", "1").to("", "q")
}

/// Goal: a relay's next try comes with the clock. Method: a broker that refuses the first two tries, an hour of
/// backoff, then two.
#[test]
fn a_relay_tries_again_when_the_clock_says_so() {
    let (folder, clock, broker) = setup();
    let store = open(&folder, builder(&clock));
    broker.script(Rule::any().times(2).then(Verdict::Nack));
    let relay = store.relay("r").backoff(HOUR, 2 * HOUR).spawn(broker.publisher()).unwrap();
    let receipt = store.write(|tx| tx.append(event())).unwrap();
    for tries in 1..=2 {
        until("the broker has refused it", || {
            broker.script_left() == 2 - tries && relay.status().in_flight == 0
        });
        std::thread::sleep(A_WHILE);
        assert_eq!((broker.script_left(), broker.published()), (2 - tries, 0));
        // The wait is spread at random, and never longer than the longest.
        clock.advance(2 * HOUR);
    }
    receipt.wait_confirmed(SOON).unwrap();
    assert_eq!(broker.published(), 1);
    relay.stop(SOON);
}

/// Goal: `not_before` and `expires` follow the wall time, also where it alone is set. Method: one event that is
/// due in an hour, one that expires before it is due.
#[test]
fn what_is_scheduled_comes_and_what_expires_goes_with_the_wall_time() {
    let (folder, clock, broker) = setup();
    let store = open(&folder, builder(&clock));
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let due = clock.wall() + HOUR;
    let later = store.write(move |tx| tx.append(event().not_before(due))).unwrap();
    until("the event waits for its time", || store.stats().unwrap().relays["r"].scheduled == 1);
    std::thread::sleep(A_WHILE);
    assert_eq!(broker.published(), 0);
    clock.set_wall(due);
    later.wait_confirmed(SOON).unwrap();

    pause(&relay);
    let end = clock.wall() + HOUR;
    let stale = store.write(move |tx| tx.append(event().expires(end))).unwrap();
    clock.advance(HOUR + Duration::from_millis(1));
    relay.resume();
    assert!(stale.wait_confirmed(SOON).is_err(), "it has expired");
    assert_eq!(broker.published(), 1);
    relay.stop(SOON);
}

/// Goal: a relay's rate follows the clock. Method: one event each second; ten need nine moves of the clock.
#[test]
fn a_rate_limit_is_a_rate_of_the_clock() {
    let (folder, clock, broker) = setup();
    let store = open(&folder, builder(&clock));
    let relay = store.relay("r").rate_limit(1).spawn(broker.publisher()).unwrap();
    let receipt = store.write(|tx| (0..10).try_for_each(|_| tx.append(event()).map(drop))).unwrap();
    until("the first is out", || broker.published() > 0);
    std::thread::sleep(A_WHILE);
    assert_eq!(broker.published(), 1);
    for events in 2..=10 {
        clock.advance(Duration::from_secs(1));
        until("the next is out", || broker.published() == events);
    }
    receipt.wait_confirmed(SOON).unwrap();
    relay.stop(SOON);
}

/// Goal: a consumer's next try comes with the clock. Method: a handler that fails the first time.
#[test]
fn a_consumer_tries_again_when_the_clock_says_so() {
    let (folder, clock, broker) = setup();
    let store = open(&folder, builder(&clock));
    let fails = AtomicBool::new(true);
    let consumer = store.consumer("s").backoff(HOUR, HOUR).spawn(broker.source("q"), move |_, _| {
        if fails.swap(false, SeqCst) { Err(Error::app("not yet")) } else { Ok(()) }
    });
    let consumer = consumer.unwrap();
    broker.publish("", "q", Message { message_id: Some("1".into()), ..Message::default() }).unwrap();
    until("the first try failed", || consumer.status().retried == 1);
    std::thread::sleep(A_WHILE);
    assert_eq!(consumer.status().applied, 0);
    clock.advance(HOUR);
    until("the second try", || consumer.status().applied == 1);
    assert_eq!(consumer.stop(SOON).failed, None);
}

/// Goal: a consumer waits for a gap by the clock. Method: the second number of a lane comes, the first never does.
#[test]
fn a_gap_is_waited_for_by_the_clock() {
    let (folder, clock, broker) = setup();
    let store = open(&folder, builder(&clock));
    let consumer = store.consumer("s").on_gap(GapPolicy::Hold(Duration::from_secs(600)));
    let consumer = consumer.spawn(broker.source("q"), |_, _| Ok(())).unwrap();
    let headers = [
        ("onewrite-store", HeaderValue::from("00000000-0000-4000-8000-000000000001")),
        ("onewrite-epoch", HeaderValue::from(1_i64)),
        ("onewrite-lane", HeaderValue::from(0_i64)),
        ("onewrite-lane-number", HeaderValue::from(1_i64)),
    ];
    let headers = headers.map(|(name, value)| (name.into(), value)).to_vec();
    broker.publish("", "q", Message { message_id: Some("1".into()), headers, ..Message::default() }).unwrap();
    until("the delivery is held", || consumer.status().held == 1);
    std::thread::sleep(A_WHILE);
    assert_eq!(consumer.status().applied, 0);
    clock.advance(Duration::from_secs(600));
    until("the gap is given up", || consumer.status().applied == 1);
    assert_eq!(consumer.stop(SOON).failed, None);
}

/// Goal: a projection's next try comes with the clock, and so does its rebuild's. Method: a handler that fails the
/// first time.
#[test]
fn a_projection_tries_again_when_the_clock_says_so() {
    let (folder, clock, _) = setup();
    let store = open(&folder, builder(&clock));
    let fails = Arc::new(AtomicU64::new(1));
    let failing = Arc::clone(&fails);
    let projection =
        store.projection("p").backoff(HOUR, HOUR).on_failure(FailurePolicy::Stop { attempts: 3 });
    let projection = projection.spawn(move |_, _| {
        if failing.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
            Err(Error::app("not yet"))
        } else {
            Ok(())
        }
    });
    let projection = projection.unwrap();
    let receipt = store.write(|tx| tx.append(event().unpublished())).unwrap();
    until("the first try failed", || matches!(projection.status().state, ProjectionState::Retrying { .. }));
    std::thread::sleep(A_WHILE);
    assert_eq!(projection.status().applied, 0);
    clock.advance(HOUR);
    projection.wait_for_position(receipt.seqs()[0], SOON).unwrap();
    // The rebuild tries it in its last transaction first, which counts as no try.
    fails.store(2, SeqCst);
    projection.rebuild();
    until("the rebuild's first try failed", || projection.status().failed_tries == 2);
    clock.advance(HOUR);
    projection.wait_until_live(SOON).unwrap();
    projection.stop(SOON);
}

/// Goal: a key whose codec has failed is tried again by the clock, with a relay and without. Method: a codec that
/// fails the first time; a first switch-on whose rows cannot be read the first time.
#[test]
fn a_capture_tries_again_when_the_clock_says_so() {
    let (folder, clock, broker) = setup();
    let tries = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&tries);
    let capture = Capture::with(TABLE, move |change| {
        if counted.fetch_add(1, SeqCst) == 0 {
            Err(Error::app("not yet"))
        } else {
            Ok(Event::bytes("c", change.key.to_string()).to("", "q"))
        }
    });
    let store = open(&folder, builder(&clock).capture(capture.mode(CaptureMode::NewestValue)));
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    store.write(|tx| tx.captured_table(TABLE)?.insert(1, 1).map(drop)).unwrap();
    until("the codec failed", || store.stats().unwrap().captures["table"].failed == 1);
    std::thread::sleep(A_WHILE);
    assert_eq!((tries.load(SeqCst), broker.published()), (1, 0));
    clock.advance(HOUR);
    until("the change is published", || broker.queue_len("q") == 1);
    relay.stop(SOON);
}

/// Goal: what has grown old enough by the clock is trimmed, though nobody writes. Method: confirmed events of two
/// ages.
#[test]
fn retention_by_age_follows_the_clock() {
    let (folder, clock, broker) = setup();
    let store = open(&folder, builder(&clock).retention(Retention::until_confirmed().keep_age(2 * HOUR)));
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let append = || store.write(|tx| tx.append(event())).unwrap().wait_confirmed(SOON).unwrap();
    append();
    clock.advance(HOUR);
    append();
    let trimmed = || store.stats().unwrap().trimmed_to;
    std::thread::sleep(A_WHILE);
    assert_eq!(trimmed(), 0);
    clock.advance(HOUR);
    until("the first is trimmed", || trimmed() == 1);
    clock.advance(HOUR);
    until("the second is trimmed", || trimmed() == 2);
    relay.stop(SOON);
}

/// Goal: a notification comes through from anywhere, and waits for nothing. Method: the clock is moved inside a
/// write closure, inside a handler, inside a codec's call, and while another thread holds the write transaction.
#[test]
fn a_clock_may_be_moved_from_anywhere() {
    let (folder, clock, broker) = setup();
    let (in_codec, in_write, in_handler) = (clock.clone(), clock.clone(), clock.clone());
    let capture = Capture::with(TABLE, move |change| {
        in_codec.advance(HOUR);
        Ok(Event::bytes("c", change.key.to_string()).to("", "q"))
    });
    let store = open(&folder, builder(&clock).capture(capture));
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let projection = store.projection("p").spawn(move |_, _| {
        in_handler.advance(HOUR);
        Ok(())
    });
    let projection = projection.unwrap();
    let receipt = store.write(move |tx| {
        in_write.advance(HOUR);
        tx.captured_table(TABLE)?.insert(1, 1).map(drop)
    });
    receipt.unwrap().wait_confirmed(SOON).unwrap();
    projection.wait_until_live(SOON).unwrap();
    let held = store.begin().unwrap();
    std::thread::scope(|scope| scope.spawn(|| clock.advance(HOUR)).join().unwrap());
    held.commit().unwrap();
    projection.stop(SOON);
    relay.stop(SOON);
}

/// A clock that calls back: a reading moves the clock and asks the store for figures. Not while it does so, and not
/// for ever: each move makes threads read the clock again.
#[derive(Debug)]
struct CallsBack(ManualClock, std::sync::OnceLock<Store>, Mutex<u32>);

impl Clock for CallsBack {
    fn now(&self) -> Now {
        if let (Some(store), Ok(mut left)) = (self.1.get(), self.2.try_lock())
            && *left > 0
        {
            *left -= 1;
            self.0.advance(Duration::from_millis(1));
            store.stats().unwrap();
        }
        self.0.now()
    }

    fn runs_by_itself(&self) -> bool {
        false
    }

    fn subscribe(&self, listener: ClockListener) {
        self.0.subscribe(listener);
    }
}

/// Goal: no lock of the store is held while a clock is read. Method: a clock whose `now` notifies the store and
/// reads its figures, below a quota that is full, with inbox ids, captures, a relay and retention by age.
#[test]
fn a_clock_that_calls_back_blocks_nothing() {
    use onewrite::{BacklogQuota, QuotaPolicy};
    let (folder, manual, broker) = setup();
    let clock = Arc::new(CallsBack(manual, std::sync::OnceLock::new(), Mutex::new(1000)));
    let quota = BacklogQuota::events(3).and_bytes(1 << 20).policy(QuotaPolicy::DropExpired);
    let capture = Capture::with(TABLE, |change| Ok(Event::bytes("c", change.key.to_string()).to("", "q")));
    let store = Store::builder()
        .clock(Arc::clone(&clock) as _)
        .backlog_quota(quota)
        .retention(Retention::until_confirmed().keep_age(HOUR))
        .capture(capture.mode(CaptureMode::NewestValue));
    let store = open(&folder, store);
    clock.1.set(store.clone()).unwrap();
    broker.go_down();
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let (done, finished) = std::sync::mpsc::channel();
    let writes = store.clone();
    std::thread::spawn(move || {
        for n in 0..5_u64 {
            let refused =
                writes.write_once(format!("request-{n}"), |tx| tx.append(event().key("k"))).is_err();
            assert_eq!(refused, n >= 3);
        }
        writes.write(|tx| tx.captured_table(TABLE)?.insert(1, 1).map(drop)).unwrap();
        done.send(()).unwrap();
    });
    finished.recv_timeout(SOON).expect("no write waits for itself");
    broker.come_up();
    until("all is published", || {
        clock.0.advance(Duration::from_secs(1));
        broker.queue_len("q") == 4
    });
    relay.stop(SOON);
}

/// Goal: an application's clock that knows nothing but `now` goes on working, even one that stands still. Method: a
/// consumer and a projection that fail once.
#[test]
fn a_clock_that_only_tells_the_time_delays_nothing_for_ever() {
    #[derive(Debug)]
    struct Fixed;
    impl Clock for Fixed {
        fn now(&self) -> Now {
            Now { mono_ms: 5, wall_ms: 7 }
        }
    }
    let (folder, _, broker) = setup();
    let store = open(&folder, Store::builder().clock(Arc::new(Fixed)));
    let (first, longest) = (Duration::from_millis(1), Duration::from_millis(5));
    let fails = AtomicBool::new(true);
    let consumer = store.consumer("s").backoff(first, longest).spawn(broker.source("q"), move |_, _| {
        if fails.swap(false, SeqCst) { Err(Error::app("not yet")) } else { Ok(()) }
    });
    broker.publish("", "q", Message { message_id: Some("1".into()), ..Message::default() }).unwrap();
    let consumer = consumer.unwrap();
    until("the delivery is applied", || consumer.status().applied == 1);
    let fails = AtomicBool::new(true);
    let projection = store
        .projection("p")
        .backoff(first, longest)
        .spawn(move |_, _| if fails.swap(false, SeqCst) { Err(Error::app("not yet")) } else { Ok(()) });
    let projection = projection.unwrap();
    let receipt = store.write(|tx| tx.append(event().unpublished())).unwrap();
    projection.wait_for_position(receipt.seqs()[0], SOON).unwrap();
    let _ = (consumer.stop(SOON), projection.stop(SOON));
}
