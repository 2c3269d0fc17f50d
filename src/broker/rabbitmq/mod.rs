//! RabbitMQ, over AMQP 0-9-1: [`RabbitMq`] publishes, [`RabbitMqSource`] consumes.
//!
//! A publisher or source lives on one thread of its own, with a current-thread runtime. Nothing of
//! lapin or tokio is visible outside this folder. Each publisher or source owns its connection:
//! lapin's recovery is off, each connection is a new [`Epoch`], and no channel outlives an error.
//!
//! | file | contents |
//! |---|---|
//! | `uri`, `uri_text`, `options`, `topology` | the settings; only `uri` holds passwords |
//! | `background`, `failover`, `pace` | the thread and its stop; the next broker; the waits between attempts |
//! | `transport`, `tls` | the stream under a connection |
//! | `connection`, `classify`, `convert` | what is around lapin: deadlines, faults, messages |
//! | `inbound` | the bytes from the broker before lapin: mended, bounded, returns taken out |
//! | `publisher`, `window`, `isolated` | publishing |
//! | `settle`, `nacks` | which outcome belongs to which message; suspicious nacks; both are pure |
//! | `declare` | declares the topology, and distinguishes an unavailable queue from a refused one |
//! | `stream` | asks whether a queue is a stream |
//! | `cause` | why a message was returned |
//! | `source`, `consumer`, `acks`, `cancelled` | consuming; `acks` is pure |
//!
//! [`RabbitMq`] describes the differences between brokers of 3.10, 4.0 and 4.3;
//! `tests/it/rabbitmq4.rs` tests them.
//!
//! **Logs.** Log lines of this folder name host, virtual host, epoch and fault. lapin's thread logs
//! nothing; see `connection`. lapin's tasks on the publisher's or source's thread log little. At
//! `TRACE` they may show frames: keep the target `lapin` off `TRACE` in production.

mod acks;
mod background;
mod cancelled;
mod cause;
mod classify;
mod connection;
mod consumer;
mod convert;
mod declare;
mod failover;
mod inbound;
mod isolated;
mod nacks;
mod options;
mod pace;
mod prepared;
mod publisher;
mod refusal;
mod settle;
mod source;
mod stream;
#[cfg(feature = "tls")]
mod tls;
mod topology;
mod transport;
mod uri;
mod uri_text;
mod window;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};

use super::{Epoch, Publisher, PublisherEvent, PublisherEvents};
use crate::error::SettingError;
use crate::limits::WINDOW_EVENTS_MAX;
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};
use crate::process::keep;

use self::background::Background;
use self::options::Options;

#[cfg(fuzzing)]
pub(crate) use self::inbound::frames_of_a_broker;
pub use self::source::RabbitMqSource;
#[cfg(feature = "tls")]
pub use self::tls::Tls;
pub use self::topology::Topology;

/// Room for the largest window, and for what the channel still holds of an epoch that has just
/// ended.
const COMMANDS_MAX: usize = 2 * WINDOW_EVENTS_MAX;

/// Publishes to RabbitMQ: persistent, mandatory, confirmed.
///
/// [`Outcome::Confirmed`] is reported only if the broker confirmed the message and did not return
/// it. If a message's exchange is missing or forbidden to this user, the broker closes the channel.
/// The publisher reports that as a [`PublisherEvent::Down`] of class [`FaultClass::Destination`].
/// The relay then finds the poison message by resending in isolation.
///
/// Heartbeats keep the connection alive. After each failure the publisher connects again, with
/// jittered backoff.
///
/// A queue that overflows with `drop-head`, RabbitMQ's default, confirms a message and then deletes
/// an older one. No publisher can see that. Use `x-overflow: reject-publish`, which is reported as
/// [`Outcome::Nacked`].
///
/// If no queue takes a message, the broker returns the message, and the publisher reports
/// [`Outcome::Returned`]. RabbitMQ also returns a message if the node of its queue is down. So the
/// If no queue takes a message, the broker returns the message, and the publisher reports
/// [`Outcome::Returned`]. RabbitMQ also returns a message if the node of its queue is down. So the
/// publisher asks whether the queue exists before it reports the return. The publisher can ask on
/// the default exchange, and where [`declare`](Self::declare) or [`Topology::bound_elsewhere`] name
/// the queue. If the queue exists, the fault is an outage, and the event consumes no attempt.
/// the broker nacks the message although the other queues have it. Each retry gives these other
/// queues one more copy. So the relay suspends a destination after 8 nacks in a row. The relay then
/// tries one event at a time, and the wait grows to ten times the longest
/// [`backoff`](crate::RelayBuilder::backoff).
/// [`RelayStatus::suspended`](crate::RelayStatus::suspended) names the destination. Consumers drop
/// repeats by id. To avoid repeats, give a queue that may be full an exchange of its own.
///
/// # RabbitMQ 4
/// RabbitMQ 3.10, 4.0 and 4.3 are tested. The differences are:
///
/// | what | 3.10 | 4.0 | 4.3 |
/// |---|---|---|---|
/// | largest message unless set (`max_message_size`) | 128 MiB | 16 MiB | 16 MiB |
/// | redeliveries of a quorum queue (`x-delivery-limit`) | any number | 20 | 20 |
/// | a delivery held over `consumer_timeout` (30 min) | channel closed | channel closed | see below |
/// | an event for a classic queue whose node is down | returned | nacked | nacked |
/// | the answer to the declaration of such a queue | at once | after a minute | after a minute |
/// | policies for mirrored queues (`ha-mode`) | taken | refused | refused |
/// | where declarations are kept | Mnesia | Mnesia, or Khepri | Khepri |
///
/// - **The largest event fits into 16 MiB**
///   ([`PAYLOAD_BYTES_MAX`](crate::limits::PAYLOAD_BYTES_MAX)). If the broker has a smaller
///   `max_message_size`, the relay quarantines larger events with the broker's reason. Keep
///   [`payload_bytes_max`](crate::StoreBuilder::payload_bytes_max) below that size.
/// - **The delivery limit** drops a message after its 21st delivery, or sends it to the queue's
///   dead-letter exchange. Lost connections count as well. Set a dead-letter exchange, or set
///   `x-delivery-limit` to -1.
/// - **A delivery held too long**: in 4.3 a quorum queue cancels the consumer, and a classic queue
///   waits. A consumer that was cut off connects again and recognises what it has applied. Its
///   fault names the timeout.
/// - **Mirrored queues** no longer exist. Quorum queues keep copies on several nodes, on 3.10 too.
/// - **A classic queue whose node is down** has its events nacked, as a full queue has. The relay
///   suspends the destination and tries it from time to time. If an exchange leads to other queues
///   too, each trial gives these queues one more copy. A publisher that [declares](Self::declare)
///   such queues waits 4 to 6 s for the answers at each connection, for any number of such queues.
///   The publisher then connects without the answers.
/// - **Khepri** has a declaration on disk before the broker answers. Mnesia writes later: if the
///   broker is killed within a second of a queue's declaration, the queue and its confirmed
///   messages may be lost.
/// - **Khepri declares nothing without a majority of the nodes.** The declarations of
///   [`declare`](Self::declare) then wait, and the publisher connects once the majority is back.
///   What is already declared continues to work.
///
/// ```no_run
/// use std::time::Duration;
/// use onewrite::broker::{RabbitMq, Topology};
///
/// # fn main() -> Result<(), onewrite::SettingError> {
/// let publisher = RabbitMq::new("amqp://app:secret@localhost:5672/%2f")?
///     .connection_name("ledger")
///     .heartbeat(Duration::from_secs(10))
///     .require_exchange("payments");
/// # let _ = publisher;
/// # Ok(()) }
/// ```
pub struct RabbitMq {
    options: Options,
    running: Option<Running>,
    started: bool,
}

struct Running {
    commands: mpsc::Sender<publisher::Command>,
    suspects: mpsc::Sender<Outgoing>,
    events: PublisherEvents,
    /// The epoch that is up, or 0.
    current: Arc<AtomicU64>,
    background: Background,
}

impl RabbitMq {
    /// Returns a publisher for the broker at `amqp://user:password@host:port/vhost`.
    ///
    /// After the scheme only the host is required. User and password go together and default to
    /// `guest`. The port defaults to 5672, or to 5671 with `amqps`. The virtual host defaults to
    /// `/`. `amqp://host/` names the virtual host with the empty name, as AMQP URIs do. The only
    /// query parameter is `heartbeat`, in seconds.
    ///
    /// The text is read strictly. Special characters are percent-encoded: a `/` in a password is
    /// `%2F`, an `@` is `%40`. Spaces, control characters and text outside ASCII are refused. A
    /// user without a password is refused too.
    ///
    /// # Errors
    /// The URI cannot be understood, or asks for TLS that is not compiled in. The error's text
    /// shows nothing of the URI.
    ///
    /// ```
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://app:secret@10.0.0.7/orders")?;
    /// assert!(!format!("{publisher:?}").contains("secret"));
    /// assert!(RabbitMq::new("http://example.org").is_err());
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    pub fn new(url: &str) -> Result<Self, SettingError> {
        Self::with_brokers([url])
    }

    /// Returns a publisher that uses any reachable broker of a list: the nodes of a cluster, or a
    /// broker and its spare. Each URI is written as in [`new`](Self::new) and has its own
    /// credentials, virtual host and scheme.
    ///
    /// - The publisher tries the brokers in the order of the list, round and round. It keeps the
    ///   broker that takes the connection until that broker fails, and then tries the next broker
    ///   at once.
    /// - The publisher waits only after a whole round has failed
    ///   ([`reconnect_backoff`](Self::reconnect_backoff)).
    /// - If a broker refuses the publisher (wrong password, unknown authority), the publisher tries
    ///   the other brokers and skips the refusing broker for about 30 s.
    /// - Each broker has 10 s ([`CONNECT_MS_MAX`](crate::limits::CONNECT_MS_MAX)) to answer. So
    ///   each try of a broker behind a dead network takes 10 s.
    /// - Names are looked up anew at each attempt. Every fault names its broker.
    ///
    /// The relay publishes again on the next broker what was unconfirmed on the broker before.
    /// Brokers of different clusters know nothing of each other's queues: consumers must then read
    /// from all of them.
    ///
    /// # Errors
    /// As for [`new`](Self::new); or the list is empty, or has more than
    /// [`BROKERS_MAX`](crate::limits::BROKERS_MAX) URIs.
    ///
    /// ```
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::with_brokers(["amqp://app:secret@10.0.0.7", "amqp://app:secret@10.0.0.8"])?;
    /// assert!(RabbitMq::with_brokers([""; 0]).is_err());
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    pub fn with_brokers(urls: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, SettingError> {
        Ok(Self { options: Options::new(urls)?, running: None, started: false })
    }

    /// The interval at which each side shows that it is alive: whole seconds, 10 by default.
    ///
    /// A dead peer is noticed within twice that time. If the broker's own value is lower, the
    /// broker's value counts.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.heartbeat(Duration::from_secs(5));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.options.heartbeat = Some(heartbeat);
        self
    }

    /// The longest time that a confirm may take, 60 s by default.
    ///
    /// After that time the message is [silent](Outcome::Silent), and the relay suspends its
    /// destination. If no younger message has a confirm either, the publisher connects again. Time
    /// during which the broker blocks publishers does not count.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.confirm_deadline(Duration::from_secs(30));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn confirm_deadline(mut self, deadline: Duration) -> Self {
        self.options.confirm_deadline = deadline;
        self
    }

    /// The name that the broker shows for the connection, `onewrite` by default.
    ///
    /// ```
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.connection_name("ledger"); // shown in the management page
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn connection_name(mut self, name: impl Into<String>) -> Self {
        self.options.connection_name = name.into();
        self
    }

    /// The first and the longest wait between connection attempts, 0.1 s and 30 s by default.
    ///
    /// The waits double, with jitter. They start over once a connection has lasted 5 s or had a
    /// confirm. After a refusal that waiting does not heal (wrong password, missing virtual host or
    /// exchange) the wait is always about 30 s.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.reconnect_backoff(Duration::from_millis(200), Duration::from_secs(60));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn reconnect_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.options.backoff = (first, max);
        self
    }

    /// Checks at each connect that this exchange exists.
    ///
    /// While the exchange is missing, nothing is published, and a fault of class
    /// [`FaultClass::Config`] reports it.
    ///
    /// ```
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.require_exchange("payments");
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn require_exchange(mut self, exchange: impl Into<String>) -> Self {
        self.options.required_exchanges.push(exchange.into());
        self
    }

    /// Declares exchanges, queues and bindings at each connect. Without this call nothing is
    /// declared.
    ///
    /// ```
    /// use onewrite::broker::{RabbitMq, Topology};
    /// let publisher = RabbitMq::new("amqp://localhost")?.declare(Topology::new().queue("ledger"));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn declare(mut self, topology: Topology) -> Self {
        self.options.topology = topology;
        self
    }

    /// How `amqps://` connections are secured. The default is [`Tls::new`].
    ///
    /// ```
    /// use onewrite::broker::{RabbitMq, Tls};
    /// let publisher = RabbitMq::new("amqps://app:secret@10.0.0.7")?.tls(Tls::new().server_name("rabbit.internal")?);
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.options.tls = Some(tls);
        self
    }

    /// Allows `amqp://` to a host other than this machine. The password then travels in plain text,
    /// so use this only inside a tunnel or a private network.
    ///
    /// ```
    /// use onewrite::broker::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://app:secret@10.0.0.7")?.allow_plaintext_credentials();
    /// assert!(!format!("{publisher:?}").contains("secret"));
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn allow_plaintext_credentials(mut self) -> Self {
        self.options.plaintext_allowed = true;
        self
    }
}

/// Shows hosts, ports and virtual hosts only.
impl fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq").field("brokers", &self.options.targets).finish_non_exhaustive()
    }
}

impl Publisher for RabbitMq {
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
        self.options.check()?;
        if std::mem::replace(&mut self.started, true) {
            return Err(SettingError::new("publisher", "it was started before"));
        }
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (suspects, suspect_inbox) = mpsc::channel(COMMANDS_MAX);
        let current = Arc::new(AtomicU64::new(0));
        let background = Background::spawn("onewrite-amqp", {
            let (options, events, current) =
                (Arc::new(self.options.clone()), events.clone(), Arc::clone(&current));
            move |stop| async move {
                let isolation = Arc::new(isolated::Isolation::default());
                let isolated = tokio::spawn(isolated::run(
                    Arc::clone(&options),
                    suspect_inbox,
                    events.clone(),
                    Arc::clone(&isolation),
                    stop.clone(),
                ));
                publisher::run(options, inbox, events, current, isolation, stop).await;
                // The isolated task ends for the same reasons; its messages still need their
                // outcomes.
                let _ = isolated.await;
            }
        })?;
        self.running = Some(Running { commands, suspects, events, current, background });
        Ok(())
    }

    fn publish(&mut self, epoch: Epoch, outgoing: Outgoing) {
        let Some(running) = &self.running else { return };
        let ticket = outgoing.ticket;
        if outgoing.isolated {
            if running.suspects.try_send(outgoing).is_err() {
                running.unknown(ticket, "no room for another isolated message, or the publisher has ended");
            }
            return;
        }
        // A full queue holds more than any window: a fault of the caller. The call does not wait,
        // and no ticket is lost.
        if let Err(TrySendError::Full(_)) = running.commands.try_send((epoch, outgoing))
            && running.current.load(Ordering::Acquire) == epoch.0
        {
            running.unknown(ticket, "more messages at once than the largest window");
        }
    }

    fn stop(&mut self, deadline: Duration) {
        if let Some(running) = self.running.take() {
            running.background.stop(deadline);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.background.is_elsewhere() {
            keep(&self.commands);
            keep(&self.suspects);
            keep(&self.events);
        }
    }
}

impl Running {
    fn unknown(&self, ticket: Ticket, text: &str) {
        let outcome = Outcome::Unknown(Fault::new(FaultClass::Outage, text));
        self.events.send(PublisherEvent::Outcomes(vec![(ticket, outcome)]));
    }
}
