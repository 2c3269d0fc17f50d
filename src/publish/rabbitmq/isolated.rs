//! Messages under suspicion, one at a time, on a connection of their own.
//!
//! **Invariants.** Each gets exactly one outcome, also when the thread ends. Nothing here touches the window's
//! connection.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::Confirmation;
use tokio::sync::mpsc;
use tracing::debug;

use crate::message::{Fault, FaultClass, Outcome, Outgoing};
use crate::publish::{PublisherEvent, PublisherEvents};

use super::background::Stop;
use super::classify::{Phase, classify};
use super::connection::Link;
use super::options::Options;
use super::publisher::{Prepared, return_fault};
use super::rota::Rota;

/// A connection that nobody needs any more is given back after this.
const IDLE: Duration = Duration::from_secs(10);

/// Publishes suspects until it is told to stop.
pub(super) async fn run(
    options: Arc<Options>,
    mut suspects: mpsc::Receiver<Outgoing>,
    events: PublisherEvents,
    mut stop: Stop,
) {
    let mut link: Option<Link> = None;
    let mut rota = Rota::new(options.targets.len(), options.backoff);
    loop {
        let next = if link.is_some() {
            stop.or(tokio::time::timeout(IDLE, suspects.recv())).await
        } else {
            stop.or(async { Ok(suspects.recv().await) }).await
        };
        let suspect = match next {
            None | Some(Ok(None)) => break,
            Some(Ok(Some(suspect))) => suspect,
            Some(Err(_)) => {
                if let Some(link) = link.take() {
                    link.close(stop.time_to_close()).await;
                }
                continue;
            }
        };
        let ticket = suspect.ticket;
        let one = publish_one(&mut link, &options, &mut rota, suspect);
        let (outcome, rest) =
            stop.or(one).await.unwrap_or_else(|| (Outcome::Unknown(stopped()), Duration::ZERO));
        debug!(?ticket, "isolated message settled");
        let away = matches!(outcome, Outcome::Unknown(_));
        if !events.send(PublisherEvent::Outcomes(vec![(ticket, outcome)])) {
            break;
        }
        // The relay may hand the same one over at once; a broker that is away is not asked in a tight loop.
        let pause = if away { rest.max(options.backoff.0) } else { Duration::ZERO };
        if !pause.is_zero() && stop.or(tokio::time::sleep(pause)).await.is_none() {
            break;
        }
    }
    suspects.close();
    while let Some(suspect) = suspects.recv().await {
        events.send(PublisherEvent::Outcomes(vec![(suspect.ticket, Outcome::Unknown(stopped()))]));
    }
    if let Some(link) = link {
        link.close(stop.time_to_close()).await;
    }
}

fn stopped() -> Fault {
    Fault::new(FaultClass::Outage, "the publisher was stopped")
}

/// Tells what became of it, and for how long no broker should be asked. A broker that gives no answer, or a nack, hands over to the next: it
/// may be half dead while the others are well.
async fn publish_one(
    slot: &mut Option<Link>,
    options: &Options,
    rota: &mut Rota,
    suspect: Outgoing,
) -> (Outcome, Duration) {
    let link = match slot.take().filter(Link::is_alive) {
        Some(link) => link,
        None => match open_any(options, rota).await {
            Ok(link) => link,
            Err((fault, rest)) => return (Outcome::Unknown(fault), rest),
        },
    };
    let outcome = publish_over(link, slot, options, suspect).await;
    match outcome {
        Outcome::Unknown(_) | Outcome::Nacked => {
            _ = rota.lost(FaultClass::Outage, Duration::ZERO, false, Instant::now());
        }
        _ => rota.answered(),
    }
    (outcome, Duration::ZERO)
}

/// Leaves the connection in `slot` only when it is as good as new.
async fn publish_over(link: Link, slot: &mut Option<Link>, options: &Options, suspect: Outgoing) -> Outcome {
    let frame_bytes_max = link.connection.configuration().frame_max() as usize;
    let prepared = match Prepared::new(&suspect, frame_bytes_max) {
        Ok(prepared) => prepared,
        Err(fault) => {
            *slot = Some(link);
            return Outcome::Refused(fault);
        }
    };
    let confirmation = tokio::time::timeout(options.confirm_deadline, prepared.send(&link.channel)).await;
    let outcome = match confirmation {
        Err(_) => {
            let text = format!("no confirm within {} s", options.confirm_deadline.as_secs_f64());
            return Outcome::Unknown(Fault::new(FaultClass::Outage, text));
        }
        Ok(Err(error)) => {
            let fault = classify(&error, Phase::Publish);
            debug!(%fault, "isolated message failed");
            return match fault.class {
                FaultClass::Message | FaultClass::Destination => Outcome::Refused(fault),
                _ => Outcome::Unknown(fault),
            };
        }
        Ok(Ok(Confirmation::NotRequested)) => {
            return Outcome::Unknown(Fault::new(FaultClass::Outage, "the channel is not in confirm mode"));
        }
        // Alone on its channel, so a return is its own.
        Ok(Ok(Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)))) => {
            Outcome::Returned(return_fault(&returned))
        }
        Ok(Ok(Confirmation::Ack(None))) => Outcome::Confirmed,
        // Perhaps only on this channel (see `nacks`): the next one gets another.
        Ok(Ok(Confirmation::Nack(None))) => return Outcome::Nacked,
    };
    *slot = Some(link);
    outcome
}

/// Asks each broker once, as the window's connection does. If all fail: how long those rest that have refused us.
async fn open_any(options: &Options, rota: &mut Rota) -> Result<Link, (Fault, Duration)> {
    loop {
        let Some(target) = options.targets.get(rota.at()) else { return Err((stopped(), Duration::ZERO)) };
        let fault = match Link::open(options, target).await {
            Ok(link) => return Ok(link),
            Err(fault) => fault,
        };
        debug!(broker = %target, %fault, "no connection for isolated messages");
        let wait = rota.refused(fault.class, Instant::now());
        if !wait.is_zero() {
            let rest = if fault.class == FaultClass::Config { wait } else { Duration::ZERO };
            return Err((fault, rest));
        }
    }
}
