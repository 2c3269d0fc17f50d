//! The backlog quota: how much may wait to be published.

use std::time::Duration;

/// What happens when the backlog reaches the quota.
///
/// ```
/// use std::time::Duration;
/// use onewrite::QuotaPolicy;
/// assert_eq!(QuotaPolicy::default(), QuotaPolicy::Refuse);
/// let policy = QuotaPolicy::Wait(Duration::from_millis(500));
/// # let _ = policy;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QuotaPolicy {
    /// `append` fails with [`Error::BacklogFull`](crate::Error::BacklogFull). The default.
    #[default]
    Refuse,
    /// Events that [expired](crate::Event::expires) before they were published are released first.
    /// If that makes no room, `append` fails.
    ///
    /// The store asks the relays whose backlog is too large to search, and `write` waits for the
    /// result, for a second at most. A longer search goes on, and later writes find the room. The
    /// policy also works while the broker is away.
    ///
    /// A released event does not vanish: the relay places the event in
    /// [quarantine](crate::Store::quarantine) as expired. There it holds no other event and does
    /// not count as backlog. Its record stays until the event is discarded. Events in flight are
    /// left to their outcome.
    ///
    /// A relay that does not run releases nothing. [`begin`](crate::Store::begin) waits like
    /// `write`. `write_async`, and `append` in a handler, do not wait: they start the search, and
    /// fail at once. The next try finds the room.
    DropExpired,
    /// `write` waits for room up to this long before its closure runs; then `append` fails.
    /// `Duration::MAX` waits until there is room, or until the store is closed.
    Wait(Duration),
}

/// A limit on the backlog. None unless set: writes then go on until the disk is full.
///
/// The backlog is what the slowest relay still has to publish: every event after its position, and
/// every deferred event (which waits for a retry, a time, or an earlier event of its key). Events
/// in quarantine do not count. The count is a little too high: it includes events that are
/// confirmed behind an unconfirmed event, until that event has its outcome or is deferred.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// use onewrite::{BacklogQuota, Error, Event, QuotaPolicy, Store};
/// let quota = BacklogQuota::events(1).and_bytes(1 << 20);
/// let store = Store::builder().backlog_quota(quota).open(folder.path().join("a.redb"))?;
/// let pay = || store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")));
/// pay()?;
/// assert!(matches!(pay(), Err(Error::BacklogFull { events_max: 1, .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a quota does nothing until it is given to `StoreBuilder::backlog_quota`"]
pub struct BacklogQuota {
    pub(crate) events_max: u64,
    pub(crate) bytes_max: u64,
    pub(crate) policy: QuotaPolicy,
}

impl BacklogQuota {
    /// Whether the backlog, in events and bytes, together with what is added, reaches the quota.
    pub(crate) fn is_over(&self, backlog: (u64, u64), added: (u64, u64)) -> bool {
        backlog.0 + added.0 >= self.events_max || backlog.1 + added.1 >= self.bytes_max
    }

    /// At most this many events, of any length.
    ///
    /// ```
    /// use onewrite::{BacklogQuota, QuotaPolicy};
    /// let quota = BacklogQuota::events(1_000_000).and_bytes(1 << 30).policy(QuotaPolicy::DropExpired);
    /// # let _ = quota;
    /// ```
    pub const fn events(events: u64) -> Self {
        Self { events_max: events, bytes_max: u64::MAX, policy: QuotaPolicy::Refuse }
    }

    /// Records of at most this many bytes together, in any number.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{BacklogQuota, Store};
    /// let store = Store::builder().backlog_quota(BacklogQuota::bytes(1 << 30)).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn bytes(bytes: u64) -> Self {
        Self { events_max: u64::MAX, bytes_max: bytes, policy: QuotaPolicy::Refuse }
    }

    /// Adds a limit of this many bytes of records.
    ///
    /// ```
    /// use onewrite::BacklogQuota;
    /// assert_ne!(BacklogQuota::events(10).and_bytes(1 << 20), BacklogQuota::events(10));
    /// ```
    pub const fn and_bytes(mut self, bytes: u64) -> Self {
        self.bytes_max = bytes;
        self
    }

    /// Sets what happens when the backlog reaches the quota; [`QuotaPolicy::Refuse`] unless set.
    ///
    /// ```
    /// use onewrite::{BacklogQuota, QuotaPolicy};
    /// let refuses = BacklogQuota::events(10);
    /// assert_eq!(refuses.policy(QuotaPolicy::Refuse), refuses);
    /// ```
    pub const fn policy(mut self, policy: QuotaPolicy) -> Self {
        self.policy = policy;
        self
    }
}
