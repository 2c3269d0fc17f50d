//! A recorded event as a CloudEvent in JSON: every attribute, each form of payload, hostile names and times.

use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

use onewrite::{Event, ExpectedRevision, HeaderValue, Store};
use serde_json::{Value, json};

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().event_version("paid", 3).open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn line(store: &Store, seq: u64) -> String {
    let event = store.read().unwrap().event(seq).unwrap().unwrap();
    serde_json::to_string(&event.to_cloud_event("/bank").unwrap()).unwrap()
}

/// Goal: a CloudEvent says all that the event carries, under names that the specification allows. Method: an
/// event with everything set, compared attribute by attribute.
#[test]
fn every_attribute_is_there() {
    let (_folder, store) = open();
    let event = Event::bytes("paid", "{\"cents\": 1.10}")
        .content_type("application/json")
        .id("p-1")
        .key("alice")
        .subject("card")
        .correlation_id("c-1")
        .content_encoding("identity")
        .trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some("a=b".into()))
        .expires(UNIX_EPOCH + Duration::from_secs(4_000_000_000))
        .version(3)
        .header("region", "eu")
        .header("retry", true)
        .header("count", 7)
        .header("large", 1 << 40)
        .header("X-Name", "not a name of an attribute")
        .header("id", "not the event's")
        .header("data", "not the payload")
        .header("bytes", HeaderValue::Bytes(vec![1]))
        .to_queue("payments");
    store
        .write(move |tx| tx.stream("account-7").append([event.clone()], ExpectedRevision::NoStream))
        .unwrap();
    let mut json: Value = serde_json::from_str(&line(&store, 0)).unwrap();
    let time = json.as_object_mut().unwrap().remove("time").unwrap();
    assert!(time.as_str().unwrap().ends_with('Z'));
    assert_eq!(
        json,
        json!({
            "specversion": "1.0", "id": "p-1", "source": "/bank", "type": "paid", "subject": "card",
            "datacontenttype": "application/json", "partitionkey": "alice", "sequence": "00000000000000000000",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b",
            "correlationid": "c-1", "contentencoding": "identity", "expirytime": "2096-10-02T07:06:40.000Z",
            "onewritestream": "account-7", "onewriterevision": "0", "onewriteversion": "3",
            "region": "eu", "retry": true, "count": 7, "data": {"cents": 1.10},
        })
    );
    assert!(line(&store, 0).contains(r#""data":{"cents":1.10}"#), "the digits are the application's");
}

/// Goal: each event is one line of JSON, whatever its payload and times are. Method:
/// payloads of every form, and a time that RFC 3339 cannot write.
#[test]
fn an_event_is_one_line() {
    let (_folder, store) = open();
    let payloads: [(&str, &[u8]); 5] = [
        ("application/json", b"{\n\"a\": \"b c\"\r\n}"),
        ("application/json", b"{\n"),
        ("text/plain", b"a\nb"),
        ("image/png", b"\x89PNG\r\n\x1a\n"),
        ("application/vnd.bank+json", b"[1,\n2]"),
    ];
    let events = payloads.map(|(content_type, payload)| {
        Event::bytes("t", payload)
            .content_type(content_type)
            .expires(UNIX_EPOCH + Duration::from_secs(1 << 40))
            .unpublished()
    });
    store.write(move |tx| events.iter().try_for_each(|event| tx.append(event.clone()).map(drop))).unwrap();
    let data: Vec<_> = (0..5)
        .map(|seq| {
            let line = line(&store, seq);
            assert!(!line.contains(['\n', '\r']), "{line}");
            let json: serde_json::Map<String, Value> = serde_json::from_str(&line).unwrap();
            let names: BTreeSet<_> = json.keys().collect();
            assert!(names.iter().all(|name| {
                name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit())
            }));
            json.get("data").or_else(|| json.get("data_base64")).unwrap().clone()
        })
        .collect();
    assert_eq!(
        data,
        [json!({"a": "b c"}), json!("ewo="), json!("a\nb"), json!("iVBORw0KGgo="), json!([1, 2])]
    );
}
