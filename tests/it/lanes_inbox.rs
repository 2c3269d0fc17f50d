//! The reading side by lanes, against a model that remembers everything, and through a broker that repeats, reorders and
//! loses: promise P6 without an expiry.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{
    Delivery, MemoryBroker, QueueOptions, Rule, Settlement, Source, SourceEvent, SourceEvents, Verdict,
};
use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::time::ManualClock;
use onewrite::{
    Consumer, ConsumerBuilder, Error, Event, GapPolicy, HeaderValue, IdsPolicy, Message, QuarantinePolicy,
    RejectTo, Result, Store, Transaction, wire,
};
use proptest::prelude::*;

use crate::scratch::{Random, crash_copy};

pub(crate) const SOON: Duration = Duration::from_secs(60);
/// How often each message took effect, by payload.
const EFFECTS: TableDefinition<'_, &[u8], u64> = TableDefinition::new("effects");
const DEDUP: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.seen");
const INBOX: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.inbox");
/// A store that exists only in headers.
pub(crate) const BANK: &str = "018f0000-0000-7000-8000-00000000000b";

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn setup() -> (tempfile::TempDir, Store, MemoryBroker) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    (folder, store, broker)
}

pub(crate) fn quick(store: &Store) -> ConsumerBuilder {
    store.consumer("service").backoff(Duration::from_millis(2), Duration::from_millis(10))
}

/// A message that carries a lane of [`BANK`].
pub(crate) fn numbered(lane: i64, number: i64, payload: &str) -> Message {
    let header = |name: &'static str, value: HeaderValue| (name.into(), value);
    Message {
        message_id: Some(format!("{lane}-{number}-{payload}").into()),
        timestamp_s: Some(1_700_000_000),
        headers: vec![
            header(wire::STORE, BANK.into()),
            header(wire::EPOCH, 1.into()),
            header(wire::LANE, lane.into()),
            header(wire::LANE_NUMBER, number.into()),
        ],
        payload: payload.as_bytes().to_vec(),
        ..Message::default()
    }
}

pub(crate) fn set(message: &mut Message, name: &str, value: impl Into<HeaderValue>) {
    let value = value.into();
    message.headers.retain(|(header, _)| header != name);
    message.headers.push((name.to_owned().into(), value));
}

pub(crate) fn send(broker: &MemoryBroker, message: Message) {
    broker.publish("", "q", message).unwrap();
}

pub(crate) fn count(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let mut effects = tx.open_table(EFFECTS)?;
    let payload = delivery.message.payload.as_slice();
    let before = effects.get(payload)?.map_or(0, |row| row.value());
    effects.insert(payload, before + 1)?;
    Ok(())
}

pub(crate) fn effects(store: &Store) -> BTreeMap<String, u64> {
    let snapshot = store.read().unwrap();
    let Ok(table) = snapshot.open_table(EFFECTS) else { return BTreeMap::new() };
    let rows = table.iter().unwrap().map(|row| row.unwrap());
    rows.map(|(payload, n)| (String::from_utf8_lossy(payload.value()).into_owned(), n.value())).collect()
}

/// Each of these took effect once, and nothing else did.
pub(crate) fn once_each(store: &Store, expected: impl IntoIterator<Item = String>) {
    let expected: BTreeMap<_, _> = expected.into_iter().map(|payload| (payload, 1)).collect();
    let effects = effects(store);
    if effects != expected {
        let wrong: Vec<_> =
            effects.iter().filter(|(payload, n)| expected.get(*payload) != Some(n)).take(5).collect();
        let lost: Vec<_> =
            expected.keys().filter(|payload| !effects.contains_key(*payload)).take(5).collect();
        panic!("wrong: {wrong:?}, lost: {lost:?}");
    }
}

/// Rows of a table, and their bytes.
fn rows(store: &Store, table: TableDefinition<'static, &'static [u8], &'static [u8]>) -> (usize, usize) {
    let table = store.read().unwrap().open_table(table).unwrap();
    let rows = table.iter().unwrap().map(|row| row.unwrap());
    rows.fold((0, 0), |(n, bytes), (key, row)| (n + 1, bytes + key.value().len() + row.value().len()))
}

pub(crate) fn drained(broker: &MemoryBroker) -> bool {
    broker.queue_len("q") == 0 && broker.unsettled_len("q") == 0
}

pub(crate) fn stop(consumer: Consumer) {
    assert_eq!(consumer.stop(SOON).failed, None);
}

// --- against a model ------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy)]
struct Arrives {
    scope: u8,
    lane: i64,
    number: i64,
    content: u8,
    /// The application writes a table too, before or after the id; then the closure ends so.
    writes_before: bool,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Good,
    Fails,
    Panics,
}

#[derive(Debug, Clone)]
enum Op {
    /// Each in a transaction of its own.
    One(Arrives),
    /// All in one exclusive transaction, which is rolled back if any of them ends badly.
    Together(Vec<Arrives>),
    /// Queued together, so that they share a group.
    Group(Vec<Arrives>),
    Reopen,
    Crash,
}

fn arrives() -> impl Strategy<Value = Arrives> {
    let end = prop_oneof![6 => Just(End::Good), 1 => Just(End::Fails), 1 => Just(End::Panics)];
    (0..2_u8, 0..2_i64, 0..40_i64, 0..2_u8, any::<bool>(), end).prop_map(
        |(scope, lane, number, content, writes_before, end)| Arrives {
            scope,
            lane,
            number,
            content,
            writes_before,
            end,
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => arrives().prop_map(Op::One),
        2 => prop::collection::vec(arrives(), 1..8).prop_map(Op::Together),
        4 => prop::collection::vec(arrives(), 2..12).prop_map(Op::Group),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
    ]
}

fn scope_of(arrives: Arrives) -> &'static str {
    if arrives.scope == 0 { "a" } else { "scope-b" }
}

fn take(tx: &Transaction, arrives: Arrives) -> Result<&'static str> {
    let message = numbered(arrives.lane, arrives.number, if arrives.content == 0 { "x" } else { "y" });
    let effect = |tx: &Transaction| -> Result<()> {
        let key = [arrives.scope, arrives.lane as u8, arrives.number as u8];
        let mut effects = tx.open_table(EFFECTS)?;
        let before = effects.get(&key[..])?.map_or(0, |row| row.value());
        effects.insert(&key[..], before + 1)?;
        Ok(())
    };
    let word = match tx.first_delivery(scope_of(arrives), &message) {
        Ok(true) => {
            if arrives.writes_before {
                effect(tx)?;
            }
            "first"
        }
        Ok(false) => "repeat",
        Err(Error::LaneConflict { .. }) => "conflict",
        Err(error) => return Err(error),
    };
    match arrives.end {
        End::Good => Ok(word),
        End::Fails => Err(Error::app("fails")),
        End::Panics => std::panic::resume_unwind(Box::new("panics")),
    }
}

/// Remembers every message that was seen: by scope and lane, which content each number had.
#[derive(Default, Clone)]
struct Model(HashMap<(u8, i64), HashMap<i64, u8>>);

impl Model {
    fn take(&mut self, arrives: Arrives) -> std::result::Result<&'static str, ()> {
        if arrives.end != End::Good {
            return Err(());
        }
        let seen = self.0.entry((arrives.scope, arrives.lane)).or_default();
        Ok(match seen.get(&arrives.number) {
            None => {
                seen.insert(arrives.number, arrives.content);
                "first"
            }
            Some(content) if *content != arrives.content => "conflict",
            Some(_) => "repeat",
        })
    }

    /// One row per lane, one per run of numbers below the newest that were not seen, and one of hashes once 32 have come.
    fn rows(&self) -> usize {
        let of_lane = |seen: &HashMap<i64, u8>| {
            let next = seen.keys().max().map_or(0, |number| number + 1);
            let gaps = (0..next)
                .filter(|n| !seen.contains_key(n) && (*n == 0 || seen.contains_key(&(n - 1))))
                .count();
            1 + gaps + usize::from(seen.len() >= 32)
        };
        self.0.values().filter(|seen| !seen.is_empty()).map(of_lane).sum()
    }
}

struct Real {
    folder: tempfile::TempDir,
    store: Option<Store>,
}

impl Real {
    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn group(&self, all: &[Arrives]) -> Vec<std::result::Result<&'static str, ()>> {
        let hold = self.store().begin().unwrap();
        let store = self.store().clone();
        let all = all.to_vec();
        let writers = std::thread::spawn(move || {
            let mut futures = Vec::new();
            for arrives in all {
                let mut future = Box::pin(store.write_async(move |tx| take(tx, arrives)));
                let waker = std::task::Waker::noop();
                assert!(future.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
                futures.push(future);
            }
            futures
        });
        let futures = writers.join().unwrap();
        drop(hold);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut answers = Vec::new();
        for future in futures {
            answers.push(runtime.block_on(future).map(onewrite::Receipt::into_value).map_err(|_| ()));
        }
        answers
    }

    fn reopen(&mut self, crash: bool) {
        let store = self.store.take().unwrap();
        let path: PathBuf = if crash {
            crash_copy(&store, self.folder.path())
        } else {
            let path = store.path().to_owned();
            store.close().unwrap();
            path
        };
        self.store = Some(Store::open(path).unwrap());
    }
}

fn play(ops: &[Op]) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().cache_bytes(1 << 20).open(folder.path().join("a.redb")).unwrap();
    let mut real = Real { folder, store: Some(store) };
    let mut model = Model::default();
    for op in ops {
        match op.clone() {
            Op::One(arrives) => {
                let written = real.store().write(move |tx| take(tx, arrives));
                let answer = written.map(onewrite::Receipt::into_value).map_err(|_| ());
                assert_eq!(answer, model.take(arrives), "{op:?}");
            }
            Op::Together(all) => {
                let mut after = model.clone();
                let expected: std::result::Result<Vec<_>, ()> =
                    all.iter().map(|one| after.take(*one)).collect();
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let tx = real.store().begin().unwrap();
                    let words: std::result::Result<Vec<_>, ()> =
                        all.iter().map(|one| take(&tx, *one).map_err(|_| ())).collect();
                    if words.is_ok() {
                        tx.commit().unwrap();
                    }
                    words
                }));
                let words = outcome.unwrap_or(Err(()));
                assert_eq!(words, expected, "{op:?}");
                if words.is_ok() {
                    model = after;
                }
            }
            Op::Group(all) => {
                let expected: Vec<_> = all.iter().map(|one| model.take(*one)).collect();
                assert_eq!(real.group(&all), expected, "{op:?}");
            }
            Op::Reopen => real.reopen(false),
            Op::Crash => real.reopen(true),
        }
    }
    real.reopen(true);
    assert_eq!(rows(real.store(), DEDUP).0, model.rows());
    let snapshot = real.store().read().unwrap();
    if let Ok(effects) = snapshot.open_table(EFFECTS) {
        for row in effects.iter().unwrap() {
            let (key, times) = row.unwrap();
            assert_eq!(times.value(), 1, "{:?} took effect twice", key.value());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: lanes are seen as somebody sees them who remembers everything, whatever fails, is rolled back or crashes, and take
    /// one row each, one per open gap, and one for the hashes that the first has no room for. Method: the same program of arrivals on the store and on the model; every answer is
    /// the same, and after an unclean end so is the number of rows; no effect came twice.
    #[test]
    fn the_store_sees_what_a_perfect_memory_sees(ops in prop::collection::vec(op(), 1..24)) {
        play(&ops);
    }
}

// --- through a broker that does everything wrong ---------------------------------------------------------------------

/// Takes every message of the queue `raw` and hands it to `q`: now and then twice, in another order, or after it was lost
/// for a long while. Returns how many it handed over.
fn wreak_havoc(broker: &MemoryBroker, events: u64, deliveries: u64, seed: u64) -> u64 {
    let mut random = Random(seed);
    let (sender, received) = SourceEvents::channel();
    let mut source = broker.source("raw");
    source.start(sender, 1000).unwrap();
    let (mut buffer, mut lost, mut old) = (Vec::new(), Vec::new(), Vec::new());
    let (mut taken, mut sent) = (0, 0);
    let mut pass = |message: Message| {
        sent += 1;
        send(broker, message);
    };
    while taken < events {
        let SourceEvent::Delivery(delivery) = received.recv().unwrap() else { continue };
        source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
        taken += 1;
        match random.below(20) {
            0 => lost.push(delivery.message),
            _ => buffer.push(delivery.message),
        }
        if buffer.len() >= 64 {
            let at = random.below(buffer.len() as u64) as usize;
            let message = buffer.swap_remove(at);
            if random.below(4) == 0 {
                pass(message.clone());
                old.push(message.clone());
            }
            pass(message);
        }
        // What was lost is delivered again, long after; and a ghost of something older still.
        if random.below(40) == 0 && !lost.is_empty() {
            let at = random.below(lost.len() as u64) as usize;
            pass(lost.swap_remove(at));
            if let Some(ghost) = old.get(random.below(old.len().max(1) as u64) as usize) {
                pass(ghost.clone());
            }
        }
    }
    buffer.into_iter().chain(lost).for_each(&mut pass);
    // Ghosts, until there were as many deliveries as asked for.
    for _ in sent..deliveries {
        send(broker, old[random.below(old.len() as u64) as usize].clone());
    }
    sent.max(deliveries)
}

/// P6. Goal: 100,000 deliveries with repeats, reorderings and losses in between: each event takes effect once, none is lost,
/// and the inbox has one row per lane at the end, beside the hashes of what it has seen. Method: a real relay, a queue whose messages somebody hands on wrongly, a
/// real consumer; the consumer's own table is the evidence. The rows and bytes are printed.
#[test]
fn a_hundred_thousand_deliveries() {
    const EVENTS: u64 = 75_000;
    const DELIVERIES: u64 = 100_000;
    const KEYS: u64 = 50;
    let (folder, credit, broker) = setup();
    broker.declare_queue("raw", QueueOptions::default());
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    let relay = bank.relay("rabbit").window_events(2048).spawn(broker.publisher()).unwrap();
    let consumer = quick(&credit).spawn(broker.source("q"), count).unwrap();
    let appender = std::thread::spawn(move || {
        for first in (0..EVENTS).step_by(250) {
            bank.write(move |tx| {
                for n in first..first + 250 {
                    let event = Event::bytes("paid", n.to_string().into_bytes()).to("", "raw");
                    // One in 51 has no key; they are a lane too.
                    tx.append(if n % (KEYS + 1) == 0 { event } else { event.key(format!("k{}", n % KEYS)) })?;
                }
                Ok(())
            })
            .unwrap();
        }
        bank
    });
    let sent = wreak_havoc(&broker, EVENTS, DELIVERIES, 0x0e17);
    let mut rows_max = 0;
    until("an empty queue", || {
        let (n, _) = rows(&credit, DEDUP);
        rows_max = rows_max.max(n);
        drained(&broker)
    });
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.rejected, stats.conflicts), (EVENTS, 0, 0), "{stats:?}");
    assert_eq!(stats.applied + stats.repeated, sent);
    once_each(&credit, (0..EVENTS).map(|n| n.to_string()));
    let (seen, bytes) = rows(&credit, DEDUP);
    // Each lane has its numbers from 0 on: once no gap is open, its high-water row, and a row for each 64 that has no room there.
    let events_of = |key: u64| (0..EVENTS).filter(|n| n % (KEYS + 1) != 0 && n % KEYS == key).count() as u64;
    let without_key = (0..EVENTS).filter(|n| n % (KEYS + 1) == 0).count() as u64;
    let chunks = |events: u64| (events.saturating_sub(31).div_ceil(64), events.div_ceil(64));
    let bounds = (0..KEYS).map(events_of).chain([without_key]).map(chunks);
    let (least, most) = bounds.fold((0, 0), |(least, most), (a, b)| (least + 1 + a, most + 1 + b));
    assert!((least..=most).contains(&(seen as u64)), "{seen} rows, not {least} to {most}: no gap is open");
    assert_eq!(rows(&credit, INBOX).0, 0, "no id is kept of a message that has a lane");
    eprintln!(
        "{sent} deliveries of {EVENTS} events: {seen} rows of {bytes} bytes, {rows_max} rows at most while looking"
    );
    stop(consumer);
    let bank = appender.join().unwrap();
    let _ = relay.stop(SOON);
    drop(bank);
}

/// Two services read one queue, each into its own store. Each event takes effect at one of them, once; what the other has of
/// a lane are its gaps.
#[test]
fn two_consumers_of_one_queue() {
    let (folder, one, broker) = setup();
    let other = Store::open(folder.path().join("other.redb")).unwrap();
    let consumers =
        [&one, &other].map(|store| quick(store).prefetch(8).spawn(broker.source("q"), count).unwrap());
    for n in 0..2000 {
        send(&broker, numbered(n % 4, n / 4, &n.to_string()));
        if n % 10 == 0 {
            send(&broker, numbered(n % 4, n / 4, &n.to_string()));
        }
    }
    until("an empty queue", || drained(&broker));
    let (one_has, other_has) = (effects(&one), effects(&other));
    assert!(one_has.values().chain(other_has.values()).all(|times| *times == 1));
    let all: BTreeSet<_> = one_has.keys().chain(other_has.keys()).cloned().collect();
    assert_eq!(all, (0..2000).map(|n| n.to_string()).collect());
    assert!(one_has.len() > 100 && other_has.len() > 100, "both took part");
    for store in [&one, &other] {
        let seen = effects(store).len();
        assert!(rows(store, DEDUP).0 <= 4 + seen + 4, "a gap lies between two that were seen");
    }
    consumers.into_iter().for_each(stop);
}

/// An event that its relay had put into quarantine, and that is driven again after those behind it, is no repeat: it fills
/// the gap that it had left.
#[test]
fn a_redrive_of_the_relay_fills_its_gap() {
    let (folder, credit, broker) = setup();
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    broker.script(Rule::matching(|m| m.message.payload == b"1").times(1).then(Verdict::no_route()));
    let relay = bank
        .relay("rabbit")
        .destination_attempts(1)
        .on_quarantine(QuarantinePolicy::SkipEvent)
        .spawn(broker.publisher())
        .unwrap();
    let consumer = quick(&credit).spawn(broker.source("q"), count).unwrap();
    for n in 0..5 {
        let event = Event::bytes("paid", n.to_string().into_bytes()).key("alice").to("", "q");
        bank.write(move |tx| tx.append(event.clone())).unwrap();
    }
    until("those around it", || consumer.status().applied == 4);
    assert_eq!(rows(&credit, DEDUP).0, 2, "the lane and its gap");
    bank.quarantine("rabbit").unwrap().redrive(1).unwrap();
    until("it too", || consumer.status().applied == 5);
    assert_eq!(rows(&credit, DEDUP).0, 1);
    once_each(&credit, (0..5).map(|n| n.to_string()));
    stop(consumer);
    let _ = relay.stop(SOON);
}

/// A consumer that meets a lane in its middle takes what is older all the same, should it come.
#[test]
fn a_late_joiner_still_takes_what_is_older() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    for number in [1000, 3, 1000, 3, 999] {
        send(&broker, numbered(0, number, &number.to_string()));
    }
    until("an empty queue", || drained(&broker));
    once_each(&store, ["1000", "3", "999"].map(str::to_owned));
    assert_eq!(consumer.status().repeated, 2);
    stop(consumer);
}

/// The flag says nothing: a first delivery that claims to be a repeat is applied, a repeat that claims to be none is not.
/// Under a new epoch numbers begin anew; so they do in another store and in another scope.
#[test]
fn an_epoch_a_store_and_a_scope_each_begin_anew() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    let other = store.consumer("other").spawn(broker.source("p"), count).unwrap();
    broker.declare_queue("p", QueueOptions::default());
    let message = |epoch: i64, bank: &str, payload: &str| {
        let mut message = numbered(0, 0, payload);
        set(&mut message, wire::EPOCH, epoch);
        set(&mut message, wire::STORE, bank);
        message
    };
    let elsewhere = BANK.replace("00b", "00c");
    for _ in 0..2 {
        send(&broker, message(1, BANK, "first"));
        send(&broker, message(2, BANK, "second epoch"));
        send(&broker, message(1, &elsewhere, "another store"));
        broker.publish("", "p", message(1, BANK, "another scope")).unwrap();
    }
    until("empty queues", || drained(&broker) && other.status().repeated == 1);
    once_each(&store, ["first", "second epoch", "another store", "another scope"].map(str::to_owned));
    assert_eq!((consumer.status().repeated, consumer.status().conflicts), (3, 0));
    stop(consumer);
    stop(other);
}

// --- what is not believed ----------------------------------------------------------------------------------------------

/// Goal: headers of a lane that are there by half, or are not what they should be, are reported by name and kept; the handler
/// never sees the message. Method: one wrong thing at a time, each sent twice.
#[test]
fn malformed_headers_are_rejected_by_name() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    let mut reasons = Vec::new();
    for (at, name) in [wire::STORE, wire::EPOCH, wire::LANE, wire::LANE_NUMBER].into_iter().enumerate() {
        let not = if at == 0 { "is not the UUID of a store" } else { "is not a number from 0 on" };
        let wrong: [Option<HeaderValue>; 8] = [
            None,
            Some("bank".into()),
            Some((-1).into()),
            Some(true.into()),
            Some(vec![7].into()),
            Some(HeaderValue::Timestamp(7)),
            Some(HeaderValue::Void),
            Some(HeaderValue::Array(vec![7.into()])),
        ];
        for (kind, value) in wrong.into_iter().enumerate() {
            let mut message = numbered(0, 0, &format!("{name} {kind}"));
            let missing = value.is_none();
            match value {
                Some(value) => set(&mut message, name, value),
                None => message.headers.retain(|(header, _)| header != name),
            }
            send(&broker, message.clone());
            send(&broker, message);
            let problem = if missing { "is missing, while others of its kind are there" } else { not };
            reasons.push(format!("header `{name}` {problem}"));
        }
    }
    until("an empty queue", || drained(&broker));
    let kept: Vec<_> = store.rejected("service").list(None, 100).unwrap();
    assert_eq!(kept.iter().map(|entry| entry.reason.clone()).collect::<Vec<_>>(), reasons);
    assert_eq!(effects(&store), BTreeMap::new());
    let stats = consumer.status();
    assert_eq!((stats.quarantined, stats.repeated, stats.retried), (32, 32, 0));
    stop(consumer);
    // In a consuming loop of one's own it is an error of its own kind.
    let mut message = numbered(0, 0, "x");
    set(&mut message, wire::LANE, "x");
    let tx = store.begin().unwrap();
    let error = tx.first_delivery("service", &message).unwrap_err();
    assert!(matches!(error, Error::LaneHeader { header: wire::LANE, .. }), "{error:?}");
}

/// A message that claims to be of a store that is none of the producers is rejected, and leaves nothing recorded: once that store
/// is one of them, it is applied by a redrive, and its relay's own repeat of it is one. Foreign messages are not concerned.
#[test]
fn only_the_producers_that_are_named() {
    let (_folder, store, broker) = setup();
    let stranger = BANK.replace("00b", "00c");
    let consumer = quick(&store).producers([BANK]).spawn(broker.source("q"), count).unwrap();
    let mut strange = numbered(0, 0, "strange");
    set(&mut strange, wire::STORE, &*stranger);
    let foreign =
        Message { message_id: Some("f".into()), payload: b"foreign".to_vec(), ..Message::default() };
    for message in [numbered(0, 0, "known"), strange.clone(), strange.clone(), foreign] {
        send(&broker, message);
    }
    until("an empty queue", || drained(&broker));
    once_each(&store, ["known", "foreign"].map(str::to_owned));
    let kept = store.rejected("service").list(None, 9).unwrap();
    assert_eq!(kept.len(), 1);
    assert_eq!(
        kept[0].reason,
        format!(
            "the message says that store {stranger} produced it, which is none of this consumer's producers"
        )
    );
    // Not let in yet: driven again, it comes back.
    store.rejected("service").redrive(0).unwrap();
    until("it is back", || consumer.status().quarantined == 2);
    assert!(!store.rejected("service").list(None, 9).unwrap()[0].redriven);
    stop(consumer);

    let consumer = quick(&store).producers([BANK, &*stranger]).spawn(broker.source("q"), count).unwrap();
    store.rejected("service").redrive(0).unwrap();
    until("its effect", || consumer.status().redriven == 1);
    send(&broker, strange);
    until("its repeat", || consumer.status().repeated == 1);
    once_each(&store, ["known", "foreign", "strange"].map(str::to_owned));
    assert!(store.rejected("service").is_empty().unwrap());
    stop(consumer);
}

/// A number that comes again with other content is a conflict: kept with its reason, once, and never applied.
#[test]
fn a_number_with_other_content_is_a_conflict() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    for number in 0..16 {
        send(&broker, numbered(0, number, &format!("one {number}")));
    }
    for _ in 0..2 {
        send(&broker, numbered(0, 0, "other"));
    }
    until("an empty queue", || drained(&broker));
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.repeated, stats.conflicts, stats.quarantined), (16, 1, 1, 1));
    assert_eq!(stats.retried, 0, "another try heals no conflict");
    let (entry, message) = store.rejected("service").get(0).unwrap();
    assert_eq!(message.payload, b"other");
    assert_eq!(
        entry.reason,
        format!(
            "number 0 of lane 0 of store {BANK} (epoch 1) is not taken as new in scope `service`: it was seen before with another content"
        )
    );
    // Whoever has looked at it may have it applied all the same.
    store.rejected("service").redrive(0).unwrap();
    until("its effect", || consumer.status().redriven == 1);
    assert_eq!(effects(&store)["other"], 1);
    stop(consumer);
}

/// Goal: a producer that was restored from a backup and gives its numbers again loses no event in silence: each is a conflict,
/// also where the numbers are older than the checksums that are kept. Method: copy the producer's file after 5 events, let the
/// original publish 40, then let the copy publish 5 others and one more time its old ones.
#[test]
fn a_producer_restored_from_a_backup() {
    let (folder, credit, broker) = setup();
    let consumer = quick(&credit).spawn(broker.source("q"), count).unwrap();
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    let append = |bank: &Store, texts: &[String]| {
        for text in texts {
            let event = Event::bytes("paid", text.clone().into_bytes()).key("alice").to("", "q");
            bank.write(move |tx| tx.append(event.clone())).unwrap();
        }
    };
    let names = |what: &str, n: std::ops::Range<u32>| n.map(|n| format!("{what} {n}")).collect::<Vec<_>>();
    append(&bank, &names("old", 0..5));
    let backup = crash_copy(&bank, folder.path());
    append(&bank, &names("old", 5..40));
    let relay = bank.relay("rabbit").spawn(broker.publisher()).unwrap();
    until("the original's", || consumer.status().applied == 40);
    assert!(relay.stop(SOON).clean);
    bank.close().unwrap();
    // No two of their events within one millisecond.
    std::thread::sleep(Duration::from_millis(5));

    let restored = Store::open(backup).unwrap();
    append(&restored, &names("new", 5..10));
    let relay = restored.relay("rabbit").spawn(broker.publisher()).unwrap();
    until("the restored ones", || consumer.status().repeated + consumer.status().quarantined == 10);
    let stats = consumer.status();
    assert_eq!((stats.repeated, stats.conflicts, stats.applied), (5, 5, 40), "{stats:?}");
    let kept = credit.rejected("service").list(None, 100).unwrap();
    assert!(kept.iter().all(|entry| entry.reason.ends_with("with another content")));
    // None of them is lost: each is applied once somebody has decided so.
    assert_eq!(credit.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 5);
    until("all of them", || consumer.status().redriven == 5);
    once_each(&credit, names("old", 0..40).into_iter().chain(names("new", 5..10)));
    stop(consumer);
    assert!(relay.stop(SOON).clean);
}

/// A row of a lane whose checksum fails is not believed: what would have been dropped on its word is kept.
#[test]
fn a_damaged_lane_drops_nothing() {
    let (_folder, store, broker) = setup();
    let consumer = quick(&store).spawn(broker.source("q"), count).unwrap();
    send(&broker, numbered(0, 0, "zero"));
    until("it", || consumer.status().applied == 1);
    stop(consumer);
    let path = store.path().to_owned();
    store.close().unwrap();
    damage(&path, DEDUP, |_| true);

    let store = Store::open(&path).unwrap();
    let consumer = quick(&store)
        .attempts(2)
        .on_gap(GapPolicy::Hold(Duration::from_secs(600)))
        .spawn(broker.source("q"), count)
        .unwrap();
    send(&broker, numbered(0, 5, "five"));
    send(&broker, numbered(1, 0, "another lane"));
    until("an empty queue", || drained(&broker));
    once_each(&store, ["zero", "another lane"].map(str::to_owned));
    let kept = store.rejected("service").list(None, 9).unwrap();
    assert_eq!(kept[0].reason, "reading the file: a seen row is damaged");
    stop(consumer);
}

/// Flips a bit in the rows of a closed store's table that `which` picks by their keys.
pub(crate) fn damage(
    path: &std::path::Path,
    table: TableDefinition<'static, &'static [u8], &'static [u8]>,
    which: impl Fn(&[u8]) -> bool,
) {
    let db = onewrite::redb::Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut table = tx.open_table(table).unwrap();
        let rows: Vec<_> = table
            .iter()
            .unwrap()
            .map(|row| row.unwrap())
            .map(|(key, row)| (key.value().to_vec(), row.value().to_vec()))
            .filter(|(key, _)| which(key))
            .collect();
        assert!(!rows.is_empty(), "there is a row to damage");
        for (key, mut row) in rows {
            row[0] ^= 1;
            table.insert(&*key, &*row).unwrap();
        }
    }
    tx.commit().unwrap();
}

/// Goal: where so many ids are remembered at most, it is exactly the newest, per scope; rows of forgotten ones go in passing; a
/// request's id is none of them. Method: ids against a list of them, and the rows at the end.
#[test]
fn foreign_ids_have_a_window_in_count() {
    const MAX: usize = 100;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .inbox_ids_max(MAX as u64)
        .inbox_ids_policy(IdsPolicy::ForgetOldest)
        .open(folder.path().join("a.redb"))
        .unwrap();
    store.write_once("a request", |_| Ok(())).unwrap();
    let mut random = Random(7);
    let mut newest: [Vec<u64>; 2] = Default::default();
    for _ in 0..4000 {
        let scope = random.below(2);
        let id = random.below(300);
        let written = store.write(move |tx| {
            let message = Message {
                message_id: Some(id.to_string().into()),
                payload: vec![id as u8],
                ..Message::default()
            };
            tx.first_delivery(&format!("scope {scope}"), &message)
        });
        let newest = &mut newest[scope as usize];
        let first = !newest.contains(&id);
        assert_eq!(*written.unwrap().value(), first);
        if first {
            newest.push(id);
            newest.drain(..newest.len().saturating_sub(MAX));
        }
    }
    assert!(
        rows(&store, INBOX).0 <= 2 * (2 * MAX + 64),
        "{} rows of two times {MAX} ids",
        rows(&store, INBOX).0
    );
    assert!(store.write_once("a request", |_| Ok(())).unwrap().is_repeat());
    let refused = Store::builder().inbox_ids_max(0).open(folder.path().join("b.redb")).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "setting `inbox_ids_max`: an inbox of no ids would see every message anew"
    );
}

/// Goal: the figure of ids is that of the rows, with a bound and without, as they come and go, and in a file of the format before. Method:
/// ids in two scopes, repeats, an id with another content and requests; then all grow old, and a few new ones prune them.
#[test]
fn ids_are_counted() {
    for bound in [None, Some(1_000)] {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::new());
        let age = Duration::from_secs(60);
        let mut builder = Store::builder().clock(clock.clone()).inbox_age(age);
        if let Some(ids) = bound {
            builder = builder.inbox_ids_max(ids);
        }
        let store = builder.clone().open(folder.path().join("a.redb")).unwrap();
        let mark = |store: &Store, scope: &'static str, id: u64, text: &str| {
            let message = Message {
                message_id: Some(id.to_string().into()),
                payload: text.into(),
                ..Message::default()
            };
            let written = store.write(move |tx| tx.first_delivery(scope, &message));
            written.map(|receipt| receipt.into_value())
        };
        let ids = |store: &Store| {
            let consumers = store.stats().unwrap().consumers;
            ["a", "b"].map(|scope| consumers.get(scope).map_or(0, |figures| figures.ids))
        };
        for id in 0..90 {
            assert!(
                mark(&store, "a", id, "x").unwrap()
                    && mark(&store, "b", id / 2, "x").unwrap() == (id % 2 == 0)
            );
            store.write_once(format!("request {id}"), |_| Ok(())).unwrap();
        }
        assert!(!mark(&store, "a", 7, "x").unwrap());
        assert!(mark(&store, "a", 7, "y").is_err());
        assert_eq!(ids(&store), [90, 45]);
        let path = store.path().to_owned();
        store.close().unwrap();
        let db = Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        {
            let mut meta = tx.open_table(TableDefinition::<&str, &[u8]>::new("onewrite.meta")).unwrap();
            meta.insert("format", &5_u32.to_le_bytes()[..]).unwrap();
            let mut dedup = tx.open_table(DEDUP).unwrap();
            for scope in ["a", "b"] {
                dedup.remove([&[1], scope.as_bytes()].concat().as_slice()).unwrap();
            }
        }
        tx.commit().unwrap();
        drop(db);
        let store = builder.open(&path).unwrap();
        assert_eq!(ids(&store), [90, 45]);
        clock.advance(age * 3);
        for id in 0..200 {
            mark(&store, "b", 1_000 + id, "x").unwrap();
        }
        assert_eq!(ids(&store), [0, 200]);
    }
}

// --- one write, one fsync -------------------------------------------------------------------------------------------

/// Goal: deliveries with lanes that wait together share a commit, and a handler that fails before it has written anything makes
/// nobody run again. Method: fill the queue first, with every fifth to fail once; count commits and runs.
#[test]
fn a_batch_is_one_commit_and_a_clean_failure_costs_nothing() {
    let (_folder, store, broker) = setup();
    for n in 0..500 {
        send(&broker, numbered(n % 7, n / 7, &n.to_string()));
    }
    let before = store.stats().unwrap();
    let failed = Mutex::new(HashSet::new());
    let consumer = quick(&store)
        .spawn(broker.source("q"), move |delivery, tx| {
            let n: u32 = String::from_utf8_lossy(&delivery.message.payload).parse().map_err(Error::app)?;
            if n.is_multiple_of(5) && failed.lock().unwrap().insert(n) {
                return Err(Error::app("not now"));
            }
            tx.append(Event::bytes("seen", n.to_string().into_bytes()).unpublished())?;
            count(delivery, tx)
        })
        .unwrap();
    until("all applied", || consumer.status().applied == 500);
    let after = store.stats().unwrap();
    assert!(
        after.commits - before.commits <= 50,
        "{} commits for 500 deliveries",
        after.commits - before.commits
    );
    assert_eq!(after.reruns, 0);
    assert_eq!(consumer.status().retried, 100);
    once_each(&store, (0..500).map(|n| n.to_string()));
    assert_eq!(
        store.read().unwrap().events(0).unwrap().count(),
        500,
        "state, events and inbox entries are one write"
    );
    stop(consumer);
}

/// A crash at any moment: the file copied while it is used, and a broker that delivers everything again in another order.
#[test]
fn a_crash_between_effect_and_acknowledgement() {
    let (folder, store, broker) = setup();
    let consumer = quick(&store).prefetch(8).spawn(broker.source("q"), count).unwrap();
    let message = |n: i64| numbered(n % 3, n / 3, &n.to_string());
    for n in 0..200 {
        send(&broker, message(n));
    }
    until("some", || consumer.status().applied > 50);
    let hold = store.begin().unwrap();
    let copy = crash_copy(&store, folder.path());
    drop(hold);
    stop(consumer);

    let crashed = Store::open(&copy).unwrap();
    let again = MemoryBroker::new();
    again.declare_queue("q", QueueOptions::default());
    (0..200).rev().for_each(|n| send(&again, message(n)));
    let consumer = quick(&crashed).spawn(again.source("q"), count).unwrap();
    until("an empty queue", || drained(&again));
    once_each(&crashed, (0..200).map(|n| n.to_string()));
    assert!(consumer.status().repeated > 50);
    stop(consumer);
}

// --- gaps -------------------------------------------------------------------------------------------------------------

/// Runs a consumer that holds back, and notes what it has applied, in order.
fn holding(
    store: &Store,
    broker: &MemoryBroker,
    timeout: Duration,
    prefetch: u16,
) -> (Consumer, Arc<Mutex<Vec<String>>>) {
    let applied = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&applied);
    let consumer = quick(store).prefetch(prefetch).on_gap(GapPolicy::Hold(timeout)).spawn(
        broker.source("q"),
        move |delivery, tx| {
            count(delivery, tx)?;
            noted.lock().unwrap().push(String::from_utf8_lossy(&delivery.message.payload).into_owned());
            Ok(())
        },
    );
    (consumer.unwrap(), applied)
}

/// What comes before an earlier one of its lane waits for it, with those behind it; other lanes and foreign messages do not.
#[test]
fn a_gap_that_is_filled_in_time_keeps_the_order() {
    let (_folder, store, broker) = setup();
    let (consumer, applied) = holding(&store, &broker, Duration::from_secs(600), 100);
    for number in [0, 3, 1, 4] {
        send(&broker, numbered(0, number, &number.to_string()));
    }
    send(&broker, numbered(1, 0, "another lane"));
    send(
        &broker,
        Message { message_id: Some("f".into()), payload: b"foreign".to_vec(), ..Message::default() },
    );
    until("those without a gap", || consumer.status().applied == 4);
    until("those with one", || consumer.status().held == 2);
    // Applied is counted first, and acknowledged then.
    until("what is held, not acknowledged", || broker.unsettled_len("q") == 2);
    send(&broker, numbered(0, 2, "2"));
    until("an empty queue", || drained(&broker));
    assert_eq!(*applied.lock().unwrap(), ["0", "1", "another lane", "foreign", "2", "3", "4"]);
    assert_eq!(consumer.status().held, 0);
    stop(consumer);
}

/// A gap that nothing fills is waited for no longer than was said; the missing one is applied all the same when it comes.
#[test]
fn a_gap_that_is_not_filled_is_waited_for_no_longer_than_said() {
    let (_folder, store, broker) = setup();
    let (consumer, applied) = holding(&store, &broker, Duration::from_millis(300), 100);
    let began = Instant::now();
    for number in [0, 3, 2, 5] {
        send(&broker, numbered(0, number, &number.to_string()));
    }
    until("an empty queue", || drained(&broker));
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(300), "{waited:?}");
    assert_eq!(*applied.lock().unwrap(), ["0", "2", "3", "5"]);
    send(&broker, numbered(0, 1, "1"));
    send(&broker, numbered(0, 4, "4"));
    until("the late ones", || consumer.status().applied == 6);
    assert!(began.elapsed() < SOON);
    stop(consumer);
}

/// Goal: no deadlock where what is missing stands in the queue behind all that the prefetch allows. Method: a prefetch of 3, a
/// timeout of ten minutes, the missing one last.
#[test]
fn a_full_prefetch_is_not_waited_for() {
    let (_folder, store, broker) = setup();
    for number in [3, 5, 7, 9, 11, 0] {
        send(&broker, numbered(0, number, &number.to_string()));
    }
    let (consumer, applied) = holding(&store, &broker, Duration::from_secs(600), 3);
    until("the missing one", || consumer.status().applied >= 2);
    until("as many as the rest allows", || broker.queue_len("q") == 0);
    assert_eq!(applied.lock().unwrap()[0], "3");
    send(&broker, numbered(0, 1, "1"));
    until("one of no use", || consumer.status().applied + consumer.status().held == 7);
    stop(consumer);
}

/// Where gaps are waited for, a lane keeps its order through retries too, whether its events have a key or not.
#[test]
fn a_held_lane_keeps_its_order_through_retries() {
    let (_folder, store, broker) = setup();
    let applied = Arc::new(Mutex::new(Vec::new()));
    let (noted, tries) = (Arc::clone(&applied), AtomicU32::new(0));
    let consumer = quick(&store)
        .on_gap(GapPolicy::Hold(Duration::from_secs(600)))
        .spawn(broker.source("q"), move |delivery, _| {
            let text = String::from_utf8_lossy(&delivery.message.payload).into_owned();
            if text == "1" && tries.fetch_add(1, Relaxed) < 3 {
                return Err(Error::app("not yet"));
            }
            noted.lock().unwrap().push(text);
            Ok(())
        })
        .unwrap();
    for number in [2, 0, 1, 4, 3] {
        send(&broker, numbered(0, number, &number.to_string()));
    }
    until("an empty queue", || drained(&broker));
    // A closure may run again with its group: what counts is the last run of each.
    let mut last = Vec::new();
    for text in applied.lock().unwrap().iter() {
        last.retain(|earlier| earlier != text);
        last.push(text.clone());
    }
    assert_eq!(last, ["0", "1", "2", "3", "4"]);
    stop(consumer);
}

/// After a lost connection nothing is held that the broker delivers again.
#[test]
fn what_is_held_is_let_go_with_its_connection() {
    let (_folder, store, broker) = setup();
    let (consumer, applied) = holding(&store, &broker, Duration::from_secs(600), 100);
    send(&broker, numbered(0, 1, "1"));
    until("it is held", || consumer.status().held == 1);
    broker.go_down();
    until("the outage seen", || consumer.status().disconnected.is_some());
    until("it is let go", || consumer.status().held == 0);
    broker.come_up();
    send(&broker, numbered(0, 0, "0"));
    until("an empty queue", || drained(&broker));
    assert_eq!(*applied.lock().unwrap(), ["0", "1"]);
    assert_eq!(consumer.status().repeated, 0);
    stop(consumer);
}

/// Settings that cannot work are refused by name.
#[test]
fn bad_settings_are_named() {
    let (_folder, store, broker) = setup();
    let refused =
        |builder: ConsumerBuilder| builder.spawn(broker.source("q"), count).unwrap_err().to_string();
    assert_eq!(refused(quick(&store).producers(["bank"])), "setting `producers`: `bank` is not a store's id");
    let builder = quick(&store).on_gap(GapPolicy::Hold(Duration::from_secs(3600)));
    assert_eq!(refused(builder), "setting `on_gap`: at most 900000 ms");
    assert!(quick(&store).rejects(RejectTo::DeadLetter).spawn(broker.source("q"), count).is_ok());
}
