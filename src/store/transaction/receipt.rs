//! The receipt: the result of a write, in the hands of its caller.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::Error;
use crate::message::Fault;
use crate::oneshot;
use crate::store::shared::core::Core;
use crate::store::shared::relays::{Awaited, RelayPort, RelayRequest};
use crate::store::shared::timed::Timed;
use crate::time::Deadline;
use crate::tuning::ANSWER_MS_MAX;

/// Proof of a durable write: the closure's value, and the sequence numbers of its events.
///
/// When a receipt exists, state and events are on disk. A receipt can also wait for the broker's
/// confirms.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, Receipt};
/// let receipt: Receipt<u32> = store.write(|tx| {
///     tx.append(Event::bytes("paid", "1").to("", "payments"))?;
///     Ok(400)
/// })?;
/// assert_eq!((receipt.seqs(), receipt.value()), (&[0][..], &400));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Receipt<T = ()> {
    value: T,
    seqs: Vec<u64>,
    /// Weak: a receipt that is kept does not keep the file open.
    core: Weak<Core>,
}

/// The reason why a wait for the broker ended without a confirm.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// use onewrite::{ConfirmError, Event};
/// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
/// let error = receipt.wait_confirmed(Duration::from_secs(5)).unwrap_err(); // at once: no relay runs
/// assert!(matches!(error, ConfirmError::NoRelay(_)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfirmError {
    /// The timeout has passed. The events stay in the log, and a relay will publish them.
    #[error("not confirmed within {waited_ms} ms; the events stay in the log")]
    Timeout {
        /// The time that the call waited.
        waited_ms: u64,
    },
    /// An event went to quarantine.
    #[error("event {seq} is in quarantine: {fault}")]
    Quarantined {
        /// The sequence number of the event.
        seq: u64,
        /// The reason.
        fault: Fault,
    },
    /// No relay that could publish the event runs in this process. Or more than one relay runs, and
    /// the call named none.
    #[error("{0}")]
    NoRelay(&'static str),
    /// The relay was stopped during the wait.
    #[error("the relay was stopped")]
    Stopped,
    /// The call was made inside a transaction of the same store, or the store failed otherwise.
    #[error(transparent)]
    Store(#[from] Error),
}

impl<T> Receipt<T> {
    pub(crate) fn new(value: T, seqs: Vec<u64>, core: &Arc<Core>) -> Self {
        Self { value, seqs, core: Arc::downgrade(core) }
    }

    /// Returns a receipt of the same events, with another value.
    pub(crate) fn with_value<U>(self, value: U) -> Receipt<U> {
        Receipt { value, seqs: self.seqs, core: self.core }
    }

    /// The sequence numbers of the appended events, in order. For a repeated event, that is the
    /// sequence number of the first append.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Event;
    /// let receipt = store.write(|tx| {
    ///     tx.append(Event::bytes("paid", "1").to("", "payments"))?;
    ///     tx.append(Event::bytes("audited", "1").unpublished())
    /// })?;
    /// assert_eq!(receipt.seqs(), [0, 1]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn seqs(&self) -> &[u64] {
        &self.seqs
    }

    /// The value that the closure returned.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.write(|_| Ok(7))?.value(), &7);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn value(&self) -> &T {
        &self.value
    }

    /// Consumes the receipt and returns the value that the closure returned.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let name: String = store.write(|_| Ok("alice".to_owned()))?.into_value();
    /// assert_eq!(name, "alice");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn into_value(self) -> T {
        self.value
    }

    /// Waits until the broker has confirmed every event of this write, `timeout` at most.
    ///
    /// `Ok` means: the only relay that runs on this store has the broker's confirm for each event.
    ///
    /// With `Duration::MAX` the call waits without a limit. With `Duration::ZERO` the call asks,
    /// but does not wait for the broker: it returns `Ok` if the relay already has all confirms.
    /// Even with the shortest `timeout`, the call asks the relay's thread once and gives it one
    /// second to answer. The relay usually answers within microseconds.
    ///
    /// # Errors
    /// See [`ConfirmError`]. A timeout loses nothing. Inside a write closure or an open transaction
    /// of the same store, the call fails at once: it could be waiting for the events of that very
    /// transaction.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// use std::time::Duration;
    /// use onewrite::Event;
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// receipt.wait_confirmed(Duration::from_secs(5))?;
    /// assert_eq!(broker.queue_len("payments"), 1);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_confirmed(&self, timeout: Duration) -> Result<(), ConfirmError> {
        self.wait(None, timeout)
    }

    /// Works as [`wait_confirmed`](Self::wait_confirmed), with the relay of this name.
    ///
    /// # Errors
    /// See [`ConfirmError`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// use std::time::Duration;
    /// use onewrite::Event;
    /// let (one, two) = (store.relay("one").spawn(broker.publisher())?, store.relay("two").spawn(broker.publisher())?);
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// receipt.wait_confirmed_by("one", Duration::from_secs(5))?;
    /// receipt.wait_confirmed_by("two", Duration::from_secs(5))?;
    /// assert!(receipt.wait_confirmed_by("three", Duration::from_secs(5)).is_err());
    /// # let _ = (one.stop(Duration::from_secs(5)), two.stop(Duration::from_secs(5)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_confirmed_by(&self, relay: &str, timeout: Duration) -> Result<(), ConfirmError> {
        self.wait(Some(relay), timeout)
    }

    /// Works as [`wait_confirmed`](Self::wait_confirmed), without blocking a thread and without a
    /// limit. No runtime is needed. If you need a limit, use your runtime's timeout.
    ///
    /// # Errors
    /// As [`wait_confirmed`](Self::wait_confirmed), except for the timeout.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use onewrite::Event;
    /// # runtime.block_on(async {
    /// let receipt = store.write_async(|tx| tx.append(Event::bytes("paid", "1").to_queue("payments"))).await?;
    /// receipt.confirmed().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// # })?;
    /// assert_eq!(broker.queue_len("payments"), 1);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn confirmed(&self) -> impl Future<Output = Result<(), ConfirmError>> + Send + use<T> {
        Self::confirm(self.core.clone(), self.seqs.clone(), None)
    }

    /// Works as [`confirmed`](Self::confirmed), with the relay of this name.
    ///
    /// # Errors
    /// As [`confirmed`](Self::confirmed).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("payments", Default::default());
    /// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// use onewrite::Event;
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").to_queue("payments")))?;
    /// runtime.block_on(receipt.confirmed_by("rabbit"))?;
    /// assert!(runtime.block_on(receipt.confirmed_by("nobody")).is_err());
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn confirmed_by(
        &self,
        relay: &str,
    ) -> impl Future<Output = Result<(), ConfirmError>> + Send + use<T> {
        Self::confirm(self.core.clone(), self.seqs.clone(), Some(relay.to_owned()))
    }

    async fn confirm(core: Weak<Core>, seqs: Vec<u64>, relay: Option<String>) -> Result<(), ConfirmError> {
        let (_, answer) = ask(&core, seqs, relay.as_deref())?;
        let core = core.upgrade().ok_or(ConfirmError::NoRelay("the store is closed"))?;
        let (waking, owner) = (core.waking(), core.owner.clone());
        drop(core);
        let answer = Timed::new(answer, Deadline::Never, &waking).await;
        answer.map_or_else(|| Err(owner.refusal().into()), reported)
    }

    fn wait(&self, relay: Option<&str>, timeout: Duration) -> Result<(), ConfirmError> {
        let (port, answer) = ask(&self.core, self.seqs.clone(), relay)?;
        let answered = answer.wait_until(Deadline::after(timeout)).or_else(|| {
            // The relay may not have looked at the request yet. The echo says when the relay has.
            let (reply, echo) = oneshot::channel();
            port.requests.send(RelayRequest::Echo { reply }).ok()?;
            echo.wait_until(Deadline::after(Duration::from_millis(ANSWER_MS_MAX)))?.ok()?;
            answer.wait_until(Deadline::now())
        });
        let late = || Err(ConfirmError::Timeout { waited_ms: crate::time::as_ms(timeout) });
        answered.map_or_else(late, reported)
    }
}

type Answer = Result<Awaited, oneshot::Abandoned>;

/// Asks the relay of this name, or the only relay.
fn ask(
    core: &Weak<Core>,
    seqs: Vec<u64>,
    relay: Option<&str>,
) -> Result<(RelayPort, oneshot::Receiver<Awaited>), ConfirmError> {
    let core = core.upgrade().ok_or(ConfirmError::NoRelay("the store is closed"))?;
    core.refuse_reentrant("Receipt::wait_confirmed")?;
    let (port, without) = match relay {
        Some(relay) => (core.relays.port(relay), "no relay of this name runs in this process"),
        None => (
            core.relays.only(),
            "there is no relay, or more than one, on this store in this process; name it with `wait_confirmed_by`",
        ),
    };
    let port = port.ok_or(ConfirmError::NoRelay(without))?;
    let (reply, answer) = oneshot::channel();
    port.requests.send(RelayRequest::Await { seqs, reply }).map_err(|_| ConfirmError::Stopped)?;
    Ok((port, answer))
}

fn reported(answer: Answer) -> Result<(), ConfirmError> {
    match answer {
        Ok(Awaited::Confirmed) => Ok(()),
        Ok(Awaited::Quarantined { seq, fault }) => Err(ConfirmError::Quarantined { seq, fault }),
        Ok(Awaited::Failed(error)) => Err(error.into()),
        Err(oneshot::Abandoned) => Err(ConfirmError::Stopped),
    }
}
