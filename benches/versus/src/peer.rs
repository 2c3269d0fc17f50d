//! What a user would pick instead, each written as its own users would at their best.

pub(crate) mod disk;
pub(crate) mod fjall;
pub(crate) mod lapin;
pub(crate) mod poller;
pub(crate) mod redb;
pub(crate) mod shared;
pub(crate) mod sqlite;

/// What a peer says when it fails, from whatever thread.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;
