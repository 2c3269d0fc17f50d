//! Listen to yourself: a shop that only writes its state, and a search service that follows it.
//!
//! The shop has been running for a while when the search service begins to follow it. The shop
//! first announces the rows that are there already, then each change of a product. Tills change the
//! stock thousands of times, so the shop announces only its newest value. The broker goes away in
//! between. At the end the search service must know exactly the products of the shop.
//!
//! ```text
//! cargo run --release --example listen_to_yourself
//! AMQP_URL=amqp://guest:guest@127.0.0.1:5672/%2f cargo run --release --example listen_to_yourself
//! ```

#[path = "../common/mod.rs"]
mod common;
mod search;
mod shop;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use onewrite::{BoxError, Capture, CaptureMode, Result, Store};

use crate::common::broker::{Broker, wait_until};
use crate::common::report::{Account, count};
use crate::shop::{Counts, PRODUCTS, STOCK};

const GOODS: u64 = 500;
const CLERKS: u64 = 4;
const CHANGES: u64 = 400;
const TILLS: u64 = 4;
const SALES: u64 = 500;
const TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> Result<ExitCode, BoxError> {
    let begin = Instant::now();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shop.redb");
    let broker = Broker::choose("listen-to-yourself");
    println!("Listen to yourself, through {}", broker.describe());

    let before = Store::open(&path)?;
    shop::stock_up(&before, GOODS)?;
    before.close()?;
    println!("  a shop has {GOODS} products, and nobody listens");

    let products = Capture::json(PRODUCTS).to("", &broker.queue).snapshot(true);
    let stock = Capture::json(STOCK).to("", &broker.queue).snapshot(true).mode(CaptureMode::NewestValue);
    let store = Store::builder().capture(products).capture(stock).open(&path)?;
    let index = Store::open(folder.path().join("search.redb"))?;
    search::prepare(&index)?;
    let consumer = broker.consume(index.consumer("search"), search::follow)?;
    let relay = broker.publish(store.relay("search"))?;

    let counts = Counts::default();
    work(&store, &counts)?;
    println!("  {CLERKS} clerks and {TILLS} tills have had their day, and somebody listens now");
    relay.pause();
    work(&store, &counts)?;
    let waiting = store.stats()?.captures.get("stock").map_or(0, |capture| capture.waiting);
    println!(
        "  and another one while the broker was away: the stock of {waiting} products waits to be reported"
    );
    relay.resume();

    let drained = wait_until(|| {
        let Ok(stats) = store.stats() else { return false };
        let dirty: u64 = stats.captures.values().map(|capture| capture.waiting).sum();
        let snapshots_done = stats.captures.values().all(|capture| capture.snapshot_done);
        snapshots_done && dirty + stats.backlog_events == 0 && consumer.status().applied >= stats.next_seq
    });
    let account = account(&store, &index, &counts, waiting, (drained, begin.elapsed()))?;
    println!("{account}");
    relay.stop(TIMEOUT);
    consumer.stop(TIMEOUT);
    Ok(if account.is_right() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn work(store: &Store, counts: &Counts) -> Result<(), BoxError> {
    thread::scope(|scope| {
        let clerks = (0..CLERKS)
            .map(|clerk| scope.spawn(move || shop::clerk(store, counts, GOODS, clerk * 100, CHANGES / 2)));
        let clerks: Vec<_> = clerks.collect();
        let tills =
            (0..TILLS).map(|till| scope.spawn(move || shop::till(store, counts, GOODS, till, SALES / 2)));
        let tills: Vec<_> = tills.collect();
        for thread in clerks.into_iter().chain(tills) {
            thread.join().map_err(|_| "somebody panicked")??;
        }
        Ok(())
    })
}

fn account(
    store: &Store,
    index: &Store,
    counts: &Counts,
    waiting: u64,
    (drained, time): (bool, Duration),
) -> Result<Account, BoxError> {
    let (shop, known) = (shop::inventory(store)?, shop::inventory(index)?);
    let (products, stock) = (counts.products.load(Ordering::Relaxed), counts.stock.load(Ordering::Relaxed));
    let stats = store.stats()?;
    let quarantined: u64 = stats.relays.values().map(|relay| relay.quarantined).sum();

    // The expected results of a search, from the shop's own titles.
    let mut expected = BTreeMap::<&str, BTreeSet<String>>::new();
    for (number, entry, _) in &shop {
        for word in entry.iter().flat_map(|(title, _)| title.split(' ')) {
            expected.entry(word).or_default().insert(number.clone());
        }
    }
    let mut wrong = search::words(index)?.iter().filter(|word| !expected.contains_key(&***word)).count();
    for (word, products) in &expected {
        wrong += usize::from(search::find(index, word)? != *products);
    }
    let differing = shop.iter().zip(&known).filter(|(ours, theirs)| ours != theirs).count();

    let mut account = Account::new("from the tables of both stores", time);
    account.line("products changed", count(products), products > 0 && products <= CLERKS * (CHANGES / 2) * 2);
    account.line("sales", count(stock), stock == TILLS * (SALES / 2) * 20 * 2);
    account.line("stocks that waited, not sales", count(waiting), waiting > 0 && waiting <= GOODS / 10);
    account.line(
        "events in the log for all that",
        count(stats.next_seq),
        // Each change of a product, the rows that were there at first, and far fewer stocks than
        // sales.
        stats.next_seq >= products && stats.next_seq < products + 2 * GOODS + stock / 2,
    );
    account.line(
        "events waiting or quarantined",
        count(stats.backlog_events + quarantined),
        drained && quarantined == 0,
    );
    account.line("products in the shop", count(shop.len() as u64), shop.len() as u64 == GOODS);
    account.line(
        "known otherwise to the search",
        count(differing as u64),
        differing == 0 && known.len() == shop.len(),
    );
    account.line("words that find wrong products", format!("{wrong} of {}", expected.len()), wrong == 0);
    Ok(account)
}
