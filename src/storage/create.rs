//! Creation of the file.
//!
//! **Invariants.** The path never names a half-made file: a store is made as a temporary file,
//! closed, synced and then linked into place. A file that another process has put there meanwhile
//! is never replaced. Only the file's owner can read and write it. A file is removed or replaced by
//! name only if an open, locked handle proves that it is ours, or abandoned.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;

use redb::Database;

use super::place::{
    self, Standing, folder_of, is_same, open_regular, owner_only, remove_same, short_side_name, side_name,
};
use crate::error::OpenError;
use crate::event::fresh_uuid_text;
use crate::storage::database::{Options, cannot, make_database};

const BEFORE: &str = ".";
const AFTER: &str = ".creating-";
/// The bytes of the UUID that ends a temporary file's name.
const UUID_BYTES: usize = 36;

/// Makes a store beside `path` and links it into place, unless another process was faster.
pub(crate) fn create_atomically(
    path: &Path,
    options: Options,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let folder = folder_of(path);
    let failed = |source| cannot_create(path, source);
    let (temporary, file) = make_temporary(path).map_err(failed)?;
    // An error of the temporary file is reported for the given path.
    let made = fill(&temporary, &file, options.cache_bytes, initialise)
        .map_err(|error| error.named_as(&temporary, path));
    let made = made.and_then(|()| put_in_place(&file, &temporary, path, options).map_err(failed));
    // The file is unlocked explicitly. Closing may not be enough, because a process that is being
    // forked may hold a copy of the handle for a moment.
    let _ = file.unlock();
    if made.is_err()
        && let Err(error) = remove_same(&file, &temporary)
    {
        tracing::debug!(%error, path = %temporary.display(), "left for the next creation to remove");
    }
    made?;
    place::sync_folder(folder, options.sync_folder).map_err(|source| cannot("sync", folder, source))
}

/// Makes the error of a creation, with what its folder has to do with it.
fn cannot_create(path: &Path, source: io::Error) -> OpenError {
    let folder = folder_of(path);
    let text = match source.kind() {
        ErrorKind::NotFound if !folder.exists() => format!("its folder {} does not exist", folder.display()),
        ErrorKind::NotADirectory => format!("{} is not a folder", folder.display()),
        ErrorKind::PermissionDenied => format!("its folder {} is not writable: {source}", folder.display()),
        ErrorKind::ReadOnlyFilesystem => format!("its folder {} is read-only: {source}", folder.display()),
        _ => return cannot("create", path, source),
    };
    cannot("create", path, io::Error::new(source.kind(), text))
}

/// Makes an empty file with a name of its own beside `path`. Removes such files that crashes have
/// left.
pub(crate) fn make_temporary(path: &Path) -> io::Result<(std::path::PathBuf, File)> {
    let folder = folder_of(path);
    let name = path.file_name().unwrap_or_default();
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    owner_only(&mut options);
    let make = |prefix: OsString| {
        remove_left_over(folder, &prefix);
        let mut name = prefix;
        name.push(fresh_uuid_text());
        let temporary = folder.join(name);
        options.open(&temporary).map(|file| (temporary, file))
    };
    match make(side_name(BEFORE, name, AFTER, UUID_BYTES)) {
        // Some file systems take shorter names only.
        Err(error) if error.kind() == ErrorKind::InvalidFilename => {
            make(short_side_name(BEFORE, name, AFTER))
        }
        made => made,
    }
}

fn fill(
    temporary: &Path,
    file: &File,
    cache_bytes: usize,
    initialise: &dyn Fn(&Database) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    make_database(temporary, file, cache_bytes, initialise)?;
    // The file stays locked until it is in place, because other creations take an unlocked file for
    // a left-over.
    if let Err(error) = file.try_lock() {
        tracing::debug!(%error, "cannot lock the new file");
    }
    // The file's length is synced with it. The folder's sync keeps its name.
    file.sync_data().map_err(|source| cannot("sync", temporary, source))
}

/// Puts the new store at its path by a hard link, which never replaces a file of another process. A
/// rename replaces an empty file that the application gives up. On a file system without links, an
/// empty file is made for that rename first.
fn put_in_place(file: &File, temporary: &Path, path: &Path, options: Options) -> io::Result<()> {
    let is_empty = || std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == 0);
    if !(options.overwrite_empty && is_empty()) {
        match std::fs::hard_link(temporary, path) {
            Ok(()) => return remove_same(file, temporary).map(drop),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return remove_same(file, temporary).map(drop);
            }
            // Another creation took our file for a left-over between close and link. The next round
            // makes it again.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => tracing::debug!(%error, "no hard links here; renaming instead"),
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        owner_only(&mut options);
        match options.open(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return remove_same(file, temporary).map(drop);
            }
            made => drop(made?),
        }
    }
    // The lock is held until the rename. If two creations find the same empty file, the second must
    // not replace the first one's store.
    let Some(_held) = hold_empty(path) else { return remove_same(file, temporary).map(drop) };
    if !is_same(file, temporary) {
        return Ok(());
    }
    match std::fs::rename(temporary, path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        renamed => renamed,
    }
}

/// Locks the empty file at `path`. Returns `None` if it is gone, or if another creation has it.
fn hold_empty(path: &Path) -> Option<File> {
    let Standing::File(file) = open_regular(path).ok()? else { return None };
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return None,
        Err(std::fs::TryLockError::Error(error)) => tracing::debug!(%error, "cannot lock the empty file"),
    }
    (file.metadata().ok()?.len() == 0 && is_same(&file, path)).then_some(file)
}

/// Removes the files that crashed creations have left. A file that another process is making is
/// locked, and stays. A file whose name only begins like a left-over stays too.
fn remove_left_over(folder: &Path, prefix: &OsStr) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if !is_left_over(&entry.file_name(), prefix) {
            continue;
        }
        let Ok(Standing::File(file)) = open_regular(&entry.path()) else { continue };
        if file.try_lock().is_ok()
            && let Err(error) = remove_same(&file, &entry.path())
        {
            tracing::debug!(%error, path = %entry.path().display(), "cannot remove a left-over file");
        }
    }
}

/// Whether a name is a left-over's. Names are compared as bytes, because two names that are not
/// UTF-8 would look alike as text.
fn is_left_over(name: &OsStr, prefix: &OsStr) -> bool {
    let rest = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
    let is_of_uuid = |byte: &u8| byte.is_ascii_hexdigit() || *byte == b'-';
    rest.is_some_and(|rest| (1..=UUID_BYTES).contains(&rest.len()) && rest.iter().all(is_of_uuid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::file::open_or_create;
    use crate::storage::journal::JournalOptions;

    fn initialise(_: &Path, db: &Database) -> Result<(), OpenError> {
        db.begin_write().unwrap().commit().unwrap();
        Ok(())
    }

    fn open(path: &Path, journal_bytes: usize, sync_folder: place::SyncFolder) -> Result<(), OpenError> {
        let journal = JournalOptions { bytes: journal_bytes, abandon: false };
        let options =
            Options { cache_bytes: 1 << 20, journal, create: true, overwrite_empty: false, sync_folder };
        let opened = open_or_create(path, options, &|db| initialise(path, db))?;
        crate::storage::file::close(opened.db)
            .map_err(|source| OpenError::Storage { path: path.into(), cause: source })
    }

    /// Goal: a store is made, opened and closed where its folder cannot be synced. If the sync
    /// fails, that is the error, and the next open finds what was made. Method: the test gives the
    /// answer of the folder's sync, with a journal and without.
    #[cfg(unix)]
    #[test]
    fn a_folder_that_cannot_be_synced_ends_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let never: [place::SyncFolder; 3] = [
            |_| Err(io::Error::from_raw_os_error(libc::EINVAL)),
            |_| Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            |_| Err(io::Error::from_raw_os_error(libc::EPERM)),
        ];
        for journal_bytes in [0, 1 << 20] {
            for (at, sync) in never.into_iter().enumerate() {
                let path = folder.path().join(format!("{journal_bytes}-{at}.redb"));
                open(&path, journal_bytes, sync).unwrap();
                open(&path, journal_bytes, sync).unwrap();
            }
            let path = folder.path().join(format!("{journal_bytes}-fails.redb"));
            let failed = open(&path, journal_bytes, |_| Err(io::Error::from_raw_os_error(libc::EIO)));
            let text = failed.unwrap_err().to_string();
            assert!(text.starts_with(&format!("cannot sync {}: ", folder.path().display())), "{text}");
            open(&path, journal_bytes, place::sync_handle).unwrap();
        }
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 8, "a journal or a temporary file is left");
    }

    /// Goal: on a file system without hard links, no file that another process has put at the path
    /// meanwhile is replaced. Method: the path is taken between the look and the placing, by a
    /// store, and by an empty file without a request to replace it.
    #[test]
    fn what_has_come_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let journal = JournalOptions::default();
        let options = Options {
            cache_bytes: 1 << 20,
            journal,
            create: true,
            overwrite_empty: false,
            sync_folder: place::sync_handle,
        };
        for there in ["somebody else's", ""] {
            let take = |db: &Database| {
                std::fs::write(&path, there).unwrap();
                initialise(&path, db)
            };
            create_atomically(&path, options, &take).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), there);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is left");
        }
    }
}
