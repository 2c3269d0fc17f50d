//! The deliveries that a consumer has in hand for longer than one try: the bytes of their rows.
//! Pure.
//!
//! ```text
//! tries   failures u32 │ deaths u32 │ shared u32 │ open u8 │ parked number u64, or its highest value │ crc32 u32
//! parked  flags u8: 1 it has waited for its gap │ name u16 + bytes │ a rejected delivery (log/rejected.rs) │ crc32 u32
//! ```
//!
//! Little-endian. The CRC-32 (IEEE) covers the row's key and everything before it.
//!
//! **Invariant.** Decoding never panics and never allocates more than the row is long, whatever the
//! bytes.

use super::dedup::{sealed, unsealed};
use super::rejected::RejectedRow;
use super::wire_bytes::{Malformed, Reader};

/// A try that has begun, and whose end is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Open {
    #[default]
    None,
    /// Tries of other deliveries ran too. If the process dies, each delivery may be the cause.
    Shared,
    /// No other try ran. If the process dies, this delivery is the cause.
    Alone,
}

/// The remembered tries of one delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Tries {
    /// Tries that the handler ended with an error.
    pub(crate) failures: u32,
    /// Tries during which the process died while nothing else was tried.
    pub(crate) deaths: u32,
    /// Deaths of the process that this delivery, or another one, may have caused.
    pub(crate) shared: u32,
    pub(crate) open: Open,
}

/// A row of tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct TriesRow {
    pub(crate) tries: Tries,
    /// The number under which the delivery is parked.
    pub(crate) parked: Option<u64>,
}

/// A parked delivery, which the consumer has acknowledged to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParkedRow {
    /// Whether the delivery has waited for the gap before it.
    pub(crate) waited: bool,
    /// The name of its row of tries.
    pub(crate) name: Vec<u8>,
    pub(crate) delivery: RejectedRow,
}

impl TriesRow {
    pub(crate) fn to_bytes(self, key: &[u8]) -> Vec<u8> {
        let Tries { failures, deaths, shared, open } = self.tries;
        let mut out = Vec::with_capacity(25);
        for number in [failures, deaths, shared] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(open as u8);
        out.extend_from_slice(&self.parked.unwrap_or(u64::MAX).to_le_bytes());
        sealed(key, out)
    }

    /// Reads a row; `None` if it is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(unsealed(key, bytes)?);
        let mut read = || -> Result<Self, Malformed> {
            let (failures, deaths, shared) = (reader.u32()?, reader.u32()?, reader.u32()?);
            let open = match reader.u8()? {
                0 => Open::None,
                1 => Open::Shared,
                2 => Open::Alone,
                _ => return Err(Malformed("a try in it is of an unknown kind")),
            };
            let parked = Some(reader.u64()?).filter(|number| *number < u64::MAX);
            reader.end()?;
            Ok(Self { tries: Tries { failures, deaths, shared, open }, parked })
        };
        read().ok()
    }
}

impl ParkedRow {
    pub(crate) fn to_bytes(&self, key: &[u8]) -> Vec<u8> {
        let mut out = vec![u8::from(self.waited)];
        let len = u16::try_from(self.name.len()).expect("a name is made of bounded parts");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&self.name);
        out.extend_from_slice(&self.delivery.to_bytes(key));
        sealed(key, out)
    }

    /// Checks a row and reads it, or returns what is wrong with it.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Result<Self, &'static str> {
        let mut reader = Reader(unsealed(key, bytes).ok_or("its checksum does not match")?);
        let mut front = || -> Result<(bool, Vec<u8>), Malformed> {
            let waited = reader.u8()? & 1 == 1;
            let len = usize::from(reader.u16()?);
            Ok((waited, reader.take(len)?.to_vec()))
        };
        let (waited, name) = front().map_err(|Malformed(what)| what)?;
        Ok(Self { waited, name, delivery: RejectedRow::from_bytes(key, reader.0)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::Message;

    fn parked(payload: Vec<u8>, name: Vec<u8>, waited: bool) -> ParkedRow {
        let delivery = RejectedRow {
            since_ms: 7,
            attempts: 0,
            recheck: false,
            reason: String::new(),
            exchange: "e".into(),
            routing_key: "r".into(),
            message: Message { message_id: Some("m".into()), payload, ..Message::default() },
        };
        ParkedRow { waited, name, delivery }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal: a row is read as it was written, and no changed byte and no row of another place
        /// is believed.
        #[test]
        fn what_is_written_is_read_back(
            payload in prop::collection::vec(any::<u8>(), 0..50),
            name in prop::collection::vec(any::<u8>(), 0..300),
            counts in any::<[u32; 3]>(),
            open in 0..3_usize,
            number in prop::option::of(0..u64::MAX),
            waited in any::<bool>(),
            at in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let row = parked(payload, name, waited);
            let mut bytes = row.to_bytes(b"key");
            prop_assert_eq!(ParkedRow::from_bytes(b"key", &bytes), Ok(row));
            prop_assert!(ParkedRow::from_bytes(b"other", &bytes).is_err());
            let at_byte = at.index(bytes.len());
            bytes[at_byte] ^= flip;
            prop_assert!(ParkedRow::from_bytes(b"key", &bytes).is_err());

            let open = [Open::None, Open::Shared, Open::Alone][open];
            let [failures, deaths, shared] = counts;
            let row = TriesRow { tries: Tries { failures, deaths, shared, open }, parked: number };
            let mut bytes = row.to_bytes(b"key");
            prop_assert_eq!(TriesRow::from_bytes(b"key", &bytes), Some(row));
            prop_assert_eq!(TriesRow::from_bytes(b"other", &bytes), None);
            let at_byte = at.index(bytes.len());
            bytes[at_byte] ^= flip;
            prop_assert_eq!(TriesRow::from_bytes(b"key", &bytes), None);
        }

        /// Goal: decoding ends without a panic for any bytes, also with a right checksum.
        #[test]
        fn hostile_bytes_do_not_panic(row in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ParkedRow::from_bytes(b"key", &sealed(b"key", row.clone()));
            let _ = TriesRow::from_bytes(b"key", &sealed(b"key", row.clone()));
            let _ = ParkedRow::from_bytes(b"key", &row);
            let _ = TriesRow::from_bytes(b"key", &row);
        }
    }
}
