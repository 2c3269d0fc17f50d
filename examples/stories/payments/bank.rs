//! The tables of the payment service, and the one write of this story.
//!
//! The number of a transfer fixes its content. So a client that got no answer sends the very same
//! request again.

use onewrite::redb::{ReadableTable, ReadableTableMetadata, TableDefinition};
use onewrite::{Error, Event, Result, Store, Transaction, WriteOnce};
use serde::{Deserialize, Serialize};

/// Customers of the bank, each with an account.
const CUSTOMERS: u64 = 100;
/// The first balance of each account, in dollars.
const OPENING: u64 = 1_000_000;
/// The sum of all balances at any time, in dollars.
pub(crate) const TOTAL: u64 = CUSTOMERS * OPENING;

/// Customer to balance, in dollars.
const ACCOUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("accounts");
/// Transfer id to the transfer as JSON.
const TRANSFERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("transfers");

/// A transfer: a row of the bank, and the payload of its event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Transfer {
    /// Names the request, the row and the event.
    pub(crate) id: String,
    pub(crate) payer: String,
    pub(crate) payee: String,
    pub(crate) dollars: u64,
}

impl Transfer {
    /// The transfer of this number of a teller.
    pub(crate) fn numbered(teller: u32, number: u32) -> Self {
        let dice = scramble(u64::from(teller) << 32 | u64::from(number));
        let payer = dice % CUSTOMERS;
        let payee = (payer + 1 + (dice >> 32) % (CUSTOMERS - 1)) % CUSTOMERS;
        Self { id: Self::id(teller, number), payer: customer(payer), payee: customer(payee), dollars: 100 }
    }

    fn id(teller: u32, number: u32) -> String {
        format!("transfer-{teller}-{number:06}")
    }
}

fn customer(number: u64) -> String {
    format!("customer-{number:02}")
}

/// Scatters the bits (the finalizer of `splitmix64`).
fn scramble(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Where `payment.completed` goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Destination {
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
}

/// Moves the money and appends the event, in one transaction, once per transfer id.
pub(crate) fn transfer(store: &Store, transfer: Transfer, to: Destination) -> Result<WriteOnce<()>> {
    store.write_once(transfer.id.clone(), move |tx| {
        move_money(tx, &transfer)?;
        tx.open_table(TRANSFERS)?.insert(&*transfer.id, &*to_json(&transfer)?)?;
        tx.append(
            Event::json("payment.completed", &transfer)?
                .id(&transfer.id)
                .key(&transfer.payer)
                .to(&to.exchange, &to.routing_key),
        )?;
        Ok(())
    })
}

fn move_money(tx: &Transaction, transfer: &Transfer) -> Result<()> {
    let mut accounts = tx.open_table(ACCOUNTS)?;
    let balance = |customer: &str| -> Result<u64> {
        let row = accounts.get(customer)?;
        row.map(|row| row.value()).ok_or_else(|| Error::app(format!("{customer} has no account")))
    };
    let (payer, payee) = (balance(&transfer.payer)?, balance(&transfer.payee)?);
    let left = payer.checked_sub(transfer.dollars).ok_or_else(|| Error::app(InsufficientFunds))?;
    accounts.insert(&*transfer.payer, left)?;
    accounts.insert(&*transfer.payee, payee + transfer.dollars)?;
    Ok(())
}

/// The payer has less than the transfer.
#[derive(Debug, thiserror::Error)]
#[error("insufficient funds")]
pub(crate) struct InsufficientFunds;

/// Opens the accounts, unless they are open already.
pub(crate) fn open_accounts(store: &Store) -> Result<()> {
    store.write(|tx| {
        tx.open_table(TRANSFERS)?;
        let mut accounts = tx.open_table(ACCOUNTS)?;
        // The table itself shows it for ever. The store would forget the id of a request some day,
        // and the balances would begin anew.
        if accounts.is_empty()? {
            for number in 0..CUSTOMERS {
                accounts.insert(&*customer(number), OPENING)?;
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// How many transfers a teller has done.
pub(crate) fn done_by(store: &Store, teller: u32) -> Result<u32> {
    let transfers = store.read()?.open_table(TRANSFERS)?;
    let (from, to) = (Transfer::id(teller, 0), Transfer::id(teller + 1, 0));
    let done = transfers.range(&*from..&*to)?.count();
    Ok(u32::try_from(done).unwrap_or(u32::MAX))
}

/// All transfers, by id.
pub(crate) fn transfers(store: &Store) -> Result<Vec<Transfer>> {
    let transfers = store.read()?.open_table(TRANSFERS)?;
    transfers.iter()?.map(|row| Ok(onewrite::codec::from_json(row?.1.value())?)).collect()
}

/// The sum of all balances, in dollars.
pub(crate) fn total(store: &Store) -> Result<u64> {
    let accounts = store.read()?.open_table(ACCOUNTS)?;
    accounts.iter()?.map(|row| Ok(row?.1.value())).sum()
}

fn to_json(transfer: &Transfer) -> Result<Vec<u8>> {
    serde_json::to_vec(transfer).map_err(Error::app)
}
