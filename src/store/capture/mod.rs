//! "Listen to yourself": a captured table leaves each of its changes in the log, in the transaction of the change.
//!
//! [`table`] is what an application writes through, and [`passes`] turns what only waits into events. What is set stands in
//! `settings::capture`, the rows in `storage::tables::capture`, and what is due in `shared::capture_schedule`.
//!
//! **Invariants.**
//! - A table that the file knows as captured is written through [`CapturedTable`](crate::CapturedTable) alone.
//! - A change and its event (or its dirty key) are in one transaction.
//! - A dirty key goes only in the transaction that appends its event.
//! - A codec runs before anything is changed: when it fails, row and log are as they were.
//! - No code of the application runs inside a call of redb that changes a table, but for `Key::compare` and `as_bytes`.
//! - A stored value is decoded only where it is wanted: rows of an older form can be replaced and removed.

mod pace;
pub(crate) mod passes;
pub(crate) mod piece;
pub(crate) mod table;
