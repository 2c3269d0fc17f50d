//! Refusals that waiting will not heal: loud, slow, and mended by whoever mends the setting.

use std::time::{Duration, Instant};

use lapin::types::AMQPValue;
use onewrite::broker::Topology;
use onewrite::{ConfirmError, FaultClass};

use super::{Line, SOON, rabbit, until};
use crate::support::proxy::ChaosProxy;
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

/// B4. Goal: a queue that is there otherwise than declared, and an exchange that is required and is not there, are config faults that
/// name it, reported at once; nothing is published, changed or made; a second attempt is not made at once; writes go on. Method: both,
/// behind a proxy that counts connections.
#[test]
fn b04_declared_otherwise() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b04", &[("x-max-length", AMQPValue::LongInt(10))]);
    for (code, name) in [(406, "b04"), (404, "b04-missing")] {
        let proxy = ChaosProxy::to(node.port());
        let publisher = rabbit(&proxy.url(&node.url()));
        let publisher = match code {
            406 => publisher.declare(Topology::new().queue_with(name, [("x-max-length", 11.into())])),
            _ => publisher.require_exchange(name),
        };
        let began = Instant::now();
        let mut line = Line::with("b04", |relay| relay, publisher);
        let fault = line.until_down();
        assert_eq!((fault.class, fault.code), (FaultClass::Config, Some(code)), "{fault}");
        assert!(fault.text.contains(name), "{fault}");
        assert!(began.elapsed() < Duration::from_secs(3), "reported after {:?}", began.elapsed());
        line.append_many(20);
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(proxy.accepted(), 1, "asked again at once");
        assert_eq!(line.store.stats().unwrap().backlog_events, 20);
        line.assert_unspent();
        assert_eq!(line.relay.stop(SOON).backlog_events, 20);
    }
    assert_eq!(tap.count("b04"), 0);
    let arguments = node.ctl(&["list_queues", "-q", "--no-table-headers", "name", "arguments"]);
    let of_b04 = arguments.lines().find(|line| line.starts_with("b04\t")).unwrap();
    assert!(of_b04.contains("10") && !of_b04.contains("11"), "{of_b04}");
    assert!(!node.ctl(&["list_exchanges", "-q", "--no-table-headers", "name"]).contains("b04-missing"));
}

/// B14 to B16. Goal: a wrong password, a missing virtual host and a forbidden exchange are reported as what they are, within a second;
/// the first two are asked about once in half a minute, spend nothing, and heal by themselves once the setting is mended; the third
/// concerns its own events only, which are quarantined with the broker's word. Method: a user and a virtual host that are set
/// right after the first refusal, behind proxies that count connections.
#[test]
fn b14_to_16_wrong_password_missing_vhost_forbidden_exchange() {
    let node = shared_node();
    node.ctl(&["add_user", "b14", "first-password"]);
    node.ctl(&["set_permissions", "-p", "/", "b14", ".*", ".*", ".*"]);
    let began = Instant::now();
    let refused = |url: &str, code, text: &str| {
        let proxy = ChaosProxy::to(node.port());
        let began = Instant::now();
        let mut line = Line::to(&proxy.url(url), "b14");
        let fault = line.until_down();
        assert!(began.elapsed() < Duration::from_secs(2), "reported after {:?}", began.elapsed());
        assert_eq!((fault.class, fault.code), (FaultClass::Config, Some(code)), "{fault}");
        assert!(fault.text.contains(text) && !fault.text.contains("password-of-now"), "{fault}");
        line.append_many(20);
        (proxy, line)
    };
    let password = refused(&node.url_as("b14", "password-of-now", "%2f"), 403, "ACCESS_REFUSED");
    let vhost = refused(&node.url_as("guest", "guest", "b14-vhost"), 530, "b14-vhost");

    // 403 on a publish is about that exchange.
    node.ctl(&["add_user", "b16", "b16"]);
    node.ctl(&["set_permissions", "-p", "/", "b16", "", "nothing", ".*"]);
    let tap = Tap::connect(&node.url());
    tap.queue("b16", &[]);
    let url = node.url_as("b16", "b16", "%2f");
    let mut line = Line::with("b16", |relay| relay.destination_attempts(2), rabbit(&url));
    let first = line.append("k");
    let behind = line.append("k");
    match first.wait_confirmed(SOON).unwrap_err() {
        ConfirmError::Quarantined { seq: 0, fault } => {
            assert_eq!((fault.class, fault.code), (FaultClass::Destination, Some(403)), "{fault}");
        }
        error => panic!("{error}"),
    }
    node.ctl(&["set_permissions", "-p", "/", "b16", "", ".*", ".*"]);
    line.store.quarantine("rabbit").unwrap().redrive(0).unwrap();
    behind.wait_confirmed(SOON).unwrap();
    line.assert_all_arrived(&tap);
    line.stop();

    // Mended: the first two come up with their next attempt.
    node.ctl(&["change_password", "b14", "password-of-now"]);
    tap.queue("b14", &[]);
    node.ctl(&["add_vhost", "b14-vhost"]);
    node.ctl(&["set_permissions", "-p", "b14-vhost", "guest", ".*", ".*", ".*"]);
    let in_vhost = Tap::connect(&node.url_as("guest", "guest", "b14-vhost"));
    in_vhost.queue("b14", &[]);
    for ((proxy, line), tap) in [(password, tap), (vhost, in_vhost)] {
        until("the next attempt", || proxy.accepted() == 2);
        assert!(began.elapsed() > Duration::from_secs(23), "asked again after {:?}", began.elapsed());
        line.assert_all_arrived(&tap);
        assert_eq!(proxy.accepted(), 2);
        line.stop();
    }
}
