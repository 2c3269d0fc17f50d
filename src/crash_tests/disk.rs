//! A disk in memory that keeps what was done to it, and what a power cut could have left of that.
//!
//! Synced bytes survive a cut. Bytes that were only written may be there, or be missing, or be there in
//! part. Writes survive in any order, but two writes of the same bytes keep theirs. [`Damage`] names
//! the ways in which the images are made.

use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{BackendError, StorageBackend};

use crate::storage::database::{Medium, Refusal};
use crate::storage::metered::{Counted, IoCounters};

/// SplitMix64: the same draws for the same seed, everywhere.
#[derive(Debug, Clone)]
pub(super) struct Rng(u64);

impl Rng {
    /// A stream of draws of its own for each of these numbers.
    pub(super) fn of(numbers: &[u64]) -> Self {
        let mut rng = Self(0x6f6e_6577_7269_7465);
        for number in numbers {
            rng.0 = rng.next() ^ number;
        }
        rng
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(super) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What changes a disk.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Write(usize, Arc<[u8]>),
    SetLen(usize),
    Sync,
}

/// What is cut off at which operation, and for how long. Reads count too.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) at: usize,
    pub(super) lasting: bool,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Op>,
    calls: usize,
    fault: Option<Fault>,
    failed: Vec<&'static str>,
    /// Calls that changed something, or tried to, after a sync that had failed.
    after_failed_sync: usize,
}

/// A handle of the disk; each database that is opened on it has one.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State { bytes, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the process sees.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Writes, changes of the length and syncs so far.
    pub(super) fn ops(&self) -> usize {
        self.state().log.len()
    }

    pub(super) fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut self.state().log)
    }

    /// Calls of every kind so far, reads among them.
    pub(super) fn calls(&self) -> usize {
        self.state().calls
    }

    pub(super) fn fail(&self, fault: Fault) {
        self.state().fault = Some(fault);
    }

    /// The names of the calls that were made to fail.
    pub(super) fn failed(&self) -> Vec<&'static str> {
        self.state().failed.clone()
    }

    pub(super) fn after_failed_sync(&self) -> usize {
        self.state().after_failed_sync
    }

    /// The state, unless this call is to fail.
    fn call(&self, what: &'static str) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        let at = state.calls;
        state.calls += 1;
        if what != "read" && state.failed.contains(&"sync") {
            state.after_failed_sync += 1;
        }
        let fails = |fault: Fault| at == fault.at || (fault.lasting && at > fault.at);
        if state.fault.is_some_and(fails) {
            state.failed.push(what);
            return Err(io::Error::other(format!("simulated: {what} fails at call {at}")));
        }
        Ok(state)
    }
}

impl Medium for Disk {
    type Backend = Counted<Self>;

    fn backend(&self, io: &Arc<IoCounters>) -> Result<Self::Backend, Refusal> {
        Ok(Counted { file: self.clone(), counters: Arc::clone(io), unless_journaled: true })
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.call("read")?;
        let from = offset as usize;
        let bytes = state.bytes.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.call("set_len")?;
        let op = Op::SetLen(len as usize);
        apply(&mut state.bytes, &op);
        state.log.push(op);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.call("sync")?.log.push(Op::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.call("write")?;
        let op = Op::Write(offset as usize, data.into());
        apply(&mut state.bytes, &op);
        state.log.push(op);
        Ok(())
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
}

/// As the operation says. A write beyond the end makes the file longer.
fn apply(bytes: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => {
            let end = offset + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset..end].copy_from_slice(data);
        }
        Op::SetLen(len) => bytes.resize(*len, 0),
        Op::Sync => {}
    }
}

pub(super) fn apply_all(bytes: &mut Vec<u8>, ops: &[Op]) {
    ops.iter().for_each(|op| apply(bytes, op));
}

/// What of the unsynced has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    Nothing,
    Everything,
    /// Each operation or not, by a draw.
    Drawn,
    /// Each unit of so many bytes of each write, by a draw.
    Torn(usize),
    /// Each write whole, not at all, up to some byte, or from some byte on.
    TornAnywhere,
    /// The newest alone.
    NewestAlone,
    /// All but one, by a draw.
    AllButOne,
}

impl Damage {
    pub(super) const ALL: [Self; 8] = [
        Self::Everything,
        Self::Drawn,
        Self::Torn(512),
        Self::Torn(4096),
        Self::TornAnywhere,
        Self::NewestAlone,
        Self::AllButOne,
        Self::Nothing,
    ];
}

/// What is found after a cut: all of `durable`, and of `unsynced` what the damage lets through.
pub(super) fn image(durable: &[u8], unsynced: &[Op], damage: Damage, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    // The blocks may have been written and the file's length not.
    let len_is_kept = rng.one_in(2);
    let missing = rng.index(unsynced.len());
    for (at, op) in unsynced.iter().enumerate() {
        let before = bytes.len();
        let whole = match damage {
            Damage::Nothing => false,
            Damage::Everything => true,
            Damage::Drawn => rng.one_in(2),
            Damage::Torn(_) | Damage::TornAnywhere => rng.one_in(3),
            Damage::NewestAlone => at + 1 == unsynced.len(),
            Damage::AllButOne => at != missing,
        };
        match (op, damage) {
            _ if whole => apply(&mut bytes, op),
            (Op::Write(offset, data), Damage::Torn(unit)) => {
                for (part, from) in data.chunks(unit).zip((*offset..).step_by(unit)) {
                    if rng.one_in(2) {
                        apply(&mut bytes, &Op::Write(from, part.into()));
                    }
                }
            }
            (Op::Write(offset, data), Damage::TornAnywhere) => {
                let at = rng.index(data.len() + 1);
                let (from, part) = if rng.one_in(2) { (0, &data[..at]) } else { (at, &data[at..]) };
                if rng.one_in(4) {
                    // Not at all.
                } else {
                    apply(&mut bytes, &Op::Write(offset + from, part.into()));
                }
            }
            _ => {}
        }
        if len_is_kept && matches!(op, Op::Write(..)) {
            bytes.truncate(before);
        }
    }
    bytes
}
