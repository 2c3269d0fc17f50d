//! Panics of the application's code, caught.
//!
//! A panic's value is the application's too: dropping it may panic again, and must not unwind what has just been saved.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs what is the application's. Where it panics, what the panic said.
pub(crate) fn caught<T>(foreign: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(foreign)).map_err(panicked)
}

/// What a panic said, and an end of its value.
pub(crate) fn panicked(panic: Box<dyn Any + Send>) -> String {
    let text = panic_text(&*panic);
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        // What panics twice may do so for ever.
        std::mem::forget(again);
    }
    text
}

/// What a panic said.
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

    /// Goal: nothing of a panic goes on, whatever its value does when it is dropped. Method: values that panic anew.
    #[test]
    fn a_panic_whose_value_panics_ends_here() {
        let reported = |value: Box<dyn Any + Send>| caught(|| -> () { std::panic::resume_unwind(value) });
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(reported(Box::new("a text")), Err("a text".into()));
        assert_eq!(reported(Box::new("a String".to_owned())), Err("a String".into()));
        assert_eq!(reported(Box::new(Again)), Err("no message".into()));
    }
}
