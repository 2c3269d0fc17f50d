//! What a consumer rejects: kept with its reason, written once, handed to the handler again when asked to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onewrite::broker::{Delivery, Epoch, MemoryBroker, QueueOptions};
use onewrite::redb::TableDefinition;
use onewrite::{Consumer, ConsumerBuilder, Error, HeaderValue, Message, RejectTo, Store};

use crate::lanes_inbox::{
    count, damage, drained, effects, numbered, once_each, quick, send, set, setup, stop, until,
};
use crate::scratch::crash_copy;

const REJECTED: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.rejected");

/// A consumer whose handler writes, and then rejects what is `bad`, for as long as `strict` says so.
fn picky(builder: ConsumerBuilder, broker: &MemoryBroker, strict: &Arc<AtomicBool>) -> Consumer {
    let strict = Arc::clone(strict);
    let consumer = builder.spawn(broker.source("q"), move |delivery, tx| {
        count(delivery, tx)?;
        let bad = delivery.message.payload.starts_with(b"bad");
        if bad && strict.load(Relaxed) { Err(Error::reject("no such account")) } else { Ok(()) }
    });
    consumer.unwrap()
}

fn strict() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(true))
}

/// A foreign message that has everything that a message can have.
fn full(payload: &str) -> Message {
    Message {
        message_id: Some(format!("id of {payload}").into()),
        event_type: Some("t".into()),
        content_type: Some("text/plain".into()),
        content_encoding: Some("gzip".into()),
        delivery_mode: Some(1),
        priority: Some(9),
        correlation_id: Some("c".into()),
        reply_to: Some("answers".into()),
        expiration: Some("60000".into()),
        user_id: Some("guest".into()),
        app_id: Some("a".into()),
        cluster_id: Some("eu".into()),
        timestamp_s: Some(7),
        headers: vec![
            ("text".into(), "é".into()),
            ("int".into(), HeaderValue::Int(i64::MIN)),
            ("bool".into(), true.into()),
            ("bytes".into(), vec![0, 255].into()),
            (
                "array".into(),
                HeaderValue::Array(vec![
                    HeaderValue::Void,
                    HeaderValue::Table(vec![("n".into(), 0.5.into())]),
                ]),
            ),
        ],
        payload: payload.as_bytes().to_vec(),
    }
}

/// Goal: what is rejected is kept, whole and with its reason, before the broker is notified; nothing of the handler's is; it
/// survives a restart; it can be looked at, driven again and given up. Method: one by lane, one by id, one without a name, one
/// that cannot be decoded, one that fails too often.
#[test]
fn kept_with_a_reason_until_somebody_decides() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store)
        .attempts(3)
        .spawn(broker.source("q"), |delivery, tx| {
            count(delivery, tx)?;
            match delivery.message.payload.as_slice() {
                b"undecodable" => Ok(onewrite::codec::from_json::<u32>(b"\"secret\"").map(drop)?),
                b"hopeless" => Err(Error::app("x".repeat(2000))),
                b"good" => Ok(()),
                _ => Err(Error::reject("no such account")),
            }
        })
        .unwrap();
    let nameless = Message { payload: b"nameless".to_vec(), ..Message::default() };
    let all = [
        numbered(0, 0, "by lane"),
        full("by id"),
        nameless,
        full("undecodable"),
        full("hopeless"),
        full("good"),
    ];
    for message in &all {
        send(&broker, message.clone());
    }
    until("an empty queue", || drained(&broker));
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.rejected, stats.quarantined, stats.retried), (1, 5, 5, 2));
    stop(consumer);
    once_each(&store, ["good".to_owned()]);

    let path = store.path().to_owned();
    store.close().unwrap();
    let store = Store::open(path).unwrap();
    assert_eq!(store.stats().unwrap().rejected, BTreeMap::from([("service".to_owned(), 5)]));
    let rejected = store.rejected("service");
    let list = rejected.list(None, 100).unwrap();
    assert_eq!(list.iter().map(|entry| entry.number).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    for (entry, message) in list.iter().zip(&all) {
        assert_eq!(&rejected.get(entry.number).unwrap(), &(entry.clone(), message.clone()));
        assert_eq!((&*entry.exchange, &*entry.routing_key), ("", "q"));
        assert!(entry.since_ms > 1_700_000_000_000 && !entry.redriven);
    }
    let reasons: Vec<_> = list.iter().map(|entry| (entry.attempts, &*entry.reason)).collect();
    assert_eq!(reasons[..3], [(1, "rejected: no such account"); 3]);
    assert_eq!(reasons[3], (1, "the payload cannot be decoded as JSON"), "what it holds is not shown");
    assert_eq!(reasons[4], (3, &*"x".repeat(512)), "a reason is bounded");
    // By pages.
    let page = |after, limit| {
        rejected.list(after, limit).unwrap().iter().map(|entry| entry.number).collect::<Vec<_>>()
    };
    assert_eq!((page(None, 2), page(Some(1), 2), page(Some(4), 2)), (vec![0, 1], vec![2, 3], vec![]));
    assert!(page(Some(u64::MAX), 2).is_empty());
    assert!(store.rejected("another").is_empty().unwrap());

    rejected.discard(1).unwrap();
    assert!(matches!(rejected.discard(1), Err(Error::NotRejected { number: 1, .. })));
    assert!(matches!(rejected.redrive(1), Err(Error::NotRejected { number: 1, .. })));
    assert!(matches!(rejected.get(1), Err(Error::NotRejected { number: 1, .. })));
    assert_eq!(rejected.len().unwrap(), 4);
    // What was given up stays recorded; and its number is given to nobody else.
    let consumer = quick(&store).spawn(broker.source("q"), |_, _| Err(Error::reject("again"))).unwrap();
    send(&broker, full("by id"));
    send(&broker, numbered(0, 0, "by lane"));
    until("two repeats", || consumer.status().repeated == 2);
    rejected.discard(4).unwrap();
    send(&broker, full("a new one"));
    until("it", || consumer.status().quarantined == 1);
    send(&broker, full("another new one"));
    until("it too", || consumer.status().quarantined == 2);
    assert_eq!(page(None, 9), [0, 2, 3, 5, 6]);
    stop(consumer);
}

/// A crash between the commit and the acknowledgement: the broker delivers again what was rejected, and it is recognised. That
/// holds for each way of being rejected, but for a message that has no name.
#[test]
fn a_redelivery_gives_no_second_row() {
    let (folder, store, broker) = setup();
    let mut malformed = numbered(0, 1, "malformed");
    set(&mut malformed, onewrite::wire::LANE, "x");
    let mut stranger = numbered(0, 2, "stranger");
    set(&mut stranger, onewrite::wire::STORE, "018f0000-0000-7000-8000-00000000000c");
    let all = [
        numbered(0, 0, "good"),
        full("good"),
        numbered(1, 0, "bad by lane"),
        full("bad by id"),
        malformed,
        stranger,
        numbered(0, 0, "bad: a conflict"),
        Message {
            message_id: full("good").message_id,
            payload: b"bad: a conflict".to_vec(),
            ..Message::default()
        },
    ];
    let here = [crate::lanes_inbox::BANK];
    let consumer = picky(quick(&store).producers(here), &broker, &strict());
    all.iter().for_each(|message| send(&broker, message.clone()));
    until("an empty queue", || drained(&broker));
    assert_eq!((consumer.status().quarantined, consumer.status().conflicts), (6, 2));
    let copy = crash_copy(&store, folder.path());
    stop(consumer);

    let crashed = Store::open(copy).unwrap();
    let again = MemoryBroker::new();
    again.declare_queue("q", QueueOptions::default());
    let consumer = picky(quick(&crashed).producers(here), &again, &strict());
    all.iter().for_each(|message| send(&again, message.clone()));
    until("an empty queue", || drained(&again));
    let stats = consumer.status();
    assert_eq!(
        (stats.applied, stats.repeated, stats.quarantined, stats.conflicts),
        (0, 8, 0, 0),
        "{stats:?}"
    );
    assert_eq!(crashed.rejected("service").len().unwrap(), 6);
    stop(consumer);
}

/// Rejected ones of a batch share a commit, and are acknowledged only after it.
#[test]
fn rejects_share_a_commit() {
    let (_folder, store, broker) = setup();
    for n in 0..500 {
        send(&broker, numbered(n % 3, n / 3, &format!("{} {n}", if n % 2 == 0 { "bad" } else { "good" })));
    }
    let before = store.stats().unwrap().commits;
    let consumer = quick(&store)
        .spawn(broker.source("q"), |delivery, _| match delivery.message.payload.starts_with(b"bad") {
            true => Err(Error::reject("no such account")),
            false => Ok(()),
        })
        .unwrap();
    until("an empty queue", || drained(&broker));
    let commits = store.stats().unwrap().commits - before;
    assert!(commits <= 60, "{commits} commits for 500 deliveries");
    assert_eq!(store.rejected("service").len().unwrap(), 250);
    stop(consumer);
}

/// Driven again, a delivery's effects and its leaving the quarantine are one write; what fails again comes back under its
/// number, with its tries added up; a repeat by the broker meanwhile changes nothing.
#[test]
fn driven_again() {
    let (_folder, store, broker) = setup();
    let strict = strict();
    let consumer = picky(quick(&store).attempts(2), &broker, &strict);
    send(&broker, numbered(0, 0, "bad one"));
    send(&broker, full("bad two"));
    until("both", || consumer.status().quarantined == 2);
    let rejected = store.rejected("service");
    rejected.redrive(0).unwrap();
    until("it is back", || consumer.status().quarantined == 3);
    let entry = rejected.list(None, 1).unwrap().remove(0);
    assert_eq!((entry.number, entry.attempts, entry.redriven), (0, 2, false));
    assert!(effects(&store).is_empty());

    strict.store(false, Relaxed);
    rejected.redrive(0).unwrap();
    until("its effect", || consumer.status().redriven == 1);
    send(&broker, numbered(0, 0, "bad one"));
    send(&broker, full("bad two"));
    until("repeats", || consumer.status().repeated == 2);
    once_each(&store, ["bad one".to_owned()]);
    assert_eq!(rejected.len().unwrap(), 1);
    assert_eq!(rejected.redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 1);
    until("the other's effect", || consumer.status().redriven == 2);
    once_each(&store, ["bad one", "bad two"].map(str::to_owned));
    assert!(rejected.is_empty().unwrap());
    assert_eq!(consumer.status().applied, 2);
    stop(consumer);
}

/// A redrive is durable: what was driven again while no consumer ran is done by the next one, more of it than a batch holds;
/// and a crash in between does none of it twice.
#[test]
fn a_redrive_waits_for_its_consumer() {
    let (folder, store, broker) = setup();
    let strict = strict();
    let consumer = picky(quick(&store), &broker, &strict);
    for n in 0..700 {
        send(&broker, numbered(n % 5, n / 5, &format!("bad {n}")));
    }
    until("all", || consumer.status().quarantined == 700);
    stop(consumer);
    assert_eq!(store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 700);
    assert_eq!(store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 0);
    let copy = crash_copy(&store, folder.path());

    let crashed = Store::open(copy).unwrap();
    assert!(crashed.rejected("service").list(None, 1000).unwrap().iter().all(|entry| entry.redriven));
    strict.store(false, Relaxed);
    let consumer = picky(quick(&crashed), &broker, &strict);
    until("some", || consumer.status().redriven > 100);
    let hold = crashed.begin().unwrap();
    let copy = crash_copy(&crashed, folder.path());
    drop(hold);
    stop(consumer);
    let again = Store::open(copy).unwrap();
    let consumer = picky(quick(&again), &broker, &strict);
    until("all", || again.rejected("service").is_empty().unwrap());
    once_each(&again, (0..700).map(|n| format!("bad {n}")));
    stop(consumer);
}

/// One that fails while it is driven again is tried again with pauses, and keeps its key's order; a lost connection to the
/// broker does not lose it. The handler can recognise it by its tag.
#[test]
fn driven_again_with_retries_and_outages() {
    let (_folder, store, broker) = setup();
    let (tries, tags) = (Arc::new(AtomicU32::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (counted, noted) = (Arc::clone(&tries), Arc::clone(&tags));
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_millis(300), Duration::from_millis(300))
        .spawn(broker.source("q"), move |delivery: &Delivery, tx| {
            count(delivery, tx)?;
            noted.lock().unwrap().push((delivery.tag.epoch, delivery.tag.tag));
            match counted.fetch_add(1, Relaxed) {
                0 | 1 => Err(Error::reject("not at first")),
                2 => Err(Error::app("not yet")),
                3 => panic!("oh no"),
                _ => Ok(()),
            }
        })
        .unwrap();
    for payload in ["one", "two"] {
        let mut message = full(payload);
        set(&mut message, "cloudEvents_partitionkey", "k");
        send(&broker, message);
    }
    until("both", || consumer.status().quarantined == 2);
    assert_eq!(store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 2);
    until("a try that failed", || consumer.status().retried > 0);
    broker.go_down();
    until("both", || consumer.status().redriven == 2);
    broker.come_up();
    once_each(&store, ["one", "two"].map(str::to_owned));
    assert!(store.rejected("service").is_empty().unwrap());
    let tags = tags.lock().unwrap();
    assert_eq!(tags.last(), Some(&(Epoch(0), 1)), "the second waited behind the first of its key: {tags:?}");
    assert!(tags[2..].iter().all(|(epoch, _)| *epoch == Epoch(0)));
    stop(consumer);
}

/// One that is discarded while it waits for its next try takes no effect any more.
#[test]
fn discarded_while_it_is_tried_again() {
    let (_folder, store, broker) = setup();
    let tries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&tries);
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_millis(200), Duration::from_millis(200))
        .spawn(broker.source("q"), move |delivery, tx| {
            count(delivery, tx)?;
            match counted.fetch_add(1, Relaxed) {
                0 => Err(Error::reject("not at first")),
                1 => Err(Error::app("not yet")),
                _ => Ok(()),
            }
        })
        .unwrap();
    send(&broker, full("one"));
    until("it", || consumer.status().quarantined == 1);
    store.rejected("service").redrive(0).unwrap();
    until("a try that failed", || consumer.status().retried == 1);
    store.rejected("service").discard(0).unwrap();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!((tries.load(Relaxed), consumer.status().redriven), (2, 0));
    assert!(effects(&store).is_empty());
    stop(consumer);
}

/// P9. Goal: a row that fails its check is reported by its number, and never handed to a handler; the others are. Method: flip a bit
/// in one of three rows of a closed store, and ask for all of them, also by a mark that was there before the damage.
#[test]
fn a_damaged_row_is_reported_and_never_handled() {
    let (_folder, store, broker) = setup();
    let strict = strict();
    let consumer = picky(quick(&store), &broker, &strict);
    for n in 0..3 {
        send(&broker, full(&format!("bad {n}")));
    }
    until("all", || consumer.status().quarantined == 3);
    stop(consumer);
    store.rejected("service").redrive(1).unwrap();
    let path = store.path().to_owned();
    store.close().unwrap();
    let row = |number: u64| [&[7][..], b"service", &[0], &number.to_be_bytes()].concat();
    damage(&path, REJECTED, |key| key == row(1));

    let store = Store::open(&path).unwrap();
    let rejected = store.rejected("service");
    let list = rejected.list(None, 9).unwrap();
    let damaged: Vec<_> = list.iter().map(|entry| entry.damaged).collect();
    assert_eq!(damaged, [None, Some("its checksum does not match"), None]);
    let error = rejected.get(1).unwrap_err();
    assert!(matches!(error, Error::DamagedDelivery { number: 1, .. }), "{error:?}");
    strict.store(false, Relaxed);
    let consumer = picky(quick(&store), &broker, &strict);
    assert_eq!(rejected.redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 2);
    until("the others", || consumer.status().redriven == 2);
    until("it is driven no more", || !rejected.list(None, 9).unwrap()[0].redriven);
    once_each(&store, ["bad 0", "bad 2"].map(str::to_owned));
    assert!(matches!(rejected.redrive(1), Err(Error::DamagedDelivery { number: 1, .. })));
    rejected.discard(1).unwrap();
    assert!(rejected.is_empty().unwrap());
    stop(consumer);
}

/// With the dead-letter option nothing is kept and nothing is marked: what comes back from there is handled again.
#[test]
fn the_dead_letter_option_leaves_it_to_the_broker() {
    let (_folder, store, broker) = setup();
    broker.declare_queue("dead", QueueOptions::default());
    broker.declare_queue("q", QueueOptions::default().dead_letter("", "dead"));
    let strict = strict();
    let consumer = picky(quick(&store).rejects(RejectTo::DeadLetter), &broker, &strict);
    send(&broker, numbered(0, 0, "bad one"));
    send(&broker, full("bad two"));
    until("both", || broker.queue_len("dead") == 2);
    let stats = consumer.status();
    assert_eq!((stats.rejected, stats.quarantined), (2, 0));
    assert!(store.rejected("service").is_empty().unwrap());
    strict.store(false, Relaxed);
    for dead in broker.messages("dead") {
        send(&broker, Message::clone(&dead.message));
    }
    until("both again", || consumer.status().applied == 2);
    once_each(&store, ["bad one", "bad two"].map(str::to_owned));
    stop(consumer);
}

/// A rejected delivery does not hold back those behind it, of its key and of its lane.
#[test]
fn those_behind_a_rejected_one_go_on() {
    let (_folder, store, broker) = setup();
    let consumer =
        picky(quick(&store).on_gap(onewrite::GapPolicy::Hold(Duration::from_secs(600))), &broker, &strict());
    for number in 0..40 {
        let what = if number % 4 == 1 { "bad" } else { "good" };
        let mut message = numbered(0, number, &format!("{what} {number}"));
        set(&mut message, "cloudEvents_partitionkey", "k");
        send(&broker, message);
    }
    until("an empty queue", || drained(&broker));
    once_each(&store, (0..40).filter(|n| n % 4 != 1).map(|n| format!("good {n}")));
    assert_eq!(store.rejected("service").len().unwrap(), 10);
    stop(consumer);
}
