//! The fingerprint of a world. Two worlds with one fingerprint have the same future.
//!
//! The fingerprint leaves out what only looks back: counters, the texts of faults, and the draws of
//! the jitter, which begins anew at each step. It also leaves out what time has made irrelevant.
//! Times count from now on, tickets by their rank, and a past time is *now*.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use super::world::World;
use crate::delivery::types::{Action, Change, Exception, ExceptionState};
use crate::delivery::{Item, ItemState, Machine};
use crate::time::Now;

impl World {
    pub(super) fn fingerprint(&self) -> u64 {
        let hasher = &mut DefaultHasher::new();
        self.budget.hash(hasher);
        (self.up, self.position, self.stored, self.confirmed, self.passed_by, self.discarded).hash(hasher);
        self.flights.len().hash(hasher);
        self.flights.values().for_each(|flight| flight.hash(hasher));
        // Ghosts matter only while one of them may still arrive.
        if self.budget.ghosts > 0 {
            self.ghosts.hash(hasher);
        }
        self.parked.hash(hasher);
        self.rows.len().hash(hasher);
        for (seq, row) in &self.rows {
            seq.hash(hasher);
            hash_exception(row, self.now, hasher);
        }
        self.requests.len().hash(hasher);
        self.requests.iter().for_each(|request| hash_request(request, self.now, hasher));
        self.pending.len().hash(hasher);
        for changes in &self.pending {
            changes.len().hash(hasher);
            changes.iter().for_each(|change| hash_change(change, self.now, hasher));
        }
        hash_machine(&self.machine, self.now, hasher);
        hasher.finish()
    }
}

fn hash_exception(exception: &Exception, now: Now, hasher: &mut DefaultHasher) {
    (exception.attempts, exception.destination_attempts).hash(hasher);
    // The code tells whether the event was a poison message.
    exception.fault.as_ref().map(|fault| fault.code).hash(hasher);
    match exception.state {
        ExceptionState::Retry { due_ms } => (0, due_ms.saturating_sub(now.wall_ms)).hash(hasher),
        ExceptionState::Scheduled { due_ms } => (1, due_ms.saturating_sub(now.wall_ms)).hash(hasher),
        ExceptionState::Quarantined { holds_key, .. } => (2, holds_key).hash(hasher),
        ExceptionState::Discarded => 3.hash(hasher),
    }
}

fn hash_request(request: &Action, now: Now, hasher: &mut DefaultHasher) {
    match request {
        Action::Load { from, events_max, bytes_max } => (0, from, events_max, bytes_max).hash(hasher),
        Action::LoadDue { after, until_ms, events_max } => {
            // The age is not cut off at now: events that became due between the question and now
            // are not in the answer.
            let age = now.wall_ms - until_ms;
            (1, after.map(|(due_ms, seq)| (now.wall_ms - due_ms, seq)), age, events_max).hash(hasher);
        }
        Action::LoadParked { key, events_max } => (2, key, events_max).hash(hasher),
        _ => unreachable!("only these are requests"),
    }
}

fn hash_change(change: &Change, now: Now, hasher: &mut DefaultHasher) {
    match change {
        Change::Position(position) => (0, position).hash(hasher),
        Change::PutException { seq, exception, .. } => {
            (1, seq).hash(hasher);
            hash_exception(exception, now, hasher);
        }
        Change::DropException { seq } => (2, seq).hash(hasher),
        Change::Park { seq, .. } => (3, seq).hash(hasher),
        Change::Unpark { seq, .. } => (4, seq).hash(hasher),
    }
}

fn hash_machine(machine: &Machine, now: Now, hasher: &mut DefaultHasher) {
    (machine.epoch.is_some(), machine.blocked, machine.paused).hash(hasher);
    (machine.position, machine.loaded_to, machine.tail, machine.saved_position).hash(hasher);
    (&machine.ahead, machine.rows_to, machine.load_out, machine.due_out).hash(hasher);
    machine.learnt.hash_for_test(now, hasher);
    machine.silence.hash_for_test(now, hasher);
    machine.slow.hash_for_test(now, hasher);
    machine.due_resume.map(|(due_ms, seq)| (now.wall_ms.saturating_sub(due_ms), seq)).hash(hasher);
    machine.next_due_ms.map(|due_ms| due_ms.saturating_sub(now.wall_ms)).hash(hasher);
    machine.starved_since_ms.map(|since| now.mono_ms - since).hash(hasher);
    let mut items: Vec<(&u64, &Item)> = machine.items.iter().collect();
    items.sort_unstable_by_key(|(seq, _)| **seq);
    items.len().hash(hasher);
    for (seq, item) in items {
        seq.hash(hasher);
        hash_item(machine, item, now, hasher);
    }
    (&machine.open, &machine.ready, &machine.suspects).hash(hasher);
    machine.timers.iter().for_each(|(due_ms, seq)| (due_ms.saturating_sub(now.mono_ms), seq).hash(hasher));
    machine.in_flight.values().for_each(|seq| seq.hash(hasher));
    machine.keys.hash_for_test(hasher);
}

/// Hashes an item. Nacks in a row only lengthen waits, and here all waits are equal.
fn hash_item(machine: &Machine, item: &Item, now: Now, hasher: &mut DefaultHasher) {
    (item.home as u8, item.attempts, item.destination_attempts, item.sent).hash(hasher);
    (item.suspect, item.likely, item.poison).hash(hasher);
    (item.silences.min(2), item.late.is_some(), item.lingers).hash(hasher);
    match item.state {
        ItemState::Ready => 0.hash(hasher),
        ItemState::Queued => 1.hash(hasher),
        ItemState::InFlight { ticket, isolated, trial } => {
            (2, machine.in_flight.range(..ticket).count(), isolated, trial).hash(hasher);
        }
        ItemState::Suspended => 4.hash(hasher),
        ItemState::Waiting { due_ms, deferred } => {
            (3, due_ms.saturating_sub(now.mono_ms), deferred).hash(hasher)
        }
    }
}
