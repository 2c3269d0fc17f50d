//! Counters for the file's reads and writes. They do not vary with the machine.

use std::io::ErrorKind;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redb::{BackendError, StorageBackend};

use super::journal;

/// Counters that only rise.
#[derive(Debug, Default)]
pub(crate) struct IoCounters {
    writes: AtomicU64,
    bytes_written: AtomicU64,
    reads: AtomicU64,
    bytes_read: AtomicU64,
    syncs: AtomicU64,
    growths: AtomicU64,
    /// The recent duration of a sync, in nanoseconds.
    sync_ns: AtomicU64,
}

/// The calls that a store has made to the operating system since it was opened, for its file and
/// its [journal](crate::StoreBuilder::journal_bytes) together.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, IoStats};
/// let before: IoStats = store.stats()?.io;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
/// let io = store.stats()?.io;
/// assert_eq!(io.syncs - before.syncs, 1); // one fsync per commit
/// assert!(io.writes > before.writes);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct IoStats {
    /// Writes to the file: pages, and the header of each commit. With a journal: one write per
    /// commit, and writes of pages to their places, many commits at a time.
    pub writes: u64,
    /// Bytes of the writes.
    pub bytes_written: u64,
    /// Reads of the file, when the page cache did not have the bytes.
    pub reads: u64,
    /// Bytes of the reads.
    pub bytes_read: u64,
    /// Syncs of the file to the disk: one per commit (two if quick repair is saved), and one each
    /// time the file has grown. With a journal, also one each time half of the journal is full.
    pub syncs: u64,
    /// How often the file became longer. It about doubles, or grows by a region of up to 4 GiB, so
    /// this is rare.
    pub growths: u64,
}

impl IoCounters {
    pub(crate) fn stats(&self) -> IoStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IoStats {
            writes: get(&self.writes),
            bytes_written: get(&self.bytes_written),
            reads: get(&self.reads),
            bytes_read: get(&self.bytes_read),
            syncs: get(&self.syncs),
            growths: get(&self.growths),
        }
    }

    /// Returns the recent duration of a sync.
    pub(crate) fn sync_time(&self) -> Duration {
        Duration::from_nanos(self.sync_ns.load(Ordering::Relaxed))
    }

    /// Notes the duration of a sync. The newest duration has a weight of an eighth.
    fn note_sync(&self, took: Duration) {
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let before_ns = self.sync_ns.load(Ordering::Relaxed);
        let next_ns = if before_ns == 0 { took_ns } else { before_ns - before_ns / 8 + took_ns / 8 };
        self.sync_ns.store(next_ns, Ordering::Relaxed);
    }
}

fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

/// The file with its counters.
#[derive(Debug)]
pub(crate) struct Counted<B> {
    pub(crate) file: B,
    pub(crate) counters: Arc<IoCounters>,
    /// Whether to refuse the file if it is journaled, so that the open does not bypass the journal.
    pub(crate) unless_journaled: bool,
}

type Io<T> = std::result::Result<T, std::io::Error>;
type Lock<T> = std::result::Result<T, BackendError>;

impl<B: StorageBackend> StorageBackend for Counted<B> {
    fn len(&self) -> Io<u64> {
        // The engine asks for the length when it has just locked the file, and hardly ever later.
        if self.unless_journaled && journal::is_journaled(&self.file)? {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Io<()> {
        count(&self.counters.reads, 1);
        count(&self.counters.bytes_read, out.len());
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Io<()> {
        let grows = len > self.file.len()?;
        self.file.set_len(len)?;
        count(&self.counters.growths, usize::from(grows));
        Ok(())
    }

    fn sync_data(&self) -> Io<()> {
        count(&self.counters.syncs, 1);
        let began = Instant::now();
        let result = self.file.sync_data();
        self.counters.note_sync(began.elapsed());
        result
    }

    fn write(&self, offset: u64, data: &[u8]) -> Io<()> {
        count(&self.counters.writes, 1);
        count(&self.counters.bytes_written, data.len());
        self.file.write(offset, data)
    }

    fn close(&self) -> Io<()> {
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
