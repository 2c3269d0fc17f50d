//! Errors name what the user gave.

use onewrite::broker::MemoryBroker;
use onewrite::redb::TableDefinition;
use onewrite::{Destination, Event, ExpectedRevision, Store};

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Goal: an error about a text names the field that the user set. Method: each text of an event, alone wrong, with a NUL
/// and too long; the same for an event of a stream.
#[test]
fn a_fault_of_an_event_names_the_field_that_was_given() {
    let long = "x".repeat(256);
    for bad in ["a\0b", &*long] {
        let base = || Event::bytes("paid", "1").to("", "q");
        let events = [
            ("type", Event::bytes(bad, "1").to("", "q")),
            ("exchange", Event::bytes("paid", "1").to(bad, "q")),
            ("routing_key", Event::bytes("paid", "1").to("", bad)),
            ("id", base().id(bad)),
            ("key", base().key(bad)),
            ("content_type", base().content_type(bad)),
            ("subject", base().subject(bad)),
            ("correlation_id", base().correlation_id(bad)),
        ];
        let (_folder, store) = store();
        for (field, event) in events {
            let error = store.write(move |tx| tx.append(event.clone())).unwrap_err().to_string();
            assert!(error.starts_with(&format!("event field `{field}` ")), "{field}: {error}");
        }
        let name = bad.to_owned();
        for event in [Event::bytes("paid", "1"), Event::bytes("paid", "1").key("k").id("id-1")] {
            let name = name.clone();
            let append =
                store.write(move |tx| tx.stream(name.clone()).append([event.clone()], ExpectedRevision::Any));
            let error = append.unwrap_err().to_string();
            assert!(error.contains("stream") && !error.contains("key"), "{error}");
        }
        assert_eq!(store.stats().unwrap().next_seq, 0, "something of them was written");
    }
}

/// Goal: so does a setting. Method: each name that a builder takes, empty, too long or the library's own.
#[test]
fn a_fault_of_a_setting_names_the_setting_that_was_given() {
    let (folder, store) = store();
    let broker = MemoryBroker::new();
    let long = "x".repeat(256);
    for name in ["", &*long] {
        let reported = [
            ("name", store.relay(name).spawn(broker.publisher()).unwrap_err().to_string()),
            ("name", store.projection(name).spawn(|_, _| Ok(())).unwrap_err().to_string()),
            ("scope", store.consumer(name).spawn(broker.source("q"), |_, _| Ok(())).unwrap_err().to_string()),
        ];
        for (setting, error) in reported {
            assert!(error.starts_with(&format!("setting `{setting}`: ")), "{error}");
        }
    }
    let consumer = |prefetch, attempts| {
        let consumer = store.consumer("c").prefetch(prefetch).attempts(attempts);
        consumer.spawn(broker.source("q"), |_, _| Ok(())).unwrap_err().to_string()
    };
    assert!(consumer(0, 1).starts_with("setting `prefetch`: "), "{}", consumer(0, 1));
    assert!(consumer(1, 0).starts_with("setting `attempts`: "), "{}", consumer(1, 0));
    const OURS: TableDefinition<'_, u64, u64> = TableDefinition::new("onewrite.mine");
    let error = store.projection("p").table(OURS).spawn(|_, _| Ok(())).unwrap_err().to_string();
    assert!(error.starts_with("setting `table`: `onewrite.mine`"), "{error}");
    drop(store);
    drop(folder);
}

/// Goal: opening the store refuses a capture whose destination no message can carry; the first change of a row would be too late.
#[test]
#[cfg(feature = "json")]
fn a_captures_destination_is_reported_at_open() {
    const ACCOUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("accounts");
    let folder = tempfile::tempdir().unwrap();
    let long = "x".repeat(256);
    for (field, exchange, routing_key) in [("exchange", &*long, "r"), ("routing_key", "e", "a\0b")] {
        let capture = onewrite::Capture::json(ACCOUNTS).to(exchange, routing_key);
        let error = Store::builder().capture(capture).open(folder.path().join("a.redb")).unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("setting `capture`: table `accounts`: "), "{error}");
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }
    // A rule names a destination only once an event asks for it.
    let rule = |_: &str, _: &str| Some(Destination::exchange("a\0b", "r"));
    let store = Store::builder().stream_destination(rule).open(folder.path().join("b.redb")).unwrap();
    let append = store.write(|tx| tx.stream("s").append([Event::bytes("paid", "1")], ExpectedRevision::Any));
    let error = append.unwrap_err().to_string();
    assert!(error.starts_with("event field `exchange` "), "{error}");
}
