//! Waiting for room. If there is no room for what deliveries write, the consumer stops taking them,
//! warns once, and goes on by itself.
//!
//! **Invariant.** A delivery without room is neither acknowledged nor dropped. It stays in hand and
//! with the broker until there is room. While a consumer waits for room in its quarantine, redrives
//! and deliveries that wait for their next try go on, because they make room.

use std::iter::Peekable;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::apply::Outcome;
use super::item::Item;
use super::{Worker, count};
use crate::broker::{Settlement, SourceEvent};
use crate::consumer::in_hand::ParkedRoom;
use crate::consumer::reject::Refusal;
use crate::consumer::rejected_room::RejectedRoom;
use crate::consumer::{ConsumerWait, RejectTo, RejectedFull};
use crate::error::Result;
use crate::log::in_hand::Open;
use crate::storage::free_space::space_at;
use crate::time::Deadline;
use crate::tuning::{CONSUMER_BATCH_MAX, ROOM_LOOK_MS};

/// The deliveries that have found no room.
#[derive(Default)]
pub(super) struct Unkept {
    items: Vec<(Item, Refusal)>,
    look_at: Option<Deadline>,
}

impl Unkept {
    pub(super) fn items(&self) -> impl Iterator<Item = &Item> {
        self.items.iter().map(|(item, _)| item)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Removes the deliveries that `keeps` does not keep.
    pub(super) fn retain(&mut self, keeps: impl Fn(&Item) -> bool) {
        self.items.retain(|(item, _)| keeps(item));
    }

    /// Replaces one of these deliveries with another. Returns the new delivery if the old one is
    /// not among them.
    pub(super) fn replace(&mut self, is_it: impl Fn(&Item) -> bool, item: Item) -> Option<Item> {
        let Some((kept, _)) = self.items.iter_mut().find(|(kept, _)| is_it(kept)) else { return Some(item) };
        *kept = item;
        None
    }
}

impl Worker {
    /// How much rejected deliveries may take. The broker no longer has a parked delivery, whose
    /// bytes are in the file already. The quarantine admits it while it holds less than both bounds
    /// together.
    pub(super) fn rejected_room(&self, item: &Item) -> RejectedRoom {
        let (rows, bytes) = self.settings.rejected_max;
        let (more_rows, more_bytes) = item.parked.map_or((0, 0), |_| self.settings.parked_max);
        RejectedRoom {
            rows_max: rows.saturating_add(more_rows),
            bytes_max: bytes.saturating_add(more_bytes),
            full: self.settings.rejected_full,
            gives_back: self.gives_back(item),
        }
    }

    /// Whether the broker gets the delivery back if the quarantine has no room. The broker does not
    /// have parked ones any more.
    fn gives_back(&self, item: &Item) -> bool {
        self.settings.rejected_full == RejectedFull::DeadLetter && item.is_the_brokers()
    }

    /// How much may be parked. If the broker gets back deliveries without room in the quarantine,
    /// each parked delivery must have room there. It cannot be given back, and would stop the
    /// consumer.
    pub(super) fn parked_room(&self) -> ParkedRoom {
        let (rows, bytes) = self.settings.parked_max;
        let (more_rows, more_bytes) = self.settings.rejected_max;
        let gives_back = self.settings.rejected_full == RejectedFull::DeadLetter
            || self.settings.reject_to == RejectTo::DeadLetter;
        let both = (rows.saturating_add(more_rows), bytes.saturating_add(more_bytes));
        ParkedRoom { max: (rows, bytes), max_with_rejected: gives_back.then_some(both) }
    }

    /// Handles a delivery for which the quarantine has no room. A parked one cannot be given back
    /// to the broker.
    pub(super) fn found_no_room(&mut self, item: Item, refusal: Refusal, outcome: &mut Outcome) {
        if self.gives_back(&item) {
            self.count_refusal(&refusal);
            self.finish(&item, Settlement::Reject, outcome);
            outcome.done.push(item);
            return;
        }
        let mut item = item;
        if item.noted && item.tries.open != Open::None {
            // The try is over. If the process dies during the wait for room, this delivery is not
            // the cause.
            item = self.never_began(item);
            outcome.never_began.extend(item.noted_name().map(|name| (name, item.row())));
        }
        self.unkept.items.push((item, refusal));
        self.wait_for(ConsumerWait::Quarantine);
    }

    /// Puts back deliveries for the quarantine, because the disk has too little free space.
    pub(super) fn put_back(&mut self, refused: Vec<(Item, Refusal)>) {
        self.unkept.items.extend(refused);
    }

    /// Whether deliveries of this many bytes may be written. If not, the consumer waits for the
    /// disk.
    pub(super) fn has_space(&mut self, bytes: usize) -> bool {
        let core = self.settings.store.core();
        let discarded = core.discarded.load(Ordering::Relaxed);
        let has = self.space.take(bytes as u64, discarded, || space_at(&core.path));
        if !has {
            self.wait_for(ConsumerWait::FreeSpace);
        }
        has
    }

    /// Whether memory has room for more deliveries that may find no room in the quarantine.
    pub(super) fn may_try_those_that_wait(&self) -> bool {
        self.unkept.items.len() < CONSUMER_BATCH_MAX && !self.is_waiting_for_space()
    }

    pub(super) fn spend_space(&mut self, bytes: usize) {
        self.space.spend(bytes as u64);
    }

    /// Returns the items that one step should write, at least one, with their bytes.
    pub(super) fn next_part<T>(
        &mut self,
        items: &mut Peekable<impl Iterator<Item = T>>,
        size: impl Fn(&T) -> usize,
    ) -> (Vec<T>, usize) {
        let core = self.settings.store.core();
        self.space.refresh(core.discarded.load(Ordering::Relaxed), || space_at(&core.path));
        let (most, mut bytes) = (self.space.step_bytes(), 0);
        let part = std::iter::from_fn(|| {
            let item = items.next_if(|_| bytes < most)?;
            // The commit of a delivery without a body also writes something.
            bytes += size(&item).max(1);
            Some(item)
        });
        (part.collect(), bytes)
    }

    /// Whether nothing more is taken from the broker.
    pub(super) fn is_waiting_for_room(&self) -> bool {
        self.waits_for.is_some()
    }

    /// Whether nothing is written at all.
    pub(super) fn is_waiting_for_space(&self) -> bool {
        self.waits_for == Some(ConsumerWait::FreeSpace)
    }

    /// When to look for room again.
    pub(super) fn looks_for_room(&self) -> Option<Deadline> {
        self.unkept.look_at
    }

    /// Looks for room at once, because something may have made room.
    pub(super) fn look_for_room(&mut self) {
        if self.unkept.look_at.is_some() {
            self.unkept.look_at = Some(Deadline::now());
        }
    }

    /// Looks for room on the disk, and in the quarantine for deliveries that found none. Fails only
    /// if the store is lost.
    pub(super) fn seek_room(&mut self) -> Result<()> {
        if self.unkept.look_at.is_some_and(|at| !at.is_over()) || !self.has_space(0) {
            return Ok(());
        }
        if !self.is_waiting_for_room() {
            return Ok(());
        }
        // An obstacle that is still there shows again.
        let waited_for = self.waits_for.take();
        let mut outcome = Outcome::of_refused(std::mem::take(&mut self.unkept.items));
        let kept = self.quarantine(&mut outcome).and_then(|()| self.write_down(&mut outcome));
        self.settle_at_source(&mut outcome);
        kept?;
        if self.waits_for.is_none() && waited_for.is_some() {
            self.unkept.look_at = None;
            *self.shared.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = None;
            match self.paces.goes_on.admit(self.now_ms()) {
                Some(held_back) => tracing::info!(held_back, "there is room again: the consumer goes on"),
                None => tracing::debug!("there is room again: the consumer goes on"),
            }
        }
        outcome.lost.map_or(Ok(()), Err)
    }

    /// Keeps deliveries that come while nothing is taken, in arrival order, within the prefetch.
    pub(super) fn take_meanwhile(&mut self, event: SourceEvent) {
        let mut batch = std::mem::take(&mut self.meanwhile.batch);
        self.receive(event, &mut batch);
        self.meanwhile.batch = batch;
    }

    fn wait_for(&mut self, what: ConsumerWait) {
        self.unkept.look_at = Some(Deadline::after(Duration::from_millis(ROOM_LOOK_MS)));
        self.waits_for = Some(what);
        let shown = &mut *self.shared.waits_for.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.replace(what) != Some(what) {
            count(&self.shared.waits);
            self.began_to_wait = true;
        }
    }

    /// Logs the beginning of each wait. Logging runs the application's logger, so no lock is held.
    pub(super) fn log_wait(&mut self) {
        let Some(what) = self.waits_for.filter(|_| std::mem::take(&mut self.began_to_wait)) else { return };
        match self.paces.waits.admit(self.now_ms()) {
            Some(held_back) => {
                tracing::warn!(waits_for = %what, held_back, "the consumer takes nothing more until there is room");
            }
            None => tracing::debug!(waits_for = %what, "the consumer takes nothing more until there is room"),
        }
    }
}
