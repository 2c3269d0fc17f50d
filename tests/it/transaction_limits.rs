//! P8: what one transaction gathers in memory is bounded, by number and by bytes, through every door; so is a group of them.

use std::pin::Pin;
use std::sync::Barrier;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{ReadableTableMetadata, TableDefinition};
use onewrite::{
    Capture, CaptureMode, Error, Event, ExpectedRevision, Message, Result, Store, StoreBuilder, Transaction,
    WriteFuture,
};

const NEWEST: TableDefinition<'_, u64, u64> = TableDefinition::new("newest");
const EVERY: TableDefinition<'_, u64, u64> = TableDefinition::new("every");
const PLAIN: TableDefinition<'_, u64, u64> = TableDefinition::new("plain");
const MAX: u64 = 100;

fn builder() -> StoreBuilder {
    Store::builder()
        .capture(Capture::json(NEWEST).to("", "q").mode(CaptureMode::NewestValue))
        .capture(Capture::json(EVERY).unpublished())
}

fn limited(folder: &tempfile::TempDir) -> Store {
    builder().transaction_events_max(MAX).open(folder.path().join("a.redb")).unwrap()
}

fn event() -> Event {
    Event::bytes("t", vec![7; 100]).unpublished()
}

fn lane_message(store: &Store, n: u64) -> Message {
    Message { message_id: Some(format!("{}-{n}", store.id()).into()), ..Message::default() }
}

type Door = (&'static str, fn(&Transaction, u64) -> Result<()>);

/// Each does something for the `n`th time.
const DOORS: [Door; 9] = [
    ("append", |tx, _| tx.append(event()).map(drop)),
    ("append with an id", |tx, n| tx.append(event().id(format!("id-{n}"))).map(drop)),
    ("append what is there", |tx, _| tx.append(event().id("the same")).map(drop)),
    ("stream", |tx, n| tx.stream(format!("s-{n}")).append([event()], ExpectedRevision::Any).map(drop)),
    ("tombstone", |tx, n| tx.stream(format!("s-{n}")).tombstone()),
    ("first_time", |tx, n| tx.first_time("scope", n.to_be_bytes()).map(drop)),
    ("first_delivery", |tx, n| {
        let message = Message { message_id: Some(format!("m-{n}").into()), ..Message::default() };
        tx.first_delivery("scope", &message).map(drop)
    }),
    ("every change", |tx, n| tx.captured_table(EVERY)?.insert(n, n).map(drop)),
    ("newest value", |tx, n| tx.captured_table(NEWEST)?.insert(n, n).map(drop)),
];

fn is_too_large<T: std::fmt::Debug>(what: &str, result: Result<T>) {
    match result {
        Err(error @ Error::TransactionTooLarge { events_max: MAX, .. }) => {
            let text = error.to_string();
            assert!(text.contains("`transaction_events_max` allows 100"), "{what}: {text}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

/// Nothing has been written, and the store is as good as before.
fn is_untouched(what: &str, store: &Store) {
    let stats = store.stats().unwrap();
    assert_eq!((stats.next_seq, stats.captures["newest"].waiting), (0, 0), "{what}: {stats:?}");
    let first = store.write(|tx| {
        let rows = tx.captured_table(EVERY)?.len()?
            + tx.captured_table(NEWEST)?.len()?
            + tx.open_table(PLAIN)?.len()?;
        Ok((rows, tx.first_time("scope", 0_u64.to_be_bytes())?))
    });
    assert_eq!(*first.unwrap().value(), (0, true), "{what}");
}

/// Goal: no call lets one write gather more than its limit; what it has done already is undone, in its tables too. Method: each call
/// once more than the limit, from a closure, and from an exclusive transaction.
#[test]
fn no_door_lets_a_write_beyond_its_limit() {
    for (name, door) in DOORS {
        let folder = tempfile::tempdir().unwrap();
        let store = limited(&folder);
        let all = move |tx: &Transaction| {
            tx.open_table(PLAIN)?.insert(1, 1)?;
            (0..=MAX).try_for_each(|n| door(tx, n))
        };
        is_too_large(name, store.write(all));
        is_too_large(name, store.write_once("request", all));
        let tx = store.begin().unwrap();
        is_too_large(name, all(&tx));
        is_too_large(name, tx.commit());
        is_untouched(name, &store);
        // As many as the limit says are fine; "what is there" stands once.
        store.write(move |tx| (0..MAX).try_for_each(|n| door(tx, n + 1))).unwrap();
    }
}

/// Goal: a closure that makes nothing of the error writes nothing all the same. Method: as above, with each error thrown away.
#[test]
fn an_ignored_limit_fails_the_write() {
    for (name, door) in DOORS {
        let folder = tempfile::tempdir().unwrap();
        let store = limited(&folder);
        let all = move |tx: &Transaction| {
            (0..2 * MAX).for_each(|n| drop(door(tx, n)));
            Ok(())
        };
        is_too_large(name, store.write(all));
        let tx = store.begin().unwrap();
        all(&tx).unwrap();
        is_too_large(name, tx.commit());
        is_untouched(name, &store);
    }
}

/// Goal: an iterator without an end ends in the error, and what it has yielded is not kept. Method: endless events for a stream; how many
/// were asked for is counted. Large events meet the limit on bytes.
#[test]
fn an_endless_iterator_ends_in_the_error() {
    let folder = tempfile::tempdir().unwrap();
    let store = builder().transaction_events_max(MAX).transaction_bytes_max(1 << 20);
    let store = store.open(folder.path().join("a.redb")).unwrap();
    for (bytes, events_max) in [(10, MAX + 1), (100_000, 12)] {
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counted = std::sync::Arc::clone(&asked);
        let refused = store.write(move |tx| {
            let events = std::iter::repeat_with(|| {
                counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                Event::bytes("t", vec![7; bytes]).id("the same").unpublished()
            });
            tx.stream("s").append(events, ExpectedRevision::Any)
        });
        is_too_large("endless", refused);
        assert!(asked.load(std::sync::atomic::Ordering::SeqCst) <= events_max);
    }
    is_untouched("endless", &store);
}

/// Goal: what one call does to many rows of a captured table is bounded too. Method: a table larger than the limit, filled in several
/// writes, is emptied at once; in steps it can be.
#[test]
fn emptying_a_large_captured_table_is_bounded() {
    for table in [EVERY, NEWEST] {
        let folder = tempfile::tempdir().unwrap();
        let store = limited(&folder);
        for part in 0..3 {
            let fill = move |tx: &Transaction| {
                let mut table = tx.captured_table(table)?;
                (part * MAX..(part + 1) * MAX).try_for_each(|n| table.insert(n, n).map(drop))
            };
            store.write(fill).unwrap();
        }
        let before = store.stats().unwrap();
        is_too_large("retain", store.write(move |tx| tx.captured_table(table)?.retain(|_, _| false)));
        is_too_large("clear", store.write(move |tx| tx.captured_table(table)?.clear()));
        let after = store.stats().unwrap();
        assert_eq!((before.next_seq, before.captures), (after.next_seq, after.captures));
        for part in 0..3 {
            let step = move |tx: &Transaction| tx.captured_table(table)?.retain(|key, _| key / MAX != part);
            store.write(step).unwrap();
        }
        assert!(store.write(move |tx| tx.captured_table(table)?.is_empty()).unwrap().into_value());
    }
}

/// Queues writes while a transaction of another thread keeps them waiting.
fn queue_all<T>(store: &Store, writes: &mut [WriteFuture<T>]) {
    let (begun, queued) = (Barrier::new(2), Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let tx = store.begin().unwrap();
            begun.wait();
            queued.wait();
            tx.rollback().unwrap();
        });
        begun.wait();
        for write in writes {
            let polled = Pin::new(write).poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_pending());
        }
        queued.wait();
    });
}

/// Goal: a group of writes ends once it has gathered as much as one write may. Method: ten writes of 60 events wait for one transaction;
/// then commits are counted. Large ones meet the limit on bytes.
#[test]
fn a_group_does_not_multiply_the_limit() {
    for (events, bytes) in [(60, 10), (6, 100_000)] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::builder().transaction_events_max(MAX).transaction_bytes_max(1_000_000);
        let store = store.open(folder.path().join("a.redb")).unwrap();
        let write = || {
            store.write_async(move |tx| {
                let event = || Event::bytes("t", vec![7; bytes]).unpublished();
                (0..events).try_for_each(|_| tx.append(event()).map(drop))
            })
        };
        let mut writes: Vec<_> = (0..10).map(|_| write()).collect();
        queue_all(&store, &mut writes);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let firsts: Vec<_> =
            writes.into_iter().map(|write| runtime.block_on(write).unwrap().seqs()[0]).collect();
        assert_eq!(
            firsts,
            (0..10).map(|n| n * events).collect::<Vec<_>>(),
            "in the order in which they came"
        );
        let stats = store.stats().unwrap();
        assert!((5..=10).contains(&stats.commits), "{stats:?}");
        assert_eq!(stats.writes, 10);
    }
}

/// Goal: of a group, the write that goes beyond its limit fails alone, also where it has written a table. Method: good writes around it wait
/// for one transaction with it.
#[test]
fn a_write_that_is_too_large_hurts_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let store = limited(&folder);
    let write = |events: u64| {
        store.write_async(move |tx| {
            tx.open_table(PLAIN)?.insert(events, events)?;
            (0..events).try_for_each(|_| tx.append(event()).map(drop))
        })
    };
    let mut writes: Vec<_> = [1, MAX + 1, 2].map(write).into_iter().collect();
    queue_all(&store, &mut writes);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut answers = writes.into_iter().map(|write| runtime.block_on(write));
    assert_eq!(answers.next().unwrap().unwrap().seqs(), [0]);
    is_too_large("group", answers.next().unwrap());
    assert_eq!(answers.next().unwrap().unwrap().seqs(), [1, 2]);
    let rows = store.write(|tx| Ok(tx.open_table(PLAIN)?.len()?)).unwrap().into_value();
    assert_eq!(rows, 2);
}

/// Goal: a consumer's handler has the limit too: its delivery is tried again and then rejected, and nothing of it is written. Method:
/// a handler that appends without end.
#[test]
fn a_consumer_s_handler_has_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let store = limited(&folder);
    let broker = MemoryBroker::new();
    broker.declare_queue("in", QueueOptions::default());
    let consumer = store
        .consumer("scope")
        .backoff(Duration::from_millis(1), Duration::from_millis(1))
        .spawn(broker.source("in"), |_, tx| {
            loop {
                tx.append(event())?;
            }
        })
        .unwrap();
    broker.publish("", "in", lane_message(&store, 1)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while store.stats().unwrap().rejected.values().sum::<u64>() == 0 {
        assert!(Instant::now() < deadline, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    consumer.stop(Duration::from_secs(10));
    let rejected: Vec<_> = store.rejected("scope").list(None, 10).unwrap();
    assert!(format!("{rejected:?}").contains("transaction_events_max"), "{rejected:?}");
    assert_eq!(store.stats().unwrap().next_seq, 0);
}

/// Goal: what the library does of itself has bounds of its own, whatever the limit: passes of captured tables go on. Method: more
/// dirty keys than the limit, and a relay that asks for passes.
#[test]
fn passes_of_captured_tables_go_on_below_any_limit() {
    let folder = tempfile::tempdir().unwrap();
    let store = builder().transaction_events_max(2).open(folder.path().join("a.redb")).unwrap();
    for n in 0..20 {
        store.write(move |tx| tx.captured_table(NEWEST)?.insert(n, n).map(drop)).unwrap();
    }
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while broker.queue_len("q") < 20 {
        assert!(Instant::now() < deadline, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    relay.stop(Duration::from_secs(10));
}
