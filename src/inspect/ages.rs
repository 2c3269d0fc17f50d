//! Figures that are times, as [`Duration`].

use std::time::Duration;

use super::{ProjectionStats, RelayStats, Stats};

/// Defines one method for each field that holds milliseconds.
macro_rules! ages {
    ($($type:ident { $($(#[$doc:meta])* $name:ident: $field:ident,)+ })+) => {
        $(impl $type {
            $($(#[$doc])*
            #[doc = ""]
            #[doc = concat!("As a number of milliseconds: [`", stringify!($field), "`](Self::", stringify!($field), ").")]
            #[doc = ""]
            #[doc = "```"]
            #[doc = concat!("let stats = onewrite::", stringify!($type), "::default();")]
            #[doc = concat!("assert_eq!((stats.", stringify!($field), ", stats.", stringify!($name), "()), (None, None));")]
            #[doc = "```"]
            #[must_use]
            pub fn $name(&self) -> Option<Duration> {
                self.$field.map(Duration::from_millis)
            })+
        })+
    };
}

ages! {
    Stats {
        /// The age of the oldest event that a relay has still to publish.
        backlog_age: backlog_age_ms,
        /// The age of the oldest event that waits for its next try.
        retrying_age: retrying_age_ms,
        /// The age of the oldest event that waits for its time.
        scheduled_age: scheduled_age_ms,
        /// The age of the oldest event that waits behind an earlier one of its key.
        parked_age: parked_age_ms,
        /// The age of the oldest read transaction that is still open.
        snapshots_age: snapshots_age_ms,
    }
    RelayStats {
        /// The age of the oldest event that the relay has still to publish.
        backlog_age: backlog_age_ms,
        /// The age of the oldest event that waits for its next try.
        retrying_age: retrying_age_ms,
        /// The age of the oldest event that waits for its time.
        scheduled_age: scheduled_age_ms,
        /// The age of the oldest event that waits behind an earlier one of its key.
        parked_age: parked_age_ms,
    }
    ProjectionStats {
        /// The age of the oldest event that the projection has still to apply.
        lag: lag_ms,
    }
}
