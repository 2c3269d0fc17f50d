//! The redb database over a medium: a plain file, or a file behind a journal. It is made and opened here,
//! and a failure to open it becomes an error.

use std::fs::File;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, StorageBackend, StorageError};

use super::header::older_text;
use super::journal::JournalOptions;
use super::metered::{Counted, IoCounters};
use super::place::SyncFolder;
use super::shared::{Check, Look, Shared};
use crate::error::OpenError;

/// The options of an open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) cache_bytes: usize,
    pub(crate) journal: JournalOptions,
    pub(crate) create: bool,
    /// Whether an empty file counts as absent.
    pub(crate) overwrite_empty: bool,
    pub(crate) sync_folder: SyncFolder,
}

pub(crate) fn cannot(action: &'static str, path: &Path, source: std::io::Error) -> OpenError {
    OpenError::Io { action, path: path.into(), cause: source }
}

/// Runs the engine's part of a creation. Until its file is synced and in place, the file belongs to
/// no store.
pub(crate) fn make_database(
    path: &Path,
    file: &impl Medium,
    cache_bytes: usize,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let (db, _) = try_open(path, file, cache_bytes, Open::Verify, &Arc::default())
        .map_err(|refusal| refusal.into_error(path))?;
    initialise(&db)?;
    db.close().map_err(|error| OpenError::Storage { path: path.into(), cause: error.into() })
}

/// The medium of a database: a file, or a simulated disk of the crash tests.
pub(crate) trait Medium {
    type Backend: StorageBackend;

    /// Returns a backend whose calls are counted.
    fn backend(&self, io: &Arc<IoCounters>) -> Result<Self::Backend, Refusal>;
}

impl Medium for File {
    type Backend = Counted<FileBackend>;

    fn backend(&self, io: &Arc<IoCounters>) -> Result<Self::Backend, Refusal> {
        let file = file_backend(self).map_err(Refusal::Io)?;
        Ok(Counted { file, counters: Arc::clone(io), unless_journaled: true })
    }
}

pub(crate) fn file_backend(file: &File) -> std::io::Result<FileBackend> {
    FileBackend::new(file.try_clone()?).map_err(std::io::Error::other)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Open {
    /// Stop before any repair.
    IfClean,
    /// Check every page, and repair.
    Verify,
}

pub(crate) enum Refusal {
    Unclean,
    Database(DatabaseError),
    Io(std::io::Error),
    /// redb panics on some damaged files.
    Panicked,
    /// A page differs from what was written.
    Damaged(String),
}

impl Refusal {
    pub(crate) fn into_error(self, path: &Path) -> OpenError {
        let path = PathBuf::from(path);
        let damaged = |path, reason: String| OpenError::Damaged { path, reason };
        match self {
            Self::Io(source) => OpenError::Io { action: "open", path, cause: source },
            Self::Panicked => damaged(path, "the storage engine gave up on it".into()),
            Self::Damaged(reason) => damaged(path, reason),
            Self::Unclean => damaged(path, "it needs repair, again".into()),
            Self::Database(DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch) => {
                OpenError::Locked { path }
            }
            Self::Database(DatabaseError::UpgradeRequired(version)) => {
                OpenError::NotAStore { path, reason: older_text(version) }
            }
            Self::Database(DatabaseError::Storage(StorageError::Io(error)))
                if error.kind() == ErrorKind::InvalidData =>
            {
                OpenError::NotAStore { path, reason: error.to_string() }
            }
            // Another process has begun a journal since this process looked at the file.
            Self::Database(DatabaseError::Storage(StorageError::Io(error)))
                if error.kind() == ErrorKind::WouldBlock =>
            {
                OpenError::Locked { path }
            }
            Self::Database(DatabaseError::Storage(StorageError::Io(error)))
                if error.kind() == ErrorKind::UnexpectedEof =>
            {
                damaged(path, "it ends too early".into())
            }
            // The error may come from a write, because the engine repairs what it opens.
            Self::Database(DatabaseError::Storage(StorageError::Io(source))) => {
                OpenError::Io { action: "open", path, cause: source }
            }
            Self::Database(DatabaseError::Storage(StorageError::Corrupted(reason))) => damaged(path, reason),
            Self::Database(error) => OpenError::Storage { path, cause: error.into() },
        }
    }
}

pub(crate) fn try_open(
    path: &Path,
    file: &impl Medium,
    cache_bytes: usize,
    how: Open,
    io: &Arc<IoCounters>,
) -> Result<(Database, Weak<dyn StorageBackend>), Refusal> {
    let backend = Arc::new(file.backend(io)?);
    let pages = Arc::downgrade(&backend);
    let look = Look::new(if how == Open::Verify { Check::All } else { Check::Own });
    let unclean = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&unclean);
    let mut builder = Builder::new();
    builder.set_cache_size(cache_bytes).set_check_integrity_on_open(how == Open::Verify);
    if how == Open::IfClean {
        builder.set_repair_callback(move |session| {
            seen.store(true, Ordering::Relaxed);
            session.abort();
        });
    }
    let opened = catch_unwind(AssertUnwindSafe(|| {
        builder.create_with_backend(Shared { file: backend, look: Arc::clone(&look) })
    }));
    match opened {
        Ok(Ok(db)) => Ok((db, pages)),
        Ok(Err(_)) if unclean.load(Ordering::Relaxed) => Err(Refusal::Unclean),
        // The second state may be whole, as after an unclean end.
        Ok(Err(_)) if how == Open::IfClean && look.found().is_some() => Err(Refusal::Unclean),
        Ok(Err(error)) => {
            Err(look.found().map_or(Refusal::Database(error), |reason| Refusal::Damaged(reason.to_owned())))
        }
        Err(_) => {
            tracing::error!(path = %path.display(), "the storage engine panicked while opening");
            Err(Refusal::Panicked)
        }
    }
}
