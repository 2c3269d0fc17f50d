//! `verify`: a store that is whole is reported so, and each thing that does not fit is reported by name.

use std::path::Path;
use std::time::{Duration, Instant};

use onewrite::broker::MemoryBroker;
use onewrite::redb::{Database, ReadableTable, TableDefinition, WriteTransaction};
use onewrite::{Event, ExpectedRevision, Finding, Store};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const CHUNKS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.chunks");

/// 6,000 events: streams and outbox, two bulk writes of the index, a truncated stream, a deleted one, one event in quarantine,
/// confirmed and trimmed. Returns what the quarantine holds.
fn filled(path: &Path) -> u64 {
    let store = Store::builder().progress_delay(Duration::from_millis(5)).open(path).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    let lost =
        store.write(|tx| tx.append(Event::bytes("t", "").key("k").to("", "nowhere"))).unwrap().value().seq;
    for n in 0..60_u64 {
        store
            .write(move |tx| {
                for at in 0..100 {
                    let stream = format!("s-{}", (n * 7 + at) % 23);
                    match at % 3 {
                        0 => drop(tx.append(Event::bytes("t", "").to("", "q"))?),
                        _ => drop(
                            tx.stream(stream)
                                .append([Event::bytes("t", "").to("", "q")], ExpectedRevision::Any)?,
                        ),
                    }
                }
                Ok(())
            })
            .unwrap();
    }
    store.write(|tx| tx.stream("s-1").truncate_before(50)).unwrap();
    store.write(|tx| tx.stream("s-2").tombstone()).unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while store.stats().unwrap().trimmed_to < 4000 {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    store
        .write(|tx| tx.stream("s-3").append([Event::bytes("t", "").unpublished()], ExpectedRevision::Any))
        .unwrap();
    let verified = store.verify().unwrap();
    assert!(verified.is_whole(), "{verified:?}");
    assert!(verified.stream_events > 3000 && verified.records > verified.stream_events, "{verified:?}");
    relay.stop(Duration::from_secs(5));
    store.close().unwrap();
    lost
}

fn findings(path: &Path, damage: impl FnOnce(&WriteTransaction)) -> Vec<Finding> {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.redb");
    std::fs::copy(path, &copy).unwrap();
    let db = Database::open(&copy).unwrap();
    let tx = db.begin_write().unwrap();
    damage(&tx);
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&copy).unwrap();
    let verified = store.verify().unwrap();
    assert_eq!(verified.findings_total, verified.findings.len() as u64);
    verified.findings
}

/// Goal: nothing is found in a store that is whole, whatever it has been through; a flipped byte, a chunk that is gone, one that
/// leads elsewhere or to nothing, one of a stream that never was, and a record that the quarantine still needs are each found, and nothing else.
/// Method: copies of one file, damaged by plain redb.
#[test]
fn what_does_not_fit_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let lost = filled(&path);
    assert_eq!(findings(&path, |_| {}), []);

    let mut at = 0;
    let flipped = findings(&path, |tx| {
        let mut log = tx.open_table(LOG).unwrap();
        let (seq, mut frame) = {
            let (seq, frame) = log.range(5000..).unwrap().next().unwrap().unwrap();
            (seq.value(), frame.value().to_vec())
        };
        *frame.last_mut().unwrap() ^= 1;
        log.insert(seq, frame.as_slice()).unwrap();
        at = seq;
    });
    assert!(flipped.iter().any(|it| matches!(it, Finding::Record(error) if error.seq == at)), "{flipped:?}");

    let chunk_of = |tx: &WriteTransaction| {
        let chunks = tx.open_table(CHUNKS).unwrap();
        let (key, value) = chunks.iter().unwrap().next().unwrap().unwrap();
        (key.value().to_vec(), value.value().to_vec())
    };
    let gone = findings(&path, |tx| {
        let (key, _) = chunk_of(tx);
        tx.open_table(CHUNKS).unwrap().remove(key.as_slice()).unwrap();
    });
    assert!(gone.len() > 1, "{gone:?}");
    assert!(
        gone.iter().all(|it| matches!(it, Finding::StreamIndex { stream, .. } if stream == "s-0")),
        "{gone:?}"
    );

    for elsewhere in [0_u64, 1 << 40] {
        let led_astray = findings(&path, |tx| {
            let (key, mut value) = chunk_of(tx);
            value[..8].copy_from_slice(&elsewhere.to_le_bytes());
            tx.open_table(CHUNKS).unwrap().insert(key.as_slice(), value.as_slice()).unwrap();
        });
        let revisions: Vec<_> = led_astray
            .iter()
            .map(|it| match it {
                Finding::StreamIndex { stream, revision, .. } if stream == "s-0" => *revision,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(
            !revisions.is_empty() && revisions.iter().all(|revision| *revision == revisions[0]),
            "{led_astray:?}"
        );
    }

    let ghost = findings(&path, |tx| {
        let key = [&[5][..], b"ghost", &0_u64.to_be_bytes()].concat();
        tx.open_table(CHUNKS).unwrap().insert(key.as_slice(), &5500_u64.to_le_bytes()[..]).unwrap();
    });
    assert_eq!(ghost, [Finding::StreamIndex { stream: "ghost".into(), revision: 0, seq: 5500 }]);

    let needed = findings(&path, |tx| drop(tx.open_table(LOG).unwrap().remove(lost).unwrap()));
    assert_eq!(needed, [Finding::Exception { seq: lost }]);
}

/// Goal: a verification looks at records as they were recorded: events of newer versions are whole, also for a release that cannot read
/// them. Method: events of versions 1 and 2, verified with their upcast and without.
#[test]
fn events_of_every_version_are_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let upcast = || Store::builder().upcast(("paid", 1), ("paid", 2), |cents| Ok(cents.to_vec()));
    let store = upcast().open(&path).unwrap();
    for version in [1, 2] {
        let paid = move || onewrite::Event::bytes("paid", "100").version(version).unpublished();
        store
            .write(move |tx| tx.stream("account-7").append([paid()], onewrite::ExpectedRevision::Any))
            .unwrap();
    }
    let looked = |store: &Store| {
        let verified = store.verify().unwrap();
        (verified.records, verified.findings_total)
    };
    assert_eq!(looked(&store), (2, 0));
    store.close().unwrap();
    assert_eq!(looked(&Store::open(&path).unwrap()), (2, 0));
}
