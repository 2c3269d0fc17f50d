//! Messages that claim to be others: forged numbers of a lane, ids that are taken, contents that differ in a part.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onewrite::broker::{ExchangeKind, MemoryBroker};
use onewrite::{Error, Event, HeaderValue, IdsPolicy, Message, Store, wire};

use crate::lanes_inbox::{SOON, drained, numbered, quick, setup, until};

const GENUINE: u64 = 43;

/// A forged message of the lane that the first event of a store begins.
fn forged(store: &str, number: i64, body: &str) -> Message {
    Message {
        message_id: Some(format!("forged-{number}").into()),
        headers: vec![
            (wire::STORE.into(), store.to_owned().into()),
            (wire::EPOCH.into(), 1.into()),
            (wire::LANE.into(), 0.into()),
            (wire::LANE_NUMBER.into(), number.into()),
        ],
        payload: body.as_bytes().to_vec(),
        ..Message::default()
    }
}

fn with_time(mut message: Message, time: &str) -> Message {
    message.headers.push(("cloudEvents_time".into(), time.to_owned().into()));
    message
}

type Forge = fn(&str, &MemoryBroker);

fn publish(broker: &MemoryBroker, message: Message) {
    broker.publish("", "q", message).unwrap();
}

/// Goal: nothing genuine is dropped in silence on account of forgeries: it is applied, or rejected. Method: a relay sends three
/// events; then forgeries of its lane come, in several ways; then the relay sends forty more. Applied and rejected are together 43,
/// and a second copy of each that was applied is a repeat.
#[test]
fn nothing_genuine_is_dropped_on_account_of_forgeries() {
    let later: [(&str, Forge); 7] = [
        ("their own bodies", |id, broker| (3..43).for_each(|n| publish(broker, forged(id, n, "forged")))),
        ("one of the year 9999", |id, broker| {
            (3..42).for_each(|n| publish(broker, forged(id, n, "forged")));
            publish(broker, with_time(forged(id, 42, "forged"), "9999-12-31T23:59:59Z"));
        }),
        ("a far number of the year 9999", |id, broker| {
            (3..43).for_each(|n| publish(broker, forged(id, n, "forged")));
            publish(broker, with_time(forged(id, 1_000_000, "forged"), "9999-12-31T23:59:59Z"));
        }),
        ("all rejected", |id, broker| {
            (3..43).for_each(|n| publish(broker, forged(id, n, "reject")));
            publish(broker, with_time(forged(id, i64::MAX, "reject"), "9999-12-31T23:59:59Z"));
        }),
        ("an AMQP timestamp", |id, broker| {
            (3..43).for_each(|n| publish(broker, forged(id, n, "forged")));
            publish(broker, Message { timestamp_s: Some(u64::MAX), ..forged(id, 1 << 40, "forged") });
        }),
        ("only every second number", |id, broker| {
            (5..43).step_by(2).for_each(|n| publish(broker, forged(id, n, "forged")));
        }),
        ("many more, backwards", |id, broker| {
            (3..900)
                .rev()
                .for_each(|n| publish(broker, forged(id, n, if n % 3 == 0 { "reject" } else { "forged" })));
        }),
    ];
    for (name, forge) in later {
        let (folder, credit, broker) = setup();
        let bank = Store::open(folder.path().join("bank.redb")).unwrap();
        let applied = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&applied);
        let consumer = quick(&credit)
            .spawn(broker.source("q"), move |delivery, _| {
                let body = String::from_utf8_lossy(&delivery.message.payload).into_owned();
                if body == "reject" {
                    return Err(Error::reject("no"));
                }
                seen.lock().unwrap().push(body);
                Ok(())
            })
            .unwrap();
        let relay = bank.relay("rabbit").spawn(broker.publisher()).unwrap();
        let send = |numbers: std::ops::Range<u64>| {
            for n in numbers {
                bank.write(move |tx| {
                    tx.append(Event::bytes("paid", format!("genuine-{n}")).key("a").to("", "q"))
                })
                .unwrap()
                .wait_confirmed(SOON)
                .unwrap();
            }
            until("an empty queue", || drained(&broker));
        };
        send(0..3);
        forge(&bank.id(), &broker);
        until("the forged", || drained(&broker));
        send(3..GENUINE);
        let _ = relay.stop(SOON);
        let stats = consumer.stop(SOON);
        let good = applied.lock().unwrap().iter().filter(|body| body.starts_with("genuine")).count();
        let rejected = credit.rejected("service");
        let entries = rejected.list(None, 10_000).unwrap();
        let kept = entries
            .iter()
            .filter(|entry| rejected.get(entry.number).unwrap().1.payload.starts_with(b"genuine"));
        assert_eq!(good + kept.count(), GENUINE as usize, "{name}: {stats:?}");
        if name == "all rejected" {
            assert_eq!(good as u64, GENUINE, "what a handler refuses takes no number");
        }
    }
}

/// Goal: messages of one id that differ in any part are no repeats: the first is applied, each other is rejected, and the same
/// again is a repeat; so is a copy in which the broker has written. Method: change type, exchange, routing key, properties, headers of
/// several types, the payload; then copies with RabbitMQ's own marks.
#[test]
fn one_id_and_another_content_is_rejected() {
    let (_folder, store, broker) = setup();
    broker.declare_exchange("x", ExchangeKind::Fanout);
    broker.bind("q", "x", "").unwrap();
    let consumer = quick(&store).spawn(broker.source("q"), |_, _| Ok(())).unwrap();
    let message = || Message {
        message_id: Some("order-17".into()),
        event_type: Some("order.paused".into()),
        headers: vec![("region".into(), "eu".into())],
        ..Message::default()
    };
    let with = |name: &'static str, value: HeaderValue| {
        let mut message = message();
        message.headers.push((name.into(), value));
        ("", "q", message)
    };
    let others: Vec<(&str, &str, Message)> = vec![
        ("", "q", Message { event_type: Some("order.closed".into()), ..message() }),
        ("", "q", Message { event_type: None, ..message() }),
        ("", "q", Message { content_type: Some("text/plain".into()), ..message() }),
        ("", "q", Message { content_encoding: Some("gzip".into()), ..message() }),
        ("", "q", Message { reply_to: Some("answers".into()), ..message() }),
        ("", "q", Message { app_id: Some("till".into()), ..message() }),
        ("", "q", Message { priority: Some(9), ..message() }),
        ("", "q", Message { headers: vec![("region".into(), HeaderValue::Int(1))], ..message() }),
        ("", "q", Message { headers: vec![], ..message() }),
        ("", "q", Message { payload: b"1".to_vec(), ..message() }),
        ("x", "elsewhere", message()),
        with("x-tenant", "a".into()),
        with("x-tenant", "b".into()),
        with("amount", HeaderValue::Decimal { scale: 2, unscaled: 100 }),
        with("amount", HeaderValue::Double(1.0)),
        with("items", HeaderValue::Table(vec![("a".into(), HeaderValue::I32(1))])),
        with("items", HeaderValue::Table(vec![("a".into(), HeaderValue::I32(2))])),
        with("items", HeaderValue::Array(vec![HeaderValue::Timestamp(1), HeaderValue::Void])),
    ];
    let copies: Vec<(&str, &str, Message)> = vec![
        with("x-delivery-count", 2.into()),
        with("x-death", HeaderValue::Array(vec![HeaderValue::Table(vec![("count".into(), 1.into())])])),
        ("", "q", Message { timestamp_s: Some(7), ..message() }),
    ];
    publish(&broker, message());
    for _ in 0..2 {
        for (exchange, routing_key, other) in others.iter().chain(&copies) {
            broker.publish(exchange, routing_key, other.clone()).unwrap();
        }
        publish(&broker, message());
    }
    until("an empty queue", || drained(&broker));
    let stats = consumer.stop(SOON);
    // Of what was rejected, the same again makes no second row.
    let (different, copies) = (others.len() as u64, copies.len() as u64);
    let counts = (stats.applied, stats.quarantined, stats.conflicts, stats.repeated);
    assert_eq!(counts, (1, different, different, 2 + 2 * copies + different), "{stats:?}");
}

/// Goal: a message that its handler has refused takes its number and its id once it is driven again and applied: a copy of it is a repeat then, and
/// another content a conflict. Method: a handler that refuses at first; a message with a lane and one with an id.
#[test]
fn a_redriven_message_takes_its_place() {
    let (_folder, store, broker) = setup();
    let refuses = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&refuses);
    let consumer = quick(&store)
        .spawn(broker.source("q"), move |_, _| match asked.load(Ordering::SeqCst) {
            true => Err(Error::reject("not yet")),
            false => Ok(()),
        })
        .unwrap();
    let of_id =
        |body: &str| Message { message_id: Some("m-1".into()), payload: body.into(), ..Message::default() };
    for body in ["good", "other"] {
        for message in [numbered(0, 0, body), of_id(body)] {
            for _ in 0..2 {
                publish(&broker, message.clone());
            }
            until("an empty queue", || drained(&broker));
        }
        if body == "good" {
            let refused = consumer.status();
            assert_eq!((refused.quarantined, refused.repeated), (2, 2), "{refused:?}");
            refuses.store(false, Ordering::SeqCst);
            assert_eq!(store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 2);
            until("both", || consumer.status().redriven == 2);
        }
    }
    for message in [numbered(0, 0, "good"), of_id("good")] {
        publish(&broker, message);
    }
    until("an empty queue", || drained(&broker));
    let stats = consumer.stop(SOON);
    assert_eq!((stats.applied, stats.conflicts, stats.repeated), (2, 2, 2 + 2 + 2), "{stats:?}");
}

/// Goal: an id that others have claimed with a message which the handler rejects still belongs to its owner. Method: the rejected claim, the
/// owner's message, a third content; each twice or alone, in one batch and one by one.
#[test]
fn a_rejected_claim_takes_no_id() {
    for one_by_one in [true, false] {
        let (_folder, store, broker) = setup();
        let consumer = quick(&store)
            .spawn(broker.source("q"), |delivery, _| match delivery.message.payload.as_slice() {
                b"bad" => Err(Error::reject("no")),
                _ => Ok(()),
            })
            .unwrap();
        for body in ["bad", "bad", "good", "good", "other", "bad"] {
            let message =
                Message { message_id: Some("m-1".into()), payload: body.into(), ..Message::default() };
            publish(&broker, message);
            until("an empty queue", || !one_by_one || drained(&broker));
        }
        until("an empty queue", || drained(&broker));
        let stats = consumer.stop(SOON);
        assert_eq!((stats.applied, stats.quarantined), (1, 2), "{one_by_one}: {stats:?}");
    }
}

/// Goal: others cannot have what was applied forgotten. Method: room for 100 ids; one genuine, 1,500 hostile ones, the genuine one
/// again. By the policy of forgetting it would be applied twice.
#[test]
fn hostile_ids_make_nothing_forgotten() {
    for (policy, applied) in [(IdsPolicy::Refuse, 1), (IdsPolicy::ForgetOldest, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let builder = Store::builder().inbox_ids_max(100).inbox_ids_policy(policy);
        let store = builder.open(folder.path().join("a.redb")).unwrap();
        let broker = MemoryBroker::new();
        broker.declare_queue("q", Default::default());
        let genuine = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&genuine);
        let consumer = quick(&store)
            .spawn(broker.source("q"), move |delivery, _| {
                *counted.lock().unwrap() += u32::from(delivery.message.payload == b"genuine");
                Ok(())
            })
            .unwrap();
        let message = |id: String, body: &str| Message {
            message_id: Some(id.into()),
            payload: body.into(),
            ..Message::default()
        };
        publish(&broker, message("genuine".into(), "genuine"));
        (0..1_500).for_each(|n| publish(&broker, message(format!("h-{n}"), "hostile")));
        publish(&broker, message("genuine".into(), "genuine"));
        until("an empty queue", || drained(&broker));
        let stats = consumer.stop(Duration::from_secs(5));
        assert_eq!(*genuine.lock().unwrap(), applied, "{policy:?}");
        let refused = if policy == IdsPolicy::Refuse { 1_401 } else { 0 };
        assert_eq!((stats.quarantined, stats.conflicts), (refused, 0), "{policy:?}: {stats:?}");
        let entry = store.rejected("service").list(None, 1).unwrap().pop();
        assert_eq!(
            entry.map(|entry| entry.reason),
            (refused > 0).then(|| "scope `service` remembers 100 ids, as many as it may: a new one is refused until some are old enough".into())
        );
    }
}
