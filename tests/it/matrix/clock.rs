//! B19. The wall clock cannot be set for one process, nor in a namespace (time namespaces have none), so it jumps where it enters:
//! at the store's [`Clock`]. The AMQP threads know only `std::time::Instant`, which is monotonic.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use lapin::ExchangeKind;
use lapin::types::AMQPValue;
use onewrite::broker::RabbitMqSource;
use onewrite::time::{Clock, Now, SystemClock};
use onewrite::{Event, Store};

use super::judge::payload;
use super::{SOON, rabbit, until};
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

const DAY_MS: i64 = 24 * 3600 * 1000;
/// Far above every wait of this test on a machine that stands still for a while, far below a day.
const PROMPTLY: Duration = Duration::from_secs(30);
/// A connection is lost after two of them without a word: far above such a standstill, and well within this test.
const HEARTBEAT: Duration = Duration::from_secs(4);

#[derive(Debug)]
struct Jumping {
    true_clock: SystemClock,
    offset_ms: AtomicI64,
}

impl Clock for Jumping {
    fn now(&self) -> Now {
        let now = self.true_clock.now();
        let wall_ms = now.wall_ms.saturating_add_signed(self.offset_ms.load(Ordering::SeqCst));
        Now { wall_ms, ..now }
    }
}

/// Goal: when the wall clock jumps a day, either way, no wait gets longer or shorter, no connection is lost, and a consumer takes
/// nothing for a repeat or a conflict; a time that an event names is met by the clock of now. Method: jumps while a nacked event,
/// an unroutable one and a scheduled one wait; with a consumer at the other end whose clock jumps too.
#[test]
fn b19_clock_jumps_a_day_either_way() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let full = [
        ("x-max-length", AMQPValue::LongInt(1)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    tap.queue("b19-full", &full);
    tap.queue("b19", &[]);
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(Jumping { true_clock: SystemClock::new(), offset_ms: AtomicI64::new(0) });
    let open = |name: &str| {
        let clock: Arc<Jumping> = Arc::clone(&clock);
        Store::builder().clock(clock).open(folder.path().join(name)).unwrap()
    };
    let (store, credit) = (open("a.redb"), open("b.redb"));
    let relay = store
        .relay("rabbit")
        .destination_attempts(1000)
        .backoff(Duration::from_millis(20), Duration::from_millis(200))
        .spawn(rabbit(&node.url()).heartbeat(HEARTBEAT))
        .unwrap();
    let source = RabbitMqSource::new(&node.url(), "b19").unwrap().heartbeat(HEARTBEAT);
    let consumer = credit.consumer("b19").spawn(source, |_, _| Ok(())).unwrap();
    let append = |event: Event| store.write(move |tx| tx.append(event.clone())).unwrap();
    let mut plain = 0;
    let mut append_plain = |count: u64| {
        for _ in 0..count {
            append(Event::bytes("matrix", payload("k", plain)).key("k").to("", "b19"))
                .wait_confirmed(PROMPTLY)
                .unwrap();
            plain += 1;
        }
        plain
    };
    for (n, offset) in [0, DAY_MS, -DAY_MS, 0].into_iter().enumerate() {
        let late = format!("b19-late-{n}");
        tap.exchange(&late, ExchangeKind::Fanout);
        // One fills the queue; the next waits for room, another for a route, a third for its time.
        append(Event::bytes("matrix", "fills").to("", "b19-full")).wait_confirmed(SOON).unwrap();
        let nacked = append(Event::bytes("matrix", "nacked").to("", "b19-full"));
        let returned = append(Event::bytes("matrix", "returned").to(&*late, ""));
        let in_a_minute = UNIX_EPOCH + Duration::from_millis(clock.now().wall_ms + 60_000);
        let scheduled = append(Event::bytes("matrix", "in time").not_before(in_a_minute).to("", "b19-late"));
        std::thread::sleep(Duration::from_millis(300));
        clock.offset_ms.store(offset, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(300));
        let began = Instant::now();
        // The nacked one is tried again meanwhile.
        assert!(tap.take_one("b19-full").is_some(), "what fills the queue");
        tap.bind("b19", &late, "");
        nacked.wait_confirmed(PROMPTLY).unwrap();
        returned.wait_confirmed(PROMPTLY).unwrap();
        append_plain(10);
        assert!(began.elapsed() < PROMPTLY, "after a jump to {offset} ms: {:?}", began.elapsed());
        assert_eq!(tap.drain("b19-full").len(), 1);
        drop(scheduled);
    }
    // Each was scheduled by the clock of before its jump. Three of those moments have been: the third, a minute after a day, has not.
    tap.queue("b19-late", &[]);
    until("what has been due", || tap.count("b19-late") == 3);
    append_plain(1);
    assert_eq!(tap.count("b19-late"), 3, "a day is not over");
    // The relay looks at the clock when something is appended.
    clock.offset_ms.store(2 * DAY_MS, Ordering::SeqCst);
    let plain = append_plain(1);
    until("what was scheduled", || tap.count("b19-late") == 4);
    until("all applied", || consumer.status().applied == plain + 4);
    let stats = consumer.status();
    assert_eq!((stats.repeated, stats.conflicts, stats.quarantined), (0, 0, 0), "{stats:?}");
    assert_eq!((relay.status().reconnects, stats.connections), (0, 1));
    assert!(relay.stop(SOON).clean);
    let _ = consumer.stop(SOON);
}
