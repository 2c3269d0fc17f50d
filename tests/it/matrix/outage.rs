//! The broker blocks, dies, is away, slow or silent. None of it costs an event an attempt, or a write a moment.

use std::time::{Duration, Instant};

use onewrite::{Event, FaultClass, RelayState};

use super::{Line, rabbit, rough_node, until};
use crate::rabbitmq_publisher::sockets_to;
use crate::support::proxy::{ChaosProxy, End, Way};
use crate::support::rabbit::{free_port, shared_node};
use crate::support::tap::Tap;

/// B1. Goal: `connection.blocked` is a state of its own, spends nothing, holds up no write, and ends by itself. Method: a memory
/// alarm; writes go on for the while; the raw queue is the evidence.
#[test]
fn b01_connection_blocked() {
    let node = rough_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b01", &[]);
    let mut line = Line::to(&node.url(), "b01");
    line.append_many(20);
    line.until_empty();
    node.block();
    // The broker says so at the next publish after the alarm.
    let began = Instant::now();
    until("blocked", || {
        line.append("k0");
        line.state() == RelayState::Blocked
    });
    assert!(began.elapsed() < Duration::from_secs(10), "reported after {:?}", began.elapsed());
    line.append_many(200);
    // Longer than two heartbeats, which hold.
    std::thread::sleep(Duration::from_millis(2500));
    let status = line.relay.status();
    assert_eq!((status.state, status.reconnects), (RelayState::Blocked, 0));
    assert!(status.in_flight <= 512);
    assert!(line.store.stats().unwrap().backlog_events >= 200, "the gauge shows what waits");
    line.assert_unspent();
    node.unblock();
    line.until_connected();
    assert_eq!(line.assert_all_arrived(&tap), 0, "nothing was given up, so nothing was sent twice");
    assert_eq!(line.relay.status().reconnects, 0);
    line.stop();
}

/// B2. Goal: a stop does not wait for a broker that cannot answer, and leaves no socket. Method: stop with a long timeout while it
/// blocks, and while it is frozen.
#[test]
fn b02_close_while_blocked_or_frozen() {
    let node = rough_node();
    Tap::connect(&node.url()).queue("b02", &[]);
    for frozen in [false, true] {
        let proxy = ChaosProxy::to(node.port());
        let mut line = Line::to(&proxy.url(&node.url()), "b02");
        line.append("k").wait_confirmed(super::SOON).unwrap();
        if frozen {
            node.freeze();
        } else {
            node.block();
            until("blocked", || {
                line.append("k");
                line.state() == RelayState::Blocked
            });
        }
        line.append_many(10);
        let began = Instant::now();
        let report = line.relay.stop(Duration::from_secs(3));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(4), "stop took {took:?}");
        assert!(report.backlog_events >= 10, "{report:?}");
        // Closing has a deadline of two seconds.
        let began = Instant::now();
        until("no socket", || sockets_to(proxy.port()) == 0);
        assert!(began.elapsed() < Duration::from_secs(4), "closed after {:?}", began.elapsed());
        if frozen {
            node.thaw();
        } else {
            node.unblock();
        }
    }
}

/// B8. Goal: a broker that dies with a full window loses nothing and costs nobody anything; what was unconfirmed comes again, in
/// order, with the same ids, marked as resends. Method: `kill -9` while a window is full, three times; the raw queue is the evidence.
#[test]
fn b08_killed_with_a_full_window() {
    let mut node = rough_node();
    Tap::connect(&node.url()).queue("b08", &[]);
    node.settle_declarations();
    let mut line = Line::to(&node.url(), "b08");
    for round in 0..3 {
        let before = line.relay.status().confirmed;
        // Keys of one event each fill the window; the five keys of `append_many` show the order.
        let bulk = format!("own-{round}");
        let queue = line.queue.clone();
        line.append_many(500);
        for n in 0..10_u64 {
            for m in 0..200_u64 {
                line.appended.insert(format!("{bulk}-{n}-{m}"), 1);
            }
            let (bulk, queue) = (bulk.clone(), queue.clone());
            line.store
                .write(move |tx| {
                    for m in 0..200_u64 {
                        let key = format!("{bulk}-{n}-{m}");
                        tx.append(Event::bytes("matrix", super::payload(&key, 0)).key(key).to("", &*queue))?;
                    }
                    Ok(())
                })
                .unwrap();
        }
        until("a window under way", || line.relay.status().confirmed > before + 300);
        node.kill9();
        let fault = line.until_outage();
        assert!(!fault.text.is_empty());
        line.append_many(100);
        node.restart();
    }
    let tap = Tap::connect(&node.url());
    let repeats = line.assert_all_arrived(&tap);
    println!("{repeats} came twice");
    assert!(line.relay.status().reconnects >= 3);
    line.stop();
}

/// B9. Goal: a broker that is away is asked again with growing, bounded, jittered waits that start over once a connection has
/// proved itself; it is an outage, at once. Method: nobody listens; then a peer that hangs up, whose callers are counted; then
/// the broker, cut off once.
#[test]
fn b09_away_at_start_and_later() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b09", &[]);
    let proxy = ChaosProxy::to(node.port());
    proxy.refuse(true);
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    let mut line = Line::to(&proxy.url(&node.url()), "b09");
    let fault = line.until_outage();
    assert!(fault.text.contains("refused"), "{fault}");
    assert!(began.elapsed() < Duration::from_secs(2), "reported after {:?}", began.elapsed());
    line.append_many(100);
    assert_eq!(line.store.stats().unwrap().backlog_events, 100);
    proxy.refuse(false);
    line.until_empty();
    // It has confirmed something, so the first wait is a short one again.
    let began = Instant::now();
    proxy.end_all(End::Close);
    line.append("k0").wait_confirmed(super::SOON).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "back after {:?}", began.elapsed());
    line.assert_all_arrived(&tap);
    line.stop();

    // Waits of 50 to 100 ms, 100 to 200, then 200 to 400 each.
    let hangs_up = ChaosProxy::to(free_port());
    let publisher = rabbit(&format!("amqp://127.0.0.1:{}/", hangs_up.port()))
        .reconnect_backoff(Duration::from_millis(100), Duration::from_millis(400));
    let line = Line::with("b09", |relay| relay, publisher);
    let began = Instant::now();
    until("fifteen calls", || hangs_up.accepted() == 15);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(150 + 12 * 200), "15 calls within {took:?}");
    line.until_outage();
}

/// B10. Goal: slow confirms are waited for, with no more than the window in flight, by count and by bytes; a confirm that does not
/// come is unknown after its deadline, and comes again. Method: everything from the broker is late by 300 ms; then stands still.
#[test]
fn b10_slow_confirms() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b10", &[]);
    let proxy = ChaosProxy::to(node.port());
    let publisher = rabbit(&proxy.url(&node.url()))
        .confirm_deadline(Duration::from_secs(2))
        // The deadline is to be the first to notice.
        .heartbeat(Duration::from_secs(30));
    let mut line = Line::with("b10", |relay| relay.window_events(64), publisher);
    line.until_connected();
    proxy.delay(Way::Down, Duration::from_millis(300));
    for n in 0..400 {
        line.append(&format!("own-{n}"));
    }
    let (mut most, mut most_bytes) = (0, 0);
    until("an empty backlog", || {
        let status = line.relay.status();
        most = most.max(status.in_flight);
        most_bytes = most_bytes.max(status.in_flight_bytes);
        line.store.stats().unwrap().backlog_events == 0
    });
    assert_eq!(most, 64, "a full window, and no more");
    assert!(most_bytes <= 8 << 20);
    assert_eq!(line.relay.status().reconnects, 0);
    proxy.delay(Way::Down, Duration::ZERO);
    proxy.stall(Way::Down, true);
    line.append_many(20);
    let began = Instant::now();
    let fault = line.until_outage();
    assert!(fault.text.contains("no confirm within 2 s"), "{fault}");
    assert!(began.elapsed() < Duration::from_secs(5), "given up after {:?}", began.elapsed());
    proxy.stall(Way::Down, false);
    let repeats = line.assert_all_arrived(&tap);
    assert!(repeats > 0, "what was unknown has arrived before, and comes again");
    line.stop();
}

/// B11. Goal: a peer that takes the connection and says nothing is given up after ten seconds, as an outage; the next attempt is
/// made, the last one leaves no socket; a stop does not wait for it. Method: a silent proxy, which finds its voice.
#[test]
fn b11_silent_peer() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b11", &[]);
    let proxy = ChaosProxy::to(node.port());
    proxy.silent(true);
    let url = proxy.url(&node.url());
    let mut stopped = Line::to(&url, "b11");
    stopped.append("k");
    until("an attempt", || proxy.accepted() == 1);
    let began = Instant::now();
    let report = stopped.relay.stop(Duration::from_secs(5));
    assert!(began.elapsed() < Duration::from_secs(2), "stop took {:?}", began.elapsed());
    assert_eq!(report.backlog_events, 1);

    let mut line = Line::to(&url, "b11");
    let began = Instant::now();
    line.append_many(10);
    let fault = line.until_outage();
    let took = began.elapsed();
    assert!(fault.text.contains("did not answer within 10 s"), "{fault}");
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(13), "reported after {took:?}");
    until("the next attempt", || proxy.accepted() == 3);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(sockets_to(proxy.port()), 1, "one for this attempt, none of the one that was given up");
    // The attempt that is under way never hears anything either; it is cut.
    proxy.silent(false);
    proxy.end_all(End::Reset);
    line.assert_all_arrived(&tap);
    line.stop();
}

/// The connection ends without a reason, with one, by reset, in the middle of a frame, or by vanishing: an outage each time, noticed
/// in its time, and everything arrives. Method: the proxy; the broker's own `close_all_connections`.
#[test]
fn b09_cut_in_every_way() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b09-cuts", &[]);
    let proxy = ChaosProxy::to(node.port());
    let mut line = Line::to(&proxy.url(&node.url()), "b09-cuts");
    line.append_many(50);
    line.until_empty();
    for way in [Way::Up, Way::Down] {
        for end in [End::Close, End::Reset, End::Vanish] {
            for bytes in [0, 3, 11] {
                let before = line.relay.status().reconnects;
                proxy.end_after(way, bytes, end);
                let began = Instant::now();
                line.append_many(20);
                until("a new connection", || line.relay.status().reconnects > before);
                let took = began.elapsed();
                // Two heartbeats of a second and one more, then the wait and the login.
                assert!(took < Duration::from_secs(5), "{way:?} {end:?} {bytes}: noticed after {took:?}");
                let why = line.relay.status().last_fault.expect("it was reported");
                assert_eq!(why.class, FaultClass::Outage, "{way:?} {end:?} {bytes}: {why}");
            }
        }
    }
    line.assert_all_arrived(&tap);
    line.stop();
}
