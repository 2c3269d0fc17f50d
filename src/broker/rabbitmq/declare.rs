//! Declares a [`Topology`] on a new connection.
//!
//! A queue whose node is down exists, and events for other queues must not wait for it. RabbitMQ 3
//! reports such a queue at once. RabbitMQ 4 answers after a minute. So if the declaration of a
//! queue is not answered in time, the publisher asks for the queue on another channel:
//! - No answer there either: the queue is *away*, and the publisher continues without it.
//! - The broker answers that the queue does not exist: the declaration itself waits, as in a
//!   cluster without a majority. Then the connection fails, because events for the queue would be
//!   returned as for a queue that was never declared.
//!
//! **Invariants.** No channel is dropped while an answer is outstanding on it (see [`within`]).
//! Many queues that are away cost no more time than one: after the first, all others are asked at
//! once.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ErrorKind, ExchangeKind as LapinKind};
use tracing::debug;

use crate::broker::ExchangeKind;
use crate::message::{Fault, FaultClass, HeaderValue};
use crate::tuning::QUEUE_AWAY_MS;

use super::cause::{self, Answer, create_channel, free_channel, within};
use super::classify::{Phase, classify, is_away};
use super::convert::{short, to_table};
use super::topology::{Binding, Topology};

/// The longest wait for each answer.
const LIMIT: Duration = Duration::from_millis(QUEUE_AWAY_MS);

/// The longest wait for the answer about the binding of a queue that is away.
const AWAY_LIMIT: Duration = Duration::from_millis(QUEUE_AWAY_MS / 10);

/// Opens the connection's channel, declares everything on it, and checks that the `required`
/// exchanges exist.
///
/// A broker may allow only one channel, and a channel that is closing still counts. So everything
/// uses this channel, unless a queue does not answer.
pub(super) async fn set_up(
    topology: &Topology,
    connection: &Connection,
    required: &[String],
) -> Result<Channel, Fault> {
    let mut channel = open_channel(connection).await?;
    exchanges(topology, &channel).await?;
    let away = queues(topology, connection, &mut channel).await?;
    bindings(topology, connection, &mut channel, &away).await?;
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

type Queue = (String, Vec<(String, HeaderValue)>);

/// Declares the queues one after another, until one does not answer. Returns the queues that are
/// away.
async fn queues<'a>(
    topology: &'a Topology,
    connection: &Connection,
    channel: &mut Channel,
) -> Result<HashSet<&'a str>, Fault> {
    let mut away = HashSet::new();
    let mut left = topology.queues.iter();
    while let Some(queue) = left.next() {
        match declare(channel.clone(), queue).await? {
            Declared::Done => continue,
            Declared::Away => {}
            Declared::Unanswered => {
                let unanswered = declare_at_once(connection, left.as_slice(), &mut away).await?;
                are_away(connection, std::iter::once(queue).chain(unanswered), &mut away).await?;
                *channel = open_channel(connection).await?;
                break;
            }
        }
        away.insert(queue.0.as_str());
        *channel = open_channel(connection).await?;
    }
    Ok(away)
}

/// Declares each queue on a channel of its own, as many at once as the broker allows. Returns the
/// queues that do not answer: they keep their channels.
async fn declare_at_once<'a>(
    connection: &Connection,
    mut queues: &'a [Queue],
    away: &mut HashSet<&'a str>,
) -> Result<Vec<&'a Queue>, Fault> {
    let (mut unanswered, mut asked) = (Vec::new(), FuturesUnordered::new());
    loop {
        while let Some((queue, left)) = queues.split_first() {
            let limit = if asked.is_empty() { LIMIT } else { Duration::ZERO };
            let Some(channel) = free(connection, limit).await? else { break };
            asked.push(async move { (queue, declare(channel, queue).await) });
            queues = left;
        }
        let Some((queue, declared)) = asked.next().await else { break };
        match declared? {
            Declared::Done => {}
            Declared::Away => _ = away.insert(queue.0.as_str()),
            Declared::Unanswered => unanswered.push(queue),
        }
    }
    let Some((queue, _)) = queues.first() else { return Ok(unanswered) };
    let text = format!(
        "queue `{queue}`: there is no channel to declare it on, since {} others do not answer; a larger `channel_max` helps",
        unanswered.len() + 1
    );
    Err(Fault::new(FaultClass::Outage, text))
}

enum Declared {
    Done,
    /// The broker answers that the queue is away. The channel is closed.
    Away,
    Unanswered,
}

async fn declare(channel: Channel, (name, arguments): &Queue) -> Result<Declared, Fault> {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let (queue, arguments) = (short("queue", name)?, to_table(arguments)?);
    let asked = async move { channel.queue_declare(queue, options, arguments).await };
    match within(LIMIT, asked).await {
        Some(Ok(_)) => Ok(Declared::Done),
        Some(Err(error)) => unless_away(naming(&error, "queue", name)).map(|()| Declared::Away),
        None => Ok(Declared::Unanswered),
    }
}

/// Asks for the queues whose declarations are not answered. Fails unless each queue exists or is
/// away.
async fn are_away<'a>(
    connection: &Connection,
    queues: impl Iterator<Item = &'a Queue>,
    away: &mut HashSet<&'a str>,
) -> Result<(), Fault> {
    let mut asked: FuturesOrdered<_> = queues
        .map(|(name, _)| async move { (name.as_str(), cause::about(connection, name).await) })
        .collect();
    while let Some((queue, answer)) = asked.next().await {
        let why = match answer {
            Answer::There | Answer::Away(_) | Answer::Unanswered => {
                debug!(queue, "the broker does not answer the declaration of a queue; its node may be down");
                away.insert(queue);
                continue;
            }
            Answer::Missing => "in a cluster that needs a majority of the nodes",
            Answer::NoChannel | Answer::Unasked => {
                "and there is no other channel to ask on; a larger `channel_max` helps"
            }
        };
        let text = format!("queue `{queue}`: the broker does not answer its declaration, {why}");
        return Err(Fault::new(FaultClass::Outage, text));
    }
    Ok(())
}

/// Declares the bindings: first those of available queues, one after another; then those of queues
/// that are away, all at once.
async fn bindings(
    topology: &Topology,
    connection: &Connection,
    channel: &mut Channel,
    away: &HashSet<&str>,
) -> Result<(), Fault> {
    let (of_away, of_others): (Vec<_>, Vec<_>) =
        topology.declared().partition(|binding| away.contains(binding.queue.as_str()));
    for binding in of_others {
        match within(LIMIT, bound(channel.clone(), binding)?).await {
            Some(Ok(())) => continue,
            Some(Err(error)) => unless_away(naming(&error, "binding of queue", &binding.queue))?,
            None => {
                let text = format!(
                    "binding of queue `{}`: the broker does not answer; in a cluster that needs a majority of the nodes",
                    binding.queue
                );
                return Err(Fault::new(FaultClass::Outage, text));
            }
        }
        *channel = open_channel(connection).await?;
    }
    let mut asked = FuturesUnordered::new();
    for binding in of_away {
        // Bindings without a channel are declared on another connection, once fewer queues are
        // silent.
        let Some(own) = free(connection, Duration::ZERO).await? else { break };
        let bound = within(AWAY_LIMIT, bound(own, binding)?);
        asked.push(async move { (binding, bound.await) });
    }
    while let Some((binding, answer)) = asked.next().await {
        if let Some(Err(error)) = answer {
            unless_away(naming(&error, "binding of queue", &binding.queue))?;
        }
    }
    Ok(())
}

fn bound(
    channel: Channel,
    binding: &Binding,
) -> Result<impl Future<Output = lapin::Result<()>> + Send + 'static, Fault> {
    let (name, exchange) = (short("queue", &binding.queue)?, short("exchange", &binding.exchange)?);
    let routing_key = short("routing_key", &binding.routing_key)?;
    let options = QueueBindOptions::default();
    Ok(async move { channel.queue_bind(name, exchange, routing_key, options, FieldTable::default()).await })
}

/// Opens a channel. Returns `None` if there is none within `limit`.
async fn free(connection: &Connection, limit: Duration) -> Result<Option<Channel>, Fault> {
    match free_channel(connection, limit).await {
        Ok(channel) => Ok(Some(channel)),
        Err(error) if matches!(error.kind(), ErrorKind::ChannelsLimitReached) => Ok(None),
        Err(error) => Err(classify(&error, Phase::Connect)),
    }
}

async fn open_channel(connection: &Connection) -> Result<Channel, Fault> {
    create_channel(connection).await.map_err(|error| classify(&error, Phase::Connect))
}

/// Returns the fault, unless it means that a queue exists and cannot be reached now.
fn unless_away(fault: Fault) -> Result<(), Fault> {
    if !fault.code.is_some_and(|code| is_away(code, &fault.text)) {
        return Err(fault);
    }
    debug!(%fault, "a queue to declare is away");
    Ok(())
}

/// A refusal of the broker to set something up is a configuration fault, whatever its code; a lost
/// connection is not.
fn naming(error: &lapin::Error, what: &str, name: &str) -> Fault {
    let mut fault = classify(error, Phase::SetUp);
    if fault.class == FaultClass::Config {
        fault.text = format!("{what} `{name}`: {}", fault.text);
    }
    fault
}
