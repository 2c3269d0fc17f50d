//! The error families.
//!
//! One enum per kind of operation, and [`Error`] over them. What can happen in operation is a value here, and it
//! names the thing it is about: the file, the sequence number, the setting, the field. No error text ever holds a
//! payload, a header value or a password.

mod causes;
mod event;
mod kind;
mod open;
mod panic;
mod revision;
mod stands;

use std::path::PathBuf;
use std::sync::Arc;

pub use self::causes::{CorruptError, SettingError, StorageFailure};
pub use self::event::EventError;
pub use self::kind::ErrorKind;
pub use self::open::OpenError;
pub(crate) use self::panic::{caught, panic_text};
pub use self::revision::ExpectedRevision;
pub use self::stands::Stands;
use crate::printable::printable;

/// An error of the application or of a library below, boxed.
///
/// ```
/// let error: onewrite::BoxError = "insufficient funds".into();
/// assert_eq!(error.to_string(), "insufficient funds");
/// ```
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// `Result` with this crate's [`Error`].
///
/// ```
/// fn check(balance: u64) -> onewrite::Result<()> {
///     if balance == 0 { Err(onewrite::Error::app("insufficient funds")) } else { Ok(()) }
/// }
/// assert!(check(0).is_err());
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that a store, a transaction or a relay can answer instead of the value asked for.
///
/// ```
/// use onewrite::{Error, Event};
/// let too_long = "k".repeat(256);
/// let error = Event::bytes("payment.completed", b"...".to_vec()).key(too_long).to("payments", "x").validate().unwrap_err();
/// assert_eq!(error.to_string(), "event field `key` is 256 bytes long; at most 255 are allowed");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store could not be opened or created.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The event was refused at append; nothing of it was written.
    #[error(transparent)]
    Event(#[from] EventError),
    /// An event with this id was appended before, and its content differs. Where that record is gone, stream and destination count
    /// as content: the checksum is of all.
    #[error("event id `{}` was appended before, as sequence number {seq}, with other content", printable(id))]
    Conflict {
        /// The id that both events carry.
        id: String,
        /// Where the first one stands.
        seq: u64,
    },
    /// An event with this id and this content was appended before, but not where this append would have it.
    #[error(
        "event id `{}` was appended before with the same content, as sequence number {seq}, but elsewhere: {stands}",
        printable(id)
    )]
    IdElsewhere {
        /// The id that both events carry.
        id: String,
        /// The sequence number of the first one.
        seq: u64,
        /// Where that one stands.
        stands: Stands,
    },
    /// A record failed its check. It is never published or applied.
    #[error(transparent)]
    Corrupt(#[from] CorruptError),
    /// The storage engine failed.
    #[error(transparent)]
    Storage(#[from] StorageFailure),
    /// An earlier durable write failed, or the store's file is no longer at its path. The store takes nothing more until it is opened anew.
    #[error("the store {path} is poisoned ({cause}); close it and open it again", path = path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
        /// What failed first, or what was found at the path.
        cause: Arc<str>,
    },
    /// The commit failed in a way that leaves open whether the change is on disk. The store is poisoned; after
    /// reopening, retry with the same request or event id.
    #[error("commit failed and its outcome is unknown ({cause}); the store must be opened again")]
    CommitUnknown {
        /// What the storage engine said.
        cause: Arc<str>,
    },
    /// The closure, or the store's clock at its commit, panicked. Nothing of it was written.
    #[error("the write closure panicked: {message}")]
    Panicked {
        /// The panic's message, where it was text.
        message: String,
    },
    /// The application's own error, returned from its closure. Nothing of that closure was written.
    #[error(transparent)]
    App(BoxError),
    /// A consumer's handler refuses this delivery for good: to quarantine with it, or to the dead-letter exchange.
    #[error("rejected: {0}")]
    Rejected(BoxError),
    /// The backlog quota that the application has set is reached.
    #[error(
        "backlog quota reached: {events} events and {bytes} bytes wait for the broker; the quota is {events_max} events and {bytes_max} bytes"
    )]
    BacklogFull {
        /// Events waiting.
        events: u64,
        /// Bytes waiting.
        bytes: u64,
        /// The quota in events.
        events_max: u64,
        /// The quota in bytes.
        bytes_max: u64,
    },
    /// The transaction would hold more in memory than it may. Nothing of it is written, also where its closure makes nothing of
    /// this error. Write in several transactions, or raise the limit.
    #[error(
        "the transaction is too large: {events} events, {entries} entries and {bytes} bytes; the setting `transaction_events_max` allows {events_max} of each, `transaction_bytes_max` allows {bytes_max} bytes"
    )]
    TransactionTooLarge {
        /// Events that it would append.
        events: u64,
        /// Entries that it would make: ids in the inbox, dirty keys of captured tables, states of streams, events that were there already.
        entries: u64,
        /// Bytes of its records and of the keys of its entries.
        bytes: u64,
        /// The limit on events, and on entries.
        events_max: u64,
        /// The limit on bytes.
        bytes_max: u64,
    },
    /// The call would wait for the transaction that its own thread holds.
    #[error("`{operation}` was called inside a transaction of the same store; it would wait for itself")]
    InsideTransaction {
        /// The call.
        operation: &'static str,
    },
    /// The write transaction was not to be had within [`StoreBuilder::write_wait_max`](crate::StoreBuilder::write_wait_max).
    /// Nothing was written, and the closure will not run.
    #[error("waited {waited_ms} ms for the write transaction of {path}, held by {holder}; nothing was written", path = path.display())]
    WriteTimeout {
        /// The file.
        path: PathBuf,
        /// How long the call has waited.
        waited_ms: u64,
        /// What holds it: thread, since when, and from where.
        holder: String,
    },
    /// The call was made in a process that was forked from the one that opened the store. Nothing was read or written, and
    /// nothing of the store is released: a store belongs to the process that opened it.
    ///
    /// Open stores after forking, or let the child run another program (`exec`).
    #[error("the store {path} belongs to process {owner}; process {process} was forked from it and cannot use it", path = path.display())]
    Forked {
        /// The file.
        path: PathBuf,
        /// The id of the process that opened it.
        owner: u32,
        /// The id of this process.
        process: u32,
    },
    /// The store is closed.
    #[error("the store {path} is closed", path = path.display())]
    Closed {
        /// The file.
        path: PathBuf,
    },
    /// A setting has a value that cannot work.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// No relay of this name is known to the store.
    #[error("the store has no relay named `{name}`")]
    NoSuchRelay {
        /// The name asked for.
        name: String,
    },
    /// The relay runs already in this process.
    #[error("relay `{name}` is running already")]
    RelayRunning {
        /// Its name.
        name: String,
    },
    /// The projection runs already in this process.
    #[error("projection `{name}` is running already")]
    ProjectionRunning {
        /// Its name.
        name: String,
    },
    /// No projection of this name is known to the store.
    #[error("the store has no projection named `{name}`")]
    NoSuchProjection {
        /// The name asked for.
        name: String,
    },
    /// The projection writes only tables that it has declared.
    #[error("table `{name}` is not declared by the projection: name it with `table` or `multimap_table`")]
    UndeclaredTable {
        /// The table asked for.
        name: String,
    },
    /// Another running projection writes this table: a rebuild of one would delete what the other has written.
    #[error("table `{name}` is projection `{projection}`'s")]
    ProjectionTable {
        /// The table.
        name: String,
        /// Whose it is.
        projection: String,
    },
    /// The event is not among those that the projection has given up.
    #[error("event {seq} is not among the failures of projection `{name}`")]
    NoSuchFailure {
        /// The projection.
        name: String,
        /// The event.
        seq: u64,
    },
    /// The projection has not come as far in time.
    #[error("projection `{name}` has come to {position} only")]
    ProjectionBehind {
        /// The projection.
        name: String,
        /// It has done with all events below.
        position: u64,
    },
    /// The projection stands still before it has come as far.
    #[error("projection `{name}` stands still at {position}: {reason}")]
    ProjectionStopped {
        /// The projection.
        name: String,
        /// It has done with all events below.
        position: u64,
        /// Why.
        reason: String,
    },
    /// The event is not in quarantine.
    #[error("event {seq} is not in the quarantine of relay `{relay}`")]
    NotQuarantined {
        /// The relay.
        relay: String,
        /// The event.
        seq: u64,
    },
    /// The table belongs to the library.
    #[error("table `{name}` is reserved; names that begin with `onewrite.` belong to the library")]
    ReservedTable {
        /// The table asked for.
        name: String,
    },
    /// The table is captured: written any other way, its change would be in no event.
    #[error(
        "table `{name}` is captured; it is written through `captured_table` alone, and `end_capture` ends it where it is not registered"
    )]
    CapturedTable {
        /// The table.
        name: String,
    },
    /// The table is not captured.
    #[error("table `{name}` is not captured; `StoreBuilder::capture` registers it")]
    NotCaptured {
        /// The table.
        name: String,
    },
    /// The table is registered as captured with other types.
    #[error("table `{name}` is captured as {registered}, and was asked for as {asked}")]
    CaptureTypes {
        /// The table.
        name: String,
        /// The types that it is registered with.
        registered: String,
        /// The types that it was asked for with.
        asked: String,
    },
    /// A row of a captured table holds bytes that its type cannot read, where its value is wanted: the file holds what an
    /// older release has written, or the type is wrong.
    #[error(
        "the row with key `{}` of captured table `{table}` cannot be read as {value_type}",
        key_text(key)
    )]
    UnreadableRow {
        /// The table.
        table: String,
        /// The row's key as redb stores it; empty if the key cannot be read either.
        key: Vec<u8>,
        /// The type of the table's values.
        value_type: &'static str,
    },
    /// An id of a request, a delivery or a scope cannot be kept.
    #[error("{what} is {len} bytes long; 1 to {max} are allowed")]
    BadId {
        /// Which id.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The longest allowed, in bytes.
        max: usize,
    },
    /// The same id was seen before with other content: two different things claim one name.
    #[error("`{}` in scope `{}` was seen before with other content", printable(id), printable(scope))]
    IdConflict {
        /// The scope.
        scope: String,
        /// The id.
        id: String,
    },
    /// A message carries some of the headers that number its lane, but not all of them as this library writes them.
    #[error("header `{header}` {problem}")]
    LaneHeader {
        /// The header.
        header: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// What came from the broker is not the whole message, or not as it was sent. The delivery came with the header
    /// [`wire::UNREADABLE`](crate::wire::UNREADABLE), which says what is wrong.
    #[error("the message cannot be taken for what it is: {reason}")]
    Unreadable {
        /// What is wrong with it.
        reason: String,
    },
    /// A message names a store as its producer from which the consumer takes nothing.
    #[error("the message says that store {producer} produced it, which is none of this consumer's producers")]
    UnknownProducer {
        /// The store's id, as its header says.
        producer: String,
    },
    /// Nothing proves that the store which a message names has produced it:
    /// [`ConsumerBuilder::authenticate`](crate::ConsumerBuilder::authenticate).
    #[error("nothing proves {} the message: {problem}", sender(producer.as_deref()))]
    NotAuthentic {
        /// The store's id, as the message's header says, if it names one.
        producer: Option<String>,
        /// What is missing.
        problem: &'static str,
    },
    /// As many ids of foreign messages are remembered as may be, and none is forgotten for another:
    /// [`StoreBuilder::inbox_ids_policy`](crate::StoreBuilder::inbox_ids_policy).
    #[error(
        "scope `{scope}` remembers {ids_max} ids, as many as it may: a new one is refused until some are old enough"
    )]
    InboxFull {
        /// The scope.
        scope: String,
        /// How many it may remember.
        ids_max: u64,
    },
    /// As many lanes of producers are remembered as may be, and none is idle for so long that it is forgotten for a new one:
    /// [`StoreBuilder::lanes_max`](crate::StoreBuilder::lanes_max).
    #[error(
        "scope `{scope}` remembers {lanes_max} lanes, as many as it may: a new one is refused until some are idle for long enough"
    )]
    LanesFull {
        /// The scope.
        scope: String,
        /// How many it may remember.
        lanes_max: u64,
    },
    /// A number of a lane was seen before with another message, or may have been. The first is so where the producer gave it twice, as one
    /// does that was restored from a backup, or where somebody else speaks in its name. The second is so where its
    /// [lane](crate::StoreBuilder::lanes_max) or its [gap](crate::StoreBuilder::gaps_max) was forgotten, or the number is very old.
    #[error(
        "number {number} of lane {lane} of store {producer} (epoch {epoch}) is not taken as new in scope `{scope}`: {how}"
    )]
    LaneConflict {
        /// The scope.
        scope: String,
        /// The store's id.
        producer: String,
        /// Its epoch.
        epoch: u64,
        /// The lane.
        lane: u64,
        /// The number.
        number: u64,
        /// How it is known.
        how: &'static str,
    },
    /// No rejected delivery of this number is in the consumer's quarantine.
    #[error("the quarantine of scope `{scope}` has no delivery {number}")]
    NotRejected {
        /// The scope.
        scope: String,
        /// The number asked for.
        number: u64,
    },
    /// The row of a rejected delivery failed its check. It is never handed to a handler; it can only be discarded.
    #[error("delivery {number} in the quarantine of scope `{scope}` is damaged: {what}")]
    DamagedDelivery {
        /// The scope.
        scope: String,
        /// Its number.
        number: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The stream is not as the append expected; nothing was appended.
    #[error("stream `{stream}` was expected at {expected}, and {}", actual_text(*actual))]
    WrongRevision {
        /// The stream.
        stream: String,
        /// What was expected.
        expected: ExpectedRevision,
        /// The revision of its newest event; `None` if it has never had one.
        actual: Option<u64>,
    },
    /// A stream's snapshot is larger than a snapshot may be; it was not saved.
    #[error("the snapshot of stream `{}` is {len} bytes long; at most {max} are allowed", printable(stream))]
    SnapshotTooLarge {
        /// The stream.
        stream: String,
        /// Its length in bytes.
        len: usize,
        /// The largest allowed, in bytes.
        max: usize,
    },
    /// The stream is deleted for good.
    #[error("stream `{stream}` is deleted")]
    StreamDeleted {
        /// The stream.
        stream: String,
    },
    /// The log has no readable event of this revision any more, though the stream should have one.
    #[error("revision {revision} of stream `{stream}` is missing or damaged")]
    MissingRevision {
        /// The stream.
        stream: String,
        /// The revision.
        revision: u64,
    },
    /// An event of an older form could not be brought up to the newest, or is of a version that is unknown here.
    #[error("event {seq} (`{}`, version {version}) cannot be upcast: {reason}", printable(event_type))]
    Upcast {
        /// The event.
        seq: u64,
        /// Its type, as recorded.
        event_type: String,
        /// Its version, as recorded.
        version: u32,
        /// Why.
        reason: BoxError,
    },
    /// A [subscription](crate::Store::subscribe) asked for events that the log has let go. It goes on behind them, with what
    /// streams keep of them.
    #[error("events from {from} on were asked for; below {trimmed_to} the log holds only what streams keep")]
    Trimmed {
        /// The first sequence number that was asked for and may be gone.
        from: u64,
        /// From here on the log is whole.
        trimmed_to: u64,
    },
    /// A thread could not be started.
    #[error("cannot start the {what} thread: {cause}")]
    Thread {
        /// Which thread.
        what: &'static str,
        /// Why.
        cause: std::io::Error,
    },
}

/// The beginning of a key, printable.
fn key_text(key: &[u8]) -> String {
    let shown = key.get(..KEY_SHOWN_BYTES).unwrap_or(key);
    format!("{}{}", shown.escape_ascii(), if shown.len() < key.len() { "…" } else { "" })
}

/// Of a key, an error's text shows so many bytes.
const KEY_SHOWN_BYTES: usize = 64;

fn sender(producer: Option<&str>) -> String {
    producer.map_or_else(|| "who has sent".to_owned(), |store| format!("that store {store} has sent"))
}

fn actual_text(actual: Option<u64>) -> String {
    actual.map_or_else(|| "it has never had an event".into(), |revision| format!("is at revision {revision}"))
}

impl Error {
    /// The event that cannot be read, if that is what this is: the next one may be.
    pub(crate) fn unreadable(&self) -> Option<u64> {
        match self {
            Self::Corrupt(CorruptError { seq, .. }) | Self::Upcast { seq, .. } => Some(*seq),
            _ => None,
        }
    }

    /// Wraps the application's own error, so that a write closure can return it with `?`.
    ///
    /// ```
    /// # use onewrite::Error;
    /// let error = Error::app("insufficient funds");
    /// assert_eq!(error.to_string(), "insufficient funds");
    /// ```
    pub fn app(error: impl Into<BoxError>) -> Self {
        Self::App(error.into())
    }

    /// Says, from a consumer's handler, that this delivery can never be handled.
    ///
    /// ```
    /// # use onewrite::Error;
    /// assert_eq!(Error::reject("no such account").to_string(), "rejected: no such account");
    /// ```
    pub fn reject(error: impl Into<BoxError>) -> Self {
        Self::Rejected(error.into())
    }

    /// The application's own error of type `E`, if that is what this is.
    ///
    /// ```
    /// # use onewrite::Error;
    /// #[derive(Debug, thiserror::Error)]
    /// #[error("insufficient funds: {0} are missing")]
    /// struct Insufficient(u64);
    ///
    /// let error = Error::app(Insufficient(40));
    /// assert_eq!(error.downcast_app::<Insufficient>().map(|error| error.0), Some(40));
    /// assert!(error.downcast_app::<std::fmt::Error>().is_none());
    /// ```
    #[must_use]
    pub fn downcast_app<E: std::error::Error + 'static>(&self) -> Option<&E> {
        match self {
            Self::App(error) => error.downcast_ref(),
            _ => None,
        }
    }
}
