//! Where a relay or a projection begins that is new to the file.

/// Where a new relay begins.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// use std::time::Duration;
/// use onewrite::{Event, StartAt};
/// let pay = || store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")));
/// pay()?; // before the relay is made: not for it
/// let relay = store.relay("new").start_at(StartAt::Newest).spawn(broker.publisher())?;
/// pay()?.wait_confirmed(Duration::from_secs(5))?;
/// assert_eq!(broker.queue_len("payments"), 1);
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StartAt {
    /// At the oldest event that the log still holds. The default.
    #[default]
    Oldest,
    /// After the newest event: only events that are appended from now on.
    Newest,
    /// At this sequence number, which lies in the log or is the log's end. A number beyond the end
    /// is refused.
    ///
    /// Of trimmed events, those that streams keep are still there. A subscription reports such a
    /// gap; a relay and a projection log it.
    Position(u64),
}
