//! A publisher at the `Publisher` seam, without store and relay.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use onewrite::broker::{Epoch, EventReceiver, Publisher, PublisherEvent, PublisherEvents, RabbitMq};
use onewrite::{Fault, Message, Outcome, Outgoing, Ticket};

pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A publisher and everything it has reported.
pub(crate) struct Rig {
    pub(crate) publisher: RabbitMq,
    pub(crate) events: EventReceiver<PublisherEvent>,
    pub(crate) epoch: Epoch,
    /// Every outcome, of the epoch and of isolated messages.
    pub(crate) outcomes: BTreeMap<u64, Outcome>,
    pub(crate) blocked: bool,
}

impl Rig {
    pub(crate) fn start(publisher: RabbitMq) -> Self {
        let (sender, events) = PublisherEvents::channel();
        let mut publisher =
            publisher.reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500));
        publisher.start(sender).expect("the settings are right");
        Self { publisher, events, epoch: Epoch(0), outcomes: BTreeMap::new(), blocked: false }
    }

    pub(crate) fn up(url: &str) -> Self {
        let mut rig = Self::start(RabbitMq::new(url).expect("a URI"));
        rig.wait_up();
        rig
    }

    /// Takes in one event; returns a `Down`.
    pub(crate) fn next(&mut self, limit: Duration) -> Option<PublisherEvent> {
        let event = self.events.recv_timeout(limit).ok()?;
        match &event {
            PublisherEvent::Up { epoch } => self.epoch = *epoch,
            PublisherEvent::Blocked { blocked } => self.blocked = *blocked,
            PublisherEvent::Outcomes(outcomes) => {
                for (ticket, outcome) in outcomes {
                    let before = self.outcomes.insert(ticket.0, outcome.clone());
                    let late = matches!(before, None | Some(Outcome::Silent(_)));
                    assert!(late, "{ticket:?} was reported twice: {before:?}, {outcome:?}");
                }
            }
            _ => {}
        }
        Some(event)
    }

    pub(crate) fn wait_up(&mut self) {
        let began = Instant::now();
        let mut seen = Vec::new();
        while began.elapsed() < SOON {
            match self.next(SOON) {
                Some(PublisherEvent::Up { .. }) => return,
                other => seen.push(other),
            }
        }
        panic!("not connected within {SOON:?}: {seen:?}");
    }

    pub(crate) fn wait_down(&mut self) -> Fault {
        let began = Instant::now();
        while began.elapsed() < SOON {
            if let Some(PublisherEvent::Down { fault, .. }) = self.next(SOON) {
                return fault;
            }
        }
        panic!("no Down within {SOON:?}");
    }

    pub(crate) fn wait_outcome(&mut self, ticket: u64) -> Outcome {
        let began = Instant::now();
        while began.elapsed() < SOON {
            if let Some(outcome) = self.outcomes.get(&ticket) {
                return outcome.clone();
            }
            self.next(Duration::from_millis(100));
        }
        panic!("no outcome of ticket {ticket} within {SOON:?}");
    }

    pub(crate) fn publish(&mut self, outgoing: Outgoing) {
        self.publisher.publish(self.epoch, outgoing);
    }
}

pub(crate) fn message(id: &str, payload: &[u8]) -> Message {
    Message { message_id: Some(id.into()), payload: payload.to_vec(), ..Message::default() }
}

pub(crate) fn outgoing(ticket: u64, exchange: &str, routing_key: &str, message: Message) -> Outgoing {
    Outgoing::new(Ticket(ticket), exchange, routing_key, Arc::new(message))
}

pub(crate) fn isolated(mut outgoing: Outgoing) -> Outgoing {
    outgoing.isolated = true;
    outgoing
}
