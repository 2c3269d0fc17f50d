//! Which stores' transactions the current thread is inside of: what would wait for itself fails at once instead.

use std::cell::RefCell;

use crate::error::Error;

thread_local! {
    static INSIDE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Marks the thread until dropped.
#[derive(Debug)]
pub(crate) struct Inside(usize);

impl Inside {
    pub(crate) fn enter(store: usize) -> Self {
        INSIDE.with_borrow_mut(|inside| inside.push(store));
        Self(store)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with_borrow_mut(|inside| {
            if let Some(at) = inside.iter().rposition(|store| *store == self.0) {
                inside.remove(at);
            }
        });
    }
}

/// Fails if the current thread is inside a transaction of this store.
pub(crate) fn refuse_inside(store: usize, operation: &'static str) -> Result<(), Error> {
    let inside = INSIDE.with_borrow(|inside| inside.contains(&store));
    if inside { Err(Error::InsideTransaction { operation }) } else { Ok(()) }
}
