//! How long published events are kept.

use std::time::Duration;

use crate::time::as_ms;

/// How long confirmed events stay in the log. An event stays while *any* of the set limits still
/// keeps it.
///
/// ```
/// use std::time::Duration;
/// use onewrite::{Retention, Store};
/// # let folder = tempfile::tempdir()?;
/// let retention = Retention::until_confirmed().keep_events(1000).keep_age(Duration::from_secs(3600));
/// let store = Store::builder().retention(retention).open(folder.path().join("a.redb"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// The newest events, this many.
    pub(crate) events_min: u64,
    /// The newest records, this many bytes together.
    pub(crate) bytes_min: u64,
    /// Events younger than this, in milliseconds.
    pub(crate) age_ms_min: u64,
    /// Every event, for ever.
    pub(crate) forever: bool,
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

    /// No event is ever trimmed: for event sourcing.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Retention, Store};
    /// let store = Store::builder().retention(Retention::forever()).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn forever() -> Self {
        Self { forever: true, ..Self::default() }
    }

    /// Keeps the newest `events`.
    ///
    /// ```
    /// use onewrite::Retention;
    /// assert_ne!(Retention::until_confirmed().keep_events(1000), Retention::until_confirmed());
    /// ```
    #[must_use]
    pub fn keep_events(mut self, events: u64) -> Self {
        self.events_min = events;
        self
    }

    /// Keeps the newest records, `bytes` bytes together.
    ///
    /// ```
    /// use onewrite::Retention;
    /// assert_ne!(Retention::until_confirmed().keep_bytes(1 << 30), Retention::until_confirmed());
    /// ```
    #[must_use]
    pub fn keep_bytes(mut self, bytes: u64) -> Self {
        self.bytes_min = bytes;
        self
    }

    /// Keeps events that are younger than `age`.
    ///
    /// The age is the time that has passed, while the store was open, since the event was appended.
    /// The event's own time and the wall clock play no part. The store knows the age in steps of a
    /// 64th of `age`, or of a second if that is longer. An event stays longer by at most one step.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use onewrite::Retention;
    /// let a_minute = Retention::until_confirmed().keep_age(Duration::from_secs(60));
    /// assert_eq!(a_minute, Retention::until_confirmed().keep_age(Duration::from_millis(60_000)));
    /// ```
    #[must_use]
    pub fn keep_age(mut self, age: Duration) -> Self {
        self.age_ms_min = as_ms(age);
        self
    }
}
