//! Rows and tables of projections within a transaction.
//!
//! **Invariant.** The tables of a rebuild carry other names until the rebuild has caught up. One
//! transaction then puts them in the place of the old tables.

use redb::{MultimapTableDefinition, TableDefinition, WriteTransaction};

use crate::error::{Error, Result};
use crate::log::keys::CursorId;
use crate::storage::tables::projection::{ProjectionRow, Track, Which};
use crate::storage::tables::schema::PROJECTIONS;
use crate::store::shared::projections::{OwnedTables, replaced_prefix, shadow_prefix};
use crate::store::transaction::Transaction;
use crate::store::transaction::cleanup::rebuild_tasks;

/// Returns a definition for deleting and renaming, which look at the name only.
pub(crate) fn plain(name: &str) -> TableDefinition<'_, u64, u64> {
    TableDefinition::new(name)
}

pub(crate) fn multimap(name: &str) -> MultimapTableDefinition<'_, u64, u64> {
    MultimapTableDefinition::new(name)
}

/// Deletes a table of this name, of either kind: the table of an earlier version may have been of
/// the other kind.
pub(in crate::store) fn delete_any(tx: &WriteTransaction, name: &str) -> Result<()> {
    match tx.delete_table(plain(name)) {
        Err(redb::TableError::TableIsMultimap(_)) => tx.delete_multimap_table(multimap(name))?,
        deleted => deleted?,
    };
    Ok(())
}

/// Renames a table, of either kind, if there is one of this name.
fn rename_any(tx: &WriteTransaction, from: &str, to: &str) -> Result<()> {
    let renamed = match tx.rename_table(plain(from), plain(to)) {
        Err(redb::TableError::TableIsMultimap(_)) => tx.rename_multimap_table(multimap(from), multimap(to)),
        renamed => renamed,
    };
    match renamed {
        Ok(()) | Err(redb::TableError::TableDoesNotExist(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl OwnedTables {
    /// Puts the tables of a rebuild in the place of the old tables. An old table that the rebuild
    /// has not opened is then gone. The old tables are renamed, not deleted: freeing their pages
    /// would take this transaction longer, the larger they are.
    pub(crate) fn swap(&self, tx: &WriteTransaction, rebuild: CursorId) -> Result<()> {
        let (new, old) = (shadow_prefix(rebuild), replaced_prefix(rebuild));
        for name in self.names() {
            rename_any(tx, name, &format!("{old}{name}"))?;
            rename_any(tx, &format!("{new}{name}"), name)?;
        }
        Ok(())
    }
}

impl Transaction {
    pub(crate) fn track(&self, name: &str, which: Which) -> Result<Track> {
        let track = self.projection_row(name)?.track(which);
        track.ok_or_else(|| Error::NoSuchProjection { name: name.to_owned() })
    }

    pub(crate) fn projection_row(&self, name: &str) -> Result<ProjectionRow> {
        if let Some(row) = self.pending.borrow().projections.get(name) {
            return Ok(*row);
        }
        let row = self.core.tail().projections.get(name).copied();
        row.ok_or_else(|| Error::NoSuchProjection { name: name.to_owned() })
    }

    pub(crate) fn write_projection_row(&self, name: &str, row: ProjectionRow) -> Result<()> {
        // Only a rollback of the whole transaction takes the row back, and everything pending goes
        // with it.
        self.touch();
        self.redb().open_table(PROJECTIONS)?.insert(name, row.to_bytes(name).as_slice())?;
        self.pending.borrow_mut().projections.insert(name.to_owned(), row);
        Ok(())
    }

    /// Takes the rebuild from the projection, and leaves its tables and failures where they are.
    pub(in crate::store) fn take_rebuild(&self, name: &str) -> Result<Option<Track>> {
        let mut row = self.projection_row(name)?;
        let taken = row.rebuild.take();
        if taken.is_some() {
            self.write_projection_row(name, row)?;
        }
        Ok(taken)
    }

    /// Forgets an abandoned rebuild: its failures and its tables. The tables' names say that they
    /// belong to the rebuild.
    pub(crate) fn drop_rebuild(&self, rebuild: Track) -> Result<()> {
        rebuild_tasks(rebuild.id).iter().try_for_each(|task| self.leave(task))
    }

    pub(crate) fn release(&self, seqs: &[u64]) -> Result<()> {
        let tail = self.core.tail();
        crate::store::transaction::commit::drop_released(
            self.redb(),
            &tail,
            &self.pending.borrow(),
            tail.trimmed_to,
            seqs,
        )
    }
}
