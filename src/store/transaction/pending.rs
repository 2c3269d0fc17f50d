//! The changes of a transaction that are not in the file yet.

use std::collections::{BTreeMap, HashMap};

use crate::log::lanes::LaneState;
use crate::log::streams::{Run, StreamState};
use crate::storage::tables::projection::ProjectionRow;
use crate::storage::tables::schema::InboxRow;
use crate::store::shared::captures::PendingCaptures;
use crate::store::shared::cleaning::LeftChange;
use crate::store::transaction::gathered::Point;

/// The changes that the transaction would make to the log and its tables.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    pub(crate) next_seq: u64,
    pub(crate) end_offset: u64,
    pub(crate) frames: Vec<(u64, Vec<u8>)>,
    pub(crate) lanes: HashMap<Box<[u8]>, LaneState>,
    pub(crate) inbox: HashMap<Vec<u8>, InboxRow>,
    pub(crate) streams: PendingStreams,
    /// Rows that are written already. Only a rollback of the whole transaction takes them back.
    pub(crate) projections: BTreeMap<String, ProjectionRow>,
    /// No savepoint takes back a part of these. Code that changes them has
    /// [touched](crate::Transaction::touch) the transaction.
    pub(crate) captures: PendingCaptures,
    /// Written already, as the projections are.
    pub(crate) cleanup: LeftChange,
    /// The commit writes the derived tables, however few events have come since the last such
    /// write.
    pub(crate) flush_derived: bool,
    /// The commit may be the last one. So it writes what is otherwise written only from time to
    /// time.
    pub(crate) closing: bool,
    pub(in crate::store) undo: Vec<Undo>,
}

#[derive(Debug)]
pub(in crate::store) enum Undo {
    Lane(Box<[u8]>, Option<LaneState>),
    Inbox(Vec<u8>, Option<InboxRow>),
    /// The state before, and how many events the transaction had appended to the stream before.
    Stream(Box<[u8]>, Option<(StreamState, usize)>),
}

/// A point within a transaction. Everything that gathered in memory after it can be rolled back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Savepoint {
    pub(in crate::store) next_seq: u64,
    pub(in crate::store) end_offset: u64,
    pub(in crate::store) frames: usize,
    pub(in crate::store) undo: usize,
    pub(in crate::store) tables_opened: u64,
    pub(in crate::store) gathered: Point,
}

impl Pending {
    pub(crate) fn put_inbox_row(&mut self, key: Vec<u8>, row: InboxRow) {
        let earlier = self.inbox.insert(key.clone(), row);
        self.undo.push(Undo::Inbox(key, earlier));
    }

    pub(crate) fn remove_inbox_row(&mut self, key: &[u8]) {
        if let Some(earlier) = self.inbox.remove(key) {
            self.undo.push(Undo::Inbox(key.to_vec(), Some(earlier)));
        }
    }

    /// Notes an event of this stream that has been appended at the next revision. `committed` is
    /// the stream's state before this transaction.
    pub(crate) fn note_revision(&mut self, name: &[u8], committed: StreamState, seq: u64) {
        let stream = self.change_stream(name, committed);
        stream.state.next += 1;
        stream.run.seqs.push(seq);
    }

    /// Sets another state of the stream.
    pub(crate) fn note_state(&mut self, name: &[u8], state: StreamState) {
        self.change_stream(name, state).state = state;
    }

    fn change_stream(&mut self, name: &[u8], committed: StreamState) -> &mut PendingStream {
        let before = self.streams.get(name).map(|stream| (stream.state, stream.run.seqs.len()));
        self.undo.push(Undo::Stream(name.into(), before));
        self.streams
            .entry(name.into())
            .or_insert_with(|| PendingStream { state: committed, run: Run::starting_at(committed.next) })
    }
}

/// The changes that a transaction made to a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PendingStream {
    pub(crate) state: StreamState,
    /// The events that the transaction appended.
    pub(crate) run: Run,
}

pub(crate) type PendingStreams = HashMap<Box<[u8]>, PendingStream>;
