//! Writes the changes that a transaction has gathered for captured tables.

use redb::WriteTransaction;

use crate::error::Result;
use crate::storage::tables::capture::capture_of;
use crate::storage::tables::schema::{CAPTURES, CHANGES};
use crate::store::shared::captures::{DirtyCounts, PendingCaptures};

/// Writes the dirty keys and the rows. If nothing has changed, nothing is written.
pub(crate) fn write(tx: &WriteTransaction, pending: &PendingCaptures) -> Result<DirtyCounts> {
    let mut counts = DirtyCounts::new();
    if !pending.dirty_keys.is_empty() {
        let mut changes = tx.open_table(CHANGES)?;
        for (key, kind) in &pending.dirty_keys {
            let was_there = match kind {
                Some(kind) => changes.insert(key.as_slice(), &[kind.to_byte()][..])?.is_some(),
                None => changes.remove(key.as_slice())?.is_some(),
            };
            let count = counts.entry(capture_of(key)?).or_default();
            *count += i64::from(kind.is_some()) - i64::from(was_there);
        }
    }
    if !pending.rows.is_empty() {
        let mut captures = tx.open_table(CAPTURES)?;
        for (name, row) in &pending.rows {
            captures.insert(name.as_str(), row.to_bytes().as_slice())?;
        }
    }
    Ok(counts)
}
