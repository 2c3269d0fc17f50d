//! Shows how an application tests against a broken broker: the in-memory broker fails on request.
//!
//! In your crate each function is a `#[test]`; here `main` calls them.
//!
//! `cargo run --release --example testing`

use std::time::Duration;

use onewrite::broker::{MemoryBroker, Rule, Verdict};
use onewrite::{BoxError, ConfirmError, Event, FaultClass, Receipt, Relay, RelayState, Store};
use tempfile::TempDir;

const TIMEOUT: Duration = Duration::from_secs(30);

fn main() -> Result<(), BoxError> {
    an_outage_delays_events_and_loses_none()?;
    a_lost_confirm_sends_the_same_event_twice()?;
    an_event_that_no_queue_takes_waits_in_quarantine()?;
    println!("all three tests passed");
    Ok(())
}

fn an_outage_delays_events_and_loses_none() -> Result<(), BoxError> {
    let (_folder, store, broker, relay) = setup()?;
    broker.go_down();
    let receipt = pay(&store, "payments")?; // the application does not notice
    let waited = receipt.wait_confirmed(Duration::ZERO);
    assert!(matches!(waited, Err(ConfirmError::Timeout { .. })));
    assert!(!matches!(relay.status().state, RelayState::Connected));
    broker.come_up();
    receipt.wait_confirmed(TIMEOUT)?;
    assert_eq!(broker.queue_len("payments"), 1);
    Ok(())
}

fn a_lost_confirm_sends_the_same_event_twice() -> Result<(), BoxError> {
    let (_folder, store, broker, relay) = setup()?;
    // The queue takes the next message, but the connection breaks before the confirm.
    broker.script(Rule::any().then(Verdict::Unknown));
    pay(&store, "payments")?.wait_confirmed(TIMEOUT)?;
    let messages = broker.messages("payments");
    let [first, copy] = &*messages else { return Err("two messages are expected".into()) };
    assert_eq!(first.message.message_id, copy.message.message_id); // a consumer sees the repeat
    assert_eq!(relay.status().retried, 1);
    Ok(())
}

fn an_event_that_no_queue_takes_waits_in_quarantine() -> Result<(), BoxError> {
    let (_folder, store, broker, _relay) = setup()?;
    let receipt = pay(&store, "misspelt")?;
    let waited = receipt.wait_confirmed(TIMEOUT);
    assert!(matches!(waited, Err(ConfirmError::Quarantined { .. })));
    let quarantine = store.quarantine("rabbit")?;
    let entry = quarantine.list(None, 1)?.pop().ok_or("the quarantine is empty")?;
    assert_eq!(entry.fault.class, FaultClass::Destination);
    // An operator creates the queue and sends the event again.
    broker.declare_queue("misspelt", Default::default());
    quarantine.redrive(entry.seq)?;
    receipt.wait_confirmed(TIMEOUT)?;
    Ok(())
}

/// The code under test: one payment.
fn pay(store: &Store, queue: &'static str) -> onewrite::Result<Receipt> {
    store.write(move |tx| tx.append(Event::json("paid", &100)?.to_queue(queue)).map(drop))
}

type Setup = (TempDir, Store, MemoryBroker, Relay);

/// A store, a broker, and a relay that gives up on a missing queue at once.
fn setup() -> Result<Setup, BoxError> {
    let folder = tempfile::tempdir()?;
    let store = Store::open(folder.path().join("test.redb"))?;
    let broker = MemoryBroker::new();
    broker.declare_queue("payments", Default::default());
    let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    Ok((folder, store, broker, relay))
}
