//! Queues whose confirms never come, beside queues that are well: hung ones, and those at which the broker stops reading the channel.

use std::time::Duration;

use onewrite::broker::RabbitMq;
use onewrite::{Event, Relay, Store};

use crate::scratch::until_within;
use crate::support::rabbit::shared_node;
use crate::support::scripted_broker::{Script, ScriptedBroker};
use crate::support::tap::Tap;

const LIMIT: Duration = Duration::from_secs(120);

fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(LIMIT, what, holds);
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn append(store: &Store, queue: &str, count: usize) {
    let queue = queue.to_owned();
    store
        .write(move |tx| {
            (0..count).try_for_each(|n| tx.append(Event::bytes("t", n.to_string()).to("", &queue)).map(drop))
        })
        .unwrap();
}

fn relay(store: &Store, url: &str, deadline: Duration) -> Relay {
    let publisher = RabbitMq::new(url)
        .unwrap()
        .confirm_deadline(deadline)
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(200));
    store.relay("r").spawn(publisher).unwrap()
}

fn silent(relay: &Relay) -> Vec<String> {
    relay.status().suspended.into_iter().map(|suspended| suspended.routing_key).collect()
}

/// The story: one message for a queue whose process hangs held back the outcomes of a thousand for a queue that was well; at the
/// deadline all were unknown, and published again, for ever. Goal: the hung queue delays nobody, is shown by name, spends nothing
/// and heals by itself. Method: RabbitMQ with a queue whose process is suspended.
#[test]
fn a_hung_queue_delays_nobody_and_heals_by_itself() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("silence.sick", &[]);
    tap.queue("silence.well", &[]);
    let pid = |what: &str| {
        let name = "rabbit_misc:r(<<\"/\">>, queue, <<\"silence.sick\">>)";
        node.ctl(&[
            "eval",
            &format!("{{ok, Q}} = rabbit_amqqueue:lookup({name}), sys:{what}(amqqueue:get_pid(Q))."),
        ]);
    };
    pid("suspend");
    let (_folder, store) = store();
    append(&store, "silence.sick", 1);
    append(&store, "silence.well", 1000);
    let relay = relay(&store, &node.url(), Duration::from_secs(3));
    until("those for the other queue are confirmed", || relay.status().confirmed >= 999);
    until("the hung queue is shown", || silent(&relay) == ["silence.sick"]);
    append(&store, "silence.well", 1000);
    until("what comes later flows", || relay.status().confirmed >= 1999);
    let status = relay.status();
    assert_eq!(status.quarantined, 0);
    assert!(status.last_fault.unwrap().text.contains("no confirm within 3 s"));
    let copies = tap.drain("silence.well");
    assert!(copies.len() <= 2000 + 512, "one window is repeated at most: {} copies", copies.len());
    pid("resume");
    until("the queue has healed", || relay.status().confirmed == 2001 && silent(&relay).is_empty());
    relay.stop(Duration::from_secs(5));
    tap.delete_queue("silence.sick");
    tap.delete_queue("silence.well");
}

/// Goal: where the broker stops reading the channel at a message, as RabbitMQ 3.10 does for a quorum queue without a leader, each
/// such queue costs one deadline and one window, and no more. Method: a scripted server; two such queues, a window's worth for each,
/// and a thousand for a queue that is well; then they heal.
#[test]
fn a_queue_that_stops_its_channel_costs_one_window_once() {
    let sick = ["stall.a", "stall.b"];
    let script = Script { stalling: sick.map(str::to_owned).into(), ..Script::default() };
    let broker = ScriptedBroker::start(script);
    let (_folder, store) = store();
    for queue in sick {
        append(&store, queue, 200);
    }
    append(&store, "well", 1000);
    let relay = relay(&store, &broker.url(), Duration::from_millis(500));
    until("those for the queue that is well are confirmed", || relay.status().confirmed >= 1000);
    until("both are shown", || silent(&relay) == sick);
    let (copies, different) = broker.copies("well");
    assert_eq!(different, 1000);
    let detections = 3;
    assert!(copies <= 1000 + detections * 512, "{copies} copies of 1000");
    // From here on nobody is disturbed by them any more.
    let (connections, copies) = (relay.status().reconnects, broker.copies("well").0);
    for round in 1..=5 {
        append(&store, "well", 200);
        until("what comes later flows", || relay.status().confirmed >= 1000 + 200 * round);
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(relay.status().reconnects, connections);
    assert_eq!(broker.copies("well").0, copies + 1000, "nothing is repeated");
    assert_eq!(relay.status().quarantined, 0);
    broker.script(|script| script.stalling.clear());
    until("both have healed", || relay.status().confirmed == 2400 && silent(&relay).is_empty());
    relay.stop(Duration::from_secs(5));
}

/// Goal: silent queues do not take the window of the others. Method: a scripted server that confirms nothing for one queue; five
/// windows for it stand before those for a queue that is well, and the deadline is far away.
#[test]
fn a_silent_queue_takes_no_more_than_its_share_of_the_window() {
    let script = Script { silent: ["quiet".to_owned()].into(), ..Script::default() };
    let broker = ScriptedBroker::start(script);
    let (_folder, store) = store();
    append(&store, "quiet", 2500);
    append(&store, "well", 1000);
    let relay = relay(&store, &broker.url(), Duration::from_secs(600));
    until("those for the queue that is well are confirmed", || relay.status().confirmed >= 1000);
    assert_eq!(broker.copies("well"), (1000, 1000));
    assert!(broker.copies("quiet").0 <= 512);
    relay.stop(Duration::ZERO);
}
