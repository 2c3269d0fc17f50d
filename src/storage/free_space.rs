//! The free space on the disk of a store's file.

use std::path::Path;

/// The size of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    /// The space that is free to users other than root.
    pub(crate) free: u64,
    pub(crate) total: u64,
}

/// Returns the space; `None` if it is not known.
#[cfg(unix)]
pub(crate) fn space_at(path: &Path) -> Option<Space> {
    let of = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(of.f_frsize);
    // Some file systems do not report their size.
    (of.f_blocks > 0).then(|| Space { free: bytes(of.f_bavail), total: bytes(of.f_blocks) })
}

/// The standard library has no such call.
#[cfg(not(unix))]
pub(crate) fn space_at(_: &Path) -> Option<Space> {
    None
}
