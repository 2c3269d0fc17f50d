//! The reason why RabbitMQ returned a message. The publisher asks before the event consumes an
//! attempt.
//!
//! `NO_ROUTE` has several meanings. RabbitMQ routes past a durable queue whose node is down as if
//! the queue did not exist. In both cases RabbitMQ answers that there is no route. A passive
//! declare distinguishes the cases: *no queue* is a fault of the destination, *home node is down*
//! is an outage. The publisher can ask only for queues whose name it knows: the routing key on the
//! default exchange, and the queues of the [`Topology`].
//!
//! The broker's answers are texts. A text that begins like RabbitMQ's *no queue* has that meaning,
//! for any name in the text. An unknown text has the same meaning, so that an event without a queue
//! ends in quarantine.
//!
//! **Invariants.** Each returned message gets one outcome, or the epoch ends before. At most one
//! more channel is open. Only one question is asked at a time, and not again for the same
//! destination within [`CAUSE_KNOWN_MS`].

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ErrorKind};
use tracing::debug;

use crate::message::{Fault, FaultClass, Outcome, Ticket};
use crate::tuning::{CAUSE_KNOWN_MS, CAUSE_MS_MAX, QUEUE_AWAY_MS};

use super::classify::is_away;
use super::convert::short;
use super::inbound::Returned;
use super::options::Options;
use super::topology::Topology;

/// The text about a queue for which the broker gives no answer.
pub(super) const UNANSWERED: &str = "the broker does not say whether it is there; its home node may be down";

/// The wait before the next request for a channel, while another channel is still closing.
const CLOSING: Duration = Duration::from_millis(10);

/// The longest time that a question waits for a channel.
const CLOSING_MAX: Duration = Duration::from_millis(200);

/// The most destinations whose answers are kept.
const KNOWN_MAX: usize = 1024;

/// The text of a connection that ends because it has no channel left for questions.
const NO_CHANNEL_LEFT: &str =
    "the connection has no channel left to ask on; the broker has closed many, or allows few (`channel_max`)";

/// The broker's answer about one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    There,
    Missing,
    /// The queue exists, but cannot be reached.
    Away(String),
    /// The broker does not answer. RabbitMQ 4 answers after a minute if the queue's node is down.
    Unanswered,
    /// The broker was not asked: there is no channel for it.
    NoChannel,
    /// The broker was not asked: the connection has ended, or does not allow the question.
    Unasked,
}

/// The meaning of the broker's refusal of a passive declare.
fn meaning(code: u16, text: &str) -> Answer {
    match code {
        404 if is_away(code, text) => Answer::Away(text.to_owned()),
        404 => Answer::Missing,
        // The queue is exclusive to another connection.
        405 => Answer::There,
        // The broker's own trouble.
        506 | 541 => Answer::Away(text.to_owned()),
        _ => Answer::Unasked,
    }
}

/// Returns the fault to report, given the answer about each queue that may take the message.
fn judged(returned: &Returned, answers: &[(&str, Answer)]) -> Fault {
    let outage = |why: String| {
        let Fault { code, text, .. } = &returned.fault;
        let text = format!("{text}; {why}");
        code.map_or_else(
            || Fault::new(FaultClass::Outage, text.clone()),
            |code| Fault::with_code(FaultClass::Outage, code, text.clone()),
        )
    };
    for (queue, answer) in answers {
        match answer {
            Answer::Away(why) => return outage(format!("queue `{queue}`: {why}")),
            Answer::Unanswered => return outage(format!("queue `{queue}`: {UNANSWERED}")),
            // The default exchange routes to every queue that exists.
            Answer::There if returned.exchange.is_empty() => {
                return outage(format!("queue `{queue}` is there now"));
            }
            Answer::There | Answer::Missing | Answer::NoChannel | Answer::Unasked => {}
        }
    }
    returned.fault.clone()
}

/// Asks the broker why it has returned the message. The fault is the broker's own, unless the cause
/// is an outage.
///
/// An error means that the connection has no channel left for questions, although the broker allows
/// several. A new connection has such a channel.
pub(super) async fn cause(
    connection: &Connection,
    topology: &Topology,
    returned: &Returned,
) -> Result<Fault, Fault> {
    let queues = topology.queues_of(&returned.exchange, &returned.routing_key);
    let ask = async {
        let mut answers = Vec::with_capacity(queues.len());
        for queue in queues {
            answers.push((queue, about(connection, queue).await));
        }
        answers
    };
    let fault = match tokio::time::timeout(Duration::from_millis(CAUSE_MS_MAX), ask).await {
        Ok(answers) => {
            let fault = judged(returned, &answers);
            let no_channel = answers.iter().any(|(_, answer)| *answer == Answer::NoChannel);
            // If these channels and the publish channel exceed the broker's limit, the next
            // connection has no more channels either.
            let allowed = usize::from(connection.configuration().channel_max()).wrapping_sub(1);
            if no_channel && fault == returned.fault && answers.len() <= allowed {
                return Err(Fault::new(FaultClass::Outage, NO_CHANNEL_LEFT));
            }
            fault
        }
        Err(_) => {
            let text = format!("{}; the broker does not say whether the queue is there", returned.fault.text);
            Fault::new(FaultClass::Outage, text)
        }
    };
    debug!(%fault, "a message was returned");
    Ok(fault)
}

/// Asks for a queue, for at most [`QUEUE_AWAY_MS`]. A refusal closes the channel, so each question
/// has its own.
pub(super) async fn about(connection: &Connection, queue: &str) -> Answer {
    let Ok(name) = short("queue", queue) else { return Answer::Missing };
    let Ok(channel) = free_channel(connection, CLOSING_MAX).await else {
        return if connection.status().connected() { Answer::NoChannel } else { Answer::Unasked };
    };
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let asked = async move {
        match channel.queue_declare(name, options, FieldTable::default()).await {
            Ok(_) => {
                // The answer to the close is needed only for tidiness.
                let _ = channel.close(200, ShortString::from("done")).await;
                Answer::There
            }
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(error) => meaning(error.get_id(), error.get_message().as_str()),
                _ => Answer::Unasked,
            },
        }
    };
    within(Duration::from_millis(QUEUE_AWAY_MS), asked).await.unwrap_or(Answer::Unanswered)
}

/// Opens a channel. Once the broker has closed a channel, the client library refuses that channel's
/// number on this connection, with the broker's old text. Each such refusal uses the number up. So
/// the loop ends, with a channel or with `ChannelsLimitReached`.
pub(super) async fn create_channel(connection: &Connection) -> lapin::Result<Channel> {
    loop {
        match connection.create_channel().await {
            Err(error)
                if matches!(error.kind(), ErrorKind::ProtocolError(_)) && connection.status().connected() => {
            }
            done => return done,
        }
    }
}

/// Opens a channel as [`create_channel`] does. If the broker allows no further channel, waits for
/// at most `limit`, because a channel that is closing still counts.
pub(super) async fn free_channel(connection: &Connection, limit: Duration) -> lapin::Result<Channel> {
    let began = Instant::now();
    loop {
        match create_channel(connection).await {
            Err(error)
                if matches!(error.kind(), ErrorKind::ChannelsLimitReached) && began.elapsed() < limit =>
            {
                tokio::time::sleep(CLOSING).await;
            }
            done => return done,
        }
    }
}

/// Waits for an answer of the broker, for at most `limit`.
///
/// After that the question continues in the background. The client library closes a channel that is
/// dropped. If the broker's late answer closes that channel too, the library ends the connection.
pub(super) async fn within<T: Send + 'static>(
    limit: Duration,
    asked: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    // A panic in the task is the client library's; there is no answer then either.
    tokio::time::timeout(limit, tokio::spawn(asked)).await.ok()?.ok()
}

type Destination = (String, String);
type Asking = Pin<Box<dyn Future<Output = (Destination, Result<Fault, Fault>)> + Send>>;

/// The messages that were returned on one connection and wait for their cause.
pub(super) struct Causes {
    options: Arc<Options>,
    connection: Arc<Connection>,
    waiting: VecDeque<(Ticket, Returned)>,
    asking: Option<Asking>,
    known: HashMap<Destination, (Instant, Fault)>,
}

impl Causes {
    pub(super) fn new(options: Arc<Options>, connection: Arc<Connection>) -> Self {
        Self { options, connection, waiting: VecDeque::new(), asking: None, known: HashMap::new() }
    }

    /// Takes a returned message in. Its outcome comes from [`poll`](Self::poll).
    pub(super) fn returned(&mut self, ticket: Ticket, returned: Returned) {
        self.waiting.push_back((ticket, returned));
    }

    /// Returns the outcomes that are known now. If there are none, wakes when the broker has
    /// answered. An error means that the connection has no channel left for questions.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<(Ticket, Outcome)>, Fault>> {
        // The publisher polls at every iteration.
        if self.waiting.is_empty() {
            return Poll::Pending;
        }
        loop {
            if let Some(asking) = &mut self.asking {
                let Poll::Ready((destination, answer)) = asking.as_mut().poll(cx) else { break };
                self.asking = None;
                let fault = match answer {
                    Ok(fault) => fault,
                    Err(fault) => return Poll::Ready(Err(fault)),
                };
                if self.known.len() >= KNOWN_MAX {
                    self.known.clear();
                }
                self.known.insert(destination, (Instant::now(), fault));
            }
            let reported = self.reported();
            if !reported.is_empty() {
                return Poll::Ready(Ok(reported));
            }
            let Some((_, returned)) = self.waiting.front().cloned() else { break };
            let (options, connection) = (Arc::clone(&self.options), Arc::clone(&self.connection));
            self.asking = Some(Box::pin(async move {
                let answer = cause(&connection, &options.topology, &returned).await;
                ((returned.exchange, returned.routing_key), answer)
            }));
        }
        Poll::Pending
    }

    /// Takes out the messages whose destination is known.
    fn reported(&mut self) -> Vec<(Ticket, Outcome)> {
        let now = Instant::now();
        let fresh = Duration::from_millis(CAUSE_KNOWN_MS);
        self.known.retain(|_, (since, _)| now.saturating_duration_since(*since) < fresh);
        if self.known.is_empty() {
            return Vec::new();
        }
        let mut reported = Vec::new();
        self.waiting.retain(|(ticket, returned)| {
            let destination = (returned.exchange.clone(), returned.routing_key.clone());
            let Some((_, fault)) = self.known.get(&destination) else { return true };
            reported.push((*ticket, Outcome::Returned(fault.clone())));
            false
        });
        reported
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn returned(exchange: &str) -> Returned {
        let fault = Fault::with_code(FaultClass::Destination, 312, "NO_ROUTE");
        Returned { id: "m".into(), exchange: exchange.into(), routing_key: "q".into(), fault }
    }

    /// Goal: the broker's answers are read correctly for any names in them, and an unknown text
    /// keeps no event for ever. Method: RabbitMQ's own texts (rabbit_misc, rabbit_amqqueue), names
    /// that look like them, another broker's text.
    #[test]
    fn one_code_has_several_meanings() {
        let away = |text: &str| Answer::Away(text.into());
        for text in [
            "NOT_FOUND - home node 'rabbit@b' of durable queue 'q' in vhost '/' is down or inaccessible",
            "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor",
            "NOT_FOUND - queue 'q' in vhost '/' has crashed and failed to restart",
            "NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout",
        ] {
            assert_eq!(meaning(404, text), away(text));
        }
        for text in [
            "NOT_FOUND - no queue 'q' in vhost '/'",
            "NOT_FOUND - no queue 'it is down or inaccessible' in vhost '/'",
            "NOT_FOUND - Queue 'q' in vhost '/' does not exist",
        ] {
            assert_eq!(meaning(404, text), Answer::Missing, "{text}");
        }
        assert_eq!(meaning(405, "RESOURCE_LOCKED - exclusive"), Answer::There);
        assert_eq!(meaning(541, "INTERNAL_ERROR"), away("INTERNAL_ERROR"));
        assert_eq!(meaning(403, "ACCESS_REFUSED"), Answer::Unasked);
    }

    /// Goal: only a known outage consumes no attempt. Method: each answer, on the default exchange
    /// and on another exchange.
    #[test]
    fn only_an_outage_spends_nothing() {
        let class = |exchange: &str, answers: &[Answer]| {
            let answers: Vec<_> = answers.iter().map(|answer| ("q", answer.clone())).collect();
            judged(&returned(exchange), &answers).class
        };
        let away = Answer::Away("home node".into());
        for exchange in ["", "payments"] {
            assert_eq!(class(exchange, std::slice::from_ref(&away)), FaultClass::Outage);
            assert_eq!(class(exchange, &[Answer::Missing, away.clone()]), FaultClass::Outage);
            assert_eq!(class(exchange, &[Answer::Missing]), FaultClass::Destination);
            assert_eq!(class(exchange, &[Answer::Unasked]), FaultClass::Destination);
            assert_eq!(class(exchange, &[]), FaultClass::Destination);
        }
        assert_eq!(class("", &[Answer::There]), FaultClass::Outage, "it has come meanwhile");
        assert_eq!(class("payments", &[Answer::There]), FaultClass::Destination, "it is not bound");
    }
}
