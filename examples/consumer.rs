//! Shows a consumer: each delivery is applied once, and a bad one is set aside with its reason.
//!
//! `cargo run --release --example consumer` needs nothing installed. If `AMQP_URL` is set, for
//! example to `amqp://guest:guest@127.0.0.1:5672/%2f`, the deliveries go through that RabbitMQ.

use std::thread;
use std::time::{Duration, Instant};

use onewrite::broker::{Delivery, MemoryBroker, RabbitMq, RabbitMqSource, Topology};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{BoxError, Consumer, ConsumerStatus, Error, Event, Relay, Store, Transaction};

const REVENUE: TableDefinition<&str, u64> = TableDefinition::new("revenue");
const QUEUE: &str = "onewrite-consumer";
const TIMEOUT: Duration = Duration::from_secs(30);

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let shop = Store::open(folder.path().join("shop.redb"))?;
    let billing = Store::open(folder.path().join("billing.redb"))?;

    // Two relays publish each event, so that every event arrives twice. In production a second copy
    // comes when a connection breaks before the confirm.
    let (relays, consumer) = connect(&shop, &billing)?;
    for cents in [2_000_u64, 0, 500] {
        shop.write(move |tx| tx.append(Event::json("sold", &cents)?.key("lamp").to_queue(QUEUE)))?;
    }

    let end = Instant::now() + TIMEOUT;
    let counts = |it: ConsumerStatus| (it.applied, it.rejected, it.repeated);
    while counts(consumer.status()) != (2, 1, 3) {
        assert!(Instant::now() < end, "not done in time: {:?}", consumer.status());
        thread::sleep(Duration::from_millis(5));
    }
    let revenue = billing.read()?.open_table(REVENUE)?;
    let revenue = revenue.get("lamp")?.map_or(0, |row| row.value());
    println!("6 deliveries of 3 events: 2 applied, 1 rejected, 3 repeats; revenue {revenue}");
    assert_eq!(revenue, 2_500);

    // The rejected delivery waits in the store. `redrive` would try it again.
    let rejected = billing.rejected("billing");
    for entry in rejected.list(None, 100)? {
        println!("set aside: {}", entry.reason);
        rejected.discard(entry.number)?;
    }
    let reports = relays.map(|relay| relay.stop(TIMEOUT));
    assert!(reports.iter().all(|report| report.confirmed == 3));
    consumer.stop(TIMEOUT);
    Ok(())
}

/// The rows that the handler writes commit together with the mark that the delivery was seen.
fn apply(delivery: &Delivery, tx: &Transaction) -> onewrite::Result<()> {
    let cents: u64 = onewrite::codec::from_json(&delivery.message.payload)?;
    if cents == 0 {
        return Err(Error::reject("nothing was paid"));
    }
    let mut revenue = tx.open_table(REVENUE)?;
    let before = revenue.get("lamp")?.map_or(0, |row| row.value());
    revenue.insert("lamp", before + cents)?;
    Ok(())
}

fn connect(shop: &Store, billing: &Store) -> Result<([Relay; 2], Consumer), BoxError> {
    let (one, two) = (shop.relay("one"), shop.relay("two"));
    let consumer = billing.consumer("billing");
    if let Ok(url) = std::env::var("AMQP_URL") {
        // The broker removes the queue after a minute without use.
        let queue = Topology::new().queue_with(QUEUE, [("x-expires", 60_000.into())]);
        let publisher = || Ok::<_, BoxError>(RabbitMq::new(&url)?.declare(queue.clone()));
        let source = RabbitMqSource::new(&url, QUEUE)?.declare(queue.clone());
        let relays = [one.spawn(publisher()?)?, two.spawn(publisher()?)?];
        return Ok((relays, consumer.spawn(source, apply)?));
    }
    let broker = MemoryBroker::new();
    broker.declare_queue(QUEUE, Default::default());
    let relays = [one.spawn(broker.publisher())?, two.spawn(broker.publisher())?];
    Ok((relays, consumer.spawn(broker.source(QUEUE), apply)?))
}
