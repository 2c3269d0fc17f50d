//! The publishing side: one connection after another, and the window on each connection.
//!
//! **Invariants.** One task publishes on a channel, on a current-thread runtime. Publishes are
//! first polled in the order of the calls; that order decides the broker's tags. No channel is used
//! again after an error.

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

/// The most commands that one iteration takes.
const BATCH: usize = 512;

/// The longest time that an outcome waits for its batch.
const OUTCOME_BATCH_TIMEOUT: Duration = Duration::from_millis(1);

/// The time after an error on the connection at which its state is checked again.
const OVERHEARD: Duration = Duration::from_millis(50);

/// One message for the window.
pub(super) type Command = (Epoch, Outgoing);

/// Publishes until a stop is requested or the receiver of the events is gone.
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
                // The relay logs the connect at its own level, so here it is only a debug line.
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
                // The report comes before the closing: the relay need not wait for a broker that
                // does not answer.
                let tidy = tokio::spawn(link.close(stop.time_to_close()));
                // This broker works and is tried again. If it allows only one connection, the last
                // connection must be gone by then.
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
                // The task ends within its deadline, even if the broker does not answer.
                _ = tidy.await;
            }
        });
        if stop.or(wait).await.is_none() {
            return;
        }
    }
}

/// Runs `future` while there is no epoch, and drops commands of the last epoch meanwhile.
async fn without_commands<T>(commands: &mut mpsc::Receiver<Command>, future: impl Future<Output = T>) -> T {
    let discard = async {
        while commands.recv().await.is_some() {}
        // The handle is gone, which is a stop; `stop` reports it.
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

/// The event that woke one iteration of an epoch.
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Woken {
    Stop,
    Connection(Option<Event>),
    Confirm(Confirmed),
    /// The broker has given the cause of these returns, or cannot be asked on this connection any
    /// more.
    Returned(Result<Vec<(Ticket, Outcome)>, Fault>),
    /// The number of commands; 0 if the handle is gone.
    Commands(usize),
    /// Outcomes have waited long enough for their batch.
    BatchTimeout,
    /// There is something to settle.
    Again,
    Tick,
}

/// Serves one epoch. Returns why the epoch ended, and whether the broker confirmed anything in it.
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
        // The timeout is also checked here: events from the broker are polled first, and may never
        // end.
        let batch_timed_out = matches!(woken, Woken::BatchTimeout)
            || (window.holds_outcomes() && batch_timeout.deadline() <= tokio::time::Instant::now());
        let result = match woken {
            Woken::Stop | Woken::Commands(0) => break End::Stop,
            Woken::Commands(_) | Woken::BatchTimeout | Woken::Again => Ok(()),
            // The error belongs to the question of an isolated message on another channel; the
            // window's channel is unaffected.
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
        // Both confirms and commands are taken at every iteration, so that neither waits for a
        // flood of the other. Confirms are also taken after an error: a confirmed message needs no
        // resend.
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
            // A command of an epoch that is over is dropped silently. So is a command after a fault
            // of this epoch.
            if of == epoch && result.is_ok() {
                result = window.publish(outgoing, events);
            }
        }
        if let Err(broken) = result {
            let fault = window.why(broken, link).await;
            // The reason is already known.
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
