//! Converts redb's errors to ours. A failure of the medium is marked fatal, which poisons the
//! store.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{BoxError, Error, Result, StorageFailure};
pub(crate) use crate::error::{caught, panic_text};

fn fatal(error: &redb::StorageError) -> bool {
    use redb::StorageError as E;
    matches!(error, E::Io(_) | E::Backend(_) | E::PreviousIo | E::LockPoisoned(_))
}

fn failure(action: &'static str, source: impl Into<BoxError>, fatal: bool) -> Error {
    Error::Storage(StorageFailure { action, cause: source.into(), fatal })
}

impl From<redb::StorageError> for Error {
    fn from(error: redb::StorageError) -> Self {
        let fatal = fatal(&error);
        failure("reading or writing the file", error, fatal)
    }
}

impl From<redb::TableError> for Error {
    fn from(error: redb::TableError) -> Self {
        let fatal = matches!(&error, redb::TableError::Storage(inner) if fatal(inner));
        failure("opening a table", error, fatal)
    }
}

impl From<redb::TransactionError> for Error {
    fn from(error: redb::TransactionError) -> Self {
        let fatal = matches!(&error, redb::TransactionError::Storage(inner) if fatal(inner));
        failure("beginning a transaction", error, fatal)
    }
}

impl From<redb::CommitError> for Error {
    fn from(error: redb::CommitError) -> Self {
        let fatal = matches!(&error, redb::CommitError::Storage(inner) if fatal(inner));
        failure("committing", error, fatal)
    }
}

/// Makes the error of an unreadable row in one of our own tables.
pub(crate) fn damaged_row(what: &'static str) -> Error {
    failure("reading the file", format!("a {what} row is damaged"), false)
}

/// Makes the error of a panic of the storage engine. It panics on a damaged page whose damage it
/// does not check.
#[cold]
pub(crate) fn engine_panicked(panic: &(dyn Any + Send)) -> Error {
    failure("reading the file", format!("the storage engine panicked: {}", panic_text(panic)), false)
}

/// Runs code that reads pages and runs nothing of the application. The storage engine checks no
/// page that it reads, and panics on some damaged pages.
#[inline]
pub(crate) fn unless_it_panics<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| Err(engine_panicked(&*panic)))
}
