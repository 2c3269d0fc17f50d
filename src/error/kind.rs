//! The kinds of errors: what a caller can do about an error.

use super::Error;

/// What a caller can do about an [`Error`]. See [`Error::kind`].
///
/// ```
/// use onewrite::{Error, ErrorKind};
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let status = |error: &Error| match error.kind() {
///     ErrorKind::Invalid => 400,
///     ErrorKind::NotFound => 404,
///     ErrorKind::Conflict => 409,
///     ErrorKind::TryLater => 503,
///     _ => 500,
/// };
/// assert_eq!(status(&store.quarantine("nobody").unwrap_err()), 404);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The application's own error, or its panic.
    App,
    /// An argument, an event, a message or a setting is not acceptable. The same call fails again.
    Invalid,
    /// Nothing has that name or number.
    NotFound,
    /// The call conflicts with the state: another revision, another content, a name in use.
    Conflict,
    /// A limit is reached, or another component is not far enough. The same call may succeed later.
    TryLater,
    /// The call is not possible here: inside a transaction, in a forked process, on a closed store.
    NotHere,
    /// The file holds damaged data. The library used none of the damaged data.
    Damaged,
    /// The file, the disk or the operating system failed.
    Storage,
}

impl Error {
    /// Returns what a caller can do about the error.
    ///
    /// ```
    /// use onewrite::{Error, ErrorKind, Event};
    /// assert_eq!(Error::app("insufficient funds").kind(), ErrorKind::App);
    /// let too_long = Event::bytes("paid", "").key("k".repeat(256)).to_queue("q").validate().unwrap_err();
    /// assert_eq!(Error::from(too_long).kind(), ErrorKind::Invalid);
    /// ```
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::App(_) | Self::Rejected(_) | Self::Panicked { .. } => ErrorKind::App,
            Self::Event(_)
            | Self::TransactionTooLarge { .. }
            | Self::Setting(_)
            | Self::UndeclaredTable { .. }
            | Self::ReservedTable { .. }
            | Self::CapturedTable { .. }
            | Self::NotCaptured { .. }
            | Self::CaptureTypes { .. }
            | Self::BadId { .. }
            | Self::LaneHeader { .. }
            | Self::Unreadable { .. }
            | Self::UnknownProducer { .. }
            | Self::NotAuthentic { .. }
            | Self::SnapshotTooLarge { .. } => ErrorKind::Invalid,
            Self::NoSuchRelay { .. }
            | Self::NoSuchProjection { .. }
            | Self::NoSuchFailure { .. }
            | Self::NotQuarantined { .. }
            | Self::NotRejected { .. }
            | Self::Trimmed { .. } => ErrorKind::NotFound,
            Self::Conflict { .. }
            | Self::IdElsewhere { .. }
            | Self::RelayRunning { .. }
            | Self::ProjectionRunning { .. }
            | Self::ProjectionTable { .. }
            | Self::IdConflict { .. }
            | Self::LaneConflict { .. }
            | Self::WrongRevision { .. }
            | Self::StreamDeleted { .. }
            | Self::ProjectionStopped { .. } => ErrorKind::Conflict,
            Self::BacklogFull { .. }
            | Self::WriteTimeout { .. }
            | Self::ProjectionBehind { .. }
            | Self::InboxFull { .. }
            | Self::LanesFull { .. } => ErrorKind::TryLater,
            Self::InsideTransaction { .. } | Self::Forked { .. } | Self::Closed { .. } => ErrorKind::NotHere,
            Self::Corrupt(_)
            | Self::UnreadableRow { .. }
            | Self::DamagedDelivery { .. }
            | Self::MissingRevision { .. }
            | Self::Upcast { .. } => ErrorKind::Damaged,
            Self::Open(_)
            | Self::Storage(_)
            | Self::Poisoned { .. }
            | Self::CommitUnknown { .. }
            | Self::Thread { .. } => ErrorKind::Storage,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::io;

    use crate::error::{Error, EventError, OpenError, StorageFailure};

    /// Goal: a cause is printed or is the `source()`, never both, and never lost. Method: an error
    /// of each family that has a cause.
    #[test]
    fn a_cause_is_reported_once() {
        let cause = || io::Error::other("no such device");
        let open = OpenError::Io { action: "open", path: "a.redb".into(), cause: cause() };
        let storage = StorageFailure { action: "reading", cause: cause().into(), fatal: true };
        let errors = [
            Error::Open(open),
            Error::Open(OpenError::Storage { path: "a.redb".into(), cause: cause().into() }),
            Error::Event(EventError::Encode { format: "JSON", cause: cause().into() }),
            Error::Storage(storage),
            Error::Thread { what: "relay", cause: cause() },
            Error::app(cause()),
            Error::reject(cause()),
        ];
        for error in &errors {
            let (text, mut chain) = (error.to_string(), Vec::new());
            let mut next = error.source();
            while let Some(source) = next {
                chain.push(source.to_string());
                next = source.source();
            }
            let reported = 1 + chain.iter().filter(|text| text.contains("no such device")).count();
            assert_eq!(reported, 1, "{text}: {chain:?}");
            assert!(text.contains("no such device"), "{text}");
        }
    }
}
