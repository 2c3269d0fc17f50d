use std::collections::BTreeSet;

use super::*;

const KEY: ContentKey = ContentKey([7; 16]);

fn message() -> Message {
    Message {
        message_id: Some("m".into()),
        event_type: Some("paid".into()),
        content_type: Some("text/plain".into()),
        correlation_id: Some("c".into()),
        headers: vec![
            ("region".into(), "eu".into()),
            ("cloudEvents_time".into(), "t".into()),
            (
                "route".into(),
                HeaderValue::Table(vec![
                    ("a".into(), 1.into()),
                    ("b".into(), HeaderValue::Array(vec!["x".into()])),
                ]),
            ),
        ],
        payload: b"100".to_vec(),
        ..Message::default()
    }
}

/// Returns a message as a relay publishes it.
fn ours() -> Message {
    let mut message = message();
    message.headers.push((STORE.into(), "a store".into()));
    message
}

fn changed(message: &Message, change: fn(&mut Message)) -> u64 {
    let mut message = message.clone();
    change(&mut message);
    KEY.hash(&message)
}

/// Goal: the hash is SipHash-2-4, in files of every version. Method: the first vector of the
/// paper's own example.
#[test]
fn it_is_siphash_2_4() {
    let key: [u8; 16] = std::array::from_fn(|at| at as u8);
    let text: [u8; 15] = std::array::from_fn(|at| at as u8);
    let mut hasher = ContentKey::new(key).hasher();
    hasher.write(&text);
    assert_eq!(hasher.finish(), 0xa129_ca61_49be_45e5);
}

/// Goal: each change of what a producer says makes another message. Method: change, take and move
/// one thing at a time; no two hashes are the same.
#[test]
fn each_part_counts() {
    let changes: [fn(&mut Message); 32] = [
        |m| m.message_id = Some("n".into()),
        |m| m.message_id = None,
        |m| m.event_type = Some("paused".into()),
        |m| m.event_type = None,
        |m| m.content_type = None,
        |m| m.content_encoding = Some("gzip".into()),
        |m| m.correlation_id = Some(String::new().into()),
        |m| m.reply_to = Some("answers".into()),
        |m| m.reply_to = Some(DIRECT_REPLY.into()),
        |m| m.reply_to = Some("amq.rabbitmq.reply-to-mine".into()),
        |m| m.user_id = Some("bank".into()),
        |m| m.cluster_id = Some("bank".into()),
        |m| m.app_id = Some("bank".into()),
        |m| m.priority = Some(0),
        |m| m.priority = Some(1),
        |m| m.payload.push(0),
        |m| m.headers[0].1 = "us".into(),
        |m| m.headers[0].1 = b"eu".to_vec().into(),
        |m| m.headers[0].0 = "regio".into(),
        |m| _ = m.headers.pop(),
        |m| m.headers.push(("region".into(), "eu".into())),
        |m| m.headers.push((VERSION.into(), 2.into())),
        |m| m.headers.push((MENDED.into(), "a name was `\\xff`".into())),
        |m| m.headers.push((MENDED.into(), "a name was `\\xfe`".into())),
        |m| m.headers.push((STORE.into(), "a store".into())),
        |m| m.headers.push(("x-tenant".into(), "a".into())),
        |m| m.headers.push(("x-tenant".into(), "b".into())),
        |m| m.headers.push(("ce-source".into(), "/bank".into())),
        |m| m.headers[2].1 = HeaderValue::Table(vec![("a".into(), 1.into())]),
        |m| {
            m.headers[2].1 = HeaderValue::Table(vec![
                ("a".into(), 2.into()),
                ("b".into(), HeaderValue::Array(vec!["x".into()])),
            ]);
        },
        |m| {
            m.headers[2].1 = HeaderValue::Table(vec![
                ("a".into(), 1.into()),
                ("b".into(), HeaderValue::Array(vec!["y".into()])),
            ]);
        },
        |m| m.headers[2].0 = "cloudEvents_route".into(),
    ];
    let mut hashes = vec![KEY.hash(&message())];
    hashes.extend(changes.map(|change| changed(&message(), change)));
    let different: BTreeSet<_> = hashes.iter().collect();
    assert_eq!(different.len(), hashes.len());
    assert_ne!(ContentKey::new([8; 16]).hash(&message()), KEY.hash(&message()), "the key counts");
    assert_ne!(KEY.route("a", "b"), KEY.route("ab", ""));
}

/// Goal: the kind of a header's value counts. Method: values of every kind that read alike, in a
/// message each.
#[test]
fn each_kind_of_value_counts() {
    let values = [
        HeaderValue::Text("1".into()),
        HeaderValue::Bytes(b"1".to_vec()),
        HeaderValue::Int(1),
        HeaderValue::Int(2),
        HeaderValue::Bool(true),
        HeaderValue::Bool(false),
        HeaderValue::I8(1),
        HeaderValue::U8(1),
        HeaderValue::I16(1),
        HeaderValue::U16(1),
        HeaderValue::I32(1),
        HeaderValue::U32(1),
        HeaderValue::Float(1.0),
        HeaderValue::Double(1.0),
        HeaderValue::Double(-0.0),
        HeaderValue::Double(0.0),
        HeaderValue::Decimal { scale: 0, unscaled: 1 },
        HeaderValue::Decimal { scale: 1, unscaled: 1 },
        HeaderValue::Timestamp(1),
        HeaderValue::Void,
        HeaderValue::Table(vec![]),
        HeaderValue::Table(vec![("1".into(), HeaderValue::Void)]),
        HeaderValue::Table(vec![("1".into(), HeaderValue::Void), ("1".into(), HeaderValue::Void)]),
        HeaderValue::Array(vec![]),
        HeaderValue::Array(vec![HeaderValue::Void]),
        HeaderValue::Array(vec![HeaderValue::Void, 1.into()]),
        HeaderValue::Array(vec![1.into(), HeaderValue::Void]),
        HeaderValue::Array(vec![HeaderValue::Array(vec![]), HeaderValue::Void]),
        HeaderValue::Array(vec![HeaderValue::Array(vec![HeaderValue::Void])]),
    ];
    let hash = |value: &HeaderValue| {
        KEY.hash(&Message { headers: vec![("h".into(), value.clone())], ..Message::default() })
    };
    let different: BTreeSet<_> = values.iter().map(hash).collect();
    assert_eq!(different.len(), values.len());
}

/// Goal: all copies of one message have one hash. Method: what brokers and hops change, one at a
/// time, in a foreign message and in one of ours.
#[test]
fn copies_have_one_hash() {
    let changes: [fn(&mut Message); 20] = [
        |m| m.headers.reverse(),
        |m| m.headers.push(("x-death".into(), HeaderValue::Array(vec![HeaderValue::Table(vec![])]))),
        |m| m.headers.push(("x-first-death-queue".into(), "q".into())),
        |m| m.headers.push(("x-last-death-reason".into(), "expired".into())),
        |m| m.headers.push(("x-delivery-count".into(), 3.into())),
        |m| m.headers.push(("x-acquired-count".into(), 3.into())),
        |m| m.headers.push(("x-received-from".into(), HeaderValue::Array(vec![]))),
        |m| m.headers.push(("x-shovelled".into(), true.into())),
        |m| m.headers.push(("x-opt-anything".into(), 1.into())),
        |m| m.headers.push(("timestamp_in_ms".into(), 1.into())),
        |m| m.headers.push(("CC".into(), HeaderValue::Array(vec!["q".into()]))),
        |m| m.headers.push(("onewrite-resend".into(), true.into())),
        |m| m.headers.push(("traceparent".into(), "00".into())),
        |m| m.headers[1].0 = "ce-time".into(),
        |m| m.expiration = Some("1000".into()),
        |m| m.delivery_mode = Some(2),
        |m| m.timestamp_s = Some(7),
        |m| {
            if let HeaderValue::Table(entries) = &mut m.headers[2].1 {
                entries.reverse();
            }
        },
        |m| m.headers.push(("onewrite-epoch".into(), 3.into())),
        |m| m.headers.push(("onewrite-lane-number".into(), 3.into())),
    ];
    for message in [message(), ours()] {
        for (at, change) in changes.into_iter().enumerate() {
            assert_eq!(changed(&message, change), KEY.hash(&message), "change {at}");
        }
    }
    let answer = |queue: &str| KEY.hash(&Message { reply_to: Some(queue.into()), ..message() });
    assert_eq!(answer("amq.rabbitmq.reply-to.g1h2"), answer("amq.rabbitmq.reply-to.g3h4"));
}

/// Goal: one event stays one message when a relay's settings change between two publishes.
#[test]
fn a_relay_s_settings_make_no_other_message() {
    let settings: [fn(&mut Message); 3] = [
        |m| m.app_id = Some("bank".into()),
        |m| m.headers.push(("ce-source".into(), "/bank".into())),
        |m| m.headers.push(("cloudEvents_source".into(), "/bank".into())),
    ];
    for change in settings {
        assert_eq!(changed(&ours(), change), KEY.hash(&ours()));
        assert_ne!(changed(&message(), change), KEY.hash(&message()));
    }
}

/// Goal: two messages that are not believed are distinguished by their claims, in any order of the
/// headers.
#[test]
fn claims_are_distinguished() {
    let claim = |claims: &[(&'static str, i64)]| {
        let headers = claims.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        KEY.claims(&Message { headers, ..message() })
    };
    let different = [
        claim(&[]),
        claim(&[(LANE, 1)]),
        claim(&[(LANE, 2)]),
        claim(&[(EPOCH, 1)]),
        claim(&[(LANE, 1), (LANE, 1)]),
        claim(&[(LANE, 1), (LANE_NUMBER, 1)]),
    ];
    assert_eq!(different.iter().collect::<BTreeSet<_>>().len(), different.len());
    assert_eq!(claim(&[(LANE_NUMBER, 1), ("region", 3), (LANE, 1)]), claim(&[(LANE, 1), (LANE_NUMBER, 1)]));
}
