//! Words of the broker with several meanings: *not found* of a queue whose node is down, *no route* of an exchange that delivers later.

use std::time::Duration;

use lapin::ExchangeKind;
use onewrite::broker::{MemoryBroker, RabbitMq, RabbitMqSource, Source, SourceEvent, SourceEvents, Topology};
use onewrite::{Event, FaultClass, RelayState, Store, SuspendCause};

use crate::scratch::until_within;
use crate::support::rabbit::{RabbitCluster, shared_node};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(120);

fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(SOON, what, holds);
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn rabbit(url: &str) -> RabbitMq {
    RabbitMq::new(url).unwrap().reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500))
}

/// Goal: an event for a queue whose node is down spends no attempt, however often it comes back, and arrives once the node is back; an
/// event for no queue at all is quarantined meanwhile, and other queues flow, also where the relay itself declares the queue that is
/// away. Method: a cluster of two, classic queues on the second, which is killed; by the default exchange, by a binding of the
/// relay's topology, and by one that others have made.
#[test]
fn a_queue_whose_node_is_down_is_an_outage() {
    let mut cluster = RabbitCluster::start(2);
    let (near, far) = (Tap::connect(&cluster.nodes[0].url()), Tap::connect(&cluster.nodes[1].url()));
    far.queue("far.q", &[]);
    near.queue("near.q", &[]);
    for exchange in ["declared", "elsewhere"] {
        near.exchange(exchange, ExchangeKind::Topic);
        near.bind("far.q", exchange, "far.#");
    }
    drop(far);
    cluster.nodes.iter().for_each(|node| node.settle_declarations());
    cluster.nodes[1].kill9();
    let is_returned = routes_past_nodes_that_are_down(&cluster);

    let (_folder, store) = open();
    let topology = Topology::new()
        .exchange("declared", onewrite::broker::ExchangeKind::Topic)
        .queue("far.q")
        .bind("declared", "far.q", "far.#")
        .bound_elsewhere("elsewhere", "far.q", "far.#")
        .queue("near.q");
    let relay = store
        .relay("r")
        .destination_attempts(2)
        .backoff(Duration::from_millis(20), Duration::from_millis(200))
        .spawn(rabbit(&cluster.nodes[0].url()).declare(topology))
        .unwrap();
    let receipts: Vec<_> = [
        ("", "near.q"),
        ("", "far.q"),
        ("declared", "far.one"),
        ("elsewhere", "far.two"),
        ("", "nowhere.q"),
        ("declared", "nowhere"),
    ]
    .into_iter()
    .map(|(exchange, key)| {
        let event = Event::bytes("t", key).key(format!("{exchange}/{key}")).to(exchange, key);
        store.write(move |tx| tx.append(event.clone())).unwrap()
    })
    .collect();
    receipts[0].wait_confirmed(SOON).expect("another queue is not concerned");
    let quarantined = || store.quarantine("r").unwrap().list(None, 10).unwrap();
    until("what goes nowhere in quarantine", || quarantined().len() == 2);
    if is_returned {
        until("an outage that is reported", || {
            let fault = relay.status().last_fault;
            fault.is_some_and(|fault| fault.class == FaultClass::Outage && fault.text.contains("home node"))
        });
        // Far more tries than two: each waits for 0.2 s at most.
        let tries = relay.status().retried;
        until("many tries", || relay.status().retried >= tries + 30);
    } else {
        until("three destinations that are suspended, after more tries than two", || {
            let suspended = relay.status().suspended;
            suspended.len() == 3
                && suspended.iter().all(|one| one.cause == SuspendCause::Nacks && one.trials > 2)
        });
    }
    let entries = quarantined();
    assert_eq!(entries.iter().map(|entry| entry.seq).collect::<Vec<_>>(), [4, 5], "{entries:?}");
    assert!(entries.iter().all(|entry| entry.fault.class == FaultClass::Destination), "{entries:?}");

    cluster.nodes[1].restart();
    for receipt in &receipts[1..4] {
        receipt.wait_confirmed(SOON).expect("it heals by itself");
    }
    assert_eq!(near.count("far.q"), 3);
    assert_eq!(relay.status().state, RelayState::Connected);
    relay.stop(Duration::from_secs(5));
}

/// Goal: a queue that the relay declares, and whose node is down, keeps no other queue waiting, and no relay from connecting; a consumer
/// of it learns of an outage. Method: a cluster of two, a classic queue and its binding on the second, which is killed before the relay
/// starts; events for a queue of the first.
#[test]
fn a_queue_to_declare_whose_node_is_down_stops_nobody() {
    let mut cluster = RabbitCluster::start(2);
    let (near, far) = (Tap::connect(&cluster.nodes[0].url()), Tap::connect(&cluster.nodes[1].url()));
    far.queue("far.q", &[]);
    near.exchange("declared", ExchangeKind::Fanout);
    near.bind("far.q", "declared", "");
    drop(far);
    cluster.nodes.iter().for_each(|node| node.settle_declarations());
    cluster.nodes[1].kill9();

    let (_folder, store) = open();
    let topology = || {
        Topology::new()
            .exchange("declared", onewrite::broker::ExchangeKind::Fanout)
            .queue("far.q")
            .bind("declared", "far.q", "")
            .queue("near.q")
            .bind("declared", "near.q", "")
    };
    let url = cluster.nodes[0].url();
    let relay = store.relay("r").spawn(rabbit(&url).declare(topology())).unwrap();
    let append =
        |to: &'static str| store.write(move |tx| tx.append(Event::bytes("t", to).to(to, "near.q"))).unwrap();
    let [direct, both] = [append(""), append("declared")];
    let confirmed = direct.wait_confirmed(SOON);
    assert!(confirmed.is_ok(), "another queue is not concerned: {confirmed:?}, {:?}", relay.status());
    until("both events in the queue that is there", || near.count("near.q") >= 2);
    let is_returned = routes_past_nodes_that_are_down(&cluster);
    if is_returned {
        both.wait_confirmed(SOON).expect("the queue that is away does not count");
        assert_eq!(near.count("near.q"), 2);
    }
    let source = RabbitMqSource::new(&url, "far.q").unwrap().declare(topology());
    let (sender, events) = SourceEvents::channel();
    let mut source = source.reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500));
    source.start(sender, 1).unwrap();
    match events.recv_timeout(SOON).unwrap() {
        SourceEvent::Down { fault, .. } => {
            // RabbitMQ 4 says so after a minute only.
            assert!(fault.class == FaultClass::Outage && matches!(fault.code, None | Some(404)), "{fault}");
            assert!(fault.text.contains("home node"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    cluster.nodes[1].restart();
    until("the queue is there again", || {
        matches!(events.recv_timeout(SOON).unwrap(), SourceEvent::Up { .. })
    });
    source.stop(SOON);
    both.wait_confirmed(SOON).expect("the queue is there again");
    relay.stop(Duration::from_secs(5));
}

/// RabbitMQ 3 routes past a classic queue whose node is down, and returns what has no other. RabbitMQ 4 routes to it, and nacks.
fn routes_past_nodes_that_are_down(cluster: &RabbitCluster) -> bool {
    cluster.nodes[0].version().0 < 4
}

/// Goal: an event that need not be routable is not returned, and one that is mandatory is; by event and by exchange. Method: an exchange
/// without a binding on a real RabbitMQ, and the same in memory.
#[test]
fn mandatory_can_be_switched_off() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let broker = MemoryBroker::new();
    for exchange in ["unbound.one", "unbound.two"] {
        tap.exchange(exchange, ExchangeKind::Fanout);
        broker.declare_exchange(exchange, onewrite::broker::ExchangeKind::Fanout);
    }
    for on_rabbit in [true, false] {
        let (_folder, store) = open();
        let builder = store.relay("r").destination_attempts(1).may_be_unroutable("unbound.two");
        let relay =
            if on_rabbit { builder.spawn(rabbit(&node.url())) } else { builder.spawn(broker.publisher()) };
        let relay = relay.unwrap();
        let append = |event: Event| store.write(move |tx| tx.append(event.clone())).unwrap();
        let event = || Event::bytes("t", "");
        append(event().to("unbound.two", "k")).wait_confirmed(SOON).unwrap();
        append(event().may_be_unroutable().to("unbound.one", "k")).wait_confirmed(SOON).unwrap();
        append(event().to("unbound.one", "k"));
        until("the mandatory one in quarantine", || relay.status().quarantined == 1);
        let entries = store.quarantine("r").unwrap().list(None, 10).unwrap();
        assert_eq!((entries[0].seq, entries[0].fault.code), (2, Some(312)));
        relay.stop(Duration::from_secs(5));
    }
}
