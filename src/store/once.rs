//! The outcome of `Store::write_once`.

use super::receipt::Receipt;

/// What [`Store::write_once`](crate::Store::write_once) did.
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
    /// The request was new; its effects are durable.
    Done(Receipt<T>),
    /// A request of this id was committed before; nothing was done. The receipt shows its events.
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
