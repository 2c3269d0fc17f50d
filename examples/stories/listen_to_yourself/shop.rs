//! The shop: it writes its state and nothing else. No line here knows of events.

use std::sync::atomic::{AtomicU64, Ordering};

use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Result, Store};

/// Product to its title and its price in cents.
pub(crate) const PRODUCTS: TableDefinition<'_, &str, (&str, u64)> = TableDefinition::new("products");
/// Product to the number of pieces left.
pub(crate) const STOCK: TableDefinition<'_, &str, u64> = TableDefinition::new("stock");

const COLOURS: [&str; 5] = ["red", "green", "blue", "black", "white"];
const THINGS: [&str; 8] = ["chair", "table", "lamp", "shelf", "desk", "bench", "mirror", "rug"];

/// Counts of the writes, for the account.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) products: AtomicU64,
    pub(crate) stock: AtomicU64,
}

pub(crate) fn product(number: u64) -> String {
    format!("product-{number:03}")
}

fn title(number: u64, edition: u64) -> String {
    let pick = |names: &[&'static str], n: u64| {
        usize::try_from(n).ok().and_then(|n| names.get(n % names.len()).copied()).unwrap_or_default()
    };
    format!("{} {}", pick(&COLOURS, number + edition), pick(&THINGS, number * 7 + edition / 3))
}

/// The plain tables of the shop, from before the capture.
pub(crate) fn stock_up(store: &Store, products: u64) -> Result<()> {
    store.write(move |tx| {
        let (mut catalogue, mut stock) = (tx.open_table(PRODUCTS)?, tx.open_table(STOCK)?);
        for number in 0..products {
            catalogue.insert(&*product(number), (&*title(number, 0), 1_000 + number))?;
            stock.insert(&*product(number), 1_000_000)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// One clerk's day: renames, reprices, takes out and brings back.
pub(crate) fn clerk(store: &Store, counts: &Counts, products: u64, first: u64, changes: u64) -> Result<()> {
    for n in 0..changes {
        let number = (first + n * 13) % products;
        let changed = store.write(move |tx| {
            let mut catalogue = tx.captured_table(PRODUCTS)?;
            if n % 9 == 4 {
                return Ok(catalogue.remove(&*product(number))?.is_some());
            }
            catalogue.insert(&*product(number), (&*title(number, first + n), 500 + n))?;
            Ok(true)
        })?;
        counts.products.fetch_add(u64::from(changed.into_value()), Ordering::Relaxed);
    }
    Ok(())
}

/// One till's day: it sells the same few things over and over, many in one write.
pub(crate) fn till(store: &Store, counts: &Counts, products: u64, first: u64, writes: u64) -> Result<()> {
    const SALES: u64 = 20;
    for n in 0..writes {
        store.write(move |tx| {
            let mut stock = tx.captured_table(STOCK)?;
            for sale in 0..SALES {
                let number = product((first + n + sale * sale) % (products / 10));
                let left = stock.get(&*number)?.map_or(0, |row| row.value());
                stock.insert(&*number, left.saturating_sub(1))?;
            }
            Ok(())
        })?;
        counts.stock.fetch_add(SALES, Ordering::Relaxed);
    }
    Ok(())
}

/// A product, with its title and price if it is in the catalogue, and how many are left.
pub(crate) type Product = (String, Option<(String, u64)>, u64);

/// Everything in the shop.
pub(crate) fn inventory(store: &Store) -> Result<Vec<Product>> {
    let snapshot = store.read()?;
    let (catalogue, stock) = (snapshot.open_table(PRODUCTS)?, snapshot.open_table(STOCK)?);
    let mut all = Vec::new();
    for row in stock.iter()? {
        let (number, left) = row?;
        let entry = catalogue.get(number.value())?.map(|row| {
            let (title, cents) = row.value();
            (title.to_owned(), cents)
        });
        all.push((number.value().to_owned(), entry, left.value()));
    }
    Ok(all)
}
