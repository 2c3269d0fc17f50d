//! Shows a captured table: the application writes rows only, and the library makes the events.
//!
//! `cargo run --release --example capture`

use std::thread;
use std::time::{Duration, Instant};

use onewrite::broker::MemoryBroker;
use onewrite::redb::TableDefinition;
use onewrite::{BoxError, Capture, CaptureMode, Error, Store};

/// Cents by product.
const PRICES: TableDefinition<&str, u64> = TableDefinition::new("prices");
const QUEUE: &str = "catalogue";

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shop.redb");

    // An older release has written a row, without any events.
    let store = Store::open(&path)?;
    store.write(|tx| Ok(tx.open_table(PRICES)?.insert("chair", 4_000).map(drop)?))?;
    store.close()?;

    // From now on the table is captured. `snapshot` also announces the rows that are there already.
    // In this mode only the newest value of a row is announced, however often the row has changed.
    let prices = Capture::json(PRICES).mode(CaptureMode::NewestValue).snapshot(true);
    let store = Store::builder().capture(prices.to_queue(QUEUE)).open(&path)?;
    for cents in 9_000..9_100 {
        set_price(&store, "desk", cents)?;
    }
    set_price(&store, "lamp", 2_000)?;
    store.write(|tx| tx.captured_table(PRICES)?.remove("lamp").map(drop))?;

    // A captured table is written through `captured_table` alone: no change can go unnoticed.
    let around = store.write(|tx| tx.open_table(PRICES).map(drop));
    println!("a write past the capture: {around:?}");
    assert!(matches!(around, Err(Error::CapturedTable { .. })));

    // The relay publishes one event for each row that has changed.
    let broker = MemoryBroker::new();
    broker.declare_queue(QUEUE, Default::default());
    let relay = store.relay("rabbit").spawn(broker.publisher())?;
    wait_until("three events are published", || broker.queue_len(QUEUE) == 3)?;
    relay.stop(Duration::from_secs(5));

    let messages = broker.messages(QUEUE);
    let mut payloads = messages
        .iter()
        .map(|stored| String::from_utf8(stored.message.payload.clone()))
        .collect::<Result<Vec<String>, _>>()?;
    payloads.sort();
    println!("102 writes made these events:");
    payloads.iter().for_each(|payload| println!("  {payload}"));
    let expected = [
        r#"{"table":"prices","key":"chair","operation":"snapshot","new":4000}"#,
        r#"{"table":"prices","key":"desk","operation":"update","new":9099}"#,
        r#"{"table":"prices","key":"lamp","operation":"remove","new":null}"#,
    ];
    assert_eq!(payloads, expected);
    Ok(())
}

fn set_price(store: &Store, product: &'static str, cents: u64) -> onewrite::Result<()> {
    store.write(move |tx| tx.captured_table(PRICES)?.insert(product, cents).map(drop))?;
    Ok(())
}

fn wait_until(what: &str, done: impl Fn() -> bool) -> Result<(), BoxError> {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        if Instant::now() > end {
            return Err(format!("waited for 30 s until {what}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
