//! Stream queues, which are refused by name.
//!
//! A stream keeps what is acknowledged and begins for each consumer where the consumer says; without a word, at what comes next.
//! Taken for a queue, it would hide all that came before. The protocol does not tell the kind of a queue, but a stream's deliveries
//! have a mark. The mark is a header, and anybody may write it: the broker has the last word.

use std::time::Duration;

use lapin::options::BasicGetOptions;
use lapin::{BasicProperties, Connection, ErrorKind};

use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass};
use crate::printable::printable;

use super::classify::{Phase, classify};
use super::connection::Link;
use super::convert::short;
use super::inbound::{Deliveries, Returns};
use super::options::Options;
use super::uri::Target;

/// RabbitMQ writes it on each delivery of a stream.
const OFFSET: &str = "x-stream-offset";

/// What RabbitMQ answers to what a kind of queue does not do.
const NOT_IMPLEMENTED: u16 = 540;

/// What it answers where others may not fetch: a queue with a single active consumer is no stream.
const RESOURCE_LOCKED: u16 = 405;

/// How long a message that was fetched takes to be back in its queue, once its connection has ended.
const RETURN: Duration = Duration::from_millis(250);

/// Whether a delivery says that it comes from a stream.
pub(super) fn is_marked(properties: &BasicProperties) -> bool {
    properties.headers().as_ref().is_some_and(|headers| headers.contains_key(OFFSET))
}

/// Why this queue is not consumed: it is a stream, or the broker does not say. `None` for a queue.
///
/// The question has a connection of its own: on another one its answer would stand behind what is delivered there. It may fetch a
/// message, which goes back when that connection ends: one that is rejected goes to the end of a quorum queue without a delivery limit.
/// What has been delivered before is unsettled meanwhile, so the order stays.
pub(super) async fn refusal(options: &Options, target: &Target, queue: &str) -> Option<Fault> {
    let limit = Duration::from_millis(CONNECT_MS_MAX / 2);
    let asked = tokio::time::timeout(limit, async {
        let link = Link::connect(options, target, Returns::of_a_consumer(), Deliveries::none()).await?;
        let is_stream = is_stream(&link.connection, queue).await;
        link.close(limit).await;
        let (is_stream, fetched) = is_stream?;
        if fetched {
            tokio::time::sleep(RETURN).await;
        }
        Ok(is_stream)
    });
    let asked = asked.await;
    match asked {
        Ok(Ok(false)) => None,
        Ok(Ok(true)) => {
            let text = format!(
                "queue `{}` is a stream, which is not consumed: bind a classic or quorum queue to the same exchange",
                printable(queue)
            );
            Some(Fault::new(FaultClass::Config, text))
        }
        Ok(Err(fault)) => Some(fault),
        Err(_) => {
            let text = format!("the broker did not say what kind of queue `{}` is", printable(queue));
            Some(Fault::new(FaultClass::Outage, text))
        }
    }
}

/// Streams refuse `basic.get`. A queue gives a message, or refuses it for another reason. Whether it is a stream, and whether a message was
/// fetched.
async fn is_stream(connection: &Connection, queue: &str) -> Result<(bool, bool), Fault> {
    let fault = |error: lapin::Error| classify(&error, Phase::Consume);
    let channel = connection.create_channel().await.map_err(fault)?;
    match channel.basic_get(short("queue", queue)?, BasicGetOptions::default()).await {
        Ok(got) => Ok((false, got.is_some())),
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(said) if said.get_id() == NOT_IMPLEMENTED => Ok((true, false)),
            ErrorKind::ProtocolError(said) if said.get_id() == RESOURCE_LOCKED => Ok((false, false)),
            _ => Err(fault(error)),
        },
    }
}
