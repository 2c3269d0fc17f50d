//! Holders: what keeps the log or the file from shrinking. This module has their kinds, the living
//! snapshots, and since when each holder was seen.
//!
//! **Invariants.** A commit does no more for this module than one comparison. A snapshot's `Drop`
//! takes no lock and cannot panic. A snapshot may end in any thread, in a destructor of a
//! thread-local, or in a forked child.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::tuning::{HOLDER_LOOKS, SNAPSHOTS_PRUNED_MIN};

/// The kind of a holder: what holds the log or the file.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::HolderKind;
/// let snapshot = store.read()?;
/// assert_eq!(store.stats()?.holders[0].kind, HolderKind::Snapshot);
/// drop(snapshot);
/// assert!(store.stats()?.holders.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HolderKind {
    /// A relay still has to publish the events from its position on.
    /// [`Store::forget_relay`](crate::Store::forget_relay) lets go of a relay that no longer runs.
    Relay,
    /// Events that a relay has passed and that are deferred, or in its quarantine.
    RelayRows,
    /// A projection still has to apply the events from its position on.
    /// [`Store::forget_projection`](crate::Store::forget_projection) lets go of a projection that
    /// no longer runs.
    Projection,
    /// A projection's rebuild still has to apply the events from its position on.
    Rebuild,
    /// Events that a projection has given up.
    Failures,
    /// A living subscription still has to be read from its position on.
    Subscription,
    /// A living snapshot, or an iterator over one, keeps the pages of its moment in the file.
    Snapshot,
    /// The store's own [retention](crate::StoreBuilder::retention).
    Retention,
    /// Events below `trimmed_to` that streams keep.
    Streams,
}

/// One thing that keeps the log or the file from shrinking. See
/// [`Stats::holders`](crate::Stats::holders).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// use onewrite::{Event, Holder, HolderKind};
/// // A relay that an earlier release has run.
/// let _ = store.relay("rabbit").spawn(broker.publisher())?.stop(std::time::Duration::from_secs(5));
/// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
/// let holder: Holder = store.stats()?.holders.remove(0);
/// assert_eq!((holder.kind, holder.name.as_str(), holder.position), (HolderKind::Relay, "rabbit", 0));
/// assert_eq!((holder.events, holder.runs), (1, false));
/// store.forget_relay("rabbit")?;
/// assert!(store.stats()?.holders.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// The kind of the holder.
    pub kind: HolderKind,
    /// The name of the relay or projection. For a subscription or a snapshot: the place in the code
    /// that made it, `file:line:column`.
    pub name: String,
    /// The first event that the holder keeps. For a snapshot: the end of the log at its moment.
    pub position: u64,
    /// The number of events that the holder keeps, also if another holder keeps them too. For a
    /// snapshot: events appended since its moment. For [`HolderKind::Failures`], at most
    /// [`STATS_ROWS_MAX`](crate::limits::STATS_ROWS_MAX) are counted.
    pub events: u64,
    /// Bytes of the records of these events; `None` where the store would have to read all the
    /// records to find out.
    pub bytes: Option<u64>,
    /// How long the holder has stayed at this position, in milliseconds of the monotonic clock, as
    /// far as the store has looked. The store looks when `stats` is called and with some commits.
    /// For a snapshot: its age.
    pub held_ms: u64,
    /// Whether the holder runs, or lives, in this process.
    pub runs: bool,
}

impl Holder {
    /// How long the holder has stayed at its position, as far as the store has looked. As a number:
    /// [`held_ms`](Self::held_ms).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").unpublished()))?;
    /// let snapshot = store.read()?;
    /// assert!(store.stats()?.holders.iter().all(|holder| holder.held() < Duration::from_secs(60)));
    /// # drop(snapshot);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn held(&self) -> Duration {
        Duration::from_millis(self.held_ms)
    }
}

// --- snapshots ---

/// A living read transaction. It ends with the last clone of this.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) number: u64,
    pub(crate) mono_ms: u64,
    pub(crate) next_seq: u64,
    pub(crate) end_offset: u64,
    pub(crate) at: &'static Location<'static>,
}

#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    next: u64,
    pub(crate) living: Vec<Weak<Taken>>,
    /// Ended snapshots are removed from the list once it has this length.
    prune_at: usize,
}

/// The position of one holder as last seen, and since when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) position: u64,
    pub(crate) since_ms: u64,
    pub(crate) warned: bool,
}

/// The key that names a holder.
pub(crate) type Key = (HolderKind, String, u64);

/// The holders that are known in memory, and since when each holds.
#[derive(Debug)]
pub(crate) struct Holders {
    pub(crate) snapshots: Mutex<Snapshots>,
    pub(crate) seen: Mutex<BTreeMap<Key, Seen>>,
    /// The end of the log after the last commit, for callers that must not wait for a commit.
    next_seq: AtomicU64,
    end_offset: AtomicU64,
    /// The first commit from this time of the monotonic clock on asks the writer thread to look.
    look_at_ms: AtomicU64,
    pub(crate) asked: AtomicBool,
    pub(crate) warn_after_ms: u64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Holders {
    pub(crate) fn new(warn_after_ms: u64, next_seq: u64, end_offset: u64) -> Self {
        Self {
            snapshots: Mutex::default(),
            seen: Mutex::default(),
            next_seq: AtomicU64::new(next_seq),
            end_offset: AtomicU64::new(end_offset),
            look_at_ms: AtomicU64::new(0),
            asked: AtomicBool::new(false),
            warn_after_ms,
        }
    }

    /// Notes where a commit has made the log end.
    pub(crate) fn note_end(&self, next_seq: u64, end_offset: u64) {
        self.next_seq.store(next_seq, Ordering::Relaxed);
        self.end_offset.store(end_offset, Ordering::Relaxed);
    }

    /// Notes a commit; `true` if the writer thread is to look.
    pub(crate) fn note_commit(&self, mono_ms: u64) -> bool {
        if mono_ms < self.look_at_ms.load(Ordering::Relaxed) {
            return false;
        }
        self.look_at_ms.store(mono_ms.saturating_add(self.interval_ms()), Ordering::Relaxed);
        self.asked.store(true, Ordering::SeqCst);
        true
    }

    /// The time between two looks while commits come.
    pub(crate) fn interval_ms(&self) -> u64 {
        (self.warn_after_ms / HOLDER_LOOKS).max(1)
    }

    /// Notes that a read transaction begins.
    pub(crate) fn take(&self, mono_ms: u64, at: &'static Location<'static>) -> Arc<Taken> {
        let (next_seq, end_offset) =
            (self.next_seq.load(Ordering::Relaxed), self.end_offset.load(Ordering::Relaxed));
        let mut snapshots = lock(&self.snapshots);
        let number = snapshots.next;
        snapshots.next += 1;
        let taken = Arc::new(Taken { number, mono_ms, next_seq, end_offset, at });
        if snapshots.living.len() >= snapshots.prune_at.max(SNAPSHOTS_PRUNED_MIN) {
            snapshots.living.retain(|taken| taken.strong_count() > 0);
            snapshots.prune_at = 2 * snapshots.living.len();
        }
        snapshots.living.push(Arc::downgrade(&taken));
        taken
    }

    /// The number of living snapshots, and the oldest of them.
    pub(crate) fn living(&self) -> (u64, Option<Arc<Taken>>) {
        let living: Vec<_> = lock(&self.snapshots).living.iter().filter_map(Weak::upgrade).collect();
        // The list is in order of age.
        (living.len() as u64, living.into_iter().next())
    }
}
