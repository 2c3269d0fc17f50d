//! Ids of deliveries by number: how many of a scope are kept.
//!
//! Where a store remembers so many ids of a scope at most, each new one gets the next number of its scope, which stands in its
//! inbox row. The row `(scope)` counts the numbers, and the ids that are kept. What becomes of a further id is the policy's:
//! [`IdsPolicy`](super::IdsPolicy).

use std::collections::BTreeMap;

use redb::{ReadableTable, WriteTransaction};

use super::failure::damaged_row;
use super::schema::{INBOX, InboxRow, SEEN, read_u64s, u64s};
use super::settings::IdsPolicy;
use super::transaction::Transaction;
use crate::error::{Error, Result};
use crate::log::keys;

type Row = &'static [u8];

/// The count of an inbox row whose `first` is the number of its id: no closure leads to so many events.
pub(super) const NUMBERED: u32 = u32::MAX;

/// The row of a scope.
#[derive(Debug, Clone, Copy, Default)]
struct Ids {
    /// The number that the next id gets.
    next: u64,
    /// How many are kept. Files of before format 5 did not count them.
    kept: Option<u64>,
}

impl Ids {
    fn of(seen: &impl ReadableTable<Row, Row>, scope: &str) -> Result<Self> {
        let Some(row) = seen.get(keys::inbox(scope, &[]).as_slice())? else {
            return Ok(Self { next: 0, kept: Some(0) });
        };
        let (row, old) = (row.value(), read_u64s(row.value()).map(|[next]| Self { next, kept: None }));
        let new = || read_u64s(row).map(|[next, kept]| Self { next, kept: Some(kept) });
        old.or_else(new).ok_or_else(|| damaged_row("seen"))
    }
}

/// The number that the scope's next id gets.
pub(super) fn next(seen: &impl ReadableTable<Row, Row>, scope: &str) -> Result<u64> {
    Ok(Ids::of(seen, scope)?.next)
}

/// Whether at least `max` ids have come since.
pub(super) fn is_forgotten(row: &InboxRow, next: u64, max: u64) -> bool {
    row.count == NUMBERED && row.first.saturating_add(max) < next
}

impl Transaction {
    /// The row of an id, unless so many have come since that it is forgotten.
    pub(super) fn remembered(&self, scope: &str, key: &[u8]) -> Result<Option<InboxRow>> {
        let row = self.seen(key)?;
        let Some(row) = row.filter(|row| row.count == NUMBERED) else { return Ok(row) };
        let Some(max) = self.core.settings.ids_forgotten_beyond() else { return Ok(Some(row)) };
        let next = self.engine(|| next(&self.redb().open_table(SEEN)?, scope))?;
        Ok(Some(row).filter(|row| !is_forgotten(row, next, max)))
    }

    /// Fails if a new id of the scope is to be refused.
    pub(super) fn admit_id(&self, scope: &str) -> Result<()> {
        let settings = &self.core.settings;
        let Some(ids_max) = settings.inbox_ids_max.filter(|_| settings.ids_policy == IdsPolicy::Refuse)
        else {
            return Ok(());
        };
        let kept = self.engine(|| {
            let ids = Ids::of(&self.redb().open_table(SEEN)?, scope)?;
            self.kept(scope, ids)
        })?;
        if kept >= ids_max {
            return Err(Error::InboxFull { scope: scope.to_owned(), ids_max });
        }
        Ok(())
    }

    /// The number of a new id, where ids have one. `key` is of its row, which may still stand though the id is forgotten.
    pub(super) fn next_id(&self, scope: &str, key: &[u8]) -> Result<Option<u64>> {
        if self.core.settings.inbox_ids_max.is_none() {
            return Ok(None);
        }
        let stands = self.seen(key)?.is_some_and(|row| row.count == NUMBERED);
        self.touch();
        self.engine(|| {
            let mut seen = self.redb().open_table(SEEN)?;
            let ids = Ids::of(&seen, scope)?;
            let kept = self.kept(scope, ids)?.saturating_add(u64::from(!stands));
            let after = [ids.next.saturating_add(1), kept];
            seen.insert(keys::inbox(scope, &[]).as_slice(), u64s(after).as_slice())?;
            Ok(Some(ids.next))
        })
    }

    /// How many are kept; counted once, where an earlier format did not.
    fn kept(&self, scope: &str, ids: Ids) -> Result<u64> {
        if let Some(kept) = ids.kept {
            return Ok(kept);
        }
        self.engine(|| {
            let (inbox, scope) = (self.redb().open_table(INBOX)?, keys::inbox(scope, &[]));
            let mut kept = 0;
            for row in inbox.range(scope.as_slice()..keys::after_prefix(&scope).as_slice())? {
                let row = InboxRow::from_bytes(row?.1.value());
                kept += u64::from(row.is_some_and(|row| row.count == NUMBERED));
            }
            Ok(kept)
        })
    }
}

/// Ids that a sweep removes, by scope.
#[derive(Debug, Default)]
pub(super) struct Fewer(BTreeMap<String, u64>);

impl Fewer {
    /// One of this scope goes, if it has a number.
    pub(super) fn note(&mut self, scope: Option<&str>) {
        if let Some(scope) = scope {
            *self.0.entry(scope.to_owned()).or_default() += 1;
        }
    }

    pub(super) fn write(self, tx: &WriteTransaction) -> Result<()> {
        for (scope, fewer) in self.0 {
            let mut seen = tx.open_table(SEEN)?;
            // Where they are not counted yet, those that are gone need not be taken off.
            if let Ids { next, kept: Some(kept) } = Ids::of(&seen, &scope)? {
                let row = u64s([next, kept.saturating_sub(fewer)]);
                seen.insert(keys::inbox(&scope, &[]).as_slice(), row.as_slice())?;
            }
        }
        Ok(())
    }
}
