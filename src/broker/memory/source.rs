//! The consumer's handle on the broker.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::broker::{DeliveryTag, Settlement, Source, SourceEvents};
use crate::error::SettingError;

use super::Shared;

/// A source of a [`MemoryBroker`](crate::broker::memory::MemoryBroker): one queue, manual
/// acknowledgement, bounded prefetch.
///
/// As with RabbitMQ, settling a delivery twice closes the channel (406). While the queue does not
/// exist, the source is down (404). The source connects when the queue is declared.
///
/// ```
/// use onewrite::Message;
/// use onewrite::broker::{MemoryBroker, QueueOptions, Settlement, Source, SourceEvent, SourceEvents};
/// let broker = MemoryBroker::new();
/// broker.declare_queue("inbox", QueueOptions::default());
/// broker.publish("", "inbox", Message::default())?;
///
/// let (sender, events) = SourceEvents::channel();
/// let mut source = broker.source("inbox");
/// source.start(sender, 10)?;
/// assert!(matches!(events.recv()?, SourceEvent::Up { .. }));
/// let SourceEvent::Delivery(delivery) = events.recv()? else { unreachable!() };
/// source.settle(vec![(delivery.tag, Settlement::Acknowledge)]);
/// assert_eq!(broker.unsettled_len("inbox"), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MemorySource {
    shared: Arc<Shared>,
    queue: Arc<str>,
    /// Set by `start`.
    consumer: Option<u64>,
}

impl MemorySource {
    pub(super) fn new(shared: Arc<Shared>, queue: &str) -> Self {
        Self { shared, queue: queue.into(), consumer: None }
    }
}

impl Source for MemorySource {
    fn start(&mut self, events: SourceEvents, prefetch: u16) -> Result<(), SettingError> {
        if prefetch == 0 {
            // AMQP reads 0 as "without limit", which this library does not allow.
            return Err(SettingError::new("prefetch", "must be at least 1"));
        }
        let queue = Arc::clone(&self.queue);
        self.consumer.get_or_insert_with(|| self.shared.state().consume(queue, events, prefetch));
        Ok(())
    }

    fn settle(&mut self, settlements: Vec<(DeliveryTag, Settlement)>) {
        if let Some(consumer) = self.consumer {
            self.shared.state().settle(consumer, settlements);
        }
    }

    fn stop(&mut self, _deadline: Duration) {
        if let Some(consumer) = self.consumer {
            self.shared.state().cancel(consumer);
        }
    }
}

impl Drop for MemorySource {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl fmt::Debug for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySource").field("queue", &self.queue).finish_non_exhaustive()
    }
}
