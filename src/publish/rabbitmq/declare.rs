//! Declares a [`Topology`] on a new connection.
//!
//! A queue whose node is down is there, and what is for other queues must not wait for it. RabbitMQ 3 says so at once; RabbitMQ 4 answers
//! after a minute. So a queue that is not declared in time is asked for on another channel. If that is not answered either, the
//! queue is away. If the broker says that there is no such queue, the declaration itself waits, as it does in a cluster without a
//! majority: then the publisher must not go on, for its events would be returned as for a queue that nobody has declared.

use std::collections::HashSet;
use std::future::Future;
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ExchangeKind as LapinKind};
use tokio::time::timeout;
use tracing::debug;

use crate::limits::{DECLARE_MS_MAX, QUEUE_AWAY_MS};
use crate::message::{Fault, FaultClass};
use crate::publish::ExchangeKind;

use super::cause::{self, Answer};
use super::classify::{Phase, classify, is_away};
use super::convert::{short, to_table};
use super::topology::Topology;

/// What each question may take, whatever those before it took.
const LEAST: Duration = Duration::from_millis(100);

/// Opens the connection's channel, declares everything on it, and checks that the `required` exchanges exist. A broker may allow
/// one channel alone, and one that is closing still counts: so there is no other for this, unless a queue does not answer.
pub(super) async fn set_up(
    topology: &Topology,
    connection: &Connection,
    required: &[String],
) -> Result<Channel, Fault> {
    let mut channel = open_channel(connection).await?;
    exchanges(topology, &channel).await?;
    let mut patience = Patience { left: Duration::from_millis(DECLARE_MS_MAX) };
    let away = queues(topology, connection, &mut channel, &mut patience).await?;
    bindings(topology, connection, &mut channel, &mut patience, &away).await?;
    for exchange in required.iter().filter(|name| !name.is_empty()) {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(short("exchange", exchange)?, LapinKind::Direct, options, FieldTable::default())
            .await
            .map_err(|error| naming(&error, "exchange", exchange))?;
    }
    Ok(channel)
}

async fn exchanges(topology: &Topology, channel: &Channel) -> Result<(), Fault> {
    for (name, kind) in &topology.exchanges {
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
    Ok(())
}

/// Declares the queues. Those that are away.
async fn queues<'a>(
    topology: &'a Topology,
    connection: &Connection,
    channel: &mut Channel,
    patience: &mut Patience,
) -> Result<HashSet<&'a str>, Fault> {
    let mut away = HashSet::new();
    for (name, arguments) in &topology.queues {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let declared = channel.queue_declare(short("queue", name)?, options, to_table(arguments)?);
        match patience.answer(declared).await {
            Some(Ok(_)) => continue,
            Some(Err(error)) => unless_away(naming(&error, "queue", name))?,
            None => is_there(connection, patience, name).await?,
        }
        away.insert(name.as_str());
        *channel = open_channel(connection).await?;
    }
    Ok(away)
}

async fn bindings(
    topology: &Topology,
    connection: &Connection,
    channel: &mut Channel,
    patience: &mut Patience,
    away: &HashSet<&str>,
) -> Result<(), Fault> {
    for binding in topology.declared() {
        let bound = channel.queue_bind(
            short("queue", &binding.queue)?,
            short("exchange", &binding.exchange)?,
            short("routing_key", &binding.routing_key)?,
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        let bound = if away.contains(binding.queue.as_str()) {
            patience.answer(bound).await
        } else {
            Some(bound.await)
        };
        match bound {
            Some(Ok(())) => continue,
            Some(Err(error)) => unless_away(naming(&error, "binding of queue", &binding.queue))?,
            None => {}
        }
        *channel = open_channel(connection).await?;
    }
    Ok(())
}

/// How long what does not answer is waited for, all of it together.
struct Patience {
    left: Duration,
}

impl Patience {
    async fn answer<T>(&mut self, asked: impl Future<Output = T>) -> Option<T> {
        let wait = Duration::from_millis(QUEUE_AWAY_MS).min(self.left).max(LEAST);
        let answer = timeout(wait, asked).await.ok();
        if answer.is_none() {
            self.left = self.left.saturating_sub(wait);
        }
        answer
    }
}

/// The declaration of a queue is not answered. Fails unless the queue is there, or is away.
async fn is_there(connection: &Connection, patience: &mut Patience, queue: &str) -> Result<(), Fault> {
    match patience.answer(cause::about(connection, queue)).await {
        None | Some(Answer::There | Answer::Away(_)) => {
            debug!(queue, "the broker does not answer the declaration of a queue; its node may be down");
            Ok(())
        }
        Some(Answer::Missing | Answer::Unasked) => {
            let text = format!(
                "queue `{queue}`: the broker does not answer its declaration; in a cluster that needs a majority of the nodes"
            );
            Err(Fault::new(FaultClass::Outage, text))
        }
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
