//! A long time without a broker: a backlog grows while it is away, and is drained when it comes, once each, in order per key, with
//! memory that does not grow with the backlog.
//!
//! 20,000 events here; a million, and every rate, is for `benches/offline.rs`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use onewrite::broker::RabbitMq;
use onewrite::{Event, Store};

use crate::scratch::{child, task};
use crate::support::rabbit::RabbitNode;
use crate::support::tap::{Raw, Tap};

const LIMIT: Duration = Duration::from_secs(180);
const EVENTS: u64 = 20_000;
const KEYS: u64 = 1000;
const WINDOW: usize = 256;

/// The child's word to the parent.
const FIGURES: &str = "figures of the drain:";

/// Resident memory in KiB.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("Linux reports it");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Goal: 20,000 events of 2 KB written while the broker is away are drained when it comes: once each, in order per key, with a full window, in
/// few commits, and in memory that does not know how many they are. Method: a process of its own, whose memory is nobody else's, writes
/// them, 1,000 to a commit, with a page cache of 4 MiB; the broker starts; the child watches its relay; the queue is judged raw.
#[test]
fn a_long_backlog_is_drained_once_in_order_and_in_flat_memory() {
    let mut node = RabbitNode::start();
    let tap = Tap::connect(&node.url());
    tap.queue("offline", &[]);
    drop(tap);
    node.settle_declarations();
    node.kill9();
    let folder = tempfile::tempdir().unwrap();
    let mut child = child("offline::child_drains", &folder.path().join("a.redb"), node.url())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let written = folder.path().join("written");
    let deadline = Instant::now() + LIMIT;
    while !written.exists() {
        assert!(
            Instant::now() < deadline && child.try_wait().unwrap().is_none(),
            "the child writes its backlog"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    node.restart();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let figures = said.split_once(FIGURES).unwrap_or_else(|| panic!("{said}")).1.lines().next().unwrap();
    let figures: Vec<u64> = figures.split_whitespace().map(|figure| figure.parse().unwrap()).collect();
    let [grown_kib, in_flight_max, commits] = figures[..] else { panic!("{said}") };
    println!("memory grew by {grown_kib} KiB");
    assert!(grown_kib < 24 * 1024, "memory grew by {grown_kib} KiB; the backlog takes 44 MiB");
    assert_eq!(in_flight_max, WINDOW as u64, "the window is full");
    // One each 250 ms of draining, and one for 512 records that are trimmed.
    assert!(commits < EVENTS / 20, "{commits} commits");
    let arrived = Tap::connect(&node.url()).drain("offline");
    assert_eq!(arrived.len() as u64, EVENTS, "each once: nothing was in doubt");
    let mut last = BTreeMap::new();
    for n in arrived
        .iter()
        .map(|raw: &Raw| -> u64 { String::from_utf8_lossy(&raw.body[..8]).trim().parse().unwrap() })
    {
        let before = last.insert(n % KEYS, n);
        assert_eq!(before.map_or(n % KEYS, |before| before + KEYS), n, "the next of its key");
    }
}

/// The process that has the backlog.
#[test]
fn child_drains() {
    let Some((path, url)) = task() else { return };
    let store = Store::builder().cache_bytes(4 << 20).open(&path).unwrap();
    let relay = store.relay("r").window_events(WINDOW).spawn(RabbitMq::new(&url).unwrap()).unwrap();
    for first in (0..EVENTS).step_by(1000) {
        store
            .write(move |tx| {
                (first..first + 1000).try_for_each(|n| {
                    let event = Event::bytes("t", format!("{n:8}{}", "x".repeat(2000)));
                    tx.append(event.key((n % KEYS).to_string()).to("", "offline")).map(drop)
                })
            })
            .unwrap();
    }
    assert_eq!(store.stats().unwrap().backlog_events, EVENTS);
    let (resident, commits) = (resident_kib(), store.stats().unwrap().commits);
    let (mut resident_max, mut in_flight_max) = (resident, 0);
    std::fs::write(path.with_file_name("written"), "").unwrap();
    let deadline = Instant::now() + LIMIT;
    while store.stats().unwrap().backlog_events > 0 {
        assert!(Instant::now() < deadline, "{:?}", relay.status());
        resident_max = resident_max.max(resident_kib());
        in_flight_max = in_flight_max.max(relay.status().in_flight);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(relay.status().confirmed, EVENTS);
    println!(
        "{FIGURES} {} {in_flight_max} {}",
        resident_max - resident,
        store.stats().unwrap().commits - commits
    );
    assert!(relay.stop(LIMIT).clean);
}
