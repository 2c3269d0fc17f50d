//! lapin by hand: persistent mandatory messages, publisher confirms, and as many unconfirmed at once as the window says; one task on
//! one channel, driven by a current-thread runtime. The window never drains: what is confirmed makes room at once.

use std::error::Error;
use std::fmt;

use futures_util::StreamExt;
use futures_util::future::{FutureExt, join_all};
use futures_util::stream::FuturesUnordered;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::runtime::Runtime;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A durable queue of the one or the other kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Classic,
    Quorum,
}

impl Kind {
    pub(crate) const ALL: [Self; 2] = [Self::Classic, Self::Quorum];

    fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }

    fn arguments(self) -> FieldTable {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(self.name().into()));
        arguments
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a message without our headers carries.
pub(crate) fn plain() -> BasicProperties {
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id("0190a000-0000-7000-8000-000000000000".into())
        .with_content_type("application/octet-stream".into())
        .with_type("payment.completed".into())
}

/// A connection with one channel in confirm mode. Its runtime runs only inside the calls: not for a connection that idles for minutes.
pub(crate) struct Client {
    runtime: Runtime,
    connection: Connection,
    channel: Channel,
}

impl Client {
    pub(crate) fn connect(url: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (connection, channel) = runtime.block_on(async {
            let connection = Connection::connect(url, ConnectionProperties::default()).await?;
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            lapin::Result::Ok((connection, channel))
        })?;
        Ok(Self { runtime, connection, channel })
    }

    /// An empty queue of this name: one that is there is deleted first.
    pub(crate) fn renew(&self, queue: &str, kind: Kind) -> Result<()> {
        let declare = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.runtime.block_on(async {
            self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
            self.channel.queue_declare(queue.into(), declare, kind.arguments()).await
        })?;
        Ok(())
    }

    /// Messages that are ready in it.
    pub(crate) fn count(&self, queue: &str) -> Result<u64> {
        let declare = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.channel.queue_declare(queue.into(), declare, FieldTable::default());
        Ok(self.runtime.block_on(declared)?.message_count().into())
    }

    /// The properties of its oldest message, which goes.
    pub(crate) fn take_properties(&self, queue: &str) -> Result<BasicProperties> {
        let get = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: true });
        let got = self.runtime.block_on(get)?.ok_or("the queue is empty")?;
        Ok(got.delivery.properties)
    }

    /// Publishes one and waits for its confirm.
    pub(crate) fn publish(&self, queue: &str, properties: &BasicProperties, payload: &[u8]) -> Result<()> {
        self.publish_all(queue, properties, 1, std::iter::once(payload))
    }

    /// Publishes all in order and waits for the last confirm.
    pub(crate) fn publish_all<'a>(
        &self,
        queue: &str,
        properties: &BasicProperties,
        window: usize,
        payloads: impl Iterator<Item = &'a [u8]>,
    ) -> Result<()> {
        self.runtime.block_on(pipelined(&self.channel, queue, properties, window, payloads))
    }

    /// Lets the connection live so long, as a service's would.
    pub(crate) fn idle(&self, time: std::time::Duration) {
        self.runtime.block_on(async { tokio::time::sleep(time).await });
    }

    pub(crate) fn close(self) -> Result<()> {
        Ok(self.runtime.block_on(self.connection.close(200, "done".into()))?)
    }
}

async fn pipelined<'a>(
    channel: &Channel,
    queue: &str,
    properties: &BasicProperties,
    window: usize,
    mut payloads: impl Iterator<Item = &'a [u8]>,
) -> Result<()> {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let mut confirms = FuturesUnordered::new();
    loop {
        let room = window - confirms.len();
        let publishes = payloads.by_ref().take(room).map(|payload| {
            channel.basic_publish("".into(), queue.into(), options, payload, properties.clone())
        });
        for confirm in join_all(publishes).await {
            confirms.push(confirm?);
        }
        let Some(confirmation) = confirms.next().await else { return Ok(()) };
        check(confirmation?)?;
        // The broker confirms many at once: publishing after each by itself would be slower by about a third.
        while let Some(Some(confirmation)) = confirms.next().now_or_never() {
            check(confirmation?)?;
        }
    }
}

fn check(confirmation: Confirmation) -> Result<()> {
    match confirmation {
        Confirmation::Ack(None) => Ok(()),
        other => Err(format!("a message was not taken: {other:?}").into()),
    }
}
