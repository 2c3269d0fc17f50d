//! The relay against the scripted in-process broker: promises P2 to P5, P7 to P9, P11.
//!
//! Judged from the broker's own tap, never from our records.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions, Rule, Verdict};
use onewrite::redb::{Database, TableDefinition};
use onewrite::{
    BacklogQuota, ConfirmError, Error, Event, FaultClass, HeaderValue, Message, PublishOrder,
    QuarantinePolicy, QuotaPolicy, Relay, RelayBuilder, RelayState, Store, wire,
};

const SOON: Duration = Duration::from_secs(20);
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const STATE: TableDefinition<'_, u64, u64> = TableDefinition::new("state");

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// A broker with an exchange `e` that fans out to a queue `q`.
fn broker() -> MemoryBroker {
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("e", ExchangeKind::Topic);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "#").unwrap();
    broker
}

fn event(text: &str, key: Option<&str>) -> Event {
    let event = Event::bytes("t", text.as_bytes().to_vec()).to("e", "r");
    match key {
        Some(key) => event.key(key),
        None => event,
    }
}

fn append(store: &Store, event: Event) -> onewrite::Receipt<onewrite::Appended> {
    store.write(move |tx| tx.append(event.clone())).unwrap()
}

fn quick(store: &Store) -> RelayBuilder {
    store.relay("r").backoff(Duration::from_millis(2), Duration::from_millis(20))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn text(message: &Message) -> String {
    String::from_utf8(message.payload.clone()).unwrap()
}

fn tapped(broker: &MemoryBroker) -> Vec<String> {
    broker.tap().iter().map(|tapped| text(&tapped.message)).collect()
}

/// Takes everything, confirms nothing, until `release`.
fn hold_confirms(broker: &MemoryBroker) {
    broker.script(Rule::any().always().then(Verdict::HoldConfirm));
}

fn release(broker: &MemoryBroker) {
    broker.clear_script();
    broker.release_confirms();
}

fn stop(relay: Relay) {
    let report = relay.stop(SOON);
    assert!(report.clean, "{report:?}");
}

/// P2. Nothing of a transaction that has not committed, or was rolled back, reaches the broker.
#[test]
fn no_phantom() {
    let (_folder, store) = open();
    let broker = broker();
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    let tx = store.begin().unwrap();
    tx.append(event("rolled back", None)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    drop(tx);
    store.write(|tx| tx.append(event("failed", None)).and(Err::<(), _>(Error::app("no")))).unwrap_err();
    let tx = store.begin().unwrap();
    tx.append(event("committed", None)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(tapped(&broker), Vec::<String>::new());
    tx.commit().unwrap().wait_confirmed(SOON).unwrap();
    assert_eq!(tapped(&broker), ["committed"]);
    stop(relay);
}

/// P3, P4, P5, P7. The broker goes away and comes back while many keys are written. Everything arrives, per key in
/// order; a resend has the same id, lane number and bytes; writes never wait; no attempt is spent.
#[test]
fn outage_loses_nothing_and_keeps_order() {
    let (_folder, store) = open();
    let broker = broker();
    // With a single attempt, an outage that spent one would send events to quarantine.
    let relay = quick(&store).attempts(1).destination_attempts(1).spawn(broker.publisher()).unwrap();
    let (mut sent, mut slowest) = (Vec::new(), Duration::ZERO);
    for n in 0..400 {
        if n % 40 == 10 {
            broker.script(Rule::any().times(3).then(Verdict::LoseConfirm));
        }
        if n % 40 == 20 {
            broker.go_down();
        }
        if n % 40 == 30 {
            broker.come_up();
        }
        let key = format!("k{}", n % 7);
        let start = Instant::now();
        append(&store, event(&format!("{key}:{n}"), Some(&key)));
        slowest = slowest.max(start.elapsed());
        sent.push(format!("{key}:{n}"));
    }
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    let stats = store.stats().unwrap();
    assert_eq!((stats.relays["r"].quarantined, stats.relays["r"].confirmed), (0, 400));

    let mut first = BTreeMap::<String, Arc<Message>>::new();
    let mut order = Vec::new();
    for tapped in broker.tap() {
        let text = text(&tapped.message);
        let Some(earlier) = first.get(&text) else {
            order.push(text.clone());
            first.insert(text, tapped.message);
            continue;
        };
        assert_eq!(earlier.message_id, tapped.message.message_id);
        for header in [wire::LANE, wire::LANE_NUMBER, wire::STORE, wire::EPOCH, wire::CRC] {
            assert_eq!(earlier.header(header), tapped.message.header(header), "{header}");
        }
        assert_eq!(tapped.message.header(wire::RESEND), Some(&HeaderValue::Bool(true)));
    }
    assert_eq!(order.len(), 400);
    for key in 0..7 {
        let of = |all: &[String]| -> Vec<String> {
            all.iter().filter(|text| text.starts_with(&format!("k{key}:"))).cloned().collect()
        };
        assert_eq!(of(&order), of(&sent));
    }
    stop(relay);
}

/// P3, P5. An unroutable event is tried, then quarantined with the broker's words; its key waits, others do not. Redriven
/// once the route is there, it is published first, then those behind it.
#[test]
fn unroutable_is_quarantined_and_redriven_in_order() {
    let (_folder, store) = open();
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("e", ExchangeKind::Topic);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "good").unwrap();
    let relay = quick(&store).destination_attempts(3).spawn(broker.publisher()).unwrap();
    let bad = append(&store, Event::bytes("t", b"a0".to_vec()).to("e", "bad").key("a"));
    let behind = append(&store, Event::bytes("t", b"a1".to_vec()).to("e", "good").key("a"));
    let other = append(&store, Event::bytes("t", b"b0".to_vec()).to("e", "good").key("b"));
    other.wait_confirmed(SOON).unwrap();
    match bad.wait_confirmed(SOON).unwrap_err() {
        ConfirmError::Quarantined { seq: 0, fault } => {
            assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(312)));
        }
        error => panic!("{error}"),
    }
    assert!(matches!(behind.wait_confirmed(Duration::from_millis(50)), Err(ConfirmError::Timeout { .. })));
    let quarantine = store.quarantine("r").unwrap();
    let listed = quarantine.list(None, 10).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].seq, listed[0].destination_attempts, listed[0].holds_key), (0, 3, true));
    let (_, record) = quarantine.get(0).unwrap();
    assert_eq!(record.unwrap().payload(), b"a0");
    assert!(matches!(quarantine.redrive(1), Err(Error::NotQuarantined { seq: 1, .. })));

    broker.bind("q", "e", "bad").unwrap();
    quarantine.redrive(0).unwrap();
    behind.wait_confirmed(SOON).unwrap();
    let queued: Vec<_> = broker.messages("q").iter().map(|stored| text(&stored.message)).collect();
    assert_eq!(queued, ["b0", "a0", "a1"]);
    assert!(quarantine.list(None, 10).unwrap().is_empty());
    stop(relay);
}

/// Discarding what is in quarantine frees its key; with the policy `SkipEvent` it never held it.
#[test]
fn discard_and_skip_free_the_key() {
    for policy in [QuarantinePolicy::HoldKey, QuarantinePolicy::SkipEvent] {
        let (_folder, store) = open();
        let broker = broker();
        broker.script(
            Rule::matching(|publishing| publishing.message.payload == b"poison")
                .always()
                .then(Verdict::close_channel(FaultClass::Message, 406, "PRECONDITION_FAILED")),
        );
        let relay = quick(&store).attempts(2).on_quarantine(policy).spawn(broker.publisher()).unwrap();
        let poison = append(&store, event("poison", Some("a")));
        let behind = append(&store, event("behind", Some("a")));
        assert!(matches!(poison.wait_confirmed(SOON), Err(ConfirmError::Quarantined { seq: 0, .. })));
        if policy == QuarantinePolicy::HoldKey {
            assert!(matches!(
                behind.wait_confirmed(Duration::from_millis(50)),
                Err(ConfirmError::Timeout { .. })
            ));
            store.quarantine("r").unwrap().discard(0).unwrap();
        }
        behind.wait_confirmed(SOON).unwrap();
        let queued: Vec<_> = broker.messages("q").iter().map(|stored| text(&stored.message)).collect();
        assert_eq!(queued, ["behind"], "{policy:?}");
        stop(relay);
    }
}

/// One message that makes the broker close the channel takes a whole window with it. Only it goes to quarantine.
#[test]
fn poison_kills_only_itself() {
    let (_folder, store) = open();
    let broker = broker();
    broker.script(
        Rule::matching(|publishing| publishing.message.payload == b"poison")
            .always()
            .then(Verdict::close_channel(FaultClass::Message, 406, "too large")),
    );
    for n in 0..200 {
        append(&store, event(if n == 77 { "poison" } else { "good" }, (n % 3 == 0).then_some("k")));
    }
    let relay = quick(&store).attempts(3).spawn(broker.publisher()).unwrap();
    until("all but one confirmed", || relay.status().confirmed >= 199);
    until("one in quarantine", || relay.status().quarantined == 1);
    assert_eq!(store.quarantine("r").unwrap().list(None, 10).unwrap()[0].seq, 77);
    assert_eq!(broker.messages("q").iter().filter(|stored| stored.message.payload == b"poison").count(), 0);
    stop(relay);
}

/// A full queue nacks. The same event is tried again, its key waits, nothing is spent; once there is room all arrive.
#[test]
fn nacks_spend_nothing() {
    let (_folder, store) = open();
    let broker = broker();
    broker.script(Rule::any().times(60).then(Verdict::Nack));
    let relay = quick(&store).attempts(1).destination_attempts(1).spawn(broker.publisher()).unwrap();
    for n in 0..20 {
        append(&store, event(&format!("{n:02}"), Some("k")));
    }
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    let queued: Vec<_> = broker.messages("q").iter().map(|stored| text(&stored.message)).collect();
    assert_eq!(queued, (0..20).map(|n| format!("{n:02}")).collect::<Vec<_>>());
    assert_eq!(relay.status().quarantined, 0);
    stop(relay);
}

/// `not_before` is waited for, without holding others; what has expired is quarantined as such.
#[test]
fn scheduled_and_expired() {
    let (_folder, store) = open();
    let broker = broker();
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    let now = SystemTime::now();
    let due = now + Duration::from_secs(2);
    let later = append(&store, event("later", Some("k")).not_before(due));
    let expired = append(&store, event("expired", Some("k")).expires(now));
    let sooner = append(&store, event("sooner", Some("k")));
    sooner.wait_confirmed(SOON).unwrap();
    match expired.wait_confirmed(SOON).unwrap_err() {
        ConfirmError::Quarantined { seq: 1, fault } => assert_eq!(fault.class, FaultClass::Expired),
        error => panic!("{error}"),
    }
    assert_eq!(tapped(&broker), ["sooner"]);
    later.wait_confirmed(SOON).unwrap();
    assert!(SystemTime::now() >= due);
    assert_eq!(tapped(&broker), ["sooner", "later"]);
    stop(relay);
}

/// A scheduled event survives a restart of the relay, and is published when it is due.
#[test]
fn scheduled_survives_a_restart() {
    let (_folder, store) = open();
    let broker = broker();
    let due = SystemTime::now() + Duration::from_secs(1);
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    append(&store, event("later", None).not_before(due));
    append(&store, event("now", None)).wait_confirmed(SOON).unwrap();
    stop(relay);
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    until("both", || tapped(&broker).len() == 2);
    assert!(SystemTime::now() >= due);
    assert_eq!(tapped(&broker), ["now", "later"]);
    stop(relay);
}

/// P11. `stop` keeps its deadline also when the broker hangs or blocks, and what was in flight is published again.
#[test]
fn stop_is_prompt() {
    let (_folder, store) = open();
    let broker = broker();
    broker.hang(true);
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    append(&store, event("a", None));
    until("in flight", || relay.status().in_flight == 1);
    let start = Instant::now();
    let report = relay.stop(Duration::from_millis(300));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!((report.clean, report.unknown, report.backlog_events), (false, 1, 1));
    broker.hang(false);

    broker.block(true);
    until("the name is free again", || {
        let Ok(relay) = quick(&store).spawn(broker.publisher()) else { return false };
        until("blocked", || relay.status().state == RelayState::Blocked);
        let start = Instant::now();
        relay.stop(SOON);
        start.elapsed() < Duration::from_secs(5)
    });
    broker.block(false);
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    stop(relay);
}

/// Pause holds what is new; resume lets it go.
#[test]
fn pause_and_resume() {
    let (_folder, store) = open();
    let broker = broker();
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    until("connected", || relay.status().state == RelayState::Connected);
    relay.pause();
    until("paused", || relay.status().state == RelayState::Paused);
    let receipt = append(&store, event("a", None));
    assert!(matches!(receipt.wait_confirmed(Duration::from_millis(100)), Err(ConfirmError::Timeout { .. })));
    relay.resume();
    receipt.wait_confirmed(SOON).unwrap();
    stop(relay);
}

/// P8. A backlog of 50,000 events before a broker that hangs: no more than the named bounds is in memory; all arrive
/// once it answers, and the log is trimmed behind them.
#[test]
fn bounded_before_a_large_backlog() {
    let (_folder, store) = open();
    for chunk in 0..50 {
        store
            .write(move |tx| {
                (0..1000).try_for_each(|n| tx.append(event(&format!("{chunk}.{n}"), None)).map(drop))
            })
            .unwrap();
    }
    let broker = broker();
    hold_confirms(&broker);
    let relay = quick(&store).window_events(100).spawn(broker.publisher()).unwrap();
    until("a full window", || relay.status().in_flight == 100);
    std::thread::sleep(Duration::from_millis(100));
    let status = relay.status();
    assert_eq!(status.in_flight, 100);
    assert!(status.in_memory <= 400, "{status:?}");
    release(&broker);
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    until("a trimmed log", || store.stats().unwrap().trimmed_to == 50_000);
    assert_eq!(broker.queue_len("q"), 50_000);
    stop(relay);
}

/// P3, P4. The file is copied while the relay works, as a crash would leave it. Whatever the copy has not noted as
/// confirmed is published from it again; nothing is lost.
#[test]
fn a_crash_at_any_moment_loses_nothing() {
    let (folder, store) = open();
    let broker = broker();
    let relay = quick(&store).window_events(16).spawn(broker.publisher()).unwrap();
    let written = Arc::new(AtomicU64::new(0));
    let writer = std::thread::spawn({
        let (store, written) = (store.clone(), Arc::clone(&written));
        move || {
            for n in 0..600 {
                let key = format!("k{}", n % 5);
                append(&store, event(&format!("{n}"), Some(&key)));
                written.store(n + 1, Relaxed);
            }
        }
    });
    for round in 0..5 {
        until("progress", || written.load(Relaxed) >= 100 * (round + 1));
        // A copy is what a crash leaves only if no write tears it: hold the writers for the moment.
        let hold = store.begin().unwrap();
        let acknowledged = written.load(Relaxed);
        let before = tapped(&broker);
        let copy = folder.path().join(format!("copy{round}.redb"));
        std::fs::copy(store.path(), &copy).unwrap();
        drop(hold);

        let crashed = Store::open(&copy).unwrap();
        let again = self::broker();
        let second = quick(&crashed).spawn(again.publisher()).unwrap();
        until("an empty backlog", || crashed.stats().unwrap().backlog_events == 0);
        let mut all = before;
        all.extend(tapped(&again));
        for n in 0..acknowledged {
            assert!(all.contains(&n.to_string()), "round {round}: {n} of {acknowledged} is lost");
        }
        stop(second);
    }
    writer.join().unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    stop(relay);
}

/// P9. A record damaged on disk is never published: it goes to quarantine with its number, and the rest goes on.
#[test]
fn a_damaged_record_is_quarantined() {
    let (folder, store) = open();
    for n in 0..10 {
        append(&store, event(&format!("{n}"), Some("k")));
    }
    store.close().unwrap();
    let path = folder.path().join("a.redb");
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut log = tx.open_table(LOG).unwrap();
        let mut frame = log.remove(4).unwrap().unwrap().value().to_vec();
        *frame.last_mut().unwrap() ^= 1;
        log.insert(4, frame.as_slice()).unwrap();
    }
    tx.commit().unwrap();
    drop(db);

    let store = Store::open(&path).unwrap();
    let broker = broker();
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    until("nine confirmed", || relay.status().confirmed == 9);
    assert_eq!(tapped(&broker), ["0", "1", "2", "3", "5", "6", "7", "8", "9"]);
    let quarantine = store.quarantine("r").unwrap();
    let listed = quarantine.list(None, 10).unwrap();
    assert_eq!((listed[0].seq, listed[0].fault.class), (4, FaultClass::Undecodable));
    assert!(matches!(quarantine.redrive(4), Err(Error::Corrupt(error)) if error.seq == 4));
    quarantine.discard(4).unwrap();
    stop(relay);
}

/// Two relays drain one log, each at its own pace; the log waits for the slower one, until it is forgotten.
#[test]
fn two_relays_on_one_log() {
    let (_folder, store) = open();
    let (fast, slow) = (broker(), broker());
    slow.hang(true);
    let first = quick(&store).spawn(fast.publisher()).unwrap();
    let second = store.relay("slow").spawn(slow.publisher()).unwrap();
    assert!(matches!(store.relay("slow").spawn(slow.publisher()), Err(Error::RelayRunning { .. })));
    let receipts: Vec<_> = (0..50).map(|n| append(&store, event(&format!("{n}"), None))).collect();
    assert!(matches!(receipts[0].wait_confirmed(SOON), Err(ConfirmError::NoRelay(_))));
    receipts.iter().for_each(|receipt| receipt.wait_confirmed_by("r", SOON).unwrap());
    assert!(matches!(
        receipts[0].wait_confirmed_by("slow", Duration::from_millis(20)),
        Err(ConfirmError::Timeout { .. })
    ));
    assert!(matches!(store.forget_relay("slow"), Err(Error::RelayRunning { .. })));
    assert_eq!(store.stats().unwrap().backlog_events, 50);
    second.stop(Duration::from_millis(100));
    until("forgotten", || store.forget_relay("slow").is_ok());
    until("trimmed", || store.stats().unwrap().trimmed_to == 50);
    stop(first);
    assert!(matches!(store.forget_relay("nobody"), Err(Error::NoSuchRelay { .. })));
}

/// Total order: one event in flight in all. Relaxed: a key is pipelined.
#[test]
fn orderings() {
    for (ordering, in_flight) in
        [(PublishOrder::PerKey, 1), (PublishOrder::Total, 1), (PublishOrder::Relaxed, 20)]
    {
        let (_folder, store) = open();
        let broker = broker();
        hold_confirms(&broker);
        for n in 0..20 {
            append(&store, event(&format!("{n:02}"), Some("k")));
        }
        let relay = quick(&store).ordering(ordering).spawn(broker.publisher()).unwrap();
        until("in flight", || relay.status().in_flight == in_flight);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(relay.status().in_flight, in_flight, "{ordering:?}");
        release(&broker);
        until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
        assert_eq!(tapped(&broker), (0..20).map(|n| format!("{n:02}")).collect::<Vec<_>>());
        stop(relay);
    }
}

/// While writes flow the relay adds no commit of its own, and so no fsync.
#[test]
fn the_applications_commits_write_progress() {
    let (_folder, store) = open();
    let broker = broker();
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    append(&store, event("warm", None)).wait_confirmed(SOON).unwrap();
    let before = store.stats().unwrap();
    let start = Instant::now();
    let mut writes = 0;
    while start.elapsed() < Duration::from_millis(700) {
        append(&store, event("x", None));
        writes += 1;
    }
    let after = store.stats().unwrap();
    assert_eq!(after.commits_alone, before.commits_alone, "over {writes} writes");
    assert!(after.relays["r"].confirmed > before.relays["r"].confirmed);
    stop(relay);
}

/// Nor where each of them takes longer than progress waits for one. Method: writes that are slow on their caller's thread, as with a slow
/// disk; there is always something to trim, and a deadline of the writer's passes during each.
#[test]
fn slow_commits_write_progress_too() {
    let folder = tempfile::tempdir().unwrap();
    let delay = Duration::from_millis(100);
    let store = Store::builder().progress_delay(delay).open(folder.path().join("a.redb")).unwrap();
    let broker = broker();
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    let slow = || {
        store.write(move |tx| {
            std::thread::sleep(delay * 2);
            (0..10).try_for_each(|_| tx.append(event("x", None)).map(drop))
        })
    };
    slow().unwrap();
    let before = store.stats().unwrap();
    (0..7).for_each(|_| drop(slow().unwrap()));
    let after = store.stats().unwrap();
    assert_eq!(after.commits_alone, before.commits_alone);
    assert!(after.relays["r"].confirmed > before.relays["r"].confirmed);
    // Of the last few nothing is due by itself; what trims them is somebody's commit that has no event at all.
    let slow_state = || {
        store.write(move |tx| {
            std::thread::sleep(delay * 2);
            tx.open_table(STATE)?.insert(1, 1)?;
            Ok(())
        })
    };
    let trimmed = || store.stats().unwrap().trimmed_to == after.next_seq;
    for _ in (0..20).take_while(|_| !trimmed()) {
        slow_state().unwrap();
    }
    assert!(trimmed(), "{:?}", store.stats());
    assert_eq!(store.stats().unwrap().commits_alone, before.commits_alone);
    stop(relay);
}

/// Settings that cannot work are refused by name.
#[test]
fn bad_settings_are_named() {
    let (_folder, store) = open();
    let refused =
        |builder: RelayBuilder| builder.spawn(MemoryBroker::new().publisher()).unwrap_err().to_string();
    assert_eq!(refused(store.relay("")), "setting `name`: a relay's name is 1 to 255 bytes long");
    assert_eq!(refused(store.relay("r").window_events(0)), "setting `window_events`: it must be 1 to 16384");
    assert_eq!(refused(store.relay("r").window_bytes(0)), "setting `window_bytes`: it must be at least 1");
    assert_eq!(refused(store.relay("r").attempts(0)), "setting `attempts`: it must be at least 1");
    assert!(matches!(store.quarantine("r"), Err(Error::NoSuchRelay { .. })));
}

/// What was discarded stays so, also when the process dies before the position is past it.
#[test]
fn discarded_stays_discarded_through_a_crash() {
    let (folder, store) = open();
    let broker = broker();
    // The first event is never confirmed, and holds the position back; the second is poison.
    broker.script(
        Rule::matching(|publishing| publishing.message.payload == b"first")
            .always()
            .then(Verdict::HoldConfirm),
    );
    let bad = Verdict::Return { code: 312, text: "NO_ROUTE".into() };
    broker.script(Rule::matching(|publishing| publishing.message.payload == b"bad").always().then(bad));
    let relay = quick(&store).destination_attempts(1).spawn(broker.publisher()).unwrap();
    append(&store, event("first", None));
    let bad = append(&store, event("bad", Some("k")));
    let behind = append(&store, event("behind", Some("k")));
    assert!(matches!(bad.wait_confirmed(SOON), Err(ConfirmError::Quarantined { seq: 1, .. })));
    store.quarantine("r").unwrap().discard(1).unwrap();
    behind.wait_confirmed(SOON).unwrap();
    assert_eq!(store.stats().unwrap().relays["r"].position, 0);
    let copy = folder.path().join("copy.redb");
    let hold = store.begin().unwrap();
    std::fs::copy(store.path(), &copy).unwrap();
    drop(hold);

    let crashed = Store::open(&copy).unwrap();
    let again = self::broker();
    let second = quick(&crashed).spawn(again.publisher()).unwrap();
    until("an empty backlog", || crashed.stats().unwrap().backlog_events == 0);
    assert!(!tapped(&again).contains(&"bad".to_owned()));
    assert!(crashed.quarantine("r").unwrap().list(None, 10).unwrap().is_empty());
    until("a trimmed log", || crashed.stats().unwrap().trimmed_to == 3);
    assert!(crashed.read().unwrap().events(0).unwrap().next().is_none(), "its record is gone too");
    stop(second);
    drop(relay);
}

/// The story: the payments example counted 20,002 confirmed of 20,000 events after a `kill -9`: what was confirmed ahead
/// of the position was published again, and counted twice. Durable figures count events, not confirms.
#[test]
fn an_event_that_is_confirmed_again_counts_once() {
    let (_folder, store) = open();
    let broker = broker();
    broker.script(Rule::matching(|m| m.message.payload == b"held").times(1).then(Verdict::HoldConfirm));
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    append(&store, event("held", None));
    append(&store, event("ahead", None)).wait_confirmed(SOON).unwrap();
    relay.stop(Duration::from_millis(200));
    let relay = quick(&store).spawn(broker.publisher()).unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    stop(relay);
    assert_eq!(tapped(&broker), ["held", "ahead", "held", "ahead"]);
    assert_eq!(store.stats().unwrap().relays["r"].confirmed, 2);
}

/// The story: `redrive` right after a receipt said *quarantined* once answered that the event is not there: its row was
/// still on its way to the file.
#[test]
fn what_is_reported_as_quarantined_can_be_redriven_at_once() {
    let (_folder, store) = open();
    let broker = broker();
    let relay = quick(&store).destination_attempts(1).spawn(broker.publisher()).unwrap();
    for n in 0..20 {
        broker.script(Rule::any().times(1).then(Verdict::no_route()));
        let receipt = append(&store, event("x", None));
        assert!(matches!(receipt.wait_confirmed(SOON), Err(ConfirmError::Quarantined { .. })));
        store.quarantine("r").unwrap().redrive(n).unwrap();
        receipt.wait_confirmed(SOON).unwrap();
    }
    stop(relay);
}

/// P8. A backlog quota refuses the event that would exceed it, within one transaction too, and nothing of it is written;
/// the policy that waits lets the write go on once the broker has taken something.
#[test]
fn a_backlog_quota_refuses_or_waits() {
    for policy in [QuotaPolicy::Refuse, QuotaPolicy::Wait(SOON)] {
        let folder = tempfile::tempdir().unwrap();
        let quota = BacklogQuota::events(3).policy(policy);
        let store = Store::builder().backlog_quota(quota).open(folder.path().join("a.redb")).unwrap();
        let four = store.write(|tx| (0..4).try_for_each(|_| tx.append(event("x", None)).map(drop)));
        assert!(matches!(four, Err(Error::BacklogFull { events: 3, events_max: 3, .. })), "{four:?}");
        assert_eq!(store.stats().unwrap().next_seq, 0);
        (0..3).for_each(|_| drop(append(&store, event("x", None))));
        if policy == QuotaPolicy::Refuse {
            let refused = store.write(|tx| tx.append(event("x", None)));
            assert!(matches!(refused, Err(Error::BacklogFull { .. })), "{refused:?}");
        }
        let broker = broker();
        let relay = quick(&store).spawn(broker.publisher()).unwrap();
        if policy == QuotaPolicy::Refuse {
            until("room", || store.stats().unwrap().backlog_events == 0);
        }
        append(&store, event("fits", None)).wait_confirmed(SOON).unwrap();
        stop(relay);
    }
}

/// Goal: a stream that was kept to itself can be published later, from any position, by rule; also what was trimmed around it; and
/// what is published already is not touched by the rule. Method: three events of a stream, between published ones that are
/// trimmed, then a relay of a new name.
#[test]
fn streams_can_be_published_after_the_fact() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        Store::builder().progress_delay(Duration::from_millis(5)).open(folder.path().join("a.redb")).unwrap();
    let (first, later) = (MemoryBroker::new(), MemoryBroker::new());
    first.declare_queue("q", Default::default());
    later.declare_queue("q", Default::default());
    later.declare_queue("history", Default::default());
    let relay = store.relay("first").spawn(first.publisher()).unwrap();
    for n in 0..900_u64 {
        store
            .write(move |tx| {
                if n % 300 == 100 {
                    tx.stream("account-7").append(
                        [Event::bytes("deposited", n.to_string())],
                        onewrite::ExpectedRevision::Any,
                    )?;
                } else {
                    tx.append(Event::bytes("other", "").to("", "q"))?;
                }
                Ok(())
            })
            .unwrap();
    }
    let end = Instant::now() + Duration::from_secs(20);
    while store.stats().unwrap().trimmed_to < 900 {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(first.queue_len("q"), 897, "unpublished events stay in the log alone");
    let beyond = store.relay("beyond").start_at(onewrite::StartAt::Position(901)).spawn(later.publisher());
    assert!(beyond.unwrap_err().to_string().contains("the log ends at 900"));
    let history = store
        .relay("history")
        .start_at(onewrite::StartAt::Position(300))
        .publish_unpublished(|event| {
            (event.category() == Some("account")).then(|| onewrite::Destination::exchange("", "history"))
        })
        .spawn(later.publisher())
        .unwrap();
    let last = store.write(|tx| tx.append(Event::bytes("other", "").to("", "q"))).unwrap();
    while later.queue_len("history") + later.queue_len("q") < 3 {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    let reported: Vec<_> = later
        .messages("history")
        .iter()
        .map(|it| String::from_utf8(it.message.payload.clone()).unwrap())
        .collect();
    assert_eq!(reported, ["400", "700"], "from the position on, in order");
    let message = &later.messages("history")[0].message;
    assert!(message.header(onewrite::wire::LANE).is_none() && message.message_id.is_some());
    assert_eq!((last.seqs(), later.queue_len("q")), (&[900][..], 1));
    relay.stop(Duration::from_secs(5));
    history.stop(Duration::from_secs(5));
}

/// Goal: an event whose rule names no place any more while it waits for its next try is quarantined, not dropped. Method: a queue
/// that is not there, then a relay of the same name without the rule.
#[test]
fn a_rule_that_is_gone_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    store.write(|tx| tx.append(Event::bytes("kept", "1").key("k").unpublished())).unwrap();
    let run = |rule: Option<&'static str>| {
        let builder = store.relay("r").backoff(Duration::from_millis(200), Duration::from_millis(200));
        let builder = builder
            .publish_unpublished(move |_| rule.map(|queue| onewrite::Destination::exchange("", queue)));
        builder.spawn(broker.publisher()).unwrap()
    };
    let relay = run(Some("absent"));
    let end = Instant::now() + Duration::from_secs(20);
    while relay.status().retrying == 0 {
        assert!(Instant::now() < end, "{:?}", relay.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    relay.stop(Duration::from_secs(5));
    assert_eq!(store.stats().unwrap().relays["r"].retrying, 1);
    let relay = run(None);
    while store.quarantine("r").unwrap().list(None, 10).unwrap().is_empty() {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    let fault = &store.quarantine("r").unwrap().list(None, 10).unwrap()[0].fault;
    assert!(fault.text.contains("no destination"), "{fault:?}");
    relay.stop(Duration::from_secs(5));
}

/// Goal: a rule that panics on one event costs that event's publication and nothing else. Method: it panics on the first of two.
#[test]
fn a_rule_that_panics_quarantines_its_event() {
    let (_folder, store) = open();
    let broker = broker();
    let rule = |event: &onewrite::RecordedEvent| {
        assert_ne!(event.payload(), b"bad", "an application's own mistake");
        Some(onewrite::Destination::exchange("", "q"))
    };
    let relay = quick(&store).publish_unpublished(rule).spawn(broker.publisher()).unwrap();
    for payload in ["bad", "good"] {
        store.write(move |tx| tx.append(Event::bytes("t", payload).unpublished()).map(drop)).unwrap();
    }
    until("the other is published", || broker.queue_len("q") == 1);
    until("it is quarantined", || relay.status().quarantined == 1);
    let fault = &store.quarantine("r").unwrap().list(None, 10).unwrap()[0].fault;
    assert!(fault.text.contains("rule panicked"), "{fault:?}");
    relay.stop(SOON);
}

/// Goal: an event that is redriven and can go nowhere is back in quarantine. Method: the rule named a queue that was not there;
/// the relay of now has no such rule. What waited behind it by its key goes on.
#[test]
fn a_redriven_event_without_a_rule_is_quarantined_again() {
    let (_folder, store) = open();
    let broker = broker();
    store.write(|tx| tx.append(Event::bytes("t", "1").key("k").unpublished())).unwrap();
    let run = |rule: Option<&'static str>| {
        let builder = quick(&store).attempts(1).destination_attempts(1);
        let builder = builder
            .publish_unpublished(move |_| rule.map(|queue| onewrite::Destination::exchange("", queue)));
        builder.spawn(broker.publisher()).unwrap()
    };
    let listed = || store.quarantine("r").unwrap().list(None, 10).unwrap();
    let relay = run(Some("absent"));
    until("it is quarantined", || listed().len() == 1);
    relay.stop(SOON);
    let relay = run(None);
    append(&store, event("behind", Some("k")));
    until("it is connected", || relay.status().state == RelayState::Connected);
    store.quarantine("r").unwrap().redrive(0).unwrap();
    until("it is quarantined again", || {
        listed().iter().any(|entry| entry.fault.text.contains("no destination"))
    });
    until("what is behind it is published", || broker.queue_len("q") == 1);
    relay.stop(SOON);
}

/// Goal: an event that was driven again and delivered stays so; it does not come back to quarantine because its record has been
/// trimmed by the time the relay hears of the redrive. Method: a relay with next to no room, so that it finds what is due in the
/// file; many events without a route, in quarantine and behind the trimmed edge; a queue; all driven again, by many threads at once.
#[test]
fn what_was_driven_again_and_delivered_does_not_come_back() {
    const EVENTS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = onewrite::broker::MemoryBroker::new();
    let relay =
        store.relay("rabbit").window_events(1).destination_attempts(1).spawn(broker.publisher()).unwrap();
    for _ in 0..EVENTS {
        store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to("", "late"))).unwrap();
    }
    let figures = || store.stats().unwrap().relays["rabbit"].clone();
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !done() {
            assert!(std::time::Instant::now() < deadline, "not {what}: {:?}", figures());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    until("in quarantine", &|| figures().quarantined == EVENTS as u64);
    // An idle store writes what is derived, and trims up to there.
    std::thread::sleep(std::time::Duration::from_secs(2));
    broker.declare_queue("late", Default::default());
    let quarantine = store.quarantine("rabbit").unwrap();
    let entries = quarantine.list(None, EVENTS).unwrap();
    // Together, so that one commit makes many due before the relay has heard of each.
    std::thread::scope(|scope| {
        for some in entries.chunks(EVENTS / 20) {
            let quarantine = &quarantine;
            scope.spawn(move || some.iter().for_each(|entry| quarantine.redrive(entry.seq).unwrap()));
        }
    });
    until("delivered", &|| figures().retrying == 0);
    let report = relay.stop(std::time::Duration::from_secs(10));
    let back: Vec<_> = quarantine.list(None, EVENTS).unwrap().into_iter().map(|entry| entry.fault).collect();
    assert!(back.is_empty(), "{} came back, the first for {}; {report:?}", back.len(), back[0]);
    assert_eq!(broker.messages("late").len(), EVENTS, "each is published once");
}
