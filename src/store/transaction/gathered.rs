//! How much one write, and one group of writes, may gather in memory before the commit.
//!
//! **Invariant.** A write that has gone beyond a limit fails, even if its closure ignores the
//! error: nothing of the write is written. A group ends with the write that has brought it to a
//! limit, so a group holds less than twice as much.

use std::cell::Cell;

use crate::error::{Error, Result};
use crate::store::settings::TransactionMax;

/// An amount that has gathered in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) events: u64,
    /// Entries of the inbox and of captured tables, states of streams, and events that were there
    /// already.
    pub(crate) entries: u64,
    /// Bytes of records, and of the keys of entries.
    pub(crate) bytes: u64,
}

impl Amount {
    pub(crate) fn event(bytes: usize) -> Self {
        Self { events: 1, entries: 0, bytes: bytes as u64 }
    }

    pub(crate) fn entry(bytes: usize) -> Self {
        Self { events: 0, entries: 1, bytes: bytes as u64 }
    }

    pub(crate) fn entries(entries: usize) -> Self {
        Self { events: 0, entries: entries as u64, bytes: 0 }
    }

    fn plus(self, more: Self) -> Self {
        Self {
            events: self.events.saturating_add(more.events),
            entries: self.entries.saturating_add(more.entries),
            bytes: self.bytes.saturating_add(more.bytes),
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            events: self.events.saturating_sub(earlier.events),
            entries: self.entries.saturating_sub(earlier.entries),
            bytes: self.bytes.saturating_sub(earlier.bytes),
        }
    }

    fn exceeds(self, max: TransactionMax) -> bool {
        self.events > max.events || self.entries > max.events || self.bytes > max.bytes
    }
}

/// The amounts that a transaction has gathered: of all writes of its group, and of the running
/// write.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    all: Cell<Amount>,
    /// The amount when the running write began.
    before: Cell<Amount>,
    /// The amount that the running write would have gathered when it went beyond a limit.
    refused: Cell<Option<Amount>>,
    /// The running work is the library's own, which has its own bounds.
    unlimited: Cell<bool>,
}

/// A point that [`Gathered`] can go back to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    all: Amount,
    refused: Option<Amount>,
}

impl Gathered {
    /// The next write of the group begins.
    pub(crate) fn begin_write(&self) {
        self.before.set(self.all.get());
    }

    /// Switches the limits off for work of the library, which has its own bounds.
    pub(crate) fn set_unlimited(&self, unlimited: bool) {
        self.unlimited.set(unlimited);
    }

    /// Refuses `more` if the running write would go beyond a limit with it.
    pub(crate) fn check(&self, more: Amount, max: TransactionMax) -> Result<()> {
        let would = self.all.get().plus(more).since(self.before.get());
        if would.exceeds(max) && !self.unlimited.get() {
            self.refused.set(Some(would));
            return Err(too_large(would, max));
        }
        Ok(())
    }

    /// Adds `more`, or refuses it.
    pub(crate) fn add(&self, more: Amount, max: TransactionMax) -> Result<()> {
        self.check(more, max)?;
        self.all.set(self.all.get().plus(more));
        Ok(())
    }

    /// Fails if the running write went beyond a limit, even if its closure ignored the error.
    pub(crate) fn was_refused(&self, max: TransactionMax) -> Result<()> {
        self.refused.get().map_or(Ok(()), |would| Err(too_large(would, max)))
    }

    /// Whether the group has gathered as much as one write may.
    pub(crate) fn is_full(&self, max: TransactionMax) -> bool {
        let all = self.all.get();
        all.events >= max.events || all.entries >= max.events || all.bytes >= max.bytes
    }

    pub(crate) fn point(&self) -> Point {
        Point { all: self.all.get(), refused: self.refused.get() }
    }

    pub(crate) fn roll_back_to(&self, point: Point) {
        self.all.set(point.all);
        self.refused.set(point.refused);
    }
}

fn too_large(would: Amount, max: TransactionMax) -> Error {
    Error::TransactionTooLarge {
        events: would.events,
        entries: would.entries,
        bytes: would.bytes,
        events_max: max.events,
        bytes_max: max.bytes,
    }
}
