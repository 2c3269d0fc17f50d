//! Whatever bytes stand as a key and a row of a table, also with a right checksum: an error or a row, never a panic, never more memory
//! than the bytes; and a key that is read is written so.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &[u8])| {
    let (key, row) = input;
    onewrite::fuzzing::decode_row(key, row);
});
