//! Shows event sourcing: an account is what happened to it, and commands decide on its state.
//!
//! `cargo run --release --example event_sourcing`

use std::thread;

use onewrite::{Aggregate, AggregateStream, BoxError, Error, Event, RecordedEvent, Result, Store};

/// The state, folded from the events of one stream.
#[derive(Default)]
struct Account {
    euros: u64,
}

enum Entry {
    Deposited(u64),
    Withdrawn(u64),
}

impl Aggregate for Account {
    /// The stream of account 7 is `account-7`.
    const CATEGORY: &'static str = "account";
    type Event = Entry;

    fn encode(entry: &Entry) -> Result<Event> {
        Ok(match entry {
            Entry::Deposited(euros) => Event::json("deposited", euros)?,
            Entry::Withdrawn(euros) => Event::json("withdrawn", euros)?,
        })
    }

    fn decode(event: &RecordedEvent) -> Result<Entry> {
        let euros = onewrite::codec::from_json(event.payload())?;
        match event.event_type() {
            "deposited" => Ok(Entry::Deposited(euros)),
            "withdrawn" => Ok(Entry::Withdrawn(euros)),
            other => Err(Error::app(format!("unknown event type `{other}`"))),
        }
    }

    fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Deposited(euros) => self.euros += euros,
            Entry::Withdrawn(euros) => self.euros -= euros,
        }
    }
}

/// The closure may run again: if another writer was faster, it decides on the newer state.
fn withdraw(account: &AggregateStream<Account>, euros: u64) -> Result<()> {
    let decide = |account: &Account| match account.euros.checked_sub(euros) {
        Some(_) => Ok(vec![Entry::Withdrawn(euros)]),
        None => Err(Error::app("insufficient funds")),
    };
    account.execute(decide).map(drop)
}

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let store = Store::open(folder.path().join("bank.redb"))?;
    let account = store.aggregate::<Account>("7");
    account.execute(|_| Ok(vec![Entry::Deposited(100)]))?;

    // Four tellers pay out 30 at the same time. The last one finds 10 and must refuse.
    let paid = thread::scope(|scope| {
        let tellers = [(); 4].map(|()| scope.spawn(|| withdraw(&account, 30)));
        tellers.into_iter().filter_map(|teller| teller.join().ok()).filter(Result::is_ok).count()
    });
    let euros = account.load()?.state.euros;
    println!("{paid} of 4 tellers paid out 30; {euros} are left");
    assert_eq!((paid, euros), (3, 10));

    for event in store.read()?.stream("account-7")?.events(0) {
        let event = event?;
        let payload = String::from_utf8_lossy(event.payload());
        println!("  {}: {} {payload}", event.revision().unwrap_or_default(), event.event_type());
    }
    Ok(())
}
