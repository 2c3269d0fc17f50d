//! The broker of the story: one in this process, or the RabbitMQ of `AMQP_URL`.

use std::time::{Duration, Instant};

use onewrite::broker::{Delivery, MemoryBroker, RabbitMq, RabbitMqSource, Topology};
use onewrite::{BoxError, Consumer, ConsumerBuilder, Relay, RelayBuilder, Result, Transaction};

/// A broker with one queue, of this run's own.
pub(crate) struct Broker {
    kind: Kind,
    pub(crate) queue: String,
}

enum Kind {
    InProcess(MemoryBroker),
    RabbitMq(String),
}

impl Broker {
    pub(crate) fn choose(name: &str) -> Self {
        let queue = format!("onewrite-{name}-{}", std::process::id());
        let url = std::env::var("AMQP_URL").ok().filter(|url| !url.is_empty());
        let kind = url.map_or_else(
            || {
                let broker = MemoryBroker::new();
                broker.declare_queue(&queue, Default::default());
                Kind::InProcess(broker)
            },
            Kind::RabbitMq,
        );
        Self { kind, queue }
    }

    pub(crate) fn describe(&self) -> &'static str {
        match self.kind {
            Kind::InProcess(_) => "an in-process broker (set AMQP_URL for a RabbitMQ)",
            Kind::RabbitMq(_) => "the RabbitMQ of AMQP_URL",
        }
    }

    pub(crate) fn publish(&self, relay: RelayBuilder) -> Result<Relay, BoxError> {
        Ok(match &self.kind {
            Kind::InProcess(broker) => relay.spawn(broker.publisher())?,
            Kind::RabbitMq(url) => relay.spawn(RabbitMq::new(url)?.declare(self.topology()))?,
        })
    }

    pub(crate) fn consume<F>(&self, consumer: ConsumerBuilder, handler: F) -> Result<Consumer, BoxError>
    where
        F: Fn(&Delivery, &Transaction) -> Result<()> + Send + Sync + 'static,
    {
        Ok(match &self.kind {
            Kind::InProcess(broker) => consumer.spawn(broker.source(&self.queue), handler)?,
            Kind::RabbitMq(url) => {
                consumer.spawn(RabbitMqSource::new(url, &self.queue)?.declare(self.topology()), handler)?
            }
        })
    }

    /// The broker removes the queue some minutes after its last use: we leave nothing behind.
    fn topology(&self) -> Topology {
        Topology::new().queue_with(&self.queue, [("x-expires", 300_000.into())])
    }
}

/// Waits until `done`, a minute at most. Returns whether `done` was reached.
pub(crate) fn wait_until(mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}
