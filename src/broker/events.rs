//! The two ends of the channel over which a publisher or a source reports. Its interface uses only
//! types of this crate and of std.

use std::sync::mpsc::{RecvError, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use super::{PublisherEvent, SourceEvent};

/// The end of the channel on which events are received.
///
/// A [`Publisher`](super::Publisher) or a [`Source`](super::Source) holds the sending end; tests
/// and adapters hold this end. The channel has no bound of its own: the relay's window, or the
/// prefetch, bounds its content.
///
/// ```
/// use onewrite::broker::{Epoch, EventReceiver, PublisherEvent, PublisherEvents};
/// let (events, received): (_, EventReceiver<PublisherEvent>) = PublisherEvents::channel();
/// events.send(PublisherEvent::Up { epoch: Epoch(1) });
/// assert!(matches!(received.recv()?, PublisherEvent::Up { epoch: Epoch(1) }));
/// drop(events);
/// assert!(received.recv().is_err()); // no sender is left
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct EventReceiver<T>(Receiver<T>);

impl<T> EventReceiver<T> {
    /// Returns the next event. Blocks until there is one.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
    /// let (events, received) = SourceEvents::channel();
    /// events.send(SourceEvent::Up { epoch: Epoch(1) });
    /// assert!(matches!(received.recv()?, SourceEvent::Up { .. }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// No sender is left, and all events have been received.
    pub fn recv(&self) -> Result<T, RecvError> {
        self.0.recv().map_err(|_| RecvError)
    }

    /// Returns the next event. Blocks for at most `timeout`.
    ///
    /// ```
    /// # use onewrite::broker::SourceEvents;
    /// use std::{sync::mpsc::RecvTimeoutError, time::Duration};
    /// let (_events, received) = SourceEvents::channel();
    /// assert_eq!(received.recv_timeout(Duration::from_millis(1)).unwrap_err(), RecvTimeoutError::Timeout);
    /// ```
    ///
    /// # Errors
    /// No event came in time, or no sender is left.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        self.0.recv_timeout(timeout).map_err(|error| match error {
            crossbeam_channel::RecvTimeoutError::Timeout => RecvTimeoutError::Timeout,
            crossbeam_channel::RecvTimeoutError::Disconnected => RecvTimeoutError::Disconnected,
        })
    }

    /// Returns the next event if there is one now. Does not block.
    ///
    /// ```
    /// # use onewrite::broker::SourceEvents;
    /// use std::sync::mpsc::TryRecvError;
    /// let (events, received) = SourceEvents::channel();
    /// assert_eq!(received.try_recv().unwrap_err(), TryRecvError::Empty);
    /// drop(events);
    /// assert_eq!(received.try_recv().unwrap_err(), TryRecvError::Disconnected);
    /// ```
    ///
    /// # Errors
    /// There is no event, or no sender is left.
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        self.0.try_recv().map_err(|error| match error {
            crossbeam_channel::TryRecvError::Empty => TryRecvError::Empty,
            crossbeam_channel::TryRecvError::Disconnected => TryRecvError::Disconnected,
        })
    }

    /// Iterates over all events until no sender is left. Blocks for each event.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
    /// let (events, received) = SourceEvents::channel();
    /// events.send(SourceEvent::Up { epoch: Epoch(1) });
    /// drop(events);
    /// assert_eq!(received.iter().count(), 1);
    /// ```
    pub fn iter(&self) -> impl Iterator<Item = T> {
        self.0.iter()
    }

    /// Iterates over the events that are there now. Does not block.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
    /// let (events, received) = SourceEvents::channel();
    /// events.send(SourceEvent::Up { epoch: Epoch(1) });
    /// assert_eq!(received.try_iter().count(), 1);
    /// ```
    pub fn try_iter(&self) -> impl Iterator<Item = T> {
        self.0.try_iter()
    }

    /// The number of events that are there now.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
    /// let (events, received) = SourceEvents::channel();
    /// events.send(SourceEvent::Up { epoch: Epoch(1) });
    /// assert_eq!(received.len(), 1);
    /// ```
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no event is there now.
    ///
    /// ```
    /// # use onewrite::broker::SourceEvents;
    /// assert!(SourceEvents::channel().1.is_empty());
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The sending end over which a publisher reports to the relay. Cheap to clone; never blocks.
///
/// ```
/// use onewrite::broker::{Epoch, PublisherEvent, PublisherEvents};
/// let (events, received) = PublisherEvents::channel();
/// events.clone().send(PublisherEvent::Up { epoch: Epoch(1) });
/// assert!(matches!(received.try_recv(), Ok(PublisherEvent::Up { epoch: Epoch(1) })));
/// ```
#[derive(Debug, Clone)]
pub struct PublisherEvents(Sender<PublisherEvent>);

/// The sending end over which a source reports to the consumer. Cheap to clone; never blocks. The
/// prefetch bounds the channel's content.
///
/// ```
/// use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
/// let (events, received) = SourceEvents::channel();
/// events.clone().send(SourceEvent::Up { epoch: Epoch(1) });
/// assert!(matches!(received.try_recv(), Ok(SourceEvent::Up { epoch: Epoch(1) })));
/// ```
#[derive(Debug, Clone)]
pub struct SourceEvents(Sender<SourceEvent>);

impl PublisherEvents {
    /// Returns a new channel, for a test of a [`Publisher`](super::Publisher) or for a publisher
    /// that wraps another publisher. A relay creates its own channel.
    ///
    /// ```
    /// # use onewrite::broker::{PublisherEvent, PublisherEvents};
    /// let (events, received) = PublisherEvents::channel();
    /// assert!(events.send(PublisherEvent::Blocked { blocked: true }));
    /// assert_eq!(received.len(), 1);
    /// ```
    #[must_use]
    pub fn channel() -> (Self, EventReceiver<PublisherEvent>) {
        let (sender, receiver) = crossbeam_channel::unbounded();
        (Self(sender), EventReceiver(receiver))
    }

    pub(crate) fn to_relay(sender: Sender<PublisherEvent>) -> Self {
        Self(sender)
    }

    /// Sends an event to the relay. Returns `false` if the relay is gone; the publisher should then
    /// end.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, PublisherEvent, PublisherEvents};
    /// let (events, received) = PublisherEvents::channel();
    /// drop(received); // the relay is gone
    /// assert!(!events.send(PublisherEvent::Up { epoch: Epoch(1) }));
    /// ```
    pub fn send(&self, event: PublisherEvent) -> bool {
        self.0.send(event).is_ok()
    }
}

impl SourceEvents {
    /// Returns a new channel, for a test of a [`Source`](super::Source) or for a source that wraps
    /// another source. A consumer creates its own channel.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
    /// let (events, received) = SourceEvents::channel();
    /// assert!(events.send(SourceEvent::Up { epoch: Epoch(1) }));
    /// assert_eq!(received.len(), 1);
    /// ```
    #[must_use]
    pub fn channel() -> (Self, EventReceiver<SourceEvent>) {
        let (sender, receiver) = crossbeam_channel::unbounded();
        (Self(sender), EventReceiver(receiver))
    }

    pub(crate) fn to_consumer(sender: Sender<SourceEvent>) -> Self {
        Self(sender)
    }

    /// Sends an event to the consumer. Returns `false` if the consumer is gone; the source should
    /// then end.
    ///
    /// ```
    /// # use onewrite::broker::{Epoch, SourceEvent, SourceEvents};
    /// let (events, received) = SourceEvents::channel();
    /// drop(received); // the consumer is gone
    /// assert!(!events.send(SourceEvent::Up { epoch: Epoch(1) }));
    /// ```
    pub fn send(&self, event: SourceEvent) -> bool {
        self.0.send(event).is_ok()
    }

    /// Whether the consumer has received everything that was reported.
    #[cfg(feature = "rabbitmq")]
    pub(crate) fn are_read(&self) -> bool {
        self.0.is_empty()
    }
}
