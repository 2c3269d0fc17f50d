//! The engine's file, shared with other readers and checked before the engine reads it. The engine
//! owns the backend that it is opened with.
//!
//! redb checks no page that it reads, and panics on some damaged pages. If it panics in a
//! destructor, the process ends. So this module first checks redb's own tables, which redb reads at
//! each open. Before redb repairs a file that was not closed, this module checks all pages.
//!
//! **Invariant.** The look is under the engine's lock. The engine locks the file, asks for its
//! length, and reads then.

use std::io::{Error, ErrorKind, Result};
use std::ops::Bound;
use std::sync::{Arc, OnceLock};

use redb::{BackendError, StorageBackend};

use super::header::HEAD_BYTES;
use super::pages::{Fault, Place, State, Visitor, Walk};

/// What is checked before the engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// The pages of the engine's own tables, in the newest state.
    Own,
    /// Every page. One of the two states must be whole, because a crash may have torn the newest.
    All,
}

/// A look, and what it found.
#[derive(Debug)]
pub(crate) struct Look {
    check: Check,
    found: OnceLock<Option<String>>,
}

impl Look {
    pub(crate) fn new(check: Check) -> Arc<Self> {
        Arc::new(Self { check, found: OnceLock::new() })
    }

    /// Returns why the engine was not allowed to read, if so.
    pub(crate) fn found(&self) -> Option<&str> {
        self.found.get()?.as_deref()
    }

    /// Returns what is damaged. The engine itself reports what is unreadable.
    fn take(&self, file: &impl StorageBackend, len: u64) -> Option<String> {
        let mut head = [0; HEAD_BYTES];
        if len < HEAD_BYTES as u64 || file.read(0, &mut head).is_err() {
            return None;
        }
        let newest = State::newest(&head);
        let damage = |at: usize| {
            let state = State::in_head(&head, len, at)?;
            let read = |offset: u64, out: &mut [u8]| file.read(offset, out);
            let mut walk = Walk::new(state, &read, FirstDamage::default());
            let _ = walk.own() && (self.check == Check::Own || walk.all());
            Some(walk.visitor.0)
        };
        // A state whose own checksum is wrong does not count. A head without any state is left to
        // the engine to refuse.
        match (damage(newest), self.check) {
            (None, Check::Own) => None,
            (Some(found), Check::Own) => found,
            (Some(None), Check::All) => None,
            (newest_found, Check::All) => match (newest_found.flatten(), damage(1 - newest)) {
                (_, Some(None)) => None,
                (found, other) => found.or(other.flatten()),
            },
        }
    }
}

/// The first damaged page. A page with a right checksum and an unknown form was written so.
#[derive(Debug, Default)]
struct FirstDamage(Option<String>);

impl Visitor for FirstDamage {
    fn right(&mut self, _: Option<&str>, _: Place) -> bool {
        true
    }

    fn wrong(&mut self, table: Option<&str>, place: Place, fault: Fault) -> bool {
        let what = match fault {
            Fault::Checksum => "its checksum is wrong",
            Fault::Outside => "it is outside the file",
            Fault::Twice => "more pages lead to it than the file has",
            Fault::Shape => return true,
            Fault::Unreadable => return false,
        };
        let of = table.map(|table| format!(", of table `{table}`")).unwrap_or_default();
        let Place { offset, bytes } = place;
        self.0 = Some(format!("the page of {bytes} bytes at {offset}{of} is damaged: {what}"));
        false
    }
}

/// A backend that the engine shares with other readers.
#[derive(Debug)]
pub(crate) struct Shared<B> {
    pub(crate) file: Arc<B>,
    pub(crate) look: Arc<Look>,
}

type Lock<T> = std::result::Result<T, BackendError>;

impl<B: StorageBackend> StorageBackend for Shared<B> {
    fn len(&self) -> Result<u64> {
        let len = self.file.len()?;
        match self.look.found.get_or_init(|| self.look.take(&*self.file, len)) {
            Some(_) => Err(Error::new(ErrorKind::InvalidData, "a page is damaged")),
            None => Ok(len),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<bool> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<bool> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<()> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<()> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<()> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<bool> {
        self.file.query_lock_range(start, end)
    }
}
