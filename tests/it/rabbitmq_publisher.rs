//! `RabbitMq` against a real broker, at the `Publisher` seam: what is reported of each ticket is judged by what really is
//! in the queues.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use lapin::ExchangeKind as Kind;
use lapin::types::AMQPValue;
use onewrite::broker::{Epoch, ExchangeKind, Publisher, PublisherEvent, PublisherEvents, RabbitMq, Topology};
use onewrite::{FaultClass, HeaderValue, Message, Outcome, Outgoing, Ticket};

use crate::support::fake_broker::FakeBroker;
use crate::support::rabbit::{MESSAGE_BYTES_MAX, RabbitNode, free_port, shared_node};
use crate::support::rig::{Rig, SOON, isolated, message, outgoing};
use crate::support::tap::Tap;

/// Goal: what is confirmed lies in the queue, byte for byte, in order, with every property and header.
/// Method: publish 2,000 messages of all shapes, payloads of 0 bytes to 300 KiB; read back with a plain client.
#[test]
fn what_is_confirmed_is_in_the_queue_as_it_was_sent() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.exchange("exact", Kind::Topic);
    tap.queue("exact.q", &[]);
    tap.bind("exact.q", "exact", "a.#");
    let mut rig = Rig::up(&node.url());
    let count = 2000;
    let shape = |n: u64| Message {
        message_id: Some(format!("exact-{n}").into()),
        event_type: Some("payment.completed".into()),
        content_type: Some("application/json".into()),
        correlation_id: n.is_multiple_of(2).then(|| format!("c-{n}").into()),
        app_id: Some("é".into()),
        timestamp_s: Some(1_700_000_000 + n),
        headers: vec![
            ("text".into(), "grüße".into()),
            ("int".into(), (n as i64).wrapping_neg().into()),
            ("bool".into(), n.is_multiple_of(3).into()),
            ("bytes".into(), HeaderValue::Bytes(vec![0, 255, n as u8])),
        ],
        payload: vec![n as u8; if n.is_multiple_of(500) { 300 << 10 } else { (n % 97) as usize }],
        ..Message::default()
    };
    for n in 0..count {
        rig.publish(outgoing(n, "exact", "a.b", shape(n)));
    }
    // Confirms come in any order.
    (0..count).for_each(|n| drop(rig.wait_outcome(n)));
    assert_eq!(rig.outcomes.len() as u64, count);
    assert!(rig.outcomes.values().all(|outcome| *outcome == Outcome::Confirmed));
    let raw = tap.drain("exact.q");
    assert_eq!(raw.len() as u64, count);
    for (n, raw) in (0..).zip(&raw) {
        let sent = shape(n);
        assert_eq!(
            (raw.exchange.as_str(), raw.routing_key.as_str(), &raw.body),
            ("exact", "a.b", &sent.payload)
        );
        let p = &raw.properties;
        let text =
            |field: &Option<lapin::types::ShortString>| field.as_ref().map(|text| text.as_str().into());
        assert_eq!(*p.delivery_mode(), Some(2));
        assert_eq!(text(p.message_id()), sent.message_id);
        assert_eq!(text(p.kind()), sent.event_type);
        assert_eq!(text(p.content_type()), sent.content_type);
        assert_eq!(text(p.correlation_id()), sent.correlation_id);
        assert_eq!(text(p.app_id()), sent.app_id);
        assert_eq!(*p.timestamp(), sent.timestamp_s);
        let headers = p.headers().as_ref().expect("headers");
        let header = |name: &str| headers.inner().get(name).expect(name);
        assert_eq!(*header("text"), AMQPValue::LongString("grüße".into()));
        assert_eq!(*header("int"), AMQPValue::LongLongInt((n as i64).wrapping_neg()));
        assert_eq!(*header("bool"), AMQPValue::Boolean(n.is_multiple_of(3)));
        assert_eq!(*header("bytes"), AMQPValue::ByteArray(vec![0, 255, n as u8].into()));
    }
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: no returned or nacked message is ever reported as confirmed, though lapin mixes returns up.
/// Method: 100,000 messages over a window of 512; a tenth to nowhere, some to a queue that takes 200 and refuses the
/// rest; then read both queues and judge every single outcome by what is in them. It fails when the confirm that
/// carries a return is trusted (tried). That settling waits for the prefix is held by the property test in `settle.rs`:
/// here, the moment in which it matters is microseconds long.
#[test]
fn every_outcome_is_the_brokers_real_one() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("real.q", &[]);
    tap.queue(
        "real.full",
        &[
            ("x-max-length", AMQPValue::LongInt(200)),
            ("x-overflow", AMQPValue::LongString("reject-publish".into())),
        ],
    );
    let mut rig = Rig::up(&node.url());
    let (count, window) = (100_000_u64, 512);
    let route = |n: u64| match n % 20 {
        3 | 11 => "real.nowhere",
        7 => "real.full",
        _ => "real.q",
    };
    let mut sent = 0;
    while (rig.outcomes.len() as u64) < count {
        while sent < count && sent - (rig.outcomes.len() as u64) < window {
            rig.publish(outgoing(sent, "", route(sent), message(&format!("real-{sent}"), b"x")));
            sent += 1;
        }
        match rig.next(SOON) {
            Some(PublisherEvent::Outcomes(_)) => {}
            other => panic!("{other:?} after {} outcomes", rig.outcomes.len()),
        }
    }
    let ids = |queue: &str| -> HashSet<String> {
        let raw = tap.drain(queue);
        let ids: HashSet<_> = raw.iter().map(|raw| raw.id().to_owned()).collect();
        assert_eq!(ids.len(), raw.len(), "no id twice in {queue}");
        ids
    };
    let (queued, full) = (ids("real.q"), ids("real.full"));
    let mut tally: HashMap<&str, u64> = HashMap::new();
    for (n, outcome) in &rig.outcomes {
        let id = format!("real-{n}");
        let expected = match route(*n) {
            "real.nowhere" => "returned",
            "real.full" if !full.contains(&id) => "nacked",
            _ => "confirmed",
        };
        let reported = match outcome {
            Outcome::Confirmed => "confirmed",
            Outcome::Nacked => "nacked",
            Outcome::Returned(fault) => {
                assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(312)));
                "returned"
            }
            other => panic!("{id}: {other:?}"),
        };
        assert_eq!(reported, expected, "{id}");
        assert_eq!(reported == "confirmed", queued.contains(&id) || full.contains(&id), "{id}");
        *tally.entry(reported).or_default() += 1;
    }
    assert_eq!(tally, HashMap::from([("returned", 10_000), ("confirmed", 85_200), ("nacked", 4_800)]));
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: a missing exchange takes the connection down as a destination fault, and isolation finds the poison message without
/// disturbing the others. Method: one of ten messages to a missing exchange; then all again, isolated, while the
/// window goes on.
#[test]
fn a_missing_exchange_is_found_in_isolation() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("iso.q", &[]);
    let mut rig = Rig::up(&node.url());
    let suspect = |n: u64| {
        let exchange = if n % 10 == 4 { "iso.missing" } else { "" };
        outgoing(n, exchange, "iso.q", message(&format!("iso-{n}"), b"x"))
    };
    for n in 0..10 {
        rig.publish(suspect(n));
    }
    let fault = rig.wait_down();
    assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(404)), "{fault}");
    assert!(fault.text.contains("iso.missing"), "{fault}");
    let before = rig.outcomes.len();
    assert!(rig.outcomes.values().all(|outcome| *outcome == Outcome::Confirmed), "{:?}", rig.outcomes);
    rig.wait_up();
    for n in 10..20 {
        rig.publish(isolated(suspect(n)));
    }
    rig.publish(isolated(outgoing(20, "", "iso.nowhere", message("iso-20", b"x"))));
    rig.publish(outgoing(21, "", "iso.q", message("iso-21", b"x")));
    for n in 10..22 {
        let outcome = rig.wait_outcome(n);
        match n {
            14 => assert!(
                matches!(&outcome, Outcome::Refused(fault) if fault.class == FaultClass::Destination && fault.code == Some(404)),
                "{outcome:?}"
            ),
            20 => assert!(
                matches!(&outcome, Outcome::Returned(fault) if fault.code == Some(312)),
                "{outcome:?}"
            ),
            _ => assert_eq!(outcome, Outcome::Confirmed, "{n}"),
        }
    }
    assert_eq!(rig.epoch, Epoch(2), "the window's connection was left alone");
    assert_eq!(rig.outcomes.len(), before + 12);
    let ids: HashSet<_> = tap.drain("iso.q").iter().map(|raw| raw.id().to_owned()).collect();
    assert!((10..20).filter(|n| *n != 14).all(|n| ids.contains(&format!("iso-{n}"))));
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: what AMQP cannot carry is refused by name, costs the others nothing and never panics. Method: one bad field at
/// a time in the window and isolated, a good message after each; headers beyond a frame; no message id.
#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("short.q", &[]);
    let mut rig = Rig::up(&node.url());
    let long = "x".repeat(256);
    let bad: Vec<(&str, Outgoing)> = vec![
        ("exchange", outgoing(0, &long, "short.q", message("a", b""))),
        ("routing_key", outgoing(1, "", &long, message("a", b""))),
        ("message_id", outgoing(2, "", "short.q", message(&long, b""))),
        (
            "type",
            outgoing(
                3,
                "",
                "short.q",
                Message { event_type: Some(long.as_str().into()), ..message("a", b"") },
            ),
        ),
        (
            "header",
            outgoing(
                4,
                "",
                "short.q",
                Message { headers: vec![(long.clone().into(), 1.into())], ..message("a", b"") },
            ),
        ),
        (
            "headers",
            outgoing(
                5,
                "",
                "short.q",
                Message { headers: vec![("h".into(), "y".repeat(131_072).into())], ..message("a", b"") },
            ),
        ),
        ("message_id", outgoing(6, "", "short.q", Message { message_id: None, ..message("a", b"") })),
    ];
    let count = bad.len() as u64;
    for (field, outgoing) in bad {
        let ticket = outgoing.ticket.0;
        rig.publish(outgoing.clone());
        let mut again = isolated(outgoing);
        again.ticket = Ticket(100 + ticket);
        rig.publish(again);
        for ticket in [ticket, 100 + ticket] {
            match rig.wait_outcome(ticket) {
                Outcome::Refused(fault) => {
                    assert_eq!(fault.class, FaultClass::Message);
                    assert!(fault.text.contains(field) && !fault.text.contains(&long), "{fault}");
                }
                other => panic!("{field}: {other:?}"),
            }
        }
    }
    rig.publish(outgoing(200, "", "short.q", message("good", b"")));
    assert_eq!(rig.wait_outcome(200), Outcome::Confirmed);
    assert_eq!(rig.epoch, Epoch(1));
    assert_eq!(rig.outcomes.len() as u64, 2 * count + 1);
    assert_eq!(tap.drain("short.q").len(), 1);
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: what the broker refuses for its size or content is a message fault, in the window and in isolation, and the
/// next message goes through. Method: a body beyond the broker's limit; a `CC` header that is not a list.
#[test]
fn what_the_broker_refuses_for_its_content_is_a_message_fault() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("content.q", &[]);
    let mut rig = Rig::up(&node.url());
    let poisons = [
        message("large", &vec![b'x'; MESSAGE_BYTES_MAX + 1]),
        Message { headers: vec![("CC".into(), 1.into())], ..message("odd", b"x") },
    ];
    for (ticket, poison) in (0..).step_by(10).zip(poisons) {
        rig.publish(outgoing(ticket, "", "content.q", poison.clone()));
        let fault = rig.wait_down();
        assert_eq!((fault.class, fault.code), (FaultClass::Message, Some(406)), "{fault}");
        rig.wait_up();
        rig.publish(isolated(outgoing(ticket + 1, "", "content.q", poison)));
        rig.publish(isolated(outgoing(ticket + 2, "", "content.q", message("good", b"x"))));
        let outcome = rig.wait_outcome(ticket + 1);
        assert!(
            matches!(&outcome, Outcome::Refused(fault) if fault.class == FaultClass::Message),
            "{outcome:?}"
        );
        assert_eq!(rig.wait_outcome(ticket + 2), Outcome::Confirmed);
        assert!(!rig.outcomes.contains_key(&ticket), "after Down no ticket of that epoch is reported");
    }
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: a message of an epoch that is over is dropped without a word. Method: publish under epochs that are not.
#[test]
fn a_message_of_another_epoch_is_dropped() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("stale.q", &[]);
    let mut rig = Rig::up(&node.url());
    rig.publisher.publish(Epoch(7), outgoing(0, "", "stale.q", message("stale", b"")));
    rig.publisher.publish(Epoch(0), outgoing(1, "", "stale.q", message("stale", b"")));
    rig.publish(outgoing(2, "", "stale.q", message("fresh", b"")));
    assert_eq!(rig.wait_outcome(2), Outcome::Confirmed);
    assert_eq!(rig.outcomes.len(), 1);
    assert_eq!(tap.drain("stale.q").len(), 1);
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: topology is declared only when asked for; what differs or is missing is a config fault that names it, at each
/// connect, before anything is published. Method: declare, declare again, declare otherwise; require an exchange.
#[test]
fn topology_is_declared_when_asked_and_never_changed() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let topology = || {
        Topology::new()
            .exchange("topo", ExchangeKind::Topic)
            .queue_with("topo.q", [("x-max-length", 10.into()), ("x-overflow", "reject-publish".into())])
            .bind("topo", "topo.q", "k")
    };
    for _ in 0..2 {
        let mut rig =
            Rig::start(RabbitMq::new(&node.url()).unwrap().declare(topology()).require_exchange("topo"));
        rig.wait_up();
        rig.publish(outgoing(0, "topo", "k", message("t", b"x")));
        assert_eq!(rig.wait_outcome(0), Outcome::Confirmed);
        rig.publisher.stop(Duration::from_secs(5));
    }
    assert_eq!(tap.count("topo.q"), 2);
    let other = Topology::new().queue_with("topo.q", [("x-max-length", 11.into())]);
    let mut rig = Rig::start(RabbitMq::new(&node.url()).unwrap().declare(other));
    let fault = rig.wait_down();
    assert_eq!((fault.class, fault.code), (FaultClass::Config, Some(406)), "{fault}");
    assert!(fault.text.contains("topo.q"), "{fault}");
    let mut rig = Rig::start(RabbitMq::new(&node.url()).unwrap().require_exchange("topo.missing"));
    let fault = rig.wait_down();
    assert_eq!((fault.class, fault.code), (FaultClass::Config, Some(404)), "{fault}");
    assert!(fault.text.contains("topo.missing"), "{fault}");
    assert!(rig.next(Duration::from_secs(1)).is_none(), "retried slowly, and never up");
    // Neither the waits nor a missing stop keep a thread.
    drop(rig);
}

/// Goal: TLS that is not compiled in, and credentials in plain text to another machine, are refused before anything is
/// sent. Method: the settings alone; no such host is ever asked.
#[test]
fn plain_text_is_never_used_by_accident() {
    #[cfg(not(feature = "tls"))]
    {
        let error = RabbitMq::new("amqps://user:secret@localhost").unwrap_err();
        assert!(error.to_string().contains("`tls`") && !error.to_string().contains("secret"), "{error}");
    }
    let start = |publisher: RabbitMq| {
        let mut publisher = publisher;
        let (sender, _events) = PublisherEvents::channel();
        let result = publisher.start(sender);
        publisher.stop(Duration::from_secs(1));
        result
    };
    // 192.0.2.0/24 is for documentation: nobody is there.
    for url in ["amqp://user:secret@192.0.2.1", "amqp://192.0.2.1", "amqp://[2001:db8::1]"] {
        let error = start(RabbitMq::new(url).unwrap()).unwrap_err();
        assert!(error.to_string().contains("plain text") && !error.to_string().contains("secret"), "{error}");
    }
    assert_eq!(start(RabbitMq::new("amqp://192.0.2.1").unwrap().allow_plaintext_credentials()), Ok(()));
    assert!(start(RabbitMq::new("amqp://localhost").unwrap().heartbeat(Duration::ZERO)).is_err());
}

/// Goal: a peer that speaks plain text where TLS is asked for is a config fault, reported at once, never a downgrade.
/// Method: `amqps://` to the broker's plain-text port.
#[cfg(feature = "tls")]
#[test]
fn tls_is_never_downgraded() {
    let url = shared_node().url().replace("amqp://", "amqps://");
    let began = Instant::now();
    let mut rig = Rig::start(RabbitMq::new(&url).unwrap());
    let fault = rig.wait_down();
    assert!(fault.class == FaultClass::Config && fault.text.contains("TLS"), "{fault}");
    assert!(began.elapsed() < Duration::from_secs(1), "reported after {:?}", began.elapsed());
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: an absent broker is waited for; one that is killed with a full window has kept everything that was confirmed;
/// a blocked one is reported, ages nothing, and does not hold up a stop; through all of it no thread is left behind.
/// Method: one broker of its own, since each start takes seconds; the steps follow each other.
#[test]
fn a_broker_comes_dies_returns_and_blocks() {
    // Absent: each failed attempt is reported.
    let port = free_port();
    let mut rig = Rig::start(RabbitMq::new(&format!("amqp://127.0.0.1:{port}")).unwrap());
    for _ in 0..3 {
        assert_eq!(rig.wait_down().class, FaultClass::Outage);
    }
    rig.publish(isolated(outgoing(0, "", "q", message("alone", b""))));
    let outcome = rig.wait_outcome(0);
    assert!(matches!(&outcome, Outcome::Unknown(fault) if fault.class == FaultClass::Outage), "{outcome:?}");
    rig.publisher.stop(Duration::from_secs(5));

    // Killed with a full window, three times over; it returns at the same address.
    let mut node = RabbitNode::start();
    Tap::connect(&node.url()).queue("crash.q", &[]);
    node.settle_declarations();
    let publisher = RabbitMq::new(&node.url()).unwrap().confirm_deadline(Duration::from_secs(2));
    let mut rig = Rig::start(publisher);
    rig.wait_up();
    let mut next = 1;
    for round in 0..2 {
        let confirmed_before = rig.outcomes.len();
        let window_end = next + 20_000;
        while rig.outcomes.len() < confirmed_before + 2_000 {
            while next < window_end && next - (rig.outcomes.len() as u64) < 1024 {
                rig.publish(outgoing(next, "", "crash.q", message(&format!("crash-{next}"), &[7; 200])));
                next += 1;
            }
            rig.next(SOON);
        }
        node.kill9();
        let began = Instant::now();
        let fault = rig.wait_down();
        assert_eq!(fault.class, FaultClass::Outage, "round {round}: {fault}");
        assert!(began.elapsed() < Duration::from_secs(2), "noticed after {:?}", began.elapsed());
        let reported = rig.outcomes.len();
        node.restart();
        rig.wait_up();
        assert_eq!(rig.outcomes.len(), reported, "after Down no ticket of that epoch is reported");
        // Tickets are numbered on from what was reported, so that the window is counted right.
        next = next.max(rig.outcomes.len() as u64 + 1);
        let lost = next - 1 - rig.outcomes.len() as u64;
        assert!(lost <= 1024, "{lost} unknown");
        let queued: HashSet<_> = {
            let tap = Tap::connect(&node.url());
            tap.drain("crash.q").iter().map(|raw| raw.id().to_owned()).collect()
        };
        let confirmed = rig.outcomes.iter().filter(|(n, o)| **n > 0 && **o == Outcome::Confirmed);
        let missing: Vec<_> = confirmed.filter(|(n, _)| !queued.contains(&format!("crash-{n}"))).collect();
        assert!(missing.is_empty(), "round {round}: confirmed, and not in the queue: {missing:?}");
        rig.outcomes.clear();
        next = 1;
    }

    // Blocked for longer than the confirm deadline: reported, and nothing is given up.
    node.block();
    let epoch = rig.epoch;
    for n in 1..=10 {
        rig.publish(outgoing(n, "", "crash.q", message(&format!("blocked-{n}"), b"x")));
    }
    let began = Instant::now();
    while !rig.blocked && began.elapsed() < SOON {
        rig.next(SOON);
    }
    assert!(rig.blocked);
    assert!(rig.next(Duration::from_secs(3)).is_none(), "blocked is no reason to give up");
    node.unblock();
    for n in 1..=10 {
        assert_eq!(rig.wait_outcome(n), Outcome::Confirmed);
    }
    assert!(!rig.blocked && rig.epoch == epoch);

    // Stop while blocked, with messages in flight and one isolated.
    node.block();
    for n in 11..=20 {
        rig.publish(outgoing(n, "", "crash.q", message(&format!("blocked-{n}"), b"x")));
    }
    rig.publish(isolated(outgoing(21, "", "crash.q", message("blocked-21", b"x"))));
    let began = Instant::now();
    while !rig.blocked && began.elapsed() < SOON {
        rig.next(SOON);
    }
    let began = Instant::now();
    rig.publisher.stop(Duration::from_secs(1));
    let took = began.elapsed();
    assert!(took < Duration::from_millis(1100), "stop took {took:?}");
    while rig.next(Duration::from_millis(200)).is_some() {}
    assert!(matches!(rig.outcomes.get(&21), Some(Outcome::Unknown(_))), "{:?}", rig.outcomes.get(&21));
    wait_no_socket_to(node.port());
    node.unblock();
}

/// Goal: outcomes wait for a batch only for a moment: those that are known are told although many more are in flight and nothing
/// more is heard. Method: 100 in flight, of which a scripted server confirms the first three, and is silent then.
#[test]
fn outcomes_do_not_wait_for_a_lot_that_never_fills() {
    let broker = FakeBroker::confirming(100, &[1, 2, 3]);
    let mut rig = Rig::start(RabbitMq::new(&broker.url).unwrap());
    rig.wait_up();
    for n in 0..100 {
        rig.publish(outgoing(n, "", "q", message(&format!("m{n}"), b"x")));
    }
    let began = Instant::now();
    for n in 0..3 {
        assert_eq!(rig.wait_outcome(n), Outcome::Confirmed);
    }
    assert!(began.elapsed() < Duration::from_secs(2), "reported after {:?}", began.elapsed());
    assert!(rig.next(Duration::from_millis(200)).is_none());
    rig.publisher.stop(Duration::from_secs(1));
}

/// Goal: a connection that ends, or dies without ending, is noticed also when nothing is published; a confirm that does
/// not come is given up by its deadline. Method: the broker closes all connections; it is frozen with a heartbeat of
/// 1 s; it is frozen with a slow heartbeat and a confirm deadline of 1 s.
#[test]
fn a_dead_connection_is_noticed() {
    let node = RabbitNode::start();
    Tap::connect(&node.url()).queue("dead.q", &[]);
    let mut rig = Rig::start(RabbitMq::new(&node.url()).unwrap().heartbeat(Duration::from_secs(1)));
    rig.wait_up();
    node.ctl(&["close_all_connections", "maintenance"]);
    let fault = rig.wait_down();
    assert_eq!((fault.class, fault.code), (FaultClass::Outage, Some(320)), "{fault}");
    rig.wait_up();

    node.freeze();
    let began = Instant::now();
    let fault = rig.wait_down();
    assert_eq!(fault.class, FaultClass::Outage, "{fault}");
    assert!(began.elapsed() < Duration::from_millis(3500), "noticed after {:?}", began.elapsed());
    node.thaw();
    rig.wait_up();
    rig.publisher.stop(Duration::from_secs(5));

    let mut rig = Rig::start(RabbitMq::new(&node.url()).unwrap().confirm_deadline(Duration::from_secs(1)));
    rig.wait_up();
    node.freeze();
    std::thread::sleep(Duration::from_millis(600));
    rig.publish(outgoing(0, "", "dead.q", message("m", b"x")));
    let began = Instant::now();
    let fault = rig.wait_down();
    assert!(fault.class == FaultClass::Outage && fault.text.contains("no confirm within 1 s"), "{fault}");
    let took = began.elapsed();
    assert!(
        took > Duration::from_millis(900) && took < Duration::from_millis(1500),
        "given up after {took:?}"
    );
    node.thaw();
    rig.wait_up();
    rig.publish(outgoing(1, "", "dead.q", message("m", b"x")));
    assert_eq!(rig.wait_outcome(1), Outcome::Confirmed);
    assert!(matches!(rig.outcomes.get(&0), Some(Outcome::Silent(_))), "{:?}", rig.outcomes);
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: connections come and go without leaving threads or descriptors. Method: 60 epochs, each ended by a missing
/// exchange, and 20 publishers started and dropped without a stop; count lapin's threads and our sockets to the broker.
#[test]
fn nothing_is_left_of_a_connection_that_ended() {
    let mut node = RabbitNode::start();
    let mut rig = Rig::up(&node.url());
    Tap::connect(&node.url()).queue("leak.q", &[]);
    for n in 0..60 {
        // Something confirmed, so that the wait between connections stays short.
        rig.publish(outgoing(2 * n, "", "leak.q", message("good", b"x")));
        assert_eq!(rig.wait_outcome(2 * n), Outcome::Confirmed);
        rig.publish(outgoing(2 * n + 1, "leak.missing", "k", message("m", b"x")));
        assert_eq!(rig.wait_down().class, FaultClass::Destination);
        rig.wait_up();
    }
    rig.publisher.stop(Duration::from_secs(5));
    for _ in 0..20 {
        drop(Rig::up(&node.url()));
    }
    wait_no_socket_to(node.port());
    // A broker that is gone is no reason to keep anything either.
    node.kill9();
}

fn wait_no_socket_to(port: u16) {
    let began = Instant::now();
    // Other tests of this process have connections too, but not to this port.
    while sockets_to(port) > 0 {
        assert!(began.elapsed() < SOON, "{} sockets to the broker are still open", sockets_to(port));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sockets connected to this port that a process still holds. What the kernel alone still winds up has inode 0.
pub(crate) fn sockets_to(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let suffix = format!(":{port:04X}");
    let held = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    held.filter(|fields| fields[2].ends_with(&suffix) && fields[9] != "0").count()
}
