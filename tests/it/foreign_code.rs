//! Application code that runs inside a call of the library: it may call back, panic, block, never end. No invariant is open
//! while it runs, and no lock of the library is held.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Waker};
use std::time::Duration;

use onewrite::redb::TableDefinition;
use onewrite::time::{Clock, Now, SystemClock};
use onewrite::{
    BacklogQuota, Capture, Change, Error, Event, ExpectedRevision, QuotaPolicy, Result, Store,
    StreamAppended, Transaction,
};

/// Far longer than anything here takes, on a loaded machine too.
const TIMEOUT: Duration = Duration::from_secs(120);

const STREAM: &str = "account-7";

thread_local! {
    /// What application code may find by itself: the transaction of its thread.
    static CURRENT: RefCell<Option<Rc<Transaction>>> = const { RefCell::new(None) };
    /// It calls back only from the outside, and so often.
    static LEFT: Cell<u32> = const { Cell::new(0) };
}

/// Calls back into the transaction of this thread, if there is one and the budget allows.
fn call_back(then: impl FnOnce(&Transaction)) {
    let Some(left) = LEFT.get().checked_sub(1) else { return };
    let current = CURRENT.with_borrow(Clone::clone);
    if let Some(tx) = current {
        LEFT.set(left);
        then(&tx);
    }
}

/// Runs `work` in an exclusive transaction which foreign code may find; commits it.
fn in_transaction<T>(store: &Store, calls: u32, work: impl FnOnce(&Transaction) -> T) -> T {
    let tx = Rc::new(store.begin().unwrap());
    CURRENT.set(Some(Rc::clone(&tx)));
    LEFT.set(calls);
    let done = work(&tx);
    CURRENT.set(None);
    Rc::into_inner(tx).unwrap().commit().unwrap();
    done
}

fn event(text: &str) -> Event {
    Event::bytes("t", text.to_owned()).unpublished()
}

fn audit(tx: &Transaction, text: &str) {
    tx.stream(STREAM).append([event(text)], ExpectedRevision::Any).unwrap();
}

/// The payloads of the stream, in order of revision. Revisions and numbers are contiguous, the index fits, also after a reopen.
fn payloads(store: &Store) -> Vec<String> {
    let read = |store: &Store| {
        let snapshot = store.read().unwrap();
        let log: Vec<_> = snapshot.events(0).unwrap().map(|event| event.unwrap()).collect();
        let seqs: Vec<_> = log.iter().map(onewrite::RecordedEvent::seq).collect();
        assert_eq!(seqs, (0..log.len() as u64).collect::<Vec<_>>());
        let of_stream: Vec<_> = log.iter().filter_map(|event| event.revision()).collect();
        assert_eq!(of_stream, (0..of_stream.len() as u64).collect::<Vec<_>>(), "revisions repeat or miss");
        let stream = snapshot.stream(STREAM).unwrap();
        let texts =
            stream.events(0).map(|event| String::from_utf8_lossy(event.unwrap().payload()).into_owned());
        let texts: Vec<_> = texts.collect();
        assert_eq!(stream.revision(), (texts.len() as u64).checked_sub(1));
        assert!(store.verify().unwrap().is_whole());
        texts
    };
    let texts = read(store);
    store.write(|tx| tx.stream(STREAM).append([event("last")], ExpectedRevision::Any)).unwrap();
    let again = read(store);
    assert_eq!(again.split_last().unwrap(), (&"last".to_owned(), &texts[..]));
    texts
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Ends the test with a message instead of hanging for ever.
fn within<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (reported, done) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        let value = work();
        // Nobody waits any more only once the test has failed.
        let _ = reported.send(());
        value
    });
    assert_ne!(done.recv_timeout(TIMEOUT), Err(mpsc::RecvTimeoutError::Timeout), "{what} hangs");
    worker.join().unwrap()
}

/// Goal: revisions are contiguous when the events of an append come from an iterator that appends to the same stream. Method: it
/// does so before each of its events, under every expectation; the expectation is compared with what is true behind it.
#[test]
fn an_iterator_that_appends_to_its_own_stream() {
    let expectations = [
        (ExpectedRevision::Any, true),
        (ExpectedRevision::StreamExists, true),
        (ExpectedRevision::Exact(1), true),
        (ExpectedRevision::NoStream, false),
        (ExpectedRevision::Exact(0), false),
    ];
    for (expected, good) in expectations {
        let (_folder, store) = open();
        let appended = store.write(move |tx| {
            let events = ["a", "b"].into_iter().map(|text| {
                audit(tx, &format!("audit {text}"));
                event(text)
            });
            match tx.stream(STREAM).append(events, expected) {
                Ok(StreamAppended { revisions, .. }) => Ok(Some(revisions)),
                Err(Error::WrongRevision { actual, .. }) => {
                    assert_eq!(actual, Some(1));
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        });
        assert_eq!(appended.unwrap().into_value(), good.then_some(2..4), "{expected:?}");
        let all = ["audit a", "audit b", "a", "b"];
        assert_eq!(payloads(&store), all[..if good { 4 } else { 2 }], "{expected:?}");
    }
}

/// Goal: an iterator that never ends, or that lies about its length, takes bounded memory and ends in a typed error; one that
/// panics in the middle leaves nothing. Method: one of each, in one store that goes on.
#[test]
fn an_iterator_that_never_ends_or_lies_or_panics() {
    struct Lying(u32);
    impl Iterator for Lying {
        type Item = Event;
        fn next(&mut self) -> Option<Event> {
            self.0 = self.0.checked_sub(1)?;
            Some(event("lied"))
        }
        fn size_hint(&self) -> (usize, Option<usize>) {
            (usize::MAX, Some(0))
        }
    }
    let (_folder, store) = open();
    let endless = store.write(|tx| {
        let events = std::iter::repeat_with(|| Event::bytes("t", vec![0; 1 << 20]).unpublished());
        tx.stream(STREAM).append(events, ExpectedRevision::Any)
    });
    assert!(matches!(endless, Err(Error::TransactionTooLarge { .. })), "{endless:?}");
    let panicked = store.write(|tx| {
        let mut left = 3;
        let events = std::iter::from_fn(move || {
            left -= 1;
            assert_ne!(left, 0, "in the middle");
            Some(event("half"))
        });
        tx.stream(STREAM).append(events, ExpectedRevision::Any)
    });
    assert!(matches!(panicked, Err(Error::Panicked { .. })), "{panicked:?}");
    store.write(|tx| tx.stream(STREAM).append(Lying(2), ExpectedRevision::NoStream)).unwrap();
    assert_eq!(payloads(&store), ["lied", "lied"]);
}

/// Goal: the rule that names an event's destination may append to the same stream, and panic. Method: a rule that finds its
/// transaction by itself.
#[test]
fn a_destination_rule_that_appends() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().stream_destination(|_, event_type| {
        assert_ne!(event_type, "panics", "the rule's own mistake");
        call_back(|tx| audit(tx, "by the rule"));
        None
    });
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let events = || ["a", "b"].map(|text| Event::bytes("t", text));
    let appended = in_transaction(&store, 2, |tx| {
        tx.stream(STREAM).append(events(), ExpectedRevision::Exact(1)).unwrap()
    });
    assert_eq!(appended.revisions, 2..4);
    let panicked = store
        .write(|tx| tx.stream(STREAM).append([Event::bytes("panics", "")], ExpectedRevision::Any).map(drop));
    assert!(matches!(panicked, Err(Error::Panicked { .. })), "{panicked:?}");
    assert_eq!(payloads(&store), ["by the rule", "by the rule", "a", "b"]);
}

/// A clock that runs something of the application's whenever it is read.
struct Busy(SystemClock, Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Busy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Busy")
    }
}

impl Clock for Busy {
    fn now(&self) -> Now {
        (self.1)();
        self.0.now()
    }
}

fn busy(work: impl Fn() + Send + Sync + 'static) -> Arc<dyn Clock> {
    Arc::new(Busy(SystemClock::new(), Box::new(work)))
}

/// Goal: nothing that was checked has changed when it is used, though the clock writes whenever it is read. Method: a clock that
/// appends to the stream, appends the very event and marks the very id that its caller is about to; each stands there once.
#[test]
fn a_clock_that_appends_and_marks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let clock = busy(|| {
        call_back(|tx| {
            audit(tx, "by the clock");
            tx.append(event("paid").id("payment-1")).unwrap();
            tx.first_time("scope", "message-1").unwrap();
        })
    });
    let store = Store::builder().clock(clock).open(&path).unwrap();
    in_transaction(&store, 1, |tx| {
        let appended = tx.stream(STREAM).append([event("a"), event("b")], ExpectedRevision::Any).unwrap();
        assert_eq!(appended.revisions, 1..3);
    });
    in_transaction(&store, 1, |tx| {
        let again = tx.append(event("paid").id("payment-1")).unwrap();
        assert!(again.repeated, "the clock was first, or the transaction before");
    });
    let store = {
        store.close().unwrap();
        let clock = busy(|| call_back(|tx| assert!(tx.first_time("scope", "message-2").unwrap())));
        Store::builder().clock(clock).open(&path).unwrap()
    };
    in_transaction(&store, 1, |tx| {
        // Marking an id reads no clock; an append does.
        tx.append(event("c")).unwrap();
        assert!(!tx.first_time("scope", "message-2").unwrap(), "marked twice");
    });
    let texts: Vec<_> =
        store.read().unwrap().stream(STREAM).unwrap().events(0).map(|it| it.unwrap()).collect();
    let texts: Vec<_> =
        texts.iter().map(|event| String::from_utf8_lossy(event.payload()).into_owned()).collect();
    assert_eq!(texts, ["by the clock", "a", "b", "by the clock"]);
    let ids = store
        .read()
        .unwrap()
        .events(0)
        .unwrap()
        .filter(|it| it.as_ref().unwrap().id() == "payment-1")
        .count();
    assert_eq!(ids, 1);
}

/// Goal: no lock is held while the clock runs, and a clock that panics at a commit fails that commit alone. Method: a clock that
/// asks for the store's figures and tries to write, wherever it is read: appends, prunings of the inbox, a quota that looks for
/// expired events, trimming, waiting for room.
#[test]
fn a_clock_that_looks_at_its_store_or_panics() {
    within("a store whose clock looks at it", || {
        let folder = tempfile::tempdir().unwrap();
        let seen: Arc<Mutex<Option<Store>>> = Arc::default();
        let (for_clock, looks) = (Arc::clone(&seen), Arc::new(AtomicU64::new(0)));
        let (counted, panics) = (Arc::clone(&looks), Arc::new(AtomicU64::new(0)));
        let when = Arc::clone(&panics);
        let clock = busy(move || {
            thread_local!(static BUSY: Cell<bool> = const { Cell::new(false) });
            let Some(store) = for_clock.lock().unwrap().clone() else { return };
            if !BUSY.replace(true) {
                store.stats().unwrap();
                store.read().unwrap().stream(STREAM).unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
                // Inside a transaction it is refused; outside it commits.
                let written = store.write(|tx| tx.append(event("by the clock")));
                assert!(matches!(
                    written,
                    Ok(_) | Err(Error::InsideTransaction { .. } | Error::BacklogFull { .. })
                ));
                BUSY.set(false);
            }
            if when.load(Ordering::Relaxed) > 0 && when.fetch_sub(1, Ordering::Relaxed) == 1 {
                std::panic::resume_unwind(Box::new("stopped"));
            }
        });
        let quota = BacklogQuota::events(300).policy(QuotaPolicy::DropExpired);
        let store = Store::builder()
            .clock(clock)
            .backlog_quota(quota)
            .progress_delay(Duration::from_millis(1))
            .open(folder.path().join("a.redb"))
            .unwrap();
        *seen.lock().unwrap() = Some(store.clone());
        for n in 0..200_u64 {
            let written = store.write(move |tx| {
                tx.first_time("scope", n.to_le_bytes())?;
                tx.append(event("one").id(format!("id-{n}")))
            });
            assert!(matches!(written, Ok(_) | Err(Error::BacklogFull { .. })), "{written:?}");
        }
        assert!(store.begin().unwrap().append(event("more")).is_err(), "the quota is reached");
        assert!(looks.load(Ordering::Relaxed) > 200);

        // A commit without an event reads the clock once, at its commit.
        const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("table");
        *seen.lock().unwrap() = None;
        let tx = store.begin().unwrap();
        tx.open_table(TABLE).unwrap().insert(1, 1).unwrap();
        *seen.lock().unwrap() = Some(store.clone());
        panics.store(1, Ordering::Relaxed);
        let failed = tx.commit();
        assert!(
            matches!(failed, Err(Error::Panicked { ref message }) if message == "the clock: stopped"),
            "{failed:?}"
        );
        *seen.lock().unwrap() = None;
        store.write(|tx| Ok(tx.open_table(TABLE)?.insert(2, 2)?.is_none())).unwrap();
        assert_eq!(store.stats().unwrap().poisoned, None);
        assert!(store.read().unwrap().open_table(TABLE).unwrap().get(1).unwrap().is_none());
    });
}

const ROWS: TableDefinition<'_, u64, u64> = TableDefinition::new("rows");

/// Goal: a codec of a captured table and the predicate of `retain` may append, to the log and to a stream. Method: both do; rows,
/// events and revisions are all there, once.
#[test]
fn a_codec_and_a_predicate_that_append() {
    let folder = tempfile::tempdir().unwrap();
    let codec = |change: &Change<'_, u64, u64>| {
        call_back(|tx| audit(tx, "by the codec"));
        Ok(Event::bytes("row", change.operation.name()))
    };
    let builder = Store::builder().capture(Capture::with(ROWS, codec).unpublished());
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    in_transaction(&store, 1, |tx| drop(tx.captured_table(ROWS).unwrap().insert(1, 1).unwrap()));
    in_transaction(&store, 2, |tx| drop(tx.captured_table(ROWS).unwrap().insert(2, 2).unwrap()));
    in_transaction(&store, 9, |tx| {
        let mut rows = tx.captured_table(ROWS).unwrap();
        let keep = |key: u64, _: u64| {
            call_back(|tx| audit(tx, "by the predicate"));
            key > 1
        };
        rows.retain(keep).unwrap();
        assert_eq!(rows.len().unwrap(), 1);
    });
    let rows =
        store.read().unwrap().events(0).unwrap().filter(|it| it.as_ref().unwrap().event_type() == "row");
    assert_eq!(rows.count(), 3);
    // `retain` asks its predicate of all rows before it removes one.
    let expected = ["by the codec", "by the codec", "by the predicate", "by the predicate", "by the codec"];
    assert_eq!(payloads(&store), expected);
}

/// Goal: an upcast may append to the stream that is being read, and its reader goes on as of its own moment. Method: the upcast
/// finds the transaction; the reader shows what stood there when it began.
#[test]
fn an_upcast_that_appends() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().upcast(("old", 1), ("old", 2), |payload| {
        call_back(|tx| audit(tx, "by the upcast"));
        Ok(payload.to_vec())
    });
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let old = || ["1", "2"].map(|text| Event::bytes("old", text).unpublished());
    store.write(move |tx| tx.stream(STREAM).append(old(), ExpectedRevision::NoStream)).unwrap();
    in_transaction(&store, 5, |tx| {
        let read: Vec<_> = tx.stream(STREAM).read().unwrap().events(0).map(|event| event.unwrap()).collect();
        assert_eq!(read.len(), 2);
        assert_eq!(tx.event(0).unwrap().unwrap().payload(), b"1");
    });
    let by_upcast = ["by the upcast"; 3];
    assert_eq!(payloads(&store), [&["1", "2"], &by_upcast[..]].concat());
}

/// Writes when it is dropped.
struct WritesAtEnd(Store, Arc<AtomicU64>);

impl Drop for WritesAtEnd {
    fn drop(&mut self) {
        let writes =
            self.0.write(|tx| tx.stream(STREAM).append([event("at the end")], ExpectedRevision::Any));
        let asynchronous = pollster(
            self.0.write_async(|tx| tx.stream(STREAM).append([event("at the end")], ExpectedRevision::Any)),
        );
        let closed = self.0.clone().close();
        assert!(matches!(closed, Err(Error::InsideTransaction { .. })), "{closed:?}");
        self.1.fetch_add(u64::from(writes.is_ok()) + u64::from(asynchronous.is_ok()), Ordering::SeqCst);
    }
}

/// Waits for a future on this thread.
fn pollster<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// Goal: what a closure captured, or returned to nobody, may write to the store when it is dropped, on the writer thread too; there
/// it must not wait for that very thread. Method: a group of closures that hold such values, again and again.
#[test]
fn a_captured_value_that_writes_when_it_is_dropped() {
    within("a value that writes when it is dropped on the writer thread", || {
        let (_folder, store) = open();
        let ended = Arc::new(AtomicU64::new(0));
        for _ in 0..3 {
            let tx = store.begin().unwrap();
            let (for_queue, ended) = (store.clone(), Arc::clone(&ended));
            let queue = move || {
                (0..4).for_each(|n| {
                    let held = WritesAtEnd(for_queue.clone(), Arc::clone(&ended));
                    let write = for_queue.write_async(move |_| {
                        let _held = &held;
                        if n == 3 { Err(Error::app("on purpose")) } else { Ok(()) }
                    });
                    let mut write = Box::pin(write);
                    assert!(Pin::new(&mut write).poll(&mut Context::from_waker(Waker::noop())).is_pending());
                    // The answer has nobody to go to.
                });
            };
            std::thread::spawn(queue).join().unwrap();
            drop(tx);
            store.write(|_| Ok(())).unwrap();
        }
        // A further write behind the last group: the drops of that are over.
        while ended.load(Ordering::SeqCst) < 24 {
            std::thread::yield_now();
        }
        assert_eq!(payloads(&store).len(), 24);
    });
}

/// A panic whose value panics again.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        std::panic::resume_unwind(Box::new("again"));
    }
}

/// Goal: a panic fails its own closure, whatever its value does when it is dropped. Method: closures, upcasts and codecs that throw a
/// value which panics anew; the store goes on.
#[test]
fn a_panic_whose_value_panics() {
    let folder = tempfile::tempdir().unwrap();
    let bomb = || -> Result<Vec<u8>, onewrite::BoxError> { std::panic::resume_unwind(Box::new(Bomb)) };
    let builder = Store::builder().upcast(("old", 1), ("old", 2), move |_| bomb());
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let reported = store.write(|_| -> Result<()> { std::panic::resume_unwind(Box::new(Bomb)) });
    assert!(matches!(reported, Err(Error::Panicked { .. })), "{reported:?}");
    store.write(|tx| tx.append(Event::bytes("old", "").unpublished())).unwrap();
    assert!(matches!(store.read().unwrap().event(0), Err(Error::Upcast { .. })));
    assert_eq!(store.stats().unwrap().poisoned, None);
}
