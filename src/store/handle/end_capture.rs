//! Ends the capture of a table.

use crate::error::{Error, Result};
use crate::storage::tables::cleanup::Task;
use crate::storage::tables::schema::CAPTURES;
use crate::store::handle::Store;
use crate::store::transaction::Transaction;

impl Store {
    /// Forgets that a table is captured: its changes no longer become events, and it may be opened like any other. When this
    /// returns `Ok`, that is durable. Dirty keys that still wait are dropped; what is in the log stays there.
    ///
    /// # Errors
    /// [`Error::CapturedTable`] where this process has registered it: open the store without it first;
    /// [`Error::NotCaptured`] if the file does not know it as captured.
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
        // Still under the write lock: nobody writes between the row's end and its being known.
        core.tail().captures.0.remove(name);
        Ok(())
    }
}
