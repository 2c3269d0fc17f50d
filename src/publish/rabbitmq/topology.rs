//! What is declared on the broker, when the application asks for it.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ExchangeKind as LapinKind};
use tracing::debug;

use crate::limits::CAUSE_QUEUES_MAX;
use crate::message::{Fault, FaultClass, HeaderValue};
use crate::publish::ExchangeKind;
use crate::publish::memory::topic_matches;

use super::classify::{Phase, classify, is_away};
use super::convert::{short, to_table};

/// Exchanges, queues and bindings to declare at each connect. All durable, none exclusive, none auto-deleted.
///
/// Declaring is idempotent where everything is as declared. Where something of the same name differs, the broker
/// refuses (406), nothing is changed, and the fault is told as a [`FaultClass::Config`] fault. Nothing is ever deleted.
///
/// ```
/// use onewrite::publish::{ExchangeKind, Topology};
/// let topology = Topology::new()
///     .exchange("payments", ExchangeKind::Topic)
///     .queue_with("ledger", [("x-max-length", 100_000.into()), ("x-overflow", "reject-publish".into())])
///     .bind("payments", "ledger", "payment.#");
/// # let _ = topology;
/// ```
#[derive(Debug, Clone, Default)]
pub struct Topology {
    exchanges: Vec<(String, ExchangeKind)>,
    queues: Vec<(String, Vec<(String, HeaderValue)>)>,
    bindings: Vec<Binding>,
}

#[derive(Debug, Clone)]
struct Binding {
    exchange: String,
    queue: String,
    routing_key: String,
    /// Others make it.
    elsewhere: bool,
}

impl Topology {
    /// Nothing to declare.
    ///
    /// ```
    /// use onewrite::publish::Topology;
    /// assert_eq!(format!("{:?}", Topology::new()), format!("{:?}", Topology::default()));
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A durable exchange.
    ///
    /// ```
    /// use onewrite::publish::{ExchangeKind, Topology};
    /// let topology = Topology::new().exchange("payments", ExchangeKind::Topic);
    /// assert!(format!("{topology:?}").contains("payments"));
    /// ```
    #[must_use]
    pub fn exchange(mut self, name: impl Into<String>, kind: ExchangeKind) -> Self {
        self.exchanges.push((name.into(), kind));
        self
    }

    /// A durable queue of the broker's default kind.
    ///
    /// ```
    /// use onewrite::publish::Topology;
    /// let topology = Topology::new().queue("ledger");
    /// assert!(format!("{topology:?}").contains("ledger"));
    /// ```
    #[must_use]
    pub fn queue(self, name: impl Into<String>) -> Self {
        self.queue_with(name, [])
    }

    /// A durable queue with arguments, for example `x-queue-type`, `x-max-length`, `x-overflow`,
    /// `x-dead-letter-exchange`. An overflow of `drop-head`, RabbitMQ's default, confirms a message and then deletes
    /// an older one: use `reject-publish` where nothing may be lost.
    ///
    /// ```
    /// use onewrite::publish::Topology;
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

    /// A binding of a queue to an exchange.
    ///
    /// ```
    /// use onewrite::publish::Topology;
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

    /// A binding that others make: nothing of it is declared. It says which queue takes what is published there. Where RabbitMQ returns an
    /// event, the publisher asks for that queue. If its node is down, that is an outage, and the event spends no attempt.
    ///
    /// AMQP cannot list bindings. So the publisher knows those that are named here or by [`bind`](Self::bind), and those of the default
    /// exchange, where the routing key is the queue's name.
    ///
    /// ```
    /// use onewrite::publish::{RabbitMq, Topology};
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

    /// The queues that are known to take what is published so, a few at most.
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
                    // Of an exchange that is declared elsewhere the kind is unknown.
                    Some(ExchangeKind::Fanout) | None => true,
                }
        };
        let mut queues: Vec<_> = self.bindings.iter().filter(takes).map(|b| b.queue.as_str()).collect();
        queues.sort_unstable();
        queues.dedup();
        queues.truncate(CAUSE_QUEUES_MAX);
        queues
    }

    /// Whether it declares this queue as a stream.
    pub(super) fn declares_stream(&self, queue: &str) -> bool {
        let is_stream = |(name, value): &(String, HeaderValue)| {
            name == "x-queue-type" && value.as_text() == Some("stream")
        };
        self.queues.iter().any(|(name, arguments)| name == queue && arguments.iter().any(is_stream))
    }

    /// The bindings that are ours to make.
    fn declared(&self) -> impl Iterator<Item = &Binding> {
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

    /// Opens the connection's channel, declares everything on it, and checks that the `required` exchanges exist. A broker may allow
    /// one channel alone, and one that is closing still counts: so there is no other for this.
    pub(super) async fn set_up(
        &self,
        connection: &Connection,
        required: &[String],
    ) -> Result<Channel, Fault> {
        let mut channel = open_channel(connection).await?;
        self.declare(connection, &mut channel).await?;
        for exchange in required.iter().filter(|name| !name.is_empty()) {
            let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            channel
                .exchange_declare(
                    short("exchange", exchange)?,
                    LapinKind::Direct,
                    options,
                    FieldTable::default(),
                )
                .await
                .map_err(|error| naming(&error, "exchange", exchange))?;
        }
        Ok(channel)
    }

    /// A queue whose node is down is there: it is left as it is, and what is for other queues need not wait for it.
    async fn declare(&self, connection: &Connection, channel: &mut Channel) -> Result<(), Fault> {
        for (name, kind) in &self.exchanges {
            let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
            let kind = match kind {
                ExchangeKind::Direct => LapinKind::Direct,
                ExchangeKind::Fanout => LapinKind::Fanout,
                ExchangeKind::Topic => LapinKind::Topic,
            };
            channel
                .exchange_declare(short("exchange", name)?, kind, options, FieldTable::default())
                .await
                .map_err(|error| naming(&error, "exchange", name))?;
        }
        for (name, arguments) in &self.queues {
            let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            let declared = channel.queue_declare(short("queue", name)?, options, to_table(arguments)?).await;
            if let Err(error) = declared {
                unless_away(naming(&error, "queue", name))?;
                *channel = open_channel(connection).await?;
            }
        }
        for Binding { exchange, queue, routing_key, .. } in self.declared() {
            let bound = channel
                .queue_bind(
                    short("queue", queue)?,
                    short("exchange", exchange)?,
                    short("routing_key", routing_key)?,
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await;
            if let Err(error) = bound {
                unless_away(naming(&error, "binding of queue", queue))?;
                *channel = open_channel(connection).await?;
            }
        }
        Ok(())
    }
}

async fn open_channel(connection: &Connection) -> Result<Channel, Fault> {
    connection.create_channel().await.map_err(|error| classify(&error, Phase::Connect))
}

/// The fault, unless it is that a queue exists and cannot be reached now.
fn unless_away(fault: Fault) -> Result<(), Fault> {
    if !fault.code.is_some_and(|code| is_away(code, &fault.text)) {
        return Err(fault);
    }
    debug!(%fault, "a queue to declare is away");
    Ok(())
}

/// What the broker refuses to set up is a matter of configuration, whatever its code; a lost connection is not.
fn naming(error: &lapin::Error, what: &str, name: &str) -> Fault {
    let mut fault = classify(error, Phase::SetUp);
    if fault.class == FaultClass::Config {
        fault.text = format!("{what} `{name}`: {}", fault.text);
    }
    fault
}
