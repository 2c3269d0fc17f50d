//! Progress that waits for a commit.
//!
//! A relay's cursor moves with every confirm; a commit for each would cost an fsync. So changes gather here, and the
//! next commit of the application carries them. If none comes they get one of their own. **Invariant:** the changes of
//! one cursor are written all together and in order, or not at all: losing them only causes repeats.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::delivery::types::{Change, Exception, Key};
use crate::time::Deadline;

/// An event that is to leave the quarantine, if it is there when this is written: another caller may have been faster.
#[derive(Debug)]
pub(crate) struct Leave {
    pub(crate) seq: u64,
    pub(crate) key: Option<Key>,
    /// What it becomes.
    pub(crate) exception: Exception,
    /// Those that have left, for the caller.
    pub(crate) left: Arc<Mutex<BTreeSet<u64>>>,
}

/// Changes of one cursor.
#[derive(Debug, Default)]
pub(crate) struct CursorProgress {
    /// The newest position.
    pub(crate) position: Option<u64>,
    /// The changes that are not a position, in order.
    pub(crate) changes: Vec<Change>,
    /// Behind the changes: what applications ask for.
    pub(crate) leaves: Vec<Leave>,
    /// Confirms among them, for the figures.
    pub(crate) confirmed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct PendingProgress {
    pub(crate) cursors: BTreeMap<String, CursorProgress>,
    /// Since when the oldest of them waits.
    since: Option<Instant>,
    /// When the last commit was through: it took along what had waited by its beginning.
    carried: Option<Instant>,
    /// It was put back, and the writer thread may not know that it waits again.
    unannounced: bool,
}

impl PendingProgress {
    /// Adds changes; `true` if the writer thread is to be notified that something waits.
    pub(crate) fn add(&mut self, cursor: &str, changes: &mut Vec<Change>, confirmed: u64) -> bool {
        self.change(cursor, |progress| {
            progress.confirmed += confirmed;
            for change in changes.drain(..) {
                match change {
                    Change::Position(position) => progress.position = Some(position),
                    change => progress.changes.push(change),
                }
            }
        })
    }

    /// Adds events that are to leave the quarantine. The caller flushes.
    pub(crate) fn add_leaves(&mut self, cursor: &str, leaves: Vec<Leave>) {
        self.change(cursor, |progress| progress.leaves.extend(leaves));
    }

    fn change(&mut self, cursor: &str, change: impl FnOnce(&mut CursorProgress)) -> bool {
        if !self.cursors.contains_key(cursor) {
            self.cursors.insert(cursor.to_owned(), CursorProgress::default());
        }
        self.cursors.get_mut(cursor).map(change);
        let notify = self.since.is_none() || std::mem::take(&mut self.unannounced);
        self.since.get_or_insert_with(Instant::now);
        notify
    }

    /// Takes everything.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            cursors: std::mem::take(&mut self.cursors),
            since: self.since.take(),
            carried: self.carried,
            unannounced: std::mem::take(&mut self.unannounced),
        }
    }

    /// A commit is through.
    pub(crate) fn carried(&mut self, at: Instant) {
        self.carried = Some(at);
    }

    /// When the last commit was through, if there was one since the store was opened.
    pub(crate) fn last_commit(&self) -> Option<Instant> {
        self.carried
    }

    /// When it gets a commit of its own, if none comes: not before it has waited for `delay`, and not before nobody has committed for
    /// as long. While writes flow the next of them takes it along, however long the last one took.
    pub(crate) fn due_at(&self, delay: Duration) -> Option<Deadline> {
        let since = self.since.map(|since| self.carried.map_or(since, |carried| carried.max(since)));
        since.map(|since| Deadline::from(since, delay))
    }

    /// A commit of its own has failed; it waits anew, or for nothing.
    pub(crate) fn wait_anew(&mut self, since: Option<Instant>) {
        self.since = since;
    }

    /// Puts back what a rolled-back transaction had taken, before what has come since.
    pub(crate) fn put_back(&mut self, taken: Self) {
        for (name, mut older) in taken.cursors {
            let newer = self.cursors.remove(&name).unwrap_or_default();
            older.position = newer.position.or(older.position);
            older.changes.extend(newer.changes);
            older.leaves.extend(newer.leaves);
            older.confirmed += newer.confirmed;
            self.cursors.insert(name, older);
        }
        self.since = taken.since.or(self.since);
        self.unannounced = true;
    }

    pub(crate) fn len(&self, cursor: &str) -> usize {
        self.cursors.get(cursor).map_or(0, |progress| progress.changes.len())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.cursors.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: while writes flow, progress never gets a commit of its own, however long one of them takes; when they cease it waits no
    /// longer than it may. Method: a commit that takes ten times the delay.
    #[test]
    fn a_long_commit_is_no_idle_time() {
        let mut progress = PendingProgress::default();
        let delay = Duration::from_millis(250);
        assert_eq!(progress.due_at(delay), None, "nothing waits");
        assert!(progress.add("rabbit", &mut vec![Change::Position(1)], 1), "the writer thread is notified");
        let since = progress.since.unwrap();
        assert_eq!(progress.due_at(delay), Some(Deadline::At(since + delay)));
        let long_commit = progress.take();
        assert!(progress.is_empty() && progress.due_at(delay).is_none());
        // Confirmed while that commit is in its fsync.
        assert!(progress.add("rabbit", &mut vec![Change::Position(2)], 1));
        let through = progress.since.unwrap() + delay * 10;
        progress.carried(through);
        assert_eq!(progress.due_at(delay), Some(Deadline::At(through + delay)));
        // What waits anew does so from its own time.
        let mut later = progress.take();
        assert!(
            later.due_at(delay) == Some(Deadline::At(through + delay)) && progress.due_at(delay).is_none()
        );
        later.wait_anew(Some(through + delay * 2));
        assert_eq!(later.due_at(delay), Some(Deadline::At(through + delay * 3)));
        drop(long_commit);
    }
}
