//! The consumer's rows, on the whole path through RabbitMQ: whatever repeats, dies or stalls, each effect happens once.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::AMQPValue;
use onewrite::broker::{Delivery, RabbitMqSource};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Consumer, FaultClass, Result, Store, Transaction};

use super::{Line, SOON, rough_node, until};
use crate::scratch::{child, task};
use crate::support::proxy::{ChaosProxy, End, Way};
use crate::support::rabbit::{RabbitNode, shared_node};
use crate::support::tap::Tap;

/// How often each message took effect, by its text.
const EFFECTS: TableDefinition<'_, &str, u64> = TableDefinition::new("effects");

fn source(url: &str, queue: &str) -> RabbitMqSource {
    RabbitMqSource::new(url, queue)
        .unwrap()
        .heartbeat(Duration::from_secs(1))
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(200))
}

fn count(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let text = String::from_utf8_lossy(&delivery.message.payload);
    let mut effects = tx.open_table(EFFECTS)?;
    let before = effects.get(&*text)?.map_or(0, |row| row.value());
    effects.insert(&*text, before + 1)?;
    Ok(())
}

fn effects(store: &Store) -> BTreeMap<String, u64> {
    let snapshot = store.read().unwrap();
    let Ok(table) = snapshot.open_table(EFFECTS) else { return BTreeMap::new() };
    table.iter().unwrap().map(|row| row.unwrap()).map(|(id, n)| (id.value().to_owned(), n.value())).collect()
}

/// Everything that the line has appended took effect, once.
fn assert_once(store: &Store, line: &Line) {
    let expected =
        line.appended.iter().flat_map(|(key, count)| (0..*count).map(move |n| (format!("{key}:{n}"), 1)));
    assert_eq!(effects(store), expected.collect());
}

/// The queue is empty, and nothing of it is unacknowledged.
fn until_settled(tap: &Tap, queue: &str, node: &crate::support::rabbit::RabbitNode) {
    until("an empty queue", || tap.count(queue) == 0);
    until("nothing unacknowledged", || {
        let listed = node.ctl(&["list_queues", "-q", "--no-table-headers", "name", "messages"]);
        listed.lines().any(|line| line == format!("{queue}\t0"))
    });
}

/// A consuming process, killed at the latest when the test ends.
struct Mortal(Child, std::io::Lines<BufReader<std::process::ChildStdout>>);

impl Mortal {
    fn start(test: &str, store: &std::path::Path, url: &str, queue: &str) -> Self {
        let mut child = child(&format!("matrix::consumer::{test}"), store, format!("{queue} {url}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self(child, lines)
    }

    /// Waits until it says this.
    fn until_says(&mut self, word: &str) {
        assert!(self.1.any(|line| line.unwrap().contains(word)), "it ended before it said {word:?}");
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        // SIGKILL. It fails when the child was first.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// C1. Goal: a consumer that dies between effect and commit has done nothing; the message comes again and takes effect once. Method: a
/// process is killed inside its handler, after it has written.
#[test]
fn c01_killed_between_effect_and_commit() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("c01", &[]);
    let mut line = Line::to(&node.url(), "c01");
    line.append_many(20);
    line.until_empty();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("credit.redb");
    let mut mortal = Mortal::start("child_dies_in_its_handler", &path, &node.url(), "c01");
    mortal.until_says("written");
    drop(mortal);
    let store = Store::open(&path).unwrap();
    assert_eq!(effects(&store), BTreeMap::new());
    let consumer = store.consumer("c").spawn(source(&node.url(), "c01"), count).unwrap();
    until("all applied", || consumer.status().applied == 20);
    until_settled(&tap, "c01", node);
    assert_once(&store, &line);
    assert_eq!(consumer.stop(SOON).repeated, 0);
}

#[test]
fn child_dies_in_its_handler() {
    let Some((path, argument)) = task() else { return };
    let (queue, url) = argument.split_once(' ').unwrap();
    let store = Store::open(&path).unwrap();
    let _consumer = store
        .consumer("c")
        .spawn(source(url, queue), |delivery, tx| {
            count(delivery, tx)?;
            println!("written");
            loop {
                std::thread::park();
            }
        })
        .unwrap();
    std::thread::sleep(SOON);
}

/// C2. Goal: a consumer that dies between commit and acknowledgement has done it; the messages come again, are recognised and only
/// acknowledged. Method: its acknowledgements are held back by the proxy, then the process is killed.
#[test]
fn c02_killed_between_commit_and_acknowledgement() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("c02", &[]);
    let mut line = Line::to(&node.url(), "c02");
    line.append("k0").wait_confirmed(SOON).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("credit.redb");
    let proxy = ChaosProxy::to(node.port());
    let mut mortal = Mortal::start("child_applies", &path, &proxy.url(&node.url()), "c02");
    mortal.until_says("applied 1.");
    until_settled(&tap, "c02", node);
    proxy.stall(Way::Up, true);
    line.append_many(50);
    mortal.until_says("applied 51.");
    drop(mortal);
    proxy.end_all(End::Reset);
    let store = Store::open(&path).unwrap();
    assert_once(&store, &line);
    let consumer = store.consumer("c").spawn(source(&node.url(), "c02"), count).unwrap();
    until("all recognised", || consumer.status().repeated == 50);
    until_settled(&tap, "c02", node);
    assert_once(&store, &line);
    assert_eq!(consumer.stop(SOON).applied, 0);
}

#[test]
fn child_applies() {
    let Some((path, argument)) = task() else { return };
    let (queue, url) = argument.split_once(' ').unwrap();
    let store = Store::open(&path).unwrap();
    // Its silence is to be the test's, not a heartbeat's.
    let source = source(url, queue).heartbeat(Duration::from_secs(60));
    let consumer = store.consumer("c").spawn(source, count).unwrap();
    let mut reported = 0;
    loop {
        let applied = consumer.status().applied;
        if applied > reported {
            println!("applied {applied}.");
            reported = applied;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A line to a raw queue, from which a test moves messages to where they are consumed.
fn moved(queue: &str, events: u64) -> (Tap, Line, Vec<crate::support::tap::Raw>) {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let raw_queue = format!("{queue}-raw");
    tap.queue(&raw_queue, &[]);
    tap.queue(queue, &[]);
    let mut line = Line::to(&node.url(), &raw_queue);
    line.append_many(events);
    line.until_empty();
    let raw = tap.drain(&raw_queue);
    assert_eq!(raw.len() as u64, events);
    (tap, line, raw)
}

fn consume(store: &Store, queue: &str) -> Consumer {
    store.consumer("c").spawn(source(&shared_node().url(), queue), count).unwrap()
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("credit.redb")).unwrap();
    (folder, store)
}

/// C3, C4. Goal: a repeat is recognised though the broker says `redelivered=false`, at once and also long after newer messages of its key,
/// also by a consumer that was started anew. Method: a tap republishes each message right behind itself, then the first ones
/// once more at the end.
#[test]
fn c03_c04_repeats_without_the_flag_and_ghosts() {
    let (tap, line, raw) = moved("c03", 100);
    let (_folder, store) = open();
    let flagged = Arc::new(AtomicU32::new(0));
    let consumer = store
        .consumer("c")
        .spawn(source(&shared_node().url(), "c03"), {
            let flagged = Arc::clone(&flagged);
            move |delivery, tx| {
                flagged.fetch_add(u32::from(delivery.redelivered), Ordering::SeqCst);
                count(delivery, tx)
            }
        })
        .unwrap();
    for raw in raw.iter().flat_map(|raw| [raw, raw]).chain(&raw[..20]) {
        tap.publish("c03", raw.properties.clone(), &raw.body);
    }
    until("all of them", || consumer.status().applied + consumer.status().repeated == 220);
    let stats = consumer.stop(SOON);
    assert_eq!((stats.applied, stats.repeated, flagged.load(Ordering::SeqCst)), (100, 120, 0), "{stats:?}");
    let again = consume(&store, "c03");
    for raw in &raw[..20] {
        tap.publish("c03", raw.properties.clone(), &raw.body);
    }
    until("the ghosts", || again.status().repeated == 20);
    assert_once(&store, &line);
    assert_eq!(again.stop(SOON).applied, 0);
}

/// C5. Goal: two consumers on one queue apply each message once between them, also the repeats that each gets of what the other has
/// applied. Method: one store, two connections, 500 messages, each sent twice.
#[test]
fn c05_two_consumers_on_one_queue() {
    let (tap, line, raw) = moved("c05", 500);
    let (_folder, store) = open();
    let (one, two) = (consume(&store, "c05"), consume(&store, "c05"));
    until("both connected", || one.status().connections == 1 && two.status().connections == 1);
    for raw in raw.iter().chain(&raw) {
        tap.publish("c05", raw.properties.clone(), &raw.body);
    }
    let total = || {
        let (one, two) = (one.status(), two.status());
        (one.applied + two.applied, one.repeated + two.repeated)
    };
    until("all of them", || total() == (500, 500));
    assert_once(&store, &line);
    let (one, two) = (one.stop(SOON), two.stop(SOON));
    assert!(one.applied > 0 && two.applied > 0, "both took part: {one:?} {two:?}");
    assert_eq!((one.conflicts, two.conflicts, one.quarantined, two.quarantined), (0, 0, 0, 0));
}

/// C6. Goal: a handler that panics leaves nothing of that try, the message is tried again, its key waits, others flow, and the connection
/// stays. Method: the first try of one of 20 panics after it has written.
#[test]
fn c06_handler_panics() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("c06", &[]);
    let mut line = Line::to(&node.url(), "c06");
    line.append_many(20);
    let (_folder, store) = open();
    let tries = AtomicU32::new(0);
    let consumer = store
        .consumer("c")
        .backoff(Duration::from_millis(20), Duration::from_millis(100))
        .spawn(source(&node.url(), "c06"), move |delivery, tx| {
            count(delivery, tx)?;
            if delivery.message.payload == b"k3:1" && tries.fetch_add(1, Ordering::SeqCst) < 2 {
                panic!("the handler's own");
            }
            Ok(())
        })
        .unwrap();
    until("all applied", || consumer.status().applied == 20);
    until_settled(&tap, "c06", node);
    assert_once(&store, &line);
    let stats = consumer.stop(SOON);
    assert_eq!((stats.retried, stats.connections, stats.quarantined), (2, 1, 0), "{stats:?}");
}

/// What a broker does to a consumer that holds a delivery longer than `consumer_timeout`.
#[derive(Clone, Copy, PartialEq)]
enum HeldTooLong {
    ChannelClosed,
    ConsumerCancelled,
    Nothing,
}

impl HeldTooLong {
    fn at(version: (u32, u32), kind: &str) -> Self {
        match kind {
            _ if version < (4, 3) => Self::ChannelClosed,
            "quorum" => Self::ConsumerCancelled,
            _ => Self::Nothing,
        }
    }
}

/// C7. Goal: a handler that takes longer than the broker's `consumer_timeout` loses its deliveries, learns why, and its effect happens once:
/// what it has committed is recognised when it comes again. Method: the broker's timeout is set to a second, and its looks at it
/// (each minute by default) to every half; the handler takes longer; and it is long enough until the next connection that the consumer, which
/// hears nothing while it handles, can be seen without one. Classic and quorum queues: RabbitMQ closes the channel, from 4.3 on it cancels the consumer
/// of a quorum queue and lets that of a classic one be.
#[test]
fn c07_handler_slower_than_the_brokers_timeout() {
    let node = rough_node();
    let set = |timeout: &str, tick: &str, quorum_tick: &str| {
        let values = [
            ("consumer_timeout", timeout),
            ("channel_tick_interval", tick),
            ("quorum_tick_interval", quorum_tick),
        ];
        for (name, value) in values {
            node.ctl(&["eval", &format!("application:set_env(rabbit, {name}, {value}).")]);
        }
    };
    set("1000", "500", "500");
    for kind in ["classic", "quorum"] {
        held_too_long(&node, kind, HeldTooLong::at(node.version(), kind));
    }
    set("1800000", "60000", "5000");
}

fn held_too_long(node: &RabbitNode, kind: &str, expected: HeldTooLong) {
    let queue = format!("c07.{kind}");
    let tap = Tap::connect(&node.url());
    tap.queue(&queue, &[("x-queue-type", AMQPValue::LongString(kind.into()))]);
    let mut line = Line::to(&node.url(), &queue);
    line.append_many(3);
    line.until_empty();
    let (_folder, store) = open();
    let tries = Arc::new(AtomicU32::new(0));
    let slowly_back =
        source(&node.url(), &queue).reconnect_backoff(Duration::from_secs(8), Duration::from_secs(8));
    // A quorum queue looks at it every few seconds.
    let long = Duration::from_secs(if expected == HeldTooLong::ConsumerCancelled { 20 } else { 3 });
    let counted = Arc::clone(&tries);
    let consumer = store
        .consumer("c")
        .spawn(slowly_back, move |delivery, tx| {
            if counted.fetch_add(1, Ordering::SeqCst) == 0 {
                std::thread::sleep(long);
            }
            count(delivery, tx)
        })
        .unwrap();
    if expected != HeldTooLong::Nothing {
        let mut why = None;
        until("the consumer disconnected", || {
            why = consumer.status().disconnected;
            why.is_some()
        });
        let why = why.unwrap();
        let code = (expected == HeldTooLong::ChannelClosed).then_some(406);
        assert_eq!((why.class, why.code), (FaultClass::Outage, code), "{why}");
        assert!(why.text.contains("timed out") || why.text.contains("timeout"), "{why}");
        until("recognised", || consumer.status().repeated > 0);
    }
    until("applied", || consumer.status().applied == 3);
    until_settled(&tap, &queue, node);
    assert_once(&store, &line);
    let stats = consumer.stop(SOON);
    let once = expected == HeldTooLong::Nothing;
    assert!(stats.quarantined == 0 && (stats.connections == 1) == once, "{stats:?}");
}

/// C8, C9. Goal: messages of foreign producers, without our headers, are known by their id; the same id with other bytes is a conflict,
/// kept with its reason and never dropped; one without any id is applied. Method: a plain client publishes them.
#[test]
fn c08_c09_foreign_producers_and_conflicts() {
    let tap = Tap::connect(&shared_node().url());
    tap.queue("c08", &[]);
    let (_folder, store) = open();
    let consumer = consume(&store, "c08");
    let send = |id: Option<&str>, body: &str| {
        let properties = BasicProperties::default();
        let properties = id.map_or(properties.clone(), |id| properties.with_message_id(id.into()));
        tap.publish("c08", properties, body.as_bytes());
    };
    for (id, body) in [("1", "a"), ("2", "b"), ("1", "a"), ("1", "other"), ("2", "b"), ("3", "c")] {
        send(Some(id), body);
    }
    send(None, "nameless");
    until("all of them", || {
        let stats = consumer.status();
        stats.applied + stats.repeated + stats.quarantined == 7
    });
    let stats = consumer.stop(SOON);
    assert_eq!(
        (stats.applied, stats.repeated, stats.conflicts, stats.quarantined),
        (4, 2, 1, 1),
        "{stats:?}"
    );
    let expected = ["a", "b", "c", "nameless"].map(|body| (body.to_owned(), 1));
    assert_eq!(effects(&store), expected.into());
    let rejected = store.rejected("c");
    let listed = rejected.list(None, 10).unwrap();
    let (entry, message) = rejected.get(listed[0].number).unwrap();
    assert_eq!((message.payload.as_slice(), message.message_id.as_deref()), (&b"other"[..], Some("1")));
    assert!(entry.reason.contains("other content"), "{}", entry.reason);
    assert_eq!(tap.count("c08"), 0);
}
