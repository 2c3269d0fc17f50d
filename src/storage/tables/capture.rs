//! The rows of captured tables: which tables are captured, the progress of each backfill, and which
//! keys have changed.
//!
//! ```text
//! onewrite.captures    table name → id u32 │ mode u8 │ snapshot u8 │ last key backfilled …
//! onewrite.changes     id u32 BE │ the row's key, as redb stores it → kind u8
//! ```
//!
//! A dirty key is one row, however often its key changes. A transaction's commit writes what the
//! transaction has gathered. The figures in memory follow once that is durable.

use crate::error::Result;
use crate::storage::errors::damaged_row;

/// The id of a captured table in the rows of dirty keys.
pub(crate) type CaptureId = u32;

/// The progress of the backfill.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SnapshotState {
    /// No backfill was requested.
    None,
    /// No row has been backfilled.
    ToBegin,
    /// The last backfilled key.
    Behind(Vec<u8>),
    Done,
}

impl SnapshotState {
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::ToBegin | Self::Behind(_))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CaptureRow {
    pub(crate) id: CaptureId,
    pub(crate) mode: CaptureMode,
    pub(crate) snapshot: SnapshotState,
}

impl CaptureRow {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.push(match self.mode {
            CaptureMode::EveryChange => 0,
            CaptureMode::NewestValue => 1,
        });
        let (state, after): (u8, &[u8]) = match &self.snapshot {
            SnapshotState::None => (0, &[]),
            SnapshotState::ToBegin => (1, &[]),
            SnapshotState::Behind(key) => (2, key),
            SnapshotState::Done => (3, &[]),
        };
        bytes.push(state);
        bytes.extend_from_slice(after);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk::<4>()?;
        let (&[mode, state], after) = rest.split_first_chunk::<2>()?;
        let mode = match mode {
            0 => CaptureMode::EveryChange,
            1 => CaptureMode::NewestValue,
            _ => return None,
        };
        let snapshot = match (state, after) {
            (0, []) => SnapshotState::None,
            (1, []) => SnapshotState::ToBegin,
            (2, key) => SnapshotState::Behind(key.to_vec()),
            (3, []) => SnapshotState::Done,
            _ => return None,
        };
        Some(Self { id: u32::from_le_bytes(*id), mode, snapshot })
    }
}

/// Why a key is dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirtyKind {
    /// The key has changed.
    Change,
    /// The key was there at switch-on, and its codec failed.
    Snapshot,
}

impl DirtyKind {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            Self::Change => 0,
            Self::Snapshot => 1,
        }
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0] => Some(Self::Change),
            [1] => Some(Self::Snapshot),
            _ => None,
        }
    }
}

/// Returns the row key of a dirty key.
pub(crate) fn dirty_key(id: CaptureId, key: &[u8]) -> Vec<u8> {
    [&id.to_be_bytes()[..], key].concat()
}

pub(crate) fn capture_of(dirty: &[u8]) -> Result<CaptureId> {
    dirty.first_chunk::<4>().map(|id| u32::from_be_bytes(*id)).ok_or_else(|| damaged_row("dirty key"))
}

/// When the changes of a captured table become events.
///
/// ```
/// use onewrite::CaptureMode;
/// assert_eq!(CaptureMode::default(), CaptureMode::EveryChange);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CaptureMode {
    /// Each change is an event of its own, appended by the write itself. The default.
    #[default]
    EveryChange,
    /// A write only records its key as dirty. When a relay asks for a coalescing pass, the key is
    /// published once, with its value at that moment. So a key that changed a thousand times while
    /// the broker was away is one event.
    ///
    /// Dirty keys wait while no relay runs. If the events
    /// [stay in the log](crate::Capture::unpublished), no relay is needed, and the dirty keys wait
    /// for a quarter of a second at most.
    NewestValue,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip() {
        let states =
            [SnapshotState::None, SnapshotState::ToBegin, SnapshotState::Behind(vec![]), SnapshotState::Done];
        for snapshot in states.into_iter().chain([SnapshotState::Behind(vec![7, 0])]) {
            for mode in [CaptureMode::EveryChange, CaptureMode::NewestValue] {
                let row = CaptureRow { id: 7, mode, snapshot: snapshot.clone() };
                assert_eq!(CaptureRow::from_bytes(&row.to_bytes()), Some(row));
            }
        }
        for damaged in
            [&[][..], &[1, 0, 0, 0, 0], &[1, 0, 0, 0, 2, 0], &[1, 0, 0, 0, 0, 4], &[1, 0, 0, 0, 0, 3, 1]]
        {
            assert_eq!(CaptureRow::from_bytes(damaged), None);
        }
        assert_eq!(DirtyKind::from_bytes(&[DirtyKind::Snapshot.to_byte()]), Some(DirtyKind::Snapshot));
        assert_eq!(DirtyKind::from_bytes(&[2]), None);
        assert_eq!(capture_of(&dirty_key(9, b"k")).unwrap(), 9);
    }
}
