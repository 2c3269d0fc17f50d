//! The other end: deliveries applied exactly once in effect.
//!
//! Each delivery is one write closure: it marks the message's id in the inbox, runs the handler, and commits with its
//! group; only then is the delivery acknowledged. A crash at any point leaves either nothing, and the broker delivers
//! again, or everything, and the next delivery of that id is recognised and only acknowledged. The broker's
//! `redelivered` flag is not looked at.
//!
//! **Order.** Deliveries of one key are applied in the order in which they arrive: while one waits for its next try,
//! later ones of its key wait behind it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::error::{Error, EventError, Result, SettingError};
use crate::limits::{BACKOFF_MS_DEFAULT, CONSUMER_BATCH_MAX, PREFETCH_DEFAULT, SHORT_STRING_BYTES_MAX};
use crate::message::Fault;
use crate::oneshot;
use crate::publish::{Delivery, DeliveryTag, Settlement, Source, SourceEvent, SourceEvents};
use crate::store::{Receipt, Store, Transaction};
use crate::wire::ordering_key;

/// Tries of a delivery whose handler fails before it is rejected, unless set.
///
/// ```
/// assert_eq!(onewrite::HANDLER_ATTEMPTS_DEFAULT, 10);
/// ```
pub const HANDLER_ATTEMPTS_DEFAULT: u32 = 10;

type Handler = dyn Fn(&Delivery, &Transaction) -> Result<()> + Send + Sync;

/// Settings of a consumer, before it runs. See [`Store::consumer`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::publish::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// let consumer = store.consumer("credit-service").prefetch(32).attempts(3).run(broker.source("credit"), |_, _| Ok(()))?;
/// # let _ = consumer.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `run` is called"]
pub struct ConsumerBuilder {
    store: Store,
    scope: String,
    prefetch: u16,
    attempts: u32,
    backoff: (Duration, Duration),
}

impl Store {
    /// A consumer that applies a queue's deliveries to this store. `scope` names it in the inbox: the ids of one scope
    /// are seen once; give it a name that stays.
    ///
    /// ```
    /// use onewrite::{Error, Event, Store, publish::MemoryBroker, redb::TableDefinition};
    /// const OFFERS: TableDefinition<&str, u64> = TableDefinition::new("offers");
    /// # let folder = tempfile::tempdir()?;
    /// # let broker = MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let credit = Store::open(folder.path().join("credit.redb"))?;
    /// let consumer = credit.consumer("credit-service").run(broker.source("credit"), |delivery, tx| {
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
        }
    }
}

impl ConsumerBuilder {
    /// Deliveries in hand at most; 256 unless set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// assert!(store.consumer("credit-service").prefetch(0).run(broker.source("credit"), |_, _| Ok(())).is_err());
    /// let consumer = store.consumer("credit-service").prefetch(32).run(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn prefetch(mut self, prefetch: u16) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Tries before a delivery whose handler fails is rejected; 10 unless set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// assert!(store.consumer("credit-service").attempts(0).run(broker.source("credit"), |_, _| Ok(())).is_err());
    /// let consumer = store.consumer("credit-service").attempts(3).run(broker.source("credit"), |_, _| Ok(()))?;
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
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use std::time::Duration;
    /// let (first, longest) = (Duration::from_millis(50), Duration::from_secs(10));
    /// let consumer = store.consumer("credit-service").backoff(first, longest).run(broker.source("credit"), |_, _| Ok(()))?;
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first, longest);
        self
    }

    /// Starts consuming.
    ///
    /// `handler` says what became of a delivery: `Ok`: its effects commit together with the mark, then it is
    /// acknowledged; [`Error::reject`], or a payload that cannot be decoded: nothing of it commits, and it goes to the
    /// queue's dead-letter exchange; any other error, or a panic: nothing of it commits, and it is tried again after a
    /// while. Like every write closure it may run more than once before it commits, so its effects belong into the
    /// transaction. A message without an id cannot be recognised: it is handled at every delivery.
    ///
    /// # Errors
    /// [`Error::Setting`] for a setting that cannot work.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # use onewrite::Message;
    /// broker.publish("", "credit", Message { message_id: Some("m-1".into()), ..Message::default() })?;
    /// let (sender, handled) = std::sync::mpsc::channel();
    /// let consumer = store.consumer("credit-service").run(broker.source("credit"), move |delivery, _tx| {
    ///     let _ = sender.send(delivery.message.message_id.clone());
    ///     Ok(())
    /// })?;
    /// assert_eq!(handled.recv()?.as_deref(), Some("m-1"));
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn run<S, F>(self, mut source: S, handler: F) -> Result<Consumer>
    where
        S: Source,
        F: Fn(&Delivery, &Transaction) -> Result<()> + Send + Sync + 'static,
    {
        if self.scope.is_empty() || self.scope.len() > SHORT_STRING_BYTES_MAX {
            return Err(SettingError::new("scope", "a scope is 1 to 255 bytes long").into());
        }
        if self.prefetch == 0 || self.attempts == 0 {
            return Err(SettingError::new("prefetch, attempts", "both must be at least 1").into());
        }
        let (events, received) = unbounded();
        source.start(SourceEvents::new(events), self.prefetch)?;
        let (stop, stopped) = crossbeam_channel::bounded(1);
        let (report, ended) = oneshot::channel();
        let stats = Arc::new(Shared::default());
        let worker = Worker {
            handler: Arc::new(handler),
            source: Box::new(source),
            shared: Arc::clone(&stats),
            keys: HashMap::new(),
            due: BTreeMap::new(),
            settings: self,
        };
        std::thread::Builder::new()
            .name("onewrite-consumer".into())
            .spawn(move || {
                worker.run(&received, &stopped);
                report.send(());
            })
            .map_err(|source| Error::Thread { what: "consumer", source })?;
        Ok(Consumer { stop, ended: Some(ended), shared: stats })
    }
}

/// Figures of a consumer since it began.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::publish::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Ok(()))?;
/// let stats: onewrite::ConsumerStats = consumer.stop(std::time::Duration::from_secs(5));
/// assert_eq!((stats.applied, stats.rejected), (0, 0));
/// assert_eq!(stats.failed, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ConsumerStats {
    /// Deliveries whose effects were committed.
    pub applied: u64,
    /// Deliveries recognised as repeats and only acknowledged.
    pub repeated: u64,
    /// Tries that failed and were put off.
    pub retried: u64,
    /// Deliveries rejected.
    pub rejected: u64,
    /// Deliveries whose id was seen before with other content; rejected too.
    pub conflicts: u64,
    /// Times the connection was set up.
    pub connections: u64,
    /// Why there is no connection now.
    pub disconnected: Option<Fault>,
    /// Why the consumer can do nothing any more.
    pub failed: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    applied: AtomicU64,
    repeated: AtomicU64,
    retried: AtomicU64,
    rejected: AtomicU64,
    conflicts: AtomicU64,
    connections: AtomicU64,
    disconnected: Mutex<Option<Fault>>,
    failed: Mutex<Option<String>>,
}

/// A running consumer. Dropping it stops it, waiting 5 s at most.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::publish::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// use std::time::Duration;
/// use onewrite::Consumer;
/// let consumer: Consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Ok(()))?;
/// assert_eq!(consumer.stop(Duration::from_secs(5)).failed, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping a consumer stops it"]
pub struct Consumer {
    stop: Sender<Instant>,
    ended: Option<oneshot::Receiver<()>>,
    shared: Arc<Shared>,
}

impl Consumer {
    /// Figures.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Ok(()))?;
    /// assert_eq!(consumer.stats().applied, 0);
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn stats(&self) -> ConsumerStats {
        let shared = &self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConsumerStats {
            applied: get(&shared.applied),
            repeated: get(&shared.repeated),
            retried: get(&shared.retried),
            rejected: get(&shared.rejected),
            conflicts: get(&shared.conflicts),
            connections: get(&shared.connections),
            disconnected: shared.disconnected.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            failed: shared.failed.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Stops, `deadline` at most from now. What is applied by then is acknowledged; the rest goes back to the broker.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// use std::time::Duration;
    /// let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Ok(()))?;
    /// let stats = consumer.stop(Duration::from_secs(5));
    /// assert_eq!(stats.rejected, 0);
    /// assert_eq!(broker.unsettled_len("credit"), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(mut self, deadline: Duration) -> ConsumerStats {
        self.end(deadline);
        self.stats()
    }

    fn end(&mut self, deadline: Duration) {
        let Some(ended) = self.ended.take() else { return };
        let deadline = Instant::now() + deadline;
        let _ = self.stop.try_send(deadline);
        if ended.wait_until(deadline).is_none() {
            tracing::warn!("the consumer did not end by its deadline; it ends by itself");
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.end(Duration::from_secs(5));
    }
}

/// A delivery in hand.
#[derive(Debug, Clone)]
struct Item {
    delivery: Arc<Delivery>,
    key: Option<Arc<str>>,
    attempts: u32,
}

/// What a delivery's transaction did.
enum Applied {
    Done,
    Repeated,
}

struct Worker {
    settings: ConsumerBuilder,
    handler: Arc<Handler>,
    source: Box<dyn Source>,
    shared: Arc<Shared>,
    /// Keys of which one delivery waits for its next try, with those that wait behind it.
    keys: HashMap<Arc<str>, VecDeque<Item>>,
    /// Deliveries that wait for their next try, by time; the number keeps them apart.
    due: BTreeMap<(Instant, u64), Item>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("scope", &self.settings.scope).finish_non_exhaustive()
    }
}

impl Worker {
    fn run(mut self, events: &Receiver<SourceEvent>, stop: &Receiver<Instant>) {
        let mut deadline = None;
        while deadline.is_none() {
            let mut batch = self.take_due();
            let wait = self.due.keys().next().map(|(due, _)| *due);
            let first = if batch.is_empty() { Self::wait(events, stop, wait, &mut deadline) } else { None };
            let more = std::iter::from_fn(|| events.try_recv().ok());
            for event in first.into_iter().chain(more) {
                self.receive(event, &mut batch);
                if batch.len() >= CONSUMER_BATCH_MAX {
                    break;
                }
            }
            if let Ok(at) = stop.try_recv() {
                deadline = Some(at);
            }
            if let Err(error) = self.apply(batch) {
                tracing::error!(%error, scope = self.settings.scope, "the consumer ends: its store takes nothing more");
                *self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
                break;
            }
        }
        let left = deadline.map_or(Duration::from_secs(2), |at| at.saturating_duration_since(Instant::now()));
        self.source.stop(left);
    }

    fn wait(
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Instant>,
        until: Option<Instant>,
        deadline: &mut Option<Instant>,
    ) -> Option<SourceEvent> {
        let timer = until.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
        crossbeam_channel::select! {
            recv(events) -> event => event.ok(),
            recv(stop) -> at => {
                *deadline = Some(at.unwrap_or_else(|_| Instant::now()));
                None
            }
            recv(timer) -> _ => None,
        }
    }

    fn receive(&mut self, event: SourceEvent, batch: &mut Vec<Item>) {
        match event {
            SourceEvent::Up { epoch } => {
                tracing::info!(scope = self.settings.scope, epoch = epoch.0, "consuming");
                self.shared.connections.fetch_add(1, Ordering::Relaxed);
                *self.shared.disconnected.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            SourceEvent::Down { epoch, fault } => {
                tracing::warn!(scope = self.settings.scope, epoch = epoch.0, %fault, "not consuming");
                *self.shared.disconnected.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
                // All of it will be delivered again.
                self.keys.clear();
                self.due.clear();
                batch.retain(|item| item.delivery.tag.epoch > epoch);
            }
            SourceEvent::Delivery(delivery) => {
                let key = ordering_key(&delivery.message).map(Arc::from);
                let item = Item { delivery: Arc::from(delivery), key, attempts: 0 };
                self.admit(item, batch);
            }
        }
    }

    /// Puts a delivery into the batch, or behind the one of its key that waits.
    fn admit(&mut self, item: Item, batch: &mut Vec<Item>) {
        match item.key.as_ref().and_then(|key| self.keys.get_mut(key)) {
            Some(behind) => behind.push_back(item),
            None => batch.push(item),
        }
    }

    /// Those whose next try is due, each with those that wait behind it.
    fn take_due(&mut self) -> Vec<Item> {
        let mut batch = Vec::new();
        let now = Instant::now();
        while let Some(entry) = self.due.first_entry()
            && entry.key().0 <= now
        {
            let item = entry.remove();
            let behind = item.key.as_ref().and_then(|key| self.keys.remove(key));
            batch.push(item);
            batch.extend(behind.into_iter().flatten());
        }
        batch
    }

    /// Applies a batch, one closure each, and settles what has become of them. Fails only if the store is lost.
    fn apply(&mut self, batch: Vec<Item>) -> Result<()> {
        let mut settlements = Vec::with_capacity(batch.len());
        let mut answers = VecDeque::with_capacity(batch.len());
        let mut failed_keys: HashMap<Arc<str>, Arc<AtomicBool>> = HashMap::new();
        for item in batch {
            let failed =
                item.key.as_ref().map(|key| Arc::clone(failed_keys.entry(Arc::clone(key)).or_default()));
            let answer = self.settings.store.submit(self.closure(&item, failed))?;
            answers.push_back((item, answer));
        }
        let mut lost = None;
        for (item, answer) in answers {
            let result = answer.wait().unwrap_or_else(|oneshot::Abandoned| Err(self.settings.store.gone()));
            match result {
                Err(
                    error @ (Error::Poisoned { .. } | Error::Closed { .. } | Error::CommitUnknown { .. }),
                ) => {
                    lost.get_or_insert(error);
                }
                result => self.settle(item, result, &mut settlements),
            }
        }
        self.source.settle(settlements);
        lost.map_or(Ok(()), Err)
    }

    /// The transaction of one delivery. `failed` is shared by those of its key in this batch: they run one after
    /// another, and one that fails holds back those after it.
    fn closure(
        &self,
        item: &Item,
        failed: Option<Arc<AtomicBool>>,
    ) -> impl FnMut(&Transaction) -> Result<Applied> + Send + 'static {
        let (handler, delivery) = (Arc::clone(&self.handler), Arc::clone(&item.delivery));
        let scope = self.settings.scope.clone();
        move |tx| {
            if failed.as_ref().is_some_and(|failed| failed.load(Ordering::Relaxed)) {
                return Err(Error::app(Held));
            }
            // Until it is known to have succeeded; a panic leaves it so.
            let note =
                |value| failed.as_ref().iter().for_each(|failed| failed.store(value, Ordering::Relaxed));
            note(true);
            let message = &delivery.message;
            if let Some(id) = message.message_id.as_deref().filter(|id| !id.is_empty())
                && !tx.first_time_with(&scope, id, &message.payload)?
            {
                note(false);
                return Ok(Applied::Repeated);
            }
            let result = handler(&delivery, tx);
            // One that is rejected does not hold back its key: it will never be applied.
            note(!matches!(
                &result,
                Ok(()) | Err(Error::Rejected(_) | Error::Event(EventError::Decode { .. }))
            ));
            result.map(|()| Applied::Done)
        }
    }

    fn settle(
        &mut self,
        item: Item,
        result: Result<Receipt<Applied>>,
        settlements: &mut Vec<(DeliveryTag, Settlement)>,
    ) {
        let tag = item.delivery.tag;
        let count = |counter: &AtomicU64| _ = counter.fetch_add(1, Ordering::Relaxed);
        match result.map(Receipt::into_value) {
            Ok(applied) => {
                count(match applied {
                    Applied::Done => &self.shared.applied,
                    Applied::Repeated => &self.shared.repeated,
                });
                settlements.push((tag, Settlement::Acknowledge));
            }
            Err(error) if error.downcast_app::<Held>().is_some() => self.hold(item),
            Err(error) if is_final(&error) || item.attempts + 1 >= self.settings.attempts => {
                if matches!(error, Error::IdConflict { .. }) {
                    count(&self.shared.conflicts);
                }
                count(&self.shared.rejected);
                let message_id = item.delivery.message.message_id.as_deref();
                tracing::error!(%error, message_id, attempts = item.attempts + 1, "a delivery is rejected");
                settlements.push((tag, Settlement::Reject));
            }
            Err(error) => {
                count(&self.shared.retried);
                tracing::warn!(%error, attempts = item.attempts + 1, "a delivery is tried again later");
                self.put_off(item);
            }
        }
    }

    /// Behind the one of its key that failed in the same batch; if that one was rejected after all, due at once.
    fn hold(&mut self, item: Item) {
        match item.key.as_ref().and_then(|key| self.keys.get_mut(key)) {
            Some(behind) => behind.push_back(item),
            None => self.schedule(Duration::ZERO, item),
        }
    }

    fn put_off(&mut self, mut item: Item) {
        let (first, longest) = self.settings.backoff;
        let wait = first.saturating_mul(1 << item.attempts.min(16)).min(longest);
        item.attempts += 1;
        self.schedule(wait, item);
    }

    fn schedule(&mut self, wait: Duration, item: Item) {
        if let Some(key) = &item.key {
            self.keys.entry(Arc::clone(key)).or_default();
        }
        self.due.insert((Instant::now() + wait, item.delivery.tag.tag), item);
    }
}

/// Errors that another try cannot heal.
fn is_final(error: &Error) -> bool {
    matches!(
        error,
        Error::Rejected(_)
            | Error::IdConflict { .. }
            | Error::BadId { .. }
            | Error::Event(EventError::Decode { .. })
    )
}

/// An earlier delivery of the same key failed in this batch.
#[derive(Debug, thiserror::Error)]
#[error("an earlier delivery of the same key waits for its next try")]
struct Held;
