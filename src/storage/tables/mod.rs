//! The tables of the file, and the codecs of their rows.

pub(crate) mod capture;
pub(crate) mod cleanup;
pub(crate) mod exception;
pub(crate) mod ids;
pub(crate) mod lanes_kept;
pub(crate) mod pieces;
pub(crate) mod projection;
pub(crate) mod rejected;
pub(crate) mod schema;
pub(crate) mod stream;
