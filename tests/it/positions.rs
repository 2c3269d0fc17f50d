//! Where reading begins: every reader refuses a position beyond the end, and no gap passes in silence.

use std::time::{Duration, Instant};

use onewrite::broker::MemoryBroker;
use onewrite::{Error, Event, EventFilter, ExpectedRevision, StartAt, Store, Subscription};

const TIMEOUT: Duration = Duration::from_secs(30);

/// A log of `events` published events that is trimmed to its end; each tenth is of a stream, and stays.
fn trimmed(events: u64) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().progress_delay(Duration::from_millis(5));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let append = move |tx: &onewrite::Transaction| {
        (0..events).try_for_each(|n| {
            let event = Event::bytes("counted", n.to_le_bytes()).to("", "q");
            match n % 10 {
                3 => tx.stream("kept-1").append([event], ExpectedRevision::Any).map(drop),
                _ => tx.append(event).map(drop),
            }
        })
    };
    store.write(append).unwrap();
    let end = Instant::now() + TIMEOUT;
    while store.stats().unwrap().trimmed_to < events {
        assert!(Instant::now() < end, "{:?}", store.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    relay.stop(TIMEOUT);
    (folder, store)
}

fn reported(subscription: &mut Subscription) -> Vec<Result<u64, Error>> {
    std::iter::from_fn(|| subscription.try_next()).map(|event| event.map(|event| event.seq())).collect()
}

/// Goal: a subscription is not silent about events that are gone. Method: positions below, at and above the trimmed edge, with
/// and without a filter, and as a stream; the gap comes first, and what a stream keeps follows.
#[test]
fn a_trimmed_position_is_reported() {
    let (_folder, store) = trimmed(40);
    for from in [0, 1, 20, 33, 39] {
        let kept: Vec<u64> = (from..40).filter(|seq| seq % 10 == 3).collect();
        for filter in
            [EventFilter::all(), EventFilter::all().category("kept"), EventFilter::all().event_type("none")]
        {
            let wanted = if filter == EventFilter::all().event_type("none") { &[][..] } else { &kept };
            let mut subscription = store.subscribe(from).unwrap().filter_events(filter);
            let mut read = reported(&mut subscription).into_iter();
            let first = read.next();
            assert!(
                matches!(first, Some(Err(Error::Trimmed { from: at, trimmed_to: 40 })) if at == from),
                "{from}: {first:?}"
            );
            assert_eq!(read.map(Result::unwrap).collect::<Vec<_>>(), wanted, "{from}");
            assert_eq!(subscription.position(), 40);
        }
    }
    let mut at_the_edge = store.subscribe(40).unwrap();
    assert!(reported(&mut at_the_edge).is_empty());
    store.write(|tx| tx.append(Event::bytes("later", "").unpublished())).unwrap();
    assert_eq!(reported(&mut at_the_edge).into_iter().map(Result::unwrap).collect::<Vec<_>>(), [40]);
    let mut oldest = store.subscribe_at(StartAt::Oldest).unwrap();
    assert_eq!(
        reported(&mut oldest).into_iter().map(Result::unwrap).collect::<Vec<_>>(),
        [3, 13, 23, 33, 40]
    );
}

/// Goal: a gap that was not taken yet is not skipped by a subscriber that remembers its position. Method: the position before
/// and after the gap is taken.
#[test]
fn the_position_stands_before_a_gap_that_is_not_reported_yet() {
    let (_folder, store) = trimmed(20);
    let mut subscription = store.subscribe(5).unwrap();
    assert_eq!(subscription.position(), 5);
    assert!(matches!(subscription.try_next(), Some(Err(Error::Trimmed { from: 5, trimmed_to: 20 }))));
    assert_eq!(subscription.position(), 13, "the next one that the stream keeps");
}

/// Goal: a position beyond the end is refused by every reader that waits for more, by one check, and leaves nothing behind. Method: one and many
/// events beyond, in an empty, a full and a trimmed log; the end itself is fine everywhere.
#[test]
fn a_position_beyond_the_end_is_refused_at_every_door() {
    let empty = tempfile::tempdir().unwrap();
    let full = tempfile::tempdir().unwrap();
    let stores = [
        (Store::open(empty.path().join("a.redb")).unwrap(), 0),
        (Store::open(full.path().join("a.redb")).unwrap(), 7),
    ];
    stores[1]
        .0
        .write(|tx| (0..7).try_for_each(|_| tx.append(Event::bytes("counted", "").unpublished()).map(drop)))
        .unwrap();
    let (_folder, old) = trimmed(20);
    for (store, end) in stores.into_iter().chain([(old, 20)]) {
        let broker = MemoryBroker::new();
        let doors = |at: u64| {
            let start = StartAt::Position(at);
            let projection = store.projection("p").start_at(start).spawn(|_, _| Ok(()));
            let relay = store.relay("beyond").start_at(start).spawn(broker.publisher());
            [
                ("subscribe", store.subscribe(at).map(drop)),
                ("subscribe_at", store.subscribe_at(start).map(drop)),
                ("projection", projection.map(drop)),
                ("relay", relay.map(|relay| _ = relay.stop(TIMEOUT))),
            ]
        };
        for at in [end + 1, end + 1000, u64::MAX] {
            for (door, opened) in doors(at) {
                let Err(Error::Setting(error)) = opened else {
                    panic!("{door} at {at} of {end}: {opened:?}")
                };
                assert!(error.reason.contains(&format!("ends at {end}")), "{door}: {error}");
            }
        }
        assert!(!store.stats().unwrap().projections.contains_key("p"));
        assert!(!store.stats().unwrap().relays.contains_key("beyond"));
        for (door, opened) in doors(end) {
            assert!(opened.is_ok(), "{door} at the end: {opened:?}");
        }
    }
}

/// Goal: a subscription reports each gap, in any order of appends, trims and reads. Method: subscribers come and go while a
/// relay lets the log be trimmed, each at the position of the one before. An event is seen once, or lies in a reported gap.
#[test]
fn every_event_is_seen_or_in_a_gap_that_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().progress_delay(Duration::from_millis(1));
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let (mut position, mut gaps) = (0, 0);
    for round in 0..40_u64 {
        let append = |tx: &onewrite::Transaction| {
            (0..100).try_for_each(|_| tx.append(Event::bytes("counted", "").to("", "q")).map(drop))
        };
        let last = *store.write(append).unwrap().seqs().last().unwrap();
        if round % 3 == 0 {
            let end = Instant::now() + TIMEOUT;
            while store.stats().unwrap().trimmed_to < last / 2 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let mut subscription = store.subscribe(position).unwrap();
        for _ in 0..30 + round {
            match subscription.try_next() {
                None => break,
                Some(Ok(event)) => {
                    assert_eq!(event.seq(), position, "round {round}");
                    position += 1;
                }
                Some(Err(Error::Trimmed { from, trimmed_to })) => {
                    assert!(
                        from == position && trimmed_to > from,
                        "round {round}: {from} {trimmed_to} {position}"
                    );
                    position = trimmed_to;
                    gaps += 1;
                }
                Some(Err(error)) => panic!("{error}"),
            }
        }
        assert_eq!(subscription.position(), position);
    }
    assert!(gaps > 0, "nothing was trimmed under them");
    relay.stop(TIMEOUT);
}
