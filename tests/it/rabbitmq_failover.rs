//! Several brokers: a list with a spare, and a cluster of three whose quorum queue loses its leader.

use std::collections::{BTreeSet, HashMap};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onewrite::broker::{Publisher, RabbitMq, RabbitMqSource, Topology};
use onewrite::redb::{ReadableTableMetadata, TableDefinition};
use onewrite::{Event, FaultClass, Outcome, RelayState, Store};

use crate::support::rabbit::{RabbitCluster, RabbitNode, free_port};
use crate::support::rig::{Rig, isolated, message, outgoing};
use crate::support::tap::Tap;

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !holds() {
        assert!(Instant::now() < deadline, "waited 90 s for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn rabbit(urls: &[String]) -> RabbitMq {
    RabbitMq::with_brokers(urls)
        .unwrap()
        .reconnect_backoff(Duration::from_millis(100), Duration::from_millis(500))
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Threads that append until they are asked to end. Event `n` of a thread is named and says `key:n`; a key is of one thread, so that its
/// order is known.
struct Writers {
    go_on: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Writers {
    fn start(count: usize, store: &Store, queue: &'static str) -> Self {
        let go_on = Arc::new(AtomicBool::new(true));
        let threads = (0..count).map(|writer| {
            let (store, go_on) = (store.clone(), Arc::clone(&go_on));
            std::thread::spawn(move || {
                for n in 0.. {
                    if !go_on.load(Ordering::Relaxed) {
                        return n;
                    }
                    let key = format!("{writer}.{}", n % 10);
                    let event = Event::bytes("t", format!("{key}:{n}")).id(format!("{key}:{n}")).key(key);
                    let event = event.to("", queue);
                    store.write(move |tx| tx.append(event.clone())).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
                unreachable!("it writes on")
            })
        });
        Self { threads: threads.collect(), go_on }
    }

    /// How many each has appended.
    fn end(self) -> Vec<u64> {
        self.go_on.store(false, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }
}

/// Goal: whatever is wrong with the brokers before it, the one that works is found in one round without a wait, and each
/// failure says which broker it is about. Method: a name that does not exist, a port where nobody listens, a wrong
/// password, and a broker; the window, isolated messages and a consumer.
#[test]
fn the_next_broker_is_asked_at_once() {
    let node = RabbitNode::start();
    Tap::connect(&node.url()).queue("list.q", &[]);
    let wrong = node.url_as("guest", "wrong", "%2f");
    let nobody = format!("amqp://127.0.0.1:{}", free_port());
    let urls = ["amqp://no-such-host.invalid".to_owned(), nobody.clone(), wrong, node.url()];
    let list = || RabbitMq::with_brokers(&urls).unwrap().allow_plaintext_credentials();
    let mut rig = Rig::start(list());
    let faults = [rig.wait_down(), rig.wait_down(), rig.wait_down()];
    let began = Instant::now();
    rig.wait_up();
    assert!(began.elapsed() < Duration::from_secs(2), "up after {:?}", began.elapsed());
    assert!(faults[0].text.contains("no-such-host.invalid:5672"), "{}", faults[0]);
    assert!(faults[1].text.contains(nobody.trim_start_matches("amqp://")), "{}", faults[1]);
    assert!(faults[2].text.contains(&node.port().to_string()), "{}", faults[2]);
    let classes = [FaultClass::Outage, FaultClass::Outage, FaultClass::Config];
    assert_eq!(faults.map(|fault| fault.class), classes);
    rig.publish(outgoing(0, "", "list.q", message("m", b"x")));
    rig.publish(isolated(outgoing(1, "", "list.q", message("alone", b"x"))));
    for ticket in 0..2 {
        assert_eq!(rig.wait_outcome(ticket), Outcome::Confirmed);
    }
    // A connection that is lost, in a list where only its own broker works: found again without the slow retry of the refusal.
    node.ctl(&["close_all_connections", "maintenance"]);
    let fault = rig.wait_down();
    assert!(fault.class == FaultClass::Outage && fault.text.contains(&node.port().to_string()), "{fault}");
    let began = Instant::now();
    while rig.wait_down().class == FaultClass::Config {}
    rig.wait_up();
    assert!(began.elapsed() < Duration::from_secs(10), "up after {:?}", began.elapsed());
    rig.publisher.stop(Duration::from_secs(5));

    let (_folder, store) = open();
    let source = RabbitMqSource::with_brokers(&urls, "list.q").unwrap().allow_plaintext_credentials();
    let consumer = store.consumer("c").spawn(source, |_, _| Ok(())).unwrap();
    until("both deliveries", || consumer.status().applied == 2);
    consumer.stop(Duration::from_secs(5));
}

/// Goal: a broker behind a dead network costs its own connect deadline and no more, and the next one is used. Method: a listener that
/// never answers, before a broker.
#[test]
fn a_silent_broker_costs_its_own_deadline() {
    let node = RabbitNode::start();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let urls = [format!("amqp://127.0.0.1:{}", silent.local_addr().unwrap().port()), node.url()];
    let began = Instant::now();
    let mut rig = Rig::start(RabbitMq::with_brokers(&urls).unwrap());
    let fault = rig.wait_down();
    assert!(fault.text.contains("did not answer within 10 s"), "{fault}");
    rig.wait_up();
    assert!(began.elapsed() < Duration::from_secs(13), "up after {:?}", began.elapsed());
    rig.publisher.stop(Duration::from_secs(5));
}

const APPLIED: TableDefinition<'_, &str, u64> = TableDefinition::new("applied");

/// P3 to P6. Goal: two brokers that know nothing of each other: the one in use is killed, the relay goes on at the other; that one is killed,
/// and it goes back; nothing is lost, and consumers of both apply each event once. Method: writers go on throughout; a consumer per broker,
/// on one store; its table is the evidence.
#[test]
fn a_spare_broker_takes_over_and_gives_back() {
    let mut nodes = [RabbitNode::start(), RabbitNode::start()];
    let urls = nodes.each_ref().map(RabbitNode::url);
    let topology = || Topology::new().queue("spare.q");
    let (_folder, store) = open();
    let (_consumer_folder, credit) = open();
    let relay = store.relay("rabbit").attempts(1).spawn(rabbit(&urls).declare(topology())).unwrap();
    let consumers = urls.each_ref().map(|url| {
        let source = RabbitMqSource::new(url, "spare.q").unwrap().declare(topology());
        let source = source.reconnect_backoff(Duration::from_millis(100), Duration::from_millis(500));
        credit
            .consumer("credit")
            .spawn(source, |delivery, tx| {
                let text = String::from_utf8_lossy(&delivery.message.payload);
                let before = tx.open_table(APPLIED)?.insert(&*text, 1)?.map(|row| row.value());
                if before.is_some() { Err(onewrite::Error::reject("applied twice")) } else { Ok(()) }
            })
            .unwrap()
    });
    let writers = Writers::start(2, &store, "spare.q");
    for used in [0, 1] {
        let before = relay.status().confirmed;
        until("confirms", || relay.status().confirmed > before + 300);
        nodes[used].settle_declarations();
        nodes[used].kill9();
        let before = relay.status().confirmed;
        until("the other one takes over", || {
            relay.status().state == RelayState::Connected && relay.status().confirmed > before + 300
        });
        nodes[used].restart();
    }
    let count = writers.end().iter().sum::<u64>();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    let applied = || consumers.iter().map(|consumer| consumer.status().applied).sum::<u64>();
    until("all effects", || applied() >= count);
    for consumer in consumers {
        assert_eq!(consumer.stop(Duration::from_secs(10)).rejected, 0);
    }
    assert_eq!(credit.read().unwrap().open_table(APPLIED).unwrap().len().unwrap(), count);
    assert!(relay.stop(Duration::from_secs(10)).clean);
}

/// P3 to P5. Goal: a quorum queue on three nodes survives `kill -9` of its leader, twice, with nothing lost and each key in order by
/// first deliveries. Method: writers go on; all three nodes are in the list; the leader is asked of the cluster; the killed one comes back and
/// rejoins; at the end a plain client reads the queue, and every event that was confirmed must be there.
#[test]
fn a_quorum_queue_survives_its_leader() {
    let mut cluster = RabbitCluster::start(3);
    let urls = cluster.urls();
    let quorum = Topology::new().queue_with(
        "quorum.q",
        [("x-queue-type", "quorum".into()), ("x-quorum-initial-group-size", 3.into())],
    );
    let (_folder, store) = open();
    let relay = store.relay("rabbit").attempts(1).spawn(rabbit(&urls).declare(quorum)).unwrap();
    let writers = Writers::start(3, &store, "quorum.q");
    for _ in 0..2 {
        let before = relay.status().confirmed;
        until("confirms", || relay.status().confirmed > before + 500);
        let mut leader = None;
        until("a leader", || {
            leader = cluster.leader("quorum.q");
            leader.is_some()
        });
        let leader = leader.unwrap();
        cluster.nodes[leader].kill9();
        let before = relay.status().confirmed;
        until("confirms of a new leader", || relay.status().confirmed > before + 500);
        let new = cluster.leader("quorum.q");
        assert!(new.is_some_and(|new| new != leader), "led by {new:?} after {leader} was killed");
        cluster.nodes[leader].restart();
        until("all members are back", || cluster.online("quorum.q") == 3);
    }
    let written = writers.end();
    let count = written.iter().sum::<u64>();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    let status = relay.status();
    assert_eq!((status.confirmed, status.quarantined), (count, 0));
    assert!(relay.stop(Duration::from_secs(10)).clean);

    // One more dies; what two of three have is still all there.
    let leader = cluster.leader("quorum.q").expect("a leader");
    cluster.nodes[leader].kill9();
    until("a leader again", || cluster.leader("quorum.q").is_some_and(|new| new != leader));
    let survivor = (leader + 1) % 3;
    let raw = Tap::connect(&cluster.nodes[survivor].url()).drain("quorum.q");
    let mut seen = BTreeSet::new();
    let mut last: HashMap<String, u64> = HashMap::new();
    for raw in &raw {
        let text = String::from_utf8_lossy(&raw.body).into_owned();
        assert_eq!(raw.id(), text);
        let (key, number) = text.split_once(':').unwrap();
        let (key, number): (_, u64) = (key.to_owned(), number.parse().unwrap());
        if seen.insert(text)
            && let Some(before) = last.insert(key.clone(), number)
        {
            assert!(before < number, "{key}: {number} came first after {before}");
        }
    }
    let appended = (0..)
        .zip(&written)
        .flat_map(|(writer, count): (u64, _)| (0..*count).map(move |n| format!("{writer}.{}:{n}", n % 10)));
    let missing: Vec<_> = appended.filter(|text| !seen.contains(text)).collect();
    assert!(missing.is_empty(), "confirmed, and not in the queue: {missing:?}");
    assert_eq!(seen.len() as u64, count);
    let repeats = raw.len() - seen.len();
    assert!(repeats <= 4 * 512, "{repeats} repeats: more than the windows of four connections");
}
