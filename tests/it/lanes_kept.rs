//! How many lanes and gaps a consumer remembers, and that forgetting them applies nothing twice and drops nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{Database, TableDefinition};
use onewrite::time::ManualClock;
use onewrite::{Error, Event, LanesPolicy, Message, RejectTo, ScopeStats, Store, StoreBuilder};

use crate::lanes_inbox::{BANK, drained, numbered, once_each, quick, send, set, stop, until};

const KEPT: TableDefinition<'static, &'static [u8], &'static [u8]> =
    TableDefinition::new("onewrite.lanes_kept");
const HOUR: Duration = Duration::from_secs(3600);

struct Rig {
    _folder: tempfile::TempDir,
    clock: Arc<ManualClock>,
    store: Store,
    broker: MemoryBroker,
}

impl Rig {
    fn new(settings: impl FnOnce(StoreBuilder) -> StoreBuilder) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::new());
        let builder = settings(Store::builder().clock(clock.clone()));
        let store = builder.open(folder.path().join("a.redb")).unwrap();
        let broker = MemoryBroker::new();
        broker.declare_queue("q", QueueOptions::default());
        Self { _folder: folder, clock, store, broker }
    }

    fn send(&self, messages: impl IntoIterator<Item = Message>) {
        messages.into_iter().for_each(|message| send(&self.broker, message));
        until("all are taken", || drained(&self.broker));
    }

    fn figures(&self) -> ScopeStats {
        self.store.stats().unwrap().consumers["service"]
    }

    fn rejected(&self) -> BTreeSet<String> {
        let list = self.store.rejected("service").list(None, 10_000).unwrap();
        list.into_iter().map(|entry| entry.message_id.unwrap_or_default()).collect()
    }
}

/// Goal: lanes are bounded; idle ones go for new ones, in any number; a repeat of a forgotten lane is never applied again, and a
/// new message of one is rejected, not dropped; lanes that are in use stay. Method: 10 lanes at most, 100 lanes one after another while
/// one lives on, an hour between them; then all of it again, and a new number of each.
#[test]
fn a_forgotten_lane_applies_nothing_twice() {
    let rig = Rig::new(|builder| builder.lanes_max(10).lanes_policy(LanesPolicy::ForgetIdle(HOUR * 5)));
    let consumer = quick(&rig.store).spawn(rig.broker.source("q"), crate::lanes_inbox::count).unwrap();
    let old = |lane: i64| numbered(100 + lane, 0, &format!("l{lane}"));
    for lane in 0..100 {
        rig.send([numbered(7, lane, &format!("alive {lane}")), old(lane)]);
        rig.clock.advance(HOUR);
    }
    let figures = rig.figures();
    assert_eq!((figures.lanes, figures.lanes_forgotten, figures.rejected), (10, 91, 0), "{figures:?}");
    let all: Vec<_> = (0..100).flat_map(|n| [format!("alive {n}"), format!("l{n}")]).collect();
    once_each(&rig.store, all.clone());
    rig.send((0..100).map(old));
    rig.send((0..100).map(|lane| numbered(7, lane, &format!("alive {lane}"))));
    once_each(&rig.store, all.clone());
    assert_eq!(rig.rejected().len(), 91, "what may be a repeat is rejected");
    // The next number of a lane that was forgotten is genuine: it waits for a person.
    rig.send([numbered(100, 1, "late"), numbered(7, 100, "alive 100")]);
    assert!(rig.rejected().contains("100-1-late"));
    let list = rig.store.rejected("service").list(None, 1_000).unwrap();
    let late = list.iter().find(|entry| entry.message_id.as_deref() == Some("100-1-late")).unwrap();
    assert!(late.reason.contains("forgotten"), "{}", late.reason);
    rig.store.rejected("service").redrive(late.number).unwrap();
    until("somebody has decided", || consumer.status().redriven == 1);
    once_each(&rig.store, all.into_iter().chain(["late".to_owned(), "alive 100".to_owned()]));
    stop(consumer);
}

/// Goal: forged lanes can take neither room nor memory without bound, and silence nothing genuine. Method: forgeries of many lanes,
/// ids and producers beyond the bound; then genuine lanes, before and after the forged ones are idle.
#[test]
fn forged_lanes_are_bounded() {
    for policy in [LanesPolicy::Refuse, LanesPolicy::ForgetIdle(HOUR)] {
        let rig = Rig::new(|builder| builder.lanes_max(50).lanes_policy(policy));
        let consumer = quick(&rig.store).spawn(rig.broker.source("q"), crate::lanes_inbox::count).unwrap();
        let genuine = |lane: i64, number| numbered(lane, number, &format!("genuine {lane} {number}"));
        rig.send((0..20).map(|lane| genuine(lane * 10, 0)));
        rig.send((0..200).map(|n| numbered(i64::MAX - 1_000_000 * n, 0, &format!("forged {n}"))));
        rig.send((0..200).map(|n| {
            let mut message = numbered(n, 5, &format!("stranger {n}"));
            set(&mut message, onewrite::wire::STORE, format!("018f0000-0000-7000-8000-{n:012x}"));
            message
        }));
        let figures = rig.figures();
        assert_eq!((figures.lanes, figures.lanes_forgotten), (50, 0), "{figures:?}");
        // Known lanes are served; a new one is rejected while there is no room.
        rig.send((0..20).map(|lane| genuine(lane * 10, 1)));
        rig.send([genuine(500, 0)]);
        let applied = crate::lanes_inbox::effects(&rig.store);
        assert!((0..20).all(|lane| applied.get(&format!("genuine {} 1", lane * 10)) == Some(&1)));
        assert!(rig.rejected().contains("500-0-genuine 500 0"));
        rig.clock.advance(HOUR * 2);
        rig.send((0..20).map(|lane| genuine(lane * 10, 2)));
        rig.send((0..20).map(|lane| genuine(1_000 + lane, 0)));
        let applied = crate::lanes_inbox::effects(&rig.store);
        let new = (0..20).filter(|lane| applied.contains_key(&format!("genuine {} 0", 1_000 + lane))).count();
        match policy {
            LanesPolicy::Refuse => assert_eq!(new, 0),
            _ => assert!(new >= 15, "forged lanes that are idle go for them: {new}"),
        }
        assert_eq!(rig.figures().lanes, 50);
        assert!(applied.values().all(|n| *n == 1), "nothing twice");
        stop(consumer);
    }
}

/// Goal: gaps are bounded, of one lane and of all; each lane may have some whatever others have; what would have filled a forgotten one is
/// rejected, never applied twice or dropped; the figures are those of the rows. Method: one lane of even numbers, many lanes that begin in their middle; then all odd numbers.
#[test]
fn forgotten_gaps_drop_nothing() {
    let rig = Rig::new(|builder| builder.gaps_max(20));
    let consumer = quick(&rig.store).spawn(rig.broker.source("q"), crate::lanes_inbox::count).unwrap();
    let message = |lane: i64, number: i64| numbered(lane, number, &format!("{lane} {number}"));
    let even: Vec<_> = (0..60).map(|n| message(1, 2 * n)).collect();
    rig.send(even.clone());
    assert_eq!((rig.figures().gaps, rig.figures().lanes), (20, 1));
    rig.send((2..12).map(|lane| message(lane, 9)));
    assert_eq!(
        (rig.figures().gaps, rig.figures().lanes),
        (20 + 10, 11),
        "gaps of one lane take no room of others"
    );
    rig.send(even);
    rig.send((0..59).map(|n| message(1, 2 * n + 1)));
    rig.send((2..12).map(|lane| message(lane, 4)));
    let applied = crate::lanes_inbox::effects(&rig.store);
    assert!(applied.values().all(|n| *n == 1), "nothing twice");
    let rejected = rig.rejected();
    assert_eq!(applied.len() + rejected.len(), 60 + 59 + 10 + 10, "nothing is dropped");
    assert_eq!((applied.len(), rejected.len()), (60 + 20 + 10 + 10, 39));
    assert_eq!(rig.figures().gaps, 20, "two of each of the other lanes");
    rig.send((2..12).flat_map(|lane| [0, 1, 2, 3, 5, 6, 7, 8].map(|number| message(lane, number))));
    assert_eq!((rig.figures().gaps, rig.rejected().len()), (0, 39), "all others are filled");
    // Room again.
    rig.send((20..30).map(|lane| message(lane, 1)));
    assert_eq!(rig.figures().gaps, 10);
    rig.send((20..30).map(|lane| message(lane, 0)));
    assert_eq!((rig.figures().gaps, rig.figures().lanes), (0, 21));
    stop(consumer);
}

/// Goal: a file of format 5 has its lanes and gaps counted, and none of its lanes is idle at once. Method: its rows without the row that
/// counts.
#[test]
fn lanes_of_the_format_before_count() {
    let rig = Rig::new(|builder| builder);
    let consumer = quick(&rig.store).spawn(rig.broker.source("q"), crate::lanes_inbox::count).unwrap();
    rig.send((0..30).flat_map(|lane| [numbered(lane, 1, "a"), numbered(lane, 3, "b")]));
    stop(consumer);
    let before = rig.figures();
    assert_eq!((before.lanes, before.gaps), (30, 60));
    let path = rig.store.path().to_owned();
    rig.clock.advance(HOUR * 100);
    rig.store.write(|tx| tx.append(Event::bytes("t", "").unpublished())).unwrap();
    rig.store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        assert!(tx.delete_table(KEPT).unwrap());
        let mut meta = tx.open_table(TableDefinition::<&str, &[u8]>::new("onewrite.meta")).unwrap();
        meta.insert("format", &5_u32.to_le_bytes()[..]).unwrap();
    }
    tx.commit().unwrap();
    drop(db);
    let builder = Store::builder().lanes_max(30).lanes_policy(LanesPolicy::ForgetIdle(HOUR * 5));
    let store = builder.open(&path).unwrap();
    assert_eq!(store.stats().unwrap().consumers["service"], before);
    // Nobody knows when something came of these lanes last.
    let new = store.begin().unwrap();
    let full = new.first_delivery("service", &numbered(99, 0, "new"));
    assert!(matches!(full, Err(Error::LanesFull { lanes_max: 30, .. })), "{full:?}");
}

/// Goal: what is not believed can go back to the broker instead of into the file, while all else is kept. Method: unknown producers, headers
/// by half, an unsigned message, and a delivery that the handler rejects.
#[test]
fn unknown_producers_leave_no_row() {
    let rig = Rig::new(|builder| builder);
    rig.broker.declare_queue("dead", QueueOptions::default());
    rig.broker.declare_queue("q", QueueOptions::default().dead_letter("", "dead"));
    let builder = quick(&rig.store).producers([BANK]).rejects_unknown(RejectTo::DeadLetter);
    let consumer = builder.spawn(rig.broker.source("q"), |delivery, tx| {
        if delivery.message.payload.starts_with(b"bad") {
            return Err(Error::reject("no such account"));
        }
        crate::lanes_inbox::count(delivery, tx)
    });
    let consumer = consumer.unwrap();
    rig.send((0..50).map(|n| {
        let mut message = numbered(n, 0, "stranger");
        set(&mut message, onewrite::wire::STORE, "018f0000-0000-7000-8000-00000000000c");
        message
    }));
    rig.send((0..50).map(|n| {
        let mut message = numbered(n, 0, "by half");
        set(&mut message, onewrite::wire::LANE, "x");
        message
    }));
    rig.send([numbered(1, 0, "good"), numbered(1, 1, "bad")]);
    let stats = consumer.status();
    assert_eq!((stats.applied, stats.rejected, stats.quarantined), (1, 101, 1), "{stats:?}");
    assert_eq!((rig.broker.queue_len("dead"), rig.figures().rejected, rig.figures().lanes), (100, 1, 1));
    stop(consumer);
}
