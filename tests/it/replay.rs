//! Replay: what is shown of the log without copying is what [`Snapshot::events`](onewrite::Snapshot::events) reads, both
//! when it is iterated and when it is visited; damage included.

use onewrite::redb::{Database, TableDefinition};
use onewrite::{Event, ExpectedRevision, RecordedEvent, Replay, ReplayedEvent, Result, Store};
use tempfile::TempDir;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");

/// What can be seen of an event in its place.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    seq: u64,
    time_ms: u64,
    event_type: String,
    version: u32,
    key: Option<String>,
    stream: Option<String>,
    category: Option<String>,
    revision: Option<u64>,
    payload: Vec<u8>,
}

/// Both forms of an event have the same methods, and no trait of them.
macro_rules! seen {
    ($event:expr) => {{
        let event = $event;
        Seen {
            seq: event.seq(),
            time_ms: event.time_ms(),
            event_type: event.event_type().to_owned(),
            version: event.version(),
            key: event.key().map(str::to_owned),
            stream: event.stream().map(str::to_owned),
            category: event.category().map(str::to_owned),
            revision: event.revision(),
            payload: event.payload().to_vec(),
        }
    }};
}

/// What was read of one place: an event, or what is reported instead of it.
type Read = std::result::Result<Seen, String>;

fn in_its_place(event: Result<ReplayedEvent<impl AsRef<[u8]>>>) -> Read {
    event.map(|event| seen!(event)).map_err(|error| error.to_string())
}

fn visited(mut replay: Replay) -> Vec<Read> {
    let mut read = Vec::new();
    let end = replay.visit(|event| -> Result<()> {
        read.push(in_its_place(event));
        Ok(())
    });
    end.unwrap();
    read
}

/// Stops at each event, and goes on behind it.
fn visited_one_by_one(mut replay: Replay) -> Vec<Read> {
    let mut read = Vec::new();
    let mut one = |replay: &mut Replay| {
        replay.visit(|event| {
            read.push(in_its_place(event));
            Err(())
        })
    };
    while one(&mut replay).is_err() {}
    read
}

/// By each way of reading, which must agree; what they read.
fn read_from(store: &Store, from: u64) -> Vec<Read> {
    let snapshot = store.read().unwrap();
    let copied =
        |event: Result<RecordedEvent>| event.map(|event| seen!(event)).map_err(|error| error.to_string());
    let owned: Vec<Read> = snapshot.events(from).unwrap().map(copied).collect();
    for (how, read) in [
        ("iterated", snapshot.replay(from).unwrap().map(in_its_place).collect()),
        ("visited", visited(snapshot.replay(from).unwrap())),
        ("visited one by one", visited_one_by_one(snapshot.replay(from).unwrap())),
    ] {
        assert_eq!(read, owned, "{how}, from {from}");
    }
    owned
}

/// Events of every form that shows: 48 of them.
fn fill(store: &Store) {
    for n in 0..12_u64 {
        let long = "ü".repeat(1 + n as usize * 10);
        store
            .write(move |tx| {
                tx.append(Event::bytes("paid", n.to_string()).unpublished())?;
                tx.append(
                    Event::bytes("größe", []).key(long.as_str()).header("kind", n as i64).to("bank", "out"),
                )?;
                let of_stream =
                    [Event::bytes("opened", vec![n as u8; 5000]), Event::bytes("shut", "x").version(3)];
                tx.stream(format!("account-{}", n % 5)).append(of_stream, ExpectedRevision::Any)?;
                Ok(())
            })
            .unwrap();
    }
}

fn open() -> (TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().event_version("shut", 3).open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Goal: what is seen in its place is what is read as a copy, from any position, stopped and gone on with or not. Method: events of
/// every form, each way of reading beside the other, from each position and beyond the end.
#[test]
fn what_is_seen_is_what_is_recorded() {
    let (_folder, store) = open();
    assert_eq!(read_from(&store, 0), []);
    fill(&store);
    for from in 0..50 {
        let read = read_from(&store, from);
        assert_eq!(read.len() as u64, 48_u64.saturating_sub(from));
        assert!(read.iter().all(Result::is_ok));
    }
}

/// Goal: damage is reported in its place, once, by each way of reading, and what follows it is still read. Method: by plain redb, one record
/// with a bit flipped, one cut short, one gone, one that stands where another belongs, two gone and the one behind them flipped, and the
/// last one three bytes long; what is reported of each.
#[test]
fn damage_is_reported_in_its_place() {
    let (_folder, store) = open();
    fill(&store);
    let path = store.path().to_owned();
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut log = tx.open_table(LOG).unwrap();
        let record = |log: &onewrite::redb::Table<'_, u64, &'static [u8]>, seq: u64| {
            onewrite::redb::ReadableTable::get(log, seq).unwrap().unwrap().value().to_vec()
        };
        for seq in [3, 32] {
            let mut flipped = record(&log, seq);
            *flipped.last_mut().unwrap() ^= 1;
            log.insert(seq, flipped.as_slice()).unwrap();
        }
        let short = record(&log, 9);
        log.insert(9, &short[..short.len() / 2]).unwrap();
        let other = record(&log, 21);
        log.insert(22, other.as_slice()).unwrap();
        for seq in [15, 30, 31] {
            log.remove(seq).unwrap();
        }
        log.insert(47, [1, 2, 3].as_slice()).unwrap();
    }
    tx.commit().unwrap();
    drop(db);

    let store = Store::builder().event_version("shut", 3).open(&path).unwrap();
    let read = read_from(&store, 0);
    // A gap is reported once, by its first number.
    let numbers: Vec<u64> = (0..48).filter(|seq| *seq != 31).collect();
    assert_eq!(read.len(), numbers.len());
    for (seq, read) in numbers.into_iter().zip(&read) {
        let wrong = match seq {
            3 | 9 | 22 | 32 => "its checksum does not match",
            15 | 30 => "it is missing",
            47 => "it does not begin with the record magic",
            _ => {
                assert_eq!(read.as_ref().unwrap().seq, seq);
                continue;
            }
        };
        let reported = read.as_ref().unwrap_err();
        assert!(
            reported.contains(&format!("record {seq} ")) && reported.contains(wrong),
            "{seq}: {reported}"
        );
    }
    // One after the other in turn, over the gaps too.
    let mut replay = store.read().unwrap().replay(0).unwrap();
    let mut in_turn = Vec::new();
    loop {
        let Some(event) = replay.next() else { break };
        in_turn.push(in_its_place(event));
        let _ = replay.visit(|event| {
            in_turn.push(in_its_place(event));
            Err(())
        });
    }
    assert_eq!(in_turn, read);
}

/// Goal: what a visitor panics with is its own affair. Method: one that does, at the second event; the replay then goes on behind it.
#[test]
fn a_visitors_panic_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().event_version("shut", 3).open(folder.path().join("a.redb")).unwrap();
    for n in 0..3 {
        crate::scratch::put(&store, n).unwrap();
    }
    let mut replay = store.read().unwrap().replay(0).unwrap();
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        replay.visit(|event| -> onewrite::Result<()> {
            if event?.seq() == 1 {
                std::panic::resume_unwind(Box::new("mine"));
            }
            Ok(())
        })
    }));
    assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"mine"));
    let mut seen = Vec::new();
    let mut note = |event: onewrite::Result<ReplayedEvent<&[u8]>>| {
        seen.push(event?.seq());
        Ok::<(), onewrite::Error>(())
    };
    replay.visit(&mut note).unwrap();
    assert_eq!(seen, [2]);
}
