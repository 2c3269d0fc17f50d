use super::*;
use crate::wire::resend;

const BANK: &str = "018f0000-0000-7000-8000-0000000000ff";
const TILL: &str = "018f0000-0000-7000-8000-0000000000fe";

type Change = fn(&mut Message);

fn key(byte: u8) -> SigningKey {
    SigningKey::new([byte; 32]).unwrap()
}

fn keys() -> ProducerKeys {
    ProducerKeys::new().key(BANK, key(1)).unwrap().key(TILL, key(2)).unwrap()
}

/// Returns a message as a relay of the store publishes it.
fn signed() -> Message {
    let mut message = Message {
        message_id: Some("e-1".into()),
        event_type: Some("paid".into()),
        app_id: Some("bank".into()),
        headers: vec![
            ("cloudEvents_source".into(), "/bank".into()),
            (EPOCH.into(), 3.into()),
            (LANE.into(), 2.into()),
            (LANE_NUMBER.into(), 7.into()),
            (STORE.into(), BANK.into()),
            ("route".into(), HeaderValue::Table(vec![("a".into(), 1.into()), ("b".into(), 2.into())])),
        ],
        payload: b"100".to_vec(),
        ..Message::default()
    };
    let signature = key(1).sign(&message);
    message.headers.push((SIGNATURE.into(), signature));
    message
}

fn set(message: &mut Message, name: &'static str, value: impl Into<HeaderValue>) {
    message.headers.retain(|(header, _)| header != name);
    message.headers.push((name.into(), value.into()));
}

fn problem(message: &Message) -> String {
    keys().verify(message).unwrap_err().to_string()
}

/// Goal: without the key, no part of a message can be changed unnoticed. Method: change, take and
/// add one thing at a time.
#[test]
fn whatever_is_changed_is_detected() {
    assert!(keys().verify(&signed()).is_ok());
    let changes: [Change; 16] = [
        |m| m.message_id = Some("e-2".into()),
        |m| m.event_type = Some("paused".into()),
        |m| m.payload = b"999".to_vec(),
        |m| m.app_id = None,
        |m| m.reply_to = Some("elsewhere".into()),
        |m| set(m, "cloudEvents_source", "/till"),
        |m| set(m, STORE, TILL),
        |m| set(m, EPOCH, 4),
        |m| set(m, LANE, 3),
        |m| set(m, LANE_NUMBER, 8),
        |m| m.headers.retain(|(name, _)| name != LANE && name != LANE_NUMBER),
        |m| m.headers.retain(|(name, _)| name != "route"),
        |m| set(m, "route", HeaderValue::Table(vec![("a".into(), 2.into()), ("b".into(), 1.into())])),
        |m| set(m, "region", "eu"),
        |m| set(m, "x-tenant", "eu"),
        |m| set(m, super::super::CRC, 1),
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut message = signed();
        change(&mut message);
        let text = problem(&message);
        assert!(
            text.ends_with("its signature is of another key, or of another message"),
            "change {at}: {text}"
        );
    }
}

/// Goal: what brokers and hops do to a message leaves it genuine.
#[test]
fn copies_stay_genuine() {
    let changes: [Change; 8] = [
        |m| m.headers.reverse(),
        |m| *m = resend(m),
        |m| set(m, "x-death", HeaderValue::Array(vec![])),
        |m| set(m, "x-delivery-count", 3),
        |m| set(m, "traceparent", "00"),
        |m| m.timestamp_s = Some(7),
        |m| m.expiration = Some("7".into()),
        |m| set(m, "route", HeaderValue::Table(vec![("b".into(), 2.into()), ("a".into(), 1.into())])),
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut message = signed();
        change(&mut message);
        assert!(keys().verify(&message).is_ok(), "change {at}");
    }
}

/// Goal: each way in which a message can lack its proof is an error that says so.
#[test]
fn what_is_missing_is_named() {
    let cases: [(Change, &str); 8] = [
        (
            |m| m.headers.retain(|(name, _)| name != STORE),
            "nothing proves who has sent the message: it names no store as its producer",
        ),
        (|m| set(m, STORE, "bank"), "header `onewrite-store` is not the UUID of a store"),
        (|m| m.headers.push((STORE.into(), TILL.into())), "header `onewrite-store` is given twice"),
        (|m| m.headers.push((LANE_NUMBER.into(), 8.into())), "header `onewrite-lane-number` is given twice"),
        (
            |m| set(m, STORE, "018f0000-0000-7000-8000-000000000001"),
            "nothing proves that store 018f0000-0000-7000-8000-000000000001 has sent the message: \
             no key of this store is known",
        ),
        (
            |m| m.headers.retain(|(name, _)| name != SIGNATURE),
            "nothing proves that store 018f0000-0000-7000-8000-0000000000ff has sent the message: it has no signature",
        ),
        (|m| m.headers.push((SIGNATURE.into(), "v1=".into())), "header `onewrite-signature` is given twice"),
        (
            |m| set(m, SIGNATURE, vec![0_u8; 32]),
            "nothing proves that store 018f0000-0000-7000-8000-0000000000ff has sent the message: \
             its signature has an unknown form",
        ),
    ];
    for (change, expected) in cases {
        let mut message = signed();
        change(&mut message);
        assert_eq!(problem(&message), expected);
    }
    let good = signed().header(SIGNATURE).and_then(HeaderValue::as_text).unwrap().to_owned();
    for text in [
        "",
        "v1=",
        "v2=00",
        &good[..good.len() - 1],
        &format!("{good}0"),
        &good.replace("v1=", "v2="),
        &good.replace('=', "=é"),
    ] {
        let mut message = signed();
        set(&mut message, SIGNATURE, text);
        assert!(problem(&message).ends_with("its signature has an unknown form"), "{text}");
    }
}

/// Goal: a key can be rotated step by step, and a removed key is not believed any more. A store's
/// key is no other store's.
#[test]
fn keys_rotate() {
    let message = signed();
    let of = |keys: &[u8], store| {
        keys.iter().fold(ProducerKeys::new(), |all, byte| all.key(store, key(*byte)).unwrap())
    };
    for (keys, is_genuine) in [(of(&[1], BANK), true), (of(&[9, 1], BANK), true), (of(&[9], BANK), false)] {
        assert_eq!(keys.verify(&message).is_ok(), is_genuine);
    }
    assert!(of(&[1], TILL).verify(&message).is_err());
    let full = of(&[1; PRODUCER_KEYS_MAX], BANK);
    assert!(full.clone().key(BANK, key(1)).is_err());
    assert!(full.key(TILL, key(1)).is_ok());
}

/// Goal: a foreign message passes only on demand, and one in the name of a store does not pass.
#[test]
fn foreign_messages_pass_on_demand_only() {
    let foreign = Message { message_id: Some("m".into()), ..Message::default() };
    assert!(keys().verify(&foreign).is_err());
    assert!(keys().and_foreign().verify(&foreign).is_ok());
    let mut forged = signed();
    forged.payload.push(0);
    assert!(keys().and_foreign().verify(&forged).is_err());
}

/// Goal: signatures stay the same in every version, and are what the page says. Method: a signature
/// computed by Python's `hmac`.
#[test]
fn a_signature_is_an_hmac_sha_256_of_what_the_page_says() {
    assert_eq!(
        signed().header(SIGNATURE).and_then(HeaderValue::as_text),
        Some("v1=ec3027896130147dc6900dfba747f233d830c2dd4ce7dfdfca8c611105c65f89")
    );
}
