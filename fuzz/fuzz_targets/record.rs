//! Whatever bytes stand where a record should: an error or a record, never a panic, never more memory than the bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &[u8])| {
    let (seq, bytes) = input;
    onewrite::fuzzing::decode_record(seq, bytes);
    // Behind a right checksum, where a mere flip never gets.
    onewrite::fuzzing::decode_body(bytes);
});
