//! Rows and records with a right checksum that this library has not written: typed errors, bounded memory, loops that end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use onewrite::{Error, Event, ExpectedRevision, Message, OpenError, Store};

use crate::scratch::{child, child_under, task};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// A record of a stream: bytes of its frame before the checksum, and where its numbers stand.
const CRC_AT: usize = 4;
const CHECKED_FROM: usize = 8;
const END_OFFSET_AT: usize = 8;
const LANE_NUMBER_AT: usize = 32;
const REVISION_AT: usize = 44;

/// Changes a record, moves it to another number, and gives it the checksum that fits.
fn forge(path: &Path, from: u64, to: u64, changes: &[(usize, u64)]) {
    let db = Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut log = tx.open_table(LOG).unwrap();
        let mut bytes = log.remove(from).unwrap().unwrap().value().to_vec();
        for (at, number) in changes {
            bytes[*at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let mut sum = crc32fast::Hasher::new();
        sum.update(&to.to_le_bytes());
        sum.update(&bytes[CHECKED_FROM..]);
        bytes[CRC_AT..CHECKED_FROM].copy_from_slice(&sum.finalize().to_le_bytes());
        log.insert(to, bytes.as_slice()).unwrap();
    }
    tx.commit().unwrap();
}

fn of_stream(payload: &'static str) -> Event {
    Event::bytes("e", payload).unpublished()
}

/// The child must end with success within a minute.
fn ends(mut command: Command, about: &str) {
    let mut child = command.spawn().unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{about}: it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{about}: {status}");
}

/// Goal: no number in a record is a length in memory or a number to add to. Method: one record of a stream of two, with a right checksum, says that it has a
/// revision, a number in its lane, an end or a sequence number far away; a process that may use 3 GB of memory opens the store and uses it.
#[test]
fn a_number_in_a_record_is_no_length_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.redb");
    let store = Store::open(&whole).unwrap();
    for payload in ["1", "2"] {
        let append = move |tx: &onewrite::Transaction| {
            tx.stream("s-1").append([of_stream(payload)], ExpectedRevision::Any)
        };
        store.write(append).unwrap();
    }
    store.write(|tx| tx.append(Event::bytes("published", "3").key("k").to("", "q"))).unwrap();
    store.close().unwrap();
    let far = [2_000_000_000, 1 << 40, i64::MAX as u64, u64::MAX - 1, u64::MAX];
    type Case = (u64, u64, Vec<(usize, u64)>);
    let mut cases: Vec<Case> = Vec::new();
    for number in far {
        cases.push((1, 1, vec![(REVISION_AT, number)]));
        cases.push((1, number, vec![(REVISION_AT, number - 1)]));
        cases.push((1, number, vec![(REVISION_AT, 1)]));
        cases.push((2, 2, vec![(LANE_NUMBER_AT, number)]));
        cases.push((2, 2, vec![(END_OFFSET_AT, number)]));
        cases.push((2, number, vec![]));
    }
    for (at, (from, to, changes)) in cases.into_iter().enumerate() {
        let path = folder.path().join(format!("{at}.redb"));
        fs::copy(&whole, &path).unwrap();
        forge(&path, from, to, &changes);
        let limited = ["sh", "-c", "ulimit -v 3000000; exec \"$0\" \"$@\""];
        let task = "hostile_rows::child_uses_a_forged_store";
        let command = child_under(&limited, task, &path, "");
        ends(command, &format!("record {from} at {to} with {changes:?}"));
    }
}

#[test]
fn child_uses_a_forged_store() {
    let Some((path, _)) = task() else { return };
    let store = match Store::open(&path) {
        Ok(store) => store,
        Err(Error::Open(OpenError::Damaged { .. })) => return,
        Err(other) => panic!("{other:?}"),
    };
    let _ = store.stats().unwrap();
    let _ = store.verify();
    let snapshot = store.read().unwrap();
    let reader = snapshot.stream("s-1").unwrap();
    // A stream that says it is long is read event by event.
    let _ = reader.events(0).take(1000).filter(Result::is_ok).count();
    let _ = reader.events(0).rev().take(1000).filter(Result::is_ok).count();
    let _ = snapshot.events(0).unwrap().take(1000).filter(Result::is_ok).count();
    let append = |tx: &onewrite::Transaction| {
        tx.append(Event::bytes("published", "4").key("k").to("", "q"))?;
        tx.stream("s-1").append([of_stream("5")], ExpectedRevision::Any)
    };
    let _ = store.write(append);
    // Outside a closure a panic would reach this caller.
    let tx = store.begin().unwrap();
    let _ = append(&tx);
    drop(tx);
    let old = store.read().unwrap();
    let _ = store.write(|tx| tx.stream("s-1").truncate_before(u64::MAX));
    let _ = old.stream("s-1").map(|reader| reader.events(0).take(1000).count());
    let _ = store.write(|tx| tx.stream("s-1").tombstone());
    drop((snapshot, old));
    let _ = store.close();
    let _ = Store::open(&path).map(Store::close);
}

/// A store with a rejected delivery, one that waits parked, a quarantined event and one that waits behind it.
fn furnished(path: &Path) {
    let store = Store::open(path).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("in", QueueOptions::default());
    for n in 0..3 {
        let id = Some(format!("m-{n}").into());
        broker.publish("", "in", Message { message_id: id, ..Default::default() }).unwrap();
    }
    let rejects = |_: &onewrite::broker::Delivery, _: &onewrite::Transaction| Err(Error::reject("no"));
    let consumer = store.consumer("scope").spawn(broker.source("in"), rejects).unwrap();
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    for _ in 0..2 {
        store.write(|tx| tx.append(Event::bytes("lost", "").key("k").to("nowhere", "x"))).unwrap();
    }
    let began = Instant::now();
    while consumer.status().rejected < 3 || store.stats().unwrap().quarantined == 0 {
        assert!(began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    consumer.stop(Duration::from_secs(5));
    let _ = relay.stop(Duration::from_secs(5));
    store.close().unwrap();
}

/// Goal: a key of another form than its table's ends no loop in a circle: it is an error, or passed over. Method: beside the rows of a furnished store, rows whose
/// keys are longer, end with a small number or the largest, in every table that is walked key by key; a child opens the store and walks all of them.
#[test]
fn a_key_of_another_length_is_walked_past_or_reported() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.redb");
    furnished(&whole);
    let scoped = |kind: u8, number: u64| [&[5][..], b"scope", &[kind], &number.to_be_bytes()].concat();
    let cursor = 1_u32.to_be_bytes();
    let due = |ms: u64, seq: u64| [&cursor[..], &ms.to_be_bytes(), &seq.to_be_bytes()].concat();
    let parked = |seq: u64| [&cursor[..], &[0, 1], b"k", &seq.to_be_bytes()].concat();
    let exception = |seq: u64| [&cursor[..], &seq.to_be_bytes()].concat();
    let prefixes: [(&str, Vec<Vec<u8>>); 8] = [
        ("onewrite.rejected", vec![scoped(0, 1), scoped(0, 300), scoped(1, 1)]),
        ("onewrite.in_hand", vec![scoped(0, 1), scoped(1, 1)]),
        ("onewrite.due", vec![due(1, 0), due(1, 1)]),
        ("onewrite.parked", vec![parked(1), parked(u64::MAX)]),
        ("onewrite.exceptions", vec![exception(0), exception(1)]),
        ("onewrite.failures", vec![exception(0)]),
        ("onewrite.chunks", vec![[&[1][..], b"s", &7_u64.to_be_bytes()].concat()]),
        ("onewrite.seen", vec![[&[5][..], b"scope", &[7; 33], &[1; 8]].concat()]),
    ];
    for (table, keys) in prefixes {
        for key in keys {
            for more in [&[0; 8][..], &[0xff; 8], &[0xff; 9], &[0], &[], &[0; 40]] {
                let is_last = more.is_empty();
                let key = if is_last {
                    [&key[..key.len() - 8], &[0xff; 8]].concat()
                } else {
                    [&key, more].concat()
                };
                let path = folder.path().join("forged.redb");
                fs::copy(&whole, &path).unwrap();
                let db = Database::open(&path).unwrap();
                let tx = db.begin_write().unwrap();
                let like = {
                    let rows = tx.open_table(Bytes::new(table)).unwrap();
                    let mut like = rows.iter().unwrap().map(|row| row.unwrap().1.value().to_vec());
                    like.find(|row| row.len() > 16).unwrap_or_default()
                };
                tx.open_table(Bytes::new(table)).unwrap().insert(key.as_slice(), like.as_slice()).unwrap();
                tx.commit().unwrap();
                drop(db);
                let command = child("hostile_rows::child_walks_every_table", &path, "");
                ends(command, &format!("{table} with {key:?}"));
            }
        }
    }
}

#[test]
fn child_walks_every_table() {
    let Some((path, _)) = task() else { return };
    walk(&path);
}

fn walk(path: &PathBuf) {
    let store = match Store::open(path) {
        Ok(store) => store,
        Err(Error::Open(OpenError::Damaged { .. } | OpenError::Storage { .. })) => return,
        Err(other) => panic!("{other:?}"),
    };
    let _ = store.stats();
    let _ = store.verify();
    let broker = MemoryBroker::new();
    broker.declare_queue("in", QueueOptions::default());
    let relay = store.relay("r").spawn(broker.publisher());
    let consumer = store.consumer("scope").spawn(broker.source("in"), |_, _| Ok(()));
    if let Ok(quarantine) = store.quarantine("r") {
        let _ = quarantine.list(None, 1000);
        let _ = quarantine.redrive(0);
    }
    let rejected = store.rejected("scope");
    let _ = rejected.list(None, 1000);
    let _ = rejected.redrive_all(&onewrite::QuarantineFilter::all());
    let _ = store.write(|tx| tx.append(Event::bytes("paid", "").key("k").to("", "in")));
    let _ = store.write(|tx| tx.stream("s").tombstone());
    std::thread::sleep(Duration::from_millis(20));
    if let Ok(relay) = relay {
        let _ = relay.stop(Duration::from_secs(5));
    }
    if let Ok(consumer) = consumer {
        consumer.stop(Duration::from_secs(5));
    }
    let _ = store.forget_relay("r");
    let _ = store.close();
}

/// Goal: a rejected delivery's key that does not say which it is, is an error of `list` and `redrive_all`, which ends. Method: two keys of another length beside genuine rows.
#[test]
fn a_rejected_row_with_a_foreign_key_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    furnished(&path);
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut rows = tx.open_table(Bytes::new("onewrite.rejected")).unwrap();
        let key = [&[5][..], b"scope", &[0], &2_u64.to_be_bytes(), &0_u64.to_be_bytes()].concat();
        rows.insert(key.as_slice(), &b"row"[..]).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    assert!(Database::open(&path).unwrap().begin_read().is_ok());
    let store = Store::open(&path).unwrap();
    let rejected = store.rejected("scope");
    assert!(matches!(rejected.list(None, 100), Err(Error::Storage(_))));
    assert!(matches!(rejected.redrive_all(&onewrite::QuarantineFilter::all()), Err(Error::Storage(_))));
    assert_eq!(rejected.list(None, 3).unwrap().len(), 3, "those before it can be listed");
    rejected.discard(1).unwrap();
}
