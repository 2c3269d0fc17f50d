//! Ids of deliveries by number: how many ids of a scope are kept.
//!
//! The row `(scope)` counts the ids that are kept. If a store limits the ids of a scope, each new
//! id gets the next number of its scope. The id's inbox row holds the number, and the row `(scope)`
//! counts the numbers too. [`IdsPolicy`](crate::store::IdsPolicy) decides what happens to an id
//! beyond the limit.

use redb::ReadableTable;

use crate::error::{Error, Result};
use crate::log::keys;
use crate::storage::tables::ids::{Ids, NUMBERED, is_counted, is_forgotten, next};
use crate::storage::tables::schema::{DEDUP, INBOX, InboxRow, scopes, u64s};
use crate::store::Store;
use crate::store::settings::IdsPolicy;
use crate::store::transaction::Transaction;

impl Transaction {
    /// Returns the row of an id, unless later ids have displaced it and it is forgotten.
    pub(crate) fn remembered(&self, scope: &str, key: &[u8]) -> Result<Option<InboxRow>> {
        let row = self.inbox_row(key)?;
        let Some(row) = row.filter(|row| row.count == NUMBERED) else { return Ok(row) };
        let Some(max) = self.core.settings.ids_forgotten_beyond() else { return Ok(Some(row)) };
        let next = self.engine(|| next(&self.redb().open_table(DEDUP)?, scope))?;
        Ok(Some(row).filter(|row| !is_forgotten(row, next, max)))
    }

    /// Fails if a new id of the scope is to be refused.
    pub(crate) fn admit_id(&self, scope: &str) -> Result<()> {
        let settings = &self.core.settings;
        let Some(ids_max) = settings.inbox_ids_max.filter(|_| settings.ids_policy == IdsPolicy::Refuse)
        else {
            return Ok(());
        };
        let kept = self.engine(|| {
            let ids = Ids::of(&self.redb().open_table(DEDUP)?, scope)?;
            self.kept(scope, ids)
        })?;
        if kept >= ids_max {
            return Err(Error::InboxFull { scope: scope.to_owned(), ids_max });
        }
        Ok(())
    }

    /// Returns the number of a new id, if ids have numbers. `key` is that of its row, which may
    /// still stand although the id is forgotten.
    pub(crate) fn next_id(&self, scope: &str, key: &[u8]) -> Result<Option<u64>> {
        if self.core.settings.inbox_ids_max.is_none() {
            return Ok(None);
        }
        let stands = self.inbox_row(key)?.is_some_and(|row| row.count == NUMBERED);
        self.touch();
        self.engine(|| {
            let mut dedup = self.redb().open_table(DEDUP)?;
            let ids = Ids::of(&dedup, scope)?;
            let kept = self.kept(scope, ids)?.saturating_add(u64::from(!stands));
            let after = [ids.next.saturating_add(1), kept];
            dedup.insert(keys::inbox(scope, &[]).as_slice(), u64s(after).as_slice())?;
            Ok(Some(ids.next))
        })
    }

    /// Returns how many ids are kept. Counts them once if an earlier format did not.
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

impl Store {
    /// How many ids each scope keeps.
    pub(crate) fn ids_kept(&self) -> Result<Vec<(String, u64)>> {
        self.core().reading(|tx| {
            let (dedup, mut kept) = (tx.open_table(DEDUP)?, Vec::new());
            for scope in scopes(&dedup, "seen")? {
                let ids = Ids::of(&dedup, &scope)?.kept.unwrap_or_default();
                kept.push((scope, ids));
            }
            Ok(kept)
        })
    }
}
