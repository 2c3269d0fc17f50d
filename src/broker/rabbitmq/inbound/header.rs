//! The content header of a message: checked as it is, and rewritten if the client library could not
//! read it.

use crate::wire::{MENDED, UNREADABLE};

use super::notes::Notes;
use super::reader::Reader;
use super::text::{is_text, mended, shown};
use super::{FRAME_OVERHEAD, table};

/// An upper bound of the header with the notes, including its name. (`Notes` keeps four, of about
/// 150 bytes at most.)
const NOTE_BYTES_MAX: usize = 1024;
const HEADERS_BIT: u16 = 13;
const MESSAGE_ID_BIT: u16 = 7;
const TYPE_BIT: u16 = 5;

/// The kind of a property on the wire.
#[derive(Clone, Copy)]
enum Kind {
    Text(&'static str),
    Table,
    Byte,
    Time,
}

/// The fourteen properties, by the bit of their flag.
const PROPERTIES: [(u16, Kind); 14] = [
    (15, Kind::Text("content_type")),
    (14, Kind::Text("content_encoding")),
    (HEADERS_BIT, Kind::Table),
    (12, Kind::Byte),
    (11, Kind::Byte),
    (10, Kind::Text("correlation_id")),
    (9, Kind::Text("reply_to")),
    (8, Kind::Text("expiration")),
    (MESSAGE_ID_BIT, Kind::Text("message_id")),
    (6, Kind::Time),
    (TYPE_BIT, Kind::Text("type")),
    (4, Kind::Text("user_id")),
    (3, Kind::Text("app_id")),
    (2, Kind::Text("cluster_id")),
];

/// The payload of a content header frame.
#[derive(Clone, Copy)]
pub(super) struct Header<'a> {
    class: u16,
    pub(super) body_bytes: u64,
    flags: u16,
    properties: &'a [u8],
}

impl<'a> Header<'a> {
    pub(super) fn read(payload: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(payload);
        let (class, _weight) = (reader.u16()?, reader.u16()?);
        let (body_bytes, flags) = (reader.u64()?, reader.u16()?);
        Some(Self { class, body_bytes, flags, properties: reader.rest() })
    }

    /// Whether the client library can read the header unchanged.
    pub(super) fn is_sound(&self) -> bool {
        let mut reader = Reader::new(self.properties);
        let sound = self.fields().all(|(_, kind)| match kind {
            Kind::Text(_) => reader.short().is_some_and(is_text),
            Kind::Table => reader.long().is_some_and(table::is_sound),
            Kind::Byte => reader.u8().is_some(),
            Kind::Time => reader.u64().is_some(),
        });
        sound && self.flags & 0b11 == 0 && reader.is_empty()
    }

    /// The number of values in its headers, nested values included, as far as they can be read.
    pub(super) fn values(&self) -> usize {
        self.field(HEADERS_BIT).and_then(|mut reader| reader.long()).map_or(0, table::values)
    }

    /// The message's id, if there is one that can be read.
    pub(super) fn message_id(&self) -> Option<&'a [u8]> {
        self.field(MESSAGE_ID_BIT)?.short()
    }

    /// Returns a reader at the start of a property, if the property exists.
    fn field(&self, wanted: u16) -> Option<Reader<'a>> {
        let mut reader = Reader::new(self.properties);
        for (bit, kind) in self.fields() {
            if bit == wanted {
                return Some(reader);
            }
            match kind {
                Kind::Text(_) => _ = reader.short()?,
                Kind::Table => _ = reader.long()?,
                Kind::Byte => _ = reader.u8()?,
                Kind::Time => _ = reader.u64()?,
            }
        }
        None
    }

    fn fields(&self) -> impl Iterator<Item = (u16, Kind)> + use<> {
        let flags = self.flags;
        PROPERTIES.into_iter().filter(move |(bit, _)| flags & (1 << bit) != 0)
    }

    /// Returns a payload of at most `bytes_max` that the client library can read. A header of its
    /// own tells what was wrong.
    pub(super) fn mend(&self, body_bytes: u64, bytes_max: usize, mut notes: Notes) -> Vec<u8> {
        let mut flags = 0;
        let (mut before, mut behind) = (Vec::new(), Vec::new());
        let mut entries = Vec::new();
        let mut reader = Reader::new(self.properties);
        if self.flags & 0b11 != 0 {
            notes.lost(format_args!("its properties cannot be read"));
        } else {
            for (bit, kind) in self.fields() {
                let out = if bit > HEADERS_BIT { &mut before } else { &mut behind };
                if read_field(&mut reader, bit, kind, out, &mut entries, &mut notes).is_none() {
                    notes.lost(format_args!("its properties end too early"));
                    break;
                }
                flags |= 1 << bit;
            }
        }
        let fixed = 14 + before.len() + behind.len() + 4;
        let room = bytes_max.saturating_sub(fixed + NOTE_BYTES_MAX);
        fit(&mut entries, room, &mut notes);
        if !notes.is_empty() {
            let name = if notes.is_lost() { UNREADABLE } else { MENDED };
            entries.push(table::text_entry(name, &notes.to_string()));
        }
        let table = entries.concat();
        flags |= u16::from(!table.is_empty()) << HEADERS_BIT;
        if table.is_empty() {
            flags &= !(1 << HEADERS_BIT);
        }
        let mut payload = Vec::with_capacity(fixed + table.len());
        payload.extend_from_slice(&self.class.to_be_bytes());
        payload.extend_from_slice(&[0, 0]);
        payload.extend_from_slice(&body_bytes.to_be_bytes());
        payload.extend_from_slice(&u16::to_be_bytes(flags));
        payload.extend_from_slice(&before);
        if !table.is_empty() {
            payload.extend_from_slice(&u32::try_from(table.len()).unwrap_or(u32::MAX).to_be_bytes());
            payload.extend_from_slice(&table);
        }
        payload.extend_from_slice(&behind);
        payload
    }
}

/// Reads one property and writes it in a sound form. Returns `None` if the bytes end too early.
fn read_field(
    reader: &mut Reader<'_>,
    bit: u16,
    kind: Kind,
    out: &mut Vec<u8>,
    entries: &mut Vec<Vec<u8>>,
    notes: &mut Notes,
) -> Option<()> {
    match kind {
        Kind::Text(name) => {
            let bytes = reader.short()?;
            let text = mended(bytes);
            if *text != *bytes {
                let what = format_args!("its {name} `{}` is not UTF-8", shown(bytes)).to_string();
                // These properties identify the message: a mended value may be another message's.
                if matches!(bit, MESSAGE_ID_BIT | TYPE_BIT) {
                    notes.lost(format_args!("{what}"));
                } else {
                    notes.changed(format_args!("{what}"));
                }
            }
            out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(&text);
        }
        Kind::Table => entries.extend(table::mend(reader.long()?, notes)),
        Kind::Byte => out.push(reader.u8()?),
        Kind::Time => out.extend_from_slice(&reader.u64()?.to_be_bytes()),
    }
    Some(())
}

/// Leaves out the largest headers until the other headers have room.
fn fit(entries: &mut Vec<Vec<u8>>, room: usize, notes: &mut Notes) {
    let mut len: usize = entries.iter().map(Vec::len).sum();
    if len <= room {
        return;
    }
    // One pass over the headers by length: a sender may have put in a hundred thousand.
    let mut lens: Vec<usize> = entries.iter().map(Vec::len).collect();
    lens.sort_unstable_by(|a, b| b.cmp(a));
    let (mut kept_len_max, mut at_limit) = (usize::MAX, 0);
    for largest in lens {
        if len <= room {
            break;
        }
        len -= largest;
        at_limit = if largest == kept_len_max { at_limit + 1 } else { 1 };
        kept_len_max = largest;
    }
    entries.retain(|entry| {
        let leave = entry.len() > kept_len_max || (entry.len() == kept_len_max && at_limit > 0);
        if leave {
            at_limit -= usize::from(entry.len() == kept_len_max);
            notes.lost(format_args!(
                "header `{}` of {} bytes is left out: all of them together do not fit into a frame",
                shown(table::name_of(entry)),
                entry.len()
            ));
        }
        !leave
    });
}

/// Whether a payload fits into a frame of this size.
pub(super) fn fits(payload: usize, frame_bytes_max: usize) -> bool {
    payload.saturating_add(FRAME_OVERHEAD) <= frame_bytes_max
}
