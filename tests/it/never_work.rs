//! Settings that can never work are refused when they are set, with the reason.

use std::time::Duration;

use onewrite::broker::MemoryBroker;
use onewrite::{Aggregate, Error, Event, EventFilter, GapPolicy, RecordedEvent, Result, Store};

fn same(payload: &[u8]) -> Result<Vec<u8>, onewrite::BoxError> {
    Ok(payload.to_vec())
}

/// The words of each reader that refuses the filter; a reader that takes it panics.
fn refusals(store: &Store, filter: &EventFilter) -> Vec<String> {
    let setting = |reader: &str, refused: Result<()>| match refused {
        Err(Error::Setting(error)) if error.setting == "filter" => error.reason,
        other => panic!("{reader} takes {filter:?}: {other:?}"),
    };
    let projection = store.projection("p").filter(filter.clone()).spawn(|_, _| Ok(()));
    let mut subscription = store.subscribe(0).unwrap().filter_events(filter.clone());
    let first = subscription.try_next().expect("a refusal is reported").map(drop);
    assert!(subscription.next().is_none(), "it waits for what can never come");
    assert!(store.stats().unwrap().projections.is_empty());
    vec![
        setting("projection", projection.map(drop)),
        setting("subscription", first),
        setting("events_of", store.read().unwrap().events_of(0, filter).map(drop)),
    ]
}

/// Goal: a filter for a type that an upcast renames away is refused, and the refusal names the type that events have now.
/// Method: a rename, a rename along a chain, one of several versions; types that events can still have are taken.
#[test]
fn a_filter_for_a_renamed_type_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .upcast(("paid", 1), ("money.paid", 1), same)
        .upcast(("a", 1), ("b", 1), same)
        .upcast(("b", 1), ("c", 1), same)
        .upcast(("v", 1), ("v", 2), same)
        .upcast(("v", 2), ("w", 1), same)
        .upcast(("there", 1), ("elsewhere", 1), same)
        .upcast(("elsewhere", 1), ("there", 2), same)
        .open(folder.path().join("a.redb"))
        .unwrap();
    store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished())).unwrap();
    for (event_type, successor) in
        [("paid", "money.paid"), ("a", "c"), ("b", "c"), ("v", "w"), ("elsewhere", "there")]
    {
        for filter in [
            EventFilter::all().event_type(event_type),
            EventFilter::all().event_type("other").event_type(event_type),
            EventFilter::all().category("account").event_type(event_type),
        ] {
            for reason in refusals(&store, &filter) {
                let names = |name: &str| reason.contains(&format!("`{name}`"));
                assert!(names(event_type) && names(successor), "{reason}");
            }
        }
    }
    for event_type in ["money.paid", "c", "w", "there", "other"] {
        let filter = EventFilter::all().event_type(event_type);
        let _ = store.projection(event_type).filter(filter.clone()).spawn(|_, _| Ok(())).unwrap();
        assert!(store.read().unwrap().events_of(0, &filter).is_ok());
    }
}

/// Goal: names that no stream, category or event type can have are refused in a filter. Method: empty, too long, with a
/// control character, and a category with a `-`; each beside names that are fine.
#[test]
fn a_filter_for_impossible_names_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let fine = || EventFilter::all().stream("account-eu-7").category("account").event_type("paid-late");
    let long = || "x".repeat(256);
    for (filter, word) in [
        (fine().category("account-eu"), "`account`"),
        (fine().category("-"), "`-`"),
        (fine().category(""), "empty"),
        (fine().category(long()), "256"),
        (fine().category("a\0b"), "control"),
        (fine().stream(""), "empty"),
        (fine().stream(long()), "256"),
        (fine().stream("a\nb"), "control"),
        (fine().event_type(""), "empty"),
        (fine().event_type(long()), "256"),
        (fine().event_type("a\0"), "control"),
    ] {
        for reason in refusals(&store, &filter) {
            assert!(reason.contains(word), "{word}: {reason}");
        }
    }
    assert!(store.projection("p").filter(fine()).spawn(|_, _| Ok(())).is_ok());
}

/// Counts events.
macro_rules! counting {
    ($name:ident, $category:expr) => {
        #[derive(Debug, Default)]
        struct $name(u64);

        impl Aggregate for $name {
            const CATEGORY: &'static str = $category;
            type Event = ();

            fn encode(_: &()) -> Result<Event> {
                Ok(Event::bytes("counted", ""))
            }
            fn decode(_: &RecordedEvent) -> Result<()> {
                Ok(())
            }
            fn apply(&mut self, _: &()) {
                self.0 += 1;
            }
        }
    };
}

counting!(Account, "account");
counting!(AccountEu, "account-eu");
counting!(Empty, "");
counting!(Nul, "a\0");

/// Goal: an aggregate whose category no filter finds, and whose streams are another's, is refused before it reads or writes.
/// Method: categories with a `-`, empty and with a NUL; ids may hold what they like.
#[test]
fn an_aggregate_of_an_impossible_category_is_refused() {
    fn refused<A: Aggregate<Event = ()> + std::fmt::Debug>(store: &Store, word: &str) {
        let aggregate = store.aggregate::<A>("7");
        for result in [aggregate.load().map(drop), aggregate.execute(|_| Ok(vec![()])).map(drop)] {
            let Err(Error::Setting(error)) = result else { panic!("{result:?}") };
            assert!(error.setting == "Aggregate::CATEGORY" && error.reason.contains(word), "{error}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    refused::<AccountEu>(&store, "`account-eu`");
    refused::<Empty>(&store, "empty");
    refused::<Nul>(&store, "control");
    assert_eq!(store.stats().unwrap().next_seq, 0);
    store.aggregate::<Account>("eu-7").execute(|_| Ok(vec![()])).unwrap();
    assert_eq!(store.aggregate::<Account>("eu-7").load().unwrap().state.0, 1);
}

/// Goal: further settings that can never work together are refused by name. Method: one pair each, and one step beside it that
/// works.
#[test]
fn pairs_that_can_never_work_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let named = |refused: Result<()>, setting: &str| match refused {
        Err(Error::Setting(error)) => assert_eq!(error.setting, setting, "{error}"),
        other => panic!("{setting}: {other:?}"),
    };
    let (short, long) = (Duration::from_millis(1), Duration::from_secs(1));
    let consumer = |prefetch, gap, backoff: (Duration, Duration)| {
        let builder = store.consumer("c").prefetch(prefetch).on_gap(gap).backoff(backoff.0, backoff.1);
        builder.spawn(broker.source("q"), |_, _| Ok(())).map(|consumer| _ = consumer.stop(long))
    };
    named(consumer(1, GapPolicy::Hold(long), (short, long)), "on_gap");
    named(consumer(2, GapPolicy::Hold(long), (long, short)), "backoff");
    consumer(2, GapPolicy::Hold(long), (long, long)).unwrap();
    consumer(1, GapPolicy::ApplyAtOnce, (short, long)).unwrap();
    named(store.projection("p").backoff(long, short).spawn(|_, _| Ok(())).map(drop), "backoff");
    for name in ["", "a\0b", &"x".repeat(256)] {
        for (from, to) in [((name, 1), ("b", 1)), (("b", 1), (name, 1))] {
            let path = folder.path().join("other.redb");
            named(Store::builder().upcast(from, to, same).open(path).map(drop), "upcast");
        }
    }
}
