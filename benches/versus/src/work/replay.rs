//! Reading a long log from its beginning, against a plain redb range scan of the very same rows in the very same file.
//!
//! The page cache holds all of it (2 GiB): what is measured is the work, not the disk. Replay checks each record's checksum and place, and finds
//! its parts; it is read both ways, visited and iterated, and the ratio is of the visit; the scan looks at each row's length and its last byte. Two more scans say where the difference goes: one that adds up every byte, as
//! whoever uses the events will read them, and one that computes a CRC-32 of each row.

use std::error::Error;

use onewrite::redb::TableDefinition;
use onewrite::{Event, ExpectedRevision, Store};

use crate::Setup;
use crate::peer::Failure;
use crate::report::{Goal, Report, median, timed};
use crate::work::sides::PAYLOAD;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const BATCH: u64 = 1000;
const STREAMS: u64 = 1000;
const CACHE_BYTES: usize = 2 << 30;

/// How it is read, and what comes out so that nothing is optimised away: rows, and a sum of what was looked at.
type Read = fn(&Store) -> Result<(u64, u64), Failure>;

const READS: [(&str, Read); 6] = [
    ("redb scan", |store| scan(store, |row| row.len() as u64 + row.last().copied().map_or(0, u64::from))),
    ("redb scan, every byte", |store| scan(store, |row| row.iter().copied().map(u64::from).sum())),
    ("redb scan, CRC-32 of each row", |store| scan(store, |row| u64::from(crc32fast::hash(row)))),
    ("onewrite, visit", |store| {
        let mut seen = (0, 0);
        store.read()?.replay(0)?.visit(|event| -> onewrite::Result<()> {
            seen = (seen.0 + 1, seen.1 + event?.payload().len() as u64);
            Ok(())
        })?;
        Ok(seen)
    }),
    ("onewrite, replay", |store| {
        let snapshot = store.read()?;
        let mut seen = (0, 0);
        for event in snapshot.replay(0)? {
            seen = (seen.0 + 1, seen.1 + event?.payload().len() as u64);
        }
        Ok(seen)
    }),
    ("onewrite, each event by itself", |store| {
        let snapshot = store.read()?;
        let mut seen = (0, 0);
        for event in snapshot.events(0)? {
            seen = (seen.0 + 1, seen.1 + event?.payload().len() as u64);
        }
        Ok(seen)
    }),
];

fn scan(store: &Store, look: impl Fn(&[u8]) -> u64) -> Result<(u64, u64), Failure> {
    let log = store.read()?.open_table(LOG)?;
    let mut seen = (0, 0_u64);
    for row in log.range::<u64>(..)? {
        seen = (seen.0 + 1, seen.1.wrapping_add(look(row?.1.value())));
    }
    Ok(seen)
}

fn fill(store: &Store, events: u64) -> Result<(), Failure> {
    for first in (0..events).step_by(BATCH as usize) {
        store.write(move |tx| {
            for n in first..(first + BATCH).min(events) {
                let event = Event::bytes("payment.completed", PAYLOAD).unpublished();
                tx.stream(format!("account-{}", n % STREAMS)).append([event], ExpectedRevision::Any)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    compare(setup).map_err(|failure| failure as Box<dyn Error>)
}

fn compare(setup: &Setup) -> Result<Report, Failure> {
    let events: u64 = setup.size(200_000, 1_000_000);
    let rounds = setup.rounds.unwrap_or(setup.size(3, 7));
    println!(
        "   {events} events of 256 bytes in {STREAMS} streams; medians of {rounds} rounds; all in the cache"
    );
    let store = Store::builder().cache_bytes(CACHE_BYTES).open(setup.folder.join("replay.redb"))?;
    fill(&store, events)?;
    let mut rates = vec![Vec::new(); READS.len()];
    for round in 0..rounds {
        // Each round begins with another, and every other one goes backwards.
        for place in 0..READS.len() {
            let at = (round + place) % READS.len();
            let at = if round % 2 == 0 { at } else { READS.len() - 1 - at };
            let ((name, read), rates) = (&READS[at], &mut rates[at]);
            let (time, seen) = timed(|| read(&store));
            let (rows, sum) = seen?;
            if rows != events || sum == 0 {
                return Err(format!("{name}: {rows} rows of {events}, sum {sum}").into());
            }
            rates.push(events as f64 / time.as_secs_f64());
        }
    }
    let rates: Vec<f64> = rates.iter().map(|rates| median(rates)).collect();
    for ((name, _), rate) in READS.iter().zip(&rates) {
        println!("{name:<34} {rate:>10.0} events/s   {:.2} of the scan", rate / rates[0]);
    }
    let [scan, bytes, checksum, visit, iterator, _] = rates[..] else {
        return Err("a read is missing".into());
    };
    let mut report = Report::default();
    let about = format!(
        "{visit:.0} events/s against {scan:.0}/s; {:.2} of a scan of every byte, {:.2} of one with CRC-32; the iterator {:.2}",
        visit / bytes,
        visit / checksum,
        iterator / scan
    );
    report.add("replay_vs_redb_scan", visit / scan, Goal::AtLeast(0.9), about);
    Ok(report)
}
