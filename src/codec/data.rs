//! A payload as the data of a CloudEvent in JSON.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;

/// A payload in the form that its content type names.
pub(crate) enum Data<'a> {
    /// JSON, on one line.
    Json(Box<RawValue>),
    Text(Cow<'a, str>),
    /// Base64.
    Binary(String),
}

impl<'a> Data<'a> {
    /// Classifies a payload. A payload that is not of the form that its content type names becomes
    /// binary, so nothing is lost.
    pub(crate) fn of(content_type: Option<&str>, payload: &'a [u8]) -> Self {
        let media = Media::of(content_type.unwrap_or_default());
        let text = || str::from_utf8(payload).ok();
        let data = match media {
            Media::Json => json(payload).map(Self::Json),
            Media::Text => text().map(|text| Self::Text(text.into())),
            Media::Binary => None,
        };
        data.unwrap_or_else(|| Self::Binary(STANDARD.encode(payload)))
    }
}

enum Media {
    Json,
    Text,
    Binary,
}

impl Media {
    fn of(content_type: &str) -> Self {
        let mut parts = content_type.split(';').map(|part| part.trim().to_ascii_lowercase());
        let media = parts.next().unwrap_or_default();
        let charset = parts
            .find_map(|part| part.strip_prefix("charset=").map(|name| name.trim_matches('"').to_owned()));
        if !matches!(charset.as_deref(), None | Some("utf-8" | "utf8" | "us-ascii")) {
            return Self::Binary;
        }
        match media.split_once('/') {
            Some((_, subtype)) if subtype == "json" || subtype.ends_with("+json") => Self::Json,
            Some(("text", _)) => Self::Text,
            _ => Self::Binary,
        }
    }
}

/// Returns the same JSON without the whitespace between its parts; `None` if the payload is not
/// JSON. Numbers, and the order of keys, stay the same.
fn json(payload: &[u8]) -> Option<Box<RawValue>> {
    serde_json::from_slice::<&RawValue>(payload).ok()?;
    let (mut in_string, mut escaped) = (false, false);
    let compact = payload.iter().copied().filter(|byte| {
        if in_string {
            let ends = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            in_string = !ends;
            return true;
        }
        in_string = *byte == b'"';
        !byte.is_ascii_whitespace()
    });
    RawValue::from_string(String::from_utf8(compact.collect()).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(content_type: &str, payload: &[u8]) -> String {
        match Data::of(Some(content_type).filter(|name| !name.is_empty()), payload) {
            Data::Json(json) => format!("json {}", json.get()),
            Data::Text(text) => format!("text {text}"),
            Data::Binary(base64) => format!("base64 {base64}"),
        }
    }

    /// Goal: a payload keeps every digit and every byte, in the form of its content type, on one
    /// line. Method: forms of content types, and payloads that match them or do not.
    #[test]
    fn a_payload_takes_the_form_of_its_content_type() {
        for (content_type, payload, shown) in [
            (
                "application/json",
                &b"{\"b\": 1.10,\n \"a\" :\t[ \"x \\\" y\\\\\" , 9007199254740993 ] }"[..],
                r#"json {"b":1.10,"a":["x \" y\\",9007199254740993]}"#,
            ),
            ("Application/CloudEvents+JSON; charset=\"UTF-8\"", b" 1 ", "json 1"),
            ("application/json", b"{", "base64 ew=="),
            ("application/json", b"", "base64 "),
            ("application/json", b"1 2", "base64 MSAy"),
            ("application/json; charset=utf-16", b"1", "base64 MQ=="),
            ("text/plain", "a\n\u{e9}".as_bytes(), "text a\n\u{e9}"),
            ("text/plain", b"\xff", "base64 /w=="),
            ("application/octet-stream", b"1", "base64 MQ=="),
            ("json", b"1", "base64 MQ=="),
            ("", b"1", "base64 MQ=="),
        ] {
            assert_eq!(show(content_type, payload), shown, "{content_type}");
        }
    }
}
