//! What a consumer keeps in its store of deliveries in hand: how often they were tried, and those that wait, parked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{
    Delivery, DeliveryTag, MemoryBroker, MemorySource, Settlement, Source, SourceEvent, SourceEvents,
};
use onewrite::redb::{ReadableTableMetadata, TableDefinition};
use onewrite::{
    ConsumerBuilder, ConsumerWait, Error, GapPolicy, Message, RejectTo, SettingError, Store, Transaction,
};

use crate::lanes_inbox::{SOON, count, drained, effects, numbered, quick, send, set, setup, until};
use crate::scratch::{Random, child, crash_copy, task};

const IN_HAND: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.in_hand");

/// Rows of the table, if it is there.
fn rows(store: &Store) -> Option<u64> {
    store.read().unwrap().open_table(IN_HAND).ok().map(|table| table.len().unwrap())
}

fn foreign(id: &str, payload: &str) -> Message {
    let message_id = (!id.is_empty()).then(|| id.into());
    Message { message_id, payload: payload.as_bytes().to_vec(), ..Message::default() }
}

fn keyed(id: &str, key: &str, payload: &str) -> Message {
    let mut message = foreign(id, payload);
    set(&mut message, "cloudEvents_partitionkey", key);
    message
}

fn text(message: &Message) -> String {
    String::from_utf8_lossy(&message.payload).into_owned()
}

fn is_sick(message: &Message) -> bool {
    message.payload.starts_with(b"sick")
}

/// A source whose deliveries come marked as redelivered, and whose settlements may get lost.
#[derive(Debug)]
struct Doubtful {
    inner: MemorySource,
    redelivered: bool,
    deaf: Arc<AtomicBool>,
}

impl Source for Doubtful {
    fn start(&mut self, events: SourceEvents, prefetch: u16) -> Result<(), SettingError> {
        let (sender, received) = SourceEvents::channel();
        let redelivered = self.redelivered;
        std::thread::spawn(move || {
            for mut event in received.iter() {
                if let SourceEvent::Delivery(delivery) = &mut event {
                    delivery.redelivered |= redelivered;
                }
                if !events.send(event) {
                    break;
                }
            }
        });
        self.inner.start(sender, prefetch)
    }

    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>) {
        if !self.deaf.load(Relaxed) {
            self.inner.settle(settlements);
        }
    }

    fn stop(&mut self, deadline: Duration) {
        self.inner.stop(deadline);
    }
}

// --- tries ----------------------------------------------------------------------------------------------------------

/// Kind: a counter refunded by another failure. Goal: a delivery that ends the process is rejected after `attempts` deaths, and
/// everything else is applied; also where nothing names it, where others of its key stand around it, and with a single attempt
/// (whose first death may be another's). Method: a child whose handler aborts is started again and again; each of its lives gets
/// everything from the broker, marked as redelivered but in the first.
#[test]
fn a_delivery_that_ends_the_process_is_rejected() {
    for (attempts, kind, deaths) in [
        (3, "named", 3),
        (4, "nameless", 4),
        (3, "keyed", 3),
        (1, "named", 2),
        (2, "laned", 2),
        // Its lane has no room any more when it is rejected.
        (2, "no room", 2),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let mut died = 0;
        for life in 0.. {
            assert!(life < 12, "{kind}: it goes on for ever");
            let task = "in_hand::child_with_a_deadly_delivery";
            let out = child(task, &path, format!("{attempts} {life} {kind}")).output().unwrap();
            if out.status.success() {
                break;
            }
            died += 1;
        }
        assert_eq!(died, deaths, "{kind}, {attempts} attempts");
        let store = Store::open(&path).unwrap();
        let rejected = store.rejected("service").list(None, 9).unwrap();
        assert_eq!(rejected.len(), 1, "{kind}: {rejected:?}");
        assert!(rejected[0].reason.contains("ended"), "{}", rejected[0].reason);
        assert_eq!(effects(&store).len(), 20, "{kind}");
        assert_eq!(rows(&store).unwrap_or_default(), 0, "{kind}: what is done with leaves no row");
        if kind == "no room" {
            // Now there is: a copy of what a person has driven again is known.
            let broker = MemoryBroker::new();
            broker.declare_queue("q", Default::default());
            let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
            store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap();
            until("it is applied", || effects(&store).len() == 21);
            send(&broker, numbered(1, 0, "poison"));
            until("the copy is taken", || consumer.status().repeated == 1);
            assert_eq!(effects(&store)["poison"], 1);
            let _ = consumer.stop(SOON);
        }
    }
}

#[test]
fn child_with_a_deadly_delivery() {
    let Some((path, argument)) = task() else { return };
    let words: Vec<&str> = argument.splitn(3, ' ').collect();
    let (attempts, life, kind): (u32, u32, &str) =
        (words[0].parse().unwrap(), words[1].parse().unwrap(), words[2]);
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let message = |n: i64| {
        let payload = if n == 10 { "poison".to_owned() } else { format!("p{n}") };
        match kind {
            "nameless" if n == 10 => foreign("", &payload),
            "keyed" => keyed(&format!("m{n}"), "k", &payload),
            "laned" => numbered(0, n, &payload),
            "no room" => numbered(i64::from(n == 10), if n == 10 { 0 } else { n }, &payload),
            _ => foreign(&format!("m{n}"), &payload),
        }
    };
    (0..21).for_each(|n| send(&broker, message(n)));
    let lanes_max = if kind == "no room" && life == attempts { 1 } else { u64::MAX };
    let store = Store::builder().lanes_max(lanes_max).open(&path).unwrap();
    let source =
        Doubtful { inner: broker.source("q"), redelivered: life > 0, deaf: Arc::new(AtomicBool::new(false)) };
    let consumer = quick(&store)
        .attempts(attempts)
        .spawn(source, |delivery, tx| {
            if delivery.message.payload == b"poison" {
                std::process::abort();
            }
            count(delivery, tx)
        })
        .unwrap();
    until("an empty queue", || drained(&broker));
    let _ = consumer.stop(SOON);
    store.close().unwrap();
}

/// Kind: a counter raised by what was not its doing. Goal: the process may end while a rejected delivery waits for room: that is no death
/// under its handler. Method: files as they are while it waits, each opened after the last; then there is room.
#[test]
fn what_waits_for_room_is_not_accused() {
    let folder = tempfile::tempdir().unwrap();
    let (mut path, mut stores) = (folder.path().join("a.redb"), Vec::new());
    for life in 0..4 {
        let store = Store::open(&path).unwrap();
        let broker = MemoryBroker::new();
        broker.declare_queue("q", Default::default());
        send(&broker, foreign("m", "p"));
        // What may have been tried before has its try written down before it begins.
        let source =
            Doubtful { inner: broker.source("q"), redelivered: true, deaf: Arc::new(AtomicBool::new(false)) };
        let reject = |_: &Delivery, _: &Transaction| Err(Error::reject("no such account"));
        let room = u64::from(life == 3);
        let consumer = quick(&store).attempts(2).rejected_max(room, 10_000).spawn(source, reject).unwrap();
        if room == 0 {
            until("it waits", || consumer.status().waits_for == Some(ConsumerWait::Quarantine));
            // What is to be written was asked for before this.
            std::thread::sleep(Duration::from_millis(100));
            store.write(|_| Ok(())).unwrap();
            path = crash_copy(&store, folder.path());
        } else {
            until("it is kept", || drained(&broker));
            let reason = store.rejected("service").list(None, 1).unwrap()[0].reason.clone();
            assert!(reason.contains("no such account"), "{reason}");
        }
        let _ = consumer.stop(Duration::ZERO);
        stores.push(store);
    }
}

/// Kind: a counter refunded by another failure. Goal: what was driven again from quarantine and ends the process is rejected again.
/// Method: as above, with a redrive before the first life.
#[test]
fn a_redriven_delivery_that_ends_the_process_is_rejected_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    for n in 0..3 {
        send(&broker, foreign(&format!("m{n}"), &format!("p{n}")));
    }
    let consumer = quick(&store).spawn(broker.source("q"), |_, _| Err(Error::reject("not today"))).unwrap();
    until("all rejected", || store.rejected("service").len().unwrap() == 3);
    let _ = consumer.stop(SOON);
    store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap();
    store.close().unwrap();
    let mut died = 0;
    while !child("in_hand::child_that_drives_again", &path, "x").output().unwrap().status.success() {
        died += 1;
        assert!(died < 12, "it goes on for ever");
    }
    assert!((3..=4).contains(&died), "{died} deaths with 3 attempts");
    let store = Store::open(&path).unwrap();
    let rejected = store.rejected("service").list(None, 9).unwrap();
    assert_eq!(rejected.iter().map(|entry| (entry.number, entry.redriven)).collect::<Vec<_>>(), [(1, false)]);
    assert_eq!(effects(&store).len(), 2);
}

#[test]
fn child_that_drives_again() {
    let Some((path, _)) = task() else { return };
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let store = Store::open(&path).unwrap();
    let consumer = quick(&store)
        .attempts(3)
        .spawn(broker.source("q"), |delivery, tx| {
            if delivery.message.payload == b"p1" {
                std::process::abort();
            }
            count(delivery, tx)
        })
        .unwrap();
    until("one left", || {
        let left = store.rejected("service").list(None, 9).unwrap();
        left.len() == 1 && !left[0].redriven
    });
    let _ = consumer.stop(SOON);
    store.close().unwrap();
}

/// Kind: a counter refunded by another failure. Goal: lost connections and restarts give a failing delivery no new tries. Method: the
/// connection is cut, or the consumer replaced, after each of the first tries; calls are counted. Named, in a lane, without a name.
#[test]
fn tries_outlive_connections_and_restarts() {
    for restart in [false, true] {
        for message in [foreign("m", "sick"), numbered(0, 0, "sick"), foreign("", "sick")] {
            let (_folder, store, broker) = setup();
            let calls = Arc::new(AtomicU32::new(0));
            let run = || {
                let counted = Arc::clone(&calls);
                quick(&store)
                    .attempts(5)
                    .backoff(Duration::from_millis(40), Duration::from_millis(40))
                    .spawn(broker.source("q"), move |_, _| {
                        counted.fetch_add(1, Relaxed);
                        Err(Error::app("not yet"))
                    })
                    .unwrap()
            };
            let mut consumer = run();
            send(&broker, message.clone());
            for tries in 1..4 {
                until("a try", || calls.load(Relaxed) >= tries);
                if restart {
                    let _ = consumer.stop(SOON);
                    consumer = run();
                } else {
                    broker.go_down();
                    broker.come_up();
                }
            }
            until("rejected", || drained(&broker) && store.rejected("service").len().unwrap() == 1);
            let _ = consumer.stop(SOON);
            assert_eq!(calls.load(Relaxed), 5, "restart: {restart}, {message:?}");
            assert_eq!(store.rejected("service").list(None, 9).unwrap()[0].attempts, 5);
            assert_eq!(
                rows(&store).unwrap(),
                u64::from(rows(&store).unwrap() > 0),
                "only the row of totals is left"
            );
        }
    }
}

/// Goal: the normal path pays nothing. Method: 1,000 first deliveries that succeed make no row, not even the table, and as few commits
/// as before.
#[test]
fn deliveries_that_succeed_at_once_leave_no_row() {
    let (_folder, store, broker) = setup();
    (0..1000).for_each(|n| send(&broker, numbered(0, n, &n.to_string())));
    let before = store.stats().unwrap().io;
    let gate = store.begin().unwrap();
    let consumer = quick(&store).prefetch(1000).spawn(broker.source("q"), count).unwrap();
    // Batches are as large as what has come: all of it, before the first commit.
    until("all are delivered", || broker.unsettled_len("q") == 1000);
    gate.rollback().unwrap();
    until("an empty queue", || drained(&broker));
    let _ = consumer.stop(SOON);
    let syncs = store.stats().unwrap().io.syncs - before.syncs;
    assert!(syncs <= 12, "{syncs} syncs");
    assert_eq!(rows(&store), None);
}

/// Goal: what is redelivered and succeeds costs one commit per batch besides, and leaves no row. Method: 1,000 marked as redelivered.
#[test]
fn redelivered_ones_share_their_note() {
    let (_folder, store, broker) = setup();
    (0..1000).for_each(|n| send(&broker, numbered(0, n, &n.to_string())));
    let before = store.stats().unwrap().io;
    let source =
        Doubtful { inner: broker.source("q"), redelivered: true, deaf: Arc::new(AtomicBool::new(false)) };
    let consumer = quick(&store).spawn(source, count).unwrap();
    until("an empty queue", || drained(&broker));
    let _ = consumer.stop(SOON);
    let syncs = store.stats().unwrap().io.syncs - before.syncs;
    assert!(syncs <= 60, "{syncs} syncs");
    assert_eq!((rows(&store), effects(&store).len()), (Some(0), 1000));
}

// --- parking --------------------------------------------------------------------------------------------------------

/// A consumer whose handler fails for what is sick until `healed`, and notes what it applies.
fn hospital(
    builder: ConsumerBuilder,
    source: impl Source,
    healed: &Arc<AtomicBool>,
) -> (onewrite::Consumer, Arc<Mutex<Vec<String>>>) {
    let applied = Arc::new(Mutex::new(Vec::new()));
    let (noted, healed) = (Arc::clone(&applied), Arc::clone(healed));
    let handler = move |delivery: &onewrite::broker::Delivery, tx: &onewrite::Transaction| {
        if is_sick(&delivery.message) && !healed.load(Relaxed) {
            return Err(Error::app("the service of this customer is away"));
        }
        count(delivery, tx)?;
        noted.lock().unwrap().push(text(&delivery.message));
        Ok(())
    };
    (builder.spawn(source, handler).unwrap(), applied)
}

/// The last time that each was applied: a closure may run again with its group.
fn last_of(applied: &Mutex<Vec<String>>) -> Vec<String> {
    let mut last: Vec<String> = Vec::new();
    for text in applied.lock().unwrap().iter() {
        last.retain(|earlier| earlier != text);
        last.push(text.clone());
    }
    last
}

/// Kind: a bounded resource held by those who wait. Goal: more deliveries of a failing key, or without a key, than the prefetch do not
/// keep others waiting; what waits is parked and acknowledged; in the end each is applied once, in the order of its key. Method: 300
/// that fail, then 50 that do not; prefetches from 1 to 256; then the handler heals.
#[test]
fn those_that_wait_do_not_hold_the_prefetch() {
    for (prefetch, key) in [(256, true), (256, false), (20, true), (7, false), (1, true)] {
        let (_folder, store, broker) = setup();
        for n in 0..300 {
            let (id, payload) = (format!("s{n}"), format!("sick {n:03}"));
            send(&broker, if key { keyed(&id, "k", &payload) } else { foreign(&id, &payload) });
        }
        (0..50).for_each(|n| send(&broker, keyed(&format!("w{n}"), "w", &format!("well {n:02}"))));
        let healed = Arc::new(AtomicBool::new(false));
        let builder = store.consumer("service").attempts(1000).prefetch(prefetch);
        let builder = builder.backoff(Duration::from_millis(300), Duration::from_millis(300));
        let (consumer, applied) = hospital(builder, broker.source("q"), &healed);
        until("the well ones", || effects(&store).len() == 50);
        let share = usize::from(prefetch / 4);
        until("parked", || consumer.status().parked as usize >= 300 - share && broker.queue_len("q") == 0);
        until("no more than the share unacknowledged", || broker.unsettled_len("q") <= share);
        assert!(consumer.status().parked_bytes > 300 * 8);
        healed.store(true, Relaxed);
        until("all", || effects(&store).len() == 350 && drained(&broker));
        until("nothing parked", || consumer.status().parked == 0);
        let _ = consumer.stop(SOON);
        assert!(effects(&store).values().all(|times| *times == 1));
        let sick: Vec<String> =
            last_of(&applied).into_iter().filter(|text| text.starts_with("sick")).collect();
        assert!(!key || sick.is_sorted(), "the order of the key: {sick:?}");
        assert_eq!(rows(&store), Some(1), "only the row of totals is left");
        assert_eq!(store.rejected("service").len().unwrap(), 0);
    }
}

/// Goal: what is parked outlives the consumer: the next one applies it before later ones of its key, once each. Method: 100 parked of
/// one key, a stop, 10 more, a healed handler.
#[test]
fn what_is_parked_survives_a_restart_in_order() {
    let (_folder, store, broker) = setup();
    (0..100).for_each(|n| send(&broker, keyed(&format!("s{n}"), "k", &format!("sick {n:03}"))));
    let sick = Arc::new(AtomicBool::new(false));
    let slow = || {
        let builder = store.consumer("service").attempts(1000).prefetch(16);
        builder.backoff(Duration::from_secs(30), Duration::from_secs(30))
    };
    let (consumer, _) = hospital(slow(), broker.source("q"), &sick);
    until("parked", || consumer.status().parked >= 96 && broker.queue_len("q") == 0);
    let began = Instant::now();
    let _ = consumer.stop(SOON);
    assert!(began.elapsed() < Duration::from_secs(5), "a stop is prompt");
    (100..110).for_each(|n| send(&broker, keyed(&format!("s{n}"), "k", &format!("sick {n:03}"))));
    let (consumer, applied) = hospital(slow(), broker.source("q"), &Arc::new(AtomicBool::new(true)));
    until("all", || effects(&store).len() == 110 && drained(&broker));
    let _ = consumer.stop(SOON);
    assert!(effects(&store).values().all(|times| *times == 1));
    assert!(last_of(&applied).is_sorted());
    assert_eq!(rows(&store), Some(1));
}

/// Goal: a crash between the parking and the acknowledgement applies nothing twice and loses nothing, whatever names a message. Method:
/// a source that swallows all settlements until the connection is cut; then everything comes again.
#[test]
fn a_delivery_that_is_parked_and_comes_again_is_recognised() {
    let (_folder, store, broker) = setup();
    for n in 0..40 {
        send(&broker, keyed(&format!("s{n}"), "k", &format!("sick {n:02}")));
        send(&broker, numbered(0, n, &format!("sick lane {n:02}")));
    }
    let deaf = Arc::new(AtomicBool::new(true));
    let source = Doubtful { inner: broker.source("q"), redelivered: false, deaf: Arc::clone(&deaf) };
    let healed = Arc::new(AtomicBool::new(false));
    let builder = store.consumer("service").attempts(1000);
    let builder = builder.backoff(Duration::from_millis(200), Duration::from_millis(200));
    let (consumer, _) = hospital(builder, source, &healed);
    until("parked", || consumer.status().parked == 80);
    assert_eq!(broker.unsettled_len("q"), 80);
    deaf.store(false, Relaxed);
    broker.go_down();
    broker.come_up();
    until("recognised", || drained(&broker));
    assert_eq!((consumer.status().parked, effects(&store).len()), (80, 0));
    healed.store(true, Relaxed);
    until("all", || effects(&store).len() == 80 && consumer.status().parked == 0);
    let _ = consumer.stop(SOON);
    assert!(effects(&store).values().all(|times| *times == 1));
}

/// Goal: what is parked has bounds; beyond them deliveries hold the prefetch, and nothing is lost. Method: room for 10 rows, or for 1,000
/// bytes, or for none; 100 of a failing key.
#[test]
fn parking_is_bounded_in_rows_and_bytes() {
    for (rows_max, bytes_max) in [(10, 1 << 20), (1000, 1000), (0, 0)] {
        let (_folder, store, broker) = setup();
        (0..100).for_each(|n| send(&broker, keyed(&format!("s{n}"), "k", &format!("sick {n:03}"))));
        let healed = Arc::new(AtomicBool::new(false));
        let builder = store.consumer("service").attempts(1000).prefetch(24).parked_max(rows_max, bytes_max);
        let builder = builder.backoff(Duration::from_millis(50), Duration::from_millis(50));
        let (consumer, applied) = hospital(builder, broker.source("q"), &healed);
        until("a full prefetch", || broker.unsettled_len("q") == 24 && consumer.status().retried > 3);
        let stats = consumer.status();
        assert!(stats.parked <= rows_max && stats.parked_bytes <= bytes_max, "{stats:?}");
        healed.store(true, Relaxed);
        until("all", || effects(&store).len() == 100 && drained(&broker));
        let _ = consumer.stop(SOON);
        assert!(last_of(&applied).is_sorted());
        assert!(effects(&store).values().all(|times| *times == 1));
    }
}

/// Goal: a parked delivery that is rejected goes to the consumer's quarantine, also where rejects go to the broker: the broker has it no
/// more. Method: 20 deliveries of a failing key, two attempts each, a prefetch of 1.
#[test]
fn a_parked_delivery_is_rejected_into_the_quarantine() {
    let (_folder, store, broker) = setup();
    (0..20).for_each(|n| send(&broker, keyed(&format!("s{n}"), "k", &format!("sick {n:02}"))));
    let never = Arc::new(AtomicBool::new(false));
    let builder = quick(&store).attempts(2).prefetch(1).rejects(RejectTo::DeadLetter);
    let (consumer, _) = hospital(builder, broker.source("q"), &never);
    until("all rejected", || consumer.status().rejected == 20 && drained(&broker));
    let stats = consumer.stop(SOON);
    assert_eq!((stats.parked, stats.parked_bytes), (0, 0));
    assert_eq!(stats.quarantined, store.rejected("service").len().unwrap());
    assert!(stats.quarantined > 0);
    assert_eq!(rows(&store), Some(1));
}

/// Kind: a bounded resource held by those who wait. Goal: what waits behind gaps costs others neither prefetch nor commits, and keeps
/// its order when the gap is filled. Method: 400 lanes with a gap, or one lane with 400 behind a gap, then 2,000 genuine ones; syncs
/// are counted; then the gaps are filled.
#[test]
fn what_is_held_costs_others_nothing() {
    for one_lane in [false, true] {
        let (_folder, store, broker) = setup();
        for n in 0..400 {
            let (lane, number) = if one_lane { (9, n + 1) } else { (100 + n, 1) };
            send(&broker, numbered(lane, number, &format!("held {n:03}")));
        }
        (0..2000).for_each(|n| send(&broker, numbered(0, n, &format!("genuine {n:04}"))));
        let before = store.stats().unwrap().io;
        let healed = Arc::new(AtomicBool::new(true));
        let builder = quick(&store).on_gap(GapPolicy::Hold(Duration::from_secs(600)));
        let (consumer, applied) = hospital(builder, broker.source("q"), &healed);
        until("the genuine ones", || consumer.status().applied == 2000);
        let syncs = store.stats().unwrap().io.syncs - before.syncs;
        assert!(syncs <= 60, "{syncs} syncs");
        let stats = consumer.status();
        assert_eq!(stats.held, 400);
        assert!(stats.parked >= 400 - 64 && broker.unsettled_len("q") <= 64, "{stats:?}");
        for n in 0..if one_lane { 1 } else { 400 } {
            let lane = if one_lane { 9 } else { 100 + n };
            send(&broker, numbered(lane, 0, &format!("filler {n:03}")));
        }
        let all = 2400 + if one_lane { 1 } else { 400 };
        until("all", || consumer.status().applied == all && drained(&broker));
        let stats = consumer.stop(SOON);
        assert_eq!((stats.held, stats.parked), (0, 0));
        let held: Vec<String> =
            last_of(&applied).into_iter().filter(|text| text.starts_with("held")).collect();
        assert!(!one_lane || held.is_sorted(), "{held:?}");
        assert!(effects(&store).values().all(|times| *times == 1));
    }
}

/// Goal: what is parked while it waits for a gap waits for it again after a restart, and keeps its order. Method: 100 behind a gap, a
/// restart, then the missing one.
#[test]
fn what_waits_for_a_gap_survives_a_restart() {
    let (_folder, store, broker) = setup();
    (1..101).for_each(|n| send(&broker, numbered(0, n, &format!("{n:03}"))));
    let healed = Arc::new(AtomicBool::new(true));
    let builder = || quick(&store).prefetch(16).on_gap(GapPolicy::Hold(Duration::from_secs(600)));
    let (consumer, _) = hospital(builder(), broker.source("q"), &healed);
    until("parked", || consumer.status().parked >= 96 && broker.queue_len("q") == 0);
    let _ = consumer.stop(SOON);
    let (consumer, applied) = hospital(builder(), broker.source("q"), &healed);
    until("held again", || consumer.status().held == 100);
    send(&broker, numbered(0, 0, "000"));
    until("all", || effects(&store).len() == 101 && drained(&broker));
    let _ = consumer.stop(SOON);
    assert!(last_of(&applied).is_sorted());
    assert!(effects(&store).values().all(|times| *times == 1));
}

/// Goal: of two consumers of one scope each takes up its own; what one leaves behind the other applies. Method: both park, one stops,
/// the other heals.
#[test]
fn what_one_consumer_leaves_behind_another_takes_up() {
    let (_folder, store, broker) = setup();
    let healed = Arc::new(AtomicBool::new(false));
    let builder = || {
        let builder = store.consumer("service").attempts(100_000).prefetch(1);
        builder.backoff(Duration::from_millis(20), Duration::from_millis(20))
    };
    let (one, _) = hospital(builder(), broker.source("q"), &healed);
    let (other, _) = hospital(builder(), broker.source("q"), &healed);
    (0..40).for_each(|n| send(&broker, foreign(&format!("s{n}"), &format!("sick {n:02}"))));
    until("parked", || one.status().parked + other.status().parked == 40);
    let _ = one.stop(SOON);
    until("taken up", || other.status().parked == 40);
    healed.store(true, Relaxed);
    until("all", || effects(&store).len() == 40 && drained(&broker));
    let _ = other.stop(SOON);
    assert!(effects(&store).values().all(|times| *times == 1));
}

/// Goal: a process that dies at any moment loses nothing and applies nothing twice, and the order of keys holds, with failures, parking
/// and redeliveries all along. Method: random histories; at random moments the connection goes, and the file is copied as a crash would
/// leave it; another store and consumer go on with the copy. (Each message has a name.)
#[test]
fn a_crash_at_any_moment_loses_nothing_that_is_parked() {
    for seed in 0..6 {
        let mut random = Random(seed);
        let folder = tempfile::tempdir().unwrap();
        let broker = MemoryBroker::new();
        broker.declare_queue("q", Default::default());
        let mut sent: BTreeMap<String, u64> = BTreeMap::new();
        let mut path = folder.path().join("a.redb");
        for life in 0..8 {
            let store = Store::open(&path).unwrap();
            for _ in 0..random.below(60) {
                let n = sent.len();
                let key = random.below(4);
                let sick = if random.below(2) == 0 { "sick" } else { "well" };
                let payload = format!("{sick} {key} {n:04}");
                let message = if key == 0 {
                    foreign(&format!("m{n}"), &payload)
                } else {
                    keyed(&format!("m{n}"), &key.to_string(), &payload)
                };
                send(&broker, message);
                sent.insert(payload, 1);
            }
            let last = life == 7;
            let prefetch = [1, 3, 16, 64][random.below(4) as usize];
            let doubt = Mutex::new(Random(random.next()));
            let consumer = quick(&store)
                .attempts(1_000_000)
                .prefetch(prefetch)
                .spawn(broker.source("q"), move |delivery, tx| {
                    let is_bad = is_sick(&delivery.message) && !last && doubt.lock().unwrap().below(4) > 0;
                    if is_bad { Err(Error::app("not yet")) } else { count(delivery, tx) }
                })
                .unwrap();
            if last {
                until("all", || effects(&store) == sent && drained(&broker));
                let _ = consumer.stop(SOON);
                until("nothing parked", || rows(&store).unwrap_or_default() <= 1);
                break;
            }
            std::thread::sleep(Duration::from_millis(random.below(60)));
            broker.go_down();
            path = crash_copy(&store, folder.path());
            drop(consumer);
            broker.come_up();
        }
    }
}
