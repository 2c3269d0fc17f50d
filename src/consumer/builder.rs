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
    /// A consumer that applies a queue's deliveries to this store, each once in effect. Deliveries of another `onewrite` store are
    /// recognised without expiry, those of other producers within the [inbox age](crate::StoreBuilder::inbox_age). `scope` names what it
    /// keeps for deduplication and what it has rejected: give it a name that stays.
    ///
    /// Order is that of arrival. After a restart a key's later deliveries may arrive before those that the broker has still to take
    /// back from the dead connection: a queue with `x-single-active-consumer`, or [`on_gap`](ConsumerBuilder::on_gap), keeps the order then
    /// too.
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
    /// Deliveries in hand at most; 256 unless set.
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

    /// Tries before a delivery whose handler fails is rejected; 10 unless set. They are counted in the store: neither a lost
    /// connection nor a restart gives new ones. A handler that ends the process counts too, as soon as it is known which delivery it
    /// had: after so many deaths (two where one attempt is set) the delivery is rejected, and the rest goes on.
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

    /// First and longest wait between tries; 100 ms and 30 s unless set.
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

    /// What becomes of a delivery that comes before an earlier one of its lane; it is applied at once unless set.
    ///
    /// With [`GapPolicy::Hold`], deliveries of a lane are applied in the order in which they were appended, as long as what is
    /// missing comes in time: also where the broker has put them in another order, or a relay's quarantine has let some by.
    /// What is held takes a quarter of the [prefetch](Self::prefetch) at most; the rest is [parked](Self::parked_max). Where there is
    /// no room for that, or the prefetch is below 4, and all that it allows is held, nothing more can come, and what was held first
    /// goes on. A lane that this consumer meets in its middle begins with a gap. 15 minutes at most.
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

    /// Deliveries that wait in the store at most, in rows and bytes; 16,384 and 64 MiB unless set
    /// ([`PARKED_ROWS_DEFAULT`](crate::limits::PARKED_ROWS_DEFAULT), [`PARKED_BYTES_DEFAULT`](crate::limits::PARKED_BYTES_DEFAULT)).
    ///
    /// Deliveries that wait for their next try, or for a gap, are parked once they take more than a quarter of the
    /// [prefetch](Self::prefetch): they are written into the store and acknowledged, so that others flow. They keep the order of
    /// their key, survive a restart, and show in [`ConsumerStatus::parked`](crate::ConsumerStatus::parked). Beyond these bounds deliveries wait unacknowledged
    /// and hold the prefetch, until there is room. With 0 rows nothing is parked.
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

    /// Rejected deliveries that the [quarantine](Store::rejected) of this scope keeps at most, in rows and bytes; 65,536 and 256 MiB
    /// unless set ([`REJECTED_ROWS_DEFAULT`](crate::limits::REJECTED_ROWS_DEFAULT),
    /// [`REJECTED_BYTES_DEFAULT`](crate::limits::REJECTED_BYTES_DEFAULT)). What happens to one more says
    /// [`on_rejected_full`](Self::on_rejected_full).
    ///
    /// A row holds the whole message, and the file grows by little more than the message. A delivery that was [parked](Self::parked_max)
    /// cannot be given back to the broker. The quarantine takes such deliveries until it holds as much as both bounds together allow.
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

    /// The policy for a rejected delivery for which the quarantine has no [room](Self::rejected_max). The consumer stops until there is
    /// room, unless set.
    ///
    /// A consumer cannot see whether its queue has a dead-letter exchange, and a queue without one drops what it gets back. So the default
    /// drops nothing. Where the queue has one, `DeadLetter` keeps genuine deliveries flowing.
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

    /// Bytes that deliveries leave free on the disk of the store's file; 64 MiB unless set, or an eighth of the disk if that is less
    /// ([`FREE_SPACE_DEFAULT`](crate::limits::FREE_SPACE_DEFAULT)). A [journal](crate::StoreBuilder::journal_bytes) counts in addition.
    ///
    /// Deliveries are others' data, and a full disk would fail the application's own writes too. While less is free, the consumer takes
    /// nothing from its queue: no handler runs, nothing is parked or put into quarantine, redrives wait too. It shows
    /// [`ConsumerWait::FreeSpace`](crate::ConsumerWait::FreeSpace), warns once, and goes on by itself once an eighth more is free, or what it could not write if that is
    /// more. The broker keeps the deliveries.
    ///
    /// The consumer looks at the disk every 20 ms at most, and counts twice the length of each message in between. It applies messages of
    /// 4 MiB at most in one step. What a handler writes beyond that, and what other programs write, can still fill the disk: choose the
    /// reserve for that. With 0 the consumer never looks. Only on Unix.
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

    /// Returns to its queue after which a delivery is parked before it is tried; 1 unless set
    /// ([`RETURNS_DEFAULT`](crate::limits::RETURNS_DEFAULT)).
    ///
    /// A quorum queue with a delivery limit (RabbitMQ 4 sets 20 where nothing else is said) drops or dead-letters a message that
    /// was requeued more often than the limit, and each lost connection requeues all that is in hand. The limit is not reported to
    /// consumers, only how often a message was requeued (`x-delivery-count`, `x-acquired-count`). What was requeued so often as this
    /// says is written into the store and acknowledged before its handler has it: from then on no limit counts. With 1 nothing is
    /// lost at any limit but 0; a higher value saves a write per message that is requeued and needs a limit well above it. With 0
    /// each delivery is parked first: for a limit of 0.
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

    /// Where a delivery goes that can never be handled; into the store's own quarantine unless set.
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

    /// Where a delivery goes that is not believed; where [all rejected ones go](Self::rejects) unless set. These are: a producer that is none of
    /// the [set ones](Self::producers), a message that lacks its [proof](Self::authenticate), headers of a lane that are there by half, an id that is
    /// none, a message that cannot be read. Whatever others publish then leaves no row in the file.
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

    /// Takes messages that carry a lane from these stores only, named by their [id](Store::id); from any unless set. One that
    /// names another store is rejected with [`Error::UnknownProducer`]. Messages without a lane are not concerned. It keeps
    /// out mistakes, not attackers: anybody who may publish to the queue may write any header. Lanes say which messages are repeats,
    /// not who sent them. A forged message may be applied; the genuine one of its number is then rejected, never dropped.
    /// [Signatures](Self::authenticate) keep attackers out.
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

    /// Takes messages only that are signed by their producer with one of these keys; unless set, signatures are not looked at. A message
    /// that lacks its proof is rejected with [`Error::NotAuthentic`] before its handler is called, and marks nothing: neither the
    /// number of its lane nor its id. The genuine one of its number is applied when it comes.
    ///
    /// In the [quarantine](Store::rejected) such a message waits for a key: when it is driven again it is checked again. What
    /// [`ProducerKeys`] says of foreign messages holds too.
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

    /// Starts consuming.
    ///
    /// `handler` says what becomes of a delivery:
    ///
    /// - `Ok`: its effects commit together with the inbox entry, then it is acknowledged.
    /// - [`Error::reject`], or a payload that cannot be decoded: nothing of it commits. It goes to the
    ///   [quarantine](Store::rejected), or [where it is set to](Self::rejects).
    /// - Any other error, or a panic: nothing of it commits, and it is tried again after a while.
    ///
    /// Like every write closure it may run more than once before it commits, so its effects belong into the transaction. A message
    /// without a lane and without an id cannot be recognised: it is handled at every delivery.
    ///
    /// These are rejected without a call:
    ///
    /// - A number or an id that was seen with another content, or may have been ([`Error::LaneConflict`], [`Error::IdConflict`]).
    ///   Type, properties and headers count as content; exchange and routing key do too, for foreign messages.
    /// - An id beyond [`inbox_ids_max`](crate::StoreBuilder::inbox_ids_max) ([`Error::InboxFull`]), or a lane beyond
    ///   [`lanes_max`](crate::StoreBuilder::lanes_max) ([`Error::LanesFull`]).
    /// - Headers of a lane that are there by half ([`Error::LaneHeader`]).
    /// - A producer that is none of the [set ones](Self::producers).
    ///
    /// A delivery that was [driven again](crate::Rejected::redrive) from quarantine comes with the epoch 0 and its number there
    /// as its tag.
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
        // What the source's own threads log is this consumer's too.
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
                    // Its connection is gone with it: what was in hand goes back to the broker.
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
