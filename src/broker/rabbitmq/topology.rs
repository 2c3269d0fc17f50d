//! What is declared on the broker, if the application asks for it.

use crate::broker::ExchangeKind;
use crate::broker::memory::topic_matches;
use crate::message::HeaderValue;
use crate::tuning::CAUSE_QUEUES_MAX;

/// Exchanges, queues and bindings to declare at each connect. All are durable, none is exclusive or
/// auto-deleted.
///
/// To declare something again changes nothing if it is the same. If something of the same name
/// differs, the broker refuses (406) and changes nothing. The fault is then reported as a
/// [`Config`](crate::FaultClass::Config) fault. Nothing is ever deleted.
///
/// ```
/// use onewrite::broker::{ExchangeKind, Topology};
/// let topology = Topology::new()
///     .exchange("payments", ExchangeKind::Topic)
///     .queue_with("ledger", [("x-max-length", 100_000.into()), ("x-overflow", "reject-publish".into())])
///     .bind("payments", "ledger", "payment.#");
/// # let _ = topology;
/// ```
#[derive(Debug, Clone, Default)]
pub struct Topology {
    pub(super) exchanges: Vec<(String, ExchangeKind)>,
    pub(super) queues: Vec<(String, Vec<(String, HeaderValue)>)>,
    bindings: Vec<Binding>,
}

#[derive(Debug, Clone)]
pub(super) struct Binding {
    pub(super) exchange: String,
    pub(super) queue: String,
    pub(super) routing_key: String,
    /// The binding is made elsewhere and not declared.
    elsewhere: bool,
}

impl Topology {
    /// Returns an empty topology: nothing to declare.
    ///
    /// ```
    /// use onewrite::broker::Topology;
    /// assert_eq!(format!("{:?}", Topology::new()), format!("{:?}", Topology::default()));
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a durable exchange.
    ///
    /// ```
    /// use onewrite::broker::{ExchangeKind, Topology};
    /// let topology = Topology::new().exchange("payments", ExchangeKind::Topic);
    /// assert!(format!("{topology:?}").contains("payments"));
    /// ```
    #[must_use]
    pub fn exchange(mut self, name: impl Into<String>, kind: ExchangeKind) -> Self {
        self.exchanges.push((name.into(), kind));
        self
    }

    /// Adds a durable queue of the broker's default kind.
    ///
    /// ```
    /// use onewrite::broker::Topology;
    /// let topology = Topology::new().queue("ledger");
    /// assert!(format!("{topology:?}").contains("ledger"));
    /// ```
    #[must_use]
    pub fn queue(self, name: impl Into<String>) -> Self {
        self.queue_with(name, [])
    }

    /// Adds a durable queue with arguments, for example `x-queue-type`, `x-max-length`,
    /// `x-overflow`, `x-dead-letter-exchange`.
    ///
    /// An overflow of `drop-head`, RabbitMQ's default, confirms a message and then deletes an older
    /// message. Use `reject-publish` if no message may be lost.
    ///
    /// ```
    /// use onewrite::broker::Topology;
    /// let topology = Topology::new().queue_with("ledger", [("x-overflow", "reject-publish".into())]);
    /// assert!(format!("{topology:?}").contains("x-overflow"));
    /// ```
    #[must_use]
    pub fn queue_with<'a>(
        mut self,
        name: impl Into<String>,
        arguments: impl IntoIterator<Item = (&'a str, HeaderValue)>,
    ) -> Self {
        let arguments = arguments.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        self.queues.push((name.into(), arguments));
        self
    }

    /// Adds a binding of a queue to an exchange.
    ///
    /// ```
    /// use onewrite::broker::Topology;
    /// let topology = Topology::new().queue("ledger").bind("payments", "ledger", "payment.#");
    /// assert!(format!("{topology:?}").contains("payment.#"));
    /// ```
    #[must_use]
    pub fn bind(
        mut self,
        exchange: impl Into<String>,
        queue: impl Into<String>,
        routing_key: impl Into<String>,
    ) -> Self {
        self.bindings.push(Binding {
            exchange: exchange.into(),
            queue: queue.into(),
            routing_key: routing_key.into(),
            elsewhere: false,
        });
        self
    }

    /// Names a binding that is made elsewhere: nothing of the binding is declared.
    ///
    /// The binding tells the publisher which queue takes what is published there. If RabbitMQ
    /// returns an event, the publisher asks for that queue. If the queue's node is down, that is an
    /// outage, and the event consumes no attempt.
    ///
    /// AMQP cannot list bindings. So the publisher knows the bindings that are named here or by
    /// [`bind`](Self::bind), and those of the default exchange, where the routing key is the
    /// queue's name.
    ///
    /// ```
    /// use onewrite::broker::{RabbitMq, Topology};
    /// # fn main() -> Result<(), onewrite::SettingError> {
    /// let topology = Topology::new().bound_elsewhere("payments", "ledger", "payment.#");
    /// let publisher = RabbitMq::new("amqp://localhost")?.declare(topology);
    /// # let _ = publisher;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn bound_elsewhere(
        mut self,
        exchange: impl Into<String>,
        queue: impl Into<String>,
        routing_key: impl Into<String>,
    ) -> Self {
        self = self.bind(exchange, queue, routing_key);
        if let Some(binding) = self.bindings.last_mut() {
            binding.elsewhere = true;
        }
        self
    }

    /// Returns the queues, at most a few, that the topology names for this exchange and routing
    /// key.
    pub(super) fn queues_of<'a>(&'a self, exchange: &'a str, routing_key: &'a str) -> Vec<&'a str> {
        if exchange.is_empty() {
            return vec![routing_key];
        }
        let kind = self.exchanges.iter().find(|(name, _)| name == exchange).map(|(_, kind)| *kind);
        let takes = |binding: &&Binding| {
            let pattern = binding.routing_key.as_str();
            binding.exchange == exchange
                && match kind {
                    Some(ExchangeKind::Direct) => pattern == routing_key,
                    Some(ExchangeKind::Topic) => topic_matches(pattern, routing_key),
                    // The kind of an exchange that is declared elsewhere is unknown.
                    Some(ExchangeKind::Fanout) | None => true,
                }
        };
        let mut queues: Vec<_> = self.bindings.iter().filter(takes).map(|b| b.queue.as_str()).collect();
        queues.sort_unstable();
        queues.dedup();
        queues.truncate(CAUSE_QUEUES_MAX);
        queues
    }

    /// Whether the topology declares this queue as a stream.
    pub(super) fn declares_stream(&self, queue: &str) -> bool {
        let is_stream = |(name, value): &(String, HeaderValue)| {
            name == "x-queue-type" && value.as_text() == Some("stream")
        };
        self.queues.iter().any(|(name, arguments)| name == queue && arguments.iter().any(is_stream))
    }

    /// The bindings to declare.
    pub(super) fn declared(&self) -> impl Iterator<Item = &Binding> {
        self.bindings.iter().filter(|binding| !binding.elsewhere)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        let exchanges = self.exchanges.iter().map(|(name, _)| name);
        let queues = self.queues.iter().flat_map(|(name, arguments)| {
            std::iter::once(name).chain(arguments.iter().map(|(name, _)| name))
        });
        let bindings = self.bindings.iter().flat_map(|b| [&b.exchange, &b.queue, &b.routing_key]);
        exchanges.chain(queues).chain(bindings)
    }
}
