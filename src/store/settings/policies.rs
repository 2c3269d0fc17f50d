//! What becomes of ids and lanes beyond their bounds.

use std::time::Duration;

use crate::limits::LANE_IDLE_MS_DEFAULT;

/// What becomes of a new id of a foreign message where as many are remembered as may be: see
/// [`StoreBuilder::inbox_ids_policy`](crate::StoreBuilder::inbox_ids_policy).
///
/// ```
/// assert_eq!(onewrite::IdsPolicy::default(), onewrite::IdsPolicy::Refuse);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum IdsPolicy {
    /// It is refused with [`Error::InboxFull`](crate::Error::InboxFull) until ids have grown old. Nobody can have what was
    /// applied forgotten. The default.
    #[default]
    Refuse,
    /// The oldest id is forgotten. **Whoever may publish can send so many ids that a repeat is applied twice.** For queues where
    /// only trusted producers publish.
    ForgetOldest,
}

/// What becomes of a message of a new lane where as many are remembered as may be: see [`StoreBuilder::lanes_policy`](crate::StoreBuilder::lanes_policy).
///
/// ```
/// use onewrite::{LanesPolicy, limits::LANE_IDLE_MS_DEFAULT};
/// let day = std::time::Duration::from_millis(LANE_IDLE_MS_DEFAULT);
/// assert_eq!(LanesPolicy::default(), LanesPolicy::ForgetIdle(day));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LanesPolicy {
    /// It is refused with [`Error::LanesFull`](crate::Error::LanesFull).
    Refuse,
    /// A lane of which nothing came for so long, by the time that the store was open, is forgotten for it; if there is none, it is refused. What
    /// comes of a forgotten lane later is rejected, never applied twice. A day is the default.
    ForgetIdle(Duration),
}

impl Default for LanesPolicy {
    fn default() -> Self {
        Self::ForgetIdle(Duration::from_millis(LANE_IDLE_MS_DEFAULT))
    }
}
