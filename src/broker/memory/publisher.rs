//! The relay's handle on the broker.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::broker::{Epoch, Publisher, PublisherEvents};
use crate::error::SettingError;
use crate::limits;
use crate::message::Outgoing;

use super::Shared;
use super::script::Publishing;

/// A publisher of a [`MemoryBroker`](crate::broker::memory::MemoryBroker). Unless the script delays
/// an outcome, [`publish`](Publisher::publish) reports it before it returns.
///
/// ```
/// use std::sync::Arc;
/// use onewrite::{Message, Outcome, Outgoing, Ticket};
/// use onewrite::broker::{Epoch, MemoryBroker, Publisher, PublisherEvent, PublisherEvents, QueueOptions};
/// let broker = MemoryBroker::new();
/// broker.declare_queue("inbox", QueueOptions::default());
/// let (sender, events) = PublisherEvents::channel();
/// let mut publisher = broker.publisher();
/// publisher.start(sender)?;
/// assert!(matches!(events.recv()?, PublisherEvent::Up { epoch: Epoch(1) }));
///
/// publisher.publish(Epoch(1), Outgoing::new(Ticket(1), "", "inbox", Arc::new(Message::default())));
/// let PublisherEvent::Outcomes(outcomes) = events.recv()? else { unreachable!() };
/// assert_eq!(outcomes, [(Ticket(1), Outcome::Confirmed)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MemoryPublisher {
    shared: Arc<Shared>,
    /// Set by `start`.
    connection: Option<u64>,
    confirm_deadline: Duration,
}

impl MemoryPublisher {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, connection: None, confirm_deadline: Duration::from_millis(limits::CONFIRM_MS_DEFAULT) }
    }

    /// The longest time that a message may wait for an outcome before it is reported
    /// [silent](crate::Outcome::Silent). The default is
    /// [`CONFIRM_MS_DEFAULT`](crate::limits::CONFIRM_MS_DEFAULT).
    ///
    /// If no younger message has an outcome by then, the connection is given up, and a new
    /// connection begins. Time during which the broker blocks does not count. A confirm that a test
    /// [holds](crate::broker::memory::Verdict::HoldConfirm) has no deadline.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::broker::MemoryBroker;
    /// let publisher = MemoryBroker::new().publisher().confirm_deadline(Duration::from_millis(50));
    /// # let _ = publisher;
    /// ```
    #[must_use]
    pub fn confirm_deadline(mut self, deadline: Duration) -> Self {
        self.confirm_deadline = deadline;
        self
    }
}

impl Publisher for MemoryPublisher {
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
        let deadline = self.confirm_deadline;
        self.connection.get_or_insert_with(|| self.shared.state().attach(events, deadline));
        Ok(())
    }

    fn publish(&mut self, epoch: Epoch, outgoing: Outgoing) {
        let Some(connection) = self.connection else { return };
        let mut verdict = None;
        // A message of an epoch that is over must not consume a rule.
        if self.shared.script.is_active() && self.shared.state().is_current(connection, epoch) {
            verdict = self.shared.script.judge(&Publishing {
                exchange: &outgoing.exchange,
                routing_key: &outgoing.routing_key,
                message: &outgoing.message,
                epoch,
                isolated: outgoing.isolated,
            });
        }
        self.shared.state().publish(connection, epoch, outgoing, verdict);
    }

    fn stop(&mut self, _deadline: Duration) {
        if let Some(connection) = self.connection {
            self.shared.state().detach(connection);
        }
    }
}

impl Drop for MemoryPublisher {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl fmt::Debug for MemoryPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryPublisher").field("connection", &self.connection).finish_non_exhaustive()
    }
}
