//! Figures of a store.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::relays::RelayStatus;
use super::{Store, relay_rows};
use crate::error::Result;

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
    /// The sequence number that the next event gets: events appended since the store was made.
    pub next_seq: u64,
    /// Records in the log start here, but for earlier ones that are quarantined or wait apart.
    pub trimmed_to: u64,
    /// Events that the slowest relay still has to publish; without any relay, all that the log holds.
    pub backlog_events: u64,
    /// Bytes of their records. What waits apart from the position is not counted.
    pub backlog_bytes: u64,
    /// Age of the oldest of them, by the wall clock, in milliseconds; `None` if there is none.
    pub backlog_age_ms: Option<u64>,
    /// Durable commits since the store was opened: one fsync each.
    pub commits: u64,
    /// Those among them that carried a relay's progress and no write of the application.
    pub commits_alone: u64,
    /// Write closures and exclusive transactions committed since the store was opened.
    pub writes: u64,
    /// Times a group was run again without a closure that had failed.
    pub reruns: u64,
    /// Why the store accepts nothing more, if so.
    pub poisoned: Option<String>,
    /// The relays that the file knows, by name.
    pub relays: BTreeMap<String, RelayStats>,
    /// Deliveries in the quarantine of each consumer that has ever rejected one, by scope.
    pub rejected: BTreeMap<String, u64>,
}

/// One relay's figures, as durable; and as it runs, if it does.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::publish::MemoryBroker::new();
/// let relay = store.relay("rabbit").publish_to(broker.publisher())?;
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
    /// Everything below is confirmed, but for what waits apart or is quarantined.
    pub position: u64,
    /// Events confirmed since the relay was made.
    pub confirmed: u64,
    /// Events that wait for their next try.
    pub retrying: u64,
    /// Events that wait for their time.
    pub scheduled: u64,
    /// Events that wait behind an earlier one of their key.
    pub parked: u64,
    /// Events in quarantine.
    pub quarantined: u64,
    /// How it is, if it runs in this process.
    pub running: Option<RelayStatus>,
}

impl Store {
    /// Figures of the store and its relays. Progress shows once it is durable: up to the progress delay later.
    ///
    /// # Errors
    /// What the storage engine says while looking at the oldest event.
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
        let (mut stats, oldest) = {
            let tail = core.tail();
            let (backlog_events, backlog_bytes) = tail.backlog();
            let relays = tail.cursors.iter().map(|(name, cursor)| {
                let stats = RelayStats {
                    position: cursor.position,
                    confirmed: cursor.confirmed,
                    retrying: cursor.rows.retrying,
                    scheduled: cursor.rows.scheduled,
                    parked: cursor.rows.parked,
                    quarantined: cursor.rows.quarantined,
                    running: None,
                };
                (name.clone(), stats)
            });
            let stats = Stats {
                next_seq: tail.next_seq,
                trimmed_to: tail.trimmed_to,
                backlog_events,
                backlog_bytes,
                relays: relays.collect(),
                ..Stats::default()
            };
            let oldest = tail.cursors.values().map(|cursor| cursor.position).min().unwrap_or(tail.trimmed_to);
            (stats, oldest)
        };
        for (name, relay) in &mut stats.relays {
            let port = core.relays.port(name);
            relay.running =
                port.map(|port| port.status.lock().unwrap_or_else(PoisonError::into_inner).clone());
        }
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        stats.commits = get(&core.counters.commits);
        stats.commits_alone = get(&core.counters.commits_alone);
        stats.writes = get(&core.counters.writes);
        stats.reruns = get(&core.counters.reruns);
        stats.poisoned = core.poisoned().map(|cause| cause.to_string());
        stats.backlog_age_ms = relay_rows::age_ms(core, oldest)?;
        stats.rejected = self.rejected_counts()?;
        Ok(stats)
    }
}
