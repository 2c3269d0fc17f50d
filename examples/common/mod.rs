//! What the examples share: which broker, and the account at the end.

pub(crate) mod account;
pub(crate) mod broker;
