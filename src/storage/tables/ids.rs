//! The row that counts the ids of deliveries of a scope, and the numbers that ids have. What they are for: `consumer/ids.rs`.

use std::collections::BTreeMap;

use redb::{ReadableTable, WriteTransaction};

use super::schema::{DEDUP, INBOX, InboxRow, KEYED, read_u64s, u64s};
use crate::error::{BoxError, Error, Result};
use crate::log::{keys, record};
use crate::storage::errors::damaged_row;

type Row = &'static [u8];

/// The count of an inbox row whose `first` is the number of its id: no closure leads to so many events.
pub(crate) const NUMBERED: u32 = u32::MAX;

/// Whether a row is of the id of a delivery, and so among those that are kept.
pub(crate) fn is_counted(row: &InboxRow) -> bool {
    row.count == NUMBERED || row.len & KEYED != 0
}

/// The row of a scope.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ids {
    /// The number that the next id gets.
    pub(crate) next: u64,
    /// How many are kept. Files of before format 5 did not count them.
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

/// The number that the scope's next id gets.
pub(crate) fn next(dedup: &impl ReadableTable<Row, Row>, scope: &str) -> Result<u64> {
    Ok(Ids::of(dedup, scope)?.next)
}

/// Whether at least `max` ids have come since.
pub(crate) fn is_forgotten(row: &InboxRow, next: u64, max: u64) -> bool {
    row.count == NUMBERED && row.first.saturating_add(max) < next
}

/// How many ids more are kept, or fewer, by scope.
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
            // Where they are not counted yet, there is nothing to change.
            if let Ids { next, kept: Some(kept) } = Ids::of(&dedup, &scope)? {
                let row = u64s([next, kept.saturating_add_signed(difference)]);
                dedup.insert(keys::inbox(&scope, &[]).as_slice(), row.as_slice())?;
            }
        }
        Ok(())
    }
}

/// Files of before format 6 counted ids with a number alone.
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

/// What distinguishes content from other content: checksum and length.
pub(crate) fn content_of(bytes: &[u8]) -> (u32, u64) {
    (record::body_checksum(bytes), u64::from(u32::try_from(bytes.len()).unwrap_or(u32::MAX)))
}

pub(crate) fn check_id(what: &'static str, id: &[u8], max: usize) -> Result<()> {
    if id.is_empty() || id.len() > max {
        return Err(Error::BadId { what, len: id.len(), max });
    }
    Ok(())
}
