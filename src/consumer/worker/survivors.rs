//! Deliveries that outlive the connection that has delivered them.
//!
//! The broker redelivers what a lost connection leaves unsettled, except deliveries that were
//! requeued too often: a quorum queue drops those. So the consumer keeps deliveries that it is
//! about to take into the store for this reason, with the earlier deliveries of their keys. If one
//! of them comes again after all, it takes the place of the kept one.
//!
//! **Invariants.** However many connections are lost while nothing can be written, a delivery is in
//! memory once. It keeps its place among the deliveries of its key.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Worker;
use super::item::{Entry, Item};
use crate::consumer::in_hand::{Name, names_one};

/// The kept deliveries, by name.
#[derive(Debug, Default)]
pub(super) struct Survivors {
    by_name: HashMap<Name, Vec<Survivor>>,
}

#[derive(Debug, Clone, Copy)]
struct Survivor {
    place: u64,
    /// How often the delivery was requeued.
    returns: u32,
}

impl Survivors {
    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Returns the place of the kept delivery that has come again. A name that several may share
    /// does not distinguish them. A delivery requeued more often is the same one, or replaces it
    /// just as well.
    fn take(&mut self, name: &Name, returns: u32) -> Option<u64> {
        let of_name = self.by_name.get_mut(name)?;
        let at = of_name.iter().position(|survivor| names_one(name) || survivor.returns < returns)?;
        let place = of_name.remove(at).place;
        if of_name.is_empty() {
            self.by_name.remove(name);
        }
        Some(place)
    }
}

impl Worker {
    /// Forgets the broker's deliveries when a connection ends, except survivors, because the broker
    /// delivers them again. Redriven and parked deliveries belong to the store. `batch` holds the
    /// newest deliveries, which are not tried yet.
    pub(super) fn forget_delivered(&mut self, batch: &mut Vec<Item>) {
        let (mut held, mut waiting) = (mem::take(&mut self.held), mem::take(&mut self.waiting));
        let mut delivered: Vec<&Item> = waiting
            .holding()
            .map(|(_, entry)| entry)
            .chain(held.iter())
            .filter_map(Entry::item)
            .chain(self.unkept.items())
            .chain(batch.iter())
            .filter(|item| item.is_the_brokers())
            .collect();
        delivered.sort_unstable_by_key(|item| item.place);
        let (survivors, places) = self.survivors_among(&delivered);
        let stays = |item: &Item| !item.is_the_brokers() || places.contains(&item.place);
        held.change(|entry| entry.item().is_none_or(stays).then_some(entry));
        waiting.retain(|entry| entry.item().is_none_or(stays));
        batch.retain(stays);
        self.unkept.retain(stays);
        (self.held, self.waiting, self.survivors) = (held, waiting, survivors);
        if self.unkept.is_empty() && self.survivors.is_empty() {
            self.space.forget_refused();
        }
        self.shared.held.store(self.held.len() as u64, Ordering::Relaxed);
    }

    /// Finds the deliveries that the broker may not deliver again. Adds the deliveries before them
    /// of their keys, which would otherwise come behind them. Leaves out such deliveries if they
    /// could not be distinguished from others when they come. `delivered` is in order.
    fn survivors_among(&self, delivered: &[&Item]) -> (Survivors, HashSet<u64>) {
        let (mut survivors, mut places) = (Survivors::default(), HashSet::new());
        let mut keys: HashSet<&Arc<str>> = HashSet::new();
        for item in delivered.iter().rev() {
            let is_taken_in = self.is_taken_in(item);
            let stands_before = item.key.as_ref().is_some_and(|key| keys.contains(key));
            if !is_taken_in && !stands_before {
                continue;
            }
            let (name, returns) = (self.name_of(item), item.returns());
            if is_taken_in || (self.may_be_parked(item) && (names_one(&name) || returns > 0)) {
                keys.extend(&item.key);
                places.insert(item.place);
                survivors.by_name.entry(name).or_default().push(Survivor { place: item.place, returns });
            }
        }
        // The first delivery of a name comes first.
        survivors.by_name.values_mut().for_each(|of_name| of_name.reverse());
        (survivors, places)
    }

    /// Puts a delivery that has come again in the place of the kept one. Returns it if none was
    /// kept, or the kept one is done with.
    pub(super) fn replace_survivor(&mut self, mut item: Item, batch: &mut [Item]) -> Option<Item> {
        if self.survivors.is_empty() {
            return Some(item);
        }
        let name = self.name(&mut item);
        let Some(place) = self.survivors.take(&name, item.returns()) else { return Some(item) };
        let is_it = |kept: &Item| kept.place == place && kept.is_the_brokers();
        item.place = place;
        if let Some(kept) = batch.iter_mut().find(|kept| is_it(kept)) {
            (item.waited, item.taken) = (kept.waited, kept.taken);
            *kept = item;
            return None;
        }
        let mut new = self.unkept.replace(is_it, item);
        self.waiting.replace(place, |entry| replaced(entry, &mut new));
        if new.is_some() {
            self.held.change(|entry| {
                let is_it = entry.item().is_some_and(is_it);
                Some(if is_it { replaced(entry, &mut new) } else { entry })
            });
        }
        new
    }
}

/// The new delivery, in the state of the kept one.
fn replaced(kept: Entry, new: &mut Option<Item>) -> Entry {
    match (kept.item(), new.take()) {
        (Some(item), Some(mut new)) => {
            new.waited = item.waited;
            Entry::of(new)
        }
        (_, before) => {
            *new = before;
            kept
        }
    }
}
