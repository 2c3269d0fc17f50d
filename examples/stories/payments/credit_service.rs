//! The credit service: raises the credit offer of the payer for each payment, once in effect, in a
//! store of its own.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use onewrite::broker::{Delivery, Source};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Consumer, HeaderValue, Result, Store, Transaction, codec, wire};

use crate::bank::Transfer;

/// Customer to credit offer, in dollars.
const OFFERS: TableDefinition<'_, &str, u64> = TableDefinition::new("offers");
/// Customer to payments counted so far.
const PAYMENTS: TableDefinition<'_, &str, u64> = TableDefinition::new("payments");
/// Transfer id to how often it had an effect: 1, if the promise holds.
const EFFECTS: TableDefinition<'_, &str, u64> = TableDefinition::new("effects");
/// Transfer id of each payment that came before an earlier one of the same payer.
const EARLY: TableDefinition<'_, &str, u64> = TableDefinition::new("early");

/// The offer grows by a tenth of each payment.
pub(crate) fn offer_for(dollars: u64) -> u64 {
    dollars / 10
}

/// Starts consuming.
pub(crate) fn start(store: &Store, source: impl Source) -> Result<Consumer> {
    store.write(|tx| {
        let _ = (tx.open_table(OFFERS)?, tx.open_table(PAYMENTS)?, tx.open_table(EFFECTS)?);
        tx.open_table(EARLY)?;
        Ok(())
    })?;
    store.consumer("credit-service").spawn(source, apply)
}

/// Applies one delivery. The same transaction marks the id of the delivery, so no check is needed
/// here. The counts are for the account at the end.
fn apply(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let transfer: Transfer = codec::from_json(&delivery.message.payload)?;
    add(tx, OFFERS, &transfer.payer, offer_for(transfer.dollars))?;
    add(tx, EFFECTS, &transfer.id, 1)?;
    // The relay numbers the events of each payer from 0, without a gap.
    let counted = add(tx, PAYMENTS, &transfer.payer, 1)?;
    let number = delivery.message.header(wire::LANE_NUMBER).and_then(HeaderValue::as_int);
    if number.map(i64::cast_unsigned) != Some(counted - 1) {
        tx.open_table(EARLY)?.insert(&*transfer.id, counted)?;
    }
    Ok(())
}

fn add(tx: &Transaction, table: TableDefinition<'_, &str, u64>, key: &str, more: u64) -> Result<u64> {
    let mut table = tx.open_table(table)?;
    let sum = table.get(key)?.map_or(0, |row| row.value()) + more;
    table.insert(key, sum)?;
    Ok(sum)
}

/// Waits until all deliveries are applied and nothing more comes. Gives up after `patience` without
/// news.
pub(crate) fn wait_for(consumer: &Consumer, applied: usize, timeout: Duration, deadline: Instant) {
    let mut before = consumer.status();
    let mut since = Instant::now();
    loop {
        thread::sleep(Duration::from_millis(20));
        let now = consumer.status();
        if now != before {
            (before, since) = (now, Instant::now());
        }
        // Late repeats come right after the last delivery.
        let enough = before.applied >= applied as u64 && since.elapsed() > Duration::from_millis(500);
        if enough || since.elapsed() > timeout || Instant::now() > deadline {
            return;
        }
    }
}

/// The books of the credit service.
pub(crate) struct Books {
    pub(crate) offers: BTreeMap<String, u64>,
    pub(crate) effects: BTreeMap<String, u64>,
    pub(crate) early: usize,
}

/// Reads the books.
pub(crate) fn books(store: &Store) -> Result<Books> {
    let snapshot = store.read()?;
    let rows = |table: TableDefinition<'_, &'static str, u64>| -> Result<BTreeMap<String, u64>> {
        let table = snapshot.open_table(table)?;
        let mut rows = BTreeMap::new();
        for row in table.iter()? {
            let (key, value) = row?;
            rows.insert(key.value().to_owned(), value.value());
        }
        Ok(rows)
    };
    Ok(Books { offers: rows(OFFERS)?, effects: rows(EFFECTS)?, early: rows(EARLY)?.len() })
}
