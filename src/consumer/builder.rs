//! The settings of a consumer.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::unbounded;

use super::handle::Consumer;
use super::handle::Shared;
use super::rejected_room::RejectedFull;
use super::worker::Worker;
use super::{GapPolicy, RejectTo};
use crate::broker::{Delivery, Source, SourceEvents};
use crate::error::{Error, Result, SettingError, caught};
use crate::event::uuid_from_text;
use crate::limits::{
    BACKOFF_MS_DEFAULT, HANDLER_ATTEMPTS_DEFAULT, HOLD_MS_MAX, PARKED_BYTES_DEFAULT, PARKED_ROWS_DEFAULT,
    PREFETCH_DEFAULT, REJECTED_BYTES_DEFAULT, REJECTED_ROWS_DEFAULT, RETURNS_DEFAULT, SHORT_STRING_BYTES_MAX,
};
use crate::oneshot;
use crate::store::{Store, Transaction};
use crate::wire::ProducerKeys;

/// Settings of a consumer, before it runs. See [`Store::consumer`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// let consumer = store.consumer("credit-service").prefetch(32).attempts(3).spawn(broker.source("credit"), |_, _| Ok(()))?;
/// # let _ = consumer.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `spawn` is called"]
pub struct ConsumerBuilder {
    pub(super) store: Store,
    pub(super) scope: String,
    pub(super) prefetch: u16,
    pub(super) attempts: u32,
    pub(super) backoff: (Duration, Duration),
    pub(super) gap: GapPolicy,
    pub(super) reject_to: RejectTo,
    pub(super) unknown_to: Option<RejectTo>,
    pub(super) producers: Option<BTreeSet<String>>,
    pub(super) keys: Option<ProducerKeys>,
    pub(super) parked_max: (u64, u64),
    pub(super) rejected_max: (u64, u64),
    pub(super) rejected_full: RejectedFull,
    pub(super) free_space_min: Option<u64>,
    pub(super) take_in_after: u32,
}

impl Store {
    /// Creates a consumer that applies a queue's deliveries to this store, each once in effect.
    ///
    /// The consumer recognises repeats from another `onewrite` store without expiry, and repeats
    /// from other producers within the [inbox age](crate::StoreBuilder::inbox_age). The `scope`
    /// names what the consumer keeps for deduplication, and what the consumer has rejected. Choose
    /// a scope that stays the same.
    ///
    /// The consumer applies deliveries in the order of their arrival. After a restart, a key's
    /// later deliveries may arrive before earlier ones that the broker has yet to take back from
    /// the dead connection. A queue with `x-single-active-consumer`, or
    /// [`on_gap`](ConsumerBuilder::on_gap), keeps the order in that case too.
    ///
    /// ```
    /// use onewrite::{Error, Event, Store, broker::MemoryBroker, redb::TableDefinition};
    /// const OFFERS: TableDefinition<&str, u64> = TableDefinition::new("offers");
    /// # let folder = tempfile::tempdir()?;
    /// # let broker = MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let credit = Store::open(folder.path().join("credit.redb"))?;
    /// let consumer = credit.consumer("credit-service").spawn(broker.source("credit"), |delivery, tx| {
    ///     let amount: u64 = onewrite::codec::from_json(&delivery.message.payload)?; // cannot be decoded: rejected
    ///     tx.open_table(OFFERS)?.insert("alice", amount)?;
    ///     Ok(())
    /// })?;
    /// # consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn consumer(&self, scope: impl Into<String>) -> ConsumerBuilder {
        ConsumerBuilder {
            store: self.clone(),
            scope: scope.into(),
            prefetch: PREFETCH_DEFAULT,
            attempts: HANDLER_ATTEMPTS_DEFAULT,
            backoff: (
                Duration::from_millis(BACKOFF_MS_DEFAULT.0),
                Duration::from_millis(BACKOFF_MS_DEFAULT.1),
            ),
            gap: GapPolicy::default(),
            reject_to: RejectTo::default(),
            unknown_to: None,
            producers: None,
            keys: None,
            parked_max: (PARKED_ROWS_DEFAULT, PARKED_BYTES_DEFAULT),
            rejected_max: (REJECTED_ROWS_DEFAULT, REJECTED_BYTES_DEFAULT),
            rejected_full: RejectedFull::default(),
            free_space_min: None,
            take_in_after: RETURNS_DEFAULT,
        }
    }
}

impl ConsumerBuilder {
    /// Sets how many deliveries the consumer holds at most. The default is 256.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// assert!(store.consumer("credit-service").prefetch(0).spawn(broker.source("credit"), |_, _| Ok(())).is_err());
    /// let consumer = store.consumer("credit-service").prefetch(32).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn prefetch(mut self, prefetch: u16) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets the number of tries before a delivery whose handler fails is rejected. The default is
    /// 10.
    ///
    /// The store counts the tries, so neither a lost connection nor a restart grants new ones. A
    /// handler that ends the process counts too, as soon as the consumer knows which delivery the
    /// handler had. After that number of process deaths (two if one attempt is set), the consumer
    /// rejects the delivery and goes on with the rest.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// assert!(store.consumer("credit-service").attempts(0).spawn(broker.source("credit"), |_, _| Ok(())).is_err());
    /// let consumer = store.consumer("credit-service").attempts(3).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// Sets the first and the longest wait between tries. The defaults are 100 ms and 30 s.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use std::time::Duration;
    /// let (first, longest) = (Duration::from_millis(50), Duration::from_secs(10));
    /// let consumer = store.consumer("credit-service").backoff(first, longest).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first, longest);
        self
    }

    /// Sets what the consumer does with a delivery that comes before an earlier one of its lane. By
    /// default, the consumer applies such a delivery at once.
    ///
    /// With [`GapPolicy::Hold`], the consumer applies a lane's deliveries in the order in which
    /// they were appended, provided that the missing ones come in time. That also holds if the
    /// broker has reordered them, or if a relay's quarantine has let later ones pass. The longest
    /// wait is 15 minutes. A lane that this consumer meets in its middle begins with a gap.
    ///
    /// Held deliveries take at most a quarter of the [prefetch](Self::prefetch); the rest are
    /// [parked](Self::parked_max). The consumer cannot park them if there is no room, or if the
    /// prefetch is below 4. In that case, nothing more can come once held deliveries fill the
    /// prefetch. The consumer then applies those that it held first.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use std::time::Duration;
    /// use onewrite::GapPolicy;
    /// let policy = GapPolicy::Hold(Duration::from_secs(10));
    /// let consumer = store.consumer("credit-service").on_gap(policy).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// assert_eq!(consumer.status().held, 0);
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_gap(mut self, policy: GapPolicy) -> Self {
        self.gap = policy;
        self
    }

    /// Sets how many deliveries may wait in the store, in rows and bytes. The defaults are 16,384
    /// rows and 64 MiB ([`PARKED_ROWS_DEFAULT`](crate::limits::PARKED_ROWS_DEFAULT),
    /// [`PARKED_BYTES_DEFAULT`](crate::limits::PARKED_BYTES_DEFAULT)).
    ///
    /// The consumer parks deliveries that wait for their next try or for a gap, once they take more
    /// than a quarter of the [prefetch](Self::prefetch). It writes them into the store and
    /// acknowledges them, so that other deliveries flow. Parked deliveries keep the order of their
    /// key, survive a restart, and show in
    /// [`ConsumerStatus::parked`](crate::ConsumerStatus::parked). Beyond these bounds, deliveries
    /// wait unacknowledged and occupy the prefetch until there is room. With 0 rows, the consumer
    /// parks nothing.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let consumer = store.consumer("credit-service").parked_max(1_000, 16 << 20).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// assert_eq!((consumer.status().parked, consumer.status().parked_bytes), (0, 0));
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn parked_max(mut self, rows: u64, bytes: u64) -> Self {
        self.parked_max = (rows, bytes);
        self
    }

    /// Sets how many rejected deliveries the [quarantine](Store::rejected) of this scope keeps, in
    /// rows and bytes. The defaults are 65,536 rows and 256 MiB
    /// ([`REJECTED_ROWS_DEFAULT`](crate::limits::REJECTED_ROWS_DEFAULT),
    /// [`REJECTED_BYTES_DEFAULT`](crate::limits::REJECTED_BYTES_DEFAULT)).
    /// [`on_rejected_full`](Self::on_rejected_full) decides what happens to one more.
    ///
    /// A row holds the whole message, and the file grows by little more than the message. A
    /// delivery that was [parked](Self::parked_max) cannot be given back to the broker. The
    /// quarantine takes such deliveries until it holds as much as both bounds together allow.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use onewrite::{ConsumerWait, Error, Message};
    /// let handler = |_: &_, _: &_| Err(Error::reject("no such account"));
    /// let consumer = store.consumer("credit-service").rejected_max(1, 1 << 20).spawn(broker.source("credit"), handler)?;
    /// broker.publish("", "credit", Message::default())?;
    /// broker.publish("", "credit", Message::default())?;
    /// while consumer.status().waits_for != Some(ConsumerWait::Quarantine) {
    ///     std::thread::yield_now();
    /// }
    /// store.rejected("credit-service").discard(0)?; // makes room: the consumer goes on
    /// while consumer.status().waits_for.is_some() {
    ///     std::thread::yield_now();
    /// }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rejected_max(mut self, rows: u64, bytes: u64) -> Self {
        self.rejected_max = (rows, bytes);
        self
    }

    /// Sets the policy for a rejected delivery for which the quarantine has no
    /// [room](Self::rejected_max). By default, the consumer stops until there is room.
    ///
    /// A consumer cannot see whether its queue has a dead-letter exchange, and a queue without one
    /// drops what it gets back. So the default drops nothing. If the queue has one, `DeadLetter`
    /// keeps genuine deliveries flowing.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use onewrite::RejectedFull;
    /// let consumer = store
    ///     .consumer("credit-service")
    ///     .on_rejected_full(RejectedFull::DeadLetter) // the queue has a dead-letter exchange
    ///     .spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_rejected_full(mut self, full: RejectedFull) -> Self {
        self.rejected_full = full;
        self
    }

    /// Sets how many bytes deliveries leave free on the disk of the store's file. The default is 64
    /// MiB, or an eighth of the disk if that is less
    /// ([`FREE_SPACE_DEFAULT`](crate::limits::FREE_SPACE_DEFAULT)). A
    /// [journal](crate::StoreBuilder::journal_bytes) counts in addition.
    ///
    /// Deliveries are data of other programs, and a full disk would fail the application's own
    /// writes too. While less is free, the consumer takes nothing from its queue, and the broker
    /// keeps the deliveries. No handler runs, the consumer neither parks nor quarantines, and
    /// redrives wait too. The consumer shows
    /// [`ConsumerWait::FreeSpace`](crate::ConsumerWait::FreeSpace) and warns once.
    ///
    /// The consumer goes on by itself once an eighth of the reserve more is free. If it could not
    /// write something larger than that eighth, it needs that much room instead.
    ///
    /// The consumer looks at the disk every 20 ms at most, and counts twice the length of each
    /// message in between. One step applies messages of 4 MiB at most. A handler that writes more
    /// than that, and other programs, can still fill the disk. Choose a reserve that covers both.
    /// With 0 the consumer never looks. The limit works on Unix only.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use onewrite::ConsumerWait;
    /// # #[cfg(unix)] {
    /// let consumer = store.consumer("credit-service").free_space_min(u64::MAX).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// while consumer.status().waits_for != Some(ConsumerWait::FreeSpace) {
    ///     std::thread::yield_now(); // no disk has so much
    /// }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn free_space_min(mut self, bytes: u64) -> Self {
        self.free_space_min = Some(bytes);
        self
    }

    /// Sets after how many returns to its queue a delivery is parked before its handler has it. The
    /// default is 1 ([`RETURNS_DEFAULT`](crate::limits::RETURNS_DEFAULT)).
    ///
    /// A quorum queue may have a delivery limit; RabbitMQ 4 sets 20 if nothing else is configured.
    /// Such a queue drops or dead-letters a message that was requeued more often than the limit.
    /// Each lost connection requeues all deliveries in hand. The broker does not report the limit
    /// to consumers, only how often a message was requeued (`x-delivery-count`,
    /// `x-acquired-count`).
    ///
    /// A delivery that was requeued this often is first written into the store and acknowledged.
    /// From then on no limit counts. With 1, no message is lost at any limit except 0. A higher
    /// value saves a write for each requeued message, and needs a limit well above it. With 0, the
    /// consumer parks each delivery first, which suits a limit of 0.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let consumer = store.consumer("credit-service").take_in_after(5).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn take_in_after(mut self, returns: u32) -> Self {
        self.take_in_after = returns;
        self
    }

    /// Sets where a delivery goes that can never be handled. The default is the store's own
    /// quarantine.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use onewrite::RejectTo;
    /// let consumer = store
    ///     .consumer("credit-service")
    ///     .rejects(RejectTo::DeadLetter) // the queue has a dead-letter exchange
    ///     .spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rejects(mut self, to: RejectTo) -> Self {
        self.reject_to = to;
        self
    }

    /// Sets where a delivery goes that the consumer does not believe. By default, such a delivery
    /// goes where [all rejected ones go](Self::rejects).
    ///
    /// These deliveries come from a producer that is not among the [set ones](Self::producers),
    /// lack their [proof](Self::authenticate), or cannot be read. Others have only some of a lane's
    /// headers, or an invalid id. With [`RejectTo::DeadLetter`], such messages leave no row in the
    /// file.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # let bank = onewrite::Store::open(folder.path().join("bank.redb"))?;
    /// use onewrite::RejectTo;
    /// let consumer = store
    ///     .consumer("credit-service")
    ///     .producers([bank.id()])
    ///     .rejects_unknown(RejectTo::DeadLetter) // the queue has a dead-letter exchange
    ///     .spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rejects_unknown(mut self, to: RejectTo) -> Self {
        self.unknown_to = Some(to);
        self
    }

    /// Accepts messages with a lane only from the stores with these [ids](Store::id). By default,
    /// the consumer accepts every store.
    ///
    /// A message that names another store is rejected with [`Error::UnknownProducer`]. The setting
    /// does not concern messages without a lane. It keeps out mistakes, not attackers: anybody with
    /// permission to publish to the queue may write any header. Lanes show which messages are
    /// repeats, not which program sent them. A forged message may be applied. The genuine message
    /// of its number is then rejected, never dropped. [Signatures](Self::authenticate) keep
    /// attackers out.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # let bank = onewrite::Store::open(folder.path().join("bank.redb"))?;
    /// let of_bank = store.consumer("credit-service").producers([bank.id()]);
    /// let consumer = of_bank.spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// assert!(store.consumer("credit-service").producers(["bank"]).spawn(broker.source("credit"), |_, _| Ok(())).is_err());
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn producers(mut self, ids: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.producers = Some(ids.into_iter().map(Into::into).collect());
        self
    }

    /// Accepts only messages that their producer has signed with one of these keys. By default, the
    /// consumer ignores signatures.
    ///
    /// A message without its proof is rejected with [`Error::NotAuthentic`] before its handler is
    /// called. It marks neither the number of its lane nor its id. So the genuine message of its
    /// number is applied when it comes.
    ///
    /// In the [quarantine](Store::rejected) such a message waits for a key: a redrive checks the
    /// message again. What [`ProducerKeys`] documents about foreign messages also holds here.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # let bank = onewrite::Store::open(folder.path().join("bank.redb"))?;
    /// use onewrite::{ProducerKeys, SigningKey};
    /// let keys = ProducerKeys::new().key(&bank.id(), SigningKey::new(b"32 bytes that nobody else knows.")?)?;
    /// let consumer = store.consumer("credit-service").authenticate(keys).spawn(broker.source("credit"), |_, _| Ok(()))?;
    /// # broker.publish("", "credit", onewrite::Message::default())?;
    /// # while consumer.status().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// assert_eq!(store.rejected("credit-service").len()?, 1); // somebody had published a message of no store
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn authenticate(mut self, keys: ProducerKeys) -> Self {
        self.keys = Some(keys);
        self
    }

    /// Starts the consumer.
    ///
    /// The result of `handler` decides what happens to a delivery:
    ///
    /// - `Ok`: the effects commit together with the inbox entry; then the consumer acknowledges the
    ///   delivery.
    /// - [`Error::reject`], or a payload that cannot be decoded: none of the effects commit. The
    ///   delivery goes to the [quarantine](Store::rejected), or
    ///   [where it is set to](Self::rejects).
    /// - Any other error, or a panic: none of the effects commit, and the consumer tries again
    ///   after a while.
    ///
    /// Like every write closure, the handler may run more than once before it commits. So its
    /// effects belong in the transaction. A message without a lane and without an id cannot be
    /// recognised: the handler runs at every delivery.
    ///
    /// The consumer rejects these deliveries without calling the handler:
    ///
    /// - A number or an id that was seen with another content, or may have been
    ///   ([`Error::LaneConflict`], [`Error::IdConflict`]). Type, properties and headers count as
    ///   content. For foreign messages, exchange and routing key count too.
    /// - An id beyond [`inbox_ids_max`](crate::StoreBuilder::inbox_ids_max) ([`Error::InboxFull`]),
    ///   or a lane beyond [`lanes_max`](crate::StoreBuilder::lanes_max) ([`Error::LanesFull`]).
    /// - A message with only some of a lane's headers ([`Error::LaneHeader`]).
    /// - A producer that is not among the [set ones](Self::producers).
    ///
    /// A delivery that was [redriven](crate::Rejected::redrive) from quarantine has the epoch 0,
    /// and its number in the quarantine as its tag.
    ///
    /// # Errors
    /// [`Error::Setting`] for a setting that cannot work.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # use onewrite::Message;
    /// broker.publish("", "credit", Message { message_id: Some("m-1".into()), ..Message::default() })?;
    /// let (sender, handled) = std::sync::mpsc::channel();
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), move |delivery, _tx| {
    ///     let _ = sender.send(delivery.message.message_id.clone());
    ///     Ok(())
    /// })?;
    /// assert_eq!(handled.recv()?.as_deref(), Some("m-1"));
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn spawn<S, F>(self, mut source: S, handler: F) -> Result<Consumer>
    where
        S: Source,
        F: Fn(&Delivery, &Transaction) -> Result<()> + Send + Sync + 'static,
    {
        if self.scope.is_empty() || self.scope.len() > SHORT_STRING_BYTES_MAX {
            return Err(SettingError::new("scope", "a scope is 1 to 255 bytes long").into());
        }
        if self.prefetch == 0 {
            return Err(SettingError::new("prefetch", "it must be at least 1").into());
        }
        if self.attempts == 0 {
            return Err(SettingError::new("attempts", "it must be at least 1").into());
        }
        if matches!(self.gap, GapPolicy::Hold(timeout) if timeout > Duration::from_millis(HOLD_MS_MAX)) {
            return Err(SettingError::new("on_gap", format!("at most {HOLD_MS_MAX} ms")).into());
        }
        if self.prefetch == 1 && matches!(self.gap, GapPolicy::Hold(timeout) if !timeout.is_zero()) {
            let reason =
                "a delivery that is held needs a prefetch of 2 or more: with 1 nothing can fill the gap";
            return Err(SettingError::new("on_gap", reason).into());
        }
        if self.backoff.0 > self.backoff.1 {
            return Err(SettingError::new("backoff", "the first wait must not be above the longest").into());
        }
        let producers = self.producers.as_ref().map(parse_producers).transpose()?;
        let owner = self.store.core().owner.clone();
        let waking = self.store.core().waking();
        let write_lock = Arc::clone(&self.store.core().write_lock);
        owner.check()?;
        let (events, received) = unbounded();
        // The log lines of the source's own threads belong to this consumer too.
        let span = tracing::info_span!("consumer", consumer = %self.scope);
        span.in_scope(|| source.start(SourceEvents::to_consumer(events), self.prefetch))?;
        let (stop, stopped) = crossbeam_channel::bounded(1);
        let (report, ended) = oneshot::channel();
        let stats = Arc::new(Shared::default());
        let (signal, notified) = self.store.core().redrives.subscribe(&self.scope);
        let shown = Arc::clone(&stats);
        let scope = self.scope.clone();
        let worker = Worker::new(self, producers, Arc::new(handler), Box::new(source), Arc::clone(&stats));
        let thread = std::thread::Builder::new()
            .name("onewrite-consumer".into())
            .spawn(move || {
                let _entered = span.enter();
                let ran = caught(|| worker.run(&received, &stopped, &notified));
                if ran.is_err() {
                    // The panic has dropped the connection, so the broker takes back what was in
                    // hand.
                    tracing::error!("the consumer ends: it panicked");
                    let mut failed = shown.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    *failed = Some("it panicked".into());
                }
                report.send(());
            })
            .map_err(|source| Error::Thread { what: "consumer", cause: source })?;
        let thread = thread.thread().id();
        Ok(Consumer {
            owner,
            write_lock,
            thread,
            scope,
            stop,
            signal,
            waking,
            ended: Some(ended),
            shared: stats,
        })
    }
}

pub(super) fn parse_producers(ids: &BTreeSet<String>) -> Result<BTreeSet<[u8; 16]>> {
    let parse = |id: &String| {
        uuid_from_text(id)
            .ok_or_else(|| SettingError::new("producers", format!("`{id}` is not a store's id")).into())
    };
    ids.iter().map(parse).collect()
}
