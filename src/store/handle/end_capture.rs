//! Ends the capture of a table.

use crate::error::{Error, Result};
use crate::storage::tables::cleanup::Task;
use crate::storage::tables::schema::CAPTURES;
use crate::store::handle::Store;
use crate::store::transaction::Transaction;

impl Store {
    /// Ends the capture of a table: its changes no longer become events, and the application may
    /// open the table like any other.
    ///
    /// When this call returns `Ok`, the end is durable. Dirty keys that still wait are dropped.
    /// Events that are in the log stay there.
    ///
    /// # Errors
    /// [`Error::CapturedTable`] if this process has registered the table: open the store without
    /// the capture first. [`Error::NotCaptured`] if the file does not know the table as captured.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("a.redb");
    /// use onewrite::{Capture, Error, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).unpublished();
    /// Store::builder().capture(accounts).open(&path)?.close()?;
    ///
    /// let store = Store::open(&path)?; // a version of the application that captures no more
    /// let write = || store.write(|tx| Ok(tx.open_table(ACCOUNTS)?.insert("alice", 100).map(drop)?));
    /// assert!(matches!(write(), Err(Error::CapturedTable { name }) if name == "accounts")); // nobody would hear of it
    /// store.end_capture("accounts")?;
    /// write()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn end_capture(&self, name: &str) -> Result<()> {
        let core = self.core();
        core.refuse_reentrant("Store::end_capture")?;
        if core.settings.captures.get(name).is_some() {
            return Err(Error::CapturedTable { name: name.to_owned() });
        }
        let mut tx = Transaction::begin(core, "`Store::end_capture`")?;
        let id = core.tail().captures.get(name).map(|known| known.row.id);
        let id = id.ok_or_else(|| Error::NotCaptured { name: name.to_owned() })?;
        tx.engine(|| {
            tx.leave(&Task::DirtyKeys(id))?;
            tx.redb().open_table(CAPTURES)?.remove(name)?;
            Ok(())
        })?;
        tx.finish(1)?;
        // The thread still holds the write lock. So no write comes between the removal of the row
        // and the removal from memory.
        core.tail().captures.0.remove(name);
        Ok(())
    }
}
