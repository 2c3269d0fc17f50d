//! Opening and creating the file.
//!
//! **Invariants.** The path never names a half-made file: a store is made aside, closed, synced and then linked into
//! place. A file that was not closed cleanly is verified before it is used. Symbolic links are not followed. The file
//! is readable and writable by its owner alone.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, StorageBackend, StorageError};

use super::counted::{Counted, IoCounters};
use super::journal::{Journal, JournalOptions, JournalRefusal, SideFile, is_journaled};
use crate::error::{BoxError, Error, OpenError, Result as StoreResult};
use crate::event::fresh_uuid_text;

/// What a database is kept on: a file, or a disk that the tests of crashes make up.
pub(super) trait Medium {
    type Backend: StorageBackend;

    /// What it is asked is to be counted.
    fn backend(&self, io: &Arc<IoCounters>) -> Result<Self::Backend, Refusal>;
}

impl Medium for File {
    type Backend = Counted<FileBackend>;

    fn backend(&self, io: &Arc<IoCounters>) -> Result<Self::Backend, Refusal> {
        let file = file_backend(self).map_err(Refusal::Io)?;
        Ok(Counted { file, counters: Arc::clone(io), unless_journaled: true })
    }
}

pub(super) fn file_backend(file: &File) -> std::io::Result<FileBackend> {
    FileBackend::new(file.try_clone()?).map_err(std::io::Error::other)
}

/// A file behind a journal.
struct Journaled<'a> {
    file: &'a File,
    side: SideFile,
    options: JournalOptions,
    /// Why the journal does not let it be opened.
    refusal: JournalRefusal,
}

impl Medium for Journaled<'_> {
    type Backend = Journal<Counted<FileBackend>, SideFile>;

    fn backend(&self, io: &Arc<IoCounters>) -> Result<Self::Backend, Refusal> {
        let (main, side) = (self.file.backend(io)?, self.side.counted_by(io));
        let main = Counted { unless_journaled: false, ..main };
        Ok(Journal::new(main, side, self.options, Arc::clone(&self.refusal)))
    }
}

/// How a file is opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) cache_bytes: usize,
    pub(crate) journal: JournalOptions,
    pub(crate) create: bool,
}

/// A database that is open, and how it came.
pub(crate) struct Opened {
    pub(crate) db: Database,
    /// It had to be repaired: the last owner did not close it.
    pub(crate) unclean: bool,
    pub(crate) io: Arc<IoCounters>,
}

/// Opens the file, or makes it by way of `initialise`.
pub(crate) fn open_or_create(
    path: &Path,
    options: Options,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<Opened, OpenError> {
    // Someone else may create or remove the file between our steps; each round sees a newer truth.
    for _ in 0..8 {
        match open_file(path)? {
            Some(file) => return open_file_or_journal(path, &file, options),
            None if !options.create => {
                let source = ErrorKind::NotFound.into();
                return Err(OpenError::Io { action: "open", path: path.into(), source });
            }
            None => create_aside(path, options.cache_bytes, initialise)?,
        }
    }
    let source = std::io::Error::other("it appears and disappears while it is being opened");
    Err(OpenError::Io { action: "open", path: path.into(), source })
}

/// The file, or `None` where there is none or an empty one (which `create_aside` replaces).
fn open_file(path: &Path) -> Result<Option<File>, OpenError> {
    let io = |source| OpenError::Io { action: "open", path: path.into(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
        Ok(meta) if meta.file_type().is_symlink() => return Err(OpenError::Symlink { path: path.into() }),
        Ok(meta) if !meta.is_file() => {
            return Err(OpenError::NotAStore {
                path: path.into(),
                reason: "it is not a regular file".into(),
            });
        }
        Ok(meta) if meta.len() == 0 => return Ok(None),
        Ok(_) => {}
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    owner_only(&mut options);
    options.open(path).map(Some).map_err(io)
}

#[cfg(unix)]
pub(super) fn owner_only(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
}

#[cfg(not(unix))]
pub(super) fn owner_only(_: &mut OpenOptions) {}

fn open_file_or_journal(path: &Path, file: &File, options: Options) -> Result<Opened, OpenError> {
    let io = |source| OpenError::Io { action: "read", path: path.into(), source };
    let is_journaled = file_backend(file).and_then(|file| is_journaled(&file)).map_err(io)?;
    if options.journal.bytes == 0 && !is_journaled {
        // Should it be by now, that is noticed under the engine's lock.
        return open_database(path, file, options.cache_bytes);
    }
    let side = SideFile::of(path).map_err(io)?;
    let journaled = Journaled { file, side, options: options.journal, refusal: JournalRefusal::default() };
    // What is given up may be half in the file, whatever its header says.
    let first = if options.journal.abandon && is_journaled { Open::Verify } else { Open::IfClean };
    open_database_as(path, &journaled, options.cache_bytes, first).map_err(|error| {
        let refusal = journaled.refusal.lock().unwrap_or_else(PoisonError::into_inner).take();
        refusal.unwrap_or(error)
    })
}

pub(super) fn open_database(
    path: &Path,
    file: &impl Medium,
    cache_bytes: usize,
) -> Result<Opened, OpenError> {
    open_database_as(path, file, cache_bytes, Open::IfClean)
}

fn open_database_as(
    path: &Path,
    file: &impl Medium,
    cache_bytes: usize,
    first: Open,
) -> Result<Opened, OpenError> {
    let io = Arc::default();
    match try_open(path, file, cache_bytes, first, &io) {
        Ok(db) => Ok(Opened { db, unclean: first == Open::Verify, io }),
        Err(Refusal::Unclean) => {
            tracing::warn!(path = %path.display(), "the store was not closed cleanly; verifying every page");
            match try_open(path, file, cache_bytes, Open::Verify, &io) {
                Ok(db) => Ok(Opened { db, unclean: true, io }),
                Err(refusal) => Err(refusal.into_error(path)),
            }
        }
        Err(refusal) => Err(refusal.into_error(path)),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    /// Stop before any repair.
    IfClean,
    /// Check every page, and repair.
    Verify,
}

pub(super) enum Refusal {
    Unclean,
    Database(DatabaseError),
    Io(std::io::Error),
    /// redb panics on some damaged files.
    Panicked,
}

impl Refusal {
    fn into_error(self, path: &Path) -> OpenError {
        let path = PathBuf::from(path);
        let damaged = |path, reason: String| OpenError::Damaged { path, reason };
        match self {
            Self::Io(source) => OpenError::Io { action: "open", path, source },
            Self::Panicked => damaged(path, "the storage engine gave up on it".into()),
            Self::Unclean => damaged(path, "it needs repair, again".into()),
            Self::Database(DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch) => {
                OpenError::Locked { path }
            }
            Self::Database(error @ DatabaseError::UpgradeRequired(_)) => {
                OpenError::NotAStore { path, reason: error.to_string() }
            }
            Self::Database(DatabaseError::Storage(StorageError::Io(error)))
                if error.kind() == ErrorKind::InvalidData =>
            {
                OpenError::NotAStore { path, reason: error.to_string() }
            }
            // Another process has begun a journal since the file was looked at.
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
            Self::Database(DatabaseError::Storage(StorageError::Io(source))) => {
                OpenError::Io { action: "read", path, source }
            }
            Self::Database(DatabaseError::Storage(StorageError::Corrupted(reason))) => damaged(path, reason),
            Self::Database(error) => OpenError::Storage { path, source: error.into() },
        }
    }
}

fn try_open(
    path: &Path,
    file: &impl Medium,
    cache_bytes: usize,
    how: Open,
    io: &Arc<IoCounters>,
) -> Result<Database, Refusal> {
    let backend = file.backend(io)?;
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
    let opened = catch_unwind(AssertUnwindSafe(|| builder.create_with_backend(backend)));
    match opened {
        Ok(Ok(db)) => Ok(db),
        Ok(Err(_)) if unclean.load(Ordering::Relaxed) => Err(Refusal::Unclean),
        Ok(Err(error)) => Err(Refusal::Database(error)),
        Err(_) => {
            tracing::error!(path = %path.display(), "the storage engine panicked while opening");
            Err(Refusal::Panicked)
        }
    }
}

/// Runs what reads a file that has just been opened. redb may panic on a damaged one that was closed cleanly, and so
/// was not verified; and whatever is wrong, the error names the file.
pub(crate) fn guarded<T>(path: &Path, read: impl FnOnce() -> StoreResult<T>) -> StoreResult<T, OpenError> {
    let path = || path.to_owned();
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Error::Open(error))) => Err(error),
        Ok(Err(Error::Corrupt(error))) => Err(OpenError::Damaged { path: path(), reason: error.to_string() }),
        Ok(Err(error)) => Err(OpenError::Storage { path: path(), source: error.into() }),
        Err(_) => Err(Refusal::Panicked.into_error(&path())),
    }
}

/// Closes; of a damaged file this may panic too.
pub(crate) fn close(db: Database) -> Result<(), BoxError> {
    match catch_unwind(AssertUnwindSafe(|| db.close())) {
        Ok(closed) => closed.map_err(Into::into),
        Err(_) => Err("the storage engine panicked".into()),
    }
}

/// Makes a store beside `path` and links it into place, unless another process was faster.
fn create_aside(
    path: &Path,
    cache_bytes: usize,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let name = path
        .file_name()
        .ok_or_else(|| OpenError::NotAStore { path: path.into(), reason: "the path names no file".into() })?;
    let folder = folder_of(path);
    let prefix = format!(".{}.creating-", name.to_string_lossy());
    remove_left_over(folder, &prefix);
    let aside = folder.join(format!("{prefix}{}", fresh_uuid_text()));
    let made = make(&aside, cache_bytes, initialise).and_then(|locked| {
        let placed = put_in_place(&aside, path);
        // Said, not left to closing: a process that is being forked elsewhere may hold a copy of the handle for a moment.
        let _ = locked.unlock();
        placed
    });
    if made.is_err() {
        // Best effort: what cannot be removed now is removed by the next creation.
        let _ = std::fs::remove_file(&aside);
    }
    made?;
    sync_folder(folder)
}

fn make(
    aside: &Path,
    cache_bytes: usize,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<File, OpenError> {
    let io = |action, source| OpenError::Io { action, path: aside.into(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    owner_only(&mut options);
    let file = options.open(aside).map_err(|source| io("create", source))?;
    make_database(aside, &file, cache_bytes, initialise)?;
    // Locked until it is in place: other creations take what is free for a left-over.
    if let Err(error) = file.try_lock() {
        tracing::debug!(%error, "cannot lock the new file");
    }
    file.sync_all().map_err(|source| io("sync", source))?;
    Ok(file)
}

/// The engine's part of a creation. What it leaves is nobody's until it is synced and in place.
pub(super) fn make_database(
    path: &Path,
    file: &impl Medium,
    cache_bytes: usize,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let db = try_open(path, file, cache_bytes, Open::Verify, &Arc::default())
        .map_err(|refusal| refusal.into_error(path))?;
    initialise(&db)?;
    db.close().map_err(|error| OpenError::Storage { path: path.into(), source: error.into() })
}

/// Links, so that a file that another process has put there meanwhile is never replaced; renames over an empty file,
/// and where the file system has no links.
fn put_in_place(aside: &Path, path: &Path) -> Result<(), OpenError> {
    let io = |source| OpenError::Io { action: "create", path: path.into(), source };
    let empty = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == 0);
    // Held until the rename: of two that found the same empty file, the second must not replace the first one's store.
    let mut _held = None;
    if empty {
        _held = hold_empty(path);
        if _held.is_none() {
            return remove(aside).map_err(io);
        }
    } else {
        match std::fs::hard_link(aside, path) {
            Ok(()) => return remove(aside).map_err(io),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return remove(aside).map_err(io);
            }
            // Another creation took ours for a left-over, in the moment between close and link: the next round makes it anew.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => tracing::debug!(%error, "no hard links here; renaming instead"),
        }
    }
    match std::fs::rename(aside, path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        renamed => renamed.map_err(io),
    }
}

/// Removes a file that another creation may have taken for a left-over, in the moment before it was locked.
fn remove(aside: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(aside) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The empty file at `path`, locked; `None` if it is no longer there, or another creation has it.
fn hold_empty(path: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    owner_only(&mut options);
    let file = options.open(path).ok()?;
    file.try_lock().ok()?;
    let (held, named) = (file.metadata().ok()?, std::fs::symlink_metadata(path).ok()?);
    (named.is_file() && named.len() == 0 && same_file(&held, &named)).then_some(file)
}

#[cfg(unix)]
fn same_file(a: &std::fs::Metadata, b: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(_: &std::fs::Metadata, _: &std::fs::Metadata) -> bool {
    true
}

/// Removes what a crash during an earlier creation has left. A file that another process is making is locked, and left.
fn remove_left_over(folder: &Path, prefix: &str) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        let free = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if free && let Err(error) = std::fs::remove_file(entry.path()) {
            tracing::debug!(%error, path = %entry.path().display(), "cannot remove a left-over file");
        }
    }
}

/// Makes the new name itself durable. Windows has no such call; there the rename is durable with the file's metadata.
fn sync_folder(folder: &Path) -> Result<(), OpenError> {
    sync_handle(folder).map_err(|source| OpenError::Io { action: "sync", path: folder.into(), source })
}

fn sync_handle(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a file's name durable, or that it is gone.
pub(super) fn sync_parent(path: &Path) -> std::io::Result<()> {
    sync_handle(folder_of(path))
}
