//! Ids of deliveries by number: how many of a scope are kept.
//!
//! The row `(scope)` counts the ids that are kept. Where a store remembers so many ids of a scope at most, each new one gets the next
//! number of its scope, which stands in its inbox row; the row `(scope)` counts the numbers too. What becomes of a further id is the policy's:
//! [`IdsPolicy`](super::IdsPolicy).

use std::collections::BTreeMap;

use redb::{ReadableTable, WriteTransaction};

use super::Store;
use super::settings::IdsPolicy;
use super::transaction::Transaction;
use crate::error::{BoxError, Error, Result};
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{INBOX, InboxRow, KEYED, SEEN, read_u64s, scopes, u64s};

type Row = &'static [u8];

/// The count of an inbox row whose `first` is the number of its id: no closure leads to so many events.
pub(super) const NUMBERED: u32 = u32::MAX;

/// Whether a row is of the id of a delivery, and so among those that are kept.
pub(super) fn is_counted(row: &InboxRow) -> bool {
    row.count == NUMBERED || row.len & KEYED != 0
}

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
                kept += u64::from(row.as_ref().is_some_and(is_counted));
            }
            Ok(kept)
        })
    }
}

/// How many ids more are kept, or fewer, by scope.
#[derive(Debug, Default)]
pub(super) struct Difference(BTreeMap<String, i64>);

impl Difference {
    pub(super) fn more(&mut self, scope: Option<&str>) {
        self.note(scope, 1);
    }

    pub(super) fn fewer(&mut self, scope: Option<&str>) {
        self.note(scope, -1);
    }

    fn note(&mut self, scope: Option<&str>, by: i64) {
        let Some(scope) = scope else { return };
        match self.0.get_mut(scope) {
            Some(difference) => *difference += by,
            None => _ = self.0.insert(scope.to_owned(), by),
        }
    }

    pub(super) fn write(self, tx: &WriteTransaction) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut seen = tx.open_table(SEEN)?;
        for (scope, difference) in self.0 {
            // Where they are not counted yet, there is nothing to change.
            if let Ids { next, kept: Some(kept) } = Ids::of(&seen, &scope)? {
                let row = u64s([next, kept.saturating_add_signed(difference)]);
                seen.insert(keys::inbox(&scope, &[]).as_slice(), row.as_slice())?;
            }
        }
        Ok(())
    }
}

/// Files of before format 6 counted ids with a number alone.
pub(super) fn count_ids(tx: &WriteTransaction) -> std::result::Result<(), BoxError> {
    let (inbox, mut seen) = (tx.open_table(INBOX)?, tx.open_table(SEEN)?);
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for row in inbox.iter()? {
        let (key, row) = row?;
        let row = InboxRow::from_bytes(row.value());
        if let Some(scope) = keys::scope_of(key.value()).filter(|_| row.as_ref().is_some_and(is_counted)) {
            *counts.entry(scope.to_owned()).or_default() += 1;
        }
    }
    for (scope, kept) in counts {
        let row = u64s([next(&seen, &scope)?, kept]);
        seen.insert(keys::inbox(&scope, &[]).as_slice(), row.as_slice())?;
    }
    Ok(())
}

impl Store {
    /// How many ids each scope keeps.
    pub(super) fn ids_kept(&self) -> Result<Vec<(String, u64)>> {
        self.core().reading(|tx| {
            let (seen, mut kept) = (tx.open_table(SEEN)?, Vec::new());
            for scope in scopes(&seen, "seen")? {
                let ids = Ids::of(&seen, &scope)?.kept.unwrap_or_default();
                kept.push((scope, ids));
            }
            Ok(kept)
        })
    }
}
