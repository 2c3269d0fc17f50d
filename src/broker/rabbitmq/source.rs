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
/// Every delivery stays with the broker until it is settled. After a lost connection, a stop or a
/// crash, the broker delivers unsettled messages again. A queue that is missing or gets deleted is
/// reported as a [`Down`](crate::broker::SourceEvent::Down) of class
/// [`Destination`](crate::FaultClass::Destination). The source then tries again.
///
/// A delivery must be settled within the broker's `consumer_timeout`, 30 minutes by default.
/// Otherwise the broker ends the consuming and delivers again. Up to RabbitMQ 4.2 the broker closes
/// the channel; from 4.3 on it cancels the consumer of a quorum queue. The source reports both as a
/// [`Down`](crate::broker::SourceEvent::Down) of class [`Outage`](crate::FaultClass::Outage). See
/// [`RabbitMq`](crate::broker::rabbitmq::RabbitMq) for other differences.
///
/// A stream queue is refused at its first delivery: a [`Down`](crate::broker::SourceEvent::Down) of
/// class [`Config`](crate::FaultClass::Config) names the queue. Streams keep acknowledged messages;
/// bind a classic or quorum queue to the same exchange instead.
///
/// Messages that the AMQP client could not read are delivered too: text that is not UTF-8, tables
/// nested too deep, headers larger than a frame. Such a delivery has the header
/// [`MENDED`](crate::wire::MENDED). If a part is missing, or the message cannot be identified, the
/// header is [`UNREADABLE`](crate::wire::UNREADABLE).
///
/// All fourteen properties are delivered, and each header as the
/// [`HeaderValue`](crate::HeaderValue) of its AMQP type. Text that is not UTF-8 is given as
/// `Bytes`. RabbitMQ's `x-death` is an array of tables.
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
    /// Returns a consumer of `queue` on the broker at `url`, which is written as in
    /// [`RabbitMq::new`](crate::broker::rabbitmq::RabbitMq::new).
    ///
    /// # Errors
    /// The URI cannot be understood or asks for TLS that is not compiled in, or the queue's name is
    /// empty or too long.
    ///
    /// ```
    /// use onewrite::broker::RabbitMqSource;
    /// assert!(RabbitMqSource::new("amqp://localhost", "ledger").is_ok());
    /// assert!(RabbitMqSource::new("amqp://localhost", "").is_err());
    /// ```
    pub fn new(url: &str, queue: impl Into<String>) -> Result<Self, SettingError> {
        Self::with_brokers([url], queue)
    }

    /// Returns a consumer of `queue` on any reachable broker of a list; see
    /// [`RabbitMq::with_brokers`](crate::broker::rabbitmq::RabbitMq::with_brokers).
    ///
    /// # Errors
    /// As for [`new`](Self::new); or the list is empty, or has more than
    /// [`BROKERS_MAX`](crate::limits::BROKERS_MAX) URIs.
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

    /// The largest body of a delivery, in bytes; 128 MiB by default ([`BODY_BYTES_DEFAULT`]).
    ///
    /// A larger body is dropped while it is read, not kept in memory. Its delivery has no body, but
    /// the header [`UNREADABLE`](crate::wire::UNREADABLE) with the body's length and CRC-32. A
    /// consumer rejects such a delivery.
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

    /// The most bytes of unsettled deliveries in memory; 64 MiB by default
    /// ([`PREFETCH_BYTES_DEFAULT`]).
    ///
    /// The consumer's `prefetch` counts deliveries of any size. While unsettled deliveries take
    /// more than this number of bytes, nothing more is read from the connection, and TCP makes the
    /// broker wait. A delivery counts with its body and its headers, and with 64 bytes more for
    /// each value of its headers.
    ///
    /// A delivery that has begun is read to its end. So memory holds at most this number of bytes
    /// plus one delivery. While a delivery larger than this number is unsettled, no other delivery
    /// comes.
    ///
    /// While nothing is read, the end of the connection is noticed late: at the next settlement. A
    /// broker with a `send_timeout` among its `tcp_listen_options` ends a connection that is not
    /// read for that long, and delivers again.
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

    /// The interval of heartbeats. See
    /// [`RabbitMq::heartbeat`](crate::broker::rabbitmq::RabbitMq::heartbeat).
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

    /// The name that the broker shows. See
    /// [`RabbitMq::connection_name`](crate::broker::rabbitmq::RabbitMq::connection_name).
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

    /// The waits between connection attempts. See
    /// [`RabbitMq::reconnect_backoff`](crate::broker::rabbitmq::RabbitMq::reconnect_backoff).
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

    /// Declares a topology at each connect. See
    /// [`RabbitMq::declare`](crate::broker::rabbitmq::RabbitMq::declare).
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

    /// How `amqps://` connections are secured. See
    /// [`RabbitMq::tls`](crate::broker::rabbitmq::RabbitMq::tls).
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

    /// Allows `amqp://` to another machine. See
    /// [`RabbitMq::allow_plaintext_credentials`](crate::broker::rabbitmq::RabbitMq::allow_plaintext_credentials).
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

/// Shows only hosts, ports, virtual hosts and the queue.
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
        // The channel is unbounded by its type but bounded by use: it carries settlements of at
        // most `prefetch` deliveries, and the thread takes them out at once.
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
            // The send fails if the thread has ended: everything unsettled then goes back.
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
