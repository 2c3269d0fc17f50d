//! The inbox: ids of requests, events and deliveries, for deduplication.

use crate::error::{Error, Result};
use crate::limits::{INBOX_ID_BYTES_MAX, SHORT_STRING_BYTES_MAX};
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::ids::{NUMBERED, check_id, content_of};
use crate::storage::tables::schema::{INBOX, InboxRow};
use crate::store::transaction::Transaction;
use crate::store::transaction::gathered::Amount;

impl Transaction {
    /// Returns whether `id` is seen for the first time within `scope`, and records the id for
    /// deduplication. The record is durable with this transaction. So everything else that the
    /// transaction does happens once for this id.
    ///
    /// Idempotent consumers, requests and appends are built on this. The store remembers an id for
    /// its inbox age at least.
    ///
    /// # Errors
    /// Returns [`Error::BadId`] for a scope of 0 or over 255 bytes, and for an id of 0 or over 512
    /// bytes.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let tx = store.begin()?;
    /// assert!(tx.first_time("credit-service", "message-1")?);
    /// assert!(!tx.first_time("credit-service", "message-1")?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn first_time(&self, scope: &str, id: impl AsRef<[u8]>) -> Result<bool> {
        Ok(self.mark(scope, id.as_ref(), None)?.is_none())
    }

    /// Works as [`first_time`](Self::first_time), and also reports an id that comes with other
    /// content.
    ///
    /// # Errors
    /// Returns [`Error::IdConflict`] if the id was seen with content of another checksum or length;
    /// otherwise as `first_time`.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// let tx = store.begin()?;
    /// assert!(tx.first_time_with("credit", "message-1", b"100")?);
    /// assert!(!tx.first_time_with("credit", "message-1", b"100")?);
    /// assert!(matches!(tx.first_time_with("credit", "message-1", b"999"), Err(Error::IdConflict { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn first_time_with(&self, scope: &str, id: impl AsRef<[u8]>, content: &[u8]) -> Result<bool> {
        let id = id.as_ref();
        let Some(first) = self.mark(scope, id, Some(content))? else { return Ok(true) };
        if (first.crc, first.len) == content_of(content) {
            return Ok(false);
        }
        Err(Error::IdConflict { scope: scope.to_owned(), id: String::from_utf8_lossy(id).into_owned() })
    }

    /// Records an id for deduplication. Returns the earlier mark, if there is one.
    pub(in crate::store) fn mark(
        &self,
        scope: &str,
        id: &[u8],
        content: Option<&[u8]>,
    ) -> Result<Option<InboxRow>> {
        check_id("the scope", scope.as_bytes(), SHORT_STRING_BYTES_MAX)?;
        check_id("the id", id, INBOX_ID_BYTES_MAX)?;
        let key = keys::inbox(scope, id);
        if let Some(row) = self.inbox_row(&key)? {
            return Ok(Some(row));
        }
        self.mark_id(key, content.map(content_of).unwrap_or_default(), None)?;
        Ok(None)
    }

    pub(crate) fn inbox_row(&self, key: &[u8]) -> Result<Option<InboxRow>> {
        self.owned()?;
        if let Some(row) = self.pending.borrow().inbox.get(key) {
            return Ok(Some(*row));
        }
        self.engine(|| {
            let table = self.redb().open_table(INBOX)?;
            let row = redb::ReadableTable::get(&table, key)?;
            row.map(|row| InboxRow::from_bytes(row.value()).ok_or_else(|| damaged_row("inbox"))).transpose()
        })
    }

    /// Marks the id of a new delivery, with the delivery's number if there is one. The commit sets
    /// the time.
    pub(crate) fn mark_id(&self, key: Vec<u8>, (crc, len): (u32, u64), number: Option<u64>) -> Result<()> {
        self.admit(Amount::entry(key.len()))?;
        let mut pending = self.pending.borrow_mut();
        let (first, count) = number.map_or((pending.next_seq, 0), |number| (number, NUMBERED));
        pending.put_inbox_row(key, InboxRow { first, count, crc, len, at_ms: 0 });
        Ok(())
    }

    /// Marks the id with other content. The age of the mark stays.
    pub(crate) fn mark_id_again(&self, key: Vec<u8>, row: InboxRow, (crc, len): (u32, u64)) -> Result<()> {
        self.admit(Amount::entry(key.len()))?;
        self.pending.borrow_mut().put_inbox_row(key, InboxRow { crc, len, ..row });
        Ok(())
    }

    /// Marks a key of the inbox. Returns `false` if the key was marked before.
    pub(crate) fn mark_once(&self, key: Vec<u8>) -> Result<bool> {
        let first = self.inbox_row(&key)?.is_none();
        if first {
            self.mark_id(key, Default::default(), None)?;
        }
        Ok(first)
    }

    /// Forgets a mark that this transaction itself has made.
    pub(crate) fn forget_entry(&self, key: &[u8]) {
        self.pending.borrow_mut().remove_inbox_row(key);
    }

    /// Records a request as done, with the events that the request led to.
    pub(crate) fn record_request(&self, key: Vec<u8>, first: u64, count: u32) -> Result<()> {
        self.admit(Amount::entry(key.len()))?;
        self.pending.borrow_mut().put_inbox_row(key, InboxRow { first, count, crc: 0, len: 0, at_ms: 0 });
        Ok(())
    }
}
