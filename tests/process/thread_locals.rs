//! Handles that live in a thread-local, and what the destructor of a thread-local does with a store.
//!
//! Goal: a thread whose thread-locals hold handles of any kind ends quietly, and so does a thread whose destructors write.
//! Method: the thread-local is used before anything else on its thread, so it is destroyed after all others, those of the library
//! and of its dependencies among them. The file is opened again and looked at.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use onewrite::broker::MemoryBroker;
use onewrite::{Error, Event, Store, Transaction};

use crate::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("thread_locals::a_store", a_store),
    ("thread_locals::a_store_of_the_main_thread", a_store_of_the_main_thread),
    ("thread_locals::a_transaction", a_transaction),
    ("thread_locals::running_handles", running_handles),
    ("thread_locals::readers", readers),
    ("thread_locals::futures", futures),
    ("thread_locals::a_destructor_that_writes", a_destructor_that_writes),
    ("thread_locals::a_destructor_that_opens_and_relays", a_destructor_that_opens_and_relays),
    ("thread_locals::a_subscriber_that_is_destroyed_first", a_subscriber_that_is_destroyed_first),
];

thread_local! {
    static KEPT: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

fn append(tx: &Transaction) -> onewrite::Result<()> {
    tx.append(Event::bytes("t", "1").to("", "queue")).map(drop)
}

/// Puts into the thread-local of a thread of its own what `make` makes, and lets the thread end.
fn kept<T: Any>(make: impl FnOnce(&Path) -> T + Send) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // Used first: so it is destroyed last.
                KEPT.with_borrow_mut(Vec::clear);
                let made: Box<dyn Any> = Box::new(make(&path));
                KEPT.with_borrow_mut(|kept| kept.push(made));
            })
            .join()
            .unwrap();
    });
    (folder, path)
}

/// The file can be opened again, and holds so many events.
fn holds(path: &Path, events: u64) {
    // The thread's destructors run before it is joined; a writer thread that was left to itself may take a moment more.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let store = loop {
        match Store::open(path) {
            Ok(store) => break store,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(store.stats().unwrap().next_seq, events);
    assert!(store.verify().unwrap().is_whole());
}

fn a_store() {
    let (_folder, path) = kept(|path| {
        let store = Store::open(path).unwrap();
        store.write(append).unwrap();
        store
    });
    holds(&path, 1);
}

/// The main thread's destructors run while the process ends. Nothing is left then that could look at the file: what is judged is
/// that the end is quiet.
fn a_store_of_the_main_thread() {
    KEPT.with_borrow_mut(Vec::clear);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    store.write(append).unwrap();
    KEPT.with_borrow_mut(|kept| {
        kept.push(Box::new(store));
        kept.push(Box::new(folder));
    });
}

fn a_transaction() {
    let (_folder, path) = kept(|path| {
        let store = Store::open(path).unwrap();
        store.write(append).unwrap();
        let tx = store.begin().unwrap();
        append(&tx).unwrap();
        (tx, store)
    });
    holds(&path, 1);
    // The last that holds the store is the transaction.
    let (_folder, path) = kept(|path| Store::open(path).unwrap().begin().unwrap());
    holds(&path, 0);
}

fn running_handles() {
    let broker = MemoryBroker::new();
    broker.declare_queue("queue", Default::default());
    let (_folder, path) = kept(|path| {
        let store = Store::open(path).unwrap();
        let relay = store.relay("rabbit").spawn(broker.publisher()).unwrap();
        let projection = store.projection("counts").spawn(|_, _| Ok(())).unwrap();
        let consumer = store.consumer("c").spawn(broker.source("queue"), |_, _| Ok(())).unwrap();
        let receipt = store.write(append).unwrap();
        receipt.wait_confirmed(Duration::from_secs(60)).unwrap();
        projection.wait_for_position(0, Duration::from_secs(60)).unwrap();
        (relay, projection, consumer, receipt, store)
    });
    holds(&path, 1);
}

fn readers() {
    let (_folder, path) = kept(|path| {
        let store = Store::open(path).unwrap();
        store.write(append).unwrap();
        let mut subscription = store.subscribe(0).unwrap();
        assert!(subscription.try_next().unwrap().is_ok());
        let stream = store.subscribe(0).unwrap().into_stream();
        let snapshot = store.read().unwrap();
        let (events, replay) = (snapshot.events(0).unwrap(), snapshot.replay(0).unwrap());
        (subscription, stream, events, replay, snapshot, store)
    });
    holds(&path, 1);
}

fn futures() {
    let (_folder, path) = kept(|path| {
        let store = Store::open(path).unwrap();
        let unpolled = store.write_async(append);
        let mut polled = store.write_async(append);
        let _ = Pin::new(&mut polled).poll(&mut Context::from_waker(Waker::noop()));
        // The queue is in order: once this write is committed, the polled one is too.
        store.write(append).unwrap();
        (unpolled, polled, store)
    });
    holds(&path, 2);
}

/// Runs a closure when it is dropped.
struct AtLast(Option<Box<dyn FnOnce()>>);

impl Drop for AtLast {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            run();
        }
    }
}

fn at_last(run: impl FnOnce() + 'static) -> AtLast {
    AtLast(Some(Box::new(run)))
}

/// All doors of a store, from a destructor; what would wait for itself is refused there too.
fn a_destructor_that_writes() {
    let done = Arc::new(Mutex::new(false));
    let is_done = Arc::clone(&done);
    let (_folder, path) = kept(move |path| {
        let store = Store::open(path).unwrap();
        // With the thread-locals of an earlier write on this thread, which are destroyed by the time of the destructor.
        store.write(append).unwrap();
        at_last(move || {
            store.write(append).unwrap();
            let nested = store.clone();
            let refused = store.write(move |_| nested.write(append).map(drop)).unwrap_err();
            assert!(matches!(refused, Error::InsideTransaction { .. }), "{refused}");
            let tx = store.begin().unwrap();
            append(&tx).unwrap();
            assert!(matches!(store.begin(), Err(Error::InsideTransaction { .. })));
            tx.commit().unwrap();
            store.write_once("request", append).unwrap();
            assert!(store.write_once("request", append).unwrap().is_repeat());
            let mut future = store.write_async(append);
            let mut context = Context::from_waker(Waker::noop());
            while Pin::new(&mut future).poll(&mut context).is_pending() {
                std::thread::yield_now();
            }
            assert_eq!(store.read().unwrap().events(0).unwrap().count(), 5);
            store.close().unwrap();
            *is_done.lock().unwrap() = true;
        })
    });
    assert!(*done.lock().unwrap(), "the destructor did not come to its end");
    holds(&path, 5);
}

fn a_destructor_that_opens_and_relays() {
    let done = Arc::new(Mutex::new(false));
    let is_done = Arc::clone(&done);
    let (_folder, path) = kept(move |path| {
        // So that there are thread-locals which are destroyed by then.
        Store::open(path.with_extension("other")).unwrap().write(append).unwrap();
        let path = path.to_owned();
        at_last(move || {
            let broker = MemoryBroker::new();
            broker.declare_queue("queue", Default::default());
            let store = Store::open(path).unwrap();
            let relay = store.relay("rabbit").spawn(broker.publisher()).unwrap();
            store.write(append).unwrap().wait_confirmed(Duration::from_secs(60)).unwrap();
            assert!(relay.stop(Duration::from_secs(60)).clean);
            *is_done.lock().unwrap() = true;
        })
    });
    assert!(*done.lock().unwrap(), "the destructor did not come to its end");
    holds(&path, 1);
}

/// A subscriber of the application's may keep a thread-local of its own, which is destroyed before ours: then it panics when
/// something is logged in a destructor.
struct Brittle;

struct Fragile;

impl Drop for Fragile {
    fn drop(&mut self) {}
}

thread_local! {
    static FRAGILE: Fragile = const { Fragile };
}

impl tracing::Subscriber for Brittle {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        if FRAGILE.try_with(|_| ()).is_err() {
            LOST.lock().unwrap().push(event.metadata().level().to_string());
            std::panic::resume_unwind(Box::new("the subscriber's thread-local is destroyed"));
        }
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

static LOST: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn a_subscriber_that_is_destroyed_first() {
    tracing::subscriber::set_global_default(Brittle).unwrap();
    let (_folder, path) = kept(|path| {
        let store = Store::open(path).unwrap();
        let tx = store.begin().unwrap();
        append(&tx).unwrap();
        // Held for so long that its end is worth a warning.
        std::thread::sleep(Duration::from_millis(1100));
        (tx, store)
    });
    assert_eq!(*LOST.lock().unwrap(), ["WARN"], "the destructor logged nothing: the test shows nothing");
    holds(&path, 0);
}
