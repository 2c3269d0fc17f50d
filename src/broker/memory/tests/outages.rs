//! Outages: a broker that is down, up again, blocked or hanging.

use super::*;

#[test]
fn an_outage_ends_every_epoch_and_keeps_the_queues() {
    let broker = broker();
    broker.script(Rule::any().skip(1).then(Verdict::HoldConfirm));
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    publishing.good(1, 2);
    broker.go_down();
    publishing.good(1, 3);
    publishing.send(1, 4, "x", "good", true);
    assert_eq!(publishing.reported(), ["up 1", "confirmed 1", "down 1 outage", "unknown 4 outage"]);
    broker.come_up();
    broker.release_confirms();
    publishing.good(2, 5);
    assert_eq!(publishing.reported(), ["up 2", "confirmed 5"]);
    assert_eq!(ids(&broker, "q"), ["1", "2", "5"]);
}

#[test]
fn a_publisher_that_starts_during_an_outage_connects_after_it() {
    let broker = broker();
    broker.go_down();
    let mut publishing = Publishing::on(&broker);
    assert_eq!(publishing.reported(), ["down 1 outage"]);
    broker.come_up();
    assert_eq!(publishing.reported(), ["up 2"]);
}

#[test]
fn what_is_published_while_blocked_is_read_afterwards_in_order() {
    let broker = broker();
    let mut publishing = Publishing::on(&broker);
    broker.block(true);
    publishing.good(1, 1);
    publishing.send(1, 2, "x", "bad", false);
    publishing.good(1, 3);
    let mut late = Publishing::on(&broker);
    assert_eq!(publishing.reported(), ["up 1", "blocked true"]);
    assert_eq!(late.reported(), ["up 1", "blocked true"]);
    assert_eq!(broker.queue_len("q"), 0);
    broker.block(false);
    assert_eq!(publishing.reported(), ["blocked false", "confirmed 1", "returned 2 312", "confirmed 3"]);
}

#[test]
fn what_is_published_while_blocked_is_lost_with_the_connection() {
    let broker = broker();
    let mut publishing = Publishing::on(&broker);
    broker.block(true);
    publishing.good(1, 1);
    publishing.send(1, 2, "x", "good", true);
    broker.go_down();
    broker.block(false);
    broker.come_up();
    assert_eq!(publishing.reported(), ["up 1", "blocked true", "down 1 outage", "unknown 2 outage", "up 2"]);
    assert_eq!(broker.queue_len("q"), 0);
}

#[test]
fn a_channel_that_closes_while_the_unread_is_read_drops_the_rest_of_it() {
    let broker = broker();
    let mut publishing = Publishing::on(&broker);
    broker.block(true);
    publishing.good(1, 1);
    publishing.send(1, 2, "nowhere", "", false);
    publishing.good(1, 3);
    publishing.send(1, 4, "x", "good", true);
    broker.block(false);
    assert_eq!(
        publishing.reported(),
        ["up 1", "blocked true", "blocked false", "confirmed 1", "down 1 404", "up 2", "confirmed 4"]
    );
    assert_eq!(ids(&broker, "q"), ["1", "4"]);
}

#[test]
fn a_hanging_broker_takes_and_says_nothing() {
    let broker = broker();
    let mut publishing = Publishing::with(broker.publisher().confirm_deadline(Duration::from_millis(300)));
    broker.hang(true);
    publishing.good(1, 1);
    broker.hang(false);
    assert_eq!(ids(&broker, "q"), ["1"]);
    assert_eq!(publishing.reported(), ["up 1"]);
    assert_eq!(publishing.next(), "silent 1 outage");
    assert_eq!(publishing.next(), "down 1 outage");
    assert_eq!(publishing.next(), "up 2");
}

#[test]
fn the_helper_thread_ends_with_the_broker() {
    let broker = broker();
    broker.script(Rule::any().then(Verdict::DelayConfirm(Duration::from_secs(3600))));
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    let thread = broker.0.state().timer.thread.take().expect("a thread was started");
    let shared = Arc::downgrade(&broker.0);
    drop((broker, publishing));
    assert_eq!(shared.strong_count(), 0, "the thread does not keep the broker alive");
    let started = std::time::Instant::now();
    while !thread.is_finished() {
        assert!(started.elapsed() < SOON);
        std::thread::yield_now();
    }
}
