//! Writes that fail, or take long, beside others: what they cost those.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use onewrite::redb::{ReadableTableMetadata, TableDefinition};
use onewrite::{Error, Message, Store};

use crate::lanes_inbox::{drained, setup, until};

const STATE: TableDefinition<'_, u64, u64> = TableDefinition::new("state");

type Calls = Arc<Mutex<BTreeMap<u64, u32>>>;

/// Whether a write fails at a call, by its number and how often it was called before.
type Fails = fn(u64, u32) -> bool;

const MIXTURES: [(&str, Fails); 6] = [
    ("every second fails", |n, _| n % 2 == 1),
    ("one of three succeeds", |n, _| n % 3 != 0),
    ("one of ten fails", |n, _| n % 10 == 9),
    ("the last fails", |n, _| n == 119),
    ("every third fails once it has succeeded", |n, called| n % 3 == 2 && called == 1),
    ("one fails at once, others once they have succeeded twice", |n, called| {
        n == 7 || called == 2 && n % 5 == 4
    }),
];

/// Writes, then fails if it is to.
fn step(tx: &onewrite::Transaction, n: u64, calls: &Calls, fails: Fails) -> onewrite::Result<()> {
    let called = {
        let mut calls = calls.lock().unwrap();
        let called = calls.entry(n).or_default();
        *called += 1;
        *called - 1
    };
    tx.open_table(STATE)?.insert(n, n)?;
    if fails(n, called) { Err(Error::reject("after all")) } else { Ok(()) }
}

fn rows(store: &Store) -> u64 {
    store.read().unwrap().open_table(STATE).map_or(0, |state| state.len().unwrap())
}

/// Goal: a write that fails after it has written makes no other run more than three times. Method: 120 writes
/// in one queue, in several mixtures of what fails and when; count calls, and rows in the table.
#[test]
fn failing_writes_make_no_other_run_often() {
    for (name, fails) in MIXTURES {
        let (_folder, store, _) = setup();
        let calls = Calls::default();
        let gate = store.begin().unwrap();
        let futures = std::thread::spawn({
            let (store, calls) = (store.clone(), Arc::clone(&calls));
            move || {
                let mut futures: Vec<_> = (0..120_u64)
                    .map(|n| {
                        let calls = Arc::clone(&calls);
                        Box::pin(store.write_async(move |tx| step(tx, n, &calls, fails)))
                    })
                    .collect();
                for future in &mut futures {
                    assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
                }
                futures
            }
        })
        .join()
        .unwrap();
        gate.rollback().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let results: Vec<_> =
            futures.into_iter().map(|future| runtime.block_on(future).map(|_| ())).collect();
        let good = results.iter().filter(|result| result.is_ok()).count() as u64;
        assert_eq!(rows(&store), good, "{name}");
        let most = calls.lock().unwrap().values().max().copied();
        assert!(
            most <= Some(u32::from(crate::support::tuning::RUNS_MAX)),
            "{name}: {most:?} calls of one write"
        );
    }
}

/// Goal: the same of deliveries, which others send: calls grow with their number, not with its square. Method: 240 deliveries by the
/// same mixtures; what fails is rejected. Every other is applied once.
#[test]
fn failing_deliveries_make_no_other_run_often() {
    for (name, fails) in MIXTURES {
        let (_folder, store, broker) = setup();
        for n in 0..240_u64 {
            let message = Message {
                message_id: Some(format!("m-{n}").into()),
                payload: n.to_le_bytes().to_vec(),
                ..Message::default()
            };
            broker.publish("", "q", message).unwrap();
        }
        let calls = Calls::default();
        let counted = Arc::clone(&calls);
        let gate = store.begin().unwrap();
        let consumer = store
            .consumer("service")
            .spawn(broker.source("q"), move |delivery, tx| {
                let n = u64::from_le_bytes(delivery.message.payload[..].try_into().unwrap());
                step(tx, n, &counted, fails)
            })
            .unwrap();
        gate.rollback().unwrap();
        until(name, || drained(&broker));
        let stats = consumer.stop(Duration::from_secs(5));
        assert_eq!(
            (stats.applied + stats.quarantined, stats.applied),
            (240, rows(&store)),
            "{name}: {stats:?}"
        );
        let most = calls.lock().unwrap().values().max().copied();
        assert!(
            most <= Some(u32::from(crate::support::tuning::RUNS_MAX)),
            "{name}: {most:?} calls of one delivery"
        );
    }
}

/// Goal: a write of the application waits for one handler, however many deliveries wait; also where they write and fail. Method: 40
/// deliveries whose handlers take 30 ms; five writes and five exclusive transactions, one after another. Between the beginning of
/// each and its end two handlers begin at most: one that held the write lock already, and one that acquired it at the same moment.
#[test]
fn a_write_waits_for_one_handler() {
    for fails in [false, true] {
        let (_folder, store, broker) = setup();
        for n in 0..40 {
            let message = Message { message_id: Some(format!("m-{n}").into()), ..Message::default() };
            broker.publish("", "q", message).unwrap();
        }
        let begun = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&begun);
        let consumer = store
            .consumer("service")
            .spawn(broker.source("q"), move |_, tx| {
                let n = counted.fetch_add(1, SeqCst);
                tx.open_table(STATE)?.insert(u64::from(n), 1)?;
                std::thread::sleep(Duration::from_millis(30));
                if fails && n % 2 == 1 { Err(Error::reject("after all")) } else { Ok(()) }
            })
            .unwrap();
        until("the first", || begun.load(SeqCst) > 0);
        let mut waited = Vec::new();
        for n in 0..5 {
            let before = begun.load(SeqCst);
            store
                .write(move |tx| tx.open_table(STATE)?.insert(1000 + n, 1).map(drop).map_err(Error::from))
                .unwrap();
            waited.push(begun.load(SeqCst) - before);
            let before = begun.load(SeqCst);
            store.begin().unwrap().rollback().unwrap();
            waited.push(begun.load(SeqCst) - before);
        }
        assert!(begun.load(SeqCst) < 40, "the handlers were done before: the test shows nothing");
        assert!(waited.iter().all(|handlers| *handlers <= 2), "{waited:?} handlers began, fails: {fails}");
        until("all", || drained(&broker));
        let stats = consumer.stop(Duration::from_secs(5));
        assert_eq!(stats.applied + stats.quarantined, 40, "{stats:?}");
    }
}

/// Goal: a long batch is acknowledged piece by piece. Method: 20 handlers of 30 ms; when the tenth begins, some are settled.
#[test]
fn a_long_batch_is_acknowledged_in_pieces() {
    let (_folder, store, broker) = setup();
    for n in 0..20 {
        let message = Message { message_id: Some(format!("m-{n}").into()), ..Message::default() };
        broker.publish("", "q", message).unwrap();
    }
    let unsettled = Arc::new(Mutex::new(Vec::new()));
    let (seen, watched) = (Arc::clone(&unsettled), broker.clone());
    let consumer = store
        .consumer("service")
        .spawn(broker.source("q"), move |_, _| {
            seen.lock().unwrap().push(watched.unsettled_len("q"));
            std::thread::sleep(Duration::from_millis(30));
            Ok(())
        })
        .unwrap();
    until("all", || drained(&broker));
    drop(consumer);
    let unsettled = unsettled.lock().unwrap();
    assert!(unsettled.last().is_some_and(|last| *last < 15), "{unsettled:?}");
}
