//! What is declared at the broker, and what faults do to it.
//!
//! Events go to the exchanges `x.0`, `x.1` …; each has one binding, to the exchange `all`, from which the queues of the consumer
//! and of the tap both get everything. So one binding that is taken away makes an exchange lead nowhere at one stroke: there is no moment
//! in which a message reaches one queue and not the other by the test's own doing.

use std::future::Future;
use std::time::Duration;

use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, ExchangeUnbindOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use onewrite_torture_checker::formats::{EXCHANGES, ROUTING_KEY, exchange};
use tokio::runtime::Runtime;

use crate::Result;
use crate::plan::{QUEUE, TAP_QUEUE};

const ALL: &str = "all";
const LIMIT: Duration = Duration::from_secs(20);
/// Messages that wait in the tap's queue at most; further ones are refused, and their publishers notified.
const TAP_QUEUE_MAX: i64 = 1500;
const QUEUE_MAX: i64 = 30_000;

/// A connection for one or a few changes; the next kill of the broker ends it.
pub(super) struct Admin {
    runtime: Runtime,
    channel: Channel,
    _connection: Connection,
}

impl Admin {
    pub(super) fn connect(url: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let url = format!("{url}?heartbeat=3600&frame_max=131072");
        let (connection, channel) = runtime.block_on(async {
            let connection = Connection::connect(&url, ConnectionProperties::default());
            let connection = tokio::time::timeout(LIMIT, connection).await??;
            let channel = connection.create_channel().await?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>((connection, channel))
        })?;
        Ok(Self { runtime, channel, _connection: connection })
    }

    fn run<T>(&self, future: impl Future<Output = lapin::Result<T>>) -> Result<T> {
        Ok(self.runtime.block_on(async { tokio::time::timeout(LIMIT, future).await })??)
    }

    /// Everything, once.
    pub(super) fn declare_all(&self) -> Result<()> {
        self.declare_exchange(ALL, ExchangeKind::Fanout)?;
        for (queue, max) in [(QUEUE, QUEUE_MAX), (TAP_QUEUE, TAP_QUEUE_MAX)] {
            let mut arguments = FieldTable::default();
            arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(max));
            arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
            // Order after a lost connection: what the dead one held is put back before the next gets anything.
            arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
            let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            self.run(self.channel.queue_declare(queue.into(), options, arguments))?;
            let options = QueueBindOptions::default();
            self.run(self.channel.queue_bind(
                queue.into(),
                ALL.into(),
                "".into(),
                options,
                FieldTable::default(),
            ))?;
        }
        (0..EXCHANGES).try_for_each(|to| self.create(to))
    }

    fn declare_exchange(&self, name: &str, kind: ExchangeKind) -> Result<()> {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        self.run(self.channel.exchange_declare(name.into(), kind, options, FieldTable::default()))
    }

    /// One of the exchanges that events go to, with its binding.
    pub(super) fn create(&self, to: u8) -> Result<()> {
        self.declare_exchange(&exchange(to), ExchangeKind::Direct)?;
        self.bind(to)
    }

    pub(super) fn delete(&self, to: u8) -> Result<()> {
        let name = exchange(to);
        self.run(self.channel.exchange_delete(name.as_str().into(), ExchangeDeleteOptions::default()))
    }

    pub(super) fn bind(&self, to: u8) -> Result<()> {
        let (name, options) = (exchange(to), ExchangeBindOptions::default());
        let arguments = FieldTable::default();
        self.run(self.channel.exchange_bind(
            ALL.into(),
            name.as_str().into(),
            ROUTING_KEY.into(),
            options,
            arguments,
        ))
    }

    pub(super) fn unbind(&self, to: u8) -> Result<()> {
        let (name, options) = (exchange(to), ExchangeUnbindOptions::default());
        let arguments = FieldTable::default();
        self.run(self.channel.exchange_unbind(
            ALL.into(),
            name.as_str().into(),
            ROUTING_KEY.into(),
            options,
            arguments,
        ))
    }

    /// Messages that are ready in the queue.
    pub(super) fn ready(&self, queue: &str) -> Result<u32> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        Ok(self
            .run(self.channel.queue_declare(queue.into(), options, FieldTable::default()))?
            .message_count())
    }
}
