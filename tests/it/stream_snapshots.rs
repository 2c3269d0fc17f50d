//! Snapshots of aggregates: an abbreviation that never fails, and never replaces, what it abbreviates.

use onewrite::{Aggregate, Error, Event, ExpectedRevision, Recorded, Result, Store, limits};

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Its snapshot is as long as it counts.
#[derive(Debug, Default, PartialEq)]
struct Large(usize);

impl Aggregate for Large {
    const CATEGORY: &'static str = "large";
    const SNAPSHOT_EVERY: u64 = 2;
    type Event = usize;

    fn encode(event: &usize) -> Result<Event> {
        Ok(Event::bytes("grew", event.to_string()))
    }

    fn decode(recorded: &Recorded) -> Result<usize> {
        String::from_utf8_lossy(recorded.payload()).parse().map_err(Error::app)
    }

    fn apply(&mut self, event: &usize) {
        self.0 += event;
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some(vec![7; self.0])
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        Some(Self(snapshot.len()))
    }
}

/// Goal: a state whose snapshot exceeds its limit hinders no command; the snapshot is left out, counted, and tried again once as many
/// events have come; a direct call is told of the snapshot. Method: a state that grows by a half of the limit and shrinks again never.
#[test]
fn a_snapshot_over_its_limit_is_left_out() {
    let (_folder, store) = open();
    let large = store.aggregate::<Large>("1");
    let half = limits::SNAPSHOT_BYTES_MAX / 2;
    for (n, left_out) in [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2)] {
        let executed = large.execute(|state| Ok(vec![if state.0 < 3 * half { half } else { 1 }])).unwrap();
        assert_eq!(executed.seqs().len(), 1, "command {n}");
        assert_eq!(store.stats().unwrap().snapshots_left_out, left_out, "command {n}");
    }
    let loaded = large.load().unwrap();
    assert_eq!(
        (loaded.state.0, loaded.snapshot),
        (3 * half + 4, Some(1)),
        "the older one stands for its events"
    );
    let told =
        store.write(|tx| tx.stream("large-1").save_snapshot(0, &vec![0; limits::SNAPSHOT_BYTES_MAX + 1]));
    assert!(matches!(told, Err(Error::SnapshotTooLarge { .. })), "{told:?}");
    assert_eq!(
        told.unwrap_err().to_string(),
        "the snapshot of stream `large-1` is 16777217 bytes long; at most 16777216 are allowed"
    );
    // The limit itself is none over it.
    store
        .write(|tx| {
            let stream = tx.stream("limit");
            stream.append([Event::bytes("t", "")], ExpectedRevision::Any)?;
            stream.save_snapshot(0, &vec![0; limits::SNAPSHOT_BYTES_MAX])
        })
        .unwrap();
}
