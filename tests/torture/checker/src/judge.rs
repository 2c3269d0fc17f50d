//! Holds what was meant against what is there.
//!
//! It is fed in this order: histories, records, rows and quarantines of the applications; the tap's messages as they came;
//! the consumer's effects. [`Judge::finish`] then says what can only be said when all is known.
//!
//! **Commit order** is the order of sequence numbers. Which event has which number is given by the log, by the answers to
//! the writers and by the tap; the three must agree. A log that is trimmed is judged by the other two.

mod event;
mod finish;

use std::collections::{BTreeMap, HashMap};

use self::event::{App, Batch, BatchOutcome, Event, Facts};
use crate::formats::{Line, ROUTING_KEY, TapMessage, exchange, name_in};
use crate::record::{self, Record};
use crate::verdict::{Verdict, Violation};

/// Knows all that it has been fed.
#[derive(Debug, Default)]
pub struct Judge {
    apps: BTreeMap<String, App>,
    /// Message id to the event that it names.
    ids: HashMap<String, (String, u64)>,
    /// Application and key: number of effects, sum of their payloads' checksums.
    balances: HashMap<(String, String), (u64, u64)>,
    verdict: Verdict,
}

impl Judge {
    /// For the events of these applications.
    #[must_use]
    pub fn new<'a>(apps: impl IntoIterator<Item = &'a str>) -> Self {
        let apps = apps.into_iter().map(|name| (name.to_owned(), App::default())).collect();
        Self { apps, ..Self::default() }
    }

    /// The application, which the caller has named before.
    fn app(&mut self, name: &str) -> &mut App {
        self.apps.entry(name.to_owned()).or_default()
    }

    /// Nothing is ever taken from this application's log: every number has its record there.
    pub fn keeps_log(&mut self, app: &str) {
        self.app(app).keeps_log = true;
    }

    /// A line of one of the application's histories, in the order of its lives.
    pub fn history(&mut self, app: &str, line: Line) {
        match line {
            Line::Intent { batch, row, stream, events, .. } => {
                let known = self.app(app);
                if let Some(before) = known.batches.get(&batch) {
                    // A retry: the very same again.
                    if before.row != row
                        || before.events != events.iter().map(|event| event.n).collect::<Vec<_>>()
                    {
                        self.verdict.says(
                            Violation::Phantom,
                            format!("{app}: batch {batch} was planned twice, in two ways"),
                        );
                    }
                    return;
                }
                let numbers = events.iter().map(|event| event.n).collect();
                known
                    .batches
                    .insert(batch, Batch { row, stream, events: numbers, outcome: BatchOutcome::Open });
                for planned in events {
                    let n = planned.n;
                    if known.events.insert(n, Event::new(batch, planned)).is_some() {
                        self.verdict
                            .says(Violation::Phantom, format!("{app}: event {n} was planned in two batches"));
                        return;
                    }
                }
            }
            Line::Ok { batch, seqs } => self.answered(app, batch, BatchOutcome::Written(seqs)),
            Line::No { batch, .. } => self.answered(app, batch, BatchOutcome::Refused),
            Line::Unknown { .. } => {}
        }
    }

    fn answered(&mut self, app: &str, batch: u64, outcome: BatchOutcome) {
        let Some(known) = self.app(app).batches.get_mut(&batch) else {
            return self
                .verdict
                .says(Violation::Phantom, format!("{app}: batch {batch} was answered and never asked for"));
        };
        match (&known.outcome, outcome) {
            (BatchOutcome::Written(before), BatchOutcome::Written(now)) if *before != now => {
                let sentence =
                    format!("{app}: batch {batch} was written once as {before:?} and once as {now:?}");
                self.verdict.says(Violation::Phantom, sentence);
            }
            (BatchOutcome::Written(_), BatchOutcome::Refused)
            | (BatchOutcome::Refused, BatchOutcome::Written(_)) => {
                self.verdict
                    .says(Violation::Phantom, format!("{app}: batch {batch} was both written and refused"));
            }
            (_, outcome) => known.outcome = outcome,
        }
    }

    /// A record of the application's log, in order.
    pub fn record(&mut self, app: &str, seq: u64, bytes: &[u8]) {
        let at = format!("{app}, seq {seq}");
        let record = match record::read(seq, bytes) {
            Ok(record) => record,
            Err(what) => {
                return self.verdict.says(Violation::Lost, format!("{at}: the record is damaged: {what}"));
            }
        };
        let known = self.app(app);
        let before = known.last_record.replace((seq, record.end_offset));
        if let Some((last, end)) = before
            && last + 1 == seq
            && end + bytes.len() as u64 != record.end_offset
        {
            self.verdict.says(
                Violation::Lost,
                format!("{at}: its end offset does not follow from the record before it"),
            );
        }
        let Some(n) = self.meant(app, &record.payload, &at) else { return };
        self.compare_record(app, n, &record, &at);
        if !self.number(app, n, seq, &at) {
            return;
        }
        if let (Some(stream), Some(revision)) = (&record.stream, record.revision) {
            let next = self.app(app).revisions.entry(stream.clone()).or_default();
            let expected = std::mem::replace(next, revision + 1);
            if expected != revision {
                let sentence =
                    format!("{at}: stream {stream} has revision {revision} where {expected} was next");
                self.verdict.says(Violation::Disordered, sentence);
            }
        }
        let facts = Facts {
            id: record.id,
            lane: record.lane,
            number: record.lane_number,
            crc: u64::from(record.crc),
        };
        if let Some(event) = self.app(app).events.get_mut(&n) {
            event.record = Some(facts);
        }
    }

    /// The event that a payload names, if it was meant with these very bytes.
    fn meant(&mut self, app: &str, payload: &[u8], at: &str) -> Option<u64> {
        let sentence = match name_in(payload) {
            None => {
                format!("{at}: no writer names its events so: {:?}", String::from_utf8_lossy(head(payload)))
            }
            Some((name, n)) if name != app => format!("{at}: it holds event {n} of {name}"),
            Some((_, n)) => match self.app(app).events.get(&n).map(|event| &event.planned) {
                None => format!("{at}: nobody meant to write event {n}"),
                Some(planned)
                    if planned.crc != crc32fast::hash(payload) || planned.len as usize != payload.len() =>
                {
                    format!("{at}: event {n} has other bytes than were meant")
                }
                Some(_) => return Some(n),
            },
        };
        self.verdict.says(Violation::Phantom, sentence);
        None
    }

    fn compare_record(&mut self, app: &str, n: u64, record: &Record, at: &str) {
        let known = self.app(app);
        let Some(event) = known.events.get(&n) else { return };
        let stream = known.batches.get(&event.batch).and_then(|batch| batch.stream.clone());
        let wrong = if event.planned.key != record.key {
            "key"
        } else if record.to != Some((exchange(event.planned.to), ROUTING_KEY.to_owned())) {
            "destination"
        } else if stream != record.stream {
            "stream"
        } else {
            return;
        };
        self.verdict.says(Violation::Phantom, format!("{at}: event {n} has another {wrong} than was meant"));
    }

    /// Notes that the event has this sequence number. Whether it is the only one to have it, and has no other.
    fn number(&mut self, app: &str, n: u64, seq: u64, at: &str) -> bool {
        let known = self.app(app);
        let there = *known.by_seq.entry(seq).or_insert(n);
        let Some(event) = known.events.get_mut(&n) else { return false };
        let has = *event.seq.get_or_insert(seq);
        if there == n && has == seq {
            return true;
        }
        let sentence = if there == n {
            format!("{at}: event {n} is there a second time, it has seq {has}")
        } else {
            format!("{at}: event {n} has the number of event {there}")
        };
        self.verdict.says(Violation::Phantom, sentence);
        false
    }

    /// A row of the application's own table: the batch, and how many events it says that it wrote.
    pub fn row(&mut self, app: &str, batch: u64, events: u64) {
        self.app(app).rows.insert(batch, events);
    }

    /// An event in the relay's quarantine.
    pub fn quarantined(&mut self, app: &str, seq: u64, reason: String) {
        self.app(app).quarantined.insert(seq, reason);
    }

    /// A message, in the order in which the tap got them.
    pub fn tapped(&mut self, message: &TapMessage) {
        let at = format!("tap, message {}", message.message_id);
        let app = match name_in(&message.body) {
            Some((app, _)) if self.apps.contains_key(app) => app.to_owned(),
            _ => {
                let text = String::from_utf8_lossy(head(&message.body)).into_owned();
                return self
                    .verdict
                    .says(Violation::Phantom, format!("{at}: no application names its events so: {text:?}"));
            }
        };
        let Some(n) = self.meant(&app, &message.body, &at) else { return };
        self.compare_message(&app, n, message, &at);
        let owner = self.ids.entry(message.message_id.clone()).or_insert_with(|| (app.clone(), n));
        if *owner != (app.clone(), n) {
            let sentence = format!("{at}: event {n} of {app} has the id of event {} of {}", owner.1, owner.0);
            return self.verdict.says(Violation::Phantom, sentence);
        }
        let facts = Facts {
            id: message.message_id.clone(),
            lane: message.lane,
            number: message.lane_number,
            crc: message.crc,
        };
        let known = self.app(&app);
        let store = known.store.get_or_insert_with(|| (message.store.clone(), message.epoch));
        let of_this_store = (store.0.as_str(), store.1) == (message.store.as_str(), message.epoch);
        let Some(event) = known.events.get_mut(&n) else { return };
        let first = event.tap.is_none();
        let same = *event.tap.get_or_insert_with(|| facts.clone()) == facts && of_this_store;
        if first {
            known.first_deliveries.push(n);
        } else {
            self.verdict.repeats += 1;
        }
        if !same {
            let sentence = format!(
                "{at}: event {n} of {app} came again under another id, lane, number, checksum or store"
            );
            self.verdict.says(Violation::Phantom, sentence);
        }
        self.number(&app, n, message.sequence, &at);
    }

    fn compare_message(&mut self, app: &str, n: u64, message: &TapMessage, at: &str) {
        let Some(event) = self.app(app).events.get(&n) else { return };
        let record_differs = event.record.as_ref().is_some_and(|record| {
            (&record.id, record.lane, record.number, record.crc)
                != (&message.message_id, message.lane, message.lane_number, message.crc)
        });
        let wrong = if event.planned.key != message.key {
            "another key than was meant"
        } else if message.exchange != exchange(event.planned.to) || message.routing_key != ROUTING_KEY {
            "another destination than was meant"
        } else if event.planned.poison {
            "come through, and the broker cannot take it"
        } else if record_differs {
            "another id, lane, number or checksum than its record"
        } else {
            return;
        };
        self.verdict.says(Violation::Phantom, format!("{at}: event {n} of {app} has {wrong}"));
    }

    /// How often the consumer has applied an event.
    pub fn effect(&mut self, app: &str, n: u64, times: u64) {
        match self.apps.get_mut(app).and_then(|app| app.events.get_mut(&n)) {
            Some(event) => event.effects += times,
            None => self.verdict.says(
                Violation::Phantom,
                format!("the consumer applied event {n} of {app}, which nobody meant"),
            ),
        }
    }

    /// The consumer's running balance of a key: effects, and the sum of their checksums.
    pub fn balance(&mut self, app: &str, key: &str, effects: u64, sum: u64) {
        self.balances.insert((app.to_owned(), key.to_owned()), (effects, sum));
    }

    /// A delivery in the consumer's own quarantine. The run drives all of them again, so none may be left.
    pub fn rejected(&mut self, what: &str) {
        self.verdict.says(
            Violation::Lost,
            format!("the consumer has not applied a delivery that it rejected: {what}"),
        );
    }
}

fn head(bytes: &[u8]) -> &[u8] {
    bytes.get(..bytes.len().min(40)).unwrap_or_default()
}
