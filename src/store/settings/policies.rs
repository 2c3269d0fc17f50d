//! Policies for ids and lanes beyond their bounds.

use std::time::Duration;

use crate::limits::LANE_IDLE_MS_DEFAULT;

/// The policy for a new id of a foreign message when the store remembers as many ids as it may. See
/// [`StoreBuilder::inbox_ids_policy`](crate::StoreBuilder::inbox_ids_policy).
///
/// ```
/// assert_eq!(onewrite::IdsPolicy::default(), onewrite::IdsPolicy::Refuse);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum IdsPolicy {
    /// The message is refused with [`Error::InboxFull`](crate::Error::InboxFull) until ids have
    /// grown old. So no publisher can make the store forget an applied id. The default.
    #[default]
    Refuse,
    /// The oldest id is forgotten. **Anyone with the right to publish can send so many ids that a
    /// repeat is applied twice.** Use it for queues to which only trusted producers publish.
    ForgetOldest,
}

/// The policy for a message of a new lane when the store remembers as many lanes as it may. See
/// [`StoreBuilder::lanes_policy`](crate::StoreBuilder::lanes_policy).
///
/// ```
/// use onewrite::{LanesPolicy, limits::LANE_IDLE_MS_DEFAULT};
/// let day = std::time::Duration::from_millis(LANE_IDLE_MS_DEFAULT);
/// assert_eq!(LanesPolicy::default(), LanesPolicy::ForgetIdle(day));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LanesPolicy {
    /// The message is refused with [`Error::LanesFull`](crate::Error::LanesFull).
    Refuse,
    /// A lane that got no message for this long is forgotten for the new lane. Only time while the
    /// store is open counts. The default is a day.
    ///
    /// If there is no such lane, the message is refused. A later message of a forgotten lane is
    /// rejected, never applied twice.
    ForgetIdle(Duration),
}

impl Default for LanesPolicy {
    fn default() -> Self {
        Self::ForgetIdle(Duration::from_millis(LANE_IDLE_MS_DEFAULT))
    }
}
