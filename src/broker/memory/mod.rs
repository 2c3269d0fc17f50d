//! A message broker inside this process: the embedded default, and the scripted one for tests.
//!
//! [`MemoryBroker`] has exchanges, queues and bindings as AMQP 0-9-1 has them, and answers as RabbitMQ does: an
//! unroutable message is returned, a full queue that rejects makes a nack, a missing exchange closes the channel with
//! everything in flight. A test can also take it down, block it, make it hang, and [script](MemoryBroker::script) what
//! happens to single publishes, a confirm that is lost after the message was stored included.
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
//! It is not:
//! - **durable**: its content ends with the process. *Confirmed* means "in this memory". The store's log is what
//!   lasts, but a confirmed event is not sent again;
//! - **bounded by itself**: a queue grows until it is read, unless it has a [`max_length`](QueueOptions::max_length);
//! - **a network broker**: nobody outside this process reaches it;
//! - **all of AMQP**: no headers exchange, no priorities, no message expiry, no transactions.
//!
//! **Invariants.** All state stands under one lock, and what happens is reported while it is held: events reach a relay in
//! the order in which they happened, and nothing is reported for an epoch after its end. A [rule](Rule)'s closure runs
//! while no lock is held. What is reported to a publisher or a source goes into an unbounded channel, so that no call waits.

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

/// The in-process broker. Cheap to clone; all clones, publishers and sources are of one broker.
///
/// Nothing is persisted: the content ends with the process. A queue is bounded only if it was
/// [set so](QueueOptions::max_length).
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

/// What the handles of one broker share. The timer thread holds it weakly.
pub(in crate::broker::memory) struct Shared {
    state: Mutex<State>,
    script: Script,
}

impl Shared {
    /// A panic under the lock is ruled out; should one come all the same, the state is whole between calls.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryBroker {
    /// A broker without queues, with the default exchange only.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().published(), 0);
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::build(false)
    }

    /// A broker that also remembers every publish it took, for [`tap`](Self::tap). Its memory grows with each.
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

    /// Declares an exchange. Declared again, it takes the new kind and keeps its bindings. The default exchange `""`
    /// is always there and stays as it is.
    ///
    /// ```
    /// # use onewrite::broker::{ExchangeKind, MemoryBroker};
    /// MemoryBroker::new().declare_exchange("payments", ExchangeKind::Topic);
    /// ```
    pub fn declare_exchange(&self, name: &str, kind: ExchangeKind) {
        self.0.state().declare_exchange(name, kind);
    }

    /// Removes an exchange with its bindings. `false` if there was none, or if it is the default exchange.
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

    /// Declares a queue. Declared again, it takes the new options and keeps its messages. Sources that waited for it
    /// connect.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, QueueOptions};
    /// MemoryBroker::new().declare_queue("credit", QueueOptions::default().max_length(1000));
    /// ```
    pub fn declare_queue(&self, name: &str, options: QueueOptions) {
        self.0.state().declare_queue(name, options);
    }

    /// Binds a queue to an exchange. The pattern is a routing key for a direct exchange, a pattern with `*` (one word)
    /// and `#` (any number of words) for a topic exchange, and means nothing to a fanout exchange.
    ///
    /// # Errors
    /// 404 if there is no such queue or exchange; 403 for the default exchange.
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

    /// Removes a binding. `false` if there was none.
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

    /// A publisher, for a relay. Any number may be attached to one broker; each has its own epochs.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, MemoryPublisher};
    /// let publisher: MemoryPublisher = MemoryBroker::new().publisher();
    /// ```
    #[must_use]
    pub fn publisher(&self) -> MemoryPublisher {
        MemoryPublisher::new(Arc::clone(&self.0))
    }

    /// A source, for a consumer of `queue`. Any number may be attached to one queue; they take turns.
    ///
    /// ```
    /// # use onewrite::broker::{MemoryBroker, MemorySource};
    /// let source: MemorySource = MemoryBroker::new().source("credit");
    /// ```
    #[must_use]
    pub fn source(&self, queue: &str) -> MemorySource {
        MemorySource::new(Arc::clone(&self.0), queue)
    }

    /// Publishes one message directly, as a foreign producer would, whether the broker is up or not. No rule applies.
    /// When this returns `Ok`, every queue that it was routed to has it.
    ///
    /// # Errors
    /// What RabbitMQ would say: 404 for a missing exchange, 312 when no queue is bound for it, and an outage without
    /// a code when a full queue rejected it.
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

    /// What waits in a queue, oldest first. Deliveries that are out and unsettled are not in it. Empty if there is no
    /// such queue. Copies the list, not the messages.
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

    /// How many messages wait in a queue; 0 if there is no such queue.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().queue_len("credit"), 0);
    /// ```
    #[must_use]
    pub fn queue_len(&self, queue: &str) -> usize {
        self.0.state().queue_len(queue)
    }

    /// How many deliveries of a queue are out and unsettled.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().unsettled_len("credit"), 0);
    /// ```
    #[must_use]
    pub fn unsettled_len(&self, queue: &str) -> usize {
        self.0.state().unsettled_len(queue)
    }

    /// Drops what waits in a queue and says how many it was.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().purge("credit"), 0);
    /// ```
    pub fn purge(&self, queue: &str) -> usize {
        self.0.state().purge(queue)
    }

    /// How many publishes were taken by a queue so far, with or without a confirm.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// assert_eq!(MemoryBroker::new().published(), 0);
    /// ```
    #[must_use]
    pub fn published(&self) -> u64 {
        self.0.state().published
    }

    /// Every publish that a queue took, in order, with or without a confirm: what the readers of all queues can
    /// have seen. Always empty unless the broker was made by [`with_tap`](Self::with_tap).
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

    /// Ends every connection, as a broker does that is stopped or killed. Unsettled deliveries go back to their
    /// queues, queues keep their content, and nobody connects until [`come_up`](Self::come_up).
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

    /// Takes connections again. Publishers and sources reconnect before this returns, each in a new epoch.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().come_up(); // it was up: nothing happens
    /// ```
    pub fn come_up(&self) {
        self.0.state().come_up();
    }

    /// Blocks publishers (`connection.blocked`, as in a memory or disk alarm), or lets them on. What is published
    /// meanwhile waits in the connection, unread, and is lost with it; once unblocked it is taken in, in order.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().block(true);
    /// ```
    pub fn block(&self, blocked: bool) {
        self.0.state().block(blocked);
    }

    /// Makes the broker take messages in and say nothing about them. A publish of that time gets no word later
    /// either: it is [silent](crate::Outcome::Silent), and its connection is given up, at the
    /// [confirm deadline](MemoryPublisher::confirm_deadline).
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().hang(true);
    /// ```
    pub fn hang(&self, hanging: bool) {
        self.0.state().hanging = hanging;
    }

    /// Reports the confirms that [`Verdict::HoldConfirm`] and [`Verdict::ConfirmOutOfOrder`] hold back, oldest first.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().release_confirms();
    /// ```
    pub fn release_confirms(&self) {
        self.0.state().release_confirms(false);
    }

    /// As [`release_confirms`](Self::release_confirms), newest first.
    ///
    /// ```
    /// # use onewrite::broker::MemoryBroker;
    /// MemoryBroker::new().release_confirms_reversed();
    /// ```
    pub fn release_confirms_reversed(&self) {
        self.0.state().release_confirms(true);
    }

    /// Adds a rule on what happens to publishes to come. The first rule that matches and is not used up decides.
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

    /// How many verdicts the rules have left to give. Those that apply [always](RuleBuilder::always) do not count.
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
