//! The row that counts the delivery ids of a scope, and the numbers of ids. `consumer/ids.rs` uses
//! them.

use std::collections::BTreeMap;

use redb::{ReadableTable, WriteTransaction};

use super::schema::{DEDUP, INBOX, InboxRow, KEYED, read_u64s, u64s};
use crate::error::{BoxError, Error, Result};
use crate::log::{keys, record};
use crate::storage::errors::damaged_row;

type Row = &'static [u8];

/// The count of an inbox row whose `first` is its id's number. No closure causes as many events.
pub(crate) const NUMBERED: u32 = u32::MAX;

/// Whether a row is of a delivery's id, and so counts among the kept ids.
pub(crate) fn is_counted(row: &InboxRow) -> bool {
    row.count == NUMBERED || row.len & KEYED != 0
}

/// The row of a scope.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ids {
    /// The number of the next id.
    pub(crate) next: u64,
    /// How many ids are kept. Files before format 5 did not count them.
    pub(crate) kept: Option<u64>,
}

impl Ids {
    pub(crate) fn of(dedup: &impl ReadableTable<Row, Row>, scope: &str) -> Result<Self> {
        let Some(row) = dedup.get(keys::inbox(scope, &[]).as_slice())? else {
            return Ok(Self { next: 0, kept: Some(0) });
        };
        let (row, old) = (row.value(), read_u64s(row.value()).map(|[next]| Self { next, kept: None }));
        let new = || read_u64s(row).map(|[next, kept]| Self { next, kept: Some(kept) });
        old.or_else(new).ok_or_else(|| damaged_row("seen"))
    }
}

/// Returns the number of the scope's next id.
pub(crate) fn next(dedup: &impl ReadableTable<Row, Row>, scope: &str) -> Result<u64> {
    Ok(Ids::of(dedup, scope)?.next)
}

/// Whether at least `max` ids have come since this row.
pub(crate) fn is_forgotten(row: &InboxRow, next: u64, max: u64) -> bool {
    row.count == NUMBERED && row.first.saturating_add(max) < next
}

/// The change in the number of kept ids, by scope.
#[derive(Debug, Default)]
pub(crate) struct Difference(BTreeMap<String, i64>);

impl Difference {
    pub(crate) fn more(&mut self, scope: Option<&str>) {
        self.note(scope, 1);
    }

    pub(crate) fn fewer(&mut self, scope: Option<&str>) {
        self.note(scope, -1);
    }

    fn note(&mut self, scope: Option<&str>, by: i64) {
        let Some(scope) = scope else { return };
        match self.0.get_mut(scope) {
            Some(difference) => *difference += by,
            None => _ = self.0.insert(scope.to_owned(), by),
        }
    }

    pub(crate) fn write(self, tx: &WriteTransaction) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut dedup = tx.open_table(DEDUP)?;
        for (scope, difference) in self.0 {
            // Without a count there is nothing to change.
            if let Ids { next, kept: Some(kept) } = Ids::of(&dedup, &scope)? {
                let row = u64s([next, kept.saturating_add_signed(difference)]);
                dedup.insert(keys::inbox(&scope, &[]).as_slice(), row.as_slice())?;
            }
        }
        Ok(())
    }
}

/// Counts the ids. Files before format 6 counted only ids with a number.
pub(crate) fn count_ids(tx: &WriteTransaction) -> std::result::Result<(), BoxError> {
    let (inbox, mut dedup) = (tx.open_table(INBOX)?, tx.open_table(DEDUP)?);
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for row in inbox.iter()? {
        let (key, row) = row?;
        let row = InboxRow::from_bytes(row.value());
        if let Some(scope) = keys::scope_of(key.value()).filter(|_| row.as_ref().is_some_and(is_counted)) {
            *counts.entry(scope.to_owned()).or_default() += 1;
        }
    }
    for (scope, kept) in counts {
        let row = u64s([next(&dedup, &scope)?, kept]);
        dedup.insert(keys::inbox(&scope, &[]).as_slice(), row.as_slice())?;
    }
    Ok(())
}

/// Returns what distinguishes contents: checksum and length.
pub(crate) fn content_of(bytes: &[u8]) -> (u32, u64) {
    (record::body_checksum(bytes), u64::from(u32::try_from(bytes.len()).unwrap_or(u32::MAX)))
}

pub(crate) fn check_id(what: &'static str, id: &[u8], max: usize) -> Result<()> {
    if id.is_empty() || id.len() > max {
        return Err(Error::BadId { what, len: id.len(), max });
    }
    Ok(())
}
