//! The only way to write a captured table.

use std::borrow::Borrow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use redb::{
    AccessGuard, Key, ReadableTable, ReadableTableMetadata, Table, TableDefinition, TableHandle, Value,
};

use super::erased::{Captured, RawChange, Types};
use super::rows::{CaptureId, MarkKind, mark_key};
use super::{CaptureMode, Operation};
use crate::error::{Error, Result};
use crate::store::transaction::Transaction;

/// A captured table, open in a [`Transaction`]: each of its changes is in the log, or marked, in the same transaction.
///
/// It is written through these methods alone; [`read`](Self::read) has everything that only reads. To leak it, or a guard
/// that it returns ([`std::mem::forget`]), is not supported: row and event may then differ.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed");
/// let store = Store::builder().capture(accounts).open(folder.path().join("bank.redb"))?;
/// store.write(|tx| {
///     let mut accounts = tx.captured_table(ACCOUNTS)?;
///     let balance = accounts.get("alice")?.map_or(500, |row| row.value());
///     accounts.insert("alice", balance - 100)?;
///     assert_eq!(accounts.read().range("a".."b")?.count(), 1);
///     Ok(())
/// })?;
/// assert_eq!(store.stats()?.next_seq, 1); // the change is an event
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CapturedTable<'tx, K: Key + 'static, V: Value + 'static> {
    table: Table<'tx, K, V>,
    tx: &'tx Transaction,
    capture: Arc<dyn Captured>,
    id: CaptureId,
}

impl<K: Key + 'static, V: Value + 'static> std::fmt::Debug for CapturedTable<'_, K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CapturedTable").field(&self.capture.name()).finish()
    }
}

impl Transaction {
    /// Opens a table that is [registered as captured](crate::StoreBuilder::capture), creating it if there is none.
    ///
    /// # Errors
    /// [`Error::NotCaptured`] for a table that is not registered, [`Error::CaptureTypes`] for one that is registered with
    /// other types; what redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Error, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// const OTHER: TableDefinition<&str, u64> = TableDefinition::new("other");
    /// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed");
    /// let store = Store::builder().capture(accounts).open(folder.path().join("bank.redb"))?;
    /// let tx = store.begin()?;
    /// tx.captured_table(ACCOUNTS)?.insert("alice", 100)?;
    /// assert!(matches!(tx.captured_table(OTHER), Err(Error::NotCaptured { name }) if name == "other"));
    /// assert!(matches!(tx.open_table(ACCOUNTS), Err(Error::CapturedTable { .. }))); // not around the capture
    /// assert_eq!(tx.commit()?.seqs(), [0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn captured_table<K: Key + 'static, V: Value + 'static>(
        &self,
        definition: TableDefinition<'_, K, V>,
    ) -> Result<CapturedTable<'_, K, V>> {
        self.owned()?;
        let name = definition.name();
        let unknown = || Error::NotCaptured { name: name.to_owned() };
        let capture = Arc::clone(self.core.settings.captures.get(name).ok_or_else(unknown)?);
        let (registered, asked) = (capture.types(), Types::of::<K, V>());
        if registered != asked {
            let (registered, asked) = (registered.to_string(), asked.to_string());
            return Err(Error::CaptureTypes { name: name.to_owned(), registered, asked });
        }
        let id = self.core.tail().captures.get(name).map(|known| known.row.id).ok_or_else(unknown)?;
        self.touch();
        Ok(CapturedTable { table: self.redb().open_table(definition)?, tx: self, capture, id })
    }
}

impl<K: Key + 'static, V: Value + 'static> CapturedTable<'_, K, V> {
    /// The table for reading: ranges, iterators, the first and the last row.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// let mut accounts = tx.captured_table(ACCOUNTS)?;
    /// accounts.insert("alice", 100)?;
    /// accounts.insert("bob", 50)?;
    /// assert_eq!(accounts.read().last()?.map(|(key, _)| key.value().to_owned()), Some("bob".to_owned()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read(&self) -> &impl ReadableTable<K, V> {
        &self.table
    }

    /// The value of this key, this transaction's own changes included.
    ///
    /// # Errors
    /// What redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// let mut accounts = tx.captured_table(ACCOUNTS)?;
    /// accounts.insert("alice", 100)?;
    /// assert_eq!(accounts.get("alice")?.map(|row| row.value()), Some(100));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn get<'k>(&self, key: impl Borrow<K::SelfType<'k>>) -> Result<Option<AccessGuard<'_, V>>> {
        self.tx.owned()?;
        Ok(self.table.get(key)?)
    }

    /// How many rows it has.
    ///
    /// # Errors
    /// What redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// let mut accounts = tx.captured_table(ACCOUNTS)?;
    /// accounts.insert("alice", 100)?;
    /// assert_eq!(accounts.len()?, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn len(&self) -> Result<u64> {
        self.tx.owned()?;
        Ok(self.table.len()?)
    }

    /// Whether it has no row.
    ///
    /// # Errors
    /// What redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// assert!(tx.captured_table(ACCOUNTS)?.is_empty()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.table.is_empty()?)
    }

    /// Sets the value of a key, and returns the one before. One that is equal to it is a change too.
    ///
    /// # Errors
    /// What the codec says, or [`append`](Transaction::append), or redb: row and log are then as they were.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// let mut accounts = tx.captured_table(ACCOUNTS)?;
    /// assert!(accounts.insert("alice", 100)?.is_none());
    /// assert_eq!(accounts.insert("alice", 70)?.map(|row| row.value()), Some(100));
    /// assert_eq!(tx.next_seq(), 2); // two events
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn insert<'k, 'v>(
        &mut self,
        key: impl Borrow<K::SelfType<'k>>,
        value: impl Borrow<V::SelfType<'v>>,
    ) -> Result<Option<AccessGuard<'_, V>>> {
        self.tx.owned()?;
        let (key, value) = (key.borrow(), value.borrow());
        let key_bytes = K::as_bytes(key);
        match self.capture.mode() {
            CaptureMode::NewestValue => {
                let old = self.table.insert(key, value)?;
                self.tx.note_mark(mark_key(self.id, key_bytes.as_ref()), MarkKind::Change);
                Ok(old)
            }
            CaptureMode::EveryChange => {
                let event = {
                    let old = self.table.get(key)?.map(|row| V::as_bytes(&row.value()).as_ref().to_vec());
                    let operation = if old.is_some() { Operation::Update } else { Operation::Insert };
                    let new = V::as_bytes(value);
                    self.capture.encode(RawChange {
                        operation,
                        key: key_bytes.as_ref(),
                        new: Some(new.as_ref()),
                        old: old.as_deref(),
                    })?
                };
                self.tx.append_with(event, || self.table.insert(key, value))
            }
        }
    }

    /// Removes a key, and returns its value. One that is not there is no change.
    ///
    /// # Errors
    /// As [`insert`](Self::insert).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// let mut accounts = tx.captured_table(ACCOUNTS)?;
    /// accounts.insert("alice", 100)?;
    /// assert_eq!(accounts.remove("alice")?.map(|row| row.value()), Some(100));
    /// assert!(accounts.remove("alice")?.is_none());
    /// assert_eq!(tx.next_seq(), 2); // the insert and the remove
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn remove<'k>(&mut self, key: impl Borrow<K::SelfType<'k>>) -> Result<Option<AccessGuard<'_, V>>> {
        self.tx.owned()?;
        let key = key.borrow();
        let key_bytes = K::as_bytes(key);
        match self.capture.mode() {
            CaptureMode::NewestValue => {
                let old = self.table.remove(key)?;
                if old.is_some() {
                    self.tx.note_mark(mark_key(self.id, key_bytes.as_ref()), MarkKind::Change);
                }
                Ok(old)
            }
            CaptureMode::EveryChange => {
                let old = self.table.get(key)?.map(|row| V::as_bytes(&row.value()).as_ref().to_vec());
                let Some(old) = old else { return Ok(None) };
                let event = self.capture.encode(removed(key_bytes.as_ref(), &old))?;
                self.tx.append_with(event, || self.table.remove(key))
            }
        }
    }

    /// Keeps the rows for which `keep` is true. Each that goes is a change.
    ///
    /// # Errors
    /// As [`insert`](Self::insert). Rows that went before it are gone, each with its event.
    ///
    /// # Panics
    /// If `keep` or the codec does. Rows that went before it are gone, each with its event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # use onewrite::{Capture, Store, redb::{ReadableTable, TableDefinition}};
    /// # const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// # let store = Store::builder().capture(Capture::json(ACCOUNTS).unpublished()).open(folder.path().join("a.redb"))?;
    /// # let tx = store.begin()?;
    /// let mut accounts = tx.captured_table(ACCOUNTS)?;
    /// accounts.insert("alice", 100)?;
    /// accounts.insert("bob", 0)?;
    /// accounts.retain(|_, balance| balance > 0)?;
    /// assert_eq!(accounts.len()?, 1);
    /// assert_eq!(tx.next_seq(), 3); // two inserts, one remove
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn retain(
        &mut self,
        mut keep: impl for<'f> FnMut(K::SelfType<'f>, V::SelfType<'f>) -> bool,
    ) -> Result<()> {
        self.tx.owned()?;
        let Self { table, tx, capture, id } = self;
        let (mut failed, mut panicked) = (None, None);
        let retained = table.retain(|key, value| {
            if failed.is_some() || panicked.is_some() {
                return true;
            }
            // A panic goes around redb: one that left it in the middle would make the whole group impossible to commit, also
            // where the closure catches it.
            let kept = catch_unwind(AssertUnwindSafe(|| {
                // redb hands both over for good: what is still needed of them is copied first.
                let key_bytes = K::as_bytes(&key).as_ref().to_vec();
                let value_bytes = V::as_bytes(&value).as_ref().to_vec();
                if keep(key, value) {
                    return Ok(true);
                }
                match capture.mode() {
                    CaptureMode::NewestValue => tx.note_mark(mark_key(*id, &key_bytes), MarkKind::Change),
                    CaptureMode::EveryChange => {
                        let event = capture.encode(removed(&key_bytes, &value_bytes))?;
                        tx.append(event)?;
                    }
                }
                Ok(false)
            }));
            match kept {
                Ok(Ok(kept)) => return kept,
                Ok(Err(error)) => failed = Some(error),
                Err(panic) => panicked = Some(panic),
            }
            true
        });
        if let Some(panic) = panicked {
            resume_unwind(panic);
        }
        retained?;
        failed.map_or(Ok(()), Err)
    }
}

fn removed<'a>(key: &'a [u8], old: &'a [u8]) -> RawChange<'a> {
    RawChange { operation: Operation::Remove, key, new: None, old: Some(old) }
}
