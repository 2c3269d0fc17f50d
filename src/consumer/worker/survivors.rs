//! Deliveries that outlive the connection that has delivered them.
//!
//! The broker delivers again what a lost connection leaves unsettled, but for what came back too often: a quorum queue drops that. So
//! what is about to be taken into the store for this reason is kept. If it comes again after all, it takes the place of the one that
//! was kept.
//!
//! **Invariants.** However many connections are lost while nothing can be written, a delivery is in memory once. It keeps its place among
//! those of its key.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Worker;
use super::item::{Entry, Item};
use crate::consumer::in_hand::{Name, names_one};

/// Those that are kept, by name.
#[derive(Debug, Default)]
pub(super) struct Survivors {
    by_name: HashMap<Name, Vec<Survivor>>,
    /// Keys of which others have come since: what comes after these stands behind them.
    passed: HashSet<Arc<str>>,
}

#[derive(Debug, Clone, Copy)]
struct Survivor {
    place: u64,
    /// How often it had come back to its queue.
    returns: u32,
}

impl Survivors {
    fn of<'a>(items: impl Iterator<Item = &'a Item>) -> Self {
        let mut survivors = Self::default();
        for item in items.filter(|item| item.is_the_brokers()) {
            if let Some(name) = item.name.clone() {
                let survivor = Survivor { place: item.place, returns: item.returns() };
                survivors.by_name.entry(name).or_default().push(survivor);
            }
        }
        survivors
    }

    /// The place of the one that has come again. A name that several may share does not tell them apart, and what has come back
    /// more often is the same one, or one that replaces it just as well.
    fn take(&mut self, item: &Item) -> Option<u64> {
        let name = item.name.as_ref()?;
        let of_name = self.by_name.get_mut(name)?;
        let is_it = |survivor: &Survivor| names_one(name) || survivor.returns < item.returns();
        let at = of_name.iter().position(is_it)?;
        let place = of_name.remove(at).place;
        if of_name.is_empty() {
            self.by_name.remove(name);
        }
        Some(place)
    }
}

impl Worker {
    /// A connection has ended. The broker will deliver again all that it has delivered, but for what survives. What was driven again, or is
    /// parked, is ours. `batch`: what has come last, without what it has delivered.
    pub(super) fn forget_delivered(&mut self, batch: &[Item]) {
        self.forget_unkept();
        self.space.forget_refused();
        let (mut held, mut waiting) = (mem::take(&mut self.held), mem::take(&mut self.waiting));
        let stays = |entry: &Entry| entry.item().is_none_or(|item| self.outlives_its_connection(item));
        held.change(|entry| stays(&entry).then_some(entry));
        waiting.retain(stays);
        let waits = waiting.holding().map(|(_, entry)| entry).chain(held.iter()).filter_map(Entry::item);
        self.survivors = Survivors::of(waits.chain(batch).chain(self.unkept.items()));
        (self.held, self.waiting) = (held, waiting);
        self.shared.held.store(self.held.len() as u64, Ordering::Relaxed);
    }

    /// The broker may not deliver it again; or it is not the broker's.
    pub(super) fn outlives_its_connection(&self, item: &Item) -> bool {
        !item.is_the_brokers() || self.is_taken_in(item)
    }

    /// Puts what has come again in the place of the one that was kept. It is returned where none was, or where that one is done with.
    pub(super) fn replace_survivor(&mut self, mut item: Item, batch: &mut [Item]) -> Option<Item> {
        let Some(place) = self.survivors.take(&item) else {
            if !self.survivors.by_name.is_empty() {
                self.survivors.passed.extend(item.key.clone());
            }
            return Some(item);
        };
        let is_it = |kept: &Item| kept.place == place && kept.is_the_brokers();
        if item.key.as_ref().is_some_and(|key| self.survivors.passed.contains(key))
            && self.waiting.is_holding(place)
        {
            // An earlier one of its key did not survive, and has come again before it.
            self.waiting.remove(place);
            return Some(item);
        }
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

/// The new one, in the state of the one that was kept.
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
