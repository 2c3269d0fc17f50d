//! Quorum queues that drop what was requeued too often (`x-delivery-limit`), on a real broker: kind "requeue taken for free".

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::types::AMQPValue;
use onewrite::broker::{Delivery, RabbitMqSource};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Consumer, Result, Store, Transaction};

use crate::scratch::{Random, child, task};
use crate::support::rabbit::{RabbitNode, shared_node};
use crate::support::tap::Tap;

const APPLIED: TableDefinition<'_, &[u8], u64> = TableDefinition::new("applied");
const SOON: Duration = Duration::from_secs(120);

fn apply(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let mut table = tx.open_table(APPLIED)?;
    let times = table.get(&delivery.message.payload[..])?.map_or(0, |row| row.value());
    table.insert(&delivery.message.payload[..], times + 1)?;
    Ok(())
}

fn applied(store: &Store) -> Vec<(Vec<u8>, u64)> {
    let snapshot = store.read().unwrap();
    let Ok(table) = snapshot.open_table(APPLIED) else { return Vec::new() };
    table.iter().unwrap().map(|row| row.unwrap()).map(|(id, n)| (id.value().to_vec(), n.value())).collect()
}

fn source(url: &str, queue: &str) -> RabbitMqSource {
    let source = RabbitMqSource::new(url, queue).unwrap();
    source.reconnect_backoff(Duration::from_millis(50), Duration::from_millis(100)).connection_name("flaky")
}

fn fill(node: &RabbitNode, queue: &str, limit: i64, count: usize) {
    let tap = Tap::connect(&node.url());
    tap.queue(
        queue,
        &[
            ("x-queue-type", AMQPValue::LongString("quorum".into())),
            ("x-delivery-limit", AMQPValue::LongLongInt(limit)),
        ],
    );
    for n in 0..count {
        let properties =
            BasicProperties::default().with_message_id(format!("m{n}").into()).with_delivery_mode(2);
        tap.publish(queue, properties, format!("{n:03}").as_bytes());
    }
}

/// Cuts the connections of consumers.
fn cut(node: &RabbitNode) {
    for line in
        node.ctl(&["list_connections", "-q", "--no-table-headers", "pid", "client_properties"]).lines()
    {
        if let Some((pid, _)) = line.split_once('\t').filter(|(_, properties)| properties.contains("flaky")) {
            node.ctl(&["close_connection", pid, "cut"]);
        }
    }
}

fn messages(node: &RabbitNode, queue: &str) -> String {
    let listed = node.ctl(&["list_queues", "-q", "--no-table-headers", "name", "messages"]);
    listed.lines().find_map(|line| line.strip_prefix(&format!("{queue}\t"))).unwrap_or_default().to_owned()
}

fn until_all(node: &RabbitNode, queue: &str, store: &Store, consumer: &Consumer, count: usize) {
    let began = Instant::now();
    while applied(store).len() < count || messages(node, queue) != "0" {
        assert!(
            began.elapsed() < SOON,
            "{} of {count} applied, {} in the queue, {:?}",
            applied(store).len(),
            messages(node, queue),
            consumer.status()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(applied(store).iter().all(|(_, times)| *times == 1));
    assert_eq!(store.rejected("c").len().unwrap(), 0);
}

/// Kind: requeue taken for free. Goal: whatever the limit, lost connections lose nothing, with the default prefetch, a slow handler and
/// more messages than the prefetch. Method: limits of 1, 3 and 20; the connection is cut again and again.
#[test]
fn cut_connections_lose_nothing_at_any_limit() {
    let node = shared_node();
    for (limit, queue) in [(1, "limit.cut.1"), (3, "limit.cut.3"), (20, "limit.cut.20")] {
        fill(node, queue, limit, 300);
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let consumer = store
            .consumer("c")
            .spawn(source(&node.url(), queue), |delivery, tx| {
                std::thread::sleep(Duration::from_millis(15));
                apply(delivery, tx)
            })
            .unwrap();
        for _ in 0..6 {
            std::thread::sleep(Duration::from_millis(400));
            cut(node);
        }
        until_all(node, queue, &store, &consumer, 300);
        let stats = consumer.stop(Duration::from_secs(5));
        assert!(stats.connections > 2, "{stats:?}");
        Tap::connect(&node.url()).delete_queue(queue);
    }
}

/// Kind: requeue taken for free. Goal: killed processes lose nothing either. Method: a child with a slow handler is killed at random
/// moments, more often than the limit allows a message to come back. There are more messages than the prefetch, so each life begins
/// with parked deliveries, and others come while their handlers run.
#[test]
fn killed_processes_lose_nothing_below_the_limit() {
    let node = shared_node();
    let queue = "limit.kill";
    fill(node, queue, 3, 600);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let mut random = Random(7);
    for _ in 0..8 {
        let mut mortal =
            child("delivery_limits::child_that_is_killed", &path, format!("{queue} {}", node.url()))
                .spawn()
                .unwrap();
        std::thread::sleep(Duration::from_millis(700 + random.below(900)));
        mortal.kill().unwrap();
        mortal.wait().unwrap();
    }
    let store = Store::open(&path).unwrap();
    let before = applied(&store).len();
    let consumer = store.consumer("c").spawn(source(&node.url(), queue), apply).unwrap();
    until_all(node, queue, &store, &consumer, 600);
    let _ = consumer.stop(Duration::from_secs(5));
    let names: BTreeSet<Vec<u8>> = applied(&store).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, (0..600).map(|n| format!("{n:03}").into_bytes()).collect());
    assert!(before < 600, "the kills came too late to prove anything");
    Tap::connect(&node.url()).delete_queue(queue);
}

#[test]
fn child_that_is_killed() {
    let Some((path, argument)) = task() else { return };
    let (queue, url) = argument.split_once(' ').unwrap();
    let store = Store::open(&path).unwrap();
    let _consumer = store
        .consumer("c")
        .spawn(source(url, queue), |delivery, tx| {
            std::thread::sleep(Duration::from_millis(30));
            apply(delivery, tx)
        })
        .unwrap();
    std::thread::sleep(Duration::from_secs(60));
}
