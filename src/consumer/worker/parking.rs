//! Parks deliveries in the store, and takes up parked deliveries.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::Receiver;

use super::item::{Entry, Item, Stub, kept_delivery};
use super::{HELD_LOOK, Worker, count};
use crate::broker::{DeliveryTag, Settlement};
use crate::consumer::in_hand::{Name, Parked, Parking, ToPark};
use crate::consumer::waiting::{Load, Member};
use crate::consumer::{ConsumerBuilder, GapPolicy};
use crate::error::Result;
use crate::log::in_hand::{ParkedRow, TriesRow};
use crate::message::Message;
use crate::store::shared::write_wait::Purpose;
use crate::store::{Receipt, Store};
use crate::time::Deadline;
use crate::tuning::{TRIES_ROWS_MAX, WAITING_SHARE};

/// The headers in which RabbitMQ's quorum queue says how often the broker has taken a delivery
/// back.
const RETURNS: [&str; 2] = ["x-delivery-count", "x-acquired-count"];

/// The consumer's view of the table of tries and parked deliveries.
pub(super) struct Hand {
    pub(super) store: Store,
    pub(super) scope: String,
    /// The rows of tries, except those of redriven deliveries.
    pub(super) tries: HashMap<Name, Known>,
    pub(super) written: u64,
    /// Parked deliveries that this consumer has taken up, with their bytes.
    pub(super) mine: HashMap<u64, u64>,
    pub(super) bytes: u64,
    /// Whether there may be parked deliveries that were not taken up.
    pub(super) look: bool,
    /// When to read again, after reading has failed.
    pub(super) look_after: Deadline,
    pub(super) next: u64,
    /// How often consumers had left parked deliveries behind, at the last look.
    pub(super) given_back: u64,
    /// The load from which the worker tries again, because there was no room for all. A delivery
    /// that goes resets it.
    pub(super) stuck: Load,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub(super) row: TriesRow,
    /// A number that rises with each note, so the lowest is the oldest.
    pub(super) written: u64,
}

impl Hand {
    pub(super) fn new(settings: &ConsumerBuilder) -> Self {
        Self {
            store: settings.store.clone(),
            scope: settings.scope.clone(),
            tries: HashMap::new(),
            written: 0,
            mine: HashMap::new(),
            bytes: 0,
            look: true,
            look_after: Deadline::now(),
            next: 0,
            given_back: settings.store.core().parked.given_back(),
            stuck: Load::default(),
        }
    }

    /// When to read parked deliveries again, if reading has failed.
    pub(super) fn looks_again(&self) -> Option<Deadline> {
        self.look.then_some(self.look_after)
    }

    pub(crate) fn remember(&mut self, name: Name, row: TriesRow) {
        self.written += 1;
        self.tries.insert(name, Known { row, written: self.written });
    }

    /// Takes up a parked delivery. Returns `false` if another consumer of the scope has it.
    fn take_up(&mut self, number: u64, bytes: u64) -> bool {
        let mine = self.store.core().parked.take(&self.scope, number);
        if mine {
            self.mine.insert(number, bytes);
            self.bytes += bytes;
        }
        mine
    }

    fn let_go(&mut self, number: u64) {
        if let Some(bytes) = self.mine.remove(&number) {
            self.bytes -= bytes;
            self.stuck = Load::default();
            self.store.core().parked.give_back(&self.scope, [number], false);
        }
    }

    /// Returns and forgets the names of surplus rows: the oldest quarter of the bound, without
    /// parked deliveries.
    pub(crate) fn surplus(&mut self) -> Vec<Name> {
        let mut rows: Vec<_> = self.tries.iter().filter(|(_, known)| known.row.parked.is_none()).collect();
        if rows.len() <= TRIES_ROWS_MAX {
            return Vec::new();
        }
        rows.sort_unstable_by_key(|(_, known)| known.written);
        let oldest: Vec<Name> =
            rows.iter().take(TRIES_ROWS_MAX / 4).map(|(name, _)| Arc::clone(name)).collect();
        for name in &oldest {
            self.tries.remove(name);
        }
        oldest
    }
}

/// Keys of which a delivery could not be parked for want of room.
#[derive(Debug, Default)]
struct FullKeys(Mutex<HashSet<Arc<str>>>);

impl FullKeys {
    fn has(&self, key: Option<&Arc<str>>) -> bool {
        let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        key.is_some_and(|key| keys.contains(key))
    }

    fn note(&self, key: Option<&Arc<str>>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(key.cloned());
    }
}

/// Hands the rest to the present or next consumer of the scope.
impl Drop for Hand {
    fn drop(&mut self) {
        if self.mine.is_empty() || self.store.core().owner.is_elsewhere() {
            return;
        }
        self.store.core().parked.give_back(&self.scope, self.mine.keys().copied(), true);
        self.store.core().redrives.notify(&self.scope);
    }
}

impl Item {
    /// The name of its row of tries, if there is one.
    pub(super) fn noted_name(&self) -> Option<Name> {
        self.name.clone().filter(|_| self.noted)
    }

    /// How often the broker has taken the delivery back.
    pub(super) fn returns(&self) -> u32 {
        if !self.delivery.redelivered || !self.is_the_brokers() {
            return 0;
        }
        let count = |message: &Message, name| {
            let count = message.header(name).and_then(|value| value.as_int());
            u32::try_from(count.unwrap_or_default().max(0)).unwrap_or(u32::MAX)
        };
        RETURNS.map(|name| count(&self.delivery.message, name)).into_iter().max().unwrap_or_default()
    }
}

impl Worker {
    /// Lets go of an item that is done with.
    pub(super) fn let_go(&mut self, item: &Item) {
        if item.noted
            && let Some(name) = &item.name
        {
            self.hand.tries.remove(name);
        }
        if let Some(number) = item.parked {
            self.hand.let_go(number);
            self.show();
        }
    }

    fn show(&self) {
        self.shared.parked.store(self.hand.mine.len() as u64, Ordering::Relaxed);
        self.shared.parked_bytes.store(self.hand.bytes, Ordering::Relaxed);
    }

    // --- parking ---------------------------------------------------------------------------

    /// Parks deliveries as far as there is room, and acknowledges them. The result leaves out
    /// deliveries that are done with already. Fails only if the store is lost.
    fn park(
        &mut self,
        items: Vec<Item>,
        settlements: &mut Vec<(DeliveryTag, Settlement)>,
    ) -> Result<Vec<Item>> {
        // If a delivery of a key runs now without being parked, no delivery of that key is parked.
        let runs = |item: &Item| item.key.as_ref().is_some_and(|key| self.running.contains(key));
        let (mut kept, items): (Vec<Item>, Vec<Item>) = items.into_iter().partition(runs);
        self.behind_running |= !kept.is_empty();
        let (mut items, full) = (items.into_iter().peekable(), Arc::new(FullKeys::default()));
        while items.peek().is_some() {
            let (step, bytes) = self.next_part(&mut items, Item::size);
            if self.has_space(bytes) {
                self.park_step(step, &full, &mut kept, settlements)?;
            } else {
                step.iter().for_each(|item| full.note(item.key.as_ref()));
                kept.extend(step);
            }
        }
        self.show();
        Ok(kept)
    }

    fn park_step(
        &mut self,
        mut items: Vec<Item>,
        full: &Arc<FullKeys>,
        kept: &mut Vec<Item>,
        settlements: &mut Vec<(DeliveryTag, Settlement)>,
    ) -> Result<()> {
        let mut answers = Vec::with_capacity(items.len());
        for item in &mut items {
            let key = item.key.clone();
            let full = Arc::clone(full);
            let what = ToPark {
                identity: item.identity.as_ref().ok().map(Arc::clone),
                name: self.name(item),
                tries: item.tries,
                waited: item.waited,
                delivery: Arc::clone(&item.delivery),
            };
            let (scope, room) = (self.settings.scope.clone(), self.parked_room());
            // The purpose is the consumer's own, so the write does not queue behind running
            // handlers: see `meanwhile`.
            answers.push(self.settings.store.submit(&Purpose::Own("parking a delivery"), move |tx| {
                // Once one delivery of a key is not parked, no later one is. Parked deliveries of a
                // key stand before the rest.
                if full.has(key.as_ref()) {
                    return Ok(Parking::Full);
                }
                let parking = tx.park(&scope, &what, &room);
                if matches!(parking, Ok(Parking::Full) | Err(_)) {
                    full.note(key.as_ref());
                }
                parking
            })?);
        }
        for (mut item, answer) in items.into_iter().zip(answers) {
            match self.settings.store.answer(answer).map(Receipt::into_value) {
                Ok(Parking::Parked { number, name, bytes }) => {
                    settlements.push((item.delivery.tag, Settlement::Acknowledge));
                    if let Some(before) =
                        item.name.replace(Arc::clone(&name)).filter(|before| *before != name)
                    {
                        self.hand.tries.remove(&before);
                    }
                    (item.parked, item.noted, item.accused) = (Some(number), true, false);
                    self.hand.remember(name, item.row());
                    if self.hand.take_up(number, bytes) {
                        kept.push(item);
                    }
                }
                Ok(Parking::Duplicate | Parking::Again) => {
                    count(&self.shared.repeated);
                    settlements.push((item.delivery.tag, Settlement::Acknowledge));
                }
                Ok(Parking::Full) => kept.push(item),
                Err(error) if self.is_lost(&error) => return Err(error),
                Err(error) => {
                    self.log_parking_failure(&error);
                    kept.push(item);
                }
            }
        }
        Ok(())
    }

    /// Takes deliveries into the store before they are tried, if the broker has taken them back so
    /// often that it may drop them soon. Also takes in copies of parked deliveries. Fails only if
    /// the store is lost.
    pub(super) fn take_in(&mut self, batch: Vec<Item>) -> Result<Vec<Item>> {
        if !batch.iter().any(|item| self.is_taken_in(item)) {
            return Ok(batch);
        }
        let order: HashMap<u64, usize> =
            batch.iter().enumerate().map(|(at, item)| (item.place, at)).collect();
        // Earlier deliveries of the key go along, because parked deliveries of a key stand before
        // the rest.
        let mut keys: HashSet<Arc<str>> = HashSet::new();
        let mut places: HashSet<u64> = HashSet::new();
        for item in batch.iter().rev() {
            let before_one = item.key.as_ref().is_some_and(|key| keys.contains(key));
            if self.is_taken_in(item) || (before_one && self.may_be_parked(item)) {
                places.insert(item.place);
                keys.extend(item.key.clone());
            }
        }
        let (wanted, mut batch): (Vec<Item>, Vec<Item>) =
            batch.into_iter().partition(|item| places.contains(&item.place));
        let mut settlements = Vec::new();
        let taken = self.park(wanted, &mut settlements);
        self.source.settle(settlements);
        batch.extend(taken?);
        batch.sort_unstable_by_key(|item| order.get(&item.place).copied());
        Ok(batch)
    }

    pub(super) fn is_taken_in(&self, item: &Item) -> bool {
        if !self.may_be_parked(item) {
            return false;
        }
        let known = item.name.as_ref().and_then(|name| self.hand.tries.get(name));
        item.returns() >= self.settings.take_in_after || known.is_some_and(|known| known.row.parked.is_some())
    }

    pub(super) fn may_be_parked(&self, item: &Item) -> bool {
        item.is_the_brokers() && item.identity.is_ok()
    }

    /// Parks waiting deliveries once they hold more than their share of the prefetch. Fails only if
    /// the store is lost.
    pub(super) fn park_those_that_wait(&mut self) -> Result<()> {
        let share = Load {
            count: usize::from(self.settings.prefetch / WAITING_SHARE),
            bytes: self.prefetch_bytes / u64::from(WAITING_SHARE),
        };
        let holding = self.holding();
        let returned = std::mem::take(&mut self.returned);
        if !returned && (!holding.exceeds(share) || !holding.exceeds(self.hand.stuck)) {
            return Ok(());
        }
        let mut items: Vec<Item> =
            self.waiting.holding().filter_map(|(_, entry)| entry.item().cloned()).collect();
        if self.parks_held() || returned {
            let held = self.held.iter().filter(|entry| entry.holds_prefetch());
            items.extend(held.filter_map(|entry| entry.item().cloned()));
        }
        items.retain(|item| item.identity.is_ok());
        if items.is_empty() {
            return Ok(());
        }
        let places: Vec<u64> = items.iter().map(|item| item.place).collect();
        let mut settlements = Vec::new();
        let parked = self.park(items, &mut settlements);
        self.source.settle(settlements);
        let mut parked: HashMap<u64, Item> = parked?.into_iter().map(|item| (item.place, item)).collect();
        let in_held: HashSet<u64> = places
            .into_iter()
            .filter(|place| match parked.remove(place) {
                Some(item) if self.waiting.is_holding(*place) => {
                    self.waiting.replace(*place, |_| Entry::of(item));
                    false
                }
                Some(item) => {
                    parked.insert(*place, item);
                    true
                }
                None => self.waiting.remove(*place).is_none(),
            })
            .collect();
        if !in_held.is_empty() {
            self.held.change(|entry| match entry.item().map(|item| item.place) {
                Some(place) if in_held.contains(&place) => parked.remove(&place).map(Entry::of),
                _ => Some(entry),
            });
        }
        let left = self.holding();
        self.hand.stuck = if left.exceeds(share) { left.plus(share) } else { Load::default() };
        Ok(())
    }

    /// The load of waiting deliveries that hold the prefetch.
    fn holding(&self) -> Load {
        let held = if self.parks_held() { self.held.load() } else { Load::default() };
        self.waiting.load().plus(held)
    }

    /// Whether the source delivers nothing more until some of these, or of the waiting deliveries,
    /// are settled.
    pub(super) fn is_full_with(&self, batch: &[Item]) -> bool {
        let bytes = batch.iter().map(|item| item.size() as u64).sum();
        let of_batch = Load { count: batch.len(), bytes };
        let all = self.held.load().plus(self.waiting.load()).plus(of_batch);
        all.count >= usize::from(self.settings.prefetch) || all.bytes >= self.prefetch_bytes
    }

    /// Whether deliveries that wait for a gap can be parked, as far as is known.
    pub(super) fn may_park_held(&self) -> bool {
        self.parks_held() && self.hand.stuck == Load::default()
    }

    /// Whether deliveries that wait for a gap are parked too. A small prefetch has no share to
    /// give. Deliveries that wait for a gap may then take all but one, and the longest-waiting one
    /// is let go.
    fn parks_held(&self) -> bool {
        self.settings.prefetch >= WAITING_SHARE
    }

    // --- taking up -------------------------------------------------------------------------

    /// Takes up parked deliveries that belong to no consumer, in the order of their parking.
    pub(super) fn load_parked(&mut self, stop: &Receiver<Deadline>) {
        while self.hand.look && self.hand.look_after.is_over() && stop.is_empty() {
            let rows = match self.settings.store.parked_from(&self.settings.scope, self.hand.next) {
                Ok(rows) => rows,
                Err(error) => {
                    tracing::error!(%error, "what is parked cannot be read now; it is read again later");
                    self.hand.look_after = Deadline::after(HELD_LOOK);
                    break;
                }
            };
            self.hand.look = !rows.is_empty();
            self.hand.next = rows.last().map_or(0, |(number, ..)| number.saturating_add(1));
            for (number, bytes, row, tries) in rows {
                match row {
                    Ok(row) if self.hand.take_up(number, bytes) => self.take_up(number, bytes, row, tries),
                    Ok(_) => {}
                    Err(what) => tracing::error!(number, what, "a parked delivery is damaged"),
                }
            }
            self.show();
        }
    }

    fn take_up(&mut self, number: u64, bytes: u64, row: ParkedRow, tries: Option<TriesRow>) {
        let name: Name = row.name.into();
        let known =
            self.hand.tries.get(&name).map(|known| known.row).filter(|row| row.parked == Some(number));
        let found = || tries.map(|row| TriesRow { tries: row.tries.after_restart(), ..row });
        let tries = known.or_else(found).map(|row| row.tries).unwrap_or_default();
        self.hand.remember(Arc::clone(&name), TriesRow { tries, parked: Some(number) });
        let delivery = kept_delivery(number, row.delivery);
        let identity = self.identify(&delivery).ok();
        let key = self.key_of(&delivery.message, identity.as_ref());
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let stub = Stub { number, name, tries, key: key.clone(), waited: row.waited, bytes };
        self.places += 1;
        let look = self.look();
        match (self.settings.gap, identity.and_then(|identity| identity.place())) {
            (GapPolicy::Hold(gap_timeout), Some((lane, in_lane))) if !row.waited => {
                self.held.put(lane, in_lane, Entry::Stored(stub), look.after(gap_timeout));
            }
            _ => self.waiting.put(key.as_ref(), self.places, Entry::Stored(stub), look.now(), false),
        }
    }

    /// Notices if another consumer of the scope has left parked deliveries behind.
    pub(super) fn look_for_parked(&mut self) {
        let given_back = self.settings.store.core().parked.given_back();
        if std::mem::replace(&mut self.hand.given_back, given_back) != given_back {
            (self.hand.look, self.hand.next) = (true, 0);
        }
    }

    /// Returns deliveries that waited, with their bodies. A delivery that has gone meanwhile is
    /// left out.
    pub(super) fn with_bodies(&mut self, taken: Vec<(u64, Entry)>) -> Vec<Item> {
        let stored = |(_, entry): &(u64, Entry)| match entry {
            Entry::Here(_) => None,
            Entry::Stored(stub) => Some(stub.number),
        };
        let numbers: Vec<u64> = taken.iter().filter_map(stored).collect();
        let rows = if numbers.is_empty() {
            Ok(Vec::new())
        } else {
            self.settings.store.parked(&self.settings.scope, &numbers)
        };
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                tracing::error!(%error, "what is parked cannot be read now; tried again later");
                let due = self.look().after(self.settings.backoff.1);
                for (place, entry) in taken {
                    self.waiting.put(entry.key().cloned().as_ref(), place, entry, due, true);
                }
                return Vec::new();
            }
        };
        let mut rows = rows.into_iter();
        let mut items = Vec::with_capacity(taken.len());
        for (place, entry) in taken {
            match entry {
                Entry::Here(mut item) => {
                    (item.place, item.taken) = (place, self.iterations);
                    items.push(*item);
                }
                Entry::Stored(stub) => items.extend(self.parked_item(place, stub, rows.next().flatten())),
            }
        }
        items
    }

    fn parked_item(&mut self, place: u64, stub: Stub, row: Option<Parked>) -> Option<Item> {
        let row = match row {
            Some(Ok(row)) => row.delivery,
            Some(Err(what)) => {
                // The delivery stays where it is, because nothing in it can be believed.
                tracing::error!(number = stub.number, what, "a parked delivery is damaged");
                return None;
            }
            None => {
                self.hand.tries.remove(&stub.name);
                self.hand.let_go(stub.number);
                self.show();
                return None;
            }
        };
        let delivery = kept_delivery(stub.number, row);
        let identity = self.identify(&delivery).map(Arc::new).map_err(Arc::new);
        let mut item = Item::new(delivery, identity, stub.key);
        (item.place, item.taken, item.waited) = (place, self.iterations, stub.waited);
        (item.tries, item.name, item.noted) = (stub.tries, Some(stub.name), true);
        item.parked = Some(stub.number);
        Some(item)
    }
}
