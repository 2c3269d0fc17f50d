//! `RabbitMqSource` against a real broker, at the `Source` seam.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use lapin::types::{AMQPValue, FieldArray, FieldTable};
use lapin::{BasicProperties, ExchangeKind};
use onewrite::broker::{
    Delivery, DeliveryTag, Epoch, EventReceiver, RabbitMqSource, Settlement, Source, SourceEvent,
    SourceEvents, Topology,
};
use onewrite::{Fault, FaultClass, HeaderValue};

use crate::support::rabbit::{RabbitNode, shared_node};
use crate::support::raw_amqp::{Properties, RawAmqp};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(20);

struct Rig {
    source: RabbitMqSource,
    events: EventReceiver<SourceEvent>,
}

impl Rig {
    fn start(url: &str, queue: &str, prefetch: u16) -> Self {
        let (sender, events) = SourceEvents::channel();
        let mut source = RabbitMqSource::new(url, queue)
            .unwrap()
            .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500));
        source.start(sender, prefetch).unwrap();
        Self { source, events }
    }

    fn next(&self) -> SourceEvent {
        self.events.recv_timeout(SOON).expect("an event in time")
    }

    fn wait_up(&self) -> Epoch {
        loop {
            if let SourceEvent::Up { epoch } = self.next() {
                return epoch;
            }
        }
    }

    fn wait_down(&self) -> Fault {
        loop {
            if let SourceEvent::Down { fault, .. } = self.next() {
                return fault;
            }
        }
    }

    fn deliveries(&self, count: usize) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        while deliveries.len() < count {
            match self.next() {
                SourceEvent::Delivery(delivery) => deliveries.push(*delivery),
                SourceEvent::Up { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        deliveries
    }

    fn is_quiet(&self) -> bool {
        self.events.recv_timeout(Duration::from_millis(500)).is_err()
    }
}

fn fill(tap: &Tap, queue: &str, count: usize) {
    tap.queue(queue, &[]);
    for n in 0..count {
        let properties = BasicProperties::default().with_message_id(format!("m{n}").into());
        tap.publish(queue, properties, format!("body {n}").as_bytes());
    }
}

fn wait_count(tap: &Tap, queue: &str, expected: usize) {
    let began = Instant::now();
    while tap.count(queue) != expected {
        assert!(began.elapsed() < SOON, "{} messages in {queue}, not {expected}", tap.count(queue));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Goal: prefetch bounds what is unsettled; acknowledged is gone, requeued comes again, rejected goes, and what was not
/// settled by the stop is back in the queue. Method: 100 messages, prefetch 10, settlements out of order.
#[test]
fn every_settlement_is_what_the_broker_does() {
    let tap = Tap::connect(&shared_node().url());
    fill(&tap, "settle.q", 100);
    let mut rig = Rig::start(&shared_node().url(), "settle.q", 10);
    let first = rig.deliveries(10);
    assert!(rig.is_quiet(), "no more than the prefetch");
    for (n, delivery) in first.iter().enumerate() {
        assert_eq!(delivery.message.payload, format!("body {n}").as_bytes());
        assert_eq!((delivery.exchange.as_str(), delivery.routing_key.as_str()), ("", "settle.q"));
        assert!(!delivery.redelivered);
    }
    // 1 stays open: 0 is acknowledged alone, 2 to 4 out of order, 5 requeued, 6 rejected.
    let of = |n: usize, settlement| (first[n].tag, settlement);
    rig.source.settle(vec![
        of(4, Settlement::Acknowledge),
        of(0, Settlement::Acknowledge),
        of(2, Settlement::Acknowledge),
        of(5, Settlement::Requeue),
        of(3, Settlement::Acknowledge),
        of(6, Settlement::Reject),
        of(4, Settlement::Acknowledge),
    ]);
    let second = rig.deliveries(6);
    let again: Vec<_> = second.iter().filter(|d| d.redelivered).collect();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].message.message_id.as_deref(), Some("m5"));
    // Everything but `m1` in one contiguous run, then `m1`, then the rest.
    let mut open: Vec<DeliveryTag> = first[7..].iter().chain(&second).map(|d| d.tag).collect();
    let mut seen: BTreeSet<_> = first.iter().chain(&second).map(|d| d.message.message_id.clone()).collect();
    rig.source.settle(vec![of(1, Settlement::Acknowledge)]);
    while seen.len() < 95 {
        rig.source.settle(open.drain(..).map(|tag| (tag, Settlement::Acknowledge)).collect());
        for delivery in rig.deliveries(1) {
            open.push(delivery.tag);
            seen.insert(delivery.message.message_id.clone());
        }
    }
    // A settlement just before the stop still counts; what is open goes back.
    rig.source.settle(open.drain(..).map(|tag| (tag, Settlement::Acknowledge)).collect());
    rig.source.stop(Duration::from_secs(5));
    let left = 100 - 95;
    wait_count(&tap, "settle.q", left);
}

/// Goal: foreign headers are taken as they are. Method: every AMQP type in the headers, odd bytes in a text.
#[test]
fn foreign_headers_are_taken_as_they_are() {
    let tap = Tap::connect(&shared_node().url());
    tap.queue("foreign.q", &[]);
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("i8", AMQPValue::ShortShortInt(-8)),
        ("i16", AMQPValue::ShortInt(-16)),
        ("i32", AMQPValue::LongInt(-32)),
        ("u32", AMQPValue::LongUInt(32)),
        ("i64", AMQPValue::LongLongInt(-64)),
        ("time", AMQPValue::Timestamp(1_700_000_000)),
        ("bool", AMQPValue::Boolean(true)),
        ("text", AMQPValue::LongString("é".into())),
        ("latin1", AMQPValue::LongString(vec![0xe9_u8].into())),
        ("bytes", AMQPValue::ByteArray(vec![1, 2].into())),
        ("float", AMQPValue::Double(1.5)),
        ("array", AMQPValue::FieldArray(FieldArray::default())),
        ("void", AMQPValue::Void),
    ] {
        headers.insert(name.into(), value);
    }
    tap.publish("foreign.q", BasicProperties::default().with_headers(headers), b"");
    let mut rig = Rig::start(&shared_node().url(), "foreign.q", 5);
    let delivery = rig.deliveries(1).remove(0);
    assert_eq!(delivery.message.message_id, None);
    let header = |name: &str| delivery.message.header(name).cloned();
    assert_eq!(header("i8"), Some(HeaderValue::I8(-8)));
    assert_eq!(header("i16"), Some(HeaderValue::I16(-16)));
    assert_eq!(header("i32"), Some(HeaderValue::I32(-32)));
    assert_eq!(header("u32"), Some(HeaderValue::U32(32)));
    assert_eq!(header("i64"), Some(HeaderValue::Int(-64)));
    assert_eq!(header("time"), Some(HeaderValue::Timestamp(1_700_000_000)));
    assert_eq!(header("bool"), Some(HeaderValue::Bool(true)));
    assert_eq!(header("text"), Some(HeaderValue::Text("é".into())));
    assert_eq!(header("latin1"), Some(HeaderValue::Bytes(vec![0xe9])));
    assert_eq!(header("bytes"), Some(HeaderValue::Bytes(vec![1, 2])));
    assert_eq!(header("float"), Some(HeaderValue::Double(1.5)));
    assert_eq!(header("array"), Some(HeaderValue::Array(Vec::new())));
    assert_eq!(header("void"), Some(HeaderValue::Void));
    rig.source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
    rig.source.stop(Duration::from_secs(5));
    wait_count(&tap, "foreign.q", 0);
}

/// Goal: a queue that is missing, or deleted while consumed, is a destination fault, and consuming goes on once it is
/// there. Method: start without it, make it, delete it, make it again.
#[test]
fn a_queue_that_goes_is_waited_for() {
    let tap = Tap::connect(&shared_node().url());
    let mut rig = Rig::start(&shared_node().url(), "gone.q", 5);
    let fault = rig.wait_down();
    assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(404)), "{fault}");
    fill(&tap, "gone.q", 1);
    rig.wait_up();
    assert_eq!(rig.deliveries(1).len(), 1);
    tap.delete_queue("gone.q");
    let fault = rig.wait_down();
    assert_eq!(fault.class, FaultClass::Destination, "{fault}");
    fill(&tap, "gone.q", 1);
    assert_eq!(rig.wait_up(), Epoch(rig_epoch(&mut rig)));
    rig.source.stop(Duration::from_secs(5));
}

/// The epoch of the next delivery.
fn rig_epoch(rig: &mut Rig) -> u64 {
    rig.deliveries(1).remove(0).tag.epoch.0
}

/// Goal: after a lost connection the broker delivers again what was not settled, and a settlement of the lost one
/// touches nothing. Method: kill the broker between delivery and settlement.
#[test]
fn after_a_lost_connection_the_unsettled_comes_again() {
    let mut node = RabbitNode::start();
    fill(&Tap::connect(&node.url()), "again.q", 3);
    // Durable through a kill only when the messages are persistent; so publish those anew.
    let tap = Tap::connect(&node.url());
    tap.drain("again.q");
    for n in 0..3 {
        let properties =
            BasicProperties::default().with_message_id(format!("m{n}").into()).with_delivery_mode(2);
        tap.publish("again.q", properties, b"x");
    }
    let mut rig = Rig::start(&node.url(), "again.q", 10);
    let first = rig.deliveries(3);
    rig.source.settle(vec![(first[0].tag, Settlement::Acknowledge)]);
    wait_acknowledged(&node);
    node.settle_declarations();
    node.kill9();
    assert_eq!(rig.wait_down().class, FaultClass::Outage);
    node.restart();
    rig.wait_up();
    let second = rig.deliveries(2);
    assert!(second.iter().all(|d| d.tag.epoch > first[0].tag.epoch));
    // Tags begin anew with each connection: these would be other messages now.
    rig.source.settle(first.iter().map(|d| (d.tag, Settlement::Acknowledge)).collect());
    assert!(rig.is_quiet());
    let listed = node.ctl(&["list_queues", "-q", "--no-table-headers", "messages_unacknowledged"]);
    assert_eq!(listed.trim(), "2");
    rig.source.settle(second.iter().map(|d| (d.tag, Settlement::Acknowledge)).collect());
    rig.source.stop(Duration::from_secs(5));
    wait_count(&Tap::connect(&node.url()), "again.q", 0);
}

fn wait_acknowledged(node: &RabbitNode) {
    let began = Instant::now();
    while node.ctl(&["list_queues", "-q", "--no-table-headers", "messages"]).trim() != "2" {
        assert!(began.elapsed() < SOON, "the acknowledgement did not arrive");
    }
    // Written within 200 ms by the queue's own sync timer.
    std::thread::sleep(Duration::from_millis(500));
}

/// Goal: a stream is never taken for a queue: it would begin at what comes next, and what came before would be missed without a
/// word. Method: a stream with messages; and one that the source itself declares.
#[test]
fn a_stream_is_refused_by_name() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("kinds.stream", &[("x-queue-type", AMQPValue::LongString("stream".into()))]);
    tap.publish("kinds.stream", BasicProperties::default(), b"before");
    let rig = Rig::start(&node.url(), "kinds.stream", 10);
    rig.wait_up();
    tap.publish("kinds.stream", BasicProperties::default(), b"after");
    let fault = loop {
        match rig.next() {
            SourceEvent::Down { fault, .. } => break fault,
            SourceEvent::Delivery(delivery) => panic!("{delivery:?}"),
            _ => {}
        }
    };
    assert_eq!(fault.class, FaultClass::Config);
    assert!(fault.text.contains("queue `kinds.stream` is a stream"), "{fault}");
    drop(rig);
    tap.delete_queue("kinds.stream");

    let declared = Topology::new().queue_with("kinds.stream", [("x-queue-type", "stream".into())]);
    let mut source = RabbitMqSource::new(&node.url(), "kinds.stream").unwrap().declare(declared);
    let refused = source.start(SourceEvents::channel().0, 10).unwrap_err();
    assert_eq!(refused.to_string(), "setting `queue`: it is declared as a stream, which is not consumed");
}

/// Goal: the offset of a stream is a header that anybody may write; it stops no queue, and the question leaves the order as it is. Method: classic
/// and quorum queues, one of these with a single active consumer, with messages that have the header among those that have not.
#[test]
fn a_forged_stream_offset_stops_nobody() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    for (kind, single) in [("classic", false), ("quorum", false), ("quorum", true)] {
        let queue = format!("kinds.{kind}.{single}");
        let kind = ("x-queue-type", AMQPValue::LongString(kind.into()));
        tap.queue(&queue, &[kind, ("x-single-active-consumer", AMQPValue::Boolean(single))]);
        for n in 0..6 {
            let bare = BasicProperties::default().with_message_id(format!("m{n}").into());
            let properties = if n % 2 == 0 { with_offset(&format!("m{n}")) } else { bare };
            tap.publish(&queue, properties, b"body");
        }
        let mut rig = Rig::start(&node.url(), &queue, 3);
        let epoch = rig.wait_up();
        let mut ids = Vec::new();
        while ids.len() < 6 {
            let delivery = rig.deliveries(1).remove(0);
            assert_eq!(delivery.tag.epoch, epoch);
            ids.push(delivery.message.message_id.unwrap().to_string());
            rig.source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
        }
        assert_eq!(ids, (0..6).map(|n| format!("m{n}")).collect::<Vec<_>>(), "{queue}");
        drop(rig);
        wait_count(&tap, &queue, 0);
        tap.delete_queue(&queue);
    }
}

/// Properties of a message with an id, and with the offset that RabbitMQ writes on a delivery of a stream.
fn with_offset(id: &str) -> BasicProperties {
    let mut offset = FieldTable::default();
    offset.insert("x-stream-offset".into(), AMQPValue::LongLongInt(7));
    BasicProperties::default().with_message_id(id.into()).with_headers(offset)
}

/// Goal: a user who may have one connection, with one channel, is told a stream from a queue with a forged offset too. Method: such a user consumes a queue of
/// each kind; where it cannot be asked beside the deliveries, the next connection asks.
#[test]
fn one_connection_is_enough_to_recognise_a_stream() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    node.ctl(&["add_user", "single", "single"]);
    node.ctl(&["set_permissions", "-p", "/", "single", "", "", ".*"]);
    node.ctl(&["set_user_limits", "single", r#"{"max-connections": 1, "max-channels": 1}"#]);
    let url = node.url_as("single", "single", "%2f");
    for kind in ["classic", "quorum", "stream"] {
        let queue = format!("single.{kind}");
        tap.queue(&queue, &[("x-queue-type", AMQPValue::LongString(kind.into()))]);
        let mut rig = Rig::start(&url, &queue, 3);
        rig.wait_up();
        let all: BTreeSet<String> = (0..4).map(|n| format!("m{n}")).collect();
        all.iter().for_each(|id| tap.publish(&queue, with_offset(id), b"body"));
        let (mut ids, mut faults) = (BTreeSet::new(), Vec::new());
        let mut refused = false;
        while ids.len() < all.len() && !refused {
            match rig.next() {
                SourceEvent::Delivery(delivery) => {
                    ids.insert(delivery.message.message_id.unwrap().to_string());
                    rig.source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
                }
                SourceEvent::Down { fault, .. } => {
                    refused = fault.text.contains("is a stream");
                    faults.push(fault);
                }
                _ => {}
            }
        }
        assert_eq!(refused, kind == "stream", "{faults:?}");
        assert_eq!(ids, if refused { BTreeSet::new() } else { all }, "{queue}: {faults:?}");
        let named = format!("it could not be asked what kind of queue `{queue}` is");
        assert!(faults[0].text.contains(&named), "{faults:?}");
        drop(rig);
        tap.delete_queue(&queue);
    }
    node.ctl(&["delete_user", "single"]);
}

/// Goal: the question about a queue ends no connection, whatever message it fetches. Method: a delivery with a forged offset, and behind it one
/// whose routing key is no text.
#[test]
fn the_question_takes_any_message() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("asked.q", &[]);
    tap.exchange("asked.x", ExchangeKind::Fanout);
    tap.bind("asked.q", "asked.x", "");
    tap.publish("asked.q", with_offset("m0"), b"body");
    let properties = Properties::default().id(b"m1");
    RawAmqp::connect(node.port()).publish("asked.x", b"\xff\xfe", &properties, b"body");
    wait_count(&tap, "asked.q", 2);
    let mut rig = Rig::start(&node.url(), "asked.q", 1);
    let epoch = rig.wait_up();
    for id in ["m0", "m1"] {
        let delivery = rig.deliveries(1).remove(0);
        assert_eq!(delivery.message.message_id.as_deref(), Some(id));
        assert_eq!(delivery.tag.epoch, epoch);
        rig.source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
    }
    drop(rig);
    tap.delete_queue("asked.q");
}
