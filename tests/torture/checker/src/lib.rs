//! The judge of a torture run.
//!
//! It is given what the processes meant to do and what they were answered (their histories), what stands in the store files,
//! what the tap has taken from the broker, and which effects the consumer's file shows. It never asks the library.

pub mod formats;
pub mod judge;
pub mod record;
pub mod sources;
pub mod verdict;
