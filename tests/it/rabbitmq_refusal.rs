//! Queues that refuse messages (`x-overflow: reject-publish`), beside queues that take a copy of each try. Kind: "retry without bound
//! where each try has an effect".

use std::time::{Duration, Instant};

use lapin::ExchangeKind;
use lapin::types::AMQPValue;
use onewrite::broker::RabbitMq;
use onewrite::{Event, Store, SuspendCause};

use crate::scratch::until_within;
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

const LIMIT: Duration = Duration::from_secs(120);

fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(LIMIT, what, holds);
}

fn append(store: &Store, exchange: &'static str, routing_key: &'static str, count: usize) {
    let each = move |tx: &onewrite::Transaction| {
        (0..count)
            .try_for_each(|n| tx.append(Event::bytes("t", n.to_string()).to(exchange, routing_key)).map(drop))
    };
    store.write(each).unwrap();
}

/// The story: an exchange led to a full queue and to one that was well. A hundred events became 1,176 copies in 90 s, and each new
/// connection, made in the hope that another channel would ack, repeated the events of others. Goal: the copies grow with the
/// logarithm of the time; no connection is given up; another queue's events go out once; all arrive once there is room. Method:
/// that exchange on a real broker, for 20 s, which is four times what a new connection took.
#[test]
fn a_full_queue_behind_a_fanout_costs_few_copies() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let overflow = AMQPValue::LongString("reject-publish".into());
    let full = [("x-max-length", AMQPValue::LongInt(1)), ("x-overflow", overflow)];
    tap.queue("refusal.full", &full);
    for queue in ["refusal.copies", "refusal.other"] {
        tap.queue(queue, &[]);
    }
    tap.exchange("refusal", ExchangeKind::Fanout);
    for queue in ["refusal.full", "refusal.copies"] {
        tap.bind(queue, "refusal", "");
    }
    tap.publish("refusal.full", lapin::BasicProperties::default(), b"it is full now");
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let relay = store.relay("r").spawn(RabbitMq::new(&node.url()).unwrap()).unwrap();
    append(&store, "refusal", "", 100);
    let (began, mut sent) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(20) {
        append(&store, "", "refusal.other", 10);
        sent += 10;
        until("the other queue's flow", || relay.status().confirmed == sent);
        std::thread::sleep(Duration::from_millis(100));
    }
    let copies = tap.count("refusal.copies");
    assert!((100..=125).contains(&copies), "{copies} copies of 100 events");
    assert_eq!(tap.count("refusal.other"), usize::try_from(sent).unwrap(), "nothing is repeated");
    let status = relay.status();
    assert_eq!((status.reconnects, status.quarantined), (0, 0));
    let [suspended] = &status.suspended[..] else { panic!("{status:?}") };
    assert_eq!((&*suspended.exchange, suspended.cause), ("refusal", SuspendCause::Nacks));
    // There is room: the destination resumes by itself.
    tap.unbind("refusal.full", "refusal", "");
    until("all are confirmed", || relay.status().confirmed == sent + 100);
    assert_eq!(relay.status().suspended, []);
    assert_eq!(relay.status().reconnects, 0);
    assert!(tap.count("refusal.copies") <= copies + 101);
    relay.stop(Duration::from_secs(5));
    for queue in ["refusal.full", "refusal.copies", "refusal.other"] {
        tap.delete_queue(queue);
    }
}
