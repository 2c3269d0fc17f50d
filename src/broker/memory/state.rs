//! The broker's state: topology, and how a message gets from an exchange into queues.
//!
//! Publishers are in [`connections`](crate::broker::memory::connections), consumers in
//! [`consumers`](crate::broker::memory::consumers); both files are `impl State` too.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::broker::Epoch;
use crate::message::{Fault, FaultClass, Outcome};

use super::Shared;
use super::connections::{Connection, OUT_OF_ORDER_WAIT};
use super::consumers::Consumer;
use super::options::{ExchangeKind, QueueOptions, Stored, Tapped};
use super::queue::{Letter, Queue};
use super::routes::{Exchange, QueueId};
use super::timer::Timer;

/// The most times that one message is dead-lettered again because the next queue is full too. After
/// that the message is dropped: two full queues may each be the other's dead-letter queue.
const DEAD_LETTER_HOPS_MAX: usize = 8;

/// The broker's answer to a publish.
#[derive(Debug)]
pub(super) enum PublishOutcome {
    /// The publisher reports this outcome.
    Report(Outcome),
    /// The channel is closed.
    Close(Fault),
    /// The connection is lost.
    Disconnect(Fault),
}

/// All state of the broker, under one lock.
///
/// **Invariants.** `queues` only grows, so that a [`QueueId`] stays valid. A consumer is in its
/// queue's list if and only if the consumer is connected.
pub(super) struct State {
    pub(super) up: bool,
    pub(super) blocked: bool,
    pub(super) hanging: bool,
    pub(super) timer: Timer,
    /// [`OUT_OF_ORDER_WAIT`], except in tests.
    pub(super) out_of_order_wait: Duration,
    pub(super) connections: BTreeMap<u64, Connection>,
    pub(super) consumers: BTreeMap<u64, Consumer>,
    pub(super) next_id: u64,
    pub(super) published: u64,
    pub(super) tap: Option<Vec<Tapped>>,
    exchanges: HashMap<Box<str>, Exchange>,
    names: HashMap<Box<str>, QueueId>,
    pub(super) queues: Vec<Queue>,
}

impl State {
    pub(super) fn new(shared: Weak<Shared>, tap: bool) -> Self {
        Self {
            up: true,
            blocked: false,
            hanging: false,
            timer: Timer::new(shared),
            out_of_order_wait: OUT_OF_ORDER_WAIT,
            connections: BTreeMap::new(),
            consumers: BTreeMap::new(),
            next_id: 0,
            published: 0,
            tap: tap.then(Vec::new),
            exchanges: HashMap::from([("".into(), Exchange::new(ExchangeKind::Direct))]),
            names: HashMap::new(),
            queues: Vec::new(),
        }
    }

    pub(super) fn declare_exchange(&mut self, name: &str, kind: ExchangeKind) {
        if !name.is_empty() {
            self.exchanges.entry(name.into()).or_insert_with(|| Exchange::new(kind)).set_kind(kind);
        }
    }

    pub(super) fn delete_exchange(&mut self, name: &str) -> bool {
        !name.is_empty() && self.exchanges.remove(name).is_some()
    }

    pub(super) fn declare_queue(&mut self, name: &str, options: QueueOptions) {
        let id = self.names.get(name).copied().unwrap_or(self.queues.len());
        if id == self.queues.len() {
            self.queues.push(Queue::default());
            self.names.insert(name.into(), id);
            self.exchanges
                .entry("".into())
                .or_insert_with(|| Exchange::new(ExchangeKind::Direct))
                .bind(id, name);
        }
        if let Some(queue) = self.queue(id) {
            queue.set_options(options);
        }
        self.settle_queues(&[id]);
        self.connect_consumers(Some(name));
    }

    pub(super) fn bind(&mut self, queue: &str, exchange: &str, pattern: &str) -> Result<(), Fault> {
        if exchange.is_empty() {
            let text = "ACCESS_REFUSED - operation not permitted on the default exchange";
            return Err(Fault::with_code(FaultClass::Destination, 403, text));
        }
        let queue = self.names.get(queue).ok_or_else(|| missing("queue", queue))?;
        let exchange = self.exchanges.get_mut(exchange).ok_or_else(|| missing("exchange", exchange))?;
        exchange.bind(*queue, pattern);
        Ok(())
    }

    pub(super) fn unbind(&mut self, queue: &str, exchange: &str, pattern: &str) -> bool {
        let (Some(queue), false) = (self.names.get(queue), exchange.is_empty()) else { return false };
        self.exchanges.get_mut(exchange).is_some_and(|exchange| exchange.unbind(*queue, pattern))
    }

    pub(super) fn queue_id(&self, name: &str) -> Option<QueueId> {
        self.names.get(name).copied()
    }

    pub(super) fn queue(&mut self, id: QueueId) -> Option<&mut Queue> {
        self.queues.get_mut(id)
    }

    fn named(&self, name: &str) -> Option<&Queue> {
        self.queues.get(self.queue_id(name)?)
    }

    pub(super) fn messages(&self, name: &str) -> Vec<Stored> {
        self.named(name).map(Queue::snapshot).unwrap_or_default()
    }

    pub(super) fn queue_len(&self, name: &str) -> usize {
        self.named(name).map_or(0, Queue::len)
    }

    pub(super) fn purge(&mut self, name: &str) -> usize {
        let id = self.queue_id(name);
        id.and_then(|id| self.queue(id)).map_or(0, Queue::purge)
    }

    /// Routes and stores one message. Returns RabbitMQ's answer.
    pub(super) fn take_in(&mut self, letter: &Letter, epoch: Epoch) -> PublishOutcome {
        let Some(routes) = self.routes(letter) else {
            return PublishOutcome::Close(missing("exchange", &letter.exchange));
        };
        if routes.is_empty() {
            return PublishOutcome::Report(Outcome::Returned(Fault::with_code(
                FaultClass::Destination,
                312,
                "NO_ROUTE",
            )));
        }
        let taken = routes.iter().filter(|id| self.push(**id, letter)).count();
        if taken > 0 {
            self.published += 1;
            if let Some(tap) = &mut self.tap {
                tap.push(Tapped {
                    exchange: Arc::clone(&letter.exchange),
                    routing_key: Arc::clone(&letter.routing_key),
                    message: Arc::clone(&letter.message),
                    epoch,
                });
            }
            self.settle_queues(&routes);
        }
        PublishOutcome::Report(if taken == routes.len() { Outcome::Confirmed } else { Outcome::Nacked })
    }

    fn routes(&mut self, letter: &Letter) -> Option<Arc<[QueueId]>> {
        Some(self.exchanges.get_mut(&*letter.exchange)?.route(&letter.routing_key))
    }

    fn push(&mut self, id: QueueId, letter: &Letter) -> bool {
        self.queue(id).is_some_and(|queue| queue.push(letter.clone()))
    }

    /// Delivers what these queues can deliver, and drops what is over their maximum.
    pub(super) fn settle_queues(&mut self, ids: &[QueueId]) {
        let mut dead = VecDeque::new();
        for &id in ids {
            self.settle_queue(id, 0, &mut dead);
        }
        self.bury(dead);
    }

    fn settle_queue(&mut self, id: QueueId, hops: usize, dead: &mut VecDeque<(QueueId, Letter, usize)>) {
        self.dispatch(id);
        while let Some(letter) = self.queue(id).and_then(Queue::drop_head) {
            dead.push_back((id, letter, hops));
        }
    }

    /// Publishes rejected and dropped letters to the dead-letter exchange of the queue they left.
    pub(super) fn bury(&mut self, mut dead: VecDeque<(QueueId, Letter, usize)>) {
        while let Some((from, letter, hops)) = dead.pop_front() {
            let Some((exchange, routing_key)) = self.queue(from).and_then(|queue| queue.dead_letter()) else {
                continue;
            };
            if hops >= DEAD_LETTER_HOPS_MAX {
                continue;
            }
            let letter = Letter { exchange, routing_key, message: letter.message };
            for &id in self.routes(&letter).iter().flat_map(|routes| routes.iter()) {
                if self.push(id, &letter) {
                    self.settle_queue(id, hops + 1, &mut dead);
                }
            }
        }
    }

    pub(super) fn go_down(&mut self) {
        self.up = false;
        let fault = Fault::new(FaultClass::Outage, "connection lost: the broker went down");
        self.disconnect_publishers(&fault);
        self.disconnect_consumers(&fault);
    }

    pub(super) fn come_up(&mut self) {
        if !self.up {
            self.up = true;
            self.connect_publishers();
            self.connect_consumers(None);
        }
    }

    /// Returns the next id of a publisher or consumer.
    pub(super) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// RabbitMQ's fault for an exchange or queue that does not exist.
pub(super) fn missing(what: &str, name: &str) -> Fault {
    Fault::with_code(FaultClass::Destination, 404, format!("NOT_FOUND - no {what} '{name}' in vhost '/'"))
}

/// The fault of an attempt to connect while the broker is down.
pub(super) fn refused() -> Fault {
    Fault::new(FaultClass::Outage, "connection refused: the broker is down")
}
