//! What a commit costs in writes and syncs: figures that do not depend on the clock.

use onewrite::{Event, ExpectedRevision, IoStats, Store, Transaction};

use crate::scratch::Random;

const COMMITS: u64 = 400;
const EVENTS: u64 = 100;

/// Writes and syncs of so many commits of 100 events each, after the store has warmed up.
fn io_of(append: impl Fn(&Transaction, u64) -> onewrite::Result<()> + Send + Copy + 'static) -> (f64, f64) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let run = |commits: u64, seed: u64| {
        let mut random = Random(seed);
        for _ in 0..commits {
            let seed = random.next();
            store
                .write(move |tx| {
                    let mut random = Random(seed);
                    (0..EVENTS).try_for_each(|_| append(tx, random.next()))
                })
                .unwrap();
        }
    };
    run(100, 1);
    let before: IoStats = store.stats().unwrap().io;
    run(COMMITS, 2);
    let after = store.stats().unwrap().io;
    let per_commit = |after: u64, before: u64| (after - before) as f64 / COMMITS as f64;
    (per_commit(after.writes, before.writes), per_commit(after.syncs, before.syncs))
}

fn event() -> Event {
    Event::bytes("counted", [7; 100]).unpublished()
}

/// Goal: the stream index stays within 40 page writes per 100 events over 1,000 streams, a lane per key costs little, and a commit
/// is one sync. Method: count what goes to the file, in commits of 100 events; say what was counted.
#[test]
fn hundred_events_cost_so_many_writes() {
    let (log, log_syncs) = io_of(|tx, _| tx.append(event()).map(drop));
    let (keyed, keyed_syncs) =
        io_of(|tx, n| tx.append(event().key((n % 1000).to_string()).to("", "q")).map(drop));
    let (streams, stream_syncs) = io_of(|tx, n| {
        tx.stream(format!("s-{}", n % 1000)).append([event()], ExpectedRevision::Any).map(drop)
    });
    eprintln!(
        "page writes per 100 events: log alone {log:.1}, 1,000 keys {keyed:.1}, 1,000 streams {streams:.1}"
    );
    eprintln!("syncs per commit: {log_syncs:.3}, {keyed_syncs:.3}, {stream_syncs:.3}");
    assert!((5.0..20.0).contains(&log), "{log}");
    assert!(keyed < 25.0, "{keyed}");
    assert!(streams <= 40.0, "{streams}");
    for syncs in [log_syncs, keyed_syncs, stream_syncs] {
        // The file grows in steps, and each step is synced too.
        assert!((1.0..1.1).contains(&syncs), "{syncs}");
    }
}
