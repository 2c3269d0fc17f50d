//! Waiting for room under the backlog quota, and what that room depends on.
//!
//! **Invariant.** A write that need not wait costs a look at the figures in memory. A write that
//! waits logs which relay it waits for: the relay with the largest backlog makes room, and only if
//! it runs.

use std::fmt;
use std::time::Duration;

use crate::printable::printable;
use crate::store::settings::{BacklogQuota, QuotaPolicy};
use crate::store::shared::core::Core;
use crate::store::shared::relays::Pace;
use crate::store::shared::tail::Tail;
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::time::Deadline;
use crate::tuning::QUOTA_SCAN_MS_MAX;

/// How often a write that waits for room under the quota checks whether the store is still open.
const QUOTA_LOOK: Duration = Duration::from_secs(1);

/// The relay that makes room under the quota.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Awaited {
    /// The file knows no relay, so the events in the log are never published.
    NoRelay,
    /// This relay has the largest backlog.
    Relay { name: String, pace: Pace },
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Relay { name, pace } = self else { return f.write_str("a relay: the store has none") };
        write!(f, "relay `{}`, ", printable(name))?;
        f.write_str(match pace {
            Pace::None => "which does not run in this process",
            Pace::Paused => "which is paused",
            Pace::Away => "whose broker is away or takes nothing",
            Pace::Flows => "which publishes",
        })
    }
}

impl Core {
    fn awaited(&self, tail: &Tail, quota: &BacklogQuota) -> Awaited {
        let most = tail.cursors.iter().max_by_key(|(_, cursor)| {
            let backlog = tail.backlog_of(cursor);
            // A relay whose backlog alone exceeds the quota comes first, whether by events or by
            // bytes.
            (quota.is_over(backlog, (0, 0)), backlog)
        });
        let Some((name, _)) = most else { return Awaited::NoRelay };
        Awaited::Relay { name: name.clone(), pace: self.relays.pace_of(name) }
    }

    /// Waits for room under the quota, where the quota's policy says so. `append` decides in the
    /// end.
    pub(crate) fn wait_for_room(&self, purpose: &Purpose) {
        let Some(quota) = &self.settings.quota else { return };
        let timeout = match quota.policy {
            QuotaPolicy::Refuse => return,
            QuotaPolicy::DropExpired => Duration::from_millis(QUOTA_SCAN_MS_MAX),
            QuotaPolicy::Wait(timeout) => timeout,
        };
        let now_ms = self.settings.clock.now().wall_ms;
        let mut tail = self.tail();
        if Self::over_quota(&tail, quota, (0, 0)).is_none() {
            return;
        }
        let deadline = Deadline::after(timeout);
        let mut wait = Wait::new(purpose.clone(), None);
        let wanted = self.ask_for_expiry(&tail, (0, 0), now_ms);
        while Self::over_quota(&tail, quota, (0, 0)).is_some()
            && self.poisoned().is_none()
            && !self.is_closing()
        {
            let vain = wanted.as_ref().is_some_and(|wanted| !self.expiry_requests.is_awaited(wanted));
            if deadline.is_over() || vain {
                return;
            }
            // Closing or poisoning the store notifies too, but without the lock: that notification
            // may come just before the wait.
            let look = deadline.min(Deadline::after(QUOTA_LOOK)).min(wait.next());
            tail = look.wait(&self.backlog_shrank, tail);
            if wait.next().is_over() && wait.take_warning() {
                let (events, bytes) = tail.backlog();
                let waits_for = self.awaited(&tail, quota);
                // The warning runs the application's logger, so the lock is released first.
                drop(tail);
                let waited_ms = wait.waited_ms();
                tracing::warn!(
                    path = %self.path.display(), waiting = %purpose, waited_ms, events, bytes, %waits_for,
                    "a write waits long for room under the backlog quota"
                );
                tail = self.tail();
            }
        }
    }
}
