//! How many lanes and gaps a scope keeps, and which lanes it forgets for others.
//!
//! ```text
//! (scope)                → lanes u64, gaps u64, lanes that were forgotten u64 [, since ms u64]
//! (scope, store, epoch)  → forgotten lanes of this producer      (log/forgotten.rs)
//! ```
//!
//! They are written when a lane begins, a gap comes or goes, or a lane is forgotten: a
//! delivery in order writes its lane's head alone.
//!
//! **Invariant.** A lane goes with all its rows, and its id is among the forgotten ones from then on, in one transaction. A message of such a
//! lane is a conflict: it may be a repeat. A gap that is forgotten leaves its numbers below the lane's next one: they are conflicts too.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use redb::{ReadableTable, TableError, WriteTransaction};

use super::Store;
use super::settings::{LanesPolicy, Settings};
use crate::error::{BoxError, Error, Result};
use crate::event::LaneOf;
use crate::limits::LANES_LOOK;
use crate::log::forgotten::Forgotten;
use crate::log::keys::{self, SeenKey};
use crate::log::seen::Head;
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{LANES_KEPT, SEEN, read_u64s, scopes, u64s};

type Row = &'static [u8];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct LaneCounts {
    pub(super) lanes: u64,
    pub(super) gaps: u64,
    pub(super) forgotten: u64,
    /// When a file of format 5 was brought up, by the age of the store: when something came last of lanes before that nobody knows.
    pub(super) since_ms: u64,
}

impl LaneCounts {
    pub(super) fn of(kept: &impl ReadableTable<Row, Row>, scope: &str) -> Result<Self> {
        let Some(row) = kept.get(keys::lanes_kept(scope).as_slice())? else { return Ok(Self::default()) };
        let counts = match read_u64s(row.value()) {
            Some([lanes, gaps, forgotten, since_ms]) => Some(Self { lanes, gaps, forgotten, since_ms }),
            None => read_u64s(row.value()).map(|[lanes, gaps, forgotten]| Self {
                lanes,
                gaps,
                forgotten,
                since_ms: 0,
            }),
        };
        counts.ok_or_else(|| damaged_row("seen"))
    }

    pub(super) fn put(self, kept: &mut redb::Table<'_, Row, Row>, scope: &str) -> Result<()> {
        let row = u64s([self.lanes, self.gaps, self.forgotten, self.since_ms]);
        kept.insert(keys::lanes_kept(scope).as_slice(), row.as_slice())?;
        Ok(())
    }
}

/// Format 5 did not count them. `age_ms`: of the store.
pub(super) fn count_lanes(tx: &WriteTransaction, age_ms: u64) -> std::result::Result<(), BoxError> {
    let (seen, mut kept) = (tx.open_table(SEEN)?, tx.open_table(LANES_KEPT)?);
    let mut counts: HashMap<String, LaneCounts> = HashMap::new();
    for row in seen.iter()? {
        let (key, _) = row?;
        let (Some(scope), Some(kind)) = (keys::scope_of(key.value()), keys::seen_kind(key.value())) else {
            continue;
        };
        let counts = counts.entry(scope.to_owned()).or_default();
        match kind {
            SeenKey::Head => counts.lanes += 1,
            SeenKey::Hole => counts.gaps += 1,
            SeenKey::Other => {}
        }
    }
    for (scope, counts) in counts {
        if LaneCounts::of(&kept, &scope)? == LaneCounts::default() {
            LaneCounts { since_ms: age_ms, ..counts }.put(&mut kept, &scope)?;
        }
    }
    Ok(())
}

/// Where the search for idle lanes goes on, by scope: in memory alone.
#[derive(Debug, Default)]
pub(crate) struct IdleSearch(Mutex<HashMap<String, Vec<u8>>>);

impl IdleSearch {
    fn from(&self, scope: &str) -> Vec<u8> {
        let places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.get(scope).cloned().unwrap_or_else(|| keys::inbox(scope, &[]))
    }

    fn go_on(&self, scope: &str, at: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(scope.to_owned(), at);
    }
}

/// Whether the lane may have been forgotten.
pub(super) fn is_forgotten(kept: &impl ReadableTable<Row, Row>, scope: &str, lane: LaneOf) -> Result<bool> {
    Ok(forgotten_of(kept, &keys::lanes_forgotten(scope, lane))?.contains(lane.id))
}

fn forgotten_of(kept: &impl ReadableTable<Row, Row>, key: &[u8]) -> Result<Forgotten> {
    let Some(row) = kept.get(key)? else { return Ok(Forgotten::default()) };
    Forgotten::from_bytes(key, row.value()).ok_or_else(|| damaged_row("seen"))
}

/// Room for one more lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LaneRoom {
    Free,
    /// In the place of the lane with this head, which is idle.
    Of(Vec<u8>),
}

/// Whether a new lane may be kept. [`Error::LanesFull`] if not.
pub(super) fn room_for_lane(
    seen: &impl ReadableTable<Row, Row>,
    kept: &impl ReadableTable<Row, Row>,
    scope: &str,
    settings: &Settings,
    search: &IdleSearch,
    age_ms: u64,
) -> Result<LaneRoom> {
    let lanes_max = settings.lanes_max;
    if lanes_max == u64::MAX {
        return Ok(LaneRoom::Free);
    }
    let counts = LaneCounts::of(kept, scope)?;
    if counts.lanes < lanes_max {
        return Ok(LaneRoom::Free);
    }
    let full = || Error::LanesFull { scope: scope.to_owned(), lanes_max };
    let LanesPolicy::ForgetIdle(idle) = settings.lanes_policy else { return Err(full()) };
    let idle_ms = crate::time::as_ms(idle);
    let (begin, end) = (keys::inbox(scope, &[]), keys::after_prefix(&keys::inbox(scope, &[])));
    let first = search.from(scope).max(begin.clone());
    let (mut from, mut wrapped) = (first.clone(), false);
    for _ in 0..LANES_LOOK {
        let Some(row) = seen.range(from.as_slice()..end.as_slice())?.next() else {
            if std::mem::replace(&mut wrapped, true) {
                break;
            }
            from.clone_from(&begin);
            continue;
        };
        let (key, row) = row?;
        let key = key.value();
        if wrapped && key >= first.as_slice() {
            break;
        }
        match keys::seen_kind(key) {
            Some(SeenKey::Head) => {
                let head = Head::from_bytes(key, row.value());
                // One that is damaged says nothing of its age.
                if head.is_some_and(|head| head.is_idle(counts.since_ms, age_ms, idle_ms)) {
                    search.go_on(scope, key.to_vec());
                    return Ok(LaneRoom::Of(key.to_vec()));
                }
                from = keys::after_prefix(keys::lane_of_seen(key));
            }
            _ => from = [key, &[0]].concat(),
        }
    }
    search.go_on(scope, from);
    Err(full())
}

/// Removes all rows of an idle lane, and notes that it was there.
pub(super) fn forget(
    seen: &mut redb::Table<'_, Row, Row>,
    kept: &mut redb::Table<'_, Row, Row>,
    scope: &str,
    head: &[u8],
) -> Result<()> {
    let known = seen.get(head)?.and_then(|row| Head::from_bytes(head, row.value()));
    let (Some(known), Some((producer, id))) = (known, keys::split_head(head)) else { return Ok(()) };
    let mut forgotten = forgotten_of(kept, producer)?;
    forgotten.add(id);
    kept.insert(producer, forgotten.to_bytes(producer).as_slice())?;
    let lane = keys::lane_of_seen(head);
    seen.retain_in(lane..keys::after_prefix(lane).as_slice(), |_, _| false)?;
    let counts = LaneCounts::of(kept, scope)?;
    let counts = LaneCounts {
        lanes: counts.lanes.saturating_sub(1),
        gaps: counts.gaps.saturating_sub(known.holes),
        forgotten: counts.forgotten + 1,
        ..counts
    };
    counts.put(kept, scope)
}

impl Store {
    /// How many lanes and gaps each of these scopes keeps; and of others that keep any.
    pub(super) fn lane_counts(&self) -> Result<Vec<(String, LaneCounts)>> {
        self.core().reading(|tx| {
            let kept = match tx.open_table(LANES_KEPT) {
                Ok(kept) => kept,
                Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            let mut counts = Vec::new();
            for scope in scopes(&kept, "seen")? {
                let of_scope = LaneCounts::of(&kept, &scope)?;
                counts.push((scope, of_scope));
            }
            Ok(counts)
        })
    }
}
