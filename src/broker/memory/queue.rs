//! One queue: the messages that wait in it, in order.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::message::Message;

use super::options::{Overflow, QueueOptions, Stored};

/// A message to route, with its address. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Letter {
    pub(super) exchange: Arc<str>,
    pub(super) routing_key: Arc<str>,
    pub(super) message: Arc<Message>,
}

/// A letter in a queue. The letter keeps its position over redeliveries.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) position: u64,
    pub(super) redelivered: bool,
    pub(super) letter: Letter,
}

/// A queue. **Invariant:** `ready` is ordered by position, so that a requeued message takes its old
/// place.
#[derive(Debug, Default)]
pub(super) struct Queue {
    options: QueueOptions,
    ready: VecDeque<Ready>,
    next_position: u64,
    /// The consumers connected to the queue; the first is the next to get a delivery.
    pub(super) consumers: VecDeque<u64>,
}

impl Queue {
    pub(super) fn set_options(&mut self, options: QueueOptions) {
        self.options = options;
    }

    pub(super) fn dead_letter(&self) -> Option<(Arc<str>, Arc<str>)> {
        self.options.dead_letter.clone()
    }

    pub(super) fn len(&self) -> usize {
        self.ready.len()
    }

    /// Adds a letter. Returns `false` only if the queue is full and rejects. A queue that drops its
    /// head may be over its maximum afterwards, until [`drop_head`](Self::drop_head).
    pub(super) fn push(&mut self, letter: Letter) -> bool {
        let full = self.options.max_length.is_some_and(|max| self.ready.len() >= max);
        if full && self.options.overflow == Overflow::RejectPublish {
            return false;
        }
        self.ready.push_back(Ready { position: self.next_position, redelivered: false, letter });
        self.next_position += 1;
        true
    }

    /// Removes the oldest letter if the queue is over its maximum and drops its head.
    pub(super) fn drop_head(&mut self) -> Option<Letter> {
        let max = self.options.max_length?;
        if self.options.overflow != Overflow::DropHead || self.ready.len() <= max {
            return None;
        }
        self.ready.pop_front().map(|ready| ready.letter)
    }

    pub(super) fn pop(&mut self) -> Option<Ready> {
        self.ready.pop_front()
    }

    /// Puts a delivery back into its old place.
    pub(super) fn put_back(&mut self, ready: Ready) {
        let place = self.ready.partition_point(|other| other.position < ready.position);
        self.ready.insert(place, Ready { redelivered: true, ..ready });
    }

    pub(super) fn purge(&mut self) -> usize {
        let purged = self.ready.len();
        self.ready.clear();
        purged
    }

    pub(super) fn snapshot(&self) -> Vec<Stored> {
        let stored = |ready: &Ready| Stored {
            exchange: Arc::clone(&ready.letter.exchange),
            routing_key: Arc::clone(&ready.letter.routing_key),
            message: Arc::clone(&ready.letter.message),
            redelivered: ready.redelivered,
        };
        self.ready.iter().map(stored).collect()
    }
}
