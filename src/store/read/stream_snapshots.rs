//! Which event a stream's snapshot includes last, and whether that event is still there.
//!
//! **The rule.** A snapshot names its newest event by revision, sequence number and checksum. The
//! snapshot is used if the log has exactly that event, whole. Otherwise the snapshot is ignored,
//! and the events are read. Revisions below the first readable one need no event. A truncated
//! stream has had its next revision on disk since, so none of them was given twice. A snapshot of
//! format 3 names no event and is believed by its revision. Recovery never gives a revision again
//! that a snapshot knows.

use crate::error::{Error, Result};
use crate::log::streams::{Run, SnapshotOf, SnapshotRow};
use crate::store::read::stream::{StreamSource, View};

impl View {
    /// Returns the sequence number and checksum of the event of this revision.
    pub(in crate::store) fn name_of(&self, source: &dyn StreamSource, revision: u64) -> Result<SnapshotOf> {
        let recorded = self.read(source, revision, &mut Run::default())?;
        Ok(SnapshotOf { seq: recorded.seq(), crc: recorded.crc() })
    }

    /// Whether the newest event of this snapshot is still there.
    pub(crate) fn has_event_of(&self, source: &dyn StreamSource, row: &SnapshotRow) -> Result<bool> {
        if row.revision >= self.state.next {
            return Ok(false);
        }
        let Some(of) = row.of.filter(|_| row.revision >= self.state.first) else { return Ok(true) };
        match self.name_of(source, row.revision) {
            Ok(stands) => Ok(stands == of),
            Err(Error::Corrupt(_) | Error::MissingRevision { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
