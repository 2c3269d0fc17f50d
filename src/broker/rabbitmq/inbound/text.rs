//! Texts that should be UTF-8.

use std::borrow::Cow;

/// The replacement for each byte that is not text. Unicode calls the character *substitute*.
pub(super) const SUBSTITUTE: u8 = 0x1a;

pub(super) fn is_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok()
}

/// Returns the same number of bytes; each byte that is not text is [`SUBSTITUTE`].
pub(super) fn mended(bytes: &[u8]) -> Cow<'_, [u8]> {
    if is_text(bytes) {
        return Cow::Borrowed(bytes);
    }
    let mut text = Vec::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.extend_from_slice(chunk.valid().as_bytes());
        text.resize(text.len() + chunk.invalid().len(), SUBSTITUTE);
    }
    Cow::Owned(text)
}

/// Returns bytes for a note: escaped, and not too long.
pub(super) fn shown(bytes: &[u8]) -> String {
    const SHOWN_BYTES_MAX: usize = 40;
    let (part, more) = bytes.split_at_checked(SHOWN_BYTES_MAX).map_or((bytes, ""), |(part, _)| (part, "…"));
    format!("{}{more}", part.escape_ascii())
}
