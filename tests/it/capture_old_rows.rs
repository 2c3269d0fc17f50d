//! Rows of captured tables that their type cannot read, as a release that changes the type finds them; and codecs,
//! predicates and rows that are mended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use onewrite::broker::MemoryBroker;
use onewrite::redb::{Key, ReadableTable, TableDefinition, TypeName, Value};
use onewrite::{
    Capture, CaptureMode, Change, Error, Event, ExpectedRevision, Operation, Relay, Store, Transaction,
};

use crate::scratch::{broker, events, until};

const SOON: Duration = Duration::from_secs(30);

fn relay(store: &Store, broker: &MemoryBroker) -> Relay {
    store.relay("r").spawn(broker.publisher()).unwrap()
}

/// An amount, in the form of the first release: eight bytes.
#[derive(Debug)]
struct Old;

/// The same in the form of the second: a currency follows.
#[derive(Debug)]
struct New;

impl Value for Old {
    type SelfType<'a> = u64;
    type AsBytes<'a> = Vec<u8>;

    fn fixed_width() -> Option<usize> {
        None
    }

    fn from_bytes<'a>(data: &'a [u8]) -> u64
    where
        Self: 'a,
    {
        u64::from_le_bytes(data.try_into().unwrap())
    }

    fn as_bytes<'a, 'b: 'a>(value: &'a u64) -> Vec<u8>
    where
        Self: 'b,
    {
        value.to_le_bytes().to_vec()
    }

    fn type_name() -> TypeName {
        TypeName::new("amount")
    }
}

impl Value for New {
    type SelfType<'a> = (u64, char);
    type AsBytes<'a> = Vec<u8>;

    fn fixed_width() -> Option<usize> {
        None
    }

    fn from_bytes<'a>(data: &'a [u8]) -> (u64, char)
    where
        Self: 'a,
    {
        (u64::from_le_bytes(data[..8].try_into().unwrap()), char::from(data[8]))
    }

    fn as_bytes<'a, 'b: 'a>(value: &'a (u64, char)) -> Vec<u8>
    where
        Self: 'b,
    {
        [&value.0.to_le_bytes()[..], &[u8::try_from(value.1).unwrap()]].concat()
    }

    fn type_name() -> TypeName {
        TypeName::new("amount")
    }
}

const OLD: TableDefinition<'_, &str, Old> = TableDefinition::new("accounts");
const NEW: TableDefinition<'_, &str, New> = TableDefinition::new("accounts");

/// A file of the first release, with these accounts. `captured`: it had the capture too.
fn first_release(path: &std::path::Path, captured: bool) {
    let builder = Store::builder();
    let codec = |change: &Change<'_, &str, Old>| Ok(Event::bytes("first", change.key));
    let store = if captured {
        builder.capture(Capture::with(OLD, codec).unpublished()).open(path).unwrap()
    } else {
        builder.open(path).unwrap()
    };
    let fill = move |tx: &Transaction| {
        for name in ["ann", "bob", "eve", "joe"] {
            if captured {
                tx.captured_table(OLD)?.insert(name, 1)?;
            } else {
                tx.open_table(OLD)?.insert(name, 1)?;
            }
        }
        Ok(())
    };
    store.write(fill).unwrap();
    store.close().unwrap();
}

/// An event of the second release, by a codec of the application.
#[expect(clippy::unnecessary_wraps, reason = "it is a codec")]
fn encode(change: &Change<'_, &'static str, New>) -> onewrite::Result<Event> {
    let unreadable = if change.old_is_unreadable() { " from an older form" } else { "" };
    let text = format!("{} {} {:?}{unreadable}", change.operation.name(), change.key, change.new);
    Ok(Event::bytes("second", text).key(change.key))
}

fn payloads(store: &Store, event_type: &str) -> Vec<String> {
    let events = events(&store.read().unwrap());
    let of_type = events.iter().filter(|event| event.event_type() == event_type);
    of_type.map(|event| String::from_utf8(event.payload().to_vec()).unwrap()).collect()
}

fn keys(store: &Store) -> Vec<String> {
    let read = |tx: &Transaction| {
        let table = tx.captured_table(NEW)?;
        let keys: Result<Vec<_>, _> =
            table.read().iter()?.map(|row| row.map(|(key, _)| key.value().to_owned())).collect();
        Ok(keys?)
    };
    store.write(read).unwrap().into_value()
}

/// Goal: rows of an older form are replaced and removed like any other, in both modes, by every codec that does not ask for old
/// values. Method: each operation on such a row; afterwards the file is as the application says, and each change has its event.
#[test]
fn rows_of_an_older_form_are_replaced_and_removed() {
    type Make = fn() -> Capture<&'static str, New>;
    let mut makes: Vec<Make> =
        vec![|| Capture::with(NEW, encode), || Capture::with(NEW, encode).old_values(false)];
    #[cfg(feature = "json")]
    makes.push(|| Capture::json(NEW));
    for make in makes {
        for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.redb");
            first_release(&path, true);
            let store = Store::builder().capture(make().to("e", "r").mode(mode)).open(&path).unwrap();
            let before = store.stats().unwrap().next_seq;
            store.write(|tx| tx.captured_table(NEW)?.insert("ann", (2, '$')).map(drop)).unwrap();
            store.write(|tx| tx.captured_table(NEW)?.remove("bob").map(drop)).unwrap();
            assert_eq!(keys(&store), ["ann", "eve", "joe"]);
            store.write(|tx| tx.captured_table(NEW)?.clear()).unwrap();
            assert!(keys(&store).is_empty());
            let stats = store.stats().unwrap();
            let changes = stats.next_seq - before + stats.captures["accounts"].waiting;
            assert_eq!(changes, if mode == CaptureMode::EveryChange { 5 } else { 4 });
        }
    }
}

/// Goal: a codec of the application sees that there was a value that cannot be read.
#[test]
fn a_codec_learns_that_the_old_value_is_unreadable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    first_release(&path, true);
    let store = Store::builder().capture(Capture::with(NEW, encode).unpublished()).open(&path).unwrap();
    for value in [(2, '$'), (3, '$')] {
        store.write(move |tx| tx.captured_table(NEW)?.insert("ann", value).map(drop)).unwrap();
    }
    store.write(|tx| tx.captured_table(NEW)?.remove("bob").map(drop)).unwrap();
    let expected = [
        "update ann Some((2, '$')) from an older form",
        "update ann Some((3, '$'))",
        "remove bob None from an older form",
    ];
    assert_eq!(payloads(&store, "second"), expected);
}

/// Goal: where old values are asked for, a row whose old value cannot be read fails its own change with an error that names
/// table, key and type; no other fails, and nothing of that change is left. Method: in one transaction, which commits.
#[test]
fn an_old_value_that_is_wanted_and_unreadable_is_an_error_of_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    first_release(&path, true);
    let mut captures = vec![Capture::with(NEW, encode).unpublished().old_values(true)];
    #[cfg(feature = "json")]
    captures.push(Capture::json(NEW).unpublished().old_values(true));
    for capture in captures {
        let store = Store::builder().capture(capture).open(&path).unwrap();
        let before = store.stats().unwrap().next_seq;
        store
            .write(|tx| {
                let mut table = tx.captured_table(NEW)?;
                for error in [
                    table.insert("ann", (2, '$')).map(drop).unwrap_err(),
                    table.remove("ann").map(drop).unwrap_err(),
                    table.clear().unwrap_err(),
                ] {
                    let text = error.to_string();
                    assert!(text.contains("`ann`") && text.contains("`accounts`"), "{text}");
                    assert!(matches!(error, Error::UnreadableRow { table, key, .. }
                        if table == "accounts" && key == b"ann"));
                }
                table.insert("zoe", (2, '$'))?;
                table.remove("zoe").map(drop)
            })
            .unwrap();
        assert_eq!(keys(&store), ["ann", "bob", "eve", "joe"]);
        assert_eq!(store.stats().unwrap().next_seq, before + 2);
        store.close().unwrap();
    }
}

/// Goal: `retain` cannot ask of a row that cannot be read: it stays, all others are as asked, and the error names it; the
/// transaction can commit all the same.
#[test]
fn retain_goes_on_past_a_row_that_it_cannot_ask_of() {
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        first_release(&path, true);
        let capture = Capture::with(NEW, encode).to("e", "r").mode(mode);
        let store = Store::builder().capture(capture).open(&path).unwrap();
        store
            .write(|tx| {
                let mut table = tx.captured_table(NEW)?;
                for name in ["ann", "dan", "joe"] {
                    table.insert(name, (2, '$'))?;
                }
                let error = table.retain(|key, _| key == "joe").unwrap_err();
                assert!(matches!(error, Error::UnreadableRow { key, .. } if key == b"bob"));
                Ok(())
            })
            .unwrap();
        assert_eq!(keys(&store), ["bob", "eve", "joe"]);
    }
}

/// Goal: one row that cannot be read stops neither the first snapshot nor a pass: it is counted, all others are told, and it
/// is reported once it can be read or is written anew. Method: in both modes, with a relay; such rows at the beginning, in the
/// middle and at the end.
#[test]
fn an_unreadable_row_stops_no_other_row() {
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        first_release(&path, false);
        let store = Store::open(&path).unwrap();
        let mend = |tx: &Transaction| {
            let mut table = tx.open_table(NEW)?;
            table.insert("bob", (2, '$'))?;
            Ok(table.insert("zoe", (2, '$')).map(drop)?)
        };
        store.write(mend).unwrap();
        store.close().unwrap();
        let capture = Capture::with(NEW, encode).to("e", "r").snapshot(true).mode(mode);
        let store = Store::builder().capture(capture).open(&path).unwrap();
        let broker = broker();
        let relay = relay(&store, &broker);
        let figures = || store.stats().unwrap().captures["accounts"];
        until("the snapshot is done", || figures().snapshot_done && figures().failed == 3);
        assert_eq!(figures().waiting, 3);
        let snapshot = ["snapshot bob Some((2, '$'))", "snapshot zoe Some((2, '$'))"];
        assert_eq!(payloads(&store, "second"), snapshot);
        store.write(|tx| tx.captured_table(NEW)?.insert("eve", (3, '$')).map(drop)).unwrap();
        until("it is reported", || figures().waiting == 2);
        let is_update = |text: &String| text.starts_with("update eve Some((3, '$'))");
        assert!(payloads(&store, "second").iter().any(is_update));
        store.write(|tx| tx.captured_table(NEW)?.clear()).unwrap();
        until("nothing waits", || figures().waiting == 0);
        drop(relay);
    }
}

/// Goal: a capture of a table with such rows can be ended, and they are whatever they were.
#[test]
fn a_capture_of_rows_of_an_older_form_can_be_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    first_release(&path, true);
    let store = Store::open(&path).unwrap();
    store.end_capture("accounts").unwrap();
    store.write(|tx| Ok(tx.open_table(OLD)?.insert("ann", 2).map(drop)?)).unwrap();
    assert!(store.write(|tx| tx.delete_table(OLD)).unwrap().into_value());
}

// --- what is mended -----------------------------------------------------------------------------------------------------

const TABLE: TableDefinition<'_, u16, u64> = TableDefinition::new("table");

/// The value that no event can carry.
const SICK: u64 = 13;

#[expect(clippy::unnecessary_wraps, reason = "it is a codec")]
fn number(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
    Ok(Event::bytes("second", format!("{} {:?}", change.key, change.new)).key(change.key.to_string()))
}

fn picky(change: &Change<'_, u16, u64>) -> onewrite::Result<Event> {
    if change.new == Some(SICK) { Err(Error::app("sick")) } else { number(change) }
}

fn put(store: &Store, key: u16, value: u64) {
    store.write(move |tx| tx.captured_table(TABLE)?.insert(key, value).map(drop)).unwrap();
}

/// A clock that stands still: what waits by it, waits for ever.
#[derive(Debug)]
struct Stopped;

impl onewrite::time::Clock for Stopped {
    fn now(&self) -> onewrite::time::Now {
        onewrite::time::Now { wall_ms: 1_700_000_000_000, mono_ms: 1_000 }
    }
}

/// Goal: a row that could not be published is published as soon as it has been mended: what failed was about its value of
/// before. Method: a clock that stands still, so that no wait ever ends; the row fails, is written, and is published; a
/// second time, when its wait would be longer. Another row that stays as it is goes on waiting.
#[test]
fn a_new_write_of_a_row_ends_its_wait() {
    let folder = tempfile::tempdir().unwrap();
    let capture = Capture::with(TABLE, picky).to("e", "r").mode(CaptureMode::NewestValue);
    let store = Store::builder()
        .clock(std::sync::Arc::new(Stopped))
        .capture(capture)
        .open(folder.path().join("a.redb"))
        .unwrap();
    let broker = broker();
    let relay = relay(&store, &broker);
    let figures = || store.stats().unwrap().captures["table"];
    put(&store, 9, SICK);
    until("the other has failed", || figures().failed == 1);
    for value in [1, 2] {
        put(&store, 7, SICK);
        until("it has failed", || figures().failed == 2);
        put(&store, 7, value);
        until("it is published", || figures().waiting == 1);
        assert_eq!(payloads(&store, "second").last(), Some(&format!("7 Some({value})")));
    }
    assert_eq!(figures().failed, 1, "the other waits on");
    store.write(|tx| tx.captured_table(TABLE)?.remove(9).map(drop)).unwrap();
    until("nothing waits", || figures().waiting == 0);
    drop(relay);
}

/// Goal: the same of a row whose codec has failed in the first snapshot, in both modes.
#[test]
fn a_new_write_ends_the_wait_of_a_row_of_the_snapshot() {
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        store.write(|tx| Ok(tx.open_table(TABLE)?.insert(7, SICK).map(drop)?)).unwrap();
        store.close().unwrap();
        let capture = Capture::with(TABLE, picky).to("e", "r").mode(mode).snapshot(true);
        let builder = Store::builder().clock(std::sync::Arc::new(Stopped)).capture(capture);
        let store = builder.open(&path).unwrap();
        let broker = broker();
        let relay = relay(&store, &broker);
        let figures = || store.stats().unwrap().captures["table"];
        until("it has failed", || figures().failed == 1 && figures().snapshot_done);
        put(&store, 7, 1);
        until("nothing waits", || figures().waiting == 0);
        assert_eq!(payloads(&store, "second").last(), Some(&"7 Some(1)".to_owned()));
        drop(relay);
    }
}

/// Goal: a release whose codec works publishes at once what the one before could not.
#[test]
fn another_codec_ends_all_waits() {
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let broker = broker();
        let open = |capture: Capture<u16, u64>, mode| {
            let capture = capture.to("e", "r").mode(mode);
            Store::builder().clock(std::sync::Arc::new(Stopped)).capture(capture).open(&path).unwrap()
        };
        let store = open(Capture::with(TABLE, picky), CaptureMode::NewestValue);
        let sick = relay(&store, &broker);
        put(&store, 7, SICK);
        until("it has failed", || store.stats().unwrap().captures["table"].failed == 1);
        sick.stop(SOON);
        store.close().unwrap();
        let store = open(Capture::with(TABLE, number), mode);
        let well = relay(&store, &broker);
        until("nothing waits", || store.stats().unwrap().captures["table"].waiting == 0);
        drop(well);
    }
}

/// Goal: a write that comes between a try and the note that the try has failed is not held for that try. Method: many passes of
/// a codec that fails every first time, beside writes of the same key, on a clock that stands still: were one write missed, it
/// would wait for ever.
#[test]
fn a_write_beside_a_failing_try_is_not_missed() {
    static FAILS: AtomicBool = AtomicBool::new(false);
    static TRIES: AtomicU64 = AtomicU64::new(0);
    let folder = tempfile::tempdir().unwrap();
    let flaky = |change: &Change<'_, u16, u64>| {
        TRIES.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_micros(50));
        if FAILS.load(SeqCst) { Err(Error::app("not now")) } else { number(change) }
    };
    let capture = Capture::with(TABLE, flaky).to("e", "r").mode(CaptureMode::NewestValue);
    let builder = Store::builder().clock(std::sync::Arc::new(Stopped)).capture(capture);
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let broker = broker();
    let relay = relay(&store, &broker);
    for value in 0..200 {
        let tries = TRIES.load(SeqCst);
        FAILS.store(true, SeqCst);
        put(&store, 7, value);
        until("it is tried", || TRIES.load(SeqCst) > tries || value % 3 != 0);
        FAILS.store(false, SeqCst);
        put(&store, 7, value);
        until("it is published", || store.stats().unwrap().captures["table"].waiting == 0);
    }
    drop(relay);
}

// --- code of the application inside the call ----------------------------------------------------------------------------

const OTHER: TableDefinition<'_, u16, u64> = TableDefinition::new("other");
const COALESCED: TableDefinition<'_, u16, u64> = TableDefinition::new("coalesced");

fn three(path: &std::path::Path, mode: CaptureMode) -> Store {
    let capture = |table, mode| Capture::with(table, number).to("e", "r").mode(mode);
    Store::builder()
        .capture(capture(TABLE, mode))
        .capture(capture(OTHER, CaptureMode::EveryChange))
        .capture(capture(COALESCED, CaptureMode::NewestValue))
        .open(path)
        .unwrap()
}

/// Goal: the predicate of `retain` may use its transaction in every way: what it appends and writes is there, in order, with
/// contiguous revisions, and the removes of `retain` have their events or dirty keys. Method: a predicate that appends, appends to a
/// stream, writes captured tables of both modes and asks for this one, which is refused; then the same with a failure of the
/// whole closure, of which nothing is left.
#[test]
fn a_predicate_may_use_its_transaction() {
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        for fails in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let store = three(&folder.path().join("a.redb"), mode);
            (0..4).for_each(|key| put(&store, key, 1));
            let before = store.stats().unwrap();
            let write = move |tx: &Transaction| {
                let mut table = tx.captured_table(TABLE)?;
                table.retain(|key, _| {
                    tx.append(Event::bytes("asked", key.to_string()).unpublished()).unwrap();
                    let stream = tx.stream("s");
                    let event = || Event::bytes("in stream", key.to_string()).unpublished();
                    stream.append([event(), event()], ExpectedRevision::Any).unwrap();
                    tx.captured_table(OTHER).unwrap().insert(key, 5).unwrap();
                    tx.captured_table(COALESCED).unwrap().insert(key, 5).unwrap();
                    assert!(tx.captured_table(TABLE).is_err(), "it is open");
                    key % 2 == 0
                })?;
                if fails { Err(Error::app("no")) } else { Ok(()) }
            };
            assert_eq!(store.write(write).is_err(), fails);
            let (stats, read) = (store.stats().unwrap(), store.read().unwrap());
            if fails {
                assert_eq!((stats.next_seq, &stats.captures), (before.next_seq, &before.captures));
                continue;
            }
            let revisions: Vec<_> =
                read.stream("s").unwrap().events(0).map(|event| event.unwrap().revision()).collect();
            assert_eq!(revisions, (0..8).map(Some).collect::<Vec<_>>());
            // Of each row one that was asked, two of the stream, one of the other table.
            let removes = if mode == CaptureMode::EveryChange { 2 } else { 0 };
            assert_eq!(stats.next_seq, before.next_seq + 4 * 4 + removes);
            assert_eq!(stats.captures["coalesced"].waiting, 4);
            let waiting = if mode == CaptureMode::EveryChange { 0 } else { 4 };
            assert_eq!(stats.captures["table"].waiting, waiting);
            assert_eq!(read.open_table(TABLE).unwrap().iter().unwrap().count(), 2);
            let found = store.verify().unwrap();
            assert!(found.findings.is_empty(), "{found:?}");
        }
    }
}

/// Goal: a codec may use its store, for reading; what would wait for its own transaction is refused. Method: a codec that reads
/// figures and state, and tries to write, in a write, in `retain`, in a pass and in a snapshot.
#[test]
fn a_codec_may_ask_its_store() {
    use std::sync::{Arc, Mutex};
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        store.write(|tx| Ok(tx.open_table(TABLE)?.insert(50, 1).map(drop)?)).unwrap();
        store.close().unwrap();
        let slot: Arc<Mutex<Option<Store>>> = Arc::default();
        let reentrant = Arc::clone(&slot);
        let curious = move |change: &Change<'_, u16, u64>| {
            let store = reentrant.lock().unwrap().clone();
            if let Some(store) = store {
                assert!(store.stats().unwrap().captures.contains_key("table"));
                assert!(store.read().unwrap().event(u64::MAX).unwrap().is_none());
                assert!(matches!(store.write(|_| Ok(())), Err(Error::InsideTransaction { .. })));
                assert!(matches!(store.begin(), Err(Error::InsideTransaction { .. })));
                assert!(store.end_capture("table").is_err());
            }
            number(change)
        };
        let capture = Capture::with(TABLE, curious).to("e", "r").mode(mode).snapshot(true);
        let store = Store::builder().capture(capture).open(&path).unwrap();
        *slot.lock().unwrap() = Some(store.clone());
        (0..4).for_each(|key| put(&store, key, 1));
        store.write(|tx| tx.captured_table(TABLE)?.retain(|key, _| key % 2 == 0)).unwrap();
        let broker = broker();
        let relay = relay(&store, &broker);
        let figures = || store.stats().unwrap().captures["table"];
        until("all is reported", || figures().waiting == 0 && figures().snapshot_done);
        assert_eq!(figures().failed, 0);
        drop(relay);
        slot.lock().unwrap().take();
    }
}

/// A value whose bytes are made by code of the caller, which may use the transaction.
#[derive(Debug)]
struct Made;

struct Maker<'a>(&'a dyn Fn() -> u64);

impl std::fmt::Debug for Maker<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Maker")
    }
}

impl Value for Made {
    type SelfType<'a> = Maker<'a>;
    type AsBytes<'a> = [u8; 8];

    fn fixed_width() -> Option<usize> {
        Some(8)
    }

    fn from_bytes<'a>(_: &'a [u8]) -> Maker<'a>
    where
        Self: 'a,
    {
        Maker(&|| 7)
    }

    fn as_bytes<'a, 'b: 'a>(value: &'a Maker<'b>) -> [u8; 8]
    where
        Self: 'b,
    {
        (value.0)().to_le_bytes()
    }

    fn type_name() -> TypeName {
        TypeName::new("made")
    }
}

/// Goal: the bytes of a value may be made by code that appends and writes: rows, events and revisions are whole all the same.
#[test]
fn a_value_may_use_the_transaction_while_it_is_written() {
    const MADE: TableDefinition<'_, u16, Made> = TableDefinition::new("made");
    for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let made = Capture::with(MADE, |change| Ok(Event::bytes("made", change.key.to_string())));
        let store = Store::builder()
            .capture(made.to("e", "r").mode(mode))
            .capture(Capture::with(OTHER, number).to("e", "r"))
            .open(&path)
            .unwrap();
        store
            .write(|tx| {
                let make = || {
                    let stream = tx.stream("s");
                    stream.append([Event::bytes("t", "").unpublished()], ExpectedRevision::Any).unwrap();
                    tx.captured_table(OTHER).unwrap().insert(1, 1).unwrap();
                    7
                };
                tx.captured_table(MADE)?.insert(1, Maker(&make)).map(drop)
            })
            .unwrap();
        let read = store.read().unwrap();
        let revisions: Vec<_> =
            read.stream("s").unwrap().events(0).map(|event| event.unwrap().revision()).collect();
        assert_eq!(revisions, (0..revisions.len() as u64).map(Some).collect::<Vec<_>>());
        let reported =
            payloads(&store, "made").len() as u64 + store.stats().unwrap().captures["made"].waiting;
        assert_eq!(reported, 1);
        assert_eq!(payloads(&store, "second").len(), revisions.len());
        assert!(store.verify().unwrap().findings.is_empty());
    }
}

/// Goal: keys of an older form harm no other row. Method: a key that its type cannot read, in the snapshot and in `clear`.
#[test]
fn an_unreadable_key_stops_no_other_row() {
    #[derive(Debug)]
    struct Letter;
    impl Value for Letter {
        type SelfType<'a> = char;
        type AsBytes<'a> = [u8; 4];

        fn fixed_width() -> Option<usize> {
            Some(4)
        }

        fn from_bytes<'a>(data: &'a [u8]) -> char
        where
            Self: 'a,
        {
            char::from_u32(u32::from_be_bytes(data.try_into().unwrap())).unwrap()
        }

        fn as_bytes<'a, 'b: 'a>(value: &'a char) -> [u8; 4]
        where
            Self: 'b,
        {
            u32::from(*value).to_be_bytes()
        }

        fn type_name() -> TypeName {
            TypeName::new("letter")
        }
    }
    impl Key for Letter {
        fn compare(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
            a.cmp(b)
        }
    }
    #[derive(Debug)]
    struct Raw;
    impl Value for Raw {
        type SelfType<'a> = u32;
        type AsBytes<'a> = [u8; 4];

        fn fixed_width() -> Option<usize> {
            Some(4)
        }

        fn from_bytes<'a>(data: &'a [u8]) -> u32
        where
            Self: 'a,
        {
            u32::from_be_bytes(data.try_into().unwrap())
        }

        fn as_bytes<'a, 'b: 'a>(value: &'a u32) -> [u8; 4]
        where
            Self: 'b,
        {
            value.to_be_bytes()
        }

        fn type_name() -> TypeName {
            TypeName::new("letter")
        }
    }
    impl Key for Raw {
        fn compare(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
            a.cmp(b)
        }
    }
    const RAW: TableDefinition<'_, Raw, u64> = TableDefinition::new("letters");
    const LETTERS: TableDefinition<'_, Letter, u64> = TableDefinition::new("letters");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    let fill = |tx: &Transaction| {
        let mut table = tx.open_table(RAW)?;
        [65, 0xD800, 0xE000].iter().try_for_each(|key| Ok(table.insert(key, 1).map(drop)?))
    };
    store.write(fill).unwrap();
    store.close().unwrap();
    let codec = |change: &Change<'_, Letter, u64>| {
        let is_snapshot = change.operation == Operation::Snapshot;
        let text = if is_snapshot { "snapshot" } else { "changed" };
        Ok(Event::bytes(text, change.key.to_string()))
    };
    let capture = Capture::with(LETTERS, codec).unpublished().snapshot(true);
    let store = Store::builder().capture(capture).open(&path).unwrap();
    let figures = || store.stats().unwrap().captures["letters"];
    until("the snapshot is done", || figures().snapshot_done && figures().failed == 1);
    assert_eq!(payloads(&store, "snapshot"), ["A", "\u{E000}"]);
    let clear = |tx: &Transaction| {
        let error = tx.captured_table(LETTERS)?.clear().unwrap_err();
        assert!(matches!(error, Error::UnreadableRow { .. }));
        Ok(())
    };
    store.write(clear).unwrap();
    assert_eq!(payloads(&store, "changed"), ["A", "\u{E000}"]);
}
