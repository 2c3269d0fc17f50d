//! Recovers the state in memory from the file: identity, the end of the log, lanes, cursors.

use std::path::Path;

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable};

use crate::error::{BoxError, CorruptError, Error, OpenError, Result};
use crate::event::{fresh_secret, fresh_uuid};
use crate::limits::NUMBER_MAX;
use crate::log::lanes::LaneState;
use crate::log::streams::{Gaps, StreamState};
use crate::log::write_back::WriteBackCache;
use crate::log::{keys, record};
use crate::printable::printable;
use crate::storage::errors::damaged_row;
use crate::storage::tables::projection::ProjectionRow;
use crate::storage::tables::schema::{
    BY_KEY, BY_NAME, CURSORS, DUE, EXCEPTIONS, FORMAT, INBOX, LANES, LOG, META, META_AGE, META_CONTENT_KEY,
    META_EPOCH, META_EPOCH_STARTS, META_FORMAT, META_NEXT_CURSOR, META_STATE, META_STORE_ID, PARKED,
    PROJECTIONS, STREAMS, StateRow,
};
use crate::storage::tables::stream::stream_row;
use crate::storage::tables::{ids, lanes_kept, rejected};
use crate::store::open::cursors::{self, count_parked};
use crate::store::open::streams::raise_to_known;
use crate::store::read::state::{plausible, read_state};
use crate::store::shared::age::AgeIndex;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::tail::{Identity, Tail};
use crate::tuning::CLOCK_TOLERANCE_MS;
use crate::wire::ContentKey;

/// More epochs than any file can have reached: each new epoch takes a damaged file.
const EPOCHS_MAX: usize = 1 << 20;

/// Writes the tables and the identity of a new store.
pub(crate) fn initialise(path: &Path, db: &Database) -> Result<(), OpenError> {
    write_schema(db).map_err(|source| OpenError::Storage { path: path.into(), cause: source })
}

fn write_schema(db: &Database) -> Result<(), BoxError> {
    let tx = db.begin_write()?;
    {
        let mut meta = tx.open_table(META)?;
        meta.insert(META_FORMAT, &FORMAT.to_le_bytes()[..])?;
        meta.insert(META_STORE_ID, &fresh_uuid()[..])?;
        meta.insert(META_CONTENT_KEY, content_key(NOTHING_BEFORE).as_slice())?;
        meta.insert(META_EPOCH, &1_u64.to_le_bytes()[..])?;
        meta.insert(META_NEXT_CURSOR, &1_u32.to_le_bytes()[..])?;
        meta.insert(META_STATE, StateRow::default().to_bytes().as_slice())?;
        tx.open_table(LOG)?;
        tx.open_table(CURSORS)?;
        for table in [LANES, EXCEPTIONS, DUE, PARKED, INBOX] {
            tx.open_table(table)?;
        }
        make_newer_tables(&tx)?;
    }
    tx.commit()?;
    Ok(())
}

/// Reads identity and format. Makes a redb database without an identity a store, if `adopt` allows
/// it.
pub(crate) fn identify(path: &Path, db: &Database, adopt: bool) -> Result<Identity> {
    let storage = |source: BoxError| OpenError::Storage { path: path.into(), cause: source };
    let damaged = |reason: &str| OpenError::Damaged { path: path.into(), reason: reason.into() };
    let tx = db.begin_read().map_err(|error| storage(error.into()))?;
    let meta = match tx.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) if adopt => {
            drop(tx);
            initialise(path, db)?;
            return identify(path, db, false);
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {
            let reason = "it is a redb database without a log; `adopt_existing(true)` adds one".into();
            return Err(OpenError::NotAStore { path: path.into(), reason }.into());
        }
        Err(error) => return Err(storage(error.into()).into()),
    };
    let row = |name: &str| -> Result<Vec<u8>, OpenError> {
        let row = meta.get(name).map_err(|error| storage(error.into()))?;
        row.map(|row| row.value().to_vec()).ok_or_else(|| damaged(&format!("its row `{name}` is missing")))
    };
    let format = row(META_FORMAT)?.try_into().map(u32::from_le_bytes);
    let format = format.map_err(|_| damaged("its row `format` cannot be read"))?;
    if format > FORMAT {
        return Err(OpenError::NewerFormat { path: path.into(), found: format, supported: FORMAT }.into());
    }
    // Before its release, format 5 had no such row.
    let has_key = meta.get(META_CONTENT_KEY).map_err(|error| storage(error.into()))?.is_some();
    if format < FORMAT || !has_key {
        drop((meta, tx));
        upgrade(db).map_err(storage)?;
        return identify(path, db, false);
    }
    let store_id =
        row(META_STORE_ID)?.try_into().map_err(|_| damaged("its row `store_id` cannot be read"))?;
    let epoch = row(META_EPOCH)?.try_into().map(u64::from_le_bytes);
    let epoch = epoch.map_err(|_| damaged("its row `epoch` cannot be read"))?;
    let starts = meta.get(META_EPOCH_STARTS).map_err(|error| storage(error.into()))?;
    let starts = starts.map(|row| row.value().to_vec()).unwrap_or_default();
    let (starts, odd) = starts.as_chunks::<8>();
    let epochs_after_first = usize::try_from(epoch.wrapping_sub(1)).ok().filter(|count| *count < EPOCHS_MAX);
    let count = epochs_after_first.filter(|count| odd.is_empty() && starts.len() <= *count);
    let count = count.ok_or_else(|| damaged("its rows `epoch` and `epoch_starts` do not fit"))?;
    let missing = std::iter::repeat_n(0, count - starts.len());
    let epoch_starts = missing.chain(starts.iter().map(|start| u64::from_le_bytes(*start))).collect();
    let (content_key, dedup_before_ms) = read_content_key(&row(META_CONTENT_KEY)?)
        .ok_or_else(|| damaged("its row `content_key` cannot be read"))?;
    Ok(Identity { store_id, epoch_starts, content_key, dedup_before_ms })
}

/// Stands in the place of a time: the store has had a secret from the beginning.
const NOTHING_BEFORE: u64 = u64::MAX;

/// A fresh secret, and a time in Unix milliseconds. By that time, everything had been recorded that
/// was recorded for deduplication without a secret.
fn content_key(dedup_before_ms: u64) -> Vec<u8> {
    [&fresh_secret()[..], &dedup_before_ms.to_le_bytes()].concat()
}

fn read_content_key(row: &[u8]) -> Option<(ContentKey, Option<u64>)> {
    let (key, before) = row.split_first_chunk::<16>()?;
    let before = u64::from_le_bytes(before.try_into().ok()?);
    Some((ContentKey::new(*key), Some(before).filter(|before| *before != NOTHING_BEFORE)))
}

/// Makes the tables that formats 2 and 3 added to format 1.
fn make_newer_tables(tx: &redb::WriteTransaction) -> Result<(), BoxError> {
    for table in BY_KEY {
        tx.open_table(table)?;
    }
    for table in BY_NAME {
        tx.open_table(table)?;
    }
    Ok(())
}

/// Upgrades an older format to the newest.
///
/// - Format 1 had no streams.
/// - Format 2 had no projections, captures and lanes of a consumer.
/// - Format 3 had no store age, and a snapshot of a stream did not name its event. Rows of that
///   form are still read.
/// - Format 4 had no AMQP properties in records and rejected deliveries. Header values were only
///   text, integers of 64 bits, booleans and bytes. Rows without the new values are unchanged. It
///   also had no secret, so lanes and ids were recognised by checksums over less. Rows of that
///   form are still read, and count for what was recorded then.
/// - Format 5 did not count lanes, gaps and the bytes of rejected deliveries, and kept each
///   rejected delivery in one piece.
///
/// Marks of ids have wall times in earlier formats. When the pruning of the inbox meets such a
/// time, it takes the time for the present.
fn upgrade(db: &Database) -> Result<(), BoxError> {
    let tx = db.begin_write()?;
    make_newer_tables(&tx)?;
    let mut meta = tx.open_table(META)?;
    if meta.get(META_CONTENT_KEY)?.is_none() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now_ms = now.map_or(0, crate::time::as_ms);
        let before_ms = now_ms.saturating_add(CLOCK_TOLERANCE_MS).min(NOTHING_BEFORE - 1);
        meta.insert(META_CONTENT_KEY, content_key(before_ms).as_slice())?;
    }
    let before = meta.insert(META_FORMAT, &FORMAT.to_le_bytes()[..])?.map(|format| format.value().to_vec());
    let age_ms = meta.get(META_AGE)?.and_then(|row| AgeIndex::from_bytes(row.value()));
    let age_ms = age_ms.map_or(0, |ages| ages.saved_ms());
    drop(meta);
    if before.is_none_or(|before| before != FORMAT.to_le_bytes()) {
        rejected::count_bytes(&tx)?;
        lanes_kept::count_lanes(&tx, age_ms)?;
        ids::count_ids(&tx)?;
    }
    tx.commit()?;
    Ok(())
}

/// Finds the end of the log, and rebuilds the indexes that are derived from it.
pub(crate) fn recover(db: &Database, identity: &mut Identity, unclean: bool) -> Result<Tail> {
    let tx = db.begin_read()?;
    let state = read_state(&tx)?;
    let log = tx.open_table(LOG)?;
    let last = log.last()?.map(|(seq, _)| seq.value());
    if last == Some(u64::MAX) {
        return Err(CorruptError { seq: u64::MAX, what: "no event can have this number" }.into());
    }
    let mut tail = Tail {
        next_seq: last.map_or(state.trimmed_to, |last| (last + 1).max(state.trimmed_to)),
        end_offset: end_of_log(&log, &state)?,
        trimmed_to: state.trimmed_to,
        trimmed_offset: state.trimmed_offset,
        derived_through: state.derived_through,
        ..Tail::default()
    };
    for row in tx.open_table(CURSORS)?.iter()? {
        let (name, row) = row?;
        let mut cursor = Cursor::from_bytes(row.value()).ok_or_else(|| damaged_row("cursor"))?;
        cursor.rows =
            cursors::count_rows(&tx.open_table(EXCEPTIONS)?, &tx.open_table(PARKED)?, &log, &cursor)?;
        tail.parked.insert(cursor.id, count_parked(&tx, &cursor)?);
        tail.cursors.insert(name.value().to_owned(), cursor);
    }
    for row in tx.open_table(PROJECTIONS)?.iter()? {
        let (name, row) = row?;
        let row = ProjectionRow::from_bytes(name.value(), row.value());
        tail.projections.insert(name.value().to_owned(), row.ok_or_else(|| damaged_row("projection"))?);
    }
    let positions = tail.cursors.values().map(|cursor| cursor.position);
    let projected = tail.projections.values().flat_map(ProjectionRow::tracks).map(|track| track.position);
    let known = positions.chain(projected).max().unwrap_or(0).max(state.derived_through);
    if tail.next_seq < known {
        // The numbers of the missing records would be given a second time.
        return Err(CorruptError { seq: known - 1, what: "it is missing at the end of the log" }.into());
    }
    tail.captures = crate::store::open::captures::recover(&tx)?;
    let ages = tx.open_table(META)?.get(META_AGE)?.and_then(|row| AgeIndex::from_bytes(row.value()));
    tail.ages = AgeIndex::opened(ages, tail.next_seq);
    tail.derived_offset = offset_before(&log, &tail, state.derived_through)?;
    let whole = replay(&tx, &mut tail)?;
    // Only a crash or damage can have removed the newest records. The check reads every snapshot,
    // so it runs only then.
    let raised = (!whole || unclean) && raise_to_known(&tx, &mut tail)?;
    if whole && !raised {
        return Ok(tail);
    }
    drop(log);
    drop(tx);
    begin_epoch(db, identity, &mut tail)?;
    Ok(tail)
}

/// The end offset of the newest record that can be read.
fn end_of_log(log: &impl ReadableTable<u64, &'static [u8]>, state: &StateRow) -> Result<u64> {
    for row in log.range(state.trimmed_to..)?.rev() {
        let (seq, frame) = row?;
        if let Some(offset) = end_offset(seq.value(), frame.value()) {
            return Ok(offset);
        }
    }
    Ok(state.trimmed_offset)
}

/// The end offset of the record before `position`. If that record cannot be read, the end offset of
/// the nearest later record.
fn offset_before(log: &impl ReadableTable<u64, &'static [u8]>, tail: &Tail, position: u64) -> Result<u64> {
    if position <= tail.trimmed_to {
        return Ok(tail.trimmed_offset);
    }
    for row in log.range(position - 1..)? {
        let (seq, frame) = row?;
        if let Some(offset) = end_offset(seq.value(), frame.value()) {
            return Ok(offset);
        }
    }
    Ok(tail.end_offset)
}

/// The end offset of a record, if it can be read and is plausible: sums with it do not overflow.
fn end_offset(seq: u64, frame: &[u8]) -> Option<u64> {
    record::end_offset(seq, frame).ok().filter(|offset| *offset <= NUMBER_MAX)
}

/// Brings lanes and streams up to date from the records that their tables do not know yet. Returns
/// `false` if a record is damaged or missing.
fn replay(tx: &ReadTransaction, tail: &mut Tail) -> Result<bool> {
    let log = tx.open_table(LOG)?;
    let streams = tx.open_table(STREAMS)?;
    let mut key = Vec::new();
    let mut whole = true;
    let mut gaps = Gaps::from(tail.derived_through);
    for row in log.range(tail.derived_through..)? {
        let (seq, frame) = row?;
        if !gaps.pass(seq.value()) {
            if whole {
                let before = seq.value();
                tracing::error!(before, "a record is missing; lanes cannot be rebuilt; a new epoch begins");
            }
            whole = false;
        }
        let known_next = |tail: &Tail, stream: &str| -> Result<StreamState> {
            match tail.streams.states.get(stream.as_bytes()) {
                Some(known) => Ok(known),
                None => Ok(stream_row(&streams, stream.as_bytes())?.unwrap_or_default()),
            }
        };
        let decoded = record::decode(seq.value(), frame.value());
        let state = match decoded.as_ref().ok().and_then(|recorded| recorded.stream()) {
            Some(stream) => known_next(tail, stream)?,
            None => StreamState::default(),
        };
        let recorded = match decoded.and_then(|recorded| plausible(recorded, state)) {
            Ok(recorded) => recorded,
            Err(error) => {
                if whole {
                    tracing::error!(%error, "lanes cannot be rebuilt; a new epoch begins");
                }
                whole = false;
                gaps.damaged();
                continue;
            }
        };
        if let Some(lane) = recorded.lane
            && keys::lane(recorded.event.destination.as_ref(), recorded.key(), &mut key)
        {
            tail.lanes.change(key.as_slice().into(), LaneState { id: lane.id, next: lane.number + 1 });
        }
        if let (Some(stream), Some(revision)) = (recorded.stream(), recorded.revision()) {
            let name = stream.as_bytes();
            // If a damaged record hides a revision, the index has a gap. Reading the gap reports
            // it.
            let run = tail.streams.recent.entry(name.into()).or_default();
            if !run.put_behind(revision, seq.value(), &mut gaps) {
                let (seq, stream) = (seq.value(), printable(stream));
                tracing::error!(seq, %stream, revision, "more revisions are missing than records; the index leaves this one out");
                whole = false;
            }
            let state = StreamState { next: state.next.max(revision + 1), ..state };
            tail.streams.states.change(name.into(), state);
        }
    }
    Ok(whole)
}

/// Begins a new epoch, in which every lane starts anew.
///
/// The numbers of lanes that can no longer be known are not guessed: a reader would take a reused
/// number for a repeat, and drop the message. Under a new epoch, no old number is taken for a new
/// one.
fn begin_epoch(db: &Database, identity: &mut Identity, tail: &mut Tail) -> Result<()> {
    identity.epoch_starts.push(tail.next_seq);
    tail.lanes = WriteBackCache::default();
    let tx = db.begin_write()?;
    tx.delete_table(LANES)?;
    tx.open_table(LANES)?;
    crate::store::transaction::stream_index::write_streams(&tx, &tail.streams, &Default::default())?;
    tail.streams.written();
    tail.derived_through = tail.next_seq;
    tail.derived_offset = tail.end_offset;
    let state = StateRow {
        trimmed_to: tail.trimmed_to,
        trimmed_offset: tail.trimmed_offset,
        derived_through: tail.next_seq,
    };
    {
        let mut meta = tx.open_table(META)?;
        meta.insert(META_EPOCH, &identity.epoch().to_le_bytes()[..])?;
        let starts: Vec<u8> = identity.epoch_starts.iter().flat_map(|start| start.to_le_bytes()).collect();
        meta.insert(META_EPOCH_STARTS, starts.as_slice())?;
        meta.insert(META_STATE, state.to_bytes().as_slice())?;
    }
    tx.commit().map_err(Error::from)
}
