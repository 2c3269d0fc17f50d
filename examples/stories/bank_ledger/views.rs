//! Views of the accounts: a projection beside the log, and the statement service behind the broker.

use std::collections::BTreeMap;

use onewrite::broker::Delivery;
use onewrite::redb::{ReadableTable, Table, TableDefinition};
use onewrite::{
    Aggregate, Error, EventFilter, HeaderValue, Projection, Result, Store, Transaction, codec, wire,
};

use crate::bank::{self, Account, Entry, Movement};

/// Stream to balance, in cents.
const BALANCES: TableDefinition<'_, &str, u64> = TableDefinition::new("balances");
/// New in version 2: `count`, `deposited` and `withdrawn` of all accounts together.
const MOVEMENTS: TableDefinition<'_, &str, u64> = TableDefinition::new("movements");

pub(crate) type Balances = BTreeMap<String, u64>;

/// Starts the projection of balances. Version 2 counts movements too.
pub(crate) fn balances(store: &Store, version: u32) -> Result<Projection> {
    let accounts = EventFilter::all().category(Account::CATEGORY);
    let projection = store.projection("balances").table(BALANCES).table(MOVEMENTS);
    projection.version(version).filter(accounts).spawn(move |event, tx| {
        let entry = Account::decode(event)?;
        book(&mut tx.open_table(BALANCES)?, event.stream().unwrap_or_default(), &entry)?;
        if version >= 2 {
            let mut movements = tx.open_table(MOVEMENTS)?;
            add(&mut movements, "count", 1)?;
            match &entry {
                Entry::Deposited(movement) => add(&mut movements, "deposited", movement.cents)?,
                Entry::Withdrawn(movement) => add(&mut movements, "withdrawn", movement.cents)?,
            }
        }
        Ok(())
    })
}

/// The statement service: another store behind the broker. A relay publishes the recorded form, so
/// this service reads both forms of a deposit.
pub(crate) fn receive(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let message = &delivery.message;
    let version = message.header(wire::VERSION).and_then(HeaderValue::as_int).unwrap_or(1);
    let entry = match (message.event_type.as_deref(), version) {
        (Some("deposited"), 1) => Entry::Deposited(Movement::new(
            codec::from_json(&message.payload)?,
            "before reasons were recorded",
        )),
        (Some("deposited"), 2) => Entry::Deposited(codec::from_json(&message.payload)?),
        (Some("withdrawn"), 1) => Entry::Withdrawn(codec::from_json(&message.payload)?),
        other => return Err(Error::reject(format!("unknown event {other:?}"))),
    };
    // Events of a stream have its name as their key.
    let stream = message.header("cloudEvents_partitionkey").and_then(HeaderValue::as_text);
    book(&mut tx.open_table(BALANCES)?, stream.unwrap_or_default(), &entry)
}

fn book(balances: &mut Table<'_, &str, u64>, stream: &str, entry: &Entry) -> Result<()> {
    let balance = balances.get(stream)?.map_or(0, |row| row.value());
    let balance = match entry {
        Entry::Deposited(movement) => balance + movement.cents,
        Entry::Withdrawn(movement) => balance
            .checked_sub(movement.cents)
            .ok_or_else(|| Error::app("more was withdrawn than was there"))?,
    };
    balances.insert(stream, balance)?;
    Ok(())
}

fn add(table: &mut Table<'_, &str, u64>, key: &str, more: u64) -> Result<()> {
    let sum = table.get(key)?.map_or(0, |row| row.value());
    table.insert(key, sum + more)?;
    Ok(())
}

/// Balances by every event, and from snapshots on, and how many accounts have a snapshot.
pub(crate) fn folded(store: &Store, accounts: u64) -> Result<(Balances, Balances, usize)> {
    let snapshot = store.read()?;
    let (mut every, mut from_snapshots, mut snapshots) = (Balances::new(), Balances::new(), 0);
    for account in 0..accounts {
        let stream = bank::stream(account);
        let mut folded = Account::default();
        for event in snapshot.stream(&*stream)?.events(0) {
            folded.apply(&Account::decode(&event?)?);
        }
        let loaded = store.aggregate::<Account>(account).load()?;
        snapshots += usize::from(loaded.snapshot.is_some());
        every.insert(stream.clone(), folded.cents);
        from_snapshots.insert(stream, loaded.state.cents);
    }
    Ok((every, from_snapshots, snapshots))
}

/// The balances of a table.
pub(crate) fn projected(store: &Store) -> Result<Balances> {
    let table = store.read()?.open_table(BALANCES)?;
    table
        .iter()?
        .map(|row| row.map(|(key, value)| (key.value().to_owned(), value.value())))
        .map(|row| Ok(row?))
        .collect()
}

#[derive(Debug)]
pub(crate) struct Movements {
    pub(crate) count: u64,
    pub(crate) deposited: u64,
    pub(crate) withdrawn: u64,
}

pub(crate) fn movements(store: &Store) -> Result<Movements> {
    let table = store.read()?.open_table(MOVEMENTS)?;
    let of = |key: &str| -> Result<u64> { Ok(table.get(key)?.map_or(0, |row| row.value())) };
    Ok(Movements { count: of("count")?, deposited: of("deposited")?, withdrawn: of("withdrawn")? })
}
