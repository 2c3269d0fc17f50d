//! Catches panics of the application's code.
//!
//! The value of a panic is the application's too. Dropping it may panic again, and that panic must
//! not unwind the caller.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the application's code. Returns the panic's message if the code panics.
pub(crate) fn caught<T>(foreign: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(foreign)).map_err(panicked)
}

/// Returns a panic's message and drops its value.
pub(crate) fn panicked(panic: Box<dyn Any + Send>) -> String {
    let text = panic_text(&*panic);
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        // A value that panics twice may panic for ever.
        std::mem::forget(again);
    }
    text
}

/// Returns a panic's message.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Again;

    impl Drop for Again {
        fn drop(&mut self) {
            std::panic::resume_unwind(Box::new("while it was dropped"));
        }
    }

    /// Goal: no panic continues, whatever its value does when it is dropped. Method: values that
    /// panic again.
    #[test]
    fn a_panic_whose_value_panics_ends_here() {
        let reported = |value: Box<dyn Any + Send>| caught(|| -> () { std::panic::resume_unwind(value) });
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(reported(Box::new("a text")), Err("a text".into()));
        assert_eq!(reported(Box::new("a String".to_owned())), Err("a String".into()));
        assert_eq!(reported(Box::new(Again)), Err("no message".into()));
    }
}
