//! The revision that an append expects of its stream.

use std::fmt;

/// The state that a stream must have for an append to succeed.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Error, Event, ExpectedRevision};
/// let deposit = || [Event::bytes("deposited", "100").unpublished()];
/// store.write(move |tx| tx.stream("account-7").append(deposit(), ExpectedRevision::NoStream))?;
/// store.write(move |tx| tx.stream("account-7").append(deposit(), ExpectedRevision::Exact(0)))?;
/// let conflict = store.write(move |tx| tx.stream("account-7").append(deposit(), ExpectedRevision::Exact(0)));
/// assert!(matches!(conflict, Err(Error::WrongRevision { actual: Some(1), .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpectedRevision {
    /// Any state.
    Any,
    /// The stream has never had an event.
    NoStream,
    /// The stream has had an event.
    StreamExists,
    /// The stream's newest event has this revision.
    Exact(u64),
}

impl ExpectedRevision {
    /// Whether a stream whose newest event has this revision meets the expectation.
    pub(crate) fn holds(self, newest: Option<u64>) -> bool {
        match self {
            Self::Any => true,
            Self::NoStream => newest.is_none(),
            Self::StreamExists => newest.is_some(),
            Self::Exact(revision) => newest == Some(revision),
        }
    }

    /// Returns the revision of the first appended event, if the expectation determines it.
    pub(crate) fn first(self) -> Option<u64> {
        match self {
            Self::Any | Self::StreamExists => None,
            Self::NoStream => Some(0),
            Self::Exact(revision) => revision.checked_add(1),
        }
    }
}

impl fmt::Display for ExpectedRevision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any revision"),
            Self::NoStream => f.write_str("no stream"),
            Self::StreamExists => f.write_str("a stream that exists"),
            Self::Exact(revision) => write!(f, "revision {revision}"),
        }
    }
}
