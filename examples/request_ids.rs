//! Shows requests with ids: a client repeats a request, and the request is applied once.
//!
//! `cargo run --release --example request_ids`

use std::thread;

use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{BoxError, Error, Event, Store, WriteOnce};

const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// The answer to each request: a repeat is answered from here.
const ANSWERS: TableDefinition<&str, u64> = TableDefinition::new("answers");

fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let store = Store::open(folder.path().join("payments.redb"))?;
    store.write(|tx| Ok(tx.open_table(ACCOUNTS)?.insert("alice", 500).map(drop)?))?;

    // The client chooses an id and sends the same id again until an answer comes.
    let first = pay(&store, "request-17", 100)?;
    println!("request-17: {first:?}");
    let again = pay(&store, "request-17", 100)?;
    println!("request-17 again: {again:?}");
    assert_eq!((first, again), (Answer::New(400), Answer::Repeated(400)));

    // The same holds when copies of a request arrive at the same moment.
    let answers = thread::scope(|scope| {
        let copies = [(); 8].map(|()| scope.spawn(|| pay(&store, "request-18", 50)));
        let answers = copies.into_iter().map(|copy| copy.join().map_err(|_| "a client panicked")?);
        answers.collect::<Result<Vec<Answer>, BoxError>>()
    })?;
    let new = answers.iter().filter(|answer| **answer == Answer::New(350)).count();
    println!("8 copies of request-18: {new} new, {} repeated", answers.len() - new);
    assert_eq!(new, 1);

    // A request that failed has left no mark. The client may try again under the same id.
    let refused = pay(&store, "request-19", 1_000);
    assert!(refused.is_err(), "alice has 350");
    assert_eq!(pay(&store, "request-19", 350)?, Answer::New(0));

    let payments = store.stats()?.next_seq;
    println!("{payments} payments have been made, each with one event");
    assert_eq!(payments, 3);
    Ok(())
}

/// The balance after the payment.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    New(u64),
    Repeated(u64),
}

fn pay(store: &Store, id: &'static str, amount: u64) -> Result<Answer, BoxError> {
    let written = store.write_once(id, move |tx| {
        let mut accounts = tx.open_table(ACCOUNTS)?;
        let balance = accounts.get("alice")?.map_or(0, |row| row.value());
        let left = balance.checked_sub(amount).ok_or_else(|| Error::app("insufficient funds"))?;
        accounts.insert("alice", left)?;
        tx.open_table(ANSWERS)?.insert(id, left)?;
        tx.append(Event::json("payment.completed", &amount)?.key("alice").to_queue("payments"))?;
        Ok(left)
    })?;
    if let WriteOnce::Done(receipt) = written {
        return Ok(Answer::New(receipt.into_value()));
    }
    let answer = store.read()?.open_table(ANSWERS)?.get(id)?.map(|row| row.value());
    Ok(Answer::Repeated(answer.ok_or("the first request has left no answer")?))
}
