//! Where there is no room for what deliveries write, the consumer stops taking them, says so once, and goes on by itself.
//!
//! **Invariant.** What finds no room is neither acknowledged nor dropped: it stays in hand, the broker's, until there is room. While a
//! consumer waits for room in its quarantine, what makes room goes on: what is driven again, and what waits for its next try.

use std::sync::PoisonError;
use std::time::Duration;

use super::apply::Outcome;
use super::item::Item;
use super::{Worker, count};
use crate::consumer::ConsumerWait;
use crate::error::Result;
use crate::limits::{CONSUMER_BATCH_MAX, ROOM_LOOK_MS};
use crate::publish::{Settlement, SourceEvent};
use crate::store::RejectedFull;
use crate::store::rejected::Refusal;
use crate::store::rejected_room::RejectedRoom;
use crate::time::Deadline;

/// What has found no room.
#[derive(Default)]
pub(super) struct Unkept {
    items: Vec<(Item, Refusal)>,
    look_at: Option<Deadline>,
}

impl Worker {
    /// How much rejected deliveries may take. One that is parked is the broker's no more, and takes its bytes in the file already: it is let
    /// in while the quarantine holds less than both bounds together.
    pub(super) fn rejected_room(&self, item: &Item) -> RejectedRoom {
        let (rows, bytes) = self.settings.rejected_max;
        let (more_rows, more_bytes) = item.parked.map_or((0, 0), |_| self.settings.parked_max);
        RejectedRoom {
            rows_max: rows.saturating_add(more_rows),
            bytes_max: bytes.saturating_add(more_bytes),
            full: self.settings.rejected_full,
        }
    }

    /// The quarantine has no room for it. What is parked cannot be given back to the broker.
    pub(super) fn found_no_room(&mut self, item: Item, refusal: Refusal, outcome: &mut Outcome) {
        if self.settings.rejected_full == RejectedFull::DeadLetter && item.is_the_brokers() {
            self.count_refusal(&refusal);
            self.finish(&item, Settlement::Reject, outcome);
            outcome.done.push(item);
            return;
        }
        self.unkept.items.push((item, refusal));
        self.unkept.look_at = Some(Deadline::after(Duration::from_millis(ROOM_LOOK_MS)));
        self.wait_for(ConsumerWait::Quarantine);
    }

    /// There is room in memory for more that may find none in the quarantine.
    pub(super) fn may_try_those_that_wait(&self) -> bool {
        self.unkept.items.len() < CONSUMER_BATCH_MAX
    }

    /// Nothing more is taken from the broker.
    pub(super) fn is_waiting_for_room(&self) -> bool {
        self.waits_for.is_some()
    }

    /// When it is looked for room again.
    pub(super) fn looks_for_room(&self) -> Option<Deadline> {
        self.unkept.look_at
    }

    /// Something may have made room.
    pub(super) fn look_for_room(&mut self) {
        if self.unkept.look_at.is_some() {
            self.unkept.look_at = Some(Deadline::now());
        }
    }

    /// Tries again what has found no room. Fails only if the store is lost.
    pub(super) fn keep_what_was_unkept(&mut self) -> Result<()> {
        if !self.unkept.look_at.is_some_and(Deadline::is_over) {
            return Ok(());
        }
        self.unkept.look_at = None;
        let mut outcome = Outcome::of_refused(std::mem::take(&mut self.unkept.items));
        let kept = self.quarantine(&mut outcome).and_then(|()| self.write_down(&mut outcome));
        self.tell_source(&mut outcome);
        kept?;
        if self.unkept.items.is_empty() && self.waits_for == Some(ConsumerWait::Quarantine) {
            self.go_on();
        }
        outcome.lost.map_or(Ok(()), Err)
    }

    /// The broker delivers these again.
    pub(super) fn forget_unkept(&mut self) {
        let items = std::mem::take(&mut self.unkept.items);
        self.unkept.items =
            items.into_iter().filter(|(item, _)| self.outlives_its_connection(item)).collect();
    }

    /// What comes while nothing is taken waits for its turn, within the prefetch.
    pub(super) fn set_aside(&mut self, event: SourceEvent) {
        let mut batch = std::mem::take(&mut self.meanwhile.batch);
        self.receive(event, &mut batch);
        self.meanwhile.batch = batch;
    }

    fn wait_for(&mut self, what: ConsumerWait) {
        if self.waits_for == Some(what) {
            return;
        }
        self.waits_for = Some(what);
        count(&self.shared.waits);
        *self.shared.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
        tracing::warn!(waits_for = %what, "the consumer takes nothing more until there is room");
    }

    fn go_on(&mut self) {
        self.waits_for = None;
        *self.shared.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = None;
        tracing::info!("there is room again: the consumer goes on");
    }
}
