//! The publishing side: one connection after the other, and on each the window.
//!
//! **Invariants.** One task publishes on a channel, on a current-thread runtime. Publishes are polled first in the
//! order of the calls, which is what decides the broker's tags. No channel is used again after an error.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{Either, FutureExt, select};
use futures_util::stream::StreamExt;
use lapin::Event;
use tokio::sync::mpsc;
use tracing::debug;

use crate::broker::{Epoch, PublisherEvent, PublisherEvents};
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};
use crate::time::as_ms;

use super::background::Stop;
use super::classify::is_about_a_queue;
use super::connection::Link;
use super::failover::Failover;
use super::isolated::Isolation;
use super::nacks::Nacks;
use super::options::Options;
use super::window::{Broken, Confirmed, Window, worse};

/// Commands taken in at one iteration.
const BATCH: usize = 512;

/// Outcomes are gathered into batches while at least as many more are in flight: telling each by itself costs two wake-ups of threads, and what
/// is published for it goes out by itself too. Fewer than the smallest batch are reported at once.
pub(crate) const OUTCOME_BATCH_MIN: usize = 64;

/// A batch is a quarter of what is in flight, within bounds: the larger the window, the less a batch says about the room in it.
pub(crate) const OUTCOME_BATCH_MAX: usize = 512;

/// How long an outcome may wait for its batch.
const OUTCOME_BATCH_TIMEOUT: Duration = Duration::from_millis(1);

/// How long to wait for the broker's own word after an echo of it (`channel is closing`) was seen.
pub(crate) const REASON_WAIT: Duration = Duration::from_millis(500);

/// After an error somewhere on the connection, its state is looked at again.
const OVERHEARD: Duration = Duration::from_millis(50);

/// One message of the window.
pub(super) type Command = (Epoch, Outgoing);

/// Publishes until it is asked to stop, or nobody listens any more.
pub(super) async fn run(
    options: Arc<Options>,
    mut commands: mpsc::Receiver<Command>,
    events: PublisherEvents,
    current: Arc<AtomicU64>,
    isolation: Arc<Isolation>,
    mut stop: Stop,
) {
    let mut failover = Failover::new(options.targets.len(), options.backoff);
    let mut nacks = Nacks::default();
    for number in 1.. {
        let epoch = Epoch(number);
        let Some(target) = options.targets.get(failover.at()) else { return };
        let attempt = without_commands(&mut commands, Link::open(&options, target));
        let Some(attempt) = stop.or(attempt).await else { return };
        let mut tidying = None;
        let (fault, wait) = match attempt {
            Err(fault) => {
                let wait = failover.refused(fault.class, Instant::now());
                (fault, wait)
            }
            Ok(mut link) => {
                // The relay logs it at its own level: each of these is logged once.
                debug!(broker = %target, epoch = number, "publisher connected");
                let began = Instant::now();
                current.store(number, Ordering::Release);
                isolation.connected(&link);
                if !events.send(PublisherEvent::Up { epoch }) {
                    return link.close(stop.time_to_close()).await;
                }
                nacks.connected();
                let window = Window::new(&link, &options, &mut nacks, &isolation);
                let (end, worked) =
                    serve(&mut link, window, epoch, &options, &mut commands, &events, &mut stop).await;
                current.store(0, Ordering::Release);
                isolation.disconnected(match &end {
                    End::Fault(fault) => Some(fault),
                    End::Stop => None,
                });
                let fault = match end {
                    End::Fault(fault) => fault,
                    End::Stop => {
                        let fault = Fault::new(FaultClass::Outage, "the publisher was stopped");
                        events.send(PublisherEvent::Down { epoch, fault });
                        return link.close(stop.time_to_close()).await;
                    }
                };
                // First the news, then the tidying: the relay need not wait for a broker that does not answer.
                let tidy = tokio::spawn(link.close(stop.time_to_close()));
                // The broker is well, and is asked again: where it allows one connection, the last one is to be gone.
                tidying =
                    matches!(fault.class, FaultClass::Message | FaultClass::Destination).then_some(tidy);
                let wait = failover.lost(fault.class, began.elapsed(), worked, Instant::now());
                (target.naming(fault), wait)
            }
        };
        if fault.class == FaultClass::Config {
            debug!(broker = %target, epoch = number, %fault, "publisher refused by the broker");
        } else {
            debug!(broker = %target, epoch = number, %fault, "publisher disconnected");
        }
        if !events.send(PublisherEvent::Down { epoch, fault }) {
            return;
        }
        debug!(broker = %target, wait_ms = as_ms(wait), "next connection attempt");
        let wait = without_commands(&mut commands, async {
            tokio::time::sleep(wait).await;
            if let Some(tidy) = tidying {
                // It ends in time, whatever the broker does.
                _ = tidy.await;
            }
        });
        if stop.or(wait).await.is_none() {
            return;
        }
    }
}

/// Runs `future` while there is no epoch: what comes in meanwhile is of one that is over.
async fn without_commands<T>(commands: &mut mpsc::Receiver<Command>, future: impl Future<Output = T>) -> T {
    let discard = async {
        while commands.recv().await.is_some() {}
        // The handle is gone; the stop that this means is seen elsewhere.
        std::future::pending::<()>().await;
    };
    match select(pin!(future), pin!(discard)).await {
        Either::Left((value, _)) => value,
        Either::Right(((), _)) => unreachable!("it never ends"),
    }
}

/// Why an epoch ended.
enum End {
    Stop,
    Fault(Fault),
}

/// What one iteration of an epoch woke up for.
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Woken {
    Stop,
    Connection(Option<Event>),
    Confirm(Confirmed),
    /// The broker has said why these were returned, or cannot be asked on this connection any more.
    Returned(Result<Vec<(Ticket, Outcome)>, Fault>),
    /// So many commands; 0 when the handle is gone.
    Commands(usize),
    /// Outcomes have waited long enough.
    BatchTimeout,
    /// There is something to settle.
    Again,
    Tick,
}

/// One epoch. Returns why it ended, and whether the broker has confirmed anything on it.
async fn serve(
    link: &mut Link,
    mut window: Window<'_>,
    epoch: Epoch,
    options: &Options,
    commands: &mut mpsc::Receiver<Command>,
    events: &PublisherEvents,
    stop: &mut Stop,
) -> (End, bool) {
    let mut batch = Vec::with_capacity(BATCH);
    let heartbeat = Duration::from_secs(link.connection.configuration().heartbeat().max(1).into());
    let tick = options.confirm_deadline.min(heartbeat);
    let mut timer = pin!(tokio::time::sleep(tick));
    let mut batch_timeout = pin!(tokio::time::sleep(OUTCOME_BATCH_TIMEOUT));
    let mut asked = pin!(stop.asked());
    let end = loop {
        let woken = poll_fn(|cx| {
            if asked.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Woken::Stop);
            }
            if let Poll::Ready(event) = link.events.poll_next_unpin(cx) {
                return Poll::Ready(Woken::Connection(event));
            }
            if let Poll::Ready(confirmed) = window.poll_confirm(cx) {
                return Poll::Ready(Woken::Confirm(confirmed));
            }
            if let Poll::Ready(reported) = window.causes.poll(cx) {
                return Poll::Ready(Woken::Returned(reported));
            }
            if std::mem::take(&mut window.noted) {
                return Poll::Ready(Woken::Again);
            }
            if let Poll::Ready(count) = commands.poll_recv_many(cx, &mut batch, BATCH) {
                return Poll::Ready(Woken::Commands(count));
            }
            if window.holds_outcomes() && batch_timeout.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Woken::BatchTimeout);
            }
            timer.as_mut().poll(cx).map(|()| Woken::Tick)
        })
        .await;
        // Looked at here too: what comes in is asked for first, and may never end.
        let batch_timed_out = matches!(woken, Woken::BatchTimeout)
            || (window.holds_outcomes() && batch_timeout.deadline() <= tokio::time::Instant::now());
        let result = match woken {
            Woken::Stop | Woken::Commands(0) => break End::Stop,
            Woken::Commands(_) | Woken::BatchTimeout | Woken::Again => Ok(()),
            // Of a message that was isolated on a channel of its own: the window's is as it was. It is looked at again soon.
            Woken::Connection(Some(Event::Error(error))) if link.is_alive() && is_about_a_queue(&error) => {
                Ok(())
            }
            Woken::Connection(Some(Event::Error(error))) if link.is_alive() => {
                window.overheard = Some(error);
                timer.set(tokio::time::sleep(OVERHEARD));
                Ok(())
            }
            Woken::Connection(event) => window.connection(event, events),
            Woken::Confirm(confirmed) => window.confirmed(confirmed),
            Woken::Returned(Err(fault)) => Err(Broken::Fault(fault)),
            Woken::Returned(Ok(reported)) => {
                window.settled.extend(reported);
                Ok(())
            }
            Woken::Tick => {
                timer.set(tokio::time::sleep(window.next_tick(tick, options.confirm_deadline)));
                let overheard = window.overheard.take();
                if link.is_alive() {
                    window.check_age(options.confirm_deadline)
                } else {
                    Err(overheard.map_or(Broken::Echo, Broken::from))
                }
            }
        };
        // Confirms and commands are both taken in at every iteration, so that neither waits for a flood of the other.
        // Confirms also after an error: what is confirmed needs no resend.
        let mut result = worse(result, window.take_ready_confirms());
        let held_before = window.holds_outcomes();
        result = worse(result, window.settle());
        if batch_timed_out || result.is_err() || window.has_batch() {
            if window.report_settled(events).is_err() {
                break End::Stop;
            }
        } else if !held_before && window.holds_outcomes() {
            batch_timeout.set(tokio::time::sleep(OUTCOME_BATCH_TIMEOUT));
        }
        if batch.is_empty() && !commands.is_empty() {
            let _ = commands.recv_many(&mut batch, BATCH).now_or_never();
        }
        for (of, outgoing) in batch.drain(..) {
            // A command of an epoch that is over is dropped without a word; so is one after a fault of this one.
            if of == epoch && result.is_ok() {
                result = window.publish(outgoing, events);
            }
        }
        if let Err(broken) = result {
            let fault = window.why(broken, link).await;
            // What is wrong is known already.
            _ = window.settle();
            if window.report_settled(events).is_err() {
                break End::Stop;
            }
            break End::Fault(fault);
        }
    };
    _ = window.settle();
    let _ = window.report_settled(events);
    window.unblock(events);
    (end, window.worked)
}
