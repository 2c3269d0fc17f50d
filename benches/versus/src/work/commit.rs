//! Durable commits: one transaction of a 100-byte state row and a 256-byte event, by 1 to 64 threads that each wait for theirs.
//!
//! In each round all sides write for the same time, in an order that turns round; every side has a file of its own, made anew for each number of
//! writers. At the end each must have a row and an event for every commit that it said was durable.

use std::error::Error;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::sides::{KINDS, Kind, Side};
use crate::Setup;
use crate::peer::Failure;
use crate::plot;
use crate::report::{Goal, Report, median};

const WRITERS: [usize; 4] = [1, 4, 16, 64];

/// Commits per second of one side with so many writers.
pub(crate) struct Measured {
    pub(crate) kind: Kind,
    pub(crate) writers: usize,
    pub(crate) rate: f64,
}

struct Seat {
    kind: Kind,
    side: Box<dyn Side>,
    committed: u64,
    rates: Vec<f64>,
}

impl Seat {
    fn run_round(&mut self, writers: usize, time: Duration) -> Result<(), Failure> {
        let (commits, taken) = on_threads(&*self.side, self.committed, writers, time)?;
        self.committed += commits;
        self.rates.push(commits as f64 / taken.as_secs_f64());
        Ok(())
    }

    fn check(&self) -> Result<(), Failure> {
        let counts = self.side.counts()?;
        match counts == [self.committed; 2] {
            true => Ok(()),
            false => Err(format!(
                "{}: {} commits, and then {counts:?} rows and events",
                self.kind.name(),
                self.committed
            )
            .into()),
        }
    }
}

/// Lets the threads commit until the time is over; commits, and how long it took until the last was durable.
fn on_threads(
    side: &dyn Side,
    first_id: u64,
    writers: usize,
    time: Duration,
) -> Result<(u64, Duration), Failure> {
    let next = AtomicU64::new(first_id);
    let ready = Barrier::new(writers + 1);
    let write = |writer| {
        ready.wait();
        let start = Instant::now();
        while start.elapsed() < time {
            side.write(writer, next.fetch_add(1, Ordering::Relaxed))?;
        }
        Ok::<_, Failure>(())
    };
    std::thread::scope(|scope| {
        let write = &write;
        let threads: Vec<_> = (0..writers).map(|writer| scope.spawn(move || write(writer))).collect();
        ready.wait();
        let start = Instant::now();
        for thread in threads {
            thread.join().map_err(|_| "a writer panicked")??;
        }
        Ok((next.load(Ordering::Relaxed) - first_id, start.elapsed()))
    })
}

fn measure(setup: &Setup, writers: usize) -> Result<Vec<Measured>, Failure> {
    let rounds = setup.rounds.unwrap_or(setup.size(3, 7));
    let time = Duration::from_millis(setup.size(350, 1000));
    let mut seats = Vec::new();
    for kind in KINDS {
        let side = kind.make(&setup.folder, writers)?;
        seats.push(Seat { kind, side, committed: 0, rates: Vec::new() });
    }
    for round in 0..rounds {
        // Nobody always follows the same one, whose background work may still be going on.
        seats.rotate_left(round * 3 % KINDS.len());
        if round % 2 == 1 {
            seats.reverse();
        }
        for seat in &mut seats {
            seat.run_round(writers, time)?;
        }
    }
    let mut measured = Vec::new();
    for kind in KINDS {
        let seat = seats.iter().find(|seat| seat.kind == kind).ok_or("nobody leaves the table")?;
        seat.check()?;
        let (low, high) = seat
            .rates
            .iter()
            .fold((f64::MAX, 0.0), |(low, high): (f64, f64), rate| (low.min(*rate), high.max(*rate)));
        let rate = median(&seat.rates);
        println!("{writers:>3} writers  {:<34} {rate:>8.0} commits/s   ({low:.0} to {high:.0})", kind.name());
        measured.push(Measured { kind, writers, rate });
    }
    Ok(measured)
}

/// The fastest of these.
fn best(measured: &[Measured], of: impl Fn(&Measured) -> bool) -> Result<&Measured, Failure> {
    let best = measured.iter().filter(|one| of(one)).max_by(|a, b| a.rate.total_cmp(&b.rate));
    best.ok_or_else(|| "nothing was measured".into())
}

fn ratios(measured: &[Measured]) -> Result<Report, Failure> {
    let at = |kind, writers| best(measured, |one| one.kind == kind && one.writers == writers);
    let one = at(Kind::Keyless, 1)?;
    let many = at(Kind::Keyless, 64)?;
    let about = |ours: &Measured, peer: &Measured| {
        let Measured { kind, writers, rate } = peer;
        format!(
            "{:.0}/s with {} writers against {rate:.0}/s: {}, {writers} writers",
            ours.rate,
            ours.writers,
            kind.name()
        )
    };
    let mut report = Report::default();
    let mut add = |key, ours: &Measured, peer: &Measured, goal| {
        report.add(key, ours.rate / peer.rate, goal, about(ours, peer));
    };
    add("one_vs_redb", one, at(Kind::Redb, 1)?, Goal::AtLeast(0.95));
    let sqlite = best(measured, |other| other.kind.is_sqlite() && other.writers == 1)?;
    add("one_vs_sqlite", one, sqlite, Goal::AtLeast(0.75));
    add("one_vs_fdatasync", one, at(Kind::Disk, 1)?, Goal::None);
    add("many_vs_sqlite", many, best(measured, |other| other.kind.is_sqlite())?, Goal::AtLeast(10.0));
    add("many_vs_fjall", many, best(measured, |other| other.kind.is_fjall())?, Goal::AtLeast(5.0));
    let mut worst = (at(Kind::Keyed, 64)?, many);
    for writers in WRITERS {
        let (keyed, keyless) = (at(Kind::Keyed, writers)?, at(Kind::Keyless, writers)?);
        if keyed.rate / keyless.rate < worst.0.rate / worst.1.rate {
            worst = (keyed, keyless);
        }
    }
    add("keyed_vs_keyless", worst.0, worst.1, Goal::AtLeast(0.7));
    let (one, many) = (at(Kind::Journaled, 1)?, at(Kind::Journaled, 64)?);
    add("journal_one_vs_redb", one, at(Kind::Redb, 1)?, Goal::AtLeast(0.95));
    add("journal_one_vs_sqlite", one, sqlite, Goal::AtLeast(0.75));
    let sqlite = best(measured, |other| other.kind.is_sqlite())?;
    add("journal_many_vs_sqlite", many, sqlite, Goal::AtLeast(10.0));
    Ok(report)
}

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    compare(setup).map_err(|failure| failure as Box<dyn Error>)
}

fn compare(setup: &Setup) -> Result<Report, Failure> {
    println!(
        "   a 100-byte row and a 256-byte event each; 32 MiB of cache; medians of rounds, and their span"
    );
    let mut measured = Vec::new();
    for writers in WRITERS {
        measured.extend(measure(setup, writers)?);
    }
    if let Some(path) = &setup.plot {
        plot::commits(path, &measured)?;
        println!("{} written", path.display());
    }
    ratios(&measured)
}
