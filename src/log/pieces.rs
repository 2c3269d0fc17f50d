//! A row that is longer than a page, in pieces that fill pages: the sizes, and the stub in its place. Pure.
//!
//! The storage engine keeps a value in one block of pages, whose number is a power of two. A value of 64 KiB and a few bytes takes
//! 128 KiB, and more while its neighbours are copied. Pieces that fill one page each waste nothing but the end of the last one.
//!
//! ```text
//! stub   1 u8 │ length of the row u64 │ crc32 u32
//! ```
//!
//! Little-endian. The row's own checksum is over all of it: a piece that is missing or another's is noticed by that.

use super::dedup::{sealed, unsealed};

/// A page of the storage engine.
const PAGE: usize = 4096;

/// What a page with one row keeps besides its key and value: its head, and the ends of both.
const PAGE_HEAD: usize = 4 + 2 * 4;

const STUB: u8 = 1;
const STUB_LEN: usize = 1 + 8 + 4;

/// The longest value that fits into one page beside a key of this length.
pub(crate) fn piece_len(key_len: usize) -> usize {
    PAGE - PAGE_HEAD - key_len.min(PAGE / 2)
}

/// What stands in the place of a row of this length.
pub(crate) fn stub(key: &[u8], len: usize) -> Vec<u8> {
    sealed(key, [&[STUB][..], &(len as u64).to_le_bytes()].concat())
}

/// Whether this can only be a stub, damaged or not: no row is so short.
pub(crate) fn is_stub(value: &[u8]) -> bool {
    value.len() == STUB_LEN
}

/// The length of the row that a stub stands for. `None` for a row, and for a stub that is damaged.
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
