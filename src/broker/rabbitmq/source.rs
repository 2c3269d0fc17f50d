//! [`RabbitMqSource`]: the settings and the handle of a queue's consumer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::broker::{DeliveryTag, Settlement, Source, SourceEvents};
use crate::error::SettingError;
use crate::limits::{BODY_BYTES_DEFAULT, PREFETCH_BYTES_DEFAULT, SHORT_STRING_BYTES_MAX};
use crate::process::keep;

use super::background::Background;
use super::consumer::{self, Settlements, Subscription};
use super::options::Options;
use super::topology::Topology;

/// Consumes one queue of RabbitMQ with manual acknowledgement.
///
/// Every delivery stays with the broker until it is settled; after a lost connection, a stop or a crash, the broker
/// delivers again what was not. A queue that is missing or gets deleted is reported as a
/// [`Down`](crate::broker::SourceEvent::Down) of class [`Destination`](crate::FaultClass::Destination) and tried again.
///
/// A delivery must be settled within the broker's `consumer_timeout`, 30 minutes unless set. Otherwise the broker ends the consuming, and
/// delivers again: up to RabbitMQ 4.2 it closes the channel, from 4.3 on it cancels the consumer of a quorum queue. Both are reported as a
/// [`Down`](crate::broker::SourceEvent::Down) of class [`Outage`](crate::FaultClass::Outage). See [`RabbitMq`](crate::broker::rabbitmq::RabbitMq) for what else differs.
///
/// A stream queue is refused at its first delivery: a [`Down`](crate::broker::SourceEvent::Down) of class [`Config`](crate::FaultClass::Config) names it.
/// Streams keep what is acknowledged; bind a classic or quorum queue to the same exchange instead.
///
/// What the AMQP client could not read comes all the same: text that is not UTF-8, tables nested too deep, headers larger than a
/// frame. Such a delivery says so in the header [`MENDED`](crate::wire::MENDED), or [`UNREADABLE`](crate::wire::UNREADABLE) where it
/// cannot be taken for what it is.
///
/// All fourteen properties come, and each header as the [`HeaderValue`](crate::HeaderValue) of its AMQP type; text that is not UTF-8
/// comes as `Bytes`. RabbitMQ's `x-death` is an array of tables.
///
/// ```no_run
/// use onewrite::broker::RabbitMqSource;
/// # fn main() -> Result<(), onewrite::SettingError> {
/// let source = RabbitMqSource::new("amqp://app:secret@localhost:5672/%2f", "ledger")?.connection_name("ledger");
/// # let _ = source;
/// # Ok(()) }
/// ```
pub struct RabbitMqSource {
    options: Options,
    queue: String,
    running: Option<(mpsc::UnboundedSender<Settlements>, Background)>,
    started: bool,
}

impl RabbitMqSource {
    /// A consumer of `queue` on the broker at `url`, which is written as in [`RabbitMq::new`](crate::broker::rabbitmq::RabbitMq::new).
    ///
    /// # Errors
    /// The URI cannot be understood, asks for TLS that is not compiled in, or the queue's name is empty or too long.
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// assert!(RabbitMqSource::new("amqp://localhost", "ledger").is_ok());
    /// assert!(RabbitMqSource::new("amqp://localhost", "").is_err());
    /// ```
    pub fn new(url: &str, queue: impl Into<String>) -> Result<Self, SettingError> {
        Self::with_brokers([url], queue)
    }

    /// A consumer of `queue` on whichever of these brokers can be reached; see
    /// [`RabbitMq::with_brokers`](crate::broker::rabbitmq::RabbitMq::with_brokers).
    ///
    /// # Errors
    /// As for [`new`](Self::new); or there is no URI, or more than [`BROKERS_MAX`](crate::limits::BROKERS_MAX).
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// let nodes = "amqp://localhost:5672,amqp://localhost:5673";
    /// assert!(RabbitMqSource::with_brokers(nodes.split(','), "ledger").is_ok());
    /// ```
    pub fn with_brokers(
        urls: impl IntoIterator<Item = impl AsRef<str>>,
        queue: impl Into<String>,
    ) -> Result<Self, SettingError> {
        let queue = queue.into();
        if queue.is_empty() || queue.len() > SHORT_STRING_BYTES_MAX {
            return Err(SettingError::new("queue", "its name must be 1 to 255 bytes long"));
        }
        let mut options = Options::new(urls)?;
        options.body_bytes_max = BODY_BYTES_DEFAULT;
        options.prefetch_bytes = PREFETCH_BYTES_DEFAULT;
        Ok(Self { options, queue, running: None, started: false })
    }

    /// Cap on the body of a delivery, in bytes; 128 MiB unless set ([`BODY_BYTES_DEFAULT`]).
    ///
    /// A larger body is not kept in memory: it is dropped as it comes. Its delivery comes without a body, with the header
    /// [`UNREADABLE`](crate::wire::UNREADABLE), which holds the body's length and CRC-32; a consumer rejects it.
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// let source = RabbitMqSource::new("amqp://localhost", "ledger")?.body_bytes_max(1 << 20);
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn body_bytes_max(mut self, bytes: u64) -> Self {
        self.options.body_bytes_max = bytes;
        self
    }

    /// Cap on the unsettled deliveries in memory, in bytes; 64 MiB unless set ([`PREFETCH_BYTES_DEFAULT`]).
    ///
    /// The consumer's `prefetch` counts deliveries, whatever their size. While those that are not settled take more than this,
    /// nothing more is read from the connection; TCP makes the broker wait. A delivery counts with its body and its headers, and
    /// each value of its headers with 64 bytes more. A delivery that has begun is read to its end. So memory holds this and one
    /// delivery more; behind a delivery larger than this nothing comes.
    ///
    /// While nothing is read, the end of the connection is noticed late: at the next settlement. A broker with a
    /// `send_timeout` among its `tcp_listen_options` ends a connection that is not read for that long, and delivers again.
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// let source = RabbitMqSource::new("amqp://localhost", "ledger")?.prefetch_bytes(16 << 20);
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn prefetch_bytes(mut self, bytes: u64) -> Self {
        self.options.prefetch_bytes = bytes;
        self
    }

    /// See [`RabbitMq::heartbeat`](crate::broker::rabbitmq::RabbitMq::heartbeat).
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::broker::RabbitMqSource;
    /// let source = RabbitMqSource::new("amqp://localhost", "ledger")?.heartbeat(Duration::from_secs(5));
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.options.heartbeat = Some(heartbeat);
        self
    }

    /// See [`RabbitMq::connection_name`](crate::broker::rabbitmq::RabbitMq::connection_name).
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// let source = RabbitMqSource::new("amqp://localhost", "ledger")?.connection_name("ledger"); // shown in the management page
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn connection_name(mut self, name: impl Into<String>) -> Self {
        self.options.connection_name = name.into();
        self
    }

    /// See [`RabbitMq::reconnect_backoff`](crate::broker::rabbitmq::RabbitMq::reconnect_backoff).
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::broker::RabbitMqSource;
    /// let source = RabbitMqSource::new("amqp://localhost", "ledger")?.reconnect_backoff(Duration::from_millis(200), Duration::from_secs(60));
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn reconnect_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.options.backoff = (first, max);
        self
    }

    /// See [`RabbitMq::declare`](crate::broker::rabbitmq::RabbitMq::declare).
    ///
    /// ```
    /// use onewrite::broker::{RabbitMqSource, Topology};
    /// let source = RabbitMqSource::new("amqp://localhost", "ledger")?.declare(Topology::new().queue("ledger"));
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn declare(mut self, topology: Topology) -> Self {
        self.options.topology = topology;
        self
    }

    /// See [`RabbitMq::tls`](crate::broker::rabbitmq::RabbitMq::tls).
    ///
    /// ```
    /// use onewrite::broker::{RabbitMqSource, Tls};
    /// let tls = Tls::new().server_name("rabbit.internal")?;
    /// let source = RabbitMqSource::new("amqps://app:secret@10.0.0.7", "ledger")?.tls(tls);
    /// # let _ = source;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: super::Tls) -> Self {
        self.options.tls = Some(tls);
        self
    }

    /// See [`RabbitMq::allow_plaintext_credentials`](crate::broker::rabbitmq::RabbitMq::allow_plaintext_credentials).
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// let source = RabbitMqSource::new("amqp://app:secret@10.0.0.7", "ledger")?.allow_plaintext_credentials();
    /// assert!(!format!("{source:?}").contains("secret"));
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn allow_plaintext_credentials(mut self) -> Self {
        self.options.plaintext_allowed = true;
        self
    }
}

/// Shows hosts, ports, virtual hosts and the queue only.
impl fmt::Debug for RabbitMqSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMqSource")
            .field("brokers", &self.options.targets)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl Source for RabbitMqSource {
    fn start(&mut self, events: SourceEvents, prefetch: u16) -> Result<(), SettingError> {
        self.options.check()?;
        if prefetch == 0 {
            return Err(SettingError::new("prefetch", "must be 1 or more; 0 would mean without bound"));
        }
        if self.options.topology.declares_stream(&self.queue) {
            return Err(SettingError::new("queue", "it is declared as a stream, which is not consumed"));
        }
        if std::mem::replace(&mut self.started, true) {
            return Err(SettingError::new("source", "it was started before"));
        }
        // Unbounded by its type, bounded by use: it carries settlements of deliveries, of which there are at most
        // `prefetch`, and the thread takes them out at once.
        let (settlements, inbox) = mpsc::unbounded_channel();
        let options = Arc::new(self.options.clone());
        let subscription =
            Subscription { queue: self.queue.clone(), prefetch, prefetch_bytes: self.options.prefetch_bytes };
        let background = Background::spawn("onewrite-amqp-in", move |stop| {
            consumer::run(options, subscription, inbox, events, stop)
        })?;
        self.running = Some((settlements, background));
        Ok(())
    }

    fn unsettled_bytes_max(&self) -> u64 {
        self.options.prefetch_bytes
    }

    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>) {
        if let Some((sender, _)) = &self.running {
            // It fails when the thread has ended: everything unsettled goes back then.
            let _ = sender.send(settlements);
        }
    }

    fn stop(&mut self, deadline: Duration) {
        if let Some((_, background)) = &self.running {
            background.stop(deadline);
        }
        self.let_go();
    }
}

impl RabbitMqSource {
    fn let_go(&mut self) {
        if let Some((settlements, background)) = self.running.take()
            && background.is_elsewhere()
        {
            keep(&settlements);
        }
    }
}

impl Drop for RabbitMqSource {
    fn drop(&mut self) {
        self.let_go();
    }
}
