//! The consumer: applies each delivery in a store of its own. It may be killed at any moment.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use onewrite::broker::{Delivery, RabbitMqSource};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Error, Store, Transaction};
use onewrite_torture_checker::formats::name_in;

use crate::Result;
use crate::plan::{self, Plan, QUEUE};

/// Application and number to how often it was applied.
const EFFECTS: TableDefinition<'_, &str, u64> = TableDefinition::new("effects");
/// Application and key to number and sum of effects.
const BALANCES: TableDefinition<'_, &str, (u64, u64)> = TableDefinition::new("balances");
const SCOPE: &str = "torture";
/// The handler fails at its first try of one delivery in so many. Each is in hand until its next try, so that some are at
/// every moment: a kill finds them.
const FAILS_ONE_IN: u32 = 199;
/// Longer than any next try takes to come.
const TRIES_WITHIN: Duration = Duration::from_secs(10);
/// The handler rejects one delivery in so many, until it is driven again.
const REJECTS_ONE_IN: u32 = 2003;

pub(crate) fn run(plan: &Plan) -> Result<()> {
    let closing = plan::closing();
    let store = Store::open(plan.store())?;
    store.write(|tx| {
        let _ = (tx.open_table(EFFECTS)?, tx.open_table(BALANCES)?);
        Ok(())
    })?;
    let source = RabbitMqSource::new(&plan.url, QUEUE)?
        .heartbeat(Duration::from_secs(2))
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500));
    let failures = Arc::new(Mutex::new(Failures::default()));
    let of_handler = Arc::clone(&failures);
    let consumer = store
        .consumer(SCOPE)
        .backoff(Duration::from_millis(300), Duration::from_millis(900))
        .spawn(source, move |delivery, tx| apply(delivery, tx, &of_handler))?;
    let mut closing_since = None;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        if let Some(failed) = consumer.status().failed {
            return Err(failed.into());
        }
        let rejected = store.rejected(SCOPE);
        rejected.redrive_all(&onewrite::QuarantineFilter::all())?;
        if !closing.load(Ordering::SeqCst) {
            continue;
        }
        // What is to be tried again is waited for: whoever is started next would fail at it once more, and be asked to end before its next
        // try. Not for ever: what never comes again is the judge's to report.
        let waited = closing_since.get_or_insert_with(Instant::now).elapsed();
        if rejected.is_empty()? && (locked(&failures).open.is_empty() || waited > TRIES_WITHIN) {
            break;
        }
    }
    consumer.stop(Duration::from_secs(10));
    Ok(store.close()?)
}

/// Deliveries that the handler of this process failed at, by the checksum of their payload.
#[derive(Default)]
struct Failures {
    once: HashSet<u32>,
    /// Those among them that it has not been through with yet.
    open: HashSet<u32>,
}

fn locked(failures: &Mutex<Failures>) -> MutexGuard<'_, Failures> {
    failures.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One delivery: a row of its own, and the running balance of its key.
fn apply(delivery: &Delivery, tx: &Transaction, failures: &Mutex<Failures>) -> onewrite::Result<()> {
    let payload = &delivery.message.payload;
    let Some((app, n)) = name_in(payload) else { return Err(Error::reject("it names no event")) };
    let crc = crc32fast::hash(payload);
    let key =
        delivery.message.header("cloudEvents_partitionkey").and_then(|key| key.as_text()).unwrap_or_default();
    add(tx, &format!("{app}/{n}"))?;
    let balance = format!("{app}/{key}");
    let mut balances = tx.open_table(BALANCES)?;
    let (effects, sum) = balances.get(balance.as_str())?.map_or((0, 0), |row| row.value());
    balances.insert(balance.as_str(), (effects + 1, sum.wrapping_add(u64::from(crc))))?;
    // Late, so that something has to be rolled back.
    if crc.is_multiple_of(REJECTS_ONE_IN) && delivery.tag.epoch.0 != 0 {
        return Err(Error::reject("on purpose"));
    }
    if crc.is_multiple_of(FAILS_ONE_IN) {
        let mut failures = locked(failures);
        if failures.once.insert(crc) {
            failures.open.insert(crc);
            return Err(Error::app("on purpose"));
        }
        failures.open.remove(&crc);
    }
    Ok(())
}

fn add(tx: &Transaction, name: &str) -> onewrite::Result<()> {
    let mut effects = tx.open_table(EFFECTS)?;
    let times = effects.get(name)?.map_or(0, |row| row.value());
    effects.insert(name, times + 1)?;
    Ok(())
}
