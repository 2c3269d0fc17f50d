//! The journal's file. It is beside the store's file, and has its name with `.journal` behind.
//!
//! **Invariants.** A journal is made as a temporary file, locked, and renamed into place, so an
//! existing file there is never overwritten. An existing journal is read only if no other user can
//! have prepared it (`private`). The file is locked while it is in use, so no other store takes it
//! for a free file. It is removed by name only while the name leads to the file that is open here.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;
use redb::backends::FileBackend;

use super::generation::{Generations, Sides, is_headed};
use crate::error::OpenError;
use crate::storage::create::make_temporary;
use crate::storage::database::file_backend;
use crate::storage::header::odd_head;
use crate::storage::metered::{Counted, IoCounters};
use crate::storage::place::{
    self, Inode, Standing, SyncFolder, folder_of, is_same, open_regular, remove_same, short_side_name,
    side_name,
};
use crate::storage::private::why_not_private;

const AFTER: &str = ".journal";

/// Whether the file says that a journal may hold what the file does not. Without a lock, the answer
/// may be outdated.
pub(crate) fn is_journaled(file: &impl StorageBackend) -> io::Result<bool> {
    Ok(Generations::of(file)?.is_some_and(Generations::is_one_open))
}

/// The place of a store's journal.
#[derive(Debug, Clone)]
pub(crate) struct SideFile {
    path: PathBuf,
    counters: Arc<IoCounters>,
    sync_folder: SyncFolder,
    /// The store's file, if it is open.
    store: Option<Metadata>,
    /// The file in use, to prove what a name leads to.
    used: Arc<Mutex<Option<Used>>>,
}

/// A file in use.
#[derive(Debug)]
struct Used {
    file: File,
    /// The file's present name.
    name: PathBuf,
}

impl SideFile {
    /// Makes the place of a store's journal. `store` is an absolute path, because the process may
    /// change its folder before the store is closed.
    pub(crate) fn of(store: &Path, sync_folder: SyncFolder) -> io::Result<Self> {
        let name = store.file_name().ok_or(ErrorKind::InvalidFilename)?;
        let mut path = store.with_file_name(side_name("", name, AFTER, 0));
        // Some file systems take shorter names only.
        if std::fs::symlink_metadata(&path).is_err_and(|error| error.kind() == ErrorKind::InvalidFilename) {
            path = store.with_file_name(short_side_name(".", name, AFTER));
        }
        Ok(Self { path, counters: Arc::default(), sync_folder, store: None, used: Arc::default() })
    }

    /// Adds the store's open file.
    pub(crate) fn beside(self, store: &File) -> io::Result<Self> {
        Ok(Self { store: Some(store.metadata()?), ..self })
    }

    pub(crate) fn counted_by(&self, counters: &Arc<IoCounters>) -> Self {
        Self { counters: Arc::clone(counters), ..self.clone() }
    }

    /// Returns the path if a file there begins with this library's journal head.
    pub(crate) fn stands(&self) -> Option<PathBuf> {
        let Ok(Standing::File(file)) = open_regular(&self.path) else { return None };
        let is_ours = file_backend(&file).and_then(|file| is_headed(&file)).unwrap_or(false);
        is_ours.then(|| self.path.clone())
    }

    /// Returns the path and the identity of the file in use.
    pub(crate) fn in_use(&self) -> Option<(PathBuf, Inode)> {
        let used = self.used();
        let used = used.as_ref()?;
        Some((used.name.clone(), Inode::of(&used.file.metadata().ok()?)))
    }

    fn used(&self) -> MutexGuard<'_, Option<Used>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a file that another user can have prepared.
    fn check_private(&self, file: &File) -> Result<(), OpenError> {
        let failed = |source| OpenError::Io { action: "look at", path: self.path.clone(), cause: source };
        let side = file.metadata().map_err(failed)?;
        // If no file can be made there, the store's file alone is the measure.
        let fresh = make_temporary(&self.path).and_then(|(temporary, file)| {
            let fresh = file.metadata();
            remove_same(&file, &temporary)?;
            fresh
        });
        let store = self.store.as_ref().unwrap_or(&side);
        match why_not_private(&side, fresh.as_ref().ok(), store) {
            Some(reason) => Err(OpenError::JournalNotPrivate { path: self.path.clone(), reason }),
            None => Ok(()),
        }
    }

    /// Locks the file for as long as it is in use.
    fn take(&self, file: File, name: PathBuf) -> Result<Counted<FileBackend>, OpenError> {
        let failed = |source| OpenError::Io { action: "open", path: self.path.clone(), cause: source };
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(OpenError::Locked { path: self.path.clone() });
            }
            Err(std::fs::TryLockError::Error(error)) => tracing::debug!(%error, "cannot lock the journal"),
        }
        let counters = Arc::clone(&self.counters);
        let backend =
            Counted { file: file_backend(&file).map_err(failed)?, counters, unless_journaled: false };
        *self.used() = Some(Used { file, name });
        Ok(backend)
    }
}

impl Sides for SideFile {
    type Side = Counted<FileBackend>;

    fn path(&self) -> &Path {
        &self.path
    }

    fn check_head(&self, main: &impl StorageBackend) -> io::Result<()> {
        // The engine's refusal reports what is wrong with the file.
        if odd_head(main)?.is_some() { Err(ErrorKind::InvalidData.into()) } else { Ok(()) }
    }

    fn open(&self) -> Result<Option<Self::Side>, OpenError> {
        let path = || self.path.clone();
        match open_regular(&self.path) {
            Ok(Standing::Nothing) => Ok(None),
            Ok(Standing::Symlink) => Err(OpenError::Symlink { path: path() }),
            Ok(Standing::Odd(_)) => Err(OpenError::JournalInTheWay { path: path() }),
            Ok(Standing::File(file)) => {
                self.check_private(&file)?;
                self.take(file, path()).map(Some)
            }
            Err(source) => Err(OpenError::Io { action: "open", path: path(), cause: source }),
        }
    }

    fn create(&self) -> Result<Self::Side, OpenError> {
        let failed = |source| OpenError::Io { action: "create", path: self.path.clone(), cause: source };
        let (temporary, file) = make_temporary(&self.path).map_err(failed)?;
        self.take(file, temporary)
    }

    fn put_in_place(&self) -> Result<(), OpenError> {
        let failed = |source| OpenError::Io { action: "create", path: self.path.clone(), cause: source };
        let in_the_way = || OpenError::JournalInTheWay { path: self.path.clone() };
        let mut used = self.used();
        let Some(used) = used.as_mut() else { return Err(failed(ErrorKind::NotFound.into())) };
        match std::fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            // The file was not there a moment ago.
            Ok(_) => return Err(in_the_way()),
        }
        if !is_same(&used.file, &used.name) {
            return Err(failed(std::io::Error::other(
                "another process has changed it while it was being made",
            )));
        }
        std::fs::rename(&used.name, &self.path).map_err(failed)?;
        used.name.clone_from(&self.path);
        if is_same(&used.file, &self.path) { Ok(()) } else { Err(in_the_way()) }
    }

    fn sync_name(&self) -> io::Result<()> {
        place::sync_folder(folder_of(&self.path), self.sync_folder)
    }

    fn remove(&self) -> io::Result<()> {
        let Some(Used { file, name }) = self.used().take() else { return Ok(()) };
        let removed = remove_same(&file, &name);
        // The file is unlocked explicitly. Closing may not be enough, because a process that is
        // being forked may hold a copy of the handle for a moment.
        let _ = file.unlock();
        if removed? {
            return self.sync_name();
        }
        tracing::warn!(
            path = %name.display(),
            "the journal is no longer at its place; what is there now is left as it is"
        );
        Ok(())
    }

    fn let_go(&self) {
        if let Some(Used { file, .. }) = self.used().take() {
            let _ = file.unlock();
        }
    }
}
