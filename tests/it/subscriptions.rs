//! Subscriptions: every durable event once, in order, and nothing before it is durable.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use onewrite::broker::MemoryBroker;
use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::{Error, Event, EventFilter, ExpectedRevision, Store};

const TIMEOUT: Duration = Duration::from_secs(20);

fn append(store: &Store, n: u64) {
    store
        .write(move |tx| tx.append(Event::bytes("counted", n.to_le_bytes()).unpublished()).map(drop))
        .unwrap();
}

fn number(event: &onewrite::RecordedEvent) -> u64 {
    u64::from_le_bytes(event.payload().try_into().unwrap())
}

/// Goal: catching up and following are seamless. Method: 2,000 events before, 2,000 from four threads while it reads, one in
/// the middle of a long catching up.
#[test]
fn all_events_once_in_order_before_and_after() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let many = |store: &Store, from: u64| {
        store
            .write(move |tx| {
                (from..from + 100).try_for_each(|n| {
                    tx.append(Event::bytes("counted", n.to_le_bytes()).unpublished()).map(drop)
                })
            })
            .unwrap();
    };
    (0..20).for_each(|n| many(&store, n * 100));
    let subscription = store.subscribe(5).unwrap();
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let store = store.clone();
            std::thread::spawn(move || (0..5).for_each(|n| many(&store, 10_000 + writer * 1000 + n * 100)))
        })
        .collect();
    for (expected, event) in (5..).zip(subscription.take(3995)) {
        assert_eq!(event.unwrap().seq(), expected);
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert_eq!(store.stats().unwrap().next_seq, 4000);
}

/// Goal: nothing is shown that is not durable. Method: a transaction that is held open, and then rolled back.
#[test]
fn nothing_is_shown_early() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let mut subscription = store.subscribe(0).unwrap();
    let tx = store.begin().unwrap();
    tx.append(Event::bytes("never", "").unpublished()).unwrap();
    assert!(subscription.next_timeout(Duration::from_millis(50)).is_none());
    tx.rollback().unwrap();
    append(&store, 1);
    assert_eq!(subscription.next_timeout(TIMEOUT).unwrap().unwrap().event_type(), "counted");
}

struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Goal: as a stream it is woken by a commit, is not lost between two polls, and needs no runtime. Method: poll by hand.
#[test]
fn as_a_stream_it_is_woken_by_a_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let mut subscription = store.subscribe(0).unwrap().into_stream();
    let count = Arc::new(Count(AtomicU64::new(0)));
    let waker = Waker::from(Arc::clone(&count));
    let mut context = Context::from_waker(&waker);
    let mut poll = || Pin::new(&mut subscription).poll_next_unpin(&mut context);
    assert!(poll().is_pending());
    assert_eq!(count.0.load(Ordering::SeqCst), 0);
    append(&store, 7);
    assert!(
        count.0.load(Ordering::SeqCst) >= 1,
        "the commit wakes the task before it is reported to its writer"
    );
    let Poll::Ready(Some(Ok(event))) = poll() else { panic!("it is there") };
    assert_eq!(number(&event), 7);
    append(&store, 8);
    let Poll::Ready(Some(Ok(event))) = poll() else { panic!("it came while nobody waited") };
    assert_eq!(number(&event), 8);
    assert!(poll().is_pending());
}

/// Goal: a filter by stream, category and type. Method: three streams, two types.
#[test]
fn only_what_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    for (stream, event_type) in
        [("a-1", "x"), ("a-2", "y"), ("b-1", "x"), ("a-1", "y"), ("c", "x"), ("b-1", "z")]
    {
        store
            .write(move |tx| tx.stream(stream).append([Event::bytes(event_type, "")], ExpectedRevision::Any))
            .unwrap();
    }
    append(&store, 0);
    let seqs = |filter: EventFilter| {
        let mut subscription = store.subscribe(0).unwrap().filter_events(filter);
        std::iter::from_fn(|| subscription.try_next()).map(|event| event.unwrap().seq()).collect::<Vec<_>>()
    };
    assert_eq!(seqs(EventFilter::all()), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(seqs(EventFilter::all().category("a")), [0, 1, 3]);
    assert_eq!(seqs(EventFilter::all().category("c")), [4], "a stream without a dash is its own category");
    assert_eq!(seqs(EventFilter::all().stream("a-1").category("b")), [0, 2, 3, 5]);
    assert_eq!(seqs(EventFilter::all().event_type("x").category("a").category("b")), [0, 2]);
    assert_eq!(seqs(EventFilter::all().event_type("x").event_type("z")), [0, 2, 4, 5]);
}

/// Goal: what a subscriber has not seen is not trimmed under it, and is once it has gone. Method: a relay that confirms
/// everything, and a subscriber that reads half.
#[test]
fn the_log_waits_for_a_subscriber() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        Store::builder().progress_delay(Duration::from_millis(5)).open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let mut subscription = store.subscribe(0).unwrap();
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let publish = |n: u64| {
        store
            .write(move |tx| tx.append(Event::bytes("counted", n.to_le_bytes()).to("", "q")).map(drop))
            .unwrap()
    };
    (0..1200).for_each(|n| drop(publish(n)));
    for n in 0..600 {
        assert_eq!(number(&subscription.next().unwrap().unwrap()), n);
    }
    let end = Instant::now() + TIMEOUT;
    while store.stats().unwrap().backlog_events > 0 || store.stats().unwrap().trimmed_to < 512 {
        publish(0);
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    publish(0);
    assert!(store.stats().unwrap().trimmed_to <= 600, "{:?}", store.stats());
    for n in 600..1200 {
        assert_eq!(number(&subscription.next().unwrap().unwrap()), n);
    }
    drop(subscription);
    while store.stats().unwrap().trimmed_to < 1200 {
        publish(0);
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    relay.stop(TIMEOUT);
}

/// Goal: damage is reported in its place, once, and the rest follows; the end of the store is reported, once, also to one that
/// waits. Method: flip a byte by plain redb; close the store under a reader.
#[test]
fn damage_and_the_end_are_reported() {
    const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    (0..3).for_each(|n| append(&store, n));
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    for seq in [1, 2] {
        let mut frame = tx.open_table(LOG).unwrap().get(seq).unwrap().unwrap().value().to_vec();
        *frame.last_mut().unwrap() ^= 1;
        tx.open_table(LOG).unwrap().insert(seq, frame.as_slice()).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    let mut subscription = store.subscribe(0).unwrap();
    assert_eq!(subscription.try_next().unwrap().unwrap().seq(), 0);
    assert!(matches!(subscription.try_next(), Some(Err(Error::Corrupt(error))) if error.seq == 1));
    assert!(matches!(subscription.try_next(), Some(Err(Error::Corrupt(error))) if error.seq == 2));
    assert!(subscription.try_next().is_none());
    append(&store, 3);
    assert_eq!(subscription.try_next().unwrap().unwrap().seq(), 3);
    let reader = std::thread::spawn(move || (subscription.next(), subscription.next().is_none()));
    std::thread::sleep(Duration::from_millis(50));
    store.close().unwrap();
    let (last, then_nothing) = reader.join().unwrap();
    assert!(matches!(last, Some(Err(Error::Closed { .. }))), "{last:?}");
    assert!(then_nothing);
}

/// Goal: a wait keeps its time also over a long stretch that the filter takes nothing of. Method: 50,000 events, 10 ms.
#[test]
fn a_wait_keeps_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    for _ in 0..50 {
        let many = |tx: &onewrite::Transaction| {
            (0..1000).try_for_each(|_| tx.append(Event::bytes("counted", "").unpublished()).map(drop))
        };
        store.write(many).unwrap();
    }
    let mut subscription = store.subscribe(0).unwrap().filter_events(EventFilter::all().event_type("other"));
    assert!(subscription.next_timeout(Duration::from_millis(10)).is_none());
    assert!(subscription.position() < 50_000, "it has looked at all of it");
    assert!(subscription.try_next().is_none());
    assert_eq!(subscription.position(), 50_000, "there is nothing for it in the log");
}
