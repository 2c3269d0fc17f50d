//! The identity of the process.
//!
//! A forked process has a copy of every handle and of none of the threads. A lock that another
//! thread held at the fork is never released in the forked process. So a handle checks the process
//! before it takes a lock, and its drop does nothing in a forked process.

use std::sync::atomic::{AtomicBool, Ordering};

/// The process in which a value was made.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    /// Whether this copy was found to be in a forked process. Further forks stay elsewhere too,
    /// even if the system reuses the process id.
    left: AtomicBool,
}

impl Process {
    pub(crate) fn current() -> Self {
        Self { id: std::process::id(), left: AtomicBool::new(false) }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whether the calling process was forked from this process. The check costs one system call.
    pub(crate) fn is_elsewhere(&self) -> bool {
        let elsewhere = self.left.load(Ordering::Relaxed) || std::process::id() != self.id;
        if elsewhere {
            self.left.store(true, Ordering::Relaxed);
        }
        elsewhere
    }
}

/// Leaks one more clone of `handle`, so that the shared value is never dropped in this process.
pub(crate) fn keep<T: Clone>(handle: &T) {
    std::mem::forget(handle.clone());
}
