//! The consumer's thread: takes deliveries in, applies them in batches, says what has become of them.
//!
//! **Invariants.** A delivery is acknowledged only after the commit that applies it, recognises it or puts it into
//! quarantine. The thread sleeps unless something has come, is due, or was driven again.

mod intake;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::handle::{Shared, count};
use super::hold::Held;
use super::{ConsumerBuilder, GapPolicy, Handler, RejectTo};
use crate::error::{Error, EventError, Result};
use crate::event::uuid_text;
use crate::limits::CONSUMER_BATCH_MAX;
use crate::message::{FaultClass, Message};
use crate::printable::plain;
use crate::publish::{Delivery, DeliveryTag, Settlement, Source, SourceEvent};
use crate::store::log_pace::LogPace;
use crate::store::rejected::{Refusal, reason};
use crate::store::seen::Identity;
use crate::store::write_wait::Purpose;
use crate::store::{Receipt, Transaction};
use crate::time::{Deadline, Due, Look};
use crate::wire::ordering_key;

/// How often heads are looked at while something waits for a gap that somebody else may fill.
const HELD_LOOK: Duration = Duration::from_secs(1);

/// After this time what is done of a batch is told, though others of it are not.
const SETTLE_AFTER: Duration = Duration::from_millis(100);

/// A delivery in hand.
#[derive(Debug, Clone)]
struct Item {
    delivery: Arc<Delivery>,
    /// What it is recognised by, or why it cannot be taken at all.
    identity: Result<Arc<Identity>, Arc<Error>>,
    key: Option<Arc<str>>,
    attempts: u32,
    /// Its number in quarantine, if it was driven again from there.
    redriven: Option<u64>,
    /// It has waited for the gap before it, and does so once: not again for each try.
    waited: bool,
}

/// What a delivery's transaction did.
enum Applied {
    Done,
    Repeated,
    /// It was driven again, and has gone from quarantine meanwhile.
    Gone,
    /// What it claims to be is another message's.
    Conflict(Error),
}

/// What a batch has come to.
#[derive(Default)]
struct Outcome {
    settlements: Vec<(DeliveryTag, Settlement)>,
    /// For the quarantine.
    refused: Vec<(Item, Refusal)>,
    /// The store takes nothing more.
    lost: Option<Error>,
}

pub(super) struct Worker {
    /// What its writes are for.
    purpose: Purpose,
    settings: ConsumerBuilder,
    producers: Option<BTreeSet<[u8; 16]>>,
    handler: Arc<Handler>,
    source: Box<dyn Source>,
    shared: Arc<Shared>,
    /// Keys of which one delivery waits for its next try, with those that wait behind it.
    keys: HashMap<Arc<str>, VecDeque<Item>>,
    /// Deliveries that wait for their next try, by time; the number keeps them apart.
    due: BTreeMap<(Due, u64), Item>,
    scheduled: u64,
    held: Held<Item>,
    redriven: Redrives,
    /// Nobody is there any more who could deliver.
    source_gone: bool,
    paces: Paces,
}

/// How often is logged what each of many deliveries may meet.
#[derive(Debug, Default)]
struct Paces {
    retries: LogPace,
    rejections: LogPace,
}

/// Where the look for deliveries that are driven again stands.
#[derive(Debug)]
struct Redrives {
    /// There may be some that are not in hand.
    look: bool,
    /// The last one that was found, where there were more.
    after: Option<u64>,
    in_hand: HashSet<u64>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("scope", &self.settings.scope).finish_non_exhaustive()
    }
}

impl Worker {
    pub(super) fn new(
        settings: ConsumerBuilder,
        producers: Option<BTreeSet<[u8; 16]>>,
        handler: Arc<Handler>,
        source: Box<dyn Source>,
        shared: Arc<Shared>,
    ) -> Self {
        let purpose = Purpose::Handler("consumer", settings.scope.as_str().into());
        Self {
            purpose,
            settings,
            producers,
            handler,
            source,
            shared,
            keys: HashMap::new(),
            due: BTreeMap::new(),
            scheduled: 0,
            held: Held::default(),
            source_gone: false,
            paces: Paces::default(),
            // What was driven again while no consumer ran waits in the file.
            redriven: Redrives { look: true, after: None, in_hand: HashSet::new() },
        }
    }

    pub(super) fn run(
        mut self,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
        rung: &Receiver<()>,
    ) {
        let mut deadline = None;
        while deadline.is_none() {
            let mut batch = self.take_due();
            let first = if batch.is_empty() && !self.may_look() {
                self.wait(events, stop, rung, &mut deadline)
            } else {
                None
            };
            let more = std::iter::from_fn(|| events.try_recv().ok());
            for event in first.into_iter().chain(more) {
                self.receive(event, &mut batch);
                if batch.len() >= CONSUMER_BATCH_MAX {
                    break;
                }
            }
            if let Ok(at) = stop.try_recv() {
                deadline = Some(at);
            }
            if self.source_gone {
                tracing::error!("the consumer ends: its source has ended by itself");
                let mut failed = self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner);
                *failed = Some("the source has ended by itself".into());
                break;
            }
            if rung.try_recv().is_ok() {
                self.look_again();
            }
            if let Err(error) = self.turn(batch) {
                tracing::error!(%error, "the consumer ends: its store takes nothing more");
                *self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
                break;
            }
        }
        let left = deadline.map_or(Duration::from_secs(2), Deadline::left_or_max);
        self.source.stop(left);
    }

    /// Fails only if the store is lost.
    fn turn(&mut self, mut batch: Vec<Item>) -> Result<()> {
        if let Err(error) = self.load_redriven(&mut batch) {
            self.settings.store.ready()?;
            // The next ring looks again.
            self.redriven.look = false;
            tracing::error!(%error, "what is driven again cannot be read now");
        }
        let kept = batch.clone();
        match self.hold_back(batch) {
            Ok(batch) => self.apply(batch),
            Err(error) => {
                self.settings.store.ready()?;
                tracing::error!(%error, "what a lane has seen cannot be read now; tried again later");
                kept.into_iter().for_each(|item| self.put_off(item));
                Ok(())
            }
        }
    }

    fn wait(
        &mut self,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
        rung: &Receiver<()>,
        deadline: &mut Option<Deadline>,
    ) -> Option<SourceEvent> {
        let due = self.due.keys().next().map(|(due, _)| *due);
        let due = due.into_iter().chain(self.held.deadline()).map(Due::wake_at);
        // A gap may be filled elsewhere: by another consumer of the scope, or from the quarantine.
        let look = (self.held.len() > 0).then(|| Deadline::after(HELD_LOOK));
        let until = due.chain(look).min().and_then(Deadline::instant);
        let timer = until.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
        crossbeam_channel::select! {
            recv(events) -> event => {
                self.source_gone = event.is_err();
                event.ok()
            }
            recv(stop) -> at => {
                *deadline = Some(at.unwrap_or_else(|_| Deadline::now()));
                None
            }
            recv(rung) -> _ => {
                self.look_again();
                None
            }
            recv(timer) -> _ => None,
        }
    }

    fn look(&self) -> Look {
        Look::at(&*self.settings.store.core().settings.clock)
    }

    fn receive(&mut self, event: SourceEvent, batch: &mut Vec<Item>) {
        match event {
            SourceEvent::Up { epoch } => {
                tracing::info!(epoch = epoch.0, "consuming");
                count(&self.shared.connections);
                *self.shared.disconnected.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            SourceEvent::Down { epoch, fault } => {
                if fault.class == FaultClass::Config {
                    tracing::error!(epoch = epoch.0, %fault, "refused by the broker");
                } else {
                    tracing::warn!(epoch = epoch.0, %fault, "not consuming");
                }
                *self.shared.disconnected.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
                self.forget_delivered();
                batch.retain(|item| item.redriven.is_some() || item.delivery.tag.epoch > epoch);
            }
            SourceEvent::Delivery(delivery) => {
                let identity = self.identify(&delivery.message).map(Arc::new).map_err(Arc::new);
                let key = self.key_of(&delivery.message, identity.as_deref().ok());
                let item = Item {
                    delivery: Arc::from(delivery),
                    identity,
                    key,
                    attempts: 0,
                    redriven: None,
                    waited: false,
                };
                self.admit(item, batch);
            }
        }
    }

    /// The broker will deliver again all that it has delivered. What was driven again is ours.
    fn forget_delivered(&mut self) {
        self.held.clear();
        self.shared.held.store(0, Ordering::Relaxed);
        let behind = std::mem::take(&mut self.keys).into_values().flatten();
        self.due.retain(|_, item| item.redriven.is_some());
        self.keys = self.due.values().filter_map(|item| Some((item.key.clone()?, VecDeque::new()))).collect();
        for item in behind.filter(|item| item.redriven.is_some()).collect::<Vec<_>>() {
            self.hold(item);
        }
    }

    fn identify(&self, message: &Message) -> Result<Identity> {
        let identity = Identity::of(&self.settings.scope, message)?;
        match (&self.producers, identity.place()) {
            (Some(producers), Some((lane, _))) if !producers.contains(&lane.store) => {
                Err(Error::UnknownProducer { producer: uuid_text(lane.store).into() })
            }
            _ => Ok(identity),
        }
    }

    /// What keeps its order. Where gaps are waited for, a lane does, whether its events have a key or not.
    fn key_of(&self, message: &Message, identity: Option<&Identity>) -> Option<Arc<str>> {
        let holding = matches!(self.settings.gap, GapPolicy::Hold(_));
        let of_lane = || identity.filter(|_| holding)?.place().map(|(lane, _)| format!("\0{lane:?}").into());
        ordering_key(message).map(Arc::from).or_else(of_lane)
    }

    /// Puts a delivery into the batch, or behind the one of its key that waits.
    fn admit(&mut self, item: Item, batch: &mut Vec<Item>) {
        match item.key.as_ref().and_then(|key| self.keys.get_mut(key)) {
            Some(behind) => behind.push_back(item),
            None => batch.push(item),
        }
    }

    /// Those whose next try is due, each with those that wait behind it.
    fn take_due(&mut self) -> Vec<Item> {
        let mut batch = Vec::new();
        if self.due.is_empty() {
            return batch;
        }
        let look = self.look();
        while let Some(entry) = self.due.first_entry()
            && entry.key().0.has_come(look)
        {
            let item = entry.remove();
            let behind = item.key.as_ref().and_then(|key| self.keys.remove(key));
            batch.push(item);
            batch.extend(behind.into_iter().flatten());
        }
        batch
    }

    // --- applying ---------------------------------------------------------------------------------------------------

    /// Applies a batch, one closure each, and settles what has become of them. Fails only if the store is lost.
    fn apply(&mut self, batch: Vec<Item>) -> Result<()> {
        let mut outcome = Outcome::default();
        #[cfg(onewrite_mutations)]
        self.acknowledge_before_commit(&batch);
        let mut answers = VecDeque::with_capacity(batch.len());
        let mut failed_keys: HashMap<Arc<str>, Arc<FailedPlaces>> = HashMap::new();
        for (at, item) in batch.into_iter().enumerate() {
            let identity = match &item.identity {
                Ok(identity) => Arc::clone(identity),
                Err(error) => {
                    let error = Arc::clone(error);
                    self.refuse(item, &error, false, &mut outcome);
                    continue;
                }
            };
            let failed = item
                .key
                .as_ref()
                .map(|key| (at, Arc::clone(failed_keys.entry(Arc::clone(key)).or_default())));
            match self.settings.store.submit(&self.purpose, self.closure(&item, identity, failed)) {
                Ok(answer) => answers.push_back((item, answer)),
                // What has been handed over before has its outcome all the same, and the broker is told of it.
                Err(error) => {
                    outcome.lost.get_or_insert(error);
                    break;
                }
            }
        }
        let mut told = Instant::now();
        for (item, answer) in answers {
            let result = self.settings.store.answer(answer).map(Receipt::into_value);
            self.settle(item, result, &mut outcome);
            if told.elapsed() >= SETTLE_AFTER {
                // A batch of slow handlers takes a while: the broker gives more as soon as some of it is done.
                self.tell_source(&mut outcome);
                told = Instant::now();
            }
        }
        let quarantined = self.quarantine(&mut outcome);
        self.tell_source(&mut outcome);
        quarantined?;
        outcome.lost.map_or(Ok(()), Err)
    }

    /// What is durable is acknowledged.
    fn tell_source(&mut self, outcome: &mut Outcome) {
        #[cfg(onewrite_mutations)]
        if crate::mutations::mutated("acknowledge-before-commit") {
            outcome.settlements.clear();
        }
        self.source.settle(std::mem::take(&mut outcome.settlements));
    }

    #[cfg(onewrite_mutations)]
    fn acknowledge_before_commit(&mut self, batch: &[Item]) {
        if crate::mutations::mutated("acknowledge-before-commit") {
            let broker_has_it = |item: &&Item| item.redriven.is_none() && item.attempts == 0;
            let tags =
                batch.iter().filter(broker_has_it).map(|item| (item.delivery.tag, Settlement::Acknowledge));
            self.source.settle(tags.collect());
        }
    }

    /// The transaction of one delivery. `failed`: its place in the batch, and what those of its key share.
    fn closure(
        &self,
        item: &Item,
        identity: Arc<Identity>,
        failed: Option<(usize, Arc<FailedPlaces>)>,
    ) -> impl FnMut(&Transaction) -> Result<Applied> + Send + 'static {
        let (handler, delivery) = (Arc::clone(&self.handler), Arc::clone(&item.delivery));
        let (scope, redriven) = (self.settings.scope.clone(), item.redriven);
        move |tx| {
            let Some((at, failed)) = &failed else {
                return apply_one(tx, &scope, &identity, redriven, || handler(&delivery, tx));
            };
            if failed.is_before(*at) {
                return Err(Error::app(Waits));
            }
            // Until it is known to have succeeded; a panic leaves it so.
            failed.note(*at, true);
            let result = apply_one(tx, &scope, &identity, redriven, || handler(&delivery, tx));
            // One that is rejected does not hold back its key: it will never be applied.
            failed.note(*at, matches!(&result, Err(error) if !is_final(error)));
            result
        }
    }

    fn settle(&mut self, item: Item, result: Result<Applied>, outcome: &mut Outcome) {
        match result {
            Ok(Applied::Conflict(error)) => self.refuse(item, &error, false, outcome),
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
            Err(error) if error.downcast_app::<Waits>().is_some() => self.hold(item),
            Err(error) if is_final(&error) || item.attempts + 1 >= self.settings.attempts => {
                self.refuse(item, &error, true, outcome);
            }
            Err(error) => {
                count(&self.shared.retried);
                let (error, attempts) = (reason(&error), item.attempts + 1);
                match self.paces.retries.admit(self.now_ms()) {
                    Some(held_back) => {
                        tracing::warn!(error, attempts, held_back, "a delivery is tried again later");
                    }
                    None => tracing::debug!(error, attempts, "a delivery is tried again later"),
                }
                self.put_off(item);
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.settings.store.core().settings.clock.now().mono_ms
    }

    /// Done with it: the broker is told, if it is the broker's.
    fn finish(&mut self, item: &Item, settlement: Settlement, outcome: &mut Outcome) {
        match item.redriven {
            Some(number) => _ = self.redriven.in_hand.remove(&number),
            None => outcome.settlements.push((item.delivery.tag, settlement)),
        }
    }

    /// It will never be applied by itself.
    fn refuse(&mut self, item: Item, error: &Error, by_handler: bool, outcome: &mut Outcome) {
        let refusal = Refusal::new(error, item.attempts + 1, by_handler);
        let message_id = item.delivery.message.message_id.as_deref().map(plain);
        let message_id = message_id.as_deref();
        let (error, attempts) = (&refusal.reason, refusal.attempts);
        match self.paces.rejections.admit(self.now_ms()) {
            Some(held_back) => {
                tracing::error!(error, message_id, attempts, held_back, "a delivery is rejected");
            }
            None => tracing::debug!(error, message_id, attempts, "a delivery is rejected"),
        }
        if self.settings.reject_to == RejectTo::DeadLetter && item.redriven.is_none() {
            self.count_refusal(&refusal);
            self.finish(&item, Settlement::Reject, outcome);
        } else {
            outcome.refused.push((item, refusal));
        }
    }

    fn count_refusal(&self, refusal: &Refusal) {
        count(&self.shared.rejected);
        if refusal.conflict {
            count(&self.shared.conflicts);
        }
    }

    /// Writes what is refused into the quarantine, one commit for all. What cannot be written stays in hand. Fails only if
    /// the store is lost.
    fn quarantine(&mut self, outcome: &mut Outcome) -> Result<()> {
        let mut answers = Vec::with_capacity(outcome.refused.len());
        for (item, refusal) in std::mem::take(&mut outcome.refused) {
            let (scope, delivery) = (self.settings.scope.clone(), Arc::clone(&item.delivery));
            let (identity, redriven) = (item.identity.as_ref().ok().map(Arc::clone), item.redriven);
            let for_closure = refusal.clone();
            let answer = self.settings.store.submit(&self.purpose, move |tx| match redriven {
                Some(number) => tx.reject_again(&scope, number, &for_closure).map(|()| true),
                None => tx.reject_delivery(&scope, identity.as_deref(), &delivery, &for_closure),
            })?;
            answers.push((item, refusal, answer));
        }
        for (item, refusal, answer) in answers {
            match self.settings.store.answer(answer).map(Receipt::into_value) {
                Ok(first) => {
                    if first {
                        self.count_refusal(&refusal);
                        count(&self.shared.quarantined);
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
                    self.put_off(item);
                }
            }
        }
        Ok(())
    }

    /// Behind the one of its key that failed in the same batch; if that one was rejected after all, due at once.
    fn hold(&mut self, item: Item) {
        match item.key.as_ref().and_then(|key| self.keys.get_mut(key)) {
            Some(behind) => behind.push_back(item),
            None => self.schedule(Duration::ZERO, item),
        }
    }

    /// The error says that nothing can be written any more, and it is this store that says so: a handler may have met another.
    fn is_lost(&self, error: &Error) -> bool {
        let lost =
            matches!(error, Error::Poisoned { .. } | Error::Closed { .. } | Error::CommitUnknown { .. });
        lost && self.settings.store.ready().is_err()
    }

    fn put_off(&mut self, mut item: Item) {
        let (first, longest) = self.settings.backoff;
        let wait = first.saturating_mul(1 << item.attempts.min(16)).min(longest);
        item.attempts = item.attempts.saturating_add(1);
        match item.key.as_ref().and_then(|key| self.keys.get_mut(key)) {
            // An earlier one of its key waits already: one time per key, or the later would overtake.
            Some(behind) => behind.push_back(item),
            None => self.schedule(wait, item),
        }
    }

    fn schedule(&mut self, wait: Duration, item: Item) {
        if let Some(key) = &item.key {
            self.keys.entry(Arc::clone(key)).or_default();
        }
        self.scheduled += 1;
        let due = self.look().after(wait);
        self.due.insert((due, self.scheduled), item);
    }
}

impl Item {
    /// Its lane and number, if the broker has delivered it in one.
    fn place(&self) -> Option<(crate::event::LaneOf, u64)> {
        let identity = self.identity.as_ref().ok().filter(|_| self.redriven.is_none())?;
        identity.place()
    }
}

/// Looks, handles, marks; in this order, so that a handler that fails before it has written anything leaves the
/// transaction clean.
fn apply_one(
    tx: &Transaction,
    scope: &str,
    identity: &Identity,
    redriven: Option<u64>,
    handle: impl FnOnce() -> Result<()>,
) -> Result<Applied> {
    if let Some(number) = redriven
        && !tx.is_redriven(scope, number)?
    {
        return Ok(Applied::Gone);
    }
    let first = match tx.is_first_delivery(scope, identity) {
        Err(error @ (Error::LaneConflict { .. } | Error::IdConflict { .. })) => {
            return Ok(Applied::Conflict(error));
        }
        first => first?,
    };
    if first {
        handle()?;
        tx.mark_delivery(scope, identity)?;
    }
    if let Some(number) = redriven {
        tx.remove_rejected(scope, number)?;
    }
    Ok(if first { Applied::Done } else { Applied::Repeated })
}

/// The places in one batch of those of one key that have failed, or are being tried. They run one after another, and whoever
/// comes behind a failed one waits. One flag would not do: when the group runs again without the failed one, those before
/// it run again too, and must neither wait for it nor take its word back.
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

/// Errors that another try cannot heal.
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
