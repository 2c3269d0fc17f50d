//! Upcasts: older forms are read in the newest; the log and what is published stay as recorded.

use std::path::Path;
use std::time::Duration;

use onewrite::broker::MemoryBroker;
use onewrite::redb::TableDefinition;
use onewrite::{
    Aggregate, Error, Event, ExpectedRevision, FailurePolicy, RecordedEvent, Result, Store, StoreBuilder,
    wire,
};

const TIMEOUT: Duration = Duration::from_secs(20);
const SEEN: TableDefinition<'_, u64, &str> = TableDefinition::new("seen");

/// From cents over "cents EUR" to another type, which says its currency first.
fn chains() -> StoreBuilder {
    let builder = Store::builder().event_version("opened", 5);
    builder.upcast(("paid", 1), ("paid", 2), |cents| Ok([cents, b" EUR"].concat())).upcast(
        ("paid", 2),
        ("money.paid", 1),
        |text| {
            let text = std::str::from_utf8(text)?;
            let (cents, currency) = text.split_once(' ').ok_or("no currency")?;
            Ok(format!("{currency} {cents}").into_bytes())
        },
    )
}

fn events() -> [Event; 4] {
    [
        Event::bytes("paid", "100").id("a").to("", "q"),
        Event::bytes("paid", "7 USD").version(2).id("b").to("", "q"),
        Event::bytes("money.paid", "CHF 9").id("c").to("", "q"),
        Event::bytes("opened", "").version(5).id("d").to("", "q"),
    ]
}

fn filled(path: &Path) {
    let builder = Store::builder().event_version("opened", 5).event_version("paid", 2);
    let store = builder.open(path).unwrap();
    store.write(|tx| tx.stream("account-7").append(events(), ExpectedRevision::NoStream)).unwrap();
    store.close().unwrap();
}

fn reported(event: &RecordedEvent) -> String {
    format!("{} {} {}", event.event_type(), event.version(), String::from_utf8_lossy(event.payload()))
}

#[derive(Debug, Default)]
struct Account(Vec<String>);

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Event = String;
    fn encode(event: &String) -> Result<Event> {
        Ok(Event::bytes("money.paid", event.clone().into_bytes()))
    }
    fn decode(recorded: &RecordedEvent) -> Result<String> {
        Ok(reported(recorded))
    }
    fn apply(&mut self, event: &String) {
        self.0.push(event.clone());
    }
}

/// Goal: wherever the application reads, it sees the newest form; what is published is what was recorded, with its version.
/// Method: one log with three forms of one type, read in every way there is.
#[test]
fn every_reader_sees_the_newest_form() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path);
    let store = chains().open(&path).unwrap();
    let expected = ["money.paid 1 EUR 100", "money.paid 1 USD 7", "money.paid 1 CHF 9", "opened 5 "];
    let snapshot = store.read().unwrap();
    let all: Vec<_> = snapshot.events(0).unwrap().map(|event| reported(&event.unwrap())).collect();
    assert_eq!(all, expected);
    let stream = snapshot.stream("account-7").unwrap();
    assert_eq!(stream.events(0).map(|event| reported(&event.unwrap())).collect::<Vec<_>>(), expected);
    assert_eq!(reported(&stream.events(0).rev().nth(3).unwrap().unwrap()), expected[0]);
    assert_eq!(reported(&snapshot.event(1).unwrap().unwrap()), expected[1]);
    store
        .write(move |tx| {
            assert_eq!(reported(&tx.event(0)?.unwrap()), expected[0]);
            assert_eq!(reported(&tx.stream("account-7").read()?.events(0).next().unwrap()?), expected[0]);
            Ok(())
        })
        .unwrap();
    assert_eq!(store.aggregate::<Account>("7").load().unwrap().state.0, expected);
    let mut subscription = store.subscribe(0).unwrap();
    assert_eq!(reported(&subscription.try_next().unwrap().unwrap()), expected[0]);
    let filter = onewrite::EventFilter::all().event_type("money.paid");
    let projection = store
        .projection("seen")
        .table(SEEN)
        .filter(filter)
        .spawn(|event, tx| {
            tx.open_table(SEEN)?.insert(event.seq(), &*reported(event))?;
            Ok(())
        })
        .unwrap();
    projection.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(store.read().unwrap().open_table(SEEN).unwrap().get(2).unwrap().unwrap().value(), expected[2]);

    let broker = MemoryBroker::new();
    broker.declare_queue("q", Default::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    store
        .write(|tx| tx.append(Event::bytes("last", "").key("account-7").to("", "q")))
        .unwrap()
        .wait_confirmed(TIMEOUT)
        .unwrap();
    let published: Vec<_> = broker
        .messages("q")
        .iter()
        .map(|it| {
            let version = it.message.header(wire::VERSION).and_then(|value| value.as_int()).unwrap_or(1);
            format!(
                "{} {version} {}",
                it.message.event_type.as_ref().unwrap(),
                String::from_utf8_lossy(&it.message.payload)
            )
        })
        .collect();
    assert_eq!(published[..4], ["paid 1 100", "paid 2 7 USD", "money.paid 1 CHF 9", "opened 5 "]);
    relay.stop(TIMEOUT);
}

/// Goal: a retry of an append made before the upcasts came is still recognised. Method: append the same events again.
#[test]
fn a_retry_across_an_upgrade_is_recognised() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    filled(&path);
    let store = chains().open(&path).unwrap();
    for expected in [ExpectedRevision::NoStream, ExpectedRevision::Any] {
        let again = store.write(move |tx| tx.stream("account-7").append(events(), expected)).unwrap();
        assert!(again.value().repeated);
    }
    let other = store.write(|tx| {
        let event = Event::bytes("paid", "100").version(2).id("a").to("", "q");
        tx.stream("account-7").append([event], ExpectedRevision::NoStream)
    });
    assert!(matches!(other, Err(Error::WrongRevision { .. })), "another version is other content: {other:?}");
}

/// Goal: what cannot be read is reported with number, type and version, and nothing else is lost: a newer version than is known, an
/// upcast that fails. A projection stands still before it, or goes on without it, by policy.
#[test]
fn what_cannot_be_upcast_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let newer = Store::builder().event_version("paid", 2).event_version("money.paid", 2).open(&path).unwrap();
    newer
        .write(|tx| {
            tx.append(Event::bytes("paid", "no currency".replace(' ', "-")).version(2).unpublished())?;
            tx.append(Event::bytes("money.paid", "EUR 1").version(2).unpublished())?;
            tx.append(Event::bytes("money.paid", "EUR 1").unpublished())
        })
        .unwrap();
    newer.close().unwrap();
    let store = chains().open(&path).unwrap();
    let snapshot = store.read().unwrap();
    let all: Vec<_> = snapshot.events(0).unwrap().collect();
    let errors: Vec<_> =
        all.iter().filter_map(|event| event.as_ref().err().map(ToString::to_string)).collect();
    assert_eq!(
        errors,
        [
            "event 0 (`paid`, version 2) cannot be upcast: no currency",
            "event 1 (`money.paid`, version 2) cannot be upcast: the newest version known here is 1",
        ]
    );
    assert!(matches!(all[1], Err(Error::Upcast { seq: 1, version: 2, .. })));
    assert_eq!(reported(all[2].as_ref().unwrap()), "money.paid 1 EUR 1");
    let mut subscription = store.subscribe(0).unwrap();
    assert!(subscription.try_next().unwrap().is_err() && subscription.try_next().unwrap().is_err());
    assert_eq!(subscription.try_next().unwrap().unwrap().seq(), 2);
    let still = store.projection("still").spawn(|_, _| Ok(())).unwrap();
    assert!(still.wait_until_live(TIMEOUT).unwrap_err().to_string().contains("no currency"));
    let policy = FailurePolicy::Quarantine { attempts: 3 };
    let going = store.projection("going").on_failure(policy).spawn(|_, _| Ok(())).unwrap();
    going.wait_until_live(TIMEOUT).unwrap();
    assert_eq!(going.failures().list(None, 10).unwrap().iter().map(|it| it.seq).collect::<Vec<_>>(), [0, 1]);
}

/// Goal: chains that leave a version out, lead round, or fork are refused when the store opens, each in words that name the
/// place; and the file is not touched.
#[test]
fn chains_that_do_not_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let same = |payload: &[u8]| Ok(payload.to_vec());
    let refused = |builder: StoreBuilder| match builder.open(&path) {
        Err(Error::Setting(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let up = Store::builder;
    let cases = [
        (
            up().upcast(("a", 1), ("a", 2), same).upcast(("a", 3), ("a", 4), same),
            "none leads on from version 2 of `a`",
        ),
        (up().upcast(("a", 2), ("a", 3), same), "none leads on from version 1 of `a`"),
        (up().upcast(("a", 1), ("b", 3), same), "none leads on from version 1 of `b`"),
        (up().upcast(("a", 1), ("a", 1), same), "round in a circle"),
        (up().upcast(("a", 1), ("a", 2), same).upcast(("a", 2), ("a", 1), same), "round in a circle"),
        (
            up().upcast(("a", 1), ("b", 1), same).upcast(("b", 1), ("c", 1), same).upcast(
                ("c", 1),
                ("b", 1),
                same,
            ),
            "round in a circle",
        ),
        (
            up().upcast(("a", 1), ("a", 2), same).upcast(("a", 1), ("b", 1), same),
            "two lead from version 1 of `a`",
        ),
        (up().upcast(("a", 0), ("a", 1), same), "version 0"),
    ];
    for (builder, text) in cases {
        let said = refused(builder);
        assert!(said.contains("upcast") && said.contains(text), "{said}");
    }
    assert!(!path.exists());
}

/// Goal: an upcast that panics is reported like one that fails. Method: one that panics on a payload, read by a projection, a
/// subscription and a snapshot.
#[test]
fn an_upcast_that_panics_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Store::builder().upcast(("paid", 1), ("paid", 2), |payload| {
        assert_ne!(payload, b"7", "an application's own mistake");
        Ok(payload.to_vec())
    });
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let append = |payload: &'static str| {
        store.write(move |tx| tx.append(Event::bytes("paid", payload).unpublished())).unwrap()
    };
    let projection = store.projection("seen").spawn(|_, _| Ok(())).unwrap();
    append("1");
    projection.wait_until_live(TIMEOUT).unwrap();
    let seq = append("7").seqs()[0];
    let stopped = projection.wait_for_position(seq, TIMEOUT).unwrap_err();
    assert!(stopped.to_string().contains("the upcast panicked"), "{stopped}");
    assert!(matches!(store.read().unwrap().event(seq), Err(Error::Upcast { seq: 1, .. })));
    let reported = store.subscribe(seq).unwrap().next().unwrap();
    assert!(matches!(reported, Err(Error::Upcast { seq: 1, .. })), "{reported:?}");
}
