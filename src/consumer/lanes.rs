//! How many lanes and gaps a scope keeps, and which lanes it forgets for others.
//!
//! ```text
//! (scope)                → lanes u64, gaps u64, lanes that were forgotten u64 [, since ms u64]
//! (scope, store, epoch)  → forgotten lanes of this producer      (log/forgotten.rs)
//! ```
//!
//! These rows are written when a lane begins, a gap comes or goes, or a lane is forgotten. A
//! delivery in order writes only its lane's high-water mark.
//!
//! **Invariant.** A lane goes with all its rows, in one transaction that adds its id to the
//! forgotten ones. A message of such a lane is a conflict, since it may be a repeat. A gap that is
//! forgotten leaves its numbers below the lane's next one, so they are conflicts too.

use redb::{ReadableTable, TableError};

use crate::error::{Error, Result};
use crate::event::LaneOf;
use crate::log::dedup::HighWater;
use crate::log::forgotten::Forgotten;
use crate::log::keys::{self, DedupKey};
use crate::storage::errors::damaged_row;
use crate::storage::tables::lanes_kept::LaneCounts;
use crate::storage::tables::schema::{LANES_KEPT, scopes};
use crate::store::Store;
use crate::store::settings::{LanesPolicy, Settings};
use crate::store::shared::consumers::IdleSearch;
use crate::tuning::LANES_LOOK;

type Row = &'static [u8];

/// Whether the lane may have been forgotten.
pub(crate) fn is_forgotten(kept: &impl ReadableTable<Row, Row>, scope: &str, lane: LaneOf) -> Result<bool> {
    Ok(forgotten_of(kept, &keys::lanes_forgotten(scope, lane))?.contains(lane.id))
}

fn forgotten_of(kept: &impl ReadableTable<Row, Row>, key: &[u8]) -> Result<Forgotten> {
    let Some(row) = kept.get(key)? else { return Ok(Forgotten::default()) };
    Forgotten::from_bytes(key, row.value()).ok_or_else(|| damaged_row("seen"))
}

/// Room for one more lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LaneRoom {
    Free,
    /// Room in the place of the idle lane whose high-water mark has this key.
    Of(Vec<u8>),
}

/// Finds room for a new lane. Fails with [`Error::LanesFull`] if there is none.
pub(crate) fn room_for_lane(
    dedup: &impl ReadableTable<Row, Row>,
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
        let Some(row) = dedup.range(from.as_slice()..end.as_slice())?.next() else {
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
        match keys::dedup_kind(key) {
            Some(DedupKey::HighWater) => {
                let high_water = HighWater::from_bytes(key, row.value());
                // A damaged row does not tell its age.
                if high_water.is_some_and(|high_water| high_water.is_idle(counts.since_ms, age_ms, idle_ms)) {
                    search.go_on(scope, key.to_vec());
                    return Ok(LaneRoom::Of(key.to_vec()));
                }
                from = keys::after_prefix(keys::dedup_lane(key));
            }
            _ => from = [key, &[0]].concat(),
        }
    }
    search.go_on(scope, from);
    Err(full())
}

/// Removes all rows of an idle lane, and notes the lane among the forgotten ones.
pub(crate) fn forget(
    dedup: &mut redb::Table<'_, Row, Row>,
    kept: &mut redb::Table<'_, Row, Row>,
    scope: &str,
    key: &[u8],
) -> Result<()> {
    let known = dedup.get(key)?.and_then(|row| HighWater::from_bytes(key, row.value()));
    let (Some(known), Some((producer, id))) = (known, keys::split_high_water(key)) else { return Ok(()) };
    let mut forgotten = forgotten_of(kept, producer)?;
    forgotten.add(id);
    kept.insert(producer, forgotten.to_bytes(producer).as_slice())?;
    let lane = keys::dedup_lane(key);
    dedup.retain_in(lane..keys::after_prefix(lane).as_slice(), |_, _| false)?;
    let counts = LaneCounts::of(kept, scope)?;
    let counts = LaneCounts {
        lanes: counts.lanes.saturating_sub(1),
        gaps: counts.gaps.saturating_sub(known.gaps),
        forgotten: counts.forgotten + 1,
        ..counts
    };
    counts.put(kept, scope)
}

impl Store {
    /// Returns how many lanes and gaps each of these scopes keeps, and each other scope that keeps
    /// any.
    pub(crate) fn lane_counts(&self) -> Result<Vec<(String, LaneCounts)>> {
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
