//! What is logged by a destructor.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs what logs in a destructor. The subscriber is the application's: it may panic, and it does where a thread-local that it
/// writes by is destroyed already. A panic that left a destructor would abort the process; the line is lost instead.
pub(crate) fn in_drop(log: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(log)) {
        // It is foreign too, and may panic when it is dropped.
        std::mem::forget(panic);
    }
}
