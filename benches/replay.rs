//! Replay: reading a long log from its beginning, against a plain redb range scan of the very same bytes.
//!
//! `cargo bench --bench replay` (`EVENTS=1000000`, `ROUNDS=5` unless set). Both read the same file, warm, in interleaved rounds;
//! the figures are medians. Reading through the log checks each record's checksum and place and finds its parts. Three scans
//! stand beside it: one that looks at the length and the last byte of each row, one that adds up every byte, and one that computes
//! a CRC-32 of each row, which is what a log that checks its records cannot do without.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

use std::time::{Duration, Instant};

use onewrite::redb::TableDefinition;
use onewrite::{Event, EventFilter, ExpectedRevision, Store};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const PAYLOAD: [u8; 256] = [8; 256];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

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

/// How long it takes, and what it has read: so that nothing is optimised away.
fn timed(read: impl FnOnce() -> u64) -> (Duration, u64) {
    let start = Instant::now();
    let sum = read();
    (start.elapsed(), sum)
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
    let told = store.read().unwrap().replay(0).unwrap().visit(|event| -> onewrite::Result<()> {
        sum += event?.payload().len() as u64;
        Ok(())
    });
    told.unwrap();
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

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times.get(times.len() / 2).unwrap().as_secs_f64()
}

fn main() {
    let (events, rounds) = (setting("EVENTS", 1_000_000), setting("ROUNDS", 5));
    let folder = tempfile::tempdir().unwrap();
    // The page cache holds all of it: what is measured is the work, not the disk.
    let store = Store::builder().cache_bytes(2 << 30).open(folder.path().join("a.redb")).unwrap();
    fill(&store, events);
    type Read = fn(&Store) -> u64;
    let reads: [(&str, Read); 7] = [
        ("plain redb scan", scan),
        ("plain redb scan, every byte", scan_every_byte),
        ("plain redb scan, CRC-32 of each row", scan_with_checksum),
        ("onewrite, replay", replay),
        ("onewrite, visit", visit),
        ("onewrite, each event by itself", owned),
        ("onewrite, by category and type", replay_filtered),
    ];
    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); reads.len()];
    for _ in 0..rounds {
        for ((_, read), times) in reads.iter().zip(&mut times) {
            let (time, sum) = timed(|| read(&store));
            assert!(sum > 0);
            times.push(time);
        }
    }
    let medians: Vec<f64> = times.into_iter().map(median).collect();
    let [scan, bytes, checksum, ..] = medians[..] else { unreachable!("there are six") };
    println!("{events} events of 256 bytes, medians of {rounds} interleaved rounds");
    for ((name, _), time) in reads.iter().zip(&medians) {
        println!(
            "{name:<36} {:>10.0} events/s   {:.2} of the scan   {:.2} with every byte   {:.2} with checksum",
            events as f64 / time,
            scan / time,
            bytes / time,
            checksum / time
        );
    }
}
