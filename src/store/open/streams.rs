//! Streams at open: a snapshot may know of more events than the log does.

use redb::{ReadTransaction, ReadableTable};

use crate::error::Result;
use crate::log::keys;
use crate::log::streams::{Run, SnapshotRow, StreamState};
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{CHUNKS, SNAPSHOTS, STREAMS};
use crate::storage::tables::stream::stream_row;
use crate::store::shared::tail::Tail;

/// Raises the next numbers above every number that a snapshot or a chunk of the index knows.
/// Returns whether a number was raised. If the log lost its newest records, or they are damaged,
/// nothing else remembers their numbers.
pub(in crate::store) fn raise_to_known(tx: &ReadTransaction, tail: &mut Tail) -> Result<bool> {
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
