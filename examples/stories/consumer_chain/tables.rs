//! Small helpers for tables of numbers and of rows in JSON.

use std::collections::BTreeMap;

use onewrite::redb::{ReadableTable, ReadableTableMetadata, TableDefinition};
use onewrite::{Error, Result, Store, Transaction, codec};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) type Numbers = TableDefinition<'static, &'static str, u64>;
pub(crate) type Rows = TableDefinition<'static, &'static str, &'static [u8]>;

/// Adds to a number, and returns the sum.
pub(crate) fn add(tx: &Transaction, table: Numbers, key: &str, more: u64) -> Result<u64> {
    let mut table = tx.open_table(table)?;
    let sum = table.get(key)?.map_or(0, |row| row.value()) + more;
    table.insert(key, sum)?;
    Ok(sum)
}

/// Takes from a number. `false`, and nothing is done, if it is not enough.
pub(crate) fn take(tx: &Transaction, table: Numbers, key: &str, less: u64) -> Result<bool> {
    let mut table = tx.open_table(table)?;
    let left = table.get(key)?.and_then(|row| row.value().checked_sub(less));
    let Some(left) = left else { return Ok(false) };
    table.insert(key, left)?;
    Ok(true)
}

pub(crate) fn put(tx: &Transaction, table: Rows, key: &str, row: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(row).map_err(Error::app)?;
    tx.open_table(table)?.insert(key, &*json)?;
    Ok(())
}

pub(crate) fn numbers(store: &Store, table: Numbers) -> Result<BTreeMap<String, u64>> {
    let table = store.read()?.open_table(table)?;
    let mut numbers = BTreeMap::new();
    for row in table.iter()? {
        let (key, value) = row?;
        numbers.insert(key.value().to_owned(), value.value());
    }
    Ok(numbers)
}

pub(crate) fn rows<T: DeserializeOwned>(store: &Store, table: Rows) -> Result<BTreeMap<String, T>> {
    let table = store.read()?.open_table(table)?;
    let mut rows = BTreeMap::new();
    for row in table.iter()? {
        let (key, value) = row?;
        rows.insert(key.value().to_owned(), codec::from_json(value.value())?);
    }
    Ok(rows)
}

pub(crate) fn len(store: &Store, table: Rows) -> Result<u64> {
    Ok(store.read()?.open_table(table)?.len()?)
}
