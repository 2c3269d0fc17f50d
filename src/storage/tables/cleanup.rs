//! The rows of the clean-up: what was deleted or forgotten, and is not removed yet.
//!
//! ```text
//! onewrite.cleanup  1, stream name        → next revision u64, end u64    records and index of a truncated or deleted stream
//!                   2, track id u32 BE    → ()                            failures of a projection
//!                   3, cursor id u32 BE   → ()                            exceptions, due times and parked events of a relay
//!                   4, capture id u32 BE  → ()                      dirty keys of a captured table
//!                   5, prefix             → ()                            tables whose names begin so
//! ```

use crate::log::keys::CursorId;
use crate::storage::tables::capture::CaptureId;
use crate::storage::tables::schema::{read_u64s, u64s};

/// A task of removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Task {
    Stream(Vec<u8>),
    Failures(CursorId),
    Relay(CursorId),
    DirtyKeys(CaptureId),
    Tables(String),
}

impl Task {
    pub(crate) fn key(&self) -> Vec<u8> {
        let (kind, name): (u8, &[u8]) = match self {
            Self::Stream(name) => (1, name),
            Self::Failures(id) => (2, &id.to_be_bytes()),
            Self::Relay(id) => (3, &id.to_be_bytes()),
            Self::DirtyKeys(id) => (4, &id.to_be_bytes()),
            Self::Tables(prefix) => (5, prefix.as_bytes()),
        };
        [&[kind][..], name].concat()
    }

    pub(crate) fn from_key(key: &[u8]) -> Option<Self> {
        let (kind, name) = key.split_first()?;
        let id = || name.try_into().ok().map(u32::from_be_bytes);
        match kind {
            1 => Some(Self::Stream(name.to_vec())),
            2 => id().map(Self::Failures),
            3 => id().map(Self::Relay),
            4 => id().map(Self::DirtyKeys),
            5 => String::from_utf8(name.to_vec()).ok().map(Self::Tables),
            _ => None,
        }
    }
}

/// The revisions of a stream that are to be removed: the next revision, and the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Revisions {
    pub(crate) next: u64,
    pub(crate) end: u64,
}

impl Revisions {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        u64s([self.next, self.end])
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        read_u64s(bytes).map(|[next, end]| Self { next, end })
    }

    pub(crate) fn len(self) -> u64 {
        self.end.saturating_sub(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_round_trip() {
        let tasks = [
            Task::Stream(b"account-7".to_vec()),
            Task::Failures(7),
            Task::Relay(u32::MAX),
            Task::DirtyKeys(0),
            Task::Tables("onewrite.rebuild.7.".into()),
        ];
        for task in tasks {
            assert_eq!(Task::from_key(&task.key()), Some(task));
        }
        for odd in [&[][..], &[9], &[2, 0, 0], &[5, 0xff]] {
            assert_eq!(Task::from_key(odd), None);
        }
        let left = Revisions { next: 7, end: 9 };
        assert_eq!(Revisions::from_bytes(&left.to_bytes()), Some(left));
        assert_eq!((left.len(), Revisions { next: 9, end: 7 }.len()), (2, 0));
        assert_eq!(Revisions::from_bytes(&[]), None);
    }
}
