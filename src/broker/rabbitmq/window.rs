//! The messages in flight on one connection: publishes, their confirms, and their outcomes.
//!
//! **Invariant.** Every confirm is held until it resolves or the connection is given up.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::{Channel, Confirmation, Event};
use tracing::{debug, error};

use super::cause::Causes;
use super::classify::{Phase, classify, is_the_brokers_own};
use super::connection::Link;
use super::inbound::Returns;
use super::isolated::Isolation;
use super::nacks::{Destination, Nacks};
use super::options::Options;
use super::prepared::{Prepared, no_confirm_within};
use super::settle::{Ledger, Silence, Word};
use crate::broker::{PublisherEvent, PublisherEvents};
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};
use crate::printable::printable;
use crate::time::as_ms;

/// The smallest batch of outcomes. While fewer messages than this are in flight, outcomes are
/// reported at once.
///
/// A report for each outcome would cost two thread wake-ups, and the messages published for it
/// would leave one by one too.
const OUTCOME_BATCH_MIN: usize = 64;

/// The largest batch. A batch is an eighth of the messages in flight, within the two bounds.
const OUTCOME_BATCH_MAX: usize = 512;

/// The longest wait for the broker's own error after an echo of it (`channel is closing`) was seen.
const REASON_WAIT: Duration = Duration::from_millis(500);

pub(super) type Confirmed = (u64, Destination, lapin::Result<Confirmation>);

pub(super) type Confirms = FuturesUnordered<Pin<Box<dyn Future<Output = Confirmed> + Send>>>;

/// The reason why an epoch cannot continue.
pub(super) enum Broken {
    /// The fault is known.
    Fault(Fault),
    /// Something is closing or closed; the reason may still come.
    Echo,
}

impl From<lapin::Error> for Broken {
    fn from(error: lapin::Error) -> Self {
        if is_the_brokers_own(&error) { Self::Fault(classify(&error, Phase::Publish)) } else { Self::Echo }
    }
}

/// Returns the more informative of two results.
pub(super) fn worse(a: Result<(), Broken>, b: Result<(), Broken>) -> Result<(), Broken> {
    match (a, b) {
        (Ok(()) | Err(Broken::Echo), b @ Err(_)) => b,
        (a, _) => a,
    }
}

/// The messages in flight on one channel.
pub(super) struct Window<'a> {
    pub(super) channel: Channel,
    pub(super) frame_bytes_max: usize,
    pub(super) confirms: Confirms,
    pub(super) ledger: Ledger,
    /// Outcomes that wait to be reported in one batch.
    pub(super) settled: Vec<(Ticket, Outcome)>,
    pub(super) clock: UnblockedClock,
    pub(super) worked: bool,
    /// A confirm was noted while publishing, after this iteration had settled: another iteration is
    /// needed.
    pub(super) noted: bool,
    pub(super) returns: Returns,
    /// An error of another channel, or of this connection before its state has changed.
    pub(super) overheard: Option<lapin::Error>,
    /// Returned messages that wait for their cause.
    pub(super) causes: Causes,
    pub(super) nacks: &'a mut Nacks,
    pub(super) isolation: &'a Isolation,
}

impl<'a> Window<'a> {
    pub(crate) fn new(
        link: &Link,
        options: &Arc<Options>,
        nacks: &'a mut Nacks,
        isolation: &'a Isolation,
    ) -> Self {
        Self {
            channel: link.channel.clone(),
            frame_bytes_max: link.connection.configuration().frame_max() as usize,
            confirms: FuturesUnordered::new(),
            ledger: Ledger::new(),
            settled: Vec::new(),
            clock: UnblockedClock::new(),
            worked: false,
            noted: false,
            returns: link.returns.clone(),
            overheard: None,
            causes: Causes::new(Arc::clone(options), Arc::clone(&link.connection)),
            nacks,
            isolation,
        }
    }

    pub(crate) fn publish(&mut self, outgoing: Outgoing, events: &PublisherEvents) -> Result<(), Broken> {
        let ticket = outgoing.ticket;
        let prepared = match Prepared::new(&outgoing, self.frame_bytes_max) {
            Ok(prepared) => prepared,
            Err(fault) => {
                events.send(PublisherEvent::Outcomes(vec![(ticket, Outcome::Refused(fault))]));
                return Ok(());
            }
        };
        let tag = self.ledger.published(ticket, Arc::clone(&outgoing.message), self.clock.now_ms());
        let destination = self.nacks.destination(&outgoing.exchange, &outgoing.routing_key);
        let channel = self.channel.clone();
        let mut confirm: Pin<Box<dyn Future<Output = Confirmed> + Send>> =
            Box::pin(async move { (tag, destination, prepared.send(&channel).await) });
        // The first poll, here and now, hands the frames to lapin and draws the tag in this order.
        // The set polls the future again, with a waker.
        match (&mut confirm).now_or_never() {
            Some((_, _, Err(error))) => return Err(error.into()),
            Some(confirmed) => {
                self.noted = true;
                self.confirmed(confirmed)?;
            }
            None => self.confirms.push(confirm),
        }
        Ok(())
    }

    pub(crate) fn poll_confirm(&mut self, cx: &mut Context<'_>) -> Poll<Confirmed> {
        match self.confirms.poll_next_unpin(cx) {
            Poll::Ready(Some(confirmed)) => Poll::Ready(confirmed),
            // An empty set has nothing to wake for; commands wake the task.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    pub(crate) fn take_ready_confirms(&mut self) -> Result<(), Broken> {
        let mut result = Ok(());
        while let Some(Some(confirmed)) = self.confirms.next().now_or_never() {
            result = worse(result, self.confirmed(confirmed));
        }
        result
    }

    pub(crate) fn confirmed(&mut self, (tag, destination, confirmation): Confirmed) -> Result<(), Broken> {
        // This library pairs returns and confirms itself (see `settle`): lapin sees no return.
        let word = match confirmation? {
            Confirmation::Ack(_) => Word::Ack,
            Confirmation::Nack(_) => Word::Nack,
            Confirmation::NotRequested => {
                return Err(Broken::Fault(Fault::new(
                    FaultClass::Outage,
                    "the channel is not in confirm mode",
                )));
            }
        };
        self.worked = true;
        self.ledger.confirmed(tag, word);
        match word {
            Word::Ack => self.nacks.acked(destination),
            Word::Nack => {
                self.hear_isolated()?;
                self.nacks.nacked(destination);
            }
        }
        Ok(())
    }

    /// Checks whether channels beside this channel ack what this channel nacks.
    fn hear_isolated(&mut self) -> Result<(), Broken> {
        for (exchange, routing_key) in self.isolation.take_acked() {
            let destination = self.nacks.destination(&exchange, &routing_key);
            if self.nacks.acked_isolated(destination) {
                let text = format!(
                    "this channel nacks every message for exchange `{exchange}`, routing key `{routing_key}`; others ack them"
                );
                return Err(Broken::Fault(Fault::new(FaultClass::Outage, text)));
            }
        }
        Ok(())
    }

    /// Settles every noted confirm: the returns that came before it are taken now.
    pub(crate) fn settle(&mut self) -> Result<(), Broken> {
        #[cfg(onewrite_mutations)]
        if crate::mutations::mutated("ignore-returns") {
            _ = self.returns.take(self.channel.id());
        }
        let mut result = Ok(());
        for returned in self.returns.take(self.channel.id()) {
            if self.ledger.returned(&returned).is_err() {
                error!("a message was returned that is not in flight, or whose outcome was reported");
                let text = "a message was returned that is not in flight, or whose outcome was reported";
                result = Err(Broken::Fault(Fault::new(FaultClass::Outage, text)));
            }
        }
        let mut returned = Vec::new();
        self.ledger.settle_into(&mut self.settled, &mut returned);
        for (ticket, returned) in returned {
            self.causes.returned(ticket, returned);
        }
        result
    }

    pub(crate) fn holds_outcomes(&self) -> bool {
        !self.settled.is_empty()
    }

    /// Whether settled outcomes should be reported now: they fill a batch, or the relay may be
    /// waiting for them.
    pub(crate) fn has_batch(&self) -> bool {
        let in_flight = self.ledger.len();
        in_flight < OUTCOME_BATCH_MIN
            || self.settled.len() >= (in_flight / 8).clamp(OUTCOME_BATCH_MIN, OUTCOME_BATCH_MAX)
    }

    /// Reports the settled outcomes. An error means that the receiver of the events is gone.
    pub(crate) fn report_settled(&mut self, events: &PublisherEvents) -> Result<(), ()> {
        let settled = std::mem::take(&mut self.settled);
        if settled.is_empty() || events.send(PublisherEvent::Outcomes(settled)) { Ok(()) } else { Err(()) }
    }

    pub(crate) fn connection(
        &mut self,
        event: Option<Event>,
        events: &PublisherEvents,
    ) -> Result<(), Broken> {
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                debug!(reason = %printable(reason.as_str()), "the broker blocks publishers");
                self.clock.block();
                events.send(PublisherEvent::Blocked { blocked: true });
                Ok(())
            }
            Some(Event::ConnectionUnblocked) => {
                debug!("the broker no longer blocks publishers");
                self.unblock(events);
                Ok(())
            }
            Some(Event::Error(error)) => Err(error.into()),
            None => Err(Broken::Echo),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn unblock(&mut self, events: &PublisherEvents) {
        if self.clock.unblock() {
            events.send(PublisherEvent::Blocked { blocked: false });
        }
    }

    /// Reports messages silent that have waited too long. If nothing shows that the channel works,
    /// it is given up. RabbitMQ 3.10 stops reading a channel at the first message for a quorum
    /// queue without a leader.
    pub(crate) fn check_age(&mut self, deadline: Duration) -> Result<(), Broken> {
        let Some(until_ms) = self.clock.now_ms().checked_sub(as_ms(deadline)) else { return Ok(()) };
        let fault = no_confirm_within(deadline);
        match self.ledger.silent_into(until_ms, &fault, &mut self.settled) {
            Silence::None => Ok(()),
            Silence::OfSome => {
                debug!(%fault, "some messages get no confirm");
                Ok(())
            }
            Silence::OfAll => Err(Broken::Fault(fault)),
        }
    }

    /// The time until the oldest publish is due, at most `tick`.
    pub(crate) fn next_tick(&self, tick: Duration, deadline: Duration) -> Duration {
        let Some(since_ms) = self.ledger.oldest_since_ms() else { return tick };
        let due_ms = since_ms.saturating_add(as_ms(deadline)).saturating_sub(self.clock.now_ms());
        Duration::from_millis(due_ms).clamp(Duration::from_millis(1), tick)
    }

    /// Returns the reason. If only its echo was seen, waits a moment for the reason.
    pub(crate) async fn why(&mut self, broken: Broken, link: &mut Link) -> Fault {
        if let Broken::Fault(fault) = broken {
            return fault;
        }
        let reason = poll_fn(|cx| {
            while let Poll::Ready(Some(event)) = link.events.poll_next_unpin(cx) {
                if let Event::Error(error) = event
                    && is_the_brokers_own(&error)
                {
                    return Poll::Ready(classify(&error, Phase::Publish));
                }
            }
            while let Poll::Ready(confirmed) = self.poll_confirm(cx) {
                if let Err(Broken::Fault(fault)) = self.confirmed(confirmed) {
                    return Poll::Ready(fault);
                }
            }
            Poll::Pending
        });
        match tokio::time::timeout(REASON_WAIT, reason).await {
            Ok(fault) => fault,
            Err(_) => Fault::new(FaultClass::Outage, "the connection ended without a reason"),
        }
    }
}

/// A clock in milliseconds that stops while the broker blocks publishers.
pub(super) struct UnblockedClock {
    began: Instant,
    blocked_since: Option<Instant>,
    blocked: Duration,
}

impl UnblockedClock {
    fn new() -> Self {
        Self { began: Instant::now(), blocked_since: None, blocked: Duration::ZERO }
    }

    fn now_ms(&self) -> u64 {
        let now = self.blocked_since.unwrap_or_else(Instant::now);
        as_ms(now.duration_since(self.began).saturating_sub(self.blocked))
    }

    fn block(&mut self) {
        self.blocked_since.get_or_insert_with(Instant::now);
    }

    /// Ends a blocked time. Returns whether there was one.
    fn unblock(&mut self) -> bool {
        let Some(since) = self.blocked_since.take() else { return false };
        self.blocked += since.elapsed();
        true
    }
}
