//! Replay: the log from a position on, without copying.

use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::error::{Error, Result};
use crate::event::category_of;
use crate::log::view::{RecordView, view};
use crate::store::read::snapshot::{Frame, Frames, Snapshot};

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
    /// As [`events`](Self::events), without copying: for reading long stretches fast. Events come
    /// as they were recorded: upcasts do not run, so look at [`version`](ReplayedEvent::version).
    ///
    /// Cost: a little more than redb's own range scan (see docs/benchmarks.md), with each record's
    /// checksum checked. [`Replay::visit`] is quicker.
    ///
    /// # Errors
    /// An error of redb.
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

impl Replay {
    /// Shows each remaining event to `visit`, in redb's own page, until `visit` returns [`Err`]. A
    /// later call goes on behind the event that was shown last. A damaged or missing record is
    /// shown too, as an error in its place: `visit` decides whether to go on. A file that cannot be
    /// read is shown once as an error, and ends the replay.
    ///
    /// Cost: about that of redb's own range scan, checksums included, since nothing is moved. The
    /// iterator costs about a tenth more, and its events can be kept.
    ///
    /// # Errors
    /// The error that `visit` returns.
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
    /// store.read()?.replay(0)?.visit(|event| -> onewrite::Result<()> {
    ///     bytes += event?.payload().len();
    ///     Ok(())
    /// })?;
    /// assert_eq!(bytes, 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn visit<E>(
        &mut self,
        mut visit: impl FnMut(Result<ReplayedEvent<&[u8]>>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.frames.has_failed() {
            return Ok(());
        }
        // One `catch_unwind` covers all events; `visiting` says whether `visit` or the engine
        // panicked.
        let visiting = Cell::new(false);
        let (frames, said) = (&mut self.frames, &mut visit);
        let all = catch_unwind(AssertUnwindSafe(|| {
            let mut show = |event: Result<ReplayedEvent<&[u8]>>| {
                visiting.set(true);
                let answer = said(event);
                visiting.set(false);
                answer
            };
            loop {
                let shown = frames.next_as(
                    |seq, bytes| {
                        Ok(show(
                            view(seq, bytes).map(|view| ReplayedEvent { bytes, view }).map_err(Error::from),
                        ))
                    },
                    |_, shown| shown,
                );
                match shown {
                    None => return Ok(()),
                    Some(Ok(shown)) => shown?,
                    Some(Err(error)) => show(Err(error))?,
                }
            }
        }));
        match all {
            Ok(said) => said,
            Err(panic) if visiting.get() => resume_unwind(panic),
            Err(panic) => visit(Err(self.frames.panicked(&*panic))),
        }
    }
}

impl Iterator for Replay {
    type Item = Result<ReplayedEvent>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.frames.guarded(|frames| {
            frames.next_as(
                |seq, frame| Ok(view(seq, frame)?),
                |frame, view| ReplayedEvent { bytes: PageBytes(frame), view },
            )
        })
    }
}

/// A record's bytes in their page, which stays in memory for as long as this is held. A
/// [`ReplayedEvent`] holds one.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// use onewrite::{PageBytes, ReplayedEvent};
/// fn payload_bytes(event: &ReplayedEvent<impl AsRef<[u8]>>) -> usize {
///     event.payload().len()
/// }
/// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
/// let kept: Vec<ReplayedEvent<PageBytes>> = store.read()?.replay(0)?.collect::<onewrite::Result<_>>()?;
/// assert_eq!(kept.iter().map(payload_bytes).sum::<usize>(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PageBytes(Frame);

impl AsRef<[u8]> for PageBytes {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.0.value()
    }
}

impl fmt::Debug for PageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageBytes({} bytes)", self.as_ref().len())
    }
}

/// An event as recorded, read in place. An event from [`Replay`] keeps its page in memory; an event
/// that [`Replay::visit`] shows is borrowed.
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
/// let shown = r#"ReplayedEvent { seq: 0, event_type: "opened", payload_bytes: 1, .. }"#; // no payload reaches a log
/// assert_eq!(format!("{event:?}"), shown);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ReplayedEvent<B = PageBytes> {
    bytes: B,
    view: RecordView,
}

impl<B: AsRef<[u8]>> fmt::Debug for ReplayedEvent<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayedEvent")
            .field("seq", &self.seq())
            .field("event_type", &self.event_type())
            .field("payload_bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}

/// Each method is as at [`RecordedEvent`](crate::RecordedEvent).
impl<B: AsRef<[u8]>> ReplayedEvent<B> {
    /// Its sequence number.
    #[must_use]
    #[inline]
    pub fn seq(&self) -> u64 {
        self.view.seq
    }

    /// When it was appended, Unix milliseconds by the store's clock.
    #[must_use]
    #[inline]
    pub fn time_ms(&self) -> u64 {
        self.view.time_ms(self.bytes.as_ref())
    }

    /// Its type.
    #[must_use]
    #[inline]
    pub fn event_type(&self) -> &str {
        self.view.event_type(self.bytes.as_ref())
    }

    /// The version of its payload.
    #[must_use]
    #[inline]
    pub fn version(&self) -> u32 {
        self.view.version
    }

    /// Its key.
    #[must_use]
    #[inline]
    pub fn key(&self) -> Option<&str> {
        self.view.key(self.bytes.as_ref())
    }

    /// Its stream.
    #[must_use]
    #[inline]
    pub fn stream(&self) -> Option<&str> {
        self.view.stream(self.bytes.as_ref())
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
        self.view.revision(self.bytes.as_ref())
    }

    /// Its payload.
    #[must_use]
    #[inline]
    pub fn payload(&self) -> &[u8] {
        self.view.payload(self.bytes.as_ref())
    }
}
