//! Whether the clock has jumped since a thread looked last.

use std::sync::atomic::{AtomicBool, Ordering};

/// The clock has jumped, and the writer thread has not looked yet.
#[derive(Debug, Default)]
pub(crate) struct Jumped(AtomicBool);

impl Jumped {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}
