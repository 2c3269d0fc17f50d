//! One piece of a round: the events of some marked keys, and of some rows that are walked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use redb::ReadableTable;

use crate::error::{BoxError, Error, EventError, Result, caught};
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::capture::{
    CaptureId, CaptureMode, CaptureRow, MarkKind, SnapshotState, mark_key,
};
use crate::storage::tables::schema::CHANGES;
use crate::store::settings::capture::Operation;
use crate::store::settings::capture_types::{Captured, Old, RawChange};
use crate::store::shared::capture_schedule::{Asked, Outcome, Rounds};
use crate::store::shared::relays::Pace;
use crate::store::transaction::Transaction;
use crate::tuning::CAPTURE_ROUND_BYTES;

/// What became of one key.
pub(in crate::store) enum Settled {
    Published,
    CodecFailed,
    /// The backlog quota is reached.
    NoRoom,
}

/// A round at work.
pub(in crate::store) struct Piece<'tx> {
    pub(in crate::store) tx: &'tx Transaction,
    pub(in crate::store) registered: BTreeMap<CaptureId, (CaptureRow, Arc<dyn Captured>)>,
    /// The writer thread has asked, for what no running relay holds.
    pub(in crate::store) own: bool,
    pub(in crate::store) relay_runs: bool,
    pub(in crate::store) keys_left: usize,
    pub(in crate::store) bytes_left: usize,
    pub(in crate::store) outcome: Outcome,
}

impl<'tx> Piece<'tx> {
    pub(crate) fn new(tx: &'tx Transaction, Asked { keys, own }: Asked) -> Self {
        let relay_runs = tx.core.relays.pace() != Pace::None;
        let tail = tx.core.tail();
        let registered = tx.core.settings.captures.iter().filter_map(|capture| {
            let row = tail.captures.get(capture.name())?.row.clone();
            Some((row.id, (row, Arc::clone(capture))))
        });
        Self {
            tx,
            registered: registered.collect(),
            own,
            relay_runs,
            keys_left: keys,
            bytes_left: CAPTURE_ROUND_BYTES,
            outcome: Outcome::default(),
        }
    }

    pub(crate) fn run(mut self) -> Result<Outcome> {
        let walks = self.due_walks();
        // While a table is walked, marks leave it half of the room.
        let marks_max = if walks.is_empty() { self.keys_left } else { self.keys_left / 2 };
        let marks = self.next_marks(marks_max)?;
        if marks.is_empty() && walks.is_empty() {
            self.outcome.stuck = self.is_lost();
        }
        // The same of the bytes: large rows that change all the time would leave none.
        let for_walks = if walks.is_empty() { 0 } else { self.bytes_left / 2 };
        self.bytes_left -= for_walks;
        for (mark, kind) in marks {
            if !self.has_room() {
                break;
            }
            self.publish_mark(mark, kind)?;
        }
        self.bytes_left += for_walks;
        for (row, capture) in walks {
            if self.has_room() {
                self.walk(row, &*capture)?;
            }
        }
        Ok(self.outcome)
    }

    /// Something waits and is due, yet a round finds nothing: memory is wrong, so the next one does not hurry.
    ///
    /// Two kinds of rounds find nothing in good order, and delay no other: one that comes after another has done its work; and one of the
    /// writer thread whose work a relay has taken over. That relay was started meanwhile.
    fn is_lost(&self) -> bool {
        let core = &self.tx.core;
        let taken_over = self.own && self.relay_runs;
        !taken_over && Rounds::due_ms(core).is_some_and(|due| due <= core.settings.clock.now().mono_ms)
    }

    fn has_room(&self) -> bool {
        self.keys_left > 0 && self.bytes_left > 0 && !self.outcome.stuck
    }

    // --- marks --------------------------------------------------------------------------------------------------------

    /// The marks that are next: from behind the last one to the end, then from the beginning up to it.
    fn next_marks(&self, max: usize) -> Result<Vec<(Vec<u8>, MarkKind)>> {
        let now_ms = self.tx.core.settings.clock.now().mono_ms;
        // Copied, so that nobody who asks for figures waits until the file is read.
        let (middle, resting) = {
            let state = self.tx.core.rounds.lock();
            let resting = state.failed.iter().filter(|(_, failed)| failed.due_ms > now_ms);
            let resting: BTreeSet<_> = resting.map(|(key, _)| key.clone()).collect();
            ([&state.after[..], &[0]].concat(), resting)
        };
        let marked = self.registered.iter().filter(|(_, (_, capture))| !self.own || capture.is_unpublished());
        let stretches = marked.map(|(id, _)| {
            let from = id.to_be_bytes().to_vec();
            let to = keys::after_prefix(&from);
            (from, to)
        });
        let behind = stretches.clone().map(|(from, to)| (from.max(middle.clone()), to));
        let before = stretches.map(|(from, to)| (from, to.min(middle.clone())));
        let changes = self.tx.redb().open_table(CHANGES)?;
        let mut found = Vec::new();
        for (from, to) in behind.chain(before).filter(|(from, to)| from < to) {
            for mark in changes.range(from.as_slice()..to.as_slice())? {
                if found.len() >= max {
                    return Ok(found);
                }
                let (key, kind) = mark?;
                let key = key.value();
                if resting.contains(key) {
                    continue;
                }
                let kind = MarkKind::from_bytes(kind.value()).ok_or_else(|| damaged_row("mark"))?;
                found.push((key.to_vec(), kind));
            }
        }
        Ok(found)
    }

    /// Appends the event of a marked key, and takes the mark away.
    fn publish_mark(&mut self, mark: Vec<u8>, kind: MarkKind) -> Result<()> {
        let Some((id, key)) = mark.split_first_chunk::<4>() else { return Err(damaged_row("mark")) };
        let Some((_, capture)) = self.registered.get(&u32::from_be_bytes(*id)) else { return Ok(()) };
        let capture = Arc::clone(capture);
        // An earlier write of this very transaction may have changed it.
        let kind = self.tx.pending_mark(&mark).flatten().unwrap_or(kind);
        let value = match caught(|| capture.value(self.tx.redb(), key)) {
            Ok(value) => value?,
            Err(_) => {
                self.mark_failed(&*capture, mark, &"reading its value panicked");
                return Ok(());
            }
        };
        let operation = match (kind, &value) {
            (MarkKind::Change, Some(_)) => Operation::Update,
            (MarkKind::Change, None) => Operation::Remove,
            (MarkKind::Snapshot, Some(_)) => Operation::Snapshot,
            // It was removed after switch-on, and that has an event of its own.
            (MarkKind::Snapshot, None) => {
                self.unmark(mark)?;
                return Ok(());
            }
        };
        match self.publish(&*capture, operation, key, value.as_deref())? {
            Settled::Published => self.unmark(mark)?,
            Settled::CodecFailed => {
                self.outcome.after = Some(mark.clone());
                self.outcome.failed.push(mark);
            }
            Settled::NoRoom => self.no_room(),
        }
        Ok(())
    }

    fn no_room(&mut self) {
        self.outcome.stuck = true;
        self.outcome.no_room = true;
    }

    fn unmark(&mut self, mark: Vec<u8>) -> Result<()> {
        self.tx.touch();
        self.tx.drop_mark(mark.clone())?;
        self.outcome.after = Some(mark.clone());
        self.outcome.settled.push(mark);
        Ok(())
    }

    fn mark_failed(&mut self, capture: &dyn Captured, mark: Vec<u8>, why: &dyn std::fmt::Display) {
        tell_failure(capture, why);
        self.outcome.after = Some(mark.clone());
        self.outcome.failed.push(mark);
    }

    // --- the first switch-on ------------------------------------------------------------------------------------------

    /// The tables that are to be walked, but for those that rest.
    fn due_walks(&self) -> Vec<(CaptureRow, Arc<dyn Captured>)> {
        let core = &self.tx.core;
        let (now_ms, state) = (core.settings.clock.now().mono_ms, core.rounds.lock());
        let free = !self.own || !self.relay_runs;
        let open = self.registered.values().filter(|(row, _)| row.snapshot.is_open());
        let open = open.filter(|(_, capture)| free || capture.is_unpublished());
        open.filter(|(row, _)| state.walk_due_ms([row.id]).is_some_and(|due| due <= now_ms))
            .cloned()
            .collect()
    }

    /// Appends events of rows that were there already, and notes how far that came.
    fn walk(&mut self, row: CaptureRow, capture: &dyn Captured) -> Result<()> {
        let after = match &row.snapshot {
            SnapshotState::Behind(key) => Some(key.as_slice()),
            _ => None,
        };
        let (keys_max, bytes_max) = (self.keys_left, self.bytes_left);
        let walked = caught(|| capture.rows_after(self.tx.redb(), after, keys_max, bytes_max));
        let Ok(walked) = walked else {
            // Which row it was is not known. Nothing but this table's walk need wait for it.
            tell_failure(capture, &"reading its rows panicked");
            self.outcome.unreadable.push(row.id);
            return Ok(());
        };
        let walked = walked?;
        self.outcome.walked.push(row.id);
        let mut last = None;
        for (key, value) in walked.rows {
            let mark = mark_key(row.id, &key);
            if !self.is_told(&mark)? {
                match self.publish(capture, Operation::Snapshot, &key, Some(&value))? {
                    Settled::Published => {}
                    Settled::CodecFailed => {
                        self.tx.touch();
                        self.tx.note_mark(mark.clone(), MarkKind::Snapshot)?;
                        self.outcome.failed.push(mark);
                    }
                    Settled::NoRoom => {
                        self.no_room();
                        break;
                    }
                }
            }
            last = Some(key);
        }
        let ended = !walked.more && !self.outcome.stuck;
        let snapshot = match (ended, last) {
            (true, _) => SnapshotState::Done,
            (false, Some(key)) => SnapshotState::Behind(key),
            (false, None) => return Ok(()),
        };
        self.tx.touch();
        self.tx.note_capture(capture.name(), CaptureRow { snapshot, ..row });
        Ok(())
    }

    /// The event of its newest change is to come, or has been appended just now.
    fn is_told(&self, mark: &[u8]) -> Result<bool> {
        Ok(self.tx.pending_mark(mark).is_some() || self.tx.redb().open_table(CHANGES)?.get(mark)?.is_some())
    }

    // --- one key ------------------------------------------------------------------------------------------------------

    fn publish(
        &mut self,
        capture: &dyn Captured,
        operation: Operation,
        key: &[u8],
        value: Option<&[u8]>,
    ) -> Result<Settled> {
        self.keys_left = self.keys_left.saturating_sub(1);
        self.bytes_left = self.bytes_left.saturating_sub(key.len() + value.map_or(0, <[u8]>::len));
        let change = RawChange { operation, key, new: value, old: Old::None };
        let event = match caught(|| capture.encode(change)) {
            Ok(Ok(event)) => event,
            // Whatever it is, it is about this key: a codec may look into a file of its own, which may be full or broken.
            Ok(Err(error)) => {
                self.tx.core.suspect(&error);
                tell_failure(capture, &kind_of(&error));
                return Ok(Settled::CodecFailed);
            }
            Err(_) => {
                tell_failure(capture, &"its codec panicked");
                return Ok(Settled::CodecFailed);
            }
        };
        match self.tx.append(event) {
            Ok(_) => {
                self.tx.touch();
                Ok(Settled::Published)
            }
            Err(Error::BacklogFull { .. }) => Ok(Settled::NoRoom),
            Err(error @ Error::Storage(_)) => Err(error),
            // The event that the codec made cannot be appended.
            Err(error) => {
                tell_failure(capture, &kind_of(&error));
                Ok(Settled::CodecFailed)
            }
        }
    }
}

/// Says that a key stays marked. Never which, and never its value: both are the application's.
pub(in crate::store) fn tell_failure(capture: &dyn Captured, why: &dyn std::fmt::Display) {
    let newest = capture.mode() == CaptureMode::NewestValue;
    tracing::error!(table = capture.name(), newest, %why, "a row of a captured table makes no event; it is tried again");
}

/// An error of the codec may quote the value; of ours, none does.
pub(in crate::store) fn kind_of(error: &Error) -> String {
    match error {
        Error::Event(EventError::Encode { format, cause: source }) => {
            let loss = loss_in(source).map(|loss| format!(": {loss}")).unwrap_or_default();
            format!("it cannot be encoded as {format}{loss}")
        }
        Error::Event(error) => error.to_string(),
        Error::Conflict { .. } | Error::IdElsewhere { .. } => "its event's id is taken".to_owned(),
        Error::UnreadableRow { value_type, .. } => format!("it cannot be read as {value_type}"),
        _ => "its codec failed".to_owned(),
    }
}

/// What the library's own encoding would lose: its text has the place alone.
#[cfg(feature = "json")]
fn loss_in(source: &BoxError) -> Option<String> {
    source.downcast_ref::<crate::codec::Lossy>().map(ToString::to_string)
}

#[cfg(not(feature = "json"))]
fn loss_in(_: &BoxError) -> Option<String> {
    None
}
