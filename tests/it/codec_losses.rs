//! What a format would lose without an error is an error, wherever in a value it stands; whatever is accepted reads back.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};
use onewrite::codec::{from_bincode, from_json};
use onewrite::redb::TableDefinition;
use onewrite::{Capture, CaptureMode, Error, Event, EventError, Store};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use crate::scratch::events;

const SOON: Duration = Duration::from_secs(30);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A place for a number in every kind of container that serde knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Place {
    Unit,
    One(f64),
    Two(u8, f32),
    Named { amount: f64 },
    Option(Option<f64>),
    List(Vec<f32>),
    Tuple((f64, f64)),
    Map(BTreeMap<String, f64>),
    Wrapped(Wrapper),
    Flat(Flat),
    Deep(Vec<Place>),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Wrapper(f64);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Flat {
    id: u32,
    #[serde(flatten)]
    rest: BTreeMap<String, f64>,
}

#[derive(Serialize)]
#[serde(tag = "kind")]
enum Tagged {
    Rate { value: f64 },
}

#[derive(Serialize)]
#[serde(untagged)]
enum Untagged {
    Rate(f64),
}

fn all_places(n: f64) -> Vec<(Place, &'static str)> {
    let map = || BTreeMap::from([("a".to_owned(), 1.0), ("b".to_owned(), n)]);
    vec![
        (Place::One(n), "`One`"),
        (Place::Two(1, n as f32), "`Two[1]`"),
        (Place::Named { amount: n }, "`Named.amount`"),
        (Place::Option(Some(n)), "`Option`"),
        (Place::List(vec![0.0, 1.0, n as f32]), "`List[2]`"),
        (Place::Tuple((1.0, n)), "`Tuple[1]`"),
        (Place::Map(map()), "`Map{entry 1}`"),
        (Place::Wrapped(Wrapper(n)), "`Wrapped`"),
        (Place::Flat(Flat { id: 1, rest: map() }), "`Flat{entry 2}`"),
        (Place::Deep(vec![Place::Unit, Place::Named { amount: n }]), "`Deep[1].Named.amount`"),
    ]
}

/// Goal: NaN and the infinities are no JSON, in whatever part of a value they stand; the error names the place, and keys of
/// a map, which are data, by number alone. bincode keeps them, bit by bit. Method: every kind of container of serde, each of
/// the three numbers; a finite one as the counter-test.
#[test]
fn a_number_that_json_lacks_is_an_error_at_every_place() {
    for n in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (place, path) in all_places(n) {
            let error = Event::json("t", &place).unwrap_err();
            assert!(matches!(&error, EventError::Encode { format: "JSON", .. }), "{error:?}");
            assert!(error.to_string().contains(path), "{error} does not name {path}");
            if !matches!(place, Place::Flat(_)) {
                let event = Event::bincode("t", &place).unwrap();
                let back: Place = from_bincode(&payload(event)).unwrap();
                assert_eq!(format!("{back:?}"), format!("{place:?}"));
            }
        }
        assert_eq!(
            Event::json("t", &n).unwrap_err().to_string().split(" is ").next(),
            Some("the payload cannot be encoded as JSON: the value")
        );
        assert!(Event::json("t", &Tagged::Rate { value: n }).is_err());
        assert!(Event::json("t", &Untagged::Rate(n)).is_err());
        assert!(Event::json("t", &[Some(n as f32)]).is_err());
        assert!(Event::json("t", &HashMap::from([(1, n)])).is_err());
    }
    for (place, _) in all_places(-0.1) {
        let back: Place = from_json(&payload(Event::json("t", &place).unwrap())).unwrap();
        assert_eq!(back, place);
    }
}

/// An event's payload as the log keeps it.
fn payload(event: Event) -> Vec<u8> {
    static STORE: LazyLock<(tempfile::TempDir, Store)> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        (folder, store)
    });
    // It is rolled back.
    let tx = STORE.1.begin().unwrap();
    let seq = tx.append(event.unpublished()).unwrap().seq;
    tx.event(seq).unwrap().unwrap().payload().to_vec()
}

/// Goal: an encoding is refused also where a `Serialize` of the application drops the error that it was given.
#[test]
fn an_error_that_is_dropped_on_the_way_is_reported_all_the_same() {
    struct Careless;
    impl Serialize for Careless {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut list = serde::ser::Serializer::serialize_seq(serializer, Some(2))?;
            let _ = serde::ser::SerializeSeq::serialize_element(&mut list, &f64::NAN);
            let _ = serde::ser::SerializeSeq::serialize_element(&mut list, &1);
            serde::ser::SerializeSeq::end(list)
        }
    }
    let error = Event::json("t", &Careless).unwrap_err();
    assert!(error.to_string().contains("`[0]` is NaN"), "{error}");
}

/// Goal: a key that comes twice in one object is an error, since readers take the first, the last, or none. Method: a structure
/// with a map flattened into it that has the name of a field; numbers as keys beside their text.
#[test]
fn a_key_that_comes_twice_is_an_error() {
    let flat = |name: &str| Flat { id: 1, rest: BTreeMap::from([(name.to_owned(), 2.0)]) };
    assert!(Event::json("t", &flat("other")).is_ok());
    let error = Event::json("t", &flat("id")).unwrap_err();
    assert!(error.to_string().contains("`{entry 1}` has the key of an earlier entry"), "{error}");

    struct Mixed;
    impl Serialize for Mixed {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(None)?;
            serde::ser::SerializeMap::serialize_entry(&mut map, &7, &1)?;
            serde::ser::SerializeMap::serialize_key(&mut map, "7")?;
            serde::ser::SerializeMap::serialize_value(&mut map, &2)?;
            serde::ser::SerializeMap::end(map)
        }
    }
    assert!(Event::json("t", &Mixed).is_err());
}

/// Goal: what bincode could not read again is refused: a field that is left out shifts what is behind it.
#[test]
fn a_field_that_bincode_leaves_out_is_an_error() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sparse {
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<u8>,
        amount: u32,
        #[serde(skip)]
        cache: u8,
    }
    let sparse = |note| Sparse { note, amount: 7, cache: 0 };
    let error = Event::bincode("t", &vec![sparse(Some(1)), sparse(None)]).unwrap_err();
    assert!(error.to_string().contains("`[1].note` is left out"), "{error}");
    let whole = Event::bincode("t", &sparse(Some(1))).unwrap();
    assert_eq!(from_bincode::<Sparse>(&payload(whole)).unwrap(), sparse(Some(1)));
    let json = Event::json("t", &sparse(None)).unwrap();
    assert_eq!(from_json::<Sparse>(&payload(json)).unwrap(), sparse(None));
    assert!(Event::bincode("t", &Flat { id: 1, rest: BTreeMap::new() }).is_err());
}

/// Goal: other values at the edge of JSON are an error or come back as they were. Method: the largest integers, the smallest
/// floats, negative zero, bytes, a path that is not UTF-8, keys that are lists.
#[test]
fn what_json_takes_comes_back() {
    fn round<T: Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
        from_json(&payload(Event::json("t", value).unwrap())).unwrap()
    }
    assert_eq!(round(&(u128::MAX, i128::MIN)), (u128::MAX, i128::MIN));
    assert_eq!(round(&[u64::MAX, (1 << 53) + 1]), [u64::MAX, (1 << 53) + 1]);
    assert_eq!(round(&-0.0_f64).to_bits(), (-0.0_f64).to_bits());
    assert_eq!(round(&[f32::MIN_POSITIVE, 0.1, f32::MAX]), [f32::MIN_POSITIVE, 0.1, f32::MAX]);
    assert_eq!(round(&(f64::MIN_POSITIVE / 4.0)), f64::MIN_POSITIVE / 4.0);
    assert_eq!(round(&vec![0_u8, 255]), [0, 255]);
    assert!(Event::json("t", &BTreeMap::from([(vec![1], 1)])).is_err());
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStringExt as _;
        let path = PathBuf::from(std::ffi::OsString::from_vec(vec![b'a', 0xff]));
        assert!(Event::json("t", &path).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: every float, by its bits, is either refused as JSON or comes back bit by bit; bincode keeps all.
    #[test]
    fn no_float_comes_back_as_another(bits in any::<u64>(), narrow in any::<u32>()) {
        let pair = (f64::from_bits(bits), f32::from_bits(narrow));
        match Event::json("t", &pair) {
            Ok(event) => {
                let back: (f64, f32) = from_json(&payload(event)).unwrap();
                prop_assert_eq!((back.0.to_bits(), back.1.to_bits()), (bits, narrow));
            }
            Err(_) => prop_assert!(!pair.0.is_finite() || !pair.1.is_finite()),
        }
        let back: (f64, f32) = from_bincode(&payload(Event::bincode("t", &pair).unwrap())).unwrap();
        prop_assert_eq!((back.0.to_bits(), back.1.to_bits()), (bits, narrow));
    }
}

// --- captured tables ----------------------------------------------------------------------------------------------------

const RATES: TableDefinition<'_, &str, (f64, Option<f32>)> = TableDefinition::new("rates");

/// Goal: a captured row that JSON cannot hold fails its own write under `EveryChange`, before anything is changed, and names
/// the place; all other keys go on, and the row can be set to another value and removed.
#[test]
fn a_captured_row_that_json_lacks_fails_its_write() {
    let folder = tempfile::tempdir().unwrap();
    let rates = Capture::json(RATES).unpublished().old_values(true);
    let store = Store::builder().capture(rates).open(folder.path().join("a.redb")).unwrap();
    let set = |key: &'static str, value| {
        store.write(move |tx| tx.captured_table(RATES)?.insert(key, value).map(drop)).map(drop)
    };
    set("a", (1.0, None)).unwrap();
    for (value, place) in [((f64::NAN, None), "`new[0]` is NaN"), ((1.0, Some(f32::INFINITY)), "`new[1]`")] {
        let error = set("a", value).unwrap_err();
        assert!(matches!(error, Error::Event(EventError::Encode { format: "JSON", .. })), "{error:?}");
        assert!(error.to_string().contains(place), "{error}");
    }
    set("b", (2.0, None)).unwrap();
    set("a", (3.0, Some(0.5))).unwrap();
    store.write(|tx| tx.captured_table(RATES)?.remove("a").map(drop)).unwrap();
    let reported = events(&store.read().unwrap());
    assert_eq!(reported.len(), 4);
    assert!(reported.iter().all(|event| !event.payload().windows(11).any(|part| part == b"\"new\":[null")));
}

/// Goal: a row that was written before it was captured, or whose key is only dirty, and that JSON cannot hold, is counted as failed and
/// holds nobody; it is published once it has another value.
#[test]
fn a_dirty_row_that_json_lacks_holds_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    store
        .write(|tx| {
            let mut table = tx.open_table(RATES)?;
            table.insert("old", (f64::NEG_INFINITY, None))?;
            Ok(table.insert("well", (1.0, None)).map(drop)?)
        })
        .unwrap();
    store.close().unwrap();
    let rates = Capture::json(RATES).to("e", "r").mode(CaptureMode::NewestValue).snapshot(true);
    let store = Store::builder().capture(rates).open(&path).unwrap();
    let set = |key: &'static str, value| {
        store.write(move |tx| tx.captured_table(RATES)?.insert(key, value).map(drop)).unwrap();
    };
    set("new", (1.0, Some(f32::NAN)));
    set("other", (2.0, None));
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("e", ExchangeKind::Fanout);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "").unwrap();
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let figures = || store.stats().unwrap().captures["rates"];
    until("both are counted", || (figures().waiting, figures().failed) == (2, 2));
    let has = |part: &str| {
        broker.tap().iter().any(|tapped| String::from_utf8_lossy(&tapped.message.payload).contains(part))
    };
    until("the others are published", || has("\"well\"") && has("\"other\""));
    assert!(!has("\"old\"") && !has("\"new\",\"operation\""));
    set("old", (1.0, None));
    set("new", (1.0, None));
    until("both are published", || figures().waiting == 0);
    drop(relay);
}
