//! How often deliveries were tried: what is known, and what is written down.

use std::sync::Arc;

use super::Worker;
use super::apply::Outcome;
use super::item::Item;
use crate::consumer::in_hand::{Name, name_of, name_of_rejected, names_one};
use crate::error::{Error, Result};
use crate::log::in_hand::{Open, Tries, TriesRow};

impl Worker {
    /// Reads how often deliveries were tried before this consumer began. An open try was ended by a death.
    pub(super) fn load_tries(&mut self) {
        match self.settings.store.all_tries(&self.settings.scope) {
            Ok(rows) => {
                for (name, row) in rows {
                    self.hand.remember(name, TriesRow { tries: row.tries.after_restart(), ..row });
                }
            }
            Err(error) => tracing::error!(%error, "how often deliveries were tried cannot be read now"),
        }
    }

    /// Recalls the tries of a delivery from the broker. Looks for a first delivery only if any
    /// tries are known.
    pub(super) fn recall(&mut self, mut item: Item) -> Item {
        if !item.delivery.redelivered && self.hand.tries.is_empty() {
            return item;
        }
        let name = self.name(&mut item);
        match self.hand.tries.get(&name) {
            Some(known) if item.delivery.redelivered || names_one(&name) => {
                item.tries = known.row.tries;
                // The row of a parked delivery belongs to the parked one.
                item.noted = known.row.parked.is_none();
            }
            _ if item.delivery.redelivered => {
                item.tries = Tries::default().accused();
                item.accused = true;
            }
            _ => {}
        }
        item
    }

    pub(super) fn name(&self, item: &mut Item) -> Name {
        let name = self.name_of(item);
        item.name = Some(Arc::clone(&name));
        name
    }

    /// The name of the delivery's tries.
    pub(super) fn name_of(&self, item: &Item) -> Name {
        let make = || match item.redriven {
            Some(number) => name_of_rejected(number),
            None => {
                let identity = item.identity.as_deref().ok();
                let store = &self.settings.store.core().identity;
                name_of(store, &self.settings.scope, identity, &item.delivery)
            }
        };
        item.name.clone().unwrap_or_else(make)
    }

    /// Recalls the tries of a redriven delivery.
    pub(super) fn recall_redriven(&mut self, mut item: Item) -> Item {
        let name = self.name(&mut item);
        if let Some(known) = self.hand.tries.get(&name) {
            (item.tries, item.noted) = (known.row.tries, true);
        }
        item
    }

    /// Writes down tries of deliveries that may have been tried before, in one commit, before the
    /// tries begin. Defers those that cannot be written down. Fails only if the store is lost.
    pub(super) fn note_first(&mut self, mut items: Vec<Item>, open: Open) -> Result<Vec<Item>> {
        let mut rows = Vec::new();
        for item in items.iter_mut().filter(|item| item.is_noted_first() && item.identity.is_ok()) {
            let name = self.name(item);
            item.tries.open = open;
            (item.noted, item.accused) = (true, false);
            rows.push((name, item.row()));
        }
        if rows.is_empty() {
            return Ok(items);
        }
        let noted = self.note(rows)?;
        if noted {
            return Ok(items);
        }
        let (deferred, rest) = items.into_iter().partition(|item| item.tries.open != Open::None);
        let deferred: Vec<Item> = deferred;
        for item in deferred {
            let item = self.never_began(item);
            self.defer(item);
        }
        Ok(rest)
    }

    /// Writes rows of tries. Returns `false` if that was not possible. Fails only if the store is
    /// lost.
    pub(super) fn note(&mut self, rows: Vec<(Name, TriesRow)>) -> Result<bool> {
        for (name, row) in &rows {
            self.hand.remember(Arc::clone(name), *row);
        }
        let (scope, surplus) = (self.settings.scope.clone(), self.hand.surplus());
        let answer = self.settings.store.submit(&self.purpose, move |tx| {
            tx.note_tries(&scope, &rows)?;
            tx.forget_tries(&scope, &surplus)
        })?;
        match self.settings.store.answer(answer) {
            Ok(_) => Ok(true),
            Err(error) if self.is_lost(&error) => Err(error),
            Err(error) => {
                self.log_parking_failure(&error);
                Ok(false)
            }
        }
    }

    /// Closes a try that was written down and did not take place. An open try would count as a
    /// death.
    pub(super) fn never_began(&mut self, mut item: Item) -> Item {
        item.tries.open = Open::None;
        if item.noted {
            let name = self.name(&mut item);
            self.hand.remember(name, item.row());
        }
        item
    }

    pub(super) fn log_parking_failure(&mut self, error: &Error) {
        match self.paces.retries.admit(self.now_ms()) {
            Some(held_back) => {
                tracing::warn!(%error, held_back, "what is in hand cannot be written down now");
            }
            None => tracing::debug!(%error, "what is in hand cannot be written down now"),
        }
    }

    /// Writes down which tries have failed, and defers those deliveries. Fails only if the store is
    /// lost.
    pub(super) fn write_down(&mut self, outcome: &mut Outcome) -> Result<()> {
        let gone: Vec<Name> = outcome.done.iter().filter_map(Item::noted_name).collect();
        if !gone.is_empty() {
            let scope = self.settings.scope.clone();
            let answer =
                self.settings.store.submit(&self.purpose, move |tx| tx.forget_tries(&scope, &gone))?;
            if let Err(error) = self.settings.store.answer(answer) {
                if self.is_lost(&error) {
                    return Err(error);
                }
                self.log_parking_failure(&error);
            }
        }
        let mut failed = std::mem::take(&mut outcome.failed);
        let mut rows = std::mem::take(&mut outcome.never_began);
        for item in &mut failed {
            let name = self.name(item);
            item.noted = true;
            let mut row = item.row();
            // Copies of one message, or messages without an id, may share a row. Each has its own
            // tries in memory.
            let known = self.hand.tries.get(&name).map_or(0, |known| known.row.tries.failures);
            row.tries.failures = row.tries.failures.max(known);
            rows.push((name, row));
        }
        if !rows.is_empty() {
            self.note(rows)?;
        }
        failed.into_iter().for_each(|item| self.defer(item));
        Ok(())
    }
}
