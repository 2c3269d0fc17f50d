//! The third service: takes paid orders from the stock, and keeps the final ledger.

use onewrite::broker::Delivery;
use onewrite::redb::ReadableTableMetadata;
use onewrite::{Error, Result, Transaction, codec};

use crate::arrivals;
use crate::orders::PRODUCTS;
use crate::payments::Payment;
use crate::tables::{self, Numbers, Rows};

/// Pieces of each product at first: enough for all orders.
pub(crate) const STOCKED: u64 = 10_000;

/// Product to pieces left.
pub(crate) const STOCK: Numbers = Numbers::new("stock");
/// Product to money earned, in cents.
pub(crate) const REVENUE: Numbers = Numbers::new("revenue");
/// Order id to the payment as JSON: where every order ends, shipped if paid.
pub(crate) const LEDGER: Rows = Rows::new("ledger");

pub(crate) fn prepare(tx: &Transaction) -> Result<()> {
    arrivals::prepare(tx)?;
    let _ = (tx.open_table(REVENUE)?, tx.open_table(LEDGER)?);
    let mut stock = tx.open_table(STOCK)?;
    // At the first start only.
    if stock.is_empty()? {
        for (product, _) in PRODUCTS {
            stock.insert(product, STOCKED)?;
        }
    }
    Ok(())
}

/// Applies one delivery, inside the transaction that also marks its id.
pub(crate) fn apply(delivery: &Delivery, tx: &Transaction) -> Result<()> {
    let payment: Payment = codec::from_json(&delivery.message.payload)?;
    let order = &payment.order;
    arrivals::note(tx, order)?;
    tables::put(tx, LEDGER, &order.id, &payment)?;
    if payment.taken {
        if !tables::take(tx, STOCK, &order.product, order.pieces)? {
            return Err(Error::reject(format!("no {} is left", order.product)));
        }
        tables::add(tx, REVENUE, &order.product, order.cents)?;
    }
    Ok(())
}
