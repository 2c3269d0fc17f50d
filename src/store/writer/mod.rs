//! The writer thread: it commits groups, cleans up, saves and looks after what is due.

pub(crate) mod cleanup;
pub(crate) mod groups;
pub(crate) mod thread;
