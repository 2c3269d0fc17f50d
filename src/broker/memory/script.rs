//! The script: what happens to single publishes.
//!
//! **Invariant.** A rule's closure runs while no lock is held: it may look at the broker, and a panic in it harms
//! nobody but its caller.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::broker::Epoch;
use crate::message::{FaultClass, Message};

/// A publish, as a [`Rule`] sees it.
///
/// ```
/// # use onewrite::broker::{Publishing, Rule, Verdict};
/// let rule = Rule::matching(|m: &Publishing<'_>| m.exchange == "payments" && !m.isolated).then(Verdict::Nack);
/// # let _ = rule;
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Publishing<'a> {
    /// The exchange.
    pub exchange: &'a str,
    /// The routing key.
    pub routing_key: &'a str,
    /// Properties, headers and payload.
    pub message: &'a Message,
    /// The publisher's epoch.
    pub epoch: Epoch,
    /// Whether it goes alone, on a channel of its own.
    pub isolated: bool,
}

/// What a [`Rule`] makes of a publish.
///
/// Where it says *as usual*, routing and queues decide as without a rule: the message may be confirmed, returned or
/// nacked; the rule then only decides when that is reported.
///
/// ```
/// # use onewrite::broker::{MemoryBroker, Rule, Verdict};
/// let broker = MemoryBroker::new();
/// // A ghost: the message is stored, its confirm never comes.
/// broker.script(Rule::any().then(Verdict::LoseConfirm));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// As usual. Stands before a broader rule as an exception to it.
    Confirm,
    /// No queue takes it; nacked.
    Nack,
    /// No queue takes it; returned. A destination fault.
    Return {
        /// The reply code, such as 312.
        code: u16,
        /// The reply text.
        text: String,
    },
    /// No queue takes it, and the channel is closed: the epoch ends, with everything in flight. An isolated message
    /// is refused alone.
    CloseChannel {
        /// The reply code, such as 404 or 406.
        code: u16,
        /// The reply text.
        text: String,
        /// Whose fault it is.
        class: FaultClass,
    },
    /// Taken as usual, then the connection is lost before a word about it. An isolated message's outcome is unknown.
    Unknown,
    /// The connection is lost before the message arrives.
    Disconnect,
    /// Taken as usual, but nothing is ever said of it; at the [confirm deadline](crate::broker::memory::MemoryPublisher::confirm_deadline) it is reported
    /// [silent](crate::Outcome::Silent), and the connection is given up if no younger message has a word.
    LoseConfirm,
    /// As usual, reported this much later.
    DelayConfirm(Duration),
    /// As usual, reported after the next outcome of this connection, or after 10 ms if there is none.
    ConfirmOutOfOrder,
    /// As usual, reported when the test says [`release_confirms`](crate::broker::memory::MemoryBroker::release_confirms).
    HoldConfirm,
}

impl Verdict {
    /// [`Verdict::Return`] as RabbitMQ says it of an unroutable message.
    ///
    /// ```
    /// # use onewrite::broker::Verdict;
    /// assert!(matches!(Verdict::no_route(), Verdict::Return { code: 312, .. }));
    /// ```
    #[must_use]
    pub fn no_route() -> Self {
        Self::Return { code: 312, text: "NO_ROUTE".to_owned() }
    }

    /// [`Verdict::CloseChannel`].
    ///
    /// ```
    /// # use onewrite::FaultClass;
    /// # use onewrite::broker::{Rule, Verdict};
    /// let too_large = Verdict::close_channel(FaultClass::Message, 406, "PRECONDITION_FAILED - message size too large");
    /// let rule = Rule::matching(|m| m.message.payload.len() > 1000).always().then(too_large);
    /// # let _ = rule;
    /// ```
    #[must_use]
    pub fn close_channel(class: FaultClass, code: u16, text: impl Into<String>) -> Self {
        Self::CloseChannel { code, text: text.into(), class }
    }
}

type Matcher = Box<dyn Fn(&Publishing<'_>) -> bool + Send + Sync>;

/// Which publishes, how often, and what becomes of them. See [`MemoryBroker::script`](crate::broker::memory::MemoryBroker::script).
///
/// ```
/// # use onewrite::broker::{MemoryBroker, Rule, Verdict};
/// let broker = MemoryBroker::new();
/// broker.script(Rule::any().skip(3).times(2).then(Verdict::no_route())); // the 4th and the 5th
/// broker.script(Rule::matching(|m| m.routing_key.starts_with("refund.")).always().then(Verdict::Nack));
/// ```
pub struct Rule {
    matcher: Matcher,
    skip: AtomicU64,
    /// `None`: always.
    left: Option<AtomicU64>,
    verdict: Verdict,
}

/// A [`Rule`] without its verdict. Applies once, unless set otherwise.
///
/// ```
/// # use onewrite::broker::{Rule, RuleBuilder, Verdict};
/// let third: RuleBuilder = Rule::any().skip(2);
/// let rule: Rule = third.then(Verdict::Nack);
/// ```
#[must_use = "a rule begins with its verdict: call `then`"]
pub struct RuleBuilder {
    matcher: Matcher,
    skip: u64,
    times: Option<u64>,
}

impl Rule {
    /// A rule on publishes for which this answers `true`.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let rule = Rule::matching(|m| m.message.message_id.as_deref() == Some("m-1")).then(Verdict::Unknown);
    /// # let _ = rule;
    /// ```
    pub fn matching(matcher: impl Fn(&Publishing<'_>) -> bool + Send + Sync + 'static) -> RuleBuilder {
        RuleBuilder { matcher: Box::new(matcher), skip: 0, times: Some(1) }
    }

    /// A rule on every publish.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let next_two = Rule::any().times(2).then(Verdict::Nack);
    /// # let _ = next_two;
    /// ```
    pub fn any() -> RuleBuilder {
        Self::matching(|_| true)
    }

    /// The verdict, if the rule applies. Counts it.
    fn apply(&self, publishing: &Publishing<'_>) -> Option<Verdict> {
        if self.is_used_up() || !(self.matcher)(publishing) || take_one(&self.skip) {
            return None;
        }
        if self.left.as_ref().is_some_and(|left| !take_one(left)) {
            return None;
        }
        Some(self.verdict.clone())
    }

    fn is_used_up(&self) -> bool {
        self.left.as_ref().is_some_and(|left| left.load(Ordering::Relaxed) == 0)
    }
}

/// Takes one off a count; `false` if it was at zero.
fn take_one(count: &AtomicU64) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

impl RuleBuilder {
    /// Lets the first `publishes` that match pass.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let second = Rule::any().skip(1).then(Verdict::Nack);
    /// # let _ = second;
    /// ```
    pub fn skip(self, publishes: u64) -> Self {
        Self { skip: publishes, ..self }
    }

    /// Applies this often.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let thrice = Rule::any().times(3).then(Verdict::Nack);
    /// # let _ = thrice;
    /// ```
    pub fn times(self, publishes: u64) -> Self {
        Self { times: Some(publishes), ..self }
    }

    /// Applies until the script is [cleared](crate::broker::memory::MemoryBroker::clear_script).
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let for_ever = Rule::any().always().then(Verdict::Nack);
    /// # let _ = for_ever;
    /// ```
    pub fn always(self) -> Self {
        Self { times: None, ..self }
    }

    /// The verdict, which makes it a rule.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let rule = Rule::any().then(Verdict::HoldConfirm);
    /// # let _ = rule;
    /// ```
    #[must_use]
    pub fn then(self, verdict: Verdict) -> Rule {
        Rule {
            matcher: self.matcher,
            skip: AtomicU64::new(self.skip),
            left: self.times.map(AtomicU64::new),
            verdict,
        }
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rule")
            .field("left", &self.left)
            .field("verdict", &self.verdict)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for RuleBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuleBuilder")
            .field("skip", &self.skip)
            .field("times", &self.times)
            .finish_non_exhaustive()
    }
}

/// The rules in force, in order.
#[derive(Debug, Default)]
pub(super) struct Script {
    rules: Mutex<Arc<Vec<Arc<Rule>>>>,
    /// Whether there are any. Read on every publish, so that a broker without a script pays for one load.
    active: AtomicBool,
}

impl Script {
    pub(super) fn add(&self, rule: Rule) {
        self.change(|rules| rules.push(Arc::new(rule)));
    }

    pub(super) fn clear(&self) {
        self.change(Vec::clear);
    }

    pub(super) fn left(&self) -> u64 {
        let lefts = |rule: &Arc<Rule>| rule.left.as_ref().map_or(0, |left| left.load(Ordering::Relaxed));
        self.rules().iter().map(lefts).sum()
    }

    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// What the script says of this publish. Counts the rule that applied.
    pub(super) fn judge(&self, publishing: &Publishing<'_>) -> Option<Verdict> {
        let rules = self.rules();
        let verdict = rules.iter().find_map(|rule| rule.apply(publishing));
        if verdict.is_some() && rules.iter().any(|rule| rule.is_used_up()) {
            self.change(|rules| rules.retain(|rule| !rule.is_used_up()));
        }
        verdict
    }

    fn rules(&self) -> Arc<Vec<Arc<Rule>>> {
        Arc::clone(&self.rules.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Rule>>)) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = Vec::clone(&rules);
        change(&mut changed);
        self.active.store(!changed.is_empty(), Ordering::Release);
        *rules = Arc::new(changed);
    }
}
