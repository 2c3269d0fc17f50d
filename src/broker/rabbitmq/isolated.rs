//! Isolated messages, beside the window: suspects that may have closed a channel, and messages for
//! a silent destination.
//!
//! Each message has a channel of its own on the window's connection, so that a broker that allows
//! one connection is enough. A message that may end a whole connection goes over the *own
//! connection*, if the broker accepts that connection. If there is no second channel, every
//! isolated message does.
//!
//! **Invariants.** Each message gets exactly one outcome, also when the thread ends; after *silent*
//! perhaps one more. No message waits for another's confirm, except on the own connection. Faults
//! are reported.

use std::hash::BuildHasher;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use lapin::options::ConfirmSelectOptions;
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, Connection, ConnectionStatus};
use rustc_hash::FxBuildHasher;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::debug;

use crate::broker::{PublisherEvent, PublisherEvents};
use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};
use crate::time::Deadline;
use crate::tuning::{CLOSE_MS_MAX, SILENT_CHANNELS_MAX};

use super::background::Stop;
use super::cause::{cause, create_channel};
use super::classify::{Phase, classify, ends_the_connection};
use super::connection::Link;
use super::failover::Failover;
use super::inbound::Returns;
use super::options::Options;
use super::prepared::{Prepared, no_confirm_within};
use super::topology::Topology;

/// The time after which an unused own connection is closed.
const IDLE: Duration = Duration::from_secs(10);

/// The most acks that are kept until the window asks for them. The window asks at a nack.
const ACKED_MAX: usize = 256;

/// The state that the window's connection and the isolated messages share.
#[derive(Default)]
pub(super) struct Isolation {
    connection: Mutex<Option<Beside>>,
    /// Exchange and routing key of messages that a channel beside the window's has acked: at most
    /// [`ACKED_MAX`].
    acked: Mutex<Vec<(Arc<str>, Arc<str>)>>,
    /// A message has ended a whole connection: suspects use the own connection.
    ends_connections: AtomicBool,
}

#[derive(Clone)]
struct Beside {
    connection: Weak<Connection>,
    returns: Returns,
}

impl Isolation {
    pub(super) fn connected(&self, link: &Link) {
        let beside = Beside { connection: Arc::downgrade(&link.connection), returns: link.returns.clone() };
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(beside);
        // Acks of an earlier connection say nothing about this connection.
        self.take_acked();
    }

    /// Takes the destinations that channels beside the window's have acked since the last call.
    pub(super) fn take_acked(&self) -> Vec<(Arc<str>, Arc<str>)> {
        std::mem::take(&mut *self.acked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_ack(&self, (exchange, routing_key): (Arc<str>, Arc<str>)) {
        let mut acked = self.acked.lock().unwrap_or_else(PoisonError::into_inner);
        if acked.len() < ACKED_MAX {
            acked.push((exchange, routing_key));
        }
    }

    /// Notes that the connection has ended, with the fault if there is one.
    pub(super) fn disconnected(&self, fault: Option<&Fault>) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if fault.is_some_and(ends_the_connection) {
            self.ends_connections.store(true, Ordering::Release);
        }
    }

    fn beside(&self) -> Option<(Arc<Connection>, Returns)> {
        let beside = self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some((beside.connection.upgrade()?, beside.returns))
    }
}

/// The state that all isolated messages share.
struct Shared {
    options: Arc<Options>,
    events: PublisherEvents,
    isolation: Arc<Isolation>,
    own: tokio::sync::Mutex<Own>,
}

/// The own connection of isolated messages.
struct Own {
    link: Option<Link>,
    failover: Failover,
    /// Every broker has refused the own connection: no broker is tried before this time.
    refused: Option<(Instant, Fault)>,
}

/// Publishes isolated messages until it is asked to stop.
pub(super) async fn run(
    options: Arc<Options>,
    mut messages: mpsc::Receiver<Outgoing>,
    events: PublisherEvents,
    isolation: Arc<Isolation>,
    mut stop: Stop,
) {
    let failover = Failover::new(options.targets.len(), options.backoff);
    let own = tokio::sync::Mutex::new(Own { link: None, failover, refused: None });
    let shared = Arc::new(Shared { options, events, isolation, own });
    let mut tasks = Tasks::default();
    while let Some(next) = stop.or(tokio::time::timeout(IDLE, messages.recv())).await {
        match next {
            Ok(None) => break,
            Ok(Some(outgoing)) => tasks.begin(&shared, outgoing, stop.clone()),
            Err(_) => shared.rest(&stop).await,
        }
    }
    messages.close();
    while let Some(outgoing) = messages.recv().await {
        shared.report(outgoing.ticket, Outcome::Unknown(stopped()));
    }
    // The tasks see the stop too.
    tasks.end().await;
    let link = shared.own.lock().await.link.take();
    if let Some(link) = link {
        link.close(stop.time_to_close()).await;
    }
}

/// The tasks that are publishing, or that listen for a late confirm.
#[derive(Default)]
struct Tasks(Vec<Task>);

struct Task {
    destination: u64,
    handle: JoinHandle<()>,
    /// The task has reported its outcome, and only listens.
    reported: Arc<AtomicBool>,
}

impl Tasks {
    fn begin(&mut self, shared: &Arc<Shared>, outgoing: Outgoing, mut stop: Stop) {
        let destination = FxBuildHasher.hash_one((&outgoing.exchange, &outgoing.routing_key));
        self.0.retain(|task| !task.handle.is_finished());
        // A newer message asks the same destination: its outcome tells as much.
        let older = self.0.iter().filter(|task| task.destination == destination);
        let too_many = (self.0.len() + 1).saturating_sub(SILENT_CHANNELS_MAX);
        for task in older.chain(self.0.iter().take(too_many)) {
            if task.reported.load(Ordering::Acquire) {
                task.handle.abort();
            }
        }
        let reported = Arc::new(AtomicBool::new(false));
        let task = (Arc::clone(shared), Arc::clone(&reported));
        let handle = tokio::spawn(async move {
            let ((shared, reported), ticket) = (task, outgoing.ticket);
            let ended = stop.or(shared.publish(outgoing, &reported)).await;
            if ended.is_none() && !reported.load(Ordering::Acquire) {
                shared.report(ticket, Outcome::Unknown(stopped()));
            }
        });
        self.0.push(Task { destination, handle, reported });
    }

    async fn end(self) {
        for task in self.0 {
            // An error means that the task was aborted after it had reported its outcome.
            _ = task.handle.await;
        }
    }
}

fn stopped() -> Fault {
    Fault::new(FaultClass::Outage, "the publisher was stopped")
}

/// One message's way to the broker.
struct Voice<'a> {
    connection: Weak<Connection>,
    channel: &'a Channel,
    status: ConnectionStatus,
    returns: &'a Returns,
    /// Whether the task waits for a confirm after it has reported *silent*.
    listens: bool,
}

/// Whether the connection can be used again.
type IsGood = bool;

impl Shared {
    fn report(&self, ticket: Ticket, outcome: Outcome) {
        // The send fails if the relay is gone: then this task ends too.
        _ = self.events.send(PublisherEvent::Outcomes(vec![(ticket, outcome)]));
    }

    /// Closes the own connection, which has not been needed for a while.
    async fn rest(&self, stop: &Stop) {
        self.isolation.ends_connections.store(false, Ordering::Release);
        // A connection in use is locked.
        let link = self.own.try_lock().ok().and_then(|mut own| own.link.take());
        if let Some(link) = link {
            link.close(stop.time_to_close()).await;
        }
    }

    /// Publishes one message and reports its outcome. If the first way fails, the task tries the
    /// second way.
    async fn publish(&self, outgoing: Outgoing, reported: &AtomicBool) {
        let ticket = outgoing.ticket;
        let own_first = self.isolation.ends_connections.load(Ordering::Acquire);
        let first = if own_first {
            self.over_own(outgoing.clone(), reported).await
        } else {
            self.beside(outgoing.clone(), reported).await
        };
        let Err(first) = first else { return };
        debug!(fault = %first, "an isolated message finds no way");
        let second = if own_first {
            self.beside(outgoing, reported).await
        } else {
            self.over_own(outgoing, reported).await
        };
        let Err(mut fault) = second else { return };
        if fault.text != first.text {
            fault.text = format!("{}; and {first}", fault.text);
        }
        // The relay may publish the same message again at once. The sleep prevents a tight loop
        // against an unreachable broker.
        tokio::time::sleep(self.options.backoff.0).await;
        self.report(ticket, Outcome::Unknown(fault));
        reported.store(true, Ordering::Release);
    }

    /// Publishes over a second channel of the window's connection. An error gives the reason why
    /// there is no such channel.
    async fn beside(&self, outgoing: Outgoing, reported: &AtomicBool) -> Result<(), Fault> {
        let gone = || Fault::new(FaultClass::Outage, "not sent: the connection is over");
        let (connection, returns) = self.isolation.beside().ok_or_else(gone)?;
        let frame_bytes_max = connection.configuration().frame_max() as usize;
        let channel = open_channel(&connection).await?;
        let status = connection.status().clone();
        // The connection belongs to the window: it ends when the window ends.
        let weak = Arc::downgrade(&connection);
        drop(connection);
        let voice = Voice { connection: weak, channel: &channel, status, returns: &returns, listens: true };
        self.speak(&voice, frame_bytes_max, outgoing, reported).await;
        close(&channel).await;
        Ok(())
    }

    /// Publishes over the own connection. An error gives the reason why there is no such
    /// connection.
    async fn over_own(&self, outgoing: Outgoing, reported: &AtomicBool) -> Result<(), Fault> {
        let mut own = self.own.lock().await;
        let link = match own.link.take().filter(Link::is_alive) {
            Some(link) => link,
            None => {
                if let Some(fault) = own.rests() {
                    return Err(fault);
                }
                match own.open(&self.options).await {
                    Ok(link) => link,
                    Err(fault) => {
                        self.events.send(PublisherEvent::Trouble(fault.clone()));
                        return Err(fault);
                    }
                }
            }
        };
        let frame_bytes_max = link.connection.configuration().frame_max() as usize;
        let status = link.connection.status().clone();
        let connection = Arc::downgrade(&link.connection);
        let voice =
            Voice { connection, channel: &link.channel, status, returns: &link.returns, listens: false };
        if self.speak(&voice, frame_bytes_max, outgoing, reported).await {
            own.failover.answered();
            own.link = Some(link);
        } else if !link.is_alive() {
            // If a broker gives no answer, the next broker is tried: the first may be half dead
            // while the others work.
            _ = own.failover.lost(FaultClass::Outage, Duration::ZERO, false, Instant::now());
        }
        Ok(())
    }

    /// Publishes, waits for the broker's confirm and reports the outcome.
    async fn speak(
        &self,
        voice: &Voice<'_>,
        frame_bytes_max: usize,
        outgoing: Outgoing,
        reported: &AtomicBool,
    ) -> IsGood {
        let ticket = outgoing.ticket;
        let destination = (Arc::clone(&outgoing.exchange), Arc::clone(&outgoing.routing_key));
        let report = |outcome| {
            debug!(?ticket, "isolated message settled");
            reported.store(true, Ordering::Release);
            self.report(ticket, outcome);
        };
        let prepared = match Prepared::new(&outgoing, frame_bytes_max) {
            Ok(prepared) => prepared,
            Err(fault) => {
                report(Outcome::Refused(fault));
                return true;
            }
        };
        // Drops returns of an earlier channel with this number.
        _ = voice.returns.take(voice.channel.id());
        let mut confirm = pin!(prepared.send(voice.channel));
        let confirmation = loop {
            match tokio::time::timeout(self.options.confirm_deadline, &mut confirm).await {
                Ok(confirmation) => break confirmation,
                // Time during which the broker blocks publishers does not count.
                Err(_) if voice.status.blocked() => {}
                Err(_) => {
                    report(Outcome::Silent(no_confirm_within(self.options.confirm_deadline)));
                    if !voice.listens {
                        return false;
                    }
                    break confirm.await;
                }
            }
        };
        let is_late = reported.load(Ordering::Acquire);
        let returned = voice.returns.take(voice.channel.id()).into_iter();
        // The message is alone on its channel, so a return belongs to it.
        let returned = match (returned.last(), voice.connection.upgrade()) {
            (Some(returned), Some(connection)) => {
                if voice.listens {
                    // The message no longer needs its channel, and the question may find no other
                    // channel.
                    close(voice.channel).await;
                }
                match cause(&connection, &self.options.topology, &returned).await {
                    Ok(fault) => Some(fault),
                    Err(fault) => {
                        if !is_late {
                            // The relay may publish the same message again at once.
                            tokio::time::sleep(self.options.backoff.0).await;
                            report(Outcome::Unknown(fault));
                        }
                        return false;
                    }
                }
            }
            (returned, _) => returned.map(|returned| returned.fault),
        };
        let outcome = match (confirmation, returned) {
            (Err(_), _) if is_late => return false,
            (Err(error), _) => {
                let fault = classify(&error, Phase::Publish);
                debug!(%fault, "isolated message failed");
                if ends_the_connection(&fault) {
                    self.isolation.ends_connections.store(true, Ordering::Release);
                }
                report(match fault.class {
                    FaultClass::Message | FaultClass::Destination => Outcome::Refused(fault),
                    _ => {
                        // The relay may publish the same message again at once.
                        tokio::time::sleep(self.options.backoff.0).await;
                        Outcome::Unknown(fault)
                    }
                });
                return false;
            }
            (Ok(Confirmation::NotRequested), _) => {
                let fault = Fault::new(FaultClass::Outage, "the channel is not in confirm mode");
                report(Outcome::Unknown(fault));
                return false;
            }
            (Ok(_), Some(fault)) => Outcome::Returned(fault),
            (Ok(Confirmation::Ack(_)), None) => Outcome::Confirmed,
            (Ok(Confirmation::Nack(_)), None) => Outcome::Nacked,
        };
        if outcome == Outcome::Confirmed {
            self.isolation.note_ack(destination);
        }
        // Perhaps only this channel nacks (see `nacks`): the next message gets another channel.
        let is_good = outcome != Outcome::Nacked;
        report(outcome);
        is_good
    }
}

/// Closes the channel unless it is closed. Dropping the channel also closes it, but without waiting
/// for the answer.
async fn close(channel: &Channel) {
    if channel.status().connected() {
        let goodbye = channel.close(200, ShortString::from("bye"));
        _ = tokio::time::timeout(Duration::from_millis(CLOSE_MS_MAX), goodbye).await;
    }
}

async fn open_channel(connection: &Connection) -> Result<Channel, Fault> {
    let fault = |error: lapin::Error| classify(&error, Phase::Connect);
    let open = async {
        let channel = create_channel(connection).await.map_err(fault)?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(fault)?;
        Ok(channel)
    };
    let deadline = Duration::from_millis(CONNECT_MS_MAX);
    tokio::time::timeout(deadline, open).await.unwrap_or_else(|_| {
        let text = format!("the broker opened no second channel within {} s", deadline.as_secs());
        Err(Fault::new(FaultClass::Outage, text))
    })
}

impl Own {
    /// Returns the reason why no broker is tried now.
    fn rests(&self) -> Option<Fault> {
        let refused = self.refused.as_ref().filter(|(until, _)| Instant::now() < *until);
        refused.map(|(_, fault)| fault.clone())
    }

    /// Tries each broker once, as the window's connection does. If all have refused, they rest.
    async fn open(&mut self, options: &Options) -> Result<Link, Fault> {
        self.refused = None;
        // The window's connection has already declared the topology.
        let options = Options { topology: Topology::default(), ..options.clone() };
        loop {
            let Some(target) = options.targets.get(self.failover.at()) else { return Err(stopped()) };
            let fault = match Link::open(&options, target).await {
                Ok(link) => return Ok(link),
                Err(fault) => fault,
            };
            debug!(broker = %target, %fault, "no connection for isolated messages");
            let wait = self.failover.refused(fault.class, Instant::now());
            if wait.is_zero() {
                continue;
            }
            let until = Deadline::from(Instant::now(), wait).instant();
            self.refused = until.map(|until| (until, fault.clone()));
            return Err(fault);
        }
    }
}
