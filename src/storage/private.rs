//! The owners and modes of files beside the store's file.
//!
//! **The rule.** An existing side file is used only under three conditions. Its owner is the user
//! of this process, root, or the owner of the store's file. It has one name. Its mode lets no other
//! user in. Otherwise another user could have prepared the file, and could read each commit and
//! revert commits.
//!
//! A file that this process has just made is the measure, because some file systems have no owners
//! and no modes of their own.

use std::fs::Metadata;
use std::path::Path;

/// Returns why a side file is not used, if it is not. `fresh` describes a file that this process
/// has just made there, if it could.
#[cfg(unix)]
pub(crate) fn why_not_private(side: &Metadata, fresh: Option<&Metadata>, store: &Metadata) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let seen = |meta: &Metadata| Seen { user: meta.uid(), mode: meta.mode(), names: meta.nlink() };
    judge(seen(side), fresh.map(seen), store.uid())
}

/// On other systems the standard library gives neither owner nor mode.
#[cfg(not(unix))]
pub(crate) fn why_not_private(_: &Metadata, _: Option<&Metadata>, _: &Metadata) -> Option<String> {
    None
}

#[cfg(unix)]
const ROOT: u32 = 0;
/// The mode bits for users other than the owner.
#[cfg(unix)]
const OTHERS: u32 = 0o077;

/// A file system's report of a file.
#[cfg(unix)]
#[derive(Debug, Clone, Copy)]
struct Seen {
    user: u32,
    mode: u32,
    names: u64,
}

#[cfg(unix)]
fn judge(side: Seen, fresh: Option<Seen>, store_owner: u32) -> Option<String> {
    let Seen { user, mode, names } = side;
    let is_ours = [ROOT, store_owner].contains(&user) || fresh.is_some_and(|fresh| fresh.user == user);
    if !is_ours {
        return Some(format!(
            "it belongs to user {user}, not to the user of this process or of the store's file"
        ));
    }
    if names != fresh.map_or(1, |fresh| fresh.names) {
        return Some(format!("the file has {names} names (hard links)"));
    }
    let shown_always = fresh.map_or(0, |fresh| fresh.mode);
    let is_open = mode & OTHERS & !shown_always != 0;
    is_open.then(|| format!("its mode {:04o} lets other users in", mode & 0o7777))
}

/// Warns of a store's file that other users may read or change, or that has more than one name. The
/// file is opened all the same, because such a mode may be wanted.
#[cfg(unix)]
pub(crate) fn warn_if_loose(path: &Path, meta: &Metadata) {
    use std::os::unix::fs::MetadataExt;
    let (mode, names, user) = (meta.mode() & 0o7777, meta.nlink(), meta.uid());
    if mode & OTHERS == 0 && names <= 1 {
        return;
    }
    let mode = format!("{mode:04o}");
    tracing::warn!(
        path = %path.display(), mode, names, user,
        "the store's file is open to other users or has several names: who may read the file can read and lock all of it, and who may \
         write it can change all of it; a mode of 0600 and one name close it"
    );
}

#[cfg(not(unix))]
pub(crate) fn warn_if_loose(_: &Path, _: &Metadata) {}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// Goal: a file that another user can have made, read or changed is not used, on any file
    /// system; other files are. Method: what a file system may show, including one without modes
    /// and owners of its own.
    #[test]
    fn only_what_is_closed_to_others_is_used() {
        let seen = |user, mode: u32, names| Seen { user, mode: 0o100_000 | mode, names };
        let fresh = Some(seen(1000, 0o600, 1));
        for side in [seen(1000, 0o600, 1), seen(ROOT, 0o600, 1), seen(7, 0o400, 1), seen(1000, 0o700, 1)] {
            assert_eq!(judge(side, fresh, 7), None, "{side:?}");
        }
        let not = |side, fresh, text: &str| {
            let reason = judge(side, fresh, 7).unwrap();
            assert!(reason.contains(text), "{reason}");
        };
        not(seen(1001, 0o600, 1), fresh, "user 1001");
        not(seen(1000, 0o600, 1), None, "user 1000");
        not(seen(1000, 0o600, 2), fresh, "2 names");
        not(seen(1000, 0o600, 0), fresh, "0 names");
        for mode in [0o666, 0o660, 0o640, 0o604, 0o602, 0o611, 0o1644] {
            not(seen(1000, mode, 1), fresh, &format!("{mode:04o}"));
            not(seen(7, mode, 1), None, &format!("{mode:04o}"));
        }
        // A file system that shows the same for every file.
        assert_eq!(judge(seen(500, 0o755, 1), Some(seen(500, 0o755, 1)), 500), None);
        not(seen(500, 0o777, 1), Some(seen(500, 0o755, 1)), "0777");
    }
}
