//! The journal's file: beside the store's, of its name with `.journal` behind.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::StorageBackend;
use redb::backends::FileBackend;

use super::life::{Lives, Sides};
use crate::error::OpenError;
use crate::store::counted::{Counted, IoCounters};
use crate::store::file::{file_backend, owner_only, sync_parent};

/// Whether the file says that a journal may hold what it does not. Not locked, the answer may be old.
pub(crate) fn is_journaled(file: &impl StorageBackend) -> io::Result<bool> {
    Ok(Lives::of(file)?.is_some_and(Lives::is_one_open))
}

/// Where the journal of a store is.
#[derive(Debug, Clone)]
pub(crate) struct SideFile {
    path: PathBuf,
    counters: Arc<IoCounters>,
}

impl SideFile {
    pub(crate) fn of(store: &Path) -> io::Result<Self> {
        // The process may change its folder before the store is closed.
        let mut path = OsString::from(std::path::absolute(store)?);
        path.push(".journal");
        Ok(Self { path: path.into(), counters: Arc::default() })
    }

    pub(crate) fn counted_by(&self, counters: &Arc<IoCounters>) -> Self {
        Self { counters: Arc::clone(counters), path: self.path.clone() }
    }

    fn backend(&self, file: &File) -> io::Result<Counted<FileBackend>> {
        let counters = Arc::clone(&self.counters);
        Ok(Counted { file: file_backend(file)?, counters, unless_journaled: false })
    }
}

impl Sides for SideFile {
    type Side = Counted<FileBackend>;

    fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self) -> Result<Option<Self::Side>, OpenError> {
        let path = || self.path.clone();
        let failed = |source| OpenError::Io { action: "open", path: path(), source };
        match std::fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(meta) if meta.is_symlink() => return Err(OpenError::Symlink { path: path() }),
            Ok(meta) if !meta.is_file() => return Err(OpenError::JournalInTheWay { path: path() }),
            Ok(_) => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        owner_only(&mut options);
        let file = options.open(&self.path).map_err(failed)?;
        self.backend(&file).map(Some).map_err(failed)
    }

    fn create(&self) -> io::Result<Self::Side> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        owner_only(&mut options);
        let file = options.open(&self.path)?;
        self.backend(&file)
    }

    fn sync_name(&self) -> io::Result<()> {
        sync_parent(&self.path)
    }

    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed?,
        }
        sync_parent(&self.path)
    }
}
