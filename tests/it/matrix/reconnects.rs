//! B22. Connections come and go without leaving anything behind.

use std::time::Duration;

use onewrite::Store;
use onewrite::broker::RabbitMqSource;

use super::{Line, rabbit, until};
use crate::scratch::{child, task};
use crate::support::proxy::{ChaosProxy, End};
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

const RECONNECTS: u64 = 1000;
/// From here on it must be flat: allocators and pools have what they need.
const WARM: u64 = 200;

/// Goal: 1,000 reconnects of a relay and of a consumer leave threads, descriptors and memory as they were after 200. Method: in a process
/// of its own, each connection is reset as soon as it is up; counted by the operating system, every hundred.
#[test]
fn b22_a_thousand_reconnects() {
    let node = shared_node();
    Tap::connect(&node.url()).queue("b22", &[]);
    let folder = tempfile::tempdir().unwrap();
    let argument = format!("{} {}", node.port(), node.url());
    let mut child = child("matrix::reconnects::child_reconnects", folder.path(), argument);
    // A connection has two buffers of 4 MiB. They go back to the system with it, instead of staying behind in whichever of glibc's
    // arenas its thread had: how many of those there are depends on who ran beside whom, and says nothing of what is left behind.
    let output = child.env("MALLOC_MMAP_THRESHOLD_", "262144").output().unwrap();
    let shown =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && shown.contains("flat"), "{shown}");
    println!("{shown}");
}

/// Threads, descriptors and resident KiB of this process.
fn used() -> [u64; 3] {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count() as u64;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    [
        count("/proc/self/task"),
        count("/proc/self/fd"),
        resident.trim().trim_end_matches(" kB").parse().unwrap(),
    ]
}

#[test]
fn child_reconnects() {
    let Some((folder, argument)) = task() else { return };
    let (port, url) = argument.split_once(' ').unwrap();
    let proxy = ChaosProxy::to(port.parse().unwrap());
    let url = proxy.url(url);
    let quick = (Duration::from_millis(1), Duration::from_millis(2));
    let mut line = Line::with("b22", |relay| relay, rabbit(&url).reconnect_backoff(quick.0, quick.1));
    let credit = Store::open(folder.join("credit.redb")).unwrap();
    let source = RabbitMqSource::new(&url, "b22").unwrap().reconnect_backoff(quick.0, quick.1);
    let consumer = credit.consumer("b22").spawn(source, |_, _| Ok(())).unwrap();
    let mut samples = Vec::new();
    let (mut up, mut consuming) = (0, 0);
    while up < RECONNECTS {
        until("both connected anew", || {
            line.relay.status().reconnects >= up && consumer.status().connections > consuming
        });
        if up >= 100 * samples.len() as u64 {
            line.append("k").wait_confirmed(super::SOON).unwrap();
            // What ended just now needs a moment to go.
            until("two connections", || proxy.live() == 2);
            std::thread::sleep(Duration::from_millis(100));
            samples.push((up, used()));
        }
        up = line.relay.status().reconnects + 1;
        consuming = consumer.status().connections;
        proxy.end_all(End::Reset);
    }
    line.until_empty();
    until("everything applied", || consumer.status().applied == line.appended["k"]);
    for sample in &samples {
        println!("{sample:?}");
    }
    let of = |at: u64| samples.iter().find(|(up, _)| *up >= at).unwrap().1;
    let (warm, last) = (of(WARM), samples.last().unwrap().1);
    assert!(last[0] <= warm[0] + 2, "threads: {samples:?}");
    assert!(last[1] <= warm[1] + 4, "descriptors: {samples:?}");
    assert!(last[2] <= warm[2] + (2 << 10), "resident KiB: {samples:?}");
    println!("flat");
}
