//! The order of a key through parking: what is parked of a key stands before the rest of it, whatever comes while handlers run.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onewrite::publish::{Delivery, DeliveryTag, Epoch, Settlement, Source, SourceEvent, SourceEvents};
use onewrite::{Error, Fault, FaultClass, Message, SettingError, Store};

use crate::scratch::until;

/// A source that the test feeds by hand.
#[derive(Debug, Clone, Default)]
struct ByHand {
    events: Arc<Mutex<Option<SourceEvents>>>,
    settled: Arc<Mutex<Vec<u64>>>,
}

impl Source for ByHand {
    fn start(&mut self, events: SourceEvents, _: u16) -> Result<(), SettingError> {
        events.send(SourceEvent::Up { epoch: Epoch(1) });
        *self.events.lock().unwrap() = Some(events);
        Ok(())
    }

    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>) {
        self.settled.lock().unwrap().extend(settlements.iter().map(|(tag, _)| tag.tag));
    }

    fn stop(&mut self, _: Duration) {}
}

impl ByHand {
    /// `returns`: how often it came back to its queue before.
    fn deliver(&self, tag: u64, key: Option<&str>, returns: i64) {
        self.deliver_in(1, tag, key, returns);
    }

    fn deliver_in(&self, epoch: u64, tag: u64, key: Option<&str>, returns: i64) {
        let mut headers = Vec::new();
        headers.extend(key.map(|key| ("cloudEvents:partitionkey".into(), key.into())));
        if returns > 0 {
            headers.push(("x-delivery-count".into(), returns.into()));
        }
        let message = Message {
            message_id: Some(format!("m-{tag}").into()),
            payload: tag.to_le_bytes().to_vec(),
            headers,
            ..Message::default()
        };
        let delivery = Delivery {
            tag: DeliveryTag { epoch: Epoch(epoch), tag },
            exchange: String::new(),
            routing_key: "q".to_owned(),
            redelivered: returns > 0,
            message,
        };
        self.tell(SourceEvent::Delivery(Box::new(delivery)));
    }

    fn tell(&self, event: SourceEvent) {
        self.events.lock().unwrap().as_ref().unwrap().send(event);
    }

    fn settled(&self) -> Vec<u64> {
        self.settled.lock().unwrap().clone()
    }

    fn place(&self, tag: u64) -> Option<usize> {
        self.settled().iter().position(|settled| *settled == tag)
    }
}

fn number(delivery: &Delivery) -> u64 {
    u64::from_le_bytes(delivery.message.payload[..].try_into().unwrap())
}

/// Goal: a delivery that came back is not parked, and so not acknowledged, before an earlier one of its key that is neither
/// parked nor done: after a crash it would come first. Method: the first of a key fails; while slow handlers of its batch run, the
/// second of the key comes, back from its queue; what is settled, in order. Both are applied in the end, in order.
#[test]
fn what_comes_back_is_not_parked_before_an_earlier_one_of_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let (applied, fed) = (Arc::new(Mutex::new(Vec::new())), source.clone());
    let seen = Arc::clone(&applied);
    let gate = store.begin().unwrap();
    let consumer = store
        .consumer("service")
        .backoff(Duration::from_millis(400), Duration::from_millis(400))
        .run(source.clone(), move |delivery, _| {
            let number = number(delivery);
            let mut seen = seen.lock().unwrap();
            if number == 2 && !seen.contains(&2) {
                fed.deliver(100, Some("k"), 1);
            }
            let first_try = number == 1 && !seen.contains(&0);
            seen.push(if first_try { 0 } else { number });
            drop(seen);
            if first_try {
                return Err(Error::app("not yet"));
            }
            std::thread::sleep(Duration::from_millis(15));
            Ok(())
        })
        .unwrap();
    source.deliver(1, Some("k"), 0);
    (2..20).for_each(|tag| source.deliver(tag, None, 0));
    // All of them are in one batch.
    std::thread::sleep(Duration::from_millis(200));
    gate.rollback().unwrap();
    until("all are settled", || source.settled().len() == 20);
    assert!(source.place(1) < source.place(100), "{:?}", source.settled());
    until("both are applied", || applied.lock().unwrap().contains(&100));
    let order: Vec<u64> = applied.lock().unwrap().iter().copied().filter(|n| [1, 100].contains(n)).collect();
    assert_eq!(order, [1, 100]);
    assert_eq!(consumer.stop(Duration::from_secs(5)).applied, 20);
}

/// Goal: where one that came back is parked, those of its key that stand before it are parked with it. Method: a first delivery
/// and one that came back, in one batch; neither is left with the broker while its handler waits.
#[test]
fn what_stands_before_one_that_came_back_is_parked_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let runs = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&runs);
    let settled = source.clone();
    let gate = store.begin().unwrap();
    let consumer = store
        .consumer("service")
        .run(source.clone(), move |delivery, _| {
            seen.lock().unwrap().push((number(delivery), settled.settled()));
            Ok(())
        })
        .unwrap();
    source.deliver(1, Some("k"), 0);
    source.deliver(2, Some("k"), 1);
    std::thread::sleep(Duration::from_millis(200));
    gate.rollback().unwrap();
    until("both are applied", || runs.lock().unwrap().len() == 2);
    assert_eq!(*runs.lock().unwrap(), [(1, vec![1, 2]), (2, vec![1, 2])]);
    let _ = consumer.stop(Duration::from_secs(5));
}

/// Goal: a delivery that cannot be parked is kept over a lost connection, since it may not come again; but no more than once,
/// however often it does. Method: no room to park, a handler that fails, and fifty connections with the same delivery; then the
/// handler succeeds.
#[test]
fn what_survives_its_connection_is_kept_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let well = Arc::new(AtomicBool::new(false));
    let is_well = Arc::clone(&well);
    let consumer = store
        .consumer("service")
        .parked_max(0, 0)
        .attempts(1_000)
        .backoff(Duration::from_secs(1), Duration::from_secs(1))
        .run(
            source.clone(),
            move |_, _| {
                if is_well.load(SeqCst) { Ok(()) } else { Err(Error::app("not yet")) }
            },
        )
        .unwrap();
    for epoch in 1..=50 {
        if epoch > 1 {
            let fault = Fault::new(FaultClass::Outage, "as the story goes");
            source.tell(SourceEvent::Down { epoch: Epoch(epoch - 1), fault });
            source.tell(SourceEvent::Up { epoch: Epoch(epoch) });
        }
        source.deliver_in(epoch, 7, None, i64::try_from(epoch).unwrap());
        until("it has come", || consumer.stats().retried >= epoch);
    }
    well.store(true, SeqCst);
    until("it is applied", || consumer.stats().applied == 1);
    std::thread::sleep(Duration::from_millis(1_200));
    assert_eq!(consumer.stop(Duration::from_secs(5)).repeated, 0, "no other copy was left");
}
