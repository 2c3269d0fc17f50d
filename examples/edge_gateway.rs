//! Shows an edge gateway: sensors write while the broker is away, on a disk that must not fill up.
//!
//! `cargo run --release --example edge_gateway`

use std::thread;
use std::time::{Duration, Instant};

use onewrite::broker::MemoryBroker;
use onewrite::codec::from_json;
use onewrite::{BacklogQuota, BoxError, Error, Event, Receipt, Retention, Store};

const SENSORS: [&str; 4] = ["boiler", "door", "fan", "pump"];
const QUOTA: u64 = 1_000;
const KEPT: u64 = 100;
const TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("gateway.redb");
    let store = &Store::builder()
        // The most that may wait for the broker. Beyond this an append fails.
        .backlog_quota(BacklogQuota::events(QUOTA).and_bytes(1 << 20))
        // Confirmed readings that stay on the disk, for a look back at the site.
        .retention(Retention::until_confirmed().keep_events(KEPT))
        .open(&path)?;
    let broker = MemoryBroker::new();
    broker.declare_queue("readings", Default::default());
    let relay = store.relay("rabbit").spawn(broker.publisher())?;

    // The link to the site breaks. Each sensor goes on until the quota is reached.
    broker.go_down();
    let counts = thread::scope(|scope| {
        let sensors = SENSORS.map(|sensor| scope.spawn(move || measure(store, sensor)));
        let counts = sensors.into_iter().map(|it| it.join().map_err(|_| "a sensor panicked")?);
        counts.collect::<Result<Vec<u64>, BoxError>>()
    })?;
    let (waiting, bytes) = (store.stats()?.backlog_events, std::fs::metadata(&path)?.len());
    println!("broker away: {waiting} readings wait in a file of {} KiB", bytes / 1024);
    assert_eq!(waiting, QUOTA);

    // The link is back. The relay publishes what waits; the store trims what is confirmed.
    broker.come_up();
    let end = Instant::now() + TIMEOUT;
    while store.stats()?.trimmed_to < QUOTA - KEPT || store.stats()?.backlog_events > 0 {
        assert!(Instant::now() < end, "not drained in time: {:?}", store.stats());
        thread::sleep(Duration::from_millis(5));
    }
    for (sensor, count) in SENSORS.into_iter().zip(counts) {
        let arrived = broker.messages("readings").into_iter().filter_map(|stored| {
            let (from, number) = from_json::<(String, u64)>(&stored.message.payload).ok()?;
            (from == sensor).then_some(number)
        });
        assert!(arrived.eq(0..count), "every reading of {sensor} once, in order");
    }
    println!("broker back: {} readings arrived, in order", broker.queue_len("readings"));
    write_reading(store, "boiler", 0)?.wait_confirmed(TIMEOUT)?;
    println!("the log has kept the newest {KEPT} readings and takes new ones");
    relay.stop(TIMEOUT);
    Ok(())
}

/// Writes readings until the quota refuses one, and counts them.
fn measure(store: &Store, sensor: &'static str) -> Result<u64, BoxError> {
    let mut count = 0;
    loop {
        match write_reading(store, sensor, count) {
            Ok(_) => count += 1,
            Err(Error::BacklogFull { .. }) => return Ok(count),
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_reading(store: &Store, sensor: &'static str, number: u64) -> onewrite::Result<Receipt> {
    store.write(move |tx| {
        let event = Event::json("measured", &(sensor, number))?;
        tx.append(event.key(sensor).to_queue("readings")).map(drop)
    })
}
