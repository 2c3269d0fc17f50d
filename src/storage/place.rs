//! Names in a folder: which file a name leads to, how side files are named, and whether the folder
//! can be synced.
//!
//! **Invariants.** A file is opened through [`open_regular`], which follows no symbolic link and
//! never waits for a pipe. A file is removed by name through [`remove_same`], which first proves
//! that the name leads to the open file. Between that proof and the removal another process can
//! still change the name, because no system call does both.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::limits::FILE_NAME_BYTES_MAX;
use crate::tuning::UNSYNCED_FOLDERS_MAX;

/// The function that syncs a folder. It is a parameter, so that tests can give the file system's
/// answer.
pub(crate) type SyncFolder = fn(&Path) -> io::Result<()>;

/// The identity of a file, independent of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    #[cfg(unix)]
    pub(crate) fn of(meta: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self { device: meta.dev(), number: meta.ino() }
    }

    /// On other systems the standard library gives no file number, so all files count as the same.
    #[cfg(not(unix))]
    pub(crate) fn of(_: &Metadata) -> Self {
        Self { device: 0, number: 0 }
    }
}

#[cfg(unix)]
pub(crate) fn owner_only(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK);
}

#[cfg(not(unix))]
pub(crate) fn owner_only(_: &mut OpenOptions) {}

/// The kind of file at a name.
#[derive(Debug)]
pub(crate) enum Standing {
    Nothing,
    Symlink,
    /// A folder, a device, a pipe, a socket.
    Odd(&'static str),
    File(File),
}

/// Opens the regular file at `path` for reading and writing. It does not open pipes and devices: a
/// pipe would wait, and a device might act. It checks the open handle again, because another
/// process may have changed the name in between.
pub(crate) fn open_regular(path: &Path) -> io::Result<Standing> {
    let meta = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Standing::Nothing),
        meta => meta?,
    };
    if meta.file_type().is_symlink() {
        return Ok(Standing::Symlink);
    }
    if let Some(kind) = odd_kind(&meta) {
        return Ok(Standing::Odd(kind));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    owner_only(&mut options);
    let file = match options.open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Standing::Nothing),
        file => file?,
    };
    match odd_kind(&file.metadata()?) {
        Some(kind) => Ok(Standing::Odd(kind)),
        None => Ok(Standing::File(file)),
    }
}

fn odd_kind(meta: &Metadata) -> Option<&'static str> {
    if meta.is_file() {
        return None;
    }
    if meta.is_dir() {
        return Some("a folder");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = meta.file_type();
        if kind.is_fifo() {
            return Some("a pipe");
        }
        if kind.is_socket() {
            return Some("a socket");
        }
        if kind.is_block_device() || kind.is_char_device() {
            return Some("a device");
        }
    }
    Some("no regular file")
}

/// Whether `path` leads to the open file. An error of the system gives `false`, because there is no
/// proof then.
pub(crate) fn is_same(file: &File, path: &Path) -> bool {
    let named = std::fs::symlink_metadata(path);
    named.is_ok_and(|named| file.metadata().is_ok_and(|held| Inode::of(&held) == Inode::of(&named)))
}

/// Removes the name if it leads to the open file. Returns `false` if it does not, or leads nowhere.
pub(crate) fn remove_same(file: &File, path: &Path) -> io::Result<bool> {
    if !is_same(file, path) {
        return Ok(false);
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true),
    }
}

/// Returns the absolute path, which stays valid when the process changes its folder. Symbolic links
/// to folders are followed now. So a link that changes later does not affect an open store.
pub(crate) fn resolved(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    if cfg!(not(unix)) {
        return Ok(absolute);
    }
    let resolved = absolute.parent().map(std::fs::canonicalize).and_then(Result::ok);
    Ok(match resolved.zip(absolute.file_name()) {
        Some((folder, name)) => folder.join(name),
        None => absolute,
    })
}

pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether the path is written like a folder's. The standard library drops a slash at the end; the
/// operating system does not.
pub(crate) fn ends_as_a_folder(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    let bytes =
        bytes.strip_suffix(b".").filter(|bytes| bytes.last().is_none_or(is_separator)).unwrap_or(bytes);
    bytes.last().is_some_and(is_separator)
}

fn is_separator(byte: &u8) -> bool {
    std::path::is_separator(char::from(*byte))
}

/// Joins `before`, `name` and `after` to one name. A hash replaces `name` if the whole would be too
/// long.
pub(crate) fn side_name(before: &str, name: &OsStr, after: &str, more_bytes: usize) -> OsString {
    let fits = before.len() + name.len() + after.len() + more_bytes <= FILE_NAME_BYTES_MAX;
    joined(before, if fits { name.to_owned() } else { short(name) }, after)
}

/// Joins the name like [`side_name`], with the hash, for a file system that takes only shorter
/// names.
pub(crate) fn short_side_name(before: &str, name: &OsStr, after: &str) -> OsString {
    joined(before, short(name), after)
}

fn joined(before: &str, name: OsString, after: &str) -> OsString {
    let mut whole = OsString::from(before);
    whole.push(name);
    whole.push(after);
    whole
}

/// Returns the FNV-1a hash of the name's bytes, which is the same in every version and on every
/// machine.
fn short(name: &OsStr) -> OsString {
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in name.as_encoded_bytes() {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    format!("onewrite-{hash:032x}").into()
}

/// Syncs a folder's handle. Windows has no such call; there a name is durable with the file's
/// metadata.
pub(crate) fn sync_handle(folder: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    let mut options = OpenOptions::new();
    options.read(true);
    folder_only(&mut options);
    options.open(folder)?.sync_all()
}

/// Makes the open not wait for a pipe that has replaced the folder.
#[cfg(unix)]
fn folder_only(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    options.custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC | libc::O_NONBLOCK);
}

#[cfg(not(unix))]
fn folder_only(_: &mut OpenOptions) {}

/// Makes a name in `folder`, or its removal, durable. If the file system cannot do that, a warning
/// says so once for each folder, and the store continues. The contents of files are synced all the
/// same.
pub(crate) fn sync_folder(folder: &Path, sync: SyncFolder) -> io::Result<()> {
    match sync(folder) {
        Err(error) if cannot_be_synced(&error) => {
            if is_first_time(folder) {
                tracing::warn!(
                    %error, folder = %folder.display(),
                    "the folder cannot be synced here; a name made or removed just before a power cut may not be as it was"
                );
            }
            Ok(())
        }
        synced => synced,
    }
}

/// Whether an error of a folder's sync says that the sync is impossible here, and not that it
/// failed.
///
/// CIFS and some FUSE file systems answer EINVAL or ENOSYS; others answer EPERM or EBADF. EACCES
/// comes from a folder that may be written and not read. A failing or full disk (EIO, ENOSPC,
/// EDQUOT), and a process out of handles, stay errors.
fn cannot_be_synced(error: &io::Error) -> bool {
    #[cfg(unix)]
    if let Some(code) = error.raw_os_error() {
        // Two names have one number on some systems, so this is no `match`.
        let codes = [
            libc::EINVAL,
            libc::ENOTSUP,
            libc::EOPNOTSUPP,
            libc::ENOSYS,
            libc::ENOTTY,
            libc::EPERM,
            libc::EACCES,
            libc::EBADF,
            libc::EISDIR,
        ];
        return codes.contains(&code);
    }
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported | ErrorKind::PermissionDenied)
}

fn is_first_time(folder: &Path) -> bool {
    static WARNED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
    let is_first = !warned.iter().any(|warned| warned == folder) && warned.len() < UNSYNCED_FOLDERS_MAX;
    if is_first {
        warned.push(folder.to_owned());
    }
    is_first
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: an error that says "not here" is distinguished from one that says "it failed". Method:
    /// every error of Linux, against the lists in words.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_cannot_be_synced_differs_from_what_has_failed() {
        let cannot: Vec<i32> =
            (1..134).filter(|code| cannot_be_synced(&io::Error::from_raw_os_error(*code))).collect();
        let listed = [
            libc::EPERM,
            libc::EBADF,
            libc::EACCES,
            libc::EISDIR,
            libc::EINVAL,
            libc::ENOTTY,
            libc::ENOSYS,
            libc::EOPNOTSUPP,
        ];
        assert_eq!(cannot, listed);
        for real in
            [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EROFS, libc::EMFILE, libc::ENFILE, libc::ESTALE]
        {
            let failed = sync_folder_answering(real).unwrap_err();
            assert_eq!(failed.raw_os_error(), Some(real));
        }
        listed.into_iter().for_each(|code| sync_folder_answering(code).unwrap());
    }

    #[cfg(target_os = "linux")]
    fn sync_folder_answering(code: i32) -> io::Result<()> {
        thread_local! {
            static ANSWER: std::cell::Cell<i32> = const { std::cell::Cell::new(0) };
        }
        ANSWER.set(code);
        sync_folder(Path::new("/anywhere"), |_| Err(io::Error::from_raw_os_error(ANSWER.get())))
    }

    /// Goal: side files keep their long names wherever these fit, get short names elsewhere, and
    /// different names stay different.
    #[test]
    fn side_names_fit_and_are_apart() {
        for len in 1..=300 {
            let (one, other) = ("s".repeat(len), format!("{}t", "s".repeat(len - 1)));
            let [one_side, other_side] =
                [&one, &other].map(|name| side_name("", name.as_ref(), ".journal", 0).into_string().unwrap());
            assert_eq!(one_side == format!("{one}.journal"), len <= 247, "{len}");
            assert!(one_side.len() <= 255 && one_side != other_side);
            assert_eq!(one_side, side_name("", one.as_ref(), ".journal", 0).into_string().unwrap());
        }
        // The hash never changes, because existing files are found by it.
        assert_eq!(short("a".as_ref()), "onewrite-d228cb696f1a8caf78912b704e4a8964");
    }

    /// Goal: only a path that is written like a folder's ends as a folder's.
    #[test]
    fn paths_that_end_as_a_folder() {
        for path in ["a/", "a//", "/a/.", "./", "/"] {
            assert!(ends_as_a_folder(path.as_ref()), "{path}");
        }
        for path in ["a", "a.", "a/b.", "..", "a/..", ".", "", "a/.b"] {
            assert!(!ends_as_a_folder(path.as_ref()), "{path}");
        }
    }
}
