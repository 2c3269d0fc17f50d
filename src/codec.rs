//! Typed payloads: JSON, bincode, raw bytes.
//!
//! Only this module names `serde_json` and `bincode`.
//!
//! bincode is pinned to 2.0.1, its last real release, which is no longer maintained. Its bytes,
//! with the `standard()` configuration, are part of our format and are described in
//! docs/file-format.md.
//!
//! Decoding is bounded: a corrupt length cannot ask for more memory than
//! [`PAYLOAD_BYTES_MAX`](crate::limits::PAYLOAD_BYTES_MAX). Encoding is exact: a silent loss by the
//! format is an error here (`strict.rs`).

#[cfg(feature = "json")]
mod data;
#[cfg(any(feature = "json", feature = "bincode"))]
mod strict;

#[cfg(any(feature = "json", feature = "bincode"))]
use self::strict::{Losses, Watch};
#[cfg(any(feature = "json", feature = "bincode"))]
use crate::error::EventError;

#[cfg(feature = "json")]
pub(crate) use self::data::Data;
/// Why an encoding was refused.
#[cfg(feature = "json")]
pub(crate) use self::strict::Lossy;

/// The content type of a JSON payload.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// let tx = store.begin()?;
/// tx.append(Event::json("paid", &1)?.unpublished())?;
/// assert_eq!(tx.event(0)?.expect("appended above").content_type(), Some(onewrite::codec::JSON));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const JSON: &str = "application/json";
/// The content type of a bincode payload.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// let tx = store.begin()?;
/// tx.append(Event::bincode("paid", &1)?.unpublished())?;
/// assert_eq!(tx.event(0)?.expect("appended above").content_type(), Some(onewrite::codec::BINCODE));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const BINCODE: &str = "application/x-bincode";
/// The content type of a payload of raw bytes.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// let tx = store.begin()?;
/// tx.append(Event::bytes("paid", "1").unpublished())?;
/// assert_eq!(tx.event(0)?.expect("appended above").content_type(), Some(onewrite::codec::BYTES));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const BYTES: &str = "application/octet-stream";

#[cfg(feature = "json")]
pub(crate) fn to_json<T: serde::Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, EventError> {
    // serde_json begins with the same capacity.
    let mut json = Vec::with_capacity(128);
    write_json(&mut json, None, value)?;
    Ok(json)
}

/// Writes a value as JSON. `root` is the value's name in an error.
#[cfg(feature = "json")]
fn write_json<T: serde::Serialize + ?Sized>(
    json: &mut Vec<u8>,
    root: Option<&'static str>,
    value: &T,
) -> Result<(), EventError> {
    const LOSSES: Losses = Losses { non_finite: true, repeated_keys: true, skipped_fields: false };
    let watch = Watch::new(LOSSES);
    let written = serde_json::to_writer(json, &watch.over(value));
    encoded("JSON", watch.lossy(root), written)
}

/// Returns the result of an encoding.
#[cfg(any(feature = "json", feature = "bincode"))]
fn encoded<T, E: std::error::Error + Send + Sync + 'static>(
    format: &'static str,
    lossy: Option<strict::Lossy>,
    result: Result<T, E>,
) -> Result<T, EventError> {
    match (lossy, result) {
        (Some(lossy), _) => Err(EventError::Encode { format, cause: lossy.into() }),
        (None, Ok(value)) => Ok(value),
        (None, Err(error)) => Err(EventError::Encode { format, cause: error.into() }),
    }
}

/// Returns the identity of a map key, for `strict`. As a JSON key, a number is the text of its
/// digits.
#[cfg(feature = "json")]
fn key_bytes<K: serde::Serialize + ?Sized>(key: &K) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_vec(key)?;
    let text = json.strip_prefix(b"\"").and_then(|json| json.strip_suffix(b"\""));
    Ok(text.map_or_else(|| json.clone(), <[u8]>::to_vec))
}

/// bincode refuses a map of unknown length.
#[cfg(all(feature = "bincode", not(feature = "json")))]
fn key_bytes<K: serde::Serialize + ?Sized>(_: &K) -> Result<Vec<u8>, std::fmt::Error> {
    Ok(Vec::new())
}

/// A key as JSON text and, if it is a string, the string itself.
#[cfg(feature = "json")]
#[derive(Debug)]
pub(crate) struct JsonKey {
    pub(crate) json: String,
    pub(crate) string: Option<String>,
}

#[cfg(feature = "json")]
pub(crate) fn json_key<K: serde::Serialize + ?Sized>(key: &K) -> Result<JsonKey, EventError> {
    let mut json = Vec::new();
    write_json(&mut json, Some("key"), key)?;
    let json = String::from_utf8(json)
        .map_err(|error| EventError::Encode { format: "JSON", cause: error.utf8_error().into() })?;
    let string = json.starts_with('"').then(|| serde_json::from_str(&json).ok()).flatten();
    Ok(JsonKey { json, string })
}

/// Writes the payload of a captured change. `key` is JSON already; `old` is `None` unless
/// requested.
#[cfg(feature = "json")]
pub(crate) fn change_to_json<V: serde::Serialize>(
    table: &str,
    key: &str,
    operation: &str,
    new: Option<&V>,
    old: Option<Option<&V>>,
) -> Result<Vec<u8>, EventError> {
    let mut json = b"{\"table\":".to_vec();
    write_json(&mut json, Some("table"), table)?;
    json.extend_from_slice(b",\"key\":");
    json.extend_from_slice(key.as_bytes());
    json.extend_from_slice(b",\"operation\":");
    write_json(&mut json, Some("operation"), operation)?;
    json.extend_from_slice(b",\"new\":");
    write_json(&mut json, Some("new"), &new)?;
    if let Some(old) = old {
        json.extend_from_slice(b",\"old\":");
        write_json(&mut json, Some("old"), &old)?;
    }
    json.push(b'}');
    Ok(json)
}

/// Decodes a JSON payload.
///
/// # Errors
/// [`EventError::Decode`], without the payload in its text.
///
/// ```
/// let amount: u32 = onewrite::codec::from_json(b"100")?;
/// assert_eq!(amount, 100);
/// # Ok::<(), onewrite::EventError>(())
/// ```
#[cfg(feature = "json")]
pub fn from_json<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, EventError> {
    serde_json::from_slice(payload).map_err(|error| {
        // serde_json quotes the offending value in its message. The error keeps the place and drops
        // the value.
        let place =
            format!("{:?} error at line {} column {}", error.classify(), error.line(), error.column());
        EventError::Decode { format: "JSON", cause: place.into() }
    })
}

#[cfg(feature = "bincode")]
const LIMIT: usize = crate::limits::PAYLOAD_BYTES_MAX;

#[cfg(feature = "bincode")]
fn config() -> bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<LIMIT>,
> {
    bincode::config::standard().with_limit::<LIMIT>()
}

#[cfg(feature = "bincode")]
pub(crate) fn to_bincode<T: serde::Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, EventError> {
    const LOSSES: Losses = Losses { non_finite: false, repeated_keys: false, skipped_fields: true };
    let watch = Watch::new(LOSSES);
    let bytes = bincode::serde::encode_to_vec(watch.over(value), config());
    encoded("bincode", watch.lossy(None), bytes)
}

/// Decodes a bincode payload. Trailing bytes are an error.
///
/// # Errors
/// [`EventError::Decode`], without the payload in its text.
///
/// ```
/// let error = onewrite::codec::from_bincode::<u8>(&[1, 2]).unwrap_err();
/// assert_eq!(error.to_string(), "the payload cannot be decoded as bincode: 1 bytes trail the value");
/// ```
#[cfg(feature = "bincode")]
pub fn from_bincode<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, EventError> {
    let decode_error = |source| EventError::Decode { format: "bincode", cause: source };
    let (value, used) = bincode::serde::decode_from_slice(payload, config())
        .map_err(|error| decode_error(Box::new(error)))?;
    match payload.len() - used {
        0 => Ok(value),
        trailing => Err(decode_error(format!("{trailing} bytes trail the value").into())),
    }
}
