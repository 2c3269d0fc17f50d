//! Accounts as aggregates: what happens to them, and how it is recorded.
//!
//! The old service recorded a deposit as a bare number of cents (version 1 of `deposited`). Since
//! version 2 a deposit also has a reason. Version 1 is read in the new form.

use onewrite::{Aggregate, BoxError, Destination, Error, Event, RecordedEvent, Result, Store, codec};
use serde::{Deserialize, Serialize};

/// An entry of an account.
#[derive(Debug, Clone)]
pub(crate) enum Entry {
    Deposited(Movement),
    Withdrawn(Movement),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Movement {
    pub(crate) cents: u64,
    pub(crate) reason: String,
}

impl Movement {
    pub(crate) fn new(cents: u64, reason: &str) -> Self {
        Self { cents, reason: reason.to_owned() }
    }
}

/// An account, folded from its entries.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) cents: u64,
    pub(crate) entries: u64,
}

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT_EVERY: u64 = 50;
    const SNAPSHOT_VERSION: u32 = 1;
    type Event = Entry;

    fn encode(entry: &Entry) -> Result<Event> {
        Ok(match entry {
            Entry::Deposited(movement) => Event::json("deposited", movement)?.version(2),
            Entry::Withdrawn(movement) => Event::json("withdrawn", movement)?,
        })
    }

    fn decode(recorded: &RecordedEvent) -> Result<Entry> {
        let movement = codec::from_json(recorded.payload())?;
        match recorded.event_type() {
            "deposited" => Ok(Entry::Deposited(movement)),
            "withdrawn" => Ok(Entry::Withdrawn(movement)),
            other => Err(Error::reject(format!("unknown event type `{other}`"))),
        }
    }

    fn apply(&mut self, entry: &Entry) {
        self.entries += 1;
        match entry {
            Entry::Deposited(movement) => self.cents += movement.cents,
            Entry::Withdrawn(movement) => self.cents -= movement.cents,
        }
    }

    fn save(&self) -> Option<Vec<u8>> {
        serde_json::to_vec(self).ok()
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        codec::from_json(snapshot).ok()
    }
}

/// The account has too little for the decision.
#[derive(Debug, thiserror::Error)]
#[error("insufficient funds")]
pub(crate) struct InsufficientFunds;

pub(crate) fn withdraw(account: &Account, cents: u64, reason: &str) -> Result<Vec<Entry>> {
    if account.cents < cents {
        return Err(Error::app(InsufficientFunds));
    }
    Ok(vec![Entry::Withdrawn(Movement::new(cents, reason))])
}

/// Moves money between two accounts: two streams, one transaction.
pub(crate) fn transfer(store: &Store, from: u64, to: u64, cents: u64) -> Result<()> {
    let (from, to) = (stream(from), stream(to));
    store.write(move |tx| {
        let payer = tx.stream(&*from).read()?.fold::<Account>()?;
        let payee = tx.stream(&*to).read()?.fold::<Account>()?;
        let taken = withdraw(&payer.state, cents, "transfer")?;
        let taken = taken.iter().map(Account::encode).collect::<Result<Vec<_>>>()?;
        let given = Account::encode(&Entry::Deposited(Movement::new(cents, "transfer")))?;
        tx.stream(&*from).append(taken, payer.expected())?;
        tx.stream(&*to).append([given], payee.expected())
    })?;
    Ok(())
}

pub(crate) fn stream(account: u64) -> String {
    format!("{}-{account}", Account::CATEGORY)
}

/// Reads a deposit of version 1 in the form of version 2.
pub(crate) fn upcast_deposit(old: &[u8]) -> Result<Vec<u8>, BoxError> {
    let cents: u64 = codec::from_json(old)?;
    Ok(serde_json::to_vec(&Movement::new(cents, "before reasons were recorded"))?)
}

/// Publishes every entry of an account.
pub(crate) fn destination(stream: &str, queue: &str) -> Option<Destination> {
    stream.starts_with("account-").then(|| Destination::exchange("", queue))
}
