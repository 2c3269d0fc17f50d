//! One connection of SQLite for many threads. A plain mutex is not enough: writers that come again at once keep out who deletes, for seconds on
//! a slow disk. Here who deletes is next when it asks.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::sqlite::Sqlite;

pub(crate) struct Shared {
    sqlite: Mutex<Sqlite>,
    /// Held by who is to have it next.
    next: Mutex<()>,
    /// Held by the one writer that may try to be.
    writer: Mutex<()>,
}

impl Shared {
    pub(crate) fn new(sqlite: Sqlite) -> Self {
        Self { sqlite: Mutex::new(sqlite), next: Mutex::new(()), writer: Mutex::new(()) }
    }

    pub(crate) fn write<T>(&self, work: impl FnOnce(&mut Sqlite) -> T) -> T {
        let _writer = lock(&self.writer);
        self.delete(work)
    }

    /// Waits for the writer that is at work, and one more at most.
    pub(crate) fn delete<T>(&self, work: impl FnOnce(&mut Sqlite) -> T) -> T {
        let next = lock(&self.next);
        let mut sqlite = lock(&self.sqlite);
        drop(next);
        work(&mut sqlite)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
