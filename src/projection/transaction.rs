//! The transaction that a projection's handler writes into.

use redb::{
    Key, MultimapTable, MultimapTableDefinition, MultimapTableHandle, Table, TableDefinition, TableHandle,
    Value,
};

use crate::error::{Error, Result};
use crate::store::shared::projections::OwnedTables;
use crate::store::transaction::Transaction;

/// The tables that a projection's handler may write: those that the projection owns, and no others.
///
/// During a rebuild, the same handler writes the tables that will take their place.
///
/// ```
/// use std::time::Duration;
/// use onewrite::{Event, ProjectionTransaction, redb::{ReadableTable, TableDefinition}};
/// const COUNTS: TableDefinition<&str, u64> = TableDefinition::new("counts");
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
/// let counts = store.projection("counts").table(COUNTS).spawn(|event, tx: &ProjectionTransaction<'_>| {
///     let mut counts = tx.open_table(COUNTS)?;
///     let count = counts.get(event.event_type())?.map_or(0, |row| row.value());
///     counts.insert(event.event_type(), count + 1)?;
///     Ok(())
/// })?;
/// counts.wait_for_position(0, Duration::from_secs(5))?;
/// assert_eq!(store.read()?.open_table(COUNTS)?.get("paid")?.map(|row| row.value()), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ProjectionTransaction<'tx> {
    pub(super) tx: &'tx Transaction,
    pub(super) owned: &'tx OwnedTables,
    /// The prefix of the tables' names in a rebuild.
    pub(super) prefix: Option<String>,
}

impl<'tx> ProjectionTransaction<'tx> {
    /// Opens one of the projection's tables for reading and writing. Creates the table if there is
    /// none.
    ///
    /// # Errors
    /// [`Error::UndeclaredTable`] for a table that the projection has not
    /// [declared](crate::ProjectionBuilder::table); errors of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// use onewrite::{Event, FailurePolicy, redb::TableDefinition};
    /// const OTHER: TableDefinition<&str, u64> = TableDefinition::new("other");
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let counts = store.projection("counts").on_failure(FailurePolicy::Stop { attempts: 1 })
    ///     .spawn(|_, tx| tx.open_table(OTHER).map(drop))?;
    /// let error = counts.wait_for_position(0, Duration::from_secs(5)).unwrap_err();
    /// assert!(error.to_string().contains("other"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_table<K: Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<'_, K, V>,
    ) -> Result<Table<'tx, K, V>> {
        let name = self.name(TableHandle::name(&definition), &self.owned.plain)?;
        self.tx.touch();
        Ok(self.tx.redb().open_table(TableDefinition::<K, V>::new(&name))?)
    }

    /// Opens one of the projection's multimap tables for reading and writing. Creates the table if
    /// there is none.
    ///
    /// # Errors
    /// As [`open_table`](Self::open_table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// use onewrite::{Event, redb::MultimapTableDefinition};
    /// const BY_TYPE: MultimapTableDefinition<&str, u64> = MultimapTableDefinition::new("by type");
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let by_type = store.projection("by type").multimap_table(BY_TYPE).spawn(|event, tx| {
    ///     tx.open_multimap_table(BY_TYPE)?.insert(event.event_type(), event.seq())?;
    ///     Ok(())
    /// })?;
    /// by_type.wait_for_position(0, Duration::from_secs(5))?;
    /// assert_eq!(store.read()?.open_multimap_table(BY_TYPE)?.get("paid")?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_multimap_table<K: Key + 'static, V: Key + 'static>(
        &self,
        definition: MultimapTableDefinition<'_, K, V>,
    ) -> Result<MultimapTable<'tx, K, V>> {
        let name = self.name(MultimapTableHandle::name(&definition), &self.owned.multimap)?;
        self.tx.touch();
        Ok(self.tx.redb().open_multimap_table(MultimapTableDefinition::<K, V>::new(&name))?)
    }

    /// Whether this writes the tables of a rebuild, which readers do not see yet.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::Duration;
    /// # use onewrite::Event;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let projection = store.projection("counts").spawn(|_, tx| {
    ///     assert!(!tx.is_rebuild());
    ///     Ok(())
    /// })?;
    /// projection.wait_for_position(0, Duration::from_secs(5))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_rebuild(&self) -> bool {
        self.prefix.is_some()
    }

    fn name(&self, name: &str, owned: &[String]) -> Result<String> {
        self.tx.owned()?;
        if !owned.iter().any(|table| table == name) {
            return Err(Error::UndeclaredTable { name: name.to_owned() });
        }
        if self.tx.core.tail().captures.holds(name) {
            return Err(Error::CapturedTable { name: name.to_owned() });
        }
        Ok(format!("{}{name}", self.prefix.as_deref().unwrap_or_default()))
    }
}
