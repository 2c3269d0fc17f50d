//! Messages that cannot be carried, and records that cannot be read. Each is named; none holds up another.

use onewrite::redb::{Database, TableDefinition};
use onewrite::{
    Appended, ConfirmError, Error, Event, EventError, FaultClass, Receipt, Result, Store, limits,
};

use super::{Line, SOON, rabbit, until};
use crate::support::rabbit::{MESSAGE_BYTES_MAX, shared_node};
use crate::support::tap::Tap;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");

fn append(store: &Store, event: Event) -> Result<Receipt<Appended>> {
    store.write(move |tx| tx.append(event.clone()))
}

/// B12. Goal: a payload over the cap is refused at append, with both sizes; where the broker is stricter than the cap, the event is
/// quarantined with the broker's word, and what was in flight with it arrives. Method: the default cap; a cap above the broker's.
#[test]
fn b12_body_too_large() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b12", &[]);
    let mut line = Line::to(&node.url(), "b12");
    let large = |bytes: usize| Event::bytes("matrix", vec![b'x'; bytes]).to("", "b12");
    let refused = append(&line.store, large(limits::PAYLOAD_BYTES_DEFAULT + 1)).unwrap_err();
    assert!(
        matches!(refused, Error::Event(EventError::PayloadTooLarge { len, max }) if len == max + 1),
        "{refused}"
    );
    line.append_many(10);
    line.assert_all_arrived(&tap);
    line.stop();

    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .payload_bytes_max(limits::PAYLOAD_BYTES_MAX)
        .open(folder.path().join("a.redb"))
        .unwrap();
    let refused = append(&store, large(limits::PAYLOAD_BYTES_MAX + 1)).unwrap_err();
    assert!(matches!(refused, Error::Event(EventError::PayloadTooLarge { .. })), "{refused}");
    let receipts: Vec<_> = (0..60)
        .map(|n| {
            let bytes = if n == 30 { MESSAGE_BYTES_MAX + 1 } else { 10 };
            append(&store, large(bytes)).unwrap()
        })
        .collect();
    let relay = store.relay("rabbit").attempts(1).spawn(rabbit(&node.url())).unwrap();
    match receipts[30].wait_confirmed(SOON).unwrap_err() {
        ConfirmError::Quarantined { seq: 30, fault } => {
            assert_eq!((fault.class, fault.code), (FaultClass::Message, Some(406)), "{fault}");
        }
        error => panic!("{error}"),
    }
    for (n, receipt) in receipts.iter().enumerate().filter(|(n, _)| *n != 30) {
        receipt.wait_confirmed(SOON).unwrap_or_else(|error| panic!("{n}: {error}"));
    }
    let raw = tap.drain("b12");
    assert!(raw.iter().all(|raw| raw.body.len() == 10));
    let mut ids: Vec<_> = raw.iter().map(|raw| raw.id().to_owned()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 59);
    assert!(relay.stop(SOON).clean);
}

/// B13. Goal: what AMQP cannot carry is refused at append, by a typed error that names the field, and leaves nothing in the log; the
/// longest that is allowed does arrive. Method: one field too long at a time; then all of them as long as they may be.
#[test]
fn b13_long_fields_and_headers() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    let queue = format!("b13-{}", "q".repeat(251));
    tap.queue(&queue, &[]);
    let line = Line::to(&node.url(), &queue);
    let long = |bytes: usize| "x".repeat(bytes);
    let base = || Event::bytes("matrix", "x").to("", &*queue);
    let bad = [
        ("type", Event::bytes(long(256), "x").to("", &*queue)),
        ("exchange", Event::bytes("matrix", "x").to(long(256), "k")),
        ("routing_key", Event::bytes("matrix", "x").to("", long(256))),
        ("key", base().key(long(256))),
        ("id", base().id(long(256))),
        // Named by its own beginning.
        (&*long(64), base().header(long(256), 1)),
        ("headers", base().header("h", long(limits::HEADERS_BYTES_MAX))),
    ];
    for (field, event) in bad {
        let refused = append(&line.store, event).unwrap_err();
        let Error::Event(error) = &refused else { panic!("{field}: {refused}") };
        let text = error.to_string();
        assert!(text.contains(field) && !text.contains(&long(256)), "{field}: {text}");
    }
    assert_eq!(line.store.stats().unwrap().next_seq, 0);
    // Every field as long as it may be, in the longest spelling of our own headers.
    let mut event = Event::bytes(long(255), "x").to("", &*queue).key(long(255)).id(long(255));
    let mut left = limits::HEADERS_BYTES_MAX;
    for n in 0..limits::HEADERS_MAX {
        let name = format!("{n:0>255}");
        // A little less than there is: it may be counted with what frames a name and a value.
        let value = long((left / (limits::HEADERS_MAX - n)).saturating_sub(name.len() + 6));
        left -= name.len() + value.len() + 6;
        event = event.header(name, value);
    }
    append(&line.store, event).unwrap().wait_confirmed(SOON).unwrap();
    let raw = tap.drain(&queue);
    assert_eq!((raw.len(), raw[0].id().len()), (1, 255));
    let headers = raw[0].properties.headers().as_ref().unwrap().inner().len();
    assert!(headers > limits::HEADERS_MAX, "{headers} headers");
    assert!(line.relay.stop(SOON).clean);
}

/// B20. Goal: a record that cannot be read is quarantined with its number, never published; the rest goes on, also its key. Method:
/// one bit of one payload changes on disk.
#[test]
fn b20_undecodable_record() {
    let node = shared_node();
    let tap = Tap::connect(&node.url());
    tap.queue("b20", &[]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    for n in 0..50 {
        append(&store, Event::bytes("matrix", format!("{n}")).key("k").to("", "b20")).unwrap();
    }
    store.close().unwrap();
    {
        let db = Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        {
            let mut log = tx.open_table(LOG).unwrap();
            let mut frame = log.remove(20).unwrap().unwrap().value().to_vec();
            *frame.last_mut().unwrap() ^= 1;
            log.insert(20, frame.as_slice()).unwrap();
        }
        tx.commit().unwrap();
    }
    let store = Store::open(&path).unwrap();
    let relay = store.relay("rabbit").attempts(1).spawn(rabbit(&node.url())).unwrap();
    until("the others", || relay.status().confirmed == 49);
    let bodies: Vec<_> =
        tap.drain("b20").into_iter().map(|raw| String::from_utf8(raw.body).unwrap()).collect();
    assert_eq!(bodies, (0..50).filter(|n| *n != 20).map(|n| n.to_string()).collect::<Vec<_>>());
    let listed = store.quarantine("rabbit").unwrap().list(None, 10).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].seq, listed[0].fault.class), (20, FaultClass::Undecodable));
    assert_eq!(relay.status().reconnects, 0);
    assert!(relay.stop(SOON).clean);
}
