//! Subscriptions: the events of the log, from a position on, as they become durable.
//!
//! A subscription suits code without tables of its own. Code with tables should use a
//! [projection](crate::Store::projection), which keeps its position with the tables.
//!
//! **Invariants.** A subscription hands out only durable events. It holds no read transaction
//! between two events of the caller. Events that the subscriber has not seen are not trimmed while
//! the subscription lives.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;

use crate::error::{Error, Result};
use crate::event::RecordedEvent;
use crate::filter::EventFilter;
use crate::store::read::wanted::{Looked, Wanted};
use crate::store::shared::notify::Listener;
use crate::store::transaction::cursor_ids::check_position;
use crate::store::{StartAt, Store};
use crate::time::Deadline;
use crate::tuning::{SUBSCRIPTION_BYTES_MAX, SUBSCRIPTION_EVENTS_MAX};

/// The events of the log from a position on: an endless iterator that waits for the next event.
/// Async code uses [`into_stream`](Self::into_stream). See [`Store::subscribe`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, Subscription};
/// store.write(|tx| tx.append(Event::bytes("opened", "").unpublished()))?;
/// let mut subscription: Subscription = store.subscribe(0)?;
/// assert_eq!(subscription.next().transpose()?.map(|event| event.seq()), Some(0));
/// assert!(subscription.try_next().is_none()); // there is no other yet
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Subscription {
    store: Store,
    wanted: Wanted,
    listener: Listener,
    /// The next sequence number to read.
    next: u64,
    /// Trimming up to here needs no report. `None` excuses everything that is trimmed when reading
    /// begins.
    excused_to: Option<u64>,
    read: VecDeque<Result<RecordedEvent>>,
    /// Whether the store is lost and that has been reported.
    ended: bool,
}

impl Store {
    /// Subscribes to the events from sequence number `from` on.
    ///
    /// The subscription first hands out the events that the log holds, then each appended event
    /// once it is durable. Events come in order, and the subscription reports every gap. If events
    /// from `from` on are trimmed, the first item is [`Error::Trimmed`], and the events that
    /// streams keep follow. To take all events that the log holds, call
    /// [`subscribe_at`](Self::subscribe_at) with [`StartAt::Oldest`].
    ///
    /// At most 256 events or 1 MiB are in memory at a time. Events that the subscriber has not seen
    /// are not trimmed while the subscription lives. So a subscription that is kept and not read
    /// keeps the log from shrinking. The store does not keep the position of a subscription; a
    /// [projection](Store::projection) keeps its own.
    ///
    /// A damaged record comes as an error in its place, and the next record follows. If the store
    /// is closed or poisoned, that comes as the last error. A living subscription holds the store
    /// open. [`Store::close`] ends a subscription that waits.
    ///
    /// # Errors
    /// [`Error::Setting`] for a position beyond the end of the log; [`Error::Closed`] or [`Error::Poisoned`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::Event;
    /// let mut subscription = store.subscribe(0)?;
    /// let reader = std::thread::spawn(move || subscription.next_timeout(Duration::from_secs(5)));
    /// store.write(|tx| tx.append(Event::bytes("opened", "").unpublished()))?;
    /// let event = reader.join().expect("it does not panic").transpose()?;
    /// assert_eq!(event.map(|event| event.event_type().to_owned()).as_deref(), Some("opened"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn subscribe(&self, from: u64) -> Result<Subscription> {
        self.subscribe_at(StartAt::Position(from))
    }

    /// Subscribes as [`subscribe`](Self::subscribe) does, from the place that `start` names. With
    /// [`StartAt::Oldest`], that is the oldest event that the log holds. With [`StartAt::Newest`],
    /// the subscription shows only events that are appended from now on.
    ///
    /// # Errors
    /// As [`subscribe`](Self::subscribe).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, StartAt};
    /// store.write(|tx| tx.append(Event::bytes("opened", "").unpublished()))?;
    /// let mut all = store.subscribe_at(StartAt::Oldest)?;
    /// let mut later = store.subscribe_at(StartAt::Newest)?;
    /// store.write(|tx| tx.append(Event::bytes("closed", "").unpublished()))?;
    /// assert_eq!(all.try_next().transpose()?.map(|event| event.seq()), Some(0));
    /// assert_eq!(later.try_next().transpose()?.map(|event| event.seq()), Some(1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn subscribe_at(&self, start: StartAt) -> Result<Subscription> {
        self.core().owner.check()?;
        self.ready()?;
        let core = self.core();
        let end = core.tail().next_seq;
        let (from, excused_to) = match start {
            StartAt::Oldest => (0, None),
            StartAt::Newest => (end, Some(end)),
            StartAt::Position(position) => {
                check_position("from", position, end)?;
                (position, Some(0))
            }
        };
        let listener = core.notifier.subscribe(Some(from));
        Ok(Subscription {
            store: self.clone(),
            wanted: Wanted::all(&core.settings.upcasts),
            listener,
            next: from,
            excused_to,
            read: VecDeque::new(),
            ended: false,
        })
    }
}

impl Subscription {
    /// Limits the subscription to the events that the filter takes. Set the filter before you take
    /// the first event. The subscription refuses a filter that no event can ever pass: it then
    /// shows [`Error::Setting`] as its only item.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, EventFilter};
    /// store.write(|tx| {
    ///     tx.append(Event::bytes("opened", "").unpublished())?;
    ///     tx.append(Event::bytes("closed", "").unpublished())
    /// })?;
    /// let mut closed = store.subscribe(0)?.filter_events(EventFilter::all().event_type("closed"));
    /// assert_eq!(closed.try_next().transpose()?.map(|event| event.seq()), Some(1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn filter_events(mut self, filter: EventFilter) -> Self {
        match Wanted::new(filter, &self.store.core().settings.upcasts) {
            Ok(wanted) => self.wanted = wanted,
            Err(error) => {
                self.read = VecDeque::from([Err(error.into())]);
                self.ended = true;
            }
        }
        self
    }

    /// The sequence number of the next event to look at. If the application is done with all events
    /// it took, it can subscribe from here another time.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("opened", "").unpublished()))?;
    /// let mut subscription = store.subscribe(0)?;
    /// assert_eq!(subscription.position(), 0);
    /// subscription.try_next().transpose()?;
    /// assert_eq!(subscription.position(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn position(&self) -> u64 {
        let first = self.read.front().and_then(|read| match read {
            Ok(event) => Some(event.seq()),
            Err(Error::Trimmed { from, .. }) => Some(*from),
            Err(error) => error.unreadable(),
        });
        first.unwrap_or(self.next)
    }

    /// Returns the next event, if it is there.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert!(store.subscribe(0)?.try_next().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn try_next(&mut self) -> Option<Result<RecordedEvent>> {
        self.end_elsewhere();
        while self.read.is_empty() && !self.ended && self.refill() {}
        self.take()
    }

    /// In a forked process, hands out the error as the last item. Events that were read ahead are
    /// not handed out, since taking them would take a lock.
    fn end_elsewhere(&mut self) {
        if !self.ended
            && let Err(error) = self.store.core().owner.check()
        {
            self.ended = true;
            self.read = VecDeque::from([Err(error)]);
        }
    }

    fn take(&mut self) -> Option<Result<RecordedEvent>> {
        let read = self.read.pop_front();
        if let Some(Ok(event)) = &read {
            // The event that is handed out belongs to the subscriber now.
            self.listener.want_from(event.seq() + 1);
        }
        read
    }

    /// Returns the next event, or `None` if no event comes in time or the end of the store has been
    /// reported.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// assert!(store.subscribe(0)?.next_timeout(Duration::from_millis(10)).is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Result<RecordedEvent>> {
        self.next_until(Deadline::after(timeout))
    }

    fn next_until(&mut self, deadline: Deadline) -> Option<Result<RecordedEvent>> {
        self.end_elsewhere();
        loop {
            let more = self.read.is_empty() && !self.ended && self.refill();
            if let Some(event) = self.take() {
                return Some(event);
            }
            if self.ended || deadline.is_over() || (!more && !self.listener.signal.wait_until(deadline)) {
                return None;
            }
        }
    }

    /// Reads one more piece of the log, in a read transaction of its own. Returns whether there is
    /// more to look at although this piece had no wanted event.
    fn refill(&mut self) -> bool {
        self.read_on().unwrap_or_else(|error| {
            self.ended = true;
            self.read.push_back(Err(error));
            false
        })
    }

    fn read_on(&mut self) -> Result<bool> {
        self.store.ready()?;
        let (before, end) = (self.next, self.store.core().tail().next_seq);
        if before >= end {
            self.listener.want_from(before);
            return Ok(false);
        }
        let mut bytes = 0;
        let mut events = self.store.read()?.events_to(before, end)?;
        self.report_trimmed(before, events.trimmed_to());
        for _ in 0..SUBSCRIPTION_EVENTS_MAX {
            let Some(looked) = events.look(&self.wanted) else {
                // Trimming has removed what stood between the last record and here.
                self.next = self.next.max(end);
                break;
            };
            match looked {
                Ok(Looked { seq, event }) => {
                    self.next = seq + 1;
                    bytes += event.as_ref().map_or(0, |event| event.payload().len());
                    self.read.extend(event.map(Ok));
                }
                Err(error) => {
                    // The subscription passes over an error only if the error certainly concerns
                    // one record.
                    let Some(seq) = error.unreadable() else { return Err(error) };
                    self.next = self.next.max(seq + 1);
                    self.read.push_back(Err(error));
                }
            }
            if bytes >= SUBSCRIPTION_BYTES_MAX {
                break;
            }
        }
        if self.next == before {
            // Everything here has been reported. Moving on keeps it from being reported for ever.
            self.next = before + 1;
        }
        Ok(self.read.is_empty())
    }

    /// Reports that requested events are gone. The check runs whenever the log is read, since a
    /// commit that was in progress when the subscription began may have trimmed events.
    fn report_trimmed(&mut self, next: u64, trimmed_to: u64) {
        let from = next.max(*self.excused_to.get_or_insert(trimmed_to));
        if trimmed_to > from {
            self.read.push_back(Err(Error::Trimmed { from, trimmed_to }));
        }
        self.excused_to = self.excused_to.max(Some(trimmed_to));
    }
}

impl Iterator for Subscription {
    type Item = Result<RecordedEvent>;

    /// Waits for the next event. Returns `None` only after the end of the store was reported.
    fn next(&mut self) -> Option<Self::Item> {
        self.next_until(Deadline::Never)
    }
}

/// A subscription for async code. See [`Subscription::into_stream`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let events: onewrite::SubscriptionStream = store.subscribe(0)?.into_stream();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "a stream does nothing until it is polled"]
pub struct SubscriptionStream(Subscription);

impl Subscription {
    /// Turns the subscription into a [`Stream`](futures_core::Stream). The stream needs no runtime:
    /// poll it from any executor. A poll reads the file if no event is left in memory, which takes
    /// as long as the disk does.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use futures_util::StreamExt;
    /// use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("opened", "").unpublished()))?;
    /// let mut events = store.subscribe(0)?.into_stream();
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// # runtime.block_on(async {
    /// let event = events.next().await.expect("it is there")?;
    /// assert_eq!(event.event_type(), "opened");
    /// # Ok::<(), onewrite::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn into_stream(self) -> SubscriptionStream {
        SubscriptionStream(self)
    }
}

impl Stream for SubscriptionStream {
    type Item = Result<RecordedEvent>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.end_elsewhere();
        loop {
            let subscription = &mut self.0;
            let more = subscription.read.is_empty() && !subscription.ended && subscription.refill();
            if let Some(event) = subscription.take() {
                return Poll::Ready(Some(event));
            }
            if subscription.ended {
                return Poll::Ready(None);
            }
            if more {
                // Other tasks of the executor run between two pieces of the log.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            // The signal keeps a notification that came since the look at the log, and is ready at
            // once.
            if subscription.listener.signal.poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    /// Goal: reading ahead is bounded in events and in bytes. Method: many small events, then few
    /// large ones.
    #[test]
    fn little_is_read_ahead() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let append = |events: usize, bytes: usize| {
            let write = move |tx: &crate::store::Transaction| {
                (0..events)
                    .try_for_each(|_| tx.append(Event::bytes("t", vec![7; bytes]).unpublished()).map(drop))
            };
            store.write(write).unwrap();
        };
        append(1000, 1);
        append(10, 600 << 10);
        let mut subscription = store.subscribe(0).unwrap();
        assert!(subscription.try_next().unwrap().is_ok());
        assert_eq!(subscription.read.len(), SUBSCRIPTION_EVENTS_MAX - 1);
        let mut large = store.subscribe(1000).unwrap();
        assert!(large.try_next().unwrap().is_ok());
        assert_eq!(large.read.len(), 1, "two are more than {SUBSCRIPTION_BYTES_MAX} bytes");
        assert_eq!(large.count_left(), 9);
    }

    impl Subscription {
        fn count_left(&mut self) -> usize {
            std::iter::from_fn(|| self.try_next()).count()
        }
    }
}
