//! All settings of a store, and what an application sets: quota, retention, policies, captures,
//! starting points.
//!
//! The lowest layer of the store. It does not know the store.

pub(crate) mod capture;
pub(crate) mod capture_stored;
pub(crate) mod capture_types;
pub(crate) mod policies;
pub(crate) mod quota;
pub(crate) mod retention;
pub(crate) mod start_at;

use std::sync::Arc;
use std::time::Duration;

use crate::event::Destination;
use crate::store::settings::capture_types::Captures;
use crate::time::Clock;
use crate::upcast::Upcasts;

pub use self::policies::{IdsPolicy, LanesPolicy};
pub use self::quota::{BacklogQuota, QuotaPolicy};
pub use self::retention::Retention;

/// The rule that gives a destination to events of streams that have none.
#[derive(Clone)]
pub(crate) struct StreamDestination(Arc<Rule>);

type Rule = dyn Fn(&str, &str) -> Option<Destination> + Send + Sync;

impl StreamDestination {
    pub(crate) fn new(rule: impl Fn(&str, &str) -> Option<Destination> + Send + Sync + 'static) -> Self {
        Self(Arc::new(rule))
    }

    pub(crate) fn of(&self, stream: &str, event_type: &str) -> Option<Destination> {
        (self.0)(stream, event_type)
    }
}

impl std::fmt::Debug for StreamDestination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StreamDestination")
    }
}

/// The bounds on what one transaction gathers in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TransactionMax {
    pub(crate) events: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) cache_bytes: usize,
    pub(crate) journal_bytes: usize,
    pub(crate) abandon_journal: bool,
    pub(crate) payload_bytes_max: usize,
    pub(crate) transaction_max: TransactionMax,
    pub(crate) quota: Option<BacklogQuota>,
    pub(crate) retention: Retention,
    pub(crate) stream_destination: Option<StreamDestination>,
    pub(crate) upcasts: Arc<Upcasts>,
    pub(crate) captures: Captures,
    pub(crate) inbox_age_ms: u64,
    pub(crate) inbox_ids_max: Option<u64>,
    pub(crate) ids_policy: IdsPolicy,
    pub(crate) lanes_max: u64,
    pub(crate) gaps_max: u64,
    pub(crate) lanes_policy: LanesPolicy,
    pub(crate) progress_delay_ms: u64,
    pub(crate) holder_warn_ms: u64,
    pub(crate) write_wait_max: Option<Duration>,
    pub(crate) quick_repair_idle: Option<Duration>,
    pub(crate) create: bool,
    pub(crate) overwrite_empty: bool,
    pub(crate) adopt: bool,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Settings {
    /// The number of ids per scope beyond which the store forgets the oldest; `None` if the store
    /// never forgets an id for a new one.
    pub(crate) fn ids_forgotten_beyond(&self) -> Option<u64> {
        self.inbox_ids_max.filter(|_| self.ids_policy == IdsPolicy::ForgetOldest)
    }
}
