//! The search service: a store of its own, which follows the shop through the broker.

use std::collections::BTreeSet;

use onewrite::broker::Delivery;
use onewrite::redb::{MultimapTableDefinition, ReadableMultimapTable};
use onewrite::{Error, Result, Store, Transaction, codec};
use serde::Deserialize;

use crate::shop::{PRODUCTS, STOCK};

/// Word to the products whose title has it.
const WORDS: MultimapTableDefinition<'_, &str, &str> = MultimapTableDefinition::new("words");

/// The message of a captured table about one key.
#[derive(Debug, Deserialize)]
struct Change<T> {
    key: String,
    /// Nothing: the key is gone.
    new: Option<T>,
}

pub(crate) fn prepare(store: &Store) -> Result<()> {
    store.write(|tx| {
        let _ = (tx.open_table(PRODUCTS)?, tx.open_table(STOCK)?, tx.open_multimap_table(WORDS)?);
        Ok(())
    })?;
    Ok(())
}

/// One delivery.
pub(crate) fn follow(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let message = &delivery.message;
    match message.event_type.as_deref() {
        Some("products.changed") => index(tx, &codec::from_json(&message.payload)?),
        Some("stock.changed") => {
            let Change { key, new } = codec::from_json::<Change<u64>>(&message.payload)?;
            let mut stock = tx.open_table(STOCK)?;
            match new {
                Some(left) => drop(stock.insert(&*key, left)?),
                None => drop(stock.remove(&*key)?),
            }
            Ok(())
        }
        other => Err(Error::reject(format!("unknown event {other:?}"))),
    }
}

fn index(tx: &Transaction, change: &Change<(String, u64)>) -> Result<()> {
    let (mut products, mut words) = (tx.open_table(PRODUCTS)?, tx.open_multimap_table(WORDS)?);
    let key = &*change.key;
    let old = products.remove(key)?.map(|row| row.value().0.to_owned());
    for word in old.iter().flat_map(|title| title.split(' ')) {
        words.remove(word, key)?;
    }
    if let Some((title, cents)) = &change.new {
        products.insert(key, (&**title, *cents))?;
        for word in title.split(' ') {
            words.insert(word, key)?;
        }
    }
    Ok(())
}

/// The products that a word finds.
pub(crate) fn find(store: &Store, word: &str) -> Result<BTreeSet<String>> {
    let words = store.read()?.open_multimap_table(WORDS)?;
    words.get(word)?.map(|product| Ok(product?.value().to_owned())).collect()
}

/// How many words are known.
pub(crate) fn words(store: &Store) -> Result<BTreeSet<String>> {
    let words = store.read()?.open_multimap_table(WORDS)?;
    words.iter()?.map(|row| Ok(row?.0.value().to_owned())).collect()
}
