//! A process forks while a store is open.
//!
//! Goal: in the forked process each call says [`Error::Forked`] and each handle is dropped without a trace, whatever the threads of
//! the owner were doing; the owner goes on as if nothing had happened. Method: fork with every kind of handle open, try them all in
//! the child, which has a limit of time; then look at the store from the owner, and at the file.

use std::fmt::Debug;
use std::future::Future;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::Stream;
use onewrite::broker::{
    MemoryBroker, Publisher, PublisherEvents, RabbitMq, RabbitMqSource, Source, SourceEvents,
};
use onewrite::redb::TableDefinition;
use onewrite::{
    Aggregate, Capture, ConfirmError, Error, Event, ExpectedRevision, OpenError, ProjectionState, Receipt,
    RecordedEvent, RelayState, Result, Store, StoreBuilder, Transaction,
};

use crate::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("forked::every_door_of_a_store", every_door_of_a_store),
    ("forked::every_handle", every_handle),
    ("forked::an_open_transaction", an_open_transaction),
    ("forked::a_fork_inside_a_closure", a_fork_inside_a_closure),
    ("forked::a_fork_on_the_writer_thread", a_fork_on_the_writer_thread),
    ("forked::iterators_end_with_the_error", iterators_end_with_the_error),
    ("forked::while_all_threads_are_busy", while_all_threads_are_busy),
    ("forked::a_daemon", a_daemon),
    ("forked::the_owner_keeps_its_lock_and_its_journal", the_owner_keeps_its_lock_and_its_journal),
    ("forked::another_program_inherits_nothing", another_program_inherits_nothing),
    ("forked::amqp_threads_are_not_waited_for", amqp_threads_are_not_waited_for),
];

const TABLE: TableDefinition<'_, &str, u64> = TableDefinition::new("table");
const CAPTURED: TableDefinition<'_, &str, u64> = TableDefinition::new("captured");
/// A child takes milliseconds.
const LIMIT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(600);

/// Forks, runs `child` in the forked process and waits for its end, which must be a good one.
fn in_child(child: impl FnOnce()) {
    match fork::fork().unwrap() {
        fork::Fork::Child => {
            let ran = catch_unwind(AssertUnwindSafe(child));
            std::process::exit(i32::from(ran.is_err()));
        }
        fork::Fork::Parent(child) => await_child(child),
    }
}

fn await_child(child: i32) {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = fork::waitpid_nohang(child).unwrap() {
            assert_eq!(status, 0, "the child ended badly");
            return;
        }
        if Instant::now() >= deadline {
            Command::new("kill").args(["-9", &child.to_string()]).status().unwrap();
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn is_forked(error: &Error) {
    let Error::Forked { owner, process, .. } = error else { panic!("{error}") };
    assert_eq!(*process, std::process::id());
    assert_ne!(owner, process);
}

#[track_caller]
fn refused<T: Debug>(result: Result<T>) {
    is_forked(&result.expect_err("it must be refused"));
}

#[track_caller]
fn refused_wait(result: std::result::Result<(), ConfirmError>) {
    match result {
        Err(ConfirmError::Store(error)) => is_forked(&error),
        other => panic!("{other:?}"),
    }
}

fn event(text: &str) -> Event {
    Event::bytes("t", text).to("", "queue")
}

fn append(tx: &Transaction) -> Result<()> {
    tx.append(event("1")).map(drop)
}

struct Rig {
    _folder: tempfile::TempDir,
    path: PathBuf,
    store: Store,
}

fn rig_with(builder: StoreBuilder) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = builder.open(&path).unwrap();
    Rig { _folder: folder, path, store }
}

fn rig() -> Rig {
    rig_with(Store::builder())
}

/// The owner goes on and closes, and the file holds so many events.
fn goes_on(rig: Rig, events: u64) {
    rig.store.write(append).unwrap();
    assert!(rig.store.verify().unwrap().is_whole());
    rig.store.close().unwrap();
    holds(&rig.path, events + 1);
}

fn holds(path: &Path, events: u64) {
    let store = Store::open(path).unwrap();
    let stats = store.stats().unwrap();
    assert_eq!((stats.next_seq, stats.verified_at_open), (events, false));
    assert!(store.verify().unwrap().is_whole());
}

#[derive(Debug, Default)]
struct Count(u64);

impl Aggregate for Count {
    const CATEGORY: &'static str = "count";
    type Event = ();
    fn encode((): &()) -> Result<Event> {
        Ok(Event::bytes("counted", ""))
    }
    fn decode(_: &RecordedEvent) -> Result<()> {
        Ok(())
    }
    fn apply(&mut self, (): &()) {
        self.0 += 1;
    }
}

fn every_door_of_a_store() {
    let rig = rig_with(Store::builder().capture(Capture::json(CAPTURED).unpublished()));
    let broker = MemoryBroker::new();
    broker.declare_queue("queue", Default::default());
    let store = rig.store.clone();
    store.write(append).unwrap();
    let relay = store.relay("known").spawn(broker.publisher()).unwrap();
    assert!(relay.stop(LIMIT).clean);
    let quarantine = store.quarantine("known").unwrap();
    let rejected = store.rejected("scope");
    let count = store.aggregate::<Count>("a");
    in_child(|| {
        refused(store.write(append));
        refused(store.write_once("request", append));
        refused(store.begin());
        refused(store.read());
        refused(store.stats());
        refused(store.verify());
        refused(store.subscribe(0));
        refused(store.relay("rabbit").spawn(broker.publisher()));
        refused(store.consumer("c").spawn(broker.source("queue"), |_, _| Ok(())));
        refused(store.projection("p").spawn(|_, _| Ok(())));
        refused(store.forget_relay("known"));
        refused(store.forget_projection("p"));
        refused(store.end_capture("captured"));
        refused(store.quarantine("known"));
        refused(quarantine.list(None, 1));
        refused(quarantine.redrive(0));
        refused(quarantine.discard(0));
        refused(rejected.list(None, 1));
        refused(rejected.len());
        refused(rejected.redrive(0));
        refused(rejected.redrive_all(&onewrite::QuarantineFilter::all()));
        refused(rejected.discard(0));
        refused(count.load());
        refused(count.execute(|_| Ok(vec![()])));
        let mut future = store.write_async(append);
        match Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => refused(result),
            Poll::Pending => panic!("it would wait for ever"),
        }
        assert!(matches!(Store::open(store.path()), Err(Error::Open(OpenError::Locked { .. }))));
        refused(store.clone().close());
        drop((future, quarantine, rejected, count, store));
    });
    goes_on(rig, 1);
}

fn every_handle() {
    let rig = rig();
    let broker = MemoryBroker::new();
    broker.declare_queue("queue", Default::default());
    broker.declare_queue("deliveries", Default::default());
    let store = rig.store.clone();
    let relay = store.relay("rabbit").spawn(broker.publisher()).unwrap();
    let projection = store.projection("p").spawn(|_, _| Ok(())).unwrap();
    let consumer = store.consumer("c").spawn(broker.source("deliveries"), |_, _| Ok(())).unwrap();
    let receipt: Receipt = store.write(append).unwrap();
    receipt.wait_confirmed(LIMIT).unwrap();
    projection.wait_until_live(LIMIT).unwrap();
    let mut subscription = store.subscribe(0).unwrap();
    let mut later = store.subscribe(1).unwrap();
    let mut stream = store.subscribe(0).unwrap().into_stream();
    // Queued behind this transaction, so without an answer while the fork happens.
    let (held, is_held) = mpsc::channel();
    let (end, ended) = mpsc::channel::<()>();
    let holder = std::thread::spawn({
        let store = store.clone();
        move || {
            let tx = store.begin().unwrap();
            held.send(()).unwrap();
            let _ = ended.recv();
            drop(tx);
        }
    });
    is_held.recv().unwrap();
    let (mut queued, unpolled) = (store.write_async(append), store.write_async(append));
    let mut context = Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut queued).poll(&mut context).is_pending());
    // Tasks that wait, one polled and one not.
    let unconfirmed = Receipt::confirmed(&receipt);
    let (mut reached, unreached) = (Box::pin(projection.reached(99)), projection.reached(99));
    assert!(reached.as_mut().poll(&mut context).is_pending());
    in_child(|| {
        for mut future in [reached, Box::pin(unreached)] {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(result) => refused(result),
                Poll::Pending => panic!("it waits"),
            }
        }
        match Box::pin(unconfirmed).as_mut().poll(&mut context) {
            Poll::Ready(result) => refused_wait(result),
            Poll::Pending => panic!("it waits"),
        }
        refused_wait(receipt.wait_confirmed(LONG));
        refused_wait(receipt.wait_confirmed_by("rabbit", LONG));
        relay.pause();
        relay.resume();
        assert!(matches!(relay.status().state, RelayState::Failed(text) if text.contains("forked")));
        assert!(!relay.stop(LONG).clean);
        assert!(
            matches!(projection.status().state, ProjectionState::Failed(text) if text.contains("forked"))
        );
        refused(projection.wait_for_position(0, LONG));
        refused(projection.wait_until_live(LONG));
        refused(projection.failures().list(None, 1));
        refused(projection.failures().redrive(0));
        refused(projection.failures().discard(0));
        projection.rebuild();
        projection.stop(LONG);
        assert!(consumer.status().failed.unwrap().contains("forked"));
        consumer.stop(LONG);
        refused(subscription.try_next().unwrap());
        assert!(subscription.try_next().is_none());
        refused(later.next_timeout(LONG).unwrap());
        match Pin::new(&mut stream).poll_next(&mut context) {
            Poll::Ready(Some(event)) => refused(event),
            other => panic!("{other:?}"),
        }
        for mut future in [queued, unpolled] {
            match Pin::new(&mut future).poll(&mut context) {
                Poll::Ready(result) => refused(result),
                Poll::Pending => panic!("it would wait for ever"),
            }
        }
        drop((receipt, subscription, later, stream, store));
    });
    // The closure did not run here. The transaction ends, and the queued write is committed.
    drop(end);
    holder.join().unwrap();
    goes_on(rig, 2);
}

fn an_open_transaction() {
    let rig = rig_with(Store::builder().capture(Capture::json(CAPTURED).unpublished()));
    let store = &rig.store;
    let uses: [fn(&Transaction); 11] = [
        |tx| refused(tx.append(event("child"))),
        |tx| refused(tx.open_table(TABLE)),
        |tx| refused(tx.delete_table(TABLE)),
        |tx| refused(tx.captured_table(CAPTURED).map(drop)),
        |tx| refused(tx.first_time("scope", "id")),
        |tx| refused(tx.first_time_with("scope", "id", b"content")),
        |tx| {
            refused(tx.first_delivery(
                "scope",
                &onewrite::Message { message_id: Some("m".into()), ..Default::default() },
            ))
        },
        |tx| refused(tx.event(0)),
        |tx| refused(tx.stream("s-1").append([event("child")], ExpectedRevision::Any)),
        |tx| refused(tx.stream("s-1").read().map(drop)),
        |tx| refused(tx.stream("s-1").tombstone()),
    ];
    let ends: [fn(Transaction); 3] = [|tx| refused(tx.commit()), |tx| refused(tx.rollback()), drop];
    for end in ends {
        let tx = store.begin().unwrap();
        tx.append(event("owner")).unwrap();
        let tx = std::cell::Cell::new(Some(tx));
        in_child(|| {
            let tx = tx.take().unwrap();
            uses.iter().for_each(|refused| refused(&tx));
            end(tx);
            refused(store.write(append));
        });
        tx.take().unwrap().commit().unwrap();
    }
    goes_on(rig, 3);
}

/// The closure runs on the calling thread: nobody else writes.
fn a_fork_inside_a_closure() {
    let rig = rig();
    let (sender, receiver) = mpsc::channel();
    let written = rig.store.write(move |tx| {
        append(tx)?;
        tx.open_table(TABLE)?.insert("a", 1)?;
        match fork::fork().unwrap() {
            fork::Fork::Parent(child) => sender.send(child).unwrap(),
            fork::Fork::Child => append(tx)?,
        }
        Ok(std::process::id())
    });
    match written {
        Ok(receipt) => assert_eq!(*receipt.value(), std::process::id()),
        // This is the child: it has come out of `write` with the error.
        Err(error) => {
            let refused = catch_unwind(AssertUnwindSafe(|| is_forked(&error)));
            drop(rig.store);
            std::process::exit(i32::from(refused.is_err()));
        }
    }
    await_child(receiver.recv().unwrap());
    goes_on(rig, 1);
}

/// The writer thread runs a handler that forks: of the child only this thread is there, and it ends.
fn a_fork_on_the_writer_thread() {
    let rig = rig();
    let forked = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    let projection = rig
        .store
        .projection("p")
        .spawn(move |_, _| {
            if !forked.swap(true, Ordering::Relaxed)
                && let fork::Fork::Parent(child) = fork::fork().unwrap()
            {
                sender.send(child).unwrap();
            }
            Ok(())
        })
        .unwrap();
    rig.store.write(append).unwrap();
    await_child(receiver.recv_timeout(LIMIT).unwrap());
    projection.wait_for_position(0, LIMIT).unwrap();
    assert_eq!(projection.stop(LIMIT).applied, 1);
    goes_on(rig, 1);
}

/// An iterator that is open across a fork looks at the process only now and then.
fn iterators_end_with_the_error() {
    const MANY: u64 = 500;
    let rig = rig();
    let events = |tx: &Transaction| {
        let events = (0..MANY).map(|_| event("1"));
        tx.stream("s-1").append(events, ExpectedRevision::NoStream).map(drop)
    };
    rig.store.write(events).unwrap();
    let snapshot = rig.store.read().unwrap();
    let (mut events, mut replay) = (snapshot.events(0).unwrap(), snapshot.replay(0).unwrap());
    let reader = snapshot.stream("s-1").unwrap();
    let mut of_stream = reader.events(0);
    assert!(events.next().unwrap().is_ok() && replay.next().unwrap().is_ok());
    assert!(of_stream.next().unwrap().is_ok());
    in_child(|| {
        refused(snapshot.event(0));
        refused(snapshot.events(0));
        refused(snapshot.replay(0));
        refused(snapshot.stream("s-1").map(drop));
        refused(snapshot.open_table(TABLE).map(drop));
        refused(reader.snapshot(0));
        refused(reader.events(0).next().unwrap());
        let last = |left: Vec<Result<()>>| {
            assert!(left.len() <= 64, "{} after the fork", left.len());
            left.into_iter().last().unwrap()
        };
        refused(last(events.map(|event| event.map(drop)).collect()));
        refused(last(replay.map(|event| event.map(drop)).collect()));
        refused(of_stream.find(Result::is_err).unwrap());
        drop(of_stream);
        drop(reader);
    });
    goes_on(rig, MANY);
}

/// Locks that other threads hold in the moment of a fork are held for ever in the child: it must not need them.
fn while_all_threads_are_busy() {
    let rig = rig();
    let broker = MemoryBroker::new();
    broker.declare_queue("queue", Default::default());
    let relay = rig.store.relay("rabbit").spawn(broker.publisher()).unwrap();
    let projection = rig.store.projection("p").spawn(|_, _| Ok(())).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let busy: Vec<_> = (0..4)
        .map(|thread| {
            let (store, over) = (rig.store.clone(), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    if thread % 2 == 0 {
                        store.write(append).unwrap();
                    } else {
                        store.stats().unwrap();
                        assert!(store.subscribe(0).unwrap().try_next().is_none_or(|event| event.is_ok()));
                        let _ = store.read().unwrap().event(0).unwrap();
                    }
                }
            })
        })
        .collect();
    let mut subscription = rig.store.subscribe(0).unwrap();
    for _ in 0..60 {
        let (store, snapshot) = (rig.store.clone(), rig.store.read().unwrap());
        let _ = relay.status();
        in_child(|| {
            refused(store.write(append));
            refused(store.begin());
            refused(store.stats());
            refused(store.read());
            refused(snapshot.event(0));
            refused(subscription.try_next().unwrap());
            assert!(matches!(relay.status().state, RelayState::Failed(_)));
            assert!(matches!(projection.status().state, ProjectionState::Failed(_)));
            // What is moved out of the owner's sight here is the child's own copy.
            drop((store, snapshot));
        });
    }
    over.store(true, Ordering::Relaxed);
    busy.into_iter().for_each(|thread| thread.join().unwrap());
    drop(subscription);
    assert!(relay.stop(LIMIT).clean);
    projection.stop(LIMIT);
    let events = rig.store.stats().unwrap().next_seq;
    goes_on(rig, events);
}

/// A service that goes into the background: the process that opened the store ends, and the forked one goes on.
fn a_daemon() {
    for journal_bytes in [0, 1 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let done = folder.path().join("done");
        in_child(|| {
            let store = Store::builder().journal_bytes(journal_bytes).open(&path).unwrap();
            store.write(append).unwrap();
            match fork::fork().unwrap() {
                // The usual way: without a word to the store.
                fork::Fork::Parent(_) => std::process::exit(0),
                fork::Fork::Child => {
                    let judged = catch_unwind(AssertUnwindSafe(|| {
                        for _ in 0..3 {
                            refused(store.write(append));
                            refused(store.read());
                        }
                        drop(store);
                    }));
                    let text = if judged.is_ok() { "as it should" } else { "not as it should" };
                    std::fs::write(&done, text).unwrap();
                    std::process::exit(0);
                }
            }
        });
        let deadline = Instant::now() + LIMIT;
        while std::fs::read_to_string(&done).unwrap_or_default().is_empty() {
            assert!(Instant::now() < deadline, "the daemon hangs");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(std::fs::read_to_string(&done).unwrap(), "as it should");
        let journal = folder.path().join("a.redb.journal");
        assert_eq!(journal.exists(), journal_bytes > 0, "the journal is the owner's, and was not closed");
        // The daemon may take a moment to be gone, and its copy of the descriptor with it.
        let store = loop {
            match Store::open(&path) {
                Ok(store) => break store,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        assert_eq!(store.stats().unwrap().next_seq, 1);
        assert!(store.verify().unwrap().is_whole());
    }
}

fn the_owner_keeps_its_lock_and_its_journal() {
    let rig = rig_with(Store::builder().journal_bytes(1 << 20));
    rig.store.write(append).unwrap();
    let journal = rig.path.with_extension("redb.journal");
    let store = std::cell::Cell::new(Some(rig.store.clone()));
    in_child(|| drop(store.take()));
    // A child that ends in the usual way, with all handles dropped.
    drop(store.take());
    assert!(journal.exists());
    assert!(matches!(Store::open(&rig.path), Err(Error::Open(OpenError::Locked { .. }))), "the lock is gone");
    // The owner closes while a child lives that has the descriptors too.
    let (rig_path, go) = (rig.path.clone(), rig.path.with_extension("go"));
    let fork::Fork::Parent(child) = fork::fork().unwrap() else {
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(rig.store);
        std::process::exit(0);
    };
    rig.store.write(append).unwrap();
    rig.store.close().unwrap();
    holds(&rig_path, 2);
    std::fs::write(&go, "").unwrap();
    await_child(child);
    holds(&rig_path, 2);
}

fn another_program_inherits_nothing() {
    let rig = rig();
    rig.store.write(append).unwrap();
    let mut program = Command::new("sleep").arg("600").spawn().unwrap();
    rig.store.close().unwrap();
    holds(&rig.path, 1);
    program.kill().unwrap();
    program.wait().unwrap();
}

/// A broker that takes the connection and says nothing more: the threads are at work.
fn amqp_threads_are_not_waited_for() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://guest:guest@{}", silent.local_addr().unwrap());
    let rig = rig();
    let relay = rig.store.relay("rabbit").spawn(RabbitMq::new(&url).unwrap()).unwrap();
    let consumer =
        rig.store.consumer("c").spawn(RabbitMqSource::new(&url, "queue").unwrap(), |_, _| Ok(())).unwrap();
    let (sender, _published) = PublisherEvents::channel();
    let mut publisher = RabbitMq::new(&url).unwrap();
    publisher.start(sender).unwrap();
    let (sender, _delivered) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&url, "queue").unwrap();
    source.start(sender, 1).unwrap();
    let others = std::cell::Cell::new(Some((
        rig.store.relay("dropped").spawn(RabbitMq::new(&url).unwrap()).unwrap(),
        rig.store.clone(),
    )));
    in_child(|| {
        assert!(!relay.stop(LONG).clean);
        consumer.stop(LONG);
        publisher.stop(LONG);
        source.stop(LONG);
        drop((publisher, source));
        drop(others.take());
    });
    drop(others.take());
    goes_on(rig, 0);
}
