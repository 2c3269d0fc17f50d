//! Replay: reading a long log from its beginning, against a plain redb range scan of the very same bytes.
//!
//! `cargo bench --bench replay` (`EVENTS=1000000`, `ROUNDS=7` unless set). Both read the same file, warm, in interleaved rounds;
//! the figures are medians. Reading through the log checks each record's checksum and place and finds its parts. Three scans
//! stand beside it: one that looks at the length and the last byte of each row, one that adds up every byte, and one that computes
//! a CRC-32 of each row, which is what a log that checks its records cannot do without.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

mod rounds;

use criterion::{Criterion, Throughput};
use onewrite::redb::TableDefinition;
use onewrite::{Event, EventFilter, ExpectedRevision, Store};
use rounds::{Side, is_test, rates, setting};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const PAYLOAD: [u8; 256] = [8; 256];

fn fill(store: &Store, events: u64) {
    let batch = 1000;
    for first in (0..events).step_by(batch) {
        store
            .write(move |tx| {
                for n in first..(first + batch as u64).min(events) {
                    let event = Event::bytes("payment.completed", PAYLOAD).unpublished();
                    tx.stream(format!("account-{}", n % 1000)).append([event], ExpectedRevision::Any)?;
                }
                Ok(())
            })
            .unwrap();
    }
}

fn scan(store: &Store) -> u64 {
    let log = store.read().unwrap().open_table(LOG).unwrap();
    let rows = log.range::<u64>(..).unwrap();
    let look = |frame: &[u8]| frame.len() as u64 + u64::from(*frame.last().unwrap());
    rows.map(|row| look(row.unwrap().1.value())).sum()
}

/// A scan that looks at every byte, as whoever uses the events will.
fn scan_every_byte(store: &Store) -> u64 {
    let log = store.read().unwrap().open_table(LOG).unwrap();
    let rows = log.range::<u64>(..).unwrap();
    rows.map(|row| row.unwrap().1.value().iter().map(|byte| u64::from(*byte)).sum::<u64>()).sum()
}

fn scan_with_checksum(store: &Store) -> u64 {
    let log = store.read().unwrap().open_table(LOG).unwrap();
    let rows = log.range::<u64>(..).unwrap();
    rows.map(|row| u64::from(crc32fast::hash(row.unwrap().1.value()))).sum()
}

fn replay(store: &Store) -> u64 {
    let snapshot = store.read().unwrap();
    snapshot.replay(0).unwrap().map(|event| event.unwrap().payload().len() as u64).sum()
}

fn visit(store: &Store) -> u64 {
    let mut sum = 0;
    let reported = store.read().unwrap().replay(0).unwrap().visit(|event| -> onewrite::Result<()> {
        sum += event?.payload().len() as u64;
        Ok(())
    });
    reported.unwrap();
    sum
}

fn owned(store: &Store) -> u64 {
    store.read().unwrap().events(0).unwrap().map(|event| event.unwrap().payload().len() as u64).sum()
}

fn replay_filtered(store: &Store) -> u64 {
    let filter = EventFilter::all().category("account").event_type("payment.completed");
    let events = store.read().unwrap();
    events.events_of(0, &filter).unwrap().map(|event| event.unwrap().payload().len() as u64).sum()
}

type Read = fn(&Store) -> u64;

const READS: [(&str, Read); 7] = [
    ("plain redb scan", scan),
    ("plain redb scan, every byte", scan_every_byte),
    ("plain redb scan, CRC-32 of each row", scan_with_checksum),
    ("onewrite, visit", visit),
    ("onewrite, replay", replay),
    ("onewrite, each event by itself", owned),
    ("onewrite, by category and type", replay_filtered),
];

fn criterion_benches(criterion: &mut Criterion, store: &Store, events: u64) {
    let mut group = criterion.benchmark_group("replay");
    group.throughput(Throughput::Elements(events)).sample_size(10);
    for (name, read) in READS {
        group.bench_function(name, |bench| bench.iter(|| read(store)));
    }
    group.finish();
}

fn main() {
    let (events, rounds) = (setting("EVENTS", 1_000_000), setting("ROUNDS", 7));
    let folder = tempfile::tempdir().unwrap();
    // The page cache holds all of it: what is measured is the work, not the disk.
    let store = Store::builder().cache_bytes(2 << 30).open(folder.path().join("a.redb")).unwrap();
    fill(&store, events);
    let mut criterion = Criterion::default().configure_from_args();
    criterion_benches(&mut criterion, &store, events);
    criterion.final_summary();
    if is_test() {
        return;
    }
    let mut sides: Vec<Side<'_>> =
        READS.iter().map(|(name, read)| (*name, Box::new(|| read(&store)) as Box<_>)).collect();
    let rates = rates(rounds, events, &mut sides);
    let [scan, bytes, checksum, ..] = rates[..] else { unreachable!("there are seven") };
    println!("\n{events} events of 256 bytes, medians of {rounds} interleaved rounds");
    for ((name, _), rate) in READS.iter().zip(&rates) {
        println!(
            "{name:<36} {rate:>10.0} events/s   {:.2} of the scan   {:.2} with every byte   {:.2} with checksum",
            rate / scan,
            rate / bytes,
            rate / checksum
        );
    }
}
