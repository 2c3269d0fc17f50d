//! Snapshots of aggregates that were left out because they exceed their limit. A snapshot only
//! saves reading, so its size must not fail a write.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::limits::SNAPSHOT_BYTES_MAX;
use crate::printable::printable;
use crate::tuning::LEFT_OUT_STREAMS_MAX;

/// How many snapshots were left out, and of which streams.
#[derive(Debug, Default)]
pub(crate) struct LeftOut {
    total: AtomicU64,
    streams: Mutex<BTreeSet<String>>,
}

impl LeftOut {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Whether a snapshot of this stream was left out: the next one is most likely as large.
    pub(crate) fn has(&self, stream: &str) -> bool {
        self.total() > 0 && self.lock().contains(stream)
    }

    /// Counts a snapshot, and warns if it is the first of its stream.
    pub(crate) fn note(&self, stream: &str, len: usize) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let is_first = {
            let mut streams = self.lock();
            streams.len() < LEFT_OUT_STREAMS_MAX && streams.insert(stream.to_owned())
        };
        if is_first {
            tracing::warn!(
                stream = %printable(stream), bytes = len, bytes_max = SNAPSHOT_BYTES_MAX,
                "the aggregate's snapshot is too large and is left out; loading folds its events"
            );
        }
    }
}
