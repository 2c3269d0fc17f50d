//! All hostile kinds at once, beside genuine traffic, on a small disk, with a kill in the middle.
//!
//! Three processes: the test; one in a mount namespace of its own, with the small disk, a real broker, the genuine
//! producer and the attackers; and the attacked service, which has its store on the small disk.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use onewrite::broker::{RabbitMq, RabbitMqSource};
use onewrite::redb::TableDefinition;
use onewrite::{Error, Event, RejectedFull, Store, wire};

use crate::lanes_inbox::{count, effects};
use crate::scratch::{child, task, until_within};
use crate::support::rabbit::RabbitNode;
use crate::support::small_disk::{enter, mount};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(120);
const QUEUE: &str = "mixed.q";
const DEAD: &str = "mixed.dead";
const OWN: TableDefinition<'_, u64, u64> = TableDefinition::new("own");
const DISK_MB: u32 = 128;
/// What the service may have in hand, and keep of what it rejects or parks.
const IN_HAND: u64 = 8 << 20;
const KEPT: u64 = 8 << 20;
/// Beside what is in hand: code, caches, buffers, threads.
const RESIDENT_KIB_MAX: u64 = 256 << 10;
/// Of the application's writes, however quick they are without an attack: what a machine that does other things besides may add.
const P99_MS: f64 = 100.0;

/// How long the attack lasts: 9 s, or as many seconds as the variable says.
fn attack() -> Duration {
    let seconds = std::env::var("ONEWRITE_ATTACK_S").ok().map(|text| text.parse().expect("seconds"));
    Duration::from_secs(seconds.unwrap_or(9))
}

/// Goal: whatever those who may publish to a queue send, each genuine event is applied once, or rejected with a reason; the
/// application's writes are served, as quickly as before but for a factor; memory and disk stay within their bounds. Method: forged lanes,
/// bodies that the handler rejects, headers larger than a frame, nested tables, keys that fail for ever, handlers that panic, foreign ids
/// and unknown producers without end, all at once beside genuine events, at a real broker; a disk of 128 MiB; the service is killed in the
/// middle and starts again. The settings are those that the page on security names.
#[test]
fn a_mixed_attack_costs_nothing_genuine() {
    let name = "mixed_attack::a_mixed_attack_costs_nothing_genuine";
    if let Some((folder, _)) = task() {
        attacked(&folder);
        println!("all well");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    enter(name, folder.path(), "");
}

struct Service {
    process: Child,
    life: u32,
    folder: PathBuf,
}

impl Service {
    fn start(folder: &Path, life: u32, url: &str) -> Self {
        let to_file = || File::options().create(true).append(true).open(said_in(folder, life)).unwrap();
        let process = child("mixed_attack::child_service", folder, url)
            .stdout(to_file())
            .stderr(to_file())
            .spawn()
            .unwrap();
        let service = Self { process, life, folder: folder.to_owned() };
        until_within(SOON, "the service is up", || service.said().contains("up\n"));
        service
    }

    fn said(&self) -> String {
        said(&self.folder, self.life)
    }
}

fn said_in(folder: &Path, life: u32) -> PathBuf {
    folder.join(format!("said-{life}"))
}

fn said(folder: &Path, life: u32) -> String {
    std::fs::read_to_string(said_in(folder, life)).unwrap_or_default()
}

fn last_figure(said: &str, name: &str) -> f64 {
    let figure = said.lines().rev().find_map(|line| line.strip_prefix(name));
    figure.unwrap_or_else(|| panic!("{name} is not in: {said}")).trim().parse().unwrap()
}

fn attacked(folder: &Path) {
    let disk = folder.join("disk");
    std::fs::create_dir(&disk).unwrap();
    mount(&disk, DISK_MB);
    let node = RabbitNode::start();
    let tap = Tap::connect(&node.url());
    tap.queue(DEAD, &[]);
    let dead_letters = [
        ("x-dead-letter-exchange", AMQPValue::LongString("".into())),
        ("x-dead-letter-routing-key", AMQPValue::LongString(DEAD.into())),
    ];
    tap.queue(QUEUE, &dead_letters);

    let mut service = Service::start(folder, 1, &node.url());
    let bank = Store::open(folder.join("bank.redb")).unwrap();
    let relay = bank.relay("r").spawn(RabbitMq::new(&node.url()).unwrap()).unwrap();
    let (over, genuine) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !over.load(Relaxed) {
                let n = genuine.load(Relaxed);
                let name = format!("genuine-{n}");
                let event =
                    Event::bytes("paid", name.clone()).id(name).key(format!("k{}", n % 7)).to("", QUEUE);
                bank.write(move |tx| tx.append(event.clone())).unwrap();
                genuine.store(n + 1, Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        // Genuine traffic alone, for the figures without an attack.
        std::thread::sleep(attack() / 3);
        std::fs::write(folder.join("attack"), "").unwrap();
        for attacker in [forge as Attacker, poison, fail, flood] {
            let (url, id, over, genuine) = (node.url(), bank.id(), &over, &genuine);
            threads.spawn(move || {
                let tap = Tap::connect(&url);
                let mut n = 0;
                while !over.load(Relaxed) {
                    attacker(&tap, &id, n, genuine.load(Relaxed));
                    n += 1;
                }
                n
            });
        }
        std::thread::sleep(attack() / 2);
        service.process.kill().unwrap();
        service.process.wait().unwrap();
        service = Service::start(folder, 2, &node.url());
        std::thread::sleep(attack() / 2);
        over.store(true, Relaxed);
    });
    let genuine = genuine.load(Relaxed);
    until_within(SOON, "all genuine events are sent", || relay.status().confirmed == genuine);
    let limit = SOON + attack() * 4;
    let began = Instant::now();
    while tap.count(QUEUE) > 0 {
        let ended = service.process.try_wait().unwrap();
        let left = tap.count(QUEUE);
        assert!(
            ended.is_none() && began.elapsed() < limit,
            "{left} in the queue, {ended:?}:\n{}",
            service.said()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    std::fs::write(folder.join("stop"), "").unwrap();
    let ended = service.process.wait().unwrap();
    assert!(ended.success() && service.said().contains("all well"), "{}", service.said());

    let (first, second) = (said(folder, 1), said(folder, 2));
    let quiet_ms = last_figure(&first, "quiet p99 ms");
    let attacked_ms = last_figure(&first, "attacked p99 ms").max(last_figure(&second, "attacked p99 ms"));
    let peak_kib = last_figure(&first, "peak KiB").max(last_figure(&second, "peak KiB"));
    eprintln!(
        "{genuine} genuine; p99 of writes {quiet_ms} ms, attacked {attacked_ms} ms; peak {peak_kib} KiB"
    );
    assert!(
        attacked_ms <= (3.0 * quiet_ms).max(P99_MS),
        "{attacked_ms} ms, and {quiet_ms} ms without an attack"
    );
    assert!(peak_kib < RESIDENT_KIB_MAX as f64, "{peak_kib} KiB");

    let store = Store::open(disk.join("a.redb")).unwrap();
    let mut rejected: BTreeSet<String> = tap.take(DEAD).iter().map(|raw| raw.id().to_owned()).collect();
    let mut after = None;
    loop {
        let rows = store.rejected("service").list(after, 256).unwrap();
        let Some(last) = rows.last() else { break };
        after = Some(last.number);
        assert!(rows.iter().all(|row| !row.reason.is_empty()));
        rejected.extend(rows.into_iter().filter_map(|row| row.message_id));
    }
    let applied = effects(&store);
    let mut lost = Vec::new();
    for n in 0..genuine {
        let name = format!("genuine-{n}");
        let times = applied.get(&name).copied().unwrap_or_default();
        assert!(times <= 1, "{name} was applied {times} times");
        if times == 0 && !rejected.contains(&name) {
            lost.push(n);
        }
    }
    assert!(
        lost.is_empty(),
        "{} of {genuine} are neither applied nor rejected: {:?}",
        lost.len(),
        &lost[..lost.len().min(9)]
    );
    assert!(store.verify().unwrap().findings.is_empty());
    relay.stop(SOON);
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn properties(id: String, headers: &[(&str, AMQPValue)]) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), value.clone());
    }
    BasicProperties::default().with_message_id(id.into()).with_headers(table)
}

type Attacker = fn(&Tap, &str, u64, u64);

/// Numbers of the genuine lanes that are to come, and lanes without end.
fn forge(tap: &Tap, store: &str, n: u64, genuine: u64) {
    let number = i64::try_from(genuine / 7 + n % 50).unwrap();
    let lane =
        if n.is_multiple_of(4) { i64::try_from(1_000 + n).unwrap() } else { i64::try_from(n % 7).unwrap() };
    let headers = [
        (wire::STORE, text(store)),
        (wire::EPOCH, AMQPValue::LongLongInt(1)),
        (wire::LANE, AMQPValue::LongLongInt(lane)),
        (wire::LANE_NUMBER, AMQPValue::LongLongInt(number)),
        ("cloudEvents_time", text("9999-12-31T23:59:59Z")),
    ];
    tap.publish(QUEUE, properties(format!("forged-{n}"), &headers), b"forged");
}

/// What cannot be read, and what the handler rejects.
fn poison(tap: &Tap, _: &str, n: u64, _: u64) {
    match n % 8 {
        0 => {
            let large = text(&"h".repeat(100_000));
            tap.publish(QUEUE, properties(format!("headers-{n}"), &[("large", large)]), b"fine");
        }
        1 => {
            let mut table = FieldTable::default();
            for _ in 0..60 {
                let mut outer = FieldTable::default();
                outer.insert("t".into(), AMQPValue::FieldTable(table));
                table = outer;
            }
            let nested = AMQPValue::FieldTable(table);
            tap.publish(QUEUE, properties(format!("nested-{n}"), &[("nested", nested)]), b"fine");
        }
        2 => tap.publish(QUEUE, properties(format!("large-{n}"), &[]), &vec![b'x'; 1 << 20]),
        _ => {
            let mut body = b"poison".to_vec();
            body.resize(64 << 10, b'x');
            tap.publish(QUEUE, properties(format!("poison-{n}"), &[]), &body);
        }
    }
    std::thread::sleep(Duration::from_millis(5));
}

/// Keys whose handler fails for ever, and handlers that panic.
fn fail(tap: &Tap, _: &str, n: u64, _: u64) {
    let key = format!("sick-{}", n % 5);
    let body: &[u8] = if n.is_multiple_of(16) { b"panic" } else { b"sick" };
    let headers = [("cloudEvents_partitionkey", text(&key))];
    tap.publish(QUEUE, properties(format!("sick-{n}"), &headers), body);
}

/// Ids and producers without end.
fn flood(tap: &Tap, _: &str, n: u64, _: u64) {
    if n.is_multiple_of(2) {
        return tap.publish(QUEUE, properties(format!("foreign-{n}"), &[]), b"fine");
    }
    let store = format!("018f0000-0000-7000-8000-{n:012x}");
    let headers = [
        (wire::STORE, text(&store)),
        (wire::EPOCH, AMQPValue::LongLongInt(1)),
        (wire::LANE, AMQPValue::LongLongInt(0)),
        (wire::LANE_NUMBER, AMQPValue::LongLongInt(i64::try_from(n).unwrap())),
    ];
    tap.publish(QUEUE, properties(format!("unknown-{n}"), &headers), b"fine");
}

/// The service: a consumer, and writes of its own, which must not fail.
#[test]
fn child_service() {
    let Some((folder, url)) = task() else { return };
    let store = Store::open(folder.join("disk/a.redb")).unwrap();
    let source = RabbitMqSource::new(&url, QUEUE).unwrap().prefetch_bytes(IN_HAND);
    let consumer = store
        .consumer("service")
        .attempts(3)
        .backoff(Duration::from_millis(10), Duration::from_millis(100))
        .parked_max(1_000, KEPT)
        .rejected_max(1_000, KEPT)
        .on_rejected_full(RejectedFull::DeadLetter)
        .spawn(source, |delivery, tx| match delivery.message.payload.as_slice() {
            body if body.starts_with(b"genuine") => count(delivery, tx),
            body if body.starts_with(b"poison") => Err(Error::reject("no such account")),
            b"sick" => Err(Error::app("the service of this customer is away")),
            b"panic" => panic!("the handler's own panic"),
            _ => Ok(()),
        })
        .unwrap();
    println!("up");
    let (mut quiet, mut attacked) = (Vec::new(), Vec::new());
    let mut said = Instant::now();
    for n in 0_u64.. {
        let began = Instant::now();
        let written = store.write(move |tx| {
            tx.open_table(OWN)?.insert(n % 1_000, n)?;
            tx.append(Event::bytes("own", n.to_string()).unpublished())
        });
        let took = began.elapsed();
        written.unwrap_or_else(|error| panic!("the application's write {n} failed: {error}"));
        let under_attack = folder.join("attack").exists();
        if under_attack { &mut attacked } else { &mut quiet }.push(took);
        assert_eq!(consumer.status().failed, None);
        if said.elapsed() > Duration::from_secs(1) {
            said = Instant::now();
            say("quiet p99 ms", &mut quiet);
            say("attacked p99 ms", &mut attacked);
            println!("peak KiB {}", peak_kib());
            println!("{:?}", consumer.status());
        }
        if folder.join("stop").exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    say("attacked p99 ms", &mut attacked);
    assert_eq!(consumer.stop(SOON).failed, None);
    let stats = store.stats().unwrap();
    assert_eq!(stats.poisoned, None);
    println!("{stats:?}");
    store.close().unwrap();
    println!("all well");
}

/// The 99th of a hundred.
fn say(name: &str, took: &mut [Duration]) {
    took.sort_unstable();
    if let Some(p99) = took.get(took.len() * 99 / 100) {
        eprintln!("{name} {:.3}", p99.as_secs_f64() * 1000.0);
    }
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches("kB").trim().parse().unwrap()
}
