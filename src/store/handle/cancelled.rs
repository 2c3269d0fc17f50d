//! Cancelled rebuilds: which version of a projection was cancelled.
//!
//! ```text
//! onewrite.meta  "cancelled." name → version u64, 0 u64
//! ```
//!
//! An older release stored the number of a cancelled rebuild as the second number, while tables and
//! failures of the rebuild were left. Now a task of the
//! [clean-up](crate::store::transaction::cleanup) names what is left.
//!
//! **Invariant.** One transaction takes the rebuild from the projection and writes the row and the
//! tasks. So a crash in the middle of the removal leaves the tasks, and the next opening goes on.

use redb::ReadTransaction;

use crate::error::Result;
use crate::log::keys::CursorId;
use crate::storage::tables::schema::{META, read_u64s, u64s};
use crate::store::handle::Store;
use crate::store::transaction::Transaction;
use crate::store::transaction::cleanup::rebuild_tasks;
use crate::tuning::CLEAN_STEP;

fn key(name: &str) -> String {
    format!("cancelled.{name}")
}

/// The version of the projection whose rebuild was cancelled.
pub(crate) fn cancelled_version(tx: &ReadTransaction, name: &str) -> Result<Option<u32>> {
    let row = tx.open_table(META)?.get(&*key(name))?.and_then(|row| read_u64s(row.value()));
    Ok(row.and_then(|[version, _]| version.try_into().ok()))
}

impl Transaction {
    /// Takes the rebuild from the projection. Returns the rebuild's number, if there was a rebuild.
    fn cancel_for_good(&self, name: &str) -> Result<Option<CursorId>> {
        let Some(rebuild) = self.take_rebuild(name)? else { return Ok(None) };
        self.drop_rebuild(rebuild)?;
        self.redb().open_table(META)?.insert(&*key(name), u64s([rebuild.version.into(), 0]).as_slice())?;
        Ok(Some(rebuild.id))
    }

    /// Removes the row, when a rebuild is requested again or the projection is forgotten.
    pub(crate) fn forget_cancelled(&self, name: &str) -> Result<()> {
        self.touch();
        self.redb().open_table(META)?.remove(&*key(name))?;
        Ok(())
    }
}

impl Store {
    /// Cancels the rebuild of a projection, whether the projection runs or not. Returns whether
    /// there was a rebuild.
    ///
    /// The live tables stay as they are. When this call returns, the rebuild is cancelled durably,
    /// the log no longer waits for it, and its tables and failures are removed, one table per
    /// transaction. A crash in between loses nothing: the next opening of the store goes on with
    /// the removal. The version stays cancelled until
    /// [`Projection::rebuild`](crate::Projection::rebuild) requests it again, or another version
    /// runs: [`ProjectionState::Cancelled`](crate::ProjectionState::Cancelled).
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
    /// store.projection("p").spawn(|_, _| Ok(()))?.wait_until_live(Duration::from_secs(5))?;
    /// let second = store.projection("p").version(2).on_failure(FailurePolicy::Stop { attempts: 1 });
    /// let second = second.spawn(|_, _| Err(Error::app("cannot be applied")))?;
    /// assert!(second.wait_until_live(Duration::from_secs(5)).is_err()); // it stands still, and the log waits for it
    /// assert!(store.cancel_rebuild("p")?);
    /// assert_eq!(store.stats()?.projections["p"].rebuilding, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cancel_rebuild(&self, name: &str) -> Result<bool> {
        let projection = name.to_owned();
        let cancelled = self.write(move |tx| tx.cancel_for_good(&projection))?.into_value();
        self.core().tail().trim_left = true;
        self.announce_progress();
        for task in cancelled.iter().flat_map(|id| rebuild_tasks(*id)) {
            loop {
                let task = task.clone();
                if !self.write(move |tx| tx.clean(&task, &mut { CLEAN_STEP }))?.into_value() {
                    break;
                }
            }
        }
        Ok(cancelled.is_some())
    }
}
