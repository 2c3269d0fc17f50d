//! Finds what keeps the log or the file from shrinking, and warns of a holder that does so for
//! long.
//!
//! **Invariant.** The writer thread alone logs, and it holds neither a mutex nor the write lock
//! meanwhile.

use std::sync::atomic::Ordering;

use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata};

use crate::error::Result;
use crate::limits::STATS_ROWS_MAX;
use crate::log::{keys, record};
use crate::storage::tables::schema::{EXCEPTIONS, FAILURES, LOG};
use crate::store::shared::core::Core;
use crate::store::shared::holders::{Holder, HolderKind, Holders, Key, Seen, lock};
use crate::store::shared::parked::Parked;
use crate::store::shared::tail::Tail;
use crate::time::Now;

/// A holder whose position moves, or that ends. Such a holder is worth a warning when it does not
/// move.
#[derive(Debug)]
pub(crate) struct Held {
    key: Key,
    name: String,
    position: u64,
    /// The offset at which the record before its position ends, if known.
    offset: Option<u64>,
    /// Since when it holds, if known.
    since_ms: Option<u64>,
    held_ms: u64,
    runs: bool,
}

/// Where the log begins and ends.
#[derive(Debug, Clone, Copy)]
struct Log {
    trimmed_to: u64,
    trimmed_offset: u64,
    next_seq: u64,
    end_offset: u64,
}

impl Log {
    fn of(tail: &Tail) -> Self {
        Self {
            trimmed_to: tail.trimmed_to,
            trimmed_offset: tail.trimmed_offset,
            next_seq: tail.next_seq,
            end_offset: tail.end_offset,
        }
    }

    fn events_from(&self, position: u64) -> u64 {
        self.next_seq.saturating_sub(position.max(self.trimmed_to))
    }

    /// Bytes of the records from `position` on; `None` if the record before `position` cannot be
    /// read.
    fn bytes_from(&self, tx: &ReadTransaction, position: u64, known: Option<u64>) -> Result<Option<u64>> {
        let offset = match known {
            _ if position <= self.trimmed_to => Some(self.trimmed_offset),
            Some(offset) => Some(offset),
            None => end_of(tx, position - 1)?,
        };
        Ok(offset.map(|offset| self.end_offset.saturating_sub(offset)))
    }
}

fn end_of(tx: &ReadTransaction, seq: u64) -> Result<Option<u64>> {
    let frame = tx.open_table(LOG)?.get(seq)?;
    Ok(frame.and_then(|frame| record::end_offset(seq, frame.value()).ok()))
}

/// Finds the holders before the end of the log, and the oldest snapshot. Each lock is released
/// before the next is taken.
fn find_held(core: &Core) -> (Vec<Held>, Log) {
    let mut held = Vec::new();
    let log = {
        let tail = core.tail();
        let mut add = |kind, name: &str, position, offset| {
            let key = (kind, name.to_owned(), 0);
            let name = name.to_owned();
            held.push(Held { key, name, position, offset, since_ms: None, held_ms: 0, runs: false });
        };
        for (name, cursor) in &tail.cursors {
            add(HolderKind::Relay, name, cursor.position, Some(cursor.position_offset));
        }
        for (name, row) in &tail.projections {
            add(HolderKind::Projection, name, row.live.position, None);
            if let Some(rebuild) = row.rebuild {
                add(HolderKind::Rebuild, name, rebuild.position, None);
            }
        }
        Log::of(&tail)
    };
    for held in &mut held {
        held.runs = match held.key.0 {
            HolderKind::Relay => core.relays.port(&held.name).is_some(),
            _ => core.projections.get(&held.name).is_some(),
        };
    }
    for (number, position, at) in core.notifier.wanted() {
        let key = (HolderKind::Subscription, String::new(), number);
        let name = at.to_string();
        held.push(Held { key, name, position, offset: None, since_ms: None, held_ms: 0, runs: true });
    }
    held.retain(|held| log.events_from(held.position) > 0);
    if let (_, Some(taken)) = core.holders.living() {
        held.push(Held {
            key: (HolderKind::Snapshot, String::new(), taken.number),
            name: taken.at.to_string(),
            position: taken.next_seq,
            offset: Some(taken.end_offset),
            since_ms: Some(taken.mono_ms),
            held_ms: 0,
            runs: true,
        });
    }
    (held, log)
}

/// Returns all holders, the largest first, then the number of living snapshots and the age of the
/// oldest.
pub(crate) fn find(core: &Core, tx: &ReadTransaction, now: Now) -> Result<(Vec<Holder>, u64, Option<u64>)> {
    let (mut held, log) = find_held(core);
    core.holders.observe(&mut held, now.mono_ms);
    let mut all = Vec::new();
    for held in held {
        let bytes = match held.key.0 {
            HolderKind::Snapshot => held.offset.map(|offset| log.end_offset.saturating_sub(offset)),
            _ => log.bytes_from(tx, held.position, held.offset)?,
        };
        all.push(Holder {
            kind: held.key.0,
            name: held.name,
            position: held.position.max(log.trimmed_to),
            events: log.events_from(held.position),
            bytes,
            held_ms: held.held_ms,
            runs: held.runs,
        });
    }
    find_kept(core, tx, &log, now, &mut all)?;
    all.sort_by_key(|holder| std::cmp::Reverse((holder.bytes.unwrap_or(0), holder.events)));
    let (living, oldest) = core.holders.living();
    Ok((all, living, oldest.map(|taken| now.mono_ms.saturating_sub(taken.mono_ms))))
}

/// Finds events that are kept one by one, or by a rule. The application wants them kept, so no
/// warning is due.
fn find_kept(core: &Core, tx: &ReadTransaction, log: &Log, now: Now, all: &mut Vec<Holder>) -> Result<()> {
    let of = |kind, name: &str, position, events, bytes| Holder {
        kind,
        name: name.to_owned(),
        position,
        events,
        bytes,
        held_ms: 0,
        runs: true,
    };
    let (rows, tracks) = {
        let tail = core.tail();
        let rows: Vec<_> = tail
            .cursors
            .iter()
            .map(|(name, cursor)| {
                let parked = tail.parked.get(&cursor.id).and_then(Parked::first);
                (name.clone(), cursor.id, cursor.rows.behind(), parked)
            })
            .collect();
        let tracks: Vec<_> = tail
            .projections
            .iter()
            .flat_map(|(name, row)| row.tracks().map(|track| (name.clone(), track.id)))
            .collect();
        (rows, tracks)
    };
    let mut kept = 0;
    for (name, id, (events, bytes), parked) in rows.into_iter().filter(|(_, _, behind, _)| behind.0 > 0) {
        let from = keys::exception(id, 0);
        let first = tx.open_table(EXCEPTIONS)?.range(&from[..]..)?.next().transpose()?;
        let first = first.filter(|(at, _)| at.value().starts_with(&id.to_be_bytes()));
        let first = first.and_then(|(at, _)| keys::split_exception(at.value()));
        let position = first.into_iter().chain(parked).min().unwrap_or(log.trimmed_to);
        kept += events;
        all.push(Holder {
            runs: core.relays.port(&name).is_some(),
            ..of(HolderKind::RelayRows, &name, position, events, Some(bytes))
        });
    }
    for (name, id) in tracks {
        let (from, to) = (keys::exception(id, 0), keys::exception(id, u64::MAX));
        let table = tx.open_table(FAILURES)?;
        let mut first = None;
        let mut events = 0;
        for row in table.range(&from[..]..=&to[..])?.take(STATS_ROWS_MAX) {
            first = first.or(keys::split_exception(row?.0.value()));
            events += 1;
        }
        kept += events;
        if let Some(first) = first {
            let runs = core.projections.get(&name).is_some();
            all.push(Holder { runs, ..of(HolderKind::Failures, &name, first, events, None) });
        }
    }
    if let Some(position) = retained_from(core, tx, log, now)?
        && log.events_from(position) > 0
    {
        let bytes = log.bytes_from(tx, position, None)?;
        all.push(of(HolderKind::Retention, "", position, log.events_from(position), bytes));
    }
    let table = tx.open_table(LOG)?;
    let below = table.len()?.saturating_sub(log.next_seq - log.trimmed_to).saturating_sub(kept);
    if below > 0 {
        let first = table.first()?.map_or(0, |(seq, _)| seq.value());
        all.push(of(HolderKind::Streams, "", first, below, None));
    }
    Ok(())
}

/// The first event that the store's retention keeps.
fn retained_from(core: &Core, tx: &ReadTransaction, log: &Log, now: Now) -> Result<Option<u64>> {
    let retention = &core.settings.retention;
    if retention.forever {
        return Ok(Some(log.trimmed_to));
    }
    let mut from = log.next_seq.saturating_sub(retention.events_min).max(log.trimmed_to);
    if retention.age_ms_min > 0 {
        let age_ms = core.age.at(now);
        let old_below = core.tail().ages.old_below(age_ms, retention.age_ms_min);
        from = from.min(old_below.max(log.trimmed_to));
    }
    if retention.bytes_min > 0 {
        let table = tx.open_table(LOG)?;
        // End offsets rise with the sequence number, except for damaged records.
        let (mut low, mut high) = (log.trimmed_to, from);
        while low < high {
            let middle = low + (high - low) / 2;
            let frame = table.get(middle)?;
            let recorded = frame.and_then(|frame| record::decode(middle, frame.value()).ok());
            let is_kept = recorded.is_some_and(|recorded| {
                recorded.end_offset.saturating_add(retention.bytes_min) > log.end_offset
            });
            if is_kept { high = middle } else { low = middle + 1 }
        }
        from = low;
    }
    Ok((from < log.next_seq).then_some(from))
}

/// Makes the writer thread look, if a commit has asked for it or `is_due`, and warn of holders that
/// have not moved for too long. Returns in how many milliseconds the next warning may be due.
pub(in crate::store) fn look(core: &Core, is_due: bool) -> Looked {
    if !core.holders.take_asked() && !is_due {
        return Looked::NotYet;
    }
    let now = core.settings.clock.now();
    let (mut held, log) = find_held(core);
    core.holders.observe(&mut held, now.mono_ms);
    let (overdue, next_ms) = core.holders.overdue(held);
    for held in overdue {
        warn(&held, &log);
    }
    Looked::Next(next_ms)
}

/// The result of a look.
pub(in crate::store) enum Looked {
    NotYet,
    /// The next warning may be due in this many milliseconds.
    Next(Option<u64>),
}

fn warn(held: &Held, log: &Log) {
    let Held { name, position, held_ms, runs, .. } = held;
    let (held_s, events) = (held_ms / 1000, log.events_from(*position));
    match held.key.0 {
        HolderKind::Snapshot => tracing::warn!(
            snapshot = %name, position, held_s, events,
            "a snapshot has been held for long: the file grows with what is written meanwhile; drop the snapshot, its iterators and its tables"
        ),
        HolderKind::Subscription => tracing::warn!(
            subscription = %name, position, held_s, events,
            "a subscription is not read and holds the log: read on, or drop it"
        ),
        HolderKind::Relay if *runs => tracing::warn!(
            relay = %name, position, held_s, events,
            "a relay stands still and holds the log: its status says why"
        ),
        HolderKind::Relay => tracing::warn!(
            relay = %name, position, held_s, events,
            "a relay that does not run here holds the log: start it, or let go of it with `Store::forget_relay`"
        ),
        _ if *runs => tracing::warn!(
            projection = %name, position, held_s, events,
            "a projection stands still and holds the log: its status says why"
        ),
        _ => tracing::warn!(
            projection = %name, position, held_s, events,
            "a projection that does not run here holds the log: start it, or let go of it with `Store::forget_projection`"
        ),
    }
}

impl Holders {
    /// Takes the request for a look, if a commit has made one.
    fn take_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) && self.asked.swap(false, Ordering::SeqCst)
    }

    /// Notes the positions of the holders; sets how long each has held.
    fn observe(&self, held: &mut [Held], mono_ms: u64) {
        let mut seen = lock(&self.seen);
        seen.retain(|key, _| held.iter().any(|held| held.key == *key));
        for held in held {
            let now =
                Seen { position: held.position, since_ms: held.since_ms.unwrap_or(mono_ms), warned: false };
            let known = seen.entry(held.key.clone()).or_insert(now);
            if known.position != held.position {
                *known = now;
            }
            held.held_ms = mono_ms.saturating_sub(known.since_ms);
        }
    }

    /// Picks the holders that have held for too long and have no warning yet. Also returns when the
    /// next warning is due.
    fn overdue(&self, held: Vec<Held>) -> (Vec<Held>, Option<u64>) {
        let mut seen = lock(&self.seen);
        let mut next_ms = None::<u64>;
        let mut overdue = Vec::new();
        for held in held {
            let Some(known) = seen.get_mut(&held.key).filter(|known| !known.warned) else { continue };
            if held.held_ms >= self.warn_after_ms {
                known.warned = true;
                overdue.push(held);
            } else {
                let left_ms = self.warn_after_ms - held.held_ms;
                next_ms = Some(next_ms.map_or(left_ms, |next_ms| next_ms.min(left_ms)));
            }
        }
        (overdue, next_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuning::{HOLDER_LOOKS, SNAPSHOTS_PRUNED_MIN};
    use std::panic::Location;

    fn held(position: u64) -> Vec<Held> {
        let key = (HolderKind::Relay, "r".to_owned(), 0);
        vec![Held { key, name: "r".into(), position, offset: None, since_ms: None, held_ms: 0, runs: false }]
    }

    /// Goal: a holder holds the bytes from its position on, even those of a single record. Method:
    /// three records, each position, with the offset read from the log.
    #[test]
    fn bytes_are_counted_from_the_position_on() {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(folder.path().join("a.redb")).unwrap();
        let mut ends = vec![0];
        for _ in 0..3 {
            store.write(|tx| tx.append(crate::event::Event::bytes("paid", [7; 100]).to("", "q"))).unwrap();
            ends.push(Log::of(&store.core().tail()).end_offset);
        }
        let log = Log::of(&store.core().tail());
        for position in 1..=3 {
            let bytes = store.core().reading(|tx| log.bytes_from(tx, position, None)).unwrap();
            assert_eq!(bytes, Some(ends[3] - ends[usize::try_from(position).unwrap()]), "from {position}");
        }
    }

    /// Goal: a holder gets one warning for each place at which it stays for too long. Method: looks
    /// at a relay that stays, moves, stays again, catches up and stays again.
    #[test]
    fn a_holder_is_warned_of_once_for_each_place() {
        let holders = Holders::new(100, 0, 0);
        let look = |mono_ms, mut held: Vec<Held>| {
            holders.observe(&mut held, mono_ms);
            let (overdue, next_ms) = holders.overdue(held);
            (overdue.len(), next_ms)
        };
        assert_eq!(look(10, held(5)), (0, Some(100)));
        assert_eq!(look(60, held(5)), (0, Some(50)));
        assert_eq!(look(110, held(5)), (1, None));
        assert_eq!(look(500, held(5)), (0, None), "once");
        assert_eq!(look(600, held(6)), (0, Some(100)), "it has moved");
        assert_eq!(look(700, held(6)), (1, None));
        assert_eq!(look(800, Vec::new()), (0, None), "it holds nothing");
        assert_eq!(look(900, held(6)), (0, Some(100)));
        assert_eq!(look(1_000, held(6)), (1, None));
        assert_eq!(look(0, held(7)), (0, Some(100)), "a clock that goes back");
    }

    /// Goal: commits ask for a look now and then, not each.
    #[test]
    fn few_commits_ask_for_a_look() {
        let holders = Holders::new(8_000, 0, 0);
        let asked = (0..8_000).filter(|mono_ms| holders.note_commit(*mono_ms)).count() as u64;
        assert_eq!(asked, HOLDER_LOOKS);
        assert!(holders.take_asked() && !holders.take_asked());
    }

    /// Goal: the list of snapshots does not grow with ended snapshots. Method: 10,000, of which one
    /// lives.
    #[test]
    fn snapshots_that_have_ended_take_no_room() {
        let holders = Holders::new(1, 0, 0);
        let oldest = holders.take(1, Location::caller());
        (0..10_000).for_each(|mono_ms| drop(holders.take(mono_ms, Location::caller())));
        assert!(lock(&holders.snapshots).living.len() <= 2 * SNAPSHOTS_PRUNED_MIN);
        let (living, first) = holders.living();
        assert_eq!((living, first.map(|taken| taken.number)), (1, Some(oldest.number)));
    }
}
