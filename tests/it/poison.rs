//! Poison below the consumer's quarantine: what the AMQP client's decoder refuses used to end the connection, or the process, and
//! came again first. On a real broker, which passes all of it on.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lapin::types::AMQPValue;
use onewrite::broker::RabbitMqSource;
use onewrite::{Consumer, Message, Store, wire};

use crate::support::fake_broker::FakeBroker;
use crate::support::rabbit::{RabbitNode, shared_node};
use crate::support::raw_amqp::{Properties, RawAmqp, entry, long, nested};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(60);

/// A consumer of one queue of a real broker, and what its handler was given.
struct Rig {
    _folder: tempfile::TempDir,
    store: Store,
    consumer: Consumer,
    handled: Arc<Mutex<Vec<Message>>>,
    tap: Tap,
    raw: RawAmqp,
    queue: &'static str,
}

impl Rig {
    fn start(
        node: &RabbitNode,
        queue: &'static str,
        source: impl FnOnce(RabbitMqSource) -> RabbitMqSource,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let tap = Tap::connect(&node.url());
        tap.queue(queue, &[]);
        let handled = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&handled);
        let source = source(RabbitMqSource::new(&node.url(), queue).unwrap());
        let consumer = store.consumer("c").spawn(source, move |delivery, _| {
            notes.lock().unwrap().push(delivery.message.clone());
            Ok(())
        });
        let raw = RawAmqp::connect(node.port());
        Self { _folder: folder, store, consumer: consumer.unwrap(), handled, tap, raw, queue }
    }

    fn send(&mut self, properties: &Properties, body: &[u8]) {
        self.raw.publish("", self.queue.as_bytes(), properties, body);
    }

    /// Waits until so many are handled, and others rejected for these reasons, all over one connection; nothing is left with the
    /// broker. What was handled.
    fn await_counts(self, handled: usize, rejected: &[&str]) -> Vec<Message> {
        let began = Instant::now();
        let counts = || (self.handled.lock().unwrap().len(), self.rejected().len());
        while counts() != (handled, rejected.len()) {
            assert!(began.elapsed() < SOON, "{:?}, {:?}", counts(), self.consumer.status());
            std::thread::sleep(Duration::from_millis(10));
        }
        let reasons = self.rejected();
        assert_eq!(self.consumer.status().connections, 1);
        let queue = self.queue;
        self.consumer.stop(SOON);
        assert_eq!(self.tap.count(queue), 0, "left with the broker");
        self.tap.delete_queue(queue);
        for (reason, expected) in reasons.iter().zip(rejected) {
            assert!(reason.contains(expected), "{reason:?} does not say {expected:?}");
        }
        std::mem::take(&mut *self.handled.lock().unwrap())
    }

    fn rejected(&self) -> Vec<String> {
        let rejected = self.store.rejected("c").list(None, 100).unwrap();
        rejected.into_iter().map(|rejected| rejected.reason).collect()
    }
}

fn good(id: &str) -> Properties {
    Properties::default().id(id.as_bytes())
}

fn note(message: &Message) -> Option<&str> {
    message.header(wire::MENDED)?.as_text()
}

fn payloads(handled: &[Message]) -> BTreeSet<&[u8]> {
    handled.iter().map(|message| &*message.payload).collect()
}

/// Goal: text that is not UTF-8, wherever it stands, never stops a queue. Method: one odd text at a time between good messages, over
/// one connection. What the message is known by makes the consumer reject it; the rest is handled, and says what was odd.
#[test]
fn text_that_is_not_utf8_reaches_the_consumer() {
    let mut rig = Rig::start(shared_node(), "poison.text", |source| source);
    rig.tap.exchange("poison.text.x", lapin::ExchangeKind::Fanout);
    rig.tap.bind("poison.text", "poison.text.x", "");
    rig.send(&good("m1"), b"first");
    rig.send(&Properties::default().id(b"m\xff\xfe"), b"odd id");
    rig.send(&Properties::default().id(b"m\xff\xfd"), b"odd id");
    rig.send(&good("m2").text(5, b"t\xc3"), b"odd type");
    rig.raw.publish("poison.text.x", b"key \xff", &good("m3"), b"odd key");
    rig.send(
        &good("m4").headers(&[entry(b"name \x80", b'S', &long(b"v")), entry(b"b", b'V', b"")]),
        b"odd header name",
    );
    rig.send(&good("m5").text(3, b"app \xe2\x82"), b"odd app_id");
    rig.send(
        &good("m6").text(10, b"\xf0\x9f").text(9, b"\xff").text(8, b"60000").text(14, b"\xfe"),
        b"more odd properties",
    );
    rig.send(&good("m7"), b"last");
    let rejected = [
        "its message_id `m\\xff\\xfe` is not UTF-8",
        "its message_id `m\\xff\\xfd` is not UTF-8",
        "its type `t\\xc3` is not UTF-8",
        "its routing key `key \\xff` is not UTF-8",
    ];
    let handled = rig.await_counts(5, &rejected);
    let expected: [&[u8]; 5] = [b"first", b"odd header name", b"odd app_id", b"more odd properties", b"last"];
    assert_eq!(payloads(&handled), BTreeSet::from(expected));
    assert_eq!(handled.iter().filter(|message| note(message).is_some()).count(), 3);
    assert!(note(&handled[1]).unwrap().contains("the name of header `name \\x80` is not UTF-8"));
}

/// Goal: nobody who may publish can end the process. Method: tables and arrays within each other, from the deepest that is taken as
/// it is to as many levels as a frame holds; each used to overflow the decoder's stack.
#[test]
fn tables_without_end_reach_the_consumer() {
    let mut rig = Rig::start(shared_node(), "poison.nested", |source| source);
    rig.send(&good("m0"), b"first");
    let depths = [(15, false), (16, true), (400, true), (5_000, true), (20_000, true)];
    for (depth, _) in depths {
        for kind in [b'F', b'A'] {
            let deep = entry(b"deep", kind, &nested(depth, kind));
            let beside = entry(b"beside", b'S', &long(b"kept"));
            rig.send(&good(&format!("{depth} {}", char::from(kind))).headers(&[deep, beside]), b"deep");
        }
    }
    rig.send(&good("m9"), b"last");
    let handled = rig.await_counts(2 + 2 * depths.len(), &[]);
    let deep = handled.iter().filter(|message| message.payload == b"deep");
    for (message, (depth, mended)) in deep.zip(depths.iter().flat_map(|depth| [depth, depth])) {
        assert_eq!(note(message).is_some(), *mended, "{depth} levels: {:?}", note(message));
        assert_eq!(
            message.header("beside").and_then(|value| value.as_text()),
            Some("kept"),
            "{depth} levels"
        );
    }
}

/// Goal: headers that have grown beyond a frame on their way do not stop the queue behind them. Method: a message whose headers
/// nearly fill a frame expires in a queue and is dead-lettered, by which RabbitMQ adds more.
#[test]
fn headers_larger_than_a_frame_reach_the_consumer() {
    let mut rig = Rig::start(shared_node(), "poison.large", |source| source);
    let text = |text: &str| AMQPValue::LongString(text.into());
    let arguments = [
        ("x-message-ttl", AMQPValue::LongInt(1)),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text("poison.large")),
    ];
    rig.tap.queue("poison.expires", &arguments);
    rig.send(&good("m0"), b"first");
    let large = [entry(b"large", b'S', &long(&vec![b'x'; 130_900])), entry(b"small", b'S', &long(b"kept"))];
    rig.raw.publish("", b"poison.expires", &good("m1").headers(&large), b"large");
    while rig.tap.count("poison.large") + rig.rejected().len() == 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    rig.send(&good("m2"), b"last");
    rig.tap.delete_queue("poison.expires");
    let handled = rig.await_counts(2, &["header `large` of 130911 bytes is left out"]);
    assert_eq!(payloads(&handled), BTreeSet::from([&b"first"[..], b"last"]));
}

/// Goal: a body over the cap costs no memory and does not stop the queue; two of the same length are distinguished. Method: a small cap.
#[test]
fn a_body_over_the_cap_is_rejected() {
    let mut rig = Rig::start(shared_node(), "poison.body", |source| source.body_bytes_max(1_000));
    rig.send(&good("m0"), &[0; 1_000]);
    rig.send(&good("m1"), &[1; 1_001]);
    rig.send(&good("m1"), &[2; 1_001]);
    rig.send(&good("m2"), &[3; 1_900_000]);
    rig.send(&good("m3"), b"last");
    let too_large = "its body of 1001 bytes (CRC-32 ";
    let handled = rig.await_counts(2, &[too_large, too_large, "its body of 1900000 bytes (CRC-32 "]);
    assert_eq!(handled.len(), 2);
}

/// Goal: a message that cannot be taken in at all is named, and asked for again ever more slowly: that the consumer has nothing to
/// settle is no proof that the connection works. Method: a broker that announces a body without end, and counts connections; their
/// waits double from 50 ms, so that seven of them take 3 s at least, however slow the machine is.
#[test]
fn what_cannot_be_taken_in_is_named_and_asked_for_ever_more_slowly() {
    let connections = Arc::new(AtomicU32::new(0));
    let broker = FakeBroker::delivering_a_body_of(1 << 62, Arc::clone(&connections), 8);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = RabbitMqSource::new(&broker.url, "q").unwrap();
    let source = source.reconnect_backoff(Duration::from_millis(50), Duration::from_secs(60));
    let began = Instant::now();
    let consumer = store.consumer("c").spawn(source, |_, _| Ok(())).unwrap();
    while connections.load(Ordering::SeqCst) < 8 {
        assert!(began.elapsed() < SOON, "{:?}", consumer.status());
        std::thread::sleep(Duration::from_millis(10));
    }
    // Each wait is at least half of what it may be.
    assert!(began.elapsed() >= Duration::from_millis(50 * 127 / 2), "{:?}", began.elapsed());
    let fault = loop {
        match consumer.status().disconnected {
            Some(fault) => break fault,
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    assert!(fault.text.contains("its body is announced with 4611686018427387904 bytes"), "{fault}");
    assert!(fault.text.contains("it is the next message of queue `q`"), "{fault}");
    consumer.stop(SOON);
}
