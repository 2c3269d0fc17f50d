//! The intake besides the broker's deliveries: redrives, and deliveries that waited for a gap.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::item::{Entry, Item, kept_delivery};
use super::{GapPolicy, HELD_LOOK, Worker};
use crate::consumer::dedup::Identity;
use crate::error::Result;
use crate::log::keys;
use crate::log::rejected::RejectedRow;
use crate::time::{Deadline, Look};
use crate::tuning::CONSUMER_BATCH_MAX;
use crate::wire::ordering_key;

impl Worker {
    pub(super) fn look_again(&mut self) {
        self.redriven.look = true;
        self.redriven.after = None;
        self.look_for_parked();
        self.look_for_room();
    }

    /// Whether there may be redrives to load, and room for them.
    pub(super) fn may_look(&self) -> bool {
        self.redriven.look && self.redriven.in_hand.len() < CONSUMER_BATCH_MAX
    }

    /// Takes in deliveries that are redriven. Fails only if the store is lost.
    pub(super) fn load_redriven(&mut self, batch: &mut Vec<Item>) -> Result<()> {
        if !self.may_look() {
            return Ok(());
        }
        let store = self.settings.store.clone();
        let room = CONSUMER_BATCH_MAX - self.redriven.in_hand.len();
        let found = store.redriven(&self.settings.scope, self.redriven.after, room)?;
        self.redriven.look = found.len() == room;
        self.redriven.after = found.last().map(|(number, _)| *number).filter(|_| self.redriven.look);
        for (number, row) in found {
            match row {
                _ if self.redriven.in_hand.contains(&number) => {}
                Ok(row) => {
                    self.redriven.in_hand.insert(number);
                    let item = self.redriven_item(number, row);
                    self.admit(item, batch);
                }
                Err(what) => {
                    tracing::error!(number, what, "a rejected delivery is damaged");
                    let scope = self.settings.scope.clone();
                    store.write(move |tx| tx.unmark_redriven(&scope, number))?;
                }
            }
        }
        Ok(())
    }

    fn redriven_item(&mut self, number: u64, row: RejectedRow) -> Item {
        let recheck = row.recheck;
        let delivery = kept_delivery(number, row);
        let key = ordering_key(&delivery.message).map(Arc::from);
        let identity = self.identify(&delivery).map(Arc::new).map_err(Arc::new);
        // A person has decided that the handler gets the delivery, regardless of what its lane has
        // shown.
        let (identity, refused_as) =
            if recheck { (identity, None) } else { (Ok(Arc::new(Identity::Nameless)), identity.ok()) };
        let mut item = Item::new(delivery, identity, key);
        (item.redriven, item.refused_as) = (Some(number), refused_as);
        self.recall_redriven(item)
    }

    /// Holds back deliveries with a gap before them, if the policy says so. Returns those that may
    /// be applied, in order.
    pub(super) fn hold_back(&mut self, batch: Vec<Item>) -> Result<Vec<Item>> {
        let GapPolicy::Hold(gap_timeout) = self.settings.gap else { return Ok(batch) };
        let look = self.look();
        let full = self.is_full_with(&batch) && !self.may_park_held();
        let mut due = self.held.due(look);
        let mut lanes: BTreeSet<_> = batch.iter().filter_map(Item::lane).map(|(lane, _)| lane).collect();
        // Look at all lanes with held deliveries: another consumer or a redrive may have filled a
        // gap.
        let all = self.held.len() > 0 && self.held_look.is_over();
        if all {
            lanes.extend(self.held.lanes());
            self.held_look = Deadline::after(HELD_LOOK);
        }
        let keys: Vec<_> =
            lanes.iter().map(|lane| keys::dedup_high_water(&self.settings.scope, *lane)).collect();
        let keys = keys.iter().map(Vec::as_slice);
        let mut nexts: BTreeMap<_, _> =
            lanes.iter().copied().zip(self.settings.store.lanes_next(keys)?).collect();
        let mut passed = Vec::new();
        for item in batch {
            match item.lane() {
                // The item comes out of its line, and has its place there.
                Some(_) if item.waited && item.taken == self.iterations => {
                    passed.push(Entry::Here(Box::new(item)))
                }
                Some((lane, number)) => {
                    let until = if item.waited { look.now() } else { look.after(gap_timeout) };
                    self.held.put(lane, number, Entry::of(item), until);
                    let next = nexts.entry(lane).or_default();
                    passed.extend(self.held.release(lane, next, look));
                }
                None => passed.push(Entry::Here(Box::new(item))),
            }
        }
        if full && passed.is_empty() && due.is_empty() {
            self.held.give_up_one(look);
            due = self.held.due(look);
        }
        let filled: Vec<_> = self.held.filled(|lane| nexts.get(&lane).copied().unwrap_or_default());
        for lane in due.into_iter().chain(filled) {
            let next = nexts.entry(lane).or_default();
            passed.extend(self.held.release(lane, next, look));
        }
        self.shared.held.store(self.held.len() as u64, Ordering::Relaxed);
        let mut ready = Vec::with_capacity(passed.len());
        for entry in passed {
            self.pass(entry, look, &mut ready);
        }
        Ok(ready)
    }

    /// Passes on an entry whose gap is filled, or whose wait is over.
    fn pass(&mut self, entry: Entry, look: Look, ready: &mut Vec<Item>) {
        match entry {
            Entry::Here(mut item) => {
                item.waited = true;
                if item.taken == self.iterations {
                    ready.push(*item);
                } else {
                    self.admit(*item, ready);
                }
            }
            // The body is read when the delivery is tried.
            Entry::Stored(mut stub) => {
                stub.waited = true;
                self.places += 1;
                let key = stub.key.clone();
                self.waiting.put(key.as_ref(), self.places, Entry::Stored(stub), look.now(), false);
            }
        }
    }
}
