//! A message, as the socket carries it.

use onewrite::{HeaderValue, Message};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Letter {
    message_id: Option<String>,
    event_type: Option<String>,
    content_type: Option<String>,
    correlation_id: Option<String>,
    app_id: Option<String>,
    timestamp_s: Option<u64>,
    headers: Vec<(String, Header)>,
    payload: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Header {
    Text(String),
    Int(i64),
    Bool(bool),
    Bytes(Vec<u8>),
}

impl Letter {
    pub(crate) fn new(message: Message) -> Self {
        let headers = message.headers.into_iter().filter_map(|(name, value)| {
            let value = match value {
                HeaderValue::Text(text) => Header::Text(text),
                HeaderValue::Int(int) => Header::Int(int),
                HeaderValue::Bool(bool) => Header::Bool(bool),
                HeaderValue::Bytes(bytes) => Header::Bytes(bytes),
                _ => return None, // a kind that came after this example
            };
            Some((name.into_owned(), value))
        });
        Self {
            message_id: message.message_id,
            event_type: message.event_type,
            content_type: message.content_type,
            correlation_id: message.correlation_id,
            app_id: message.app_id,
            timestamp_s: message.timestamp_s,
            headers: headers.collect(),
            payload: message.payload,
        }
    }

    pub(crate) fn into_message(self) -> Message {
        let headers = self.headers.into_iter().map(|(name, value)| {
            let value = match value {
                Header::Text(text) => HeaderValue::Text(text),
                Header::Int(int) => HeaderValue::Int(int),
                Header::Bool(bool) => HeaderValue::Bool(bool),
                Header::Bytes(bytes) => HeaderValue::Bytes(bytes),
            };
            (name.into(), value)
        });
        Message {
            message_id: self.message_id,
            event_type: self.event_type,
            content_type: self.content_type,
            correlation_id: self.correlation_id,
            app_id: self.app_id,
            timestamp_s: self.timestamp_s,
            headers: headers.collect(),
            payload: self.payload,
        }
    }
}
