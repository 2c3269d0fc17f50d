//! The relay: a cursor whose sink is a broker.
//!
//! [The machine](crate::delivery) decides, and `worker` acts. The worker reads the log, hands
//! messages to the publisher, and lets progress wait for the application's commits. It sleeps until
//! a commit notifies it, the publisher reports, or a timer is due.

mod expired;
mod handle;
mod loading;
mod prepare;
mod quarantine;
mod requests;
pub(crate) mod rows;
mod waiters;
mod worker;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{bounded, unbounded};

use self::worker::Worker;
use crate::broker::Publisher;
use crate::delivery::types::Settings;
use crate::error::{Error, Result, SettingError};
use crate::event::{Destination, RecordedEvent, fresh_uuid, uuid_text};
use crate::limits::{
    ATTEMPTS_DEFAULT, BACKOFF_MS_DEFAULT, DESTINATION_ATTEMPTS_DEFAULT, RATE_LIMIT_MAX,
    SHORT_STRING_BYTES_MAX, WINDOW_BYTES_DEFAULT, WINDOW_EVENTS_DEFAULT, WINDOW_EVENTS_MAX,
};
use crate::oneshot;
use crate::store::shared::relays::RelayPort;
use crate::store::{RelayStatus, StartAt, Store};
use crate::text::Text;
use crate::time::as_ms;
use crate::tuning::{HELD_KEYS_MAX, LOAD_EVENTS_MAX, LOOKAHEAD_PER_WINDOW, RETRYING_MAX};
use crate::wire::{HeaderSpelling, SigningKey, Wire};

pub(crate) use self::handle::Registered;
pub use self::handle::{Relay, StopReport};
pub use self::quarantine::{Quarantine, Quarantined};
pub use crate::delivery::types::{PublishOrder, QuarantinePolicy, SuspendCause};

type Rule = dyn Fn(&RecordedEvent) -> Option<Destination> + Send + Sync;

/// The rule that gives a destination to events that were recorded as unpublished.
#[derive(Clone)]
pub(crate) struct Unpublished(Arc<Rule>);

impl std::fmt::Debug for Unpublished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpublished")
    }
}

/// Settings of a relay, before it runs. See [`Store::relay`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// use onewrite::{PublishOrder, QuarantinePolicy};
/// let relay = store
///     .relay("rabbit")
///     .ordering(PublishOrder::Total)
///     .on_quarantine(QuarantinePolicy::SkipEvent)
///     .window_events(1024)
///     .spawn(broker.publisher())?;
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `spawn` is called"]
pub struct RelayBuilder {
    store: Store,
    name: String,
    start: StartAt,
    settings: Settings,
    spelling: HeaderSpelling,
    source: Option<String>,
    app_id: Option<String>,
    signing: Option<SigningKey>,
    may_be_unroutable: BTreeSet<String>,
    unpublished: Option<Unpublished>,
}

impl Store {
    /// Creates a relay that publishes the log to a broker.
    ///
    /// `name` is the name of the relay's cursor in the file. A relay with the same name goes on
    /// where the last one stopped. Several relays, each with its own name and broker, can publish
    /// one log.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::{Event, Store, broker::{ExchangeKind, MemoryBroker}};
    /// # let folder = tempfile::tempdir()?;
    /// let store = Store::open(folder.path().join("payments.redb"))?;
    /// let broker = MemoryBroker::new();
    /// broker.declare_exchange("payments", ExchangeKind::Fanout);
    /// broker.declare_queue("credit", Default::default());
    /// broker.bind("credit", "payments", "")?;
    ///
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// let receipt = store.write(|tx| {
    ///     tx.append(Event::bytes("payment.completed", b"100".to_vec()).key("alice").to("payments", "completed"))
    /// })?;
    /// receipt.wait_confirmed(Duration::from_secs(5))?; // the broker has it
    /// let report = relay.stop(Duration::from_secs(5));
    /// assert_eq!(report.backlog_events, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn relay(&self, name: impl Into<String>) -> RelayBuilder {
        RelayBuilder {
            store: self.clone(),
            name: name.into(),
            start: StartAt::default(),
            settings: Settings {
                ordering: PublishOrder::default(),
                on_quarantine: QuarantinePolicy::default(),
                window_events: WINDOW_EVENTS_DEFAULT,
                window_bytes: WINDOW_BYTES_DEFAULT,
                lookahead_events: WINDOW_EVENTS_DEFAULT * LOOKAHEAD_PER_WINDOW,
                lookahead_bytes: WINDOW_BYTES_DEFAULT * 2,
                load_events: LOAD_EVENTS_MAX,
                attempts_max: ATTEMPTS_DEFAULT,
                destination_attempts_max: DESTINATION_ATTEMPTS_DEFAULT,
                backoff_first_ms: BACKOFF_MS_DEFAULT.0,
                backoff_max_ms: BACKOFF_MS_DEFAULT.1,
                retrying_max: RETRYING_MAX,
                held_keys_max: HELD_KEYS_MAX,
                rate_limit: None,
                seed: 0,
            },
            spelling: HeaderSpelling::default(),
            source: None,
            app_id: None,
            signing: None,
            may_be_unroutable: BTreeSet::new(),
            unpublished: None,
        }
    }
}

impl RelayBuilder {
    /// Sets which events may overtake each other. The default is [`PublishOrder::PerKey`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use onewrite::PublishOrder;
    /// let relay = store.relay("rabbit").ordering(PublishOrder::Total).spawn(broker.publisher())?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn ordering(mut self, ordering: PublishOrder) -> Self {
        self.settings.ordering = ordering;
        self
    }

    /// Sets what happens to later events of a key when one is quarantined. The default is
    /// [`QuarantinePolicy::HoldKey`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use onewrite::QuarantinePolicy;
    /// let relay = store.relay("rabbit").on_quarantine(QuarantinePolicy::SkipEvent).spawn(broker.publisher())?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_quarantine(mut self, policy: QuarantinePolicy) -> Self {
        self.settings.on_quarantine = policy;
        self
    }

    /// Sets how many events may be unconfirmed. The default is 512, the maximum 16,384. Throughput
    /// needs 256 or more in flight.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// assert!(store.relay("rabbit").window_events(0).spawn(broker.publisher()).is_err());
    /// let relay = store.relay("rabbit").window_events(1024).spawn(broker.publisher())?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn window_events(mut self, events: usize) -> Self {
        self.settings.window_events = events;
        self.settings.lookahead_events = events.saturating_mul(LOOKAHEAD_PER_WINDOW);
        self
    }

    /// Sets how many payload bytes may be unconfirmed. The default is 8 MiB. One larger event may
    /// go alone.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// assert!(store.relay("rabbit").window_bytes(0).spawn(broker.publisher()).is_err());
    /// let relay = store.relay("rabbit").window_bytes(1 << 20).spawn(broker.publisher())?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn window_bytes(mut self, bytes: usize) -> Self {
        self.settings.window_bytes = bytes;
        self.settings.lookahead_bytes = bytes.saturating_mul(2);
        self
    }

    /// Sets how many publishes a second the relay makes at most, resends included. By default,
    /// there is no limit.
    ///
    /// After a pause, and when the relay starts, a tenth of a second's worth may go at once (at
    /// least one). So in any stretch of time `t`, the relay makes no more publishes than that and
    /// the rate times `t`.
    ///
    /// The limit protects a broker, or a line, that a long backlog must not take for itself. It
    /// delays neither an idle relay nor [`stop`](Relay::stop). Events wait in the file, not in
    /// memory.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// use std::time::{Duration, Instant};
    /// use onewrite::Event;
    /// assert!(store.relay("rabbit").rate_limit(0).spawn(broker.publisher()).is_err());
    /// let relay = store.relay("rabbit").rate_limit(100).spawn(broker.publisher())?; // ten at once
    /// let began = Instant::now();
    /// let twenty = |tx: &onewrite::Transaction| (0..20).try_for_each(|_| tx.append(Event::bytes("paid", "1").to("", "payments")).map(drop));
    /// store.write(twenty)?.wait_confirmed(Duration::from_secs(5))?;
    /// assert!(began.elapsed() >= Duration::from_millis(99)); // the other ten, one each 10 ms
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rate_limit(mut self, events_per_second: u32) -> Self {
        self.settings.rate_limit = Some(events_per_second);
        self
    }

    /// Sets the tries of an event that the broker itself refuses, before the event is quarantined.
    /// The default is 5.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// assert!(store.relay("rabbit").attempts(0).spawn(broker.publisher()).is_err());
    /// let relay = store.relay("rabbit").attempts(3).spawn(broker.publisher())?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.settings.attempts_max = attempts;
        self
    }

    /// Sets the tries of an event whose destination is missing, forbidden, or routes nowhere,
    /// before the event is quarantined. The default is 10.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use std::time::Duration;
    /// use onewrite::{ConfirmError, Event};
    /// let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "nowhere")))?;
    /// let error = receipt.wait_confirmed(Duration::from_secs(5)).unwrap_err();
    /// assert!(matches!(error, ConfirmError::Quarantined { seq: 0, .. }));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn destination_attempts(mut self, attempts: u32) -> Self {
        self.settings.destination_attempts_max = attempts;
        self
    }

    /// Sets the first and the longest wait between tries of one event. The defaults are 100 ms and
    /// 30 s. Destination faults wait ten times longer at first. Waits are jittered.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use std::time::Duration;
    /// let (short, long) = (Duration::from_millis(50), Duration::from_secs(10));
    /// assert!(store.relay("rabbit").backoff(long, short).spawn(broker.publisher()).is_err());
    /// let relay = store.relay("rabbit").backoff(short, long).spawn(broker.publisher())?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        (self.settings.backoff_first_ms, self.settings.backoff_max_ms) = (as_ms(first), as_ms(longest));
        self
    }

    /// Sets how CloudEvents attributes are spelt as headers.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// use onewrite::HeaderSpelling;
    /// let relay = store.relay("rabbit").header_spelling(HeaderSpelling::Dash).spawn(broker.publisher())?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").id("p-1").to("", "payments")))?
    /// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
    /// let message = &broker.messages("payments")[0].message; // the first event, published
    /// assert_eq!(message.header("ce-id").and_then(|id| id.as_text()), Some("p-1"));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn header_spelling(mut self, spelling: HeaderSpelling) -> Self {
        self.spelling = spelling;
        self
    }

    /// Sets the CloudEvents `source`, a URI reference. The default is `/onewrite/` and the store's
    /// id.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// let relay = store.relay("rabbit").source("/services/ledger").spawn(broker.publisher())?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").id("p-1").to("", "payments")))?
    /// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
    /// let message = &broker.messages("payments")[0].message; // the first event, published
    /// assert_eq!(message.header("cloudEvents_source").and_then(|source| source.as_text()), Some("/services/ledger"));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Sets the AMQP `app_id` of each event that has [none of its own](crate::Event::app_id).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// let relay = store.relay("rabbit").app_id("ledger").spawn(broker.publisher())?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").id("p-1").to("", "payments")))?
    /// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
    /// let message = &broker.messages("payments")[0].message; // the first event, published
    /// assert_eq!(message.app_id.as_deref(), Some("ledger"));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn app_id(mut self, app_id: impl Into<String>) -> Self {
        self.app_id = Some(app_id.into());
        self
    }

    /// Signs each message with this key. Consumers that
    /// [check](crate::ConsumerBuilder::authenticate) signatures then know that this store has
    /// produced the message.
    ///
    /// The signature is an HMAC-SHA-256 in the header [`wire::SIGNATURE`](crate::wire::SIGNATURE).
    /// It covers store, epoch, lane, number, id, type, properties, headers and payload, but not the
    /// parts that brokers write. No message is signed unless a key is set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// use onewrite::{ProducerKeys, SigningKey};
    /// let key = SigningKey::new(b"32 bytes that nobody else knows.")?;
    /// let relay = store.relay("rabbit").sign_with(key.clone()).spawn(broker.publisher())?;
    /// # store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to("", "payments")))?
    /// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
    /// let message = &broker.messages("payments")[0].message; // the first event, published
    /// assert!(ProducerKeys::new().key(&store.id(), key)?.verify(message).is_ok());
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn sign_with(mut self, key: SigningKey) -> Self {
        self.signing = Some(key);
        self
    }

    /// Publishes events to this exchange without AMQP's `mandatory`. Call it once for each such
    /// exchange. **Risk:** if no queue takes an event, the broker drops it and confirms it. The
    /// event counts as delivered, and nothing reports the loss.
    ///
    /// It is for exchanges that return events that they will deliver, such as `x-delayed-message`.
    /// A mandatory event would be published again and again, and quarantined, though each copy
    /// arrives. For single events see
    /// [`Event::may_be_unroutable`](crate::Event::may_be_unroutable).
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_exchange("delayed", onewrite::broker::ExchangeKind::Fanout);
    /// # use onewrite::Event;
    /// let relay = store.relay("rabbit").may_be_unroutable("delayed").spawn(broker.publisher())?;
    /// let receipt = store.write(|tx| tx.append(Event::bytes("remind", "1").to("delayed", "mails")))?;
    /// receipt.wait_confirmed(Duration::from_secs(5))?; // though nothing is bound
    /// # let _ = relay.stop(Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn may_be_unroutable(mut self, exchange: impl Into<String>) -> Self {
        self.may_be_unroutable.insert(exchange.into());
        self
    }

    /// Sets where a relay begins whose name the store does not know yet. The default is the oldest
    /// event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use onewrite::StartAt;
    /// let relay = store.relay("rabbit").start_at(StartAt::Newest).spawn(broker.publisher())?;
    /// assert_eq!(store.stats()?.relays["rabbit"].position, 0); // nothing was appended yet
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn start_at(mut self, start: StartAt) -> Self {
        self.start = start;
        self
    }

    /// Sets a rule that gives a destination to events that were recorded as unpublished. By
    /// default, these events stay in the log alone.
    ///
    /// The rule can publish a stream that was kept private, from any position on. Use a relay of a
    /// new name, this rule, and [`start_at`](Self::start_at).
    ///
    /// The relay asks the rule whenever it reads such an event. These events have no lane numbers,
    /// so their reader knows a repeat by the id. Keep the rule for as long as the relay has such
    /// events in hand. An event that waits for its next try goes to quarantine if the rule no
    /// longer names a destination for it.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("deposits", Default::default());
    /// use std::time::Duration;
    /// use onewrite::{Destination, Event, ExpectedRevision, StartAt};
    /// store.write(|tx| tx.stream("account-7").append([Event::bytes("deposited", "1")], ExpectedRevision::Any))?;
    /// let relay = store
    ///     .relay("history")
    ///     .start_at(StartAt::Position(0))
    ///     .publish_unpublished(|event| {
    ///         (event.category() == Some("account")).then(|| Destination::exchange("", "deposits"))
    ///     })
    ///     .spawn(broker.publisher())?;
    /// store.write(|tx| tx.append(Event::bytes("last", "").to("", "deposits")))?.wait_confirmed(Duration::from_secs(5))?;
    /// assert_eq!(broker.queue_len("deposits"), 2);
    /// # let _ = relay.stop(Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn publish_unpublished(
        mut self,
        rule: impl Fn(&RecordedEvent) -> Option<Destination> + Send + Sync + 'static,
    ) -> Self {
        self.unpublished = Some(Unpublished(Arc::new(rule)));
        self
    }

    fn check(&self) -> Result<(), SettingError> {
        let settings = &self.settings;
        let fail = |setting, reason: &str| Err(SettingError::new(setting, reason));
        match () {
            () if self.name.is_empty() || self.name.len() > SHORT_STRING_BYTES_MAX => {
                fail("name", "a relay's name is 1 to 255 bytes long")
            }
            () if settings.window_events == 0 || settings.window_events > WINDOW_EVENTS_MAX => {
                fail("window_events", "it must be 1 to 16384")
            }
            () if settings.rate_limit.is_some_and(|rate| rate == 0 || rate > RATE_LIMIT_MAX) => {
                fail("rate_limit", "it must be 1 to 1,000,000 events per second")
            }
            () if settings.window_bytes == 0 => fail("window_bytes", "it must be at least 1"),
            () if settings.attempts_max == 0 => fail("attempts", "it must be at least 1"),
            () if settings.destination_attempts_max == 0 => {
                fail("destination_attempts", "it must be at least 1")
            }
            () if settings.backoff_first_ms == 0 || settings.backoff_first_ms > settings.backoff_max_ms => {
                fail("backoff", "the first wait must be at least 1 ms and not above the longest")
            }
            () if self.may_be_unroutable.iter().any(|name| name.len() > SHORT_STRING_BYTES_MAX) => {
                fail("may_be_unroutable", "the name of an exchange is at most 255 bytes long")
            }
            () if self.app_id.as_ref().is_some_and(|id| id.len() > SHORT_STRING_BYTES_MAX) => {
                fail("app_id", "it is at most 255 bytes long")
            }
            () if self.source.as_ref().is_some_and(String::is_empty) => fail("source", "it is empty"),
            () => Ok(()),
        }
    }

    /// Starts the relay. A broker that is away is no error: the relay connects when it can.
    ///
    /// # Errors
    /// [`Error::Setting`] for a setting that cannot work, [`Error::RelayRunning`] for a name that
    /// runs already, or an error of the store.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// use onewrite::Error;
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// let second = store.relay("rabbit").spawn(broker.publisher());
    /// assert!(matches!(second, Err(Error::RelayRunning { .. })));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn spawn(mut self, mut publisher: impl Publisher) -> Result<Relay> {
        self.check()?;
        let cursor = self.store.cursor(&self.name, self.start)?;
        self.settings.seed = u64::from_le_bytes(fresh_uuid().last_chunk().copied().unwrap_or_default());
        let core = Arc::clone(self.store.core());
        let (grown, notified) = bounded(1);
        let (requests, requested) = unbounded();
        let status = Arc::new(Mutex::new(RelayStatus::default()));
        let port = RelayPort { grown, requests: requests.clone(), status: Arc::clone(&status) };
        core.relays.register(&self.name, port)?;
        // From here on the name is taken; dropping this frees the name if the start fails.
        let registered = Registered { store: self.store.clone(), name: self.name.clone() };
        let (events, published) = unbounded();
        // The log lines of the publisher's own threads belong to this relay too.
        let span = tracing::info_span!("relay", relay = %self.name);
        span.in_scope(|| publisher.start(crate::broker::PublisherEvents::to_relay(events)))?;
        let store_id = uuid_text(core.identity.store_id);
        let wire = Wire {
            spelling: self.spelling,
            source: self.source.unwrap_or_else(|| format!("/onewrite/{store_id}")).as_str().into(),
            app_id: self.app_id.as_deref().map(Text::from),
            store: store_id,
            epoch_starts: core.identity.epoch_starts.clone(),
            second: None,
            signing: self.signing,
        };
        let inputs = worker::Inputs { notified, requested, published };
        let publisher = Box::new(publisher);
        let form =
            worker::Form { wire, unpublished: self.unpublished, may_be_unroutable: self.may_be_unroutable };
        let worker =
            Worker::new(registered, cursor, self.settings, form, publisher, inputs, Arc::clone(&status))?;
        let (report, ended) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("onewrite-relay".into())
            .spawn(move || report.send(span.in_scope(|| worker.run())))
            .map_err(|source| Error::Thread { what: "relay", cause: source })?;
        let (owner, write_lock, thread) =
            (core.owner.clone(), Arc::clone(&core.write_lock), thread.thread().id());
        let (waking, ended) = (core.waking(), Some(ended));
        Ok(Relay { name: self.name, owner, write_lock, thread, requests, waking, ended, status })
    }
}
