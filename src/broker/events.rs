//! The channel over which a publisher or a source reports: its two ends, in terms of this crate and of std alone.

use std::sync::mpsc::{RecvError, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use super::{PublisherEvent, SourceEvent};

/// The end of the channel on which events are received. A [`Publisher`](super::Publisher) or [`Source`](super::Source) holds the other
/// end; tests and adapters hold this one. Unbounded: what is in it is bounded by the relay's window, or by the prefetch.
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
    /// The next event. Blocks until there is one.
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

    /// The next event. Blocks `timeout` at most.
    ///
    /// ```
    /// # use onewrite::broker::SourceEvents;
    /// use std::{sync::mpsc::RecvTimeoutError, time::Duration};
    /// let (_events, received) = SourceEvents::channel();
    /// assert_eq!(received.recv_timeout(Duration::from_millis(1)).unwrap_err(), RecvTimeoutError::Timeout);
    /// ```
    ///
    /// # Errors
    /// No event has come in time, or no sender is left.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        self.0.recv_timeout(timeout).map_err(|error| match error {
            crossbeam_channel::RecvTimeoutError::Timeout => RecvTimeoutError::Timeout,
            crossbeam_channel::RecvTimeoutError::Disconnected => RecvTimeoutError::Disconnected,
        })
    }

    /// The next event, if it is there. Does not block.
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

    /// All events that come, until no sender is left. Blocks for each.
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

    /// The events that are there now. Does not block.
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

    /// How many events are there now.
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

/// Where a publisher reports what happens. Cheap to clone; never blocks.
///
/// ```
/// use onewrite::broker::{Epoch, PublisherEvent, PublisherEvents};
/// let (events, received) = PublisherEvents::channel();
/// events.clone().send(PublisherEvent::Up { epoch: Epoch(1) });
/// assert!(matches!(received.try_recv(), Ok(PublisherEvent::Up { epoch: Epoch(1) })));
/// ```
#[derive(Debug, Clone)]
pub struct PublisherEvents(Sender<PublisherEvent>);

/// Where a source hands over deliveries. Cheap to clone; never blocks: the prefetch bounds what is in it.
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
    /// A new channel: for a test of a [`Publisher`](super::Publisher), or for one that stands before another. A relay brings its own.
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

    /// Notifies the relay. Returns `false` when the relay is gone, upon which the publisher should end.
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
    /// A new channel: for a test of a [`Source`](super::Source), or for one that stands before another. A consumer brings its own.
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

    /// Notifies the consumer. Returns `false` when the consumer is gone, upon which the source should end.
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

    /// The consumer has taken out all that was reported.
    #[cfg(feature = "rabbitmq")]
    pub(crate) fn are_read(&self) -> bool {
        self.0.is_empty()
    }
}
