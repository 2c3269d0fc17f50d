//! A long time without a broker, and what goes wrong for some while the rest flows on: ratios within one run.
//!
//! `cargo bench --bench offline` starts a RabbitMQ node of its own (`scripts/rabbit-node`). `EVENTS` sets the backlog (1,000,000),
//! `ROUNDS` the interleaved rounds (5); `cargo bench --bench offline -- fairness` (or `backlog`) runs one half.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

mod rounds;

use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use onewrite::broker::RabbitMq;
use onewrite::{Event, Relay, Store, Transaction};
use rounds::{is_test, median, setting};

const QUEUE: &str = "offline.rest";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rabbit-node");
/// Keys of the events: more than the window, so that none has to wait for its own kind.
const KEYS: u64 = 5000;
const PAYLOAD: [u8; 120] = [7; 120];
/// Larger than the broker is set to take.
const TOO_LARGE: usize = 300_000;

/// A private RabbitMQ node; killed when dropped.
struct Node {
    folder: tempfile::TempDir,
    port: String,
}

impl Node {
    fn script(&self, arguments: &[&str]) -> Output {
        let (verb, rest) = arguments.split_first().unwrap();
        let output = Command::new(SCRIPT).arg(verb).arg(self.folder.path()).args(rest).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn start() -> Self {
        let port = Command::new(SCRIPT).arg("free-port").output().unwrap().stdout;
        let port = String::from_utf8(port).unwrap().trim().to_owned();
        let node = Self { folder: tempfile::tempdir().unwrap(), port };
        node.go_up();
        node
    }

    fn go_up(&self) {
        let started =
            Command::new(SCRIPT).arg("start").arg(self.folder.path()).arg(&self.port).output().unwrap();
        if !started.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&started.stderr));
            eprintln!("RabbitMQ is missing or does not start; run: scripts/test packages");
            std::process::exit(1);
        }
    }

    fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = Command::new(SCRIPT).arg("kill9").arg(self.folder.path()).output();
    }
}

/// A plain client beside the library.
struct Tap {
    runtime: tokio::runtime::Runtime,
    _connection: Connection,
    channel: Channel,
}

impl Tap {
    fn connect(node: &Node) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let url = format!("{}?heartbeat=3600", node.url());
        let (connection, channel) = runtime.block_on(async {
            let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
            let channel = connection.create_channel().await.unwrap();
            (connection, channel)
        });
        Self { runtime, _connection: connection, channel }
    }

    fn queue(&self, name: &str, arguments: FieldTable) -> u64 {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let queue =
            self.runtime.block_on(self.channel.queue_declare(name.into(), options, arguments)).unwrap();
        u64::from(queue.message_count())
    }

    fn count(&self) -> u64 {
        self.queue(QUEUE, FieldTable::default())
    }

    fn purge(&self, name: &str) {
        self.runtime.block_on(self.channel.queue_purge(name.into(), QueuePurgeOptions::default())).unwrap();
    }
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn healthy(n: u64) -> Event {
    Event::bytes("payment.completed", PAYLOAD).key((n % KEYS).to_string()).to("", QUEUE)
}

/// Writes events 1,000 to a commit.
fn fill(store: &Store, events: u64, event: impl Fn(u64) -> Event + Clone + Send + 'static) {
    for first in (0..events).step_by(1000) {
        let event = event.clone();
        let write = move |tx: &Transaction| {
            (first..(first + 1000).min(events)).try_for_each(|n| tx.append(event(n)).map(drop))
        };
        store.write(write).unwrap();
    }
}

fn relay(store: &Store, node: &Node) -> Relay {
    store.relay("r").spawn(RabbitMq::new(&node.url()).unwrap()).unwrap()
}

/// Small durable writes, one after the other, per second.
fn small_writes(store: &Store, writes: u64) -> f64 {
    let start = Instant::now();
    for n in 0..writes {
        store.write(move |tx| tx.append(healthy(n))).unwrap();
    }
    writes as f64 / start.elapsed().as_secs_f64()
}

/// This process's resident memory, in MiB: now, and the part of it that is not the file's.
fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

struct Drain {
    rate: f64,
    in_flight_max: usize,
    resident_mib_max: f64,
}

/// Drains to the last confirm; `meanwhile` is called again and again.
fn drain(relay: &Relay, events: u64, mut meanwhile: impl FnMut()) -> Drain {
    let mut start = Instant::now();
    let mut seen = Drain { rate: 0.0, in_flight_max: 0, resident_mib_max: 0.0 };
    let first = relay.status().confirmed;
    loop {
        let status = relay.status();
        if status.confirmed == first && status.in_flight == 0 {
            start = Instant::now();
        }
        if status.confirmed - first >= events {
            seen.rate = events as f64 / start.elapsed().as_secs_f64();
            return seen;
        }
        seen.in_flight_max = seen.in_flight_max.max(status.in_flight);
        seen.resident_mib_max = seen.resident_mib_max.max(resident_mib());
        meanwhile();
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn short_drain(node: &Node, tap: &Tap) -> f64 {
    let (_folder, store) = open();
    fill(&store, 20_000, healthy);
    let relay = relay(&store, node);
    let rate = drain(&relay, 20_000, || ()).rate;
    relay.stop(Duration::from_secs(10));
    tap.purge(QUEUE);
    rate
}

/// Publishes by lapin alone what the store's events become, persistent, 512 unconfirmed, until asked to stop. Reports the rate.
fn bare_publisher(url: String, stop: Arc<AtomicBool>) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id("0190a000-0000-7000-8000-000000000000".into());
        let (start, mut count, mut confirms) = (Instant::now(), 0u64, FuturesUnordered::new());
        while !stop.load(Ordering::Relaxed) {
            while confirms.len() < 512 {
                let publish =
                    channel.basic_publish("".into(), QUEUE.into(), options, &PAYLOAD, properties.clone());
                confirms.push(publish.await.unwrap());
            }
            assert!(confirms.next().await.unwrap().unwrap().is_ack());
            count += 1;
        }
        count as f64 / start.elapsed().as_secs_f64()
    })
}

/// Small writes into a store with no relay, while the broker is as busy through somebody else.
fn small_writes_beside_bare_lapin(node: &Node, store: &Store) -> (f64, f64) {
    let stop = Arc::new(AtomicBool::new(false));
    let publisher = std::thread::spawn({
        let (url, stop) = (node.url(), Arc::clone(&stop));
        move || bare_publisher(url, stop)
    });
    std::thread::sleep(Duration::from_secs(2));
    let writes = (0..7)
        .map(|_| {
            std::thread::sleep(Duration::from_secs(1));
            small_writes(store, 50)
        })
        .collect();
    stop.store(true, Ordering::Relaxed);
    (median(writes), publisher.join().unwrap())
}

fn long_offline(node: &Node, rounds: u64) {
    let events = setting("EVENTS", 1_000_000);
    let tap = Tap::connect(node);
    tap.count();
    let before = median((0..3).map(|_| short_drain(node, &tap)).collect());
    drop(tap);
    node.script(&["stop"]);

    let ((_a, empty), (_b, full)) = (open(), open());
    let relays = (relay(&empty, node), relay(&full, node));
    let start = Instant::now();
    fill(&full, events, healthy);
    println!(
        "\n{events} events written while the broker is away: {:.1} s, 1,000 to a commit",
        start.elapsed().as_secs_f64()
    );
    // The first writes of a store also make its file grow.
    small_writes(&empty, 2000);
    let writes = |store: &Store| small_writes(store, 500);
    let (mut small, mut large) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(5) {
        small.push(writes(&empty));
        large.push(writes(&full));
    }
    let (small, large) = (median(small), median(large));
    println!(
        "small durable writes per second, broker away: {small:.0} with a short backlog, {large:.0} with this one, ratio {:.2}",
        large / small
    );
    relays.0.stop(Duration::from_secs(5));

    let resident = resident_mib();
    node.go_up();
    let backlog = full.stats().unwrap().backlog_events;
    let commits = full.stats().unwrap().commits;
    let mut during = Vec::new();
    let mut next = Instant::now();
    let writes_per_probe = 50;
    let seen = drain(&relays.1, backlog, || {
        if next <= Instant::now() {
            during.push(small_writes(&full, writes_per_probe));
            next = Instant::now() + Duration::from_secs(3);
        }
    });
    let probes = during.len() as u64;
    let commits = full.stats().unwrap().commits - commits - probes * writes_per_probe;
    println!(
        "drained at {:.0} events/s; window {} of 512; resident memory {resident:.0} MiB before, {:.0} at most; {commits} commits of the relay's own",
        seen.rate, seen.in_flight_max, seen.resident_mib_max
    );
    let during = median(during);
    println!(
        "small durable writes per second while it drains: {during:.0}, ratio to the broker being away {:.2}",
        during / large
    );
    relays.1.stop(Duration::from_secs(10));
    let (beside, rate) = small_writes_beside_bare_lapin(node, &empty);
    println!(
        "small durable writes per second, no relay, a bare lapin loop publishing {rate:.0}/s: {beside:.0}, ratio to the broker being away {:.2}",
        beside / small
    );
    let tap = Tap::connect(node);
    tap.purge(QUEUE);
    let after = median((0..3).map(|_| short_drain(node, &tap)).collect());
    println!(
        "a backlog of 20,000: {before:.0} events/s before, {after:.0} after; the long drain is {:.2} of the first, {:.2} of the second",
        seen.rate / before,
        seen.rate / after
    );
}

const SHARE: u64 = 10;
const EVENTS: u64 = 20_000;

fn is_disturbed(n: u64) -> bool {
    n % SHARE == 3
}

/// What becomes of a share of the events.
#[derive(Clone, Copy)]
struct Fault {
    name: &'static str,
    event: fn(u64) -> Event,
    /// The rest are the others, or (of a hot key) the share itself.
    hot: bool,
}

const FAULTS: [Fault; 5] = [
    Fault {
        name: "missing exchange",
        event: |n| healthy(n).key(format!("x{n}")).to("offline.none", "r"),
        hot: false,
    },
    Fault {
        name: "unroutable",
        event: |n| healthy(n).key(format!("x{n}")).to("offline.unbound", "r"),
        hot: false,
    },
    Fault {
        name: "full queue",
        event: |n| healthy(n).key(format!("x{n}")).to("", "offline.full"),
        hot: false,
    },
    Fault { name: "poison (20 of them)", event: poison, hot: false },
    Fault {
        name: "hot key (nine tenths)",
        event: |n| healthy(n).key("hot").to("", "offline.others"),
        hot: true,
    },
];

fn poison(n: u64) -> Event {
    if n % 1000 == 3 {
        Event::bytes("payment.completed", vec![7; TOO_LARGE]).key(format!("x{n}")).to("", "offline.others")
    } else {
        healthy(n).to("", "offline.others")
    }
}

/// Events of the rest per second, until the last of them lies in its queue.
fn rest_rate(node: &Node, tap: &Tap, hot: bool, disturbed: fn(u64) -> Event) -> f64 {
    let (_folder, store) = open();
    fill(&store, EVENTS, move |n| if is_disturbed(n) != hot { disturbed(n) } else { healthy(n) });
    let rest = (0..EVENTS).filter(|n| is_disturbed(*n) == hot).count() as u64;
    let relay = relay(&store, node);
    while relay.status().in_flight == 0 && relay.status().confirmed == 0 {
        std::thread::sleep(Duration::from_micros(200));
    }
    let start = Instant::now();
    while tap.count() < rest {
        assert!(start.elapsed() < Duration::from_secs(300), "{:?}", relay.status());
        std::thread::sleep(Duration::from_millis(3));
    }
    let rate = rest as f64 / start.elapsed().as_secs_f64();
    relay.stop(Duration::from_secs(5));
    tap.purge(QUEUE);
    tap.purge("offline.others");
    rate
}

fn fairness(node: &Node, rounds: u64) {
    node.script(&["ctl", "eval", "application:set_env(rabbit, max_message_size, 200000)."]);
    let tap = Tap::connect(node);
    tap.count();
    tap.queue("offline.others", FieldTable::default());
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    tap.queue("offline.full", arguments);
    let options = ExchangeDeclareOptions::default();
    let declared = tap.channel.exchange_declare(
        "offline.unbound".into(),
        ExchangeKind::Fanout,
        options,
        FieldTable::default(),
    );
    tap.runtime.block_on(declared).unwrap();
    let bound = tap.channel.queue_bind(
        "offline.others".into(),
        "amq.fanout".into(),
        "".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    tap.runtime.block_on(bound).unwrap();
    println!(
        "\nevents per second of those that nothing disturbs, medians of {rounds} interleaved rounds of {EVENTS} in all"
    );
    println!("{:>24} {:>12} {:>12} {:>8}", "the others", "undisturbed", "disturbed", "ratio");
    for Fault { name, event, hot } in FAULTS {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            without.push(rest_rate(node, &tap, hot, |n| healthy(n).to("", "offline.others")));
            with.push(rest_rate(node, &tap, hot, event));
        }
        let (without, with) = (median(without), median(with));
        println!("{name:>24} {without:>12.0} {with:>12.0} {:>8.2}", with / without);
    }
}

fn main() {
    if is_test() {
        return;
    }
    let asked = |name: &str| {
        let mut names = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).peekable();
        names.peek().is_none() || names.any(|argument| argument == name)
    };
    let rounds = setting("ROUNDS", 5);
    let node = Node::start();
    if asked("fairness") {
        fairness(&node, rounds);
    }
    if asked("backlog") {
        long_offline(&node, rounds);
    }
}
