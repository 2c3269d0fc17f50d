//! Reads the events of one stream.

use std::ops::Range;

use redb::ReadableTable;

use crate::error::{CorruptError, Error, Result};
use crate::event::RecordedEvent;
use crate::limits::SHORT_STRING_BYTES_MAX;
use crate::log::keys;
use crate::log::streams::{NO_SEQ, Run, SnapshotRow, StreamState};
use crate::printable::printable;
use crate::storage::errors::{damaged_row, unless_it_panics};
use crate::storage::tables::ids::check_id;
use crate::upcast::Upcasts;

/// The source of the rows and records of one view.
pub(crate) trait StreamSource {
    /// The chunk that this revision would be in: the last chunk that begins at or before it.
    fn chunk(&self, name: &[u8], revision: u64) -> Result<Option<Run>>;
    /// The row of the stream's snapshot.
    fn snapshot_row(&self, name: &[u8]) -> Result<Option<Vec<u8>>>;
    /// The record at this sequence number, as recorded.
    fn record(&self, seq: u64) -> Result<Option<RecordedEvent>>;
    /// The rules that read older forms of payloads.
    fn upcasts(&self) -> &Upcasts;
    /// Fails in another process than the one that opened the store.
    fn owned(&self) -> Result<()>;
}

pub(crate) fn find_chunk(
    chunks: &impl ReadableTable<&'static [u8], &'static [u8]>,
    name: &[u8],
    revision: u64,
) -> Result<Option<Run>> {
    let (from, to) = (keys::chunk(name, 0), keys::chunk(name, revision));
    let Some(row) = chunks.range(from.as_slice()..=to.as_slice())?.next_back() else { return Ok(None) };
    let (key, value) = row?;
    let (_, first) = keys::split_chunk(key.value()).ok_or_else(|| damaged_row("chunk"))?;
    Run::from_bytes(first, value.value()).map(Some).ok_or_else(|| damaged_row("chunk"))
}

/// A stream as of one moment.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) name: String,
    pub(crate) state: StreamState,
    /// The part of the stream that no chunk holds.
    pub(crate) recent: Run,
}

impl View {
    /// Returns the sequence number of a revision. `cached` keeps the chunk of the last answer.
    fn seq_of(&self, source: &dyn StreamSource, revision: u64, cached: &mut Run) -> Result<u64> {
        if let Some(seq) = self.recent.get(revision).or_else(|| cached.get(revision)) {
            return self.known(revision, seq);
        }
        if let Some(run) = source.chunk(self.name.as_bytes(), revision)? {
            *cached = run;
        }
        self.known(revision, cached.get(revision).unwrap_or(NO_SEQ))
    }

    fn known(&self, revision: u64, seq: u64) -> Result<u64> {
        if seq == NO_SEQ { Err(self.missing(revision)) } else { Ok(seq) }
    }

    fn missing(&self, revision: u64) -> Error {
        Error::MissingRevision { stream: self.name.clone(), revision }
    }

    pub(crate) fn read(
        &self,
        source: &dyn StreamSource,
        revision: u64,
        cached: &mut Run,
    ) -> Result<RecordedEvent> {
        let seq = self.seq_of(source, revision, cached)?;
        let recorded = source.record(seq)?.ok_or_else(|| self.missing(revision))?;
        if recorded.stream() != Some(&*self.name) || recorded.revision() != Some(revision) {
            return Err(CorruptError { seq, what: "it is not the event that the stream index says" }.into());
        }
        Ok(recorded)
    }
}

/// Events of one stream, in order of revision; from the newest on with [`rev`](Iterator::rev). See
/// [`StreamReader::events`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::{Event, ExpectedRevision};
/// # store.write(|tx| {
/// #     let events = ["1", "2"].map(|text| Event::bytes("deposited", text).unpublished());
/// #     tx.stream("account-7").append(events, ExpectedRevision::Any)
/// # })?;
/// let snapshot = store.read()?;
/// let events: onewrite::StreamEvents<'_> = snapshot.stream("account-7")?.events(0);
/// let newest = events.rev().next().expect("two were appended")?;
/// assert_eq!(newest.payload(), b"2");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct StreamEvents<'a> {
    pub(crate) source: &'a dyn StreamSource,
    view: View,
    left: Range<u64>,
    chunk: Run,
    /// Events read so far.
    reads: u32,
}

impl std::fmt::Debug for StreamEvents<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamEvents").field("stream", &self.view.name).field("left", &self.left).finish()
    }
}

impl StreamEvents<'_> {
    fn read(&mut self, revision: u64) -> Result<RecordedEvent> {
        if self.reads.is_multiple_of(EVENTS_PER_LOOK) {
            self.source.owned()?;
        }
        self.reads = self.reads.wrapping_add(1);
        let recorded = self.view.read(self.source, revision, &mut self.chunk)?;
        self.source.upcasts().upcast(recorded)
    }
}

impl Iterator for StreamEvents<'_> {
    type Item = Result<RecordedEvent>;

    fn next(&mut self) -> Option<Self::Item> {
        let revision = self.left.next()?;
        Some(unless_it_panics(|| self.read(revision)))
    }
}

impl DoubleEndedIterator for StreamEvents<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let revision = self.left.next_back()?;
        Some(unless_it_panics(|| self.read(revision)))
    }
}

/// A stream as of a snapshot. See [`Snapshot::stream`](crate::Snapshot::stream).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, ExpectedRevision, StreamReader};
/// store.write(|tx| {
///     let events = ["100", "20"].map(|text| Event::bytes("deposited", text).unpublished());
///     tx.stream("account-7").append(events, ExpectedRevision::NoStream)
/// })?;
/// let snapshot = store.read()?;
/// let account: StreamReader<'_> = snapshot.stream("account-7")?;
/// assert_eq!(account.revision(), Some(1));
/// let payloads: Vec<_> = account.events(0).map(|event| Ok(event?.payload().to_vec())).collect::<onewrite::Result<_>>()?;
/// assert_eq!(payloads, [b"100".to_vec(), b"20".to_vec()]);
/// assert_eq!(snapshot.stream("account-8")?.revision(), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct StreamReader<'a> {
    pub(crate) source: &'a dyn StreamSource,
    pub(crate) view: View,
}

impl std::fmt::Debug for StreamReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamReader").field("stream", &self.view.name).finish_non_exhaustive()
    }
}

impl<'a> StreamReader<'a> {
    pub(crate) fn name(&self) -> &str {
        &self.view.name
    }

    /// The first revision that can be read: 0 unless the stream is truncated.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, ExpectedRevision};
    /// # store.write(|tx| {
    /// #     let events = ["1", "2"].map(|text| Event::bytes("deposited", text).unpublished());
    /// #     tx.stream("account-7").append(events, ExpectedRevision::Any)
    /// # })?;
    /// store.write(|tx| tx.stream("account-7").truncate_before(1))?;
    /// assert_eq!(store.read()?.stream("account-7")?.first_revision(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn first_revision(&self) -> u64 {
        self.view.state.first
    }

    /// The newest snapshot that was saved in this version, and the newest revision in it. The
    /// result is `None` if the snapshot is of another version or fails its checksum. The same holds
    /// if its newest event is not there any more as it was.
    ///
    /// # Errors
    /// An error of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| {
    ///     let account = tx.stream("account-7");
    ///     account.append([Event::bytes("deposited", "100").unpublished()], ExpectedRevision::NoStream)?;
    ///     account.save_snapshot(1, b"100")
    /// })?;
    /// let snapshot = store.read()?;
    /// let account = snapshot.stream("account-7")?;
    /// assert_eq!(account.snapshot(1)?, Some((0, b"100".to_vec())));
    /// assert_eq!(account.snapshot(2)?, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn snapshot(&self, version: u32) -> Result<Option<(u64, Vec<u8>)>> {
        self.source.owned()?;
        let View { name, .. } = &self.view;
        let row = unless_it_panics(|| self.source.snapshot_row(name.as_bytes()))?;
        let Some(row) = row else { return Ok(None) };
        let row = SnapshotRow::from_bytes(name.as_bytes(), &row);
        if row.is_none() {
            tracing::warn!(stream = name, "a snapshot is damaged; the events are read instead");
        }
        let Some(row) = row.filter(|row| row.version == version) else { return Ok(None) };
        if !unless_it_panics(|| self.view.has_event_of(self.source, &row))? {
            tracing::warn!(
                stream = %printable(name), revision = row.revision,
                "a snapshot is of an event that is not there; the events are read instead"
            );
            return Ok(None);
        }
        Ok(Some((row.revision, row.bytes)))
    }

    /// The revision of the newest event; `None` if the stream has never had one. A truncated or
    /// deleted stream keeps its revision.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.read()?.stream("account-7")?.revision(), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn revision(&self) -> Option<u64> {
        self.view.state.next.checked_sub(1)
    }

    /// Whether the stream is deleted for good.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.stream("account-7").tombstone())?;
    /// assert!(store.read()?.stream("account-7")?.is_deleted());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.view.state.deleted
    }

    /// The events from revision `from` on, read one by one as the iterator advances. Truncated
    /// events are left out; a deleted stream has none. A damaged record comes as an error in its
    /// place.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, ExpectedRevision};
    /// # store.write(|tx| {
    /// #     let events = ["1", "2", "3"].map(|text| Event::bytes("deposited", text).unpublished());
    /// #     tx.stream("account-7").append(events, ExpectedRevision::Any)
    /// # })?;
    /// let snapshot = store.read()?;
    /// assert_eq!(snapshot.stream("account-7")?.events(1).count(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn events(&self, from: u64) -> StreamEvents<'a> {
        let readable = self.view.state.readable();
        let left = from.max(readable.start)..readable.end;
        StreamEvents { source: self.source, view: self.view.clone(), left, chunk: Run::default(), reads: 0 }
    }
}

pub(in crate::store) fn check_name(name: &str) -> Result<()> {
    check_id("the stream's name", name.as_bytes(), SHORT_STRING_BYTES_MAX)
}

/// How many events in a row share one look at the process. A look costs a system call, which takes
/// as long as half the replay of an event.
pub(in crate::store) const EVENTS_PER_LOOK: u32 = 64;
