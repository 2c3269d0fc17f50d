//! Progress that waits for a commit to ride on.
//!
//! A relay's cursor moves with every confirm; a commit for each would cost an fsync. So changes gather here, and the
//! next commit of the application carries them. If none comes they get one of their own. **Invariant:** the changes of
//! one cursor are written all together and in order, or not at all: losing them only causes repeats.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::relay::machine::types::Change;

/// Changes of one cursor.
#[derive(Debug, Default)]
pub(crate) struct CursorRide {
    /// The newest position.
    pub(crate) position: Option<u64>,
    /// The changes that are not a position, in order.
    pub(crate) changes: Vec<Change>,
    /// Confirms among them, for the figures.
    pub(crate) confirmed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Ride {
    pub(crate) cursors: BTreeMap<String, CursorRide>,
    /// Since when the oldest of them waits.
    pub(crate) since: Option<Instant>,
    /// It was put back, and the writer thread may not know that it waits again.
    unannounced: bool,
}

impl Ride {
    /// Adds changes; `true` if the writer thread is to be told that something waits.
    pub(crate) fn add(&mut self, cursor: &str, changes: &mut Vec<Change>, confirmed: u64) -> bool {
        if !self.cursors.contains_key(cursor) {
            self.cursors.insert(cursor.to_owned(), CursorRide::default());
        }
        if let Some(ride) = self.cursors.get_mut(cursor) {
            ride.confirmed += confirmed;
            for change in changes.drain(..) {
                match change {
                    Change::Position(position) => ride.position = Some(position),
                    change => ride.changes.push(change),
                }
            }
        }
        let tell = self.since.is_none() || std::mem::take(&mut self.unannounced);
        self.since.get_or_insert_with(Instant::now);
        tell
    }

    /// Takes everything.
    pub(crate) fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// Puts back what a rolled-back transaction had taken, before what has come since.
    pub(crate) fn put_back(&mut self, taken: Self) {
        for (name, mut older) in taken.cursors {
            let newer = self.cursors.remove(&name).unwrap_or_default();
            older.position = newer.position.or(older.position);
            older.changes.extend(newer.changes);
            older.confirmed += newer.confirmed;
            self.cursors.insert(name, older);
        }
        self.since = taken.since.or(self.since);
        self.unannounced = true;
    }

    pub(crate) fn len(&self, cursor: &str) -> usize {
        self.cursors.get(cursor).map_or(0, |ride| ride.changes.len())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.cursors.is_empty()
    }
}
