//! Nowhere to go, or no room there. Other destinations and other keys flow on.

use std::time::Duration;

use lapin::ExchangeKind;
use lapin::types::AMQPValue;
use onewrite::{ConfirmError, Event, FaultClass};

use super::judge::{Judge, payload};
use super::{Line, SOON, rabbit, until};
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

/// B3. Goal: a missing exchange closes the channel with everything in flight, and only its own event pays: tried twice with a wait,
/// then quarantined with the broker's words, its key held; all others arrive meanwhile. Once the exchange is there a redrive lets
/// the key go on, in order. Method: one of 300 in the middle of a window, and one behind it.
#[test]
fn b03_exchange_missing() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b03", &[]);
    let mut line = Line::with("b03", |relay| relay.destination_attempts(2), rabbit(&node.url()));
    line.append_many(150);
    let lost = Event::bytes("matrix", payload("lost", 0)).key("lost").to("b03-missing", "b03");
    let poison = line.store.write(move |tx| tx.append(lost.clone())).unwrap();
    line.appended.insert("lost".into(), 1);
    let behind = line.append("lost");
    line.append_many(150);
    match poison.wait_confirmed(SOON).unwrap_err() {
        ConfirmError::Quarantined { fault, .. } => {
            assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(404)));
            assert!(fault.text.contains("b03-missing"), "{fault}");
        }
        error => panic!("{error}"),
    }
    line.append("k1").wait_confirmed(SOON).unwrap();
    until("the others confirmed", || line.relay.status().confirmed == 301);
    assert!(matches!(behind.wait_confirmed(Duration::from_millis(50)), Err(ConfirmError::Timeout { .. })));
    let quarantine = line.store.quarantine("rabbit").unwrap();
    let listed = quarantine.list(None, 10).unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!((listed[0].attempts, listed[0].destination_attempts, listed[0].holds_key), (0, 2, true));

    tap.exchange("b03-missing", ExchangeKind::Direct);
    tap.bind("b03", "b03-missing", "b03");
    quarantine.redrive(listed[0].seq).unwrap();
    behind.wait_confirmed(SOON).unwrap();
    line.assert_all_arrived(&tap);
    line.stop();
}

/// B5. Goal: what routes nowhere is matched by its id among hundreds in flight, never counted as delivered, tried twice, then
/// quarantined; everything else is confirmed. Bound and redriven it arrives, and its keys go on in order. Method: every seventh of
/// 700 to a routing key that nothing is bound to, of keys of their own.
#[test]
fn b05_unroutable() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b05", &[]);
    tap.exchange("b05-late", ExchangeKind::Direct);
    let mut line = Line::with("b05", |relay| relay.destination_attempts(2), rabbit(&node.url()));
    let mut returned = Vec::new();
    for n in 0..100 {
        let key = format!("returned-{n}");
        let event = Event::bytes("matrix", payload(&key, 0)).key(&*key).to("b05-late", "b05");
        returned.push(line.store.write(move |tx| tx.append(event.clone())).unwrap());
        line.appended.insert(key.clone(), 1);
        line.append_many(5);
        line.append(&key);
    }
    for receipt in &returned {
        match receipt.wait_confirmed(SOON).unwrap_err() {
            ConfirmError::Quarantined { fault, .. } => {
                assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(312)), "{fault}");
            }
            error => panic!("{error}"),
        }
    }
    until("the rest confirmed", || line.relay.status().confirmed == 500);
    assert_eq!(line.relay.status().reconnects, 0, "a return costs no connection");
    // Judged by what is there: none of the returned, all of the others.
    let mut raw = tap.drain("b05");
    assert_eq!(raw.len(), 500);
    assert!(raw.iter().all(|raw| raw.body.starts_with(b"k")));
    let quarantine = line.store.quarantine("rabbit").unwrap();
    let listed = quarantine.list(None, 200).unwrap();
    assert_eq!(listed.len(), 100);
    assert!(listed.iter().all(|entry| (entry.attempts, entry.destination_attempts) == (0, 2)));
    tap.bind("b05", "b05-late", "b05");
    listed.iter().for_each(|entry| quarantine.redrive(entry.seq).unwrap());
    until("all confirmed", || line.relay.status().confirmed == 700);
    line.until_empty();
    raw.extend(tap.drain("b05"));
    let judge = Judge::of(&raw).unwrap();
    judge.complete(&line.appended).unwrap();
    line.stop();
}

/// B6. Goal: a queue that is full refuses: the same event is tried again, its key waits, nothing is spent, other queues flow; as room
/// comes everything arrives. Method: a queue of 50 that rejects, 300 events; it is emptied by and by.
#[test]
fn b06_queue_full() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let full = [
        ("x-max-length", AMQPValue::LongInt(50)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    tap.queue("b06", &full);
    tap.queue("b06-other", &[]);
    let mut line = Line::to(&node.url(), "b06");
    line.append_many(300);
    until("a full queue", || tap.count("b06") == 50);
    let other = Event::bytes("matrix", "x").key("other").to("", "b06-other");
    line.store.write(move |tx| tx.append(other.clone())).unwrap().wait_confirmed(SOON).unwrap();
    assert_eq!(line.relay.status().reconnects, 0);
    line.assert_unspent();
    let mut raw = Vec::new();
    until("all of it", || {
        raw.extend(tap.take("b06"));
        raw.len() >= 300
    });
    line.until_empty();
    line.assert_unspent();
    line.assert_complete(&raw);
    line.stop();
}
