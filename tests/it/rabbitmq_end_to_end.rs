//! The whole path on a real RabbitMQ: store → relay → broker → consumer → store.
//!
//! Judged from what is in the queues and in the consumer's tables, not from the relay's figures.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use onewrite::broker::{ExchangeKind, RabbitMq, RabbitMqSource, Topology};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Event, GapPolicy, RelayState, Store, wire};

use crate::support::rabbit::{RabbitNode, shared_node};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(60);
/// How often each event took effect at the consumer, and the last number seen of each key.
const EFFECTS: TableDefinition<'_, &str, u64> = TableDefinition::new("effects");
const LAST: TableDefinition<'_, &str, u64> = TableDefinition::new("last");

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn rabbit(url: &str) -> RabbitMq {
    RabbitMq::new(url).unwrap().reconnect_backoff(Duration::from_millis(100), Duration::from_millis(500))
}

fn append(store: &Store, event: Event) -> onewrite::Receipt<onewrite::Appended> {
    store.write(move |tx| tx.append(event.clone())).unwrap()
}

/// P3 to P7. Goal: nothing is lost, doubled in effect or out of order when RabbitMQ is killed with `kill -9` under a
/// full window, twice, while writers go on. Method: 6,000 events of 50 keys; the consumer's own table is the evidence.
#[test]
fn killed_under_a_full_window() {
    let mut node = RabbitNode::start();
    let (_folder, store) = open();
    let (_consumer_folder, credit) = open();
    let topology = || {
        Topology::new().exchange("payments", ExchangeKind::Topic).queue("credit").bind(
            "payments",
            "credit",
            "payment.*",
        )
    };
    let relay = store.relay("rabbit").attempts(1).spawn(rabbit(&node.url()).declare(topology())).unwrap();
    let source = RabbitMqSource::new(&node.url(), "credit")
        .unwrap()
        .declare(topology())
        .reconnect_backoff(Duration::from_millis(100), Duration::from_millis(500));
    let consumer = credit
        .consumer("credit-service")
        .spawn(source, |delivery, tx| {
            let text = String::from_utf8_lossy(&delivery.message.payload);
            let (key, number) =
                text.split_once(':').ok_or_else(|| onewrite::Error::reject("no such form"))?;
            let number: u64 = number.parse().map_err(onewrite::Error::app)?;
            let mut effects = tx.open_table(EFFECTS)?;
            let before = effects.get(&*text)?.map_or(0, |row| row.value());
            effects.insert(&*text, before + 1)?;
            let last = tx.open_table(LAST)?.insert(key, number)?.map(|row| row.value());
            match last {
                Some(last) if last >= number => Err(onewrite::Error::reject("out of order")),
                _ => Ok(()),
            }
        })
        .unwrap();
    let writer = std::thread::spawn({
        let store = store.clone();
        move || {
            for n in 0..6000_u64 {
                let key = format!("k{}", n % 50);
                let event = Event::bytes("payment.completed", format!("{key}:{n}").into_bytes());
                let event = event.key(key).to("payments", "payment.completed");
                store.write(move |tx| tx.append(event.clone())).unwrap();
            }
        }
    });
    for confirmed in [500, 2500] {
        until("confirms", || relay.status().confirmed >= confirmed);
        node.settle_declarations();
        node.kill9();
        until("the outage seen", || matches!(relay.status().state, RelayState::Disconnected(_)));
        node.restart();
    }
    writer.join().unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    until("all effects", || consumer.status().applied + consumer.status().rejected >= 6000);
    let stats = consumer.stop(Duration::from_secs(10));
    assert_eq!(stats.rejected, 0, "{stats:?}");
    let snapshot = credit.read().unwrap();
    let effects: BTreeMap<String, u64> = snapshot
        .open_table(EFFECTS)
        .unwrap()
        .iter()
        .unwrap()
        .map(|row| row.map(|(text, times)| (text.value().to_owned(), times.value())).unwrap())
        .collect();
    assert_eq!(effects.len(), 6000, "lost: {}", 6000 - effects.len());
    assert!(effects.values().all(|times| *times == 1));
    assert_eq!(relay.status().quarantined, 0);
    assert!(relay.stop(Duration::from_secs(10)).clean);
}

/// P6, by lanes. Goal: through RabbitMQ and its types of headers, repeats and another order change nothing, and a number that
/// comes with another body is kept. Method: somebody takes the relay's messages out of a queue and puts them into another: in
/// blocks turned round, every third twice, and once all of them again. The consumer holds back behind gaps, so the order of
/// each key is that of the appends.
#[test]
fn repeated_and_turned_round_on_the_way() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("lanes-raw", &[]);
    tap.queue("lanes", &[]);
    let (_folder, store) = open();
    let (_consumer_folder, credit) = open();
    for n in 0..300_u64 {
        let key = format!("k{}", n % 7);
        append(&store, Event::bytes("paid", format!("{key}:{n}").into_bytes()).key(key).to("", "lanes-raw"));
    }
    let relay = store.relay("rabbit").spawn(rabbit(&node.url())).unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    let raw = tap.drain("lanes-raw");
    assert_eq!(raw.len(), 300);
    for block in raw.chunks(30) {
        for (at, message) in block.iter().enumerate().rev() {
            for _ in 0..=usize::from(at % 3 == 0) {
                tap.publish("lanes", message.properties.clone(), &message.body);
            }
        }
    }
    tap.publish("lanes", raw[299].properties.clone(), b"k5:999");
    raw.iter().for_each(|message| tap.publish("lanes", message.properties.clone(), &message.body));

    let consumer = credit
        .consumer("credit-service")
        .producers([store.id()])
        .on_gap(GapPolicy::Hold(Duration::from_secs(30)))
        .spawn(RabbitMqSource::new(&node.url(), "lanes").unwrap(), |delivery, tx| {
            let text = String::from_utf8_lossy(&delivery.message.payload);
            let (key, number) =
                text.split_once(':').ok_or_else(|| onewrite::Error::reject("no such form"))?;
            let number: u64 = number.parse().map_err(onewrite::Error::app)?;
            let last = tx.open_table(LAST)?.insert(key, number)?.map(|row| row.value());
            match last {
                Some(last) if last >= number => Err(onewrite::Error::reject("out of order")),
                _ => Ok(()),
            }
        })
        .unwrap();
    until("all deliveries", || {
        let stats = consumer.status();
        stats.applied + stats.repeated + stats.quarantined == 300 + 100 + 1 + 300
    });
    let stats = consumer.stop(Duration::from_secs(10));
    assert_eq!((stats.applied, stats.conflicts, stats.quarantined), (300, 1, 1), "{stats:?}");
    assert_eq!(tap.count("lanes"), 0);
    let (entry, message) = credit.rejected("credit-service").get(0).unwrap();
    assert!(entry.reason.ends_with("with another content"), "{}", entry.reason);
    assert_eq!(message.payload, b"k5:999");
    assert!(relay.stop(Duration::from_secs(10)).clean);
}

/// The wire form of design §6, read back raw.
#[test]
fn the_wire_form() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("e2e-wire", &[]);
    let (_folder, store) = open();
    let relay = store.relay("rabbit").source("/bank").app_id("bank").spawn(rabbit(&node.url())).unwrap();
    let event = Event::json("payment.completed", &serde_json::json!({"amount": 100})).unwrap();
    append(&store, event.id("transfer-1").key("alice").to("", "e2e-wire").header("region", "eu"))
        .wait_confirmed(SOON)
        .unwrap();
    let raw = tap.drain("e2e-wire");
    assert_eq!(raw.len(), 1);
    assert_eq!(raw[0].body, br#"{"amount":100}"#);
    let properties = format!("{:?}", raw[0].properties);
    for part in [
        "transfer-1",
        "payment.completed",
        "application/json",
        "cloudEvents_id",
        "cloudEvents_specversion",
        "cloudEvents_partitionkey",
        "cloudEvents_sequence",
        "region",
        wire::STORE,
        wire::EPOCH,
        wire::LANE,
        wire::LANE_NUMBER,
        wire::CRC,
    ] {
        assert!(properties.contains(part), "{part} in {properties}");
    }
    let headers = raw[0].properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers["cloudEvents_source"], lapin::types::AMQPValue::LongString("/bank".into()));
    assert_eq!(raw[0].properties.delivery_mode(), &Some(2));
    assert!(!properties.contains(wire::RESEND));
    assert!(relay.stop(Duration::from_secs(10)).clean);
}
