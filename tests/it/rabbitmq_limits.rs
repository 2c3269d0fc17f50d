//! Brokers that allow little: one connection, one channel.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use onewrite::broker::{RabbitMq, RabbitMqSource, Source, SourceEvent, SourceEvents, Topology};
use onewrite::{Event, FaultClass, Relay, Store};

use crate::support::fake_broker::FakeBroker;
use crate::support::scripted_broker::{Script, ScriptedBroker};

const LIMIT: Duration = Duration::from_secs(120);

fn until(what: &str, relay: &Relay, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "not within {LIMIT:?}: {what}; {:?}", relay.status());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A relay to this broker, with one event that makes the broker close the channel before 200 that do not.
fn relay_with_a_poison_message(broker: &ScriptedBroker) -> (tempfile::TempDir, Store, Relay) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    store
        .write(|tx| {
            tx.append(Event::bytes("t", "lost").to("", "missing"))?;
            (0..200).try_for_each(|n| tx.append(Event::bytes("t", n.to_string()).to("", "well")).map(drop))
        })
        .unwrap();
    let publisher = RabbitMq::new(&broker.url())
        .unwrap()
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(200));
    let relay = store.relay("r").spawn(publisher).unwrap();
    (folder, store, relay)
}

fn script() -> Script {
    Script { missing: ["missing".to_owned()].into(), ..Script::default() }
}

/// The story: a virtual host allowed one connection. After a message had closed the channel, the 200 beside it waited for a second
/// connection for ever, and `status()` said `Connected` with no fault. Goal: one connection is enough. Method: a scripted server that refuses a
/// second one.
#[test]
fn one_connection_is_enough_to_find_a_poison_message() {
    let broker = ScriptedBroker::start(Script { connections_max: 1, ..script() });
    let (_folder, _store, relay) = relay_with_a_poison_message(&broker);
    until("the others are confirmed", &relay, || relay.status().confirmed == 200);
    until("the poison message is alone", &relay, || relay.status().retrying == 1);
    let fault = relay.status().last_fault.expect("it is shown");
    assert_eq!(fault.code, Some(404), "{fault}");
    relay.stop(Duration::from_secs(5));
}

/// Goal: where the broker allows one channel, the way is a connection of their own. Method: a scripted server.
#[test]
fn one_channel_is_enough_to_find_a_poison_message() {
    let broker = ScriptedBroker::start(Script { channel_max: 1, ..script() });
    let (_folder, _store, relay) = relay_with_a_poison_message(&broker);
    until("the others are confirmed", &relay, || relay.status().confirmed == 200);
    assert!(broker.script(|script| script.logins) > 2, "there was a connection beside the window's");
    relay.stop(Duration::from_secs(5));
}

/// Goal: where there is no way at all, the fault says what does not fit. Method: a scripted server that allows one channel on one
/// connection.
#[test]
fn where_nothing_fits_the_fault_says_what() {
    let broker = ScriptedBroker::start(Script { channel_max: 1, connections_max: 1, ..script() });
    let (_folder, _store, relay) = relay_with_a_poison_message(&broker);
    until("the fault names both", &relay, || {
        let fault = relay.status().last_fault.map(|fault| fault.text).unwrap_or_default();
        fault.contains("channel_max") && fault.contains("connection limit is reached")
    });
    relay.stop(Duration::ZERO);
}

/// The story: a broker with a `frame_max` of 4096 showed as *connection reset*, for ever. Goal: the fault names the setting and both
/// numbers, at once and as one of configuration; a publisher works with the smallest size that fits. Method: scripted servers.
#[test]
fn a_broker_with_small_frames_is_named() {
    let broker = ScriptedBroker::start(Script { frame_max: 4096, ..script() });
    let (_folder, _store, relay) = relay_with_a_poison_message(&broker);
    until("the fault", &relay, || relay.status().last_fault.is_some());
    let fault = relay.status().last_fault.unwrap();
    assert_eq!(fault.class, FaultClass::Config);
    assert!(fault.text.contains("frames of 4096 bytes (`frame_max`); 8192 or more are needed"), "{fault}");
    relay.stop(Duration::ZERO);
    let broker = ScriptedBroker::start(Script { frame_max: 8192, ..Script::default() });
    let (_folder, _store, relay) = relay_with_a_poison_message(&broker);
    until("all are confirmed", &relay, || relay.status().confirmed == 201);
    relay.stop(Duration::ZERO);
}

/// Kind: a question whose answer nobody waits for any more. Goal: a late answer ends no connection, and queues that are away keep no relay
/// from connecting, however many they are. Method: a scripted server closes the channel of a question about 40 of its queues with 404
/// after four seconds, as RabbitMQ 4 does after a minute; events for another queue go on until after that.
#[test]
fn late_answers_end_no_connection() {
    let away = |n: u64| format!("away-{n}");
    let late = (0..40).map(|n| (away(n), Duration::from_secs(4))).collect();
    let broker = ScriptedBroker::start(Script { late, ..Script::default() });
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let mut topology = Topology::new().queue("near");
    for n in 0..40 {
        topology = topology.queue(away(n)).bind("all", away(n), "");
    }
    let publisher = RabbitMq::new(&broker.url()).unwrap().declare(topology);
    let relay = store.relay("r").spawn(publisher).unwrap();
    let mut sent = 0;
    // The declaration and the question of each.
    while broker.script(|script| script.answered_late) < 80 {
        store.write(|tx| tx.append(Event::bytes("t", "near").to("", "near"))).unwrap();
        sent += 1;
        until("it is confirmed", &relay, || relay.status().confirmed == sent);
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(500));
    store.write(|tx| tx.append(Event::bytes("t", "near").to("", "near"))).unwrap();
    until("the last one is confirmed", &relay, || relay.status().confirmed == sent + 1);
    assert_eq!(
        (broker.script(|script| script.logins), relay.status().reconnects),
        (1, 0),
        "{:?}",
        relay.status()
    );
    assert_eq!(
        broker.copies("near"),
        (usize::try_from(sent).unwrap() + 1, usize::try_from(sent).unwrap() + 1)
    );
    relay.stop(Duration::from_secs(5));
}

/// A relay that declares `near`, then `silent` queues whose node is down, then so many others; the broker allows so many channels.
fn declaring(
    channel_max: u16,
    silent: usize,
    others: usize,
) -> (ScriptedBroker, tempfile::TempDir, Store, Relay) {
    let away = |n: usize| format!("away-{n}");
    let late = (0..silent).map(|n| (away(n), Duration::from_secs(60))).collect();
    let broker = ScriptedBroker::start(Script { late, channel_max, ..Script::default() });
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let silent = (0..silent).map(away);
    let queues = silent.chain((0..others).map(|n| format!("there-{n}")));
    let topology = queues.fold(Topology::new().queue("near"), |topology, queue| topology.queue(queue));
    let publisher = RabbitMq::new(&broker.url()).unwrap().declare(topology);
    let relay = store.relay("r").spawn(publisher).unwrap();
    (broker, folder, store, relay)
}

/// Goal: many queues are declared on few channels, though some do not answer. Method: 8 channels, 2 silent queues, 60 others.
#[test]
fn many_queues_are_declared_on_few_channels() {
    let (broker, _folder, store, relay) = declaring(8, 2, 60);
    store.write(|tx| tx.append(Event::bytes("t", "near").to("", "near"))).unwrap();
    until("it is confirmed", &relay, || relay.status().confirmed == 1);
    let declared = broker.script(|script| script.declared.clone());
    for n in 0..60 {
        assert!(declared.contains(&format!("there-{n}")), "{declared:?}");
    }
    assert_eq!(broker.script(|script| script.logins), 1);
    relay.stop(Duration::from_secs(5));
}

/// Goal: where more queues are silent than there are channels, the fault says what helps. Method: 8 channels, 40 silent queues.
#[test]
fn more_silent_queues_than_channels_are_reported() {
    let (_broker, _folder, store, relay) = declaring(8, 40, 0);
    store.write(|tx| tx.append(Event::bytes("t", "near").to("", "near"))).unwrap();
    let fault = || relay.status().last_fault.map(|fault| fault.text).unwrap_or_default();
    until("it is reported", &relay, || fault().contains("a larger `channel_max` helps"));
    assert!(fault().contains("queue `away-"), "{}", fault());
    relay.stop(Duration::from_secs(5));
}

/// Kind: what the client library remembers of a channel that the broker has closed. It refuses the channel's number on this connection. Goal:
/// however many channels the broker closes, it can be asked why a message came back, and no outage spends an attempt. Method: a scripted server
/// with 8 channels; events for 40 queues that do not exist, then one for a queue whose node is down.
#[test]
fn closed_channels_use_up_no_connection() {
    let nowhere: BTreeSet<String> = (0..40).map(|n| format!("nowhere-{n}")).collect();
    let late = BTreeMap::from([("away".to_owned(), Duration::ZERO)]);
    let script = Script { nowhere: nowhere.clone(), late, channel_max: 8, ..Script::default() };
    let broker = ScriptedBroker::start(script);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let publisher = RabbitMq::new(&broker.url())
        .unwrap()
        .reconnect_backoff(Duration::from_millis(20), Duration::from_millis(20));
    let backoff = Duration::from_millis(20);
    let relay = store.relay("r").destination_attempts(2).backoff(backoff, backoff).spawn(publisher);
    let relay = relay.unwrap();
    for queue in nowhere {
        store.write(move |tx| tx.append(Event::bytes("t", "lost").to("", queue.as_str()))).unwrap();
        store.write(|tx| tx.append(Event::bytes("t", "away").to("", "away"))).unwrap();
    }
    until("those for nowhere are in quarantine", &relay, || relay.status().quarantined == 40);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(relay.status().quarantined, 40, "none for the queue that is away is");
    broker.script(|script| script.late.clear());
    until("the others are confirmed", &relay, || relay.status().confirmed == 40);
    assert_eq!(relay.status().quarantined, 40);
    relay.stop(Duration::from_secs(5));
}

/// Goal: an event for more missing queues than the broker allows channels ends in quarantine: no connection could ask for all of them. Method: a
/// scripted server with 4 channels; an exchange with 6 queues, which do not exist.
#[test]
fn more_missing_queues_than_channels_end_in_quarantine() {
    let mut nowhere: BTreeSet<String> = (0..6).map(|n| format!("nowhere-{n}")).collect();
    nowhere.insert("paid".to_owned());
    let broker = ScriptedBroker::start(Script { nowhere, channel_max: 4, ..Script::default() });
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let queues = (0..6).map(|n| format!("nowhere-{n}"));
    let topology =
        queues.fold(Topology::new(), |topology, queue| topology.bound_elsewhere("x", queue, "paid"));
    let publisher = RabbitMq::new(&broker.url())
        .unwrap()
        .declare(topology)
        .reconnect_backoff(Duration::from_millis(20), Duration::from_millis(20));
    let backoff = Duration::from_millis(20);
    let relay = store.relay("r").destination_attempts(2).backoff(backoff, backoff).spawn(publisher).unwrap();
    store.write(|tx| tx.append(Event::bytes("t", "lost").to("x", "paid"))).unwrap();
    until("it is in quarantine", &relay, || relay.status().quarantined == 1);
    relay.stop(Duration::from_secs(5));
}

/// Goal: a broker that delivers more than it was asked for is disconnected with a fault that says so, and what came beyond is not
/// taken in. Method: a scripted server that delivers for ever to a consumer that settles nothing.
#[test]
fn deliveries_beyond_the_prefetch_end_the_connection() {
    let broker = FakeBroker::delivering(20_000, 50_000);
    let (sender, events) = SourceEvents::channel();
    let mut source = RabbitMqSource::new(&broker.url, "q").unwrap();
    source.start(sender, 5).unwrap();
    let mut delivered = 0;
    let fault = loop {
        match events.recv_timeout(LIMIT).expect("it ends in time") {
            SourceEvent::Delivery(_) => delivered += 1,
            SourceEvent::Down { fault, .. } => break fault,
            _ => {}
        }
    };
    assert!(fault.text.contains("more than the 5 messages that were asked for"), "{fault}");
    assert!(delivered <= 5, "{delivered}");
    source.stop(Duration::from_secs(5));
}
