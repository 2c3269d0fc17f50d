//! The pieces of a row that is longer than a page: their sizes, and the stub in the row's place.
//! Pure.
//!
//! The storage engine keeps a value in one block of pages, and the number of pages is a power of
//! two. A value of 64 KiB and a few bytes takes 128 KiB, and more while its neighbours are copied.
//! Pieces that fill one page each waste nothing but the end of the last piece.
//!
//! ```text
//! stub   1 u8 │ length of the row u64 │ crc32 u32
//! ```
//!
//! Little-endian. The row's own checksum covers the whole row, so it detects a missing or foreign
//! piece.

use super::dedup::{sealed, unsealed};

/// The bytes of a page of the storage engine.
const PAGE: usize = 4096;

/// The overhead of a page with one row: its head, and the end offsets of key and value.
const PAGE_HEAD: usize = 4 + 2 * 4;

const STUB: u8 = 1;
const STUB_LEN: usize = 1 + 8 + 4;

/// Returns the length of the longest value that fits into one page beside a key of this length.
pub(crate) fn piece_len(key_len: usize) -> usize {
    PAGE - PAGE_HEAD - key_len.min(PAGE / 2)
}

/// Returns the stub for a row of this length.
pub(crate) fn stub(key: &[u8], len: usize) -> Vec<u8> {
    sealed(key, [&[STUB][..], &(len as u64).to_le_bytes()].concat())
}

/// Whether the value can only be a stub, damaged or not. No row is as short.
pub(crate) fn is_stub(value: &[u8]) -> bool {
    value.len() == STUB_LEN
}

/// Returns the length of the row that a stub stands for. `None` for a row, and for a damaged stub.
pub(crate) fn stubbed_len(key: &[u8], value: &[u8]) -> Option<u64> {
    let stub = unsealed(key, value).filter(|_| is_stub(value))?;
    let (kind, len) = stub.split_first()?;
    let len = u64::from_le_bytes(len.try_into().ok()?);
    (*kind == STUB).then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stub_says_a_length_and_nothing_else_does() {
        assert_eq!(stubbed_len(b"key", &stub(b"key", 70_000)), Some(70_000));
        assert_eq!(stubbed_len(b"other", &stub(b"key", 70_000)), None);
        assert_eq!(stubbed_len(b"key", &sealed(b"key", vec![2; STUB_LEN - 4])), None);
        assert_eq!(stubbed_len(b"key", b""), None);
        let mut damaged = stub(b"key", 70_000);
        damaged[3] ^= 1;
        assert!(is_stub(&damaged) && stubbed_len(b"key", &damaged).is_none());
    }
}
