//! One piece of a pass: the events of some dirty keys, and of some rows of a backfill.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use redb::ReadableTable;

use crate::error::{BoxError, Error, EventError, Result, caught};
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::capture::{
    CaptureId, CaptureMode, CaptureRow, DirtyKind, SnapshotState, dirty_key,
};
use crate::storage::tables::schema::CHANGES;
use crate::store::settings::capture::Operation;
use crate::store::settings::capture_types::{Captured, Old, RawChange};
use crate::store::shared::capture_schedule::{Asked, CoalescingPasses, Outcome};
use crate::store::shared::relays::Pace;
use crate::store::transaction::Transaction;
use crate::tuning::CAPTURE_PASS_BYTES;

/// The result of publishing one key.
pub(in crate::store) enum Settled {
    Published,
    CodecFailed,
    /// The backlog quota is reached.
    NoRoom,
}

/// A running pass.
pub(in crate::store) struct Piece<'tx> {
    pub(in crate::store) tx: &'tx Transaction,
    pub(in crate::store) registered: BTreeMap<CaptureId, (CaptureRow, Arc<dyn Captured>)>,
    /// The writer thread has asked for this pass, for work that no running relay holds.
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
            bytes_left: CAPTURE_PASS_BYTES,
            outcome: Outcome::default(),
        }
    }

    pub(crate) fn run(mut self) -> Result<Outcome> {
        let backfills = self.due_backfills();
        // While a table is backfilled, dirty keys leave it half of the keys of the pass.
        let dirty_max = if backfills.is_empty() { self.keys_left } else { self.keys_left / 2 };
        let dirty_keys = self.next_dirty_keys(dirty_max)?;
        if dirty_keys.is_empty() && backfills.is_empty() {
            self.outcome.stuck = self.is_lost();
        }
        // The same holds for bytes: large rows that change all the time would leave none.
        let for_backfills = if backfills.is_empty() { 0 } else { self.bytes_left / 2 };
        self.bytes_left -= for_backfills;
        for (dirty, kind) in dirty_keys {
            if !self.has_room() {
                break;
            }
            self.publish_dirty_key(dirty, kind)?;
        }
        self.bytes_left += for_backfills;
        for (row, capture) in backfills {
            if self.has_room() {
                self.backfill(row, &*capture)?;
            }
        }
        Ok(self.outcome)
    }

    /// Whether something is due, yet the pass has found nothing. Then memory is wrong, so the next
    /// pass does not hurry.
    ///
    /// Two kinds of passes find nothing in normal operation, and delay no other pass. One comes
    /// after another pass has done its work. The other is a pass of the writer thread whose work a
    /// relay has taken over. That relay was started meanwhile.
    fn is_lost(&self) -> bool {
        let core = &self.tx.core;
        let taken_over = self.own && self.relay_runs;
        !taken_over
            && CoalescingPasses::due_ms(core).is_some_and(|due| due <= core.settings.clock.now().mono_ms)
    }

    fn has_room(&self) -> bool {
        self.keys_left > 0 && self.bytes_left > 0 && !self.outcome.stuck
    }

    // --- dirty keys ---

    /// Returns the next dirty keys: from behind the key where the last pass ended to the end, then
    /// from the beginning up to that key.
    fn next_dirty_keys(&self, max: usize) -> Result<Vec<(Vec<u8>, DirtyKind)>> {
        let now_ms = self.tx.core.settings.clock.now().mono_ms;
        // The state is copied, so that a request for figures does not wait until the file is read.
        let (middle, resting) = {
            let state = self.tx.core.passes.lock();
            let resting = state.failed.iter().filter(|(_, failed)| failed.due_ms > now_ms);
            let resting: BTreeSet<_> = resting.map(|(key, _)| key.clone()).collect();
            ([&state.after[..], &[0]].concat(), resting)
        };
        let captures =
            self.registered.iter().filter(|(_, (_, capture))| !self.own || capture.is_unpublished());
        let stretches = captures.map(|(id, _)| {
            let from = id.to_be_bytes().to_vec();
            let to = keys::after_prefix(&from);
            (from, to)
        });
        let behind = stretches.clone().map(|(from, to)| (from.max(middle.clone()), to));
        let before = stretches.map(|(from, to)| (from, to.min(middle.clone())));
        let changes = self.tx.redb().open_table(CHANGES)?;
        let mut found = Vec::new();
        for (from, to) in behind.chain(before).filter(|(from, to)| from < to) {
            for row in changes.range(from.as_slice()..to.as_slice())? {
                if found.len() >= max {
                    return Ok(found);
                }
                let (key, kind) = row?;
                let key = key.value();
                if resting.contains(key) {
                    continue;
                }
                let kind = DirtyKind::from_bytes(kind.value()).ok_or_else(|| damaged_row("dirty key"))?;
                found.push((key.to_vec(), kind));
            }
        }
        Ok(found)
    }

    /// Appends the event of a dirty key, and makes the key clean.
    fn publish_dirty_key(&mut self, dirty: Vec<u8>, kind: DirtyKind) -> Result<()> {
        let Some((id, key)) = dirty.split_first_chunk::<4>() else { return Err(damaged_row("dirty key")) };
        let Some((_, capture)) = self.registered.get(&u32::from_be_bytes(*id)) else { return Ok(()) };
        let capture = Arc::clone(capture);
        // An earlier write of the same transaction may have changed the key's kind.
        let kind = self.tx.pending_dirty_key(&dirty).flatten().unwrap_or(kind);
        let value = match caught(|| capture.value(self.tx.redb(), key)) {
            Ok(value) => value?,
            Err(_) => {
                self.key_failed(&*capture, dirty, &"reading its value panicked");
                return Ok(());
            }
        };
        let operation = match (kind, &value) {
            (DirtyKind::Change, Some(_)) => Operation::Update,
            (DirtyKind::Change, None) => Operation::Remove,
            (DirtyKind::Snapshot, Some(_)) => Operation::Snapshot,
            // The row was removed after switch-on, and that removal has an event of its own.
            (DirtyKind::Snapshot, None) => {
                self.clear_dirty_key(dirty)?;
                return Ok(());
            }
        };
        match self.publish(&*capture, operation, key, value.as_deref())? {
            Settled::Published => self.clear_dirty_key(dirty)?,
            Settled::CodecFailed => {
                self.outcome.after = Some(dirty.clone());
                self.outcome.failed.push(dirty);
            }
            Settled::NoRoom => self.no_room(),
        }
        Ok(())
    }

    fn no_room(&mut self) {
        self.outcome.stuck = true;
        self.outcome.no_room = true;
    }

    fn clear_dirty_key(&mut self, dirty: Vec<u8>) -> Result<()> {
        self.tx.touch();
        self.tx.drop_dirty_key(dirty.clone())?;
        self.outcome.after = Some(dirty.clone());
        self.outcome.settled.push(dirty);
        Ok(())
    }

    fn key_failed(&mut self, capture: &dyn Captured, dirty: Vec<u8>, why: &dyn std::fmt::Display) {
        report_failure(capture, why);
        self.outcome.after = Some(dirty.clone());
        self.outcome.failed.push(dirty);
    }

    // --- the first switch-on ---

    /// Returns the tables to backfill, except the tables whose backfill rests.
    fn due_backfills(&self) -> Vec<(CaptureRow, Arc<dyn Captured>)> {
        let core = &self.tx.core;
        let (now_ms, state) = (core.settings.clock.now().mono_ms, core.passes.lock());
        let free = !self.own || !self.relay_runs;
        let open = self.registered.values().filter(|(row, _)| row.snapshot.is_open());
        let open = open.filter(|(_, capture)| free || capture.is_unpublished());
        open.filter(|(row, _)| state.backfill_due_ms([row.id]).is_some_and(|due| due <= now_ms))
            .cloned()
            .collect()
    }

    /// Appends events of rows that were there at switch-on, and notes the last row.
    fn backfill(&mut self, row: CaptureRow, capture: &dyn Captured) -> Result<()> {
        let after = match &row.snapshot {
            SnapshotState::Behind(key) => Some(key.as_slice()),
            _ => None,
        };
        let (keys_max, bytes_max) = (self.keys_left, self.bytes_left);
        let found = caught(|| capture.rows_after(self.tx.redb(), after, keys_max, bytes_max));
        let Ok(found) = found else {
            // The row that failed is not known. Only this table's backfill needs to wait.
            report_failure(capture, &"reading its rows panicked");
            self.outcome.unreadable.push(row.id);
            return Ok(());
        };
        let found = found?;
        self.outcome.backfilled.push(row.id);
        let mut last = None;
        for (key, value) in found.rows {
            let dirty = dirty_key(row.id, &key);
            if !self.is_reported(&dirty)? {
                match self.publish(capture, Operation::Snapshot, &key, Some(&value))? {
                    Settled::Published => {}
                    Settled::CodecFailed => {
                        self.tx.touch();
                        self.tx.note_dirty_key(dirty.clone(), DirtyKind::Snapshot)?;
                        self.outcome.failed.push(dirty);
                    }
                    Settled::NoRoom => {
                        self.no_room();
                        break;
                    }
                }
            }
            last = Some(key);
        }
        let ended = !found.more && !self.outcome.stuck;
        let snapshot = match (ended, last) {
            (true, _) => SnapshotState::Done,
            (false, Some(key)) => SnapshotState::Behind(key),
            (false, None) => return Ok(()),
        };
        self.tx.touch();
        self.tx.note_capture(capture.name(), CaptureRow { snapshot, ..row });
        Ok(())
    }

    /// Whether the event of the key's newest change is still to come, or was appended just now.
    fn is_reported(&self, dirty: &[u8]) -> Result<bool> {
        Ok(self.tx.pending_dirty_key(dirty).is_some()
            || self.tx.redb().open_table(CHANGES)?.get(dirty)?.is_some())
    }

    // --- one key ---

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
            // Any such error concerns this key only: a codec may read a file of its own, which may
            // be full or broken.
            Ok(Err(error)) => {
                self.tx.core.suspect(&error);
                report_failure(capture, &kind_of(&error));
                return Ok(Settled::CodecFailed);
            }
            Err(_) => {
                report_failure(capture, &"its codec panicked");
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
                report_failure(capture, &kind_of(&error));
                Ok(Settled::CodecFailed)
            }
        }
    }
}

/// Logs that a key stays dirty. The log names neither the key nor its value: both are the
/// application's.
pub(in crate::store) fn report_failure(capture: &dyn Captured, why: &dyn std::fmt::Display) {
    let newest = capture.mode() == CaptureMode::NewestValue;
    tracing::error!(table = capture.name(), newest, %why, "a row of a captured table makes no event; it is tried again");
}

/// Describes an error for the log. An error of the codec may quote the value; the library's own
/// errors do not.
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

/// Returns what the library's own encoding would lose. The text contains only the place.
#[cfg(feature = "json")]
fn loss_in(source: &BoxError) -> Option<String> {
    source.downcast_ref::<crate::codec::Lossy>().map(ToString::to_string)
}

#[cfg(not(feature = "json"))]
fn loss_in(_: &BoxError) -> Option<String> {
    None
}
