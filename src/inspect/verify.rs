//! Looking at everything that is in the file, and reporting what does not fit.

use std::fmt;

use redb::ReadableTable;

use crate::delivery::types::ExceptionState;
use crate::error::{CorruptError, Result};
use crate::event::RecordedEvent;
use crate::log::streams::{NO_SEQ, Run, SnapshotRow};
use crate::log::{keys, record};
use crate::printable::printable;
use crate::storage::errors::{damaged_row, unless_it_panics};
use crate::storage::tables::exception::ExceptionRow;
use crate::storage::tables::schema::{CHUNKS, EXCEPTIONS, LOG, SNAPSHOTS, STREAMS};
use crate::storage::tables::stream::stream_row;
use crate::store::Store;
use crate::store::read::snapshot::Snapshot;
use crate::store::read::state::read_state;
use crate::store::read::stream::find_chunk;
use crate::store::shared::core::Core;
use crate::tuning::FINDINGS_MAX;

/// Something in the file that does not fit.
///
/// ```
/// use onewrite::Finding;
/// let finding = Finding::StreamIndex { stream: "account-7".into(), revision: 3, seq: 12 };
/// assert_eq!(finding.to_string(), "the index of stream `account-7` and event 12 disagree about revision 3");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A record of the log is damaged or missing.
    Record(CorruptError),
    /// The index of streams does not lead to this event, or leads to another.
    StreamIndex {
        /// The stream.
        stream: String,
        /// The revision.
        revision: u64,
        /// The event.
        seq: u64,
    },
    /// A stream's snapshot is damaged, or the event that it includes last is not there as it was. It is not used.
    Snapshot {
        /// The stream.
        stream: String,
        /// The revision of that event; `None` where the snapshot itself is damaged.
        revision: Option<u64>,
    },
    /// An event waits or is quarantined, and its record is gone.
    Exception {
        /// The event.
        seq: u64,
    },
    /// A page of the file is not as it was written. Only [`Store::verify_pages`] looks at pages.
    Page {
        /// The table that the page is of; `None` of the table of all tables.
        table: Option<String>,
        /// Where the page begins in the file, in bytes.
        offset: u64,
        /// Its length, in bytes.
        bytes: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(error) => error.fmt(f),
            Self::StreamIndex { stream, revision, seq } => {
                write!(f, "the index of stream `{stream}` and event {seq} disagree about revision {revision}")
            }
            Self::Snapshot { stream, revision: None } => {
                write!(f, "the snapshot of stream `{}` is damaged", printable(stream))
            }
            Self::Snapshot { stream, revision: Some(revision) } => write!(
                f,
                "the snapshot of stream `{}` is of an event at revision {revision} that is not there",
                printable(stream)
            ),
            Self::Exception { seq } => {
                write!(f, "event {seq} waits or is quarantined, and its record is gone")
            }
            Self::Page { table, offset, bytes, what } => {
                let table = table.as_deref().map(|table| format!(", of table `{table}`")).unwrap_or_default();
                write!(f, "the page of {bytes} bytes at {offset}{table} is damaged: {what}")
            }
        }
    }
}

/// What [`Store::verify`] has looked at, and what it has found: the log and what leads to it, and nothing of the application's tables.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let verified: onewrite::Verification = store.verify()?;
/// assert_eq!((verified.records, verified.findings_total), (0, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Verification {
    /// Records of the log whose checksums are right.
    pub records: u64,
    /// Those among them that are of a stream.
    pub stream_events: u64,
    /// What does not fit: the first 1,000.
    pub findings: Vec<Finding>,
    /// How many there were.
    pub findings_total: u64,
}

impl Verification {
    /// Whether everything fits that was looked at. Rows of the application's tables were not: [`Store::verify_pages`] looks at them.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert!(store.verify()?.is_whole());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.findings_total == 0
    }

    pub(crate) fn found(&mut self, finding: Finding) {
        self.findings_total += 1;
        // A log of a million damaged records is reported in the result, not in a million lines.
        if self.findings.len() < FINDINGS_MAX {
            tracing::error!(%finding, "verification");
            self.findings.push(finding);
        }
    }
}

impl Store {
    /// Reads the whole log and checks it: the checksum and place of every record, the index of streams against the events
    /// that it leads to, and that what waits or is quarantined has its record. Writers go on meanwhile.
    ///
    /// **Not covered** are rows of the application's tables, of the inbox, of relays and of projections, and pages that no record
    /// stands on: a byte that changed there is not found. [`verify_pages`](Self::verify_pages) checks every page.
    ///
    /// Cost: every record is read, in one read transaction: the file cannot reuse pages for as long. Pages come from the cache where
    /// they are in it.
    ///
    /// # Errors
    /// What redb says; that it panicked, on a page that is damaged in a way it does not look for. What does not fit is no error but a
    /// [`Finding`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Event, ExpectedRevision};
    /// store.write(|tx| tx.stream("account-7").append([Event::bytes("opened", "")], ExpectedRevision::NoStream))?;
    /// let verified = store.verify()?;
    /// assert!(verified.is_whole());
    /// assert_eq!((verified.records, verified.stream_events), (1, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify(&self) -> Result<Verification> {
        unless_it_panics(|| self.look_at_everything())
    }

    fn look_at_everything(&self) -> Result<Verification> {
        self.core().owner.check()?;
        // Before the snapshot: what is known to be in the log then is in it.
        let end = self.core().tail().next_seq;
        let snapshot = self.read()?;
        let derived_through = read_state(snapshot.tx())?.derived_through;
        let mut verified = Verification::default();
        let mut indexed = 0;
        for read in snapshot.recorded_to(end)? {
            let recorded = match read {
                Ok(recorded) => recorded,
                Err(crate::error::Error::Corrupt(error)) => {
                    verified.found(Finding::Record(error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            verified.records += 1;
            let (Some(stream), Some(revision)) = (recorded.stream(), recorded.revision()) else { continue };
            verified.stream_events += 1;
            let seq = recorded.seq();
            let leads_to = match seq < derived_through {
                true => written_index(&snapshot, &recorded, revision, &mut indexed)?,
                false => recent_index(self.core(), derived_through, &recorded, revision),
            };
            if leads_to.is_some_and(|leads_to| leads_to != seq) {
                verified.found(Finding::StreamIndex { stream: stream.to_owned(), revision, seq });
            }
        }
        check_chunks(&snapshot, indexed, &mut verified)?;
        verify_stream_snapshots(&snapshot, &mut verified)?;
        check_exceptions(&snapshot, &mut verified)?;
        Ok(verified)
    }
}

/// Where the chunks say that a revision stands; `None` where its stream does not want it any more.
fn written_index(
    snapshot: &Snapshot,
    recorded: &RecordedEvent,
    revision: u64,
    indexed: &mut u64,
) -> Result<Option<u64>> {
    let name = recorded.stream().unwrap_or_default().as_bytes();
    let state = stream_row(&snapshot.tx().open_table(STREAMS)?, name)?.unwrap_or_default();
    if !state.wants(revision) {
        return Ok(None);
    }
    let chunk = find_chunk(&snapshot.tx().open_table(CHUNKS)?, name, revision)?;
    let leads_to = chunk.and_then(|run| run.get(revision));
    *indexed += u64::from(leads_to == Some(recorded.seq()));
    Ok(Some(leads_to.unwrap_or(NO_SEQ)))
}

/// Where memory says that a revision stands; `None` where it has moved on since the snapshot.
fn recent_index(core: &Core, derived_through: u64, recorded: &RecordedEvent, revision: u64) -> Option<u64> {
    let tail = core.tail();
    if tail.derived_through != derived_through {
        return None;
    }
    let name = recorded.stream().unwrap_or_default().as_bytes();
    let wanted = tail.streams.states.get(name).is_none_or(|state| state.wants(revision));
    let run = tail.streams.recent.get(name);
    wanted.then(|| run.and_then(|run| run.get(revision)).unwrap_or(NO_SEQ))
}

/// Every entry of a chunk leads to an event. `indexed` of them were met from the event's side.
fn check_chunks(snapshot: &Snapshot, indexed: u64, verified: &mut Verification) -> Result<()> {
    let mut entries = 0;
    each_run(snapshot, |_, run| {
        entries += run.seqs.iter().filter(|seq| **seq != NO_SEQ).count() as u64;
        Ok(())
    })?;
    if entries == indexed {
        return Ok(());
    }
    // Only now does it pay to look at each.
    let log = snapshot.tx().open_table(LOG)?;
    each_run(snapshot, |name, run| {
        for (seq, revision) in run.seqs.iter().copied().zip(run.first..).filter(|(seq, _)| *seq != NO_SEQ) {
            let recorded = log.get(seq)?.and_then(|frame| record::decode(seq, frame.value()).ok());
            let fits = recorded.is_some_and(|recorded| {
                recorded.revision() == Some(revision) && recorded.stream().map(str::as_bytes) == Some(name)
            });
            if !fits {
                let stream = String::from_utf8_lossy(name).into_owned();
                verified.found(Finding::StreamIndex { stream, revision, seq });
            }
        }
        Ok(())
    })
}

/// Each chunk, as far as its stream wants it.
fn each_run(snapshot: &Snapshot, mut look: impl FnMut(&[u8], Run) -> Result<()>) -> Result<()> {
    let streams = snapshot.tx().open_table(STREAMS)?;
    for row in snapshot.tx().open_table(CHUNKS)?.iter()? {
        let (key, value) = row?;
        let (name, first) = keys::split_chunk(key.value()).ok_or_else(|| damaged_row("chunk"))?;
        let run = Run::from_bytes(first, value.value()).ok_or_else(|| damaged_row("chunk"))?;
        let state = stream_row(&streams, name)?.unwrap_or_default();
        look(name, run.from(state.first))?;
    }
    Ok(())
}

fn check_exceptions(snapshot: &Snapshot, verified: &mut Verification) -> Result<()> {
    let log = snapshot.tx().open_table(LOG)?;
    for row in snapshot.tx().open_table(EXCEPTIONS)?.iter()? {
        let (at, row) = row?;
        let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
        let discarded = ExceptionRow::from_bytes(row.value())?.exception.state == ExceptionState::Discarded;
        if !discarded && log.get(seq)?.is_none() {
            verified.found(Finding::Exception { seq });
        }
    }
    Ok(())
}

/// Every snapshot includes the event that it names.
fn verify_stream_snapshots(snapshot: &Snapshot, verified: &mut Verification) -> Result<()> {
    for row in snapshot.tx().open_table(SNAPSHOTS)?.iter()? {
        let (name, row) = row?;
        let stream = String::from_utf8_lossy(name.value()).into_owned();
        match SnapshotRow::from_bytes(name.value(), row.value()) {
            None => verified.found(Finding::Snapshot { stream, revision: None }),
            Some(row) => {
                let reader = snapshot.stream(&*stream)?;
                if !reader.view.has_event_of(snapshot, &row)? {
                    verified.found(Finding::Snapshot { stream, revision: Some(row.revision) });
                }
            }
        }
    }
    Ok(())
}
