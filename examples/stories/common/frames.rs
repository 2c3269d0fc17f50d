//! The frames on the socket between a service and the in-process broker: a length (4 bytes,
//! little-endian), then JSON.

use std::io::{self, Read, Write};

use onewrite::{Fault, FaultClass, Message, Outcome, Outgoing};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::letter::Letter;

/// Longest frame, in bytes.
const FRAME_BYTES_MAX: u32 = 32 << 20;

/// One publish, from a service.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Publish {
    pub(crate) ticket: u64,
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
    pub(crate) letter: Letter,
}

/// An answer of the broker. `Ready` comes first on each connection. The other answers come once per
/// publish, in order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Word {
    Ready,
    Confirmed { ticket: u64 },
    Nacked { ticket: u64 },
    Returned { ticket: u64, code: u16, text: String },
    Refused { ticket: u64, code: u16, text: String },
}

impl Word {
    /// The ticket and its outcome; `None` for the greeting.
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

impl Publish {
    pub(crate) fn new(outgoing: &Outgoing) -> Self {
        Self {
            ticket: outgoing.ticket.0,
            exchange: outgoing.exchange.to_string(),
            routing_key: outgoing.routing_key.to_string(),
            letter: Letter::new(Message::clone(&outgoing.message)),
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
