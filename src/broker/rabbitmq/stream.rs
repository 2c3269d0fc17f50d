//! Stream queues, which are refused by name.
//!
//! A stream keeps what is acknowledged and begins for each consumer where the consumer says; without a word, at what comes next.
//! Taken for a queue, it would hide all that came before. The protocol does not tell the kind of a queue, but a stream's deliveries
//! have a mark. The mark is a header, and anybody may write it: the broker has the last word.

use std::time::Duration;

use lapin::options::{BasicGetOptions, BasicRejectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Connection, ErrorKind};

use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass};
use crate::printable::printable;

use super::classify::{Phase, classify};
use super::convert::short;

/// RabbitMQ writes it on each delivery of a stream.
const OFFSET: &str = "x-stream-offset";

/// What RabbitMQ answers to what a kind of queue does not do.
const NOT_IMPLEMENTED: u16 = 540;

/// Whether a delivery says that it comes from a stream.
pub(super) fn is_marked(properties: &BasicProperties) -> bool {
    properties.headers().as_ref().is_some_and(|headers| headers.contains_key(OFFSET))
}

/// Why a connection ends with the first delivery that has the mark.
pub(super) fn to_be_asked() -> Fault {
    Fault::new(
        FaultClass::Outage,
        "a delivery has the mark of a stream: the broker is asked what kind of queue it is",
    )
}

/// Why this queue is not consumed: it is a stream, or the broker does not say. `None` for a queue.
pub(super) async fn refusal(connection: &Connection, queue: &str) -> Option<Fault> {
    let deadline = Duration::from_millis(CONNECT_MS_MAX);
    let asked = tokio::time::timeout(deadline, is_stream(connection, queue)).await;
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
        Err(_) => Some(Fault::new(FaultClass::Outage, "the broker did not say what kind of queue it is")),
    }
}

/// Streams refuse `basic.get`. A queue gives a message, which goes back.
async fn is_stream(connection: &Connection, queue: &str) -> Result<bool, Fault> {
    let fault = |error: lapin::Error| classify(&error, Phase::Consume);
    let channel = connection.create_channel().await.map_err(fault)?;
    match channel.basic_get(short("queue", queue)?, BasicGetOptions::default()).await {
        Ok(got) => {
            if let Some(got) = got {
                let back = BasicRejectOptions { requeue: true };
                channel.basic_reject(got.delivery.delivery_tag, back).await.map_err(fault)?;
            }
            channel.close(200, ShortString::from("bye")).await.map_err(fault)?;
            Ok(false)
        }
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(said) if said.get_id() == NOT_IMPLEMENTED => Ok(true),
            _ => Err(fault(error)),
        },
    }
}
