//! Opens the file. The module `create` makes it.
//!
//! **Invariants.** A file that was not closed cleanly is verified before it is used. Only regular
//! files are opened, without waiting. Symbolic links are not followed: `O_NOFOLLOW` holds for the
//! last part of the path, of the store's file and of each side file. An empty file counts as absent
//! only if the application has said so. Every error names the path in the given form.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};

use redb::backends::FileBackend;
use redb::{Database, StorageBackend};

use super::create::create_atomically;
use super::header::{Odd, odd_head};
use super::journal::{Journal, JournalOptions, JournalRefusal, SideFile, is_journaled};
use super::metered::{Counted, IoCounters};
use super::place::{Inode, Standing, ends_as_a_folder, is_same, open_regular, resolved};
use super::private::warn_if_loose;
use super::watch::Watch;
use crate::error::{BoxError, Error, OpenError, Result as StoreResult};
use crate::storage::database::{Medium, Open, Options, Refusal, cannot, file_backend, try_open};
use crate::tuning::{EMPTY_FILE_MS, OPEN_ROUNDS_MAX};

/// A file behind a journal.
struct Journaled<'a> {
    file: &'a File,
    side: SideFile,
    options: JournalOptions,
    /// Why the journal does not let the file be opened.
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

/// An open database, and the circumstances of its open.
pub(crate) struct Opened {
    pub(crate) db: Database,
    /// Whether the database had to be repaired, because its last owner did not close it.
    pub(crate) unclean: bool,
    pub(crate) io: Arc<IoCounters>,
    /// The watch on the names of the store's files.
    pub(crate) watch: Watch,
    /// The file behind the engine, as long as the engine has it.
    pub(crate) pages: Weak<dyn StorageBackend>,
}

/// Opens the file, or makes it with `initialise`.
pub(crate) fn open_or_create(
    given: &Path,
    options: Options,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<Opened, OpenError> {
    let refused = |reason: &str| OpenError::NotAStore { path: given.into(), reason: reason.into() };
    if ends_as_a_folder(given) {
        return Err(refused("the path ends as a folder's does; name a file in it"));
    }
    if given.file_name().is_none() {
        return Err(refused("the path names no file"));
    }
    let path = resolved(given).map_err(|source| cannot("open", given, source))?;
    open_resolved(&path, options, initialise).map_err(|error| error.named_as(&path, given))
}

fn open_resolved(
    path: &Path,
    options: Options,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<Opened, OpenError> {
    // Another process may create or remove the file between our steps. Each round looks again.
    for round in 0..OPEN_ROUNDS_MAX {
        match find(path, options, round)? {
            Found::File(file) => {
                let mut opened = open_file_or_journal(path, &file, options)?;
                let meta = file.metadata().map_err(|source| cannot("open", path, source))?;
                if opened.watch.add("its file", path.into(), Inode::of(&meta)) {
                    warn_if_loose(path, &meta);
                    return Ok(opened);
                }
                if round + 1 == OPEN_ROUNDS_MAX {
                    tracing::warn!(
                        path = %path.display(),
                        "the file system numbers an open file otherwise than its name: should the file be moved or deleted, that is not noticed"
                    );
                    return Ok(Opened { watch: Watch::default(), ..opened });
                }
                // The file was replaced between our look and the engine's lock. The path now leads
                // to another file.
                close(opened.db).map_err(|source| OpenError::Storage { path: path.into(), cause: source })?;
            }
            Found::Nothing if !options.create => {
                return Err(cannot("open", path, ErrorKind::NotFound.into()));
            }
            Found::Nothing | Found::Empty => create_atomically(path, options, initialise)?,
            Found::Changing => std::thread::sleep(std::time::Duration::from_millis(EMPTY_FILE_MS)),
        }
    }
    let source = std::io::Error::other("it appears and disappears while it is being opened");
    Err(cannot("open", path, source))
}

/// What the store's path leads to.
enum Found {
    Nothing,
    /// An empty file that is to be replaced.
    Empty,
    /// An empty file that another process may be about to fill or replace.
    Changing,
    File(File),
}

fn find(path: &Path, options: Options, round: usize) -> Result<Found, OpenError> {
    let failed = |source| cannot("open", path, source);
    let file = match open_regular(path).map_err(failed)? {
        Standing::Nothing => return Ok(Found::Nothing),
        Standing::Symlink => return Err(OpenError::Symlink { path: path.into() }),
        Standing::Odd(kind) => {
            return Err(OpenError::NotAStore { path: path.into(), reason: format!("it is {kind}") });
        }
        Standing::File(file) => file,
    };
    if file.metadata().map_err(failed)?.len() > 0 {
        return Ok(Found::File(file));
    }
    let journal = journal_beside(path, options);
    if options.overwrite_empty && journal.is_none() {
        return Ok(Found::Empty);
    }
    // An engine that makes a database in this very file has locked it. A creation that has just
    // made the name is about to lock it.
    if let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
        return Err(OpenError::Locked { path: path.into() });
    }
    let changed = !is_same(&file, path) || file.metadata().map_err(failed)?.len() > 0;
    file.unlock().map_err(failed)?;
    if changed || round < OPEN_ROUNDS_MAX / 2 {
        return Ok(Found::Changing);
    }
    Err(OpenError::Empty { path: path.into(), journal })
}

/// Returns the path of this store's journal if the file there begins with this library's journal
/// head.
fn journal_beside(path: &Path, options: Options) -> Option<PathBuf> {
    SideFile::of(path, options.sync_folder).ok().and_then(|side| side.stands())
}

fn open_file_or_journal(path: &Path, file: &File, options: Options) -> Result<Opened, OpenError> {
    let failed = |source| cannot("read", path, source);
    let is_journaled = file_backend(file).and_then(|file| is_journaled(&file)).map_err(failed)?;
    let described = |error| described(error, path, file, options);
    if options.journal.bytes == 0 && !is_journaled {
        // If the file has become journaled by now, the engine's lock detects it.
        return open_database(path, file, options.cache_bytes).map_err(described);
    }
    let side = SideFile::of(path, options.sync_folder).and_then(|side| side.beside(file)).map_err(failed)?;
    let journaled = Journaled { file, side, options: options.journal, refusal: JournalRefusal::default() };
    // A file whose journal is given up may hold half a commit, whatever its header says.
    let first = if options.journal.abandon && is_journaled { Open::Verify } else { Open::IfClean };
    let opened = open_database_as(path, &journaled, options.cache_bytes, first).map_err(|error| {
        let refusal = journaled.refusal.lock().unwrap_or_else(PoisonError::into_inner).take();
        refusal.unwrap_or_else(|| described(error))
    });
    opened.map(|mut opened| {
        if let Some((path, inode)) = journaled.side.in_use() {
            opened.watch.add("its journal", path, inode);
        }
        opened
    })
}

/// Adds what can be seen of a file that the engine refuses: its head, and a journal that shows what
/// the file once was.
fn described(error: OpenError, path: &Path, file: &File, options: Options) -> OpenError {
    if matches!(error, OpenError::Locked { .. }) && is_locked_by_reader(file) {
        return OpenError::LockedByReader { path: path.into() };
    }
    let (OpenError::NotAStore { .. } | OpenError::Damaged { .. }) = &error else { return error };
    let seen = file_backend(file).and_then(|file| odd_head(&file)).ok().flatten();
    let error = match seen {
        Some(Odd::Short(reason)) => OpenError::Damaged { path: path.into(), reason },
        Some(Odd::Foreign(reason)) => OpenError::NotAStore { path: path.into(), reason },
        None => error,
    };
    match (error, journal_beside(path, options)) {
        (OpenError::NotAStore { path, reason }, Some(journal)) => {
            let journal = journal.display();
            let reason = format!(
                "{reason}; a store's journal, {journal}, lies beside it: the store that was here has lost its file, which has to be put \
                 back from a backup"
            );
            OpenError::NotAStore { path, reason }
        }
        (error, _) => error,
    }
}

/// Whether only a lock on the whole file keeps the engine out. An engine holds range locks beside
/// it, and takes them a moment later.
fn is_locked_by_reader(file: &File) -> bool {
    let Ok(ranges) = file_backend(file) else { return false };
    (0..OPEN_ROUNDS_MAX).all(|round| {
        if round > 0 {
            std::thread::sleep(std::time::Duration::from_millis(EMPTY_FILE_MS));
        }
        let is_engines = ranges.query_lock_range(Bound::Unbounded, Bound::Unbounded).unwrap_or(true);
        let is_locked = match file.try_lock() {
            Err(std::fs::TryLockError::WouldBlock) => true,
            Ok(()) => {
                let _ = file.unlock();
                false
            }
            Err(std::fs::TryLockError::Error(_)) => false,
        };
        is_locked && !is_engines
    })
}

pub(crate) fn open_database(
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
        Ok((db, pages)) => {
            Ok(Opened { db, unclean: first == Open::Verify, io, watch: Watch::default(), pages })
        }
        Err(Refusal::Unclean) => {
            tracing::warn!(path = %path.display(), "the store was not closed cleanly; verifying every page");
            match try_open(path, file, cache_bytes, Open::Verify, &io) {
                Ok((db, pages)) => Ok(Opened { db, unclean: true, io, watch: Watch::default(), pages }),
                Err(refusal) => Err(refusal.into_error(path)),
            }
        }
        Err(refusal) => Err(refusal.into_error(path)),
    }
}

/// Runs code that reads a file that has just been opened. redb may panic on a damaged file that was
/// closed cleanly, because such a file was not verified. Every error names the file.
pub(crate) fn guarded<T>(path: &Path, read: impl FnOnce() -> StoreResult<T>) -> StoreResult<T, OpenError> {
    let path = || path.to_owned();
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Error::Open(error))) => Err(error),
        Ok(Err(Error::Corrupt(error))) => Err(OpenError::Damaged { path: path(), reason: error.to_string() }),
        Ok(Err(error)) => Err(OpenError::Storage { path: path(), cause: error.into() }),
        Err(_) => Err(Refusal::Panicked.into_error(&path())),
    }
}

/// Closes the database. With a damaged file the close may panic too.
pub(crate) fn close(db: Database) -> Result<(), BoxError> {
    match catch_unwind(AssertUnwindSafe(|| db.close())) {
        Ok(closed) => closed.map_err(Into::into),
        Err(_) => Err("the storage engine panicked".into()),
    }
}
