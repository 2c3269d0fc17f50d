//! The error families.
//!
//! There is one enum per kind of operation, and [`Error`] over them. A failure that can happen in
//! operation is a value here. It names its subject: the file, the sequence number, the setting or
//! the field. No error text ever holds a payload, a header value or a password.

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

/// A boxed error of the application or of another library.
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

/// Each error that a store, a transaction or a relay can return.
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
    /// The append refused the event and wrote nothing of it.
    #[error(transparent)]
    Event(#[from] EventError),
    /// An event with this id was appended before, and its content differs. Stream and destination
    /// count as content if the earlier record is gone, because the kept checksum covers them too.
    #[error("event id `{}` was appended before, as sequence number {seq}, with other content", printable(id))]
    Conflict {
        /// The id that both events carry.
        id: String,
        /// The sequence number of the earlier event.
        seq: u64,
    },
    /// An event with this id and this content was appended before, but in another place.
    #[error(
        "event id `{}` was appended before with the same content, as sequence number {seq}, but elsewhere: {stands}",
        printable(id)
    )]
    IdElsewhere {
        /// The id that both events carry.
        id: String,
        /// The sequence number of the earlier event.
        seq: u64,
        /// The place of the earlier event.
        stands: Stands,
    },
    /// A record failed its check. The library never publishes or applies the record.
    #[error(transparent)]
    Corrupt(#[from] CorruptError),
    /// The storage engine failed.
    #[error(transparent)]
    Storage(#[from] StorageFailure),
    /// An earlier durable write failed, or the store's file is no longer at its path. The store
    /// accepts nothing more until it is opened again.
    #[error("the store {path} is poisoned ({cause}); close it and open it again", path = path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
        /// The first failure, or what was found at the path.
        cause: Arc<str>,
    },
    /// The commit failed, and whether the change is on disk is unknown. The store is poisoned. Open
    /// the store again, then retry with the same request or event id.
    #[error("commit failed and its outcome is unknown ({cause}); the store must be opened again")]
    CommitUnknown {
        /// The message of the storage engine.
        cause: Arc<str>,
    },
    /// The closure panicked, or the store's clock panicked at the commit. Nothing was written.
    #[error("the write closure panicked: {message}")]
    Panicked {
        /// The panic's message, if it was text.
        message: String,
    },
    /// The application's own error, returned from its closure. Nothing of the closure was written.
    #[error(transparent)]
    App(BoxError),
    /// A consumer's handler refuses this delivery for good. The delivery goes to quarantine or to
    /// the dead-letter exchange.
    #[error("rejected: {0}")]
    Rejected(BoxError),
    /// The backlog has reached the application's quota.
    #[error(
        "backlog quota reached: {events} events and {bytes} bytes wait for the broker; the quota is {events_max} events and {bytes_max} bytes"
    )]
    BacklogFull {
        /// Events that wait.
        events: u64,
        /// Bytes that wait.
        bytes: u64,
        /// The quota in events.
        events_max: u64,
        /// The quota in bytes.
        bytes_max: u64,
    },
    /// The transaction would hold more in memory than its limit allows. Nothing of it is written,
    /// even if the closure ignores this error. Write in several transactions, or raise the limit.
    #[error(
        "the transaction is too large: {events} events, {entries} entries and {bytes} bytes; the setting `transaction_events_max` allows {events_max} of each, `transaction_bytes_max` allows {bytes_max} bytes"
    )]
    TransactionTooLarge {
        /// Events that the transaction would append.
        events: u64,
        /// Entries that the transaction would make. Entries are ids in the inbox, dirty keys of
        /// captured tables, states of streams, and events that were there already.
        entries: u64,
        /// Bytes of the transaction's records, and of the keys of its entries.
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
    /// The write transaction did not become free within
    /// [`StoreBuilder::write_wait_max`](crate::StoreBuilder::write_wait_max). Nothing was written,
    /// and the closure will not run.
    #[error("waited {waited_ms} ms for the write transaction of {path}, held by {holder}; nothing was written", path = path.display())]
    WriteTimeout {
        /// The file.
        path: PathBuf,
        /// How long the call has waited, in milliseconds.
        waited_ms: u64,
        /// The holder of the write transaction: its thread, since when, and from where.
        holder: String,
    },
    /// The calling process was forked from the process that opened the store. Nothing was read,
    /// written or released, because a store belongs to the process that opened it.
    ///
    /// Open stores after forking, or let the child process run another program (`exec`).
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
    /// The store knows no relay of this name.
    #[error("the store has no relay named `{name}`")]
    NoSuchRelay {
        /// The name asked for.
        name: String,
    },
    /// The relay already runs in this process.
    #[error("relay `{name}` is running already")]
    RelayRunning {
        /// Its name.
        name: String,
    },
    /// The projection already runs in this process.
    #[error("projection `{name}` is running already")]
    ProjectionRunning {
        /// Its name.
        name: String,
    },
    /// The store knows no projection of this name.
    #[error("the store has no projection named `{name}`")]
    NoSuchProjection {
        /// The name asked for.
        name: String,
    },
    /// The projection has not declared this table. A projection writes declared tables only.
    #[error("table `{name}` is not declared by the projection: name it with `table` or `multimap_table`")]
    UndeclaredTable {
        /// The table asked for.
        name: String,
    },
    /// Another running projection writes this table. A rebuild of one projection would delete the
    /// rows of the second.
    #[error("table `{name}` is projection `{projection}`'s")]
    ProjectionTable {
        /// The table.
        name: String,
        /// The projection that writes the table.
        projection: String,
    },
    /// The projection has not given up this event.
    #[error("event {seq} is not among the failures of projection `{name}`")]
    NoSuchFailure {
        /// The projection.
        name: String,
        /// The event.
        seq: u64,
    },
    /// The projection did not reach the position in time.
    #[error("projection `{name}` has come to {position} only")]
    ProjectionBehind {
        /// The projection.
        name: String,
        /// The projection has dealt with all events below this number.
        position: u64,
    },
    /// The projection stopped before it reached the position.
    #[error("projection `{name}` stands still at {position}: {reason}")]
    ProjectionStopped {
        /// The projection.
        name: String,
        /// The projection has dealt with all events below this number.
        position: u64,
        /// Why the projection stopped.
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
    /// The table is captured. A write that bypasses the capture would put its change into no event.
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
        /// The registered types.
        registered: String,
        /// The requested types.
        asked: String,
    },
    /// A row of a captured table holds bytes that its type cannot read, and the row's value is
    /// needed. Either an older release wrote the row, or the type is wrong.
    #[error(
        "the row with key `{}` of captured table `{table}` cannot be read as {value_type}",
        key_text(key)
    )]
    UnreadableRow {
        /// The table.
        table: String,
        /// The row's key as redb stores it; empty if the key is unreadable too.
        key: Vec<u8>,
        /// The type of the table's values.
        value_type: &'static str,
    },
    /// The id of a request, a delivery or a scope is not acceptable.
    #[error("{what} is {len} bytes long; 1 to {max} are allowed")]
    BadId {
        /// Which id it is.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The longest allowed, in bytes.
        max: usize,
    },
    /// The same id was seen before with other content.
    #[error("`{}` in scope `{}` was seen before with other content", printable(id), printable(scope))]
    IdConflict {
        /// The scope.
        scope: String,
        /// The id.
        id: String,
    },
    /// A message carries some of the headers that number its lane, but not all of them in this
    /// library's form.
    #[error("header `{header}` {problem}")]
    LaneHeader {
        /// The header.
        header: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The delivery is incomplete, or differs from what was sent. Its header
    /// [`wire::UNREADABLE`](crate::wire::UNREADABLE) says what is wrong.
    #[error("the message cannot be taken for what it is: {reason}")]
    Unreadable {
        /// What is wrong with it.
        reason: String,
    },
    /// The message names a producer from which the consumer takes nothing.
    #[error("the message says that store {producer} produced it, which is none of this consumer's producers")]
    UnknownProducer {
        /// The store's id from the message's header.
        producer: String,
    },
    /// Nothing proves that the named store produced the message. See
    /// [`ConsumerBuilder::authenticate`](crate::ConsumerBuilder::authenticate).
    #[error("nothing proves {} the message: {problem}", sender(producer.as_deref()))]
    NotAuthentic {
        /// The store's id from the message's header, if the header names one.
        producer: Option<String>,
        /// What the proof lacks.
        problem: &'static str,
    },
    /// The scope remembers its maximum of foreign ids, and forgets none for a new id. See
    /// [`StoreBuilder::inbox_ids_policy`](crate::StoreBuilder::inbox_ids_policy).
    #[error(
        "scope `{scope}` remembers {ids_max} ids, as many as it may: a new one is refused until some are old enough"
    )]
    InboxFull {
        /// The scope.
        scope: String,
        /// The most ids that the scope may remember.
        ids_max: u64,
    },
    /// The scope remembers its maximum of lanes, and no lane is idle for long enough to be
    /// forgotten. See [`StoreBuilder::lanes_max`](crate::StoreBuilder::lanes_max).
    #[error(
        "scope `{scope}` remembers {lanes_max} lanes, as many as it may: a new one is refused until some are idle for long enough"
    )]
    LanesFull {
        /// The scope.
        scope: String,
        /// The most lanes that the scope may remember.
        lanes_max: u64,
    },
    /// A lane number was seen before with another message, or may have been.
    ///
    /// The number *was* seen before if the producer gave it twice, as a store restored from a
    /// backup does, or if an impostor used the producer's name. The number *may* have been seen
    /// before if the consumer forgot its [lane](crate::StoreBuilder::lanes_max) or its
    /// [gap](crate::StoreBuilder::gaps_max), or if the number is very old.
    #[error(
        "number {number} of lane {lane} of store {producer} (epoch {epoch}) is not taken as new in scope `{scope}`: {how}"
    )]
    LaneConflict {
        /// The scope.
        scope: String,
        /// The store's id.
        producer: String,
        /// The store's epoch.
        epoch: u64,
        /// The lane.
        lane: u64,
        /// The number.
        number: u64,
        /// How the conflict is known.
        how: &'static str,
    },
    /// The consumer's quarantine holds no rejected delivery of this number.
    #[error("the quarantine of scope `{scope}` has no delivery {number}")]
    NotRejected {
        /// The scope.
        scope: String,
        /// The requested number.
        number: u64,
    },
    /// The row of a rejected delivery failed its check. No handler ever gets the delivery; the
    /// operator can only discard it.
    #[error("delivery {number} in the quarantine of scope `{scope}` is damaged: {what}")]
    DamagedDelivery {
        /// The scope.
        scope: String,
        /// The delivery's number.
        number: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The stream is not at the expected revision. Nothing was appended.
    #[error("stream `{stream}` was expected at {expected}, and {}", actual_text(*actual))]
    WrongRevision {
        /// The stream.
        stream: String,
        /// The expected revision.
        expected: ExpectedRevision,
        /// The revision of the stream's newest event; `None` if the stream has never had an event.
        actual: Option<u64>,
    },
    /// The stream's snapshot exceeds the limit and was not saved.
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
    /// The stream should have this revision, but the log has no readable event of it.
    #[error("revision {revision} of stream `{stream}` is missing or damaged")]
    MissingRevision {
        /// The stream.
        stream: String,
        /// The revision.
        revision: u64,
    },
    /// An event of an older version could not be upcast to the newest, or its version is unknown
    /// here.
    #[error("event {seq} (`{}`, version {version}) cannot be upcast: {reason}", printable(event_type))]
    Upcast {
        /// The event.
        seq: u64,
        /// Its type, as recorded.
        event_type: String,
        /// Its version, as recorded.
        version: u32,
        /// Why the event cannot be upcast.
        reason: BoxError,
    },
    /// A [subscription](crate::Store::subscribe) asked for events that the log no longer holds. The
    /// subscription continues with the later events, and with the events that streams keep.
    #[error("events from {from} on were asked for; below {trimmed_to} the log holds only what streams keep")]
    Trimmed {
        /// The first requested sequence number that may be gone.
        from: u64,
        /// The log is complete from this number on.
        trimmed_to: u64,
    },
    /// A thread could not be started.
    #[error("cannot start the {what} thread: {cause}")]
    Thread {
        /// Which thread.
        what: &'static str,
        /// Why the thread could not be started.
        cause: std::io::Error,
    },
}

/// Returns the beginning of a key in printable form.
fn key_text(key: &[u8]) -> String {
    let shown = key.get(..KEY_SHOWN_BYTES).unwrap_or(key);
    format!("{}{}", shown.escape_ascii(), if shown.len() < key.len() { "…" } else { "" })
}

/// The most bytes of a key that an error's text shows.
const KEY_SHOWN_BYTES: usize = 64;

fn sender(producer: Option<&str>) -> String {
    producer.map_or_else(|| "who has sent".to_owned(), |store| format!("that store {store} has sent"))
}

fn actual_text(actual: Option<u64>) -> String {
    actual.map_or_else(|| "it has never had an event".into(), |revision| format!("is at revision {revision}"))
}

impl Error {
    /// Returns the number of an unreadable event if this error reports one. Later events may be
    /// readable.
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

    /// Makes a consumer's refusal of a delivery that its handler can never handle.
    ///
    /// ```
    /// # use onewrite::Error;
    /// assert_eq!(Error::reject("no such account").to_string(), "rejected: no such account");
    /// ```
    pub fn reject(error: impl Into<BoxError>) -> Self {
        Self::Rejected(error.into())
    }

    /// Returns the application's own error if this error holds one of type `E`.
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
