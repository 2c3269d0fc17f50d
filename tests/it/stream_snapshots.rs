//! Snapshots of aggregates: an abbreviation that never fails, and never replaces, what it abbreviates.

use std::path::Path;

use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::{Aggregate, Error, Event, ExpectedRevision, Finding, RecordedEvent, Result, Store, limits};

use crate::scratch::crash_copy;

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

    fn decode(recorded: &RecordedEvent) -> Result<usize> {
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
/// events have come; a direct call learns of the snapshot. Method: a state that grows by a half of the limit and shrinks again never.
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
    let reported =
        store.write(|tx| tx.stream("large-1").save_snapshot(0, &vec![0; limits::SNAPSHOT_BYTES_MAX + 1]));
    assert!(matches!(reported, Err(Error::SnapshotTooLarge { .. })), "{reported:?}");
    assert_eq!(
        reported.unwrap_err().to_string(),
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

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const SNAPSHOTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.snapshots");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");

/// An account whose events are sums; each append saves a snapshot.
#[derive(Debug, Default, PartialEq, Clone, Copy)]
struct Account(u64);

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT_EVERY: u64 = 1;
    type Event = u64;

    fn encode(event: &u64) -> Result<Event> {
        Ok(Event::bytes("deposited", event.to_string()))
    }

    fn decode(recorded: &RecordedEvent) -> Result<u64> {
        String::from_utf8_lossy(recorded.payload()).parse().map_err(Error::app)
    }

    fn apply(&mut self, event: &u64) {
        self.0 += event;
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some(self.0.to_le_bytes().to_vec())
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        Some(Self(u64::from_le_bytes(snapshot.try_into().ok()?)))
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Damage {
    /// A byte of the newest record.
    Flip,
    /// Its row.
    Remove,
    /// The newest two rows.
    RemoveTwo,
}

/// Damages the newest records of the log by plain redb. The copy of a file that was open is repaired by that, so that afterwards it
/// looks as if it had been closed cleanly; `unclean` leaves it as a crash would.
fn damage(path: &Path, damage: Damage, unclean: bool) {
    let db = Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut log = tx.open_table(LOG).unwrap();
        let newest = log.last().unwrap().unwrap().0.value();
        match damage {
            Damage::Flip => {
                let mut frame = log.get(newest).unwrap().unwrap().value().to_vec();
                *frame.last_mut().unwrap() ^= 1;
                log.insert(newest, frame.as_slice()).unwrap();
            }
            Damage::Remove => drop(log.remove(newest).unwrap()),
            Damage::RemoveTwo => {
                drop(log.remove(newest).unwrap());
                drop(log.remove(newest - 1).unwrap());
            }
        }
    }
    tx.commit().unwrap();
    if unclean {
        let copy = path.with_extension("copy");
        std::fs::copy(path, &copy).unwrap();
        drop(db);
        std::fs::rename(&copy, path).unwrap();
    }
}

/// Goal: after a crash and damage to the newest records no state is reported that is not the sum of the stream's events, no revision and no
/// sequence number is given again that a snapshot knows, and `verify` finds what does not fit. Method: three deposits with a snapshot
/// each, damage of three kinds, a further deposit; then the same again over a bulk write of the index.
#[test]
fn a_snapshot_of_a_lost_event_is_not_used() {
    for (kind, unclean, fills) in [
        (Damage::Flip, false, false),
        (Damage::Flip, true, false),
        (Damage::Flip, true, true),
        (Damage::Remove, true, false),
        (Damage::RemoveTwo, true, false),
        (Damage::Remove, false, false),
    ] {
        let what = format!("{kind:?}, unclean: {unclean}, index written: {fills}");
        let (folder, store) = open();
        let account = store.aggregate::<Account>("1");
        account.execute(|_| Ok(vec![1])).unwrap();
        account.execute(|_| Ok(vec![10])).unwrap();
        if fills {
            let fill = |tx: &onewrite::Transaction| {
                (0..crate::support::tuning::DERIVED_FLUSH_EVENTS)
                    .try_for_each(|_| tx.append(Event::bytes("f", "").unpublished()).map(drop))
            };
            store.write(fill).unwrap();
        }
        account.execute(|_| Ok(vec![100])).unwrap();
        assert_eq!(account.load().unwrap().snapshot, Some(2));
        let next_seq = store.stats().unwrap().next_seq;
        let path = crash_copy(&store, folder.path());
        damage(&path, kind, unclean);

        let store = Store::open(&path).unwrap();
        let verified = store.verify().unwrap();
        let named = |finding: &Finding| matches!(finding, Finding::Snapshot { stream, revision: Some(2) } if stream == "account-1");
        assert!(verified.findings.iter().any(named), "{what}: {verified:?}");
        assert_eq!(store.read().unwrap().stream("account-1").unwrap().snapshot(0).unwrap(), None, "{what}");
        let event = || [Event::bytes("deposited", "1000")];
        let appended = store.write(move |tx| tx.stream("account-1").append(event(), ExpectedRevision::Any));
        let appended = appended.unwrap().into_value();
        if kind == Damage::Flip || unclean {
            assert_eq!((appended.revisions, appended.seqs), (3..4, vec![next_seq]), "{what}");
        }
        match store.aggregate::<Account>("1").load() {
            Ok(loaded) => {
                let snapshot = store.read().unwrap();
                let events = snapshot.stream("account-1").unwrap().events(0);
                let sum: u64 = events.map(|event| Account::decode(&event.unwrap()).unwrap()).sum();
                assert_eq!((loaded.state.0, loaded.snapshot), (sum, None), "{what}");
            }
            Err(Error::MissingRevision { revision: 1 | 2, .. } | Error::Corrupt(_)) => {}
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

/// Goal: a snapshot goes on standing for what was truncated, whatever trimming and a crash do; a damaged one is found. Method: truncate
/// up to and beyond the event that it names, crash, load; then flip a byte of its row.
#[test]
fn a_snapshot_stands_for_what_is_truncated() {
    let (folder, store) = open();
    let account = store.aggregate::<Account>("1");
    for by in [1, 10, 100] {
        account.execute(|_| Ok(vec![by])).unwrap();
    }
    store.write(|tx| tx.stream("account-1").truncate_before(3)).unwrap();
    let event = || [Event::bytes("deposited", "1000")];
    store.write(move |tx| tx.stream("account-1").append(event(), ExpectedRevision::Exact(2))).unwrap();
    // Of a stream without a readable event one can be saved too.
    store
        .write(|tx| {
            let all = tx.stream("all-gone");
            all.append([Event::bytes("deposited", "1")], ExpectedRevision::NoStream)?;
            all.truncate_before(1)?;
            all.save_snapshot(0, b"1")
        })
        .unwrap();
    let store = Store::open(crash_copy(&store, folder.path())).unwrap();
    assert_eq!(
        store.read().unwrap().stream("all-gone").unwrap().snapshot(0).unwrap(),
        Some((0, b"1".to_vec()))
    );
    let loaded = store.aggregate::<Account>("1").load().unwrap();
    assert_eq!((loaded.state, loaded.snapshot, loaded.revision), (Account(1111), Some(2), Some(3)));
    assert!(store.verify().unwrap().is_whole());

    let path = crash_copy(&store, folder.path());
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut rows = tx.open_table(SNAPSHOTS).unwrap();
        let mut row = rows.get(&b"account-1"[..]).unwrap().unwrap().value().to_vec();
        *row.last_mut().unwrap() ^= 1;
        rows.insert(&b"account-1"[..], row.as_slice()).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    let reported = Finding::Snapshot { stream: "account-1".into(), revision: None };
    assert_eq!(store.verify().unwrap().findings, [reported]);
    assert!(matches!(
        store.aggregate::<Account>("1").load(),
        Err(Error::MissingRevision { revision: 0, .. })
    ));
}

/// Goal: a file of format 3 opens, and its snapshots, which name no event, are read by their revision until the next is saved. Method:
/// rows are written back in the old form, and the format is set to 3, by plain redb.
#[test]
fn a_snapshot_of_format_3_is_read() {
    let (folder, store) = open();
    store.aggregate::<Account>("1").execute(|_| Ok(vec![1, 10])).unwrap();
    let path = crash_copy(&store, folder.path());
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        // Version 0, revision 1, a state that shows where it was read.
        let checked = [&0_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &500_u64.to_le_bytes()].concat();
        let mut crc = crc32fast::Hasher::new();
        crc.update(b"account-1");
        crc.update(&checked);
        let row = [&crc.finalize().to_le_bytes()[..], &checked].concat();
        tx.open_table(SNAPSHOTS).unwrap().insert(&b"account-1"[..], row.as_slice()).unwrap();
        tx.open_table(META).unwrap().insert("format", &3_u32.to_le_bytes()[..]).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    let account = store.aggregate::<Account>("1");
    assert_eq!(account.load().unwrap().state, Account(500));
    account.execute(|_| Ok(vec![1])).unwrap();
    let loaded = account.load().unwrap();
    assert_eq!((loaded.state, loaded.snapshot), (Account(501), Some(2)));
    assert!(store.verify().unwrap().is_whole());
}
