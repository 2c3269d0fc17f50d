//! The consumer's thread: takes deliveries in, applies them in batches, and settles them.
//!
//! **Invariants.** A delivery is acknowledged only after the commit that applies it, recognises it,
//! parks it or quarantines it. The thread sleeps unless something has come, is due, or was
//! redriven.
//!
//! | file | does |
//! |---|---|
//! | `mod.rs` | takes deliveries in, decides what is tried next |
//! | `apply` | applies a batch and settles its deliveries |
//! | `tried` | what is known of tries, and what is written down |
//! | `parking` | parks waiting deliveries, takes them up again |
//! | `intake` | redrives and gaps |
//! | `meanwhile` | takes in what comes while handlers run, and before the first of them |
//! | `room` | waits if there is no room for what deliveries write |
//! | `survivors` | deliveries that outlive their connection |
//! | `item` | a delivery in hand |

mod apply;
mod intake;
mod item;
mod meanwhile;
mod parking;
mod room;
mod survivors;
mod tried;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crossbeam_channel::Receiver;

use self::item::{Entry, Item};
use self::meanwhile::Meanwhile;
use self::parking::Hand;
use self::room::Unkept;
use self::survivors::Survivors;
use super::dedup::Identity;
use super::handle::{Shared, count};
use super::hold::Held;
use super::space::SpaceLeft;
use super::waiting::Waiting;
use super::{ConsumerBuilder, ConsumerWait, GapPolicy, Handler};
use crate::broker::{Delivery, Source, SourceEvent};
use crate::error::{Error, Result};
use crate::event::uuid_text;
use crate::message::{FaultClass, Message};
use crate::store::shared::log_pace::LogPace;
use crate::store::shared::write_wait::Purpose;
use crate::time::{Deadline, Due, Look};
use crate::tuning::{CONSUMER_BATCH_MAX, PARKING_STEP_BYTES, RETRY_ITERATIONS};
use crate::wire::ordering_key;

/// How often the thread looks at high-water marks while a delivery waits for a gap that others may
/// fill.
const HELD_LOOK: Duration = Duration::from_secs(1);

/// How long the thread waits for the next delivery while requeued deliveries come.
const RETURNED_LINGER: Duration = Duration::from_millis(20);

pub(super) struct Worker {
    /// The unsettled bytes beyond which the source delivers nothing.
    prefetch_bytes: u64,
    /// The purpose of the worker's writes.
    purpose: Purpose,
    settings: ConsumerBuilder,
    producers: Option<BTreeSet<[u8; 16]>>,
    handler: Arc<Handler>,
    source: Box<dyn Source>,
    shared: Arc<Shared>,
    /// Deliveries that wait for their next try, and those of their keys behind them.
    waiting: Waiting<Entry>,
    /// Deliveries that wait for a gap in their lane.
    held: Held<Entry>,
    /// When to look again at the high-water marks of all lanes with held deliveries.
    held_look: Deadline,
    /// How many deliveries have come so far.
    places: u64,
    /// How many batches there were so far.
    iterations: u64,
    hand: Hand,
    /// Whether a delivery has come that is taken into the store before it is tried.
    returned: bool,
    /// Keys of the running batch's deliveries that the broker has.
    running: HashSet<Arc<str>>,
    /// Something could not be parked because of these keys. The worker tries again after the batch.
    behind_running: bool,
    survivors: Survivors,
    /// Deliveries that came while handlers ran.
    meanwhile: Meanwhile,
    /// Rejected deliveries that the quarantine has no room for.
    unkept: Unkept,
    space: SpaceLeft,
    /// Why nothing more is taken from the broker.
    waits_for: Option<ConsumerWait>,
    /// Whether the beginning of the wait is yet to be logged.
    began_to_wait: bool,
    redriven: Redrives,
    /// Whether the last iteration did not read the source. The next one then reads it first.
    heard_nothing: bool,
    /// Whether the source has ended.
    source_gone: bool,
    paces: Paces,
}

/// How often the worker logs events that each of many deliveries may meet.
#[derive(Debug, Default)]
struct Paces {
    retries: LogPace,
    rejections: LogPace,
    drops: LogPace,
    waits: LogPace,
    goes_on: LogPace,
}

/// The state of the search for deliveries to redrive.
#[derive(Debug)]
struct Redrives {
    /// Whether there may be some that are not in hand.
    look: bool,
    /// The last delivery that was found, if there were more.
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
        let hand = Hand::new(&settings);
        let prefetch_bytes = source.unsettled_bytes_max();
        let journal = settings.store.core().settings.journal_bytes as u64;
        let space = SpaceLeft::new(settings.free_space_min, journal);
        Self {
            prefetch_bytes,
            purpose,
            settings,
            producers,
            handler,
            source,
            shared,
            waiting: Waiting::default(),
            held: Held::default(),
            held_look: Deadline::now(),
            places: 0,
            iterations: 0,
            hand,
            returned: false,
            running: HashSet::new(),
            behind_running: false,
            survivors: Survivors::default(),
            meanwhile: Meanwhile::default(),
            unkept: Unkept::default(),
            space,
            waits_for: None,
            began_to_wait: false,
            heard_nothing: false,
            source_gone: false,
            paces: Paces::default(),
            // Redrives from a time without a consumer wait in the file.
            redriven: Redrives { look: true, after: None, in_hand: HashSet::new() },
        }
    }

    pub(super) fn run(
        mut self,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
        notified: &Receiver<()>,
    ) {
        let mut deadline = None;
        self.load_tries();
        self.load_parked(stop);
        self.await_source(events, stop);
        while deadline.is_none() {
            self.load_parked(stop);
            let paused = self.is_paused();
            if let Err(error) = if paused { Ok(()) } else { self.seek_room() } {
                self.end_for(&error);
                break;
            }
            self.log_wait();
            let waits = paused || self.is_waiting_for_room();
            let others_come = !waits && (!events.is_empty() || !self.meanwhile.is_empty());
            let has_events = !events.is_empty() || self.meanwhile.next.is_some();
            let may_try = !paused && self.may_try_those_that_wait() && !(has_events && self.heard_nothing);
            let may_look = self.may_look() && !self.rests();
            let mut batch = if may_try { self.take_due(others_come) } else { Vec::new() };
            let due = batch.len();
            if !waits {
                self.go_on_with_those_of_meanwhile(&mut batch);
            }
            // While nothing is taken, deliveries are tried and done with before the end of their
            // connection is read.
            let hears = !waits || batch.is_empty();
            self.heard_nothing = !hears;
            let first = match self.meanwhile.next.take_if(|_| hears) {
                None if batch.is_empty() && !may_look => self.wait(events, stop, notified, &mut deadline),
                next => next,
            };
            let more = std::iter::from_fn(|| if hears { events.try_recv().ok() } else { None });
            for event in first.into_iter().chain(more) {
                if waits {
                    self.take_meanwhile(event);
                    continue;
                }
                self.receive(event, &mut batch);
                if batch.len() >= CONSUMER_BATCH_MAX {
                    break;
                }
            }
            if self.returned && !waits {
                self.gather(events, &mut batch);
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
            if notified.try_recv().is_ok() {
                self.look_again();
            }
            if self.is_waiting_for_space() {
                continue;
            }
            if paused {
                // Deliveries that the broker may drop are parked even during a pause.
                if let Err(error) = self.take_in_meanwhile(events) {
                    self.end_for(&error);
                    break;
                }
                continue;
            }
            if self.is_paused() {
                // The pause came while the thread slept. New deliveries wait, and so do those that
                // were due.
                let mut come = batch.split_off(due);
                come.append(&mut self.meanwhile.batch);
                self.meanwhile.batch = come;
                self.put_back_due(batch);
                continue;
            }
            if let Err(error) = self.iterate(batch, events, stop) {
                self.end_for(&error);
                break;
            }
        }
        let left = deadline.map_or(Duration::from_secs(2), Deadline::left_or_max);
        self.source.stop(left);
    }

    fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::Acquire)
    }

    /// Whether nothing is tried now, even if something is due.
    fn rests(&self) -> bool {
        self.is_paused() || self.is_waiting_for_space()
    }

    fn end_for(&self, error: &Error) {
        tracing::error!(%error, "the consumer ends: its store takes nothing more");
        *self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }

    /// Runs one iteration. Fails only if the store is lost.
    fn iterate(
        &mut self,
        mut batch: Vec<Item>,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
    ) -> Result<()> {
        if let Err(error) = self.load_redriven(&mut batch) {
            self.settings.store.ready()?;
            // The next notification looks again.
            self.redriven.look = false;
            tracing::error!(%error, "what is driven again cannot be read now");
        }
        // Only holding back may fail.
        let kept = matches!(self.settings.gap, GapPolicy::Hold(_)).then(|| batch.clone());
        match self.hold_back(batch) {
            Ok(batch) => self.apply(batch, events, stop)?,
            Err(error) => {
                self.settings.store.ready()?;
                tracing::error!(%error, "the deduplication rows of a lane cannot be read now; tried again later");
                kept.into_iter().flatten().for_each(|item| self.defer(item));
            }
        }
        let now = self.look().now();
        self.waiting.tried(now);
        self.park_those_that_wait()
    }

    fn wait(
        &mut self,
        events: &Receiver<SourceEvent>,
        stop: &Receiver<Deadline>,
        notified: &Receiver<()>,
        deadline: &mut Option<Deadline>,
    ) -> Option<SourceEvent> {
        let waiting = self.waiting.next_due().filter(|_| self.may_try_those_that_wait());
        let due = waiting.into_iter().chain(self.held.deadline()).map(Due::wake_at);
        let due = due.filter(|_| !self.rests());
        // A gap may be filled elsewhere: by another consumer of the scope, or from the quarantine.
        let look = (self.held.len() > 0 && !self.rests()).then(|| Deadline::after(HELD_LOOK));
        let parked = self.hand.looks_again();
        let room = self.looks_for_room().filter(|_| !self.is_paused());
        let until = due.chain(look).chain(parked).chain(room).min().and_then(Deadline::instant);
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
            recv(notified) -> _ => {
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
                self.forget_delivered(batch);
            }
            SourceEvent::Delivery(delivery) => {
                let identity = self.identify(&delivery).map(Arc::new).map_err(Arc::new);
                let key = self.key_of(&delivery.message, identity.as_deref().ok());
                let item = self.recall(Item::new(*delivery, identity, key));
                self.returned |= self.is_taken_in(&item);
                if let Some(item) = self.replace_survivor(item, batch) {
                    self.admit(item, batch);
                }
            }
        }
    }

    /// Gathers requeued deliveries, which go into the store before any handler runs. While a
    /// handler runs, each cut requeues unread deliveries once more. So the worker waits for all
    /// that the prefetch allows, as long as they keep coming.
    fn gather(&mut self, events: &Receiver<SourceEvent>, batch: &mut Vec<Item>) {
        while batch.len() < usize::from(self.settings.prefetch)
            && let Ok(event) = events.recv_timeout(RETURNED_LINGER)
        {
            self.receive(event, batch);
        }
    }

    fn identify(&self, delivery: &Delivery) -> Result<Identity> {
        let store = &self.settings.store.core().identity;
        let identity = Identity::of_delivery(store, &self.settings.scope, delivery)?;
        if let Some(keys) = &self.settings.keys {
            keys.verify(&delivery.message)?;
        }
        match (&self.producers, identity.place()) {
            (Some(producers), Some((lane, _))) if !producers.contains(&lane.store) => {
                Err(Error::UnknownProducer { producer: uuid_text(lane.store).into() })
            }
            _ => Ok(identity),
        }
    }

    /// The key by which a delivery keeps its order. With [`GapPolicy::Hold`], a lane keeps its
    /// order even without a key.
    fn key_of(&self, message: &Message, identity: Option<&Identity>) -> Option<Arc<str>> {
        let holding = matches!(self.settings.gap, GapPolicy::Hold(_));
        let of_lane = || identity.filter(|_| holding)?.place().map(|(lane, _)| format!("\0{lane:?}").into());
        ordering_key(message).map(Arc::from).or_else(of_lane)
    }

    /// Puts a delivery into the batch, or behind waiting deliveries of its key.
    fn admit(&mut self, mut item: Item, batch: &mut Vec<Item>) {
        self.places += 1;
        item.place = self.places;
        if item.key.as_ref().is_some_and(|key| self.waiting.has(key)) {
            self.wait_behind(item);
        } else {
            batch.push(item);
        }
    }

    /// Puts an item behind the delivery of its key that failed before it, if that still waits.
    fn wait_behind(&mut self, item: Item) {
        let now = self.look().now();
        let (key, place) = (item.key.clone(), item.place);
        self.waiting.put(key.as_ref(), place, Entry::of(item), now, false);
    }

    /// Takes deliveries whose next try is due. While others come, due ones get one in several
    /// iterations, and at most half of a batch.
    fn take_due(&mut self, others_come: bool) -> Vec<Item> {
        self.iterations = self.iterations.wrapping_add(1);
        if self.waiting.is_empty() || (others_come && !self.iterations.is_multiple_of(RETRY_ITERATIONS)) {
            return Vec::new();
        }
        let room = if others_come { CONSUMER_BATCH_MAX / 2 } else { CONSUMER_BATCH_MAX };
        let taken = self.waiting.take(self.look(), room, PARKING_STEP_BYTES);
        self.with_bodies(taken)
    }

    /// Puts due deliveries that are not tried after all back into their lines.
    fn put_back_due(&mut self, items: Vec<Item>) {
        let now = self.look().now();
        for item in items {
            let (key, place) = (item.key.clone(), item.place);
            // Like a failed one: it is tried without those behind it.
            self.waiting.put(key.as_ref(), place, Entry::of(item), now, true);
        }
        self.waiting.tried(now);
    }

    fn now_ms(&self) -> u64 {
        self.settings.store.core().settings.clock.now().mono_ms
    }

    /// Defers an item until its next try.
    fn defer(&mut self, item: Item) {
        let (first, longest) = self.settings.backoff;
        let wait = first.saturating_mul(1 << item.tries.failures.saturating_sub(1).min(16)).min(longest);
        let due = self.look().after(wait);
        let (key, place) = (item.key.clone(), item.place);
        self.waiting.put(key.as_ref(), place, Entry::of(item), due, true);
    }
}
