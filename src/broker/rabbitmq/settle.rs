//! Matches outcomes and messages. Pure: no I/O, no clock, no lapin.
//!
//! The broker's confirms name tags, and may come in any order. Each confirm settles its own message
//! and waits for no other message. A return names no tag. The ledger matches a return by the
//! message's own id. The broker sends the return before the confirm of the same message. So one
//! rule makes every outcome right: **after confirms are noted, all returns that came before them
//! are noted too, and only then is anything settled.** `Returns` has these returns in time (see
//! there). lapin's own pairing of returns with confirms is not used.
//!
//! A message that waits too long for a confirm is reported *silent*, once. The message stays,
//! because its confirm may still come.
//!
//! A return that comes after its message was settled breaks the rule; such a return is always
//! reported.

use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;

use rustc_hash::FxBuildHasher;

use crate::message::{Fault, Message, Outcome, Ticket};

use super::inbound::Returned;

/// The most places of settled messages that are kept between unsettled messages, in addition to one
/// for each message that waits.
const GAPS_MAX: usize = 1024;

/// The unsettled publishes of one channel, in publish order.
#[derive(Debug)]
pub(super) struct Ledger {
    /// The tag of the front slot.
    front: u64,
    /// The front slot is unsettled.
    slots: VecDeque<Option<Slot>>,
    /// Unsettled messages that much younger messages have overtaken.
    behind: BTreeMap<u64, Slot>,
    /// The number of unsettled messages that are not reported silent.
    waiting: usize,
    /// Confirms that are noted and not settled.
    heard: Vec<(u64, Word)>,
    /// The highest tag with a confirm.
    highest: u64,
}

#[derive(Debug)]
struct Slot {
    ticket: Ticket,
    message: Arc<Message>,
    /// A hash of the message's id: searching a whole window of hashes is faster than searching
    /// texts.
    id_hash: u64,
    since_ms: u64,
    returned: Option<Returned>,
    reported_silent: bool,
}

/// The broker's confirm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Ack,
    Nack,
}

/// A return for a message that is not in flight or already settled: a reported outcome may be
/// wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LateReturn;

/// The result of a check of the ages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silence {
    /// No message has waited too long.
    None,
    /// Some messages have waited too long, and younger messages have a confirm: the channel works.
    OfSome,
    /// Some messages have waited too long, and no younger message has a confirm: the channel may be
    /// dead.
    OfAll,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            front: 1,
            slots: VecDeque::new(),
            behind: BTreeMap::new(),
            waiting: 0,
            heard: Vec::new(),
            highest: 0,
        }
    }

    /// Notes a publish and returns its tag. Tags count from 1, as the broker's tags do.
    pub(super) fn published(&mut self, ticket: Ticket, message: Arc<Message>, since_ms: u64) -> u64 {
        let tag = self.front + self.slots.len() as u64;
        let id_hash = hash(message.message_id.as_deref().unwrap_or_default());
        let slot = Slot { ticket, message, id_hash, since_ms, returned: None, reported_silent: false };
        self.slots.push_back(Some(slot));
        self.waiting += 1;
        tag
    }

    /// Notes the broker's confirm of one tag.
    pub(super) fn confirmed(&mut self, tag: u64, word: Word) {
        self.heard.push((tag, word));
        self.highest = self.highest.max(tag);
    }

    /// Notes that the message of this id was returned. If one id is in flight twice, both messages
    /// count as returned. Which of them it was cannot be known, and a repeat is harmless while a
    /// loss is not.
    ///
    /// Searches all unsettled messages. An index of ids would cost each publish an allocation and
    /// three look-ups, returned or not.
    pub(super) fn returned(&mut self, returned: &Returned) -> Result<(), LateReturn> {
        let (id, id_hash, mut found) = (&*returned.id, hash(&returned.id), Err(LateReturn));
        let has_it =
            |slot: &&mut Slot| slot.id_hash == id_hash && slot.message.message_id.as_deref() == Some(id);
        for slot in self.slots.iter_mut().flatten().chain(self.behind.values_mut()).filter(has_it) {
            slot.returned = Some(returned.clone());
            found = Ok(());
        }
        found
    }

    /// Takes out what is settled. Call it once all returns that came before the noted confirms have
    /// been noted. Returned messages come separately: their cause must still be asked.
    pub(super) fn settle_into(
        &mut self,
        settled: &mut Vec<(Ticket, Outcome)>,
        returned: &mut Vec<(Ticket, Returned)>,
    ) {
        let mut heard = std::mem::take(&mut self.heard);
        for (tag, word) in heard.drain(..) {
            let Some(slot) = self.take(tag) else { continue };
            self.waiting -= usize::from(!slot.reported_silent);
            match (slot.returned, word) {
                (Some(back), _) => returned.push((slot.ticket, back)),
                (None, Word::Ack) => settled.push((slot.ticket, Outcome::Confirmed)),
                (None, Word::Nack) => settled.push((slot.ticket, Outcome::Nacked)),
            }
        }
        // The buffer is reused.
        self.heard = heard;
        self.tidy();
    }

    /// The number of messages that wait for a confirm and are not reported silent.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    /// The publish time of the oldest of these messages.
    pub(super) fn oldest_since_ms(&self) -> Option<u64> {
        self.in_order().find(|(_, slot)| !slot.reported_silent).map(|(_, slot)| slot.since_ms)
    }

    /// Reports all messages silent that were published at or before `until_ms`. They stay: a
    /// confirm may still come.
    pub(super) fn silent_into(
        &mut self,
        until_ms: u64,
        fault: &Fault,
        settled: &mut Vec<(Ticket, Outcome)>,
    ) -> Silence {
        let mut oldest = None;
        let behind = self.behind.iter_mut().map(|(tag, slot)| (*tag, slot));
        let slots = (self.front..).zip(&mut self.slots).filter_map(|(tag, slot)| Some((tag, slot.as_mut()?)));
        // The messages are in order of time, so the first young message ends the loop.
        for (tag, slot) in behind.chain(slots).take_while(|(_, slot)| slot.since_ms <= until_ms) {
            if slot.reported_silent {
                continue;
            }
            oldest = oldest.or(Some(tag));
            slot.reported_silent = true;
            // The message's id is still needed, its payload is not.
            let message_id = slot.message.message_id.clone();
            slot.message = Arc::new(Message { message_id, ..Message::default() });
            settled.push((slot.ticket, Outcome::Silent(fault.clone())));
            self.waiting -= 1;
        }
        match oldest {
            None => Silence::None,
            Some(tag) if self.highest > tag => Silence::OfSome,
            Some(_) => Silence::OfAll,
        }
    }

    fn in_order(&self) -> impl Iterator<Item = (u64, &Slot)> {
        let behind = self.behind.iter().map(|(tag, slot)| (*tag, slot));
        behind.chain((self.front..).zip(&self.slots).filter_map(|(tag, slot)| Some((tag, slot.as_ref()?))))
    }

    fn take(&mut self, tag: u64) -> Option<Slot> {
        let Some(index) = tag.checked_sub(self.front) else { return self.behind.remove(&tag) };
        self.slots.get_mut(usize::try_from(index).ok()?)?.take()
    }

    /// Drops settled slots at the front, and moves out messages that many others have overtaken. So
    /// an old message keeps no room for the messages that overtook it.
    fn tidy(&mut self) {
        let keeps = |slots: &VecDeque<Option<Slot>>, most| {
            slots.front().is_none_or(|front| front.is_some() && slots.len() <= most)
        };
        let most = 2 * self.waiting + GAPS_MAX;
        while !keeps(&self.slots, most) {
            if let Some(slot) = self.slots.pop_front().flatten() {
                self.behind.insert(self.front, slot);
            }
            self.front += 1;
        }
    }

    #[cfg(test)]
    fn settle(&mut self) -> Vec<(Ticket, Outcome)> {
        let (mut settled, mut returned) = (Vec::new(), Vec::new());
        self.settle_into(&mut settled, &mut returned);
        settled.extend(returned.into_iter().map(|(ticket, back)| (ticket, Outcome::Returned(back.fault))));
        settled
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.behind.is_empty() && self.waiting == 0
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

    fn back(id: &str) -> Returned {
        let (exchange, routing_key) = (String::new(), "q".to_owned());
        Returned { id: id.to_owned(), exchange, routing_key, fault: no_route() }
    }

    fn no_route() -> Fault {
        Fault::with_code(FaultClass::Destination, 312, "NO_ROUTE")
    }

    fn silence() -> Fault {
        Fault::new(FaultClass::Outage, "no confirm")
    }

    fn message(id: &str) -> Arc<Message> {
        Arc::new(Message { message_id: Some(id.into()), ..Message::default() })
    }

    /// Goal: a message without a confirm delays no other's outcome. Method: the second and third of
    /// three get their confirms first.
    #[test]
    fn a_gap_delays_nobody() {
        let mut ledger = Ledger::new();
        for n in 1..=3 {
            assert_eq!(ledger.published(Ticket(n), message(&format!("m{n}")), n), n);
        }
        ledger.returned(&back("m2")).unwrap();
        ledger.confirmed(2, Word::Ack);
        ledger.confirmed(3, Word::Nack);
        assert_eq!(
            ledger.settle(),
            [(Ticket(3), Outcome::Nacked), (Ticket(2), Outcome::Returned(no_route()))]
        );
        assert_eq!((ledger.oldest_since_ms(), ledger.len()), (Some(1), 1));
        assert_eq!(ledger.returned(&back("m2")), Err(LateReturn));
        ledger.confirmed(1, Word::Ack);
        assert_eq!(ledger.settle(), [(Ticket(1), Outcome::Confirmed)]);
        assert!(ledger.is_empty() && ledger.oldest_since_ms().is_none());
    }

    /// Goal: silence is reported once, only for messages that have waited too long, and tells
    /// whether the channel works; a late confirm is still reported. Method: four messages, confirms
    /// out of order, a check of the ages between them.
    #[test]
    fn silence_is_reported_once_and_a_late_word_after_it() {
        let mut ledger = Ledger::new();
        for n in 1..=4 {
            ledger.published(Ticket(n), message(&format!("m{n}")), 10 * n);
        }
        let mut reported = Vec::new();
        assert_eq!(ledger.silent_into(9, &silence(), &mut reported), Silence::None);
        ledger.confirmed(2, Word::Ack);
        ledger.settle();
        assert_eq!(ledger.silent_into(10, &silence(), &mut reported), Silence::OfSome);
        assert_eq!(reported, [(Ticket(1), Outcome::Silent(silence()))]);
        assert_eq!((ledger.len(), ledger.oldest_since_ms()), (2, Some(30)));
        assert_eq!(
            ledger.silent_into(40, &silence(), &mut reported),
            Silence::OfAll,
            "3 and 4 have no younger one"
        );
        assert_eq!(reported.len(), 3);
        ledger.returned(&back("m3")).unwrap();
        for tag in [3, 1] {
            ledger.confirmed(tag, Word::Ack);
        }
        assert_eq!(
            ledger.settle(),
            [(Ticket(1), Outcome::Confirmed), (Ticket(3), Outcome::Returned(no_route()))]
        );
        assert_eq!(ledger.silent_into(99, &silence(), &mut reported), Silence::None);
        assert_eq!(ledger.len(), 0);
    }

    /// Goal: a silent message costs no memory for the messages that overtake it. Method: a hundred
    /// thousand messages overtake it.
    #[test]
    fn what_is_overtaken_keeps_no_room_for_the_others() {
        let mut ledger = Ledger::new();
        for n in 1..=100_000_u64 {
            let tag = ledger.published(Ticket(n), message("m"), n);
            if n % 40_000 != 1 {
                ledger.confirmed(tag, Word::Ack);
                assert_eq!(ledger.settle().len(), 1);
            }
        }
        assert!(ledger.slots.len() <= GAPS_MAX + 8, "{}", ledger.slots.len());
        let mut reported = Vec::new();
        assert_eq!(ledger.silent_into(u64::MAX, &silence(), &mut reported), Silence::OfSome);
        let tickets: Vec<u64> = reported.iter().map(|(ticket, _)| ticket.0).collect();
        assert_eq!(tickets, [1, 40_001, 80_001]);
        for tag in tickets {
            ledger.confirmed(tag, Word::Ack);
        }
        assert_eq!(ledger.settle().len(), 3);
        assert!(ledger.is_empty());
    }

    /// Goal: one id in flight twice never ends in a false confirm, and the bookkeeping stays right.
    /// Method: publish an id twice around another id, return it once, settle in two steps.
    #[test]
    fn an_id_in_flight_twice_counts_as_returned_twice() {
        let mut ledger = Ledger::new();
        ledger.published(Ticket(1), message("same"), 0);
        ledger.published(Ticket(2), message("other"), 0);
        ledger.published(Ticket(3), message("same"), 0);
        ledger.returned(&back("same")).unwrap();
        ledger.confirmed(1, Word::Ack);
        assert_eq!(ledger.settle(), [(Ticket(1), Outcome::Returned(no_route()))]);
        ledger.confirmed(3, Word::Ack);
        ledger.confirmed(2, Word::Ack);
        ledger.returned(&back("same")).unwrap();
        assert_eq!(
            ledger.settle(),
            [(Ticket(2), Outcome::Confirmed), (Ticket(3), Outcome::Returned(no_route()))]
        );
        assert!(ledger.is_empty());
    }

    /// A model of the connection's returns and confirms: the only rule is that a return comes
    /// before the confirm of its message.
    struct Model {
        /// The broker's decision for each tag: returned, acked.
        plan: Vec<(bool, bool)>,
        /// Tags whose returns have been sent.
        sent: Vec<bool>,
    }

    impl Model {
        /// The broker confirms `tag`: its return has been sent before, and perhaps returns of other
        /// tags.
        fn complete(&mut self, tag: u64, others: u32) -> Vec<u64> {
            let mut sent = Vec::new();
            for other in 1..=self.plan.len() as u64 {
                let at = other as usize - 1;
                let now = other == tag || (others >> (other % 32)) & 1 == 1;
                if now && self.plan[at].0 && !self.sent[at] {
                    self.sent[at] = true;
                    sent.push(other);
                }
            }
            sent
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Goal: in any order of confirms, every outcome is the broker's real one, reported once.
        /// Method: a model of the connection. Tags complete in any order, each return before its
        /// own confirm. Confirms are noted first and the returns of a batch after them, as the
        /// publisher does. The test settles after batches of random size.
        #[test]
        fn outcomes_are_right_in_any_order_of_confirms(
            plan in prop::collection::vec((prop::bool::weighted(0.3), prop::bool::weighted(0.8)), 1..60),
            order_seed in prop::collection::vec(any::<u32>(), 60),
            others in prop::collection::vec(any::<u32>(), 60),
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
            let mut model = Model { plan: plan.clone(), sent: vec![false; plan.len()] };
            let mut reported = BTreeMap::new();
            let mut left = order.as_slice();
            for size in batch.iter().cycle() {
                let (now, rest) = left.split_at((*size).min(left.len()));
                left = rest;
                let mut returned = Vec::new();
                for tag in now {
                    let sparse = others[*tag as usize - 1] & others[(*tag as usize) % 60];
                    returned.extend(model.complete(*tag, sparse));
                    let word = if plan[*tag as usize - 1].1 { Word::Ack } else { Word::Nack };
                    ledger.confirmed(*tag, word);
                }
                for returned in returned {
                    prop_assert_eq!(ledger.returned(&back(&format!("m{returned}"))), Ok(()));
                }
                for (ticket, outcome) in ledger.settle() {
                    prop_assert!(reported.insert(ticket.0 - 1000, outcome).is_none(), "reported twice");
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
                prop_assert_eq!(reported.get(&tag), Some(&expected), "tag {}", tag);
            }
        }
    }
}
