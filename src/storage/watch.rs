//! Watches the names of an open store's files, and whether they still lead to these files.
//!
//! An open file stays usable when another process deletes, moves or replaces it. Commits continue,
//! and are lost with the process. So the store looks at its names now and then, and at its close.
//! It is poisoned when a name leads elsewhere.
//!
//! **Invariants.** A look costs one system call per name. Before a transaction begins, a look is
//! due after [`NAME_COMMITS_MAX`] commits, [`NAME_EVENTS_MAX`] events or [`NAME_MS_MAX`] ms since
//! the last look. After a commit without a following commit, the writer thread takes the look. A
//! missing answer of the operating system is no loss.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::place::Inode;
use crate::time::Deadline;
use crate::tuning::{NAME_COMMITS_MAX, NAME_EVENTS_MAX, NAME_MS_MAX};

/// The names of one store.
#[derive(Debug)]
pub(crate) struct Watch {
    names: Vec<Name>,
    /// The root folder at the open. A process that has changed its root folder since cannot find
    /// the names any more.
    root: Option<Inode>,
    last: Mutex<Look>,
    /// The first loss that was found. It stays true: a name that comes back may have missed writes.
    lost: OnceLock<String>,
}

#[derive(Debug)]
struct Name {
    what: &'static str,
    path: PathBuf,
    inode: Inode,
}

/// The time of the last look, and how much the store had written then.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    written: Written,
}

/// How much a store has written since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Written {
    pub(crate) commits: u64,
    pub(crate) next_seq: u64,
}

impl Written {
    fn is_much_since(self, before: Self) -> bool {
        self.commits.saturating_sub(before.commits) >= NAME_COMMITS_MAX
            || self.next_seq.saturating_sub(before.next_seq) >= NAME_EVENTS_MAX
    }
}

impl Default for Watch {
    /// The watch of a store without a name.
    fn default() -> Self {
        let last = Look { at: Instant::now(), written: Written::default() };
        Self {
            names: Vec::new(),
            root: inode("/".as_ref()).ok(),
            last: Mutex::new(last),
            lost: OnceLock::new(),
        }
    }
}

impl Watch {
    /// Watches one more name, which was just found to lead to this file. Returns `false` if it does
    /// not. On a file system whose file numbers differ between a handle and a name, no name can be
    /// watched.
    pub(crate) fn add(&mut self, what: &'static str, path: PathBuf, inode: Inode) -> bool {
        let is_there = matches!(found(inode, self::inode(&path)), Found::Same);
        if is_there {
            self.names.push(Name { what, path, inode });
        }
        is_there
    }

    fn last(&self) -> MutexGuard<'_, Look> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks if a look is due. `Err` says what was found instead of a file.
    pub(crate) fn look_if_due(&self, written: Written) -> Result<(), String> {
        let is_due = {
            let last = self.last();
            written.is_much_since(last.written) || last.at.elapsed() >= Duration::from_millis(NAME_MS_MAX)
        };
        if is_due { self.look(written) } else { Ok(()) }
    }

    /// Returns when the writer thread is to look, if no look has followed the last commit.
    pub(crate) fn due_at(&self, written: Written) -> Option<Deadline> {
        let last = *self.last();
        let is_due = last.written != written && !self.names.is_empty();
        is_due.then(|| Deadline::from(last.at, Duration::from_millis(NAME_MS_MAX)))
    }

    /// Looks at every name. `Err` says what was found instead of a file.
    pub(crate) fn look(&self, written: Written) -> Result<(), String> {
        *self.last() = Look { at: Instant::now(), written };
        if let Some(lost) = self.lost.get() {
            return Err(lost.clone());
        }
        for Name { what, path, inode } in &self.names {
            let seen = match found(*inode, self::inode(path)) {
                Found::Same => continue,
                Found::Unknown(error) => {
                    tracing::debug!(%error, path = %path.display(), what, "cannot look where it is");
                    continue;
                }
                Found::Nothing => "nothing is there now",
                Found::Another => "another file is there now",
            };
            if self.root != self::inode("/".as_ref()).ok() {
                // The process now has another root folder, so the names may be unchanged in the old
                // one.
                tracing::debug!(path = %path.display(), "the process has changed its root folder");
                continue;
            }
            let path = path.display();
            let lost =
                format!("{what} was deleted, moved or replaced while the store was open: {path}: {seen}");
            return Err(self.lost.get_or_init(|| lost).clone());
        }
        Ok(())
    }
}

/// The target of a name.
#[derive(Debug)]
enum Found {
    Same,
    Another,
    Nothing,
    Unknown(io::Error),
}

fn found(expected: Inode, seen: io::Result<Inode>) -> Found {
    match seen {
        Ok(seen) if seen == expected => Found::Same,
        Ok(_) => Found::Another,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Found::Nothing
        }
        // The process may have given up permissions since the open, or a network may be away.
        Err(error) => Found::Unknown(error),
    }
}

fn inode(path: &Path) -> io::Result<Inode> {
    std::fs::symlink_metadata(path).map(|meta| Inode::of(&meta))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only what is certain is a loss. Method: each answer that the operating system may
    /// give.
    #[test]
    fn what_is_unknown_is_no_loss() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, name).unwrap();
            inode(&path).unwrap()
        };
        let (one, other) = (at("one"), at("other"));
        assert!(matches!(found(one, Ok(one)), Found::Same));
        assert_eq!(matches!(found(one, Ok(other)), Found::Another), cfg!(unix));
        for kind in [ErrorKind::NotFound, ErrorKind::NotADirectory] {
            assert!(matches!(found(one, Err(kind.into())), Found::Nothing));
        }
        for kind in [
            ErrorKind::PermissionDenied,
            ErrorKind::TimedOut,
            ErrorKind::StaleNetworkFileHandle,
            ErrorKind::Other,
        ] {
            assert!(matches!(found(one, Err(kind.into())), Found::Unknown(_)), "{kind:?}");
        }
        let mut watch = Watch::default();
        assert_eq!(watch.add("its file", folder.path().join("other"), one), cfg!(not(unix)));
    }

    /// Goal: looks cost a bounded share, and none is deferred for ever. Method: writes that come at
    /// once need one look per so many commits or events. A store without new commits needs none.
    #[test]
    fn looks_are_few_and_come() {
        let watch = Watch::default();
        let written = |commits, next_seq| Written { commits, next_seq };
        assert!(!written(NAME_COMMITS_MAX - 1, NAME_EVENTS_MAX - 1).is_much_since(written(0, 0)));
        assert!(written(NAME_COMMITS_MAX, 0).is_much_since(written(0, 0)));
        assert!(written(1, NAME_EVENTS_MAX + 5).is_much_since(written(0, 5)));
        assert_eq!(watch.due_at(written(1, 1)), None, "without a name there is nothing to look at");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "").unwrap();
        let mut watch = Watch::default();
        assert!(watch.add("its file", path.clone(), inode(&path).unwrap()));
        assert!(watch.due_at(written(1, 1)).is_some());
        watch.look(written(1, 1)).unwrap();
        assert_eq!(watch.due_at(written(1, 1)), None);
        std::fs::remove_file(&path).unwrap();
        watch.look_if_due(written(2, 2)).unwrap();
        let lost = watch.look_if_due(written(1 + NAME_COMMITS_MAX, 2)).unwrap_err();
        std::fs::write(&path, "").unwrap();
        assert_eq!(
            watch.look(written(1, 1)),
            Err(lost),
            "what was written meanwhile may be missing all the same"
        );
    }
}
