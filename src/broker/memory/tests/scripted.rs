//! The script: every verdict, and which publishes a rule matches.

use super::*;

#[test]
fn a_rule_takes_the_publishes_it_names_and_no_more() {
    let broker = broker();
    broker.script(Rule::matching(|m| m.routing_key == "good.b").skip(1).times(2).then(Verdict::Nack));
    let mut publishing = Publishing::on(&broker);
    for (n, key) in (1..).zip(["good.b", "good.a", "good.b", "good.b", "good.b"]) {
        publishing.send(1, n, "x", key, false);
    }
    assert_eq!(
        publishing.reported(),
        ["up 1", "confirmed 1", "confirmed 2", "nacked 3", "nacked 4", "confirmed 5"]
    );
    assert_eq!(ids(&broker, "q"), ["1", "2", "5"], "what a rule nacks is not stored");
    assert_eq!(broker.script_left(), 0);
}

#[test]
fn the_first_rule_that_is_not_used_up_decides() {
    let broker = broker();
    broker.script(Rule::any().then(Verdict::Confirm));
    broker.script(Rule::any().then(Verdict::no_route()));
    broker.script(Rule::any().always().then(Verdict::Nack));
    let mut publishing = Publishing::on(&broker);
    (1..=4).for_each(|n| publishing.good(1, n));
    broker.clear_script();
    publishing.good(1, 5);
    assert_eq!(
        publishing.reported(),
        ["up 1", "confirmed 1", "returned 2 312", "nacked 3", "nacked 4", "confirmed 5"]
    );
}

#[test]
fn a_message_of_an_epoch_that_is_over_uses_up_no_rule() {
    let broker = broker();
    broker.script(Rule::any().then(Verdict::Nack));
    let mut publishing = Publishing::on(&broker);
    publishing.good(0, 1);
    publishing.good(1, 2);
    assert_eq!(publishing.reported(), ["up 1", "nacked 2"]);
}

#[test]
fn a_ghost_is_stored_although_its_connection_is_lost() {
    let broker = broker();
    broker.script(Rule::any().then(Verdict::Unknown));
    broker.script(Rule::any().then(Verdict::Disconnect));
    broker.script(Rule::any().then(Verdict::Unknown));
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    publishing.good(2, 2);
    publishing.send(3, 3, "x", "good", true);
    assert_eq!(
        publishing.reported(),
        ["up 1", "down 1 outage", "up 2", "down 2 outage", "up 3", "unknown 3 outage"]
    );
    assert_eq!(ids(&broker, "q"), ["1", "3"], "the second was lost before it arrived");
}

#[test]
fn a_closed_channel_says_whose_fault_it_was() {
    let broker = broker();
    let too_large = || Verdict::close_channel(FaultClass::Message, 406, "PRECONDITION_FAILED");
    broker.script(Rule::any().times(2).then(too_large()));
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    publishing.send(2, 2, "x", "good", true);
    publishing.good(2, 3);
    assert_eq!(publishing.reported(), ["up 1", "down 1 406", "up 2", "refused 2 406", "confirmed 3"]);
    assert_eq!(ids(&broker, "q"), ["3"]);
}

#[test]
fn a_lost_confirm_is_silence_and_ends_the_connection_only_where_nothing_says_that_it_lives() {
    let broker = broker();
    broker.script(Rule::any().times(2).then(Verdict::LoseConfirm));
    let publisher = broker.publisher().confirm_deadline(Duration::from_millis(300));
    let mut publishing = Publishing::with(publisher);
    publishing.send(1, 1, "x", "good", true);
    publishing.good(1, 2);
    publishing.good(1, 3);
    assert_eq!(publishing.reported(), ["up 1", "confirmed 3"]);
    assert_eq!(publishing.next(), "silent 1 outage");
    assert_eq!(publishing.next(), "silent 2 outage", "a younger one has its word: the connection lives");
    broker.script(Rule::any().then(Verdict::LoseConfirm));
    publishing.good(1, 4);
    assert_eq!(publishing.next(), "silent 4 outage");
    assert_eq!(publishing.next(), "down 1 outage", "no younger one has a word");
    assert_eq!(publishing.next(), "up 2");
    assert_eq!(ids(&broker, "q"), ["1", "2", "3", "4"]);
}

#[test]
fn confirms_come_late_and_out_of_order() {
    let broker = broker();
    broker.0.state().out_of_order_wait = SOON;
    broker.script(Rule::any().then(Verdict::DelayConfirm(Duration::from_millis(300))));
    broker.script(Rule::any().then(Verdict::ConfirmOutOfOrder));
    broker.script(Rule::any().skip(1).then(Verdict::ConfirmOutOfOrder));
    let mut publishing = Publishing::on(&broker);
    (1..=3).for_each(|n| publishing.good(1, n));
    let reported: Vec<_> = (0..4).map(|_| publishing.next()).collect();
    assert_eq!(reported, ["up 1", "confirmed 3", "confirmed 2", "confirmed 1"]);
    broker.0.state().out_of_order_wait = Duration::from_millis(1);
    publishing.good(1, 4);
    assert_eq!(publishing.next(), "confirmed 4", "with nothing to come after, it comes by itself");
}

#[test]
fn a_test_lets_go_of_held_confirms_as_it_likes() {
    let broker = broker();
    broker.script(Rule::any().always().then(Verdict::HoldConfirm));
    let mut publishing = Publishing::on(&broker);
    (1..=3).for_each(|n| publishing.good(1, n));
    assert_eq!(publishing.reported(), ["up 1"]);
    broker.release_confirms_reversed();
    assert_eq!(publishing.reported(), ["confirmed 3", "confirmed 2", "confirmed 1"]);
    publishing.good(1, 4);
    publishing.send(1, 5, "x", "bad", false);
    broker.release_confirms();
    assert_eq!(publishing.reported(), ["confirmed 4", "returned 5 312"]);
}

#[test]
fn a_rule_may_look_at_the_broker_and_may_panic() {
    let broker = broker();
    let seen = broker.clone();
    broker.script(
        Rule::matching(move |_| seen.queue_len("q") == 1 && panic!("on purpose")).then(Verdict::Nack),
    );
    let mut publishing = Publishing::on(&broker);
    publishing.good(1, 1);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| publishing.good(1, 2)));
    assert!(panicked.is_err());
    broker.clear_script();
    publishing.good(1, 3);
    assert_eq!(publishing.reported(), ["up 1", "confirmed 1", "confirmed 3"]);
}
