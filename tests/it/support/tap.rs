//! A plain lapin client: looks at what really is on the broker, without the code under test.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use tokio::runtime::Runtime;

const LIMIT: Duration = Duration::from_secs(60);

/// One connection and channel, used from one test thread.
pub(crate) struct Tap {
    runtime: Runtime,
    _connection: Connection,
    channel: Channel,
}

/// A message as it lies in a queue.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Vec<u8>,
}

impl Raw {
    pub(crate) fn id(&self) -> &str {
        self.properties.message_id().as_ref().map_or("", |id| id.as_str())
    }
}

impl Tap {
    pub(crate) fn connect(url: &str) -> Self {
        Self::try_connect(url).expect("the broker takes a login")
    }

    pub(crate) fn try_connect(url: &str) -> lapin::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (connection, channel) = runtime.block_on(async {
            // The runtime is driven only inside calls, so no heartbeat that could be missed between them.
            let url = format!("{url}?heartbeat=3600&frame_max=131072");
            let connect = Connection::connect(&url, ConnectionProperties::default());
            let connection =
                tokio::time::timeout(Duration::from_secs(10), connect).await.map_err(|_| timed_out())??;
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok::<_, lapin::Error>((connection, channel))
        })?;
        Ok(Self { runtime, _connection: connection, channel })
    }

    fn run<T>(&self, future: impl Future<Output = lapin::Result<T>>) -> T {
        self.runtime
            .block_on(async { tokio::time::timeout(LIMIT, future).await })
            .expect("the broker answers in time")
            .expect("the broker agrees")
    }

    /// A durable queue.
    pub(crate) fn queue(&self, name: &str, arguments: &[(&str, AMQPValue)]) {
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.run(self.channel.queue_declare(name.into(), options, table));
    }

    pub(crate) fn exchange(&self, name: &str, kind: ExchangeKind) {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        self.run(self.channel.exchange_declare(name.into(), kind, options, FieldTable::default()));
    }

    pub(crate) fn bind(&self, queue: &str, exchange: &str, routing_key: &str) {
        let options = QueueBindOptions::default();
        self.run(self.channel.queue_bind(
            queue.into(),
            exchange.into(),
            routing_key.into(),
            options,
            FieldTable::default(),
        ));
    }

    pub(crate) fn unbind(&self, queue: &str, exchange: &str, routing_key: &str) {
        let none = FieldTable::default();
        self.run(self.channel.queue_unbind(queue.into(), exchange.into(), routing_key.into(), none));
    }

    pub(crate) fn delete_queue(&self, name: &str) {
        self.run(self.channel.queue_delete(name.into(), QueueDeleteOptions::default()));
    }

    /// Messages that are ready in the queue.
    pub(crate) fn count(&self, name: &str) -> usize {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        self.run(self.channel.queue_declare(name.into(), options, FieldTable::default())).message_count()
            as usize
    }

    /// Publishes with a confirm.
    pub(crate) fn publish(&self, queue: &str, properties: BasicProperties, body: &[u8]) {
        self.run(async {
            let options = BasicPublishOptions::default();
            self.channel.basic_publish("".into(), queue.into(), options, body, properties).await?.await
        });
    }

    /// Takes what is ready, one by one: also where more may come meanwhile.
    pub(crate) fn take(&self, queue: &str) -> Vec<Raw> {
        self.run(async {
            let mut messages = Vec::new();
            let options = BasicGetOptions { no_ack: true };
            while let Some(got) = self.channel.basic_get(queue.into(), options).await? {
                messages.push(raw(got.delivery));
            }
            Ok(messages)
        })
    }

    /// Takes the first one that is ready, and leaves what comes meanwhile.
    pub(crate) fn take_one(&self, queue: &str) -> Option<Raw> {
        let options = BasicGetOptions { no_ack: true };
        self.run(self.channel.basic_get(queue.into(), options)).map(|got| raw(got.delivery))
    }

    /// Takes everything that is ready out of the queue. Nothing may be on its way to it: that would be lost.
    pub(crate) fn drain(&self, queue: &str) -> Vec<Raw> {
        let count = self.count(queue);
        self.run(async {
            let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
            let consumer = self
                .channel
                .basic_consume(queue.into(), "tap".into(), options, FieldTable::default())
                .await?;
            let mut messages = Vec::with_capacity(count);
            let mut deliveries = consumer.take(count);
            while let Some(delivery) = deliveries.next().await {
                messages.push(raw(delivery?));
            }
            self.channel.basic_cancel("tap".into(), lapin::options::BasicCancelOptions::default()).await?;
            Ok(messages)
        })
    }
}

fn raw(delivery: Delivery) -> Raw {
    Raw {
        exchange: delivery.exchange.as_str().to_owned(),
        routing_key: delivery.routing_key.as_str().to_owned(),
        properties: delivery.properties,
        body: delivery.data,
    }
}

fn timed_out() -> lapin::Error {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
