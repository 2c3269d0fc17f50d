//! AMQP tables: checks whether the client library can read a table, and mends a table that it
//! cannot read.
//!
//! **Invariants.** Nothing here recurses deeper than [`TABLE_NESTING_MAX`]. [`is_sound`] accepts
//! everything that [`mend`] writes.

use crate::limits::TABLE_NESTING_MAX;
use crate::wire::{MENDED, UNREADABLE};

use super::notes::Notes;
use super::reader::Reader;
use super::text::{is_text, mended, shown};

/// Whether the client library can read these entries (a table without its length) unchanged. Types
/// must be known. Names must be text and not reserved. Nesting must not exceed
/// [`TABLE_NESTING_MAX`].
pub(super) fn is_sound(entries: &[u8]) -> bool {
    is_sound_table(entries, 1)
}

/// Whether only this library may set a header of this name.
pub(super) fn is_reserved(name: &[u8]) -> bool {
    name == MENDED.as_bytes() || name == UNREADABLE.as_bytes()
}

fn is_sound_table(entries: &[u8], depth: usize) -> bool {
    let mut reader = Reader::new(entries);
    while !reader.is_empty() {
        let sound = reader.short().is_some_and(|name| is_text(name) && !is_reserved(name))
            && Value::read(&mut reader).is_some_and(|value| value.is_sound(depth));
        if !sound {
            return false;
        }
    }
    true
}

fn is_sound_array(values: &[u8], depth: usize) -> bool {
    let mut reader = Reader::new(values);
    while !reader.is_empty() {
        if !Value::read(&mut reader).is_some_and(|value| value.is_sound(depth)) {
            return false;
        }
    }
    true
}

/// The number of values in these entries, nested values included. A value that is nested too deep
/// counts as one.
pub(super) fn values(entries: &[u8]) -> usize {
    values_of(entries, true, 1)
}

fn values_of(bytes: &[u8], named: bool, depth: usize) -> usize {
    let (mut reader, mut count) = (Reader::new(bytes), 0);
    while !reader.is_empty() && (!named || reader.short().is_some()) {
        let Some(value) = Value::read(&mut reader) else { break };
        count += 1;
        if value.is_nested() && depth < TABLE_NESTING_MAX {
            count += values_of(value.inner, value.kind == b'F', depth + 1);
        }
    }
    count
}

/// A value in its table: its type, and the bytes after the type (with their length, if they have
/// one).
#[derive(Clone, Copy)]
struct Value<'a> {
    kind: u8,
    bytes: &'a [u8],
    /// The content of a table or an array.
    inner: &'a [u8],
}

impl<'a> Value<'a> {
    /// Reads a value. Returns `None` if the bytes end too early or the type is not one of
    /// RabbitMQ's.
    fn read(reader: &mut Reader<'a>) -> Option<Self> {
        let kind = reader.u8()?;
        let fixed = match kind {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'l' | b'L' | b'd' | b'T' => 8,
            b'S' | b'x' | b'A' | b'F' => {
                let all = reader.rest();
                let inner = reader.long()?;
                return Some(Self { kind, bytes: all.get(..4 + inner.len())?, inner });
            }
            _ => return None,
        };
        Some(Self { kind, bytes: reader.take(fixed)?, inner: &[] })
    }

    fn is_nested(self) -> bool {
        matches!(self.kind, b'A' | b'F')
    }

    /// Whether the value is sound in a table or an array at this depth.
    fn is_sound(self, depth: usize) -> bool {
        match self.kind {
            b'A' | b'F' if depth >= TABLE_NESTING_MAX => false,
            b'A' => is_sound_array(self.inner, depth + 1),
            b'F' => is_sound_table(self.inner, depth + 1),
            _ => true,
        }
    }

    /// Writes the value in a sound form. A value that is too deep, or cannot be read, becomes an
    /// array of bytes. `name` is the header that contains the value.
    fn mend(self, depth: usize, name: &[u8], out: &mut Vec<u8>, notes: &mut Notes) {
        if !self.is_nested() || self.is_sound(depth) {
            out.push(self.kind);
            out.extend_from_slice(self.bytes);
            return;
        }
        let at = out.len();
        out.extend_from_slice(&[self.kind, 0, 0, 0, 0]);
        let whole = depth < TABLE_NESTING_MAX
            && match self.kind {
                b'A' => mend_array(self.inner, depth + 1, name, out, notes),
                _ => mend_table(self.inner, depth + 1, name, out, notes),
            };
        if whole {
            set_len(out, at + 1);
        } else {
            notes.changed(format_args!("a table in header `{}` is kept as bytes", shown(name)));
            out.truncate(at);
            out.push(b'x');
            out.extend_from_slice(self.bytes);
        }
    }
}

/// Writes at `at` the length of the bytes after it.
fn set_len(out: &mut [u8], at: usize) {
    let len = u32::try_from(out.len().saturating_sub(at + 4)).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(at..at + 4) {
        place.copy_from_slice(&len.to_be_bytes());
    }
}

/// Writes a table's entries in a sound form. Returns `false` if the table cannot be read to its
/// end.
fn mend_table(entries: &[u8], depth: usize, header: &[u8], out: &mut Vec<u8>, notes: &mut Notes) -> bool {
    let mut reader = Reader::new(entries);
    while !reader.is_empty() {
        let Some((name, value)) = entry(&mut reader) else { return false };
        push_name(name, out, notes);
        value.mend(depth, header, out, notes);
    }
    true
}

fn mend_array(values: &[u8], depth: usize, name: &[u8], out: &mut Vec<u8>, notes: &mut Notes) -> bool {
    let mut reader = Reader::new(values);
    while !reader.is_empty() {
        let Some(value) = Value::read(&mut reader) else { return false };
        value.mend(depth, name, out, notes);
    }
    true
}

fn entry<'a>(reader: &mut Reader<'a>) -> Option<(&'a [u8], Value<'a>)> {
    Some((reader.short()?, Value::read(reader)?))
}

fn push_name(name: &[u8], out: &mut Vec<u8>, notes: &mut Notes) {
    let text = mended(name);
    if *text != *name {
        notes.changed(format_args!("the name of header `{}` is not UTF-8", shown(name)));
    }
    out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(&text);
}

/// Returns the entries of a table, each in a sound form. Entries that cannot be read are left out
/// and noted as lost.
pub(super) fn mend(entries: &[u8], notes: &mut Notes) -> Vec<Vec<u8>> {
    let mut reader = Reader::new(entries);
    let mut mended = Vec::new();
    while !reader.is_empty() {
        let Some((name, value)) = entry(&mut reader) else {
            notes.lost(format_args!("from entry {} on the headers cannot be read", mended.len() + 1));
            break;
        };
        if is_reserved(name) {
            notes.changed(format_args!("header `{}` is left out: only this library gives it", shown(name)));
            continue;
        }
        let mut out = Vec::with_capacity(name.len() + value.bytes.len() + 2);
        push_name(name, &mut out, notes);
        value.mend(1, name, &mut out, notes);
        mended.push(out);
    }
    mended
}

/// Returns an entry with a text value.
pub(super) fn text_entry(name: &str, text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + text.len() + 6);
    out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(name.as_bytes());
    out.push(b'S');
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    out
}

/// Returns the name of an entry that [`mend`] made.
pub(super) fn name_of(entry: &[u8]) -> &[u8] {
    Reader::new(entry).short().unwrap_or_default()
}
