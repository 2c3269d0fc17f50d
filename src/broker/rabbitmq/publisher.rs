//! The publishing side: one connection after the other, and on each the window.
//!
//! **Invariants.** One task publishes on a channel, on a current-thread runtime. Publishes are polled first in the
//! order of the calls, which is what decides the broker's tags. Every confirm is held until it resolves or the
//! connection is given up; no channel is used again after an error.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::future::{Either, FutureExt, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, Event};
use tokio::sync::mpsc;
use tracing::{debug, error};

use crate::broker::{Epoch, PublisherEvent, PublisherEvents};
use crate::message::{Fault, FaultClass, Message, Outcome, Outgoing, Ticket};
use crate::printable::printable;
use crate::time::as_ms;

use super::background::Stop;
use super::cause::Causes;
use super::classify::{Phase, classify, is_about_a_queue, is_telling};
use super::connection::Link;
use super::convert::{header_frame_len_max, short, to_properties};
use super::inbound::Returns;
use super::isolated::Apart;
use super::nacks::{Destination, Nacks};
use super::options::Options;
use super::rota::Rota;
use super::settle::{Ledger, Silence, Word};

/// Commands taken in at one turn.
const BATCH: usize = 512;

/// Outcomes are gathered into lots while at least as many more are in flight: telling each by itself costs two wake-ups of threads, and what
/// is published for it goes out by itself too. Fewer than the smallest lot are told at once.
const LOT_MIN: usize = 64;

/// A lot is a quarter of what is in flight, within bounds: the larger the window, the less a lot says about the room in it.
const LOT_MAX: usize = 512;

/// How long an outcome may wait for its lot.
const LOT_PATIENCE: Duration = Duration::from_millis(1);

/// How long to wait for the broker's own word after an echo of it (`channel is closing`) was seen.
const TELLING: Duration = Duration::from_millis(500);

/// After an error somewhere on the connection, its state is looked at again.
const OVERHEARD: Duration = Duration::from_millis(50);

/// One message of the window.
pub(super) type Command = (Epoch, Outgoing);

/// Publishes until it is told to stop, or nobody listens any more.
pub(super) async fn run(
    options: Arc<Options>,
    mut commands: mpsc::Receiver<Command>,
    events: PublisherEvents,
    current: Arc<AtomicU64>,
    apart: Arc<Apart>,
    mut stop: Stop,
) {
    let mut rota = Rota::new(options.targets.len(), options.backoff);
    let mut nacks = Nacks::default();
    for number in 1.. {
        let epoch = Epoch(number);
        let Some(target) = options.targets.get(rota.at()) else { return };
        let attempt = without_commands(&mut commands, Link::open(&options, target));
        let Some(attempt) = stop.or(attempt).await else { return };
        let mut tidying = None;
        let (fault, wait) = match attempt {
            Err(fault) => {
                let wait = rota.refused(fault.class, Instant::now());
                (fault, wait)
            }
            Ok(mut link) => {
                // The relay tells it at its own level: each of these is told once.
                debug!(broker = %target, epoch = number, "publisher connected");
                let began = Instant::now();
                current.store(number, Ordering::Release);
                apart.connected(&link);
                if !events.send(PublisherEvent::Up { epoch }) {
                    return link.close(stop.time_to_close()).await;
                }
                nacks.connected();
                let window = Window::new(&link, &options, &mut nacks, &apart);
                let (end, worked) =
                    serve(&mut link, window, epoch, &options, &mut commands, &events, &mut stop).await;
                current.store(0, Ordering::Release);
                apart.disconnected(match &end {
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
                let wait = rota.lost(fault.class, began.elapsed(), worked, Instant::now());
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

/// What one turn of an epoch woke up for.
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Turn {
    Stop,
    Connection(Option<Event>),
    Confirm(Confirmed),
    /// The broker has said why these were returned.
    Returned(Vec<(Ticket, Outcome)>),
    /// So many commands; 0 when the handle is gone.
    Commands(usize),
    /// Outcomes have waited long enough.
    Patience,
    /// There is something to settle.
    Again,
    Tick,
}

type Confirmed = (u64, Destination, lapin::Result<Confirmation>);
type Confirms = FuturesUnordered<Pin<Box<dyn Future<Output = Confirmed> + Send>>>;

/// One epoch. Tells why it ended, and whether the broker has confirmed anything on it.
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
    let mut patience = pin!(tokio::time::sleep(LOT_PATIENCE));
    let mut asked = pin!(stop.asked());
    let end = loop {
        let turn = poll_fn(|cx| {
            if asked.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Turn::Stop);
            }
            if let Poll::Ready(event) = link.events.poll_next_unpin(cx) {
                return Poll::Ready(Turn::Connection(event));
            }
            if let Poll::Ready(confirmed) = window.poll_confirm(cx) {
                return Poll::Ready(Turn::Confirm(confirmed));
            }
            if let Poll::Ready(told) = window.causes.poll(cx) {
                return Poll::Ready(Turn::Returned(told));
            }
            if std::mem::take(&mut window.noted) {
                return Poll::Ready(Turn::Again);
            }
            if let Poll::Ready(count) = commands.poll_recv_many(cx, &mut batch, BATCH) {
                return Poll::Ready(Turn::Commands(count));
            }
            if window.holds_outcomes() && patience.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Turn::Patience);
            }
            timer.as_mut().poll(cx).map(|()| Turn::Tick)
        })
        .await;
        // Looked at here too: what comes in is asked for first, and may never end.
        let patience_over = matches!(turn, Turn::Patience)
            || (window.holds_outcomes() && patience.deadline() <= tokio::time::Instant::now());
        let result = match turn {
            Turn::Stop | Turn::Commands(0) => break End::Stop,
            Turn::Commands(_) | Turn::Patience | Turn::Again => Ok(()),
            // Of a message that was isolated on a channel of its own: the window's is as it was. It is looked at again soon.
            Turn::Connection(Some(Event::Error(error))) if link.is_alive() && is_about_a_queue(&error) => {
                Ok(())
            }
            Turn::Connection(Some(Event::Error(error))) if link.is_alive() => {
                window.overheard = Some(error);
                timer.set(tokio::time::sleep(OVERHEARD));
                Ok(())
            }
            Turn::Connection(event) => window.connection(event, events),
            Turn::Confirm(confirmed) => window.confirmed(confirmed),
            Turn::Returned(told) => {
                window.settled.extend(told);
                Ok(())
            }
            Turn::Tick => {
                timer.set(tokio::time::sleep(window.next_tick(tick, options.confirm_deadline)));
                let overheard = window.overheard.take();
                if link.is_alive() {
                    window.check_age(options.confirm_deadline)
                } else {
                    Err(overheard.map_or(Broken::Echo, Broken::from))
                }
            }
        };
        // Confirms and commands are both taken in at every turn, so that neither waits for a flood of the other.
        // Confirms also after an error: what is confirmed needs no resend.
        let mut result = worse(result, window.take_ready_confirms());
        let held_before = window.holds_outcomes();
        result = worse(result, window.settle());
        if patience_over || result.is_err() || window.has_lot() {
            if window.tell_settled(events).is_err() {
                break End::Stop;
            }
        } else if !held_before && window.holds_outcomes() {
            patience.set(tokio::time::sleep(LOT_PATIENCE));
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
            if window.tell_settled(events).is_err() {
                break End::Stop;
            }
            break End::Fault(fault);
        }
    };
    _ = window.settle();
    let _ = window.tell_settled(events);
    window.unblock(events);
    (end, window.worked)
}

/// Why an epoch cannot go on.
enum Broken {
    /// This is why.
    Fault(Fault),
    /// Something is closing or closed; the reason may be about to come.
    Echo,
}

impl From<lapin::Error> for Broken {
    fn from(error: lapin::Error) -> Self {
        if is_telling(&error) { Self::Fault(classify(&error, Phase::Publish)) } else { Self::Echo }
    }
}

/// Of two results the one that says more.
fn worse(a: Result<(), Broken>, b: Result<(), Broken>) -> Result<(), Broken> {
    match (a, b) {
        (Ok(()) | Err(Broken::Echo), b @ Err(_)) => b,
        (a, _) => a,
    }
}

/// What is in flight on one channel.
struct Window<'a> {
    channel: Channel,
    frame_bytes_max: usize,
    confirms: Confirms,
    ledger: Ledger,
    /// Settled, and waiting to be told in one lot.
    settled: Vec<(Ticket, Outcome)>,
    clock: UnblockedClock,
    worked: bool,
    /// A confirm was noted while publishing, after this turn had settled: there is to be another turn.
    noted: bool,
    returns: Returns,
    /// An error of another channel, or of this connection where its state has not changed yet.
    overheard: Option<lapin::Error>,
    /// What was returned, and waits for the answer why.
    causes: Causes,
    nacks: &'a mut Nacks,
    apart: &'a Apart,
}

impl<'a> Window<'a> {
    fn new(link: &Link, options: &Arc<Options>, nacks: &'a mut Nacks, apart: &'a Apart) -> Self {
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
            apart,
        }
    }

    fn publish(&mut self, outgoing: Outgoing, events: &PublisherEvents) -> Result<(), Broken> {
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
        // The first poll hands the frames to lapin and draws the tag: in this order, here and now. The set polls it
        // again, with a waker.
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

    fn poll_confirm(&mut self, cx: &mut Context<'_>) -> Poll<Confirmed> {
        match self.confirms.poll_next_unpin(cx) {
            Poll::Ready(Some(confirmed)) => Poll::Ready(confirmed),
            // An empty set has nothing to wake for; commands do that.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    fn take_ready_confirms(&mut self) -> Result<(), Broken> {
        let mut result = Ok(());
        while let Some(Some(confirmed)) = self.confirms.next().now_or_never() {
            result = worse(result, self.confirmed(confirmed));
        }
        result
    }

    fn confirmed(&mut self, (tag, destination, confirmation): Confirmed) -> Result<(), Broken> {
        // Which return is whose is ours to say (see `settle`): lapin sees none.
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
                self.hear_apart()?;
                self.nacks.nacked(destination);
            }
        }
        Ok(())
    }

    /// Whether channels beside this one ack what this one nacks.
    fn hear_apart(&mut self) -> Result<(), Broken> {
        for (exchange, routing_key) in self.apart.take_acked() {
            let destination = self.nacks.destination(&exchange, &routing_key);
            if self.nacks.acked_apart(destination) {
                let text = format!(
                    "this channel nacks every message for exchange `{exchange}`, routing key `{routing_key}`; others ack them"
                );
                return Err(Broken::Fault(Fault::new(FaultClass::Outage, text)));
            }
        }
        Ok(())
    }

    /// Every confirm that has been noted is settled: the returns that came before it are taken now.
    fn settle(&mut self) -> Result<(), Broken> {
        #[cfg(onewrite_mutations)]
        if crate::mutations::mutated("ignore-returns") {
            _ = self.returns.take(self.channel.id());
        }
        let mut result = Ok(());
        for returned in self.returns.take(self.channel.id()) {
            if self.ledger.returned(&returned).is_err() {
                error!("a message was returned that is not in flight, or whose outcome was told");
                let text = "a message was returned that is not in flight, or whose outcome was told";
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

    fn holds_outcomes(&self) -> bool {
        !self.settled.is_empty()
    }

    /// Whether what is settled should be told now: it is a lot, or the relay may be waiting for it.
    fn has_lot(&self) -> bool {
        let in_flight = self.ledger.len();
        in_flight < LOT_MIN || self.settled.len() >= (in_flight / 8).clamp(LOT_MIN, LOT_MAX)
    }

    /// An error says that nobody listens.
    fn tell_settled(&mut self, events: &PublisherEvents) -> Result<(), ()> {
        let settled = std::mem::take(&mut self.settled);
        if settled.is_empty() || events.send(PublisherEvent::Outcomes(settled)) { Ok(()) } else { Err(()) }
    }

    fn connection(&mut self, event: Option<Event>, events: &PublisherEvents) -> Result<(), Broken> {
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

    fn unblock(&mut self, events: &PublisherEvents) {
        if self.clock.unblock() {
            events.send(PublisherEvent::Blocked { blocked: false });
        }
    }

    /// Tells of what has waited for its word for too long. If nothing says that the channel lives, it is given up: RabbitMQ 3.10 stops
    /// reading a channel at the first message for a quorum queue without a leader.
    fn check_age(&mut self, deadline: Duration) -> Result<(), Broken> {
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

    /// Until the oldest publish is due, `tick` at most.
    fn next_tick(&self, tick: Duration, deadline: Duration) -> Duration {
        let Some(since_ms) = self.ledger.oldest_since_ms() else { return tick };
        let due_ms = since_ms.saturating_add(as_ms(deadline)).saturating_sub(self.clock.now_ms());
        Duration::from_millis(due_ms).clamp(Duration::from_millis(1), tick)
    }

    /// The reason, waiting a moment for it where only its echo was heard.
    async fn why(&mut self, broken: Broken, link: &mut Link) -> Fault {
        if let Broken::Fault(fault) = broken {
            return fault;
        }
        let telling = poll_fn(|cx| {
            while let Poll::Ready(Some(event)) = link.events.poll_next_unpin(cx) {
                if let Event::Error(error) = event
                    && is_telling(&error)
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
        match tokio::time::timeout(TELLING, telling).await {
            Ok(fault) => fault,
            Err(_) => Fault::new(FaultClass::Outage, "the connection ended without a reason"),
        }
    }
}

/// What is said of a message without a word.
pub(super) fn no_confirm_within(deadline: Duration) -> Fault {
    Fault::new(FaultClass::Outage, format!("no confirm within {} s", deadline.as_secs_f64()))
}

/// A message that is known to be encodable.
pub(super) struct Prepared {
    exchange: ShortString,
    routing_key: ShortString,
    properties: BasicProperties,
    message: Arc<Message>,
    mandatory: bool,
}

impl Prepared {
    pub(super) fn new(outgoing: &Outgoing, frame_bytes_max: usize) -> Result<Self, Fault> {
        let message = &outgoing.message;
        if message.message_id.is_none() {
            return Err(Fault::new(
                FaultClass::Message,
                "field `message_id` is missing; returns are matched by it",
            ));
        }
        let header_bytes = header_frame_len_max(message);
        if header_bytes > frame_bytes_max {
            return Err(Fault::new(
                FaultClass::Message,
                format!(
                    "properties and headers take {header_bytes} bytes; a frame of this broker takes {frame_bytes_max}"
                ),
            ));
        }
        Ok(Self {
            exchange: short("exchange", &outgoing.exchange)?,
            routing_key: short("routing_key", &outgoing.routing_key)?,
            properties: to_properties(message)?,
            message: Arc::clone(message),
            mandatory: outgoing.mandatory,
        })
    }

    /// Publishes and waits for the broker's word. Everything up to drawing the tag happens in the first poll.
    pub(super) async fn send(self, channel: &Channel) -> lapin::Result<Confirmation> {
        let Self { exchange, routing_key, properties, message, mandatory } = self;
        let options = BasicPublishOptions { mandatory, immediate: false };
        channel.basic_publish(exchange, routing_key, options, &message.payload, properties).await?.await
    }
}

/// Milliseconds that were not spent blocked by the broker.
struct UnblockedClock {
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

    /// Whether it was blocked.
    fn unblock(&mut self) -> bool {
        let Some(since) = self.blocked_since.take() else { return false };
        self.blocked += since.elapsed();
        true
    }
}
