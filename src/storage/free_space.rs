//! How much is free on the disk of a store's file.

use std::path::Path;

/// What a file system says of itself, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    /// Free to users who are not root.
    pub(crate) free: u64,
    pub(crate) total: u64,
}

/// `None` where it is not known.
#[cfg(unix)]
pub(crate) fn space_at(path: &Path) -> Option<Space> {
    let of = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(of.f_frsize);
    // Some file systems do not say how large they are.
    (of.f_blocks > 0).then(|| Space { free: bytes(of.f_bavail), total: bytes(of.f_blocks) })
}

/// The standard library does not say.
#[cfg(not(unix))]
pub(crate) fn space_at(_: &Path) -> Option<Space> {
    None
}
