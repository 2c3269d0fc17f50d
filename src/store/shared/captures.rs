//! Captured tables as memory knows them, and the changes that a transaction has gathered for them.

use std::collections::{BTreeMap, BTreeSet};

use crate::storage::tables::capture::{CaptureId, CaptureRow, DirtyKind};

/// The pending changes of a transaction; the newest change of a key is written.
#[derive(Debug, Default)]
pub(crate) struct PendingCaptures {
    /// The dirty keys. `None`: the key is no longer dirty.
    pub(crate) dirty_keys: BTreeMap<Vec<u8>, Option<DirtyKind>>,
    pub(crate) rows: BTreeMap<String, CaptureRow>,
    /// Rows that were dirty before and have been written, each with an event of its own.
    pub(crate) written: BTreeSet<Vec<u8>>,
    /// A pass is in this transaction, after all writes.
    pub(crate) has_pass: bool,
}

impl PendingCaptures {
    /// The dirty keys of rows that the application has written.
    pub(crate) fn written(&self) -> impl Iterator<Item = &Vec<u8>> {
        let changed = self.dirty_keys.iter().filter(|(_, kind)| matches!(kind, Some(DirtyKind::Change)));
        changed.map(|(dirty, _)| dirty).chain(&self.written)
    }
}

/// The change of each capture's number of dirty keys.
pub(crate) type DirtyCounts = BTreeMap<CaptureId, i64>;

/// A table that the file knows as captured.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) row: CaptureRow,
    /// The number of dirty keys of the table.
    pub(crate) waiting: u64,
}

/// The registry of captured tables, by name: registered in this process or not.
#[derive(Debug, Default)]
pub(crate) struct CaptureRegistry(pub(crate) BTreeMap<String, Known>);

impl CaptureRegistry {
    pub(crate) fn get(&self, name: &str) -> Option<&Known> {
        self.0.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Known)> {
        self.0.iter()
    }

    pub(crate) fn holds(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Applies the changes of a durable commit.
    pub(crate) fn settle(&mut self, pending: &PendingCaptures, counts: &DirtyCounts) {
        for (name, row) in &pending.rows {
            if let Some(known) = self.0.get_mut(name) {
                known.row = row.clone();
            }
        }
        for known in self.0.values_mut().filter(|_| !counts.is_empty()) {
            let more = counts.get(&known.row.id).copied().unwrap_or_default();
            known.waiting = known.waiting.saturating_add_signed(more);
        }
    }
}
