//! Replay: the log from a position on, without copying.

use std::fmt;

use super::read::{Frame, Frames, Snapshot};
use crate::error::Result;
use crate::event::category_of;
use crate::log::skim::{Skim, skim};

/// Events of a [`Snapshot`], in order, each as a view of its record. See [`Snapshot::replay`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
/// let replay: onewrite::Replay = store.read()?.replay(0)?;
/// assert_eq!(replay.count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Replay {
    frames: Frames,
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Replay")
    }
}

impl Snapshot {
    /// As [`events`](Self::events), without copying: for reading long stretches fast. What is seen is what was recorded: upcasts do
    /// not run; look at [`version`](ReplayedEvent::version).
    ///
    /// Cost: about that of redb's own range scan; each record's checksum is checked all the same.
    ///
    /// # Errors
    /// What redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// store.write(|tx| {
    ///     tx.append(Event::bytes("paid", "1").unpublished())?;
    ///     tx.append(Event::bytes("paid", "22").unpublished())
    /// })?;
    /// let mut bytes = 0;
    /// for event in store.read()?.replay(0)? {
    ///     bytes += event?.payload().len();
    /// }
    /// assert_eq!(bytes, 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn replay(&self, from: u64) -> Result<Replay> {
        Ok(Replay { frames: self.frames(from)? })
    }
}

impl Iterator for Replay {
    type Item = Result<ReplayedEvent>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.frames.next_as(|seq, frame| Ok(skim(seq, frame)?), |frame, skim| ReplayedEvent { frame, skim })
    }
}

/// An event as recorded, seen in its place. It keeps the page that it stands on in memory.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, ExpectedRevision, ReplayedEvent};
/// store.write(|tx| tx.stream("account-7").append([Event::bytes("opened", "x")], ExpectedRevision::NoStream))?;
/// let event: ReplayedEvent = store.read()?.replay(0)?.next().expect("appended above")?;
/// assert_eq!((event.seq(), event.event_type(), event.payload()), (0, "opened", &b"x"[..]));
/// assert_eq!((event.stream(), event.category(), event.revision()), (Some("account-7"), Some("account"), Some(0)));
/// assert_eq!((event.key(), event.version()), (Some("account-7"), 1));
/// assert!(event.time_ms() > 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ReplayedEvent {
    frame: Frame,
    skim: Skim,
}

impl fmt::Debug for ReplayedEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayedEvent")
            .field("seq", &self.seq())
            .field("event_type", &self.event_type())
            .field("payload_bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}

/// As at [`Recorded`](crate::Recorded), where each is shown.
impl ReplayedEvent {
    /// Its sequence number.
    #[must_use]
    #[inline]
    pub fn seq(&self) -> u64 {
        self.skim.seq
    }

    /// When it was appended, Unix milliseconds by the store's clock.
    #[must_use]
    #[inline]
    pub fn time_ms(&self) -> u64 {
        self.skim.time_ms(self.frame.value())
    }

    /// Its type.
    #[must_use]
    #[inline]
    pub fn event_type(&self) -> &str {
        self.skim.event_type(self.frame.value())
    }

    /// The version of its payload.
    #[must_use]
    #[inline]
    pub fn version(&self) -> u32 {
        self.skim.version
    }

    /// Its key.
    #[must_use]
    #[inline]
    pub fn key(&self) -> Option<&str> {
        self.skim.key(self.frame.value())
    }

    /// Its stream.
    #[must_use]
    #[inline]
    pub fn stream(&self) -> Option<&str> {
        self.skim.stream(self.frame.value())
    }

    /// Its stream's category.
    #[must_use]
    #[inline]
    pub fn category(&self) -> Option<&str> {
        self.stream().map(category_of)
    }

    /// Its revision in its stream.
    #[must_use]
    #[inline]
    pub fn revision(&self) -> Option<u64> {
        self.skim.revision(self.frame.value())
    }

    /// Its payload.
    #[must_use]
    #[inline]
    pub fn payload(&self) -> &[u8] {
        self.skim.payload(self.frame.value())
    }
}
