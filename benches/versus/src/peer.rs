//! What a user would pick instead, each written as its own users would at their best.

pub(crate) mod lapin;
pub(crate) mod page;
pub(crate) mod poller;
pub(crate) mod shared;
pub(crate) mod sqlite;
