//! The script: rules that decide what happens to single publishes.
//!
//! **Invariant.** A rule's closure runs while no lock is held. The closure may look at the broker,
//! and a panic in the closure harms only its caller.

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
    /// Whether the message goes alone, on a channel of its own.
    pub isolated: bool,
}

/// The decision of a [`Rule`] about a publish.
///
/// *As usual* means that routing and queues decide, as they do without a rule: the message may be
/// confirmed, returned or nacked. The rule then decides only when the outcome is reported.
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
    /// As usual. Put such a rule before a broader rule to make an exception.
    Confirm,
    /// No queue takes the message; it is nacked.
    Nack,
    /// No queue takes the message; it is returned. A destination fault.
    Return {
        /// The reply code, such as 312.
        code: u16,
        /// The reply text.
        text: String,
    },
    /// No queue takes the message, and the channel is closed: the epoch ends, with everything in
    /// flight. An isolated message is refused alone.
    CloseChannel {
        /// The reply code, such as 404 or 406.
        code: u16,
        /// The reply text.
        text: String,
        /// The class of the fault.
        class: FaultClass,
    },
    /// Taken as usual, but the connection is lost before an outcome. An isolated message's outcome
    /// is unknown.
    Unknown,
    /// The connection is lost before the message arrives.
    Disconnect,
    /// Taken as usual, but never confirmed. At the [confirm
    /// deadline](crate::broker::memory::MemoryPublisher::confirm_deadline) the message is reported
    /// [silent](crate::Outcome::Silent). If no younger message has an outcome, the connection is
    /// given up.
    LoseConfirm,
    /// As usual, reported with this delay.
    DelayConfirm(Duration),
    /// As usual, reported after the next outcome of this connection, or after 10 ms if there is
    /// none.
    ConfirmOutOfOrder,
    /// As usual, reported when the test calls
    /// [`release_confirms`](crate::broker::memory::MemoryBroker::release_confirms).
    HoldConfirm,
}

impl Verdict {
    /// [`Verdict::Return`] with RabbitMQ's code and text for an unroutable message.
    ///
    /// ```
    /// # use onewrite::broker::Verdict;
    /// assert!(matches!(Verdict::no_route(), Verdict::Return { code: 312, .. }));
    /// ```
    #[must_use]
    pub fn no_route() -> Self {
        Self::Return { code: 312, text: "NO_ROUTE".to_owned() }
    }

    /// [`Verdict::CloseChannel`] with the given code, text and class.
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

/// A rule of the script: which publishes it matches, how often, and with which verdict. See
/// [`MemoryBroker::script`](crate::broker::memory::MemoryBroker::script).
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
    /// The verdicts left; `None` means always.
    left: Option<AtomicU64>,
    verdict: Verdict,
}

/// A [`Rule`] without its verdict. It applies once, unless set otherwise.
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
    /// Returns a rule on publishes for which the closure returns `true`.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let rule = Rule::matching(|m| m.message.message_id.as_deref() == Some("m-1")).then(Verdict::Unknown);
    /// # let _ = rule;
    /// ```
    pub fn matching(matcher: impl Fn(&Publishing<'_>) -> bool + Send + Sync + 'static) -> RuleBuilder {
        RuleBuilder { matcher: Box::new(matcher), skip: 0, times: Some(1) }
    }

    /// Returns a rule on every publish.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let next_two = Rule::any().times(2).then(Verdict::Nack);
    /// # let _ = next_two;
    /// ```
    pub fn any() -> RuleBuilder {
        Self::matching(|_| true)
    }

    /// Returns the verdict if the rule applies, and counts it.
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

/// Takes one off a count. Returns `false` if the count was zero.
fn take_one(count: &AtomicU64) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

impl RuleBuilder {
    /// Lets the first `publishes` matching publishes pass.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let second = Rule::any().skip(1).then(Verdict::Nack);
    /// # let _ = second;
    /// ```
    pub fn skip(self, publishes: u64) -> Self {
        Self { skip: publishes, ..self }
    }

    /// Applies the rule this many times.
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let thrice = Rule::any().times(3).then(Verdict::Nack);
    /// # let _ = thrice;
    /// ```
    pub fn times(self, publishes: u64) -> Self {
        Self { times: Some(publishes), ..self }
    }

    /// Applies the rule until the script is
    /// [cleared](crate::broker::memory::MemoryBroker::clear_script).
    ///
    /// ```
    /// # use onewrite::broker::{Rule, Verdict};
    /// let for_ever = Rule::any().always().then(Verdict::Nack);
    /// # let _ = for_ever;
    /// ```
    pub fn always(self) -> Self {
        Self { times: None, ..self }
    }

    /// Sets the verdict, which completes the rule.
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
    /// Whether the script has rules. Read on every publish, so that a broker without a script pays
    /// for one load.
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

    /// Returns the script's verdict on this publish, and counts the rule that applied.
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
