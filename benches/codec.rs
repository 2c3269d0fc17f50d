//! One event to its record and back, beside what a user of redb would write by hand: a struct as bincode behind a CRC-32.
//!
//! `cargo bench --features bincode --bench codec`. Both sides run on redb's pages without a commit: writing is appended and rolled back, reading is a warm
//! scan. The same parts on both sides: id, type, key, exchange, routing key, content type, time, a payload of 256 bytes; what is read in place
//! is found, not copied. The ratios at the end come from interleaved rounds with medians (`ROUNDS=15`, `EVENTS=10000`).

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

mod rounds;

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use onewrite::redb::{Database, ReadableDatabase, TableDefinition};
use onewrite::{Event, Store};
use rounds::{Side, is_test, rates, setting};
use serde::{Deserialize, Serialize};

const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");
const PAYLOAD: [u8; 256] = [8; 256];
const ID: &str = "0190a000-0000-7000-8000-000000000000";

fn event(n: u64) -> Event {
    Event::bytes("payment.completed", PAYLOAD).key(key(n)).id(format!("{ID}-{n}")).to("payments", "completed")
}

fn key(n: u64) -> String {
    format!("account-{}", n % 1000)
}

/// The row that a user would write.
#[derive(Serialize, Deserialize)]
struct Row {
    id: String,
    event_type: String,
    key: Option<String>,
    exchange: String,
    routing_key: String,
    content_type: String,
    time_ms: u64,
    #[serde(with = "in_one_piece")]
    payload: Vec<u8>,
}

/// serde takes a vector of bytes for a sequence, one by one: more than half of all the time. This is what the crate `serde_bytes` does.
mod in_one_piece {
    use std::fmt;

    use serde::de::Visitor;
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

impl Row {
    fn new(n: u64) -> Self {
        Self {
            id: format!("{ID}-{n}"),
            event_type: "payment.completed".to_owned(),
            key: Some(key(n)),
            exchange: "payments".to_owned(),
            routing_key: "completed".to_owned(),
            content_type: "application/octet-stream".to_owned(),
            time_ms: 1_790_000_000_000 + n,
            payload: PAYLOAD.to_vec(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(512);
        bytes.extend_from_slice(&[0; 4]);
        bincode::serde::encode_into_std_write(self, &mut bytes, bincode::config::standard()).unwrap();
        let crc = crc32fast::hash(bytes.get(4..).unwrap()).to_le_bytes();
        bytes.get_mut(..4).unwrap().copy_from_slice(&crc);
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        bincode::serde::decode_from_slice(checked(bytes), bincode::config::standard()).unwrap().0
    }
}

/// The same, where it lies.
#[derive(Deserialize)]
#[allow(dead_code, reason = "decoded, not used")]
struct RowInPlace<'a> {
    id: &'a str,
    event_type: &'a str,
    key: Option<&'a str>,
    exchange: &'a str,
    routing_key: &'a str,
    content_type: &'a str,
    time_ms: u64,
    payload: &'a [u8],
}

impl<'a> RowInPlace<'a> {
    fn decode(bytes: &'a [u8]) -> Self {
        bincode::serde::borrow_decode_from_slice(checked(bytes), bincode::config::standard()).unwrap().0
    }
}

fn checked(bytes: &[u8]) -> &[u8] {
    let (crc, row) = bytes.split_first_chunk::<4>().unwrap();
    assert_eq!(u32::from_le_bytes(*crc), crc32fast::hash(row));
    row
}

/// Both files, filled and warm.
struct Files {
    store: Store,
    plain: Database,
    events: u64,
    _folder: tempfile::TempDir,
}

impl Files {
    fn new(events: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::builder().cache_bytes(1 << 30).open(folder.path().join("ours.redb")).unwrap();
        store.write(move |tx| (0..events).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
        let mut builder = Database::builder();
        builder.set_cache_size(1 << 30);
        let plain = builder.create(folder.path().join("plain.redb")).unwrap();
        let tx = plain.begin_write().unwrap();
        {
            let mut rows = tx.open_table(OUTBOX).unwrap();
            (0..events).for_each(|n| drop(rows.insert(n, Row::new(n).encode().as_slice()).unwrap()));
        }
        tx.commit().unwrap();
        Self { store, plain, events, _folder: folder }
    }

    fn encode(&self) -> u64 {
        let tx = self.store.begin().unwrap();
        (0..self.events).try_for_each(|n| tx.append(event(n)).map(|_| ())).unwrap();
        tx.rollback().unwrap();
        self.events
    }

    fn encode_by_hand(&self) -> u64 {
        let tx = self.plain.begin_write().unwrap();
        {
            let mut rows = tx.open_table(OUTBOX).unwrap();
            let numbers = self.events..2 * self.events;
            numbers.for_each(|n| drop(rows.insert(n, Row::new(n).encode().as_slice()).unwrap()));
        }
        tx.abort().unwrap();
        self.events
    }

    fn decode(&self) -> u64 {
        let events = self.store.read().unwrap().events(0).unwrap();
        events.map(|event| black_box(event.unwrap()).payload().len() as u64).sum()
    }

    fn decode_by_hand(&self) -> u64 {
        let rows = self.plain.begin_read().unwrap().open_table(OUTBOX).unwrap();
        let rows = rows.range::<u64>(..).unwrap();
        rows.map(|row| black_box(Row::decode(row.unwrap().1.value())).payload.len() as u64).sum()
    }

    fn decode_in_place_by_hand(&self) -> u64 {
        let rows = self.plain.begin_read().unwrap().open_table(OUTBOX).unwrap();
        let rows = rows.range::<u64>(..).unwrap();
        rows.map(|row| black_box(RowInPlace::decode(row.unwrap().1.value())).payload.len() as u64).sum()
    }

    fn decode_in_place(&self) -> u64 {
        let mut bytes = 0;
        let visited = self.store.read().unwrap().replay(0).unwrap().visit(|event| -> onewrite::Result<()> {
            bytes += black_box(event?).payload().len() as u64;
            Ok(())
        });
        visited.unwrap();
        bytes
    }

    fn sides(&self) -> Vec<Side<'_>> {
        vec![
            ("encode, by hand", Box::new(|| self.encode_by_hand())),
            ("encode, onewrite", Box::new(|| self.encode())),
            ("decode, by hand", Box::new(|| self.decode_by_hand())),
            ("decode, onewrite", Box::new(|| self.decode())),
            ("decode in place, by hand", Box::new(|| self.decode_in_place_by_hand())),
            ("decode in place, onewrite", Box::new(|| self.decode_in_place())),
        ]
    }
}

fn criterion_benches(criterion: &mut Criterion, files: &Files) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(files.events)).sample_size(20);
    for (name, mut work) in files.sides() {
        group.bench_function(name, |bench| bench.iter(&mut work));
    }
    group.finish();
}

fn main() {
    let files = Files::new(setting("EVENTS", 10_000));
    let mut criterion = Criterion::default().configure_from_args();
    criterion_benches(&mut criterion, &files);
    criterion.final_summary();
    if is_test() {
        return;
    }
    let rounds = setting("ROUNDS", 15);
    let mut sides = files.sides();
    let rates = rates(rounds, files.events, &mut sides);
    println!("\nevents per second, medians of {rounds} interleaved rounds of {}", files.events);
    // Each of ours stands behind its other side.
    for (names, rates) in sides.chunks(2).zip(rates.chunks(2)) {
        for ((name, _), rate) in names.iter().zip(rates) {
            println!("{name:<28} {rate:>12.0}   {:.2} of by hand", rate / rates.first().unwrap());
        }
    }
}
