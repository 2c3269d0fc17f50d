//! A consumer and a projection that pause. A relay's pause stands in `relay`.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onewrite::broker::MemoryBroker;
use onewrite::{Error, Event, Message, ProjectionState, Store};

use crate::scratch::until;

const SOON: Duration = Duration::from_secs(20);

/// Goal: a paused consumer hands nothing to its handler, neither new deliveries nor repeats. After the
/// pause it goes on in order. A stop during the pause is prompt. Method: deliveries of one key, before
/// and during the pause. The first one fails.
#[test]
fn a_paused_consumer_takes_nothing_and_goes_on_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let (calls, applied) = (Arc::new(AtomicU32::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (called, seen) = (Arc::clone(&calls), Arc::clone(&applied));
    let backoff = Duration::from_millis(50);
    let consumer = store
        .consumer("c")
        .backoff(backoff, backoff)
        .attempts(1_000)
        .spawn(broker.source("q"), move |delivery, _| {
            if called.fetch_add(1, SeqCst) < 3 {
                return Err(Error::app("not yet"));
            }
            seen.lock().unwrap().push(delivery.message.payload[0]);
            Ok(())
        })
        .unwrap();
    let publish = |n: u8| {
        let headers = vec![("cloudEvents:partitionkey".into(), "k".into())];
        broker.publish("", "q", Message { payload: vec![n], headers, ..Message::default() }).unwrap();
    };
    publish(0);
    until("its first try fails", || calls.load(SeqCst) >= 1);
    consumer.pause();
    assert!(consumer.status().paused);
    std::thread::sleep(Duration::from_millis(200));
    let during = calls.load(SeqCst);
    (1..20).for_each(publish);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(calls.load(SeqCst), during, "nothing is tried");
    consumer.resume();
    until("all are applied", || consumer.status().applied == 20);
    assert_eq!(*applied.lock().unwrap(), (0..20).collect::<Vec<u8>>());
    assert!(!consumer.status().paused);
    consumer.pause();
    publish(20);
    let began = std::time::Instant::now();
    let status = consumer.stop(SOON);
    assert!(began.elapsed() < SOON / 2);
    assert_eq!(status.applied, 20);
    assert_eq!((broker.queue_len("q"), broker.unsettled_len("q")), (1, 0), "it goes back");
}

/// Goal: a pause loses nothing, in whatever moment it comes: neither what is due again nor what has just
/// come. Each key keeps its order. Method: deliveries of ten keys fail now and then and are due after a
/// millisecond, while another thread pauses and resumes without a rest.
#[test]
fn pauses_in_any_moment_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let (calls, applied) = (Arc::new(AtomicU32::new(0)), Arc::new(Mutex::new(vec![Vec::new(); 10])));
    let (called, seen) = (Arc::clone(&calls), Arc::clone(&applied));
    let backoff = Duration::from_millis(1);
    let consumer = store
        .consumer("c")
        .backoff(backoff, backoff)
        .attempts(100_000)
        .spawn(broker.source("q"), move |delivery, _| {
            if called.fetch_add(1, SeqCst) % 3 != 0 {
                return Err(Error::app("not yet"));
            }
            let number = delivery.message.payload[0];
            seen.lock().unwrap()[usize::from(number % 10)].push(number);
            Ok(())
        })
        .unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(SeqCst) {
                consumer.pause();
                std::thread::sleep(Duration::from_micros(200));
                consumer.resume();
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        for n in 0..200_u8 {
            let headers = vec![("cloudEvents:partitionkey".into(), format!("k{}", n % 10).as_str().into())];
            broker.publish("", "q", Message { payload: vec![n], headers, ..Message::default() }).unwrap();
        }
        let all = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until("all are applied", || consumer.status().applied == 200)
        }));
        done.store(true, SeqCst);
        all.unwrap();
    });
    for (key, numbers) in applied.lock().unwrap().iter().enumerate() {
        assert_eq!(*numbers, (0..20).map(|n| n * 10 + key as u8).collect::<Vec<_>>());
    }
    assert!(consumer.stop(SOON).failed.is_none());
}

/// Goal: a paused projection applies nothing, reports the pause, and goes on afterwards. A rebuild
/// pauses too. Method: events and the request for a rebuild during the pause.
#[test]
fn a_paused_projection_applies_nothing_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let calls = Arc::new(AtomicU32::new(0));
    let called = Arc::clone(&calls);
    let projection = store
        .projection("p")
        .spawn(move |_, _| {
            called.fetch_add(1, SeqCst);
            Ok(())
        })
        .unwrap();
    let write = || store.write(|tx| tx.append(Event::bytes("t", "1").unpublished())).unwrap().seqs()[0];
    projection.wait_for_position(write(), SOON).unwrap();
    projection.pause();
    until("it says so", || projection.status().state == ProjectionState::Paused);
    (0..9).for_each(|_| _ = write());
    let last = write();
    projection.rebuild();
    assert!(matches!(
        projection.wait_for_position(last, Duration::from_millis(300)),
        Err(Error::ProjectionBehind { position: 1, .. })
    ));
    assert_eq!(calls.load(SeqCst), 1);
    projection.resume();
    projection.wait_for_position(last, SOON).unwrap();
    projection.wait_until_live(SOON).unwrap();
    assert_eq!(calls.load(SeqCst), 1 + 10 + 11, "live, and rebuilt");
    until("it is live", || projection.status().state == ProjectionState::Live);
    projection.pause();
    until("it says so again", || projection.status().state == ProjectionState::Paused);
    assert_eq!(projection.stop(SOON).state, ProjectionState::Ended);
}
