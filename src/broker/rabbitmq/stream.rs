//! Detects stream queues, which are refused by name.
//!
//! A stream keeps acknowledged messages. A consumer of a stream chooses where to begin; the default
//! is the next new message. So a stream that is consumed like a queue would hide all earlier
//! messages. The protocol does not tell the kind of a queue, but a stream's deliveries have an
//! offset header. Any producer can write that header, so the broker is asked.
//!
//! **Limits.**
//! - A message that the question fetches counts as returned once more. A quorum queue drops a
//!   message that was requeued too often.
//! - If the question cannot be asked beside the deliveries (a user may be limited to one
//!   connection), it is asked on the next connection before anything is consumed. A quorum queue
//!   may then deliver the first message behind other requeued messages.

use std::time::Duration;

use lapin::options::BasicGetOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, ErrorKind};

use crate::message::{Fault, FaultClass};
use crate::printable::printable;

use super::classify::{Phase, classify};
use super::connection::Link;
use super::convert::short;
use super::inbound::{Deliveries, Returns};
use super::options::Options;
use super::topology::Topology;
use super::uri::Target;

/// The header that RabbitMQ writes on each delivery of a stream.
const OFFSET: &str = "x-stream-offset";

/// RabbitMQ's code for an operation that the kind of queue does not support.
const NOT_IMPLEMENTED: u16 = 540;

/// RabbitMQ's code if this user may not fetch: a queue with a single active consumer is no stream.
const RESOURCE_LOCKED: u16 = 405;

/// The longest wait for each answer.
const LIMIT: Duration = Duration::from_secs(2);

/// The time until a fetched message is back in its queue, after its connection has ended.
const RETURN: Duration = Duration::from_millis(250);

/// Whether a delivery has the offset header of a stream.
pub(super) fn has_offset(properties: &BasicProperties) -> bool {
    properties.headers().as_ref().is_some_and(|headers| headers.contains_key(OFFSET))
}

/// Returns the fault of a source whose queue is a stream.
pub(super) fn refused(queue: &str) -> Fault {
    let text = format!(
        "queue `{}` is a stream, which is not consumed: bind a classic or quorum queue to the same exchange",
        printable(queue)
    );
    Fault::new(FaultClass::Config, text)
}

/// Returns the fault of a connection that ends because the kind of the queue could not be asked
/// beside the deliveries.
pub(super) fn not_asked(queue: &str, fault: &Fault) -> Fault {
    let text = format!("it could not be asked what kind of queue `{}` is: {}", printable(queue), fault.text);
    Fault::new(FaultClass::Outage, text)
}

/// Asks on a separate connection whether the queue is a stream. On the connection of the deliveries
/// the answer would queue behind them. The separate connection declares nothing.
///
/// The question may fetch a message, which goes back when this connection ends. A reject would put
/// the message at the end of a quorum queue without a delivery limit. Earlier deliveries are
/// unsettled meanwhile, so the order stays.
pub(super) async fn is_one_beside(options: &Options, target: &Target, queue: &str) -> Result<bool, Fault> {
    let bare = Options { topology: Topology::default(), required_exchanges: Vec::new(), ..options.clone() };
    let connecting = Link::connect(&bare, target, Returns::of_a_consumer(), Deliveries::none());
    let link = within(connecting, queue).await?;
    let answer = is_one(&link.channel, queue).await;
    link.close(LIMIT).await;
    let (is_stream, fetched) = answer?;
    if fetched {
        tokio::time::sleep(RETURN).await;
    }
    Ok(is_stream)
}

/// Returns whether the queue is a stream, and whether a message was fetched. Streams refuse
/// `basic.get`. A queue gives a message, or refuses for another reason. The question's channel is
/// closed, so a fetched message goes back.
pub(super) async fn is_one(channel: &Channel, queue: &str) -> Result<(bool, bool), Fault> {
    let fault = |error: lapin::Error| classify(&error, Phase::Consume);
    let asked = async {
        match channel.basic_get(short("queue", queue)?, BasicGetOptions::default()).await {
            Ok(got) => {
                channel.close(200, ShortString::from("bye")).await.map_err(fault)?;
                Ok((false, got.is_some()))
            }
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(said) if said.get_id() == NOT_IMPLEMENTED => Ok((true, false)),
                ErrorKind::ProtocolError(said) if said.get_id() == RESOURCE_LOCKED => Ok((false, false)),
                _ => Err(fault(error)),
            },
        }
    };
    within(asked, queue).await
}

async fn within<T>(asked: impl Future<Output = Result<T, Fault>>, queue: &str) -> Result<T, Fault> {
    let late = || {
        let text = format!("the broker did not say what kind of queue `{}` is", printable(queue));
        Err(Fault::new(FaultClass::Outage, text))
    };
    tokio::time::timeout(LIMIT, asked).await.unwrap_or_else(|_| late())
}
