//! Which event a stream's snapshot includes last, and whether it still does.
//!
//! **The rule.** A snapshot names its newest event: revision, sequence number, checksum. It is used if that very event stands there,
//! whole; else it is ignored, and the events are read. Revisions below the first that can be read need no event: a stream that is
//! truncated has its next revision on disk since then, so none below it was given twice. A snapshot of format 3 names none and is
//! believed by its revision; recovery gives no revision again that a snapshot knows.

use redb::{ReadTransaction, ReadableTable};

use super::core::Tail;
use super::streams::{StreamSource, View, stream_row};
use crate::error::{Error, Result};
use crate::log::keys;
use crate::log::streams::{Run, SnapshotOf, SnapshotRow, StreamState};
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{CHUNKS, SNAPSHOTS, STREAMS};

impl View {
    /// The name of the event of this revision.
    pub(super) fn name_of(&self, source: &dyn StreamSource, revision: u64) -> Result<SnapshotOf> {
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

/// Raises what is given next above everything that a snapshot or a chunk of the index knows; `true` if anything was. Where the log
/// lost its newest records, or they are damaged, nothing else remembers their numbers.
pub(super) fn raise_to_known(tx: &ReadTransaction, tail: &mut Tail) -> Result<bool> {
    let streams = tx.open_table(STREAMS)?;
    let mut raised = false;
    let mut raise = |tail: &mut Tail, name: &[u8], next: u64| -> Result<()> {
        let known = match tail.streams.states.get(name) {
            Some(known) => known,
            None => stream_row(&streams, name)?.unwrap_or_default(),
        };
        if known.next < next {
            tracing::error!(
                stream = %String::from_utf8_lossy(name).escape_debug(), next = known.next, known = next,
                "the newest events of a stream are lost; their revisions are not given again"
            );
            tail.streams.states.change(name.into(), StreamState { next, ..known });
            raised = true;
        }
        Ok(())
    };
    let mut seq_known = 0;
    for row in tx.open_table(SNAPSHOTS)?.iter()? {
        let (name, row) = row?;
        let Some(row) = SnapshotRow::from_bytes(name.value(), row.value()) else { continue };
        raise(tail, name.value(), row.revision.saturating_add(1))?;
        seq_known = seq_known.max(row.of.map_or(0, |of| of.seq.saturating_add(1)));
    }
    for row in tx.open_table(CHUNKS)?.iter()? {
        let (key, value) = row?;
        let (name, first) = keys::split_chunk(key.value()).ok_or_else(|| damaged_row("chunk"))?;
        let run = Run::from_bytes(first, value.value()).ok_or_else(|| damaged_row("chunk"))?;
        raise(tail, name, first.saturating_add(run.seqs.len() as u64))?;
    }
    if tail.next_seq < seq_known {
        tracing::error!(
            next_seq = tail.next_seq,
            known = seq_known,
            "the newest events of the log are lost; their numbers are not given again"
        );
        tail.next_seq = seq_known;
        raised = true;
    }
    Ok(raised)
}
