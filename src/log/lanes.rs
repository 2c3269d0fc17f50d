//! The next number of each lane.

use crate::event::Lane;

/// A lane's id and its next number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneState {
    pub(crate) id: u64,
    pub(crate) next: u64,
}

impl LaneState {
    /// Returns the lane that begins with the event at `seq`.
    pub(crate) fn beginning_at(seq: u64) -> Self {
        Self { id: seq, next: 0 }
    }

    /// Takes the next number.
    pub(crate) fn take(&mut self) -> Lane {
        let number = self.next;
        self.next += 1;
        Lane { id: self.id, number }
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes.first_chunk_mut::<8>().expect("16 bytes").copy_from_slice(&self.id.to_le_bytes());
        bytes.last_chunk_mut::<8>().expect("16 bytes").copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (id, next) = bytes.split_first_chunk::<8>()?;
        Some(Self { id: u64::from_le_bytes(*id), next: u64::from_le_bytes(next.try_into().ok()?) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip() {
        let state = LaneState { id: 3, next: 8 };
        assert_eq!(LaneState::from_bytes(&state.to_bytes()), Some(state));
        assert_eq!(LaneState::from_bytes(&[0; 15]), None);
    }
}
