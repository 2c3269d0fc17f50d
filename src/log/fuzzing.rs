//! Entry points for the fuzz targets.

use super::dedup::{Gap, HighWater, sealed};
use super::in_hand::{ParkedRow, TriesRow};
use super::lanes::LaneState;
use super::rejected::RejectedRow;
use super::streams::{Run, SnapshotRow, StreamState};
use super::{keys, record};

/// Reads any bytes as a key and a row of each table, also with a right checksum.
pub(crate) fn row(key: &[u8], bytes: &[u8]) {
    let right = sealed(key, bytes.to_vec());
    for row in [bytes, &right] {
        let _ = (RejectedRow::from_bytes(key, row).is_ok(), ParkedRow::from_bytes(key, row).is_ok());
        let _ = (TriesRow::from_bytes(key, row), HighWater::from_bytes(key, row), Gap::from_bytes(key, row));
        let _ = (SnapshotRow::from_bytes(key, row), StreamState::from_bytes(row), LaneState::from_bytes(row));
        let _ = (Run::from_bytes(0, row), record::end_offset(0, row).is_ok());
    }
    // A key that can be read is written the same.
    if let Some((due_ms, seq)) = keys::split_due(key) {
        let cursor = u32::from_be_bytes(*key.first_chunk().expect("it is read"));
        assert_eq!(keys::due(cursor, due_ms, seq), key);
    }
    if let Some((text, seq)) = keys::split_parked(key) {
        let cursor = u32::from_be_bytes(*key.first_chunk().expect("it is read"));
        assert_eq!(keys::parked(cursor, text, seq), key);
    }
    if let Some((stream, first)) = keys::split_chunk(key) {
        assert_eq!(keys::chunk(stream, first), key);
    }
    if let Some(scope) = keys::scope_of(key) {
        assert!(key.starts_with(&keys::rejected(scope)));
    }
}
