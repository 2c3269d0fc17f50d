//! The log's bytes: record frames, the keys of the tables around them, and the lane book. Pure; names no storage engine.

pub(crate) mod keys;
pub(crate) mod lanes;
pub(crate) mod record;
pub(crate) mod wire_bytes;
