//! What rejected deliveries may take in the file: bounds in rows and bytes, and what becomes of one more.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::{Consumer, ConsumerBuilder, ConsumerWait, Error, Message, RejectedFull, Store};

use crate::lanes_inbox::{drained, numbered, once_each, quick, send, set, setup, stop, until};
use crate::scratch::{Warnings, child, crash_copy, task};

type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;
const REJECTED: Bytes = Bytes::new("onewrite.rejected");
const PIECES: Bytes = Bytes::new("onewrite.pieces");
const INBOX: Bytes = Bytes::new("onewrite.inbox");

/// Rejects what is bad.
fn picky(builder: ConsumerBuilder, broker: &MemoryBroker) -> Consumer {
    let consumer = builder.spawn(broker.source("q"), |delivery, tx| {
        if delivery.message.payload.starts_with(b"bad") {
            return Err(Error::reject("no such account"));
        }
        crate::lanes_inbox::count(delivery, tx)
    });
    consumer.unwrap()
}

fn bad(id: &str, bytes: usize) -> Message {
    let payload = [b"bad", &vec![b'x'; bytes][..]].concat();
    Message { message_id: Some(id.into()), payload, ..Message::default() }
}

fn good(id: &str) -> Message {
    Message { message_id: Some(id.into()), payload: id.into(), ..Message::default() }
}

/// Bytes of pages in use in a file that nobody has open.
fn used(path: &Path) -> u64 {
    let db = Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    let stats = tx.stats().unwrap();
    stats.allocated_pages() * stats.page_size() as u64
}

fn rows(store: &Store, table: Bytes) -> usize {
    store.read().unwrap().open_table(table).map_or(0, |table| table.iter().unwrap().count())
}

/// Goal: what is rejected, or parked, takes little more in the file than it is long, whatever its length, and goes with nothing left
/// behind. Method: pages in use of a file with 100 such deliveries, per length of bodies and of headers.
#[test]
fn a_kept_delivery_takes_little_more_than_its_length() {
    for (bytes, header) in [(65_536, 0), (70_000, 0), (5_000, 0), (130_000, 0), (10, 40_000)] {
        for parked in [false, true] {
            let (_folder, store, broker) = setup();
            let path = store.path().to_owned();
            store.close().unwrap();
            let before = used(&path);
            let store = Store::open(&path).unwrap();
            let builder =
                quick(&store).backoff(Duration::from_secs(3600), Duration::from_secs(3600)).prefetch(8);
            let consumer = builder.spawn(broker.source("q"), move |_, _| match parked {
                true => Err(Error::app("not yet")),
                false => Err(Error::reject("never")),
            });
            let consumer = consumer.unwrap();
            for n in 0..100 {
                let mut message = bad(&format!("m{n}"), bytes);
                if header > 0 {
                    set(&mut message, "h", "h".repeat(header));
                }
                send(&broker, message);
            }
            let of_scope =
                |store: &Store| store.stats().unwrap().consumers.get("service").copied().unwrap_or_default();
            // A few wait with the broker.
            until("all are kept", || {
                let kept = of_scope(&store);
                kept.rejected == 100 || kept.parked >= 98
            });
            let kept = of_scope(&store);
            let (rows, counted) = (kept.rejected + kept.parked, kept.rejected_bytes + kept.parked_bytes);
            let _ = consumer.stop(Duration::from_secs(5));
            store.close().unwrap();
            let taken = used(&path) - before;
            let each = (bytes + header) as u64;
            assert!(counted >= rows * each && counted <= rows * (each + 1_000), "{counted} bytes for {rows}");
            let most = rows * (each + each / 8 + 6_000);
            assert!(
                taken <= most,
                "{rows} of {each} bytes take {taken}, more than {most} (parked: {parked})"
            );
            if parked {
                continue;
            }
            let store = Store::open(&path).unwrap();
            let (entry, message) = store.rejected("service").get(7).unwrap();
            assert_eq!((entry.number, message.payload.len()), (7, bytes + 3));
            for entry in store.rejected("service").list(None, 1_000).unwrap() {
                store.rejected("service").discard(entry.number).unwrap();
            }
            assert_eq!((rows_of(&store), crate::rejected_room::rows(&store, PIECES)), ((0, 0), 0));
            store.close().unwrap();
        }
    }
}

fn rows_of(store: &Store) -> (u64, u64) {
    let figures = store.stats().unwrap().consumers["service"];
    (figures.rejected, figures.rejected_bytes)
}

/// Goal: beyond the bound a consumer stops by default and says so; nothing is lost or dropped; it goes on by itself once there is
/// room, whether a row was discarded or driven again; a lost connection in between makes no second row. Method: poison before
/// genuine deliveries, a bound of four rows or of their bytes, and rows taken away one by one.
#[test]
fn a_full_quarantine_stops_the_consumer_until_there_is_room() {
    for (rows_max, bytes_max) in [(4, u64::MAX), (u64::MAX, 4 * 20_000 + 2_000)] {
        let (folder, store, broker) = setup();
        let cured = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&cured);
        let builder = quick(&store).rejected_max(rows_max, bytes_max);
        let consumer = builder.spawn(broker.source("q"), move |delivery, tx| {
            let is_bad = delivery.message.payload.starts_with(b"bad");
            if is_bad && !seen.load(Relaxed) {
                return Err(Error::reject("no such account"));
            }
            crate::lanes_inbox::count(delivery, tx)
        });
        let consumer = consumer.unwrap();
        (0..9).for_each(|n| send(&broker, bad(&format!("b{n}"), 20_000)));
        until("it waits", || consumer.status().waits_for == Some(ConsumerWait::Quarantine));
        (0..50).for_each(|n| send(&broker, good(&format!("g{n}"))));
        until("the broker keeps the rest", || broker.unsettled_len("q") + broker.queue_len("q") == 55);
        assert_eq!(rows_of(&store).0, 4);
        broker.go_down();
        broker.come_up();
        until("connected again", || consumer.status().connections >= 2);
        until("it waits still", || broker.unsettled_len("q") + broker.queue_len("q") == 55);
        assert_eq!((rows_of(&store).0, consumer.status().applied), (4, 0));

        // A crash in between: all that the broker has comes again, and gives no second row.
        let copy = Store::open(crash_copy(&store, folder.path())).unwrap();
        let again = MemoryBroker::new();
        again.declare_queue("q", QueueOptions::default());
        let other = picky(quick(&copy), &again);
        (0..9).for_each(|n| send(&again, bad(&format!("b{n}"), 20_000)));
        until("all of them", || drained(&again));
        assert_eq!((rows_of(&copy).0, other.status().waits), (9, 0));
        stop(other);

        store.rejected("service").discard(0).unwrap();
        until("one more", || store.rejected("service").list(None, 9).unwrap().last().unwrap().number == 4);
        until("it waits for the others", || consumer.status().waits_for == Some(ConsumerWait::Quarantine));
        cured.store(true, Relaxed);
        store.rejected("service").redrive(1).unwrap();
        until("driven again while it waits", || consumer.status().redriven == 1);
        store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap();
        until("all", || drained(&broker));
        until("nothing is left", || {
            let _ = store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap();
            store.rejected("service").is_empty().unwrap()
        });
        let stats = consumer.status();
        assert_eq!((stats.waits_for, stats.dropped), (None, 0), "{stats:?}");
        assert!(stats.waits <= 12, "{stats:?}");
        assert_eq!(crate::lanes_inbox::effects(&store).values().sum::<u64>(), 50 + 8, "one was discarded");
        stop(consumer);
    }
}

/// Goal: with a dead-letter exchange nothing stops: what finds no room goes there, unmarked, whatever it was refused for. Method: a
/// bound of two rows, poison by lane, by id, and with headers by half.
#[test]
fn a_full_quarantine_gives_back_what_it_cannot_keep() {
    let (_folder, store, broker) = setup();
    broker.declare_queue("dead", QueueOptions::default());
    broker.declare_queue("q", QueueOptions::default().dead_letter("", "dead"));
    let consumer =
        picky(quick(&store).rejected_max(2, 1 << 20).on_rejected_full(RejectedFull::DeadLetter), &broker);
    for n in 0..10 {
        send(&broker, bad(&format!("b{n}"), 10));
        send(&broker, numbered(1, n, "bad by lane"));
        let mut by_half = numbered(2, n, "by half");
        set(&mut by_half, onewrite::wire::LANE, "x");
        send(&broker, by_half);
        send(&broker, good(&format!("g{n}")));
    }
    until("all", || drained(&broker));
    once_each(&store, (0..10).map(|n| format!("g{n}")));
    let stats = consumer.status();
    assert_eq!((stats.quarantined, stats.rejected, broker.queue_len("dead")), (2, 30, 28));
    assert_eq!((stats.waits, rows_of(&store).0), (0, 2));
    // Nothing of those that were given back is marked: they can come again.
    store.rejected("service").discard(0).unwrap();
    store.rejected("service").discard(1).unwrap();
    let dead = broker.messages("dead");
    send(&broker, Message::clone(&dead[0].message));
    until("it is kept now", || consumer.status().quarantined == 3);
    stop(consumer);
}

/// Goal: where the oldest may go they go, counted durably, and nothing stays behind of them: neither pieces nor inbox entries. Method: 300
/// rejected deliveries that are not marked by id (two messages of one id each), a bound of 20 rows, and one that exceeds the bound alone.
#[test]
fn the_oldest_go_and_leave_nothing_behind() {
    let (_folder, store, broker) = setup();
    let bounded = quick(&store).rejected_max(20, 200_000).on_rejected_full(RejectedFull::DropOldest);
    let consumer = picky(bounded, &broker);
    send(&broker, good("g"));
    until("one is applied", || consumer.status().applied == 1);
    let entries = rows(&store, INBOX);
    for n in 0..300 {
        // A conflict with what was applied: not recorded for deduplication.
        send(&broker, Message { payload: vec![7; 5_000 + n], ..good("g") });
    }
    until("all", || drained(&broker));
    let figures = store.stats().unwrap().consumers["service"];
    assert_eq!((figures.rejected, figures.rejected_dropped, consumer.status().dropped), (20, 280, 280));
    assert!(figures.rejected_bytes <= 200_000, "{figures:?}");
    assert_eq!(store.rejected("service").list(None, 1).unwrap()[0].number, 280, "the newest are kept");
    assert_eq!(rows(&store, PIECES), 40, "two of each");
    until("no entry stays", || {
        store.write(|_| Ok(())).unwrap();
        rows(&store, INBOX) == entries + 20
    });
    // One that is longer than all may be has room alone.
    send(&broker, Message { payload: vec![8; 300_000], ..good("g") });
    until("it is kept", || drained(&broker));
    assert_eq!((store.rejected("service").len().unwrap(), consumer.status().waits_for), (1, None));
    let path = store.path().to_owned();
    let _ = consumer.stop(Duration::from_secs(5));
    store.close().unwrap();
    let figures = Store::open(path).unwrap().stats().unwrap().consumers["service"];
    assert_eq!((figures.rejected, figures.rejected_dropped), (1, 300));
}

/// Goal: where the broker gets back what has no room, one that is longer than the bound goes back too: it leaves no room to what is parked
/// and cannot go back. Method: such a bound, one that is longer, and one that is not.
#[test]
fn one_that_is_longer_than_the_bound_is_given_back() {
    let (_folder, store, broker) = setup();
    broker.declare_queue("dead", QueueOptions::default());
    broker.declare_queue("q", QueueOptions::default().dead_letter("", "dead"));
    let builder = quick(&store).rejected_max(20, 10_000).on_rejected_full(RejectedFull::DeadLetter);
    let consumer = picky(builder, &broker);
    send(&broker, bad("long", 50_000));
    send(&broker, bad("short", 500));
    until("all are taken", || drained(&broker));
    assert_eq!((broker.queue_len("dead"), store.rejected("service").len().unwrap()), (1, 1));
    stop(consumer);
}

/// Goal: one that is longer than the bound alone stops no consumer for ever, where the quarantine is emptied by hand. Method: it comes first,
/// and behind another one.
#[test]
fn a_rejected_delivery_that_is_longer_than_the_bound_has_room_alone() {
    let (_folder, store, broker) = setup();
    let consumer = picky(quick(&store).rejected_max(20, 10_000), &broker);
    send(&broker, bad("long", 50_000));
    until("it is kept", || consumer.status().quarantined == 1);
    send(&broker, bad("longer", 60_000));
    until("it waits", || consumer.status().waits_for == Some(ConsumerWait::Quarantine));
    store.rejected("service").discard(0).unwrap();
    until("there is room", || consumer.status().quarantined == 2 && consumer.status().waits_for.is_none());
    send(&broker, good("g"));
    until("it goes on", || drained(&broker));
    once_each(&store, ["g".to_owned()]);
    stop(consumer);
}

/// Goal: deliveries that wait parked and are rejected in the end cannot fill the file either; and where the broker gets back what has no
/// room, they do not stop the consumer: nothing is parked that the quarantine may have no room for. Method: a handler that always
/// fails, few attempts, more deliveries than both bounds allow.
#[test]
fn parked_deliveries_that_are_rejected_are_bounded_too() {
    let (_folder, store, broker) = setup();
    let tries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&tries);
    let builder = quick(&store).prefetch(8).attempts(2).parked_max(10, 1 << 20).rejected_max(5, 1 << 20);
    let builder = builder.on_rejected_full(RejectedFull::DeadLetter).rejects(onewrite::RejectTo::Quarantine);
    let consumer = builder
        .spawn(broker.source("q"), move |_, _| {
            counted.fetch_add(1, Relaxed);
            Err(Error::app("no such account"))
        })
        .unwrap();
    (0..400).for_each(|n| send(&broker, bad(&format!("b{n}"), 100)));
    until("all are tried", || {
        assert_eq!(consumer.status().waits_for, None, "{:?}", consumer.status());
        drained(&broker) && consumer.status().parked == 0
    });
    let figures = store.stats().unwrap().consumers["service"];
    assert!(figures.rejected <= 15 && figures.parked <= 10, "{figures:?}");
    assert!(tries.load(Relaxed) <= 810, "what waits for room is not tried again and again");
    let _ = consumer.stop(Duration::from_secs(5));
}

/// Goal: a consumer that stops says so once, in one warning, however often it looks. Method: a process that collects what it warns of.
#[test]
fn a_full_quarantine_is_reported_once() {
    use tracing_subscriber::layer::SubscriberExt;
    let Some((folder, _)) = task() else {
        let folder = tempfile::tempdir().unwrap();
        let done =
            child("rejected_room::a_full_quarantine_is_reported_once", folder.path(), "").output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        return;
    };
    let warnings = Warnings::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(warnings.clone())).unwrap();
    let store = Store::open(folder.join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let consumer = picky(quick(&store).rejected_max(1, 1 << 20), &broker);
    (0..20).for_each(|n| send(&broker, bad(&format!("b{n}"), 10)));
    until("it waits", || consumer.status().waits_for.is_some());
    for number in 0..5 {
        store.rejected("service").discard(number).unwrap();
        until("the next", || {
            store.rejected("service").list(None, 9).unwrap()[0..].iter().any(|entry| entry.number > number)
        });
    }
    let reported =
        warnings.0.lock().unwrap().iter().filter(|text| text.contains("takes nothing more")).count();
    assert_eq!(reported, 1);
    stop(consumer);
}

/// Goal: rows whose keys name no delivery hold up nothing and can be removed; what has a number stays. Method: such keys among
/// rejected deliveries and among those that are driven again.
#[test]
fn rows_that_name_no_delivery_can_be_removed() {
    let (_folder, store, broker) = setup();
    let consumer = picky(quick(&store), &broker);
    (0..6).for_each(|n| send(&broker, bad(&format!("b{n}"), 9_000)));
    until("all", || consumer.status().quarantined == 6);
    stop(consumer);
    let path = store.path().to_owned();
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut table = tx.open_table(REJECTED).unwrap();
        for kind in [0, 1] {
            for behind in [&b"\0\0"[..], &[0, 0, 0, 0, 0, 0, 0, 2, 9], &[255; 8]] {
                let key = [&[7][..], b"service", &[kind], behind].concat();
                table.insert(key.as_slice(), &b"row"[..]).unwrap();
            }
        }
    }
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    let rejected = store.rejected("service");
    assert!(matches!(rejected.list(None, 100), Err(Error::Storage(_))));
    rejected.redrive(3).unwrap();
    let consumer = quick(&store).spawn(broker.source("q"), |_, _| Ok(())).unwrap();
    until("what is driven again", || consumer.status().redriven == 1);
    assert!(
        matches!(rejected.redrive_all(&onewrite::QuarantineFilter::all()), Err(Error::Storage(_))),
        "reported, though all others are driven again"
    );
    until("all others", || consumer.status().redriven == 6);
    assert_eq!(rejected.discard_unnamed().unwrap(), 6);
    assert_eq!(
        (rejected.redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), rejected.len().unwrap()),
        (0, 0)
    );
    assert_eq!((rejected.list(None, 100).unwrap().len(), rows(&store, PIECES)), (0, 0));
    assert_eq!(rejected.discard_unnamed().unwrap(), 0);
    stop(consumer);
}

/// Goal: a file of format 5 opens: its rejected deliveries are counted with their bytes, and are driven again. Method: rows as that
/// format wrote them: in one piece, and totals without bytes.
#[test]
fn rejected_deliveries_of_the_format_before_count() {
    let (_folder, store, broker) = setup();
    let consumer = picky(quick(&store), &broker);
    (0..3).for_each(|n| send(&broker, bad(&format!("b{n}"), 100)));
    until("all", || consumer.status().quarantined == 3);
    stop(consumer);
    let (_, bytes) = rows_of(&store);
    let path = store.path().to_owned();
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut table = tx.open_table(REJECTED).unwrap();
        let key = [&[7][..], b"service"].concat();
        let totals = table.get(key.as_slice()).unwrap().unwrap().value()[..16].to_vec();
        table.insert(key.as_slice(), totals.as_slice()).unwrap();
        let mut meta = tx.open_table(TableDefinition::<&str, &[u8]>::new("onewrite.meta")).unwrap();
        meta.insert("format", &5_u32.to_le_bytes()[..]).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    assert_eq!(rows_of(&store), (3, bytes));
    let consumer = quick(&store).spawn(broker.source("q"), |_, _| Ok(())).unwrap();
    assert_eq!(store.rejected("service").redrive_all(&onewrite::QuarantineFilter::all()).unwrap(), 3);
    until("all", || consumer.status().redriven == 3);
    assert_eq!(rows_of(&store), (0, 0));
    stop(consumer);
}
