//! The checksum of a record: CRC-32 (IEEE) over its sequence number and its bytes.
//!
//! A record is a few hundred bytes, and `crc32fast` is optimized for long input. Feeding it the
//! number first costs a third of the whole check. So this module checksums the eight bytes of the
//! number by the usual eight tables, and `crc32fast` continues from there.

/// `TABLES[n][b]` is the remainder of byte `b` with `n` bytes of zeros behind it.
static TABLES: [[u32; 256]; 8] = tables();

#[allow(clippy::indexing_slicing, reason = "computed while compiling, where a panic is an error")]
const fn tables() -> [[u32; 256]; 8] {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let (mut remainder, mut step) = (byte as u32, 0);
        while step < 64 {
            remainder = (remainder >> 1) ^ if remainder & 1 == 1 { POLYNOMIAL } else { 0 };
            step += 1;
            if step % 8 == 0 {
                tables[step / 8 - 1][byte] = remainder;
            }
        }
        byte += 1;
    }
    tables
}

/// Returns the CRC-32 of a number's eight bytes, little-endian.
#[inline]
fn of_number(number: u64) -> u32 {
    let bytes = (number ^ u64::from(u32::MAX)).to_le_bytes();
    let remainders = bytes.into_iter().zip(TABLES.iter().rev());
    !remainders.fold(0, |crc, (byte, table)| crc ^ table.get(usize::from(byte)).copied().unwrap_or_default())
}

/// Returns the checksum of the record with this number and these checked bytes.
#[inline]
pub(super) fn checksum(seq: u64, checked: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(of_number(seq));
    hasher.update(checked);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Goal: the checksum is what the library computes of the number and the bytes in one
        /// piece.
        #[test]
        fn it_is_the_usual_one(seq in any::<u64>(), bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let whole = [&seq.to_le_bytes()[..], &bytes].concat();
            prop_assert_eq!(checksum(seq, &bytes), crc32fast::hash(&whole));
        }
    }
}
