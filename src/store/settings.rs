//! The store's settings and its builder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::Store;
use crate::error::{Result, SettingError};
use crate::limits::{
    CACHE_BYTES_DEFAULT, INBOX_AGE_MS_DEFAULT, PAYLOAD_BYTES_DEFAULT, PAYLOAD_BYTES_MAX, RIDE_MS_DEFAULT,
};
use crate::time::{Clock, SystemClock, as_ms};

/// What happens when the backlog quota is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QuotaPolicy {
    /// `append` fails with [`Error::BacklogFull`](crate::Error::BacklogFull). The default.
    #[default]
    Refuse,
    /// `write` waits for room up to this long before its closure runs; then `append` fails.
    Wait(Duration),
}

/// A limit on what may wait for the broker. None unless set: writes then go on until the disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BacklogQuota {
    /// Events at most.
    pub events_max: u64,
    /// Bytes of records at most.
    pub bytes_max: u64,
    /// What happens then.
    pub policy: QuotaPolicy,
}

/// How long confirmed events stay in the log. They stay while *any* of the set limits still wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// The newest this many.
    pub events_min: u64,
    /// The newest records of this many bytes together.
    pub bytes_min: u64,
    /// Those younger than this, in milliseconds.
    pub age_ms_min: u64,
    /// Everything, for ever.
    pub forever: bool,
}

impl Retention {
    /// Confirmed events are trimmed soon. The default.
    ///
    /// ```
    /// # use onewrite::Retention;
    /// assert_eq!(Retention::until_confirmed(), Retention::default());
    /// ```
    #[must_use]
    pub fn until_confirmed() -> Self {
        Self::default()
    }
    /// Nothing is ever trimmed: for event sourcing.
    #[must_use]
    pub fn forever() -> Self {
        Self { forever: true, ..Self::default() }
    }
    /// Keeps the newest `events`.
    #[must_use]
    pub fn keep_events(mut self, events: u64) -> Self {
        self.events_min = events;
        self
    }
    /// Keeps the newest records of `bytes` together.
    #[must_use]
    pub fn keep_bytes(mut self, bytes: u64) -> Self {
        self.bytes_min = bytes;
        self
    }
    /// Keeps what is younger than `age`.
    #[must_use]
    pub fn keep_age(mut self, age: Duration) -> Self {
        self.age_ms_min = as_ms(age);
        self
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) cache_bytes: usize,
    pub(crate) payload_bytes_max: usize,
    pub(crate) quota: Option<BacklogQuota>,
    pub(crate) retention: Retention,
    pub(crate) inbox_age_ms: u64,
    pub(crate) ride_ms: u64,
    pub(crate) create: bool,
    pub(crate) adopt: bool,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Settings of a store, before it is opened.
///
/// ```
/// use onewrite::{BacklogQuota, QuotaPolicy, Store};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("payments.redb");
/// let store = Store::builder()
///     .cache_bytes(8 << 20)
///     .backlog_quota(BacklogQuota { events_max: 1_000_000, bytes_max: 1 << 30, policy: QuotaPolicy::Refuse })
///     .open(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `open` is called"]
pub struct StoreBuilder {
    settings: Settings,
}

impl Default for StoreBuilder {
    fn default() -> Self {
        Self {
            settings: Settings {
                cache_bytes: CACHE_BYTES_DEFAULT,
                payload_bytes_max: PAYLOAD_BYTES_DEFAULT,
                quota: None,
                retention: Retention::default(),
                inbox_age_ms: INBOX_AGE_MS_DEFAULT,
                ride_ms: RIDE_MS_DEFAULT,
                create: true,
                adopt: false,
                clock: Arc::new(SystemClock::new()),
            },
        }
    }
}

impl StoreBuilder {
    /// Bytes of redb's page cache; 32 MiB unless set (redb's own default is 1 GiB).
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.settings.cache_bytes = bytes;
        self
    }

    /// Cap on one event's payload; 1 MiB unless set, at most [`PAYLOAD_BYTES_MAX`]. RabbitMQ 3.10 takes 128 MiB, RabbitMQ 4 takes 16 MiB.
    pub fn payload_bytes_max(mut self, bytes: usize) -> Self {
        self.settings.payload_bytes_max = bytes;
        self
    }

    /// Limits what may wait for the broker.
    pub fn backlog_quota(mut self, quota: BacklogQuota) -> Self {
        self.settings.quota = Some(quota);
        self
    }

    /// How long confirmed events stay in the log; not at all unless set.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.settings.retention = retention;
        self
    }

    /// How long a seen id (request, delivery, event id given by the application) is remembered at least; 7 days unless set.
    pub fn inbox_age(mut self, age: Duration) -> Self {
        self.settings.inbox_age_ms = as_ms(age);
        self
    }

    /// How long a relay's progress may wait for a commit to ride on before it gets one of its own; 250 ms unless set.
    /// What is not written when the process dies is published again.
    pub fn progress_delay(mut self, delay: Duration) -> Self {
        self.settings.ride_ms = as_ms(delay);
        self
    }

    /// Whether a missing file is created; yes unless set.
    pub fn create_if_missing(mut self, create: bool) -> Self {
        self.settings.create = create;
        self
    }

    /// Whether a redb database that has no log yet gets one; no unless set, so that a wrong path is not written to.
    /// The application's own tables stay as they are.
    pub fn adopt_existing(mut self, adopt: bool) -> Self {
        self.settings.adopt = adopt;
        self
    }

    /// The clock; the operating system's unless set.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.settings.clock = clock;
        self
    }

    /// Opens the store, creating it if there is none.
    ///
    /// When this returns `Ok`, this process owns the file; the log is readable and its end is known. After an unclean
    /// end of the last owner every page is verified first (about 2 s per GB).
    ///
    /// # Errors
    /// [`Error::Open`](crate::Error::Open), naming the file, or [`Error::Setting`](crate::Error::Setting). Nothing is lost by trying.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Store> {
        let settings = self.settings;
        if settings.payload_bytes_max > PAYLOAD_BYTES_MAX {
            let reason = format!("{} bytes are more than {PAYLOAD_BYTES_MAX}", settings.payload_bytes_max);
            return Err(SettingError::new("payload_bytes_max", reason).into());
        }
        if settings.quota.is_some_and(|quota| quota.events_max == 0 || quota.bytes_max == 0) {
            return Err(SettingError::new("backlog_quota", "a quota of zero would refuse every event").into());
        }
        Store::open_with(PathBuf::from(path.as_ref()), settings)
    }
}
