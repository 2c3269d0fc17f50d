//! The process that owns a store. A process that was forked from the owner does nothing with its
//! handles.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::process::Process;

/// The process that opened a store.
#[derive(Debug, Clone)]
pub(crate) struct Owner(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    process: Process,
}

impl Owner {
    /// The calling process, of the store at `path`.
    pub(crate) fn of(path: &Path) -> Self {
        Self(Arc::new(Inner { path: path.to_owned(), process: Process::current() }))
    }

    pub(crate) fn is_elsewhere(&self) -> bool {
        self.0.process.is_elsewhere()
    }

    /// Fails in a process other than the owner. It takes no lock.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_elsewhere() { Err(self.refusal()) } else { Ok(()) }
    }

    #[cold]
    pub(crate) fn refusal(&self) -> Error {
        let Inner { path, process } = &*self.0;
        Error::Forked { path: path.clone(), owner: process.id(), process: std::process::id() }
    }
}

/// A part of the storage engine that a forked process does not drop: dropping it would take locks.
#[derive(Debug)]
pub(in crate::store) struct Kept<T> {
    value: Option<T>,
    owner: Owner,
}

impl<T> Kept<T> {
    pub(in crate::store) fn new(value: T, owner: &Owner) -> Self {
        Self { value: Some(value), owner: owner.clone() }
    }

    pub(in crate::store) fn owner(&self) -> &Owner {
        &self.owner
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is taken only by `drop`")
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if self.owner.is_elsewhere() {
            std::mem::forget(self.value.take());
        }
    }
}
