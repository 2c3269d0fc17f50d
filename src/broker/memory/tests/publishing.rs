//! RabbitMQ's answers to a publish.

use super::*;

#[test]
fn a_routed_message_is_stored_and_confirmed() {
    let broker = broker();
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 7);
    publishing.send(1, 8, "", "q", false);
    assert_eq!(publishing.reported(), ["up 1", "confirmed 7", "confirmed 8"]);
    assert_eq!(ids(&broker, "q"), ["7", "8"]);
    assert_eq!(broker.published(), 2);
    let tap = broker.tap();
    assert_eq!((&*tap[0].exchange, &*tap[0].routing_key, tap[0].epoch), ("x", "good", Epoch(1)));
}

#[test]
fn direct_and_fanout_route_as_their_names_say() {
    let broker = broker();
    broker.declare_exchange("direct", ExchangeKind::Direct);
    broker.declare_exchange("fanout", ExchangeKind::Fanout);
    for queue in ["a", "b"] {
        broker.declare_queue(queue, QueueOptions::default());
        broker.bind(queue, "direct", queue).unwrap();
        broker.bind(queue, "fanout", "").unwrap();
    }
    broker.publish("direct", "a", message("1")).unwrap();
    broker.publish("fanout", "whatever", message("2")).unwrap();
    assert_eq!(ids(&broker, "a"), ["1", "2"]);
    assert_eq!(ids(&broker, "b"), ["2"]);
    assert!(broker.delete_exchange("fanout"));
    assert_eq!(broker.publish("fanout", "", message("3")).unwrap_err().code, Some(404));
}

#[test]
fn an_unroutable_message_comes_back_and_is_not_confirmed() {
    let broker = broker();
    let mut publishing = Publishing::on(&broker);
    publishing.send(1, 1, "x", "bad", false);
    publishing.send(1, 2, "", "nobody", true);
    assert_eq!(publishing.reported(), ["up 1", "returned 1 312", "returned 2 312"]);
    assert_eq!(broker.published(), 0);
}

#[test]
fn a_missing_exchange_takes_the_window_with_it() {
    let broker = broker();
    broker.script(Rule::any().times(2).then(Verdict::HoldConfirm));
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    publishing.good(1, 2);
    publishing.send(1, 3, "nowhere", "good", false);
    publishing.good(1, 4);
    assert_eq!(publishing.reported(), ["up 1", "down 1 404", "up 2"]);
    broker.release_confirms();
    assert!(publishing.reported().is_empty(), "nothing is reported for an epoch that is over");
    assert_eq!(ids(&broker, "q"), ["1", "2"], "they are stored all the same");
}

#[test]
fn an_isolated_message_is_judged_alone() {
    let broker = broker();
    broker.script(Rule::any().then(Verdict::HoldConfirm));
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    publishing.send(1, 2, "nowhere", "good", true);
    broker.release_confirms();
    assert_eq!(publishing.reported(), ["up 1", "refused 2 404", "confirmed 1"]);
}

#[test]
fn a_full_queue_rejects_or_drops_its_head() {
    let broker = broker();
    let full = QueueOptions::default().max_length(2);
    broker.declare_queue("q", full.clone().overflow(Overflow::RejectPublish));
    broker.declare_queue("other", QueueOptions::default());
    broker.bind("other", "x", "good").unwrap();
    let mut publishing = Publishing::on(&broker);
    (1..=3).for_each(|n| publishing.good(1, n));
    assert_eq!(publishing.reported(), ["up 1", "confirmed 1", "confirmed 2", "nacked 3"]);
    assert_eq!(ids(&broker, "q"), ["1", "2"]);
    assert_eq!(ids(&broker, "other"), ["1", "2", "3"], "a nack does not mean that nobody has it");

    broker.declare_queue("q", full.overflow(Overflow::DropHead));
    publishing.good(1, 4);
    assert_eq!(publishing.reported(), ["confirmed 4"]);
    assert_eq!(ids(&broker, "q"), ["2", "4"]);
}

#[test]
fn two_full_queues_that_dead_letter_to_each_other_come_to_rest() {
    let broker = MemoryBroker::new();
    broker.declare_queue("a", QueueOptions::default().max_length(1).dead_letter("", "b"));
    broker.declare_queue("b", QueueOptions::default().max_length(1).dead_letter("", "a"));
    for n in 0..5 {
        broker.publish("", "a", message(&n.to_string())).unwrap();
    }
    assert_eq!((broker.queue_len("a"), broker.queue_len("b")), (1, 1));
}

#[test]
fn publishers_have_epochs_of_their_own() {
    let broker = broker();
    let (mut one, mut two) = (Publishing::on(&broker), Publishing::on(&broker));
    one.send(1, 1, "nowhere", "", false);
    one.good(2, 2);
    two.good(1, 3);
    assert_eq!(one.reported(), ["up 1", "down 1 404", "up 2", "confirmed 2"]);
    assert_eq!(two.reported(), ["up 1", "confirmed 3"]);
    assert_eq!(ids(&broker, "q"), ["2", "3"]);
}

#[test]
fn a_stopped_publisher_is_notified_of_the_end_and_then_nothing() {
    let broker = broker();
    let mut publishing = Publishing::on(&broker);
    publishing.publisher.stop(Duration::ZERO);
    publishing.good(1, 1);
    broker.go_down();
    broker.come_up();
    assert_eq!(publishing.reported(), ["up 1", "down 1 outage"]);
    assert_eq!(broker.queue_len("q"), 0);
}
