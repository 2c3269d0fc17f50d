//! The callers that wait for events to be confirmed.

use std::collections::{BTreeSet, HashMap};

use crate::message::Fault;
use crate::oneshot::Sender;
use crate::store::shared::relays::Awaited;

/// The number of waiters from which abandoned ones are looked for, and again at every doubling.
const PRUNE_FROM: usize = 1024;

#[derive(Debug)]
struct Waiter {
    left: BTreeSet<u64>,
    reply: Sender<Awaited>,
}

#[derive(Debug)]
pub(crate) struct Waiters {
    waiters: HashMap<u64, Waiter>,
    by_seq: HashMap<u64, Vec<u64>>,
    next: u64,
    prune_at: usize,
}

impl Default for Waiters {
    fn default() -> Self {
        Self { waiters: HashMap::new(), by_seq: HashMap::new(), next: 0, prune_at: PRUNE_FROM }
    }
}

impl Waiters {
    /// Answers at once if nothing is left to wait for.
    pub(crate) fn add(&mut self, left: BTreeSet<u64>, reply: Sender<Awaited>) {
        if left.is_empty() {
            reply.send(Awaited::Confirmed);
            return;
        }
        if self.waiters.len() >= self.prune_at {
            self.prune();
        }
        let id = self.next;
        self.next += 1;
        for seq in &left {
            self.by_seq.entry(*seq).or_default().push(id);
        }
        self.waiters.insert(id, Waiter { left, reply });
    }

    pub(crate) fn confirmed(&mut self, seq: u64) {
        if self.by_seq.is_empty() {
            return;
        }
        for id in self.by_seq.remove(&seq).unwrap_or_default() {
            let done = self.waiters.get_mut(&id).is_some_and(|waiter| {
                waiter.left.remove(&seq);
                waiter.left.is_empty()
            });
            if done && let Some(waiter) = self.waiters.remove(&id) {
                waiter.reply.send(Awaited::Confirmed);
            }
        }
    }

    pub(crate) fn quarantined(&mut self, seq: u64, fault: &Fault) {
        for id in self.by_seq.remove(&seq).unwrap_or_default() {
            if let Some(waiter) = self.remove(id) {
                waiter.reply.send(Awaited::Quarantined { seq, fault: fault.clone() });
            }
        }
    }

    fn remove(&mut self, id: u64) -> Option<Waiter> {
        let waiter = self.waiters.remove(&id)?;
        for seq in &waiter.left {
            if let Some(ids) = self.by_seq.get_mut(seq) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.by_seq.remove(seq);
                }
            }
        }
        Some(waiter)
    }

    /// Removes waiters whose caller's timeout has passed. Otherwise they would pile up while the
    /// broker is away.
    fn prune(&mut self) {
        let gone: Vec<u64> = self
            .waiters
            .iter()
            .filter(|(_, waiter)| waiter.reply.is_abandoned())
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.remove(id);
        }
        self.prune_at = (self.waiters.len() * 2).max(PRUNE_FROM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::FaultClass;
    use crate::oneshot::channel;

    #[test]
    fn each_is_answered_once_and_the_abandoned_are_forgotten() {
        let mut waiters = Waiters::default();
        let (reply, both) = channel();
        waiters.add(BTreeSet::from([1, 2]), reply);
        waiters.confirmed(1);
        waiters.confirmed(2);
        assert!(matches!(both.wait(), Ok(Awaited::Confirmed)));

        let (reply, bad) = channel();
        waiters.add(BTreeSet::from([3, 4]), reply);
        waiters.quarantined(4, &Fault::new(FaultClass::Message, "too large"));
        assert!(matches!(bad.wait(), Ok(Awaited::Quarantined { seq: 4, .. })));
        assert!(waiters.by_seq.is_empty());

        for seq in 0..10 * PRUNE_FROM as u64 {
            let (reply, abandoned) = channel();
            waiters.add(BTreeSet::from([seq]), reply);
            drop(abandoned);
        }
        assert!(waiters.waiters.len() <= PRUNE_FROM);
    }
}
