//! "Listen to yourself": each change of a captured table gets into the log, in the transaction of
//! the change.
//!
//! The application writes through [`table`]. The module [`passes`] turns waiting dirty keys and
//! rows into events. The settings are in `settings::capture`, the rows in
//! `storage::tables::capture`, and the schedule in `shared::capture_schedule`.
//!
//! **Invariants.**
//! - A table that the file knows as captured is written through
//!   [`CapturedTable`](crate::CapturedTable) alone.
//! - A change and its event (or its dirty key) are in one transaction.
//! - A dirty key is removed only in the transaction that appends its event.
//! - A codec runs before anything is changed: when it fails, row and log are as they were.
//! - No code of the application runs inside a call of redb that changes a table, except
//!   `Key::compare` and `as_bytes`.
//! - A stored value is decoded only where it is wanted: rows of an older form can be replaced and
//!   removed.

mod pace;
pub(crate) mod passes;
pub(crate) mod piece;
pub(crate) mod table;
