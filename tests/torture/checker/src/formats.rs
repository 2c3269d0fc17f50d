//! The files that a run leaves for the judge: histories, the tap's messages, the description of the run.
//!
//! A history is lines of `crc32 json`; the tap's file is frames of `length u32, crc32 u32, bytes`. A process may be killed in
//! the middle of a line or a frame, so the last one may be cut; anything else that fails its check is an error.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The exchanges that events go to are `x.0`, `x.1` …
pub const EXCHANGES: u8 = 3;
/// The routing key of all of them.
pub const ROUTING_KEY: &str = "r";

/// The exchange of this number.
#[must_use]
pub fn exchange(to: u8) -> String {
    format!("x.{to}")
}

/// An event that a writer is about to append.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// Its number in this application; the payload begins with the application's name and it.
    pub n: u64,
    /// Its ordering key.
    pub key: Option<String>,
    /// The number of its exchange.
    pub to: u8,
    /// Bytes of its payload.
    pub len: u32,
    /// CRC-32 of its payload.
    pub crc: u32,
    /// The broker will never take it: it must end in quarantine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub poison: bool,
}

/// A line of a history. The intent is on disk before the write is called, its answer follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// A write is about to be called. The same intent again is a retry of a write whose answer is not known.
    Intent {
        batch: u64,
        /// How it is written; for people.
        kind: String,
        /// Whether the same transaction puts a row of the application's own.
        row: bool,
        /// The stream that its events are of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stream: Option<String>,
        events: Vec<Planned>,
    },
    /// The write returned `Ok`: these are the sequence numbers of its events, in order.
    Ok { batch: u64, seqs: Vec<u64> },
    /// The write returned an error that says that nothing was written.
    No { batch: u64, why: String },
    /// The write returned an error that leaves its outcome open.
    Unknown { batch: u64, why: String },
}

/// What the conductor leaves in `run.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub seed: u64,
    pub apps: Vec<String>,
    /// Those among them whose log is never trimmed.
    pub keep_logs: Vec<String>,
    pub consumer: String,
    pub app_kills: u64,
    pub broker_kills: u64,
    pub faults: u64,
}

/// The payload of an event: its name, and letters that follow from it.
#[must_use]
pub fn payload(app: &str, n: u64, len: u32) -> Vec<u8> {
    let mut out = format!("{app} {n} ").into_bytes();
    let mut state = n ^ 0x9e37_79b9_7f4a_7c15;
    while out.len() < len as usize {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.push(b'a' + u8::try_from((state >> 59) % 26).unwrap_or(0));
    }
    out
}

/// The application and the number that a payload names.
#[must_use]
pub fn name_in(payload: &[u8]) -> Option<(&str, u64)> {
    let mut parts = payload.splitn(3, |byte| *byte == b' ');
    let app = std::str::from_utf8(parts.next()?).ok()?;
    let n = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    parts.next().map(|_| (app, n))
}

/// A history that is being written.
#[derive(Debug)]
pub struct History(File);

impl History {
    /// A new file.
    ///
    /// # Errors
    /// What the system says; also if the file is there.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self(File::options().create_new(true).append(true).open(path)?))
    }

    /// Hands one line to the system: it survives this process, not the machine.
    ///
    /// # Errors
    /// What the system says.
    pub fn line(&mut self, line: &Line) -> io::Result<()> {
        let json = serde_json::to_string(line)?;
        let text = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        self.0.write_all(text.as_bytes())
    }

    /// Everything so far is on disk.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Reads a history. A last line that is cut is left out.
///
/// # Errors
/// A line that is not whole but the last, or that cannot be read.
pub fn read_history(path: &Path, mut each: impl FnMut(Line)) -> io::Result<()> {
    let mut reader = BufReader::new(File::open(path)?);
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        if reader.read_until(b'\n', &mut text)? == 0 {
            break;
        }
        let damaged = || io::Error::other(format!("{}: line {number} is damaged", path.display()));
        if text.pop() != Some(b'\n') {
            break;
        }
        let (crc, json) = text.split_at_checked(9).ok_or_else(damaged)?;
        if format!("{:08x} ", crc32fast::hash(json)).as_bytes() != crc {
            return Err(damaged());
        }
        each(serde_json::from_slice(json)?);
    }
    Ok(())
}

/// A message as the broker delivered it to the tap.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TapMessage {
    pub exchange: String,
    pub routing_key: String,
    pub message_id: String,
    /// Headers of the library; empty or `u64::MAX` where there is none of the right kind.
    pub store: String,
    pub epoch: u64,
    pub lane: u64,
    pub lane_number: u64,
    pub crc: u64,
    pub sequence: u64,
    pub key: Option<String>,
    pub resend: bool,
    pub redelivered: bool,
    pub body: Vec<u8>,
}

impl TapMessage {
    /// As a frame of the tap's file.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let begin = out.len();
        out.extend_from_slice(&[0; 8]);
        let key = self.key.as_deref().unwrap_or_default();
        for text in [&self.exchange, &self.routing_key, &self.message_id, &self.store, key] {
            out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        for number in [self.epoch, self.lane, self.lane_number, self.crc, self.sequence] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend([self.key.is_some(), self.resend, self.redelivered].map(u8::from));
        out.extend_from_slice(&self.body);
        let (head, bytes) = out[begin..].split_at_mut(8);
        head[..4].copy_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        head[4..].copy_from_slice(&crc32fast::hash(bytes).to_le_bytes());
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
        let mut text = || {
            let (len, rest) = bytes.split_first_chunk()?;
            let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            bytes = rest;
            String::from_utf8(text.to_vec()).ok()
        };
        let (exchange, routing_key, message_id) = (text()?, text()?, text()?);
        let (store, key) = (text()?, text()?);
        let mut number = || {
            let (number, rest) = bytes.split_first_chunk()?;
            bytes = rest;
            Some(u64::from_le_bytes(*number))
        };
        let (epoch, lane, lane_number) = (number()?, number()?, number()?);
        let (crc, sequence) = (number()?, number()?);
        let ([keyed, resend, redelivered], body) = bytes.split_first_chunk()?;
        Some(Self {
            exchange,
            routing_key,
            message_id,
            store,
            epoch,
            lane,
            lane_number,
            crc,
            sequence,
            key: (*keyed == 1).then_some(key),
            resend: *resend == 1,
            redelivered: *redelivered == 1,
            body: body.to_vec(),
        })
    }
}

/// Reads the tap's file. A last frame that is cut is left out: it was not acknowledged.
///
/// # Errors
/// A frame that is damaged.
pub fn read_tap(path: &Path, mut each: impl FnMut(TapMessage)) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut bytes = Vec::new();
    for number in 1.. {
        let mut head = [0; 8];
        if !fill(&mut reader, &mut head)? {
            break;
        }
        let [a, b, c, d, crc @ ..] = head;
        bytes.resize(u32::from_le_bytes([a, b, c, d]) as usize, 0);
        if !fill(&mut reader, &mut bytes)? {
            break;
        }
        let message =
            (crc32fast::hash(&bytes) == u32::from_le_bytes(crc)).then(|| TapMessage::decode(&bytes));
        let message = message.flatten();
        each(
            message
                .ok_or_else(|| io::Error::other(format!("{}: frame {number} is damaged", path.display())))?,
        );
    }
    Ok(())
}

/// Whether there was enough to fill it.
fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
