//! Which process this is.
//!
//! A process that is forked has a copy of every handle, and of none of the threads. A lock that another thread held in that moment
//! is never released in it. So a handle asks where it is before it takes a lock, and does nothing at all when it is dropped there.

use std::sync::atomic::{AtomicBool, Ordering};

/// The process in which something was made.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    /// A copy has found out that it is elsewhere. What is forked from there is elsewhere too, also once the number is given again.
    left: AtomicBool,
}

impl Process {
    pub(crate) fn current() -> Self {
        Self { id: std::process::id(), left: AtomicBool::new(false) }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whether the calling process was forked from this one. It costs one system call.
    pub(crate) fn is_elsewhere(&self) -> bool {
        let elsewhere = self.left.load(Ordering::Relaxed) || std::process::id() != self.id;
        if elsewhere {
            self.left.store(true, Ordering::Relaxed);
        }
        elsewhere
    }
}

/// Keeps what `handle` shares from ever being dropped in this process: one more handle is leaked.
pub(crate) fn keep<T: Clone>(handle: &T) {
    std::mem::forget(handle.clone());
}
