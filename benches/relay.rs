//! Draining the log: through the in-process broker; and through RabbitMQ beside a bare lapin loop with no store.
//!
//! `cargo bench --bench relay` starts a RabbitMQ node of its own (`scripts/rabbit-node`). The ratio at the end comes from
//! interleaved rounds with medians, both sides with the same window, the same 256-byte persistent messages, mandatory,
//! confirmed, into a durable classic queue.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a benchmark"
)]

mod rounds;

use std::process::Command;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use onewrite::broker::{MemoryBroker, Publisher, QueueOptions, RabbitMq};
use onewrite::{Event, Store};
use rounds::{is_test, median, setting};

const PAYLOAD: [u8; 256] = [8; 256];
const QUEUE: &str = "bench";

/// A store with a backlog of so many keyless events.
fn backlog(events: u64) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    for first in (0..events).step_by(1000) {
        let write = move |tx: &onewrite::Transaction| {
            for _ in first..(first + 1000).min(events) {
                tx.append(Event::bytes("payment.completed", PAYLOAD).to("", QUEUE))?;
            }
            Ok(())
        };
        store.write(write).unwrap();
    }
    (folder, store)
}

/// The time from the first publish possible to the last confirm.
fn drain(store: &Store, window: usize, publisher: impl Publisher) -> Duration {
    let relay = store.relay("r").window_events(window).spawn(publisher).unwrap();
    let events = store.stats().unwrap().next_seq;
    let mut start = Instant::now();
    loop {
        let status = relay.status();
        // Connecting is not draining.
        if status.confirmed == 0 && status.in_flight == 0 {
            start = Instant::now();
        }
        if status.confirmed >= events {
            break;
        }
        // Seldom: each look takes the relay's time.
        std::thread::sleep(Duration::from_millis(5));
    }
    let time = start.elapsed();
    relay.stop(Duration::from_secs(10));
    time
}

fn criterion_benches(criterion: &mut Criterion) {
    const EVENTS: u64 = 20_000;
    let mut group = criterion.benchmark_group("relay");
    group.throughput(Throughput::Elements(EVENTS)).sample_size(10);
    group.bench_function("drain to the in-process broker", |bench| {
        bench.iter_custom(|rounds| {
            (0..rounds)
                .map(|_| {
                    let (_folder, store) = backlog(EVENTS);
                    let broker = MemoryBroker::new();
                    broker.declare_queue(QUEUE, QueueOptions::default());
                    drain(&store, 512, broker.publisher())
                })
                .sum()
        });
    });
    group.finish();
}

/// A private RabbitMQ node; stopped when dropped.
struct Node {
    folder: tempfile::TempDir,
    url: String,
}

impl Node {
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rabbit-node");
        let port = Command::new(script).arg("free-port").output().ok()?.stdout;
        let port = String::from_utf8(port).ok()?.trim().to_owned();
        let started = Command::new(script).arg("start").arg(folder.path()).arg(&port).output().ok()?;
        if !started.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&started.stderr));
            return None;
        }
        Some(Self { folder, url: format!("amqp://guest:guest@127.0.0.1:{port}/%2f") })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rabbit-node");
        let _ = Command::new(script).arg("kill9").arg(self.folder.path()).output();
    }
}

async fn channel(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    (connection, channel)
}

/// What a user of lapin would write at best: a window of confirms that never drains, one task, one channel.
async fn bare_lapin(channel: &Channel, properties: &BasicProperties, events: u64, window: usize) -> Duration {
    let start = Instant::now();
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let mut confirms = FuturesUnordered::new();
    let mut sent = 0;
    while sent < events || !confirms.is_empty() {
        let mut publishes = Vec::new();
        while sent < events && confirms.len() + publishes.len() < window {
            let publish =
                channel.basic_publish("".into(), QUEUE.into(), options, &PAYLOAD, properties.clone());
            publishes.push(publish);
            sent += 1;
        }
        for confirm in futures_util::future::join_all(publishes).await {
            confirms.push(confirm.unwrap());
        }
        if let Some(confirmation) = confirms.next().await {
            assert!(confirmation.unwrap().is_ack());
        }
    }
    start.elapsed()
}

fn ratios() {
    let rounds = setting("ROUNDS", 5);
    let events = 20_000;
    let Some(node) = Node::start() else {
        eprintln!("RabbitMQ is missing or does not start; run: scripts/test packages");
        std::process::exit(1);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (_connection, channel) = runtime.block_on(channel(&node.url));
    let declare = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    runtime.block_on(channel.queue_declare(QUEUE.into(), declare, FieldTable::default())).unwrap();
    let plain = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id("0190a000-0000-7000-8000-000000000000".into())
        .with_content_type("application/octet-stream".into())
        .with_type("payment.completed".into());
    println!("\nevents per second to RabbitMQ, medians of {rounds} interleaved rounds of {events}");
    println!(
        "{:>8} {:>12} {:>14} {:>8} {:>14} {:>8}",
        "window", "onewrite", "same message", "ratio", "no headers", "ratio"
    );
    for window in [64, 512, 4096] {
        let (mut ours, mut same, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (_folder, store) = backlog(events);
            let time = drain(&store, window, RabbitMq::new(&node.url).unwrap());
            ours.push(events as f64 / time.as_secs_f64());
            let sent = runtime
                .block_on(channel.basic_get(QUEUE.into(), BasicGetOptions { no_ack: true }))
                .unwrap()
                .unwrap();
            purge(&runtime, &channel);
            for (properties, rates) in [(&sent.properties, &mut same), (&plain, &mut bare)] {
                let time = runtime.block_on(bare_lapin(&channel, properties, events, window));
                rates.push(events as f64 / time.as_secs_f64());
                purge(&runtime, &channel);
            }
        }
        let (ours, same, bare) = (median(ours), median(same), median(bare));
        println!(
            "{window:>8} {ours:>12.0} {same:>14.0} {:>8.2} {bare:>14.0} {:>8.2}",
            ours / same,
            ours / bare
        );
    }
}

fn purge(runtime: &tokio::runtime::Runtime, channel: &Channel) {
    runtime.block_on(channel.queue_purge(QUEUE.into(), QueuePurgeOptions::default())).unwrap();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    criterion_benches(&mut criterion);
    criterion.final_summary();
    if !is_test() {
        ratios();
    }
}
