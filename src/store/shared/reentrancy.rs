//! The reentrancy guard: the number of the calling thread, by which a store knows the thread that
//! holds its write lock.
//!
//! **Invariant.** Nothing here has a destructor. The application may drop a handle, or write, in
//! the destructor of a thread-local. By then a thread-local of onewrite's with a destructor may be
//! destroyed.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// No thread has this number.
pub(crate) const NO_THREAD: u64 = 0;

static NEXT: AtomicU64 = AtomicU64::new(NO_THREAD + 1);

thread_local! {
    static NUMBER: Cell<u64> = const { Cell::new(NO_THREAD) };
}

const _: () = assert!(!std::mem::needs_drop::<Cell<u64>>(), "it must outlive every destructor");

/// The calling thread's number. No two threads of a process ever have the same number.
pub(crate) fn this_thread() -> u64 {
    NUMBER.with(|number| {
        if number.get() == NO_THREAD {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}
