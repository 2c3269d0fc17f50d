//! What is not the same in all brokers: RabbitMQ 3.10, 4.0 and 4.3. Each test says what is right for each of them, and runs on the
//! broker that `RABBITMQ_BIN` names. `c07` in `matrix::consumer` is about consumer timeouts.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::AMQPValue;
use onewrite::broker::{
    EventReceiver, Publisher, RabbitMq, RabbitMqSource, Settlement, Source, SourceEvent, SourceEvents,
    Topology,
};
use onewrite::limits::PAYLOAD_BYTES_MAX;
use onewrite::{Event, FaultClass, Outcome, RelayState, Store};

use crate::scratch::until_within;
use crate::support::rabbit::{RabbitCluster, RabbitNode, free_port, programs};
use crate::support::rig::{Rig, message, outgoing};
use crate::support::tap::Tap;

const SOON: Duration = Duration::from_secs(120);

/// From here on Mnesia is gone, and Khepri keeps what is declared.
const KHEPRI: (u32, u32) = (4, 3);

fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(SOON, what, holds);
}

fn quick(url: &str) -> RabbitMq {
    RabbitMq::new(url).unwrap().reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500))
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    (folder, Store::builder().payload_bytes_max(PAYLOAD_BYTES_MAX).open(path).unwrap())
}

/// Goal: one setting chooses the broker of the tests and of `scripts/rabbit-node`, and a chosen broker that is missing is an error.
/// Method: ask the nodes that run which version they are, and the programs of the chosen folder; then a folder without a broker.
#[test]
fn the_setting_chooses_the_broker() {
    let version = Command::new(programs().join("rabbitmqctl")).arg("version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let node = RabbitNode::start();
    let (major, minor) = node.version();
    assert!(version.trim().starts_with(&format!("{major}.{minor}.")), "{version}, not {major}.{minor}");

    let folder = tempfile::tempdir().unwrap();
    let script = |bin: &Path, arguments: &[&str]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rabbit-node");
        Command::new(script).env("RABBITMQ_BIN", bin).args(arguments).output().unwrap()
    };
    let place = folder.path().to_str().unwrap();
    // The script takes the next two also.
    let port = loop {
        let [first, second, third] = [free_port(), free_port(), free_port()];
        if (second, third) == (first + 1, first + 2) {
            break first.to_string();
        }
    };
    let missing = script(folder.path(), &["start", place, &port]);
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(!missing.status.success() && said.contains("RABBITMQ_BIN"), "{said}");

    let started = script(&programs(), &["start", place, &port]);
    let asked = script(&programs(), &["ctl", place, "eval", "rabbit_misc:version()."]);
    let stopped = script(&programs(), &["stop", place]);
    assert!(started.status.success() && stopped.status.success(), "{started:?} {stopped:?}");
    let said = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert!(said.contains(version.trim()), "{version}, not {said}");
}

/// Goal: what was declared and confirmed outlives a kill of the broker. Khepri has it on disk when it answers, Mnesia later.
/// Method: declare, publish, kill at once; where Mnesia runs, after it has been asked to write.
#[test]
fn a_kill_right_after_a_declaration() {
    let mut node = RabbitNode::start();
    let khepri = node.version() >= KHEPRI;
    for round in 0..3_u64 {
        let queue = format!("declared.{round}");
        let topology = Topology::new().queue(&queue);
        let mut rig = Rig::start(quick(&node.url()).declare(topology));
        rig.wait_up();
        rig.publish(outgoing(round, "", &queue, message("1", b"kept")));
        assert_eq!(rig.wait_outcome(round), Outcome::Confirmed);
        if !khepri {
            node.settle_declarations();
        }
        node.kill9();
        rig.publisher.stop(Duration::from_secs(5));
        node.restart();
        let tap = Tap::connect(&node.url());
        for declared in 0..=round {
            assert_eq!(tap.count(&format!("declared.{declared}")), 1, "{declared} of {round}");
        }
    }
}

/// Goal: without a majority of its nodes a cluster goes on with what is declared. Khepri refuses to declare more: that is an outage
/// which heals, not a mistake in the settings. Method: two nodes of three are killed; a relay for a queue of the third one, and
/// one that declares another queue; then the nodes come back.
#[test]
fn a_minority_declares_nothing_and_delivers() {
    let mut cluster = RabbitCluster::start(3);
    let khepri = cluster.nodes[0].version() >= KHEPRI;
    let url = cluster.nodes[0].url();
    let tap = Tap::connect(&url);
    tap.queue("minority.old", &[]);
    cluster.nodes[0].settle_declarations();
    cluster.nodes[1].kill9();
    cluster.nodes[2].kill9();
    let (_folder, store) = open();
    let relay = store.relay("old").spawn(quick(&url)).unwrap();
    store.write(|tx| tx.append(Event::bytes("a", "1").to("", "minority.old"))).unwrap();
    until("the queue takes it", || relay.status().confirmed == 1);
    relay.stop(SOON);

    let (_folder, store) = open();
    let declared = Topology::new().queue("minority.new");
    let relay = store.relay("new").spawn(quick(&url).declare(declared)).unwrap();
    store.write(|tx| tx.append(Event::bytes("a", "1").to("", "minority.new"))).unwrap();
    if khepri {
        until("the refusal is reported", || relay.status().last_fault.is_some());
        let status = relay.status();
        let fault = status.last_fault.as_ref().unwrap();
        assert_eq!(fault.class, FaultClass::Outage, "{fault}");
        assert!(status.confirmed == 0 && !matches!(status.state, RelayState::Failed(..)), "{status:?}");
        cluster.nodes[1].restart();
    }
    until("declared and delivered", || relay.status().confirmed == 1);
    assert_eq!((tap.count("minority.old"), Tap::connect(&url).count("minority.new")), (1, 1));
    relay.stop(SOON);
}

struct Requeues {
    source: RabbitMqSource,
    events: EventReceiver<SourceEvent>,
}

impl Requeues {
    fn start(node: &RabbitNode, queue: &str) -> Self {
        let (sender, events) = SourceEvents::channel();
        let mut source = RabbitMqSource::new(&node.url(), queue).unwrap();
        source.start(sender, 1).unwrap();
        Self { source, events }
    }

    /// How often a message comes that is requeued each time, up to `most`.
    fn count(&mut self, most: u32) -> u32 {
        for count in 0..most {
            loop {
                match self.events.recv_timeout(Duration::from_secs(10)) {
                    Ok(SourceEvent::Delivery(delivery)) => {
                        self.source.settle(vec![(delivery.tag, Settlement::Requeue)]);
                        break;
                    }
                    Ok(_) => {}
                    Err(_) => return count,
                }
            }
        }
        most
    }
}

/// Goal: a quorum queue of RabbitMQ 4 gives a message up after 20 deliveries that came back, unless set otherwise; one of 3.10, and
/// a classic queue, never. What is given up is dropped, or goes to the dead-letter exchange. Method: requeue what comes.
#[test]
fn a_quorum_queue_gives_up_after_twenty() {
    let node = RabbitNode::start();
    let limited = node.version() >= (4, 0);
    let tap = Tap::connect(&node.url());
    let text = |value: &str| AMQPValue::LongString(value.into());
    let quorum = ("x-queue-type", text("quorum"));
    tap.queue("limit.dead", &[]);
    tap.queue(
        "limit.default",
        &[
            quorum.clone(),
            ("x-dead-letter-exchange", text("")),
            ("x-dead-letter-routing-key", text("limit.dead")),
        ],
    );
    tap.queue("limit.none", &[quorum, ("x-delivery-limit", AMQPValue::LongInt(-1))]);
    tap.queue("limit.classic", &[]);
    let most = 30;
    for queue in ["limit.default", "limit.none", "limit.classic"] {
        if queue == "limit.none" && !limited {
            // RabbitMQ 3.10 knows no -1.
            continue;
        }
        tap.publish(queue, BasicProperties::default(), b"again");
        let expected = if queue == "limit.default" && limited { 21 } else { most };
        let mut requeues = Requeues::start(&node, queue);
        assert_eq!(requeues.count(most), expected, "{queue}");
        requeues.source.stop(Duration::from_secs(5));
    }
    until("the dead letter", || tap.count("limit.dead") == usize::from(limited));
}

/// Goal: RabbitMQ 4 takes messages up to 16 MiB unless set otherwise, 3.10 up to 128 MiB. The largest event fits into both. A larger
/// message of another publisher is refused as a fault of the message. Method: an event of the largest payload, through a relay; then 16
/// MiB and a byte, without a store.
#[test]
fn a_message_beyond_sixteen_mebibytes() {
    let node = RabbitNode::start_with_default_message_size();
    let tap = Tap::connect(&node.url());
    tap.queue("large.q", &[]);
    let (_folder, store) = open();
    let relay = store.relay("large").spawn(quick(&node.url())).unwrap();
    store.write(|tx| tx.append(Event::bytes("large", vec![0; PAYLOAD_BYTES_MAX]).to("", "large.q"))).unwrap();
    until("the largest event is there", || relay.status().confirmed == 1);
    assert_eq!(tap.count("large.q"), 1);
    relay.stop(SOON);

    let mut rig = Rig::start(quick(&node.url()));
    rig.wait_up();
    rig.publish(outgoing(1, "", "large.q", message("1", &vec![0; (16 << 20) + 1])));
    if node.version() >= (4, 0) {
        let fault = rig.wait_down();
        assert_eq!((fault.class, fault.code), (FaultClass::Message, Some(406)), "{fault}");
        assert!(fault.text.contains("16777216"), "{fault}");
    } else {
        assert_eq!(rig.wait_outcome(1), Outcome::Confirmed);
    }
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: classic queues are not mirrored on RabbitMQ 4, and a policy that asks for it is refused there; quorum queues are the way.
/// Method: set one.
#[test]
fn mirrored_queues_are_refused() {
    let node = RabbitNode::start();
    let set = node.try_ctl(&["set_policy", "mirrored", ".*", r#"{"ha-mode":"all"}"#]);
    assert_eq!(set.is_err(), node.version() >= (4, 0), "{set:?}");
    let refused = set.err().unwrap_or_default();
    assert!(refused.is_empty() || refused.contains("ha-mode"), "{refused}");
}
