//! A message on the socket, with those properties and kinds of headers that the stories use.

use onewrite::{HeaderValue, Message, Text};
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
                HeaderValue::Text(text) => Header::Text(text.into()),
                HeaderValue::Int(int) => Header::Int(int),
                HeaderValue::Bool(bool) => Header::Bool(bool),
                HeaderValue::Bytes(bytes) => Header::Bytes(bytes),
                _ => return None, // a kind that no example sends
            };
            Some((name.into_owned(), value))
        });
        Self {
            message_id: message.message_id.map(String::from),
            event_type: message.event_type.map(String::from),
            content_type: message.content_type.map(String::from),
            correlation_id: message.correlation_id.map(String::from),
            app_id: message.app_id.map(String::from),
            timestamp_s: message.timestamp_s,
            headers: headers.collect(),
            payload: message.payload,
        }
    }

    pub(crate) fn into_message(self) -> Message {
        let headers = self.headers.into_iter().map(|(name, value)| {
            let value = match value {
                Header::Text(text) => HeaderValue::from(text),
                Header::Int(int) => HeaderValue::Int(int),
                Header::Bool(bool) => HeaderValue::Bool(bool),
                Header::Bytes(bytes) => HeaderValue::Bytes(bytes),
            };
            (name.into(), value)
        });
        Message {
            message_id: self.message_id.map(Text::from),
            event_type: self.event_type.map(Text::from),
            content_type: self.content_type.map(Text::from),
            correlation_id: self.correlation_id.map(Text::from),
            app_id: self.app_id.map(Text::from),
            timestamp_s: self.timestamp_s,
            headers: headers.collect(),
            payload: self.payload,
            ..Message::default()
        }
    }
}
