//! The part of the file that memory knows: the store's identity, and where its log ends.

use std::collections::BTreeMap;

use crate::log::keys::CursorId;
use crate::log::lanes::LaneState;
use crate::log::streams::StreamCache;
use crate::log::write_back::WriteBackCache;
use crate::storage::tables::projection::ProjectionRow;
use crate::store::shared::age::AgeIndex;
use crate::store::shared::captures::CaptureRegistry;
use crate::store::shared::cleaning::Left;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::deferred_trim::Deferred;
use crate::store::shared::parked::Parked;
use crate::wire::ContentKey;

/// The identity of the store, in the file and on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) store_id: [u8; 16],
    /// The sequence number at which each epoch after the first begins. An event of an earlier epoch
    /// is published under the name of that epoch, also when it is published again.
    pub(crate) epoch_starts: Vec<u64>,
    /// The key with which contents of deliveries are hashed.
    pub(crate) content_key: ContentKey,
    /// A bound, in Unix milliseconds, on all that lanes had shown before the content key existed.
    /// `None` if there always was a content key.
    pub(crate) dedup_before_ms: Option<u64>,
}

impl Identity {
    /// The epoch of events that are appended now. The first epoch is 1.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch_starts.len() as u64 + 1
    }
}

/// The end of the log, and what memory holds about the log.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    pub(crate) next_seq: u64,
    pub(crate) end_offset: u64,
    pub(crate) trimmed_to: u64,
    pub(crate) trimmed_offset: u64,
    pub(crate) lanes: WriteBackCache<LaneState>,
    pub(crate) streams: StreamCache,
    /// The tables that are derived from the log are correct for all records below this number.
    pub(crate) derived_through: u64,
    /// Ages of events, and of the store.
    pub(crate) ages: AgeIndex,
    /// The end offset of the record before `derived_through`.
    pub(crate) derived_offset: u64,
    pub(crate) cursors: BTreeMap<String, Cursor>,
    /// The parked events, by cursor.
    pub(crate) parked: BTreeMap<CursorId, Parked>,
    pub(crate) projections: BTreeMap<String, ProjectionRow>,
    /// The captured tables.
    pub(crate) captures: CaptureRegistry,
    /// The work left for clean-up.
    pub(crate) cleanup: Left,
    /// Inbox rows added since the last pruning step, and where the next step begins.
    pub(crate) inbox_added: usize,
    pub(crate) prune_after: Vec<u8>,
    /// Records can be trimmed, but the last commit had trimmed its share, or deferred trimming
    /// until the store is idle.
    pub(crate) trim_left: bool,
    /// Since when trimming has been deferred.
    pub(crate) deferred: Option<Deferred>,
}

impl Tail {
    /// The most events, and the most bytes, that any relay still has to publish. Without a relay:
    /// all that is in the log.
    pub(crate) fn backlog(&self) -> (u64, u64) {
        self.cursors
            .values()
            .map(|cursor| self.backlog_of(cursor))
            .reduce(|a, b| (a.0.max(b.0), a.1.max(b.1)))
            .unwrap_or((
                self.next_seq.saturating_sub(self.trimmed_to),
                self.end_offset.saturating_sub(self.trimmed_offset),
            ))
    }

    /// The backlog of one cursor: the events past its position that have no exception, and the
    /// events that wait with a row. Quarantined and discarded events are not included, wherever
    /// they are. A confirmed event behind an unconfirmed event counts until the position passes it:
    /// the relay's lookahead bounds their number.
    pub(crate) fn backlog_of(&self, cursor: &Cursor) -> (u64, u64) {
        let rows = &cursor.rows;
        let events = self.next_seq.saturating_sub(cursor.position).saturating_sub(rows.ahead);
        let bytes = self.end_offset.saturating_sub(cursor.position_offset).saturating_sub(rows.ahead_bytes);
        (events + rows.waiting(), bytes + rows.waiting_bytes)
    }
}
