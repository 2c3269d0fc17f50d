//! Logging from a destructor.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs logging code in a destructor. The subscriber is the application's code and may panic. It
/// does panic if it uses a thread-local that is already destroyed. A panic that leaves a destructor
/// would abort the process, so the log line is lost instead.
pub(crate) fn in_drop(log: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(log)) {
        // The panic's value is foreign too, and may panic when it is dropped.
        std::mem::forget(panic);
    }
}
