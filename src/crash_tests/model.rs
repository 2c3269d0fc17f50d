//! What a store must hold after so many steps, as plain as can be.

use std::collections::{BTreeMap, BTreeSet};

use super::workload::{Blob, Item, NewEvent, Step};
use crate::delivery::types::Change;
use crate::event::{Lane, RecordedEvent};

pub(super) const RELAYS: [&str; 2] = ["one", "other"];
pub(super) const MESSAGE_SCOPE: &str = "consumer";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) content: Blob,
    pub(super) key: Option<&'static str>,
    pub(super) lane: Lane,
    pub(super) stream: Option<(&'static str, u64)>,
}

impl Recorded {
    /// Whether this is what was read.
    pub(super) fn is(&self, event: &RecordedEvent) -> bool {
        event.payload() == self.content.bytes()
            && event.event_type() == self.content.tag.to_string()
            && event.key() == self.key
            && event.lane() == Some(self.lane)
            && event.stream().zip(event.revision()) == self.stream
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StreamOf {
    pub(super) seqs: Vec<u64>,
    pub(super) first: u64,
    pub(super) deleted: bool,
}

/// Where a relay is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RelayAt {
    pub(super) position: u64,
    pub(super) confirmed: u64,
    pub(super) exceptions: BTreeSet<u64>,
    pub(super) parked: BTreeSet<u64>,
}

/// Progress of a relay that is in memory only.
#[derive(Debug, Clone, Default)]
pub(super) struct Waiting {
    position: u64,
    changes: Vec<Change>,
    confirmed: u64,
}

impl RelayAt {
    /// As it will be once this progress is written.
    pub(super) fn with(&self, waiting: Option<&Waiting>) -> Self {
        let mut relay = self.clone();
        let Some(waiting) = waiting else { return relay };
        relay.position = waiting.position;
        relay.confirmed += waiting.confirmed;
        for change in &waiting.changes {
            match change {
                Change::Position(position) => relay.position = *position,
                Change::PutException { seq, .. } => drop(relay.exceptions.insert(*seq)),
                Change::DropException { seq } => drop(relay.exceptions.remove(seq)),
                Change::Park { seq, .. } => drop(relay.parked.insert(*seq)),
                Change::Unpark { seq, .. } => drop(relay.parked.remove(seq)),
            }
        }
        relay
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub(super) steps: u64,
    pub(super) rows: BTreeMap<u64, Blob>,
    pub(super) captured: BTreeMap<u64, u64>,
    pub(super) coalesced: BTreeMap<u64, u64>,
    pub(super) events: Vec<Recorded>,
    /// By key: whose lane it is, and its next number.
    pub(super) lanes: BTreeMap<Option<&'static str>, Lane>,
    pub(super) streams: BTreeMap<&'static str, StreamOf>,
    pub(super) snapshots: BTreeMap<&'static str, (u64, Blob)>,
    pub(super) seen_ids: BTreeSet<u64>,
    pub(super) deliveries: BTreeSet<u64>,
    pub(super) requests: BTreeSet<String>,
    pub(super) ids: usize,
    pub(super) relays: [Option<RelayAt>; 2],
    pub(super) waiting: [Option<Waiting>; 2],
}

impl Model {
    /// The step is acknowledged.
    pub(super) fn take(&mut self, step: &Step) {
        self.steps += 1;
        match step {
            Step::Write(items) | Step::Exclusive(items, true) => self.commit(items),
            Step::Once(id, _) if self.requests.contains(id) => {}
            Step::Once(id, items) => {
                self.commit(items);
                self.requests.insert(id.clone());
            }
            Step::Group(group, fails) => {
                let live = group.iter().enumerate().filter(|(at, _)| at != fails);
                live.for_each(|(_, items)| self.commit(items));
            }
            Step::Exclusive(_, false) | Step::Fails(..) => {}
            Step::MakeRelay(at) => {
                self.commit(&[]);
                self.relays[*at] = Some(RelayAt::default());
            }
            Step::Progress(at, position, changes) => {
                let waiting = self.waiting[*at].get_or_insert_default();
                waiting.position = *position;
                waiting.changes.extend(changes.iter().cloned());
                waiting.confirmed += 1;
            }
            Step::Flush | Step::QuickRepair => self.commit(&[]),
            // A close writes what waits.
            Step::Reopen => self.commit(&[]),
        }
    }

    /// What was in memory only is gone.
    pub(super) fn after_crash(&self) -> Self {
        Self { waiting: Default::default(), ..self.clone() }
    }

    fn commit(&mut self, items: &[Item]) {
        for (relay, waiting) in self.relays.iter_mut().zip(&mut self.waiting) {
            if let (Some(relay), Some(waiting)) = (relay, waiting.take()) {
                *relay = relay.with(Some(&waiting));
            }
        }
        items.iter().for_each(|item| self.change(item));
    }

    fn change(&mut self, item: &Item) {
        match item {
            Item::Row(key, blob) => drop(self.rows.insert(*key, *blob)),
            Item::Event(event) => {
                self.ids += usize::from(event.id.is_some());
                self.append(event.content, event.key, None);
            }
            Item::Stream(name, events) => {
                for NewEvent { content, key, .. } in events {
                    let revision = self.streams.entry(name).or_default().seqs.len() as u64;
                    let seq = self.append(*content, Some(key.unwrap_or(name)), Some((name, revision)));
                    self.streams.entry(name).or_default().seqs.push(seq);
                }
            }
            Item::Truncate(name, revision) => {
                let stream = self.streams.entry(name).or_default();
                stream.first = stream.first.max(*revision);
            }
            Item::Tombstone(name) => {
                let stream = self.streams.entry(name).or_default();
                stream.first = stream.seqs.len() as u64;
                stream.deleted = true;
                self.snapshots.remove(name);
            }
            Item::Snapshot(name, blob) => {
                let newest = self.streams.entry(name).or_default().seqs.len() as u64 - 1;
                self.snapshots.insert(name, (newest, *blob));
            }
            Item::Id(id, _) => drop(self.seen_ids.insert(*id)),
            Item::Delivery(number, _) => drop(self.deliveries.insert(*number)),
            Item::Captured(key, value) => {
                self.captured.insert(*key, *value);
                self.append(Blob { tag: *value, len: 8 }, Some("captured"), None);
            }
            Item::Coalesced(key, value) => drop(self.coalesced.insert(*key, *value)),
        }
    }

    fn append(
        &mut self,
        content: Blob,
        key: Option<&'static str>,
        stream: Option<(&'static str, u64)>,
    ) -> u64 {
        let seq = self.events.len() as u64;
        let next = self.lanes.entry(key).or_insert(Lane { id: seq, number: 0 });
        self.events.push(Recorded { content, key, lane: *next, stream });
        next.number += 1;
        seq
    }

    /// Whether the log must hold this event once everything below `trimmed_to` is trimmed that may be.
    pub(super) fn is_kept(&self, seq: u64, trimmed_to: u64) -> bool {
        let has_row = |relay: &RelayAt| relay.exceptions.contains(&seq) || relay.parked.contains(&seq);
        let of_stream = self.events[seq as usize].stream.is_some_and(|(name, revision)| {
            let stream = &self.streams[name];
            !stream.deleted && revision >= stream.first
        });
        seq >= trimmed_to || of_stream || self.relays.iter().flatten().any(has_row)
    }
}
