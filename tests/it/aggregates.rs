//! Aggregates: decisions on what is true, snapshots that are never misread, conflicts that are decided anew.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use onewrite::{Aggregate, Error, Event, RecordedEvent, Result, Store};

use crate::scratch::crash_copy;

/// Sums its events. `VERSION` of its snapshots; `HONEST`: whether a snapshot says the truth, so that one sees where it was read.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Sum<const VERSION: u32, const HONEST: bool> {
    total: u64,
    events: u64,
}

impl<const VERSION: u32, const HONEST: bool> Aggregate for Sum<VERSION, HONEST> {
    const CATEGORY: &'static str = "sum";
    const SNAPSHOT_EVERY: u64 = 4;
    const SNAPSHOT_VERSION: u32 = VERSION;
    type Event = u64;

    fn encode(event: &u64) -> Result<Event> {
        Ok(Event::bytes("added", event.to_string()).unpublished())
    }

    fn decode(recorded: &RecordedEvent) -> Result<u64> {
        if recorded.event_type() != "added" {
            return Err(Error::reject(format!("unknown event type `{}`", recorded.event_type())));
        }
        String::from_utf8_lossy(recorded.payload()).parse().map_err(Error::app)
    }

    fn apply(&mut self, event: &u64) {
        self.total += event;
        self.events += 1;
    }

    fn save(&self) -> Option<Vec<u8>> {
        let total = if HONEST { self.total } else { self.total + 1_000_000 };
        Some([total.to_le_bytes(), self.events.to_le_bytes()].concat())
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        let (total, events) = snapshot.split_first_chunk::<8>()?;
        Some(Self { total: u64::from_le_bytes(*total), events: u64::from_le_bytes(events.try_into().ok()?) })
    }
}

type Honest = Sum<1, true>;

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Goal: loading gives the fold of all events, with or without snapshots, after each append and each crash. Method: add 1 to
/// 3 events at a time, compare with the sum, look where the snapshot stands.
#[test]
fn a_snapshot_is_an_abbreviation_and_no_more() {
    let (folder, mut store) = open();
    let (mut total, mut count) = (0, 0);
    for round in 1..30_u64 {
        let added: Vec<u64> = (0..round % 4).map(|n| round * 10 + n).collect();
        (total, count) = (total + added.iter().sum::<u64>(), count + added.len() as u64);
        let executed = store.aggregate::<Honest>("a").execute(|_| Ok(added.clone())).unwrap();
        assert_eq!(executed.seqs().len(), added.len());
        assert_eq!(executed.value().state, Honest { total, events: count });
        if round % 7 == 0 {
            store = Store::open(crash_copy(&store, folder.path())).unwrap();
        }
        let loaded = store.aggregate::<Honest>("a").load().unwrap();
        assert_eq!(loaded.state, Honest { total, events: count });
        assert_eq!(loaded.revision, count.checked_sub(1));
        // None is further behind than the policy says, but for what one append brings.
        let since = count - loaded.snapshot.map_or(0, |revision| revision + 1);
        assert!(since < 4, "{since} events since the snapshot");
    }
}

/// Goal: a snapshot of another version, or one that its reader cannot read, is ignored. Method: snapshots that lie show
/// whether they were used.
#[test]
fn a_snapshot_of_another_version_is_ignored() {
    let (_folder, store) = open();
    store.aggregate::<Sum<1, false>>("a").execute(|_| Ok(vec![1, 2, 3, 4])).unwrap();
    let lied_to = store.aggregate::<Sum<1, false>>("a").load().unwrap();
    assert_eq!((lied_to.state.total, lied_to.snapshot), (1_000_010, Some(3)));
    let newer = store.aggregate::<Sum<2, true>>("a").load().unwrap();
    assert_eq!((newer.state.total, newer.snapshot), (10, None));
    store.write(|tx| tx.stream("sum-a").save_snapshot(1, b"short")).unwrap();
    assert_eq!(store.aggregate::<Honest>("a").load().unwrap().state.total, 10);
}

/// Goal: a state that leaves something out is never given. Method: truncate with and without a snapshot; an unknown event
/// type; a deleted stream.
#[test]
fn no_state_is_made_of_half_a_stream() {
    let (_folder, store) = open();
    store.aggregate::<Honest>("a").execute(|_| Ok(vec![1, 2, 3])).unwrap();
    store.write(|tx| tx.stream("sum-a").truncate_before(2)).unwrap();
    let error = store.aggregate::<Honest>("a").load().unwrap_err();
    assert!(matches!(error, Error::MissingRevision { revision: 0, .. }), "{error}");

    store.aggregate::<Honest>("b").execute(|_| Ok(vec![1, 2, 3, 4, 5])).unwrap();
    store.write(|tx| tx.stream("sum-b").truncate_before(5)).unwrap();
    assert_eq!(store.aggregate::<Honest>("b").load().unwrap().state.total, 15);

    let other = || [Event::bytes("renamed", "x").unpublished()];
    store.write(move |tx| tx.stream("sum-c").append(other(), onewrite::ExpectedRevision::Any)).unwrap();
    let error = store.aggregate::<Honest>("c").load().unwrap_err();
    assert_eq!(error.to_string(), "rejected: unknown event type `renamed`");

    store.write(|tx| tx.stream("sum-b").tombstone()).unwrap();
    assert!(matches!(store.aggregate::<Honest>("b").load(), Err(Error::StreamDeleted { .. })));
    assert_eq!(store.read().unwrap().stream("sum-b").unwrap().snapshot(1).unwrap(), None);
}

/// Goal: of decisions made at the same time none is lost and none builds on what is no longer true. Method: 8 threads withdraw
/// from one account as long as something is left.
#[test]
fn conflicts_are_decided_anew() {
    let (_folder, store) = open();
    store.aggregate::<Honest>("a").execute(|_| Ok(vec![0])).unwrap();
    let decisions = AtomicU32::new(0);
    let begin = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let sum = store.aggregate::<Honest>("a").attempts(1000);
                begin.wait();
                // Adds one as long as fewer than 100 are there.
                loop {
                    let executed = sum.execute(|state| {
                        decisions.fetch_add(1, Relaxed);
                        Ok(if state.total < 100 { vec![1] } else { Vec::new() })
                    });
                    if executed.unwrap().seqs().is_empty() {
                        break;
                    }
                }
            });
        }
    });
    let state = store.aggregate::<Honest>("a").load().unwrap().state;
    assert_eq!(state, Honest { total: 100, events: 101 });
    assert!(decisions.load(Relaxed) >= 108);
}

/// Goal: the bound on attempts holds, and the last conflict is reported. Method: somebody else is always faster.
#[test]
fn attempts_are_bounded() {
    let (_folder, store) = open();
    let mut decisions = 0;
    let outrun = store.aggregate::<Honest>("a").attempts(3).execute(|_| {
        decisions += 1;
        store.aggregate::<Honest>("a").execute(|_| Ok(vec![1]))?;
        Ok(vec![7])
    });
    assert!(matches!(outrun, Err(Error::WrongRevision { actual: Some(2), .. })), "{outrun:?}");
    assert_eq!(decisions, 3);
    assert_eq!(store.aggregate::<Honest>("a").load().unwrap().state.total, 3);
}
