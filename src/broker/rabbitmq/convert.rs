//! Conversion of a [`Message`] to AMQP properties, and back.
//!
//! **Invariant.** Nothing here panics on a string that is too long: lapin's `ShortString::from`
//! would.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, ByteArray, DecimalValue, FieldTable, ShortString};

use crate::limits::{SHORT_STRING_BYTES_MAX, TABLE_NESTING_MAX};
use crate::message::{Fault, FaultClass, HeaderValue, Message};
use crate::wire::PERSISTENT;

/// Returns a string with one length byte, or a message fault that names the field.
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

/// Returns the properties, persistent unless the message sets otherwise. Of two headers with one
/// name the later remains.
pub(super) fn to_properties(message: &Message) -> Result<BasicProperties, Fault> {
    let mut properties =
        BasicProperties::default().with_delivery_mode(message.delivery_mode.unwrap_or(PERSISTENT));
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
    if has_more(message) {
        properties = with_more(properties, message)?;
    }
    if let Some(timestamp_s) = message.timestamp_s {
        properties = properties.with_timestamp(timestamp_s);
    }
    if !message.headers.is_empty() {
        properties = properties.with_headers(to_table(&message.headers)?);
    }
    Ok(properties)
}

/// Whether the message has one of the rare properties.
fn has_more(message: &Message) -> bool {
    let Message { content_encoding, reply_to, expiration, user_id, cluster_id, priority, .. } = message;
    priority.is_some()
        || [content_encoding, reply_to, expiration, user_id, cluster_id].into_iter().any(Option::is_some)
}

#[cold]
fn with_more(mut properties: BasicProperties, message: &Message) -> Result<BasicProperties, Fault> {
    if let Some(encoding) = &message.content_encoding {
        properties = properties.with_content_encoding(short("content_encoding", encoding)?);
    }
    if let Some(priority) = message.priority {
        properties = properties.with_priority(priority);
    }
    if let Some(reply_to) = &message.reply_to {
        properties = properties.with_reply_to(short("reply_to", reply_to)?);
    }
    if let Some(expiration) = &message.expiration {
        properties = properties.with_expiration(short("expiration", expiration)?);
    }
    if let Some(user_id) = &message.user_id {
        properties = properties.with_user_id(short("user_id", user_id)?);
    }
    if let Some(cluster_id) = &message.cluster_id {
        properties = properties.with_cluster_id(short("cluster_id", cluster_id)?);
    }
    Ok(properties)
}

/// Returns headers or arguments as an AMQP table. The table is built from all entries at once,
/// because adding them one by one would search a place for each.
pub(super) fn to_table(entries: &[(impl AsRef<str>, HeaderValue)]) -> Result<FieldTable, Fault> {
    let mut table = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        let name = name.as_ref();
        let value = to_amqp(name, value, 1)?;
        table.push((header_name(name)?, value));
    }
    Ok(BTreeMap::from_iter(table).into())
}

fn header_name(name: &str) -> Result<ShortString, Fault> {
    ShortString::try_new(name).map_err(|_| too_long(&format!("header {}", beginning(name)), name))
}

/// The beginning of a name that is too long to show.
fn beginning(name: &str) -> String {
    name.chars().take(57).collect()
}

#[cold]
fn refused(header: &str, what: &str) -> Fault {
    Fault::new(FaultClass::Message, format!("header {} {what}", beginning(header)))
}

/// Converts a value in a table or array at this depth; the headers are the table at depth 1. A
/// value that RabbitMQ or this library could not read is refused: an odd float ends the whole
/// connection there.
fn to_amqp(header: &str, value: &HeaderValue, depth: usize) -> Result<AMQPValue, Fault> {
    if value.is_odd_float() {
        return Err(refused(header, "holds NaN or an infinity, which RabbitMQ cannot read"));
    }
    Ok(match value {
        HeaderValue::Text(text) => AMQPValue::LongString(text.as_str().into()),
        HeaderValue::Int(int) => AMQPValue::LongLongInt(*int),
        HeaderValue::Bool(bool) => AMQPValue::Boolean(*bool),
        HeaderValue::Bytes(bytes) => AMQPValue::ByteArray(ByteArray::from(bytes.clone())),
        HeaderValue::I8(int) => AMQPValue::ShortShortInt(*int),
        HeaderValue::U8(int) => AMQPValue::ShortShortUInt(*int),
        HeaderValue::I16(int) => AMQPValue::ShortInt(*int),
        HeaderValue::U16(int) => AMQPValue::ShortUInt(*int),
        HeaderValue::I32(int) => AMQPValue::LongInt(*int),
        HeaderValue::U32(int) => AMQPValue::LongUInt(*int),
        HeaderValue::Float(float) => AMQPValue::Float(*float),
        HeaderValue::Double(float) => AMQPValue::Double(*float),
        HeaderValue::Decimal { scale, unscaled } => {
            AMQPValue::DecimalValue(DecimalValue { scale: *scale, value: *unscaled })
        }
        HeaderValue::Timestamp(seconds) => AMQPValue::Timestamp(*seconds),
        HeaderValue::Void => AMQPValue::Void,
        HeaderValue::Table(_) | HeaderValue::Array(_) if depth >= TABLE_NESTING_MAX => {
            let what = format!("holds tables or arrays deeper than {TABLE_NESTING_MAX} levels");
            return Err(refused(header, &what));
        }
        HeaderValue::Table(entries) => {
            let mut table = FieldTable::default();
            for (name, value) in entries {
                table.insert(header_name(name)?, to_amqp(header, value, depth + 1)?);
            }
            AMQPValue::FieldTable(table)
        }
        HeaderValue::Array(values) => {
            let values: Result<Vec<_>, _> =
                values.iter().map(|value| to_amqp(header, value, depth + 1)).collect();
            AMQPValue::FieldArray(values?.into())
        }
    })
}

/// The largest possible size of the content header frame, in bytes. The header must fit into one
/// frame: lapin waits for ever for room if it does not.
pub(super) fn header_frame_len_max(message: &Message) -> usize {
    const FRAME: usize = 8;
    const CLASS_WEIGHT_SIZE_FLAGS: usize = 14;
    const MODE_PRIORITY_AND_TIMESTAMP: usize = 10;
    const TABLE_LEN: usize = 4;
    let strings: usize = message.texts().map(|text| 1 + text.len()).sum();
    let headers = message.headers_len();
    FRAME + CLASS_WEIGHT_SIZE_FLAGS + MODE_PRIORITY_AND_TIMESTAMP + TABLE_LEN + strings + headers
}

/// Converts a delivered message, with all its properties. Each AMQP type becomes a [`HeaderValue`];
/// text that is not UTF-8 becomes [`HeaderValue::Bytes`].
pub(super) fn to_message(properties: &BasicProperties, payload: Vec<u8>) -> Message {
    let text = |field: &Option<ShortString>| field.as_ref().map(|text| text.as_str().into());
    let headers = properties.headers().as_ref().map_or_else(Vec::new, |table| {
        table.inner().iter().map(|(name, value)| (name.as_str().to_owned().into(), to_value(value))).collect()
    });
    Message {
        message_id: text(properties.message_id()),
        event_type: text(properties.kind()),
        content_type: text(properties.content_type()),
        content_encoding: text(properties.content_encoding()),
        delivery_mode: *properties.delivery_mode(),
        priority: *properties.priority(),
        correlation_id: text(properties.correlation_id()),
        reply_to: text(properties.reply_to()),
        expiration: text(properties.expiration()),
        user_id: text(properties.user_id()),
        app_id: text(properties.app_id()),
        cluster_id: text(properties.cluster_id()),
        timestamp_s: *properties.timestamp(),
        headers,
        payload,
    }
}

/// Converts a value. The scanner in front of the decoder has bounded the depth.
fn to_value(value: &AMQPValue) -> HeaderValue {
    match value {
        AMQPValue::Boolean(bool) => HeaderValue::Bool(*bool),
        AMQPValue::ShortShortInt(int) => HeaderValue::I8(*int),
        AMQPValue::ShortShortUInt(int) => HeaderValue::U8(*int),
        AMQPValue::ShortInt(int) => HeaderValue::I16(*int),
        AMQPValue::ShortUInt(int) => HeaderValue::U16(*int),
        AMQPValue::LongInt(int) => HeaderValue::I32(*int),
        AMQPValue::LongUInt(int) => HeaderValue::U32(*int),
        AMQPValue::LongLongInt(int) => HeaderValue::Int(*int),
        AMQPValue::Float(float) => HeaderValue::Float(*float),
        AMQPValue::Double(float) => HeaderValue::Double(*float),
        AMQPValue::DecimalValue(DecimalValue { scale, value }) => {
            HeaderValue::Decimal { scale: *scale, unscaled: *value }
        }
        AMQPValue::Timestamp(seconds) => HeaderValue::Timestamp(*seconds),
        AMQPValue::ShortString(text) => HeaderValue::Text(text.as_str().into()),
        AMQPValue::LongString(text) => match std::str::from_utf8(text.as_bytes()) {
            Ok(text) => HeaderValue::Text(text.into()),
            Err(_) => HeaderValue::Bytes(text.as_bytes().to_vec()),
        },
        AMQPValue::ByteArray(bytes) => HeaderValue::Bytes(bytes.as_slice().to_vec()),
        AMQPValue::FieldArray(values) => HeaderValue::Array(values.as_slice().iter().map(to_value).collect()),
        AMQPValue::FieldTable(table) => HeaderValue::Table(
            table.inner().iter().map(|(name, value)| (name.as_str().to_owned(), to_value(value))).collect(),
        ),
        AMQPValue::Void => HeaderValue::Void,
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, gen_frame};

    use super::*;

    fn full() -> Message {
        Message {
            message_id: Some("m-1".into()),
            event_type: Some("payment.completed".into()),
            content_type: Some("application/json".into()),
            content_encoding: Some("gzip".into()),
            delivery_mode: Some(1),
            priority: Some(9),
            correlation_id: Some("c".into()),
            reply_to: Some("answers".into()),
            expiration: Some("60000".into()),
            user_id: Some("guest".into()),
            app_id: Some("a".into()),
            cluster_id: Some("eu".into()),
            timestamp_s: Some(1_700_000_000),
            headers: vec![
                ("a-text".into(), "é".into()),
                ("b-int".into(), i64::MIN.into()),
                ("c-bool".into(), true.into()),
                ("d-bytes".into(), vec![0, 255].into()),
                (
                    "e-table".into(),
                    HeaderValue::Table(vec![("n".into(), HeaderValue::Array(vec![7.into()]))]),
                ),
                ("f-decimal".into(), HeaderValue::Decimal { scale: 2, unscaled: u32::MAX }),
                ("g-small".into(), HeaderValue::Array(vec![HeaderValue::Void, HeaderValue::U16(1)])),
            ],
            payload: b"{}".to_vec(),
        }
    }

    #[test]
    fn what_goes_out_comes_back() {
        let message = full();
        let properties = to_properties(&message).unwrap();
        assert_eq!(*properties.delivery_mode(), Some(1));
        assert_eq!(to_message(&properties, message.payload.clone()), message);
        let silent = Message { delivery_mode: None, ..message };
        assert_eq!(
            *to_properties(&silent).unwrap().delivery_mode(),
            Some(2),
            "persistent unless it says otherwise"
        );
    }

    /// Goal: the bound on the header frame holds. Method: encode the header and compare.
    #[test]
    fn the_header_frame_is_within_its_bound() {
        let message = full();
        let properties = to_properties(&message).unwrap();
        let header = AMQPContentHeader { class_id: 60, body_size: 2, properties };
        let frame = AMQPFrame::Header(1, header);
        let mut buffer = [0; 4096];
        let encoded = gen_frame(&frame)(std::io::Cursor::new(&mut buffer[..]).into()).unwrap().position;
        let bound = header_frame_len_max(&message);
        assert_eq!(bound as u64, encoded, "all properties are there");
    }

    /// Goal: an oversize string is a fault that names its field, never a panic. Method: one field
    /// at a time.
    #[test]
    fn oversize_strings_are_refused_by_name() {
        let long = "x".repeat(256);
        type Set = fn(&mut Message, String);
        let cases: [(&str, Set); 12] = [
            ("message_id", |m, s| m.message_id = Some(s.into())),
            ("type", |m, s| m.event_type = Some(s.into())),
            ("content_type", |m, s| m.content_type = Some(s.into())),
            ("correlation_id", |m, s| m.correlation_id = Some(s.into())),
            ("content_encoding", |m, s| m.content_encoding = Some(s.into())),
            ("reply_to", |m, s| m.reply_to = Some(s.into())),
            ("expiration", |m, s| m.expiration = Some(s.into())),
            ("user_id", |m, s| m.user_id = Some(s.into())),
            ("cluster_id", |m, s| m.cluster_id = Some(s.into())),
            ("header", |m, s| m.headers.push(("t".into(), HeaderValue::Table(vec![(s, 1.into())])))),
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
