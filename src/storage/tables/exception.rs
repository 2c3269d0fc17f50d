//! The rows of events that a relay does not publish in order: retried, scheduled, quarantined,
//! discarded.
//!
//! ```text
//! exception row:  state u8 │ time ms u64 │ holds key u8 │ attempts u32 │ destination attempts u32 │
//!                 has key u8 │ [key t8] │ has fault u8 │ [class u8 │ code u16 (0: none) │ text t16]
//! ```
//!
//! State 0 is *retry* (time: due), 1 *scheduled* (time: due), 2 *quarantined* (time: since), 3
//! *discarded* (until the position has passed). Rows of state 0 and 1 also have a row in the due
//! table.

use crate::delivery::types::{Exception, ExceptionState, Key};
use crate::error::Result;
use crate::log::wire_bytes::{Malformed, Reader, put_text8, put_text16};
use crate::message::{Fault, FaultClass};
use crate::storage::errors::damaged_row;

/// The longest kept text of a fault, in bytes.
const FAULT_TEXT_BYTES_MAX: usize = 1024;

/// An exception with the key of its event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExceptionRow {
    pub(crate) key: Option<Key>,
    pub(crate) exception: Exception,
}

impl ExceptionRow {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let (state, time_ms, holds_key) = match self.exception.state {
            ExceptionState::Retry { due_ms } => (0, due_ms, false),
            ExceptionState::Scheduled { due_ms } => (1, due_ms, false),
            ExceptionState::Quarantined { at_ms, holds_key } => (2, at_ms, holds_key),
            ExceptionState::Discarded => (3, 0, false),
        };
        let mut out = vec![state];
        out.extend_from_slice(&time_ms.to_le_bytes());
        out.push(u8::from(holds_key));
        out.extend_from_slice(&self.exception.attempts.to_le_bytes());
        out.extend_from_slice(&self.exception.destination_attempts.to_le_bytes());
        out.push(u8::from(self.key.is_some()));
        if let Some(key) = &self.key {
            put_text8(&mut out, key);
        }
        out.push(u8::from(self.exception.fault.is_some()));
        if let Some(fault) = &self.exception.fault {
            out.push(class_number(fault.class));
            out.extend_from_slice(&fault.code.unwrap_or(0).to_le_bytes());
            put_text16(&mut out, head(&fault.text, FAULT_TEXT_BYTES_MAX));
        }
        out
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::read(bytes).map_err(|_| damaged_row("exception"))
    }

    fn read(bytes: &[u8]) -> std::result::Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let (state, time_ms, holds_key) = (reader.u8()?, reader.u64()?, reader.u8()? != 0);
        let state = match state {
            0 => ExceptionState::Retry { due_ms: time_ms },
            1 => ExceptionState::Scheduled { due_ms: time_ms },
            2 => ExceptionState::Quarantined { at_ms: time_ms, holds_key },
            3 => ExceptionState::Discarded,
            _ => return Err(Malformed("its state is unknown")),
        };
        let (attempts, destination_attempts) = (reader.u32()?, reader.u32()?);
        let key = if reader.u8()? != 0 { Some(Key::from(reader.text8()?)) } else { None };
        let fault = if reader.u8()? != 0 {
            let class = class_of(reader.u8()?).ok_or(Malformed("its fault class is unknown"))?;
            let code = Some(reader.u16()?).filter(|code| *code != 0);
            Some(Fault { class, code, text: reader.text16()?.to_owned() })
        } else {
            None
        };
        reader.end()?;
        Ok(Self { key, exception: Exception { state, attempts, destination_attempts, fault } })
    }
}

const CLASSES: [FaultClass; 6] = [
    FaultClass::Message,
    FaultClass::Destination,
    FaultClass::Outage,
    FaultClass::Config,
    FaultClass::Expired,
    FaultClass::Undecodable,
];

fn class_number(class: FaultClass) -> u8 {
    CLASSES.iter().position(|known| *known == class).and_then(|at| u8::try_from(at).ok()).unwrap_or(0)
}

fn class_of(number: u8) -> Option<FaultClass> {
    CLASSES.get(usize::from(number)).copied()
}

/// Returns the beginning of a text, cut between characters.
pub(crate) fn head(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

pub(crate) fn due_of(state: ExceptionState) -> Option<u64> {
    match state {
        ExceptionState::Retry { due_ms } | ExceptionState::Scheduled { due_ms } => Some(due_ms),
        ExceptionState::Quarantined { .. } | ExceptionState::Discarded => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip_with_a_cut_text() {
        let fault = Fault::with_code(FaultClass::Destination, 404, "ä".repeat(1000));
        for state in [
            ExceptionState::Retry { due_ms: 5 },
            ExceptionState::Scheduled { due_ms: 6 },
            ExceptionState::Quarantined { at_ms: 7, holds_key: true },
            ExceptionState::Discarded,
        ] {
            let exception =
                Exception { state, attempts: 1, destination_attempts: 2, fault: Some(fault.clone()) };
            let row = ExceptionRow { key: Some("alice".into()), exception };
            let back = ExceptionRow::from_bytes(&row.to_bytes()).unwrap();
            assert_eq!(back.exception.state, state);
            assert_eq!(back.exception.fault.unwrap().text, "ä".repeat(512));
            assert_eq!(back.key.as_deref(), Some("alice"));
        }
        assert!(ExceptionRow::from_bytes(&[9; 30]).is_err());
    }
}
