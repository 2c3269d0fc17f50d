//! The consuming side: one connection after another, deliveries out, settlements in.
//!
//! **Invariants.**
//! - After a lost connection, consuming begins only once the consumer has read everything from the
//!   earlier connections. Unread deliveries would be requeued once more, and a queue may drop a
//!   message that is requeued too often.
//! - At most `prefetch` deliveries are unsettled.
//! - A settlement of an epoch that is over is dropped: its delivery comes again.
//! - Frames leave in the order of the settlements.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{Either, FutureExt, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::message::Delivery as LapinDelivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Consumer, Event};
use tokio::sync::mpsc;
use tracing::debug;

use crate::broker::{Delivery, DeliveryTag, Epoch, Settlement, SourceEvent, SourceEvents};
use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass};
use crate::time::as_ms;

use super::acks::{Frame, Unsettled};
use super::background::Stop;
use super::cancelled;
use super::cause::free_channel;
use super::classify::{Phase, classify, is_about_a_queue, is_the_brokers_own};
use super::connection::{Link, within_deadline};
use super::convert::{short, to_message};
use super::failover::Failover;
use super::inbound::{Deliveries, NOT_TAKEN_IN, Returns};
use super::options::Options;
use super::stream;
use super::uri::Target;

/// The longest wait for the answer to the request to consume.
const CONSUME: Duration = Duration::from_secs(5);

/// The latest time of that wait. It is before the deadline of the connection attempt, whose fault
/// names no queue.
const CONSUME_BY: Duration = Duration::from_millis(CONNECT_MS_MAX - 500);

/// The longest wait for the broker's own error after an echo of it was seen.
const REASON_WAIT: Duration = Duration::from_millis(500);

/// The interval at which the source checks whether the consumer has read everything.
const UNREAD: Duration = Duration::from_millis(5);

pub(super) type Settlements = Vec<(DeliveryTag, Settlement)>;

/// The queue to consume, and how.
pub(super) struct Subscription {
    pub(super) queue: String,
    pub(super) prefetch: u16,
    pub(super) prefetch_bytes: u64,
}

/// Consumes until a stop is requested or the receiver of the events is gone.
pub(super) async fn run(
    options: Arc<Options>,
    subscription: Subscription,
    mut settlements: mpsc::UnboundedReceiver<Settlements>,
    events: SourceEvents,
    mut stop: Stop,
) {
    let mut failover = Failover::new(options.targets.len(), options.backoff);
    let mut kind = QueueKind::Unknown;
    for number in 1.. {
        let epoch = Epoch(number);
        let Some(target) = options.targets.get(failover.at()) else { return };
        let attempt = discarding(&mut settlements, open(&options, target, &subscription, &mut kind));
        let Some(attempt) = stop.or(attempt).await else { return };
        let (fault, wait) = match attempt {
            Err(fault) => {
                let wait = failover.refused(fault.class, Instant::now());
                (fault, wait)
            }
            Ok((mut link, consumer)) => {
                // The consumer logs the connect at its own level, so here it is only a debug line.
                debug!(broker = %target, epoch = number, queue = %subscription.queue, "source connected");
                let began = Instant::now();
                if !events.send(SourceEvent::Up { epoch }) {
                    return link.close(stop.time_to_close()).await;
                }
                let place = Place { options: &options, target, queue: &subscription.queue };
                let (end, worked) = serve(
                    &mut link,
                    (place, &mut kind),
                    consumer,
                    epoch,
                    &mut settlements,
                    &events,
                    &mut stop,
                )
                .await;
                let end = end.map(|fault| naming_the_message(fault, &subscription.queue));
                match end {
                    Some(fault) => {
                        tokio::spawn(link.close(stop.time_to_close()));
                        let wait = failover.lost(fault.class, began.elapsed(), worked, Instant::now());
                        (target.naming(fault), wait)
                    }
                    None => return link.close(stop.time_to_close()).await,
                }
            }
        };
        if kind == QueueKind::NoStream {
            // The next queue of this name may be of another kind.
            kind = QueueKind::Unknown;
        }
        if fault.class == FaultClass::Config {
            debug!(broker = %target, epoch = number, %fault, "source refused by the broker");
        } else {
            debug!(broker = %target, epoch = number, %fault, "source disconnected");
        }
        if !events.send(SourceEvent::Down { epoch, fault }) {
            return;
        }
        debug!(broker = %target, wait_ms = as_ms(wait), "next connection attempt");
        let pause = async {
            tokio::time::sleep(wait).await;
            while !events.are_read() {
                tokio::time::sleep(UNREAD).await;
            }
        };
        if stop.or(discarding(&mut settlements, pause)).await.is_none() {
            return;
        }
    }
}

/// What is known about the queue's kind on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum QueueKind {
    Unknown,
    /// A delivery had the offset header of a stream, and the kind could not be asked beside the
    /// deliveries.
    ToBeAsked,
    NoStream,
}

/// Where to ask for the kind of a queue.
#[derive(Clone, Copy)]
struct Place<'a> {
    options: &'a Options,
    target: &'a Target,
    queue: &'a str,
}

async fn open(
    options: &Options,
    target: &Target,
    subscription: &Subscription,
    kind: &mut QueueKind,
) -> Result<(Link, Consumer), Fault> {
    let began = Instant::now();
    within_deadline(target, async {
        let deliveries = Deliveries::at_most(subscription.prefetch.into(), subscription.prefetch_bytes);
        let mut link = Link::connect(options, target, Returns::of_a_consumer(), deliveries).await?;
        if *kind == QueueKind::ToBeAsked {
            // A second channel may not be allowed.
            let (is_stream, _) = stream::is_one(&link.channel, &subscription.queue).await?;
            if is_stream {
                return Err(stream::refused(&subscription.queue));
            }
            let channel = free_channel(&link.connection, CONSUME).await;
            link.channel = channel.map_err(|error| classify(&error, Phase::Connect))?;
            *kind = QueueKind::NoStream;
        }
        let refused = |error: lapin::Error| classify(&error, Phase::Consume);
        link.channel.basic_qos(subscription.prefetch, BasicQosOptions::default()).await.map_err(refused)?;
        let consume = link.channel.basic_consume(
            short("queue", &subscription.queue)?,
            // The broker chooses the consumer tag.
            ShortString::default(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        // RabbitMQ 4 answers after a minute if the queue's node is down: the fault must name the
        // queue.
        let limit = CONSUME.min(CONSUME_BY.saturating_sub(began.elapsed()));
        match tokio::time::timeout(limit, consume).await {
            Ok(consumer) => Ok((link, consumer.map_err(refused)?)),
            Err(_) => Err(unanswered(&subscription.queue, limit)),
        }
    })
    .await
}

fn unanswered(queue: &str, limit: Duration) -> Fault {
    let text = format!(
        "queue `{queue}`: the broker has not answered the request to consume within {limit:.1?}; its home node may be down"
    );
    Fault::new(FaultClass::Outage, text)
}

/// Runs `future` while there is no epoch, and discards settlements meanwhile.
async fn discarding<T>(
    settlements: &mut mpsc::UnboundedReceiver<Settlements>,
    future: impl Future<Output = T>,
) -> T {
    let discard = async {
        while settlements.recv().await.is_some() {}
        std::future::pending::<()>().await;
    };
    match select(pin!(future), pin!(discard)).await {
        Either::Left((value, _)) => value,
        Either::Right(((), _)) => unreachable!("it never ends"),
    }
}

type Writes = FuturesUnordered<Pin<Box<dyn Future<Output = lapin::Result<()>> + Send>>>;

#[allow(clippy::large_enum_variant, reason = "one at a time, on the stack; with 32-bit pointers it is small")]
enum Woken {
    Stop,
    Connection(Option<Event>),
    Delivery(Option<lapin::Result<LapinDelivery>>),
    Settlements(Option<Settlements>),
    Written(lapin::Result<()>),
}

/// Serves one epoch. Returns why the epoch ended, or `None` for a stop, and whether anything was
/// settled in it.
async fn serve(
    link: &mut Link,
    (place, kind): (Place<'_>, &mut QueueKind),
    mut consumer: Consumer,
    epoch: Epoch,
    settlements: &mut mpsc::UnboundedReceiver<Settlements>,
    events: &SourceEvents,
    stop: &mut Stop,
) -> (Option<Fault>, bool) {
    let mut unsettled = Unsettled::default();
    let mut writes = Writes::new();
    let mut worked = false;
    let end = {
        let mut asked = pin!(stop.asked());
        loop {
            let woken = poll_fn(|cx| {
                if asked.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Woken::Stop);
                }
                if let Poll::Ready(event) = link.events.poll_next_unpin(cx) {
                    return Poll::Ready(Woken::Connection(event));
                }
                if let Poll::Ready(Some(written)) = writes.poll_next_unpin(cx) {
                    return Poll::Ready(Woken::Written(written));
                }
                if let Poll::Ready(batch) = settlements.poll_recv(cx) {
                    return Poll::Ready(Woken::Settlements(batch));
                }
                consumer.poll_next_unpin(cx).map(Woken::Delivery)
            })
            .await;
            let result = match woken {
                Woken::Stop | Woken::Settlements(None) => break None,
                // A late answer about a queue, on a channel that was opened to ask.
                Woken::Connection(Some(Event::Error(error)))
                    if link.is_alive() && is_about_a_queue(&error) =>
                {
                    Ok(())
                }
                Woken::Connection(Some(Event::Error(error))) | Woken::Written(Err(error)) => {
                    Err(error.into())
                }
                Woken::Connection(None) => Err(Broken::Echo),
                Woken::Connection(Some(_)) | Woken::Written(Ok(())) => Ok(()),
                Woken::Settlements(Some(batch)) => {
                    // An empty batch, or a batch of an earlier connection, proves nothing about
                    // this connection.
                    settle(link, &mut unsettled, epoch, batch, &mut writes).map(|settled| worked |= settled)
                }
                Woken::Delivery(Some(Ok(delivery))) => {
                    let bytes = link.deliveries.taken();
                    if *kind != QueueKind::NoStream && stream::has_offset(&delivery.properties) {
                        let Place { options, target, queue } = place;
                        match select(asked.as_mut(), pin!(stream::is_one_beside(options, target, queue)))
                            .await
                        {
                            Either::Left(_) => break None,
                            Either::Right((Ok(true), _)) => break Some(stream::refused(queue)),
                            Either::Right((Ok(false), _)) => {}
                            Either::Right((Err(fault), _)) => {
                                *kind = QueueKind::ToBeAsked;
                                break Some(stream::not_asked(queue, &fault));
                            }
                        }
                    }
                    // A stream puts its offset on each of its deliveries.
                    *kind = QueueKind::NoStream;
                    unsettled.delivered(delivery.delivery_tag, bytes);
                    if !events.send(SourceEvent::Delivery(Box::new(to_delivery(epoch, delivery)))) {
                        break None;
                    }
                    Ok(())
                }
                Woken::Delivery(Some(Err(error))) => Err(error.into()),
                Woken::Delivery(None) => Err(Broken::Cancelled),
            };
            if let Err(broken) = result {
                link.deliveries.want_no_more();
                break match select(asked.as_mut(), pin!(why(broken, link, place.queue))).await {
                    Either::Left(_) => None,
                    Either::Right((fault, _)) => Some(fault),
                };
            }
        }
    };
    if end.is_none() {
        // Settlements from before the stop are still sent.
        while let Ok(batch) = settlements.try_recv() {
            if settle(link, &mut unsettled, epoch, batch, &mut writes).is_err() {
                break;
            }
        }
        let all = async { while writes.next().await.is_some() {} };
        let _ = tokio::time::timeout(stop.time_to_close(), all).await;
    }
    (end, worked)
}

enum Broken {
    Fault(Fault),
    Echo,
    /// The stream of deliveries ended: the broker cancelled the consumer, or everything is closing.
    Cancelled,
}

impl From<lapin::Error> for Broken {
    fn from(error: lapin::Error) -> Self {
        if is_the_brokers_own(&error) { Self::Fault(classify(&error, Phase::Consume)) } else { Self::Echo }
    }
}

async fn why(broken: Broken, link: &mut Link, queue: &str) -> Fault {
    if let Broken::Fault(fault) = broken {
        return fault;
    }
    if matches!(broken, Broken::Cancelled) && link.is_alive() {
        return cancelled::why(&link.connection, queue).await;
    }
    let reason = async {
        while let Some(event) = link.events.next().await {
            if let Event::Error(error) = event
                && is_the_brokers_own(&error)
            {
                return Some(error);
            }
        }
        None
    };
    match tokio::time::timeout(REASON_WAIT, reason).await {
        Ok(Some(error)) => classify(&error, Phase::Consume),
        _ => Fault::new(FaultClass::Outage, "the connection ended without a reason"),
    }
}

/// Names the queue of a message that cannot be taken in. The broker delivers an unacknowledged
/// message first again, so this message is redelivered until an operator removes it.
fn naming_the_message(mut fault: Fault, queue: &str) -> Fault {
    if fault.text.contains(NOT_TAKEN_IN) {
        fault.text = format!("{}; it is the next message of queue `{queue}`", fault.text);
    }
    fault
}

/// Hands the frames to lapin, in order. Returns whether there were any.
fn settle(
    link: &Link,
    unsettled: &mut Unsettled,
    epoch: Epoch,
    batch: Settlements,
    writes: &mut Writes,
) -> Result<bool, Broken> {
    let mut settled = false;
    let of_this_epoch = batch.into_iter().filter(|(tag, _)| tag.epoch == epoch);
    let before = unsettled.load();
    let frames = unsettled.settle(of_this_epoch.map(|(tag, settlement)| (tag.tag, settlement)));
    // This comes before the broker gets the frames: the broker may then deliver as many again at
    // once.
    link.deliveries.settled(before, unsettled.load());
    for frame in frames {
        let channel = link.channel.clone();
        let mut write: Pin<Box<dyn Future<Output = lapin::Result<()>> + Send>> = Box::pin(async move {
            match frame {
                Frame::Ack { tag, multiple } => channel.basic_ack(tag, BasicAckOptions { multiple }).await,
                Frame::Reject { tag, requeue } => {
                    channel.basic_reject(tag, BasicRejectOptions { requeue }).await
                }
            }
        });
        // The first poll queues the frame. Polling here fixes the order.
        match (&mut write).now_or_never() {
            Some(written) => written?,
            None => writes.push(write),
        }
        settled = true;
    }
    Ok(settled)
}

fn to_delivery(epoch: Epoch, delivery: LapinDelivery) -> Delivery {
    Delivery {
        tag: DeliveryTag { epoch, tag: delivery.delivery_tag },
        exchange: delivery.exchange.as_str().to_owned(),
        routing_key: delivery.routing_key.as_str().to_owned(),
        redelivered: delivery.redelivered,
        message: to_message(&delivery.properties, delivery.data),
    }
}
