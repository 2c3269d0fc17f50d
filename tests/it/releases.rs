//! Releases that follow one another, and are taken back: what a release does not know it neither reads nor writes.

use std::path::Path;

use onewrite::redb::TableDefinition;
use onewrite::{
    Aggregate, Capture, Change, Error, Event, EventError, ExpectedRevision, RecordedEvent, Result, Store,
    StoreBuilder,
};
use proptest::prelude::*;

const STREAM: &str = "account-1";

/// Release `n` knows versions 1 to `n` of `deposited`: each says its version and what it was made from. Release 1 has no upcast.
fn release(n: u32) -> StoreBuilder {
    (1..n).fold(Store::builder(), |builder, from| {
        builder.upcast(("deposited", from), ("deposited", from + 1), move |old| {
            Ok([old, format!(">{}", from + 1).as_bytes()].concat())
        })
    })
}

fn deposit(version: u32) -> Event {
    Event::bytes("deposited", version.to_string()).version(version)
}

/// What release `n` reads of a version: the chain, or nothing.
fn form(version: u32, n: u32) -> Option<String> {
    let chain = (version..=n).map(|version| version.to_string()).collect::<Vec<_>>();
    (version <= n).then(|| chain.join(">"))
}

fn life(path: &Path, n: u32, appends: &[u32], model: &mut Vec<u32>) {
    let store = release(n).open(path).unwrap();
    for version in appends {
        let append = |version: u32| {
            store.write(move |tx| {
                tx.stream(STREAM).append([deposit(version)], ExpectedRevision::Any).map(drop)
            })
        };
        match append(*version) {
            Ok(_) => {
                assert!(*version <= n, "release {n} has appended version {version}");
                model.push(*version);
            }
            Err(Error::Event(EventError::UnknownVersion { version: reported, newest, .. })) => {
                assert!(*version > n, "release {n} has refused version {version}");
                assert_eq!((reported, newest), (*version, n));
            }
            Err(error) => panic!("{error}"),
        }
    }
    let snapshot = store.read().unwrap();
    let expected: Vec<_> = model.iter().map(|version| form(*version, n)).collect();
    let text = |read: Result<RecordedEvent>| match read {
        Ok(event) => {
            assert_eq!(event.version(), n);
            Some(String::from_utf8_lossy(event.payload()).into_owned())
        }
        Err(Error::Upcast { version, reason, .. }) => {
            assert_eq!(reason.to_string(), format!("the newest version known here is {n}"));
            assert!(version > n);
            None
        }
        Err(error) => panic!("{error}"),
    };
    let all: Vec<_> = snapshot.events(0).unwrap().map(text).collect();
    assert_eq!(all, expected, "release {n}");
    let of_stream: Vec<_> = snapshot.stream(STREAM).unwrap().events(0).map(text).collect();
    assert_eq!(of_stream, expected, "release {n}");
    let one_by_one: Vec<_> =
        (0..model.len() as u64).map(|seq| text(snapshot.event(seq).transpose().unwrap())).collect();
    assert_eq!(one_by_one, expected, "release {n}");
    drop(snapshot);
    store.close().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: whichever release runs, in whatever order, it reads what it knows in its own newest form, and learns of the rest; it
    /// appends nothing that it could not read. Method: random lives of releases 1 to 4, each of which tries versions 1 to 5.
    #[test]
    fn releases_that_follow_in_any_order(
        lives in prop::collection::vec((1..5_u32, prop::collection::vec(1..6_u32, 0..4)), 1..10)
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let mut model = Vec::new();
        for (n, appends) in &lives {
            life(&path, *n, appends, &mut model);
        }
    }
}

#[derive(Debug, Default)]
struct Newer;

impl Aggregate for Newer {
    const CATEGORY: &'static str = "newer";
    type Event = u32;

    fn encode(version: &u32) -> Result<Event> {
        Ok(deposit(*version))
    }

    fn decode(recorded: &RecordedEvent) -> Result<u32> {
        Ok(recorded.version())
    }

    fn apply(&mut self, _: &u32) {}
}

const ROWS: TableDefinition<'_, u64, u32> = TableDefinition::new("rows");

/// Goal: every door refuses a version that is unknown here, with a typed error that names it, and nothing of it is written: a plain
/// append, a stream, an aggregate, the codec of a captured table. Method: a store that declares version 2; 0, 3 and the highest.
#[test]
fn every_door_refuses_an_unknown_version() {
    let folder = tempfile::tempdir().unwrap();
    let codec = |change: &Change<'_, u64, u32>| Ok(deposit(change.new.unwrap_or(1)));
    let builder =
        Store::builder().event_version("deposited", 2).capture(Capture::with(ROWS, codec).unpublished());
    let store = builder.open(folder.path().join("a.redb")).unwrap();
    let refused = |reported: Result<()>, version: u32| {
        let words = reported.as_ref().unwrap_err().to_string();
        assert!(words.starts_with(&format!("version {version} of event type `deposited`")), "{words}");
        assert!(
            matches!(reported, Err(Error::Event(EventError::UnknownVersion { newest: 2, .. }))),
            "{reported:?}"
        );
    };
    for version in [0, 3, u32::MAX] {
        refused(store.write(move |tx| tx.append(deposit(version).unpublished())).map(drop), version);
        let append =
            store.write(move |tx| tx.stream(STREAM).append([deposit(version)], ExpectedRevision::NoStream));
        refused(append.map(drop), version);
        refused(store.aggregate::<Newer>("1").execute(|_| Ok(vec![version])).map(drop), version);
        refused(
            store.write(move |tx| tx.captured_table(ROWS)?.insert(1, version).map(drop)).map(drop),
            version,
        );
    }
    assert_eq!(store.stats().unwrap().next_seq, 0);
    for version in [1, 2] {
        store.aggregate::<Newer>("1").execute(|_| Ok(vec![version])).unwrap();
        store.write(move |tx| tx.captured_table(ROWS)?.insert(1, version).map(drop)).unwrap();
    }
    // A type that nobody has spoken of has its first version alone.
    let other = store.write(|tx| tx.append(Event::bytes("other", "").version(2).unpublished()));
    assert!(matches!(other, Err(Error::Event(EventError::UnknownVersion { newest: 1, .. }))), "{other:?}");
}

/// Goal: a declaration that cannot be is refused at open. Method: version 0; one below what an upcast names.
#[test]
fn a_declaration_that_cannot_be_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    for builder in [Store::builder().event_version("deposited", 0), release(3).event_version("deposited", 2)]
    {
        let reported = builder.open(&path).unwrap_err();
        assert!(matches!(&reported, Error::Setting(error) if error.setting == "event_version"), "{reported}");
    }
    release(3).event_version("deposited", 3).open(&path).unwrap();
}
