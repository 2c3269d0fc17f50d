//! What memory knows of the file: whose it is, and where its log ends.

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

/// Who this store is, on the wire too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) store_id: [u8; 16],
    /// The sequence number at which each epoch after the first begins. What was appended in an earlier epoch is published under
    /// that one's name, also when it is published again.
    pub(crate) epoch_starts: Vec<u64>,
    /// What contents of deliveries are hashed with.
    pub(crate) content_key: ContentKey,
    /// What lanes had shown before there was such a key is no later than this, in Unix milliseconds. `None` if there always was
    /// one.
    pub(crate) dedup_before_ms: Option<u64>,
}

impl Identity {
    /// The epoch of what is appended now. The first is 1.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch_starts.len() as u64 + 1
    }
}

/// The end of the log, and what is kept in memory about it.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    pub(crate) next_seq: u64,
    pub(crate) end_offset: u64,
    pub(crate) trimmed_to: u64,
    pub(crate) trimmed_offset: u64,
    pub(crate) lanes: WriteBackCache<LaneState>,
    pub(crate) streams: StreamCache,
    /// The tables that are derived from the log are true for all records below.
    pub(crate) derived_through: u64,
    /// Ages of events, and of the store.
    pub(crate) ages: AgeIndex,
    /// The end offset of the record before `derived_through`.
    pub(crate) derived_offset: u64,
    pub(crate) cursors: BTreeMap<String, Cursor>,
    /// What is parked, by cursor.
    pub(crate) parked: BTreeMap<CursorId, Parked>,
    pub(crate) projections: BTreeMap<String, ProjectionRow>,
    /// The tables that are captured.
    pub(crate) captures: CaptureRegistry,
    /// What is left to be cleaned up.
    pub(crate) cleanup: Left,
    /// Inbox rows added since the last pruning step, and where the next one begins.
    pub(crate) inbox_added: usize,
    pub(crate) prune_after: Vec<u8>,
    /// Records can go, but the last commit had done its share, or deferred it until the store is idle.
    pub(crate) trim_left: bool,
    /// Since when it has been deferred.
    pub(crate) deferred: Option<Deferred>,
}

impl Tail {
    /// Events and bytes that some relay still has to publish, the most of each. Without a relay, all that is in the log.
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

    /// What lies between a cursor's position and the end of the log and has no exception, and what waits with a row.
    /// Quarantined and discarded events are not in it, wherever they stand. What is confirmed behind an event that is not
    /// counts until the position passes it: how far a relay reads ahead bounds that.
    pub(crate) fn backlog_of(&self, cursor: &Cursor) -> (u64, u64) {
        let rows = &cursor.rows;
        let events = self.next_seq.saturating_sub(cursor.position).saturating_sub(rows.ahead);
        let bytes = self.end_offset.saturating_sub(cursor.position_offset).saturating_sub(rows.ahead_bytes);
        (events + rows.waiting(), bytes + rows.waiting_bytes)
    }
}
