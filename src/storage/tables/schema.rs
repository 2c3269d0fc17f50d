//! The tables of the file, and the rows of the small tables.
//!
//! ```text
//! onewrite.meta        name → bytes        format u32 · content_key 16, dedup before ms u64 · store_id 16 · epoch u64 · epoch_starts u64… · next_cursor u32 · state 24 · age u64 (age u64, seq u64)…
//! onewrite.log         seq u64 → record    (log/record.rs)
//! onewrite.lanes       lane → id u64, next u64
//! onewrite.streams     stream name → next revision u64, first revision u64, deleted u8
//! onewrite.chunks      (stream, first revision) → sequence numbers u64…
//! onewrite.snapshots   stream name → crc32 u32, version u32, revision u64, seq u64, its record's crc32 u32, the application's bytes
//! onewrite.cursors     relay name → id u32, position u64, offset at position u64, confirmed u64
//! onewrite.exceptions  (cursor, seq) → exception row        (cursor.rs)
//! onewrite.due         (cursor, due ms, seq) → ()
//! onewrite.parked      (cursor, key, seq) → ()
//! onewrite.inbox       (scope, id) → first u64, count u32, crc u32, len u64, at ms u64   (of deliveries: see consumer/dedup.rs)
//! onewrite.projections projection name → see projection.rs
//! onewrite.failures    (projection, seq) → see projection/rows.rs
//! onewrite.captures    table name → id u32, mode u8, snapshot u8, last key backfilled    (capture/rows.rs)
//! onewrite.changes     (capture, the application's key) → kind u8: 0 change, 1 snapshot
//! onewrite.seen        (scope, store, epoch, lane) → high-water mark; (scope, store, epoch, lane, start) → gap;
//!                      (scope, store, epoch, lane, chunk) → hashes                              (log/dedup.rs);
//!                      (scope) → ids that were given a number u64, those of them that are kept u64   (consumer/ids.rs)
//! onewrite.lanes_kept  (scope) → lanes u64, gaps u64, lanes that were forgotten u64, since ms u64; (scope, store, epoch) → forgotten lanes    (consumer/lanes.rs)
//! onewrite.rejected    (scope) → next number u64, rows u64, their bytes u64, dropped u64; (scope, number) → delivery          (log/rejected.rs);
//!                      (scope, number) → (), to be driven again                                 (consumer/rejected.rs)
//! onewrite.cleanup     a task of the clean-up, see cleanup/mod.rs                                (made when first needed)
//! onewrite.in_hand     (scope) → next number u64, rows u64, bytes u64; (scope, number) → parked delivery;
//!                      (scope, name) → tries       (log/in_hand.rs; the table is made when it is first needed)
//! onewrite.pieces      (table, the key of a rejected or parked delivery, piece) → bytes       (pieces.rs; made when it is first needed)
//! ```
//!
//! Key and value types are only `u64`, `&str` and `&[u8]`, whose encoding is the same in redb 4 and
//! 5. Numbers are big-endian in keys and little-endian in values.

use redb::{ReadableTable, TableDefinition};

use crate::error::Result;
use crate::log::keys;
use crate::storage::errors::damaged_row;

pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");
pub(crate) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
pub(crate) const LANES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.lanes");
pub(crate) const STREAMS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.streams");
pub(crate) const CHUNKS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.chunks");
pub(crate) const SNAPSHOTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.snapshots");
pub(crate) const CURSORS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.cursors");
pub(crate) const EXCEPTIONS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.exceptions");
pub(crate) const DUE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.due");
pub(crate) const PARKED: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.parked");
pub(crate) const INBOX: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.inbox");
pub(crate) const PROJECTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.projections");
pub(crate) const FAILURES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.failures");
pub(crate) const CAPTURES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.captures");
pub(crate) const CHANGES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.changes");
/// The rows of deduplication. The stored name is older than the constant's name.
pub(crate) const DEDUP: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.seen");
pub(crate) const REJECTED: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.rejected");
pub(crate) const LANES_KEPT: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.lanes_kept");
/// The clean-up's rows, made when first needed. An earlier release of the same format ignores them.
pub(crate) const CLEANUP: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.cleanup");
pub(crate) const IN_HAND: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.in_hand");
pub(crate) const PIECES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.pieces");

/// The tables by name that later formats added.
pub(crate) const BY_NAME: [TableDefinition<'_, &str, &[u8]>; 2] = [PROJECTIONS, CAPTURES];
/// The tables by key that formats after format 1 added.
pub(crate) const BY_KEY: [TableDefinition<'_, &[u8], &[u8]>; 8] =
    [STREAMS, CHUNKS, SNAPSHOTS, FAILURES, CHANGES, DEDUP, REJECTED, LANES_KEPT];

/// The prefix of our tables. An application cannot open them for writing.
pub(crate) const RESERVED_PREFIX: &str = "onewrite.";

/// The format that this version writes, and the newest format that it reads.
pub(crate) const FORMAT: u32 = 6;

pub(crate) const META_FORMAT: &str = "format";
/// The secret for hashes of contents, and the bound on times from before format 5.
pub(crate) const META_CONTENT_KEY: &str = "content_key";
pub(crate) const META_STORE_ID: &str = "store_id";
pub(crate) const META_EPOCH: &str = "epoch";
/// The sequence numbers at which the epochs after the first begin. A missing number is 0; it comes
/// from a file before this row existed.
pub(crate) const META_EPOCH_STARTS: &str = "epoch_starts";
pub(crate) const META_NEXT_CURSOR: &str = "next_cursor";
pub(crate) const META_STATE: &str = "state";
/// The store age (see age.rs). Without it, everything in the file counts as just written.
pub(crate) const META_AGE: &str = "age";

/// The row `state`: what cannot be derived from the log once its beginning is trimmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StateRow {
    /// Records below are trimmed, except those that an exception still needs.
    pub(crate) trimmed_to: u64,
    /// The end offset of the record before `trimmed_to`.
    pub(crate) trimmed_offset: u64,
    /// The tables of lanes, streams and chunks are true for records below this number.
    pub(crate) derived_through: u64,
}

impl StateRow {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        u64s([self.trimmed_to, self.trimmed_offset, self.derived_through])
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let [trimmed_to, trimmed_offset, derived_through] = read_u64s(bytes)?;
        Some(Self { trimmed_to, trimmed_offset, derived_through })
    }
}

/// Encodes numbers as little-endian bytes.
pub(crate) fn u64s<const N: usize>(numbers: [u64; N]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Reads exactly `N` little-endian numbers.
pub(crate) fn read_u64s<const N: usize>(bytes: &[u8]) -> Option<[u64; N]> {
    let mut numbers = [0; N];
    if bytes.len() != N * 8 {
        return None;
    }
    for (number, chunk) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_le_bytes(chunk.try_into().ok()?);
    }
    Some(numbers)
}

/// Returns the scopes that have rows in a table, going straight from one to the next. `what` names
/// the table in the error of a damaged key.
pub(crate) fn scopes(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    what: &'static str,
) -> Result<Vec<String>> {
    let (mut scopes, mut from) = (Vec::new(), Vec::new());
    while let Some(row) = table.range(from.as_slice()..)?.next() {
        let (key, _) = row?;
        let scope = keys::scope_of(key.value()).ok_or_else(|| damaged_row(what))?.to_owned();
        from = keys::after_prefix(&keys::inbox(&scope, &[]));
        scopes.push(scope);
        if from.is_empty() {
            break;
        }
    }
    Ok(scopes)
}

/// A row of the inbox: something that came once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InboxRow {
    /// The first sequence number that it caused.
    pub(crate) first: u64,
    /// How many events it caused, contiguous from `first`.
    pub(crate) count: u32,
    /// The CRC-32 of its content; with the length it distinguishes a repeat from other content of
    /// the same name. For a delivery, see consumer/dedup.rs.
    pub(crate) crc: u32,
    pub(crate) len: u64,
    /// The store age at which it came (age.rs). An age beyond the store age is of an earlier
    /// format, or was lost in a crash, and counts as now.
    pub(crate) at_ms: u64,
}

/// The flag that the length is no length, but the keyed hash of a delivery.
pub(crate) const KEYED: u64 = 1 << 63;

impl InboxRow {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        u64s([self.first, u64::from(self.count) << 32 | u64::from(self.crc), self.len, self.at_ms])
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let [first, packed, len, at_ms] = read_u64s(bytes)?;
        Some(Self {
            first,
            count: u32::try_from(packed >> 32).ok()?,
            crc: u32::try_from(packed & u64::from(u32::MAX)).ok()?,
            len,
            at_ms,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip() {
        let row = InboxRow { first: 7, count: 2, crc: 0xdead_beef, len: 5, at_ms: 9 };
        assert_eq!(InboxRow::from_bytes(&row.to_bytes()), Some(row));
        let state = StateRow { trimmed_to: 1, trimmed_offset: 2, derived_through: 3 };
        assert_eq!(StateRow::from_bytes(&state.to_bytes()), Some(state));
        assert_eq!(StateRow::from_bytes(&[0; 23]), None);
    }
}
