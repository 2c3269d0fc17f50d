//! Streams against a model that a page of code can hold, through rollbacks, bulk writes of the index, clean and unclean
//! ends; and what becomes of their records when the log is trimmed or damaged.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{ReadableDatabase, ReadableTable, TableDefinition};
use onewrite::{
    Destination, Error, Event, ExpectedRevision, Result, Snapshot, Store, StreamAppended, Transaction,
};
use proptest::prelude::*;

use crate::scratch::crash_copy;

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn text(n: usize) -> Event {
    Event::bytes("t", n.to_string()).unpublished()
}

fn append(store: &Store, stream: &str, event: Event, expected: ExpectedRevision) -> Result<StreamAppended> {
    let stream = stream.to_owned();
    let write = move |tx: &Transaction| tx.stream(&stream).append([event.clone()], expected);
    store.write(write).map(onewrite::Receipt::into_value)
}

/// Enough events for the index to be written in bulk.
fn fill_in(tx: &Transaction) -> Result<()> {
    (0..crate::support::tuning::DERIVED_FLUSH_EVENTS)
        .try_for_each(|_| tx.append(Event::bytes("f", "").unpublished()).map(drop))
}

#[derive(Debug, Clone, Copy)]
enum Expect {
    Any,
    NoStream,
    Exists,
    /// Relative to what is true: 0 is right.
    Exact(i64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Odd {
    Part,
    More,
    Reversed,
    Elsewhere,
}

#[derive(Debug, Clone)]
enum Op {
    /// To each of these streams so many events, in one transaction, which may fail at its end.
    /// `fills`: with so many others that the index is written in bulk by the same commit.
    Append {
        to: Vec<(usize, usize, Expect)>,
        ids: bool,
        fails: bool,
        fills: bool,
    },
    /// The newest append that succeeded, once more.
    Retry,
    /// The same in another form.
    OddRetry(Odd),
    Truncate(usize, u64),
    Tombstone(usize),
    Fill,
    /// Looked at again at the end.
    Hold,
    Reopen,
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    let expect = prop_oneof![
        3 => Just(Expect::Any),
        1 => Just(Expect::NoStream),
        1 => Just(Expect::Exists),
        4 => prop_oneof![5 => Just(0_i64), 1 => Just(-1), 1 => Just(1)].prop_map(Expect::Exact),
    ];
    let to = prop::collection::vec((0..3_usize, 0..4_usize, expect), 1..3);
    prop_oneof![
        12 => (to, any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.1))
            .prop_map(|(to, ids, fails, fills)| Op::Append { to, ids, fails, fills }),
        3 => Just(Op::Retry),
        2 => prop_oneof![Just(Odd::Part), Just(Odd::More), Just(Odd::Reversed), Just(Odd::Elsewhere)]
            .prop_map(Op::OddRetry),
        2 => (0..3_usize, 0..12_u64).prop_map(|(stream, before)| Op::Truncate(stream, before)),
        1 => (0..3_usize).prop_map(Op::Tombstone),
        2 => Just(Op::Fill),
        2 => Just(Op::Hold),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
    ]
}

#[derive(Debug, Clone, Default, PartialEq)]
struct ModelStream {
    payloads: Vec<usize>,
    first: u64,
    deleted: bool,
}

type Model = BTreeMap<usize, ModelStream>;

impl ModelStream {
    fn revision(&self) -> Option<u64> {
        (self.payloads.len() as u64).checked_sub(1)
    }

    fn expected(&self, expect: Expect) -> ExpectedRevision {
        match expect {
            Expect::Any => ExpectedRevision::Any,
            Expect::NoStream => ExpectedRevision::NoStream,
            Expect::Exists => ExpectedRevision::StreamExists,
            Expect::Exact(by) => match self.payloads.len() as i64 - 1 + by {
                below if below < 0 => ExpectedRevision::NoStream,
                revision => ExpectedRevision::Exact(revision as u64),
            },
        }
    }

    fn takes(&self, expected: ExpectedRevision) -> bool {
        let right = match expected {
            ExpectedRevision::Any => true,
            ExpectedRevision::NoStream => self.payloads.is_empty(),
            ExpectedRevision::StreamExists => !self.payloads.is_empty(),
            ExpectedRevision::Exact(revision) => self.revision() == Some(revision),
        };
        right && !self.deleted
    }
}

fn name(stream: usize) -> String {
    format!("account-{stream}")
}

fn compare(snapshot: &Snapshot, model: &Model) {
    for stream in 0..3 {
        let expected = model.get(&stream).cloned().unwrap_or_default();
        let reader = snapshot.stream(name(stream)).unwrap();
        assert_eq!((reader.revision(), reader.is_deleted()), (expected.revision(), expected.deleted));
        let readable = if expected.deleted { &[] } else { &expected.payloads[expected.first as usize..] };
        for from in [0, expected.first + 1, 1000] {
            let events: Vec<_> = reader.events(from).map(|event| event.unwrap()).collect();
            let skipped = (from.max(expected.first) - expected.first).min(readable.len() as u64) as usize;
            let payloads: Vec<usize> = events
                .iter()
                .map(|event| String::from_utf8_lossy(event.payload()).parse().unwrap())
                .collect();
            assert_eq!(payloads, readable[skipped..], "stream {stream} from {from}");
            let revisions: Vec<_> = events.iter().map(|event| event.revision().unwrap()).collect();
            let first = from.max(expected.first);
            assert_eq!(revisions, (first..first + events.len() as u64).collect::<Vec<_>>());
            let mut backwards: Vec<_> = reader.events(from).rev().map(|event| event.unwrap()).collect();
            backwards.reverse();
            assert_eq!(backwards, events);
        }
    }
}

/// What an append did: who got what, under which expectation.
type Done = Vec<(usize, Vec<Event>, ExpectedRevision, StreamAppended)>;

fn run(ops: &[Op]) {
    let (folder, mut store) = open();
    let mut model = Model::new();
    let mut held: Vec<(Snapshot, Model)> = Vec::new();
    let mut last: Done = Vec::new();
    let mut count = 0;
    for op in ops {
        match op {
            Op::Append { to, ids, fails, fills } => {
                let mut planned = Vec::new();
                let mut next = model.clone();
                let mut good = !fails;
                for (stream, events, expect) in to {
                    let state = next.entry(*stream).or_default();
                    let expected = state.expected(*expect);
                    let numbers: Vec<usize> = (count..count + events).collect();
                    count += events;
                    let events =
                        numbers.iter().map(|n| if *ids { text(*n).id(format!("id-{n}")) } else { text(*n) });
                    planned.push((*stream, events.collect::<Vec<_>>(), expected));
                    good &= state.takes(expected);
                    state.payloads.extend(numbers);
                }
                let (plan, fails, fills) = (planned.clone(), *fails, *fills);
                let written = store.write(move |tx| {
                    let mut done = Vec::new();
                    for (stream, events, expected) in &plan {
                        done.push(tx.stream(name(*stream)).append(events.clone(), *expected)?);
                    }
                    if fills {
                        fill_in(tx)?;
                    }
                    if fails { Err(Error::app("on purpose")) } else { Ok(done) }
                });
                assert_eq!(written.is_ok(), good, "{written:?}");
                if let Ok(done) = written {
                    model = next;
                    last = planned
                        .into_iter()
                        .zip(done.into_value())
                        .map(|((a, b, c), d)| (a, b, c, d))
                        .collect();
                    last.retain(|(_, events, ..)| *ids && !events.is_empty());
                }
            }
            Op::Retry => {
                for (stream, events, expected, first) in &last {
                    let state = &model[stream];
                    let stands = !state.deleted && first.revisions.start >= state.first;
                    // Under the first expectation, under what is true now, and under none.
                    let now = state.expected(Expect::Exact(0));
                    for expected in [*expected, now, ExpectedRevision::Any, ExpectedRevision::NoStream] {
                        let (to, events) = (name(*stream), events.clone());
                        let again = store.write(move |tx| tx.stream(&to).append(events.clone(), expected));
                        if stands {
                            let again = again.unwrap().into_value();
                            assert!(again.repeated);
                            assert_eq!((&again.revisions, &again.seqs), (&first.revisions, &first.seqs));
                        } else {
                            assert!(again.is_err(), "{again:?}");
                        }
                    }
                }
            }
            Op::OddRetry(odd) => {
                for (stream, events, _, first) in &last {
                    let state = &model[stream];
                    let stands = !state.deleted && first.revisions.start >= state.first;
                    let mut sent = events.clone();
                    let to = match odd {
                        Odd::Part => {
                            sent.truncate(sent.len().div_ceil(2));
                            *stream
                        }
                        Odd::More => {
                            sent.push(text(usize::MAX).id("more"));
                            *stream
                        }
                        Odd::Reversed => {
                            sent.reverse();
                            *stream
                        }
                        Odd::Elsewhere => (*stream + 1) % 3,
                    };
                    let good =
                        stands && *odd != Odd::Elsewhere && sent == events[..sent.len().min(events.len())];
                    let (to, events) = (name(to), sent.clone());
                    let again =
                        store.write(move |tx| tx.stream(&to).append(events.clone(), ExpectedRevision::Any));
                    match again {
                        Ok(again) => assert!(good && again.value().repeated, "{odd:?} {again:?}"),
                        Err(Error::StreamDeleted { .. }) => {}
                        // Where the record is gone nobody knows whether the content is another.
                        Err(Error::Conflict { .. }) => assert!(*odd == Odd::Elsewhere && !stands),
                        Err(Error::IdElsewhere { .. }) => assert!(!good, "{odd:?}"),
                        Err(error) => panic!("{odd:?}: {error}"),
                    }
                }
            }
            Op::Truncate(stream, before) => {
                let to = *before;
                let at = name(*stream);
                let truncated = store.write(move |tx| tx.stream(&at).truncate_before(to));
                let state = model.entry(*stream).or_default();
                assert_eq!(truncated.is_err(), state.deleted);
                if !state.deleted {
                    state.first = to.min(state.payloads.len() as u64).max(state.first);
                }
            }
            Op::Tombstone(stream) => {
                let at = name(*stream);
                store.write(move |tx| tx.stream(&at).tombstone()).unwrap();
                let state = model.entry(*stream).or_default();
                (state.deleted, state.first) = (true, state.payloads.len() as u64);
            }
            Op::Fill => drop(store.write(fill_in).unwrap()),
            Op::Hold => held.push((store.read().unwrap(), model.clone())),
            Op::Reopen => {
                held.drain(..).for_each(|(snapshot, model)| compare(&snapshot, &model));
                let path = store.path().to_owned();
                store.close().unwrap();
                store = Store::open(path).unwrap();
            }
            Op::Crash => {
                held.drain(..).for_each(|(snapshot, model)| compare(&snapshot, &model));
                store = Store::open(crash_copy(&store, folder.path())).unwrap();
            }
        }
        compare(&store.read().unwrap(), &model);
    }
    held.iter().for_each(|(snapshot, model)| compare(snapshot, model));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Goal: streams do what the model does. Method: random programs; after each step every stream is read forwards,
    /// backwards and from the middle; snapshots that were held are compared with what was true when they were taken.
    #[test]
    fn streams_are_as_the_model_says(ops in prop::collection::vec(op(), 1..25)) {
        run(&ops);
    }
}

/// Goal: of many writers that expect the same revision one wins, and the others learn what is true. Method: 8 threads
/// deposit 20 times each, with a retry on conflict.
#[test]
fn one_writer_wins_each_revision() {
    let (_folder, store) = open();
    let threads: Vec<_> = (0..8)
        .map(|thread| {
            let store = store.clone();
            std::thread::spawn(move || {
                for n in 0..20 {
                    let mut expected = ExpectedRevision::NoStream;
                    loop {
                        match append(&store, "account-1", text(thread * 100 + n), expected) {
                            Ok(appended) => break assert!(!appended.repeated),
                            Err(Error::WrongRevision { actual: Some(actual), .. }) => {
                                expected = ExpectedRevision::Exact(actual);
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let snapshot = store.read().unwrap();
    let mut payloads: Vec<_> = snapshot
        .stream("account-1")
        .unwrap()
        .events(0)
        .map(|event| event.unwrap().payload().to_vec())
        .collect();
    payloads.sort();
    payloads.dedup();
    assert_eq!(payloads.len(), 160);
}

/// Goal: what cannot be is refused in words. Method: one wrong call after another.
#[test]
fn wrong_calls_are_reported() {
    let (_folder, store) = open();
    append(&store, "account-1", text(1), ExpectedRevision::NoStream).unwrap();
    let reported =
        |stream: &str, expected| append(&store, stream, text(2), expected).unwrap_err().to_string();
    assert_eq!(
        reported("account-1", ExpectedRevision::NoStream),
        "stream `account-1` was expected at no stream, and is at revision 0"
    );
    assert_eq!(
        reported("account-1", ExpectedRevision::Exact(7)),
        "stream `account-1` was expected at revision 7, and is at revision 0"
    );
    assert_eq!(
        reported("account-2", ExpectedRevision::StreamExists),
        "stream `account-2` was expected at a stream that exists, and it has never had an event"
    );
    assert_eq!(
        reported("", ExpectedRevision::Any),
        "the stream's name is 0 bytes long; 1 to 255 are allowed"
    );
    assert!(reported(&"x".repeat(256), ExpectedRevision::Any).contains("256 bytes"));
    assert!(store.read().unwrap().stream("").is_err());
    store.write(|tx| tx.stream("account-1").tombstone()).unwrap();
    assert_eq!(reported("account-1", ExpectedRevision::Any), "stream `account-1` is deleted");
    assert!(store.write(|tx| tx.stream("account-1").truncate_before(0)).is_err());
}

/// Goal: an id that stands elsewhere is no silent success. Method: append an id to one stream, then to another, and with
/// other content at the same place.
#[test]
fn an_id_belongs_to_one_event() {
    let (_folder, store) = open();
    let event = |content: usize| text(content).id("e-1");
    append(&store, "account-1", event(1), ExpectedRevision::Any).unwrap();
    let elsewhere = append(&store, "account-2", event(1), ExpectedRevision::Any);
    assert!(matches!(elsewhere, Err(Error::IdElsewhere { seq: 0, .. })), "{elsewhere:?}");
    let other = append(&store, "account-1", event(2), ExpectedRevision::NoStream);
    assert!(matches!(other, Err(Error::WrongRevision { actual: Some(0), .. })), "{other:?}");
    assert_eq!(store.stats().unwrap().next_seq, 1);

    // An event without an id is never taken for one that stands there, however alike.
    let mixed = |tx: &Transaction| {
        tx.stream("account-3").append([text(1).id("e-2"), text(2)], ExpectedRevision::NoStream)
    };
    store.write(mixed).unwrap();
    assert!(matches!(store.write(mixed), Err(Error::WrongRevision { actual: Some(1), .. })));
}

/// Goal: a closure that fails in a group leaves nothing in a stream that its neighbours append to. Method: three in one
/// group, the second fails after it has appended.
#[test]
fn a_failed_neighbour_leaves_no_revision() {
    let (_folder, store) = open();
    append(&store, "account-1", text(0), ExpectedRevision::Any).unwrap();
    let ((opened, open_it), (entered, is_in)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let gate = std::thread::spawn({
        let store = store.clone();
        move || {
            let exclusive = store.begin().unwrap();
            entered.send(()).unwrap();
            open_it.recv().unwrap();
            exclusive.rollback().unwrap();
        }
    });
    is_in.recv().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let writers: Vec<_> = (1..=3_usize)
        .map(|n| {
            let write = move |tx: &Transaction| {
                tx.stream("account-1").append([text(n)], ExpectedRevision::Any)?;
                tx.stream(format!("new-{n}")).append([text(n)], ExpectedRevision::NoStream)?;
                if n == 2 { Err(Error::app("on purpose")) } else { Ok(()) }
            };
            // Queued in this order: each future is polled before the next is made.
            let mut future = Box::pin(store.write_async(write));
            let waker = std::task::Waker::noop();
            let pending = future.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending();
            assert!(pending);
            let sender = sender.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                sender.send((n, runtime.block_on(future).is_ok())).unwrap();
            })
        })
        .collect();
    opened.send(()).unwrap();
    gate.join().unwrap();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let mut ends: Vec<_> = receiver.try_iter().collect();
    ends.sort_unstable();
    assert_eq!(ends, [(1, true), (2, false), (3, true)]);
    let snapshot = store.read().unwrap();
    let of = |stream: &str| -> Vec<(u64, Vec<u8>)> {
        let events = snapshot.stream(stream).unwrap().events(0).map(|event| event.unwrap());
        events.map(|event| (event.revision().unwrap(), event.payload().to_vec())).collect()
    };
    assert_eq!(of("account-1"), [(0, b"0".to_vec()), (1, b"1".to_vec()), (2, b"3".to_vec())]);
    assert_eq!((of("new-1").len(), of("new-2").len(), of("new-3").len()), (1, 0, 1));
    assert_eq!(append(&store, "account-1", text(4), ExpectedRevision::Exact(2)).unwrap().revisions, 3..4);
}

/// Goal: confirmed events of a stream outlive trimming, are published in order under the stream's name as key, and leave the log
/// once they are truncated; the outbox's own are trimmed as ever. Method: a relay, 600 events of both kinds, then look.
#[test]
fn trimming_keeps_what_streams_want() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .progress_delay(Duration::from_millis(20))
        .stream_destination(|_, event_type| Some(Destination::exchange("", event_type)))
        .open(folder.path().join("a.redb"))
        .unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("t", QueueOptions::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    for n in 0..300_usize {
        let write = move |tx: &Transaction| {
            tx.append(Event::bytes("t", "outbox").to("", "t"))?;
            tx.stream("account-1").append([Event::bytes("t", n.to_string())], ExpectedRevision::Any)
        };
        store.write(write).unwrap();
    }
    let until = |what: &str, holds: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    until("trimmed", &|| store.stats().unwrap().trimmed_to == 600);
    let messages = broker.messages("t");
    assert_eq!(messages.len(), 600);
    let of_stream: Vec<_> = messages.iter().filter(|stored| stored.message.payload != b"outbox").collect();
    assert_eq!(of_stream[7].message.payload, b"7");
    let key = of_stream[7].message.header("cloudEvents_partitionkey");
    assert_eq!(key.and_then(|key| key.as_text()), Some("account-1"));

    let left = || {
        let snapshot = store.read().unwrap();
        (0..600).filter(|seq| snapshot.event(*seq).unwrap().is_some()).count()
    };
    assert_eq!(left(), 300, "the outbox's events are gone, the stream's are there");
    assert_eq!(store.read().unwrap().stream("account-1").unwrap().events(0).count(), 300);
    store.write(|tx| tx.stream("account-1").truncate_before(250)).unwrap();
    assert_eq!(left(), 50);
    store.write(|tx| tx.stream("account-1").tombstone()).unwrap();
    assert_eq!(left(), 0);
    assert!(relay.stop(Duration::from_secs(5)).clean);
}

/// Goal: a snapshot shows a stream as of its own moment, however near a commit or a bulk write it is taken. Method: a writer
/// counts its events in a table and sometimes fills the log; snapshots are taken all the while and compared with that table.
#[test]
fn a_snapshot_is_of_one_moment() {
    const COUNT: TableDefinition<'_, u8, u64> = TableDefinition::new("count");
    let (_folder, store) = open();
    let writer = std::thread::spawn({
        let store = store.clone();
        move || {
            for n in 0..3000_u64 {
                let write = move |tx: &Transaction| {
                    if n % 1000 == 999 {
                        fill_in(tx)?;
                    }
                    tx.open_table(COUNT)?.insert(0, n + 1)?;
                    tx.stream("account-1").append([text(0)], ExpectedRevision::Any)
                };
                store.write(write).unwrap();
            }
        }
    });
    let mut looks = 0;
    while !writer.is_finished() {
        let snapshot = store.read().unwrap();
        let count =
            snapshot.open_table(COUNT).map_or(0, |table| table.get(0).unwrap().map_or(0, |row| row.value()));
        let stream = snapshot.stream("account-1").unwrap();
        assert_eq!(stream.revision().map_or(0, |revision| revision + 1), count);
        assert_eq!(stream.events(count.saturating_sub(3)).filter(Result::is_ok).count() as u64, count.min(3));
        looks += 1;
    }
    writer.join().unwrap();
    assert!(looks > 100, "{looks}");
}

/// Goal: what is deleted leaves nothing in the index but its name, also when it is deleted again. Method: delete one stream whose
/// revisions are in chunks and one whose are in memory, write in bulk, look at the table by plain redb.
#[test]
fn a_deleted_stream_leaves_its_name_alone() {
    let (_folder, store) = open();
    for stream in ["old", "kept"] {
        (0..5).for_each(|n| drop(append(&store, stream, text(n), ExpectedRevision::Any).unwrap()));
    }
    store.write(fill_in).unwrap();
    (0..5).for_each(|n| drop(append(&store, "young", text(n), ExpectedRevision::Any).unwrap()));
    for stream in ["old", "young", "old"] {
        store.write(move |tx| tx.stream(stream).tombstone()).unwrap();
    }
    store.write(|tx| tx.stream("kept").truncate_before(3)).unwrap();
    store.write(fill_in).unwrap();
    let path = store.path().to_owned();
    store.close().unwrap();
    let db = onewrite::redb::Database::open(&path).unwrap();
    let tx = db.begin_read().unwrap();
    let chunks = tx.open_table(TableDefinition::<&[u8], &[u8]>::new("onewrite.chunks")).unwrap();
    let left: Vec<_> = chunks.iter().unwrap().map(|row| row.unwrap().0.value()[1..5].to_vec()).collect();
    assert_eq!(left, [b"kept".to_vec()]);
}

/// Goal: P9 for streams: a damaged record is reported in its place, whether the index knows it from a chunk or is rebuilt over it;
/// its neighbours are read, and revisions go on behind it. Method: flip a byte of one record by plain redb, in a stretch that
/// is in chunks and in one that is not; one whose row is gone too.
#[test]
fn a_damaged_record_is_reported_in_its_place() {
    const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
    const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");
    for (in_chunks, gone) in [(true, false), (false, false), (true, true), (false, true)] {
        let (_folder, store) = open();
        (0..5).for_each(|n| drop(append(&store, "account-1", text(n), ExpectedRevision::Any).unwrap()));
        if in_chunks {
            store.write(fill_in).unwrap();
        }
        let path = store.path().to_owned();
        store.close().unwrap();
        let db = onewrite::redb::Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        {
            let mut log = tx.open_table(LOG).unwrap();
            let mut frame = log.get(2).unwrap().unwrap().value().to_vec();
            let at = frame.len() - 1;
            frame[at] ^= 1;
            if gone {
                log.remove(2).unwrap();
            } else {
                log.insert(2, frame.as_slice()).unwrap();
            }
        }
        tx.commit().unwrap();
        drop(db);

        let store = Store::open(&path).unwrap();
        let appended = append(&store, "account-1", text(5), ExpectedRevision::Exact(4)).unwrap();
        assert_eq!(appended.revisions, 5..6);
        let snapshot = store.read().unwrap();
        let read: Vec<_> = snapshot.stream("account-1").unwrap().events(0).collect();
        let what = format!("in chunks: {in_chunks}, gone: {gone}: {read:?}");
        assert_eq!(read.len(), 6, "{what}");
        for (revision, event) in read.iter().enumerate() {
            match event {
                Ok(event) => {
                    assert_ne!(revision, 2, "{what}");
                    assert_eq!(event.payload(), revision.to_string().as_bytes(), "{what}");
                }
                Err(Error::Corrupt(_) | Error::MissingRevision { revision: 2, .. }) => {
                    assert_eq!(revision, 2, "{what}")
                }
                Err(error) => panic!("{error}: {what}"),
            }
        }
        // Numbers that cannot be rebuilt for certain are not given again under the same epoch.
        drop(snapshot);
        store.close().unwrap();
        let db = onewrite::redb::Database::open(&path).unwrap();
        let meta = db.begin_read().unwrap().open_table(META).unwrap();
        let epoch = meta.get("epoch").unwrap().unwrap().value().to_vec();
        let expected: u64 = if in_chunks { 1 } else { 2 };
        assert_eq!(epoch, expected.to_le_bytes(), "{what}");
    }
}
