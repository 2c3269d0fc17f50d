//! The byte form of header values and of the rarer properties, in records and in rejected
//! deliveries.
//!
//! ```text
//! value       kind u8 │ by its kind: u32 length and bytes, a number, or values
//! table       count u32 │ { name u32 + bytes, value }…
//! array       count u32 │ value…
//! properties  flags u16 │ [content encoding t8] │ [reply to t8] │ [user id t8] │ [app id t8] │ [cluster id t8] │
//!             [priority u8] │ [expiration ms u32]
//! ```
//!
//! Little-endian. Floats are written as their bits.
//!
//! **Invariants.** A read never panics, and goes [`TABLE_NESTING_MAX`] levels deep at most. It
//! takes memory for what it has read, never for what a count promises. An unknown kind or flag is
//! an error.

use super::wire_bytes::{Malformed, Reader, put_text8};
use crate::event::Properties;
use crate::limits::TABLE_NESTING_MAX;
use crate::message::HeaderValue;
use crate::text::Text;

const TEXT: u8 = 0;
const INT: u8 = 1;
const BOOL: u8 = 2;
const BYTES: u8 = 3;
const I8: u8 = 4;
const U8: u8 = 5;
const I16: u8 = 6;
const U16: u8 = 7;
const I32: u8 = 8;
const U32: u8 = 9;
const FLOAT: u8 = 10;
const DOUBLE: u8 = 11;
const DECIMAL: u8 = 12;
const TIMESTAMP: u8 = 13;
const TABLE: u8 = 14;
const ARRAY: u8 = 15;
const VOID: u8 = 16;

/// Writes a header's value.
pub(super) fn put_value(out: &mut Vec<u8>, value: &HeaderValue) {
    put_value_at(out, value, 1);
}

/// Writes a value in a table or array at this depth. The headers are the table at depth 1.
fn put_value_at(out: &mut Vec<u8>, value: &HeaderValue, depth: usize) {
    if depth >= TABLE_NESTING_MAX && matches!(value, HeaderValue::Table(_) | HeaderValue::Array(_)) {
        // No event and no RabbitMQ delivery is nested as deep. A value from an application's
        // `Source` may be, and becomes readable bytes.
        let mut bytes = Vec::new();
        put_kind_and_value(&mut bytes, value, 1);
        return put_long(out, BYTES, &bytes);
    }
    put_kind_and_value(out, value, depth);
}

fn put_kind_and_value(out: &mut Vec<u8>, value: &HeaderValue, depth: usize) {
    match value {
        HeaderValue::Text(text) => put_long(out, TEXT, text.as_bytes()),
        HeaderValue::Bytes(bytes) => put_long(out, BYTES, bytes),
        HeaderValue::Int(int) => put_fixed(out, INT, &int.to_le_bytes()),
        HeaderValue::Bool(value) => put_fixed(out, BOOL, &[u8::from(*value)]),
        HeaderValue::I8(int) => put_fixed(out, I8, &int.to_le_bytes()),
        HeaderValue::U8(int) => put_fixed(out, U8, &[*int]),
        HeaderValue::I16(int) => put_fixed(out, I16, &int.to_le_bytes()),
        HeaderValue::U16(int) => put_fixed(out, U16, &int.to_le_bytes()),
        HeaderValue::I32(int) => put_fixed(out, I32, &int.to_le_bytes()),
        HeaderValue::U32(int) => put_fixed(out, U32, &int.to_le_bytes()),
        HeaderValue::Float(float) => put_fixed(out, FLOAT, &float.to_bits().to_le_bytes()),
        HeaderValue::Double(float) => put_fixed(out, DOUBLE, &float.to_bits().to_le_bytes()),
        HeaderValue::Decimal { scale, unscaled } => {
            put_fixed(out, DECIMAL, &[*scale]);
            out.extend_from_slice(&unscaled.to_le_bytes());
        }
        HeaderValue::Timestamp(seconds) => put_fixed(out, TIMESTAMP, &seconds.to_le_bytes()),
        HeaderValue::Table(entries) => {
            put_fixed(out, TABLE, &len(entries.len()));
            for (name, value) in entries {
                out.extend_from_slice(&len(name.len()));
                out.extend_from_slice(name.as_bytes());
                put_value_at(out, value, depth + 1);
            }
        }
        HeaderValue::Array(values) => {
            put_fixed(out, ARRAY, &len(values.len()));
            values.iter().for_each(|value| put_value_at(out, value, depth + 1));
        }
        HeaderValue::Void => out.push(VOID),
    }
}

fn put_fixed(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    out.push(kind);
    out.extend_from_slice(bytes);
}

fn put_long(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    put_fixed(out, kind, &len(bytes.len()));
    out.extend_from_slice(bytes);
}

fn len(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("a message of 4 GiB is carried by no broker").to_le_bytes()
}

/// Reads a header's value.
pub(super) fn read_value(reader: &mut Reader<'_>) -> Result<HeaderValue, Malformed> {
    read_value_at(reader, 1)
}

fn read_value_at(reader: &mut Reader<'_>, depth: usize) -> Result<HeaderValue, Malformed> {
    Ok(match reader.u8()? {
        TEXT => {
            let len = reader.u32()? as usize;
            HeaderValue::Text(reader.text(len)?.into())
        }
        BYTES => {
            let len = reader.u32()? as usize;
            HeaderValue::Bytes(reader.take(len)?.to_vec())
        }
        INT => HeaderValue::Int(reader.u64()?.cast_signed()),
        BOOL => HeaderValue::Bool(reader.u8()? != 0),
        I8 => HeaderValue::I8(reader.u8()?.cast_signed()),
        U8 => HeaderValue::U8(reader.u8()?),
        I16 => HeaderValue::I16(reader.u16()?.cast_signed()),
        U16 => HeaderValue::U16(reader.u16()?),
        I32 => HeaderValue::I32(reader.u32()?.cast_signed()),
        U32 => HeaderValue::U32(reader.u32()?),
        FLOAT => HeaderValue::Float(f32::from_bits(reader.u32()?)),
        DOUBLE => HeaderValue::Double(f64::from_bits(reader.u64()?)),
        DECIMAL => HeaderValue::Decimal { scale: reader.u8()?, unscaled: reader.u32()? },
        TIMESTAMP => HeaderValue::Timestamp(reader.u64()?),
        VOID => HeaderValue::Void,
        TABLE | ARRAY if depth >= TABLE_NESTING_MAX => {
            return Err(Malformed("a header in it is nested too deep"));
        }
        TABLE => {
            let mut entries = Vec::new();
            for _ in 0..reader.u32()? {
                let len = reader.u32()? as usize;
                entries.push((reader.text(len)?.to_owned(), read_value_at(reader, depth + 1)?));
            }
            HeaderValue::Table(entries)
        }
        ARRAY => {
            let mut values = Vec::new();
            for _ in 0..reader.u32()? {
                values.push(read_value_at(reader, depth + 1)?);
            }
            HeaderValue::Array(values)
        }
        _ => return Err(Malformed("a header in it has an unknown kind")),
    })
}

const CONTENT_ENCODING: u16 = 1 << 0;
const REPLY_TO: u16 = 1 << 1;
const USER_ID: u16 = 1 << 2;
const APP_ID: u16 = 1 << 3;
const CLUSTER_ID: u16 = 1 << 4;
const PRIORITY: u16 = 1 << 5;
const EXPIRATION: u16 = 1 << 6;
const TRANSIENT: u16 = 1 << 7;
const MAY_BE_UNROUTABLE: u16 = 1 << 8;
const KNOWN: u16 = (1 << 9) - 1;

/// Writes the properties of a valid event.
#[cold]
pub(super) fn put_properties(out: &mut Vec<u8>, properties: &Properties) {
    let Properties { content_encoding, reply_to, user_id, app_id, cluster_id, .. } = properties;
    let texts = [content_encoding, reply_to, user_id, app_id, cluster_id];
    let flags = [
        (content_encoding.is_some(), CONTENT_ENCODING),
        (reply_to.is_some(), REPLY_TO),
        (user_id.is_some(), USER_ID),
        (app_id.is_some(), APP_ID),
        (cluster_id.is_some(), CLUSTER_ID),
        (properties.priority.is_some(), PRIORITY),
        (properties.expiration_ms.is_some(), EXPIRATION),
        (properties.transient, TRANSIENT),
        (properties.may_be_unroutable, MAY_BE_UNROUTABLE),
    ];
    let flags =
        flags.into_iter().filter_map(|(set, flag)| set.then_some(flag)).fold(0, |all, flag| all | flag);
    out.extend_from_slice(&flags.to_le_bytes());
    texts.into_iter().flatten().for_each(|text| put_text8(out, text));
    out.extend(properties.priority);
    if let Some(ms) = properties.expiration_ms {
        out.extend_from_slice(&ms.to_le_bytes());
    }
}

/// Reads the output of [`put_properties`].
#[cold]
pub(super) fn read_properties(reader: &mut Reader<'_>) -> Result<Properties, Malformed> {
    let flags = reader.u16()?;
    if flags & !KNOWN != 0 {
        return Err(Malformed("it has a property that is unknown"));
    }
    let has = |flag| flags & flag != 0;
    let mut optional = |flag| has(flag).then(|| reader.text8().map(Text::from)).transpose();
    // The fields are in the order of the bytes.
    Ok(Properties {
        content_encoding: optional(CONTENT_ENCODING)?,
        reply_to: optional(REPLY_TO)?,
        user_id: optional(USER_ID)?,
        app_id: optional(APP_ID)?,
        cluster_id: optional(CLUSTER_ID)?,
        priority: has(PRIORITY).then(|| reader.u8()).transpose()?,
        expiration_ms: has(EXPIRATION).then(|| reader.u32()).transpose()?,
        transient: has(TRANSIENT),
        may_be_unroutable: has(MAY_BE_UNROUTABLE),
    })
}

#[cfg(test)]
pub(crate) mod samples {
    //! Values and properties of every kind, for property tests.

    use proptest::prelude::*;

    use super::*;

    /// One value of each kind. Tables and arrays hold other values, with sorted and unique names,
    /// as they come from RabbitMQ.
    pub(crate) fn any_value() -> impl Strategy<Value = HeaderValue> {
        let leaf = prop_oneof![
            ".{0,20}".prop_map(HeaderValue::from),
            any::<i64>().prop_map(HeaderValue::Int),
            any::<bool>().prop_map(HeaderValue::Bool),
            prop::collection::vec(any::<u8>(), 0..20).prop_map(HeaderValue::Bytes),
            any::<i8>().prop_map(HeaderValue::I8),
            any::<u8>().prop_map(HeaderValue::U8),
            any::<i16>().prop_map(HeaderValue::I16),
            any::<u16>().prop_map(HeaderValue::U16),
            any::<i32>().prop_map(HeaderValue::I32),
            any::<u32>().prop_map(HeaderValue::U32),
            prop::num::f32::ANY.prop_map(HeaderValue::Float),
            prop::num::f64::ANY.prop_map(HeaderValue::Double),
            any::<(u8, u32)>().prop_map(|(scale, unscaled)| HeaderValue::Decimal { scale, unscaled }),
            any::<u64>().prop_map(HeaderValue::Timestamp),
            Just(HeaderValue::Void),
        ];
        leaf.prop_recursive(4, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(HeaderValue::Array),
                prop::collection::btree_map("[a-zé]{0,9}", inner, 0..4)
                    .prop_map(|entries| HeaderValue::Table(entries.into_iter().collect())),
            ]
        })
    }

    pub(crate) fn any_properties() -> impl Strategy<Value = Properties> {
        let text = || prop::option::of("[a-zé]{0,30}".prop_map(Text::from));
        let texts = (text(), text(), text(), text(), text());
        (texts, any::<Option<u8>>(), any::<Option<u32>>(), any::<(bool, bool)>()).prop_map(
            |(texts, priority, expiration_ms, (transient, may_be_unroutable))| {
                let (content_encoding, reply_to, user_id, app_id, cluster_id) = texts;
                Properties {
                    content_encoding,
                    reply_to,
                    user_id,
                    app_id,
                    cluster_id,
                    priority,
                    expiration_ms,
                    transient,
                    may_be_unroutable,
                }
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(levels: usize) -> HeaderValue {
        (1..levels).fold(HeaderValue::Void, |inner, level| match level % 2 {
            0 => HeaderValue::Array(vec![inner]),
            _ => HeaderValue::Table(vec![("n".into(), inner)]),
        })
    }

    /// Goal: everything that was written can be read, however deep an application's `Source` has
    /// nested it. Method: depths around the limit; values that are too deep come back as bytes.
    #[test]
    fn what_is_nested_too_deep_is_kept_as_bytes() {
        for levels in 1..TABLE_NESTING_MAX + 4 {
            let (value, mut out) = (nested(levels), Vec::new());
            put_value(&mut out, &value);
            let back = read_value(&mut Reader(&out)).unwrap();
            assert_eq!(back == value, levels <= TABLE_NESTING_MAX, "{levels} levels");
        }
    }

    /// Goal: a forged row neither overflows the stack nor asks for memory that it does not fill.
    /// Method: tables nested a million deep; a count of four thousand million.
    #[test]
    fn hostile_values_are_refused() {
        let deep = [[ARRAY, 1, 0, 0, 0]; 1 << 20].concat();
        assert_eq!(read_value(&mut Reader(&deep)), Err(Malformed("a header in it is nested too deep")));
        for kind in [ARRAY, TABLE] {
            let row = [kind, 255, 255, 255, 255, VOID, VOID];
            assert_eq!(read_value(&mut Reader(&row)), Err(Malformed("it ends too early")));
        }
    }
}
