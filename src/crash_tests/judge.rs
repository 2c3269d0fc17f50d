//! What is found after a crash, and whether it may be so.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata, TableDefinition};

use super::disk::{Disk, Fault};
use super::model::{Model, RELAYS};
use super::record::Recording;
use super::workload::{CAPTURED, COALESCED, ROWS, Step, Subject};
use crate::event::Destination;
use crate::log::keys;
use crate::log::lanes::LaneState;
use crate::relay::rows::exceptions_between;
use crate::storage::tables::schema::{
    BY_KEY, BY_NAME, CURSORS, DEDUP, DUE, EXCEPTIONS, INBOX, LANES, LOG, META, PARKED,
};
use crate::store::Store;
use crate::store::shared::cursor::Cursor;
use crate::store::shared::parked::Bounds;

/// Everything there is: each table's rows by their number and hash, and what is kept in memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Observed {
    tables: BTreeMap<String, (usize, u64)>,
    /// Of the log: next, offset; trimmed, offset; derived; the epoch.
    pub(super) ends: [u64; 6],
    cursors: BTreeMap<String, Cursor>,
    lanes: BTreeMap<Option<&'static str>, Option<LaneState>>,
    /// By stream: first and last revision, and where each stands.
    streams: BTreeMap<&'static str, (u64, Option<u64>, Vec<u64>)>,
    waiting: Vec<(String, u64)>,
}

impl Observed {
    pub(super) fn has_empty_log(&self) -> bool {
        self.tables.get("onewrite.log").is_some_and(|(rows, _)| *rows == 0)
    }
}

type Found<T> = Result<T, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn hash_table<K: redb::Key + 'static, V: redb::Value + 'static>(
    tx: &ReadTransaction,
    table: TableDefinition<'_, K, V>,
    tables: &mut BTreeMap<String, (usize, u64)>,
) -> Found<()> {
    let name = redb::TableHandle::name(&table).to_owned();
    let table = match tx.open_table(table) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
        Err(error) => return Err(text(error)),
    };
    let (mut rows, mut hasher) = (0, DefaultHasher::new());
    for row in table.iter().map_err(text)? {
        let (key, value) = row.map_err(text)?;
        K::as_bytes(&key.value()).as_ref().hash(&mut hasher);
        V::as_bytes(&value.value()).as_ref().hash(&mut hasher);
        rows += 1;
    }
    tables.insert(name, (rows, hasher.finish()));
    Ok(())
}

/// Looks at everything. The model says for which lanes and streams to look.
pub(super) fn observe(store: &Store, model: &Model) -> Found<Observed> {
    let mut seen = Observed::default();
    let snapshot = store.read().map_err(text)?;
    let tx = snapshot.tx();
    let tables = &mut seen.tables;
    for table in [LANES, EXCEPTIONS, DUE, PARKED, INBOX].into_iter().chain(BY_KEY) {
        hash_table(tx, table, tables)?;
    }
    for table in [META, CURSORS].into_iter().chain(BY_NAME) {
        hash_table(tx, table, tables)?;
    }
    hash_table(tx, LOG, tables)?;
    hash_table(tx, ROWS, tables)?;
    hash_table(tx, CAPTURED, tables)?;
    hash_table(tx, COALESCED, tables)?;
    for name in model.streams.keys() {
        let stream = snapshot.stream(*name).map_err(text)?;
        let seqs = stream.events(0).map(|read| read.map(|event| event.seq()).map_err(text));
        let seqs = seqs.collect::<Found<Vec<u64>>>()?;
        seen.streams.insert(name, (stream.first_revision(), stream.revision(), seqs));
    }
    let lanes = tx.open_table(LANES).map_err(text)?;
    let epoch = store.core().identity.epoch();
    let tail = store.core().tail();
    for key in model.lanes.keys() {
        let mut lane = Vec::new();
        keys::lane(Some(&Destination::exchange("exchange", "key")), *key, &mut lane);
        let row = lanes.get(lane.as_slice()).map_err(text)?;
        let row = row.and_then(|row| LaneState::from_bytes(row.value()));
        seen.lanes.insert(*key, tail.lanes.get(&lane).or(row));
    }
    seen.ends =
        [tail.next_seq, tail.end_offset, tail.trimmed_to, tail.trimmed_offset, tail.derived_through, epoch];
    seen.cursors = tail.cursors.clone();
    // Where a search through the rows begins is of memory alone, and an open begins anew.
    seen.cursors.values_mut().for_each(|cursor| cursor.rows.bounds = Bounds::default());
    seen.waiting = tail.captures.iter().map(|(name, known)| (name.clone(), known.waiting)).collect();
    Ok(seen)
}

/// Holds the store against the model, through what an application would use.
pub(super) fn compare(store: &Store, model: &Model) -> Found<()> {
    ensure_whole(store)?;
    let snapshot = store.read().map_err(text)?;
    compare_log(store, model)?;
    let tx = snapshot.tx();
    let blobs = model.rows.iter().map(|(key, blob)| (*key, blob.bytes()));
    match tx.open_table(ROWS) {
        Ok(rows) => {
            let rows = rows.iter().map_err(text)?;
            let rows = rows.map(|row| row.map(|(key, value)| (key.value(), value.value().to_vec())));
            ensure(rows.map(Result::unwrap).eq(blobs), || "the application's rows differ".into())?;
        }
        Err(_) => ensure(model.rows.is_empty(), || "the application's table is missing".into())?,
    }
    for (table, rows) in [(CAPTURED, &model.captured), (COALESCED, &model.coalesced)] {
        let Ok(table) = tx.open_table(table) else {
            ensure(rows.is_empty(), || "a captured table is missing".into())?;
            continue;
        };
        let found =
            table.iter().map_err(text)?.map(|row| row.map(|(key, value)| (key.value(), value.value())));
        let expected = rows.iter().map(|(key, value)| (*key, *value));
        ensure(found.map(Result::unwrap).eq(expected), || "a captured table differs".into())?;
    }
    let inbox = tx.open_table(INBOX).map_err(text)?.len().map_err(text)?;
    let known = (model.seen_ids.len() + model.requests.len() + model.ids) as u64;
    ensure(inbox == known, || format!("{inbox} entries in the inbox instead of {known}"))?;
    let high_waters = u64::from(!model.deliveries.is_empty());
    let rows = tx.open_table(DEDUP).map_err(text)?.len().map_err(text)?;
    ensure(rows >= high_waters, || "the lane of another store is forgotten".into())?;
    compare_streams(store, model)?;
    compare_relays(store, model)
}

/// Damage may be found; nothing may panic.
fn look_everywhere(store: &Store, model: &Model) {
    let _ = store.verify();
    let Ok(snapshot) = store.read() else { return };
    for name in model.streams.keys() {
        let Ok(stream) = snapshot.stream(*name) else { continue };
        let _ = (stream.snapshot(1), stream.events(0).count());
    }
}

fn ensure_whole(store: &Store) -> Found<()> {
    let verified = store.verify().map_err(text)?;
    ensure(verified.is_whole(), || format!("verification: {:?}", verified.findings))
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Found<()> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn compare_log(store: &Store, model: &Model) -> Found<()> {
    let trimmed_to = {
        let tail = store.core().tail();
        ensure(tail.next_seq == model.events.len() as u64, || format!("the log ends at {}", tail.next_seq))?;
        tail.trimmed_to
    };
    let done = model.relays.iter().map(|relay| relay.as_ref().map_or(0, |relay| relay.position)).min();
    ensure(trimmed_to <= done.unwrap_or(0), || format!("trimmed to {trimmed_to}, before all are done"))?;
    let mut kept = (0..model.events.len() as u64).filter(|seq| model.is_kept(*seq, trimmed_to));
    for read in store.read().map_err(text)?.events(0).map_err(text)? {
        let event = read.map_err(text)?;
        let seq = event.seq();
        let expected = kept.next();
        ensure(expected == Some(seq), || format!("event {seq} is there, and expected was {expected:?}"))?;
        let recorded = &model.events[seq as usize];
        ensure(recorded.is(&event), || format!("event {seq} is another: {event:?} instead of {recorded:?}"))?;
    }
    let missing = kept.next();
    ensure(missing.is_none(), || format!("event {missing:?} is missing"))
}

fn compare_streams(store: &Store, model: &Model) -> Found<()> {
    let snapshot = store.read().map_err(text)?;
    for (name, stream) in &model.streams {
        let found = snapshot.stream(*name).map_err(text)?;
        let state = (found.revision(), found.is_deleted(), found.first_revision());
        let expected = ((stream.seqs.len() as u64).checked_sub(1), stream.deleted, stream.first);
        ensure(state == expected, || format!("stream {name} is at {state:?} instead of {expected:?}"))?;
        let events = found.events(0).map(|read| read.map(|event| event.seq()).map_err(text));
        let seqs = events.collect::<Found<Vec<u64>>>()?;
        let readable = if stream.deleted { &[] } else { &stream.seqs[stream.first as usize..] };
        ensure(seqs == readable, || format!("stream {name} has {seqs:?} instead of {readable:?}"))?;
        let saved = found.snapshot(1).map_err(text)?;
        let expected = model.snapshots.get(name).map(|(revision, blob)| (*revision, blob.bytes()));
        ensure(saved == expected, || format!("the snapshot of stream {name} is another"))?;
    }
    Ok(())
}

fn compare_relays(store: &Store, model: &Model) -> Found<()> {
    for (name, relay) in RELAYS.iter().zip(&model.relays) {
        let cursor = store.core().tail().cursors.get(*name).cloned();
        let (Some(cursor), Some(relay)) = (&cursor, relay) else {
            ensure(cursor.is_none() == relay.is_none(), || format!("relay {name} comes and goes"))?;
            continue;
        };
        let found = (cursor.position, cursor.confirmed, cursor.rows.parked);
        let expected = (relay.position, relay.confirmed, relay.parked.len() as u64);
        ensure(found == expected, || format!("relay {name} is at {found:?} instead of {expected:?}"))?;
        let exceptions = exceptions_between(store.core(), cursor.id, 0, u64::MAX).map_err(text)?;
        ensure(exceptions == relay.exceptions, || format!("relay {name} has exceptions {exceptions:?}"))?;
    }
    Ok(())
}

/// What there was at some moment, and what it must look like.
#[derive(Debug)]
pub(super) struct Moment {
    pub(super) model: Model,
    pub(super) observed: Observed,
}

/// Opens an image and looks for the moment that it shows. `from` is the oldest allowed moment, `to` the
/// newest.
pub(super) fn judge(image: Vec<u8>, recording: &Recording, from: usize, to: usize) -> Found<usize> {
    let subject = Subject::open(recording.seed, Disk::of(image)).map_err(|error| format!("open: {error}"))?;
    let moments = &recording.moments[from..=to];
    let newest = &moments.last().expect("a range that is not empty").moment;
    let found = observe(subject.store(), &newest.model)?;
    let fits = |moment: &Moment| {
        // Of lanes and streams that came later there is nothing yet.
        let model = &moment.model;
        let mut found = found.clone();
        found.lanes.retain(|key, state| state.is_some() || model.lanes.contains_key(key));
        found.streams.retain(|name, stream| stream.1.is_some() || model.streams.contains_key(name));
        found == moment.observed
    };
    let at = moments.iter().rposition(|checkpoint| fits(&checkpoint.moment));
    let at = at.ok_or_else(|| {
        let expected = moments.iter().map(|checkpoint| &checkpoint.moment.observed).collect::<Vec<_>>();
        format!("it shows no moment that it may: {found:#?}\ninstead of {expected:#?}")
    })?;
    let model = moments[at].moment.model.after_crash();
    ensure_whole(subject.store())?;
    go_on(subject, model)?;
    Ok(from + at)
}

/// Judges the image of a disk that has lied about its syncs: an older moment, or an error that says what
/// is wrong. No event is another in any case. If every page was verified, the store is as at that moment.
///
/// Returns whether it could be opened.
pub(super) fn judge_lie(image: Vec<u8>, recording: &Recording, to: usize) -> Found<bool> {
    let disk = Disk::of(image.clone());
    let Ok(subject) = Subject::open_uncached(recording.seed, disk.clone()) else { return Ok(false) };
    let newest = &recording.moments[to].moment.model;
    let store = subject.store();
    if let Ok(events) = store.read().and_then(|snapshot| snapshot.events(0)) {
        for event in events.flatten() {
            let recorded = newest.events.get(event.seq() as usize);
            ensure(recorded.is_some_and(|recorded| recorded.is(&event)), || {
                format!("{event:?} instead of {recorded:?}")
            })?;
        }
    }
    look_everywhere(store, newest);
    // Nothing is written where nothing was verified, not even by a close: on some damaged pages the
    // engine panics twice, and the process ends. So the disk dies first, and a read reports it.
    let verified = store.core().verified_at_open;
    disk.fail(Fault { at: 0, lasting: true });
    let _ = store.read().and_then(|snapshot| snapshot.event(0));
    drop(subject);
    if verified { judge(image, recording, 0, to).map(|_| true) } else { Ok(true) }
}

/// The next step, one more write, and another after a clean end.
pub(super) fn go_on(mut subject: Subject, mut model: Model) -> Found<()> {
    let seed = subject.seed;
    let next = Step::draw(seed, &model);
    subject.take(&next, &mut model).map_err(|error| format!("one more step, {next:?}: {error}"))?;
    let write = Step::draw_write(seed, &model);
    subject.take(&write, &mut model).map_err(|error| format!("one more write, {write:?}: {error}"))?;
    subject.take(&Step::Reopen, &mut model).map_err(|error| format!("a clean end: {error}"))?;
    let write = Step::draw_write(seed, &model);
    subject.take(&write, &mut model).map_err(|error| format!("a write after it, {write:?}: {error}"))?;
    compare(subject.store(), &model).map_err(|what| format!("after {next:?} and two writes: {what}"))?;
    subject.close().map_err(text)
}
