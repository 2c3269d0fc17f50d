//! Deliveries: prefetch, round robin, and requeueing.

use super::*;

/// A broker whose queue `q` holds messages `1..=n`.
fn filled(n: u64) -> MemoryBroker {
    let broker = broker();
    (1..=n).for_each(|n| broker.publish("", "q", message(&n.to_string())).unwrap());
    broker
}

fn tags(deliveries: &[Delivery]) -> Vec<DeliveryTag> {
    deliveries.iter().map(|delivery| delivery.tag).collect()
}

#[test]
fn never_more_than_the_prefetch_is_out() {
    let broker = filled(5);
    let mut consuming = Consuming::on(&broker, "q", 2);
    let (reported, first) = consuming.take();
    assert_eq!(reported, ["up 1", "1", "2"]);
    broker.publish("", "q", message("6")).unwrap();
    assert!(consuming.reported().is_empty());
    consuming.settle(&tags(&first)[..1], Settlement::Acknowledge);
    assert_eq!(consuming.reported(), ["3"]);
    assert_eq!((broker.unsettled_len("q"), broker.queue_len("q")), (2, 3));
}

#[test]
fn what_is_requeued_comes_again_in_its_old_place() {
    let broker = filled(5);
    let mut consuming = Consuming::on(&broker, "q", 3);
    let out = tags(&consuming.deliveries());
    // Out of order on purpose: position orders the queue, not the time of return.
    consuming.settle(&[out[2], out[0]], Settlement::Requeue);
    assert_eq!(consuming.reported(), ["1 again", "3 again"]);
    assert_eq!(ids(&broker, "q"), ["4", "5"]);
}

#[test]
fn an_outage_redelivers_what_was_unsettled() {
    let broker = filled(4);
    let mut consuming = Consuming::on(&broker, "q", 3);
    let out = tags(&consuming.deliveries());
    consuming.settle(&out[..1], Settlement::Acknowledge);
    broker.go_down();
    assert_eq!(ids(&broker, "q"), ["2", "3", "4"]);
    consuming.settle(&out[1..2], Settlement::Acknowledge);
    assert_eq!(consuming.reported(), ["4", "down 1 outage"]);
    broker.come_up();
    consuming.settle(&out[2..], Settlement::Acknowledge);
    assert_eq!(
        consuming.reported(),
        ["up 2", "2 again", "3 again", "4 again"],
        "a settlement of the past is dropped"
    );
    assert_eq!(broker.unsettled_len("q"), 3);
}

#[test]
fn a_rejected_message_goes_to_the_dead_letter_queue_or_is_gone() {
    let broker = filled(1);
    broker.declare_queue("dead", QueueOptions::default());
    let mut consuming = Consuming::on(&broker, "q", 1);
    consuming.settle(&tags(&consuming.deliveries()), Settlement::Reject);
    assert_eq!((broker.queue_len("q"), broker.unsettled_len("q")), (0, 0));

    broker.declare_queue("q", QueueOptions::default().dead_letter("", "dead"));
    broker.publish("", "q", message("2")).unwrap();
    consuming.settle(&tags(&consuming.deliveries()), Settlement::Reject);
    assert_eq!(ids(&broker, "dead"), ["2"]);
    let dead = &broker.messages("dead")[0];
    assert_eq!((&*dead.exchange, &*dead.routing_key, dead.redelivered), ("", "dead", false));
}

#[test]
fn consumers_of_one_queue_take_turns() {
    let broker = filled(0);
    let (one, two) = (Consuming::on(&broker, "q", 10), Consuming::on(&broker, "q", 1));
    (1..=4).for_each(|n| broker.publish("", "q", message(&n.to_string())).unwrap());
    assert_eq!(one.reported(), ["up 1", "1", "3", "4"]);
    assert_eq!(two.reported(), ["up 1", "2"], "one that is full is passed over");
}

#[test]
fn what_a_stopped_consumer_left_goes_to_the_other() {
    let broker = filled(2);
    let one = Consuming::on(&broker, "q", 10);
    let two = Consuming::on(&broker, "q", 10);
    assert_eq!(two.reported(), ["up 1"]);
    drop(one);
    assert_eq!(two.reported(), ["1 again", "2 again"]);
}

#[test]
fn a_consumer_that_nobody_listens_to_loses_nothing() {
    let broker = filled(2);
    let Consuming { source, events } = Consuming::on(&broker, "q", 1);
    drop(events);
    broker.publish("", "q", message("3")).unwrap();
    drop(source);
    assert_eq!(ids(&broker, "q"), ["1", "2", "3"]);
}

#[test]
fn settling_twice_closes_the_channel() {
    let broker = filled(2);
    let mut consuming = Consuming::on(&broker, "q", 1);
    let out = tags(&consuming.deliveries());
    consuming.settle(&[out[0], out[0]], Settlement::Acknowledge);
    assert_eq!(consuming.reported(), ["down 1 406", "up 2", "2"]);
}

#[test]
fn a_missing_queue_is_waited_for() {
    let broker = broker();
    let consuming = Consuming::on(&broker, "later", 1);
    assert_eq!(consuming.reported(), ["down 1 404"]);
    broker.declare_queue("later", QueueOptions::default());
    assert_eq!(consuming.reported(), ["up 2"]);
}

#[test]
fn a_prefetch_of_nothing_is_refused() {
    let (sender, _events) = SourceEvents::channel();
    let error = broker().source("q").start(sender, 0).unwrap_err();
    assert_eq!(error.setting, "prefetch");
}

#[test]
fn a_full_queue_drops_nothing_that_a_consumer_takes_at_once() {
    let broker = broker();
    broker.declare_queue("q", QueueOptions::default().max_length(0));
    let consuming = Consuming::on(&broker, "q", 1);
    (1..=2).for_each(|n| broker.publish("", "q", message(&n.to_string())).unwrap());
    assert_eq!(consuming.reported(), ["up 1", "1"]);
    assert_eq!(broker.queue_len("q"), 0);
}
