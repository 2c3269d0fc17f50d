//! When passes over captured tables are due: which pass is requested, and what rests after a
//! failure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::log::keys;
use crate::storage::tables::capture::{CaptureId, capture_of};
use crate::store::shared::captures::PendingCaptures;
use crate::tuning::{CAPTURE_FAILED_MAX, CAPTURE_PASS_KEYS, CAPTURE_PAUSE_MS, CAPTURE_RETRY_MS};

/// A failure that is tried again later: a key's codec, or the backfill of a table.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Failed {
    pub(in crate::store) tries: u32,
    /// When the next try is due, by the monotonic clock.
    pub(in crate::store) due_ms: u64,
}

impl Failed {
    /// The next failure: the delay doubles up to its limit.
    fn again(earlier: Option<&Self>, now_ms: u64) -> Self {
        let tries = earlier.map_or(0, |failed| failed.tries);
        let (first, longest) = CAPTURE_RETRY_MS;
        let delay = first.saturating_mul(1 << tries.min(16)).min(longest);
        Self { tries: tries + 1, due_ms: now_ms.saturating_add(delay) }
    }
}

#[derive(Debug, Default)]
pub(in crate::store) struct State {
    /// The last dirty key of the last pass.
    pub(crate) after: Vec<u8>,
    /// No pass begins before this time of the monotonic clock.
    pub(in crate::store) not_before_ms: u64,
    /// The writer thread asks for no pass over dirty keys before this time.
    pub(in crate::store) own_after_ms: u64,
    /// The last pass has found the backlog quota reached.
    pub(in crate::store) no_room: bool,
    /// The last logged reason why each table waits, by name.
    pub(in crate::store) said: BTreeMap<String, CaptureWait>,
    /// The waiting dirty keys whose codec has failed. A person has to look at these keys.
    pub(in crate::store) failed: BTreeMap<Vec<u8>, Failed>,
    /// The failed keys that the last pass has tried, and whose rows have not been written since.
    /// They are noted before the commit of the pass: a row written later needs another try.
    pub(in crate::store) tried: BTreeSet<Vec<u8>>,
    /// Tables that cannot be backfilled. Their backfills rest, and the backfills of other tables go
    /// on.
    pub(in crate::store) unreadable: BTreeMap<CaptureId, Failed>,
}

/// What is remembered from one pass to the next. It is lost with the process; passes then begin
/// anew.
#[derive(Debug, Default)]
pub(crate) struct CoalescingPasses {
    /// The requested or running pass: [`Asked`] as a number. 0: none.
    pub(crate) asked: AtomicUsize,
    /// Whether the writer thread looks soon anyway, and need not be notified when something begins
    /// to wait.
    pub(in crate::store) looks_soon: AtomicBool,
    /// Passes that have ended, well or not.
    pub(crate) ended: AtomicU64,
    state: Mutex<State>,
}

/// A requested pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(in crate::store) keys: usize,
    /// Whether the writer thread itself asks, for what no relay holds.
    pub(in crate::store) own: bool,
}

impl Asked {
    fn to_number(self) -> usize {
        self.keys << 1 | usize::from(self.own)
    }

    fn from_number(number: usize) -> Self {
        Self { keys: number >> 1, own: number & 1 == 1 }
    }
}

impl CoalescingPasses {
    pub(in crate::store) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.asked().keys > 0
    }

    pub(crate) fn asked(&self) -> Asked {
        Asked::from_number(self.asked.load(Ordering::SeqCst))
    }

    /// Asks for a pass over this many keys, for a relay; `true` if no pass was requested yet.
    pub(crate) fn ask(&self, keys: usize) -> bool {
        self.set(Asked { keys, own: false })
    }

    /// Asks for a pass of the writer thread's own, for what no running relay holds.
    pub(crate) fn ask_own(&self) {
        self.set(Asked { keys: CAPTURE_PASS_KEYS, own: true });
    }

    fn set(&self, asked: Asked) -> bool {
        self.asked.compare_exchange(0, asked.to_number(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The number of passes that have ended, well or not.
    pub(crate) fn ended(&self) -> u64 {
        self.ended.load(Ordering::SeqCst)
    }

    /// Notes a durable commit in which the application has written rows. Earlier failures were
    /// about the earlier values, so these keys need not wait any more.
    pub(crate) fn rewritten(&self, pending: &PendingCaptures) {
        let mut written = pending.written().peekable();
        if written.peek().is_none() {
            return;
        }
        let mut state = self.lock();
        if state.failed.is_empty() && state.tried.is_empty() && state.unreadable.is_empty() {
            return;
        }
        for dirty in written {
            if let Ok(id) = capture_of(dirty) {
                state.unreadable.remove(&id);
            }
            // A pass of the same transaction has seen this value.
            if pending.has_pass && state.tried.contains(dirty) {
                continue;
            }
            state.tried.remove(dirty);
            state.failed.remove(dirty);
        }
    }

    /// Keys of this capture whose codec has failed.
    pub(crate) fn failed(&self, id: CaptureId) -> u64 {
        self.lock().failed_of(id)
    }
}

/// The result of a pass, to be noted once it is durable.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Where the next pass begins.
    pub(in crate::store) after: Option<Vec<u8>>,
    pub(in crate::store) settled: Vec<Vec<u8>>,
    pub(in crate::store) failed: Vec<Vec<u8>>,
    /// Tables whose next rows were read, and tables where that failed.
    pub(in crate::store) backfilled: Vec<CaptureId>,
    pub(in crate::store) unreadable: Vec<CaptureId>,
    /// Nothing more can be done for now.
    pub(in crate::store) stuck: bool,
    /// The backlog quota is reached.
    pub(in crate::store) no_room: bool,
}

impl State {
    pub(in crate::store) fn has_no_room(&self) -> bool {
        self.no_room
    }

    /// Whether the backfill of this table rests.
    pub(in crate::store) fn rests(&self, id: CaptureId) -> bool {
        self.unreadable.contains_key(&id)
    }

    fn failed_in(&self, id: CaptureId) -> impl Iterator<Item = &Failed> {
        let from = id.to_be_bytes().to_vec();
        let to = keys::after_prefix(&from);
        self.failed.range(from..to).map(|(_, failed)| failed)
    }

    /// Keys of this capture whose codec has failed.
    pub(in crate::store) fn failed_of(&self, id: CaptureId) -> u64 {
        self.failed_in(id).count() as u64
    }

    /// When the first failed key of this capture is tried again.
    pub(in crate::store) fn retry_ms(&self, id: CaptureId) -> Option<u64> {
        self.failed_in(id).map(|failed| failed.due_ms).min()
    }

    /// When the first of these tables may be backfilled.
    pub(in crate::store) fn backfill_due_ms(
        &self,
        backfills: impl IntoIterator<Item = CaptureId>,
    ) -> Option<u64> {
        backfills.into_iter().map(|id| self.unreadable.get(&id).map_or(0, |failed| failed.due_ms)).min()
    }

    pub(crate) fn note(&mut self, outcome: Outcome, now_ms: u64) {
        self.no_room = outcome.no_room;
        if let Some(after) = outcome.after {
            self.after = after;
        }
        for key in outcome.settled {
            self.failed.remove(&key);
        }
        let mut crowded = false;
        let tried = std::mem::take(&mut self.tried);
        for key in outcome.failed {
            if !tried.contains(&key) {
                // The row has been written meanwhile.
                self.failed.remove(&key);
                continue;
            }
            let earlier = self.failed.get(&key);
            if earlier.is_none() && self.failed.len() >= CAPTURE_FAILED_MAX {
                crowded = true;
                continue;
            }
            let failed = Failed::again(earlier, now_ms);
            self.failed.insert(key, failed);
        }
        for id in outcome.backfilled {
            self.unreadable.remove(&id);
        }
        for id in outcome.unreadable {
            let failed = Failed::again(self.unreadable.get(&id), now_ms);
            self.unreadable.insert(id, failed);
        }
        // More keys fail than are remembered. Each pass meets the rest again, so passes slow down.
        if outcome.stuck || crowded {
            self.not_before_ms = now_ms.saturating_add(CAPTURE_PAUSE_MS);
        }
    }
}

/// The reason why a captured table waits.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// use onewrite::{Capture, CaptureMode, CaptureWait, Store, redb::TableDefinition};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed").mode(CaptureMode::NewestValue);
/// let store = Store::builder().capture(accounts).open(folder.path().join("a.redb"))?;
/// assert_eq!(store.stats()?.captures["accounts"].waits_for, None); // nothing waits
/// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
/// assert_eq!(store.stats()?.captures["accounts"].waits_for, Some(CaptureWait::Relay));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CaptureWait {
    /// This process has not registered the capture.
    /// [`StoreBuilder::capture`](crate::StoreBuilder::capture) registers it;
    /// [`Store::end_capture`](crate::Store::end_capture) drops what waits.
    Registration,
    /// Dirty keys wait to be published, and no relay runs in this process.
    Relay,
    /// Every relay that runs is paused.
    PausedRelay,
    /// No running relay has a broker that takes anything: the broker is away, or blocks publishers.
    Broker,
    /// The backlog quota is reached.
    Quota,
    /// Everything that waits has failed. It is tried again later, or when its row is written. The
    /// log says why.
    Retry,
}

impl std::fmt::Display for CaptureWait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Registration => "its capture: this process has not registered it",
            Self::Relay => "a relay: none runs",
            Self::PausedRelay => "a relay: each that runs is paused",
            Self::Broker => "the broker",
            Self::Quota => "room under the backlog quota",
            Self::Retry => "the next try of what has failed",
        })
    }
}
