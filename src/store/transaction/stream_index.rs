//! Writes the index of streams.

use std::collections::BTreeSet;

use redb::WriteTransaction;

use crate::error::Result;
use crate::event::RecordedEvent;
use crate::log::keys;
use crate::log::streams::{Run, StreamCache};
use crate::storage::tables::schema::{CHUNKS, STREAMS};
use crate::storage::tables::stream::stream_row;
use crate::store::shared::tail::Tail;
use crate::store::transaction::pending::{Pending, PendingStreams};

/// Writes the index in bulk: the states, and a chunk for each stream that was appended to since the
/// last bulk write.
pub(in crate::store) fn write_streams(
    tx: &WriteTransaction,
    cache: &StreamCache,
    pending: &PendingStreams,
) -> Result<()> {
    {
        let mut streams = tx.open_table(STREAMS)?;
        for (name, state) in cache.states.changed() {
            streams.insert(name, &state.to_bytes()[..])?;
        }
        // The transaction's own changes are newer.
        for (name, stream) in pending {
            streams.insert(&**name, &stream.state.to_bytes()[..])?;
        }
    }
    let mut chunks = tx.open_table(CHUNKS)?;
    let names: BTreeSet<&[u8]> = cache.recent.keys().chain(pending.keys()).map(|name| &**name).collect();
    for name in names {
        let own = pending.get(name);
        let run = joined(cache.recent.get(name), own.map(|stream| &stream.run));
        let state = own.map(|stream| stream.state).or_else(|| cache.states.get(name)).unwrap_or_default();
        // Of a deleted stream, nothing is left.
        let run = run.from(state.first);
        if !run.seqs.is_empty() {
            chunks.insert(keys::chunk(name, run.first).as_slice(), run.to_bytes().as_slice())?;
        }
    }
    Ok(())
}

/// Joins two runs that follow each other.
pub(crate) fn joined(first: Option<&Run>, then: Option<&Run>) -> Run {
    let mut run = first.filter(|run| !run.seqs.is_empty()).cloned();
    if let Some(then) = then {
        run.get_or_insert_with(|| Run::starting_at(then.first)).seqs.extend(&then.seqs);
    }
    run.unwrap_or_default()
}

/// Whether the log must keep this record for its stream.
pub(crate) fn wants(
    tx: &WriteTransaction,
    tail: &Tail,
    pending: &Pending,
    recorded: &RecordedEvent,
) -> Result<bool> {
    let (Some(stream), Some(revision)) = (recorded.stream(), recorded.revision()) else { return Ok(false) };
    let name = stream.as_bytes();
    let known =
        pending.streams.get(name).map(|stream| stream.state).or_else(|| tail.streams.states.get(name));
    let state = match known {
        Some(state) => state,
        None => stream_row(&tx.open_table(STREAMS)?, name)?.unwrap_or_default(),
    };
    Ok(state.wants(revision))
}
