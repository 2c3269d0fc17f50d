//! Applying a batch: one closure for each delivery, and the handling of its result.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::item::Item;
use super::{Worker, count};
use crate::broker::{DeliveryTag, Settlement, SourceEvent};
use crate::consumer::dedup::{Identity, is_of_the_delivery};
use crate::consumer::in_hand::Name;
use crate::consumer::reject::{Refusal, reason};
use crate::consumer::rejected_room::Kept;
use crate::consumer::tries::{Step, steps};
use crate::consumer::{Handler, RejectTo};
use crate::error::{Error, EventError, Result};
use crate::log::in_hand::TriesRow;
use crate::printable::plain;
use crate::store::{Receipt, Transaction};
use crate::time::Deadline;
use crate::tuning::CONSUMER_BATCH_MAX;

/// The time after which the finished part of a batch is settled at the broker, although the rest is
/// not.
const SETTLE_AFTER: Duration = Duration::from_millis(100);

/// The time after which a batch looks for deliveries that came meanwhile.
const LOOK_AFTER: Duration = Duration::from_millis(10);

/// What a delivery's transaction did.
enum Applied {
    Done,
    Repeated,
    /// The delivery was redriven or parked, and has gone meanwhile.
    Gone,
    /// The delivery's identity is that of another message.
    Conflict(Error),
}

/// The outcome of a batch.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) settlements: Vec<(DeliveryTag, Settlement)>,
    /// Deliveries for the quarantine.
    refused: Vec<(Item, Refusal)>,
    /// Deliveries whose try has failed, which is to be written down.
    pub(super) failed: Vec<Item>,
    /// Rows of tries that were written down and did not take place.
    pub(super) never_began: Vec<(Name, TriesRow)>,
    /// Deliveries that are done with, and whose row of tries no transaction has removed.
    pub(super) done: Vec<Item>,
    /// Set if the store takes nothing more.
    pub(super) lost: Option<Error>,
}

impl Outcome {
    pub(super) fn of_refused(refused: Vec<(Item, Refusal)>) -> Self {
        Self { refused, ..Self::default() }
    }
}

impl Worker {
    /// Applies a batch and settles its deliveries. Fails only if the store is lost.
    pub(super) fn apply(
        &mut self,
        batch: Vec<Item>,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
    ) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut batch = self.take_in(batch)?;
        // Deliveries beyond a batch wait for the next.
        let rest = batch.split_off(batch.len().min(CONSUMER_BATCH_MAX * 2));
        rest.into_iter().for_each(|item| self.wait_behind(item));
        let unparked = batch.iter().filter(|item| item.is_the_brokers());
        self.running = unparked.filter_map(|item| item.key.clone()).collect();
        let result = self.apply_steps(batch, events, stop);
        self.running.clear();
        self.returned |= std::mem::take(&mut self.behind_running);
        result
    }

    fn apply_steps(
        &mut self,
        batch: Vec<Item>,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
    ) -> Result<()> {
        let attempts = self.settings.attempts;
        let steps = steps(batch, |item| item.tries.wants_to_be_alone(attempts));
        for (at, step) in steps.into_iter().enumerate() {
            // The rest is with the broker or parked, and comes again.
            if at > 0 && !stop.is_empty() {
                break;
            }
            let Step { items, open } = step;
            let mut items = items.into_iter().peekable();
            while items.peek().is_some() {
                let (part, bytes) = self.next_part(&mut items, Item::size);
                if self.has_space(bytes) {
                    self.spend_space(bytes);
                    self.apply_step(Step { items: part, open }, events)?;
                } else {
                    part.into_iter().for_each(|item| self.wait_behind(item));
                }
            }
        }
        Ok(())
    }

    fn apply_step(&mut self, step: Step<Item>, events: &Receiver<SourceEvent>) -> Result<()> {
        let mut outcome = Outcome::default();
        let mut items = Vec::with_capacity(step.items.len());
        for item in step.items {
            if item.tries.is_convicted(self.settings.attempts) {
                let error = Error::app(Killed { deaths: item.tries.counted() });
                let attempts = item.tries.counted();
                self.refuse(item, &error, Some(attempts), &mut outcome);
            } else if item.key.as_ref().is_some_and(|key| self.has_failed_before(key, item.place)) {
                self.wait_behind(item);
            } else {
                items.push(item);
            }
        }
        let items = self.note_first(items, step.open)?;
        self.apply_together(items, outcome, events)
    }

    /// Applies these deliveries, one closure each, in one group if possible.
    fn apply_together(
        &mut self,
        items: Vec<Item>,
        mut outcome: Outcome,
        events: &Receiver<SourceEvent>,
    ) -> Result<()> {
        #[cfg(onewrite_mutations)]
        self.acknowledge_before_commit(&items);
        let mut answers = VecDeque::with_capacity(items.len());
        let mut failed_keys: HashMap<Arc<str>, Arc<FailedPlaces>> = HashMap::new();
        for (at, item) in items.into_iter().enumerate() {
            let identity = match &item.identity {
                Ok(identity) => Arc::clone(identity),
                Err(error) => {
                    let error = Arc::clone(error);
                    self.refuse(item, &error, None, &mut outcome);
                    continue;
                }
            };
            let failed = item
                .key
                .as_ref()
                .map(|key| (at, Arc::clone(failed_keys.entry(Arc::clone(key)).or_default())));
            match self.settings.store.submit(&self.purpose, self.closure(&item, identity, failed)) {
                Ok(answer) => answers.push_back((item, answer)),
                // Deliveries handed over before still have their outcome, and it is settled at the
                // broker.
                Err(error) => {
                    outcome.lost.get_or_insert(error);
                    break;
                }
            }
        }
        let mut settled_at = Instant::now();
        let mut looked = settled_at;
        for (item, answer) in answers {
            let result = self.settings.store.answer(answer).map(Receipt::into_value);
            self.settle(item, result, &mut outcome);
            if looked.elapsed() >= LOOK_AFTER {
                if let Err(error) = self.take_in_meanwhile(events) {
                    outcome.lost.get_or_insert(error);
                }
                looked = Instant::now();
            }
            if settled_at.elapsed() >= SETTLE_AFTER {
                // A batch of slow handlers takes a while. The broker delivers more as soon as a
                // part is settled.
                self.settle_at_source(&mut outcome);
                settled_at = Instant::now();
            }
        }
        let written = self.quarantine(&mut outcome).and_then(|()| self.write_down(&mut outcome));
        self.settle_at_source(&mut outcome);
        written?;
        outcome.lost.map_or(Ok(()), Err)
    }

    /// Acknowledges what is durable.
    pub(super) fn settle_at_source(&mut self, outcome: &mut Outcome) {
        #[cfg(onewrite_mutations)]
        if crate::mutations::mutated("acknowledge-before-commit") {
            outcome.settlements.clear();
        }
        self.source.settle(std::mem::take(&mut outcome.settlements));
    }

    #[cfg(onewrite_mutations)]
    fn acknowledge_before_commit(&mut self, batch: &[Item]) {
        if crate::mutations::mutated("acknowledge-before-commit") {
            let broker_has_it = |item: &&Item| item.is_the_brokers() && item.tries.failures == 0;
            let tags =
                batch.iter().filter(broker_has_it).map(|item| (item.delivery.tag, Settlement::Acknowledge));
            self.source.settle(tags.collect());
        }
    }

    /// The transaction of one delivery. `failed` is its place in the batch, and the places that its
    /// key shares.
    fn closure(
        &self,
        item: &Item,
        identity: Arc<Identity>,
        failed: Option<(usize, Arc<FailedPlaces>)>,
    ) -> impl FnMut(&Transaction) -> Result<Applied> + Send + 'static {
        let one = One {
            scope: self.settings.scope.clone(),
            handler: Arc::clone(&self.handler),
            identity,
            item: item.clone(),
        };
        move |tx| {
            let Some((at, failed)) = &failed else { return one.apply(tx) };
            if failed.is_before(*at) {
                return Err(Error::app(Waits));
            }
            // The place counts as failed until the try has certainly succeeded. A panic leaves it
            // so.
            failed.note(*at, true);
            let result = one.apply(tx);
            // A rejected delivery does not hold back its key, because it will never be applied.
            failed.note(*at, matches!(&result, Err(error) if !is_final(error)));
            result
        }
    }

    fn settle(&mut self, item: Item, result: Result<Applied>, outcome: &mut Outcome) {
        match result {
            Ok(Applied::Conflict(error)) => self.refuse(item, &error, None, outcome),
            Ok(applied) => {
                match applied {
                    Applied::Done => {
                        count(&self.shared.applied);
                        item.redriven.iter().for_each(|_| count(&self.shared.redriven));
                    }
                    Applied::Repeated => count(&self.shared.repeated),
                    Applied::Gone | Applied::Conflict(_) => {}
                }
                self.finish(&item, Settlement::Acknowledge, outcome);
            }
            Err(error) if self.is_lost(&error) => {
                outcome.lost.get_or_insert(error);
            }
            // If the earlier delivery was rejected after all, this one is due at once.
            Err(error) if error.downcast_app::<Waits>().is_some() => {
                if item.noted {
                    let mut idle = self.never_began(item);
                    outcome.never_began.extend(idle.name.clone().map(|name| (name, idle.row())));
                    idle.accused = false;
                    self.wait_behind(idle);
                } else {
                    self.wait_behind(item);
                }
            }
            Err(error) if is_final(&error) || item.tries.failed().counted() >= self.settings.attempts => {
                let attempts = item.tries.failed().counted();
                self.refuse(item, &error, Some(attempts), outcome);
            }
            Err(error) => {
                count(&self.shared.retried);
                let mut item = item;
                item.tries = item.tries.failed();
                let (error, attempts) = (reason(&error), item.tries.counted());
                match self.paces.retries.admit(self.now_ms()) {
                    Some(held_back) => {
                        tracing::warn!(error, attempts, held_back, "a delivery is tried again later");
                    }
                    None => tracing::debug!(error, attempts, "a delivery is tried again later"),
                }
                outcome.failed.push(item);
            }
        }
    }

    /// Finishes a delivery, and settles it at the broker if the broker has it.
    pub(super) fn finish(&mut self, item: &Item, settlement: Settlement, outcome: &mut Outcome) {
        self.let_go(item);
        if let Some(number) = item.redriven {
            self.redriven.in_hand.remove(&number);
        } else if item.parked.is_none() {
            outcome.settlements.push((item.delivery.tag, settlement));
        }
    }

    /// Refuses a delivery that will never be applied by itself. `tried` is how often its handler
    /// had it, if it had.
    fn refuse(&mut self, item: Item, error: &Error, tried: Option<u32>, outcome: &mut Outcome) {
        let attempts = tried.unwrap_or_else(|| item.tries.counted().saturating_add(1));
        let refusal = Refusal::new(error, attempts, tried.is_some());
        let message_id = item.delivery.message.message_id.as_deref().map(plain);
        let message_id = message_id.as_deref();
        let (error, attempts) = (&refusal.reason, refusal.attempts);
        match self.paces.rejections.admit(self.now_ms()) {
            Some(held_back) => {
                tracing::error!(error, message_id, attempts, held_back, "a delivery is rejected");
            }
            None => tracing::debug!(error, message_id, attempts, "a delivery is rejected"),
        }
        let unknown_to = self.settings.unknown_to.filter(|_| item.identity.is_err());
        let to = unknown_to.unwrap_or(self.settings.reject_to);
        // The broker no longer has a parked delivery.
        if to == RejectTo::DeadLetter && item.is_the_brokers() {
            self.count_refusal(&refusal);
            self.finish(&item, Settlement::Reject, outcome);
            outcome.done.push(item);
        } else {
            outcome.refused.push((item, refusal));
        }
    }

    pub(super) fn count_refusal(&self, refusal: &Refusal) {
        count(&self.shared.rejected);
        if refusal.conflict {
            count(&self.shared.conflicts);
        }
    }

    /// Writes refused deliveries into the quarantine, with one commit for about 4 MiB. Deliveries
    /// that cannot be written stay in hand. Fails only if the store is lost.
    pub(super) fn quarantine(&mut self, outcome: &mut Outcome) -> Result<()> {
        let mut refused = std::mem::take(&mut outcome.refused).into_iter().peekable();
        while refused.peek().is_some() && outcome.lost.is_none() {
            let (step, bytes) = self.next_part(&mut refused, |(item, _)| item.size());
            if self.has_space(bytes) {
                self.quarantine_step(step, outcome)?;
            } else {
                self.put_back(step);
            }
        }
        Ok(())
    }

    fn quarantine_step(&mut self, refused: Vec<(Item, Refusal)>, outcome: &mut Outcome) -> Result<()> {
        let mut answers = Vec::with_capacity(refused.len());
        for (item, refusal) in refused {
            let (scope, delivery) = (self.settings.scope.clone(), Arc::clone(&item.delivery));
            let (identity, redriven) = (item.identity.as_ref().ok().map(Arc::clone), item.redriven);
            let (row, parked) = (item.noted_name(), item.parked);
            let for_closure = refusal.clone();
            let room = self.rejected_room(&item);
            let answer = self.settings.store.submit(&self.purpose, move |tx| {
                let is_gone = match parked {
                    Some(number) => !tx.is_parked(&scope, number)?,
                    None => false,
                };
                if is_gone {
                    return Ok(Kept::Again);
                }
                let kept = match redriven {
                    Some(number) => {
                        tx.reject_again(&scope, number, &for_closure).map(|()| Kept::Yes { dropped: 0 })
                    }
                    None => tx.reject_delivery(&scope, identity.as_deref(), &delivery, &for_closure, &room),
                }?;
                if kept != Kept::Full {
                    tx.leave_hand(&scope, row.as_ref(), parked)?;
                }
                Ok(kept)
            })?;
            answers.push((item, refusal, answer));
        }
        for (mut item, refusal, answer) in answers {
            match self.settings.store.answer(answer).map(Receipt::into_value) {
                Ok(Kept::Full) => self.found_no_room(item, refusal, outcome),
                Ok(kept) => {
                    if let Kept::Yes { dropped } = kept {
                        self.count_refusal(&refusal);
                        count(&self.shared.quarantined);
                        self.log_dropped(dropped);
                    } else {
                        count(&self.shared.repeated);
                    }
                    self.finish(&item, Settlement::Acknowledge, outcome);
                }
                Err(error) if self.is_lost(&error) => _ = outcome.lost.get_or_insert(error),
                Err(error) => {
                    match self.paces.retries.admit(self.now_ms()) {
                        Some(held_back) => {
                            tracing::warn!(%error, held_back, "a rejected delivery cannot be put into quarantine yet");
                        }
                        None => {
                            tracing::debug!(%error, "a rejected delivery cannot be put into quarantine yet");
                        }
                    }
                    item.tries = item.tries.failed();
                    self.defer(item);
                }
            }
        }
        Ok(())
    }

    fn log_dropped(&mut self, dropped: u64) {
        if dropped == 0 {
            return;
        }
        self.shared.dropped.fetch_add(dropped, Ordering::Relaxed);
        match self.paces.drops.admit(self.now_ms()) {
            Some(held_back) => {
                tracing::error!(
                    dropped,
                    held_back,
                    "the oldest rejected deliveries are dropped for a new one"
                );
            }
            None => tracing::debug!(dropped, "the oldest rejected deliveries are dropped for a new one"),
        }
    }

    /// Whether an earlier delivery of the key waits. A delivery taken out of the same line is not
    /// behind its own followers.
    fn has_failed_before(&self, key: &Arc<str>, place: u64) -> bool {
        self.waiting.first_of(key).is_some_and(|first| first < place)
    }

    /// Whether nothing can be written any more to this store. A handler may return such an error of
    /// another store.
    pub(super) fn is_lost(&self, error: &Error) -> bool {
        let lost =
            matches!(error, Error::Poisoned { .. } | Error::Closed { .. } | Error::CommitUnknown { .. });
        lost && self.settings.store.ready().is_err()
    }
}

/// A delivery, with everything that its transaction needs.
struct One {
    scope: String,
    handler: Arc<Handler>,
    identity: Arc<Identity>,
    item: Item,
}

impl One {
    /// Looks, handles, then marks. In this order, a handler that fails before it has written
    /// anything leaves the transaction clean.
    fn apply(&self, tx: &Transaction) -> Result<Applied> {
        let Self { scope, identity, item, .. } = self;
        if let Some(number) = item.redriven
            && !tx.is_redriven(scope, number)?
        {
            tx.leave_hand(scope, item.noted_name().as_ref(), None)?;
            return Ok(Applied::Gone);
        }
        if let Some(number) = item.parked
            && !tx.is_parked(scope, number)?
        {
            return Ok(Applied::Gone);
        }
        let first = match tx.is_first_delivery(scope, identity) {
            Err(error) if is_of_the_delivery(&error) => return Ok(Applied::Conflict(error)),
            first => first?,
        };
        if first {
            (self.handler)(&item.delivery, tx)?;
            tx.mark_delivery(scope, identity)?;
        }
        if let Some(number) = item.redriven {
            if let Some(refused_as) = &item.refused_as {
                tx.mark_applied(scope, refused_as)?;
            }
            tx.remove_rejected(scope, number)?;
        }
        tx.leave_hand(scope, item.noted_name().as_ref(), item.parked)?;
        Ok(if first { Applied::Done } else { Applied::Repeated })
    }
}

/// The places in one batch of a key's deliveries that have failed or are being tried. The
/// deliveries run one after another, and a delivery behind a failed one waits.
///
/// One flag would not do. When the group runs again without the failed delivery, the deliveries
/// before it run again too. They must neither wait for it nor clear its failure.
#[derive(Debug, Default)]
struct FailedPlaces(Mutex<BTreeSet<usize>>);

impl FailedPlaces {
    fn is_before(&self, at: usize) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).first().is_some_and(|first| *first < at)
    }

    fn note(&self, at: usize, failed: bool) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if failed {
            places.insert(at);
        } else {
            places.remove(&at);
        }
    }
}

/// Whether another try cannot heal the error.
fn is_final(error: &Error) -> bool {
    matches!(
        error,
        Error::Rejected(_)
            | Error::IdConflict { .. }
            | Error::LaneConflict { .. }
            | Error::BadId { .. }
            | Error::Event(EventError::Decode { .. })
    )
}

/// An earlier delivery of the same key failed in this batch.
#[derive(Debug, thiserror::Error)]
#[error("an earlier delivery of the same key waits for its next try")]
struct Waits;

/// The delivery has ended the process too often, and is not tried again.
#[derive(Debug, thiserror::Error)]
#[error("the process has ended {deaths} times while the handler had this delivery")]
struct Killed {
    deaths: u32,
}
