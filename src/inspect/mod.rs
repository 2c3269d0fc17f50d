//! Inspection of a store: figures, and checks of the file's content. It only reads.

mod ages;
mod scope_stats;
mod stats;
mod verify;
mod verify_pages;
#[cfg(test)]
mod waiting_tests;

pub use self::scope_stats::ScopeStats;
pub use self::stats::{CaptureStats, ProjectionStats, RelayStats, Stats};
pub use self::verify::{Finding, Verification};
pub use self::verify_pages::{PageProgress, PageVerification};
