//! Which event a stream's snapshot includes last, and whether it still does.
//!
//! **The rule.** A snapshot names its newest event: revision, sequence number, checksum. It is used if that very event stands there,
//! whole; else it is ignored, and the events are read. Revisions below the first that can be read need no event: a stream that is
//! truncated has its next revision on disk since then, so none below it was given twice. A snapshot of format 3 names none and is
//! believed by its revision; recovery gives no revision again that a snapshot knows.

use crate::error::{Error, Result};
use crate::log::streams::{Run, SnapshotOf, SnapshotRow};
use crate::store::read::stream::{StreamSource, View};

impl View {
    /// The name of the event of this revision.
    pub(in crate::store) fn name_of(&self, source: &dyn StreamSource, revision: u64) -> Result<SnapshotOf> {
        let recorded = self.read(source, revision, &mut Run::default())?;
        Ok(SnapshotOf { seq: recorded.seq(), crc: recorded.crc() })
    }

    /// Whether what this snapshot says it includes is there.
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
