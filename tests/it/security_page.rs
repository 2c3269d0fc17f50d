//! The page on security gives commands for a RabbitMQ with the least rights. They are run as they stand there.

use std::time::Duration;

use lapin::ExchangeKind;
use onewrite::broker::{RabbitMq, RabbitMqSource};
use onewrite::{ConfirmError, Event, Fault, FaultClass, Store};

use crate::lanes_inbox::{SOON, until};
use crate::support::rabbit::RabbitNode;
use crate::support::tap::Tap;

/// The arguments of each `rabbitmqctl` on the page, as a shell would split them.
fn commands() -> Vec<Vec<String>> {
    let page = include_str!("../../src/security.rs");
    let lines =
        page.lines().filter_map(|line| line.trim_start_matches("//!").trim().strip_prefix("rabbitmqctl "));
    let word = |word: &str| match word.trim_matches(['\'', '"']) {
        "$BANK_PASSWORD" => "bank-secret".to_owned(),
        "$CREDIT_PASSWORD" => "credit-secret".to_owned(),
        word => word.to_owned(),
    };
    lines.map(|line| line.split_whitespace().map(word).collect()).collect()
}

fn publish(store: &Store, url: &str, to: (&'static str, &'static str)) -> Result<(), Fault> {
    let relay = store.relay("rabbit").destination_attempts(1).spawn(RabbitMq::new(url).unwrap()).unwrap();
    let event = move |tx: &onewrite::Transaction| tx.append(Event::bytes("paid", "100").to(to.0, to.1));
    let said = match store.write(event).unwrap().wait_confirmed(SOON) {
        Ok(()) => Ok(()),
        Err(ConfirmError::Quarantined { fault, .. }) => Err(fault),
        Err(error) => panic!("{error}"),
    };
    let _ = relay.stop(SOON);
    said
}

/// Goal: the commands are enough for a service that publishes and one that consumes, and for no more. Method: run them against a broker
/// of its own, with an operator's topology. Publish and consume; then try what the commands do
/// not allow: another exchange, a queue by name, another routing key, a consumer that publishes, a publisher that consumes.
#[test]
fn the_commands_of_the_page_give_the_least_rights() {
    let node = RabbitNode::start();
    node.ctl(&["add_user", "operator", "operator-secret"]);
    let commands = commands();
    assert!(commands.len() > 5, "{commands:?}");
    let (first, others) = commands.split_first().unwrap();
    assert_eq!(first[0], "add_vhost");
    let run = |command: &[String]| node.ctl(&command.iter().map(String::as_str).collect::<Vec<_>>());
    run(first);
    node.ctl(&["set_permissions", "-p", "money", "operator", ".*", ".*", ".*"]);
    let operator = Tap::connect(&node.url_as("operator", "operator-secret", "money"));
    operator.exchange("payments", ExchangeKind::Topic);
    operator.exchange("other", ExchangeKind::Topic);
    operator.queue("credit", &[]);
    operator.bind("credit", "payments", "#");
    others.iter().for_each(|command| drop(run(command)));

    let (bank, credit) =
        (node.url_as("bank", "bank-secret", "money"), node.url_as("credit", "credit-secret", "money"));
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| Store::open(folder.path().join(name)).unwrap();
    publish(&open("bank.redb"), &bank, ("payments", "paid")).unwrap();
    let store = open("credit.redb");
    let consumer = store
        .consumer("credit")
        .spawn(RabbitMqSource::new(&credit, "credit").unwrap(), |_, _| Ok(()))
        .unwrap();
    until("the event is applied", || consumer.status().applied == 1);
    consumer.stop(SOON);

    for (who, to) in [
        (&bank, ("other", "paid")),
        (&bank, ("", "credit")),
        (&bank, ("payments", "refunded")),
        (&credit, ("payments", "paid")),
    ] {
        let forbidden = tempfile::tempdir().unwrap();
        let store = Store::open(forbidden.path().join("a.redb")).unwrap();
        let fault = publish(&store, who, to).unwrap_err();
        assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(403)), "{to:?}: {fault}");
    }
    let consumer =
        store.consumer("credit").spawn(RabbitMqSource::new(&bank, "credit").unwrap(), |_, _| Ok(())).unwrap();
    until("it is refused", || consumer.status().disconnected.is_some());
    let fault = consumer.status().disconnected.unwrap();
    assert_eq!(fault.code, Some(403), "{fault}");
    consumer.stop(Duration::from_secs(5));
    assert!(Tap::try_connect(&node.url()).is_err(), "guest is still there");
}
