//! A message broker inside this process: the embedded default, and a scripted broker for tests.
//!
//! [`MemoryBroker`] has exchanges, queues and bindings as AMQP 0-9-1 has them, and answers as
//! RabbitMQ does. An unroutable message is returned. A full queue that rejects leads to a nack. A
//! missing exchange closes the channel with everything in flight.
//!
//! A test can also take the broker down, block it or make it hang. A test can
//! [script](MemoryBroker::script) what happens to single publishes, for example that a confirm is
//! lost after the message was stored.
//!
//! ```
//! use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};
//! let broker = MemoryBroker::new();
//! broker.declare_exchange("payments", ExchangeKind::Topic);
//! broker.declare_queue("credit", QueueOptions::default());
//! broker.bind("credit", "payments", "payment.*")?;
//!
//! let publisher = broker.publisher();     // for a relay
//! let source = broker.source("credit");   // for a consumer
//! # let _ = (publisher, source);
//! assert_eq!(broker.queue_len("credit"), 0);
//! # Ok::<(), onewrite::Fault>(())
//! ```
//!
//! The broker is not:
//! - **durable**: its content ends with the process. *Confirmed* means "in this memory". The
//!   store's log survives, but a confirmed event is not sent again;
//! - **bounded by itself**: a queue grows until it is read, unless it has a
//!   [`max_length`](QueueOptions::max_length);
//! - **a network broker**: no other process can reach it;
//! - **all of AMQP**: no headers exchange, no priorities, no message expiry, no transactions.
//!
//! **Invariants.**
//! - One lock guards all state, and events are reported while the lock is held. So events reach a
//!   relay in the order in which they happened, and nothing is reported for an epoch after its end.
//! - A [rule](Rule)'s closure runs while no lock is held.
//! - Reports to a publisher or a source go into an unbounded channel, so no call waits.

mod connections;
mod consumers;
mod options;
mod publisher;
mod queue;
mod routes;
mod script;
mod source;
mod state;
#[cfg(test)]
mod tests;
mod timer;
mod topic;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Epoch;
use crate::message::{Fault, FaultClass, Message, Outcome};

use self::queue::Letter;
use self::script::Script;
use self::state::{PublishOutcome, State};

pub use self::options::{ExchangeKind, Overflow, QueueOptions, Stored, Tapped};
pub use self::publisher::MemoryPublisher;
pub use self::script::{Publishing, Rule, RuleBuilder, Verdict};
pub use self::source::MemorySource;
#[cfg(feature = "rabbitmq")]
pub(in crate::broker) use self::topic::matches as topic_matches;

/// A message broker inside this process. Cheap to clone; all clones, publishers and sources share
/// one broker.
///
/// Nothing is persisted: the content ends with the process. A queue is unbounded unless it has a
/// [`max_length`](QueueOptions::max_length).
///
/// ```
/// use onewrite::Message;
/// use onewrite::broker::{MemoryBroker, QueueOptions};
/// let broker = MemoryBroker::new();
/// broker.declare_queue("inbox", QueueOptions::default());
/// // The default exchange "" routes to the queue that the routing key names.
/// broker.publish("", "inbox", Message { payload: b"hello".to_vec(), ..Message::default() })?;
/// assert_eq!(broker.queue_len("inbox"), 1);
/// # Ok::<(), onewrite::Fault>(())
/// ```
#[derive(Clone)]
pub struct MemoryBroker(Arc<Shared>);

/// The state that the handles of one broker share. The timer thread holds it weakly.
pub(in crate::broker::memory) struct Shared {
    state: Mutex<State>,
    script: Script,
}

impl Shared {
    /// Locks the state. No panic is possible under the lock; even after one the state would be
    /// whole between calls.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryBroker {
    /// Returns a broker with the default exchange and no queues.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().published(), 0);
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::build(false)
    }

    /// Returns a broker that also remembers every publish it took, for [`tap`](Self::tap). Its
    /// memory grows with each publish.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert!(MemoryBroker::with_tap().tap().is_empty());
    /// ```
    #[must_use]
    pub fn with_tap() -> Self {
        Self::build(true)
    }

    fn build(tap: bool) -> Self {
        Self(Arc::new_cyclic(|shared| Shared {
            state: Mutex::new(State::new(shared.clone(), tap)),
            script: Script::default(),
        }))
    }

    /// Declares an exchange. If the exchange exists, it takes the new kind and keeps its bindings.
    /// The default exchange `""` always exists and does not change.
    ///
    /// ```
    /// # use onewrite::broker::{ExchangeKind, MemoryBroker};
    /// MemoryBroker::new().declare_exchange("payments", ExchangeKind::Topic);
    /// ```
    pub fn declare_exchange(&self, name: &str, kind: ExchangeKind) {
        self.0.state().declare_exchange(name, kind);
    }

    /// Removes an exchange with its bindings. Returns `false` if there was no such exchange, or for
    /// the default exchange.
    ///
    /// ```
    /// # use onewrite::broker::{ExchangeKind, MemoryBroker};
    /// let broker = MemoryBroker::new();
    /// broker.declare_exchange("payments", ExchangeKind::Fanout);
    /// assert!(broker.delete_exchange("payments"));
    /// assert!(!broker.delete_exchange("payments"));
    /// ```
    pub fn delete_exchange(&self, name: &str) -> bool {
        self.0.state().delete_exchange(name)
    }

    /// Declares a queue. If the queue exists, it takes the new options and keeps its messages.
    /// Sources that waited for the queue connect.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, QueueOptions};
    /// MemoryBroker::new().declare_queue("credit", QueueOptions::default().max_length(1000));
    /// ```
    pub fn declare_queue(&self, name: &str, options: QueueOptions) {
        self.0.state().declare_queue(name, options);
    }

    /// Binds a queue to an exchange.
    ///
    /// For a direct exchange the pattern is a routing key. For a topic exchange the pattern may
    /// contain `*` (one word) and `#` (any number of words). A fanout exchange ignores the pattern.
    ///
    /// # Errors
    /// 404 if the queue or the exchange does not exist; 403 for the default exchange.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, QueueOptions};
    /// let broker = MemoryBroker::new();
    /// broker.declare_queue("credit", QueueOptions::default());
    /// assert_eq!(broker.bind("credit", "nowhere", "#").unwrap_err().code, Some(404));
    /// ```
    pub fn bind(&self, queue: &str, exchange: &str, pattern: &str) -> Result<(), Fault> {
        self.0.state().bind(queue, exchange, pattern)
    }

    /// Removes a binding. Returns `false` if there was no such binding.
    ///
    /// ```
    /// # use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};
    /// let broker = MemoryBroker::new();
    /// broker.declare_exchange("payments", ExchangeKind::Topic);
    /// broker.declare_queue("credit", QueueOptions::default());
    /// broker.bind("credit", "payments", "#")?;
    /// assert!(broker.unbind("credit", "payments", "#"));
    /// assert!(!broker.unbind("credit", "payments", "#"));
    /// # Ok::<(), onewrite::Fault>(())
    /// ```
    pub fn unbind(&self, queue: &str, exchange: &str, pattern: &str) -> bool {
        self.0.state().unbind(queue, exchange, pattern)
    }

    /// Returns a publisher, for a relay. A broker may have any number of publishers; each has its
    /// own epochs.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, MemoryPublisher};
    /// let publisher: MemoryPublisher = MemoryBroker::new().publisher();
    /// ```
    #[must_use]
    pub fn publisher(&self) -> MemoryPublisher {
        MemoryPublisher::new(Arc::clone(&self.0))
    }

    /// Returns a source, for a consumer of `queue`. A queue may have any number of sources, which
    /// take turns.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, MemorySource};
    /// let source: MemorySource = MemoryBroker::new().source("credit");
    /// ```
    #[must_use]
    pub fn source(&self, queue: &str) -> MemorySource {
        MemorySource::new(Arc::clone(&self.0), queue)
    }

    /// Publishes one message directly, as a foreign producer would, even while the broker is down.
    /// No rule applies. After `Ok`, every queue that the message was routed to has the message.
    ///
    /// # Errors
    /// The answers of RabbitMQ: 404 if the exchange is missing, and 312 if no queue is bound for
    /// the message. If a full queue rejected the message, the error is an outage without a code.
    ///
    /// ```
    /// # use onewrite::Message;
    /// # use onewrite::broker::MemoryBroker;
    /// let fault = MemoryBroker::new().publish("", "nobody", Message::default()).unwrap_err();
    /// assert_eq!(fault.code, Some(312));
    /// ```
    pub fn publish(&self, exchange: &str, routing_key: &str, message: Message) -> Result<(), Fault> {
        let letter =
            Letter { exchange: exchange.into(), routing_key: routing_key.into(), message: Arc::new(message) };
        match self.0.state().take_in(&letter, Epoch::default()) {
            PublishOutcome::Report(Outcome::Confirmed) => Ok(()),
            PublishOutcome::Report(Outcome::Returned(fault)) | PublishOutcome::Close(fault) => Err(fault),
            PublishOutcome::Report(_) | PublishOutcome::Disconnect(_) => {
                Err(Fault::new(FaultClass::Outage, "a full queue rejected it"))
            }
        }
    }

    /// Returns the messages that wait in a queue, oldest first. Unsettled deliveries are not
    /// included. Empty if the queue does not exist. The call copies the list, not the messages.
    ///
    /// ```
    /// # use onewrite::Message;
    /// # use onewrite::broker::{MemoryBroker, QueueOptions};
    /// let broker = MemoryBroker::new();
    /// broker.declare_queue("inbox", QueueOptions::default());
    /// broker.publish("", "inbox", Message::default())?;
    /// assert_eq!(&*broker.messages("inbox")[0].routing_key, "inbox");
    /// # Ok::<(), onewrite::Fault>(())
    /// ```
    #[must_use]
    pub fn messages(&self, queue: &str) -> Vec<Stored> {
        self.0.state().messages(queue)
    }

    /// The number of messages that wait in a queue; 0 if the queue does not exist.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().queue_len("credit"), 0);
    /// ```
    #[must_use]
    pub fn queue_len(&self, queue: &str) -> usize {
        self.0.state().queue_len(queue)
    }

    /// The number of a queue's unsettled deliveries.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().unsettled_len("credit"), 0);
    /// ```
    #[must_use]
    pub fn unsettled_len(&self, queue: &str) -> usize {
        self.0.state().unsettled_len(queue)
    }

    /// Drops the messages that wait in a queue and returns how many there were.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().purge("credit"), 0);
    /// ```
    pub fn purge(&self, queue: &str) -> usize {
        self.0.state().purge(queue)
    }

    /// The number of publishes that queues have taken so far, with or without a confirm.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().published(), 0);
    /// ```
    #[must_use]
    pub fn published(&self) -> u64 {
        self.0.state().published
    }

    /// Returns every publish that a queue took, in order, with or without a confirm: everything
    /// that readers of all queues can have seen. Always empty unless [`with_tap`](Self::with_tap)
    /// made the broker.
    ///
    /// ```
    /// # use onewrite::Message;
    /// # use onewrite::broker::{MemoryBroker, QueueOptions};
    /// let broker = MemoryBroker::with_tap();
    /// broker.declare_queue("inbox", QueueOptions::default());
    /// broker.publish("", "inbox", Message::default())?;
    /// assert_eq!(broker.tap().len(), 1);
    /// # Ok::<(), onewrite::Fault>(())
    /// ```
    #[must_use]
    pub fn tap(&self) -> Vec<Tapped> {
        self.0.state().tap.clone().unwrap_or_default()
    }

    /// Ends every connection, as a stopped or killed broker does. Unsettled deliveries go back to
    /// their queues, and queues keep their content. No connection succeeds until
    /// [`come_up`](Self::come_up).
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// let broker = MemoryBroker::new();
    /// broker.go_down();
    /// broker.come_up();
    /// ```
    pub fn go_down(&self) {
        self.0.state().go_down();
    }

    /// Accepts connections again. Publishers and sources reconnect before the call returns, each in
    /// a new epoch.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().come_up(); // it was up: nothing happens
    /// ```
    pub fn come_up(&self) {
        self.0.state().come_up();
    }

    /// Blocks publishers (`connection.blocked`, as in a memory or disk alarm), or unblocks them.
    ///
    /// Messages published while blocked wait unread in the connection and are lost with it. After
    /// unblocking the broker takes them in order.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().block(true);
    /// ```
    pub fn block(&self, blocked: bool) {
        self.0.state().block(blocked);
    }

    /// Makes the broker take messages and report no outcome for them.
    ///
    /// A message of that time gets no confirm later either. At the [confirm
    /// deadline](MemoryPublisher::confirm_deadline) the message is
    /// [silent](crate::Outcome::Silent), and its connection is given up.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().hang(true);
    /// ```
    pub fn hang(&self, hanging: bool) {
        self.0.state().hanging = hanging;
    }

    /// Reports the confirms that [`Verdict::HoldConfirm`] and [`Verdict::ConfirmOutOfOrder`] hold
    /// back, oldest first.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().release_confirms();
    /// ```
    pub fn release_confirms(&self) {
        self.0.state().release_confirms(false);
    }

    /// Reports the confirms that are held back, as [`release_confirms`](Self::release_confirms)
    /// does, but newest first.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().release_confirms_reversed();
    /// ```
    pub fn release_confirms_reversed(&self) {
        self.0.state().release_confirms(true);
    }

    /// Adds a rule for later publishes. The first rule that matches and is not used up decides.
    /// Rules apply to publishers, not to [`publish`](Self::publish).
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, Rule, Verdict};
    /// let broker = MemoryBroker::new();
    /// broker.script(Rule::matching(|m| m.routing_key == "payment.failed").times(2).then(Verdict::Nack));
    /// assert_eq!(broker.script_left(), 2);
    /// ```
    pub fn script(&self, rule: Rule) {
        self.0.script.add(rule);
    }

    /// Removes all rules.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, Rule, Verdict};
    /// let broker = MemoryBroker::new();
    /// broker.script(Rule::any().always().then(Verdict::Nack));
    /// broker.clear_script();
    /// ```
    pub fn clear_script(&self) {
        self.0.script.clear();
    }

    /// The number of verdicts that the rules can still give. Rules that apply
    /// [always](RuleBuilder::always) do not count.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().script_left(), 0);
    /// ```
    #[must_use]
    pub fn script_left(&self) -> u64 {
        self.0.script.left()
    }
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBroker").field("published", &self.published()).finish_non_exhaustive()
    }
}
