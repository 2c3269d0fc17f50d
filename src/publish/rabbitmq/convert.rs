//! A [`Message`] as AMQP properties, and back.
//!
//! **Invariant.** Nothing here panics on a string that is too long: lapin's `ShortString::from` would.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, ByteArray, FieldTable, ShortString};

use crate::limits::SHORT_STRING_BYTES_MAX;
use crate::message::{Fault, FaultClass, HeaderValue, Message};

/// A string with one length byte, or a message fault naming the field.
pub(super) fn short(field: &str, text: &str) -> Result<ShortString, Fault> {
    ShortString::try_new(text).map_err(|_| too_long(field, text))
}

#[cold]
fn too_long(field: &str, text: &str) -> Fault {
    Fault::new(
        FaultClass::Message,
        format!("field `{field}` is {} bytes long; AMQP carries {SHORT_STRING_BYTES_MAX}", text.len()),
    )
}

/// The properties, always persistent. Two headers of one name leave one, the later.
pub(super) fn to_properties(message: &Message) -> Result<BasicProperties, Fault> {
    let mut properties = BasicProperties::default().with_delivery_mode(2);
    if let Some(id) = &message.message_id {
        properties = properties.with_message_id(short("message_id", id)?);
    }
    if let Some(event_type) = &message.event_type {
        properties = properties.with_type(short("type", event_type)?);
    }
    if let Some(content_type) = &message.content_type {
        properties = properties.with_content_type(short("content_type", content_type)?);
    }
    if let Some(correlation_id) = &message.correlation_id {
        properties = properties.with_correlation_id(short("correlation_id", correlation_id)?);
    }
    if let Some(app_id) = &message.app_id {
        properties = properties.with_app_id(short("app_id", app_id)?);
    }
    if let Some(timestamp_s) = message.timestamp_s {
        properties = properties.with_timestamp(timestamp_s);
    }
    if !message.headers.is_empty() {
        properties = properties.with_headers(to_table(&message.headers)?);
    }
    Ok(properties)
}

/// Headers or arguments as an AMQP table. It is built of all entries at once: one by one, each would be searched a place.
pub(super) fn to_table(entries: &[(impl AsRef<str>, HeaderValue)]) -> Result<FieldTable, Fault> {
    let mut table = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        let (name, value) = (name.as_ref(), to_amqp(value));
        // A name that is too long is shown in part.
        let shown = || format!("header {}", name.chars().take(57).collect::<String>());
        table.push((ShortString::try_new(name).map_err(|_| too_long(&shown(), name))?, value));
    }
    Ok(BTreeMap::from_iter(table).into())
}

fn to_amqp(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Text(text) => AMQPValue::LongString(text.as_str().into()),
        HeaderValue::Int(int) => AMQPValue::LongLongInt(*int),
        HeaderValue::Bool(bool) => AMQPValue::Boolean(*bool),
        HeaderValue::Bytes(bytes) => AMQPValue::ByteArray(ByteArray::from(bytes.clone())),
    }
}

/// Bytes of the content header frame, at most. It must fit into one frame: lapin waits for ever for the room of one
/// that does not.
pub(super) fn header_frame_len_max(message: &Message) -> usize {
    const FRAME: usize = 8;
    const CLASS_WEIGHT_SIZE_FLAGS: usize = 14;
    const MODE_AND_TIMESTAMP: usize = 9;
    const TABLE_LEN: usize = 4;
    let strings = [
        &message.message_id,
        &message.event_type,
        &message.content_type,
        &message.correlation_id,
        &message.app_id,
    ];
    let strings: usize = strings.into_iter().flatten().map(|text| 1 + text.len()).sum();
    let headers: usize =
        message.headers.iter().map(|(name, value)| 1 + name.len() + 1 + value.encoded_len()).sum();
    FRAME + CLASS_WEIGHT_SIZE_FLAGS + MODE_AND_TIMESTAMP + TABLE_LEN + strings + headers
}

/// A delivered message. Integers of every width and timestamps become [`HeaderValue::Int`], text of both kinds
/// [`HeaderValue::Text`], text that is not UTF-8 [`HeaderValue::Bytes`]. Floats, decimals, arrays, tables, void and
/// unsigned values beyond `i64` are dropped: this library writes none.
pub(super) fn to_message(properties: &BasicProperties, payload: Vec<u8>) -> Message {
    let text = |field: &Option<ShortString>| field.as_ref().map(|text| text.as_str().into());
    let headers = properties.headers().as_ref().map_or_else(Vec::new, |table| {
        table
            .inner()
            .iter()
            .filter_map(|(name, value)| Some((name.as_str().to_owned().into(), to_value(value)?)))
            .collect()
    });
    Message {
        message_id: text(properties.message_id()),
        event_type: text(properties.kind()),
        content_type: text(properties.content_type()),
        correlation_id: text(properties.correlation_id()),
        app_id: text(properties.app_id()),
        timestamp_s: *properties.timestamp(),
        headers,
        payload,
    }
}

fn to_value(value: &AMQPValue) -> Option<HeaderValue> {
    Some(match value {
        AMQPValue::Boolean(bool) => HeaderValue::Bool(*bool),
        AMQPValue::ShortShortInt(int) => HeaderValue::Int((*int).into()),
        AMQPValue::ShortShortUInt(int) => HeaderValue::Int((*int).into()),
        AMQPValue::ShortInt(int) => HeaderValue::Int((*int).into()),
        AMQPValue::ShortUInt(int) => HeaderValue::Int((*int).into()),
        AMQPValue::LongInt(int) => HeaderValue::Int((*int).into()),
        AMQPValue::LongUInt(int) => HeaderValue::Int((*int).into()),
        AMQPValue::LongLongInt(int) => HeaderValue::Int(*int),
        AMQPValue::Timestamp(seconds) => HeaderValue::Int(i64::try_from(*seconds).ok()?),
        AMQPValue::ShortString(text) => HeaderValue::Text(text.as_str().into()),
        AMQPValue::LongString(text) => match std::str::from_utf8(text.as_bytes()) {
            Ok(text) => HeaderValue::Text(text.into()),
            Err(_) => HeaderValue::Bytes(text.as_bytes().to_vec()),
        },
        AMQPValue::ByteArray(bytes) => HeaderValue::Bytes(bytes.as_slice().to_vec()),
        AMQPValue::Float(_)
        | AMQPValue::Double(_)
        | AMQPValue::DecimalValue(_)
        | AMQPValue::FieldArray(_)
        | AMQPValue::FieldTable(_)
        | AMQPValue::Void => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Message {
        Message {
            message_id: Some("m-1".into()),
            event_type: Some("payment.completed".into()),
            content_type: Some("application/json".into()),
            correlation_id: Some("c".into()),
            app_id: Some("a".into()),
            timestamp_s: Some(1_700_000_000),
            headers: vec![
                ("a-text".into(), "é".into()),
                ("b-int".into(), i64::MIN.into()),
                ("c-bool".into(), true.into()),
                ("d-bytes".into(), vec![0, 255].into()),
            ],
            payload: b"{}".to_vec(),
        }
    }

    #[test]
    fn what_goes_out_comes_back() {
        let message = full();
        let properties = to_properties(&message).unwrap();
        assert_eq!(*properties.delivery_mode(), Some(2));
        assert_eq!(to_message(&properties, message.payload.clone()), message);
    }

    /// Goal: the bound on the header frame is one. Method: encode it and compare.
    #[test]
    fn the_header_frame_is_within_its_bound() {
        let message = full();
        let table = to_table(&message.headers).unwrap();
        let encoded: usize = table
            .inner()
            .iter()
            .map(|(name, value)| {
                1 + name.as_str().len()
                    + 1
                    + match value {
                        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
                        AMQPValue::ByteArray(bytes) => 4 + bytes.as_slice().len(),
                        AMQPValue::Boolean(_) => 1,
                        _ => 8,
                    }
            })
            .sum();
        let bound = header_frame_len_max(&message);
        assert!(bound >= encoded + 22 && bound < encoded + 200, "{bound} against {encoded}");
    }

    /// Goal: an oversize string is a fault that names its field, never a panic. Method: one field at a time.
    #[test]
    fn oversize_strings_are_refused_by_name() {
        let long = "x".repeat(256);
        type Set = fn(&mut Message, String);
        let cases: [(&str, Set); 6] = [
            ("message_id", |m, s| m.message_id = Some(s.into())),
            ("type", |m, s| m.event_type = Some(s.into())),
            ("content_type", |m, s| m.content_type = Some(s.into())),
            ("correlation_id", |m, s| m.correlation_id = Some(s.into())),
            ("app_id", |m, s| m.app_id = Some(s.into())),
            ("header", |m, s| m.headers.push((s.into(), 1.into()))),
        ];
        for (field, set) in cases {
            let mut message = full();
            set(&mut message, long.clone());
            let fault = to_properties(&message).unwrap_err();
            assert_eq!(fault.class, FaultClass::Message);
            assert!(fault.text.contains(field) && fault.text.len() < 200, "{}", fault.text);
        }
    }
}
