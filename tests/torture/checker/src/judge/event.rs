//! What the judge knows of one application.

use std::collections::HashMap;

use crate::formats::Planned;

/// One application.
#[derive(Debug, Default)]
pub(super) struct App {
    pub(super) events: HashMap<u64, Event>,
    pub(super) batches: HashMap<u64, Batch>,
    /// Sequence number to event.
    pub(super) by_seq: HashMap<u64, u64>,
    /// Nothing is ever taken from its log.
    pub(super) keeps_log: bool,
    /// Of its log: the newest so far, and where it ends.
    pub(super) last_record: Option<(u64, u64)>,
    /// Stream to its next revision, as far as the log has been read.
    pub(super) revisions: HashMap<String, u64>,
    pub(super) rows: HashMap<u64, u64>,
    /// Sequence number to reason.
    pub(super) quarantined: HashMap<u64, String>,
    /// Events as the tap got them for the first time.
    pub(super) first_deliveries: Vec<u64>,
    /// Store id and epoch that its messages name.
    pub(super) store: Option<(String, u64)>,
}

/// One write.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) row: bool,
    pub(super) stream: Option<String>,
    pub(super) events: Vec<u64>,
    pub(super) outcome: BatchOutcome,
}

/// What was reported to its writer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BatchOutcome {
    /// Nothing, or that it is unknown.
    Open,
    Written(Vec<u64>),
    Refused,
}

/// One event.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) batch: u64,
    pub(super) planned: Planned,
    pub(super) seq: Option<u64>,
    pub(super) record: Option<Facts>,
    pub(super) tap: Option<Facts>,
    pub(super) effects: u64,
}

/// What must be the same wherever an event shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) id: String,
    pub(super) lane: u64,
    pub(super) number: u64,
    pub(super) crc: u64,
}

impl Event {
    pub(super) fn new(batch: u64, planned: Planned) -> Self {
        Self { batch, planned, seq: None, record: None, tap: None, effects: 0 }
    }

    pub(super) fn facts(&self) -> Option<&Facts> {
        self.record.as_ref().or(self.tap.as_ref())
    }
}
