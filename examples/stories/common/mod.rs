//! What the examples of one process share: which broker, and the account at the end.

pub(crate) mod book;
pub(crate) mod broker;
