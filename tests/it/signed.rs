//! Producers that sign and consumers that check: forgeries mark nothing, and no genuine event is rejected for their sake.

use std::sync::{Arc, Mutex};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::{Error, Event, Message, ProducerKeys, RejectTo, SigningKey, Store, wire};

use crate::lanes_inbox::{SOON, drained, quick, setup, until};

fn key(byte: u8) -> SigningKey {
    SigningKey::new([byte; 32]).unwrap()
}

/// Bodies that the handler has had, each once, in order of arrival.
type Applied = Arc<Mutex<Vec<String>>>;

fn applied() -> (Applied, impl Fn(&onewrite::broker::Delivery, &onewrite::Transaction) -> onewrite::Result<()>)
{
    let all = Applied::default();
    let seen = Arc::clone(&all);
    let handler = move |delivery: &onewrite::broker::Delivery, _: &onewrite::Transaction| {
        seen.lock().unwrap().push(String::from_utf8_lossy(&delivery.message.payload).into_owned());
        Ok(())
    };
    (all, handler)
}

fn send(bank: &Store, queue: &'static str, numbers: std::ops::Range<u64>) {
    for n in numbers {
        bank.write(move |tx| tx.append(Event::bytes("paid", format!("genuine-{n}")).key("a").to("", queue)))
            .unwrap()
            .wait_confirmed(SOON)
            .unwrap();
    }
}

fn genuine(numbers: std::ops::Range<u64>) -> Vec<String> {
    numbers.map(|n| format!("genuine-{n}")).collect()
}

/// A signed message with another number and another body, as somebody makes it who reads the queue and may publish to it.
fn forged(genuine: &Message, number: i64) -> Message {
    let mut message = Message { payload: b"forged".to_vec(), ..genuine.clone() };
    for (name, value) in &mut message.headers {
        if name == wire::LANE_NUMBER {
            *value = number.into();
        }
    }
    message
}

/// Goal: with signatures, every genuine event is applied once, whatever is forged, wherever rejected deliveries go. Method: a relay
/// signs three events; forgeries of its next forty numbers, of far ones, of an unknown store, without a store, without a signature come;
/// then the relay sends forty more, and the broker a copy of each.
#[test]
fn forgeries_mark_nothing() {
    for to in [RejectTo::Quarantine, RejectTo::DeadLetter] {
        let (folder, credit, broker) = setup();
        broker.declare_queue("copies", QueueOptions::default());
        let bank = Store::open(folder.path().join("bank.redb")).unwrap();
        let (applied, handler) = applied();
        let keys = ProducerKeys::new().key(&bank.id(), key(1)).unwrap();
        let consumer =
            quick(&credit).rejects(to).authenticate(keys).spawn(broker.source("q"), handler).unwrap();
        let relay = bank.relay("rabbit").sign_with(key(1)).spawn(broker.publisher()).unwrap();
        let publish = |message: Message| broker.publish("", "q", message).unwrap();

        send(&bank, "copies", 0..1);
        let example = Message::clone(&broker.messages("copies")[0].message);
        send(&bank, "q", 0..3);
        until("the first", || drained(&broker));
        let lane = 1; // that of the queue `q`: the sequence number of its first event
        let mut of_lane = example.clone();
        for (name, value) in &mut of_lane.headers {
            if name == wire::LANE {
                *value = lane.into();
            }
        }
        for number in (3..43).chain([1_000_000, i64::MAX]) {
            publish(forged(&of_lane, number));
        }
        let without = |name: &str| {
            let mut message = forged(&of_lane, 3);
            message.headers.retain(|(header, _)| header != name);
            message
        };
        publish(without(wire::SIGNATURE));
        publish(without(wire::STORE));
        publish(Message {
            message_id: Some("foreign".into()),
            payload: b"forged".to_vec(),
            ..Message::default()
        });
        until("the forged", || drained(&broker));
        send(&bank, "q", 3..43);
        until("the genuine", || drained(&broker));

        let stats = consumer.stop(SOON);
        assert_eq!(*applied.lock().unwrap(), genuine(0..43), "{to:?}: {stats:?}");
        assert_eq!((stats.applied, stats.conflicts), (43, 0), "{to:?}: {stats:?}");
        let rejected = credit.rejected("service").list(None, 1000).unwrap();
        match to {
            RejectTo::Quarantine => {
                assert_eq!(rejected.len(), 45);
                let proved = |reason: &str| {
                    reason.starts_with("nothing proves")
                        || reason.starts_with("header `onewrite-store` is missing")
                };
                assert!(rejected.iter().all(|entry| proved(&entry.reason)), "{rejected:?}");
            }
            _ => assert_eq!((rejected.len(), stats.rejected), (0, 45), "{stats:?}"),
        }
        let _ = relay.stop(SOON);
    }
}

/// Goal: keys are taken over while messages flow, and a message that came before its key is applied once the key is there. Method:
/// the relay signs with the new key before the consumer knows it; then the consumer gets both; what was rejected is driven again.
#[test]
fn a_key_is_taken_over() {
    let (folder, credit, broker) = setup();
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    let keys = |bytes: &[u8]| {
        bytes.iter().fold(ProducerKeys::new(), |keys, byte| keys.key(&bank.id(), key(*byte)).unwrap())
    };
    let (applied, handler) = applied();
    let consumer = quick(&credit).authenticate(keys(&[1])).spawn(broker.source("q"), handler).unwrap();
    let relay = bank.relay("rabbit").sign_with(key(1)).spawn(broker.publisher()).unwrap();
    send(&bank, "q", 0..2);
    let _ = relay.stop(SOON);
    let relay = bank.relay("rabbit").sign_with(key(2)).spawn(broker.publisher()).unwrap();
    send(&bank, "q", 2..4);
    until("an empty queue", || drained(&broker));
    let stats = consumer.stop(SOON);
    assert_eq!((stats.applied, stats.quarantined), (2, 2), "{stats:?}");

    let rejected = credit.rejected("service");
    let (_, copy) = rejected.get(0).unwrap();
    let again = applied.clone();
    let handler = move |delivery: &onewrite::broker::Delivery, _: &onewrite::Transaction| {
        again.lock().unwrap().push(String::from_utf8_lossy(&delivery.message.payload).into_owned());
        Ok(())
    };
    let consumer = quick(&credit).authenticate(keys(&[1, 2])).spawn(broker.source("q"), handler).unwrap();
    assert_eq!(rejected.redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 2);
    until("both", || consumer.status().redriven == 2);
    // Its lane knows it now.
    broker.publish("", "q", copy).unwrap();
    send(&bank, "q", 4..5);
    until("an empty queue", || drained(&broker));
    let stats = consumer.stop(SOON);
    assert_eq!((stats.applied, stats.repeated, stats.quarantined), (3, 1, 0), "{stats:?}");
    assert_eq!(*applied.lock().unwrap(), genuine(0..5));
    assert!(rejected.is_empty().unwrap());
    let _ = relay.stop(SOON);
}

/// Goal: a forgery that is driven again is checked again: a person's click makes no message genuine.
#[test]
fn a_redrive_proves_nothing() {
    let (folder, credit, broker) = setup();
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    let keys = ProducerKeys::new().key(&bank.id(), key(1)).unwrap();
    let (applied, handler) = applied();
    let consumer = quick(&credit).authenticate(keys).spawn(broker.source("q"), handler).unwrap();
    let relay = bank.relay("rabbit").sign_with(key(2)).spawn(broker.publisher()).unwrap();
    send(&bank, "q", 0..1);
    until("an empty queue", || drained(&broker));
    let rejected = credit.rejected("service");
    assert_eq!(rejected.redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 1);
    until("somebody has looked at it", || {
        rejected.list(None, 1).unwrap().iter().all(|entry| !entry.redriven)
    });
    let stats = consumer.stop(SOON);
    assert_eq!((stats.applied, rejected.len().unwrap()), (0, 1), "{stats:?}");
    assert!(applied.lock().unwrap().is_empty());
    let (_, message) = rejected.get(0).unwrap();
    let other = ProducerKeys::new().key(&bank.id(), key(1)).unwrap().verify(&message);
    assert!(matches!(other, Err(Error::NotAuthentic { .. })));
    let _ = relay.stop(SOON);
}

/// Goal: what is published after the fact has no lane, and is signed all the same.
#[test]
fn events_without_a_lane_are_signed_too() {
    let folder = tempfile::tempdir().unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    bank.write(|tx| tx.append(Event::bytes("paid", "1").unpublished())).unwrap();
    let relay = bank
        .relay("history")
        .start_at(onewrite::StartAt::Position(0))
        .publish_unpublished(|_| Some(onewrite::Destination::exchange("", "q")))
        .sign_with(key(1))
        .spawn(broker.publisher())
        .unwrap();
    until("it is there", || broker.queue_len("q") == 1);
    let message = Message::clone(&broker.messages("q")[0].message);
    let keys = ProducerKeys::new().key(&bank.id(), key(1)).unwrap();
    assert!(keys.verify(&message).is_ok());
    // It cannot be given a lane by others.
    let mut forged = message;
    forged.headers.push((wire::LANE.into(), 0.into()));
    forged.headers.push((wire::LANE_NUMBER.into(), 0.into()));
    assert!(keys.verify(&forged).is_err());
    let _ = relay.stop(SOON);
}

/// Goal: a copy with a forged signature is not taken for the genuine message, though all else is the same and neither can be believed yet. Method:
/// both come before their producer's key is known, the forged copy first; then the key is there, and both are driven again.
#[test]
fn a_forged_copy_does_not_stand_for_the_genuine_message() {
    let (folder, credit, broker) = setup();
    broker.declare_queue("raw", QueueOptions::default());
    let bank = Store::open(folder.path().join("bank.redb")).unwrap();
    let relay = bank.relay("rabbit").sign_with(key(1)).spawn(broker.publisher()).unwrap();
    send(&bank, "raw", 0..1);
    let genuine_message = Message::clone(&broker.messages("raw")[0].message);
    let mut copy = genuine_message.clone();
    copy.headers.retain(|(name, _)| name != wire::SIGNATURE);
    copy.headers.push((wire::SIGNATURE.into(), format!("v1={:064}", 0).into()));

    let (applied, handler) = applied();
    let consumer =
        quick(&credit).authenticate(ProducerKeys::new()).spawn(broker.source("q"), |_, _| Ok(())).unwrap();
    for message in [&copy, &genuine_message, &copy, &genuine_message] {
        broker.publish("", "q", message.clone()).unwrap();
    }
    until("an empty queue", || drained(&broker));
    let stats = consumer.stop(SOON);
    assert_eq!((stats.applied, stats.quarantined, stats.repeated), (0, 2, 2), "{stats:?}");

    let keys = ProducerKeys::new().key(&bank.id(), key(1)).unwrap();
    let consumer = quick(&credit).authenticate(keys).spawn(broker.source("q"), handler).unwrap();
    let rejected = credit.rejected("service");
    assert_eq!(rejected.redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 2);
    until("both", || rejected.list(None, 2).unwrap().iter().all(|entry| !entry.redriven));
    let stats = consumer.stop(SOON);
    assert_eq!((stats.redriven, rejected.len().unwrap()), (1, 1), "{stats:?}");
    assert_eq!(*applied.lock().unwrap(), genuine(0..1));
    let _ = relay.stop(SOON);
}
