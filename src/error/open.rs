//! The errors of a store that cannot be opened.

use std::path::{Path, PathBuf};

use super::BoxError;

/// Why a store could not be opened or created. Each error names the file.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Error, OpenError, Store};
/// match Store::open(store.path()) {
///     Err(Error::Open(OpenError::Locked { path })) => assert_eq!(path, store.path()),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process, or another `Store` of this process, owns the file.
    #[error("{path} is locked: another process, or another Store in this one, has it open", path = path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A process that has not opened the file as a store holds a lock on all of it (`flock`).
    ///
    /// The process may be a backup, a script, or a program with redb before 4.3. Every user that
    /// may read the file can take this lock, so keep the file's mode at 0600.
    #[error("{path} is locked by a process that has not opened it as a store. It holds a `flock`, as backups, scripts and programs with redb before 4.3 do. End the process (`lslocks` and `fuser -v` name it), and close the file to users that need not read it (`chmod 600`)", path = path.display())]
    LockedByReader {
        /// The file.
        path: PathBuf,
    },
    /// The path is a symbolic link. The library does not follow links.
    #[error("{path} is a symbolic link; name the file itself", path = path.display())]
    Symlink {
        /// The path.
        path: PathBuf,
    },
    /// The file is not a redb database.
    #[error("{path} is not a onewrite store: {reason}", path = path.display())]
    NotAStore {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is empty, and a store never is. A failed copy leaves an empty file, and so does a
    /// file system that lost the content.
    ///
    /// The library takes an empty file for a new store only with
    /// [`overwrite_empty`](crate::StoreBuilder::overwrite_empty). Nothing has been written.
    #[error("{path} is empty: {}", empty_text(journal.as_deref()), path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// A [journal](crate::StoreBuilder::journal_bytes) beside the file, which shows that a
        /// store was here.
        journal: Option<PathBuf>,
    },
    /// A newer version of this library wrote the file.
    #[error("{path} has onewrite format {found}; this version reads formats up to {supported}", path = path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// The format in the file.
        found: u32,
        /// The newest format that this version knows.
        supported: u32,
    },
    /// The file is damaged.
    #[error("{path} is damaged: {reason}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the check found.
        reason: String,
    },
    /// The store was not closed, and its [journal](crate::StoreBuilder::journal_bytes) is missing
    /// or belongs to another store. That journal holds commits that the file does not hold.
    ///
    /// Put the journal back, or give its commits up with
    /// [`abandon_missing_journal`](crate::StoreBuilder::abandon_missing_journal). Nothing has been
    /// written.
    #[error("the journal {path} is missing, or is not this store's: the store was not closed, and its last commits are in that journal", path = path.display())]
    JournalMissing {
        /// The journal's path.
        path: PathBuf,
    },
    /// The path of the store's [journal](crate::StoreBuilder::journal_bytes) holds another store's
    /// journal with commits, or a file that is no journal. The library leaves the file as it is.
    #[error("{path} is in the way: it is no journal of this store; move it away if it is not needed", path = path.display())]
    JournalInTheWay {
        /// The file.
        path: PathBuf,
    },
    /// Another user can have prepared, read or changed the file at the path of the store's
    /// [journal](crate::StoreBuilder::journal_bytes).
    ///
    /// The library uses a journal only if the file has the right owner, has one name, and is closed
    /// to all other users. The owner must be this process's user, root, or the owner of the store's
    /// file. Nothing has been written.
    #[error("{path} is not trusted as the store's journal: {reason}; if it is yours, give it that owner, one name and mode 0600, else move it away", path = path.display())]
    JournalNotPrivate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused an action.
    #[error("cannot {action} {path}: {cause}", path = path.display())]
    Io {
        /// The attempted action.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// The storage engine refused to open the file.
    #[error("cannot open {path}: {cause}", path = path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        cause: BoxError,
    },
}

pub(super) fn empty_text(journal: Option<&Path>) -> String {
    match journal {
        Some(journal) => format!(
            "a store's journal, {}, lies beside it, so a store was here and has lost its file; put the file back from a backup, or move \
             the journal away",
            journal.display()
        ),
        None => {
            "no store ever is; if a new store is to be made of it, remove the file or set `overwrite_empty(true)`".into()
        }
    }
}

impl OpenError {
    /// Names the path, and the paths of files beside it, in the form that the application gave.
    pub(crate) fn named_as(mut self, path: &Path, given: &Path) -> Self {
        let named = |named_path: &mut PathBuf| {
            if named_path == path {
                *named_path = given.to_owned();
            } else if named_path.parent() == path.parent()
                && let Some(name) = named_path.file_name()
            {
                *named_path = given.with_file_name(name);
            }
        };
        match &mut self {
            Self::Empty { path, journal } => {
                named(path);
                journal.iter_mut().for_each(named);
            }
            Self::Locked { path }
            | Self::LockedByReader { path }
            | Self::Symlink { path }
            | Self::NotAStore { path, .. }
            | Self::NewerFormat { path, .. }
            | Self::Damaged { path, .. }
            | Self::JournalMissing { path }
            | Self::JournalInTheWay { path }
            | Self::JournalNotPrivate { path, .. }
            | Self::Io { path, .. }
            | Self::Storage { path, .. } => named(path),
        }
        self
    }
}
