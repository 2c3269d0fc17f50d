//! The journal's file: beside the store's, of its name with `-journal` behind. It is there while the store is open, and after a crash.
//!
//! **Invariants.** Whoever reads or writes it holds its lock. It is emptied only once all it holds is in the store's file and synced there, and
//! removed only where that was closed, or is no longer written through a journal.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use redb::StorageBackend;
use redb::backends::FileBackend;

use super::BLOCK_BYTES;
use super::frame::{BLOCK, Hole, replay};
use crate::error::OpenError;
use crate::limits::JOURNAL_BYTES_MAX;
use crate::store::file::{owner_only, same_file, sync_parent};

/// Where the journal of a store is.
pub(crate) fn path_of(store: &Path) -> PathBuf {
    let mut path = OsString::from(store);
    path.push("-journal");
    path.into()
}

/// The journal's file, locked.
#[derive(Debug)]
pub(crate) struct Side {
    file: File,
    pub(crate) path: PathBuf,
    /// It was there before: whatever it held is in the store's file.
    pub(crate) found: bool,
}

/// Brings what a crash has left in a journal into the store's file; then makes the journal, of so many bytes of zeros. `None` if there was none and there is to
/// be none.
///
/// # Errors
/// [`OpenError::Locked`] if another process has it, [`OpenError::Damaged`] if a frame that is not the last does not match its checksum.
pub(crate) fn acquire(store: &Path, main: &File, bytes: usize) -> Result<Option<Side>, OpenError> {
    let path = path_of(store);
    let locked = || OpenError::Locked { path: store.into() };
    let failed = |action| {
        let path = path.clone();
        move |source| OpenError::Io { action, path, source }
    };
    let (file, found) = match open(&path)? {
        Some(file) => (file, true),
        None if bytes == 0 => return Ok(None),
        None => match create(&path) {
            // Nobody had it a moment ago.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(locked()),
            file => (file.map_err(failed("create"))?, false),
        },
    };
    // Whoever had it may have removed it in between.
    let named =
        || std::fs::symlink_metadata(&path).and_then(|named| Ok(same_file(&file.metadata()?, &named)));
    if file.try_lock().is_err() || !named().unwrap_or(false) {
        return Err(locked());
    }
    if found {
        recover(store, main, &path, &file)?;
    }
    fill(&file, &path, bytes).map_err(failed("write"))?;
    Ok(Some(Side { file, path, found }))
}

fn recover(store: &Path, main: &File, path: &Path, file: &File) -> Result<(), OpenError> {
    let failed = |source| OpenError::Io { action: "bring its journal into", path: store.into(), source };
    let damaged = |reason| OpenError::Damaged { path: path.into(), reason };
    let len = file.metadata().map_err(failed)?.len();
    if len > JOURNAL_BYTES_MAX as u64 {
        return Err(damaged(format!("a journal is never as long as {len} bytes")));
    }
    let brought = backend(main).and_then(|main| bring(&main, &backend(file)?)).map_err(failed)?;
    match brought {
        Ok(0) => Ok(()),
        Ok(blocks) => {
            tracing::warn!(path = %path.display(), blocks, "the store was not closed; its journal has been brought into it");
            Ok(())
        }
        Err(Hole { number }) => {
            Err(damaged(format!("frame {number} does not match its checksum, and newer ones follow")))
        }
    }
}

/// Brings what a journal holds into the file, and empties it. How many blocks that were.
pub(super) fn bring<D: StorageBackend>(main: &D, side: &D) -> io::Result<Result<usize, Hole>> {
    let mut bytes = vec![0; usize::try_from(side.len()?).unwrap_or_default()];
    side.read(0, &mut bytes)?;
    let half = bytes.len() / 2 / BLOCK * BLOCK;
    let (a, b) = bytes.split_at_checked(half).unwrap_or_default();
    let blocks = match replay([a, b.get(..half).unwrap_or_default()]) {
        Ok(blocks) => blocks,
        Err(hole) => return Ok(Err(hole)),
    };
    for (number, block) in &blocks {
        main.write(number.checked_mul(BLOCK_BYTES).ok_or(ErrorKind::InvalidData)?, block)?;
    }
    main.sync_data()?;
    // Before anything else is written to the store: what is replayed again would take that back.
    side.set_len(0)?;
    side.sync_data()?;
    Ok(Ok(blocks.len()))
}

fn backend(file: &File) -> io::Result<FileBackend> {
    FileBackend::new(file.try_clone()?).map_err(io::Error::other)
}

impl Side {
    /// The file, for reading and writing.
    pub(crate) fn backend(&self) -> io::Result<FileBackend> {
        backend(&self.file)
    }

    /// The store could not be opened. A journal that was there stays.
    pub(crate) fn discard(self) {
        if !self.found
            && let Err(error) = remove(&self.path)
        {
            tracing::debug!(%error, path = %self.path.display(), "cannot remove the journal");
        }
    }
}

fn open(path: &Path) -> Result<Option<File>, OpenError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Ok(meta) if meta.is_symlink() => return Err(OpenError::Symlink { path: path.into() }),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    owner_only(&mut options);
    match options.open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(OpenError::Io { action: "open", path: path.into(), source }),
    }
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    owner_only(&mut options);
    options.open(path)
}

/// All of it is there, so that it never meets a full disk; and so is its name.
fn fill(file: &File, path: &Path, bytes: usize) -> io::Result<()> {
    let side = backend(file)?;
    let zeros = vec![0; bytes.min(1 << 20)];
    let mut at = 0;
    while at < bytes {
        let part = zeros.get(..zeros.len().min(bytes - at)).unwrap_or_default();
        side.write(at as u64, part)?;
        at += part.len();
    }
    file.sync_all()?;
    sync_parent(path)
}

/// Removes a journal, durably. All it holds is in the store's file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        removed => removed?,
    }
    sync_parent(path)
}
