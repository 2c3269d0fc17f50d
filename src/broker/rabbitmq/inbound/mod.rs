//! The bytes from the broker, frame by frame, before the client library sees them.
//!
//! lapin's decoder trusts its input. A header table nested some hundred levels deep overflows its
//! stack and ends the process. Text that is not UTF-8 ends the connection, and the broker then
//! delivers the same message first, for ever. So each frame passes through here: a sound frame
//! unchanged, any other frame as a sound one. A header of its own ([`MENDED`](crate::wire::MENDED),
//! [`UNREADABLE`](crate::wire::UNREADABLE)) then tells what was wrong. Returned messages go to
//! [`Returns`] instead.
//!
//! **Invariants.** No socket and no clock. All output is whole frames that lapin can read, or the
//! beginning of a body frame. At most one method or header frame, of a bounded length, is collected
//! at a time.

mod deliveries;
mod header;
mod notes;
mod reader;
mod returns;
mod table;
#[cfg(test)]
mod tests;
mod text;

use std::borrow::Cow;
use std::task::Context;

use crc32fast::Hasher;

use crate::limits::{BODY_BYTES_ANNOUNCED_MAX, CONTENT_HEADER_BYTES_MAX, FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use crate::message::VALUE_BYTES;

use self::deliveries::Came;
pub(super) use self::deliveries::Deliveries;
use self::header::Header;
use self::notes::Notes;
use self::reader::Reader;
pub(super) use self::returns::{Returned, Returns};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
/// A frame that only shows that the broker lives.
pub(super) const HEARTBEAT_FRAME: [u8; FRAME_OVERHEAD] = [HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END];
/// The first byte, and the length, of the answer of a server that speaks another version.
const PROTOCOL: u8 = b'A';
const PROTOCOL_HEADER: usize = 8;
/// The byte after each frame.
const FRAME_END: u8 = 0xce;
/// Kind, channel, length.
const FRAME_HEAD: usize = 7;
const FRAME_OVERHEAD: usize = FRAME_HEAD + 1;

const CONNECTION_START: (u16, u16) = (10, 10);
const CONNECTION_TUNE: (u16, u16) = (10, 30);
const CONNECTION_CLOSE: (u16, u16) = (10, 50);
const CONNECTION_BLOCKED: (u16, u16) = (10, 60);
const CHANNEL_CLOSE: (u16, u16) = (20, 40);
const BASIC_RETURN: (u16, u16) = (60, 50);
const BASIC_DELIVER: (u16, u16) = (60, 60);
const BASIC_GET_OK: (u16, u16) = (60, 71);

/// The login that this library supports.
const PLAIN: &[u8] = b"PLAIN";

/// The words about a message that ends the connection.
pub(super) const NOT_TAKEN_IN: &str = "cannot be taken in";

/// The reason why nothing more of this connection is handed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Waiting does not heal the fault.
    #[error("{0}")]
    ForGood(String),
    /// The connection or the peer is broken.
    #[error("{0}")]
    Broken(String),
}

fn broken(text: impl Into<String>) -> Refused {
    Refused::Broken(text.into())
}

/// The position in the stream.
#[derive(Debug)]
enum At {
    /// Collecting a frame's head, or a whole method or header frame.
    Frame(Vec<u8>),
    /// In a body frame that is handed on, or dropped, as it comes; `left` counts the frame's end.
    Body { channel: u16, left: usize, dropped: bool },
    /// The server speaks another version, and lapin reports that. Nothing follows.
    Other,
}

/// The reader of one connection's frames.
#[derive(Debug)]
pub(super) struct Inbound {
    at: At,
    /// Nothing has come yet.
    fresh: bool,
    /// The agreed size of a frame, in bytes.
    frame_bytes_max: usize,
    body_bytes_max: u64,
    /// Faults in the routing of the message whose header comes next, by channel.
    noted: Vec<(u16, Notes)>,
    dropping: Vec<Dropped>,
    /// Returned messages whose header comes next, by channel.
    returning: Vec<(u16, Returned)>,
    /// Channels whose next header is of a delivery, and whether the consumer takes the delivery.
    delivering: Vec<(u16, bool)>,
    /// The bytes of the current delivery's body that are still to come.
    body_left: u64,
    returns: Returns,
    deliveries: Deliveries,
}

/// A message whose body is dropped as it comes.
#[derive(Debug)]
struct Dropped {
    channel: u16,
    left: u64,
    of: DroppedOf,
}

#[derive(Debug)]
enum DroppedOf {
    /// The body is too long. The header is handed on after the whole body, with the body's
    /// checksum. The checksum distinguishes two messages that differ only in their bodies.
    Delivery { head: Head, header: Vec<u8>, notes: Notes, checksum: Hasher },
    /// The body is known, because this library sent it.
    Returned(Returned),
    /// The consumer takes nothing more.
    Unwanted,
}

impl Inbound {
    /// Drops bodies of more than `body_bytes_max` bytes; their messages come without a body.
    /// Returned messages go to `returns`. More deliveries than `deliveries` allows are refused.
    pub(super) fn new(body_bytes_max: u64, returns: Returns, deliveries: Deliveries) -> Self {
        Self {
            at: At::Frame(Vec::new()),
            fresh: true,
            frame_bytes_max: FRAME_BYTES_MAX as usize,
            body_bytes_max,
            noted: Vec::new(),
            dropping: Vec::new(),
            returning: Vec::new(),
            delivering: Vec::new(),
            body_left: 0,
            returns,
            deliveries,
        }
    }

    /// Takes bytes from the broker and appends to `out` what lapin may see.
    pub(super) fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Refused> {
        while !bytes.is_empty() {
            match &mut self.at {
                At::Other => return Ok(()),
                At::Body { channel, left, dropped } => {
                    let (now, later) = bytes.split_at(bytes.len().min(*left));
                    bytes = later;
                    *left -= now.len();
                    let (channel, left, dropped) = (*channel, *left, *dropped);
                    // The frame's end is not part of the body.
                    let part = if left == 0 { now.split_last().map_or(now, |(_, part)| part) } else { now };
                    self.body_left = self.body_left.saturating_sub(part.len() as u64);
                    if dropped {
                        self.drop_part(channel, part, left == 0, out)?;
                    } else {
                        out.extend_from_slice(now);
                    }
                    if left == 0 {
                        self.at = At::Frame(Vec::new());
                    }
                }
                At::Frame(frame) => {
                    let is_other = self.fresh && frame.first() == Some(&PROTOCOL);
                    let wanted = if is_other { PROTOCOL_HEADER } else { wanted(frame) };
                    let (now, later) = bytes.split_at(bytes.len().min(wanted - frame.len()));
                    frame.extend_from_slice(now);
                    bytes = later;
                    if frame.len() == wanted {
                        self.collected(out)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Handles a complete head or a complete frame.
    fn collected(&mut self, out: &mut Vec<u8>) -> Result<(), Refused> {
        let At::Frame(frame) = &mut self.at else { return Ok(()) };
        if self.fresh && frame.first() == Some(&PROTOCOL) {
            // Seven bytes of a protocol header decide nothing.
            if frame.len() == PROTOCOL_HEADER {
                out.append(frame);
                self.at = At::Other;
            }
            return Ok(());
        }
        self.fresh = false;
        let Some(head) = Head::read(frame) else { return Ok(()) };
        if frame.len() == FRAME_HEAD {
            return self.begin(head, out);
        }
        if frame.last() != Some(&FRAME_END) {
            return Err(broken("a frame of the broker does not end where it should"));
        }
        let mut frame = std::mem::take(frame);
        match head.kind {
            METHOD => self.method(head, &mut frame)?,
            HEADER => self.header(head, &mut frame)?,
            _ => {}
        }
        out.extend_from_slice(&frame);
        // The buffer is reused for the next frame.
        frame.clear();
        self.at = At::Frame(frame);
        Ok(())
    }

    /// Checks the length in a frame's head, and decides what happens to the rest.
    fn begin(&mut self, head: Head, out: &mut Vec<u8>) -> Result<(), Refused> {
        let max = match head.kind {
            METHOD => FRAME_BYTES_MAX as usize,
            HEADER => CONTENT_HEADER_BYTES_MAX,
            BODY => self.frame_bytes_max,
            HEARTBEAT => FRAME_OVERHEAD,
            kind => return Err(broken(format!("the broker sent a frame of the unknown kind {kind}"))),
        };
        if head.len + FRAME_OVERHEAD > max {
            let len = head.len + FRAME_OVERHEAD;
            let what = match head.kind {
                METHOD => "a method",
                HEADER => {
                    return Err(broken(format!(
                        "a message {NOT_TAKEN_IN}: its headers are a frame of {len} bytes, {max} at most are"
                    )));
                }
                BODY => "a part of a body",
                _ => "a heartbeat",
            };
            return Err(broken(format!("the broker sent {what} in a frame of {len} bytes; {max} may come")));
        }
        if head.kind == BODY {
            let dropped = self.dropping.iter_mut().find(|dropped| dropped.channel == head.channel);
            if dropped.as_ref().is_some_and(|dropped| dropped.left < head.len as u64) {
                return Err(broken("the broker sent a body that is longer than its header says"));
            }
            let dropped = dropped.is_some();
            if !dropped && let At::Frame(frame) = &self.at {
                out.extend_from_slice(frame);
            }
            self.at = At::Body { channel: head.channel, left: head.len + 1, dropped };
        } else if self.dropping.iter().any(|dropped| dropped.channel == head.channel) {
            return Err(broken("the broker sent another frame in the middle of a body"));
        }
        Ok(())
    }

    /// Drops a part of a body. The last part of a delivery brings the message's header.
    fn drop_part(
        &mut self,
        channel: u16,
        part: &[u8],
        ends_frame: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        let Some(at) = self.dropping.iter().position(|dropped| dropped.channel == channel) else {
            return Ok(());
        };
        let Some(dropped) = self.dropping.get_mut(at) else { return Ok(()) };
        if let DroppedOf::Delivery { checksum, .. } = &mut dropped.of {
            checksum.update(part);
        }
        dropped.left -= part.len() as u64;
        if dropped.left > 0 || !ends_frame {
            return Ok(());
        }
        match self.dropping.swap_remove(at).of {
            DroppedOf::Returned(returned) => self.has_returned(channel, returned),
            DroppedOf::Unwanted => Ok(()),
            DroppedOf::Delivery { head, header, mut notes, checksum } => {
                let Some(header) = Header::read(&header) else { return Ok(()) };
                notes.lost(format_args!(
                    "its body of {} bytes (CRC-32 {:08x}) is left out: at most {} are taken in",
                    header.body_bytes,
                    checksum.finalize(),
                    self.body_bytes_max
                ));
                out.extend_from_slice(&head.with(&header.mend(0, self.payload_bytes_max(), notes)));
                Ok(())
            }
        }
    }

    fn has_returned(&self, channel: u16, returned: Returned) -> Result<(), Refused> {
        self.returns
            .push(channel, returned)
            .map_err(|()| broken("the broker returned more messages than are in flight"))
    }

    /// The largest payload of one frame, as agreed.
    fn payload_bytes_max(&self) -> usize {
        self.frame_bytes_max.saturating_sub(FRAME_OVERHEAD)
    }

    fn method(&mut self, head: Head, frame: &mut Vec<u8>) -> Result<(), Refused> {
        let payload = head.payload(frame);
        let mut reader = Reader::new(payload);
        let (Some(class), Some(method)) = (reader.u16(), reader.u16()) else { return Ok(()) };
        if self.returning.iter().any(|(channel, _)| *channel == head.channel) {
            return Err(broken("the broker sent a returned message without its header"));
        }
        let texts: &[Field] = match (class, method) {
            CONNECTION_START => return start(head, frame),
            CONNECTION_TUNE => {
                let (_channels, bytes) = (reader.u16(), reader.u32());
                if let Some(bytes) = bytes.filter(|bytes| (1..FRAME_BYTES_MIN).contains(bytes)) {
                    return Err(Refused::ForGood(format!(
                        "the broker allows frames of {bytes} bytes (`frame_max`); {FRAME_BYTES_MIN} or more are needed"
                    )));
                }
                if let Some(bytes) = bytes.filter(|bytes| (1..FRAME_BYTES_MAX).contains(bytes)) {
                    self.frame_bytes_max = bytes as usize;
                }
                return Ok(());
            }
            CONNECTION_CLOSE | CHANNEL_CLOSE => &[Field::Skip(2), Field::Text("reply text")],
            CONNECTION_BLOCKED => &[Field::Text("reason")],
            BASIC_RETURN => {
                let (code, text, exchange, key) =
                    (reader.u16(), reader.short(), reader.short(), reader.short());
                let (Some(code), Some(text), Some(exchange), Some(key)) = (code, text, exchange, key) else {
                    return Err(broken("the broker sent a return that cannot be read"));
                };
                self.returning.push((head.channel, Returned::new(code, text, exchange, key)));
                frame.clear();
                return Ok(());
            }
            BASIC_DELIVER => {
                let came = self.deliveries.came();
                self.delivering.retain(|(channel, _)| *channel != head.channel);
                self.delivering.push((head.channel, came == Came::Wanted));
                match came {
                    Came::Wanted => {}
                    Came::Unwanted => {
                        frame.clear();
                        return Ok(());
                    }
                    Came::TooMany => {
                        return Err(broken(format!(
                            "the broker delivered more than the {} messages that were asked for",
                            self.deliveries.max()
                        )));
                    }
                }
                &[
                    Field::Text("consumer tag"),
                    Field::Skip(9),
                    Field::Text("exchange"),
                    Field::Text("routing key"),
                ]
            }
            BASIC_GET_OK => &[Field::Skip(9), Field::Text("exchange"), Field::Text("routing key")],
            _ => return Ok(()),
        };
        // Notes on a message whose header never came belong to no message any more.
        self.noted.retain(|(channel, _)| *channel != head.channel);
        let (mended, notes) = mend_texts(reader.rest(), texts);
        if let Some(arguments) = mended {
            let mut payload = frame.get(FRAME_HEAD..FRAME_HEAD + 4).unwrap_or_default().to_vec();
            payload.extend_from_slice(&arguments);
            *frame = head.with(&payload);
            if class == BASIC_DELIVER.0 {
                self.noted.push((head.channel, notes));
            }
        }
        Ok(())
    }

    fn header(&mut self, head: Head, frame: &mut Vec<u8>) -> Result<(), Refused> {
        if let Some(at) = self.returning.iter().position(|(channel, _)| *channel == head.channel) {
            let (channel, returned) = self.returning.swap_remove(at);
            let begun = self.returned_header(channel, returned, head.payload(frame));
            frame.clear();
            return begun;
        }
        let at = self.delivering.iter().position(|(channel, _)| *channel == head.channel);
        // The header of a fetched message belongs to no delivery.
        let delivery = at.map(|at| self.delivering.swap_remove(at).1);
        if delivery == Some(false) {
            let begun = self.unwanted_header(head.channel, head.payload(frame));
            frame.clear();
            return begun;
        }
        let notes = match self.noted.iter().position(|(channel, _)| *channel == head.channel) {
            Some(at) => self.noted.swap_remove(at).1,
            None => Notes::default(),
        };
        // lapin complains of a malformed header, which holds nothing that nests.
        let Some(header) = Header::read(head.payload(frame)) else { return Ok(()) };
        if header.body_bytes > BODY_BYTES_ANNOUNCED_MAX {
            let len = header.body_bytes;
            return Err(broken(format!(
                "a message {NOT_TAKEN_IN}: its body is announced with {len} bytes, and RabbitMQ has none over {BODY_BYTES_ANNOUNCED_MAX}"
            )));
        }
        let is_kept = header.body_bytes <= self.body_bytes_max;
        if delivery.is_some() {
            let body_bytes = if is_kept { header.body_bytes } else { 0 };
            let in_memory = head.len as u64 + (header.values() * VALUE_BYTES) as u64;
            self.deliveries.announced(body_bytes.saturating_add(in_memory));
            // Also for a dropped body: its header is handed on after it.
            self.body_left = header.body_bytes;
        }
        if !is_kept {
            let (left, header) = (header.body_bytes, head.payload(frame).to_vec());
            let of = DroppedOf::Delivery { head, header, notes, checksum: Hasher::new() };
            self.dropping.push(Dropped { channel: head.channel, left, of });
            frame.clear();
            return Ok(());
        }
        if notes.is_empty() && header::fits(head.len, self.frame_bytes_max) && header.is_sound() {
            return Ok(());
        }
        *frame = head.with(&header.mend(header.body_bytes, self.payload_bytes_max(), notes));
        Ok(())
    }

    /// Handles the header of a delivery that the consumer no longer takes: its body is dropped.
    fn unwanted_header(&mut self, channel: u16, payload: &[u8]) -> Result<(), Refused> {
        let bytes = Header::read(payload).map_or(0, |header| header.body_bytes);
        if bytes > BODY_BYTES_ANNOUNCED_MAX {
            return Err(broken("the broker announced a body that is longer than any can be"));
        }
        if bytes > 0 {
            self.dropping.push(Dropped { channel, left: bytes, of: DroppedOf::Unwanted });
        }
        Ok(())
    }

    /// How much may be read now. A delivery that has begun is read to its end. `None` means
    /// nothing, until the task of `cx` is woken. Everything handed on is then whole frames.
    pub(super) fn room(&self, cx: &Context<'_>) -> Option<usize> {
        if self.deliveries.have_room(cx) {
            return Some(usize::MAX);
        }
        match self.at {
            At::Body { left, .. } => Some(left),
            At::Frame(ref frame) if self.body_left > 0 => Some(wanted(frame) - frame.len()),
            _ => None,
        }
    }

    /// Handles the header of a returned message, which names the message.
    fn returned_header(
        &mut self,
        channel: u16,
        mut returned: Returned,
        payload: &[u8],
    ) -> Result<(), Refused> {
        let Some(header) = Header::read(payload) else {
            return Err(broken("the broker sent a returned message whose header cannot be read"));
        };
        returned.id = String::from_utf8_lossy(header.message_id().unwrap_or_default()).into_owned();
        if header.body_bytes == 0 {
            return self.has_returned(channel, returned);
        }
        // The reader waits for the end of the body, so the end must not be far.
        if header.body_bytes > BODY_BYTES_ANNOUNCED_MAX {
            return Err(broken("the broker returned a message with a body that is longer than any can be"));
        }
        let of = DroppedOf::Returned(returned);
        self.dropping.push(Dropped { channel, left: header.body_bytes, of });
        Ok(())
    }
}

/// The number of bytes to collect first for this frame: its head, and then all of it.
fn wanted(frame: &[u8]) -> usize {
    Head::read(frame).map_or(FRAME_HEAD, |head| FRAME_OVERHEAD + head.len)
}

/// Checks the greeting. Its table may be nested too deep for lapin. lapin would also send the
/// password to a server that does not ask for it.
fn start(head: Head, frame: &mut Vec<u8>) -> Result<(), Refused> {
    let mut reader = Reader::new(head.payload(frame));
    let (_method, version) = (reader.u32(), reader.take(2));
    let (Some(version), Some(properties), Some(mechanisms)) = (version, reader.long(), reader.long()) else {
        return Ok(());
    };
    if !mechanisms.split(|byte| *byte == b' ').any(|mechanism| mechanism == PLAIN) {
        return Err(Refused::ForGood(format!(
            "the broker does not offer the login PLAIN, but `{}`; no password was sent",
            text::shown(mechanisms)
        )));
    }
    if table::is_sound(properties) {
        return Ok(());
    }
    let entries = table::mend(properties, &mut Notes::default()).concat();
    let mut payload = frame.get(FRAME_HEAD..FRAME_HEAD + 4).unwrap_or_default().to_vec();
    payload.extend_from_slice(version);
    payload.extend_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_be_bytes());
    payload.extend_from_slice(&entries);
    payload.extend_from_slice(&u32::try_from(mechanisms.len()).unwrap_or(u32::MAX).to_be_bytes());
    payload.extend_from_slice(mechanisms);
    payload.extend_from_slice(reader.rest());
    *frame = head.with(&payload);
    Ok(())
}

/// One argument of a method.
#[derive(Clone, Copy)]
enum Field {
    Skip(usize),
    Text(&'static str),
}

/// Returns the arguments with their text fields mended, if any field is not text.
fn mend_texts(arguments: &[u8], fields: &[Field]) -> (Option<Vec<u8>>, Notes) {
    let mut notes = Notes::default();
    let mut reader = Reader::new(arguments);
    let mut mended = Vec::new();
    for field in fields {
        match *field {
            Field::Skip(len) => match reader.take(len) {
                Some(bytes) => mended.extend_from_slice(bytes),
                // lapin reports this fault.
                None => return (None, Notes::default()),
            },
            Field::Text(name) => {
                let Some(bytes) = reader.short() else { return (None, Notes::default()) };
                let text = text::mended(bytes);
                if matches!(text, Cow::Owned(_)) {
                    notes.lost(format_args!("its {name} `{}` is not UTF-8", text::shown(bytes)));
                }
                mended.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
                mended.extend_from_slice(&text);
            }
        }
    }
    if notes.is_empty() {
        return (None, notes);
    }
    mended.extend_from_slice(reader.rest());
    (Some(mended), notes)
}

/// The head of a frame.
#[derive(Debug, Clone, Copy)]
struct Head {
    kind: u8,
    channel: u16,
    /// Length of the payload, in bytes.
    len: usize,
}

impl Head {
    fn read(frame: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(frame);
        let (kind, channel, len) = (reader.u8()?, reader.u16()?, reader.u32()?);
        Some(Self { kind, channel, len: usize::try_from(len).ok()? })
    }

    /// The payload of a complete frame.
    fn payload(self, frame: &[u8]) -> &[u8] {
        frame.get(FRAME_HEAD..FRAME_HEAD + self.len).unwrap_or_default()
    }

    /// Returns a frame of the same kind and channel with another payload.
    fn with(self, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(payload.len() + FRAME_OVERHEAD);
        frame.push(self.kind);
        frame.extend_from_slice(&self.channel.to_be_bytes());
        frame.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
        frame.extend_from_slice(payload);
        frame.push(FRAME_END);
        frame
    }
}

/// Feeds the fuzz target's bytes in pieces. Returns the output up to a refusal.
#[cfg(fuzzing)]
pub(crate) fn frames_of_a_broker(bytes: &[u8], piece: usize) -> Vec<u8> {
    let (mut inbound, mut out) =
        (Inbound::new(64, Returns::of_a_publisher(), Deliveries::at_most(256, 1 << 20)), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        if inbound.feed(piece, &mut out).is_err() {
            break;
        }
    }
    out
}
