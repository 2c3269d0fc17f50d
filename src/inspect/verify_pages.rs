//! The check of every page of a store that is in use.

use std::io;
use std::ops::ControlFlow;

use super::verify::Finding;
use crate::error::{Error, Result, StorageFailure};
use crate::storage::header::HEAD_BYTES;
use crate::storage::pages::{Fault, Place, State, Visitor, Walk};
use crate::store::Store;
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::tuning::{FINDINGS_MAX, PAGES_PER_PROGRESS};

/// The progress of [`Store::verify_pages_with`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::ops::ControlFlow;
/// store.verify_pages_with(|progress| {
///     assert!(progress.bytes <= progress.bytes_max);
///     ControlFlow::Continue(())
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageProgress {
    /// Pages that have been read.
    pub pages: u64,
    /// Bytes of the pages that have been read.
    pub bytes: u64,
    /// Bytes of the file at the beginning: no more are read. Free pages are not read, so the end
    /// may come sooner.
    pub bytes_max: u64,
}

/// What [`Store::verify_pages`] has read and found.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let verified: onewrite::PageVerification = store.verify_pages()?;
/// assert!(verified.pages > 0 && verified.is_whole());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PageVerification {
    /// Pages that have been read.
    pub pages: u64,
    /// Bytes of the pages that have been read.
    pub bytes: u64,
    /// The damaged pages: the first 1,000, each a [`Finding::Page`].
    pub findings: Vec<Finding>,
    /// The number of all findings. Pages below a damaged page in its tree cannot be found, and are
    /// not counted.
    pub findings_total: u64,
    /// Whether the check reached the end, and the application did not stop it.
    pub is_complete: bool,
}

impl PageVerification {
    /// Whether every page was read and is as it was written.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::ops::ControlFlow;
    /// assert!(store.verify_pages()?.is_whole());
    /// let ended = store.verify_pages_with(|_| ControlFlow::Break(()))?;
    /// assert!(!ended.is_whole() && ended.findings.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_complete && self.findings_total == 0
    }
}

impl Store {
    /// Checks the checksum of every page that holds a row, also of the application's tables, as of
    /// the last commit.
    ///
    /// [`verify`](Self::verify) checks what the log's rows say; this call checks whether the file
    /// still holds what was written. Both together find most.
    ///
    /// Each page is read from the file (or its journal), not from the cache. A page that differs
    /// from what was written is a [`Finding::Page`]. The check covers all tables, also those of the
    /// library. It does not cover:
    ///
    /// - the engine's own tables of free space, which each commit writes anew and which are read
    ///   when an uncleanly closed file is opened;
    /// - free pages;
    /// - the unused end of a page.
    ///
    /// **Writers go on.** The call waits once, for the transaction that is running, and then delays
    /// no writer. It is a read transaction: pages that writers free meanwhile are not used again
    /// before it ends, so the file may grow.
    ///
    /// **Cost.** This thread reads each page in use once: about the time that reading the file
    /// takes. Memory: the largest page, which is as large as the largest row, and a few KiB.
    ///
    /// # Errors
    /// - [`Error::Closed`] if the store is closed meanwhile;
    /// - [`Error::InsideTransaction`];
    /// - an error if the file's head is damaged, or of an unknown format.
    ///
    /// A page that cannot be read is no error but a finding.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::redb::TableDefinition;
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// store.write(|tx| Ok(drop(tx.open_table(ACCOUNTS)?.insert("alice", 100)?)))?;
    /// let verified = store.verify_pages()?;
    /// assert!(verified.is_whole(), "{:?}", verified.findings);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify_pages(&self) -> Result<PageVerification> {
        self.verify_pages_with(|_| ControlFlow::Continue(()))
    }

    /// As [`verify_pages`](Self::verify_pages), and reports its progress every 64 pages and at the
    /// end.
    ///
    /// `Break` stops the check. The call holds no lock meanwhile: `progress` may write to the
    /// store, or wait.
    ///
    /// # Errors
    /// As `verify_pages`.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::ops::ControlFlow;
    /// use std::time::{Duration, Instant};
    /// let began = Instant::now();
    /// let verified = store.verify_pages_with(|_| match began.elapsed() > Duration::from_secs(60) {
    ///     true => ControlFlow::Break(()),
    ///     false => ControlFlow::Continue(()),
    /// })?;
    /// assert!(verified.is_complete);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify_pages_with(
        &self,
        progress: impl FnMut(PageProgress) -> ControlFlow<()>,
    ) -> Result<PageVerification> {
        let core = self.core();
        core.refuse_reentrant("Store::verify_pages")?;
        self.ready()?;
        // No commit comes between the two. So the snapshot keeps the pages of the state in the
        // head.
        let guard = core.acquire_write_lock(&mut Wait::new(Purpose::Own("`Store::verify_pages`"), None))?;
        let snapshot = self.read()?;
        let file = core.pages().ok_or_else(|| Error::Closed { path: core.path.clone() })?;
        let mut head = [0; HEAD_BYTES];
        let bytes_max =
            file.len().and_then(|len| file.read(0, &mut head).map(|()| len)).map_err(unreadable)?;
        drop(guard);
        let state = State::of(&head, bytes_max).ok_or_else(|| {
            unreadable(io::Error::other("its head is damaged, or of a format unknown here"))
        })?;
        let visitor = Progressing { found: PageVerification::default(), bytes_max, progress };
        let read = |offset: u64, out: &mut [u8]| file.read(offset, out);
        let mut walk = Walk::new(state, &read, visitor);
        let is_complete = walk.all();
        let mut visitor = walk.visitor;
        let ends = visitor.report_progress();
        drop(snapshot);
        // Once the store is closed, another process may write to the file. Pages read after that
        // prove nothing.
        if core.pages().is_none() || core.is_closing() {
            return Err(Error::Closed { path: core.path.clone() });
        }
        Ok(PageVerification { is_complete: is_complete && ends.is_continue(), ..visitor.found })
    }
}

fn unreadable(source: io::Error) -> Error {
    Error::Storage(StorageFailure { action: "reading the file's head", cause: source.into(), fatal: false })
}

struct Progressing<F> {
    found: PageVerification,
    bytes_max: u64,
    progress: F,
}

impl<F: FnMut(PageProgress) -> ControlFlow<()>> Progressing<F> {
    fn report_progress(&mut self) -> ControlFlow<()> {
        let PageVerification { pages, bytes, .. } = self.found;
        (self.progress)(PageProgress { pages, bytes, bytes_max: self.bytes_max })
    }

    fn count(&mut self, place: Place) -> bool {
        self.found.pages += 1;
        self.found.bytes += place.bytes;
        !self.found.pages.is_multiple_of(PAGES_PER_PROGRESS) || self.report_progress().is_continue()
    }
}

impl<F: FnMut(PageProgress) -> ControlFlow<()>> Visitor for Progressing<F> {
    fn right(&mut self, _: Option<&str>, place: Place) -> bool {
        self.count(place)
    }

    fn wrong(&mut self, table: Option<&str>, place: Place, fault: Fault) -> bool {
        let what = match fault {
            Fault::Checksum => "its checksum is wrong",
            Fault::Shape => "its rows are not where they should be",
            Fault::Outside => "it is outside the file",
            Fault::Unreadable => "it cannot be read",
            Fault::Twice => "more pages lead to it than the file has",
        };
        let table = table.map(str::to_owned);
        let finding = Finding::Page { table, offset: place.offset, bytes: place.bytes, what };
        tracing::error!(%finding, "verification of pages");
        self.found.findings_total += 1;
        if self.found.findings.len() < FINDINGS_MAX {
            self.found.findings.push(finding);
        }
        match fault {
            Fault::Checksum | Fault::Shape => self.count(place),
            Fault::Twice | Fault::Outside | Fault::Unreadable => true,
        }
    }
}
