//! The file: how it is found, made, opened, read and written beside the storage engine, and what it
//! holds.
//!
//! **Invariant.** Nothing here knows of a store's transactions or threads. The callers give bytes
//! and rows to read or write.

pub(crate) mod create;
pub(crate) mod database;
pub(crate) mod errors;
pub(crate) mod file;
pub(crate) mod free_space;
pub(crate) mod header;
pub(crate) mod journal;
pub(crate) mod metered;
pub(crate) mod pages;
pub(crate) mod place;
pub(crate) mod private;
pub(crate) mod shared;
pub(crate) mod tables;
pub(crate) mod watch;
