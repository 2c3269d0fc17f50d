//! A canary password and a canary payload through every failure that is quick to make, with every thread logging at TRACE: neither is shown
//! anywhere, not in logs, errors, `Debug`, reports or panics.

use std::fmt::Debug;
use std::net::TcpListener;
use std::time::Duration;

use lapin::types::AMQPValue;
use onewrite::broker::{RabbitMq, RabbitMqSource};
use onewrite::{Event, FaultClass, RelayState, Store};

use super::{Line, hostile, rabbit, until};
use crate::scratch::{child, task};
use crate::support::proxy::{ChaosProxy, End, Way};
use crate::support::rabbit::RabbitNode;
use crate::support::tap::Tap;

const PASSWORD: &str = "c4n4ry-P4ssword";
const PAYLOAD: &str = "c4n4ry-P4yload";

/// Every spelling in which a secret could be shown: letters, and the bytes as `Debug` and as hexadecimal would print them.
fn spellings(secret: &str) -> [String; 4] {
    let hex = |separator: &str| {
        secret.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(separator)
    };
    let bytes = format!("{:?}", secret.as_bytes());
    [secret.to_owned(), bytes.trim_matches(['[', ']']).to_owned(), hex(""), hex(" ")]
}

/// Goal: no text anywhere shows a password or a payload. Method: a process that logs all of it drives both through wrong logins, a
/// forbidden exchange, returns, nacks, blocking, cuts, garbled frames, a hostile peer, unknown hosts, hung stops, and a handler
/// that fails in each of its ways, and prints every error and every `Debug`; its output is searched.
#[test]
fn no_failure_shows_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    let output = child("matrix::secrets::child_that_logs_everything", folder.path(), "").output().unwrap();
    let shown =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    for (what, secret) in [("the password", PASSWORD), ("the payload", PAYLOAD)] {
        for spelling in spellings(secret) {
            let place = shown.lines().find(|line| line.contains(&spelling));
            assert!(place.is_none(), "{what} is shown: {place:?}");
        }
    }
    let end: String =
        shown.lines().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(output.status.success() && shown.contains("all well"), "{end}");
    for expected in [
        "TRACE",
        "publisher connected",
        "publisher refused by the broker",
        "publisher disconnected",
        "blocks publishers",
        "source connected",
        "source refused by the broker",
        "source disconnected",
        "the handler's own panic",
    ] {
        assert!(shown.contains(expected), "the log lacks {expected:?}, so it proves nothing");
    }
}

fn show(what: &str, value: &dyn Debug) {
    eprintln!("{what}: {value:?} {value:#?}");
}

fn canary(line: &Line, exchange: &str, routing_key: &str) {
    let event = Event::bytes("canary", PAYLOAD).key("k").header("note", "public").to(exchange, routing_key);
    line.store.write(move |tx| tx.append(event.clone())).unwrap();
}

/// Shows all there is to show of a line, and stops it.
fn show_and_stop(line: Line, timeout: Duration) {
    show("store", &line.store);
    show("stats", &line.store.stats());
    show("relay", &line.relay);
    show("status", &line.relay.status());
    show("quarantine", &line.store.quarantine("rabbit").unwrap().list(None, 10));
    show("report", &line.relay.stop(timeout));
}

#[test]
fn child_that_logs_everything() {
    let Some((folder, _)) = task() else { return };
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let node = RabbitNode::start();
    node.ctl(&["add_user", "spy", PASSWORD]);
    node.ctl(&["set_permissions", "-p", "/", "spy", "", "amq.default", ".*"]);
    let tap = Tap::connect(&node.url());
    tap.queue("canary", &[]);
    let full = [
        ("x-max-length", AMQPValue::LongInt(1)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    tap.queue("canary-full", &full);
    let url = node.url_as("spy", PASSWORD, "%2f");

    refused_logins(&node);
    what_the_broker_says_of_messages(&url);
    bad_lines(&node, &url);
    a_hostile_peer();
    consumers(&node, &url, &folder);
    blocked_and_hung(&node, &url);
    settings_and_errors();
    println!("all well");
}

fn refused_logins(node: &RabbitNode) {
    let wrong = format!("{PASSWORD}-wrong");
    let unknown = format!("amqp://spy:{PASSWORD}@no-such-host.invalid:5672/%2f");
    for (url, class) in [
        (node.url_as("spy", &wrong, "%2f"), FaultClass::Config),
        (node.url_as("spy", PASSWORD, "no-such-vhost"), FaultClass::Config),
        (unknown, FaultClass::Outage),
    ] {
        let publisher = rabbit(&url);
        show("publisher", &publisher);
        let line = Line::with("canary", |relay| relay, publisher);
        canary(&line, "", "canary");
        let fault = line.until_down();
        assert_eq!(fault.class, class, "{fault}");
        eprintln!("{fault} {fault:?}");
        show_and_stop(line, Duration::from_secs(2));
        let source = RabbitMqSource::new(&url, "canary").unwrap().allow_plaintext_credentials();
        show("source", &source);
        let store_folder = tempfile::tempdir().unwrap();
        let store = Store::open(store_folder.path().join("c.redb")).unwrap();
        let consumer = store.consumer("c").spawn(source, |_, _| Ok(())).unwrap();
        until("the source's word", || consumer.status().disconnected.is_some());
        show("consumer", &consumer);
        show("stats", &consumer.stop(Duration::from_secs(2)));
    }
}

/// Returned, nacked, forbidden, sent to nowhere; and confirmed.
fn what_the_broker_says_of_messages(url: &str) {
    let line = Line::to(url, "canary");
    for (exchange, routing_key) in
        [("", "canary"), ("", "nowhere"), ("amq.topic", "x"), ("missing", "x"), ("", "canary-full")]
    {
        for _ in 0..3 {
            let event = Event::bytes("canary", PAYLOAD).to(exchange, routing_key);
            let receipt = line.store.write(move |tx| tx.append(event.clone())).unwrap();
            let confirmed = receipt.wait_confirmed(Duration::from_secs(3));
            eprintln!("{exchange} {routing_key}: {confirmed:?}");
            if let Err(error) = confirmed {
                eprintln!("{error}");
            }
            show("receipt", &receipt);
        }
    }
    let quarantined = line.store.quarantine("rabbit").unwrap().list(None, 100).unwrap();
    assert!(quarantined.len() >= 9, "{quarantined:?}");
    show_and_stop(line, Duration::from_secs(1));
}

fn bad_lines(node: &RabbitNode, url: &str) {
    let proxy = ChaosProxy::to(node.port());
    let line = Line::to(&proxy.url(url), "canary");
    line.until_connected();
    for end in [End::Close, End::Reset, End::Vanish] {
        for way in [Way::Up, Way::Down] {
            let before = line.relay.status().reconnects;
            proxy.end_after(way, 9, end);
            canary(&line, "", "canary");
            until("another connection", || line.relay.status().reconnects > before);
        }
    }
    for bytes in [0, 1, 7, 60, 200, 400] {
        // In the login's frames too.
        let before = proxy.accepted();
        proxy.end_all(End::Reset);
        until("the old one gone", || proxy.live() == 0 || proxy.accepted() > before);
        proxy.corrupt_after(Way::Down, bytes);
        canary(&line, "", "canary");
        std::thread::sleep(Duration::from_millis(300));
    }
    proxy.end_all(End::Reset);
    line.until_empty();
    show_and_stop(line, Duration::from_secs(2));
}

fn a_hostile_peer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let publisher = rabbit(&format!("amqp://spy:{PASSWORD}@127.0.0.1:{port}"));
    let line = Line::with(
        "canary",
        |relay| relay,
        publisher.reconnect_backoff(Duration::from_millis(1), Duration::from_millis(2)),
    );
    canary(&line, "", "canary");
    let (refused, scripts): (Vec<_>, Vec<_>) =
        hostile::scripts().into_iter().partition(hostile::Script::is_refused_for_good);
    // After the first of those that are refused for good the relay waits for 30 s: it stands last.
    for script in scripts.iter().chain(refused.first()) {
        let (mut stream, _) = listener.accept().unwrap();
        // It fails where the client was first to go, which is what is wanted.
        let _ = hostile::play(&mut stream, script);
    }
    show_and_stop(line, Duration::from_secs(1));
}

fn consumers(node: &RabbitNode, url: &str, folder: &std::path::Path) {
    let tap = Tap::connect(&node.url());
    tap.queue("canary-in", &[]);
    let proxy = ChaosProxy::to(node.port());
    let store = Store::open(folder.join("credit.redb")).unwrap();
    let source = RabbitMqSource::new(&proxy.url(url), "canary-in")
        .unwrap()
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(200));
    let consumer = store
        .consumer("c")
        .attempts(2)
        .backoff(Duration::from_millis(10), Duration::from_millis(20))
        .spawn(source, |delivery, _| match delivery.message.message_id.as_deref() {
            Some("panics") => panic!("the handler's own panic"),
            Some("rejects") => Err(onewrite::Error::reject("the handler's own word")),
            Some("fails") => Err(onewrite::Error::app("not now")),
            Some("undecodable") => {
                Ok(onewrite::codec::from_json::<u32>(&delivery.message.payload).map(drop)?)
            }
            _ => Ok(()),
        })
        .unwrap();
    let send = |id: &str, body: &str| {
        let properties = lapin::BasicProperties::default().with_message_id(id.into());
        tap.publish("canary-in", properties, body.as_bytes());
    };
    for id in ["panics", "rejects", "fails", "undecodable", "good", "good"] {
        send(id, PAYLOAD);
    }
    send("good", &format!("{PAYLOAD}, but another"));
    until("all of them", || {
        let stats = consumer.status();
        stats.quarantined == 5 && stats.applied == 1 && stats.repeated == 1
    });
    for end in [End::Close, End::Reset, End::Vanish] {
        let before = consumer.status().connections;
        proxy.end_all(end);
        until("another connection", || consumer.status().connections > before);
    }
    show("consumer", &consumer);
    show("rejected", &store.rejected("c").list(None, 10));
    for entry in store.rejected("c").list(None, 10).unwrap() {
        eprintln!("{}", entry.reason);
    }
    show("stats", &consumer.stop(Duration::from_secs(2)));
    show("store", &store.stats());
}

fn blocked_and_hung(node: &RabbitNode, url: &str) {
    let line = Line::to(url, "canary");
    canary(&line, "", "canary");
    line.until_empty();
    node.block();
    until("blocked", || {
        canary(&line, "", "canary");
        line.state() == RelayState::Blocked
    });
    show_and_stop(line, Duration::from_secs(1));
    node.unblock();
    let line = Line::to(url, "canary");
    line.until_connected();
    node.freeze();
    canary(&line, "", "canary");
    show_and_stop(line, Duration::from_secs(1));
    node.thaw();
}

fn settings_and_errors() {
    for url in
        ["amqp://spy:{}@host:x", "amqp:spy:{}@host", "amqp://spy:{}@[x]:1", "amqp://spy:12?{}@h", "http://{}"]
    {
        let error = RabbitMq::new(&url.replace("{}", PASSWORD)).unwrap_err();
        eprintln!("{error} {error:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().payload_bytes_max(4).open(folder.path().join("a.redb")).unwrap();
    let event = Event::bytes("canary", PAYLOAD).to("", "canary");
    let error = store.write(move |tx| tx.append(event.clone())).unwrap_err();
    eprintln!("{error} {error:?}");
    // Credentials in plain text to another machine are refused by a setting's error.
    let error = store.relay("r").spawn(RabbitMq::new(&format!("amqp://spy:{PASSWORD}@192.0.2.1")).unwrap());
    eprintln!("{error:?} {}", error.as_ref().unwrap_err());
    store.close().unwrap();
}
