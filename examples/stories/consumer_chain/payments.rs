//! The second service: takes the money for each order or refuses it, and publishes which.

use onewrite::broker::Delivery;
use onewrite::redb::ReadableTableMetadata;
use onewrite::{Event, Result, Transaction, codec};
use serde::{Deserialize, Serialize};

use crate::arrivals;
use crate::orders::Order;
use crate::plan::Wiring;
use crate::tables::{self, Numbers, Rows};

/// Each has an account.
pub(crate) const CUSTOMERS: u64 = 40;
/// The first balance of each account, in cents. It is too small for all orders of a customer.
pub(crate) const OPENING: u64 = 770_000;

/// Customer to balance, in cents.
pub(crate) const ACCOUNTS: Numbers = Numbers::new("accounts");
/// Order id to the payment as JSON.
pub(crate) const PAYMENTS: Rows = Rows::new("payments");

/// A payment: a row of the table, and the payload of `payment.taken` and `payment.refused`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Payment {
    pub(crate) order: Order,
    /// Otherwise refused.
    pub(crate) taken: bool,
}

pub(crate) fn customer(number: u64) -> String {
    format!("customer-{number:02}")
}

pub(crate) fn prepare(tx: &Transaction) -> Result<()> {
    arrivals::prepare(tx)?;
    let _ = tx.open_table(PAYMENTS)?;
    let mut accounts = tx.open_table(ACCOUNTS)?;
    // At the first start only: from then on there is money in them.
    if accounts.is_empty()? {
        for number in 0..CUSTOMERS {
            accounts.insert(&*customer(number), OPENING)?;
        }
    }
    Ok(())
}

/// Applies one delivery, inside the transaction that also marks its id. The appended event commits
/// with both.
pub(crate) fn apply(delivery: &Delivery, tx: &Transaction, wiring: &Wiring) -> Result<()> {
    let order: Order = codec::from_json(&delivery.message.payload)?;
    arrivals::note(tx, &order)?;
    let taken = tables::take(tx, ACCOUNTS, &order.customer, order.cents)?;
    let payment = Payment { order, taken };
    let order = &payment.order;
    tables::put(tx, PAYMENTS, &order.id, &payment)?;
    let event_type = if taken { "payment.taken" } else { "payment.refused" };
    tx.append(
        Event::json(event_type, &payment)?
            .id(format!("payment-{}", order.id))
            .key(&order.customer)
            .to(&wiring.exchange, wiring.routing_key(event_type)),
    )?;
    Ok(())
}
