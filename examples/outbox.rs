//! Shows the transactional outbox: a shop takes orders while the broker is away, and restarts.
//!
//! `cargo run --release --example outbox` needs nothing installed. If `AMQP_URL` is set, for
//! example to `amqp://guest:guest@127.0.0.1:5672/%2f`, the events go to that RabbitMQ.

use std::time::Duration;

use onewrite::broker::{MemoryBroker, RabbitMq, Topology};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{BoxError, Error, Event, Receipt, Relay, Store};

const STOCK: TableDefinition<&str, u64> = TableDefinition::new("stock");
const ORDERS: TableDefinition<&str, u64> = TableDefinition::new("orders");
const QUEUE: &str = "onewrite-outbox";
const TIMEOUT: Duration = Duration::from_secs(30);

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shop.redb");

    // No relay runs yet, as if the broker were away. The shop sells all the same.
    let store = Store::open(&path)?;
    store.write(|tx| Ok(tx.open_table(STOCK)?.insert("lamp", 10).map(drop)?))?;
    place_order(&store, "order-1", 4)?;
    place_order(&store, "order-2", 5)?;
    let refused = place_order(&store, "order-3", 2);
    assert!(matches!(refused, Err(Error::App(_))), "only one lamp is left: {refused:?}");
    println!("two orders accepted, one refused; {} events wait", store.stats()?.backlog_events);
    store.close()?;

    // After the restart a relay publishes what waits, then what is new.
    let store = Store::open(&path)?;
    let relay = start_relay(&store)?;
    let receipt = place_order(&store, "order-4", 1)?;

    // All events have the key `lamp`, so the broker got the first two before the last one.
    receipt.wait_confirmed(TIMEOUT)?;
    let report = relay.stop(TIMEOUT);
    println!("the broker confirmed {} events; {} wait", report.confirmed, report.backlog_events);
    assert_eq!((report.confirmed, report.backlog_events), (3, 0));

    let orders = store.read()?.open_table(ORDERS)?;
    let ids = orders.iter()?.map(|row| Ok(row?.0.value().to_owned()));
    let ids = ids.collect::<Result<Vec<String>, BoxError>>()?;
    println!("the orders in the table: {}", ids.join(", "));
    assert_eq!(ids, ["order-1", "order-2", "order-4"]);
    Ok(())
}

/// Takes the lamps from the stock, writes the order and announces it: all or nothing.
fn place_order(store: &Store, id: &'static str, lamps: u64) -> onewrite::Result<Receipt> {
    store.write(move |tx| {
        let mut stock = tx.open_table(STOCK)?;
        let before = stock.get("lamp")?.map_or(0, |row| row.value());
        let left = before.checked_sub(lamps).ok_or_else(|| Error::app("out of stock"))?;
        stock.insert("lamp", left)?;
        tx.open_table(ORDERS)?.insert(id, lamps)?;
        tx.append(Event::json("order.placed", &(id, lamps))?.key("lamp").to_queue(QUEUE))?;
        Ok(())
    })
}

fn start_relay(store: &Store) -> Result<Relay, BoxError> {
    let relay = store.relay("rabbit");
    if let Ok(url) = std::env::var("AMQP_URL") {
        // The broker removes the queue after a minute without use.
        let topology = Topology::new().queue_with(QUEUE, [("x-expires", 60_000.into())]);
        return Ok(relay.spawn(RabbitMq::new(&url)?.declare(topology))?);
    }
    let broker = MemoryBroker::new();
    broker.declare_queue(QUEUE, Default::default());
    Ok(relay.spawn(broker.publisher())?)
}
