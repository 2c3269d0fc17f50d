//! A record of the log, read from its description in docs/file-format.md ("A record") and from nothing else.

/// A checked record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    pub end_offset: u64,
    pub time_ms: u64,
    /// `u64::MAX`: published nowhere.
    pub lane: u64,
    pub lane_number: u64,
    pub crc: u32,
    pub revision: Option<u64>,
    /// As it stands in `message_id`.
    pub id: String,
    pub event_type: String,
    pub stream: Option<String>,
    pub key: Option<String>,
    /// Exchange and routing key.
    pub to: Option<(String, String)>,
    pub payload: Vec<u8>,
}

const HEAD_BYTES: usize = 44;

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<u64, String> {
        let taken = self.take(bytes)?;
        Ok(taken.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn text(&mut self, len_bytes: usize) -> Result<String, String> {
        let len = usize::try_from(self.number(len_bytes)?).map_err(|_| "a text is too long")?;
        String::from_utf8(self.take(len)?.to_vec()).map_err(|_| "a text is not UTF-8".into())
    }
}

/// Checks and reads the record that stands at `seq`.
///
/// # Errors
/// What is wrong with it.
pub fn read(seq: u64, bytes: &[u8]) -> Result<Record, String> {
    let mut head = Bytes(bytes);
    if head.take(2)? != b"OW" || head.number(1)? != 1 {
        return Err("it does not begin as a record of version 1".into());
    }
    let frame_flags = head.number(1)?;
    let crc = u32::try_from(head.number(4)?).map_err(|error| error.to_string())?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&seq.to_le_bytes());
    hasher.update(bytes.get(8..).unwrap_or_default());
    if hasher.finalize() != crc {
        return Err("its checksum is wrong".into());
    }
    let mut record =
        Record { crc, end_offset: head.number(8)?, time_ms: head.number(8)?, ..Record::default() };
    (record.lane, record.lane_number) = (head.number(8)?, head.number(8)?);
    let body_len = head.number(4)?;
    debug_assert_eq!(bytes.len() - head.0.len(), HEAD_BYTES);
    if frame_flags & !1 != 0 {
        return Err("its frame has a flag that is unknown".into());
    }
    if frame_flags & 1 == 1 {
        record.revision = Some(head.number(8)?);
    }
    if head.0.len() as u64 != body_len {
        return Err("its body is not as long as its head says".into());
    }
    read_body(head, &mut record)?;
    if record.stream.is_some() != record.revision.is_some() {
        return Err("it has a stream without a revision, or a revision without a stream".into());
    }
    Ok(record)
}

fn read_body(mut body: Bytes<'_>, record: &mut Record) -> Result<(), String> {
    let flags = body.number(2)?;
    if flags >> 13 != 0 {
        return Err("its body has a flag that is unknown".into());
    }
    let has = |bit: u32| flags >> bit & 1 == 1;
    record.id = if has(0) { uuid(body.take(16)?) } else { body.text(1)? };
    record.event_type = body.text(1)?;
    record.stream = has(11).then(|| body.text(1)).transpose()?;
    record.key = has(1).then(|| body.text(1)).transpose()?;
    record.to = has(2).then(|| Ok::<_, String>((body.text(1)?, body.text(1)?))).transpose()?;
    for bit in [3, 4, 5, 6] {
        if has(bit) {
            body.text(1)?;
        }
    }
    if has(7) {
        body.text(2)?;
    }
    for bit in [8, 9] {
        if has(bit) {
            body.number(8)?;
        }
    }
    if has(12) {
        body.number(4)?;
    }
    if has(10) {
        for _ in 0..body.number(2)? {
            body.text(1)?;
            match body.number(1)? {
                0 | 3 => {
                    let len = body.number(4)?;
                    body.take(usize::try_from(len).map_err(|error| error.to_string())?)?;
                }
                1 => drop(body.number(8)?),
                2 => drop(body.number(1)?),
                kind => return Err(format!("a header is of the unknown kind {kind}")),
            }
        }
    }
    record.payload = body.0.to_vec();
    Ok(())
}

fn uuid(bytes: &[u8]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| hex.get(part).unwrap_or_default());
    parts.join("-")
}
