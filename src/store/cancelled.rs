//! Rebuilds that were cancelled: which version of a projection, and what is still to be removed of it.
//!
//! ```text
//! onewrite.meta  "cancelled." name → version u64, id u64 of the rebuild whose tables and failures are left (0: none)
//! ```
//!
//! **Invariant.** The row is written in the transaction that takes the rebuild from the projection. So a crash in the middle of
//! the removal leaves the row, and the next start of the projection goes on.

use redb::{ReadTransaction, ReadableTable};

use super::Store;
use super::projections::{delete_any, shadow_prefix};
use super::schema::{FAILURES, META, read_u64s, u64s};
use super::transaction::Transaction;
use crate::error::Result;
use crate::limits::CANCEL_STEP;
use crate::log::keys::{self, CursorId};

fn key(name: &str) -> String {
    format!("cancelled.{name}")
}

/// The version whose rebuild was cancelled, and the number of the rebuild that is not removed yet.
fn read(
    meta: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Option<(u64, CursorId)>> {
    let row = meta.get(&*key(name))?;
    let numbers = row.and_then(|row| read_u64s(row.value()));
    Ok(numbers.and_then(|[version, id]| Some((version, id.try_into().ok()?))))
}

/// The version of the projection whose rebuild was cancelled.
pub(crate) fn cancelled_version(tx: &ReadTransaction, name: &str) -> Result<Option<u32>> {
    Ok(read(&tx.open_table(META)?, name)?.and_then(|(version, _)| version.try_into().ok()))
}

impl Transaction {
    /// Takes the rebuild from the projection; whether there was one.
    fn cancel_for_good(&self, name: &str) -> Result<bool> {
        let Some(rebuild) = self.take_rebuild(name)? else { return Ok(false) };
        self.forget_cancelled(name)?;
        let row = u64s([rebuild.version.into(), rebuild.id.into()]);
        self.redb().open_table(META)?.insert(&*key(name), row.as_slice())?;
        Ok(true)
    }

    /// Removes a piece of what a cancelled rebuild has left: some failures, or one table. Whether there may be more.
    pub(crate) fn clear_cancelled(&self, name: &str) -> Result<bool> {
        let Some((version, id)) = read(&self.redb().open_table(META)?, name)? else { return Ok(false) };
        if id == 0 {
            return Ok(false);
        }
        self.touch();
        let (from, to) = (id.to_be_bytes(), keys::after_prefix(&id.to_be_bytes()));
        let mut seqs = Vec::new();
        {
            let mut failures = self.redb().open_table(FAILURES)?;
            for row in failures.range(&from[..]..to.as_slice())?.take(CANCEL_STEP) {
                seqs.extend(keys::last_seq(row?.0.value()));
            }
            for seq in &seqs {
                failures.remove(&keys::exception(id, *seq)[..])?;
            }
        }
        if !seqs.is_empty() {
            self.release(&seqs)?;
            return Ok(true);
        }
        let (prefix, tx) = (shadow_prefix(id), self.redb());
        let plain = tx.list_tables()?.map(|table| redb::TableHandle::name(&table).to_owned());
        let multimap = tx.list_multimap_tables()?.map(|it| redb::MultimapTableHandle::name(&it).to_owned());
        let left = plain.chain(multimap).find(|table| table.starts_with(&prefix));
        let Some(table) = left else {
            tx.open_table(META)?.insert(&*key(name), u64s([version, 0]).as_slice())?;
            return Ok(false);
        };
        delete_any(tx, &table)?;
        Ok(true)
    }

    /// A rebuild is asked for again, or the projection is forgotten: nothing is left of the cancelled one.
    pub(super) fn forget_cancelled(&self, name: &str) -> Result<()> {
        while self.clear_cancelled(name)? {}
        self.touch();
        self.redb().open_table(META)?.remove(&*key(name))?;
        Ok(())
    }
}

impl Store {
    /// Cancels the rebuild of a projection, whether the projection runs or not. Returns whether there was a rebuild.
    ///
    /// The live tables stay as they are. When this returns the rebuild is cancelled durably, the log no longer waits for it, and
    /// what it had written is removed, one table for each transaction. A crash in between loses nothing: the next start of the
    /// projection goes on with the removal. The version stays cancelled until [`Projection::rebuild`](crate::Projection::rebuild)
    /// asks again, or another version runs: [`ProjectionState::Cancelled`](crate::ProjectionState::Cancelled).
    ///
    /// # Errors
    /// [`Error::NoSuchProjection`](crate::Error::NoSuchProjection), or as [`write`](Self::write).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::{Error, Event, FailurePolicy, ProjectionState};
    /// store.write(|tx| tx.append(Event::bytes("paid", "poison").unpublished()))?;
    /// store.projection("p").run(|_, _| Ok(()))?.await_live(Duration::from_secs(5))?;
    /// let second = store.projection("p").version(2).on_failure(FailurePolicy::Stop { attempts: 1 });
    /// let second = second.run(|_, _| Err(Error::app("cannot be applied")))?;
    /// assert!(second.await_live(Duration::from_secs(5)).is_err()); // it stands still, and the log waits for it
    /// assert!(store.cancel_rebuild("p")?);
    /// assert_eq!(store.stats()?.projections["p"].rebuilding, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cancel_rebuild(&self, name: &str) -> Result<bool> {
        let projection = name.to_owned();
        let cancelled = self.write(move |tx| tx.cancel_for_good(&projection))?.into_value();
        self.core().tail().trim_left = true;
        self.announce_ride();
        loop {
            let projection = name.to_owned();
            if !self.write(move |tx| tx.clear_cancelled(&projection))?.into_value() {
                return Ok(cancelled);
            }
        }
    }
}
