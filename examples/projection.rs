//! Shows a projection: a table that follows the log, and is rebuilt when its code changes.
//!
//! `cargo run --release --example projection`

use std::time::Duration;

use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{BoxError, Event, EventFilter, Projection, Receipt, Retention, Store};

/// A figure for each item. Only the projection writes this table.
const FIGURES: TableDefinition<&str, u64> = TableDefinition::new("figures");
const TIMEOUT: Duration = Duration::from_secs(30);

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    // A rebuild reads the log from the beginning, so the log must keep what is published.
    let path = folder.path().join("shop.redb");
    let store = Store::builder().retention(Retention::forever()).open(path)?;

    // The first release counts sales.
    let sales = follow(&store, 1, |_cents| 1)?;
    sell(&store, "lamp", 2_000)?;
    sell(&store, "desk", 9_000)?;
    let receipt = sell(&store, "lamp", 2_500)?;

    // A projection lags behind the log by some milliseconds. To read your own write, wait for it.
    let last = receipt.seqs().last().copied().unwrap_or_default();
    sales.wait_for_position(last, TIMEOUT)?;
    let (lamps, desks) = (figure(&store, "lamp")?, figure(&store, "desk")?);
    println!("release 1 counts sales: lamp {lamps}, desk {desks}");
    assert_eq!((lamps, desks), (2, 1));
    sales.stop(TIMEOUT);

    // The second release adds up cents. Its version differs, so the table is rebuilt from the log.
    // Readers see the old table until the new one has caught up.
    let revenue = follow(&store, 2, |cents| cents)?;
    revenue.wait_until_live(TIMEOUT)?;
    let (lamps, desks) = (figure(&store, "lamp")?, figure(&store, "desk")?);
    println!("release 2 adds up cents: lamp {lamps}, desk {desks}");
    assert_eq!((lamps, desks), (4_500, 9_000));
    revenue.stop(TIMEOUT);
    Ok(())
}

/// Adds `amount` of each sale to the figure of the sold item.
fn follow(store: &Store, version: u32, amount: fn(u64) -> u64) -> onewrite::Result<Projection> {
    store
        .projection("figures")
        .table(FIGURES)
        .version(version)
        .filter(EventFilter::all().event_type("sold"))
        .spawn(move |event, tx| {
            let (item, cents): (String, u64) = onewrite::codec::from_json(event.payload())?;
            let mut figures = tx.open_table(FIGURES)?;
            let before = figures.get(&*item)?.map_or(0, |row| row.value());
            // The row and the position of the projection commit together: each sale counts once.
            figures.insert(&*item, before + amount(cents))?;
            Ok(())
        })
}

fn sell(store: &Store, item: &'static str, cents: u64) -> onewrite::Result<Receipt> {
    // This event stays in the log. With `.to_queue(…)` a relay would publish it too.
    store.write(move |tx| {
        tx.append(Event::json("sold", &(item, cents))?.key(item).unpublished())?;
        Ok(())
    })
}

fn figure(store: &Store, item: &str) -> onewrite::Result<u64> {
    Ok(store.read()?.open_table(FIGURES)?.get(item)?.map_or(0, |row| row.value()))
}
