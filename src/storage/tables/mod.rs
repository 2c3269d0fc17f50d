//! The tables of the file, and the codecs of their rows.

pub(crate) mod pieces;
pub(crate) mod schema;
