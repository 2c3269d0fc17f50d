//! Reads of committed data: snapshots, events in order, streams, replay, and the events that have
//! waited longest.

pub(crate) mod hidden;
pub(crate) mod holders;
pub(crate) mod oldest;
pub(crate) mod records;
pub(crate) mod replay;
pub(crate) mod snapshot;
pub(crate) mod state;
pub(crate) mod stream;
pub(crate) mod stream_snapshots;
pub(crate) mod wanted;
