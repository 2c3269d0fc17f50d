//! The check of the file's content, which reports what does not fit.

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
    /// The index of streams does not lead to this event, or leads to another event.
    StreamIndex {
        /// The stream.
        stream: String,
        /// The revision.
        revision: u64,
        /// The event.
        seq: u64,
    },
    /// A stream's snapshot is damaged, or its last included event is missing or changed. The
    /// snapshot is not used.
    Snapshot {
        /// The stream.
        stream: String,
        /// The revision of that event; `None` if the snapshot itself is damaged.
        revision: Option<u64>,
    },
    /// An event waits or is quarantined, and its record is missing.
    Exception {
        /// The event.
        seq: u64,
    },
    /// A page of the file differs from what was written. Only [`Store::verify_pages`] checks pages.
    Page {
        /// The table of the page; `None` for the table of all tables.
        table: Option<String>,
        /// Where the page begins in the file, in bytes.
        offset: u64,
        /// The page's length, in bytes.
        bytes: u64,
        /// What is wrong with the page.
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

/// What [`Store::verify`] has checked and found. It covers the log and what leads to the log, and
/// nothing of the application's tables.
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
    /// Records of the log whose checksums are correct.
    pub records: u64,
    /// Correct records that are of a stream.
    pub stream_events: u64,
    /// The first 1,000 findings.
    pub findings: Vec<Finding>,
    /// The number of all findings.
    pub findings_total: u64,
}

impl Verification {
    /// Whether everything that was checked fits. Rows of the application's tables were not checked:
    /// [`Store::verify_pages`] checks them.
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
        // A log of a million damaged records must not write a million log lines. The result reports
        // the rest.
        if self.findings.len() < FINDINGS_MAX {
            tracing::error!(%finding, "verification");
            self.findings.push(finding);
        }
    }
}

impl Store {
    /// Reads the whole log and checks it, while writers go on.
    ///
    /// It checks the checksum and place of every record, and the index of streams against its
    /// events. It also checks that each event that waits or is quarantined has its record.
    ///
    /// **Not covered** are rows of the application's tables, of the inbox, of relays and of
    /// projections, and pages without a record. A changed byte there is not found.
    /// [`verify_pages`](Self::verify_pages) checks every page.
    ///
    /// Cost: one read transaction reads every record. The file cannot reuse pages for as long.
    /// Pages come from the cache where the cache has them.
    ///
    /// # Errors
    /// Errors of redb, also for a panic of redb on a page with damage that redb does not check for.
    /// What does not fit is no error but a [`Finding`].
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
        // Before the snapshot, so that every event below this number is in the snapshot.
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

/// Where the chunks say that a revision stands; `None` if its stream no longer wants the revision.
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

/// Where memory says that a revision stands; `None` if memory has moved on since the snapshot.
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

/// Checks that every entry of a chunk leads to an event. `indexed` entries were already met from
/// their events.
fn check_chunks(snapshot: &Snapshot, indexed: u64, verified: &mut Verification) -> Result<()> {
    let mut entries = 0;
    each_run(snapshot, |_, run| {
        entries += run.seqs.iter().filter(|seq| **seq != NO_SEQ).count() as u64;
        Ok(())
    })?;
    if entries == indexed {
        return Ok(());
    }
    // The counts differ, so each entry must be checked.
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

/// Visits each chunk, as far as its stream wants it.
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

/// Checks that every snapshot includes the event that it names.
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
