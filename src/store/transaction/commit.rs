//! One durable commit: the gathered events, the inbox entries, the waiting progress, and a small
//! piece of trimming. When it is time, the commit also writes the lanes.
//!
//! Every tree that a commit touches costs page writes, so a commit leaves out every write that can
//! wait. Lanes are written in bulk. Records are trimmed in steps at the log's left edge, once
//! enough records can go ([`Plan`]).

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Instant;

use redb::{ReadableTable, WriteTransaction};

use crate::error::{Error, Result};
use crate::log::{keys, record};
use crate::storage::tables::ids;
use crate::storage::tables::projection::ProjectionRow;
use crate::storage::tables::schema::{
    DEDUP, EXCEPTIONS, FAILURES, INBOX, InboxRow, LANES, LOG, META, META_STATE, PARKED, StateRow,
};
use crate::store::shared::age::{self, AgeIndex};
use crate::store::shared::captures::DirtyCounts;
use crate::store::shared::core::Core;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::deferred_trim::Deferred;
use crate::store::shared::parked::{Parked, ParkedChanges};
use crate::store::shared::progress::PendingProgress;
use crate::store::shared::tail::Tail;
use crate::store::transaction::pending::Pending;
use crate::store::transaction::trim::{Plan, offset_at};
use crate::store::transaction::{apply_progress, captures, stream_index};
use crate::time::Now;
use crate::tuning::INBOX_PRUNE_STEP;

/// The values of the tail that become true once the commit is durable.
struct Next {
    state: StateRow,
    derived_flushed: bool,
    cursors: Vec<(String, Cursor, ParkedChanges)>,
    dirty: DirtyCounts,
    trim_left: bool,
    /// Records below this sequence number can go.
    floor: u64,
    now: Now,
    /// The store age, and the ages that this commit writes.
    age_ms: u64,
    ages: Option<AgeIndex>,
    /// Where the next pruning of the inbox begins, if this commit did a step of it.
    pruned_to: Option<Vec<u8>>,
}

/// Commits. On an error the progress that this commit would have carried goes back to waiting, and
/// nothing in memory changes.
///
/// No code of the application runs here, where locks are held: the caller passes the time in.
pub(crate) fn commit(
    core: &Core,
    tx: WriteTransaction,
    pending: &Pending,
    writes: u64,
    now: Now,
) -> Result<()> {
    let progress = core.progress().take();
    let result = match prepare(core, &tx, pending, &progress, (writes == 0, now)) {
        Ok(next) => match tx.commit() {
            Ok(()) => {
                settle(core, pending, next, writes);
                Ok(())
            }
            Err(error) => Err(failed(core, progress, error)),
        },
        Err(error) => {
            core.progress().put_back(progress);
            if let Err(error) = tx.abort() {
                tracing::warn!(%error, "rolling back failed; nothing was committed");
            }
            Err(core.note(error))
        }
    };
    core.announce_rest(now);
    result
}

fn failed(core: &Core, progress: PendingProgress, error: redb::CommitError) -> Error {
    match error {
        // Here redb has certainly rolled back: a panic or a leaked table inside the transaction.
        redb::CommitError::TransactionPoisoned => {
            core.progress().put_back(progress);
            error.into()
        }
        error => Error::CommitUnknown { cause: core.poison(&error.to_string()) },
    }
}

fn prepare(
    core: &Core,
    tx: &WriteTransaction,
    pending: &Pending,
    progress: &PendingProgress,
    (alone, now): (bool, Now),
) -> Result<Next> {
    let tail = core.tail();
    write_frames(tx, pending)?;
    let age_ms = core.age.at(now);
    write_inbox(tx, pending, age_ms)?;
    let dirty = captures::write(tx, &pending.captures)?;
    let mut next = Next {
        state: StateRow {
            trimmed_to: tail.trimmed_to,
            trimmed_offset: tail.trimmed_offset,
            derived_through: tail.derived_through,
        },
        derived_flushed: false,
        cursors: Vec::new(),
        dirty,
        trim_left: false,
        floor: 0,
        now,
        age_ms,
        ages: tail.ages.after(age_ms, pending.next_seq, core.settings.retention.age_ms_min, pending.closing),
        pruned_to: prune_inbox(core, tx, &tail, INBOX_PRUNE_STEP.max(2 * pending.inbox.len()), age_ms)?,
    };
    let before = next.state;
    let mut released = Vec::new();
    for (name, progress) in &progress.cursors {
        let Some(cursor) = tail.cursors.get(name) else { continue };
        let mut cursor = cursor.clone();
        let offset_of = |position| offset_at(tx, &tail, pending, position);
        let none = Parked::default();
        let parked = tail.parked.get(&cursor.id).unwrap_or(&none);
        let (gone, moved) = apply_progress::apply(tx, name, &mut cursor, progress, parked, offset_of)?;
        released.extend(gone);
        next.cursors.push((name.clone(), cursor, moved));
    }
    next.floor = trim_floor(core, &tail, pending, &next.cursors, age_ms);
    age::save(tx, next.ages.as_ref())?;
    let plan = Plan::new(core, (tx, &tail, pending), &next.cursors, next.floor, (alone, now))?;
    if plan.flush {
        write_lanes(tx, &tail, pending)?;
        stream_index::write_streams(tx, &tail.streams, &pending.streams)?;
        next.state.derived_through = pending.next_seq;
        next.derived_flushed = true;
    }
    trim(core, tx, &tail, pending, &mut next, plan)?;
    drop_released(tx, &tail, pending, next.state.trimmed_to, &released)?;
    if next.state != before {
        tx.open_table(META)?.insert(META_STATE, next.state.to_bytes().as_slice())?;
    }
    Ok(next)
}

/// Notes in memory everything that is durable now, then notifies the waiting threads and tasks.
fn settle(core: &Core, pending: &Pending, next: Next, writes: u64) {
    let begins_cleaning;
    {
        let mut tail = core.tail();
        tail.next_seq = pending.next_seq;
        tail.end_offset = pending.end_offset;
        tail.trimmed_to = next.state.trimmed_to;
        tail.trimmed_offset = next.state.trimmed_offset;
        tail.trim_left = next.trim_left;
        tail.ages.committed(next.ages, next.age_ms, pending.next_seq);
        let after = || Deferred::after(tail.deferred, next.state.trimmed_to, next.floor, next.now);
        tail.deferred = next.trim_left.then(after);
        for (key, state) in &pending.lanes {
            tail.lanes.change(key.clone(), *state);
        }
        for (name, stream) in &pending.streams {
            tail.streams.appended(name, stream.state, &stream.run);
        }
        if next.derived_flushed {
            tail.lanes.written();
            tail.streams.written();
            tail.derived_through = next.state.derived_through;
            tail.derived_offset = pending.end_offset;
        }
        for (name, cursor, moved) in next.cursors {
            tail.parked.entry(cursor.id).or_default().settle(moved);
            tail.cursors.insert(name, cursor);
        }
        tail.projections.extend(pending.projections.iter().map(|(name, row)| (name.clone(), *row)));
        tail.captures.settle(&pending.captures, &next.dirty);
        tail.cleanup.settle(pending.cleanup);
        begins_cleaning = core.cleaning.note_left(tail.cleanup.tasks);
        tail.inbox_added += pending.inbox.len();
        if let Some(pruned_to) = next.pruned_to {
            tail.prune_after = pruned_to;
            tail.inbox_added =
                tail.inbox_added.saturating_sub((INBOX_PRUNE_STEP / 2).max(pending.inbox.len()));
        }
    }
    {
        // All figures change together, for readers that hold this lock.
        let mut progress = core.progress();
        progress.carried(Instant::now());
        core.counters.commits.fetch_add(1, Ordering::Relaxed);
        core.counters.writes.fetch_add(writes, Ordering::Relaxed);
        if writes == 0 {
            core.counters.commits_alone.fetch_add(1, Ordering::Relaxed);
        }
    }
    core.passes.rewritten(&pending.captures);
    core.holders.note_end(pending.next_seq, pending.end_offset);
    if begins_cleaning || core.passes.begins(&pending.captures) {
        core.nudge_writer();
    }
    core.announce_commit();
}

fn write_frames(tx: &WriteTransaction, pending: &Pending) -> Result<()> {
    if pending.frames.is_empty() {
        return Ok(());
    }
    let mut log = tx.open_table(LOG)?;
    for (seq, frame) in &pending.frames {
        log.insert(seq, frame.as_slice())?;
    }
    Ok(())
}

/// Writes inbox entries with the store age at which they become durable.
fn write_inbox(tx: &WriteTransaction, pending: &Pending, age_ms: u64) -> Result<()> {
    if pending.inbox.is_empty() {
        return Ok(());
    }
    let mut inbox = tx.open_table(INBOX)?;
    let mut ids = ids::Difference::default();
    for (key, row) in &pending.inbox {
        let before =
            inbox.insert(key.as_slice(), InboxRow { at_ms: age_ms, ..*row }.to_bytes().as_slice())?;
        // An id with a number was counted when it got the number.
        if before.is_none() && row.count != ids::NUMBERED && ids::is_counted(row) {
            ids.more(keys::scope_of(key));
        }
    }
    ids.write(tx)
}

/// Forgets some of the ids that were recorded longer ago than the inbox age, or too many ids ago. A
/// step runs after a number of new marks; the steps go round and round the table.
fn prune_inbox(
    core: &Core,
    tx: &WriteTransaction,
    tail: &Tail,
    step: usize,
    age_ms: u64,
) -> Result<Option<Vec<u8>>> {
    if tail.inbox_added < INBOX_PRUNE_STEP / 2 {
        return Ok(None);
    }
    let mut inbox = tx.open_table(INBOX)?;
    let forgotten = core.settings.ids_forgotten_beyond();
    let dedup = forgotten.map(|max| tx.open_table(DEDUP).map(|dedup| (max, dedup))).transpose()?;
    let (mut old, mut ahead) = (Vec::new(), Vec::new());
    let mut ids = ids::Difference::default();
    let mut pruned_to = Vec::new();
    let mut rows = inbox.range(tail.prune_after.as_slice()..)?;
    for row in rows.by_ref().take(step) {
        let (key, row) = row?;
        pruned_to = key.value().to_vec();
        // A row that cannot be read no longer says anything, so it counts as old.
        let row = InboxRow::from_bytes(row.value());
        if let Some(row) = row.filter(|row| row.at_ms > age_ms) {
            ahead.push((pruned_to.clone(), row));
            continue;
        }
        let is_old = row.is_none_or(|row| row.at_ms.saturating_add(core.settings.inbox_age_ms) < age_ms);
        let numbered = row.filter(|row| row.count == ids::NUMBERED);
        let outnumbered = match (&dedup, numbered, keys::scope_of(&pruned_to)) {
            (Some((max, dedup)), Some(row), Some(scope)) => {
                ids::is_forgotten(&row, ids::next(dedup, scope)?, *max)
            }
            _ => false,
        };
        if outnumbered || is_old {
            old.push(pruned_to.clone());
            ids.fewer(row.filter(ids::is_counted).and_then(|_| keys::scope_of(&pruned_to)));
        }
    }
    let at_end = rows.next().is_none();
    drop((rows, dedup));
    ids.write(tx)?;
    for key in old {
        inbox.remove(key.as_slice())?;
    }
    for (key, row) in ahead {
        inbox.insert(key.as_slice(), InboxRow { at_ms: age_ms, ..row }.to_bytes().as_slice())?;
    }
    Ok(Some(if at_end { Vec::new() } else { pruned_to }))
}

fn write_lanes(tx: &WriteTransaction, tail: &Tail, pending: &Pending) -> Result<()> {
    let mut lanes = tx.open_table(LANES)?;
    for (key, state) in tail.lanes.changed() {
        lanes.insert(key, &state.to_bytes()[..])?;
    }
    // The transaction's own changes are newer.
    for (key, state) in &pending.lanes {
        lanes.insert(&**key, &state.to_bytes()[..])?;
    }
    Ok(())
}

/// Returns the sequence number below which trimming may go. Every relay is done with every record
/// below that has no exception, and retention wants none of these records.
fn trim_floor(
    core: &Core,
    tail: &Tail,
    pending: &Pending,
    moved: &[(String, Cursor, ParkedChanges)],
    age_ms: u64,
) -> u64 {
    let retention = &core.settings.retention;
    if retention.forever {
        return tail.trimmed_to;
    }
    let position = |name: &str, cursor: &Cursor| {
        moved
            .iter()
            .find(|(moved, ..)| moved == name)
            .map_or(cursor.position, |(_, cursor, _)| cursor.position)
    };
    let done = tail.cursors.iter().map(|(name, cursor)| position(name, cursor)).min();
    let done = done.unwrap_or(tail.trimmed_to);
    let done = done.min(core.notifier.wanted_from().unwrap_or(done));
    let projected = tail.projections.iter().map(|(name, row)| {
        let row = pending.projections.get(name).unwrap_or(row);
        row.wants_from()
    });
    let done = projected.fold(done, u64::min);
    let done = done.min(pending.next_seq.saturating_sub(retention.events_min));
    match retention.age_ms_min {
        0 => done,
        keep_ms => done.min(tail.ages.old_below(age_ms, keep_ms).max(tail.trimmed_to)),
    }
}

fn trim(
    core: &Core,
    tx: &WriteTransaction,
    tail: &Tail,
    pending: &Pending,
    next: &mut Next,
    plan: Plan,
) -> Result<()> {
    let from = next.state.trimmed_to;
    // The rest is trimmed once the store is idle, or when trimming has been deferred for too long.
    next.trim_left = plan.floor > from && !plan.thorough;
    let floor = plan.floor.min(next.state.derived_through);
    if !plan.removes(floor.saturating_sub(from)) {
        return Ok(());
    }
    let (records_max, bytes_max) = plan.step;
    let last = floor.min(from.saturating_add(records_max));
    let bytes_to = next.state.trimmed_offset.saturating_add(bytes_max);
    let mut log = tx.open_table(LOG)?;
    let mut keep = BTreeSet::new();
    let mut to = from;
    let retention = &core.settings.retention;
    let outside_bytes = |offset: u64| offset.saturating_add(retention.bytes_min) <= tail.end_offset;
    let needs = Needs::of(tx, tail, from, last)?;
    for row in log.range(from..last)? {
        if next.state.trimmed_offset >= bytes_to {
            break;
        }
        let (seq, frame) = row?;
        let seq = seq.value();
        match record::decode(seq, frame.value()) {
            Ok(recorded) => {
                if !outside_bytes(recorded.end_offset) {
                    break;
                }
                next.state.trimmed_offset = recorded.end_offset;
                if needs.needs(seq, recorded.key()) || stream_index::wants(tx, tail, pending, &recorded)? {
                    keep.insert(seq);
                }
            }
            // A damaged record in quarantine stays for as long as it is in quarantine.
            Err(_) if needs.needs(seq, None) => drop(keep.insert(seq)),
            Err(_) => {}
        }
        to = seq + 1;
    }
    if to > from {
        log.retain_in(from..to, |seq, _| keep.contains(&seq))?;
        next.state.trimmed_to = to;
        next.trim_left |= to < floor;
    }
    Ok(())
}

/// The records in a range that some cursor still needs, though its position is past them.
struct Needs<'tx> {
    exceptions: BTreeSet<u64>,
    parked: Option<redb::Table<'tx, &'static [u8], &'static [u8]>>,
    cursors: Vec<keys::CursorId>,
}

impl<'tx> Needs<'tx> {
    fn of(tx: &'tx WriteTransaction, tail: &Tail, from: u64, to: u64) -> Result<Self> {
        let mut exceptions = BTreeSet::new();
        let table = tx.open_table(EXCEPTIONS)?;
        for cursor in tail.cursors.values() {
            let (from, to) = (keys::exception(cursor.id, from), keys::exception(cursor.id, to));
            for row in table.range(&from[..]..&to[..])? {
                exceptions.extend(keys::split_exception(row?.0.value()));
            }
        }
        drop(table);
        let failures = tx.open_table(FAILURES)?;
        for track in tail.projections.values().flat_map(ProjectionRow::tracks) {
            let (from, to) = (keys::exception(track.id, from), keys::exception(track.id, to));
            for row in failures.range(&from[..]..&to[..])? {
                exceptions.extend(keys::split_exception(row?.0.value()));
            }
        }
        drop(failures);
        let parked = tx.open_table(PARKED)?;
        let parked = if redb::ReadableTableMetadata::is_empty(&parked)? { None } else { Some(parked) };
        Ok(Self { exceptions, parked, cursors: tail.cursors.values().map(|cursor| cursor.id).collect() })
    }

    fn needs(&self, seq: u64, key: Option<&str>) -> bool {
        let parked = |cursor, table: &redb::Table<'tx, &'static [u8], &'static [u8]>| {
            key.is_some_and(|key| {
                // If the row cannot be looked up, the record is kept.
                table.get(keys::parked(cursor, key, seq).as_slice()).map_or(true, |row| row.is_some())
            })
        };
        self.exceptions.contains(&seq)
            || self
                .parked
                .as_ref()
                .is_some_and(|table| self.cursors.iter().any(|cursor| parked(*cursor, table)))
    }
}

/// Removes records below the trimmed edge whose last exception is gone.
pub(in crate::store) fn drop_released(
    tx: &WriteTransaction,
    tail: &Tail,
    pending: &Pending,
    trimmed_to: u64,
    released: &[u64],
) -> Result<()> {
    for seq in released.iter().copied().filter(|seq| *seq < trimmed_to) {
        let recorded = {
            let log = tx.open_table(LOG)?;
            let Some(frame) = log.get(seq)? else { continue };
            record::decode(seq, frame.value()).ok()
        };
        let of_stream =
            recorded.as_ref().map(|recorded| stream_index::wants(tx, tail, pending, recorded)).transpose()?;
        let key = recorded.as_ref().and_then(|recorded| recorded.key());
        let needed = of_stream == Some(true) || Needs::of(tx, tail, seq, seq + 1)?.needs(seq, key);
        if !needed {
            tx.open_table(LOG)?.remove(seq)?;
        }
    }
    Ok(())
}
