//! A reader is stopped by what it wants alone: its filter is asked before an event is decoded and upcast.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::{Error, Event, EventFilter, ExpectedRevision, FailurePolicy, Store, StoreBuilder};
use proptest::prelude::*;

const TIMEOUT: Duration = Duration::from_secs(30);
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
const ROWS: TableDefinition<'_, u64, u64> = TableDefinition::new("rows");

fn same(payload: &[u8]) -> Result<Vec<u8>, onewrite::BoxError> {
    Ok(payload.to_vec())
}

/// A log as a newer release has written it: (stream, type, version) each.
fn written(path: &Path, events: &[(&'static str, &'static str, u32)]) {
    let newer = Store::builder()
        .upcast(("card.issued", 1), ("card.issued", 2), same)
        .upcast(("card.issued", 2), ("card.issued", 3), same)
        .upcast(("paid", 1), ("paid", 2), same);
    let store = newer.open(path).unwrap();
    for (stream, event_type, version) in events.iter().copied() {
        let event = move || Event::bytes(event_type, stream).version(version).unpublished();
        store.write(move |tx| tx.stream(stream).append([event()], ExpectedRevision::Any)).unwrap();
    }
    store.close().unwrap();
}

/// Sequence numbers that each kind of reader sees under a filter; an error's stands as an error.
fn seen(store: &Store, filter: &EventFilter) -> [Vec<Result<u64, u64>>; 3] {
    let reported = |read: Result<onewrite::RecordedEvent, Error>| match read {
        Ok(event) => Ok(event.seq()),
        Err(Error::Upcast { seq, .. }) => Err(seq),
        Err(Error::Corrupt(error)) => Err(error.seq),
        Err(error) => panic!("{error}"),
    };
    let read = store.read().unwrap().events_of(0, filter).unwrap().map(reported).collect();
    let mut subscription = store.subscribe(0).unwrap().filter_events(filter.clone());
    let subscribed = std::iter::from_fn(|| subscription.try_next()).map(reported).collect();
    let policy = FailurePolicy::Quarantine { attempts: 1 };
    let projection = store.projection("p").table(ROWS).filter(filter.clone()).on_failure(policy);
    let projection = projection.spawn(|event, tx| {
        tx.open_table(ROWS)?.insert(event.seq(), 1)?;
        Ok(())
    });
    let projection = projection.unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    let failed: Vec<_> =
        projection.failures().list(None, 1000).unwrap().iter().map(|it| Err(it.seq)).collect();
    projection.stop(TIMEOUT);
    let mut projected: Vec<_> = store.read().unwrap().open_table(ROWS).map_or_else(
        |_| Vec::new(),
        |rows| rows.iter().unwrap().map(|row| Ok(row.unwrap().0.value())).collect(),
    );
    projected.extend(failed);
    projected.sort_by_key(|row| row.map_or_else(|seq| seq, |seq| seq));
    store.forget_projection("p").unwrap();
    store.write(|tx| tx.delete_table(ROWS)).unwrap();
    [read, subscribed, projected]
}

/// Goal: an event that cannot be upcast stops only readers that want it. Method: an upcast fails, or panics, or the version is
/// unknown, in a foreign stream or of a foreign type. The filters name streams, categories, types, and two of them.
#[test]
fn a_foreign_event_that_cannot_be_upcast_stops_no_reader() {
    let events = [
        ("account-1", "paid", 1),
        ("card-1", "card.issued", 1),
        ("account-1", "paid", 2),
        ("card-1", "card.issued", 3),
        ("account-2", "card.issued", 3),
        ("account-2", "paid", 1),
    ];
    let failing = || {
        Store::builder().upcast(("card.issued", 1), ("card.issued", 2), |_| Err("no".into())).upcast(
            ("paid", 1),
            ("paid", 2),
            same,
        )
    };
    let panicking = || {
        Store::builder().upcast(("card.issued", 1), ("card.issued", 2), |_| panic!("no")).upcast(
            ("paid", 1),
            ("paid", 2),
            same,
        )
    };
    for builder in [&failing as &dyn Fn() -> StoreBuilder, &panicking] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        written(&path, &events);
        let store = builder().open(&path).unwrap();
        let all = EventFilter::all;
        for (filter, expected) in [
            (all().stream("account-1"), vec![Ok(0), Ok(2)]),
            (all().event_type("paid"), vec![Ok(0), Ok(2), Ok(5)]),
            (all().category("account").event_type("paid"), vec![Ok(0), Ok(2), Ok(5)]),
            (all().category("other"), vec![]),
            (all().category("account"), vec![Ok(0), Ok(2), Err(4), Ok(5)]),
            (all().stream("card-1").stream("account-1"), vec![Ok(0), Err(1), Ok(2), Err(3)]),
            (all().event_type("card.issued"), vec![Err(1), Err(3), Err(4)]),
            (all(), vec![Ok(0), Err(1), Ok(2), Err(3), Err(4), Ok(5)]),
        ] {
            for (reader, seen) in
                ["events_of", "subscription", "projection"].iter().zip(seen(&store, &filter))
            {
                assert_eq!(seen, expected, "{reader} of {filter:?}");
            }
        }
    }
}

/// Goal: no code of the application runs for an event that the filter lets pass. Method: count the calls of an upcast.
#[test]
fn what_the_filter_lets_pass_is_not_upcast() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    written(&path, &[("account-1", "paid", 1), ("card-1", "card.issued", 1), ("card-2", "card.issued", 1)]);
    let calls = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    let count = move |payload: &[u8]| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(payload.to_vec())
    };
    let store = Store::builder().upcast(("card.issued", 1), ("card.issued", 2), count).open(&path).unwrap();
    seen(&store, &EventFilter::all().category("account"));
    seen(&store, &EventFilter::all().event_type("paid"));
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    seen(&store, &EventFilter::all().stream("card-2"));
    assert_eq!(calls.load(Ordering::SeqCst), 3, "one event, three readers");
}

/// Goal: a filter by type means the type that an event is read as. Method: types that become another, one of them by version,
/// one along a chain. A step fails, and a newer version of its type is unknown: readers of the type it leads to want both.
#[test]
fn a_filter_takes_what_becomes_its_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let old = Store::builder().upcast(("b", 1), ("b", 2), same).upcast(("b", 2), ("b", 3), same);
    let store = old.open(&path).unwrap();
    for (event_type, version) in [("a", 1), ("b", 1), ("b", 2), ("b", 3), ("c", 1), ("d", 1), ("other", 1)] {
        let event = move || Event::bytes(event_type, "x").version(version).unpublished();
        store.write(move |tx| tx.append(event())).unwrap();
    }
    store.close().unwrap();
    let store = Store::builder()
        .upcast(("a", 1), ("c", 1), same)
        .upcast(("b", 1), ("c", 1), same)
        .upcast(("b", 2), ("broken", 1), |_| Err("no".into()))
        .upcast(("c", 1), ("d", 1), same)
        .open(&path)
        .unwrap();
    for (event_type, expected) in [
        ("d", vec![Ok(0), Ok(1), Ok(4), Ok(5)]),
        ("broken", vec![Err(2), Err(3)]),
        ("other", vec![Ok(6)]),
        ("unknown", vec![]),
    ] {
        for seen in seen(&store, &EventFilter::all().event_type(event_type)) {
            assert_eq!(seen, expected, "{event_type}");
        }
    }
}

/// Goal: each reader reports a damaged record, since its stream cannot be trusted. Method: flip one byte of it.
#[test]
fn a_damaged_record_is_reported_whatever_the_filter() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    written(&path, &[("account-1", "paid", 2), ("card-1", "card.issued", 3), ("account-1", "paid", 2)]);
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    let mut frame = tx.open_table(LOG).unwrap().get(1).unwrap().unwrap().value().to_vec();
    *frame.last_mut().unwrap() ^= 1;
    tx.open_table(LOG).unwrap().insert(1, frame.as_slice()).unwrap();
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    for seen in seen(&store, &EventFilter::all().category("none")) {
        assert_eq!(seen, [Err(1)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Goal: for every filter, a reader sees what a look at all events would leave, and is stopped by no other. Method: chance
    /// makes the chains between four types, whose steps fail or hold, the events in three categories, and the filters. The
    /// model follows each chain itself.
    #[test]
    fn a_filter_shows_what_a_look_at_everything_leaves(
        steps in prop::collection::btree_map(0..4_u8, (0..4_u8, any::<bool>()), 0..4),
        events in prop::collection::vec((0..3_u8, 0..4_u8), 1..30),
        (categories, types) in (prop::collection::btree_set(0..3_u8, 0..2), prop::collection::btree_set(0..4_u8, 0..3)),
    ) {
        // A step leads to a higher type only, so that no chain returns.
        let steps: std::collections::BTreeMap<u8, (u8, bool)> =
            steps.into_iter().filter(|(from, (to, _))| from < to).collect();
        // The type at the end, and whether each step on the way holds.
        let ends = |mut at: u8| {
            let mut whole = true;
            while let Some((to, holds)) = steps.get(&at) {
                (at, whole) = (*to, whole && *holds);
            }
            (at, whole)
        };
        // A filter for a type that no event can be any more is left out.
        let types: Vec<u8> = types.into_iter().filter(|it| !steps.contains_key(it)).collect();
        let mut builder = Store::builder();
        for (from, (to, holds)) in steps.clone() {
            let step = move |payload: &[u8]| if holds { Ok(payload.to_vec()) } else { Err("no".into()) };
            builder = builder.upcast((&format!("t{from}"), 1), (&format!("t{to}"), 1), step);
        }
        let folder = tempfile::tempdir().unwrap();
        let store = builder.open(folder.path().join("a.redb")).unwrap();
        let all = events.clone();
        store.write(move |tx| {
            for (category, event_type) in &all {
                let event = Event::bytes(format!("t{event_type}"), "x");
                tx.stream(format!("c{category}-1")).append([event], ExpectedRevision::Any)?;
            }
            Ok(())
        }).unwrap();
        let mut filter = EventFilter::all();
        for category in &categories {
            filter = filter.category(format!("c{category}"));
        }
        for event_type in &types {
            filter = filter.event_type(format!("t{event_type}"));
        }
        let expected: Vec<_> = (0..).zip(&events).filter_map(|(seq, (category, event_type))| {
            let (end, whole) = ends(*event_type);
            let takes = (categories.is_empty() || categories.contains(category))
                && (types.is_empty() || types.contains(&end));
            takes.then_some(if whole { Ok(seq) } else { Err(seq) })
        }).collect();
        for (reader, seen) in ["events_of", "subscription", "projection"].iter().zip(seen(&store, &filter)) {
            prop_assert_eq!(&seen, &expected, "{} of {:?}", reader, filter);
        }
    }
}
