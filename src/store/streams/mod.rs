//! Streams in the file: appending under an expected revision, reading in order of revision, and the
//! derived index.
//!
//! **Invariants.** The newest stretch of the index is in memory
//! ([`StreamCache`](crate::log::streams::StreamCache)). A bulk write puts that stretch into chunks,
//! in the same commit that moves `derived_through`. So a reader that knows `derived_through` as of
//! a commit finds every revision. Below `derived_through` the revision is in a chunk of that
//! commit. From there on it is in memory, or in the log itself where memory has moved on.

pub(crate) mod ids;

use std::ops::Range;

use redb::ReadableTable;

use crate::error::{Error, ExpectedRevision, Result};
use crate::event::{Destination, Event, RecordedEvent};
use crate::limits::{NUMBER_MAX, SNAPSHOT_BYTES_MAX};
use crate::log::record::{self, RecordId};
use crate::log::streams::{Run, SnapshotRow, StreamState};
use crate::storage::errors::damaged_row;
use crate::storage::tables::ids::content_of;
use crate::storage::tables::schema::{CHUNKS, SNAPSHOTS, STREAMS};
use crate::storage::tables::stream::stream_row;
use crate::store::read::stream::{StreamReader, StreamSource, View, check_name, find_chunk};
use crate::store::transaction::Transaction;
use crate::store::transaction::gathered::Amount;
use crate::store::transaction::stream_index::joined;
use crate::upcast::Upcasts;

/// The place where events were appended to a stream.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, ExpectedRevision};
/// let append = || store.write(|tx| {
///     let events = [Event::bytes("opened", "").id("open-7").unpublished()];
///     tx.stream("account-7").append(events, ExpectedRevision::NoStream)
/// });
/// let first = append()?.into_value();
/// assert_eq!((first.revisions, first.seqs, first.repeated), (0..1, vec![0], false));
/// let again = append()?.into_value(); // a retry whose answer had been lost
/// assert_eq!((again.revisions, again.seqs, again.repeated), (0..1, vec![0], true));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamAppended {
    /// The revisions of the events.
    pub revisions: Range<u64>,
    /// The sequence numbers of the events in the log.
    pub seqs: Vec<u64>,
    /// The events were there already, and nothing was written.
    pub repeated: bool,
}

// --- the derived tables ---

// --- appending ---

/// A stream within a write transaction. See [`Transaction::stream`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, EventStream, ExpectedRevision};
/// let tx = store.begin()?;
/// let account: EventStream<'_> = tx.stream("account-7");
/// account.append([Event::bytes("opened", "").unpublished()], ExpectedRevision::NoStream)?;
/// assert_eq!(account.read()?.revision(), Some(0)); // the transaction sees its own events
/// tx.commit()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EventStream<'a> {
    pub(in crate::store) tx: &'a Transaction,
    pub(in crate::store) name: String,
}

impl Transaction {
    /// Returns the stream of this name. A stream begins with its first event. The part of the name
    /// before the first `-` is the stream's category.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| {
    ///     // Several streams in one transaction: all or nothing.
    ///     tx.stream("account-1").append([Event::bytes("withdrawn", "5").unpublished()], ExpectedRevision::Any)?;
    ///     tx.stream("account-2").append([Event::bytes("deposited", "5").unpublished()], ExpectedRevision::Any)
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stream(&self, name: impl Into<String>) -> EventStream<'_> {
        EventStream { tx: self, name: name.into() }
    }

    fn stream_state(&self, name: &[u8]) -> Result<StreamState> {
        if let Some(stream) = self.pending.borrow().streams.get(name) {
            return Ok(stream.state);
        }
        if let Some(state) = self.core.tail().streams.states.get(name) {
            return Ok(state);
        }
        let state =
            self.engine(|| Ok(stream_row(&self.redb().open_table(STREAMS)?, name)?.unwrap_or_default()))?;
        self.core.tail().streams.states.cache(name.into(), state);
        Ok(state)
    }

    fn view(&self, name: &str) -> Result<View> {
        let state = self.stream_state(name.as_bytes())?;
        let tail = self.core.tail();
        let pending = self.pending.borrow();
        let own = pending.streams.get(name.as_bytes()).map(|stream| &stream.run);
        let recent = joined(tail.streams.recent.get(name.as_bytes()), own);
        Ok(View { name: name.to_owned(), state, recent })
    }
}

impl StreamSource for Transaction {
    fn chunk(&self, name: &[u8], revision: u64) -> Result<Option<Run>> {
        self.engine(|| find_chunk(&self.redb().open_table(CHUNKS)?, name, revision))
    }

    fn snapshot_row(&self, name: &[u8]) -> Result<Option<Vec<u8>>> {
        self.engine(|| {
            let snapshots = self.redb().open_table(SNAPSHOTS)?;
            let row = snapshots.get(name)?;
            Ok(row.map(|row| row.value().to_vec()))
        })
    }

    fn record(&self, seq: u64) -> Result<Option<RecordedEvent>> {
        self.recorded(seq)
    }

    fn upcasts(&self) -> &Upcasts {
        &self.core.settings.upcasts
    }

    fn owned(&self) -> Result<()> {
        Self::owned(self)
    }
}

impl<'a> EventStream<'a> {
    /// Appends events, with contiguous revisions, if the stream is as expected.
    ///
    /// The call is safe to retry for events whose ids the application gave. If these very events
    /// are in the stream already, in a row and not truncated, nothing is written. The call then
    /// returns their first positions, under every expectation. Where `expected` names their place,
    /// the store knows the events for as long as they are there. Elsewhere the store knows them
    /// while it remembers the first id: for the store's inbox age.
    ///
    /// An event without a destination goes where
    /// [`StoreBuilder::stream_destination`](crate::StoreBuilder::stream_destination) says,
    /// otherwise nowhere. An event without a key gets the stream's name as its key, so that a
    /// stream is published in order.
    ///
    /// The iterator runs to its end before the call looks at the stream. Events that the iterator
    /// itself appends, to this stream too, come before the call's own events. The call compares
    /// `expected` with the stream as it is then.
    ///
    /// # Errors
    /// - [`Error::WrongRevision`], with the expected and the actual revision.
    /// - [`Error::StreamDeleted`].
    /// - [`Error::BadId`] for a name of 0 or over 255 bytes.
    /// - [`Error::Conflict`] if other content has an id.
    /// - [`Error::IdElsewhere`] if the same content has an id, but not all of these events are in
    ///   this stream in a row.
    /// - The errors of [`Transaction::append`].
    ///
    /// An error may leave the first of several events appended: let the closure fail with that
    /// error.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, ExpectedRevision};
    /// let appended = store.write(|tx| {
    ///     let events = ["100", "20"].map(|text| Event::bytes("deposited", text).to("accounts", "deposited"));
    ///     tx.stream("account-7").append(events, ExpectedRevision::NoStream)
    /// })?;
    /// assert_eq!(appended.value().revisions, 0..2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn append(
        &self,
        events: impl IntoIterator<Item = Event>,
        expected: ExpectedRevision,
    ) -> Result<StreamAppended> {
        let name = &self.name;
        // The application's code runs first: the iterator, the rule and the clock may append to
        // this very stream. After these two lines no such code runs, so each check still holds when
        // its result is used.
        let events = self.taken(events)?;
        let now = self.tx.core.settings.clock.now();
        let state = self.state()?;
        if state.deleted {
            return Err(Error::StreamDeleted { stream: name.clone() });
        }
        let actual = state.next.checked_sub(1);
        if !expected.holds(actual) {
            // A retry is recognised under every expectation.
            if let Some(repeated) = self.repeated(&events, expected)? {
                return Ok(repeated);
            }
            return Err(Error::WrongRevision { stream: name.clone(), expected, actual });
        }
        if state.next > NUMBER_MAX {
            return Err(damaged_row("stream"));
        }
        let (mut seqs, first) = (Vec::with_capacity(events.len()), state.next);
        for (event, revision) in events.iter().zip(first..) {
            let appended = self.tx.append_at(event, Some(revision), now)?;
            if appended.repeated {
                self.tx.forget_newest_seq();
                // Nothing is appended yet: all of the events may be there already.
                if seqs.is_empty()
                    && let Some(repeated) = self.repeated(&events, expected)?
                {
                    return Ok(repeated);
                }
                return Err(self.tx.elsewhere(event.id.as_deref().unwrap_or_default(), appended.seq));
            }
            seqs.push(appended.seq);
            self.tx.pending.borrow_mut().note_revision(name.as_bytes(), state, appended.seq);
        }
        Ok(StreamAppended { revisions: first..first + seqs.len() as u64, seqs, repeated: false })
    }

    /// Collects the iterator's events as they will be recorded. Fails once there are more than a
    /// transaction may append. The call counts the events: an iterator may be wrong about its
    /// length, or never end.
    fn taken(&self, events: impl IntoIterator<Item = Event>) -> Result<Vec<Event>> {
        let (mut taken, mut bytes) = (Vec::new(), 0_u64);
        for event in events {
            bytes = bytes.saturating_add(event.content_bytes());
            let events = taken.len() as u64 + 1;
            self.tx.foresee(Amount { events, entries: 0, bytes })?;
            taken.push(self.prepared(event));
        }
        Ok(taken)
    }

    /// The event as it will be recorded.
    fn prepared(&self, mut event: Event) -> Event {
        if event.destination.is_none() {
            let rule = self.tx.core.settings.stream_destination.as_ref();
            let by_rule = rule.and_then(|rule| rule.of(&self.name, &event.event_type));
            event.destination = Some(by_rule.unwrap_or(Destination::Unpublished));
        }
        event.key.get_or_insert_with(|| self.name.clone().into());
        event.stream = Some(self.name.clone());
        event
    }

    /// Returns the stream as this transaction sees it, its own events included.
    ///
    /// # Errors
    /// Returns [`Error::BadId`] for a name that is not valid, or an error of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let tx = store.begin()?;
    /// assert_eq!(tx.stream("account-7").read()?.events(0).count(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read(&self) -> Result<StreamReader<'a>> {
        check_name(&self.name)?;
        self.tx.owned()?;
        Ok(StreamReader { source: self.tx, view: self.tx.view(&self.name)? })
    }

    /// Saves a snapshot of the stream as of its newest event, in place of any earlier snapshot. The
    /// snapshot commits with this transaction.
    ///
    /// # Errors
    /// - [`Error::StreamDeleted`].
    /// - [`Error::SnapshotTooLarge`] for more than
    ///   [`SNAPSHOT_BYTES_MAX`](crate::limits::SNAPSHOT_BYTES_MAX).
    /// - [`Error::WrongRevision`] for a stream without an event: there is nothing to sum up.
    /// - [`Error::Corrupt`] or [`Error::MissingRevision`] if the newest event cannot be read, since
    ///   a snapshot names that event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let nothing = store.write(|tx| tx.stream("account-7").save_snapshot(1, b"0"));
    /// assert!(nothing.is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_snapshot(&self, version: u32, bytes: &[u8]) -> Result<()> {
        let state = self.state()?;
        if state.deleted {
            return Err(Error::StreamDeleted { stream: self.name.clone() });
        }
        if bytes.len() > SNAPSHOT_BYTES_MAX {
            let (stream, len) = (self.name.clone(), bytes.len());
            return Err(Error::SnapshotTooLarge { stream, len, max: SNAPSHOT_BYTES_MAX });
        }
        let Some(revision) = state.next.checked_sub(1) else {
            let (stream, expected) = (self.name.clone(), ExpectedRevision::StreamExists);
            return Err(Error::WrongRevision { stream, expected, actual: None });
        };
        // Below the first readable revision there is no event any more, and none is needed.
        let of = match revision >= state.first {
            true => Some(self.tx.view(&self.name)?.name_of(self.tx, revision)?),
            false => None,
        };
        let row = SnapshotRow { version, revision, of, bytes: bytes.to_vec() }.to_bytes(self.name.as_bytes());
        self.tx.touch();
        self.tx.engine(|| {
            self.tx.redb().open_table(SNAPSHOTS)?.insert(self.name.as_bytes(), row.as_slice())?;
            Ok(())
        })
    }

    /// Forgets the events before this revision. The stream keeps its revision. A revision beyond
    /// the newest event forgets all events.
    ///
    /// The records leave the log when trimming passes them. Trimming waits for every relay and for
    /// retention; in a store without a relay the records stay. Events that trimming has passed
    /// already are gone for every reader once this transaction commits. This transaction removes
    /// the first 512 records. Later transactions remove the others, also after a crash: see
    /// [`Stats::cleanup_events`](crate::Stats::cleanup_events).
    ///
    /// # Errors
    /// Returns [`Error::StreamDeleted`], [`Error::BadId`] or an error of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, ExpectedRevision};
    /// # store.write(|tx| {
    /// #     let events = ["1", "2", "3"].map(|text| Event::bytes("deposited", text).unpublished());
    /// #     tx.stream("account-7").append(events, ExpectedRevision::Any)
    /// # })?;
    /// store.write(|tx| tx.stream("account-7").truncate_before(2))?;
    /// let snapshot = store.read()?;
    /// let account = snapshot.stream("account-7")?;
    /// assert_eq!((account.revision(), account.events(0).count()), (Some(2), 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn truncate_before(&self, revision: u64) -> Result<()> {
        let state = self.state()?;
        if state.deleted {
            return Err(Error::StreamDeleted { stream: self.name.clone() });
        }
        let first = revision.min(state.next).max(state.first);
        self.forget(StreamState { first, ..state })
    }

    /// Deletes the stream for good. Its events are forgotten, and no event can be appended any
    /// more. The stream's name and revision stay known. The cost is that of
    /// [`truncate_before`](Self::truncate_before): bounded, however many events there are. A second
    /// call does nothing.
    ///
    /// # Errors
    /// Returns [`Error::BadId`] or an error of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Error, Event, ExpectedRevision};
    /// store.write(|tx| tx.stream("account-7").tombstone())?;
    /// let late = store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("deposited", "1").unpublished()], ExpectedRevision::Any)
    /// });
    /// assert!(matches!(late, Err(Error::StreamDeleted { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn tombstone(&self) -> Result<()> {
        let state = self.state()?;
        if state.deleted {
            return Ok(());
        }
        self.forget(StreamState { first: state.next, deleted: true, ..state })
    }

    fn state(&self) -> Result<StreamState> {
        check_name(&self.name)?;
        self.tx.owned()?;
        self.tx.stream_state(self.name.as_bytes())
    }

    /// Writes a state that wants fewer events, and releases the events that the state no longer
    /// wants.
    fn forget(&self, state: StreamState) -> Result<()> {
        self.tx.engine(|| self.forget_in(state))
    }

    fn forget_in(&self, state: StreamState) -> Result<()> {
        let (tx, name) = (self.tx, self.name.as_bytes());
        let before = self.state()?;
        tx.admit(Amount::entry(name.len()))?;
        tx.touch();
        tx.pending.borrow_mut().note_state(name, state);
        tx.redb().open_table(STREAMS)?.insert(name, &state.to_bytes()[..])?;
        if state.deleted {
            tx.redb().open_table(SNAPSHOTS)?.remove(name)?;
        }
        // Events that no chunk leads to yet have not been trimmed: trimming takes them, and the
        // next bulk write leaves them out.
        let gone = before.readable().start..state.first;
        if gone.is_empty() { Ok(()) } else { tx.leave_revisions(name, gone) }
    }
}

/// The content of an event, apart from its position.
pub(in crate::store) fn body_of(event: &Event) -> (u32, u64) {
    content_of(&record::encode_body(event, RecordId::Text(event.id.as_deref().unwrap_or_default())))
}
