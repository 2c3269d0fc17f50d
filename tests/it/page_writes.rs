//! What a commit costs in writes, bytes and syncs: figures that do not depend on the clock.

use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::{Event, ExpectedRevision, IoStats, Retention, Store, Transaction};

use crate::scratch::Random;

const COMMITS: u64 = 400;
const EVENTS: u64 = 100;

/// What went to the file, per so many commits or events.
#[derive(Debug, Clone, Copy)]
struct Cost {
    writes: f64,
    bytes: f64,
    syncs: f64,
}

/// Budgets, as measured; a tenth more is let pass. A commit is one sync; the file grows in steps, and each step is synced too.
/// The pages of the log that 100 records of about 200 bytes fill, and those that lead to them.
const LOG: Cost = Cost { writes: 13.3, bytes: 50_800.0, syncs: 1.0 };
/// Lanes are written in bulk, 4,096 events at a time.
const KEYED: Cost = Cost { writes: 13.6, bytes: 52_000.0, syncs: 1.0 };
/// So is the index of the streams: a row for each stream and bulk write.
const STREAMS: Cost = Cost { writes: 17.6, bytes: 68_100.0, syncs: 1.0 };
/// A commit of one event: a leaf of the log, the pages that lead to it, the trees' roots, the header.
const SINGLE: Cost = Cost { writes: 7.0, bytes: 24_900.0, syncs: 1.0 };
/// One commit of the relay's cursor, for all of the backlog.
const DRAINED: Cost = Cost { writes: 0.07, bytes: 230.0, syncs: 0.01 };
/// And one commit for each 512 records that go.
const TRIMMED: Cost = Cost { writes: 2.3, bytes: 8_400.0, syncs: 0.21 };

impl Cost {
    fn hold(self, what: &str, used: Self) {
        let within = |used: f64, budget: f64| used <= budget * 1.1;
        let all = within(used.writes, self.writes)
            && within(used.bytes, self.bytes)
            && within(used.syncs, self.syncs);
        assert!(all, "{what} costs {used:?}, its budget is {self:?}");
        assert!(used.writes > 0.0 && used.bytes > 0.0 && used.syncs > 0.0, "{what}: nothing was counted");
    }

    fn between(before: IoStats, after: IoStats, per: u64) -> Self {
        let each = |after: u64, before: u64| (after - before) as f64 / per as f64;
        Self {
            writes: each(after.writes, before.writes),
            bytes: each(after.bytes_written, before.bytes_written),
            syncs: each(after.syncs, before.syncs),
        }
    }
}

/// What commits of so many events each cost, after the store has warmed up.
fn io_of(
    events: u64,
    append: impl Fn(&Transaction, u64) -> onewrite::Result<()> + Send + Copy + 'static,
) -> Cost {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let run = |commits: u64, seed: u64| {
        let mut random = Random(seed);
        for _ in 0..commits {
            let seed = random.next();
            store
                .write(move |tx| {
                    let mut random = Random(seed);
                    (0..events).try_for_each(|_| append(tx, random.next()))
                })
                .unwrap();
        }
    };
    run(100, 1);
    let before: IoStats = store.stats().unwrap().io;
    run(COMMITS, 2);
    Cost::between(before, store.stats().unwrap().io, COMMITS)
}

fn event() -> Event {
    Event::bytes("counted", [7; 100]).unpublished()
}

fn keyed(tx: &Transaction, n: u64) -> onewrite::Result<()> {
    tx.append(event().key((n % 1000).to_string()).to("", "q")).map(drop)
}

/// Goal: events, lanes and the index of streams keep to their budgets. Method: count what goes to the file, in commits of 100
/// events of 100 bytes; say what was counted.
#[test]
fn hundred_events_cost_so_many_writes() {
    let log = io_of(EVENTS, |tx, _| tx.append(event()).map(drop));
    let keyed = io_of(EVENTS, keyed);
    let streams = io_of(EVENTS, |tx, n| {
        tx.stream(format!("s-{}", n % 1000)).append([event()], ExpectedRevision::Any).map(drop)
    });
    eprintln!("per 100 events: log alone {log:.1?}, 1,000 keys {keyed:.1?}, 1,000 streams {streams:.1?}");
    LOG.hold("log alone", log);
    KEYED.hold("1,000 keys", keyed);
    STREAMS.hold("1,000 streams", streams);
}

/// Goal: a commit of one keyed event has its budget too. Method: as above.
#[test]
fn one_event_costs_so_many_writes() {
    let single = io_of(1, keyed);
    eprintln!("per event, one in a commit: {single:.1?}");
    SINGLE.hold("one keyed event", single);
}

/// Goal: draining and trimming a backlog costs little beside having written it. Method: a relay drains 20,000 events of 100 bytes
/// while nobody writes, with its progress written at the end only; what goes to the file until it has stopped is counted. Again
/// where the log is trimmed, with commits of one event each that trim too.
#[test]
fn a_drained_event_costs_so_many_writes() {
    let kept = drained(Retention::forever());
    let trimmed = drained(Retention::until_confirmed());
    eprintln!("per 100 events drained: kept {kept:.2?}, trimmed {trimmed:.2?}");
    DRAINED.hold("drained", kept);
    TRIMMED.hold("drained and trimmed", trimmed);
}

fn drained(retention: Retention) -> Cost {
    const BACKLOG: u64 = 20_000;
    let trims = retention == Retention::until_confirmed();
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().retention(retention).progress_delay(Duration::from_secs(600));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    for _ in 0..BACKLOG / EVENTS {
        store.write(move |tx| (0..EVENTS).try_for_each(|n| keyed(tx, n))).unwrap();
    }
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let before = store.stats().unwrap().io;
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let began = Instant::now();
    while relay.status().confirmed < BACKLOG {
        assert!(began.elapsed() < Duration::from_secs(120), "{:?}", relay.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(relay.stop(Duration::from_secs(60)).clean);
    if trims {
        // At most 512 records with each commit, at least 256.
        for _ in 0..BACKLOG / 512 {
            store.write(|tx| tx.append(event())).unwrap();
        }
        assert!(store.stats().unwrap().trimmed_to > BACKLOG - 512, "{:?}", store.stats());
    }
    Cost::between(before, store.stats().unwrap().io, BACKLOG / EVENTS)
}
