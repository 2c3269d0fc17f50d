//! Shows the whole idea once: one transaction writes a balance and an event, and a relay publishes.
//!
//! `cargo run --release --example quickstart` needs nothing installed. If `AMQP_URL` is set, for
//! example to `amqp://guest:guest@127.0.0.1:5672/%2f`, the event goes to that RabbitMQ.

use std::time::Duration;

use onewrite::broker::{MemoryBroker, RabbitMq, Topology};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{BoxError, Error, Event, Receipt, Relay, Store};

/// The application's own table: cents by account.
const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
const QUEUE: &str = "onewrite-quickstart";
const TIMEOUT: Duration = Duration::from_secs(30);

fn main() -> Result<(), BoxError> {
    // One file holds the tables and the event log. A real service keeps the file.
    let folder = tempfile::tempdir()?;
    let store = Store::open(folder.path().join("payments.redb"))?;
    let relay = start_relay(&store)?;

    store.write(|tx| {
        tx.open_table(ACCOUNTS)?.insert("alice", 500)?;
        Ok(())
    })?;

    // When `pay` returns `Ok`, the new balance and the event are durable.
    let receipt = pay(&store, 100)?;
    println!("alice paid 100 and has {} left; the event is in the log", receipt.value());

    // Waiting for the broker is optional: the relay publishes in any case.
    receipt.wait_confirmed(TIMEOUT)?;
    println!("the broker has confirmed the event");

    // A closure that fails leaves neither a balance nor an event behind.
    let refused = pay(&store, 1_000).map(Receipt::into_value);
    println!("alice tried to pay 1000: {refused:?}");
    assert!(matches!(refused, Err(Error::App(_))));
    assert_eq!(balance(&store)?, 400);

    let report = relay.stop(TIMEOUT);
    assert_eq!((report.confirmed, report.backlog_events), (1, 0));
    store.close()?;
    Ok(())
}

fn pay(store: &Store, amount: u64) -> onewrite::Result<Receipt<u64>> {
    store.write(move |tx| {
        let mut accounts = tx.open_table(ACCOUNTS)?;
        let balance = accounts.get("alice")?.map_or(0, |row| row.value());
        let left = balance.checked_sub(amount).ok_or_else(|| Error::app("insufficient funds"))?;
        accounts.insert("alice", left)?;
        // Events of one key are published in the order of their commits.
        tx.append(Event::json("payment.completed", &amount)?.key("alice").to_queue(QUEUE))?;
        Ok(left)
    })
}

fn balance(store: &Store) -> onewrite::Result<u64> {
    let accounts = store.read()?.open_table(ACCOUNTS)?;
    Ok(accounts.get("alice")?.map_or(0, |row| row.value()))
}

/// The relay publishes on a thread of its own. The broker may be away; the relay keeps trying.
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
