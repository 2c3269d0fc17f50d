//! The only way to write a captured table.

use std::borrow::Borrow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use redb::{
    AccessGuard, Key, ReadableTable, ReadableTableMetadata, Table, TableDefinition, TableHandle, Value,
};

use crate::error::{Error, Result};
use crate::storage::tables::capture::{CaptureId, CaptureMode, DirtyKind, dirty_key};
use crate::store::settings::capture::Operation;
use crate::store::settings::capture_stored::{self, Found, Unreadable};
use crate::store::settings::capture_types::{Captured, Old, RawChange, Types};
use crate::store::transaction::Transaction;
use crate::store::transaction::gathered::Amount;

/// A captured table, open in a [`Transaction`]. Each change is in the log, or recorded as dirty, in
/// the same transaction.
///
/// The table is written through these methods alone; [`read`](Self::read) has everything that only
/// reads. Leaking the table, or a guard that it returns ([`std::mem::forget`]), is not supported:
/// row and event may then differ.
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
    /// The table has dirty rows: a write may mend one of them.
    has_dirty_keys: bool,
}

impl<K: Key + 'static, V: Value + 'static> std::fmt::Debug for CapturedTable<'_, K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CapturedTable").field(&self.capture.name()).finish()
    }
}

impl Transaction {
    /// Opens a table that is [registered as captured](crate::StoreBuilder::capture), and creates it
    /// if there is none.
    ///
    /// # Errors
    /// - [`Error::NotCaptured`] for a table that is not registered.
    /// - [`Error::CaptureTypes`] for a table that is registered with other types.
    /// - An error of redb.
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
        let known = self.core.tail().captures.get(name).map(|known| (known.row.id, known.waiting > 0));
        let (id, has_dirty_keys) = known.ok_or_else(unknown)?;
        self.touch();
        let table = self.engine(|| Ok(self.redb().open_table(definition)?))?;
        Ok(CapturedTable { table, tx: self, capture, id, has_dirty_keys })
    }
}

impl<K: Key + 'static, V: Value + 'static> CapturedTable<'_, K, V> {
    /// Returns the table for reading: ranges, iterators, the first and the last row.
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

    /// Returns the value of this key, this transaction's own changes included.
    ///
    /// # Errors
    /// An error of redb.
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
        self.tx.engine(|| Ok(self.table.get(key)?))
    }

    /// Returns how many rows the table has.
    ///
    /// # Errors
    /// An error of redb.
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
        self.tx.engine(|| Ok(self.table.len()?))
    }

    /// Returns whether the table has no row.
    ///
    /// # Errors
    /// An error of redb.
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
        self.tx.engine(|| Ok(self.table.is_empty()?))
    }

    /// Sets the value of a key, and returns the value before. Setting an equal value is a change
    /// too.
    ///
    /// # Errors
    /// The error of the codec, of [`append`](Transaction::append) or of redb. Row and log are then
    /// as they were.
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
                let table = &mut self.table;
                let old = self.tx.engine(move || Ok(table.insert(key, value)?))?;
                self.tx.note_dirty_key(dirty_key(self.id, key_bytes.as_ref()), DirtyKind::Change)?;
                Ok(old)
            }
            CaptureMode::EveryChange => {
                let new = V::as_bytes(value);
                let (was_there, old) = self.old(key)?;
                let event = self.capture.encode(RawChange {
                    operation: if was_there { Operation::Update } else { Operation::Insert },
                    key: key_bytes.as_ref(),
                    new: Some(new.as_ref()),
                    old: Old::found(&old),
                })?;
                self.note_written(key_bytes.as_ref());
                self.tx.append_with(event, || self.table.insert(key, value))
            }
        }
    }

    /// Removes a key, and returns its value. If the key is not there, nothing changes.
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
                let table = &mut self.table;
                let old = self.tx.engine(move || Ok(table.remove(key)?))?;
                if old.is_some() {
                    self.tx.note_dirty_key(dirty_key(self.id, key_bytes.as_ref()), DirtyKind::Change)?;
                }
                Ok(old)
            }
            CaptureMode::EveryChange => {
                let (was_there, old) = self.old(key)?;
                if !was_there {
                    return Ok(None);
                }
                let event = self.capture.encode(removed(key_bytes.as_ref(), Old::found(&old)))?;
                self.note_written(key_bytes.as_ref());
                self.tx.append_with(event, || self.table.remove(key))
            }
        }
    }

    /// Whether there is a row, and the bytes of its value if events carry old values.
    fn old(&self, key: &K::SelfType<'_>) -> Result<(bool, Found)> {
        let row = self.tx.engine(|| Ok(self.table.get(key)?))?;
        let wanted = row.as_ref().filter(|_| self.capture.wants_old());
        Ok((row.is_some(), wanted.map(capture_stored::bytes_of).transpose()))
    }

    /// Notes a written row. A dirty row that could not be published then need not wait for its next
    /// try.
    fn note_written(&self, key: &[u8]) {
        if self.has_dirty_keys {
            self.tx.note_written(dirty_key(self.id, key));
        }
    }

    /// Removes all rows. Each removal is a change.
    ///
    /// The call decodes a value only if an event carries it
    /// ([`Capture::old_values`](crate::Capture::old_values)). So the call also removes rows that
    /// their type cannot read.
    ///
    /// # Errors
    /// As [`insert`](Self::insert). A row that cannot be removed stays, and the others go, each
    /// with its event. The error is that of the first row that stays. The call ends early on an
    /// error that concerns all rows: an error of redb, the backlog quota, or the transaction's
    /// limits.
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
    /// accounts.clear()?;
    /// assert!(accounts.is_empty()?);
    /// assert_eq!(tx.next_seq(), 4); // two inserts, two removes
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clear(&mut self) -> Result<()> {
        self.tx.owned()?;
        let (keys, mut first) = (self.stored_keys()?, None);
        for key in keys {
            let removed = match key {
                Ok(key) => self.remove_stored(&key),
                Err(Unreadable) => Err(self.capture.unreadable(&[])),
            };
            match removed {
                Ok(()) => {}
                // This error concerns all rows.
                Err(
                    error @ (Error::Storage(_)
                    | Error::BacklogFull { .. }
                    | Error::TransactionTooLarge { .. }),
                ) => return Err(error),
                Err(error) => drop(first.get_or_insert(error)),
            }
        }
        first.map_or(Ok(()), Err)
    }

    fn stored_keys(&self) -> Result<Vec<Result<Vec<u8>, Unreadable>>> {
        let (mut keys, mut bytes) = (Vec::new(), 0);
        let mut rows = self.tx.engine(|| Ok(self.table.iter()?))?;
        while let Some(row) = self.tx.engine(|| Ok(rows.next()))? {
            let key = capture_stored::bytes_of(&row?.0);
            bytes += key.as_ref().map_or(0, |key| key.len() as u64);
            self.tx.foresee(Amount { events: 0, entries: keys.len() as u64 + 1, bytes })?;
            keys.push(key);
        }
        Ok(keys)
    }

    fn remove_stored(&mut self, key: &[u8]) -> Result<()> {
        let read = capture_stored::read::<K>(key).map_err(|_| self.capture.unreadable(key))?;
        self.remove(read).map(drop)
    }

    /// Keeps the rows for which `keep` is true. Each row that goes is a change.
    ///
    /// The call first asks `keep` about all rows, and then removes the rows that `keep` does not
    /// keep. The closure may use the transaction, but not this table.
    ///
    /// # Errors
    /// - As [`insert`](Self::insert): rows that were removed before the error are gone, each with
    ///   its event.
    /// - [`Error::UnreadableRow`] for a row that its type cannot read, so that `keep` cannot be
    ///   asked. Such rows stay, and all others are as `keep` says. The methods
    ///   [`clear`](Self::clear) and [`remove`](Self::remove) do not ask.
    ///
    /// # Panics
    /// If `keep` or the codec panics. Rows that were removed before the panic are gone, each with
    /// its event.
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
        keep: impl for<'f> FnMut(K::SelfType<'f>, V::SelfType<'f>) -> bool,
    ) -> Result<()> {
        self.tx.owned()?;
        let Judged { doomed, unreadable, panicked } = self.judge(keep)?;
        for key in doomed {
            self.remove_stored(&key)?;
        }
        if let Some(panic) = panicked {
            resume_unwind(panic);
        }
        unreadable.map_or(Ok(()), Err)
    }

    /// Asks `keep` about each row while nothing is changed. The closure `keep` is the
    /// application's: it may append, write another table, or panic.
    fn judge(
        &self,
        mut keep: impl for<'f> FnMut(K::SelfType<'f>, V::SelfType<'f>) -> bool,
    ) -> Result<Judged> {
        let mut judged = Judged { doomed: Vec::new(), unreadable: None, panicked: None };
        let mut bytes = 0;
        let mut rows = self.tx.engine(|| Ok(self.table.iter()?))?;
        while let Some(row) = self.tx.engine(|| Ok(rows.next()))? {
            let (key, value) = row?;
            let key_bytes = capture_stored::bytes_of(&key);
            let read =
                capture_stored::value_of(&key).and_then(|key| Ok((key, capture_stored::value_of(&value)?)));
            let (Ok(key_bytes), Ok((key, value))) = (&key_bytes, read) else {
                let key = key_bytes.as_deref().unwrap_or_default();
                judged.unreadable.get_or_insert_with(|| self.capture.unreadable(key));
                continue;
            };
            match catch_unwind(AssertUnwindSafe(|| keep(key, value))) {
                Ok(true) => {}
                Ok(false) => {
                    bytes += key_bytes.len() as u64;
                    let entries = judged.doomed.len() as u64 + 1;
                    self.tx.foresee(Amount { events: 0, entries, bytes })?;
                    judged.doomed.push(key_bytes.clone());
                }
                Err(panic) => {
                    judged.panicked = Some(panic);
                    break;
                }
            }
        }
        Ok(judged)
    }
}

/// The answers that [`CapturedTable::retain`] got.
struct Judged {
    /// The keys of the rows that go.
    doomed: Vec<Vec<u8>>,
    unreadable: Option<Error>,
    panicked: Option<Box<dyn std::any::Any + Send>>,
}

fn removed<'a>(key: &'a [u8], old: Old<'a>) -> RawChange<'a> {
    RawChange { operation: Operation::Remove, key, new: None, old }
}
