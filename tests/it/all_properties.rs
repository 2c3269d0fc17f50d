//! All fourteen properties and all types of header values, both ways: set on an event, read on a delivery, kept wherever a message
//! is kept.

use std::sync::mpsc;
use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use onewrite::broker::{
    Delivery, MemoryBroker, Publisher, QueueOptions, RabbitMq, RabbitMqSource, Settlement, Source,
    SourceEvent, SourceEvents,
};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{
    Error, Event, EventError, FaultClass, HeaderValue, Message, OpenError, Outcome, RecordedEvent, Store,
    limits,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::scratch::until_within;
use crate::support::rabbit::shared_node;
use crate::support::rig::{Rig, outgoing};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(60);
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");

/// A value of each type, at the edge of its range.
fn values() -> Vec<(&'static str, HeaderValue)> {
    let table = |entries: &[(&str, HeaderValue)]| {
        HeaderValue::Table(entries.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect())
    };
    vec![
        ("array", HeaderValue::Array(vec![HeaderValue::Void, table(&[("a", 1.into()), ("é", "ü".into())])])),
        ("bool", true.into()),
        ("bytes", vec![0, 0xff].into()),
        ("decimal", HeaderValue::Decimal { scale: 255, unscaled: u32::MAX }),
        ("double", f64::MIN_POSITIVE.into()),
        ("empty", HeaderValue::Array(vec![HeaderValue::Array(vec![]), table(&[])])),
        ("float", HeaderValue::Float(f32::MAX)),
        ("i16", HeaderValue::I16(i16::MIN)),
        ("i32", HeaderValue::I32(i32::MIN)),
        ("i8", HeaderValue::I8(i8::MIN)),
        ("int", i64::MIN.into()),
        ("table", table(&[("inner", table(&[("x", HeaderValue::Float(-0.0))]))])),
        ("text", "grüße".into()),
        ("timestamp", HeaderValue::Timestamp(u64::MAX)),
        ("u16", HeaderValue::U16(u16::MAX)),
        ("u32", HeaderValue::U32(u32::MAX)),
        ("u8", HeaderValue::U8(u8::MAX)),
        ("void", HeaderValue::Void),
    ]
}

/// An event that has everything.
fn everything() -> Event {
    let event = Event::bytes("quote.asked", "1")
        .id("q-1")
        .content_type("text/plain")
        .content_encoding("gzip")
        .correlation_id("request-17")
        .reply_to("answers")
        .priority(9)
        .expiration_ms(3_600_000)
        .user_id("guest")
        .app_id("till-7")
        .cluster_id("eu-1")
        .transient();
    values().into_iter().fold(event, |event, (name, value)| event.header(name, value))
}

/// Says what is missing of it in a message.
fn check_message(message: &Message) {
    assert_eq!(message.message_id.as_deref(), Some("q-1"));
    assert_eq!(message.event_type.as_deref(), Some("quote.asked"));
    assert_eq!(message.content_type.as_deref(), Some("text/plain"));
    assert_eq!(message.content_encoding.as_deref(), Some("gzip"));
    assert_eq!(message.correlation_id.as_deref(), Some("request-17"));
    assert_eq!(message.reply_to.as_deref(), Some("answers"));
    assert_eq!(message.priority, Some(9));
    assert_eq!(message.expiration.as_deref(), Some("3600000"));
    assert_eq!(message.user_id.as_deref(), Some("guest"));
    assert_eq!(message.app_id.as_deref(), Some("till-7"), "the event's, not the relay's");
    assert_eq!(message.cluster_id.as_deref(), Some("eu-1"));
    assert_eq!(message.delivery_mode, Some(1));
    assert!(message.timestamp_s.is_some_and(|seconds| seconds > 1_700_000_000));
    for (name, value) in values() {
        assert_eq!(message.header(name), Some(&value), "{name}");
    }
}

fn check_record(record: &RecordedEvent) {
    let properties = record.properties();
    assert_eq!((record.content_type(), record.correlation_id()), (Some("text/plain"), Some("request-17")));
    assert_eq!(properties.content_encoding.as_deref(), Some("gzip"));
    assert_eq!(properties.reply_to.as_deref(), Some("answers"));
    assert_eq!((properties.priority, properties.expiration_ms), (Some(9), Some(3_600_000)));
    assert_eq!(properties.user_id.as_deref(), Some("guest"));
    assert_eq!(properties.app_id.as_deref(), Some("till-7"));
    assert_eq!(properties.cluster_id.as_deref(), Some("eu-1"));
    assert!(properties.transient);
    let headers: Vec<_> =
        record.headers().iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    assert_eq!(headers, values());
}

fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(SOON, what, holds);
}

fn rabbit() -> RabbitMq {
    let pause = (Duration::from_millis(50), Duration::from_millis(500));
    RabbitMq::new(&shared_node().url()).unwrap().reconnect_backoff(pause.0, pause.1)
}

/// Takes an event with everything through a broker, by way of the relay's quarantine and the consumer's, over restarts of both.
fn there_and_back<P: Publisher + 'static, S: Source + 'static>(
    publisher: impl Fn() -> P,
    source: impl Fn() -> S,
    queue: &str,
    declare: impl FnOnce(),
) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    // No queue yet: the event goes to quarantine, and the store is closed over it.
    let store = Store::open(&path).unwrap();
    let relay = store.relay("r").app_id("relay").destination_attempts(1).spawn(publisher()).unwrap();
    let to = queue.to_owned();
    store.write(move |tx| tx.append(everything().to("", &*to))).unwrap();
    until("a quarantined event", || !store.quarantine("r").unwrap().list(None, 1).unwrap().is_empty());
    check_record(&store.quarantine("r").unwrap().get(0).unwrap().1.unwrap());
    relay.stop(SOON);
    store.close().unwrap();

    declare();
    let store = Store::open(&path).unwrap();
    check_record(&store.read().unwrap().event(0).unwrap().unwrap());
    let relay = store.relay("r").app_id("relay").spawn(publisher()).unwrap();
    store.quarantine("r").unwrap().redrive(0).unwrap();
    let consumer = store.consumer("c").spawn(source(), |_, _| Err(Error::reject("not today"))).unwrap();
    until("a rejected delivery", || store.rejected("c").len().unwrap() == 1);
    consumer.stop(SOON);
    relay.stop(SOON);
    check_message(&store.rejected("c").get(0).unwrap().1);
    store.close().unwrap();

    let store = Store::open(&path).unwrap();
    check_message(&store.rejected("c").get(0).unwrap().1);
    store.rejected("c").redrive(0).unwrap();
    let (seen, handled) = mpsc::channel();
    let consumer = store
        .consumer("c")
        .spawn(source(), move |delivery: &Delivery, _: &onewrite::Transaction| {
            seen.send(delivery.message.clone()).map_err(Error::app)
        })
        .unwrap();
    check_message(&handled.recv_timeout(SOON).unwrap());
    consumer.stop(SOON);
    store.close().unwrap();
}

/// Goal: nothing that a message carries is dropped on the way: log, relay's quarantine, broker, rejected delivery, redrive. Method: one
/// event with all properties and all types, through a real RabbitMQ.
#[test]
fn all_of_an_event_arrives_through_rabbitmq() {
    let tap = Tap::connect(&shared_node().url());
    let source = || RabbitMqSource::new(&shared_node().url(), "all.q").unwrap();
    there_and_back(rabbit, source, "all.q", || tap.queue("all.q", &[]));
}

/// Goal and method: as above, through the broker in memory.
#[test]
fn all_of_an_event_arrives_through_memory() {
    let broker = MemoryBroker::new();
    let declare = || broker.declare_queue("q", QueueOptions::default());
    there_and_back(|| broker.publisher(), || broker.source("q"), "q", declare);
}

/// A value that RabbitMQ carries; tables in the order of their names.
fn any_value() -> impl Strategy<Value = HeaderValue> {
    let leaf = prop_oneof![
        ".{0,20}".prop_map(HeaderValue::from),
        any::<i64>().prop_map(HeaderValue::Int),
        any::<bool>().prop_map(HeaderValue::Bool),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(HeaderValue::Bytes),
        any::<i8>().prop_map(HeaderValue::I8),
        any::<u8>().prop_map(HeaderValue::U8),
        any::<i16>().prop_map(HeaderValue::I16),
        any::<u16>().prop_map(HeaderValue::U16),
        any::<i32>().prop_map(HeaderValue::I32),
        any::<u32>().prop_map(HeaderValue::U32),
        (prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO)
            .prop_map(HeaderValue::Float),
        (prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL | prop::num::f64::ZERO)
            .prop_map(HeaderValue::Double),
        any::<(u8, u32)>().prop_map(|(scale, unscaled)| HeaderValue::Decimal { scale, unscaled }),
        any::<u64>().prop_map(HeaderValue::Timestamp),
        Just(HeaderValue::Void),
    ];
    leaf.prop_recursive(8, 40, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(HeaderValue::Array),
            prop::collection::btree_map(".{0,20}", inner, 0..5)
                .prop_map(|entries| HeaderValue::Table(entries.into_iter().collect())),
        ]
    })
}

fn any_message() -> impl Strategy<Value = Message> {
    let text = || prop::option::of(".{0,60}".prop_map(onewrite::Text::from));
    let texts = (text(), text(), text(), text(), text(), text(), text());
    let rest = (
        prop::option::of(any::<u32>().prop_map(|ms| ms.to_string().into())),
        prop::option::of(Just("guest".into())),
        any::<Option<u8>>(),
        prop::sample::select(vec![1, 2]),
        any::<Option<u64>>(),
        // Not `CC` and its like: the broker acts on those.
        prop::collection::btree_map("[a-zé]{1,40}", any_value(), 0..6),
        prop::collection::vec(any::<u8>(), 0..300),
    );
    (texts, rest).prop_map(|(texts, rest)| {
        let (expiration, user_id, priority, delivery_mode, timestamp_s, headers, payload) = rest;
        Message {
            message_id: None,
            event_type: texts.0,
            content_type: texts.1,
            content_encoding: texts.2,
            correlation_id: texts.3,
            reply_to: texts.4,
            app_id: texts.5,
            cluster_id: texts.6,
            expiration,
            user_id,
            priority,
            delivery_mode: Some(delivery_mode),
            timestamp_s,
            headers: headers.into_iter().map(|(name, value)| (name.into(), value)).collect(),
            payload,
        }
    })
}

/// Goal: any message that AMQP carries comes back from RabbitMQ as it was published. Method: 300 random messages through the publisher
/// and the source; a time to live that has run out is allowed to have its effect.
#[test]
fn any_message_round_trips_through_rabbitmq() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("any.q", &[("x-max-priority", AMQPValue::LongInt(1))]);
    let mut rig = Rig::up(&node.url());
    let (sender, events) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&node.url(), "any.q").unwrap();
    source.start(sender, 1).unwrap();
    let mut runner = TestRunner::deterministic();
    for n in 0..300 {
        let message = any_message().new_tree(&mut runner).unwrap().current();
        let expired = message.expiration.as_ref().is_some_and(|ms| ms.len() < 6);
        let message = Message {
            message_id: Some(format!("any-{n}").into()),
            expiration: message.expiration.filter(|_| !expired),
            ..message
        };
        rig.publish(outgoing(n, "", "any.q", message.clone()));
        assert_eq!(rig.wait_outcome(n), Outcome::Confirmed, "{message:?}");
        let delivery = loop {
            match events.recv_timeout(SOON).unwrap() {
                SourceEvent::Delivery(delivery) => break *delivery,
                SourceEvent::Up { .. } => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(delivery.message, message, "message {n}");
        source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
    }
    source.stop(SOON);
}

fn nested(levels: usize, array: bool) -> HeaderValue {
    (1..levels).fold(HeaderValue::Void, |inner, _| {
        if array { HeaderValue::Array(vec![inner]) } else { HeaderValue::Table(vec![("n".into(), inner)]) }
    })
}

/// Goal: what no message can carry is refused at append, with an error that names the header; what is at the limit passes, and arrives.
/// Method: each limit, at it and beyond it; the publisher is given the same without a store.
#[test]
fn what_amqp_cannot_carry_is_refused_at_append() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let refused = |event: Event| match store.write(move |tx| tx.append(event.clone().unpublished())) {
        Err(Error::Event(error)) => error,
        other => panic!("{other:?}"),
    };
    let event = |value: HeaderValue| Event::bytes("t", "").header("h\u{e9}ader", value);
    let max = limits::TABLE_NESTING_MAX;
    for array in [false, true] {
        store.write(move |tx| tx.append(event(nested(max, array)).unpublished())).unwrap();
        for levels in [max + 1, max + 2, 200] {
            let error = refused(event(nested(levels, array)));
            assert!(
                matches!(&error, EventError::NestedTooDeep { header, max: reported } if header == "héader" && *reported == max),
                "{error}"
            );
        }
    }
    let many = move |count: usize| event(HeaderValue::Array(vec![HeaderValue::Void; count]));
    store.write(move |tx| tx.append(many(limits::HEADER_VALUES_MAX - 1).unpublished())).unwrap();
    assert!(matches!(refused(many(limits::HEADER_VALUES_MAX)), EventError::TooManyHeaderValues { .. }));
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for value in [HeaderValue::Double(odd), HeaderValue::Float(odd as f32)] {
            let inner = HeaderValue::Array(vec![value.clone()]);
            assert!(matches!(refused(event(value)), EventError::OddFloat { .. }));
            assert!(matches!(refused(event(inner)), EventError::OddFloat { .. }));
        }
    }
    let table = |names: &[&str]| {
        event(HeaderValue::Table(names.iter().map(|name| ((*name).to_owned(), 1.into())).collect()))
    };
    assert!(matches!(refused(table(&["a", "b", "a"])), EventError::DuplicateHeader { name } if name == "a"));
    assert!(matches!(refused(table(&[&"n".repeat(256)])), EventError::TooLong { len: 256, .. }));
    assert!(matches!(refused(table(&["a\nb"])), EventError::ControlCharacter { .. }));
    let large = HeaderValue::Array(vec!["x".repeat(limits::HEADERS_BYTES_MAX / 2).into(); 2]);
    assert!(matches!(refused(event(large)), EventError::HeadersTooLarge { .. }));
    let long = "x".repeat(256);
    for (field, event) in [
        ("content_encoding", Event::bytes("t", "").content_encoding(&*long)),
        ("reply_to", Event::bytes("t", "").reply_to(&*long)),
        ("user_id", Event::bytes("t", "").user_id(&*long)),
        ("app_id", Event::bytes("t", "").app_id(&*long)),
        ("cluster_id", Event::bytes("t", "").cluster_id(&*long)),
    ] {
        assert!(matches!(refused(event), EventError::TooLong { field: reported, .. } if reported == field));
    }
}

/// Goal: a message that was never checked by a store cannot harm the publisher's connection. Method: what append refuses, given to the
/// publisher; each is a fault of that message alone, and the next message is confirmed on the same connection.
#[test]
fn the_publisher_refuses_what_rabbitmq_cannot_read() {
    let node = shared_node();
    Tap::connect(&node.url()).queue("unchecked.q", &[]);
    let mut rig = Rig::up(&node.url());
    let epoch = rig.epoch;
    let bad = [
        nested(limits::TABLE_NESTING_MAX + 1, true),
        HeaderValue::Double(f64::NAN),
        HeaderValue::Array(vec![HeaderValue::Float(f32::INFINITY)]),
        HeaderValue::Table(vec![("n".repeat(256), 1.into())]),
    ];
    for (n, value) in (0..).zip(bad) {
        let message = |headers| Message { message_id: Some("m".into()), headers, ..Message::default() };
        rig.publish(outgoing(2 * n, "", "unchecked.q", message(vec![("h".into(), value)])));
        let Outcome::Refused(fault) = rig.wait_outcome(2 * n) else { panic!("value {n} is not refused") };
        assert_eq!(fault.class, FaultClass::Message);
        rig.publish(outgoing(2 * n + 1, "", "unchecked.q", message(vec![])));
        assert_eq!(rig.wait_outcome(2 * n + 1), Outcome::Confirmed);
    }
    assert_eq!(rig.epoch, epoch, "one connection");
}

/// The story: `x-death`, which says how often and why a message was dead-lettered, is an array of tables, and was dropped. Method: a
/// message that expires in one queue and is read from another.
#[test]
fn the_story_of_a_dead_letter_is_read() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("buried.q", &[]);
    let to = |key: &str| AMQPValue::LongString(key.into());
    tap.queue(
        "dying.q",
        &[("x-dead-letter-exchange", to("")), ("x-dead-letter-routing-key", to("buried.q"))],
    );
    let mut headers = FieldTable::default();
    headers.insert("retries".into(), AMQPValue::ShortShortUInt(3));
    let properties = BasicProperties::default().with_expiration("1".into()).with_headers(headers);
    tap.publish("dying.q", properties, b"");
    let (sender, events) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&node.url(), "buried.q").unwrap();
    source.start(sender, 1).unwrap();
    let delivery = loop {
        match events.recv_timeout(SOON).unwrap() {
            SourceEvent::Delivery(delivery) => break *delivery,
            SourceEvent::Up { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    let deaths = delivery.message.header("x-death").and_then(HeaderValue::as_array).expect("an array");
    let death = deaths[0].as_table().expect("a table");
    let of = |wanted: &str| death.iter().find(|(name, _)| name == wanted).map(|(_, value)| value);
    assert_eq!(of("queue").and_then(HeaderValue::as_text), Some("dying.q"));
    assert_eq!(of("reason").and_then(HeaderValue::as_text), Some("expired"));
    assert_eq!(of("count").and_then(HeaderValue::as_int), Some(1));
    assert_eq!(of("original-expiration").and_then(HeaderValue::as_text), Some("1"));
    assert_eq!(delivery.message.header("retries").and_then(HeaderValue::as_int), Some(3));
    source.stop(SOON);
}

/// Goal: a file of format 4 opens and is read; one with records of today is refused by a release that does not know them. Method: the
/// number in a file; the release of the past is played by a number that is one too high.
#[test]
fn a_file_of_the_format_before_opens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    let old = Event::bytes("t", "1").header("text", "x").header("int", 7).correlation_id("c").unpublished();
    store.write(move |tx| tx.append(old.clone())).unwrap();
    store.close().unwrap();
    let format = |set: Option<fn(u32) -> u32>| {
        let db = onewrite::redb::Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        let format = {
            let mut meta = tx.open_table(META).unwrap();
            let format = u32::from_le_bytes(meta.get("format").unwrap().unwrap().value().try_into().unwrap());
            let set = set.map_or(format, |set| set(format));
            meta.insert("format", &set.to_le_bytes()[..]).unwrap();
            format
        };
        tx.commit().unwrap();
        format
    };
    let today = format(Some(|_| 4));
    assert!(today > 4, "records have a form that format 4 does not know");
    let store = Store::open(&path).unwrap();
    let event = store.read().unwrap().event(0).unwrap().unwrap();
    assert_eq!(event.headers(), [("text".to_owned(), "x".into()), ("int".to_owned(), 7.into())]);
    assert_eq!(event.properties(), &onewrite::Properties::default());
    store.write(|tx| tx.append(everything().unpublished())).unwrap();
    store.close().unwrap();
    assert_eq!(format(Some(|format| format + 1)), today, "brought up");
    let Err(Error::Open(OpenError::NewerFormat { found, supported, .. })) = Store::open(&path) else {
        panic!("a newer format was opened")
    };
    assert_eq!((found, supported), (today + 1, today));
}
