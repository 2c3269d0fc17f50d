//! One shape for what was quarantined: by a relay, a consumer, a projection.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use onewrite::broker::MemoryBroker;
use onewrite::{Destination, Error, Event, FailurePolicy, Message, QuarantineFilter, Store};

use crate::scratch::until;

const SOON: Duration = Duration::from_secs(20);

fn all() -> QuarantineFilter {
    QuarantineFilter::all()
}

/// Goal: a relay's quarantine is listed, driven again and given up by type, destination, reason and tries, over more than one page; what is
/// not meant stays. Method: 600 events of two types to two queues that do not exist; one of these is declared.
#[test]
fn a_relays_quarantine_goes_by_filter() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    let backoff = Duration::from_millis(1);
    let builder = store.relay("r").destination_attempts(2).backoff(backoff, backoff);
    let relay = builder.spawn(broker.publisher()).unwrap();
    store
        .write(|tx| {
            (0..600).try_for_each(|n| {
                let event = Event::bytes(if n % 2 == 0 { "paid" } else { "refunded" }, "1");
                tx.append(event.to_queue(if n % 3 == 0 { "near" } else { "far" })).map(drop)
            })
        })
        .unwrap();
    let quarantine = store.quarantine("r").unwrap();
    until("all are in quarantine", || quarantine.len().unwrap() == 600);
    let of = |filter: &QuarantineFilter| quarantine.list_matching(filter, None, 1_000).unwrap().len();
    assert_eq!((of(&all()), of(&all().event_type("paid")), of(&all().routing_key("near"))), (600, 300, 200));
    assert_eq!((of(&all().attempts_min(2)), of(&all().attempts_min(3))), (600, 0));
    assert_eq!((of(&all().reason_contains("NO_ROUTE")), of(&all().exchange("near"))), (600, 0));
    let (entry, record) = quarantine.get(599).unwrap();
    assert_eq!(entry.event_type.as_deref(), Some("refunded"));
    assert_eq!(entry.destination.as_ref(), Some(&Destination::queue("far")));
    assert_eq!(record.unwrap().event_type(), "refunded");
    let page = quarantine.list_matching(&all().routing_key("near"), Some(0), 2).unwrap();
    assert_eq!(page.iter().map(|entry| entry.seq).collect::<Vec<_>>(), [3, 6]);

    broker.declare_queue("near", Default::default());
    assert_eq!(quarantine.redrive_all(&all().routing_key("near")).unwrap(), 200);
    until("they are confirmed", || relay.status().confirmed == 200);
    assert_eq!(broker.queue_len("near"), 200);
    assert_eq!(quarantine.discard_all(&all().event_type("paid")).unwrap(), 200);
    assert_eq!((quarantine.len().unwrap(), of(&all().event_type("refunded"))), (200, 200));
    assert_eq!(quarantine.discard_all(&all()).unwrap(), 200);
    assert!(quarantine.is_empty().unwrap());
    until("nothing waits", || store.stats().unwrap().backlog_events == 0);
    let _ = relay.stop(SOON);
}

/// Goal: so is a consumer's. Method: 600 deliveries of two types, all rejected with one of two reasons.
#[test]
fn rejected_deliveries_go_by_filter() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    for n in 0..600 {
        let message = Message {
            event_type: Some(if n % 2 == 0 { "paid" } else { "refunded" }.into()),
            payload: vec![u8::from(n % 3 == 0)],
            ..Message::default()
        };
        broker.publish("", "q", message).unwrap();
    }
    let (well, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(std::sync::Mutex::new(BTreeSet::new())));
    let (is_well, types) = (Arc::clone(&well), Arc::clone(&seen));
    let consumer = store.consumer("c").spawn(broker.source("q"), move |delivery, _| {
        if is_well.load(SeqCst) {
            types.lock().unwrap().insert(delivery.message.event_type.clone().unwrap().to_string());
            return Ok(());
        }
        let third = delivery.message.payload == [1];
        Err(Error::reject(if third { "no such account" } else { "the account is closed" }))
    });
    let consumer = consumer.unwrap();
    let rejected = store.rejected("c");
    until("all are rejected", || rejected.len().unwrap() == 600);
    let of = |filter: &QuarantineFilter| rejected.list_matching(filter, None, 1_000).unwrap().len();
    assert_eq!((of(&all()), of(&all().event_type("paid"))), (600, 300));
    assert_eq!((of(&all().reason_contains("no such")), of(&all().routing_key("q"))), (200, 600));
    assert_eq!((of(&all().attempts_min(1)), of(&all().attempts_min(2))), (600, 0));

    assert_eq!(rejected.discard_all(&all().reason_contains("no such account")).unwrap(), 200);
    assert_eq!(rejected.len().unwrap(), 400);
    well.store(true, SeqCst);
    assert_eq!(rejected.redrive_all(&all().event_type("refunded")).unwrap(), 200);
    until("they are applied", || consumer.status().applied == 200);
    assert_eq!(*seen.lock().unwrap(), BTreeSet::from(["refunded".to_owned()]));
    assert_eq!(rejected.discard_all(&all()).unwrap(), 200);
    assert!(rejected.is_empty().unwrap());
    let _ = consumer.stop(SOON);
}

/// Goal: so is a projection's; an event that fails again stays, and stops none behind it. Method: 600 events of two types that fail; then
/// those of one type succeed, but for one.
#[test]
fn a_projections_failures_go_by_filter() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    store
        .write(|tx| {
            (0..600).try_for_each(|n| {
                let event = Event::bytes(if n % 2 == 0 { "paid" } else { "refunded" }, "1");
                tx.append(event.unpublished()).map(drop)
            })
        })
        .unwrap();
    let well = Arc::new(AtomicBool::new(false));
    let is_well = Arc::clone(&well);
    let builder = store.projection("p").on_failure(FailurePolicy::Quarantine { attempts: 1 });
    let projection =
        builder
            .spawn(move |event, _| {
                if is_well.load(SeqCst) && event.seq() != 301 { Ok(()) } else { Err(Error::app("not yet")) }
            })
            .unwrap();
    projection.wait_for_position(599, SOON).unwrap();
    let failures = projection.failures();
    assert_eq!(failures.len().unwrap(), 600);
    let of = |filter: &QuarantineFilter| failures.list_matching(filter, None, 1_000).unwrap().len();
    assert_eq!((of(&all().event_type("paid")), of(&all().reason_contains("not yet"))), (300, 600));
    let (failure, record) = failures.get(301).unwrap();
    assert_eq!((failure.seq, failure.event_type.as_deref()), (301, Some("refunded")));
    assert_eq!(record.unwrap().seq(), 301);
    assert_eq!(failures.get(0).unwrap().0.seq, 0);

    well.store(true, SeqCst);
    assert_eq!(failures.redrive_all(&all().event_type("refunded")).unwrap(), 299);
    assert_eq!(failures.list_matching(&all().event_type("refunded"), None, 10).unwrap()[0].seq, 301);
    assert_eq!(failures.discard_all(&all().event_type("paid")).unwrap(), 300);
    assert_eq!(failures.len().unwrap(), 1);
    let _ = projection.stop(SOON);
}

/// Goal: callers at once take an event out of quarantine once: it is sent again or given up, never both, and one of them counts it. Method: 600
/// events for a queue that is made; four threads redrive and discard all of them; then two by two, one by one.
#[test]
fn callers_at_once_take_an_event_out_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    let backoff = Duration::from_millis(1);
    let builder = store.relay("r").destination_attempts(1).backoff(backoff, backoff);
    let relay = builder.spawn(broker.publisher()).unwrap();
    let append = |queue: &'static str| {
        let write = move |tx: &onewrite::Transaction| {
            (0..600).try_for_each(|_| tx.append(Event::bytes("t", "1").to_queue(queue)).map(drop))
        };
        store.write(write).unwrap();
    };
    append("q");
    let quarantine = store.quarantine("r").unwrap();
    until("all are in quarantine", || quarantine.len().unwrap() == 600);
    broker.declare_queue("q", Default::default());
    let (mut redriven, mut discarded) = (0, 0);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|n| {
                let quarantine = quarantine.clone();
                scope.spawn(move || match n % 2 {
                    0 => (quarantine.redrive_all(&all()).unwrap(), 0),
                    _ => (0, quarantine.discard_all(&all()).unwrap()),
                })
            })
            .collect();
        for caller in callers {
            let counts = caller.join().unwrap();
            (redriven, discarded) = (redriven + counts.0, discarded + counts.1);
        }
    });
    assert_eq!(redriven + discarded, 600, "{redriven} and {discarded}");
    until("they are confirmed", || relay.status().confirmed == redriven);
    append("p");
    until("all are in quarantine", || quarantine.len().unwrap() == 600);
    broker.declare_queue("p", Default::default());
    let alone: u64 = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..2)
            .map(|_| {
                let quarantine = quarantine.clone();
                let one = move |seq| u64::from(quarantine.redrive(seq).is_ok());
                scope.spawn(move || (600..620).map(one).sum::<u64>())
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).sum()
    });
    assert_eq!(alone, 20);
    until("these too", || relay.status().confirmed == redriven + 20);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(broker.queue_len("q") as u64, redriven, "each once");
    assert_eq!(broker.queue_len("p"), 20);
    let _ = relay.stop(SOON);
}
