//! The row that counts the rejected deliveries of a scope. `consumer/rejected.rs` uses it.

use redb::{ReadableTable, WriteTransaction};

use super::schema::{REJECTED, read_u64s, u64s};
use crate::error::{BoxError, Result};
use crate::log::keys;
use crate::storage::errors::damaged_row;

type Row = &'static [u8];

/// The row of a scope: the next number, the count and bytes of the rows, and how many were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RejectedTotals {
    pub(crate) next: u64,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    pub(crate) dropped: u64,
}

impl RejectedTotals {
    pub(crate) fn of(rejected: &impl ReadableTable<Row, Row>, key: &[u8]) -> Result<Self> {
        let Some(row) = rejected.get(key)? else { return Ok(Self::default()) };
        let [next, rows, bytes, dropped] = read_u64s(row.value()).ok_or_else(|| damaged_row("rejected"))?;
        Ok(Self { next, rows, bytes, dropped })
    }

    pub(crate) fn put(self, rejected: &mut redb::Table<'_, Row, Row>, key: &[u8]) -> Result<()> {
        rejected.insert(key, u64s([self.next, self.rows, self.bytes, self.dropped]).as_slice())?;
        Ok(())
    }

    pub(crate) fn less(self, bytes: u64) -> Self {
        Self { rows: self.rows.saturating_sub(1), bytes: self.bytes.saturating_sub(bytes), ..self }
    }
}

/// Counts the bytes, which format 5 did not count.
pub(crate) fn count_bytes(tx: &WriteTransaction) -> std::result::Result<(), BoxError> {
    let mut rejected = tx.open_table(REJECTED)?;
    let mut of_scopes: Vec<(Vec<u8>, RejectedTotals)> = Vec::new();
    for row in rejected.iter()? {
        let (key, row) = row?;
        let (key, row) = (key.value(), row.value());
        if let Some([next, rows]) =
            read_u64s(row).filter(|_| keys::scope_of(key).is_some_and(|scope| key.len() == 1 + scope.len()))
        {
            of_scopes.push((key.to_vec(), RejectedTotals { next, rows, ..RejectedTotals::default() }));
        } else if let Some((scope, totals)) = of_scopes.last_mut()
            && key.starts_with(scope)
            && key.get(scope.len()) == Some(&0)
        {
            totals.bytes = totals.bytes.saturating_add(row.len() as u64);
        }
    }
    for (key, totals) in of_scopes {
        totals.put(&mut rejected, &key)?;
    }
    Ok(())
}
