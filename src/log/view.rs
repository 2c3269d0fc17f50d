//! A view of a record in its bytes. The record is checked as by
//! [`record::decode`](super::record::decode), and its parts are found, not copied.
//!
//! **Invariant.** Every part that the view shows has been checked: bounds, and UTF-8. Texts that
//! the view does not show are not checked.

use super::record::{
    CONTENT_TYPE, CORRELATION, EVENT_VERSION, EXPIRES, FRAME_BYTES, HEADERS, KEY, KNOWN_FLAGS, NOT_BEFORE,
    PROPERTIES, PUBLISHED, REVISION, STREAM, SUBJECT, TIME_AT, TRACEPARENT, TRACESTATE, UUID, check, le_u64,
    read_headers,
};
use super::values::read_properties;
use super::wire_bytes::{Malformed, Reader};
use crate::error::CorruptError;

/// The places of a checked record's parts in its bytes. It is small, because each event has a view.
/// So parts at a fixed place are not in it.
#[derive(Debug, Clone)]
pub(crate) struct RecordView {
    pub(crate) seq: u64,
    pub(crate) version: u32,
    payload: u32,
    event_type: Place,
    stream: Place,
    key: Place,
}

/// The place of a text: its beginning and length.
#[derive(Debug, Clone, Copy)]
struct Place(u16, u8);

/// A place that no text has, because no text begins with the frame.
const NOWHERE: Place = Place(0, 0);

/// These functions take the frame that was viewed.
impl RecordView {
    #[inline]
    pub(crate) fn event_type<'a>(&self, frame: &'a [u8]) -> &'a str {
        text_at(frame, self.event_type).unwrap_or_default()
    }

    #[inline]
    pub(crate) fn stream<'a>(&self, frame: &'a [u8]) -> Option<&'a str> {
        text_at(frame, self.stream)
    }

    #[inline]
    pub(crate) fn key<'a>(&self, frame: &'a [u8]) -> Option<&'a str> {
        text_at(frame, self.key)
    }

    #[inline]
    pub(crate) fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        frame.get(self.payload as usize..).unwrap_or_default()
    }

    #[inline]
    pub(crate) fn time_ms(&self, frame: &[u8]) -> u64 {
        frame.first_chunk().map_or(0, |frame| le_u64(frame, TIME_AT))
    }

    #[inline]
    pub(crate) fn revision(&self, frame: &[u8]) -> Option<u64> {
        let (fixed, rest) = frame.split_first_chunk::<FRAME_BYTES>()?;
        let &[_, _, _, flags, ..] = fixed;
        (flags & REVISION != 0).then(|| rest.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))).flatten()
    }
}

#[inline]
fn text_at(frame: &[u8], Place(from, len): Place) -> Option<&str> {
    let from = usize::from(from);
    let bytes = frame.get(from..from + usize::from(len)).unwrap_or_default();
    (from != 0).then(|| std::str::from_utf8(bytes).expect("seen to be UTF-8 when it was viewed"))
}

/// Checks a record and finds its parts.
#[inline]
pub(crate) fn view(seq: u64, bytes: &[u8]) -> Result<RecordView, CorruptError> {
    let (header, body) = check(seq, bytes)?;
    let walk = Walk { body, at: 0, before: bytes.len() - body.len() };
    walk.view(seq, header.revision.is_some()).map_err(|Malformed(what)| CorruptError { seq, what })
}

const TOO_EARLY: Malformed = Malformed("it ends too early");

/// A walk over the lengths in a body. It reads the lengths only, and checks once, at the end, that
/// the last part is there.
struct Walk<'a> {
    body: &'a [u8],
    at: usize,
    /// The bytes of the frame before the body.
    before: usize,
}

impl Walk<'_> {
    #[inline]
    fn view(mut self, seq: u64, is_of_stream: bool) -> Result<RecordView, Malformed> {
        let flags = self.body.first_chunk().map_or(0, |flags| u16::from_le_bytes(*flags));
        self.at = 2;
        if flags & !KNOWN_FLAGS != 0 {
            return Err(Malformed("it has a flag that is unknown"));
        }
        let has = |flag| flags & flag != 0;
        if has(UUID) {
            self.at += 16;
        } else {
            self.text8()?;
        }
        let texts_from = self.at;
        let event_type = self.text8()?;
        let stream = if has(STREAM) { self.text8()? } else { NOWHERE };
        if has(STREAM) != is_of_stream {
            return Err(Malformed("it has a stream without a revision, or the other way round"));
        }
        let key = if has(KEY) { self.text8()? } else { NOWHERE };
        let texts_to = self.at;
        // The walk skips parts that the view does not show.
        if has(PUBLISHED) {
            self.skip8()?;
            self.skip8()?;
        }
        if has(CONTENT_TYPE) {
            self.skip8()?;
        }
        let version = if flags & !(UUID | STREAM | KEY | PUBLISHED | CONTENT_TYPE) == 0 {
            1
        } else {
            self.rest(flags)?
        };
        let payload = u32::try_from(self.before + self.at).map_err(|_| Malformed("it is too long"))?;
        if self.at > self.body.len() {
            return Err(TOO_EARLY);
        }
        // One check covers all texts, because ASCII is UTF-8.
        if !self.body.get(texts_from..texts_to).is_some_and(<[u8]>::is_ascii) {
            self.check_texts(texts_from, 1 + usize::from(has(STREAM)) + usize::from(has(KEY)))?;
        }
        Ok(RecordView { seq, version, payload, event_type, stream, key })
    }

    #[inline]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "three texts of at most 255 bytes lie before the last that is shown"
    )]
    fn text8(&mut self) -> Result<Place, Malformed> {
        let from = (self.before + self.at + 1) as u16;
        let len = *self.body.get(self.at).ok_or(TOO_EARLY)?;
        self.at += 1 + usize::from(len);
        Ok(Place(from, len))
    }

    #[inline]
    fn skip8(&mut self) -> Result<(), Malformed> {
        self.at += 1 + usize::from(*self.body.get(self.at).ok_or(TOO_EARLY)?);
        Ok(())
    }

    /// Walks the parts that few events have, up to the payload. Returns the version.
    fn rest(&mut self, flags: u16) -> Result<u32, Malformed> {
        let has = |flag| flags & flag != 0;
        let mut rest = Reader(self.body.get(self.at..).ok_or(TOO_EARLY)?);
        for _ in [SUBJECT, CORRELATION, TRACEPARENT].into_iter().filter(|flag| has(*flag)) {
            let len = rest.u8()?;
            rest.take(len.into())?;
        }
        if has(TRACESTATE) {
            let len = rest.u16()?;
            rest.take(len.into())?;
        }
        for _ in [NOT_BEFORE, EXPIRES].into_iter().filter(|flag| has(*flag)) {
            rest.u64()?;
        }
        let version = if has(EVENT_VERSION) { rest.u32()? } else { 1 };
        if has(HEADERS) {
            read_headers(&mut rest)?;
        }
        if has(PROPERTIES) {
            read_properties(&mut rest)?;
        }
        self.at = self.body.len() - rest.0.len();
        Ok(version)
    }

    #[cold]
    fn check_texts(&self, from: usize, count: usize) -> Result<(), Malformed> {
        let mut texts = Reader(self.body.get(from..).ok_or(TOO_EARLY)?);
        (0..count).try_for_each(|_| texts.text8().map(drop))
    }
}
