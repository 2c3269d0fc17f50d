//! A consumer under failures that once broke its word: order through group reruns, held deliveries, errors of a handler's own,
//! sources and stores that end.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use onewrite::broker::{DeliveryTag, Settlement, Source, SourceEvents};
use onewrite::redb::{ReadableTable, ReadableTableMetadata, TableDefinition};
use onewrite::{Error, GapPolicy, IdsPolicy, Message, SettingError, Store};

use crate::lanes_inbox::{count, drained, effects, numbered, quick, send, set, setup, until};

const ORDER: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("order");
const INBOX: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.inbox");

fn note(tx: &onewrite::Transaction, payload: &[u8]) -> onewrite::Result<()> {
    let mut t = tx.open_table(ORDER)?;
    let n = t.len()?;
    t.insert(n, payload)?;
    Ok(())
}
fn order(store: &Store) -> Vec<String> {
    let s = store.read().unwrap();
    let Ok(t) = s.open_table(ORDER) else { return vec![] };
    t.iter().unwrap().map(|r| String::from_utf8_lossy(r.unwrap().1.value()).into_owned()).collect()
}
fn keyed(n: i64, payload: &str) -> Message {
    let mut m = numbered(0, n, payload);
    set(&mut m, "cloudEvents_partitionkey", "k");
    m
}

/// Goal: order per key also where the group is run again because one of the key failed after it had written. Method: four of a key
/// in one group, the second fails once.
#[test]
fn order_is_kept_when_the_group_runs_again() {
    let (_f, store, broker) = setup();
    for (n, p) in ["a", "b", "c", "d"].iter().enumerate() {
        send(&broker, keyed(n as i64, p));
    }
    let gate = store.begin().unwrap();
    let tries = AtomicU32::new(0);
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_millis(300), Duration::from_millis(300))
        .spawn(broker.source("q"), move |d, tx| {
            note(tx, &d.message.payload)?;
            if d.message.payload == b"b" && tries.fetch_add(1, Relaxed) == 0 {
                return Err(Error::app("once"));
            }
            Ok(())
        })
        .unwrap();
    std::thread::sleep(Duration::from_millis(200));
    gate.rollback().unwrap();
    until("drained", || drained(&broker));
    let _ = consumer.stop(Duration::from_secs(5));
    assert_eq!(order(&store), ["a", "b", "c", "d"]);
}

/// Goal: what was held for a gap does not overtake an earlier one of its key that waits for its next try. Method: 0 fails once, 2 is
/// held, 1 comes in time.
#[test]
fn what_was_held_does_not_overtake_a_retry() {
    let (_f, store, broker) = setup();
    let gate = store.begin().unwrap();
    send(&broker, keyed(0, "0"));
    send(&broker, keyed(2, "2"));
    let tries = AtomicU32::new(0);
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_secs(2), Duration::from_secs(2))
        .on_gap(GapPolicy::Hold(Duration::from_millis(500)))
        .spawn(broker.source("q"), move |d, tx| {
            if d.message.payload == b"0" && tries.fetch_add(1, Relaxed) == 0 {
                return Err(Error::app("once"));
            }
            note(tx, &d.message.payload)
        })
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    gate.rollback().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    send(&broker, keyed(1, "1")); // the gap is filled, well in time
    until("drained", || drained(&broker));
    let _ = consumer.stop(Duration::from_secs(5));
    assert_eq!(order(&store), ["0", "1", "2"]);
}

/// Goal: one that is tried again does not wait for its gap again. Method: a lane joined in its middle, a handler that always fails.
#[test]
fn a_gap_is_waited_for_once() {
    let (_f, store, broker) = setup();
    send(&broker, keyed(5, "5"));
    let began = Instant::now();
    let consumer = quick(&store)
        .attempts(4)
        .on_gap(GapPolicy::Hold(Duration::from_secs(1)))
        .spawn(broker.source("q"), move |_, _| Err(Error::app("never")))
        .unwrap();
    until("drained", || drained(&broker));
    let took = began.elapsed();
    let _ = consumer.stop(Duration::from_secs(5));
    assert!(took < Duration::from_millis(1900), "unacknowledged for {took:?} with a gap timeout of 1 s");
}

/// Goal: a conflict that the handler itself has met is no conflict of the delivery: it is marked as any other that is rejected, and its
/// resend is a repeat. Method: the handler's own id check fails once; resend, then redrive.
#[test]
fn a_handler_s_own_conflict_is_not_the_delivery_s() {
    let (_f, store, broker) = setup();
    let tries = AtomicU32::new(0);
    let consumer = quick(&store)
        .spawn(broker.source("q"), move |d, tx| {
            if tries.fetch_add(1, Relaxed) == 0 {
                // the handler's own business check: Error::IdConflict
                tx.first_time_with("requests", "r", b"1")?;
                tx.first_time_with("requests", "r", b"2")?;
            }
            count(d, tx)
        })
        .unwrap();
    send(&broker, numbered(0, 0, "x"));
    until("quarantined", || drained(&broker) && store.rejected("service").len().unwrap() == 1);
    send(&broker, numbered(0, 0, "x")); // the relay's resend of the same message
    until("drained", || drained(&broker));
    store.rejected("service").redrive(0).unwrap();
    until("gone", || store.rejected("service").is_empty().unwrap());
    let _ = consumer.stop(Duration::from_secs(5));
    assert_eq!(effects(&store)["x"], 1);
}

/// Goal: the window in count bounds the inbox also under load. Method: 80 commits of 256 ids with a window of 100.
#[test]
fn the_window_in_count_bounds_the_inbox() {
    let f = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .inbox_ids_max(100)
        .inbox_ids_policy(IdsPolicy::ForgetOldest)
        .open(f.path().join("a.redb"))
        .unwrap();
    let mut sizes = vec![];
    for round in 0..80_u32 {
        store
            .write(move |tx| {
                for n in 0..256 {
                    let id = format!("{:08x}-{round}-{n}", (round * 256 + n).wrapping_mul(2_654_435_761));
                    assert!(tx.first_delivery(
                        "service",
                        &Message { message_id: Some(id.into()), ..Message::default() }
                    )?);
                }
                Ok(())
            })
            .unwrap();
        if round % 20 == 19 {
            sizes.push(store.read().unwrap().open_table(INBOX).unwrap().len().unwrap());
        }
    }
    assert!(sizes.iter().all(|n| *n < 2000), "rows in the inbox: {sizes:?}");
}

/// Goal: a gap that somebody else fills is noticed well before the gap timeout has passed. Method: another consuming loop of the same
/// scope fills it.
#[test]
fn a_gap_filled_elsewhere_is_noticed() {
    let (_f, store, broker) = setup();
    send(&broker, keyed(1, "1"));
    let consumer = quick(&store)
        .on_gap(GapPolicy::Hold(Duration::from_secs(6)))
        .spawn(broker.source("q"), |d, tx| note(tx, &d.message.payload))
        .unwrap();
    until("held", || consumer.status().held == 1);
    let began = Instant::now();
    store.write(|tx| tx.first_delivery("service", &keyed(0, "0"))).unwrap(); // as another consumer of the scope, or a redrive, would
    until("drained", || drained(&broker));
    let took = began.elapsed();
    let _ = consumer.stop(Duration::from_secs(5));
    assert!(took < Duration::from_secs(2), "waited {took:?}");
}

/// Goal: an error about another store does not end the consumer. Method: a handler that asks a closed one.
#[test]
fn an_error_of_another_store_ends_nobody() {
    let (f, store, broker) = setup();
    let other = Store::open(f.path().join("b.redb")).unwrap();
    other.clone().close().unwrap();
    let consumer = quick(&store)
        .attempts(2)
        .spawn(broker.source("q"), move |_, _| other.rejected("x").len().map(drop))
        .unwrap();
    send(&broker, numbered(0, 0, "x"));
    std::thread::sleep(Duration::from_millis(500));
    let stats = consumer.stop(Duration::from_secs(5));
    assert_eq!(stats.failed, None);
}

/// Goal: a wait that no clock can express kills nobody. Method: the longest backoff there is.
#[test]
fn an_endless_backoff_kills_nobody() {
    let (_f, store, broker) = setup();
    let consumer = store
        .consumer("service")
        .backoff(Duration::MAX, Duration::MAX)
        .spawn(broker.source("q"), |_, _| Err(Error::app("x")))
        .unwrap();
    send(&broker, numbered(0, 0, "x"));
    until("tried", || consumer.status().retried == 1);
    std::thread::sleep(Duration::from_millis(200));
    let up = broker.unsettled_len("q");
    let stats = consumer.stop(Duration::from_secs(5));
    assert!(up == 1 || stats.failed.is_some(), "dead, and says nothing: unsettled {up}, {stats:?}");
}

/// Goal: order per key also where a stranger's failure makes the group run again. Method: the second of a key fails cleanly, another
/// key's delivery is rejected after it had written.
#[test]
fn order_is_kept_when_a_stranger_makes_the_group_run_again() {
    let (_f, store, broker) = setup();
    for (n, p) in ["a", "b", "c"].iter().enumerate() {
        send(&broker, keyed(n as i64, p));
    }
    send(&broker, numbered(1, 0, "stranger"));
    let gate = store.begin().unwrap();
    let tries = Mutex::new(HashMap::<Vec<u8>, u32>::new());
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_millis(300), Duration::from_millis(300))
        .spawn(broker.source("q"), move |d, tx| {
            let mut tries = tries.lock().unwrap();
            let n = tries.entry(d.message.payload.clone()).or_default();
            *n += 1;
            if d.message.payload == b"b" && *n == 1 {
                return Err(Error::app("clean"));
            }
            note(tx, &d.message.payload)?;
            if d.message.payload == b"stranger" {
                return Err(Error::reject("dirty"));
            }
            Ok(())
        })
        .unwrap();
    std::thread::sleep(Duration::from_millis(200));
    gate.rollback().unwrap();
    until("drained", || drained(&broker));
    let _ = consumer.stop(Duration::from_secs(5));
    assert_eq!(order(&store), ["a", "b", "c"]);
}

/// Goal: a consumer whose source has ended by itself says so and rests. Method: a source that drops what it could send through.
#[test]
fn a_source_that_has_ended_is_reported() {
    #[derive(Debug)]
    struct Dead;
    impl Source for Dead {
        fn start(&mut self, _: SourceEvents, _: u16) -> Result<(), SettingError> {
            Ok(())
        }
        fn settle(&mut self, _: Vec<(DeliveryTag, Settlement)>) {}
        fn stop(&mut self, _: Duration) {}
    }
    let (_f, store, _broker) = setup();
    let consumer = store.consumer("service").spawn(Dead, |_, _| Ok(())).unwrap();
    until("it says so", || consumer.status().failed.is_some());
    let stats = consumer.stop(Duration::from_secs(5));
    assert_eq!(stats.failed.as_deref(), Some("the source has ended by itself"));
}

/// Goal: what was published before a crash is recognised also where the newest stretch was damaged and a new epoch began. Method: a copy of
/// the producer's file from before its relay's progress, with one damaged record.
#[test]
fn a_new_epoch_applies_nothing_twice() {
    const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
    let (folder, credit, broker) = setup();
    let consumer = quick(&credit).spawn(broker.source("q"), count).unwrap();
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    for n in 0..10 {
        bank.write(move |tx| {
            tx.append(onewrite::Event::bytes("paid", format!("{n}").into_bytes()).key("alice").to("", "q"))
        })
        .unwrap();
    }
    let crashed = crate::scratch::crash_copy(&bank, folder.path());
    let relay = bank.relay("rabbit").spawn(broker.publisher()).unwrap();
    until("applied", || consumer.status().applied == 10);
    let _ = relay.stop(Duration::from_secs(5));
    bank.close().unwrap();
    {
        // The copy opens once, so that its own recovery from the crash is over; then one byte of record 5 changes.
        Store::open(&crashed).unwrap().close().unwrap();
        let db = onewrite::redb::Database::open(&crashed).unwrap();
        let tx = db.begin_write().unwrap();
        {
            let mut log = tx.open_table(LOG).unwrap();
            let mut row = log.get(5).unwrap().unwrap().value().to_vec();
            row[40] ^= 1;
            log.insert(5, &*row).unwrap();
        }
        tx.commit().unwrap();
    }
    let bank = Store::open(&crashed).unwrap();
    let relay = bank.relay("rabbit").spawn(broker.publisher()).unwrap();
    until("again", || consumer.status().applied + consumer.status().repeated >= 19);
    let stats = consumer.status();
    let _ = relay.stop(Duration::from_secs(5));
    let _ = consumer.stop(Duration::from_secs(5));
    assert_eq!((stats.applied, stats.repeated), (10, 9), "{:?}", effects(&credit));
}
