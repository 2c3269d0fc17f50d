//! What travels over the socket between the payment service and the in-process broker: frames of a length (4 bytes,
//! little-endian) and JSON.

use std::io::{self, Read, Write};

use onewrite::{Fault, FaultClass, HeaderValue, Message, Outcome, Outgoing};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest frame, in bytes.
const FRAME_BYTES_MAX: u32 = 32 << 20;

/// One publish, from the payment service.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Publish {
    pub(crate) ticket: u64,
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
    message: Letter,
}

/// The broker's word. `Ready` comes first on each connection, the others once per publish, in order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Word {
    Ready,
    Confirmed { ticket: u64 },
    Nacked { ticket: u64 },
    Returned { ticket: u64, code: u16, text: String },
    Refused { ticket: u64, code: u16, text: String },
}

impl Word {
    /// The ticket and what became of it; `None` for the greeting.
    pub(crate) fn into_outcome(self) -> Option<(u64, Outcome)> {
        let fault = |code, text| Fault::with_code(FaultClass::Destination, code, text);
        Some(match self {
            Self::Ready => return None,
            Self::Confirmed { ticket } => (ticket, Outcome::Confirmed),
            Self::Nacked { ticket } => (ticket, Outcome::Nacked),
            Self::Returned { ticket, code, text } => (ticket, Outcome::Returned(fault(code, text))),
            Self::Refused { ticket, code, text } => (ticket, Outcome::Refused(fault(code, text))),
        })
    }
}

/// A message, as the socket carries it.
#[derive(Debug, Serialize, Deserialize)]
struct Letter {
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

impl Publish {
    pub(crate) fn new(outgoing: &Outgoing) -> Self {
        let message = Message::clone(&outgoing.message);
        let headers = message.headers.into_iter().filter_map(|(name, value)| {
            let value = match value {
                HeaderValue::Text(text) => Header::Text(text),
                HeaderValue::Int(int) => Header::Int(int),
                HeaderValue::Bool(bool) => Header::Bool(bool),
                HeaderValue::Bytes(bytes) => Header::Bytes(bytes),
                _ => return None, // a kind that came after this example
            };
            Some((name, value))
        });
        Self {
            ticket: outgoing.ticket.0,
            exchange: outgoing.exchange.to_string(),
            routing_key: outgoing.routing_key.to_string(),
            message: Letter {
                message_id: message.message_id,
                event_type: message.event_type,
                content_type: message.content_type,
                correlation_id: message.correlation_id,
                app_id: message.app_id,
                timestamp_s: message.timestamp_s,
                headers: headers.collect(),
                payload: message.payload,
            },
        }
    }

    pub(crate) fn into_message(self) -> Message {
        let letter = self.message;
        let headers = letter.headers.into_iter().map(|(name, value)| {
            let value = match value {
                Header::Text(text) => HeaderValue::Text(text),
                Header::Int(int) => HeaderValue::Int(int),
                Header::Bool(bool) => HeaderValue::Bool(bool),
                Header::Bytes(bytes) => HeaderValue::Bytes(bytes),
            };
            (name, value)
        });
        Message {
            message_id: letter.message_id,
            event_type: letter.event_type,
            content_type: letter.content_type,
            correlation_id: letter.correlation_id,
            app_id: letter.app_id,
            timestamp_s: letter.timestamp_s,
            headers: headers.collect(),
            payload: letter.payload,
        }
    }
}

pub(crate) fn write(to: &mut impl Write, frame: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(frame)?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= FRAME_BYTES_MAX);
    let length = length.ok_or_else(|| io::Error::other("the frame is too long"))?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&body)
}

/// The next frame. An end of the connection is an error like any other.
pub(crate) fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::other("the frame is too long"));
    }
    let mut body = vec![0; length as usize];
    from.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}
