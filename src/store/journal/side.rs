//! The journal's file: beside the store's, of its name with `.journal` behind.
//!
//! **Invariants.** The file is locked for as long as it is in use, so no other store takes it for one that is free. It is removed by name
//! only while the name leads to the file that is open here.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;
use redb::backends::FileBackend;

use super::life::{Lives, Sides, is_headed};
use crate::error::OpenError;
use crate::store::counted::{Counted, IoCounters};
use crate::store::file::file_backend;
use crate::store::head::odd_head;
use crate::store::place::{
    self, Inode, Standing, SyncFolder, folder_of, open_regular, owner_only, remove_same, short_side_name,
    side_name,
};

const AFTER: &str = ".journal";

/// Whether the file says that a journal may hold what it does not. Not locked, the answer may be old.
pub(crate) fn is_journaled(file: &impl StorageBackend) -> io::Result<bool> {
    Ok(Lives::of(file)?.is_some_and(Lives::is_one_open))
}

/// Where the journal of a store is.
#[derive(Debug, Clone)]
pub(crate) struct SideFile {
    path: PathBuf,
    counters: Arc<IoCounters>,
    sync_folder: SyncFolder,
    /// The file in use, to prove by what a name means.
    used: Arc<Mutex<Option<File>>>,
}

impl SideFile {
    /// `store` is a path from the root on: the process may change its folder before the store is closed.
    pub(crate) fn of(store: &Path, sync_folder: SyncFolder) -> io::Result<Self> {
        let name = store.file_name().ok_or(ErrorKind::InvalidFilename)?;
        let mut path = store.with_file_name(side_name("", name, AFTER, 0));
        // Some file systems take shorter names only.
        if std::fs::symlink_metadata(&path).is_err_and(|error| error.kind() == ErrorKind::InvalidFilename) {
            path = store.with_file_name(short_side_name(".", name, AFTER));
        }
        Ok(Self { path, counters: Arc::default(), sync_folder, used: Arc::default() })
    }

    pub(crate) fn counted_by(&self, counters: &Arc<IoCounters>) -> Self {
        Self { counters: Arc::clone(counters), ..self.clone() }
    }

    /// Where it is, if something stands there that this library has written.
    pub(crate) fn stands(&self) -> Option<PathBuf> {
        let Ok(Standing::File(file)) = open_regular(&self.path) else { return None };
        let is_ours = file_backend(&file).and_then(|file| is_headed(&file)).unwrap_or(false);
        is_ours.then(|| self.path.clone())
    }

    /// Where it is, and which file, if it is in use.
    pub(crate) fn in_use(&self) -> Option<(PathBuf, Inode)> {
        let meta = self.used().as_ref().and_then(|file| file.metadata().ok())?;
        Some((self.path.clone(), Inode::of(&meta)))
    }

    fn used(&self) -> MutexGuard<'_, Option<File>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks it, for as long as it is in use.
    fn take(&self, file: File) -> Result<Counted<FileBackend>, OpenError> {
        let failed = |source| OpenError::Io { action: "open", path: self.path.clone(), source };
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
        *self.used() = Some(file);
        Ok(backend)
    }
}

impl Sides for SideFile {
    type Side = Counted<FileBackend>;

    fn path(&self) -> &Path {
        &self.path
    }

    fn check_head(&self, main: &impl StorageBackend) -> io::Result<()> {
        // What is wrong with it is told with the engine's refusal.
        if odd_head(main)?.is_some() { Err(ErrorKind::InvalidData.into()) } else { Ok(()) }
    }

    fn open(&self) -> Result<Option<Self::Side>, OpenError> {
        let path = || self.path.clone();
        match open_regular(&self.path) {
            Ok(Standing::Nothing) => Ok(None),
            Ok(Standing::Symlink) => Err(OpenError::Symlink { path: path() }),
            Ok(Standing::Odd(_)) => Err(OpenError::JournalInTheWay { path: path() }),
            Ok(Standing::File(file)) => self.take(file).map(Some),
            Err(source) => Err(OpenError::Io { action: "open", path: path(), source }),
        }
    }

    fn create(&self) -> Result<Self::Side, OpenError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        owner_only(&mut options);
        let failed = |source| OpenError::Io { action: "create", path: self.path.clone(), source };
        self.take(options.open(&self.path).map_err(failed)?)
    }

    fn sync_name(&self) -> io::Result<()> {
        place::sync_folder(folder_of(&self.path), self.sync_folder)
    }

    fn remove(&self) -> io::Result<()> {
        let Some(file) = self.used().take() else { return Ok(()) };
        let removed = remove_same(&file, &self.path);
        // Said, not left to closing: a process that is being forked elsewhere may hold a copy of the handle for a moment.
        let _ = file.unlock();
        if removed? {
            return self.sync_name();
        }
        tracing::warn!(
            path = %self.path.display(),
            "the journal is no longer at its place; what is there now is left as it is"
        );
        Ok(())
    }

    fn let_go(&self) {
        if let Some(file) = self.used().take() {
            let _ = file.unlock();
        }
    }
}
