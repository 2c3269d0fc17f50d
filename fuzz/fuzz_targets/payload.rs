//! Whatever bytes come as a typed payload: an error or a value, never a panic, never unbounded memory.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = onewrite::codec::from_bincode::<Vec<(String, u64, Option<Vec<u8>>)>>(bytes);
    let _ = onewrite::codec::from_bincode::<BTreeMap<String, Vec<u128>>>(bytes);
    let _ = onewrite::codec::from_json::<BTreeMap<String, Vec<u64>>>(bytes);
});
