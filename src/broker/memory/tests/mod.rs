//! Tests of the broker, and the fixtures that they use.

mod consuming;
mod epochs;
mod outages;
mod publishing;
mod scripted;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::broker::{
    Delivery, DeliveryTag, EventReceiver, Publisher, PublisherEvent, PublisherEvents, Settlement, Source,
    SourceEvent, SourceEvents,
};
use crate::message::{Outgoing, Ticket};

/// The longest wait for another thread's work.
const SOON: Duration = Duration::from_secs(10);

fn message(id: &str) -> Message {
    Message { message_id: Some(id.into()), ..Message::default() }
}

fn id_of(message: &Message) -> String {
    message.message_id.as_deref().unwrap_or_default().to_owned()
}

fn ids(broker: &MemoryBroker, queue: &str) -> Vec<String> {
    broker.messages(queue).iter().map(|stored| id_of(&stored.message)).collect()
}

/// A broker with a topic exchange `x` bound to the queue `q` for all keys that begin with `good`.
fn broker() -> MemoryBroker {
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("x", ExchangeKind::Topic);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "x", "good.#").unwrap();
    broker
}

/// A publisher with its reports, one a line: `up 1`, `down 1 404`, `confirmed 7`.
struct Publishing {
    publisher: MemoryPublisher,
    events: EventReceiver<PublisherEvent>,
    waiting: VecDeque<String>,
}

impl Publishing {
    fn on(broker: &MemoryBroker) -> Self {
        Self::with(broker.publisher())
    }

    fn with(mut publisher: MemoryPublisher) -> Self {
        let (sender, events) = PublisherEvents::channel();
        publisher.start(sender).unwrap();
        Self { publisher, events, waiting: VecDeque::new() }
    }

    /// Publishes ticket `n` as message `n`.
    fn send(&mut self, epoch: u64, n: u64, exchange: &str, key: &str, isolated: bool) {
        let outgoing = Outgoing {
            mandatory: true,
            ticket: Ticket(n),
            exchange: exchange.into(),
            routing_key: key.into(),
            message: Arc::new(message(&n.to_string())),
            isolated,
        };
        self.publisher.publish(Epoch(epoch), outgoing);
    }

    fn good(&mut self, epoch: u64, n: u64) {
        self.send(epoch, n, "x", "good", false);
    }

    /// All reports so far.
    fn reported(&mut self) -> Vec<String> {
        while let Ok(event) = self.events.try_recv() {
            self.waiting.extend(words(event));
        }
        self.waiting.drain(..).collect()
    }

    /// Waits for the next report.
    fn next(&mut self) -> String {
        while self.waiting.is_empty() {
            self.waiting.extend(words(self.events.recv_timeout(SOON).expect("a word in time")));
        }
        self.waiting.pop_front().unwrap()
    }
}

fn words(event: PublisherEvent) -> Vec<String> {
    let code = |fault: &Fault| fault.code.map_or_else(|| fault.class.to_string(), |code| code.to_string());
    match event {
        PublisherEvent::Up { epoch } => vec![format!("up {}", epoch.0)],
        PublisherEvent::Down { epoch, fault } => vec![format!("down {} {}", epoch.0, code(&fault))],
        PublisherEvent::Blocked { blocked } => vec![format!("blocked {blocked}")],
        PublisherEvent::Outcomes(outcomes) => outcomes
            .into_iter()
            .map(|(Ticket(n), outcome)| match outcome {
                Outcome::Confirmed => format!("confirmed {n}"),
                Outcome::Nacked => format!("nacked {n}"),
                Outcome::Returned(fault) => format!("returned {n} {}", code(&fault)),
                Outcome::Refused(fault) => format!("refused {n} {}", code(&fault)),
                Outcome::Unknown(fault) => format!("unknown {n} {}", code(&fault)),
                Outcome::Silent(fault) => format!("silent {n} {}", code(&fault)),
            })
            .collect(),
        PublisherEvent::Trouble(fault) => vec![format!("trouble {}", code(&fault))],
    }
}

/// A source with its reports.
struct Consuming {
    source: MemorySource,
    events: EventReceiver<SourceEvent>,
}

impl Consuming {
    fn on(broker: &MemoryBroker, queue: &str, prefetch: u16) -> Self {
        let (sender, events) = SourceEvents::channel();
        let mut source = broker.source(queue);
        source.start(sender, prefetch).unwrap();
        Self { source, events }
    }

    /// The reports so far: `up 1`, `down 1 404`, `m-1`, and `m-1 again` for a redelivery.
    fn reported(&self) -> Vec<String> {
        self.take().0
    }

    fn deliveries(&self) -> Vec<Delivery> {
        self.take().1
    }

    fn take(&self) -> (Vec<String>, Vec<Delivery>) {
        let (mut reported, mut deliveries) = (Vec::new(), Vec::new());
        for event in self.events.try_iter() {
            reported.push(match event {
                SourceEvent::Up { epoch } => format!("up {}", epoch.0),
                SourceEvent::Down { epoch, fault } => {
                    let code = fault.code.map_or_else(|| fault.class.to_string(), |code| code.to_string());
                    format!("down {} {code}", epoch.0)
                }
                SourceEvent::Delivery(delivery) => {
                    let again = if delivery.redelivered { " again" } else { "" };
                    let reported = id_of(&delivery.message) + again;
                    deliveries.push(*delivery);
                    reported
                }
            });
        }
        (reported, deliveries)
    }

    fn settle(&mut self, tags: &[DeliveryTag], settlement: Settlement) {
        self.source.settle(tags.iter().map(|tag| (*tag, settlement)).collect());
    }
}
