//! No properties and headers of a message cause a panic. A copy is recognised in any order of its headers, and a signed message is
//! believed while nothing in it changes.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use onewrite::{HeaderValue, Message, ProducerKeys, SigningKey, Store, wire};

const PRODUCER: &str = "018f0000-0000-7000-8000-0000000000ff";

/// Names that mean something. The fuzzer adds others.
const NAMES: [&str; 24] = [
    wire::STORE,
    wire::EPOCH,
    wire::LANE,
    wire::LANE_NUMBER,
    wire::CRC,
    wire::RESEND,
    wire::VERSION,
    wire::SIGNATURE,
    wire::MENDED,
    wire::UNREADABLE,
    "cloudEvents_partitionkey",
    "cloudEvents:partitionkey",
    "ce-partitionkey",
    "cloudEvents_time",
    "ce-time",
    "cloudEvents_source",
    "traceparent",
    "x-death",
    "x-delivery-count",
    "x-acquired-count",
    "x-first-death-queue",
    "timestamp_in_ms",
    "CC",
    "onewrite-",
];
const TEXTS: [&str; 6] = [
    PRODUCER,
    "v1=0000000000000000000000000000000000000000000000000000000000000000",
    "2023-11-14T22:13:20.123Z",
    "9999-12-31T23:59:59.999Z",
    "0000-00-00T00:00:00Z",
    "alice",
];

#[derive(Debug, Arbitrary)]
enum Name<'a> {
    Known(u8),
    Any(&'a str),
}

#[derive(Debug, Arbitrary)]
enum Value<'a> {
    Known(u8),
    Text(&'a str),
    Int(i64),
    Small(u8),
    Bool(bool),
    Bytes(&'a [u8]),
    Double(f64),
    Decimal(u8, u32),
    Time(u64),
    Table(Vec<(&'a str, Value<'a>)>),
    Array(Vec<Value<'a>>),
    Void,
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    id: Option<&'a str>,
    kind: Option<&'a str>,
    reply_to: Option<&'a str>,
    app_id: Option<&'a str>,
    timestamp_s: Option<u64>,
    priority: Option<u8>,
    lane: Option<(u64, u64, u64)>,
    headers: Vec<(Name<'a>, Value<'a>)>,
    payload: &'a [u8],
    /// Which header of the signed message is changed.
    changed: u8,
}

fn value(of: &Value<'_>) -> HeaderValue {
    match of {
        Value::Known(at) => TEXTS[usize::from(*at) % TEXTS.len()].into(),
        Value::Text(text) => (*text).into(),
        Value::Int(int) => (*int).into(),
        Value::Small(int) => HeaderValue::U8(*int),
        Value::Bool(yes) => (*yes).into(),
        Value::Bytes(bytes) => bytes.to_vec().into(),
        Value::Double(float) => HeaderValue::Double(*float),
        Value::Decimal(scale, unscaled) => HeaderValue::Decimal { scale: *scale, unscaled: *unscaled },
        Value::Time(seconds) => HeaderValue::Timestamp(*seconds),
        Value::Table(entries) => {
            HeaderValue::Table(entries.iter().map(|(name, of)| ((*name).into(), value(of))).collect())
        }
        Value::Array(values) => HeaderValue::Array(values.iter().map(value).collect()),
        Value::Void => HeaderValue::Void,
    }
}

fn message(input: &Input<'_>) -> Message {
    let mut headers: Vec<(std::borrow::Cow<'static, str>, HeaderValue)> = Vec::new();
    if let Some((epoch, lane, number)) = input.lane {
        let int = |number: u64| HeaderValue::Int(number.cast_signed());
        headers.push((wire::STORE.into(), PRODUCER.into()));
        headers.push((wire::EPOCH.into(), int(epoch)));
        headers.push((wire::LANE.into(), int(lane)));
        headers.push((wire::LANE_NUMBER.into(), int(number)));
    }
    for (name, of) in &input.headers {
        let name = match name {
            Name::Known(at) => NAMES[usize::from(*at) % NAMES.len()].into(),
            Name::Any(name) => (*name).to_owned().into(),
        };
        headers.push((name, value(of)));
    }
    Message {
        message_id: input.id.map(Into::into),
        event_type: input.kind.map(Into::into),
        reply_to: input.reply_to.map(Into::into),
        app_id: input.app_id.map(Into::into),
        timestamp_s: input.timestamp_s,
        priority: input.priority,
        headers,
        payload: input.payload.to_vec(),
        ..Message::default()
    }
}

struct Ready {
    store: Store,
    key: SigningKey,
    keys: ProducerKeys,
}

static READY: LazyLock<Ready> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("onewrite-fuzz-wire-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let key = SigningKey::new([7; 32]).unwrap();
    let keys = ProducerKeys::new().key(PRODUCER, key.clone()).unwrap();
    Ready { store: Store::open(folder.join("seen.redb")).unwrap(), key, keys }
});

fuzz_target!(|input: Input<'_>| {
    let Ready { store, key, keys } = &*READY;
    let message = message(&input);
    let mut turned = message.clone();
    turned.headers.reverse();
    let _ = keys.verify(&message);
    onewrite::fuzzing::message(&message, key, keys, input.changed.into());

    // Nothing of this is committed.
    let tx = store.begin().unwrap();
    let first = tx.first_delivery("scope", &message);
    if let Ok(first) = first {
        assert!(first, "nothing was seen before");
        let has_name = message.message_id.as_ref().is_some_and(|id| !id.is_empty()) || input.lane.is_some();
        // Copies may differ in the order of headers. Where two have one name, the first counts.
        let mut names: Vec<_> = message.headers.iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        let twice = names.windows(2).any(|pair| pair[0] == pair[1]);
        match tx.first_delivery("scope", &message) {
            Ok(again) => assert!(!again || !has_name, "a repeat is new: {message:?}"),
            Err(error) => panic!("a repeat is none: {error}"),
        }
        if !twice && has_name {
            assert!(matches!(tx.first_delivery("scope", &turned), Ok(false)), "{message:?}");
        }
    }
});
