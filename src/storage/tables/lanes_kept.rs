//! The row that counts the lanes and gaps of a scope. `consumer/lanes.rs` uses it.

use std::collections::HashMap;

use redb::{ReadableTable, WriteTransaction};

use super::schema::{DEDUP, LANES_KEPT, read_u64s, u64s};
use crate::error::{BoxError, Result};
use crate::log::keys::{self, DedupKey};
use crate::storage::errors::damaged_row;

type Row = &'static [u8];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LaneCounts {
    pub(crate) lanes: u64,
    pub(crate) gaps: u64,
    pub(crate) forgotten: u64,
    /// The store age at the upgrade of a format 5 file. It stands for the time of a lane's last
    /// message if that time is unknown.
    pub(crate) since_ms: u64,
}

impl LaneCounts {
    pub(crate) fn of(kept: &impl ReadableTable<Row, Row>, scope: &str) -> Result<Self> {
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

    pub(crate) fn put(self, kept: &mut redb::Table<'_, Row, Row>, scope: &str) -> Result<()> {
        let row = u64s([self.lanes, self.gaps, self.forgotten, self.since_ms]);
        kept.insert(keys::lanes_kept(scope).as_slice(), row.as_slice())?;
        Ok(())
    }
}

/// Counts lanes and gaps, which format 5 did not count. `age_ms` is the store age.
pub(crate) fn count_lanes(tx: &WriteTransaction, age_ms: u64) -> std::result::Result<(), BoxError> {
    let (dedup, mut kept) = (tx.open_table(DEDUP)?, tx.open_table(LANES_KEPT)?);
    let mut counts: HashMap<String, LaneCounts> = HashMap::new();
    for row in dedup.iter()? {
        let (key, _) = row?;
        let (Some(scope), Some(kind)) = (keys::scope_of(key.value()), keys::dedup_kind(key.value())) else {
            continue;
        };
        let counts = counts.entry(scope.to_owned()).or_default();
        match kind {
            DedupKey::HighWater => counts.lanes += 1,
            DedupKey::Gap => counts.gaps += 1,
            DedupKey::Other => {}
        }
    }
    for (scope, counts) in counts {
        if LaneCounts::of(&kept, &scope)? == LaneCounts::default() {
            LaneCounts { since_ms: age_ms, ..counts }.put(&mut kept, &scope)?;
        }
    }
    Ok(())
}
