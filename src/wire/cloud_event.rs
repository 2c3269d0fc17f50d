//! A recorded event as a CloudEvent in JSON, for files, HTTP and logs. On AMQP its attributes are
//! headers.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{LATEST_MS, twenty_digits};
use crate::codec::Data;
use crate::error::SettingError;
use crate::event::RecordedEvent;
use crate::message::HeaderValue;
use crate::time::wall_time;

/// The longest attribute name that every implementation must accept.
const NAME_BYTES_MAX: usize = 20;

/// A recorded event as a [CloudEvent](https://cloudevents.io) 1.0. Serialize it with serde_json
/// only: the data is copied in its raw form, which other formats cannot do.
///
/// The attributes are those on the wire (module [`wire`](crate::wire)). The attributes
/// `correlationid`, `contentencoding` and `expirytime` are added, and, if the event has them,
/// `onewritestream`, `onewriterevision` and `onewriteversion`. The lane is left out.
///
/// A header of the application becomes an attribute if its name has at most 20 lower-case letters
/// and digits. Its value must also be a text, a boolean or an integer of 32 bits. Other headers are
/// left out.
///
/// The payload is in `data` if its content type says JSON or text and the payload is that.
/// Otherwise it is Base64 in `data_base64`. JSON loses the whitespace between its parts, so one
/// event is one line.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::Event;
/// store.write(|tx| tx.append(Event::json("paid", &100)?.id("p-1").key("alice").to_queue("payments")))?;
/// let event = store.read()?.event(0)?.expect("appended above");
/// let json = serde_json::to_value(event.to_cloud_event("/bank")?)?;
/// assert_eq!((&json["type"], &json["data"]), (&"paid".into(), &100.into()));
/// assert_eq!((&json["source"], &json["partitionkey"]), (&"/bank".into(), &"alice".into()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct CloudEvent<'a> {
    event: &'a RecordedEvent,
    source: &'a str,
}

impl RecordedEvent {
    /// Returns the event as a CloudEvent of this source, which serde_json writes. The source is a
    /// URI reference such as `/services/ledger`, like the [source of a
    /// relay](crate::RelayBuilder::source).
    ///
    /// # Errors
    /// [`SettingError`] if the source is empty.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("paid", vec![0xff]).id("p-1").unpublished()))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// let line = serde_json::to_string(&event.to_cloud_event("/bank")?)?;
    /// assert!(line.starts_with(r#"{"specversion":"1.0","id":"p-1","source":"/bank","type":"paid""#));
    /// assert!(line.ends_with(r#""data_base64":"/w=="}"#));
    /// assert!(event.to_cloud_event("").is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn to_cloud_event<'a>(&'a self, source: &'a str) -> Result<CloudEvent<'a>, SettingError> {
        if source.is_empty() {
            return Err(SettingError::new("source", "it is empty"));
        }
        Ok(CloudEvent { event: self, source })
    }
}

impl Serialize for CloudEvent<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { event: recorded, source } = *self;
        let event = &recorded.event;
        let stream = recorded.stream();
        let attributes = [
            ("specversion", Some("1.0".into())),
            ("id", Some(recorded.id.to_string())),
            ("source", Some(source.to_owned())),
            ("type", Some(event.event_type.to_string())),
            ("time", Some(rfc3339(recorded.time_ms))),
            ("subject", recorded.subject().map(str::to_owned)),
            ("datacontenttype", recorded.content_type().map(str::to_owned)),
            ("partitionkey", recorded.key().map(str::to_owned)),
            ("sequence", Some(twenty_digits(recorded.seq).to_string())),
            ("traceparent", recorded.traceparent().map(str::to_owned)),
            ("tracestate", recorded.tracestate().map(str::to_owned)),
            ("expirytime", event.expires_ms.map(rfc3339)),
            ("correlationid", event.correlation_id.as_ref().map(ToString::to_string)),
            ("contentencoding", recorded.properties().content_encoding.as_ref().map(ToString::to_string)),
            ("onewritestream", stream.map(str::to_owned)),
            (
                "onewriterevision",
                recorded.revision.filter(|_| stream.is_some()).map(|number| number.to_string()),
            ),
            (
                "onewriteversion",
                Some(event.version).filter(|version| *version != 1).map(|number| number.to_string()),
            ),
        ];
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in &attributes {
            if let Some(value) = value {
                map.serialize_entry(name, value)?;
            }
        }
        let mut names: Vec<&str> = attributes.iter().map(|(name, _)| *name).collect();
        for (name, value) in &event.headers {
            if !is_attribute(name) || names.contains(&name.as_str()) {
                continue;
            }
            match (value, value.as_int().map(i32::try_from)) {
                (HeaderValue::Text(text), _) => map.serialize_entry(name, &**text)?,
                (HeaderValue::Bool(bool), _) => map.serialize_entry(name, bool)?,
                (_, Some(Ok(int))) => map.serialize_entry(name, &int)?,
                _ => continue,
            }
            names.push(name);
        }
        match Data::of(recorded.content_type(), recorded.payload()) {
            Data::Json(json) => map.serialize_entry("data", &json)?,
            Data::Text(text) => map.serialize_entry("data", &text)?,
            Data::Binary(base64) => map.serialize_entry("data_base64", &base64)?,
        }
        map.end()
    }
}

/// Formats a time. A time after the year 9999 becomes the last of that year, because RFC 3339 has
/// four digits for it.
fn rfc3339(time_ms: u64) -> String {
    humantime::format_rfc3339_millis(wall_time(time_ms.min(LATEST_MS))).to_string()
}

/// Whether the application may use the name for an attribute.
fn is_attribute(name: &str) -> bool {
    let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(is_name)
        && !["data", "dataschema"].contains(&name)
}
