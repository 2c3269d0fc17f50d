//! The log over time: numbers that go on whatever happens in between, damage reported where it is, records that stay as long
//! as someone wants them and no longer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::time::{Clock, Now, SystemClock};
use onewrite::{Error, Event, FaultClass, OpenError, Relay, Retention, Store, StoreBuilder};

use crate::scratch::{STATE, audit, crash_copy, event, events, number_of, put};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");

/// Changes rows of the log behind the library's back, by plain redb.
fn edit_log(path: &std::path::Path, edit: impl FnOnce(&mut onewrite::redb::Table<'_, u64, &'static [u8]>)) {
    let db = Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    edit(&mut tx.open_table(LOG).unwrap());
    tx.commit().unwrap();
}

fn flip(log: &mut onewrite::redb::Table<'_, u64, &'static [u8]>, seq: u64, at: usize) {
    let mut record = log.get(seq).unwrap().unwrap().value().to_vec();
    let at = at % record.len();
    record[at] ^= 1 << (at % 8);
    log.insert(seq, record.as_slice()).unwrap();
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn broker() -> MemoryBroker {
    let broker = MemoryBroker::with_tap();
    broker.declare_queue("orders", QueueOptions::default());
    broker
}

fn relay(store: &Store, broker: &MemoryBroker) -> Relay {
    let quick = (Duration::from_millis(1), Duration::from_millis(2));
    let relay = store.relay("relay").destination_attempts(1).attempts(1).backoff(quick.0, quick.1);
    relay.spawn(broker.publisher()).unwrap()
}

/// Goal: sequence and lane numbers have no gap and are never given twice, however a process ended. Method: 9,000 events
/// (more than two bulk writes of the lanes), with failed writes in between, over alternately clean and unclean ends.
#[test]
fn numbers_go_on_across_every_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path().join("a.redb")).unwrap();
    let total = 2 * crate::support::tuning::DERIVED_FLUSH_EVENTS + 808;
    assert_eq!(total, 9000);
    let mut n = 0;
    for round in 0.. {
        let (first, count) = (n, 3 * (50 + round * 17 % 150));
        let failed = store.write(move |tx| {
            tx.open_table(STATE)?.insert(first, first)?;
            (first..first + count).try_for_each(|n| tx.append(event(n)).map(drop))?;
            Err::<(), _>(Error::app("no"))
        });
        assert!(failed.is_err());
        let end = (n + count).min(total);
        store
            .write(move |tx| {
                let mut state = tx.open_table(STATE)?;
                for n in first..end {
                    state.insert(n, n)?;
                    tx.append(event(n))?;
                }
                Ok(())
            })
            .unwrap();
        n = end;
        if n == total {
            break;
        }
        let path = match round % 3 {
            0 => {
                let path = store.path().to_owned();
                store.close().unwrap();
                path
            }
            1 => crash_copy(&store, folder.path()),
            _ => continue,
        };
        store = Store::open(path).unwrap();
        assert_eq!(store.stats().unwrap().next_seq, n);
    }
    assert_eq!(audit(&store).len() as u64, total);
    let lanes = |store: &Store| {
        let events = events(&store.read().unwrap());
        events.iter().map(|event| event.lane().unwrap().id).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(
        lanes(&store).into_iter().collect::<Vec<_>>(),
        [0, 1, 2],
        "a lane is named by its first event"
    );
}

/// Goal: P9: no flipped byte of a record, and no record in another's place, is read as an event; what is wrong is reported
/// with its sequence number, and the others are read. Method: in every second of 300 records flip one byte, each at
/// another place; exchange two; remove two.
#[test]
fn damaged_records_are_reported_by_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    store.write(|tx| (0..306).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
    store.close().unwrap();
    edit_log(&path, |log| {
        (0..300).step_by(2).for_each(|seq| flip(log, seq, seq as usize));
        let [a, b] = [301, 303].map(|seq| log.get(seq).unwrap().unwrap().value().to_vec());
        log.insert(303, a.as_slice()).unwrap();
        log.insert(301, b.as_slice()).unwrap();
        log.remove(304).unwrap();
    });
    let store = Store::open(&path).unwrap();
    let damaged = |seq: u64| (seq < 300 && seq.is_multiple_of(2)) || [301, 303, 304].contains(&seq);
    let snapshot = store.read().unwrap();
    let read: Vec<_> = snapshot.events(0).unwrap().collect();
    assert_eq!(read.len(), 306);
    for (seq, read) in (0..).zip(read) {
        match read {
            Ok(recorded) => {
                assert!(!damaged(seq), "{seq} was read although it is damaged");
                assert_eq!((recorded.seq(), number_of(&recorded)), (seq, seq));
            }
            Err(Error::Corrupt(error)) => {
                assert_eq!(error.seq, seq);
                assert!(damaged(seq), "{error}");
                assert!(error.to_string().contains(&seq.to_string()));
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(matches!(snapshot.event(0), Err(Error::Corrupt(error)) if error.seq == 0));
    let tx = store.begin().unwrap();
    assert!(matches!(tx.event(301), Err(Error::Corrupt(error)) if error.seq == 301));
    assert_eq!(number_of(&tx.event(305).unwrap().unwrap()), 305);
}

/// Goal: B20: damaged and missing records go to quarantine with their number; all others reach the broker; nothing is
/// skipped in silence.
#[test]
fn a_relay_quarantines_what_it_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    store.write(|tx| (0..40).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
    store.close().unwrap();
    edit_log(&path, |log| {
        flip(log, 7, 60);
        drop(log.remove(20).unwrap());
        drop(log.remove(21).unwrap());
    });
    let store = Store::builder().progress_delay(Duration::from_millis(5)).open(&path).unwrap();
    let broker = broker();
    let relay = relay(&store, &broker);
    eventually("37 published", || broker.queue_len("orders") == 37);
    let quarantine = store.quarantine("relay").unwrap();
    eventually("three in quarantine", || quarantine.list(None, 10).unwrap().len() == 3);
    let listed = quarantine.list(None, 10).unwrap();
    assert_eq!(listed.iter().map(|entry| entry.seq).collect::<Vec<_>>(), [7, 20, 21]);
    assert!(listed.iter().all(|entry| entry.fault.class == FaultClass::Undecodable));
    assert!(matches!(quarantine.get(7).unwrap().1, Err(Error::Corrupt(error)) if error.seq == 7));
    assert!(matches!(quarantine.redrive(7), Err(Error::Corrupt(_))));
    relay.stop(Duration::from_secs(5));
}

/// The epochs on the wire, in order, each once; and the lane numbers of what was published last.
fn epoch_on_the_wire(broker: &MemoryBroker) -> i64 {
    let tap = broker.tap();
    tap.last().unwrap().message.header("onewrite-epoch").unwrap().as_int().unwrap()
}

/// Goal: where lane numbers cannot be known any more they are not guessed: a new epoch begins, on the wire too, with new
/// lanes; once. Damage below the last bulk write of the lanes is no reason for one.
#[test]
fn damage_in_the_newest_stretch_begins_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let flushed = crate::support::tuning::DERIVED_FLUSH_EVENTS;
    let reopen_and_publish = |n: u64| {
        let store = Store::builder().retention(Retention::forever()).open(&path).unwrap();
        let seq = store.write(move |tx| tx.append(event(n))).unwrap().seqs()[0];
        let lane = store.read().unwrap().event(seq).unwrap().unwrap().lane().unwrap();
        let broker = broker();
        let name = format!("relay-{n}");
        let relay = store.relay(&*name).start_at(onewrite::StartAt::Newest).spawn(broker.publisher());
        let relay = relay.unwrap();
        store.write(move |tx| tx.append(event(n))).unwrap().wait_confirmed(Duration::from_secs(20)).unwrap();
        relay.stop(Duration::from_secs(5));
        store.forget_relay(&name).unwrap();
        store.close().unwrap();
        (seq, lane, epoch_on_the_wire(&broker))
    };
    let store = Store::builder().retention(Retention::forever()).open(&path).unwrap();
    store.write(move |tx| (0..flushed).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
    store.write(move |tx| (flushed..flushed + 9).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
    store.close().unwrap();

    edit_log(&path, |log| flip(log, 10, 50));
    let (_, lane, epoch) = reopen_and_publish(3);
    assert_eq!((lane.id, epoch), (0, 1), "below the last bulk write: the lane goes on");
    assert!(lane.number > 1365);

    edit_log(&path, |log| flip(log, flushed + 4, 50));
    let (seq, lane, epoch) = reopen_and_publish(6);
    assert_eq!((lane.id, lane.number, epoch), (seq, 0, 2), "a new epoch, a new lane");
    let (_, lane, epoch) = reopen_and_publish(9);
    assert_eq!((lane.id, lane.number, epoch), (seq, 2, 2), "once only, and the new lane goes on");
}

/// Goal: a log that ends before what is known to have been there is refused: its numbers would be given again.
#[test]
fn a_log_that_lost_its_end_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::builder().retention(Retention::forever()).open(&path).unwrap();
    let broker = broker();
    let relay = relay(&store, &broker);
    let receipt = store.write(|tx| (0..9).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
    receipt.wait_confirmed(Duration::from_secs(20)).unwrap();
    relay.stop(Duration::from_secs(5));
    store.close().unwrap();
    edit_log(&path, |log| drop(log.remove(8).unwrap()));
    match Store::open(&path) {
        Err(Error::Open(OpenError::Damaged { path: named, reason })) => {
            assert_eq!(named, path);
            assert!(reason.contains('8'), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

/// The system's clock, with a wall clock that can be set forward.
#[derive(Debug)]
struct Later(SystemClock, AtomicU64);

impl Clock for Later {
    fn now(&self) -> Now {
        let now = self.0.now();
        let later = self.1.load(Ordering::SeqCst);
        Now { mono_ms: now.mono_ms + later, wall_ms: now.wall_ms + later }
    }
}

fn retaining(folder: &tempfile::TempDir, name: &str, retention: Retention) -> (Store, Arc<Later>) {
    let clock = Arc::new(Later(SystemClock::new(), AtomicU64::new(0)));
    let builder: StoreBuilder = Store::builder().retention(retention).clock(clock.clone() as Arc<dyn Clock>);
    let builder = builder.progress_delay(Duration::from_millis(5));
    (builder.open(folder.path().join(name)).unwrap(), clock)
}

fn same_size() -> Event {
    Event::bytes("t", vec![7; 100]).key("k").to("", "orders").id("id")
}

/// Goal: what a commit off the writer thread leaves to be trimmed is trimmed in a while, whatever that thread waits for beside. Method: the
/// relay is gone, so that nobody else asks; an exclusive transaction pushes confirmed records out of what retention keeps; without and with a
/// wait of an hour for the store to be idle.
#[test]
fn an_exclusive_transaction_leaves_nothing_untrimmed() {
    for idle in [None, Some(Duration::from_secs(3600))] {
        let folder = tempfile::tempdir().unwrap();
        let mut builder = Store::builder().retention(Retention::until_confirmed().keep_events(10));
        if let Some(idle) = idle {
            builder = builder.quick_repair_when_idle(idle);
        }
        let store =
            builder.progress_delay(Duration::from_millis(10)).open(folder.path().join("a.redb")).unwrap();
        let broker = broker();
        let relay = relay(&store, &broker);
        (0..20).for_each(|n| drop(store.write(move |tx| tx.append(event(n))).unwrap()));
        let trimmed_to = |to: u64| eventually("trimmed", || store.stats().unwrap().trimmed_to == to);
        trimmed_to(10);
        assert!(relay.stop(Duration::from_secs(20)).clean);
        // By then the writer thread waits for nothing of this.
        std::thread::sleep(Duration::from_millis(200));
        let tx = store.begin().unwrap();
        for n in 20..25 {
            tx.append(event(n)).unwrap();
        }
        tx.commit().unwrap();
        trimmed_to(15);
    }
}

/// Goal: retention keeps exactly what it says, counted from the newest, and nothing goes before it is confirmed.
/// Method: 700 events (more than one step of trimming), with the broker away at first; then wait for what is left.
#[test]
fn confirmed_records_stay_as_long_as_retention_says() {
    let folder = tempfile::tempdir().unwrap();
    let (sized, _) = retaining(&folder, "size", Retention::until_confirmed());
    let sized_event = |n: u64| same_size().id(format!("{n:04}"));
    sized.write(move |tx| tx.append(sized_event(0))).unwrap();
    let record_bytes = sized.stats().unwrap().backlog_bytes;
    let day = Duration::from_secs(24 * 3600);
    for (name, retention, kept) in [
        ("confirmed", Retention::until_confirmed(), 0),
        ("events", Retention::until_confirmed().keep_events(10), 10),
        ("bytes", Retention::until_confirmed().keep_bytes(5 * record_bytes), 5),
        ("most", Retention::until_confirmed().keep_bytes(5 * record_bytes).keep_events(8), 8),
        ("all-bytes", Retention::until_confirmed().keep_bytes(u64::MAX), 700),
        ("all-events", Retention::until_confirmed().keep_events(u64::MAX), 700),
        ("age", Retention::until_confirmed().keep_age(day), 700),
        ("all-ages", Retention::until_confirmed().keep_age(Duration::MAX), 700),
        ("forever", Retention::forever(), 700),
    ] {
        let (store, clock) = retaining(&folder, name, retention);
        let broker = broker();
        broker.go_down();
        let relay = relay(&store, &broker);
        store.write(move |tx| (0..700).try_for_each(|n| tx.append(sized_event(n)).map(drop))).unwrap();
        store.write(|tx| tx.open_table(STATE).map(drop)).unwrap();
        assert_eq!(store.stats().unwrap().trimmed_to, 0, "{name}: trimmed before it was confirmed");
        broker.come_up();
        eventually("all confirmed", || store.stats().unwrap().relays["relay"].position == 700);
        let trimmed_to = || store.stats().unwrap().trimmed_to;
        if kept < 700 {
            eventually(name, || trimmed_to() >= 700 - kept);
        }
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(trimmed_to(), 700 - kept, "{name}");
        let left = events(&store.read().unwrap());
        assert_eq!(
            left.iter().map(|left| left.seq()).collect::<Vec<_>>(),
            (700 - kept..700).collect::<Vec<_>>()
        );
        if name == "age" {
            clock.1.store(day.as_millis() as u64 + 60_000, Ordering::SeqCst);
            store.write(|tx| tx.open_table(STATE).map(drop)).unwrap();
            eventually("trimmed once old enough", || trimmed_to() == 700);
            assert_eq!(events(&store.read().unwrap()).len(), 0);
        }
        let path = store.path().to_owned();
        relay.stop(Duration::from_secs(5));
        store.close().unwrap();
        let next = Store::open(path).unwrap();
        assert_eq!(
            next.write(move |tx| tx.append(sized_event(700))).unwrap().seqs(),
            [700],
            "{name}: the end is known"
        );
        let lane = next.read().unwrap().event(700).unwrap().unwrap().lane().unwrap();
        assert_eq!((lane.id, lane.number), (0, 700), "{name}: the lane is known");
    }
}

/// Goal: a record whose lane is not written down yet is not trimmed. Method: progress is written by a commit of the application
/// and no idle commit comes, so that more records are confirmed than the lane table knows; then the process dies.
#[test]
fn trimming_waits_for_the_lanes() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().progress_delay(Duration::from_secs(3600));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let broker = broker();
    let relay = relay(&store, &broker);
    store.write(|tx| (0..900).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
    eventually("all confirmed", || relay.status().confirmed == 900);
    store.write(|tx| tx.open_table(STATE).map(drop)).unwrap();
    eventually("the progress rode along", || {
        store.write(|tx| tx.open_table(STATE).map(drop)).unwrap();
        store.stats().unwrap().relays["relay"].position == 900
    });
    let copy = Store::open(crash_copy(&store, folder.path())).unwrap();
    let seq = copy.write(|tx| tx.append(event(900))).unwrap().seqs()[0];
    let lane = copy.read().unwrap().event(seq).unwrap().unwrap().lane().unwrap();
    assert_eq!((seq, lane.id, lane.number), (900, 0, 300));
    relay.stop(Duration::from_secs(5));
}

/// Goal: P3: a quarantined event outlives trimming and reopening, can be looked at, and goes once it is given up; so does
/// what only a relay that is forgotten still held.
#[test]
fn a_quarantined_record_outlives_trimming() {
    let folder = tempfile::tempdir().unwrap();
    for give_up in ["discard", "forget"] {
        let (store, _) = retaining(&folder, give_up, Retention::until_confirmed());
        let broker = broker();
        let one = relay(&store, &broker);
        let unroutable = store.write(|tx| tx.append(event(0).to("", "nowhere"))).unwrap();
        assert!(unroutable.wait_confirmed(Duration::from_secs(20)).is_err());
        store.write(|tx| (1..300).try_for_each(|n| tx.append(event(n)).map(drop))).unwrap();
        eventually("the others are trimmed", || store.stats().unwrap().trimmed_to == 300);
        one.stop(Duration::from_secs(5));
        let path = store.path().to_owned();
        store.close().unwrap();

        let store = Store::builder().progress_delay(Duration::from_millis(5)).open(&path).unwrap();
        assert_eq!(store.stats().unwrap().next_seq, 300);
        let quarantine = store.quarantine("relay").unwrap();
        let (entry, record) = quarantine.get(0).unwrap();
        assert_eq!((entry.fault.class, number_of(&record.unwrap())), (FaultClass::Destination, 0));
        let held: Vec<u64> = events(&store.read().unwrap()).iter().map(|event| event.seq()).collect();
        assert_eq!(held[0], 0);
        if give_up == "discard" {
            // Its key was held: what waits behind it is still there, and goes out now.
            let two = relay(&store, &broker);
            quarantine.discard(0).unwrap();
            assert!(matches!(quarantine.get(0), Err(Error::NotQuarantined { .. })));
            eventually("all published", || broker.queue_len("orders") == 299);
            eventually("the log is empty", || events(&store.read().unwrap()).is_empty());
            two.stop(Duration::from_secs(5));
        } else {
            store.forget_relay("relay").unwrap();
            eventually("the log is empty", || events(&store.read().unwrap()).is_empty());
        }
    }
}

/// Goal: seen ids are forgotten after the inbox age and not before. Method: the clock set forward, enough new ids to
/// prune the old.
#[test]
fn ids_are_remembered_for_the_inbox_age() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(Later(SystemClock::new(), AtomicU64::new(0)));
    let builder =
        Store::builder().inbox_age(Duration::from_secs(1000)).clock(clock.clone() as Arc<dyn Clock>);
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let seen = |store: &Store, id: u64| {
        store.write(move |tx| tx.first_time("s", id.to_be_bytes())).unwrap().into_value()
    };
    assert!((0..40).all(|id| seen(&store, id)));
    clock.1.store(500_000, Ordering::SeqCst);
    assert!((100..300).all(|id| seen(&store, id)));
    assert!((0..40).all(|id| !seen(&store, id)), "forgotten too early");
    clock.1.store(1_100_000, Ordering::SeqCst);
    assert!((300..500).all(|id| seen(&store, id)));
    assert!((0..40).all(|id| seen(&store, id)), "never forgotten: the inbox grows for ever");
    put(&store, 0).unwrap();
    assert_eq!(audit(&store), [0]);
}
