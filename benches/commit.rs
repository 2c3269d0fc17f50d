//! Durable commits: onewrite against plain redb code that does the same two inserts by hand.
//!
//! `cargo bench --bench commit`. Each element is one transaction: a 100-byte state row and a 256-byte event, durable.
//! The ratios at the end come from interleaved rounds with medians: what one machine does at one moment is no figure.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

mod rounds;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use onewrite::redb::{Database, TableDefinition};
use onewrite::{Event, Store};
use rounds::{is_test, median, setting};

const STATE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("state");
const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");
const ROW: [u8; 100] = [7; 100];
const PAYLOAD: [u8; 256] = [8; 256];
const WRITERS: [u64; 3] = [1, 8, 64];
const CACHE_BYTES: usize = 32 << 20;

/// Runs `writes` transactions on so many threads and returns the time.
fn on_threads(writers: u64, writes: u64, write: impl Fn(u64) + Send + Sync + 'static) -> Duration {
    let write = Arc::new(write);
    let start = Instant::now();
    let threads: Vec<_> = (0..writers)
        .map(|writer| {
            let write = Arc::clone(&write);
            std::thread::spawn(move || (writer..writes).step_by(writers as usize).for_each(|n| write(n)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    start.elapsed()
}

/// One store for all rounds of one kind, as a service has.
struct Ours(Store, AtomicU64);

impl Ours {
    fn open(path: &Path) -> Arc<Self> {
        let store = Store::builder().cache_bytes(CACHE_BYTES).open(path).unwrap();
        Arc::new(Self(store, AtomicU64::new(0)))
    }

    fn write(&self, key: Option<u64>) {
        let id = self.1.fetch_add(1, Ordering::Relaxed);
        let write = move |tx: &onewrite::Transaction| {
            tx.open_table(STATE)?.insert(id, &ROW[..])?;
            let event = Event::bytes("payment.completed", PAYLOAD).to("payments", "completed");
            tx.append(match key {
                Some(key) => event.key(key.to_string()),
                None => event,
            })?;
            Ok(())
        };
        self.0.write(write).unwrap();
    }
}

/// What a user of redb would write by hand.
struct Plain(Database, AtomicU64);

impl Plain {
    fn open(folder: &Path) -> Arc<Self> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        Arc::new(Self(builder.create(folder.join("plain.redb")).unwrap(), AtomicU64::new(0)))
    }

    fn write(&self) {
        let tx = self.0.begin_write().unwrap();
        let id = self.1.fetch_add(1, Ordering::Relaxed);
        tx.open_table(STATE).unwrap().insert(id, &ROW[..]).unwrap();
        tx.open_table(OUTBOX).unwrap().insert(id, &PAYLOAD[..]).unwrap();
        tx.commit().unwrap();
    }
}

fn criterion_benches(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let mut group = criterion.benchmark_group("commit");
    group.throughput(Throughput::Elements(1)).sample_size(10).measurement_time(Duration::from_secs(3));
    for writers in WRITERS {
        let ours = Ours::open(&folder.path().join("ours.redb"));
        let plain = Plain::open(folder.path());
        group.bench_function(BenchmarkId::new("onewrite", writers), |bench| {
            bench.iter_custom(|writes| {
                let ours = Arc::clone(&ours);
                on_threads(writers, writes, move |_| ours.write(None))
            });
        });
        group.bench_function(BenchmarkId::new("redb by hand", writers), |bench| {
            bench.iter_custom(|writes| {
                let plain = Arc::clone(&plain);
                on_threads(writers, writes, move |_| plain.write())
            });
        });
    }
    group.finish();
}

/// Interleaved rounds; the ratio of medians.
fn ratios() {
    let rounds = setting("ROUNDS", 7);
    println!("\ncommits per second, medians of {rounds} interleaved rounds");
    println!(
        "{:>8} {:>12} {:>12} {:>12} {:>8} {:>8}",
        "writers", "onewrite", "keyed", "redb", "ratio", "keyed"
    );
    for writers in WRITERS {
        let writes = 300 * (1 + writers / 8);
        let plain_writes = 300;
        let folder = tempfile::tempdir().unwrap();
        let open = |name| Ours::open(&folder.path().join(name));
        let (ours, keyed, plain) = (open("ours.redb"), open("keyed.redb"), Plain::open(folder.path()));
        let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let one = Arc::clone(&ours);
            let time = on_threads(writers, writes, move |_| one.write(None));
            a.push(writes as f64 / time.as_secs_f64());
            let one = Arc::clone(&keyed);
            let time = on_threads(writers, writes, move |n| one.write(Some(n % 1000)));
            b.push(writes as f64 / time.as_secs_f64());
            let one = Arc::clone(&plain);
            let time = on_threads(writers, plain_writes, move |_| one.write());
            c.push(plain_writes as f64 / time.as_secs_f64());
        }
        let (a, b, c) = (median(a), median(b), median(c));
        println!("{writers:>8} {a:>12.0} {b:>12.0} {c:>12.0} {:>8.2} {:>8.2}", a / c, b / a);
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    criterion_benches(&mut criterion);
    criterion.final_summary();
    if !is_test() {
        ratios();
    }
}
