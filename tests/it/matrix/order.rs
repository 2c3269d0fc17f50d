//! P5 through everything at once: order per key, judged from a raw tap on a queue of its own.

use std::time::{Duration, Instant};

use lapin::ExchangeKind;
use lapin::types::AMQPValue;

use super::{Line, SOON, rabbit, rough_node, until};
use crate::scratch::Random;
use crate::support::proxy::{ChaosProxy, End, Way};
use crate::support::rabbit::RabbitNode;
use crate::support::tap::Tap;

const STEPS: u64 = 24;
const KEYS: u64 = 40;
/// Another seed is another test: the first failure of one is worth keeping here.
const SEED: u64 = 7;

/// What is on the broker: an exchange that feeds the tap, and a queue that is soon full and refuses.
fn declare(tap: &Tap) {
    tap.exchange("order", ExchangeKind::Direct);
    tap.queue("order-tap", &[]);
    let full = [
        ("x-max-length", AMQPValue::LongInt(60)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    tap.queue("order-full", &full);
    bind(tap);
}

fn bind(tap: &Tap) {
    for queue in ["order-tap", "order-full"] {
        tap.bind(queue, "order", "r");
    }
}

fn redrive_all(line: &Line) -> usize {
    let quarantine = line.store.quarantine("rabbit").unwrap();
    let listed = quarantine.list(None, 1000).unwrap();
    listed.iter().for_each(|entry| quarantine.redrive(entry.seq).unwrap());
    listed.len()
}

/// Does one thing to the way, the broker or the relay, and says what.
fn disturb(random: &mut Random, line: &mut Line, proxy: &ChaosProxy, tap: &Tap) -> String {
    let way = if random.below(2) == 0 { Way::Up } else { Way::Down };
    let end = [End::Close, End::Reset, End::Vanish][random.below(3) as usize];
    match random.below(8) {
        0 => format!("room for {}", tap.take("order-full").len()),
        1 => {
            // The tap last, and first again in `bind`: whatever is routed anywhere must reach it.
            for queue in ["order-full", "order-tap"] {
                tap.unbind(queue, "order", "r");
            }
            std::thread::sleep(Duration::from_millis(random.below(400)));
            bind(tap);
            "unbound for a while".into()
        }
        2 => {
            proxy.end_all(end);
            format!("all connections end by {end:?}")
        }
        3 => {
            let bytes = random.below(3000);
            proxy.end_after(way, bytes, end);
            format!("{end:?} after {bytes} bytes {way:?}")
        }
        4 => {
            proxy.corrupt_after(Way::Down, 0);
            "the next frame from the broker is garbled".into()
        }
        5 => {
            // With nothing in flight the next byte begins a frame: its kind is garbled, and no payload.
            line.relay.pause();
            until("nothing in flight", || line.relay.status().in_flight == 0);
            proxy.corrupt_after(Way::Up, 0);
            line.relay.resume();
            "the next frame to the broker is garbled".into()
        }
        6 => format!("{} redriven", redrive_all(line)),
        _ => {
            line.append_to(&format!("k{}", random.below(KEYS)), "order-missing", "r");
            "one to an exchange that is not there".into()
        }
    }
}

fn kill(node: &mut RabbitNode) -> Tap {
    node.settle_declarations();
    node.kill9();
    std::thread::sleep(Duration::from_millis(200));
    node.restart();
    Tap::connect(&node.url())
}

/// Goal: with strict order (the default) the first deliveries of each key ascend without a gap, and a resend is the same message and says
/// so, through nacks, returns, missing exchanges, cuts, resets, lost links, garbled frames, kills of the broker, quarantines
/// and redrives; and all of it arrives. Method: some 600 events of 40 keys, 24 random disturbances from a seed and two
/// `kill -9` between them; a queue of its own is read raw when it is over.
#[test]
fn first_deliveries_ascend_without_a_gap_through_everything() {
    let mut node = rough_node();
    let mut tap = Tap::connect(&node.url());
    declare(&tap);
    let proxy = ChaosProxy::to(node.port());
    let publisher = rabbit(&proxy.url(&node.url()));
    let mut line = Line::with("order-tap", |relay| relay.destination_attempts(3), publisher);
    let mut random = Random(SEED);
    let mut reported = Vec::new();
    let began = Instant::now();
    line.append_to("poor", "order-missing", "r");
    for step in 0..STEPS {
        for _ in 0..10 + random.below(30) {
            line.append_to(&format!("k{}", random.below(KEYS)), "order", "r");
        }
        let what = disturb(&mut random, &mut line, &proxy, &tap);
        reported.push(format!("{:?}: {what}", began.elapsed()));
        if step == 7 || step == 15 {
            reported.push("kill -9".into());
            tap = kill(&mut node);
        }
        std::thread::sleep(Duration::from_millis(random.below(200)));
    }
    println!("disturbed for {:?}", began.elapsed());
    until("one is in quarantine", || line.relay.status().quarantined > 0);
    // Everything is well again; what is in quarantine is driven again until nothing is.
    tap.exchange("order-missing", ExchangeKind::Fanout);
    tap.bind("order-tap", "order-missing", "");
    // What was nacked is tried again ever later.
    let deadline = Instant::now() + 4 * SOON;
    loop {
        tap.take("order-full");
        redrive_all(&line);
        let stats = line.store.stats().unwrap();
        let relay = &stats.relays["rabbit"];
        if (stats.backlog_events, relay.retrying, relay.parked, relay.quarantined) == (0, 0, 0, 0) {
            break;
        }
        assert!(Instant::now() < deadline, "seed {SEED}: not all is confirmed: {stats:#?}\n{reported:#?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    println!("all confirmed after {:?}", began.elapsed());
    let raw = tap.drain("order-tap");
    let judge = super::Judge::of(&raw).unwrap_or_else(|error| panic!("seed {SEED}: {error}\n{reported:#?}"));
    judge.complete(&line.appended).unwrap_or_else(|error| panic!("seed {SEED}: {error}\n{reported:#?}"));
    let status = line.relay.status();
    println!(
        "{} arrivals, {} again, {} reconnects, {} quarantined and redriven",
        raw.len(),
        judge.repeats,
        status.reconnects,
        status.quarantined
    );
    // The test has shown something only if all of it happened.
    assert!(
        judge.repeats > 20 && status.reconnects > 4 && status.quarantined > 0,
        "too quiet: {status:?}\n{reported:#?}"
    );
    assert!(line.relay.stop(SOON).clean);
}
