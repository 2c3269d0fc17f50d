//! Decides when a try is written down before it begins, which try runs alone, and when a delivery's
//! tries are used up. Knows nothing of a store, a broker or a clock.
//!
//! A first delivery that succeeds leaves no row. A try is written down first, in a commit of its
//! own, if the delivery may have been tried before. That is so if the broker delivers it again, a
//! row of it exists, or it is parked or redriven. A process that finds an open try in the file
//! knows that its predecessor died on it.
//!
//! **Rules.**
//! - A death while other deliveries were tried too accuses each of them and convicts none. Each is
//!   tried alone next.
//! - Only a death while a delivery was tried alone convicts it. From then on, the deaths that it
//!   may have caused count too. So it is rejected after `attempts` deaths in all.
//! - A try that ends with an error clears the delivery of its accusations: a handler that returns
//!   has killed nothing.

use crate::log::in_hand::{Open, Tries};

impl Tries {
    /// The tries as a new process finds them: the predecessor's death ended an open try.
    pub(super) fn after_restart(self) -> Self {
        let (deaths, shared) = match self.open {
            Open::None => (0, 0),
            Open::Shared => (0, 1),
            Open::Alone => (1, 0),
        };
        Self {
            deaths: self.deaths.saturating_add(deaths),
            shared: self.shared.saturating_add(shared),
            open: Open::None,
            ..self
        }
    }

    /// The broker delivers it again, and nothing is known of it: a process may have died on it.
    pub(super) fn accused(self) -> Self {
        Self { shared: self.shared.saturating_add(1), ..self }
    }

    /// The tries after the handler has returned an error.
    pub(super) fn failed(self) -> Self {
        Self { failures: self.failures.saturating_add(1), shared: 0, open: Open::None, ..self }
    }

    /// The tries that count.
    pub(super) fn counted(self) -> u32 {
        let accused = if self.deaths > 0 { self.shared } else { 0 };
        self.failures.saturating_add(self.deaths).saturating_add(accused)
    }

    /// Whether the delivery has ended the process as often as it may. Then it is not tried again.
    pub(super) fn is_convicted(self, attempts: u32) -> bool {
        self.deaths > 0 && self.counted() >= attempts
    }

    /// Whether no other delivery may be tried beside it. With few attempts, none can be spared for
    /// a try beside others.
    pub(super) fn wants_to_be_alone(self, attempts: u32) -> bool {
        self.deaths > 0 || self.shared > u32::from(attempts > 2)
    }
}

/// Deliveries that are tried together, in the order of their arrival.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step<T> {
    pub(super) items: Vec<T>,
    /// The kind of open try that the rows record.
    pub(super) open: Open,
}

/// Splits a batch into steps, in its order. `alone` says which items are tried alone.
pub(super) fn steps<T>(batch: Vec<T>, alone: impl Fn(&T) -> bool) -> Vec<Step<T>> {
    let mut steps: Vec<Step<T>> = Vec::new();
    for item in batch {
        if alone(&item) {
            steps.push(Step { items: vec![item], open: Open::Alone });
            continue;
        }
        match steps.last_mut().filter(|step| step.open == Open::Shared) {
            Some(step) => step.items.push(item),
            None => steps.push(Step { items: vec![item], open: Open::Shared }),
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Simulates deliveries `0..len` and a consumer that starts again after each death. The handler
    /// of `poison` kills the process each time; the handler of `failing` fails each time. Returns
    /// the number of deaths, and the failures after which each was rejected.
    fn lives(len: u32, poison: &[u32], failing: &[u32], attempts: u32) -> (u32, BTreeMap<u32, u32>) {
        let mut rows: BTreeMap<u32, Tries> = BTreeMap::new();
        let mut queue: Vec<u32> = (0..len).collect();
        let (mut deaths, mut rejected, mut redelivered) = (0, BTreeMap::new(), false);
        'life: loop {
            assert!(deaths <= 100, "it goes on for ever");
            rows.values_mut().for_each(|tries| *tries = tries.after_restart());
            let mut unknown = redelivered;
            redelivered = true;
            while !queue.is_empty() {
                let mut tries: BTreeMap<u32, Tries> = BTreeMap::new();
                for item in &queue {
                    let known = rows.get(item).copied();
                    let new = if unknown { Tries::default().accused() } else { Tries::default() };
                    tries.insert(*item, known.unwrap_or(new));
                }
                let noted = |item: &u32| unknown || rows.contains_key(item);
                let noted: Vec<u32> = queue.iter().copied().filter(noted).collect();
                unknown = false;
                for item in queue.clone() {
                    if tries[&item].is_convicted(attempts) {
                        rejected.insert(item, tries[&item].failures);
                        queue.retain(|other| *other != item);
                    }
                }
                for step in steps(queue.clone(), |item| tries[item].wants_to_be_alone(attempts)) {
                    for item in step.items.iter().filter(|item| noted.contains(item)) {
                        rows.insert(*item, Tries { open: step.open, ..tries[item] });
                    }
                    if step.items.iter().any(|item| poison.contains(item)) {
                        deaths += 1;
                        continue 'life;
                    }
                    for item in step.items {
                        if failing.contains(&item) {
                            let after = tries[&item].failed();
                            rows.insert(item, after);
                            if after.counted() >= attempts {
                                rejected.insert(item, after.failures);
                                queue.retain(|other| *other != item);
                            }
                        } else {
                            rows.remove(&item);
                            queue.retain(|other| *other != item);
                        }
                    }
                }
            }
            return (deaths, rejected);
        }
    }

    /// Goal: one delivery that kills is rejected after `attempts` deaths, and nothing else is.
    /// Method: every place, every number of attempts. (With a single attempt, the first death is
    /// not known to be its own.)
    #[test]
    fn a_killer_is_rejected_after_its_attempts() {
        for attempts in 1..=12 {
            for at in 0..6 {
                let (deaths, rejected) = lives(6, &[at], &[], attempts);
                assert_eq!(deaths, attempts.max(2), "{attempts} attempts");
                assert_eq!(rejected.into_keys().collect::<Vec<_>>(), [at]);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal: among killers, failing deliveries and innocent ones, exactly the killers and the
        /// failing ones are rejected. The deaths are bounded. A failing one has its tries, less at
        /// most those on which it was accused.
        #[test]
        fn only_the_guilty_are_rejected(
            poison in prop::collection::btree_set(0..12_u32, 0..4),
            failing in prop::collection::btree_set(0..12_u32, 0..4),
            attempts in 1..12_u32,
        ) {
            let failing: Vec<u32> = failing.difference(&poison).copied().collect();
            let poison: Vec<u32> = poison.into_iter().collect();
            let (deaths, rejected) = lives(12, &poison, &failing, attempts);
            let guilty: std::collections::BTreeSet<u32> = poison.iter().chain(&failing).copied().collect();
            prop_assert_eq!(rejected.keys().copied().collect::<std::collections::BTreeSet<_>>(), guilty);
            prop_assert!(deaths <= attempts.max(2) * poison.len() as u32 + 1);
            for item in failing {
                prop_assert_eq!(rejected[&item], attempts, "an innocent failure pays for nobody's death");
            }
        }
    }
}
