//! Figures of what the deliveries of each consumer's scope hold in the file.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::store::Store;

/// Figures of the rows that deliveries of one consumer's scope hold in the file. Messages of others
/// have made these rows. See [`Stats::consumers`](crate::Stats::consumers).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// # broker.publish("", "credit", onewrite::Message { payload: b"100".to_vec(), ..Default::default() })?;
/// # let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
/// # while consumer.status().rejected == 0 { std::thread::yield_now() }
/// # let _ = consumer.stop(std::time::Duration::from_secs(5));
/// let figures: onewrite::ScopeStats = store.stats()?.consumers["credit-service"];
/// assert_eq!((figures.rejected, figures.rejected_dropped, figures.parked), (1, 0, 0));
/// assert!(figures.rejected_bytes > 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ScopeStats {
    /// Deliveries in the [quarantine](Store::rejected).
    pub rejected: u64,
    /// Bytes of the rows of rejected deliveries.
    pub rejected_bytes: u64,
    /// Rejected deliveries that were ever dropped for later ones:
    /// [`RejectedFull::DropOldest`](crate::RejectedFull::DropOldest).
    pub rejected_dropped: u64,
    /// Deliveries that wait [parked](crate::ConsumerBuilder::parked_max), whether a consumer runs
    /// or not.
    pub parked: u64,
    /// Bytes of the rows of parked deliveries.
    pub parked_bytes: u64,
    /// Ids of foreign messages that are remembered. This includes ids that are old enough to be
    /// forgotten and are still there.
    pub ids: u64,
    /// Lanes of producers that are remembered.
    pub lanes: u64,
    /// Gaps in these lanes.
    pub gaps: u64,
    /// Lanes that were ever forgotten for others:
    /// [`LanesPolicy::ForgetIdle`](crate::LanesPolicy::ForgetIdle).
    pub lanes_forgotten: u64,
}

impl Store {
    pub(crate) fn scope_stats(&self) -> Result<BTreeMap<String, ScopeStats>> {
        let mut scopes: BTreeMap<String, ScopeStats> = BTreeMap::new();
        for (scope, totals) in self.rejected_totals()? {
            let stats = scopes.entry(scope).or_default();
            (stats.rejected, stats.rejected_bytes) = (totals.rows, totals.bytes);
            stats.rejected_dropped = totals.dropped;
        }
        for (scope, (rows, bytes)) in self.parked_totals()? {
            let stats = scopes.entry(scope).or_default();
            (stats.parked, stats.parked_bytes) = (rows, bytes);
        }
        for (scope, ids) in self.ids_kept()?.into_iter().filter(|(_, ids)| *ids > 0) {
            scopes.entry(scope).or_default().ids = ids;
        }
        for (scope, counts) in self.lane_counts()? {
            let stats = scopes.entry(scope).or_default();
            (stats.lanes, stats.gaps, stats.lanes_forgotten) = (counts.lanes, counts.gaps, counts.forgotten);
        }
        Ok(scopes)
    }
}
