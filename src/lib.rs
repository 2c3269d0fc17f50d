//! Never trust two separate writes. Make one.
//!
//! A service that writes its database and then publishes an event will one day do the first and not the second. With
//! `onewrite` one [redb](https://docs.rs/redb) file holds the service's state **and** its event log; one transaction
//! writes both; a background relay drains the log to RabbitMQ, at least once, in order per key, each message with a
//! stable id; and a consumer at the other end applies each delivery exactly once in effect.
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
//! 1. **One write.** When [`Store::write`] returns `Ok`, state and events are on disk together; on `Err` or a crash before
//!    that, neither is. Only [`Error::CommitUnknown`] leaves it open until the store is opened again.
//! 2. **No phantom.** Nothing is published, projected or shown to a subscriber before it is durable.
//! 3. **No loss.** Every committed event ends as confirmed by the broker, or in [quarantine](Quarantine) with a reason.
//! 4. **At least once, same name.** A resend carries the same id, lane number and bytes.
//! 5. **Order per key**, through retries, reconnects, restarts and quarantine.
//! 6. **Once in effect** at a [consumer](Store::consumer): for ever for what a store of this library has produced, within the
//!    inbox age for what another producer has named.
//! 7. **A broken broker never breaks the application.** Writes go on; an outage spends no event's attempts.
//! 8. **Bounded.** Every limit has a [name](limits); memory does not grow with the backlog.
//! 9. **Detected, not passed on.** A record whose checksum fails is never published; a failed durable write poisons the store.
//! 10. **Single owner.** A second open fails at once, naming the file.
//! 11. **Stop is prompt**, also when the broker hangs.
//!
//! Against whom these hold, and how to configure it, stands on the page on [security].
//!
//! # Crate features
//!
//! | feature | by default | brings |
//! |---|---|---|
//! | `rabbitmq` | yes | `broker::RabbitMq` and `broker::RabbitMqSource`, over lapin and a tokio runtime of their own |
//! | `json` | yes | `Event::json`, `Capture::json`: payloads by serde_json |
//! | `tls` | no | `amqps://`, over rustls with the ring provider; brings `rabbitmq` |
//! | `bincode` | no | `Event::bincode`: payloads by bincode 2, which nobody maintains any more |
//!
//! Without any of them the library compiles too: events of bytes, and a broker of your own behind [`broker::Publisher`].
//!
//! # It is not
//!
//! - a broker, or a replicated database: one process owns one file on one disk;
//! - exactly-once delivery: the broker may see an event twice, its effect at a consumer happens once;
//! - a guarantee beyond the broker's word: what RabbitMQ confirms and then drops (a queue with `drop-head`, a classic
//!   queue on a lost disk) is lost there.

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

/// The storage engine, whose table types an application uses: the version that this library is built with.
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

/// What the fuzz targets reach inside.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    use crate::log::record::fuzzing;

    /// Bytes as they might stand in the table.
    pub fn decode_record(seq: u64, bytes: &[u8]) {
        fuzzing::record(seq, bytes);
    }

    /// The same as a body, behind a frame that is right.
    pub fn decode_body(body: &[u8]) {
        fuzzing::body(body);
    }

    /// A key and a row as they might stand in any table, also behind a right checksum.
    pub fn decode_row(key: &[u8], row: &[u8]) {
        crate::log::fuzzing::row(key, row);
    }

    /// Two halves of a journal, in which frames have right checksums where they have heads.
    pub fn replay_journal(salt: [u8; 8], halves: [&mut [u8]; 2]) {
        crate::store::fuzzing_journal(salt, halves);
    }

    /// A message as it might come, and as this library would have signed it; of the signed one, the header of this number is left out.
    pub fn message(
        message: &crate::Message,
        key: &crate::SigningKey,
        keys: &crate::ProducerKeys,
        left_out: usize,
    ) {
        crate::wire::fuzzing(message, key, keys, left_out);
    }

    /// Bytes as a broker might send them, in pieces; what the AMQP client may see of them.
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
