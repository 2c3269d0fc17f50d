//! The writer thread: it commits groups, cleans up, makes the next open quick, and does all other
//! work that is due.

pub(crate) mod cleanup;
pub(crate) mod groups;
pub(crate) mod thread;
