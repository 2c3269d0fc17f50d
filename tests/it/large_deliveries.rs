//! What is in hand is bounded in bytes, not only in number: large deliveries on a real broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use onewrite::broker::{
    Delivery, EventReceiver, RabbitMqSource, Settlement, Source, SourceEvent, SourceEvents,
};
use onewrite::{Error, Store};

use crate::scratch::{child, task, until_within};
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(30);
const MIB: usize = 1 << 20;

fn fill(tap: &Tap, queue: &str, count: usize, bytes: usize) {
    tap.queue(queue, &[]);
    for n in 0..count {
        let properties = BasicProperties::default().with_message_id(format!("m{n}").into());
        tap.publish(queue, properties, &vec![b'x'; bytes]);
    }
}

/// What comes until nothing has come for a second.
fn all_that_comes(events: &EventReceiver<SourceEvent>) -> Vec<Delivery> {
    let mut came = Vec::new();
    while let Ok(event) = events.recv_timeout(Duration::from_secs(1)) {
        match event {
            SourceEvent::Delivery(delivery) => came.push(*delivery),
            SourceEvent::Up { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    came
}

/// Kind: a bound by number where the cost is bytes. Goal: no more is delivered than the bound in bytes allows, however many the
/// prefetch does; the connection lives while nothing is read; each settlement lets as much in; and a stop does not wait for what
/// was not let in. Method: 30 bodies of 1 MiB, 4 MiB at most, a heartbeat of a second; nothing is settled for eight.
#[test]
fn unsettled_deliveries_are_bounded_in_bytes() {
    let (url, queue) = (shared_node().url(), "large.bound");
    let tap = Tap::connect(&url);
    fill(&tap, queue, 30, MIB);
    let (sender, events) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&url, queue)
        .unwrap()
        .prefetch_bytes(4 * MIB as u64)
        .heartbeat(Duration::from_secs(1));
    source.start(sender, 256).unwrap();
    assert_eq!(source.unsettled_bytes_max(), 4 * MIB as u64);
    let first = events.recv_timeout(SOON).expect("it connects");
    assert!(matches!(first, SourceEvent::Up { .. }), "{first:?}");
    let mut unsettled = all_that_comes(&events);
    assert_eq!(unsettled.len(), 4, "MiB");
    let silence = events.recv_timeout(Duration::from_secs(8));
    assert!(silence.is_err(), "neither a delivery nor the end of the connection: {silence:?}");

    let mut settled = 0;
    while settled < 20 {
        let now: Vec<_> = unsettled.drain(..2).map(|one| (one.tag, Settlement::Acknowledge)).collect();
        settled += now.len();
        source.settle(now);
        while unsettled.len() < 4 {
            match events.recv_timeout(SOON).expect("there is room for more") {
                SourceEvent::Delivery(delivery) => unsettled.push(*delivery),
                other => panic!("{other:?}"),
            }
        }
        assert!(unsettled.len() <= 4);
    }
    unsettled.extend(all_that_comes(&events));
    assert!(unsettled.len() <= 4, "{} MiB", unsettled.len());

    let began = Instant::now();
    source.stop(SOON);
    // The closing handshake would be given up after 2 s.
    assert!(began.elapsed() < Duration::from_millis(1800), "{:?}", began.elapsed());
    drop(source);
    until_within(SOON, "the broker has the rest", || tap.count(queue) == 10);
    tap.delete_queue(queue);
}

/// Goal: one delivery has room, whatever its size. Method: bodies of 1 MiB where 100 bytes are allowed come one by one.
#[test]
fn a_delivery_that_is_larger_than_the_bound_comes_alone() {
    let (url, queue) = (shared_node().url(), "large.alone");
    let tap = Tap::connect(&url);
    fill(&tap, queue, 3, MIB);
    let (sender, events) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&url, queue).unwrap().prefetch_bytes(100);
    source.start(sender, 256).unwrap();
    let _up = events.recv_timeout(SOON).expect("it connects");
    for n in 0..3 {
        let SourceEvent::Delivery(one) = events.recv_timeout(SOON).expect("there is room for one") else {
            panic!("no delivery");
        };
        assert_eq!(
            (one.message.message_id.as_deref(), one.message.payload.len()),
            (Some(format!("m{n}").as_str()), MIB)
        );
        assert_eq!(all_that_comes(&events).len(), 0, "it is the only one");
        source.settle(vec![(one.tag, Settlement::Acknowledge)]);
    }
    source.stop(SOON);
    tap.delete_queue(queue);
}

/// Goal: the offset header of a stream, which anybody may write, lifts no bound and stops nobody: the broker is asked what the queue is on a connection of
/// its own. Method: large deliveries with the header, of which one has room.
#[test]
fn a_forged_stream_offset_on_large_deliveries_stops_nobody() {
    let (url, queue) = (shared_node().url(), "large.offset");
    let tap = Tap::connect(&url);
    tap.queue(queue, &[]);
    for _ in 0..10 {
        let mut headers = FieldTable::default();
        headers.insert("x-stream-offset".into(), AMQPValue::LongLongInt(7));
        tap.publish(queue, BasicProperties::default().with_headers(headers), &vec![b'x'; MIB]);
    }
    let (sender, events) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&url, queue).unwrap().prefetch_bytes(MIB as u64);
    source.start(sender, 256).unwrap();
    let (mut came, mut connections) = (0, 0);
    while came < 10 {
        match events.recv_timeout(SOON).expect("it goes on") {
            SourceEvent::Delivery(one) => {
                came += 1;
                assert_eq!(all_that_comes(&events).len(), 0, "it is the only one");
                source.settle(vec![(one.tag, Settlement::Acknowledge)]);
            }
            SourceEvent::Up { .. } => connections += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(connections, 1);
    source.stop(SOON);
    tap.delete_queue(queue);
}

/// Kind: a bounded shared resource held by those who wait. Goal: deliveries that wait for their next try and take more than a share of
/// the bytes are parked in the store; those behind them are applied. Method: six of 1 MiB always fail, 4 MiB are the bound, and
/// 20 of another key stand behind them.
#[test]
fn large_deliveries_that_fail_stop_nobody() {
    let (url, queue) = (shared_node().url(), "large.failing");
    let tap = Tap::connect(&url);
    tap.queue(queue, &[]);
    let publish = |n: usize, key: &str, body: &[u8]| {
        let mut headers = FieldTable::default();
        headers.insert("cloudEvents_partitionkey".into(), AMQPValue::LongString(key.into()));
        let properties =
            BasicProperties::default().with_message_id(format!("{key}{n}").into()).with_headers(headers);
        tap.publish(queue, properties, body);
    };
    (0..6).for_each(|n| publish(n, "sick", &vec![b'x'; MIB]));
    (0..20).for_each(|n| publish(n, "well", b"well"));
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let well = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&well);
    let source = RabbitMqSource::new(&url, queue).unwrap().prefetch_bytes(4 * MIB as u64);
    let consumer = store
        .consumer("c")
        .attempts(u32::MAX)
        .backoff(Duration::from_secs(60), Duration::from_secs(60))
        .spawn(source, move |delivery, _| {
            if delivery.message.payload.len() == MIB {
                return Err(Error::app(std::io::Error::other("the service of this customer is away")));
            }
            counted.fetch_add(1, Relaxed);
            Ok(())
        })
        .unwrap();
    until_within(SOON, "the others are applied", || well.load(Relaxed) == 20);
    assert!(consumer.status().parked >= 3, "{:?}", consumer.status());
    consumer.stop(SOON);
    tap.delete_queue(queue);
}

/// Goal: the memory of a consumer does not grow with the bodies that wait in the queue. Method: a child consumes 80 bodies of 1.5 MiB with
/// 8 MiB allowed; its peak stands beside that of a child that consumes small ones.
#[test]
fn memory_is_bounded_by_bytes() {
    let (url, tap) = (shared_node().url(), Tap::connect(&shared_node().url()));
    let folder = tempfile::tempdir().unwrap();
    let mut peaks = [("large.small", 1024), ("large.memory", MIB * 3 / 2)].map(|(queue, bytes)| {
        fill(&tap, queue, 80, bytes);
        let path = folder.path().join(format!("{queue}.redb"));
        let ran =
            child("large_deliveries::child_that_consumes", &path, format!("{queue} {url}")).output().unwrap();
        let out = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{out}{}", String::from_utf8_lossy(&ran.stderr));
        tap.delete_queue(queue);
        let peak = out.lines().find_map(|line| line.split_once("peak KiB ")).expect("it says so");
        peak.1.trim().parse::<usize>().unwrap() << 10
    });
    let [small, large] = &mut peaks;
    assert!(*large < *small + 48 * MIB, "{} MiB over {} MiB", (*large - *small) / MIB, *small / MIB);
}

#[test]
fn child_that_consumes() {
    let Some((path, words)) = task() else { return };
    let (queue, url) = words.split_once(' ').unwrap();
    let store = Store::open(&path).unwrap();
    let source = RabbitMqSource::new(url, queue).unwrap().prefetch_bytes(8 * MIB as u64);
    let consumer = store
        .consumer("c")
        .spawn(source, |_, _| {
            std::thread::sleep(Duration::from_millis(60));
            Ok(())
        })
        .unwrap();
    until_within(SOON, "all are applied", || consumer.status().applied == 80);
    consumer.stop(SOON);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("peak KiB {}", peak.trim().trim_end_matches("kB").trim());
}
