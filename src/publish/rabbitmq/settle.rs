//! Which outcome belongs to which message. Pure: no I/O, no clock, no lapin.
//!
//! lapin hands the oldest waiting `basic.return` to whichever confirm completes next, so a return says nothing of the
//! confirm that carries it. Two rules make it right again:
//!
//! 1. A return is matched by the message's own id.
//! 2. Only the contiguous prefix of tags that all have the broker's word is settled, and only after every confirm that
//!    is ready has been taken in.
//!
//! Why that is enough: the broker sends returns in publish order, each before its own confirm. Each completed confirm
//! takes the oldest waiting return, so never more returns wait than there are returned tags still without a word; and
//! what waits are the youngest ones. Once every tag up to `x` has its word, only returns of tags beyond `x` can wait.
//!
//! So confirms are noted in the order in which they completed. The set of waiting confirms keeps to it, even where it hands out only some of
//! those that are ready: they queue as they wake. One that is ready before it is put there must be noted at once: behind
//! others it would be late, and with it a return of theirs.
//!
//! A return that comes after its message was settled breaks the argument; it is reported, never passed over.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::Arc;

use rustc_hash::FxBuildHasher;

use crate::message::{Fault, Message, Outcome, Ticket};

/// The unsettled publishes of one channel, in publish order.
#[derive(Debug)]
pub(super) struct Ledger {
    /// Tag of the front slot.
    front: u64,
    slots: VecDeque<Slot>,
}

#[derive(Debug)]
struct Slot {
    ticket: Ticket,
    message: Arc<Message>,
    /// Of its id: a whole window of them is looked through faster than one of texts.
    id_hash: u64,
    since_ms: u64,
    word: Option<Word>,
    returned: Option<Fault>,
}

/// The broker's confirm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Ack,
    Nack,
}

/// A return for a message that is not, or no longer, unsettled: an outcome that was told may be wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LateReturn;

impl Ledger {
    pub(super) fn new() -> Self {
        Self { front: 1, slots: VecDeque::new() }
    }

    /// Notes a publish. The tag counts from 1, as the broker's does.
    pub(super) fn published(&mut self, ticket: Ticket, message: Arc<Message>, since_ms: u64) -> u64 {
        let tag = self.front + self.slots.len() as u64;
        let id_hash = hash(message.message_id.as_deref().unwrap_or_default());
        self.slots.push_back(Slot { ticket, message, id_hash, since_ms, word: None, returned: None });
        tag
    }

    /// Notes the broker's word on one tag.
    pub(super) fn confirmed(&mut self, tag: u64, word: Word) {
        if let Some(slot) = self.slot(tag) {
            slot.word = Some(word);
        }
    }

    /// Notes that the message of this id came back. Where one id is in flight twice, both count as returned: which of
    /// them it was cannot be known, and a repeat is harmless where a loss is not.
    ///
    /// Looks through all that is unsettled: an index of ids would cost each publish an allocation and three look-ups, returned or not.
    pub(super) fn returned(&mut self, id: &str, fault: &Fault) -> Result<(), LateReturn> {
        let (id_hash, mut found) = (hash(id), Err(LateReturn));
        let has_it =
            |slot: &&mut Slot| slot.id_hash == id_hash && slot.message.message_id.as_deref() == Some(id);
        for slot in self.slots.iter_mut().filter(has_it) {
            slot.returned = Some(fault.clone());
            found = Ok(());
        }
        found
    }

    /// Takes the confirm that carries a return for its own.
    #[cfg(onewrite_mutations)]
    pub(super) fn returned_with(&mut self, tag: u64, fault: &Fault) {
        if let Some(slot) = self.slot(tag) {
            slot.returned = Some(fault.clone());
        }
    }

    /// Takes out what is settled. Call it when every ready confirm has been noted.
    pub(super) fn settle_into(&mut self, settled: &mut Vec<(Ticket, Outcome)>) {
        while let Some(word) = self.slots.front().and_then(|slot| slot.word) {
            let Some(slot) = self.slots.pop_front() else { break };
            self.front += 1;
            let outcome = match (slot.returned, word) {
                (Some(fault), _) => Outcome::Returned(fault),
                (None, Word::Ack) => Outcome::Confirmed,
                (None, Word::Nack) => Outcome::Nacked,
            };
            settled.push((slot.ticket, outcome));
        }
    }

    /// Messages that are not settled.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// When the oldest publish that waits for its word was made. Right after [`Ledger::settle_into`] it is the front one.
    pub(super) fn oldest_since_ms(&self) -> Option<u64> {
        self.slots.iter().find(|slot| slot.word.is_none()).map(|slot| slot.since_ms)
    }

    #[cfg(test)]
    fn settle(&mut self) -> Vec<(Ticket, Outcome)> {
        let mut settled = Vec::new();
        self.settle_into(&mut settled);
        settled
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    fn slot(&mut self, tag: u64) -> Option<&mut Slot> {
        let index = usize::try_from(tag.checked_sub(self.front)?).ok()?;
        self.slots.get_mut(index)
    }
}

fn hash(id: &str) -> u64 {
    FxBuildHasher.hash_one(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::FaultClass;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn no_route() -> Fault {
        Fault::with_code(FaultClass::Destination, 312, "NO_ROUTE")
    }

    fn message(id: &str) -> Arc<Message> {
        Arc::new(Message { message_id: Some(id.into()), ..Message::default() })
    }

    #[test]
    fn nothing_is_settled_past_a_hole() {
        let mut ledger = Ledger::new();
        for n in 1..=3 {
            assert_eq!(ledger.published(Ticket(n), message(&format!("m{n}")), n), n);
        }
        ledger.confirmed(2, Word::Ack);
        ledger.confirmed(3, Word::Nack);
        assert_eq!(ledger.settle(), []);
        assert_eq!(ledger.oldest_since_ms(), Some(1));
        ledger.returned("m2", &no_route()).unwrap();
        ledger.confirmed(1, Word::Ack);
        let settled = ledger.settle();
        assert_eq!(
            settled,
            [
                (Ticket(1), Outcome::Confirmed),
                (Ticket(2), Outcome::Returned(no_route())),
                (Ticket(3), Outcome::Nacked)
            ]
        );
        assert!(ledger.is_empty() && ledger.oldest_since_ms().is_none());
        assert_eq!(ledger.returned("m2", &no_route()), Err(LateReturn));
    }

    /// Goal: one id in flight twice never ends in a false confirm, and the bookkeeping stays whole.
    /// Method: publish an id twice around another one, return it once, settle in two steps.
    #[test]
    fn an_id_in_flight_twice_counts_as_returned_twice() {
        let mut ledger = Ledger::new();
        ledger.published(Ticket(1), message("same"), 0);
        ledger.published(Ticket(2), message("other"), 0);
        ledger.published(Ticket(3), message("same"), 0);
        ledger.returned("same", &no_route()).unwrap();
        ledger.confirmed(1, Word::Ack);
        assert_eq!(ledger.settle(), [(Ticket(1), Outcome::Returned(no_route()))]);
        ledger.confirmed(3, Word::Ack);
        ledger.confirmed(2, Word::Ack);
        ledger.returned("same", &no_route()).unwrap();
        assert_eq!(
            ledger.settle(),
            [(Ticket(2), Outcome::Confirmed), (Ticket(3), Outcome::Returned(no_route()))]
        );
        assert!(ledger.is_empty());
    }

    /// lapin and the broker, as far as pairing goes.
    struct Model {
        /// What the broker does with each tag: returned, acked.
        plan: Vec<(bool, bool)>,
        /// Returns that arrived and wait for the next confirm to complete, oldest first.
        waiting: VecDeque<u64>,
        /// Returns that the broker has sent: all of tags up to this.
        sent: u64,
    }

    impl Model {
        /// The broker confirms `tag`: returns up to it have been sent before, and the confirm carries the oldest waiting one.
        fn complete(&mut self, tag: u64) -> Option<u64> {
            while self.sent < tag {
                self.sent += 1;
                if self.plan[self.sent as usize - 1].0 {
                    self.waiting.push_back(self.sent);
                }
            }
            self.waiting.pop_front()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Goal: however confirms complete, every outcome is the broker's real one.
        /// Method: a model of lapin's pairing; tags complete in any order, a return stands before its own confirm,
        /// each confirm carries the oldest waiting return; settle after batches of random size.
        #[test]
        fn outcomes_are_right_in_any_order_of_confirms(
            plan in prop::collection::vec((prop::bool::weighted(0.3), prop::bool::weighted(0.8)), 1..60),
            order_seed in prop::collection::vec(any::<u32>(), 60),
            batch in prop::collection::vec(1_usize..8, 60),
            reach in 1_u64..60,
        ) {
            let count = plan.len() as u64;
            let mut ledger = Ledger::new();
            for tag in 1..=count {
                ledger.published(Ticket(tag + 1000), message(&format!("m{tag}")), 0);
            }
            // A random order in which no confirm overtakes another by more than `reach`.
            let mut order: Vec<u64> = (1..=count).collect();
            order.sort_by_key(|tag| (tag + u64::from(order_seed[*tag as usize - 1]) % reach, *tag));
            let mut model = Model { plan: plan.clone(), waiting: VecDeque::new(), sent: 0 };
            let mut told = BTreeMap::new();
            let mut left = order.as_slice();
            for size in batch.iter().cycle() {
                let (now, rest) = left.split_at((*size).min(left.len()));
                left = rest;
                for tag in now {
                    if let Some(returned) = model.complete(*tag) {
                        prop_assert_eq!(ledger.returned(&format!("m{returned}"), &no_route()), Ok(()));
                    }
                    let word = if plan[*tag as usize - 1].1 { Word::Ack } else { Word::Nack };
                    ledger.confirmed(*tag, word);
                }
                for (ticket, outcome) in ledger.settle() {
                    prop_assert!(told.insert(ticket.0 - 1000, outcome).is_none(), "told twice");
                }
                if left.is_empty() {
                    break;
                }
            }
            prop_assert!(ledger.is_empty());
            for (tag, (returned, acked)) in (1..).zip(&plan) {
                let expected = match (returned, acked) {
                    (true, _) => Outcome::Returned(no_route()),
                    (false, true) => Outcome::Confirmed,
                    (false, false) => Outcome::Nacked,
                };
                prop_assert_eq!(told.get(&tag), Some(&expected), "tag {}", tag);
            }
        }
    }
}
