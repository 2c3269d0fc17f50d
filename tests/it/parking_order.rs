//! The order of a key through parking: what is parked of a key stands before the rest of it, whatever comes while handlers run.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onewrite::broker::{Delivery, DeliveryTag, Epoch, Settlement, Source, SourceEvent, SourceEvents};
use onewrite::{Consumer, Error, Fault, FaultClass, GapPolicy, Message, RejectedFull, SettingError, Store};

use crate::lanes_inbox::numbered;
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
        self.notify(SourceEvent::Delivery(Box::new(delivery(epoch, tag, key, returns))));
    }

    /// As `deliver_in`, without an id.
    fn deliver_nameless(&self, epoch: u64, tag: u64, returns: i64) {
        let mut delivery = delivery(epoch, tag, None, returns);
        delivery.message.message_id = None;
        self.notify(SourceEvent::Delivery(Box::new(delivery)));
    }

    /// The connection of this epoch ends, and the next begins.
    fn lose(&self, epoch: u64) {
        let fault = Fault::new(FaultClass::Outage, "as the story goes");
        self.notify(SourceEvent::Down { epoch: Epoch(epoch), fault });
        self.notify(SourceEvent::Up { epoch: Epoch(epoch + 1) });
    }

    fn notify(&self, event: SourceEvent) {
        self.events.lock().unwrap().as_ref().unwrap().send(event);
    }

    fn settled(&self) -> Vec<u64> {
        self.settled.lock().unwrap().clone()
    }

    fn place(&self, tag: u64) -> Option<usize> {
        self.settled().iter().position(|settled| *settled == tag)
    }
}

fn delivery(epoch: u64, tag: u64, key: Option<&str>, returns: i64) -> Delivery {
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
    let mut delivery = Delivery::new(DeliveryTag { epoch: Epoch(epoch), tag }, "", "q", message);
    delivery.redelivered = returns > 0;
    delivery
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
        .spawn(source.clone(), move |delivery, _| {
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
        .spawn(source.clone(), move |delivery, _| {
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
/// however often it does. Method: no room to park, a handler that fails, and twenty connections with the same delivery; then the
/// handler succeeds.
#[test]
fn what_survives_its_connection_is_kept_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let (consumer, well, _) = sick(&store, &source);
    for epoch in 1..=20 {
        if epoch > 1 {
            source.lose(epoch - 1);
        }
        source.deliver_in(epoch, 7, None, i64::try_from(epoch).unwrap());
        until("it has come", || consumer.status().retried >= epoch);
    }
    well.store(true, SeqCst);
    until("it is applied", || consumer.status().applied == 1);
    std::thread::sleep(Duration::from_millis(1_200));
    assert_eq!(consumer.stop(Duration::from_secs(5)).repeated, 0, "no other copy was left");
}

/// Goal: while nothing is taken for want of room, lost connections leave no second copy of what survives them, whether an id names it
/// or not. Method: a full quarantine, then thirty connections with the same deliveries, which have come back ever more often.
#[test]
fn what_survives_while_there_is_no_room_is_kept_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&calls);
    let consumer = store
        .consumer("service")
        .rejected_max(1, 10_000)
        .spawn(source.clone(), move |delivery, _| {
            let number = number(delivery);
            if number < 3 {
                return Err(Error::reject("no such account"));
            }
            seen.lock().unwrap().push(number);
            Ok(())
        })
        .unwrap();
    source.deliver(1, None, 0);
    until("it is kept", || consumer.status().quarantined == 1);
    source.deliver(2, None, 0);
    until("it waits", || consumer.status().waits_for.is_some());
    for epoch in 2..=30 {
        source.lose(epoch - 1);
        let returns = i64::try_from(epoch).unwrap() + 5;
        source.deliver_in(epoch, 2, None, returns);
        for number in 3..13 {
            source.deliver_in(epoch, number, Some("k").filter(|_| number < 6), returns);
            source.deliver_nameless(epoch, 100 + number, returns);
        }
    }
    std::thread::sleep(Duration::from_millis(300));
    store.rejected("service").discard(0).unwrap();
    until("there is room", || consumer.status().waits_for.is_none() && calls.lock().unwrap().len() >= 20);
    std::thread::sleep(Duration::from_millis(200));
    let stats = consumer.stop(Duration::from_secs(5));
    assert_eq!((stats.applied, stats.repeated, stats.quarantined), (20, 0, 2), "{stats:?}");
    let mut calls = calls.lock().unwrap().clone();
    let of_key: Vec<u64> = calls.iter().copied().filter(|number| *number < 6).collect();
    assert_eq!(of_key, [3, 4, 5]);
    calls.sort_unstable();
    assert_eq!(calls, (3..13).chain(103..113).collect::<Vec<u64>>());
}

/// A consumer that can park nothing and fails until it is notified that all is well; and what it applies, in order.
fn sick(store: &Store, source: &ByHand) -> (Consumer, Arc<AtomicBool>, Arc<Mutex<Vec<u64>>>) {
    let (well, applied) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let (is_well, seen) = (Arc::clone(&well), Arc::clone(&applied));
    let builder = store.consumer("service").parked_max(0, 0).attempts(1_000);
    let backoff = Duration::from_millis(300);
    let consumer = builder.backoff(backoff, backoff).spawn(source.clone(), move |delivery, _| {
        if !is_well.load(SeqCst) {
            return Err(Error::app("not yet"));
        }
        seen.lock().unwrap().push(number(delivery));
        Ok(())
    });
    (consumer.unwrap(), well, applied)
}

/// Goal: one that survives its connection keeps its place among those of its key, also when it comes again; and does not overtake an
/// earlier one that did not survive and comes again. Method: two of a key, no room to park; a new connection delivers only the first of
/// them again, or both, of which the first had come once.
#[test]
fn what_survives_keeps_its_place() {
    for (returns, both) in [(5, false), (0, true)] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let source = ByHand::default();
        let (consumer, well, applied) = sick(&store, &source);
        source.deliver(1, Some("k"), returns);
        source.deliver(2, Some("k"), 5);
        until("the first has failed", || consumer.status().retried >= 1);
        source.lose(1);
        source.deliver_in(2, 1, Some("k"), returns + 1);
        if both {
            source.deliver_in(2, 2, Some("k"), 6);
        }
        source.deliver_in(2, 9, None, 0);
        std::thread::sleep(Duration::from_millis(100));
        well.store(true, SeqCst);
        until("all are done", || consumer.status().applied == 3);
        let of_key: Vec<u64> = applied.lock().unwrap().iter().copied().filter(|number| *number < 9).collect();
        assert_eq!(of_key, [1, 2], "{both}");
        let _ = consumer.stop(Duration::from_secs(5));
    }
}

/// Goal: one of a lane that is held keeps its place when it comes again just as it is tried. Method: three of a lane, whose first fails; while a slow
/// handler runs, its next try falls due and a new connection delivers all three again. The iterations before differ, since an iteration decides what is due.
#[test]
fn what_comes_again_as_it_is_tried_keeps_its_turn() {
    for iterations_before in 0..8 {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let source = ByHand::default();
        let (applied, failed) = (Arc::new(Mutex::new(Vec::new())), AtomicBool::new(false));
        let seen = Arc::clone(&applied);
        let backoff = Duration::from_millis(300);
        let builder = store.consumer("service").parked_max(0, 0).backoff(backoff, backoff);
        let builder = builder.on_gap(GapPolicy::Hold(Duration::from_secs(60)));
        let consumer = builder
            .spawn(source.clone(), move |delivery, _| {
                let text = String::from_utf8_lossy(&delivery.message.payload).into_owned();
                if text == "first" && !failed.swap(true, SeqCst) {
                    return Err(Error::app("not yet"));
                }
                if text == "slow" {
                    std::thread::sleep(Duration::from_millis(700));
                }
                seen.lock().unwrap().push(text);
                Ok(())
            })
            .unwrap();
        let of_lane = |epoch, returns: i64| {
            for (at, text) in (0..).zip(["first", "second", "third"]) {
                let mut delivery = delivery(epoch, 100 + at, None, returns);
                let headers = std::mem::take(&mut delivery.message.headers);
                delivery.message = numbered(7, i64::try_from(at).unwrap(), text);
                delivery.message.headers.extend(headers);
                source.notify(SourceEvent::Delivery(Box::new(delivery)));
            }
        };
        let alone = |tag: u64, text: &str| {
            let mut delivery = delivery(1, tag, None, 0);
            delivery.message.payload = text.into();
            source.notify(SourceEvent::Delivery(Box::new(delivery)));
        };
        of_lane(1, 5);
        until("the first has failed", || consumer.status().retried == 1);
        for at in 0..iterations_before {
            alone(at + 1, "quick");
            until("it is applied", || consumer.status().applied == at + 1);
        }
        alone(50, "slow");
        std::thread::sleep(Duration::from_millis(100));
        source.lose(1);
        of_lane(2, 6);
        until("all are done", || consumer.status().applied == 4 + iterations_before);
        let of_lane: Vec<String> =
            applied.lock().unwrap().iter().filter(|text| text.ends_with(['t', 'd'])).cloned().collect();
        assert_eq!(of_lane, ["first", "second", "third"], "{iterations_before} iterations before");
        let _ = consumer.stop(Duration::from_secs(5));
    }
}

/// Goal: what came back and could not be parked because an earlier one of its key ran is parked once that has ended. Method: the first of a
/// key always fails; during its third try one of its key comes back, while slow ones of its batch run on.
#[test]
fn what_comes_back_during_a_try_is_parked_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let (source, tries) = (ByHand::default(), AtomicU32::new(0));
    let fed = source.clone();
    let consumer = store
        .consumer("service")
        .attempts(1_000)
        .backoff(Duration::from_millis(50), Duration::from_secs(600))
        .spawn(source.clone(), move |delivery, _| {
            if number(delivery) > 2 {
                std::thread::sleep(Duration::from_millis(15));
                return Ok(());
            }
            if tries.fetch_add(1, SeqCst) == 2 {
                fed.deliver(100, Some("k"), 9);
            }
            Err(Error::app("not yet"))
        })
        .unwrap();
    source.deliver(1, Some("k"), 0);
    source.deliver(2, Some("k"), 0);
    let mut others = 1_000..;
    until("it is parked", || {
        others.next().into_iter().for_each(|tag| source.deliver(tag, None, 0));
        std::thread::sleep(Duration::from_millis(10));
        source.settled().contains(&100)
    });
    let settled = source.settled();
    let order: Vec<u64> = settled.into_iter().filter(|tag| [1, 2, 100].contains(tag)).collect();
    assert_eq!(order, [1, 2, 100]);
    let _ = consumer.stop(Duration::ZERO);
}

/// Goal: a consumer that waits for room in its quarantine notices a lost connection, however busy it is
/// with repeats. Method: a full quarantine, and thirty failing deliveries that are due at once.
#[test]
fn a_busy_consumer_without_room_hears_of_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let backoff = Duration::ZERO;
    let builder =
        store.consumer("service").rejected_max(1, 10_000).attempts(u32::MAX).backoff(backoff, backoff);
    let consumer = builder
        .spawn(source.clone(), |delivery, _| match number(delivery) {
            1 | 2 => Err(Error::reject("no such account")),
            _ => {
                // By the end of a batch its first ones are due again.
                std::thread::sleep(Duration::from_millis(2));
                Err(Error::app("not yet"))
            }
        })
        .unwrap();
    (10..40).for_each(|tag| source.deliver(tag, None, 0));
    until("they fail", || consumer.status().retried > 30);
    source.deliver(1, None, 0);
    source.deliver(2, None, 0);
    until("it waits", || consumer.status().waits_for.is_some());
    source.lose(1);
    until("it has heard of both", || consumer.status().connections == 2);
    let _ = consumer.stop(Duration::from_secs(5));
}

/// Goal: a parked delivery that is rejected has room alone however long it is, also where the broker gets back what has none: it does not
/// have this one any more. Method: one is parked, then a consumer with smaller bounds begins.
#[test]
fn a_long_parked_delivery_stops_no_consumer_that_gives_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let source = ByHand::default();
    let consumer = store.consumer("service").attempts(1_000);
    let consumer = consumer.spawn(source.clone(), |_, _| Err(Error::app("not yet"))).unwrap();
    let mut long = delivery(1, 1, None, 9);
    long.message.payload = vec![7; 5_000];
    source.notify(SourceEvent::Delivery(Box::new(long)));
    until("it is parked", || source.settled() == [1]);
    let _ = consumer.stop(Duration::from_secs(5));
    let builder = store.consumer("service").rejected_max(10, 100).parked_max(10, 100);
    let builder = builder.on_rejected_full(RejectedFull::DeadLetter);
    let source = ByHand::default();
    let consumer = builder.spawn(source.clone(), |_, _| Err(Error::reject("never"))).unwrap();
    until("it is in quarantine", || consumer.status().quarantined == 1);
    assert_eq!(consumer.status().waits_for, None);
    let _ = consumer.stop(Duration::from_secs(5));
}

/// Goal: what the broker may drop is parked also while the consumer is paused: a lost connection, and a stop, lose nothing. Method: one that
/// came back often is delivered during the pause.
#[test]
fn what_comes_back_during_a_pause_is_parked() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let (source, calls) = (ByHand::default(), Arc::new(AtomicU32::new(0)));
    let called = Arc::clone(&calls);
    let consumer = store.consumer("service").spawn(source.clone(), move |_, _| {
        called.fetch_add(1, SeqCst);
        Ok(())
    });
    let consumer = consumer.unwrap();
    consumer.pause();
    source.deliver(1, Some("k"), 9);
    until("it is parked", || source.settled() == [1]);
    source.lose(1);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((calls.load(SeqCst), consumer.status().applied), (0, 0));
    let _ = consumer.stop(Duration::from_secs(5));
    let again = ByHand::default();
    let consumer = store.consumer("service").spawn(again, |_, _| Ok(())).unwrap();
    until("it is applied", || consumer.status().applied == 1);
    let _ = consumer.stop(Duration::from_secs(5));
}
