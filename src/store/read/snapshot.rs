//! Snapshots: state and log together, as of one commit.

use std::any::Any;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, Weak};

use redb::{AccessGuard, Key, ReadOnlyMultimapTable, ReadOnlyTable, ReadTransaction, TableDefinition, Value};

use crate::error::{CorruptError, Error, Result};
use crate::event::RecordedEvent;
use crate::filter::EventFilter;
use crate::log::record;
use crate::log::streams::{Gaps, NO_SEQ, Run, StreamState};
use crate::log::view::view;
use crate::process::keep;
use crate::storage::errors::{engine_panicked, unless_it_panics};
use crate::storage::tables::schema::{CHUNKS, LOG, SNAPSHOTS, STREAMS};
use crate::storage::tables::stream::stream_row;
use crate::store::read::hidden::Hidden;
use crate::store::read::state::{plausible, read_state};
use crate::store::read::stream::{EVENTS_PER_LOOK, StreamReader, StreamSource, View, check_name, find_chunk};
use crate::store::read::wanted::{Looked, Wanted};
use crate::store::shared::core::Core;
use crate::store::shared::holders::Taken;
use crate::store::shared::owner::{Kept, Owner};
use crate::upcast::Upcasts;

/// The state and the log as of the last commit. Later commits do not show in it.
///
/// A snapshot held for long keeps redb from reusing pages, and the file grows: take one per task.
/// An iterator over its events, and a table opened from it, hold the pages too.
/// [`Stats::snapshots`](crate::Stats::snapshots) counts living snapshots and iterators, not tables.
///
/// ```
/// use onewrite::{Event, Store};
/// # let folder = tempfile::tempdir()?;
/// # let store = Store::open(folder.path().join("a.redb"))?;
/// store.write(|tx| tx.append(Event::bytes("tick", b"1".to_vec()).to("", "ticks")))?;
/// let snapshot = store.read()?;
/// let events: Vec<_> = snapshot.events(0)?.collect::<onewrite::Result<_>>()?;
/// assert_eq!(events[0].event_type(), "tick");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Snapshot {
    tx: Kept<ReadTransaction>,
    /// The core keeps the newest stretch of the stream index, until the next bulk write.
    core: Weak<Core>,
    upcasts: Arc<Upcasts>,
    /// Each reader that outlives the snapshot holds a clone; `None` in tests without a store.
    taken: Option<Arc<Taken>>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Snapshot")
    }
}

impl Snapshot {
    #[track_caller]
    pub(crate) fn new(tx: ReadTransaction, core: &Arc<Core>) -> Self {
        let mono_ms = core.settings.clock.now().mono_ms;
        Self {
            tx: Kept::new(tx, &core.owner),
            core: Arc::downgrade(core),
            upcasts: Arc::clone(&core.settings.upcasts),
            taken: Some(core.holders.take(mono_ms, Location::caller())),
        }
    }

    /// Opens one of the application's tables.
    ///
    /// # Errors
    /// An error of redb: no such table, or another type under this name.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::redb::TableDefinition;
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// store.write(|tx| {
    ///     tx.open_table(ACCOUNTS)?.insert("alice", 100)?;
    ///     Ok(())
    /// })?;
    /// let accounts = store.read()?.open_table(ACCOUNTS)?;
    /// assert_eq!(accounts.get("alice")?.map(|row| row.value()), Some(100));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_table<K: Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<'_, K, V>,
    ) -> Result<ReadOnlyTable<K, V>> {
        self.owned()?;
        unless_it_panics(|| Ok(self.tx.open_table(definition)?))
    }

    /// Opens one of the application's multimap tables.
    ///
    /// # Errors
    /// As [`open_table`](Self::open_table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::redb::MultimapTableDefinition;
    /// const OWNERS: MultimapTableDefinition<&str, u64> = MultimapTableDefinition::new("owners");
    /// store.write(|tx| Ok(tx.open_multimap_table(OWNERS)?.insert("alice", 1)?))?;
    /// assert_eq!(store.read()?.open_multimap_table(OWNERS)?.get("alice")?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_multimap_table<K: Key + 'static, V: Key + 'static>(
        &self,
        definition: redb::MultimapTableDefinition<'_, K, V>,
    ) -> Result<ReadOnlyMultimapTable<K, V>> {
        self.owned()?;
        unless_it_panics(|| Ok(self.tx.open_multimap_table(definition)?))
    }

    /// The event at this sequence number; `None` if there is none (any more).
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) if its record fails its check.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// let snapshot = store.read()?;
    /// assert_eq!(snapshot.event(0)?.expect("appended above").event_type(), "paid");
    /// assert!(snapshot.event(1)?.is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn event(&self, seq: u64) -> Result<Option<RecordedEvent>> {
        self.owned()?;
        unless_it_panics(|| self.recorded(seq))?.map(|recorded| self.upcasts.upcast(recorded)).transpose()
    }

    /// The event as recorded, in any version.
    fn recorded(&self, seq: u64) -> Result<Option<RecordedEvent>> {
        let log = self.tx.open_table(LOG)?;
        match redb::ReadableTable::get(&log, seq)? {
            Some(frame) => Ok(Some(record::decode(seq, frame.value())?)),
            None => Ok(None),
        }
    }

    /// The stream of this name as of this snapshot; a stream without events is empty.
    ///
    /// Cost: memory holds the newest stretch of the stream index while the snapshot is young. After
    /// a bulk write of the index (every 4,096 events) each call reads that stretch from the log.
    ///
    /// # Errors
    /// [`Error::BadId`](crate::Error::BadId) for a name of 0 or over 255 bytes; redb's errors.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("opened", "").unpublished()], ExpectedRevision::NoStream)
    /// })?;
    /// let snapshot = store.read()?;
    /// for event in snapshot.stream("account-7")?.events(0) {
    ///     assert_eq!(event?.event_type(), "opened");
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stream(&self, name: impl Into<String>) -> Result<StreamReader<'_>> {
        let name = name.into();
        check_name(&name)?;
        self.owned()?;
        unless_it_panics(|| Ok(StreamReader { source: self, view: self.view(name)? }))
    }

    fn view(&self, name: String) -> Result<View> {
        let mut state = stream_row(&self.tx.open_table(STREAMS)?, name.as_bytes())?.unwrap_or_default();
        let recent = self.recent(&name, state)?;
        if !recent.seqs.is_empty() {
            state.next = recent.first.saturating_add(recent.seqs.len() as u64);
        }
        Ok(View { name, state, recent })
    }

    /// The part of the stream that no chunk of this snapshot holds.
    fn recent(&self, name: &str, state: StreamState) -> Result<Run> {
        let derived_through = read_state(&self.tx)?.derived_through;
        let log = self.tx.open_table(LOG)?;
        let end = redb::ReadableTable::last(&log)?.map_or(0, |(seq, _)| seq.value().saturating_add(1));
        if let Some(core) = self.core.upgrade() {
            let tail = core.tail();
            // Memory follows a commit a moment after the file: it may be older than this snapshot.
            if tail.derived_through == derived_through && tail.next_seq >= end {
                let mut run = tail.streams.recent.get(name.as_bytes()).cloned().unwrap_or_default();
                // Events of later commits are not in this snapshot. Gaps precede the event they
                // belong to.
                let later = run.seqs.iter().position(|seq| *seq >= end && *seq != NO_SEQ);
                run.seqs.truncate(later.unwrap_or(run.seqs.len()));
                return Ok(run);
            }
        }
        let (mut run, mut gaps) = (Run::default(), Gaps::from(derived_through));
        for row in log.range(derived_through..end)? {
            let (seq, frame) = row?;
            gaps.pass(seq.value());
            let recorded = record::decode(seq.value(), frame.value());
            let Ok(recorded) = recorded.and_then(|recorded| plausible(recorded, state)) else {
                gaps.damaged();
                continue;
            };
            if let Some(revision) = recorded.revision().filter(|_| recorded.stream() == Some(name)) {
                run.put_behind(revision, seq.value(), &mut gaps);
            }
        }
        Ok(run)
    }

    /// The events from `from` on, in order, one at a time. A damaged record comes as an error in
    /// its place; reading can go on after it.
    ///
    /// The range is of one moment and ends with the log of that moment. Trimmed events are left
    /// out, as the sequence numbers show. [`Store::subscribe`](crate::Store::subscribe) checks its
    /// first number.
    ///
    /// # Errors
    /// An error of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// store.write(|tx| {
    ///     tx.append(Event::bytes("opened", "1").unpublished())?;
    ///     tx.append(Event::bytes("paid", "2").unpublished())
    /// })?;
    /// for event in store.read()?.events(1)? {
    ///     assert_eq!(event?.event_type(), "paid");
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn events(&self, from: u64) -> Result<Events> {
        Ok(Events { frames: self.frames(from)?, upcasts: Arc::clone(&self.upcasts) })
    }

    /// The records from `from` on, unread.
    pub(in crate::store) fn frames(&self, from: u64) -> Result<Frames> {
        self.owned()?;
        unless_it_panics(|| self.frames_from(from))
    }

    fn frames_from(&self, from: u64) -> Result<Frames> {
        let trimmed_to = read_state(&self.tx)?.trimmed_to;
        let log = self.tx.open_table(LOG)?;
        let range = log.range::<u64>((Bound::Included(from), Bound::Unbounded))?;
        let rows = Rows { range, owner: self.tx.owner().clone() };
        let taken = self.taken.clone();
        let hidden = if from < trimmed_to { Hidden::of(&self.tx)? } else { None };
        let detour = hidden.map(Detour::Hidden);
        Ok(Frames { rows, next: from, trimmed_to, end: 0, detour, failed: false, _taken: taken })
    }

    /// Fails outside the process that opened the store.
    fn owned(&self) -> Result<()> {
        self.tx.owner().check()
    }

    pub(crate) fn tx(&self) -> &ReadTransaction {
        &self.tx
    }

    /// All records up to `end`, as recorded, in any version.
    pub(crate) fn recorded_to(&self, end: u64) -> Result<Events> {
        Ok(Events { upcasts: Arc::new(Upcasts::none()), frames: Frames { end, ..self.frames(0)? } })
    }

    /// As [`events`](Self::events), with missing records before `end` reported too.
    pub(crate) fn events_to(&self, from: u64, end: u64) -> Result<Events> {
        Ok(Events { upcasts: Arc::clone(&self.upcasts), frames: Frames { end, ..self.frames(from)? } })
    }
}

impl Snapshot {
    /// As [`events`](Self::events), only those that the filter takes. Every record is checked all
    /// the same; only events that the filter takes are decoded and upcast. [`stream`](Self::stream)
    /// reads one stream alone.
    ///
    /// # Errors
    /// [`Error::Setting`] for a filter that no event can ever pass; redb's errors.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, EventFilter};
    /// store.write(|tx| {
    ///     tx.append(Event::bytes("opened", "1").unpublished())?;
    ///     tx.append(Event::bytes("paid", "2").unpublished())
    /// })?;
    /// let paid: Vec<_> = store.read()?.events_of(0, &EventFilter::all().event_type("paid"))?.collect();
    /// assert_eq!(paid.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn events_of(
        &self,
        from: u64,
        filter: &EventFilter,
    ) -> Result<impl Iterator<Item = Result<RecordedEvent>> + use<>> {
        let wanted = Wanted::new(filter.clone(), &self.upcasts)?;
        let mut events = self.events(from)?;
        let looked = std::iter::from_fn(move || events.look(&wanted));
        Ok(looked.filter_map(|looked| looked.map(|looked| looked.event).transpose()))
    }
}

/// Events of a [`Snapshot`], in order.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # use onewrite::Event;
/// store.write(|tx| {
///     tx.append(Event::bytes("opened", "1").unpublished())?;
///     tx.append(Event::bytes("paid", "2").unpublished())
/// })?;
/// let mut events: onewrite::Events = store.read()?.events(0)?;
/// assert_eq!(events.next().transpose()?.map(|event| event.seq()), Some(0));
/// assert_eq!(events.count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Events {
    frames: Frames,
    upcasts: Arc<Upcasts>,
}

impl Events {
    /// Below this number, only events that streams keep are left.
    pub(crate) fn trimmed_to(&self) -> u64 {
        self.frames.trimmed_to
    }

    /// Looks at the next record; decodes and upcasts it if the reader wants it.
    pub(crate) fn look(&mut self, wanted: &Wanted) -> Option<Result<Looked>> {
        let decode = |seq, frame: &[u8]| {
            let takes = wanted.takes_all() || wanted.takes_record(&view(seq, frame)?, frame);
            let event = if takes { Some(record::decode(seq, frame)?) } else { None };
            Ok(Looked { seq, event })
        };
        let looked = self.frames.guarded(|frames| frames.next_as(decode, |_, looked| looked))?;
        let newest = |Looked { seq, event }| {
            let event = event.map(|event| self.upcasts.upcast(event)).transpose()?;
            Ok(Looked { seq, event: event.filter(|event| wanted.takes_event(event)) })
        };
        Some(looked.and_then(newest))
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

impl Iterator for Events {
    type Item = Result<RecordedEvent>;

    fn next(&mut self) -> Option<Self::Item> {
        let recorded = self
            .frames
            .guarded(|frames| frames.next_as(|seq, frame| Ok(record::decode(seq, frame)?), |_, it| it));
        recorded.map(|recorded| recorded.and_then(|recorded| self.upcasts.upcast(recorded)))
    }
}

/// A record's bytes in their page.
pub(in crate::store) type Frame = AccessGuard<'static, &'static [u8]>;

/// A row of redb's range.
type Row = Result<(AccessGuard<'static, u64>, Frame), redb::StorageError>;

/// The rows of the log. A forked process does not drop the storage engine's part of them.
struct Rows {
    range: redb::Range<'static, u64, &'static [u8]>,
    owner: Owner,
}

impl Drop for Rows {
    fn drop(&mut self) {
        if self.owner.is_elsewhere() {
            keep(&self.range);
        }
    }
}

/// The reason why the next record needs a second look.
enum Detour {
    /// This record follows records that were reported as missing.
    BehindGap(u64, Frame),
    /// Records below the trimmed edge may be hidden.
    Hidden(Hidden),
}

/// The records of the log, unread. Missing records are reported.
pub(in crate::store) struct Frames {
    rows: Rows,
    /// No record below this number may come any more.
    next: u64,
    /// From this number on, every record must be there.
    trimmed_to: u64,
    /// Every record below this number must have been there.
    end: u64,
    /// The second look that is due before the next record is read directly.
    detour: Option<Detour>,
    /// The failure to read the file was reported.
    failed: bool,
    /// The range holds the read transaction, even after the snapshot has ended.
    _taken: Option<Arc<Taken>>,
}

impl Frames {
    /// The next record: `read` reads it in place, then `make` gets the result and the bytes.
    ///
    /// The page's guard is moved after the read. A copy of a guard that was just written waits for
    /// the processor's stores, which costs a tenth of a replay.
    #[inline]
    pub(in crate::store) fn next_as<P, T>(
        &mut self,
        read: impl FnOnce(u64, &[u8]) -> Result<P>,
        make: impl FnOnce(Frame, P) -> T,
    ) -> Option<Result<T>> {
        if self.detour.is_some() {
            return self.next_by_detour(read, make);
        }
        if self.next.is_multiple_of(u64::from(EVENTS_PER_LOOK)) && self.rows.owner.is_elsewhere() {
            return self.forked();
        }
        let row = self.rows.range.next();
        self.next_of(row, read, make)
    }

    // This has two callers; out of line it copies the row, a tenth of a replay.
    #[inline(always)]
    fn next_of<P, T>(
        &mut self,
        row: Option<Row>,
        read: impl FnOnce(u64, &[u8]) -> Result<P>,
        make: impl FnOnce(Frame, P) -> T,
    ) -> Option<Result<T>> {
        let Some(Ok((seq, frame))) = &row else {
            return self.at_end(row);
        };
        let seq = seq.value();
        if seq < self.next || self.next.max(self.trimmed_to) < seq {
            return self.misplaced(seq, row);
        }
        self.next = seq.saturating_add(1);
        match (read(seq, frame.value()), row) {
            (Ok(parts), Some(Ok((_, frame)))) => Some(Ok(make(frame, parts))),
            (Err(error), _) => Some(Err(error)),
            (Ok(_), row) => self.at_end(row),
        }
    }

    /// Runs `read`, which must run none of the application's code. A panic of the storage engine is
    /// reported and ends the range: its position is unknown.
    #[inline]
    pub(in crate::store) fn guarded<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Option<Result<T>>,
    ) -> Option<Result<T>> {
        if self.failed {
            return None;
        }
        catch_unwind(AssertUnwindSafe(|| read(self)))
            .unwrap_or_else(|panic| Some(Err(self.panicked(&*panic))))
    }

    #[cold]
    fn forked<T>(&mut self) -> Option<Result<T>> {
        self.failed = true;
        Some(Err(self.rows.owner.refusal()))
    }

    /// Whether the end was reported as a failure.
    pub(in crate::store) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Notes a panic of the storage engine; nothing more comes.
    #[cold]
    pub(in crate::store) fn panicked(&mut self, panic: &(dyn Any + Send)) -> Error {
        self.failed = true;
        engine_panicked(panic)
    }

    #[cold]
    fn next_by_detour<P, T>(
        &mut self,
        read: impl FnOnce(u64, &[u8]) -> Result<P>,
        make: impl FnOnce(Frame, P) -> T,
    ) -> Option<Result<T>> {
        let hidden = match self.detour.take()? {
            Detour::BehindGap(seq, frame) => {
                return Some(read(seq, frame.value()).map(|parts| make(frame, parts)));
            }
            Detour::Hidden(hidden) => hidden,
        };
        if self.rows.owner.is_elsewhere() {
            return self.forked();
        }
        loop {
            let row = self.rows.range.next();
            if let Some(Ok((seq, frame))) = &row
                && seq.value() < self.trimmed_to
            {
                if hidden.hides(seq.value(), frame.value()) {
                    self.next = self.next.max(seq.value().saturating_add(1));
                    continue;
                }
                self.detour = Some(Detour::Hidden(hidden));
            }
            return self.next_of(row, read, make);
        }
    }

    /// Handles a missing or unreadable record. redb's range repeats its error for ever; this
    /// reports the error once.
    #[cold]
    fn at_end<T>(&mut self, row: Option<Row>) -> Option<Result<T>> {
        match row {
            _ if self.failed => None,
            Some(Err(error)) => {
                self.failed = true;
                Some(Err(error.into()))
            }
            _ => self.missing_at_end(),
        }
    }

    #[cold]
    fn misplaced<T>(&mut self, seq: u64, row: Option<Row>) -> Option<Result<T>> {
        let Some(Ok((_, frame))) = row else {
            return self.at_end(row);
        };
        // A damaged page can show intact records of another place.
        if seq < self.next {
            return Some(Err(CorruptError { seq, what: "it stands out of order" }.into()));
        }
        let expected = self.next.max(self.trimmed_to);
        self.next = seq.saturating_add(1);
        self.detour = Some(Detour::BehindGap(seq, frame));
        Some(Err(CorruptError { seq: expected, what: "it is missing" }.into()))
    }

    #[cold]
    fn missing_at_end<T>(&mut self) -> Option<Result<T>> {
        let expected = self.next.max(self.trimmed_to);
        self.next = self.next.max(self.end);
        let missing = CorruptError { seq: expected, what: "it is missing" };
        (expected < self.end).then_some(Err(missing.into()))
    }
}

impl StreamSource for Snapshot {
    fn chunk(&self, name: &[u8], revision: u64) -> Result<Option<Run>> {
        find_chunk(&self.tx.open_table(CHUNKS)?, name, revision)
    }

    fn snapshot_row(&self, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let snapshots = self.tx.open_table(SNAPSHOTS)?;
        let row = redb::ReadableTable::get(&snapshots, name)?;
        Ok(row.map(|row| row.value().to_vec()))
    }

    fn record(&self, seq: u64) -> Result<Option<RecordedEvent>> {
        self.recorded(seq)
    }

    fn upcasts(&self) -> &Upcasts {
        &self.upcasts
    }

    fn owned(&self) -> Result<()> {
        Self::owned(self)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use redb::backends::FileBackend;
    use redb::{BackendError, Database, ReadableDatabase, StorageBackend};

    use super::*;
    use crate::event::Event;
    use crate::store::Store;

    /// A file that can be read until its flag is set.
    #[derive(Debug)]
    struct Failing(FileBackend, Arc<AtomicBool>);

    impl StorageBackend for Failing {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            if self.1.load(Ordering::Relaxed) {
                return Err(io::Error::other("the disk is gone"));
            }
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.0.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write(offset, data)
        }

        fn close(&self) -> io::Result<()> {
            self.0.close()
        }

        fn try_lock_range(
            &self,
            start: Bound<u64>,
            end: Bound<u64>,
        ) -> std::result::Result<bool, BackendError> {
            self.0.try_lock_range(start, end)
        }
    }

    /// Goal: a file that cannot be read any more is reported once and ends every way of reading. A
    /// range of redb would repeat the error for ever. Method: a disk that goes after the third
    /// event, of 200 that do not fit into the cache.
    #[test]
    fn a_disk_that_goes_ends_the_log_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        store
            .write(|tx| {
                (0..200).try_for_each(|_| tx.append(Event::bytes("e", vec![7; 9000]).unpublished()).map(drop))
            })
            .unwrap();
        store.close().unwrap();
        type Report<'a> = &'a mut dyn FnMut(bool);
        let outcomes = |read: &dyn Fn(&Snapshot, Report<'_>)| {
            let gone = Arc::new(AtomicBool::new(false));
            let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
            let backend = Failing(FileBackend::new(file).unwrap(), Arc::clone(&gone));
            let db = Database::builder().set_cache_size(0).create_with_backend(backend).unwrap();
            let tx = db.begin_read().unwrap();
            let tx = Kept::new(tx, &Owner::of(std::path::Path::new("a.redb")));
            let snapshot = Snapshot { tx, core: Weak::new(), upcasts: Arc::default(), taken: None };
            let (mut well, mut badly) = (0, 0);
            read(&snapshot, &mut |is_ok| {
                if is_ok {
                    well += 1
                } else {
                    badly += 1
                }
                gone.store(well >= 3, Ordering::Relaxed);
                assert!(badly < 100, "reported for ever");
            });
            (well, badly)
        };
        let visited = outcomes(&|snapshot, report| {
            let end = snapshot.replay(0).unwrap().visit(|event| -> Result<()> {
                report(event.is_ok());
                Ok(())
            });
            end.unwrap();
        });
        let replayed =
            outcomes(&|snapshot, report| snapshot.replay(0).unwrap().for_each(|event| report(event.is_ok())));
        let copied =
            outcomes(&|snapshot, report| snapshot.events(0).unwrap().for_each(|event| report(event.is_ok())));
        assert_eq!((visited.1, replayed.1, copied.1), (1, 1, 1));
        assert!((3..200).contains(&visited.0), "{visited:?}");
    }
}
