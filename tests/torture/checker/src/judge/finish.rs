//! What can be said when everything is known.

use std::collections::HashMap;

use super::Judge;
use super::event::{App, BatchOutcome};
use crate::verdict::{Verdict, Violation};

impl Judge {
    /// The verdict.
    #[must_use]
    pub fn finish(self) -> Verdict {
        let Self { apps, balances, mut verdict, .. } = self;
        for (name, mut app) in apps {
            let mut case = Case { name: &name, verdict: &mut verdict };
            case.answers(&mut app);
            case.batches(&app);
            case.gaps(&app);
            case.whole_log(&app);
            case.lanes(&app);
            case.ends(&app);
            case.order(&app);
            case.balances(&app, &balances);
            verdict.events += app.by_seq.len() as u64;
        }
        verdict
    }
}

struct Case<'a> {
    name: &'a str,
    verdict: &'a mut Verdict,
}

impl Case<'_> {
    fn says(&mut self, violation: Violation, sentence: &str) {
        self.verdict.says(violation, format!("{}: {sentence}", self.name));
    }

    /// What was reported to a writer is what the log and the tap say.
    fn answers(&mut self, app: &mut App) {
        let mut reported = Vec::new();
        for (number, batch) in &app.batches {
            let BatchOutcome::Written(seqs) = &batch.outcome else { continue };
            if seqs.len() != batch.events.len() {
                let sentence = format!(
                    "batch {number} of {} events was given {} numbers",
                    batch.events.len(),
                    seqs.len()
                );
                self.says(Violation::Lost, &sentence);
            }
            reported.extend(batch.events.iter().copied().zip(seqs.iter().copied()));
        }
        for (n, seq) in reported {
            let there = *app.by_seq.entry(seq).or_insert(n);
            let has = app.events.get_mut(&n).map(|event| *event.seq.get_or_insert(seq));
            if there != n || has != Some(seq) {
                let sentence = format!(
                    "event {n} was acknowledged as seq {seq}; there is event {there}, and it has seq {has:?}"
                );
                self.says(Violation::Lost, &sentence);
            }
        }
    }

    /// All or nothing, and nothing of what was refused; events and row together.
    fn batches(&mut self, app: &App) {
        for (number, batch) in &app.batches {
            let mut seqs: Vec<_> =
                batch.events.iter().filter_map(|n| app.events.get(n).and_then(|event| event.seq)).collect();
            let ascending = seqs.is_sorted();
            seqs.sort_unstable();
            let there = seqs.len();
            let row = app.rows.get(number).copied();
            if batch.outcome == BatchOutcome::Refused {
                if there > 0 || row.is_some() {
                    let sentence = format!(
                        "batch {number} was refused, and {there} of its events and row {row:?} are there"
                    );
                    self.says(Violation::Phantom, &sentence);
                }
                continue;
            }
            if there != 0 && there != batch.events.len() {
                let sentence = format!("batch {number}: {there} of {} events are there", batch.events.len());
                self.says(Violation::Lost, &sentence);
            }
            if !ascending || seqs.windows(2).any(|pair| pair[0] + 1 != pair[1]) {
                self.says(Violation::Disordered, &format!("batch {number} has the numbers {seqs:?}"));
            }
            let expected = (batch.row && there > 0).then_some(batch.events.len() as u64);
            match (expected, row) {
                (Some(events), None) => {
                    self.says(
                        Violation::Lost,
                        &format!("batch {number}: its {events} events are there, its row is not"),
                    );
                }
                (_, Some(_)) if expected != row => {
                    self.says(
                        Violation::Phantom,
                        &format!("batch {number}: its row says {row:?}, it should be {expected:?}"),
                    );
                }
                _ => {}
            }
        }
        for number in app.rows.keys().filter(|number| !app.batches.contains_key(number)) {
            self.says(
                Violation::Phantom,
                &format!("there is a row of batch {number}, which nobody meant to write"),
            );
        }
    }

    /// Every number up to the newest is some event's.
    fn gaps(&mut self, app: &App) {
        let newest = app.by_seq.keys().max().copied().map_or(0, |seq| seq + 1);
        for seq in (0..newest).filter(|seq| !app.by_seq.contains_key(seq)) {
            self.says(
                Violation::Lost,
                &format!("seq {seq} is neither in the log, nor in the tap, nor acknowledged"),
            );
        }
    }

    /// Where nothing is trimmed, what was acknowledged or published is in the log too.
    fn whole_log(&mut self, app: &App) {
        for (n, event) in app.events.iter().filter(|_| app.keeps_log) {
            if let (Some(seq), None) = (event.seq, &event.record) {
                self.says(Violation::Lost, &format!("event {n}, seq {seq}, is no longer in the log"));
            }
        }
    }

    /// Each lane is one destination and key, numbered from 0 without a gap, in commit order, and named after its first event.
    fn lanes(&mut self, app: &App) {
        let mut numbered = Vec::new();
        let (mut lane_of, mut of_lane) = (HashMap::new(), HashMap::new());
        for (n, event) in &app.events {
            let (Some(facts), Some(seq)) = (event.facts(), event.seq) else { continue };
            numbered.push((facts.lane, facts.number, seq, *n));
            let of = (event.planned.to, &event.planned.key);
            if *lane_of.entry(of).or_insert(facts.lane) != facts.lane {
                self.says(
                    Violation::Phantom,
                    &format!("event {n} is in another lane than others of its destination and key"),
                );
            }
            if *of_lane.entry(facts.lane).or_insert(of) != of {
                self.says(
                    Violation::Phantom,
                    &format!("event {n} is in the lane of another destination or key"),
                );
            }
        }
        numbered.sort_unstable();
        let mut before = None;
        for (lane, number, seq, n) in numbered {
            let (expected, after) = match before {
                Some((of, number, seq)) if of == lane => (number + 1, Some(seq)),
                _ => (0, None),
            };
            if number != expected || (number == 0 && lane != seq) {
                let sentence = format!("event {n} has number {number} of lane {lane}; {expected} was next");
                self.says(Violation::Phantom, &sentence);
            } else if after.is_some_and(|after| after >= seq) {
                self.says(
                    Violation::Disordered,
                    &format!("event {n}: lane {lane} is not numbered in commit order"),
                );
            }
            before = Some((lane, number, seq));
        }
    }

    /// Each committed event was delivered and applied once; what cannot be published is in quarantine with a reason, and nothing else is: the
    /// conductor has driven again whatever its destination had kept back.
    fn ends(&mut self, app: &App) {
        for (n, event) in &app.events {
            let Some(seq) = event.seq else {
                if event.effects > 0 {
                    self.says(
                        Violation::Phantom,
                        &format!("event {n} was applied and is nowhere in the log"),
                    );
                }
                continue;
            };
            let reason = app.quarantined.get(&seq).filter(|reason| !reason.is_empty());
            if event.planned.poison && reason.is_none() {
                let sentence = format!(
                    "event {n}, seq {seq}, cannot be published, and is not in quarantine with a reason"
                );
                self.says(Violation::Lost, &sentence);
            } else if let (false, Some(reason)) = (event.planned.poison, reason) {
                let sentence =
                    format!("event {n}, seq {seq}, is left in quarantine, and can be published: {reason}");
                self.says(Violation::Lost, &sentence);
            } else if event.planned.poison {
                // In its place.
            } else if event.tap.is_none() {
                self.says(Violation::Lost, &format!("event {n}, seq {seq}, never reached the tap"));
            } else if event.effects == 0 {
                self.says(Violation::Lost, &format!("event {n}, seq {seq}, was never applied"));
            }
            if event.effects > 1 {
                let sentence = format!("event {n}, seq {seq}, was applied {} times", event.effects);
                self.says(Violation::AppliedTwice, &sentence);
            }
            if event.effects > 0 && event.planned.poison {
                self.says(
                    Violation::Phantom,
                    &format!("event {n}, seq {seq}, was applied, and cannot be published"),
                );
            }
        }
    }

    /// First deliveries of a key come in commit order, without a gap.
    fn order(&mut self, app: &App) {
        let mut keys: HashMap<&str, Key> = HashMap::new();
        for event in app.events.values() {
            if let (Some(key), Some(seq), Some(_)) = (&event.planned.key, event.seq, &event.tap) {
                keys.entry(key).or_default().seqs.push(seq);
            }
        }
        for key in keys.values_mut() {
            key.seqs.sort_unstable();
            key.came = vec![false; key.seqs.len()];
        }
        for n in &app.first_deliveries {
            let Some(event) = app.events.get(n) else { continue };
            let (Some(key), Some(seq)) = (&event.planned.key, event.seq) else { continue };
            let Some(state) = keys.get_mut(key.as_str()) else { continue };
            if let Some(missed) = state.comes(seq) {
                let sentence =
                    format!("event {n}, seq {seq}, of key {key} came before seq {missed} of that key");
                self.says(Violation::Disordered, &sentence);
            }
        }
    }

    /// The running balance of each key is what its effects come to.
    fn balances(&mut self, app: &App, balances: &HashMap<(String, String), (u64, u64)>) {
        let mut expected: HashMap<&str, (u64, u64)> = HashMap::new();
        for event in app.events.values().filter(|event| event.effects > 0) {
            let (effects, sum) =
                expected.entry(event.planned.key.as_deref().unwrap_or_default()).or_default();
            *effects += event.effects;
            *sum = sum.wrapping_add(u64::from(event.planned.crc).wrapping_mul(event.effects));
        }
        let there = balances.iter().filter(|((app, _), _)| app == self.name);
        let there: HashMap<&str, (u64, u64)> =
            there.map(|((_, key), balance)| (key.as_str(), *balance)).collect();
        for (key, balance) in &there {
            let is = expected.get(key).copied().unwrap_or_default();
            if is != *balance {
                let sentence =
                    format!("the balance of key {key:?} is {balance:?}; its effects come to {is:?}");
                self.says(Violation::AppliedTwice, &sentence);
            }
        }
        for key in expected.keys().filter(|key| !there.contains_key(*key)) {
            self.says(Violation::Lost, &format!("there are effects of key {key:?}, and no balance"));
        }
    }
}

/// The deliveries of one key.
#[derive(Default)]
struct Key {
    /// In commit order.
    seqs: Vec<u64>,
    came: Vec<bool>,
    /// All before it came.
    next: usize,
}

impl Key {
    /// The one that should have come now, if it is another.
    fn comes(&mut self, seq: u64) -> Option<u64> {
        let at = self.seqs.binary_search(&seq).ok()?;
        let missed = self.seqs.get(self.next).copied().filter(|next| *next != seq);
        if let Some(came) = self.came.get_mut(at) {
            *came = true;
        }
        while self.came.get(self.next) == Some(&true) {
            self.next += 1;
        }
        missed
    }
}
