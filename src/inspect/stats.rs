//! Figures of a store.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::scope_stats::ScopeStats;
use crate::error::Result;
use crate::storage::errors::unless_it_panics;
use crate::storage::metered::IoStats;
use crate::storage::tables::capture::CaptureMode;
use crate::store::Store;
use crate::store::read::holders;
use crate::store::read::oldest::{Oldest, age_ms, find_oldest};
use crate::store::shared::capture_schedule::{CaptureWait, CoalescingPasses};
use crate::store::shared::cursor::Cursor;
use crate::store::shared::holders::Holder;
use crate::store::shared::parked::Parked;
use crate::store::shared::projections::ProjectionStatus;
use crate::store::shared::relays::RelayStatus;
use crate::store::shared::tail::Tail;
use crate::time::Now;

/// A store's figures at one moment.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
/// let stats: onewrite::Stats = store.stats()?;
/// assert_eq!((stats.next_seq, stats.backlog_events, stats.writes), (1, 1, 1));
/// assert!(stats.poisoned.is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// The sequence number of the next event, and so the number of events that were ever appended.
    pub next_seq: u64,
    /// Where the records of the log start, except for earlier events that are quarantined or
    /// deferred.
    pub trimmed_to: u64,
    /// Events that are neither confirmed nor quarantined nor discarded. Events that wait count,
    /// for any cause. This is the [`backlog_events`](RelayStats::backlog_events) of the slowest
    /// relay. Without any relay, all events from `trimmed_to` on count.
    pub backlog_events: u64,
    /// Bytes of the records of the same events, of the same relay.
    pub backlog_bytes: u64,
    /// Age of the oldest event that a relay has still to publish, in milliseconds; `None` if there
    /// is none. See [`RelayStats::backlog_age_ms`].
    pub backlog_age_ms: Option<u64>,
    /// Events that wait for their next try, over all relays.
    pub retrying: u64,
    /// Age of the oldest event that waits for its next try, in milliseconds; `None` if there is
    /// none.
    pub retrying_age_ms: Option<u64>,
    /// Events that wait for their time, over all relays.
    pub scheduled: u64,
    /// Age of the oldest event that waits for its time, in milliseconds; `None` if there is none.
    pub scheduled_age_ms: Option<u64>,
    /// Events that wait behind an earlier event of their key, over all relays.
    pub parked: u64,
    /// Age of the oldest event that waits behind an earlier one of its key, in milliseconds; `None`
    /// if there is none.
    pub parked_age_ms: Option<u64>,
    /// Events in quarantine, over all relays. They are no part of the backlog.
    pub quarantined: u64,
    /// The things that keep the log or the file from shrinking. The holder of most bytes comes first.
    ///
    /// Holders are relays, projections and subscriptions that have not reached the end of the log,
    /// events that are kept one by one, retention, and the oldest snapshot. The log is trimmed up
    /// to the lowest position of relays, projections, subscriptions and retention.
    pub holders: Vec<Holder>,
    /// Open read transactions: [snapshots](crate::store::Snapshot), and iterators that have
    /// outlived their snapshot.
    pub snapshots: u64,
    /// Age of the oldest open read transaction, in milliseconds of the monotonic clock; `None` if
    /// there is none.
    pub snapshots_age_ms: Option<u64>,
    /// Durable commits since the store was opened. Each takes one fsync, or two if
    /// [`quick_repair_when_idle`](crate::store::StoreBuilder::quick_repair_when_idle) made it.
    pub commits: u64,
    /// Durable commits without a write of the application. They carried a relay's progress, or
    /// nothing ([`quick_repair_when_idle`](crate::store::StoreBuilder::quick_repair_when_idle)).
    pub commits_alone: u64,
    /// Write closures and exclusive transactions that were committed since the store was opened.
    pub writes: u64,
    /// Times that a group was run again without a closure that had failed.
    pub reruns: u64,
    /// Whether the last close before this opening was unclean, and every page was verified.
    pub verified_at_open: bool,
    /// The requests of the store to the operating system since the store was opened.
    pub io: IoStats,
    /// Snapshots of aggregates that were left out since the store was opened, because they exceed
    /// [`SNAPSHOT_BYTES_MAX`](crate::limits::SNAPSHOT_BYTES_MAX). A command warns of the first of
    /// each stream.
    pub snapshots_left_out: u64,
    /// Clean-up tasks that are left: deleted or forgotten data that is still in the file. This is
    /// data of streams, relays, projections, tables that a rebuild has replaced, and captured
    /// tables. The store removes it in pieces; for readers, it is already gone.
    pub cleanup_tasks: u64,
    /// Events in these tasks, left by truncated and deleted streams.
    pub cleanup_events: u64,
    /// Why the store accepts nothing more, if it is poisoned.
    pub poisoned: Option<String>,
    /// The relays that the file knows, by name.
    pub relays: BTreeMap<String, RelayStats>,
    /// The projections that the file knows, by name.
    pub projections: BTreeMap<String, ProjectionStats>,
    /// The tables that the file knows as captured, by name.
    pub captures: BTreeMap<String, CaptureStats>,
    /// Deliveries in the quarantine of each consumer that has ever rejected one, by scope.
    pub rejected: BTreeMap<String, u64>,
    /// Figures of the rows of deliveries in the file, by their consumer's scope.
    pub consumers: BTreeMap<String, ScopeStats>,
}

/// One captured table's figures.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// use onewrite::{Capture, CaptureMode, CaptureStats, Store, redb::TableDefinition};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed").mode(CaptureMode::NewestValue);
/// let store = Store::builder().capture(accounts).open(folder.path().join("a.redb"))?;
/// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
/// let stats: CaptureStats = store.stats()?.captures["accounts"];
/// assert_eq!((stats.mode, stats.waiting, stats.failed), (CaptureMode::NewestValue, 1, 0));
/// assert!(stats.snapshot_done); // none was asked for
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CaptureStats {
    /// When the table's changes become events.
    pub mode: CaptureMode,
    /// Dirty keys: keys that have no event yet.
    pub waiting: u64,
    /// Whether no row that was there at switch-on still awaits its backfill.
    pub snapshot_done: bool,
    /// Waiting keys whose codec has failed since the store was opened. At most 1,024 keys of all
    /// tables are counted. The log gives the reasons.
    pub failed: u64,
    /// The reason why the capture waits; `None` if nothing waits, or if it is under way.
    pub waits_for: Option<CaptureWait>,
}

/// One relay's figures: the durable state, and the running state if the relay runs.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// let stats = store.stats()?;
/// let rabbit: &onewrite::RelayStats = &stats.relays["rabbit"];
/// assert_eq!((rabbit.confirmed, rabbit.quarantined), (0, 0));
/// assert!(rabbit.running.is_some());
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RelayStats {
    /// The position: everything below is confirmed, except for deferred or quarantined events.
    pub position: u64,
    /// Events that were confirmed since the relay was made.
    pub confirmed: u64,
    /// Events that are neither confirmed nor quarantined nor discarded: those from `position` on,
    /// and those that are deferred.
    ///
    /// Two kinds are counted for a while, until the position passes them: events that are published
    /// nowhere, and events that are confirmed out of order.
    pub backlog_events: u64,
    /// Bytes of the records of the same events.
    pub backlog_bytes: u64,
    /// Age of the oldest of the same events, in milliseconds; `None` if there is none.
    ///
    /// An event's age goes by the wall clock, which may have jumped, so the store's own time bounds
    /// it. The age of an event that was appended since the store was opened is at most the time
    /// since the opening. The age of an older event is at least that time. So an event that is
    /// stamped in the future counts as new. A damaged event counts with the age of the next one.
    pub backlog_age_ms: Option<u64>,
    /// The sequence number of the oldest of the same events; `None` if there is none.
    pub backlog_first: Option<u64>,
    /// Events that wait for their next try.
    pub retrying: u64,
    /// Age of the oldest event that waits for its next try, in milliseconds; `None` if there is
    /// none.
    pub retrying_age_ms: Option<u64>,
    /// Events that wait for their time.
    pub scheduled: u64,
    /// Age of the oldest event that waits for its time, in milliseconds; `None` if there is none.
    pub scheduled_age_ms: Option<u64>,
    /// Events that wait behind an earlier event of their key, or did so and are under way now.
    pub parked: u64,
    /// Age of the oldest event that waits behind an earlier one of its key, in milliseconds; `None`
    /// if there is none.
    pub parked_age_ms: Option<u64>,
    /// Events in quarantine. They are no part of the backlog.
    pub quarantined: u64,
    /// The relay's running state, if it runs in this process.
    pub running: Option<RelayStatus>,
}

/// One projection's figures: its running state if it runs, otherwise its durable state.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
/// let projection = store.projection("balances").spawn(|_, _| Ok(()))?;
/// projection.wait_for_position(0, std::time::Duration::from_secs(5))?;
/// let stats: &onewrite::ProjectionStats = &store.stats()?.projections["balances"];
/// assert_eq!((stats.position, stats.lag_events, stats.lag_ms), (1, 0, None));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ProjectionStats {
    /// The version of the projection's tables.
    pub version: u32,
    /// The position: everything below is in the projection's tables, was skipped by its filter, or
    /// is among its failures.
    pub position: u64,
    /// Events from the position to the end of the log. This includes events that the filter will
    /// skip, and trimmed events.
    pub lag_events: u64,
    /// Age of the oldest of these events that the log holds, in milliseconds; `None` if there is
    /// none. The rule is that of [`RelayStats::backlog_age_ms`].
    pub lag_ms: Option<u64>,
    /// The position of a rebuild, if one is under way.
    pub rebuilding: Option<u64>,
    /// The version whose rebuild was [cancelled](Store::cancel_rebuild), unless a later rebuild was
    /// requested.
    pub cancelled: Option<u32>,
    /// The projection's running state, if it runs in this process.
    pub running: Option<ProjectionStatus>,
}

impl Store {
    /// Returns figures of the store and its relays. Progress shows once it is durable: up to the
    /// progress delay later.
    ///
    /// **Cost.** The call waits for no write. It reads a few rows for each relay and projection,
    /// and at most [`STATS_ROWS_MAX`](crate::limits::STATS_ROWS_MAX) rows for each age of a relay.
    /// If more rows of other kinds stand before the oldest event, the age is that of an event among
    /// these rows. The next call then goes on where the last call ended.
    ///
    /// # Errors
    /// Errors of the storage engine while it finds the oldest events.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// let stats = store.stats()?;
    /// assert_eq!(stats.backlog_events, 1); // nothing has published it
    /// assert!(stats.backlog_bytes > 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stats(&self) -> Result<Stats> {
        let core = self.core();
        core.owner.check()?;
        // Read the clock first. The clock belongs to the application, so its panic is no panic of
        // the engine.
        let now = core.settings.clock.now();
        let waits = CoalescingPasses::waits(core);
        unless_it_panics(|| self.all_stats(now, &waits))
    }

    fn all_stats(&self, now: Now, waits: &BTreeMap<String, CaptureWait>) -> Result<Stats> {
        let core = self.core();
        let (mut stats, cursors) = {
            let tail = core.tail();
            let relays = tail.cursors.iter().map(|(name, cursor)| (name.clone(), relay_stats(&tail, cursor)));
            let captures = tail.captures.iter().map(|(name, known)| {
                let stats = CaptureStats {
                    mode: known.row.mode,
                    waiting: known.waiting,
                    snapshot_done: !known.row.snapshot.is_open(),
                    failed: core.passes.failed(known.row.id),
                    waits_for: waits.get(name).copied(),
                };
                (name.clone(), stats)
            });
            let mut stats = Stats {
                captures: captures.collect(),
                next_seq: tail.next_seq,
                trimmed_to: tail.trimmed_to,
                relays: relays.collect(),
                projections: projection_stats(&tail),
                cleanup_tasks: tail.cleanup.tasks,
                cleanup_events: tail.cleanup.events,
                ..Stats::default()
            };
            let cursors: Vec<_> = tail
                .cursors
                .iter()
                .map(|(name, cursor)| {
                    let parked = tail.parked.get(&cursor.id).and_then(Parked::first);
                    (name.clone(), cursor.clone(), parked)
                })
                .collect();
            if cursors.is_empty() {
                (stats.backlog_events, stats.backlog_bytes) = tail.backlog();
            }
            (stats, cursors)
        };
        let tx = core.begin_read()?;
        for (name, cursor, parked) in &cursors {
            let oldest = find_oldest(&tx, cursor, *parked, stats.next_seq)?;
            if let Some(now) = core.tail().cursors.get_mut(name) {
                oldest.note(cursor, now);
            }
            if let Some(relay) = stats.relays.get_mut(name) {
                relay.note_oldest(&oldest, |seq| age_ms(core, &tx, seq, now))?;
            }
        }
        stats.add_up();
        if cursors.is_empty() && stats.backlog_events > 0 {
            stats.backlog_age_ms = Some(age_ms(core, &tx, stats.trimmed_to, now)?);
        }
        for (name, relay) in &mut stats.relays {
            let port = core.relays.port(name);
            relay.running =
                port.map(|port| port.status.lock().unwrap_or_else(PoisonError::into_inner).clone());
        }
        for (name, projection) in &mut stats.projections {
            projection.cancelled = crate::store::handle::cancelled::cancelled_version(&tx, name)?;
            projection.running = core.projections.get(name).map(|running| running.status().clone());
            // A projection writes down only now and then what its filter has skipped.
            if let Some(running) = &projection.running {
                projection.position = projection.position.max(running.position);
                projection.lag_events = stats.next_seq.saturating_sub(projection.position);
            }
            if projection.lag_events > 0 {
                projection.lag_ms = Some(age_ms(core, &tx, projection.position, now)?);
            }
        }
        (stats.holders, stats.snapshots, stats.snapshots_age_ms) = holders::find(core, &tx, now)?;
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        {
            // Keeps the figures of one moment. A commit under way may have been synced, and is not
            // counted yet.
            let _unchanged = core.progress();
            stats.commits = get(&core.counters.commits);
            stats.commits_alone = get(&core.counters.commits_alone);
            stats.writes = get(&core.counters.writes);
            stats.io = core.io.stats();
        }
        stats.snapshots_left_out = core.left_out.total();
        stats.reruns = get(&core.counters.reruns);
        stats.verified_at_open = core.verified_at_open;
        stats.poisoned = core.poisoned().map(|cause| cause.to_string());
        stats.consumers = self.scope_stats()?;
        let of_any = self.rejected_totals()?.into_iter().map(|(scope, totals)| (scope, totals.rows));
        stats.rejected = of_any.collect();
        Ok(stats)
    }
}

fn relay_stats(tail: &Tail, cursor: &Cursor) -> RelayStats {
    let (backlog_events, backlog_bytes) = tail.backlog_of(cursor);
    RelayStats {
        position: cursor.position,
        confirmed: cursor.confirmed,
        backlog_events,
        backlog_bytes,
        retrying: cursor.rows.retrying,
        scheduled: cursor.rows.scheduled,
        parked: cursor.rows.parked,
        quarantined: cursor.rows.quarantined,
        ..RelayStats::default()
    }
}

impl RelayStats {
    fn note_oldest(&mut self, oldest: &Oldest, age_ms: impl Fn(u64) -> Result<u64>) -> Result<()> {
        let age_of = |seq: Option<u64>| seq.map(&age_ms).transpose();
        self.backlog_first = oldest.unsettled.filter(|_| self.backlog_events > 0);
        self.backlog_age_ms = age_of(self.backlog_first)?;
        self.retrying_age_ms = age_of(oldest.retrying)?;
        self.scheduled_age_ms = age_of(oldest.scheduled)?;
        self.parked_age_ms = age_of(oldest.parked.filter(|_| self.parked > 0))?;
        Ok(())
    }
}

impl Stats {
    /// Sums up the figures of all relays.
    fn add_up(&mut self) {
        let backlog = |relay: &&RelayStats| (relay.backlog_events, relay.backlog_bytes);
        if let Some(most) = self.relays.values().max_by_key(backlog) {
            (self.backlog_events, self.backlog_bytes) = backlog(&most);
        }
        for relay in self.relays.values() {
            self.backlog_age_ms = self.backlog_age_ms.max(relay.backlog_age_ms);
            self.retrying += relay.retrying;
            self.retrying_age_ms = self.retrying_age_ms.max(relay.retrying_age_ms);
            self.scheduled += relay.scheduled;
            self.scheduled_age_ms = self.scheduled_age_ms.max(relay.scheduled_age_ms);
            self.parked += relay.parked;
            self.parked_age_ms = self.parked_age_ms.max(relay.parked_age_ms);
            self.quarantined += relay.quarantined;
        }
    }
}

fn projection_stats(tail: &Tail) -> BTreeMap<String, ProjectionStats> {
    let stats = tail.projections.iter().map(|(name, row)| {
        let stats = ProjectionStats {
            version: row.live.version,
            position: row.live.position,
            lag_events: tail.next_seq.saturating_sub(row.live.position),
            lag_ms: None,
            rebuilding: row.rebuild.map(|rebuild| rebuild.position),
            cancelled: None,
            running: None,
        };
        (name.clone(), stats)
    });
    stats.collect()
}
