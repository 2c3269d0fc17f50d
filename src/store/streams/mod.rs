//! Streams in the file: appending under an expected revision, reading in order of revision, and the derived index.
//!
//! **Invariants.** The newest stretch of the index is in memory ([`StreamCache`](crate::log::streams::StreamCache)); a bulk write puts it into chunks, in the
//! same commit that moves `derived_through`. So whoever knows `derived_through` as of a commit finds every revision:
//! below it in a chunk of that commit, from it on in memory, or, where memory has moved on, in the log itself.

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

/// Where events were appended to a stream.
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
    /// Their revisions.
    pub revisions: Range<u64>,
    /// Their sequence numbers in the log.
    pub seqs: Vec<u64>,
    /// They were there already, and nothing was written.
    pub repeated: bool,
}

// --- the derived tables -------------------------------------------------------------------------------------------

// --- appending ----------------------------------------------------------------------------------------------------

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
    /// The stream of this name; it begins with its first event. The part of the name before the first `-` is its
    /// category.
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
    /// Retry-safe for events whose ids the application gave: if these very events stand in the stream, in a row and not truncated,
    /// nothing is written and their first positions are returned, whatever is expected. Where `expected` names their place they
    /// are known for as long as they stand there, elsewhere while the first id is remembered: the store's inbox age. An event without a destination goes where
    /// [`StoreBuilder::stream_destination`](crate::StoreBuilder::stream_destination) says, else nowhere; its key, unless
    /// it has one, is the stream's name, so that a stream is published in order.
    ///
    /// The iterator runs to its end before anything is looked at. Whatever it appends itself, to this stream too, stands before
    /// its own events, and `expected` is compared with the stream as it is then.
    ///
    /// # Errors
    /// [`Error::WrongRevision`] with what was expected and what is; [`Error::StreamDeleted`]; [`Error::BadId`] for a
    /// name of 0 or over 255 bytes; [`Error::Conflict`] if an id is taken by other content, [`Error::IdElsewhere`] if it is taken by the
    /// same content, but not all of these events stand in this stream in a row; and those of [`Transaction::append`]. An error may
    /// leave the first of several events appended: let the closure fail with it.
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
        // The application's code first: the iterator, the rule and the clock may append to this very stream. Behind these
        // two lines none of it runs, so what is checked is still so when it is used.
        let events = self.taken(events)?;
        let now = self.tx.core.settings.clock.now();
        let state = self.state()?;
        if state.deleted {
            return Err(Error::StreamDeleted { stream: name.clone() });
        }
        let actual = state.next.checked_sub(1);
        if !expected.holds(actual) {
            // A retry is known under every expectation.
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
                // Nothing is appended yet: all of them may stand there.
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

    /// What the iterator gives, as it will be recorded; fails once there is more than a transaction may append. Its length is found
    /// out by counting: an iterator may be wrong about it, or never end.
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

    /// The stream as this transaction sees it, its own events included.
    ///
    /// # Errors
    /// [`Error::BadId`] for a name that cannot be; what redb says.
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

    /// Saves what the stream adds up to, as of its newest event, in place of any earlier snapshot. It commits with this
    /// transaction.
    ///
    /// # Errors
    /// [`Error::StreamDeleted`]; [`Error::SnapshotTooLarge`] for more than [`SNAPSHOT_BYTES_MAX`](crate::limits::SNAPSHOT_BYTES_MAX);
    /// [`Error::WrongRevision`] for a stream without an event: there is nothing to sum up. [`Error::Corrupt`] or
    /// [`Error::MissingRevision`] where the newest event cannot be read, since a snapshot names it.
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
        // Below the first that can be read there is no event any more, and none is needed.
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

    /// Forgets the events before this revision; the stream keeps its revision. Beyond the newest event it forgets all
    /// there are. Their records leave the log when trimming passes them, which waits for every relay and for retention;
    /// in a store without a relay they stay. What trimming has passed already is gone for every reader once this commits. The
    /// first 512 records are removed by this transaction, the others in later ones, also
    /// after a crash: [`Stats::cleanup_events`](crate::Stats::cleanup_events).
    ///
    /// # Errors
    /// [`Error::StreamDeleted`], [`Error::BadId`]; what redb says.
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

    /// Deletes the stream for good: its events are forgotten, and none can be appended any more. Its name and revision
    /// stay known. The cost is that of [`truncate_before`](Self::truncate_before): bounded, however many events there are.
    ///
    /// # Errors
    /// [`Error::BadId`]; what redb says. Deleting it again does nothing.
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

    /// Writes a state that wants fewer events, and lets go of what it no longer wants.
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
        // What no chunk leads to yet has not been trimmed: trimming takes it, and the next bulk write leaves it out.
        let gone = before.readable().start..state.first;
        if gone.is_empty() { Ok(()) } else { tx.leave_revisions(name, gone) }
    }
}

/// The content of an event apart from where it stands.
pub(in crate::store) fn body_of(event: &Event) -> (u32, u64) {
    content_of(&record::encode_body(event, RecordId::Text(event.id.as_deref().unwrap_or_default())))
}
