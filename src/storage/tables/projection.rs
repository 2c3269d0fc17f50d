//! The row of a projection: the progress of its tables, and of a rebuild.
//!
//! ```text
//! onewrite.projections  name → id u64, version u64, position u64, rebuild id u64 (0: none), rebuild version u64,
//!                              rebuild position u64, crc32 u64 (of the name and the six before)
//! ```

use super::schema::{read_u64s, u64s};
use crate::log::keys::CursorId;
use crate::log::record;

/// A progress through the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Track {
    pub(crate) id: CursorId,
    pub(crate) version: u32,
    pub(crate) position: u64,
}

/// A projection, as its row holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProjectionRow {
    pub(crate) live: Track,
    pub(crate) rebuild: Option<Track>,
}

/// Which of the two tracks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Live,
    Rebuild,
}

impl ProjectionRow {
    pub(crate) fn track(&self, which: Which) -> Option<Track> {
        match which {
            Which::Live => Some(self.live),
            Which::Rebuild => self.rebuild,
        }
    }

    pub(crate) fn tracks(&self) -> impl Iterator<Item = Track> {
        std::iter::once(self.live).chain(self.rebuild)
    }

    /// Returns the first record that must not be trimmed.
    pub(crate) fn wants_from(&self) -> u64 {
        self.tracks().map(|track| track.position).min().unwrap_or(0)
    }

    fn numbers(&self) -> [u64; 6] {
        let numbers = |track: Track| [u64::from(track.id), u64::from(track.version), track.position];
        let [a, b, c] = numbers(self.live);
        let [d, e, f] = self.rebuild.map(numbers).unwrap_or_default();
        [a, b, c, d, e, f]
    }

    fn checksum(name: &str, numbers: [u64; 6]) -> u64 {
        record::body_checksum(&[name.as_bytes(), &u64s(numbers)].concat()).into()
    }

    pub(crate) fn to_bytes(self, name: &str) -> Vec<u8> {
        let numbers = self.numbers();
        [u64s(numbers), u64s([Self::checksum(name, numbers)])].concat()
    }

    pub(crate) fn from_bytes(name: &str, bytes: &[u8]) -> Option<Self> {
        let [id, version, position, rebuild_id, rebuild_version, rebuild_position, crc] = read_u64s(bytes)?;
        let row = Self {
            live: Track { id: id.try_into().ok()?, version: version.try_into().ok()?, position },
            rebuild: match CursorId::try_from(rebuild_id).ok()? {
                0 => None,
                id => {
                    let version = rebuild_version.try_into().ok()?;
                    Some(Track { id, version, position: rebuild_position })
                }
            },
        };
        (Self::checksum(name, row.numbers()) == crc).then_some(row)
    }
}
