//! Each wait has a form for tasks, which needs no runtime: it is woken by what it waits for, or by the store's alarms.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use onewrite::broker::MemoryBroker;
use onewrite::{ConfirmError, Error, Event, ProjectionState, Receipt, Store};

const SOON: Duration = Duration::from_secs(20);

/// Runs a future on this thread, with nothing that looks at it but its wakers.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(SOON, future).await.expect("it is woken in time") })
}

fn is_send<T: Send + 'static>(value: T) -> T {
    value
}

fn open() -> (tempfile::TempDir, Store, MemoryBroker) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store, MemoryBroker::new())
}

/// Goal: a task hears of the confirm when it comes, of quarantine, and of the relay's end; and of a wrong name at once. Method: the relay is
/// paused while the task waits.
#[test]
fn a_task_waits_for_the_confirm() {
    let (_folder, store, broker) = open();
    broker.declare_queue("q", Default::default());
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    relay.pause();
    let write =
        |queue: &'static str| store.write(move |tx| tx.append(Event::bytes("t", "1").to_queue(queue)));
    let receipt = write("q").unwrap();
    let confirmed = std::thread::spawn({
        let confirmed = is_send(receipt.confirmed());
        move || block_on(confirmed)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!confirmed.is_finished());
    relay.resume();
    confirmed.join().unwrap().unwrap();
    block_on(receipt.confirmed_by("r")).unwrap();
    assert!(matches!(block_on(receipt.confirmed_by("s")), Err(ConfirmError::NoRelay(_))));
    let lost: Receipt<_> = write("nowhere").unwrap();
    assert!(matches!(block_on(lost.confirmed()), Err(ConfirmError::Quarantined { seq: 1, .. })));

    relay.pause();
    let never = write("q").unwrap();
    let waiting = std::thread::spawn({
        let confirmed = never.confirmed();
        move || block_on(confirmed)
    });
    std::thread::sleep(Duration::from_millis(100));
    let report = block_on(is_send(relay.stop_async(SOON)));
    assert_eq!((report.confirmed, report.backlog_events), (1, 1));
    assert!(matches!(waiting.join().unwrap(), Err(ConfirmError::Stopped)));
}

/// Goal: a task hears when a projection has come as far, and when it cannot any more. Method: a handler waits for the test; a task that was
/// dropped while it waited, and others that go on.
#[test]
fn a_task_waits_for_a_position() {
    let (_folder, store, _) = open();
    let go = Arc::new(AtomicBool::new(false));
    let may_go = Arc::clone(&go);
    let projection = store
        .projection("p")
        .spawn(move |_, _| {
            while !may_go.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
        .unwrap();
    let seq = store.write(|tx| tx.append(Event::bytes("t", "1").unpublished())).unwrap().seqs()[0];
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let reached = is_send(projection.reached(seq));
            std::thread::spawn(move || block_on(reached))
        })
        .collect();
    let quick = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let dropped = projection.reached(seq);
    assert!(
        quick.block_on(async { tokio::time::timeout(Duration::from_millis(50), dropped).await }).is_err()
    );
    go.store(true, SeqCst);
    waiting.into_iter().for_each(|waiting| waiting.join().unwrap().unwrap());
    block_on(projection.reached(seq)).unwrap();
    let beyond = projection.reached(seq + 1);
    let waiting = std::thread::spawn(move || block_on(beyond));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(block_on(is_send(projection.stop_async(SOON))).state, ProjectionState::Ended);
    assert!(matches!(waiting.join().unwrap(), Err(Error::ProjectionStopped { .. })));
}

/// Goal: a stop ends by its timeout also where a handler does not. Method: handlers that wait for the test.
#[test]
fn a_task_stops_by_its_timeout() {
    let (_folder, store, broker) = open();
    broker.declare_queue("q", Default::default());
    let go = Arc::new(AtomicBool::new(false));
    let busy = || {
        let go = Arc::clone(&go);
        move || {
            let began = Instant::now();
            while !go.load(SeqCst) && began.elapsed() < SOON {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    };
    let wait = busy();
    let consumer = store.consumer("c").spawn(broker.source("q"), move |_, _| {
        wait();
        Ok(())
    });
    broker.publish("", "q", onewrite::Message::default()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    let status = block_on(is_send(consumer.unwrap().stop_async(Duration::from_millis(100))));
    assert!(began.elapsed() >= Duration::from_millis(100));
    assert_eq!(status.applied, 0, "its handler still waits");
    go.store(true, SeqCst);
}

/// Goal: a request takes place once, a wrong id is reported, and a store is closed without blocking.
#[test]
fn a_task_writes_once_and_closes() {
    let (_folder, store, _) = open();
    let pay = || is_send(store.write_once_async("r-1", |tx| tx.append(Event::bytes("t", "1").unpublished())));
    assert!(!block_on(pay()).unwrap().is_repeat());
    assert!(block_on(pay()).unwrap().is_repeat());
    assert!(matches!(block_on(store.write_once_async("", |_| Ok(()))), Err(Error::BadId { .. })));
    assert_eq!(store.stats().unwrap().next_seq, 1);
    let other = store.clone();
    block_on(is_send(store.close_async())).unwrap();
    assert!(matches!(other.write(|_| Ok(())), Err(Error::Closed { .. })));
    block_on(other.close_async()).unwrap(); // again
}
