//! The notes of a consumer on each event that has an effect, in the same transaction. The services
//! do not need these notes. The account does: it must see an event that had its effect twice, or
//! too early.

use std::collections::BTreeMap;

use onewrite::{Result, Store, Transaction};

use crate::orders::Order;
use crate::tables::{self, Numbers};

/// Order id to how often it had an effect: 1, if the promise holds.
const EFFECTS: Numbers = Numbers::new("effects");
/// Customer to orders that came so far.
const CAME: Numbers = Numbers::new("came");
/// The id of each order that was not the next one of its customer.
const OUT_OF_ORDER: Numbers = Numbers::new("out of order");

pub(crate) fn prepare(tx: &Transaction) -> Result<()> {
    let _ = (tx.open_table(EFFECTS)?, tx.open_table(CAME)?, tx.open_table(OUT_OF_ORDER)?);
    Ok(())
}

pub(crate) fn note(tx: &Transaction, order: &Order) -> Result<()> {
    tables::add(tx, EFFECTS, &order.id, 1)?;
    let came = tables::add(tx, CAME, &order.customer, 1)?;
    if came != order.nth {
        tables::add(tx, OUT_OF_ORDER, &order.id, 1)?;
    }
    Ok(())
}

pub(crate) struct Arrivals {
    pub(crate) effects: BTreeMap<String, u64>,
    pub(crate) out_of_order: usize,
}

impl Arrivals {
    pub(crate) fn read(store: &Store) -> Result<Self> {
        let effects = tables::numbers(store, EFFECTS)?;
        Ok(Self { effects, out_of_order: tables::numbers(store, OUT_OF_ORDER)?.len() })
    }

    /// Orders whose event had its effect more than once.
    pub(crate) fn twice(&self) -> usize {
        self.effects.values().filter(|times| **times != 1).count()
    }
}
