//! Event sourcing at length: accounts are what happened to them.
//!
//! An old service has recorded deposits in an old form, and has published nothing. The new service:
//!
//! - reads the deposits in its own form,
//! - decides on accounts from many threads at once,
//! - keeps a table of balances, and rebuilds the table for a new version while business goes on,
//! - publishes everything from the first day on.
//!
//! At the end four ways to know a balance must agree.
//!
//! ```text
//! cargo run --release --example bank_ledger
//! AMQP_URL=amqp://guest:guest@127.0.0.1:5672/%2f cargo run --release --example bank_ledger
//! ```

mod bank;
#[path = "../common/mod.rs"]
mod common;
mod views;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use onewrite::{BoxError, Event, ExpectedRevision, Result, StartAt, Store};

use crate::bank::{Account, Entry, InsufficientFunds, Movement};
use crate::common::broker::{Broker, wait_until};
use crate::common::report::{self, count};

const ACCOUNTS: u64 = 20;
const OLD_DEPOSITS: u64 = 500;
const TELLERS: u64 = 8;
const DECISIONS: u64 = 250;
const TRANSFERS: u64 = 300;
const TIMEOUT: Duration = Duration::from_secs(60);

/// The counts of the tellers.
#[derive(Debug, Default)]
struct Counts {
    /// Decisions, those that met a conflict included.
    decisions: AtomicU64,
    done: AtomicU64,
    refused: AtomicU64,
}

fn main() -> Result<ExitCode, BoxError> {
    let begin = Instant::now();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("bank.redb");
    let broker = Broker::choose("bank-ledger");
    println!("Event sourcing, through {}", broker.describe());

    old_service(&path)?;
    println!("  an old service has recorded {OLD_DEPOSITS} deposits, as bare numbers, and published nothing");

    let queue = broker.queue.clone();
    let store = Store::builder()
        .upcast(("deposited", 1), ("deposited", 2), bank::upcast_deposit)
        .stream_destination(move |stream, _| bank::destination(stream, &queue))
        .open(&path)?;
    let statements = Store::open(folder.path().join("statements.redb"))?;
    let consumer = broker.consume(statements.consumer("statements"), views::receive)?;
    let queue = broker.queue.clone();
    let relay = store
        .relay("statements")
        .start_at(StartAt::Oldest)
        .publish_unpublished(move |event| bank::destination(event.stream()?, &queue));
    let relay = broker.publish(relay)?;

    let balances = views::balances(&store, 1)?;
    let counts = Counts::default();
    work(&store, &counts)?;
    balances.wait_until_live(TIMEOUT)?;
    println!(
        "  {TELLERS} tellers have decided on {ACCOUNTS} accounts, and {TRANSFERS} transfers touched two at once"
    );
    balances.stop(TIMEOUT);

    let balances = views::balances(&store, 2)?;
    work(&store, &counts)?;
    balances.wait_until_live(TIMEOUT)?;
    println!("  the balances were rebuilt for version 2 while they went on");

    let end = store.stats()?.next_seq;
    let drained = wait_until(|| {
        let seen = consumer.status();
        seen.applied >= end && store.stats().is_ok_and(|stats| stats.backlog_events == 0)
    });
    let report = account(&store, &statements, &counts, drained, begin.elapsed())?;
    println!("{report}");
    relay.stop(TIMEOUT);
    consumer.stop(TIMEOUT);
    balances.stop(TIMEOUT);
    Ok(if report.is_right() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The old service: deposits as bare numbers, and no rule that would publish them.
fn old_service(path: &Path) -> Result<()> {
    let store = Store::open(path)?;
    for n in 0..OLD_DEPOSITS {
        let stream = bank::stream(n % ACCOUNTS);
        store.write(move |tx| {
            tx.stream(&*stream).append([Event::json("deposited", &1_000)?], ExpectedRevision::Any)
        })?;
    }
    store.close()
}

/// Tellers decide on accounts at the same time. One more thread moves money between accounts.
fn work(store: &Store, counts: &Counts) -> Result<(), BoxError> {
    thread::scope(|scope| {
        let tellers: Vec<_> =
            (0..TELLERS).map(|teller| scope.spawn(move || serve(store, counts, teller))).collect();
        for n in 0..TRANSFERS / 2 {
            let (from, to) = (n % ACCOUNTS, (n * 7 + 1) % ACCOUNTS);
            if from != to {
                settle(bank::transfer(store, from, to, 100 + n), counts)?;
            }
        }
        tellers.into_iter().try_for_each(|teller| teller.join().map_err(|_| "a teller panicked")?)
    })
}

fn serve(store: &Store, counts: &Counts, teller: u64) -> Result<(), BoxError> {
    for n in 0..DECISIONS / 2 {
        // All tellers share a few accounts, so that decisions there meet conflicts.
        let account = store.aggregate::<Account>((teller * 31 + n * 17) % (ACCOUNTS / 4)).attempts(1_000);
        let decided = account.execute(|account| {
            counts.decisions.fetch_add(1, Ordering::Relaxed);
            match n % 3 {
                0 => bank::withdraw(account, 700 + 200 * n, "withdrawn at the counter"),
                _ => Ok(vec![Entry::Deposited(Movement::new(300 + n, "paid in at the counter"))]),
            }
        });
        settle(decided.map(drop), counts)?;
    }
    Ok(())
}

fn settle(decided: Result<()>, counts: &Counts) -> Result<(), BoxError> {
    match decided {
        Ok(()) => _ = counts.done.fetch_add(1, Ordering::Relaxed),
        Err(error) if error.downcast_app::<InsufficientFunds>().is_some() => {
            counts.refused.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Compares four ways to know a balance: a fold of every event, a fold from a snapshot, the
/// projection, and the published events.
fn account(
    store: &Store,
    statements: &Store,
    counts: &Counts,
    drained: bool,
    time: Duration,
) -> Result<report::Account, BoxError> {
    let (folded, from_snapshots, snapshots) = views::folded(store, ACCOUNTS)?;
    let (projected, published) = (views::projected(store)?, views::projected(statements)?);
    let movements = views::movements(store)?;
    let (stats, verified) = (store.stats()?, store.verify()?);
    let decided = TELLERS * (DECISIONS / 2) * 2;
    let decisions = counts.decisions.load(Ordering::Relaxed);
    let cents = |balances: &views::Balances| balances.values().sum::<u64>();
    let in_and_out = movements.deposited - movements.withdrawn;

    let mut report = report::Account::new("from the tables of both stores", time);
    report.line(
        "events in the log",
        count(stats.next_seq),
        verified.records == stats.next_seq && verified.is_whole(),
    );
    report.line("decisions asked for", count(decided), decided > 0);
    report.line(
        "decided again after a conflict",
        format!("{} times", count(decisions - decided)),
        decisions > decided,
    );
    let (done, refused) = (counts.done.load(Ordering::Relaxed), counts.refused.load(Ordering::Relaxed));
    let asked = decided + TRANSFERS / 2 * 2;
    report.line(
        "done, and refused",
        format!("{}, {}", count(done), count(refused)),
        done + refused == asked && refused > 0,
    );
    report.line("folded from every event", euros(cents(&folded)), cents(&folded) == in_and_out);
    report.line(
        "folded from snapshots",
        format!("{}, {snapshots} of {ACCOUNTS} accounts have one", euros(cents(&from_snapshots))),
        from_snapshots == folded && snapshots > 0,
    );
    report.line("kept by the projection", euros(cents(&projected)), projected == folded);
    report.line("movements it counted", count(movements.count), movements.count == stats.next_seq);
    report.line("known to the statement service", euros(cents(&published)), published == folded && drained);
    report.line(
        "events waiting or quarantined",
        count(stats.backlog_events + stats.relays.values().map(|relay| relay.quarantined).sum::<u64>()),
        stats.backlog_events == 0 && stats.relays.values().all(|relay| relay.quarantined == 0),
    );
    Ok(report)
}

fn euros(cents: u64) -> String {
    format!("{}.{:02} EUR", cents / 100, cents % 100)
}
