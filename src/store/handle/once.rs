//! Writes that take place once per request.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use crate::error::{Error, Result};
use crate::limits::INBOX_ID_BYTES_MAX;
use crate::log::keys;
use crate::storage::tables::ids::check_id;
use crate::storage::tables::schema::InboxRow;
use crate::store::handle::Store;
use crate::store::handle::write_future::WriteFuture;
use crate::store::transaction::receipt::Receipt;
use crate::store::transaction::{REQUEST_SCOPE, Transaction};

/// The outcome of [`Store::write_once`](crate::Store::write_once).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, WriteOnce};
/// match store.write_once("request-17", |tx| tx.append(Event::bytes("paid", "1").to("", "payments")))? {
///     WriteOnce::Done(receipt) => assert_eq!(receipt.seqs(), [0]),
///     _ => unreachable!("no request of this id came before"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum WriteOnce<T> {
    /// The request was new, and its effects are durable.
    Done(Receipt<T>),
    /// A request of this id was committed before, so the closure did not run. The receipt shows the
    /// events of the earlier request.
    Repeated(Receipt),
}

impl<T> WriteOnce<T> {
    /// Whether the request had been committed before.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let again = || store.write_once("request-17", |_| Ok(()));
    /// assert!(!again()?.is_repeat());
    /// assert!(again()?.is_repeat());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_repeat(&self) -> bool {
        matches!(self, Self::Repeated(_))
    }
}

/// A pending write that takes place once per request. See [`Store::write_once_async`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
/// use onewrite::WriteOnceFuture;
/// let write: WriteOnceFuture<u32> = store.write_once_async("request-17", |_| Ok(7)); // nothing happens before it is polled
/// assert!(!runtime.block_on(write)?.is_repeat());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a future does nothing until it is polled"]
pub struct WriteOnceFuture<T> {
    store: Store,
    /// The write, or the error that prevented it. The error is `None` once it was reported.
    write: std::result::Result<WriteFuture<Answer<T>>, Option<Error>>,
}

impl<T> std::fmt::Debug for WriteOnceFuture<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteOnceFuture").finish_non_exhaustive()
    }
}

impl<T> Future for WriteOnceFuture<T> {
    type Output = Result<WriteOnce<T>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let written = match &mut self.write {
            Ok(write) => ready!(Pin::new(write).poll(context)),
            Err(refused) => Err(refused.take().unwrap_or_else(|| self.store.gone())),
        };
        Poll::Ready(written.map(|receipt| self.store.done_once(receipt)))
    }
}

/// The result of the closure of such a write: its value, or the row of the earlier request.
type Answer<T> = Result<T, InboxRow>;

fn request_key(id: &[u8]) -> Result<Vec<u8>> {
    check_id("the request id", id, INBOX_ID_BYTES_MAX)?;
    Ok(keys::inbox(REQUEST_SCOPE, id))
}

/// Runs `write` unless a request of this key was committed before.
fn once<T>(
    key: Vec<u8>,
    mut write: impl FnMut(&Transaction) -> Result<T> + Send,
) -> impl FnMut(&Transaction) -> Result<Answer<T>> + Send {
    move |tx| {
        if let Some(row) = tx.inbox_row(&key)? {
            return Ok(Err(row));
        }
        let first = tx.next_seq();
        let value = write(tx)?;
        let count = u32::try_from(tx.next_seq() - first).unwrap_or(u32::MAX);
        tx.record_request(key.clone(), first, count)?;
        Ok(Ok(value))
    }
}

impl Store {
    /// As [`write`](Self::write), once per request.
    ///
    /// If a request of this id was committed before, the closure does not run, and the result says
    /// so. The store remembers an id for at least its inbox age (7 days unless set).
    ///
    /// # Errors
    /// As `write`; [`Error::BadId`] for an id of 0 or over 512 bytes.
    ///
    /// ```
    /// # use onewrite::{Event, WriteOnce, Store};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = Store::open(folder.path().join("a.redb"))?;
    /// let pay = || store.write_once("request-17", |tx| {
    ///     tx.append(Event::bytes("payment.completed", b"100".to_vec()).to("payments", "completed"))
    /// });
    /// assert!(matches!(pay()?, WriteOnce::Done(_)));
    /// assert!(matches!(pay()?, WriteOnce::Repeated(receipt) if receipt.seqs() == [0]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn write_once<T, F>(&self, request_id: impl AsRef<[u8]>, write: F) -> Result<WriteOnce<T>>
    where
        F: FnMut(&Transaction) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let key = request_key(request_id.as_ref())?;
        let receipt = self.write(once(key, write))?;
        Ok(self.done_once(receipt))
    }

    /// As [`write_once`](Self::write_once), without blocking a thread. Nothing happens before the
    /// first poll. See [`write_async`](Self::write_async).
    ///
    /// # Errors
    /// As `write_once`.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use onewrite::Event;
    /// let pay = || store.write_once_async("request-17", |tx| tx.append(Event::bytes("paid", "1").to_queue("payments")));
    /// # runtime.block_on(async {
    /// assert!(!pay().await?.is_repeat());
    /// assert!(pay().await?.is_repeat());
    /// # Ok::<(), onewrite::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn write_once_async<T, F>(&self, request_id: impl AsRef<[u8]>, write: F) -> WriteOnceFuture<T>
    where
        F: FnMut(&Transaction) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let write = request_key(request_id.as_ref()).map(|key| self.write_async(once(key, write)));
        WriteOnceFuture { store: self.clone(), write: write.map_err(Some) }
    }

    fn done_once<T>(&self, receipt: Receipt<Answer<T>>) -> WriteOnce<T> {
        let seqs = receipt.seqs().to_vec();
        match receipt.into_value() {
            Ok(value) => WriteOnce::Done(Receipt::new(value, seqs, self.core())),
            Err(row) => {
                let seqs = (row.first..row.first + u64::from(row.count)).collect();
                WriteOnce::Repeated(Receipt::new((), seqs, self.core()))
            }
        }
    }
}
