//! Never trust two separate writes. Make one.
//!
//! A service that writes its database and then publishes an event will one day do the first and not
//! the second. With `onewrite`, one [redb](https://docs.rs/redb) file holds the service's state
//! **and** its event log, and one transaction writes both. A background relay publishes the log to
//! RabbitMQ: at least once, in order per key, each message with a stable id. A consumer at the
//! other end applies each delivery exactly once in effect.
//!
//! ```
//! use std::time::Duration;
//! use onewrite::{Event, Store, broker::MemoryBroker, redb::{ReadableTable, TableDefinition}};
//!
//! const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("payments.redb");
//! let store = Store::open(path)?;
//! let broker = MemoryBroker::new(); // in production: onewrite::broker::RabbitMq::new("amqp://localhost")?
//! broker.declare_queue("payments", Default::default());
//! let relay = store.relay("rabbit").spawn(broker.publisher())?;
//!
//! let receipt = store.write(|tx| {
//!     let mut accounts = tx.open_table(ACCOUNTS)?; // the application's own redb table
//!     let balance = accounts.get("alice")?.map_or(500, |row| row.value());
//!     accounts.insert("alice", balance - 100)?;
//!     tx.append(Event::json("payment.completed", &100)?.key("alice").to_queue("payments"))?; // same transaction
//!     Ok(())
//! })?; // durable here: both, or on an error neither
//! receipt.wait_confirmed(Duration::from_secs(5))?; // optional: the broker has it
//! relay.stop(Duration::from_secs(5));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is promised
//!
//! 1. **One write.** When [`Store::write`] returns `Ok`, state and events are on disk together. On
//!    `Err`, or after a crash before that, neither is. Only [`Error::CommitUnknown`] leaves it open
//!    until the store is opened again.
//! 2. **No phantom.** An event is durable before it is published, projected or shown to a
//!    subscriber.
//! 3. **No loss.** Every committed event is either confirmed by the broker in the end, or placed in
//!    [quarantine](Quarantine) with a reason.
//! 4. **At least once, same name.** A resend carries the same id, lane number and payload bytes.
//! 5. **Order per key**, through retries, reconnects, restarts and quarantine.
//! 6. **Once in effect** at a [consumer](Store::consumer). For messages of a store of this library,
//!    this holds for ever. For messages that another producer has given an id, it holds within the
//!    inbox age.
//! 7. **A broken broker never breaks the application.** Writes go on, and an outage consumes no
//!    event's attempts.
//! 8. **Bounded.** Every limit has a [name](limits), and memory does not grow with the backlog.
//! 9. **Detected, not passed on.** A record whose checksum fails is never published. A failed
//!    durable write poisons the store.
//! 10. **Single owner.** A second open fails at once, and its error names the file.
//! 11. **Stop is prompt**, also when the broker hangs.
//!
//! The page on [security] says against which attackers these promises hold, and how to configure
//! the store for that.
//!
//! # Crate features
//!
//! | feature | by default | brings |
//! |---|---|---|
//! | `rabbitmq` | yes | `broker::RabbitMq` and `broker::RabbitMqSource`, over lapin and a tokio runtime of their own |
//! | `json` | yes | `Event::json`, `Capture::json`: payloads by serde_json |
//! | `tls` | no | `amqps://`, over rustls with the ring provider; brings `rabbitmq` |
//! | `bincode` | no | `Event::bincode`: payloads by bincode 2, which is no longer maintained |
//!
//! The library also compiles without any feature: with events of bytes, and a broker of your own
//! behind [`broker::Publisher`].
//!
//! # It is not
//!
//! - a broker, or a replicated database: one process owns one file on one disk;
//! - exactly-once delivery: the broker may see an event twice, but its effect at a consumer happens
//!   once;
//! - a guarantee beyond the broker's word: RabbitMQ may confirm a message and drop it later, in a
//!   queue with `drop-head` or in a classic queue on a lost disk. The message is lost there.

#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod aggregate;
pub mod broker;
pub mod codec;
mod consumer;
#[cfg(test)]
mod crash_tests;
mod delivery;
mod error;
mod event;
mod filter;
#[cfg(any(doc, doctest))]
pub mod guide;
mod inspect;
pub mod limits;
mod log;
mod message;
#[cfg(onewrite_mutations)]
mod mutations;
mod oneshot;
mod printable;
mod process;
mod projection;
mod quarantine_filter;
mod relay;
mod say;
pub mod security;
mod storage;
mod store;
mod subscription;
mod text;
pub mod time;
mod tuning;
mod upcast;
pub mod wire;

/// The storage engine, whose table types an application uses, in the version that this library is
/// built with.
pub use redb;

pub use aggregate::{Aggregate, AggregateStream, Loaded};
pub use consumer::{
    Consumer, ConsumerBuilder, ConsumerStatus, ConsumerWait, GapPolicy, RejectTo, Rejected, RejectedDelivery,
    RejectedFull,
};
pub use error::{
    BoxError, CorruptError, Error, ErrorKind, EventError, ExpectedRevision, OpenError, Result, SettingError,
    Stands, StorageFailure,
};
pub use event::{Destination, Event, Lane, Properties, RecordedEvent};
pub use filter::EventFilter;
pub use inspect::{
    CaptureStats, Finding, PageProgress, PageVerification, ProjectionStats, RelayStats, ScopeStats, Stats,
    Verification,
};
pub use message::{Fault, FaultClass, HeaderValue, Message, Outcome, Outgoing, Ticket};
pub use projection::{
    FailurePolicy, Projection, ProjectionBuilder, ProjectionFailure, ProjectionFailures,
    ProjectionTransaction,
};
pub use quarantine_filter::QuarantineFilter;
pub use relay::{
    PublishOrder, Quarantine, QuarantinePolicy, Quarantined, Relay, RelayBuilder, StopReport, SuspendCause,
};
pub use store::{
    Appended, BacklogQuota, Capture, CaptureMode, CaptureWait, CapturedTable, Change, ConfirmError,
    EventStream, Events, Holder, HolderKind, IdsPolicy, IoStats, LanesPolicy, Operation, PageBytes,
    ProjectionState, ProjectionStatus, QuotaPolicy, Receipt, RelayState, RelayStatus, Replay, ReplayedEvent,
    Retention, Snapshot, StartAt, Store, StoreBuilder, StreamAppended, StreamEvents, StreamReader,
    SuspendedDestination, Transaction, WriteFuture, WriteOnce, WriteOnceFuture,
};
pub use subscription::{Subscription, SubscriptionStream};
pub use text::Text;
#[cfg(feature = "json")]
pub use wire::CloudEvent;
pub use wire::{HeaderSpelling, ProducerKeys, SigningKey};

/// The entry points of the fuzz targets.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    use crate::log::record::fuzzing;

    /// Decodes bytes as the table of records might hold them.
    pub fn decode_record(seq: u64, bytes: &[u8]) {
        fuzzing::record(seq, bytes);
    }

    /// Decodes bytes as a body, behind a frame that is right.
    pub fn decode_body(body: &[u8]) {
        fuzzing::body(body);
    }

    /// Decodes a key and a row as any table might hold them, also behind a right checksum.
    pub fn decode_row(key: &[u8], row: &[u8]) {
        crate::log::fuzzing::row(key, row);
    }

    /// Replays two halves of a journal. Frames that have heads get right checksums.
    pub fn replay_journal(salt: [u8; 8], halves: [&mut [u8]; 2]) {
        crate::store::fuzzing_journal(salt, halves);
    }

    /// Reads a message as it might come, and as this library would have signed it. From the signed
    /// message, the header with this number is left out.
    pub fn message(
        message: &crate::Message,
        key: &crate::SigningKey,
        keys: &crate::ProducerKeys,
        left_out: usize,
    ) {
        crate::wire::fuzzing(message, key, keys, left_out);
    }

    /// Passes bytes, as a broker might send them, on in pieces. Returns what the AMQP client may
    /// see.
    #[cfg(feature = "rabbitmq")]
    #[must_use]
    pub fn frames_of_a_broker(bytes: &[u8], piece: usize) -> Vec<u8> {
        crate::broker::frames_of_a_broker(bytes, piece)
    }
}

/// The README's code blocks are tests.
#[cfg(all(doctest, feature = "json", feature = "tls"))]
#[doc = include_str!("../README.md")]
struct Readme;
