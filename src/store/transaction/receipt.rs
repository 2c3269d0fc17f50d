//! What a write leaves in its caller's hands.

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
/// When a receipt exists, state and events are on disk. It can also wait for the broker's word.
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

/// Why waiting for the broker ended without its word.
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
    /// The time was up. The events stay in the log and will be published.
    #[error("not confirmed within {waited_ms} ms; the events stay in the log")]
    Timeout {
        /// How long was waited.
        waited_ms: u64,
    },
    /// An event went to quarantine.
    #[error("event {seq} is in quarantine: {fault}")]
    Quarantined {
        /// Which one.
        seq: u64,
        /// Why.
        fault: Fault,
    },
    /// No relay runs that could publish it, or more than one and none was named.
    #[error("{0}")]
    NoRelay(&'static str),
    /// The relay was stopped while waiting.
    #[error("the relay was stopped")]
    Stopped,
    /// Waiting inside a transaction of the same store, or another failure of the store.
    #[error(transparent)]
    Store(#[from] Error),
}

impl<T> Receipt<T> {
    pub(crate) fn new(value: T, seqs: Vec<u64>, core: &Arc<Core>) -> Self {
        Self { value, seqs, core: Arc::downgrade(core) }
    }

    /// The same events, with another value.
    pub(crate) fn with_value<U>(self, value: U) -> Receipt<U> {
        Receipt { value, seqs: self.seqs, core: self.core }
    }

    /// The sequence numbers of the events appended, in order. A repeated event shows the first one's.
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

    /// What the closure returned.
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

    /// What the closure returned.
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
    /// When this returns `Ok`, the one relay that runs on this store has the broker's confirm for each.
    ///
    /// `Duration::MAX` waits for ever. `Duration::ZERO` asks and does not wait for the broker: it returns `Ok` if the relay
    /// has all confirms already. However short `timeout` is, the relay's thread is asked once, and has
    /// a second to answer; it usually takes microseconds.
    ///
    /// # Errors
    /// See [`ConfirmError`]. On a timeout nothing is lost. Inside a write closure or an open transaction of the same
    /// store it fails at once: the events that it waits for might be that very transaction's.
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

    /// As [`wait_confirmed`](Self::wait_confirmed), by the relay of this name.
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

    /// As [`wait_confirmed`](Self::wait_confirmed), without blocking a thread, for as long as it takes. It needs no runtime; for a limit use
    /// your runtime's timeout.
    ///
    /// # Errors
    /// As [`wait_confirmed`](Self::wait_confirmed), but for the timeout.
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

    /// As [`confirmed`](Self::confirmed), by the relay of this name.
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
            // The relay may not have looked at what was asked: it says when it has.
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

/// Asks the relay of this name, or the only one.
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
