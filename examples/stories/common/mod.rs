//! Modules of the stories that run in one process: the broker, and the account at the end.

pub(crate) mod broker;
pub(crate) mod report;
