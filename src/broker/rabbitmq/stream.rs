//! Stream queues, which are refused by name.
//!
//! A stream keeps what is acknowledged and begins for each consumer where the consumer says; without a word, at what comes next.
//! Taken for a queue, it would hide all that came before. The protocol does not give the kind of a queue, but a stream's deliveries
//! have an offset. The offset is a header, and anybody may write it: the broker has the last word.
//!
//! **Limits.** A message that the question fetches counts as returned once more: a quorum queue drops one that was requeued as often as
//! it may. Where it cannot be asked beside the deliveries, as where a user may have one connection, it is asked before anything is
//! consumed on the next one; a quorum queue may then deliver the first message behind others that were requeued with it.

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

/// RabbitMQ writes it on each delivery of a stream.
const OFFSET: &str = "x-stream-offset";

/// What RabbitMQ answers to what a kind of queue does not do.
const NOT_IMPLEMENTED: u16 = 540;

/// What it answers where others may not fetch: a queue with a single active consumer is no stream.
const RESOURCE_LOCKED: u16 = 405;

/// How long each answer is waited for.
const LIMIT: Duration = Duration::from_secs(2);

/// How long a message that was fetched takes to be back in its queue, once its connection has ended.
const RETURN: Duration = Duration::from_millis(250);

/// Whether a delivery says that it comes from a stream.
pub(super) fn has_offset(properties: &BasicProperties) -> bool {
    properties.headers().as_ref().is_some_and(|headers| headers.contains_key(OFFSET))
}

/// Why a stream is not consumed.
pub(super) fn refused(queue: &str) -> Fault {
    let text = format!(
        "queue `{}` is a stream, which is not consumed: bind a classic or quorum queue to the same exchange",
        printable(queue)
    );
    Fault::new(FaultClass::Config, text)
}

/// Why a connection ends on which it could not be asked beside the deliveries what kind of queue this is.
pub(super) fn not_asked(queue: &str, fault: &Fault) -> Fault {
    let text = format!("it could not be asked what kind of queue `{}` is: {}", printable(queue), fault.text);
    Fault::new(FaultClass::Outage, text)
}

/// Asks on a connection of its own: on that of the deliveries the answer would stand behind them. It declares nothing.
///
/// The question may fetch a message, which goes back when this connection ends: one that is rejected goes to the end of a quorum queue without
/// a delivery limit. What has been delivered before is unsettled meanwhile, so the order stays.
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

/// Whether it is a stream, and whether a message was fetched. Streams refuse `basic.get`. A queue gives a message, or refuses it for another
/// reason. The channel is closed behind the question, so a message goes back.
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
