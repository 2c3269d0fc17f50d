//! The consumer against the scripted in-process broker: promise P6.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{Delivery, MemoryBroker, QueueOptions};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{
    Consumer, ConsumerBuilder, Error, HeaderValue, Message, RejectTo, Result, Store, Transaction,
};

const SOON: Duration = Duration::from_secs(20);
/// How often each message took effect.
const EFFECTS: TableDefinition<'_, &str, u64> = TableDefinition::new("effects");

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn setup() -> (tempfile::TempDir, Store, MemoryBroker) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("dead", QueueOptions::default());
    broker.declare_queue("q", QueueOptions::default().dead_letter("", "dead"));
    (folder, store, broker)
}

fn send(broker: &MemoryBroker, id: &str, key: Option<&str>, payload: &str) {
    let headers = key.map(|key| ("cloudEvents_partitionkey".into(), HeaderValue::from(key)));
    let message = Message {
        message_id: Some(id.into()),
        headers: headers.into_iter().collect(),
        payload: payload.as_bytes().to_vec(),
        ..Message::default()
    };
    broker.publish("", "q", message).unwrap();
}

fn quick(store: &Store) -> ConsumerBuilder {
    store.consumer("service").backoff(Duration::from_millis(2), Duration::from_millis(10))
}

/// Counts the delivery's effect, by message id.
fn count(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let id = delivery.message.message_id.as_deref().unwrap_or("none");
    let mut effects = tx.open_table(EFFECTS)?;
    let before = effects.get(id)?.map_or(0, |row| row.value());
    effects.insert(id, before + 1)?;
    Ok(())
}

fn effects(store: &Store) -> BTreeMap<String, u64> {
    let snapshot = store.read().unwrap();
    let Ok(table) = snapshot.open_table(EFFECTS) else { return BTreeMap::new() };
    table.iter().unwrap().map(|row| row.unwrap()).map(|(id, n)| (id.value().to_owned(), n.value())).collect()
}

fn drained(broker: &MemoryBroker) -> bool {
    broker.queue_len("q") == 0 && broker.unsettled_len("q") == 0
}

fn stop(consumer: Consumer) {
    let stats = consumer.stop(SOON);
    assert_eq!(stats.failed, None);
}

/// Goal: deliveries that wait together share a commit. Method: fill the queue first, count the commits.
#[test]
fn a_batch_is_one_commit() {
    let (_folder, store, broker) = setup();
    for n in 0..500 {
        send(&broker, &n.to_string(), None, "x");
    }
    let before = store.stats().unwrap().commits;
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    until("all applied", || consumer.status().applied == 500);
    let commits = store.stats().unwrap().commits - before;
    assert!(commits <= 50, "{commits} commits for 500 deliveries");
    stop(consumer);
}

/// P6. Every message is sent three times, the connection ends again and again between commit and acknowledgement.
/// Each takes effect once; the broker's `redelivered` flag plays no part.
#[test]
fn once_in_effect() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).prefetch(16).spawn(broker.source("q"), count).unwrap();
    for round in 0..3 {
        for n in 0..100 {
            send(&broker, &format!("m{n}"), (n % 2 == 0).then_some("k"), &format!("{n}"));
            if n % 25 == round * 5 {
                broker.go_down();
                broker.come_up();
            }
        }
    }
    until("an empty queue", || drained(&broker));
    let effects = effects(&store);
    assert_eq!(effects.len(), 100);
    assert!(effects.values().all(|times| *times == 1), "{effects:?}");
    let stats = consumer.status();
    assert_eq!(stats.applied, 100);
    assert!(stats.repeated >= 200, "{stats:?}");
    stop(consumer);
}

/// The effect and the inbox entry are one transaction: a file copied at any moment, and a broker that delivers everything
/// again, end with each effect once.
#[test]
fn a_crash_between_effect_and_acknowledgement() {
    let (folder, store, broker) = setup();
    let consumer = quick(&store).prefetch(8).spawn(broker.source("q"), count).unwrap();
    for n in 0..200 {
        send(&broker, &format!("m{n}"), None, "x");
    }
    until("some", || consumer.status().applied > 50);
    let hold = store.begin().unwrap();
    let copy = folder.path().join("copy.redb");
    std::fs::copy(store.path(), &copy).unwrap();
    drop(hold);
    stop(consumer);

    let crashed = Store::open(&copy).unwrap();
    let again = MemoryBroker::new();
    again.declare_queue("q", QueueOptions::default());
    for n in 0..200 {
        send(&again, &format!("m{n}"), None, "x");
    }
    let consumer = quick(&crashed).spawn(again.source("q"), count).unwrap();
    until("an empty queue", || drained(&again));
    let effects = effects(&crashed);
    assert_eq!(effects.len(), 200);
    assert!(effects.values().all(|times| *times == 1));
    assert!(consumer.status().repeated > 50);
    stop(consumer);
}

/// A handler that fails or panics leaves nothing of that try; the delivery is tried again, and applied once.
#[test]
fn failures_are_retried_and_leave_nothing() {
    let (_folder, store, broker) = setup();
    let tries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&tries);
    let consumer = quick(&store)
        .spawn(broker.source("q"), move |delivery, tx| {
            count(delivery, tx)?;
            match counted.fetch_add(1, Relaxed) {
                0 => Err(Error::app("not now")),
                1 => panic!("oh no"),
                _ => Ok(()),
            }
        })
        .unwrap();
    send(&broker, "m", None, "x");
    until("an empty queue", || drained(&broker));
    assert_eq!(effects(&store), BTreeMap::from([("m".to_owned(), 1)]));
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.retried, stats.rejected), (1, 2, 0));
    stop(consumer);
}

/// What the handler rejects, what cannot be decoded and what has failed too often goes to the dead-letter queue at once,
/// and takes no effect.
#[test]
fn rejected_goes_to_the_dead_letter_queue() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store)
        .attempts(3)
        .rejects(RejectTo::DeadLetter)
        .spawn(broker.source("q"), |delivery, tx| {
            count(delivery, tx)?;
            match delivery.message.payload.as_slice() {
                b"bad" => Err(Error::reject("no such account")),
                b"undecodable" => Ok(onewrite::codec::from_json::<u32>(b"{").map(drop)?),
                b"hopeless" => Err(Error::app("never")),
                _ => Ok(()),
            }
        })
        .unwrap();
    for payload in ["bad", "undecodable", "hopeless", "good"] {
        send(&broker, payload, None, payload);
    }
    until("an empty queue", || drained(&broker));
    assert_eq!(effects(&store), BTreeMap::from([("good".to_owned(), 1)]));
    let dead: HashSet<_> = broker.messages("dead").iter().map(|dead| dead.message.payload.clone()).collect();
    assert_eq!(dead, [&b"bad"[..], b"undecodable", b"hopeless"].map(<[u8]>::to_vec).into());
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.retried, stats.rejected), (1, 2, 3));
    stop(consumer);
}

/// The same id with other content is a conflict: rejected and counted, never dropped in silence.
#[test]
fn an_id_with_other_content_is_a_conflict() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).rejects(RejectTo::DeadLetter).spawn(broker.source("q"), count).unwrap();
    send(&broker, "m", None, "one");
    send(&broker, "m", None, "one");
    send(&broker, "m", None, "other");
    until("an empty queue", || drained(&broker));
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.repeated, stats.conflicts, stats.rejected), (1, 1, 1, 1));
    assert_eq!(stats.retried, 0, "another try heals no conflict");
    assert_eq!(broker.messages("dead")[0].message.payload, b"other");
    stop(consumer);
}

/// Deliveries of one key are applied in the order of arrival, also when one of them has to be tried again; other keys
/// do not wait.
#[test]
fn order_per_key_through_retries() {
    let (_folder, store, broker) = setup();
    for n in 0..60 {
        let key = format!("k{}", n % 3);
        send(&broker, &format!("m{n}"), Some(&key), &format!("{key}:{n}"));
    }
    let applied = Arc::new(Mutex::new(Vec::new()));
    let failed = Arc::new(Mutex::new(HashSet::new()));
    let consumer = quick(&store)
        .spawn(broker.source("q"), {
            let (applied, failed) = (Arc::clone(&applied), Arc::clone(&failed));
            move |delivery, _| {
                let text = String::from_utf8_lossy(&delivery.message.payload).into_owned();
                // Every fourth fails at its first try.
                let n: u32 = text.split(':').next_back().and_then(|n| n.parse().ok()).unwrap_or(0);
                if n % 4 == 1 && failed.lock().unwrap().insert(n) {
                    return Err(Error::app("first try"));
                }
                applied.lock().unwrap().push(text);
                Ok(())
            }
        })
        .unwrap();
    until("an empty queue", || drained(&broker));
    // A closure may run again with its group: what counts is the last run of each.
    let mut last = Vec::<String>::new();
    for text in applied.lock().unwrap().iter() {
        last.retain(|earlier| earlier != text);
        last.push(text.clone());
    }
    assert_eq!(last.len(), 60);
    for key in 0..3 {
        let of_key: Vec<_> =
            last.iter().filter(|text| text.starts_with(&format!("k{key}:"))).cloned().collect();
        let expected: Vec<_> = (0..60).filter(|n| n % 3 == key).map(|n| format!("k{key}:{n}")).collect();
        assert_eq!(of_key, expected);
    }
    stop(consumer);
}

/// Goal: what arrives while an earlier one of its key waits for its next try waits behind it; other keys do not. Method: the
/// first fails once, with a wait of 2 s; two more of its key and one of another arrive meanwhile.
#[test]
fn what_arrives_later_waits_behind_its_key() {
    let (_folder, store, broker) = setup();
    let (applied, tried) = (Arc::new(Mutex::new(Vec::new())), AtomicU32::new(0));
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_secs(2), Duration::from_secs(5))
        .spawn(broker.source("q"), {
            let applied = Arc::clone(&applied);
            move |delivery, _| {
                let text = String::from_utf8_lossy(&delivery.message.payload).into_owned();
                if text == "k:1" && tried.fetch_add(1, Relaxed) == 0 {
                    return Err(Error::app("first try"));
                }
                applied.lock().unwrap().push(text);
                Ok(())
            }
        })
        .unwrap();
    send(&broker, "m1", Some("k"), "k:1");
    until("the first try", || consumer.status().retried == 1);
    for (id, key, payload) in [("m2", "k", "k:2"), ("m3", "other", "other:3"), ("m4", "k", "k:4")] {
        send(&broker, id, Some(key), payload);
    }
    until("an empty queue", || drained(&broker));
    assert_eq!(*applied.lock().unwrap(), ["other:3", "k:1", "k:2", "k:4"]);
    stop(consumer);
}

/// Goal: after a lost connection nothing waits behind what the broker delivers again. Method: a delivery fails with a wait of
/// a minute; the broker goes and comes back.
#[test]
fn a_redelivery_does_not_wait_for_its_old_self() {
    let (_folder, store, broker) = setup();
    let tried = AtomicU32::new(0);
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_secs(60), Duration::from_secs(60))
        .spawn(broker.source("q"), move |delivery, tx| {
            if tried.fetch_add(1, Relaxed) == 0 {
                return Err(Error::app("first try"));
            }
            count(delivery, tx)
        })
        .unwrap();
    send(&broker, "m", Some("k"), "x");
    until("the first try", || consumer.status().retried == 1);
    broker.go_down();
    until("the outage seen", || consumer.status().disconnected.is_some());
    broker.come_up();
    until("an empty queue", || drained(&broker));
    assert_eq!(effects(&store)["m"], 1);
    stop(consumer);
}

/// A delivery, the state that it changes and the events that it leads to are one write.
#[test]
fn consume_and_append_are_one_write() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store)
        .spawn(broker.source("q"), |delivery, tx| {
            count(delivery, tx)?;
            tx.append(
                onewrite::Event::bytes("offer.updated", delivery.message.payload.clone()).unpublished(),
            )?;
            Ok(())
        })
        .unwrap();
    for _ in 0..3 {
        send(&broker, "m", None, "x");
    }
    until("an empty queue", || drained(&broker));
    assert_eq!(effects(&store), BTreeMap::from([("m".to_owned(), 1)]));
    assert_eq!(store.read().unwrap().events(0).unwrap().count(), 1);
    stop(consumer);
}

/// The consumer of a store that is gone ends, and says why.
#[test]
fn a_closed_store_ends_the_consumer() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    store.close().unwrap();
    send(&broker, "m", None, "x");
    until("its word", || consumer.status().failed.is_some());
    assert!(consumer.status().failed.unwrap().contains("is closed"));
    until("the message back", || broker.queue_len("q") == 1 && broker.unsettled_len("q") == 0);
}

/// Settings that cannot work are refused by name.
#[test]
fn bad_settings_are_named() {
    let (_folder, store, broker) = setup();
    let refused =
        |builder: ConsumerBuilder| builder.spawn(broker.source("q"), count).unwrap_err().to_string();
    assert_eq!(refused(store.consumer("")), "setting `scope`: a scope is 1 to 255 bytes long");
    assert_eq!(refused(quick(&store).prefetch(0)), "setting `prefetch`: it must be at least 1");
}
