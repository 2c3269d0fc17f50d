//! A duration is the time that has passed while the store was open. The wall clock of a device may start in 1970 and jump by decades.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::time::ManualClock;
use onewrite::{Event, Message, Retention, Store, StoreBuilder, WriteOnce};

const HOUR: Duration = Duration::from_secs(3600);
const INBOX: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.inbox");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");

fn day(days: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(days * 24 * 3600)
}

fn open(clock: &ManualClock, path: &Path, more: impl FnOnce(StoreBuilder) -> StoreBuilder) -> Store {
    more(Store::builder().clock(std::sync::Arc::new(clock.clone()))).open(path).unwrap()
}

/// One request, one event with an id, one foreign delivery; whether each was seen before.
fn again(store: &Store) -> [bool; 3] {
    let once =
        store.write_once("payment-17", |tx| tx.append(Event::bytes("paid", "1").unpublished())).unwrap();
    let appended =
        store.write(|tx| tx.append(Event::bytes("paid", "1").id("event-17").unpublished())).unwrap();
    let message =
        Message { message_id: Some("foreign-17".into()), payload: b"1".to_vec(), ..Message::default() };
    let first = store.write(move |tx| tx.first_delivery("credit", &message)).unwrap().into_value();
    [matches!(once, WriteOnce::Repeated(_)), appended.value().repeated, !first]
}

/// Enough new ids that the pruning has looked at all: each brings a look at two others.
fn many_others(store: &Store, from: u64) {
    for n in 0..60_u64 {
        let mark = move |tx: &onewrite::Transaction| {
            (0..50).try_for_each(|m| tx.first_time("others", (from + n * 50 + m).to_be_bytes()).map(drop))
        };
        store.write(mark).unwrap();
    }
}

/// Goal: a jump of the wall clock, either way and by any amount, forgets no id early and keeps none for ever. Method: a device that
/// boots in 1970 and gets its time later; one whose clock is set back from 2099; with restarts in between. Only the time that
/// passes counts.
#[test]
fn a_jump_of_the_clock_forgets_nothing_early_and_keeps_nothing_for_ever() {
    for walls in [[day(0), day(20_700)], [day(47_400), day(0)], [day(20_700), day(20_700 + 365 * 60)]] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let clock = ManualClock::at(walls[0]);
        let with_age = |builder: StoreBuilder| builder.inbox_age(100 * HOUR);
        let mut store = open(&clock, &path, with_age);
        assert_eq!(again(&store), [false; 3]);
        for jump in 0..6_u64 {
            clock.set_wall(walls[usize::from(jump % 2 == 0)]);
            many_others(&store, jump * 10_000);
            assert_eq!(again(&store), [true; 3], "forgotten after {jump} jumps and {} hours", jump * 15);
            clock.advance(15 * HOUR);
            if jump % 2 == 1 {
                store.close().unwrap();
                // Time while it is closed does not count.
                clock.advance(1000 * HOUR);
                store = open(&clock, &path, with_age);
            }
        }
        clock.advance(11 * HOUR);
        for more in 10..22 {
            many_others(&store, more * 10_000);
        }
        assert_eq!(again(&store), [false; 3], "kept for ever");
    }
}

/// Goal: retention by age is by the time that has passed, whatever the events' own times say. Method: events of 1970, of 2099 and of
/// today, the clock set between them; half of the age later none is gone, later all are.
#[test]
fn retention_by_age_is_held_up_by_no_event_of_the_future() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let clock = ManualClock::at(day(20_700));
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let keep = |builder: StoreBuilder| builder.retention(Retention::until_confirmed().keep_age(100 * HOUR));
    let append = |store: &Store| {
        let receipt = store.write(|tx| tx.append(Event::bytes("t", "x").to("", "q"))).unwrap();
        receipt.wait_confirmed(Duration::from_secs(60)).unwrap();
    };
    let trimmed_to = |store: &Store| store.stats().unwrap().trimmed_to;
    let store = open(&clock, &path, keep);
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    for days in [0, 47_400, 20_700, 1, 20_701] {
        clock.set_wall(day(days));
        append(&store);
    }
    clock.advance(50 * HOUR);
    append(&store);
    assert_eq!(trimmed_to(&store), 0, "gone too early");
    assert!(relay.stop(Duration::from_secs(60)).clean);
    store.close().unwrap();

    let store = open(&clock, &path, keep);
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    clock.advance(53 * HOUR);
    let began = std::time::Instant::now();
    while trimmed_to(&store) < 5 {
        assert!(began.elapsed() < Duration::from_secs(60), "held at {}", trimmed_to(&store));
        append(&store);
    }
    assert_eq!(trimmed_to(&store), 5, "the sixth is 53 hours old");
    relay.stop(Duration::from_secs(60));
}

/// Goal: ids that an earlier format marked with wall times are remembered for a whole age more, and not for ever. Method: the rows
/// of a closed store are given wall times, of today and of 1970, and the file the number of the earlier format.
#[test]
fn ids_of_an_earlier_format_are_remembered_for_one_more_age() {
    for wall_ms in [1_790_000_000_000_u64, 60_000, u64::MAX] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let clock = ManualClock::at(day(20_700));
        let with_age = |builder: StoreBuilder| builder.inbox_age(100 * HOUR);
        let store = open(&clock, &path, with_age);
        again(&store);
        store.close().unwrap();
        let db = Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        {
            let mut inbox = tx.open_table(INBOX).unwrap();
            let rows: Vec<(Vec<u8>, Vec<u8>)> = inbox
                .range::<&[u8]>(..)
                .unwrap()
                .map(|row| row.map(|(key, row)| (key.value().to_vec(), row.value().to_vec())).unwrap())
                .collect();
            assert_eq!(rows.len(), 3);
            for (key, mut row) in rows {
                row[24..32].copy_from_slice(&wall_ms.to_le_bytes());
                inbox.insert(&*key, &*row).unwrap();
            }
            let mut meta = tx.open_table(META).unwrap();
            meta.insert("format", &3_u32.to_le_bytes()[..]).unwrap();
            meta.remove("age").unwrap();
        }
        tx.commit().unwrap();
        drop(db);

        let store = open(&clock, &path, with_age);
        many_others(&store, 0);
        clock.advance(99 * HOUR);
        many_others(&store, 10_000);
        assert_eq!(again(&store), [true; 3], "forgotten early");
        clock.advance(2 * HOUR);
        for more in 2..6 {
            many_others(&store, more * 10_000);
        }
        assert_eq!(again(&store), [false; 3], "kept for ever");
    }
}
