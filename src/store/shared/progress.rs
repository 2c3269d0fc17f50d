//! Pending progress: confirms that wait for a commit.
//!
//! A relay's cursor moves with every confirm; a commit for each confirm would cost an fsync. So
//! changes gather here, and the next commit of the application carries them. If no such commit
//! comes, the changes get a commit of their own. **Invariant:** the changes of one cursor are
//! written all together and in order, or not at all. Losing them only causes repeats.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::delivery::types::{Change, Exception, Key};
use crate::time::Deadline;

/// An event that is to leave the quarantine, if it is still there when this is written: another
/// caller may have been faster.
#[derive(Debug)]
pub(crate) struct Leave {
    pub(crate) seq: u64,
    pub(crate) key: Option<Key>,
    /// The event's new exception.
    pub(crate) exception: Exception,
    /// The events that have left, for the caller.
    pub(crate) left: Arc<Mutex<BTreeSet<u64>>>,
}

/// Changes of one cursor.
#[derive(Debug, Default)]
pub(crate) struct CursorProgress {
    /// The newest position.
    pub(crate) position: Option<u64>,
    /// The other changes, in order.
    pub(crate) changes: Vec<Change>,
    /// Requests of applications, which follow the changes.
    pub(crate) leaves: Vec<Leave>,
    /// The number of confirms among them, for the figures.
    pub(crate) confirmed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct PendingProgress {
    pub(crate) cursors: BTreeMap<String, CursorProgress>,
    /// Since when the oldest change waits.
    since: Option<Instant>,
    /// When the last commit ended. It carried all changes that waited at its beginning.
    carried: Option<Instant>,
    /// The changes were put back, and the writer thread may not know that they wait again.
    unannounced: bool,
}

impl PendingProgress {
    /// Adds changes; `true` if the writer thread is to be notified of them.
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

    /// Notes that a commit has ended.
    pub(crate) fn carried(&mut self, at: Instant) {
        self.carried = Some(at);
    }

    /// When the last commit ended, if there was one since the store was opened.
    pub(crate) fn last_commit(&self) -> Option<Instant> {
        self.carried
    }

    /// Returns when the changes get a commit of their own, if no other commit comes. They have then
    /// waited for `delay`, and no thread has committed for as long. While writes flow the next
    /// write carries the changes, even if the last write took long.
    pub(crate) fn due_at(&self, delay: Duration) -> Option<Deadline> {
        let since = self.since.map(|since| self.carried.map_or(since, |carried| carried.max(since)));
        since.map(|since| Deadline::from(since, delay))
    }

    /// Starts the wait anew after the changes' own commit has failed; without `since`, nothing
    /// waits.
    pub(crate) fn wait_anew(&mut self, since: Option<Instant>) {
        self.since = since;
    }

    /// Puts back what a rolled-back transaction had taken, before newer changes.
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

    /// Goal: while writes flow, progress never gets a commit of its own, however long a write
    /// takes. When writes cease, progress waits no longer than it may. Method: a commit that takes
    /// ten times the delay.
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
        // The broker confirms while that commit is in its fsync.
        assert!(progress.add("rabbit", &mut vec![Change::Position(2)], 1));
        let through = progress.since.unwrap() + delay * 10;
        progress.carried(through);
        assert_eq!(progress.due_at(delay), Some(Deadline::At(through + delay)));
        // Changes that wait anew do so from the given time.
        let mut later = progress.take();
        assert!(
            later.due_at(delay) == Some(Deadline::At(through + delay)) && progress.due_at(delay).is_none()
        );
        later.wait_anew(Some(through + delay * 2));
        assert_eq!(later.due_at(delay), Some(Deadline::At(through + delay * 3)));
        drop(long_commit);
    }
}
