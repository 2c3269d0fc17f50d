//! The bytes of the log: record frames, the keys of the tables around them, and what is derived
//! from the log. Pure; no module here names a storage engine.

mod checksum;
pub(crate) mod dedup;
pub(crate) mod forgotten;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
pub(crate) mod in_hand;
pub(crate) mod keys;
pub(crate) mod lanes;
pub(crate) mod pieces;
pub(crate) mod record;
pub(crate) mod rejected;
pub(crate) mod streams;
mod values;
pub(crate) mod view;
pub(crate) mod wire_bytes;
pub(crate) mod write_back;
