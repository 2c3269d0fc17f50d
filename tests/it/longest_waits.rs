//! Every wait and every setting takes every duration: the longest means "for ever", the shortest "at once".
//!
//! Goal: no number of a caller's panics, and none ends a thread. Method: `Duration::MAX`, which no `Instant` can be
//! added to, a nanosecond less than what is refused, and nothing at all, for everything public that takes a
//! `Duration`; the last test reads the source, so that nothing new is left out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use onewrite::broker::{MemoryBroker, MemoryPublisher, QueueOptions, Rule, Verdict};
use onewrite::time::{Clock, ManualClock};
use onewrite::{
    BacklogQuota, ConfirmError, Error, Event, GapPolicy, Message, Projection, ProjectionState, QuotaPolicy,
    Receipt, Relay, RelayState, RelayStatus, Retention, Store, StoreBuilder,
};

use crate::floors::{code_only, files, without_tests};
use crate::scratch::{pause, until};

const FOREVER: Duration = Duration::MAX;
const INSTANT: Duration = Duration::from_nanos(1);
const SOON: Duration = Duration::from_secs(20);
const ALL: [Duration; 3] = [Duration::ZERO, INSTANT, FOREVER];

/// Runs what waits for ever until something happens; fails if it goes on waiting after that.
fn in_time<T: Send + 'static>(what: &str, wait: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(wait()));
    waited.recv_timeout(SOON).unwrap_or_else(|_| panic!("{what}: it waits on, or panicked"))
}

struct Rig {
    folder: tempfile::TempDir,
    broker: MemoryBroker,
}

fn rig() -> Rig {
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    Rig { folder: tempfile::tempdir().unwrap(), broker }
}

impl Rig {
    fn open(&self, builder: StoreBuilder) -> Store {
        builder.open(self.folder.path().join("a.redb")).unwrap()
    }

    fn relay(&self, store: &Store) -> Relay {
        store.relay("r").spawn(self.broker.publisher()).unwrap()
    }
}

fn event() -> Event {
    Event::bytes("t", "1").to("", "q")
}

fn append(store: &Store) -> Receipt {
    store.write(|tx| tx.append(event()).map(drop)).unwrap()
}

/// A projection that counts its failures: so many tries fail.
fn projection(store: &Store, fails: u32, backoff: Duration) -> Projection {
    let left = AtomicU32::new(fails);
    let fails = move || left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
    let builder = store.projection("p").batch_delay(Duration::ZERO).backoff(backoff, backoff);
    builder.spawn(move |_, _| if fails() { Err(Error::app("not yet")) } else { Ok(()) }).unwrap()
}

// --- waits --------------------------------------------------------------------------------------------------------------

#[test]
fn confirms_are_waited_for_as_long_as_it_takes() {
    let rig = rig();
    let store = rig.open(Store::builder());
    let relay = rig.relay(&store);
    pause(&relay);
    let receipt = append(&store);
    for timeout in [Duration::ZERO, INSTANT] {
        for waited in [receipt.wait_confirmed(timeout), receipt.wait_confirmed_by("r", timeout)] {
            assert!(matches!(waited, Err(ConfirmError::Timeout { .. })), "{waited:?}");
        }
    }
    let receipt = Arc::new(receipt);
    let (waits, other) = (Arc::clone(&receipt), Arc::clone(&receipt));
    let waiter = std::thread::spawn(move || waits.wait_confirmed(FOREVER));
    relay.resume();
    in_time("confirmed_by", move || other.wait_confirmed_by("r", FOREVER)).unwrap();
    in_time("confirmed", move || waiter.join().unwrap()).unwrap();
    relay.stop(FOREVER);
    assert!(matches!(receipt.wait_confirmed(FOREVER), Err(ConfirmError::NoRelay(_))));
}

/// Goal: what is confirmed already is told without any wait. Method: events that are confirmed in order and out
/// of it, in memory and after the position passed them, asked for as soon as a wait has said so; and one in quarantine.
#[test]
fn what_is_known_is_reported_without_waiting() {
    let rig = rig();
    let store = rig.open(Store::builder());
    rig.broker.script(Rule::any().skip(7).times(1).then(Verdict::HoldConfirm));
    let relay = store.relay("r").attempts(1).spawn(rig.broker.publisher()).unwrap();
    for n in 0..20 {
        let receipt = append(&store);
        if n == 7 {
            continue; // Its confirm is held back: those behind it are ahead of the position.
        }
        receipt.wait_confirmed(SOON).unwrap();
        for timeout in [Duration::ZERO, INSTANT] {
            receipt.wait_confirmed(timeout).unwrap();
            receipt.wait_confirmed_by("r", timeout).unwrap();
        }
    }
    rig.broker.release_confirms();
    until("all are confirmed", || relay.status().position == 20);
    rig.broker.script(Rule::any().always().then(Verdict::no_route()));
    let relay = {
        relay.stop(SOON);
        let relay = store.relay("r").attempts(1).destination_attempts(1);
        relay.spawn(rig.broker.publisher()).unwrap()
    };
    let refused = append(&store);
    assert!(matches!(refused.wait_confirmed(SOON), Err(ConfirmError::Quarantined { .. })));
    assert!(matches!(refused.wait_confirmed(Duration::ZERO), Err(ConfirmError::Quarantined { .. })));
    relay.stop(SOON);
}

#[test]
fn a_wait_for_ever_ends_when_nothing_can_come_any_more() {
    let rig = rig();
    let store = rig.open(Store::builder());
    let relay = rig.relay(&store);
    pause(&relay);
    let receipt = append(&store);
    let waiter = std::thread::spawn(move || receipt.wait_confirmed(FOREVER));
    let running = projection(&store, 0, SOON);
    let behind = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| running.wait_for_position(1_000, FOREVER));
        std::thread::sleep(Duration::from_millis(20));
        store.clone().close().unwrap();
        waiter.join().unwrap()
    });
    assert!(matches!(behind, Err(Error::ProjectionStopped { .. })), "{behind:?}");
    running.stop(FOREVER);
    in_time("the relay's stop", move || relay.stop(FOREVER));
    assert!(matches!(in_time("confirmed", move || waiter.join().unwrap()), Err(ConfirmError::Stopped)));
}

#[test]
fn a_subscription_waits_as_long_as_it_takes() {
    let rig = rig();
    let store = rig.open(Store::builder());
    let mut subscription = store.subscribe(0).unwrap();
    for timeout in [Duration::ZERO, INSTANT] {
        assert!(subscription.next_timeout(timeout).is_none());
    }
    let waiter =
        std::thread::spawn(move || (subscription.next_timeout(FOREVER).unwrap().unwrap(), subscription));
    append(&store);
    let (first, mut subscription) = in_time("next_timeout", move || waiter.join().unwrap());
    assert_eq!(first.seq(), 0);
    append(&store);
    assert_eq!(subscription.next_timeout(Duration::ZERO).unwrap().unwrap().seq(), 1, "it is there already");
    let waiter =
        std::thread::spawn(move || subscription.next_timeout(FOREVER).is_none_or(|next| next.is_err()));
    store.close().unwrap();
    assert!(in_time("next_timeout", move || waiter.join().unwrap()), "the store is closed");
}

#[test]
fn a_projection_is_waited_for_as_long_as_it_takes() {
    let rig = rig();
    let store = rig.open(Store::builder());
    let running = projection(&store, 1, Duration::from_millis(1));
    let seq = append(&store).seqs()[0];
    running.wait_for_position(seq, FOREVER).unwrap();
    running.wait_until_live(FOREVER).unwrap();
    for timeout in [Duration::ZERO, INSTANT] {
        running.wait_for_position(seq, timeout).unwrap();
        running.wait_until_live(timeout).unwrap();
        assert!(matches!(running.wait_for_position(seq + 1, timeout), Err(Error::ProjectionBehind { .. })));
    }
    assert_eq!(in_time("stop", move || running.stop(FOREVER)).state, ProjectionState::Ended);
}

#[test]
fn everything_that_runs_is_stopped_with_any_timeout() {
    for timeout in ALL {
        let rig = rig();
        let store = rig.open(Store::builder());
        let (relay, running) = (rig.relay(&store), projection(&store, 0, SOON));
        let consumer = store.consumer("s").spawn(rig.broker.source("q"), |_, _| Ok(())).unwrap();
        append(&store).wait_confirmed(SOON).unwrap();
        until("it is applied", || consumer.status().applied == 1);
        let (report, stats, status) =
            in_time("stop", move || (relay.stop(timeout), consumer.stop(timeout), running.stop(timeout)));
        assert_eq!(stats.failed, None);
        if timeout == FOREVER {
            assert!(report.clean && status.state == ProjectionState::Ended);
        }
        // What was not waited for ends by itself: the name is free again.
        until("the relay has ended", || store.relay("r").spawn(rig.broker.publisher()).is_ok());
    }
}

/// Goal: a write waits for room as long as it takes, and no longer than the store is open. Method: a quota that is
/// full; a relay makes room; then the store is closed while another write waits.
#[test]
fn room_is_waited_for_as_long_as_it_takes() {
    let rig = rig();
    let quota = |timeout| BacklogQuota::events(1).and_bytes(1 << 20).policy(QuotaPolicy::Wait(timeout));
    for timeout in [Duration::ZERO, INSTANT] {
        let folder = tempfile::tempdir().unwrap();
        let store =
            Store::builder().backlog_quota(quota(timeout)).open(folder.path().join("a.redb")).unwrap();
        append(&store);
        let refused = store.write(|tx| tx.append(event()));
        assert!(matches!(refused, Err(Error::BacklogFull { .. })));
    }
    let store = rig.open(Store::builder().backlog_quota(quota(FOREVER)));
    append(&store);
    let writes = store.clone();
    let waiter = std::thread::spawn(move || drop(append(&writes)));
    let relay = rig.relay(&store);
    in_time("the write", move || waiter.join().unwrap());
    until("all is published", || rig.broker.queue_len("q") == 2);
    pause(&relay);
    append(&store);
    let writes = store.clone();
    let waiter = std::thread::spawn(move || writes.write(|tx| tx.append(event())).map(drop));
    std::thread::sleep(Duration::from_millis(50));
    relay.stop(SOON);
    store.close().unwrap();
    let refused = in_time("the write", move || waiter.join().unwrap());
    assert!(matches!(refused, Err(Error::Closed { .. })), "{refused:?}");
}

// --- settings -----------------------------------------------------------------------------------------------------------

#[test]
fn a_store_takes_every_duration() {
    for duration in ALL {
        let rig = rig();
        let retention = Retention::until_confirmed().keep_age(duration);
        let builder = Store::builder().retention(retention).inbox_age(duration).progress_delay(duration);
        // A nanosecond is a limit that any company exceeds: tests/it/write_waits.rs.
        let builder = if duration == FOREVER { builder.write_wait_max(duration) } else { builder };
        let builder = builder.holder_warn_after(duration);
        let builder = if duration.is_zero() { builder } else { builder.quick_repair_when_idle(duration) };
        let store = rig.open(builder);
        let relay = rig.relay(&store);
        for n in 0..100 {
            store.write_once(format!("request {n}"), |tx| tx.append(event().id("e"))).unwrap();
        }
        append(&store).wait_confirmed(SOON).unwrap();
        if duration == FOREVER {
            assert!(store.write_once("request 0", |_| Ok(())).unwrap().is_repeat(), "it is kept for ever");
        } else {
            until("what is confirmed is trimmed", || store.stats().unwrap().trimmed_to > 0);
        }
        assert!(relay.stop(SOON).clean);
        store.close().unwrap();
    }
    let zero =
        Store::builder().quick_repair_when_idle(Duration::ZERO).open(rig().folder.path().join("a.redb"));
    assert!(matches!(zero, Err(Error::Setting(_))));
    let zero = Store::builder().write_wait_max(Duration::ZERO).open(rig().folder.path().join("a.redb"));
    assert!(matches!(zero, Err(Error::Setting(_))));
}

/// Goal: a wait between tries may be as long as it likes: the next try never comes, everything else goes on.
#[test]
fn a_backoff_takes_every_duration() {
    for duration in ALL {
        let rig = rig();
        let store = rig.open(Store::builder());
        let running = projection(&store, 1, duration);
        let left = AtomicU32::new(1);
        let consumer =
            store.consumer("s").backoff(duration, duration).spawn(rig.broker.source("q"), move |_, _| {
                let fails = left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
                if fails { Err(Error::app("not yet")) } else { Ok(()) }
            });
        let consumer = consumer.unwrap();
        rig.broker.publish("", "q", Message { message_id: Some("1".into()), ..Message::default() }).unwrap();
        until("the consumer's first try failed", || consumer.status().retried == 1);
        let seq = append(&store).seqs()[0];
        until("the projection's first try failed", || running.status().failed_tries == 1);
        if duration == FOREVER {
            rig.broker
                .publish("", "q", Message { message_id: Some("2".into()), ..Message::default() })
                .unwrap();
            until("another delivery is applied", || consumer.status().applied == 1);
            assert!(matches!(running.status().state, ProjectionState::Retrying { .. }));
        } else {
            running.wait_for_position(seq, SOON).unwrap();
            until("the delivery is applied", || consumer.status().applied == 1);
        }
        assert_eq!(in_time("stop", move || consumer.stop(SOON)).failed, None);
        assert_eq!(in_time("stop", move || running.stop(SOON)).state, ProjectionState::Ended);
    }
}

#[test]
fn a_relays_backoff_takes_every_duration() {
    let rig = rig();
    let store = rig.open(Store::builder());
    for refused in [Duration::ZERO, INSTANT] {
        let relay = store.relay("r").backoff(refused, FOREVER).spawn(rig.broker.publisher());
        assert!(matches!(relay, Err(Error::Setting(_))), "the first wait is a millisecond at least");
    }
    // A nack, a return and a redriven event: each of them waits by itself.
    let queue = |name: &'static str| {
        move |tx: &onewrite::Transaction| tx.append(Event::bytes("t", "1").to("", name)).map(drop)
    };
    rig.broker.script(Rule::any().times(1).then(Verdict::Nack));
    let relay = store.relay("r").backoff(FOREVER, FOREVER).destination_attempts(2);
    let relay = relay.spawn(rig.broker.publisher()).unwrap();
    store.write(queue("q")).unwrap();
    until("it is refused", || rig.broker.script_left() == 0 && relay.status().in_flight == 0);
    store.write(queue("nowhere")).unwrap();
    until("it waits", || relay.status().retrying == 1);
    store.write(queue("q")).unwrap().wait_confirmed(SOON).unwrap();
    assert_eq!(relay.status().state, RelayState::Connected);
    in_time("stop", move || relay.stop(SOON));
    // What waits for ever on disk is read again.
    let relay = rig.relay(&store);
    let is_back = |status: RelayStatus| status.retrying == 1 && status.state == RelayState::Connected;
    until("it is in memory again", || is_back(relay.status()));
    relay.stop(SOON);
}

/// Goal: events may gather for ever; the projection still stops, and what was gathered is applied by the next.
#[test]
fn a_projections_delay_takes_every_duration() {
    for delay in ALL {
        let rig = rig();
        let store = rig.open(Store::builder());
        let running = store.projection("p").batch_delay(delay).spawn(|_, _| Ok(())).unwrap();
        running.wait_until_live(SOON).unwrap();
        let mut seq = append(&store).seqs()[0];
        if delay == FOREVER {
            // One that comes before the projection has gone to sleep is applied at once, with what was there before.
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(20));
                if running.status().applied <= seq {
                    break;
                }
                seq = append(&store).seqs()[0];
            }
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(running.status().applied, seq, "the newest event gathers");
        } else {
            running.wait_for_position(seq, SOON).unwrap();
        }
        assert_eq!(in_time("stop", move || running.stop(SOON)).state, ProjectionState::Ended);
        projection(&store, 0, SOON).wait_for_position(seq, SOON).unwrap();
    }
}

/// Goal: a broker's consumer timeout is longer than no wait for a gap. Method: the longest is refused by name.
#[test]
fn a_gap_is_not_waited_for_for_ever() {
    let rig = rig();
    let store = rig.open(Store::builder());
    let run = |timeout| {
        store.consumer("s").on_gap(GapPolicy::Hold(timeout)).spawn(rig.broker.source("q"), |_, _| Ok(()))
    };
    assert!(matches!(run(FOREVER), Err(Error::Setting(_))));
    for timeout in [Duration::ZERO, INSTANT] {
        assert_eq!(run(timeout).unwrap().stop(SOON).failed, None);
    }
}

#[test]
fn the_memory_broker_takes_every_duration() {
    for duration in ALL {
        let rig = rig();
        let store = rig.open(Store::builder());
        let publisher: MemoryPublisher = rig.broker.publisher().confirm_deadline(duration);
        rig.broker.script(Rule::any().times(1).then(Verdict::LoseConfirm));
        let relay = store.relay("r").spawn(publisher).unwrap();
        let lost = append(&store);
        if duration == FOREVER {
            assert!(matches!(
                lost.wait_confirmed(Duration::from_millis(20)),
                Err(ConfirmError::Timeout { .. })
            ));
        } else {
            lost.wait_confirmed(SOON).unwrap();
        }
        in_time("stop", move || relay.stop(Duration::from_millis(50)));

        let other = store.relay("other").spawn(rig.broker.publisher()).unwrap();
        lost.wait_confirmed_by("other", SOON).unwrap();
        rig.broker.script(Rule::any().times(1).then(Verdict::DelayConfirm(duration)));
        let delayed = append(&store);
        if duration == FOREVER {
            assert!(delayed.wait_confirmed(Duration::from_millis(20)).is_err());
        } else {
            delayed.wait_confirmed(SOON).unwrap();
        }
        in_time("stop", move || other.stop(Duration::from_millis(50)));
    }
}

/// Goal: what RabbitMQ cannot do is refused by name; every other duration does. Method: a port at which nobody listens.
#[cfg(feature = "rabbitmq")]
#[test]
fn rabbitmq_takes_every_duration_that_the_protocol_has() {
    use onewrite::broker::{RabbitMq, RabbitMqSource};
    const URL: &str = "amqp://127.0.0.1:1";
    let rig = rig();
    let store = rig.open(Store::builder());
    let start = |publisher: RabbitMq| store.relay("r").spawn(publisher);
    let consume = |source: RabbitMqSource| store.consumer("s").spawn(source, |_, _| Ok(()));
    let (publisher, source) = (|| RabbitMq::new(URL).unwrap(), || RabbitMqSource::new(URL, "q").unwrap());
    for duration in ALL {
        assert!(matches!(start(publisher().heartbeat(duration)), Err(Error::Setting(_))));
        assert!(matches!(consume(source().heartbeat(duration)), Err(Error::Setting(_))));
    }
    for duration in [Duration::ZERO, INSTANT] {
        assert!(matches!(start(publisher().confirm_deadline(duration)), Err(Error::Setting(_))));
        assert!(matches!(start(publisher().reconnect_backoff(duration, FOREVER)), Err(Error::Setting(_))));
        assert!(matches!(consume(source().reconnect_backoff(duration, FOREVER)), Err(Error::Setting(_))));
    }
    for first in [Duration::from_millis(1), FOREVER] {
        let publisher = publisher().confirm_deadline(FOREVER).reconnect_backoff(first, FOREVER);
        let (relay, consumer) =
            (start(publisher).unwrap(), consume(source().reconnect_backoff(first, FOREVER)).unwrap());
        until("both are refused", || {
            relay.status().last_fault.is_some() && consumer.status().disconnected.is_some()
        });
        let (report, stats) = in_time("stop", move || (relay.stop(FOREVER), consumer.stop(FOREVER)));
        assert_eq!((report.clean, stats.failed), (true, None));
    }
}

// --- times --------------------------------------------------------------------------------------------------------------

/// The latest time that this platform can represent.
fn latest() -> SystemTime {
    let (mut latest, mut step) = (SystemTime::now(), Duration::MAX / 2);
    while step > Duration::ZERO {
        match latest.checked_add(step) {
            Some(later) => latest = later,
            None => step /= 2,
        }
    }
    latest
}

/// Goal: an event's own times, and a clock, may be as far away as can be represented. Method: events that are due, and that
/// expire, at the ends of time; then the clock is moved to the end.
#[test]
fn times_may_be_as_far_away_as_can_be_represented() {
    let rig = rig();
    let clock = ManualClock::new();
    let store = rig.open(Store::builder().clock(Arc::new(clock.clone())));
    let relay = rig.relay(&store);
    let running = projection(&store, 1, FOREVER);
    store.write(|tx| tx.append(event().not_before(SystemTime::UNIX_EPOCH).expires(latest()))).unwrap();
    store.write(|tx| tx.append(event().not_before(latest()))).unwrap();
    until("the first is published", || rig.broker.queue_len("q") == 1);
    until("the projection waits for ever", || running.status().failed_tries == 1);
    for _ in 0..2 {
        clock.advance(FOREVER);
        assert_eq!(clock.now().mono_ms, u64::MAX);
    }
    running.wait_until_live(SOON).unwrap();
    append(&store).wait_confirmed(SOON).unwrap();
    assert_eq!(relay.status().state, RelayState::Connected);
    relay.stop(SOON);
    running.stop(SOON);
}

// --- nothing is left out ------------------------------------------------------------------------------------------------

/// Goal: a lane that may never be forgotten stays, and a new one beyond the bound is refused at once. Method: one lane at most.
#[test]
fn a_lane_is_never_idle_for_long_enough() {
    let rig = rig();
    let policy = onewrite::LanesPolicy::ForgetIdle(Duration::MAX);
    let store = rig.open(Store::builder().lanes_max(1).lanes_policy(policy));
    let message = |lane| crate::lanes_inbox::numbered(lane, 0, "x");
    let first = |lane| store.write(move |tx| tx.first_delivery("s", &message(lane))).map(Receipt::into_value);
    assert!(first(1).unwrap());
    assert!(matches!(first(2), Err(onewrite::Error::LanesFull { lanes_max: 1, .. })));
    assert!(!first(1).unwrap());
}

/// Goal: a task that stops something may wait for as long as it takes, or not at all; so may whoever receives events of a broker. Method: each
/// is stopped with the longest and the shortest timeout.
#[test]
fn tasks_wait_as_long_as_it_takes() {
    let rig = rig();
    let store = rig.open(Store::builder());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for timeout in [FOREVER, Duration::ZERO] {
        let (relay, running) = (rig.relay(&store), projection(&store, 1, Duration::from_millis(10)));
        let consumer = store.consumer("c").spawn(rig.broker.source("q"), |_, _| Ok(())).unwrap();
        runtime.block_on(async {
            relay.stop_async(timeout).await;
            running.stop_async(timeout).await;
            consumer.stop_async(timeout).await;
        });
        // What was not waited for ends by itself.
        until("the names are free", || {
            store.stats().unwrap().relays.values().all(|relay| relay.running.is_none())
        });
        std::thread::sleep(Duration::from_millis(300));
    }
    let (events, received) = onewrite::broker::SourceEvents::channel();
    assert!(received.recv_timeout(Duration::ZERO).is_err());
    let waiter = std::thread::spawn(move || received.recv_timeout(FOREVER).is_ok());
    events.send(onewrite::broker::SourceEvent::Up { epoch: onewrite::broker::Epoch(1) });
    assert!(in_time("recv_timeout", move || waiter.join().unwrap()));
}

/// What is public and takes a `Duration`, and is called above with the longest and the shortest.
const COVERED: &[&str] = &[
    "advance",
    "backoff",
    "batch_delay",
    "confirm_deadline",
    "heartbeat",
    "holder_warn_after",
    "inbox_age",
    "keep_age",
    "next_timeout",
    "progress_delay",
    "quick_repair_when_idle",
    "reconnect_backoff",
    "recv_timeout",
    "stop",
    "stop_async",
    "wait_confirmed",
    "wait_confirmed_by",
    "wait_for_position",
    "wait_until_live",
    "write_wait_max",
];

/// Variants of public enums that hold a `Duration`.
const COVERED_VARIANTS: &[&str] = &["DelayConfirm", "ForgetIdle", "Hold", "Wait"];

#[test]
fn everything_that_takes_a_duration_is_called_with_the_longest() {
    let (mut functions, mut variants) = (BTreeSet::new(), BTreeSet::new());
    for (_, source) in files("src") {
        let code = without_tests(&code_only(&source));
        let both = ["pub fn ", "pub async fn "].map(|begin| code.match_indices(begin));
        for (at, begin) in both.into_iter().flatten() {
            let signature = code[at..].split_once('{').map_or("", |(signature, _)| signature);
            let (name, rest) = signature[begin.len()..].split_once(['(', '<']).unwrap();
            let arguments = rest.split("->").next().unwrap();
            if arguments.contains(": Duration") || arguments.contains("<Duration>") {
                functions.insert(name.to_owned());
            }
        }
        for (at, _) in code.match_indices("pub enum ") {
            let body = code[at..].split_once("\n}").map_or("", |(body, _)| body);
            let holds = body.lines().filter_map(|line| line.trim().split_once("(Duration)"));
            variants.extend(holds.map(|(name, _)| name.to_owned()));
        }
    }
    assert_eq!(functions.iter().map(String::as_str).collect::<Vec<_>>(), COVERED);
    assert_eq!(variants.iter().map(String::as_str).collect::<Vec<_>>(), COVERED_VARIANTS);
}
