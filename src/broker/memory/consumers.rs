//! The consumers of the broker: which consumer gets which message, and which deliveries are
//! unsettled.
//!
//! **Invariants.** A message is in its queue or unsettled with one consumer, never both. A consumer
//! has at most `prefetch` unsettled deliveries. A requeued message takes its old place in the
//! queue.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::broker::{Delivery, DeliveryTag, Epoch, Settlement, SourceEvent, SourceEvents};
use crate::message::{Fault, FaultClass, Message};

use super::queue::Ready;
use super::routes::QueueId;
use super::state::{State, missing, refused};

/// One consumer.
pub(super) struct Consumer {
    events: SourceEvents,
    queue: Arc<str>,
    prefetch: usize,
    /// The last epoch, which is current while `connected`.
    epoch: u64,
    connected: bool,
    next_tag: u64,
    unsettled: BTreeMap<u64, Ready>,
}

impl Consumer {
    fn has_room(&self) -> bool {
        self.unsettled.len() < self.prefetch
    }

    /// Hands one message to the consumer. Returns `false` if the consumer's receiver is gone.
    fn deliver(&mut self, ready: Ready) -> bool {
        self.next_tag += 1;
        let delivery = Delivery {
            tag: DeliveryTag { epoch: Epoch(self.epoch), tag: self.next_tag },
            exchange: ready.letter.exchange.to_string(),
            routing_key: ready.letter.routing_key.to_string(),
            redelivered: ready.redelivered,
            message: Message::clone(&ready.letter.message),
        };
        self.unsettled.insert(self.next_tag, ready);
        self.events.send(SourceEvent::Delivery(Box::new(delivery)))
    }
}

impl State {
    /// Attaches a consumer and connects it.
    pub(super) fn consume(&mut self, queue: Arc<str>, events: SourceEvents, prefetch: u16) -> u64 {
        let consumer = Consumer {
            events,
            queue,
            prefetch: usize::from(prefetch),
            epoch: 0,
            connected: false,
            next_tag: 0,
            unsettled: BTreeMap::new(),
        };
        let id = self.next_id();
        self.consumers.insert(id, consumer);
        self.connect_consumer(id);
        id
    }

    /// Ends a consumer. Its unsettled deliveries go back to the queue.
    pub(super) fn cancel(&mut self, id: u64) {
        let queue = self.disconnect_consumer(id, &Fault::new(FaultClass::Outage, "the source was stopped"));
        self.consumers.remove(&id);
        if let Some(queue) = queue {
            self.settle_queues(&[queue]);
        }
    }

    /// Connects the consumers that are not connected: those of `queue`, or all.
    pub(super) fn connect_consumers(&mut self, queue: Option<&str>) {
        let wanted = |(id, consumer): (&u64, &Consumer)| {
            (!consumer.connected && queue.is_none_or(|queue| *consumer.queue == *queue)).then_some(*id)
        };
        let ids: Vec<u64> = self.consumers.iter().filter_map(wanted).collect();
        for id in ids {
            self.connect_consumer(id);
        }
    }

    fn connect_consumer(&mut self, id: u64) {
        let up = self.up;
        let Some(name) = self.consumers.get(&id).map(|consumer| Arc::clone(&consumer.queue)) else { return };
        let queue = self.queue_id(&name);
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        consumer.epoch += 1;
        let epoch = Epoch(consumer.epoch);
        let Some(queue) = queue.filter(|_| up) else {
            let fault = if up { missing("queue", &name) } else { refused() };
            consumer.events.send(SourceEvent::Down { epoch, fault });
            return;
        };
        consumer.connected = true;
        consumer.next_tag = 0;
        consumer.events.send(SourceEvent::Up { epoch });
        if let Some(queue) = self.queue(queue) {
            queue.consumers.push_back(id);
        }
        self.settle_queues(&[queue]);
    }

    pub(super) fn disconnect_consumers(&mut self, fault: &Fault) {
        let ids: Vec<u64> = self.consumers.keys().copied().collect();
        for id in ids {
            self.disconnect_consumer(id, fault);
        }
    }

    /// Ends a consumer's connection and puts its unsettled deliveries back. Returns the queue, so
    /// that the caller can serve other consumers of the queue.
    fn disconnect_consumer(&mut self, id: u64, fault: &Fault) -> Option<QueueId> {
        let consumer = self.consumers.get_mut(&id).filter(|consumer| consumer.connected)?;
        consumer.connected = false;
        consumer.events.send(SourceEvent::Down { epoch: Epoch(consumer.epoch), fault: fault.clone() });
        let unsettled = std::mem::take(&mut consumer.unsettled);
        let name = Arc::clone(&consumer.queue);
        let queue_id = self.queue_id(&name)?;
        let queue = self.queue(queue_id)?;
        queue.consumers.retain(|other| *other != id);
        // Newest first, so that each message goes to the very front, at no cost.
        unsettled.into_values().rev().for_each(|ready| queue.put_back(ready));
        Some(queue_id)
    }

    /// Delivers round robin, while there are messages and consumers with room.
    pub(super) fn dispatch(&mut self, id: QueueId) {
        while let Some(consumer_id) = self.next_consumer(id) {
            let Some(ready) = self.queue(id).and_then(|queue| queue.pop()) else { return };
            let heard = self.consumers.get_mut(&consumer_id).is_some_and(|consumer| consumer.deliver(ready));
            if !heard {
                self.disconnect_consumer(consumer_id, &Fault::new(FaultClass::Outage, "nobody listens"));
                self.consumers.remove(&consumer_id);
            }
        }
    }

    /// Returns the next consumer, if there is something to deliver and a consumer has room.
    fn next_consumer(&mut self, id: QueueId) -> Option<u64> {
        let Self { queues, consumers, .. } = self;
        let queue = queues.get_mut(id)?;
        if queue.len() == 0 {
            return None;
        }
        let has_room = |id: &u64| consumers.get(id).is_some_and(Consumer::has_room);
        let place = queue.consumers.iter().position(has_room)?;
        queue.consumers.rotate_left(place);
        let next = queue.consumers.pop_front()?;
        queue.consumers.push_back(next);
        Some(next)
    }

    pub(super) fn unsettled_len(&self, queue: &str) -> usize {
        let of_queue = self.consumers.values().filter(|consumer| *consumer.queue == *queue);
        of_queue.map(|consumer| consumer.unsettled.len()).sum()
    }

    /// Settles deliveries of the current epoch. A tag that is not unsettled closes the channel, as
    /// RabbitMQ does.
    pub(super) fn settle(&mut self, id: u64, settlements: Vec<(DeliveryTag, Settlement)>) {
        let Some(name) = self.consumers.get(&id).map(|consumer| Arc::clone(&consumer.queue)) else { return };
        let Some(queue_id) = self.queue_id(&name) else { return };
        let mut rejected = VecDeque::new();
        let mut unknown = None;
        for (DeliveryTag { epoch, tag }, settlement) in settlements {
            let current = |consumer: &&mut Consumer| consumer.connected && consumer.epoch == epoch.0;
            let Some(consumer) = self.consumers.get_mut(&id).filter(current) else { continue };
            let Some(ready) = consumer.unsettled.remove(&tag) else {
                unknown = Some(tag);
                break;
            };
            match settlement {
                Settlement::Acknowledge => {}
                Settlement::Reject => rejected.push_back((queue_id, ready.letter, 0)),
                Settlement::Requeue => {
                    if let Some(queue) = self.queue(queue_id) {
                        queue.put_back(ready);
                    }
                }
            }
        }
        self.bury(rejected);
        if let Some(tag) = unknown {
            let text = format!("PRECONDITION_FAILED - unknown delivery tag {tag}");
            self.disconnect_consumer(id, &Fault::with_code(FaultClass::Message, 406, text));
            self.connect_consumer(id);
        }
        self.settle_queues(&[queue_id]);
    }
}
