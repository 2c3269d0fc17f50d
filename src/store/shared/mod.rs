//! State that the threads of one store share, and the part of the file that memory knows.
//!
//! [`core`] holds the rest together. **Invariant:** transactions are opened only through [`core`],
//! and nothing here knows a [`Transaction`](super::Transaction).

pub(crate) mod age;
pub(crate) mod alarms;
pub(crate) mod capture_schedule;
pub(crate) mod captures;
pub(crate) mod cleaning;
pub(crate) mod consumers;
pub(crate) mod core;
pub(crate) mod cursor;
pub(crate) mod deferred_trim;
pub(crate) mod expiry_requests;
pub(crate) mod holders;
pub(crate) mod jumps;
pub(crate) mod left_out;
pub(crate) mod lines;
pub(crate) mod log_pace;
pub(crate) mod notify;
pub(crate) mod owner;
pub(crate) mod parked;
pub(crate) mod progress;
pub(crate) mod projections;
pub(crate) mod redrive_signal;
pub(crate) mod reentrancy;
pub(crate) mod relays;
pub(crate) mod room;
pub(crate) mod tail;
pub(crate) mod timed;
pub(crate) mod write_lock;
pub(crate) mod write_queue;
pub(crate) mod write_wait;
