//! The frames of a journal. Each frame is what one sync made durable.
//!
//! ```text
//! frame   salt 8 · crc32 u32 · blocks u32 · number u64 · flags u32 · 0 u32 · block numbers u64… · zeros to 4,096 · blocks of 4,096
//! ```
//!
//! Little-endian. The salt is drawn for each generation, so an application's page is never taken
//! for a frame. The checksum (CRC-32, IEEE) covers everything after itself.
//!
//! Frames are numbered from 1, without a gap. They begin at a multiple of 4,096, so writing a frame
//! never touches a sector of the frame before. They follow one another from the beginning of a
//! half.

use std::collections::BTreeMap;

use crate::log::record::body_checksum;
use crate::tuning::JOURNAL_CHECKS_MAX;

/// The bytes of a block: a page of the storage engine, or a part of a larger page.
pub(super) const BLOCK: usize = 4096;

/// The written blocks of the file, by block number.
pub(super) type Blocks = BTreeMap<u64, Box<[u8]>>;

/// The first bytes of every frame of one generation.
pub(super) type Salt = [u8; 8];

const HEAD: usize = 32;
const CRC_AT: usize = 8;
const CHECKED_FROM: usize = 12;

/// The flag that everything before this frame is in the file already.
const RESET: u32 = 1;

/// Returns how many blocks a frame's head takes.
fn head_blocks(blocks: usize) -> usize {
    (HEAD + 8 * blocks).div_ceil(BLOCK)
}

/// Returns the bytes of a frame of so many blocks.
pub(super) fn frame_bytes(blocks: usize) -> usize {
    (head_blocks(blocks) + blocks) * BLOCK
}

/// Writes a frame over `out`. A frame without blocks says that everything before it is in the file.
pub(super) fn encode(salt: Salt, number: u64, blocks: &Blocks, out: &mut Vec<u8>) {
    out.clear();
    out.reserve_exact(frame_bytes(blocks.len()));
    let flags = if blocks.is_empty() { RESET } else { 0 };
    out.extend(salt);
    out.extend([0; 4]);
    out.extend(u32::try_from(blocks.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(number.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out.extend([0; 4]);
    for number in blocks.keys() {
        out.extend(number.to_le_bytes());
    }
    out.resize(head_blocks(blocks.len()) * BLOCK, 0);
    for block in blocks.values() {
        out.extend_from_slice(block);
    }
    let crc = body_checksum(out.get(CHECKED_FROM..).unwrap_or_default());
    if let Some(place) = out.get_mut(CRC_AT..CHECKED_FROM) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

/// A frame that was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    pub(super) number: u64,
    numbers: &'a [u8],
    data: &'a [u8],
    reset: bool,
}

impl<'a> Frame<'a> {
    fn bytes(&self) -> usize {
        frame_bytes(self.numbers.len() / 8)
    }

    fn blocks(&self) -> impl Iterator<Item = (u64, &'a [u8])> {
        let numbers = self.numbers.as_chunks::<8>().0.iter().map(|number| u64::from_le_bytes(*number));
        numbers.zip(self.data.chunks_exact(BLOCK))
    }

    /// Returns the frame at the beginning of `bytes` if it is whole. `checks` bounds the bytes that
    /// may still be summed.
    fn read(salt: Salt, bytes: &'a [u8], checks: &mut Checks) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(HEAD)?;
        let head = head.strip_prefix(&salt)?;
        let (crc, head) = head.split_first_chunk::<4>()?;
        let (blocks, head) = head.split_first_chunk::<4>()?;
        let (number, head) = head.split_first_chunk::<8>()?;
        let flags = head.first_chunk::<4>()?;
        let blocks = usize::try_from(u32::from_le_bytes(*blocks)).ok()?;
        let numbers = rest.get(..blocks.checked_mul(8)?)?;
        let frame_bytes = head_blocks(blocks).checked_add(blocks)?.checked_mul(BLOCK)?;
        let data = bytes.get(head_blocks(blocks) * BLOCK..frame_bytes)?;
        let checked = bytes.get(CHECKED_FROM..frame_bytes)?;
        if !checks.spend(checked.len()) || body_checksum(checked) != u32::from_le_bytes(*crc) {
            return None;
        }
        let reset = u32::from_le_bytes(*flags) & RESET != 0;
        Some(Self { number: u64::from_le_bytes(*number), numbers, data, reset })
    }
}

/// The bytes of which a checksum may still be computed.
///
/// A frame states its own length. Forged heads, one in each block, could each claim a frame that
/// reaches the end. Checking them would take time that grows with the square of the journal.
#[derive(Debug)]
struct Checks {
    left: usize,
    exceeded: bool,
}

impl Checks {
    fn of(journal_bytes: usize) -> Self {
        Self { left: journal_bytes.saturating_mul(JOURNAL_CHECKS_MAX), exceeded: false }
    }

    fn spend(&mut self, bytes: usize) -> bool {
        let left = self.left.checked_sub(bytes);
        self.exceeded |= left.is_none();
        self.left = left.unwrap_or(0);
        left.is_some()
    }
}

/// States of a journal that no crash leaves.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Odd {
    /// A frame differs from what was written, and newer frames follow. So this is no end that a
    /// crash has torn.
    Gap { number: u64 },
    /// Frames overlap.
    Overlap,
}

/// Returns the frames of a half, from its beginning for as long as each follows the one before.
/// Older frames may be behind them.
fn run<'a>(salt: Salt, half: &'a [u8], checks: &mut Checks) -> Vec<Frame<'a>> {
    let mut frames: Vec<Frame<'_>> = Vec::new();
    let mut at = 0;
    while let Some(frame) = half.get(at..).and_then(|bytes| Frame::read(salt, bytes, checks)) {
        if frames.last().is_some_and(|last| last.number.checked_add(1) != Some(frame.number)) {
            break;
        }
        at += frame.bytes();
        frames.push(frame);
    }
    frames
}

/// Returns the number of the newest frame at any place; 0 if there is none.
fn newest(salt: Salt, half: &[u8], checks: &mut Checks) -> u64 {
    let starts = (0..half.len()).step_by(BLOCK).filter_map(|at| half.get(at..));
    starts.filter_map(|bytes| Frame::read(salt, bytes, checks)).map(|frame| frame.number).max().unwrap_or(0)
}

/// Returns the blocks that may not be in the file yet, each in its newest form. They are in the
/// newer half alone. That half is begun only once the older half is in the file, and only then is
/// the older half overwritten.
pub(super) fn replay(salt: Salt, halves: [&[u8]; 2]) -> Result<BTreeMap<u64, &[u8]>, Odd> {
    let last = |frames: &[Frame<'_>]| frames.last().map_or(0, |frame| frame.number);
    let mut checks = Checks::of(halves.map(<[u8]>::len).iter().sum());
    let [a, b] = halves.map(|half| run(salt, half, &mut checks));
    let frames = if last(&a) > last(&b) { a } else { b };
    // A frame that a crash has torn is the newest there is.
    let newest = halves.map(|half| newest(salt, half, &mut checks));
    if checks.exceeded {
        return Err(Odd::Overlap);
    }
    if newest.into_iter().any(|newest| newest > last(&frames)) {
        return Err(Odd::Gap { number: last(&frames).saturating_add(1) });
    }
    let after = frames.iter().rposition(|frame| frame.reset).map_or(0, |reset| reset + 1);
    Ok(frames.iter().skip(after).flat_map(Frame::blocks).collect())
}

/// The entry point for the fuzz target. It replays halves in which heads of frames get fitting
/// checksums, as long as there are few.
#[cfg(fuzzing)]
pub(crate) fn fuzzing_journal(salt: Salt, halves: [&mut [u8]; 2]) {
    let [a, b] = halves.map(|half| {
        for at in (0..half.len()).step_by(BLOCK).rev().take(64) {
            let blocks = |half: &[u8]| {
                let head = half.get(at..)?.strip_prefix(&salt)?;
                let blocks = u32::from_le_bytes(*head.get(4..)?.first_chunk()?);
                usize::try_from(blocks).ok().filter(|blocks| *blocks < 1 << 20)
            };
            let Some(frame) = blocks(half).and_then(|blocks| half.get_mut(at..at + frame_bytes(blocks)))
            else {
                continue;
            };
            let crc = body_checksum(frame.get(CHECKED_FROM..).unwrap_or_default());
            if let Some(place) = frame.get_mut(CRC_AT..CHECKED_FROM) {
                place.copy_from_slice(&crc.to_le_bytes());
            }
        }
        &*half
    });
    if let Ok(blocks) = replay(salt, [a, b]) {
        assert!(blocks.len() <= (a.len() + b.len()) / BLOCK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: Salt = *b"salt-ab!";

    fn blocks(numbers: &[u64], fill: u8) -> Blocks {
        numbers.iter().map(|number| (*number, vec![fill; BLOCK].into())).collect()
    }

    fn half(frames: &[(u64, Blocks)], blocks_max: usize) -> Vec<u8> {
        let (mut half, mut out) = (Vec::new(), Vec::new());
        for (number, blocks) in frames {
            encode(SALT, *number, blocks, &mut out);
            assert_eq!(out.len(), frame_bytes(blocks.len()));
            half.extend_from_slice(&out);
        }
        half.resize(blocks_max * BLOCK, 0);
        half
    }

    fn fills(replayed: &BTreeMap<u64, &[u8]>) -> Vec<(u64, u8)> {
        replayed.iter().map(|(number, block)| (*number, *block.last().unwrap())).collect()
    }

    /// Goal: the newest of each block is read as it was written, also if the numbers fill more than
    /// one block.
    #[test]
    fn the_newest_of_each_block() {
        let many: Vec<u64> = (0..1200).map(|n| n * 3).collect();
        let newer = half(&[(7, blocks(&many, 1)), (8, blocks(&[3, 4], 2)), (9, blocks(&[4, 5], 3))], 1300);
        let older = half(&[(5, blocks(&[7], 9)), (6, blocks(&[7], 9))], 1300);
        for halves in [[&newer[..], &older], [&older, &newer], [&newer, &[]]] {
            let found = replay(SALT, halves).unwrap();
            assert_eq!(found.len(), 1202);
            assert_eq!(fills(&found)[..5], [(0, 1), (3, 2), (4, 3), (5, 3), (6, 1)]);
        }
        assert!(replay(SALT, [&[0; 4 * BLOCK], &[]]).unwrap().is_empty());
    }

    /// Goal: a block that is in the file already is not overwritten. Method: a reset in the middle;
    /// an older half that is being overwritten.
    #[test]
    fn what_is_in_the_file_is_left() {
        let newer = half(&[(11, blocks(&[1], 1)), (12, Blocks::new()), (13, blocks(&[2], 2))], 16);
        assert_eq!(fills(&replay(SALT, [&newer, &[]]).unwrap()), [(2, 2)]);
        let mut older = half(
            &[(7, blocks(&[3], 3)), (8, blocks(&[3], 3)), (9, blocks(&[4], 4)), (10, blocks(&[5], 5))],
            16,
        );
        older[2 * BLOCK..3 * BLOCK].fill(0);
        assert_eq!(fills(&replay(SALT, [&older, &newer]).unwrap()), [(2, 2)]);
    }

    /// Goal: a torn end is the end; a gap before newer frames is not. Method: each byte of the last
    /// and of the middle frame changed, with frames of an older time behind.
    #[test]
    fn a_torn_end_differs_from_a_gap() {
        let older = half(
            &[(1, blocks(&[9], 9)), (2, blocks(&[9], 9)), (3, blocks(&[9], 9)), (4, blocks(&[9], 9))],
            8,
        );
        let newer = half(&[(5, blocks(&[1], 1)), (6, blocks(&[2], 2)), (7, blocks(&[3], 3))], 6);
        let mut good = older.clone();
        good[..newer.len()].copy_from_slice(&newer);
        assert_eq!(fills(&replay(SALT, [&good, &[]]).unwrap()), [(1, 1), (2, 2), (3, 3)]);
        for at in (0..HEAD + 8).chain([BLOCK, 2 * BLOCK - 1]) {
            let mut torn = good.clone();
            torn[4 * BLOCK + at] ^= 1;
            assert_eq!(fills(&replay(SALT, [&torn, &[]]).unwrap()), [(1, 1), (2, 2)], "byte {at}");
            torn = good.clone();
            torn[2 * BLOCK + at] ^= 1;
            assert_eq!(replay(SALT, [&torn, &[]]).unwrap_err(), Odd::Gap { number: 6 }, "byte {at}");
            torn = good.clone();
            torn[at] ^= 1;
            assert_eq!(replay(SALT, [&torn, &older]).unwrap_err(), Odd::Gap { number: 5 }, "byte {at}");
        }
    }

    /// Goal: impossible lengths are no frame, and ask for no memory.
    #[test]
    fn hostile_lengths_are_no_frame() {
        let mut frame = half(&[(1, blocks(&[1], 1))], 2);
        for count in [2_u32, 511, u32::MAX / 8, u32::MAX] {
            frame[12..16].copy_from_slice(&count.to_le_bytes());
            assert!(Frame::read(SALT, &frame, &mut Checks::of(frame.len())).is_none());
        }
        assert!(Frame::read(SALT, &frame[..20], &mut Checks::of(20)).is_none());
    }

    /// Goal: reading a journal takes time that grows with its size alone. Method: a forged journal,
    /// with the head of a frame to the end of the half in each block of each half, behind whole
    /// frames and without. The summed bytes are counted. A regular journal is far from the bound.
    #[test]
    fn crafted_heads_cost_no_more_than_the_journal_is_long() {
        const BLOCKS: usize = 2048;
        let mut crafted = vec![0; BLOCKS * BLOCK];
        for at in 0..BLOCKS {
            let blocks =
                (1..BLOCKS - at).rev().find(|blocks| at * BLOCK + frame_bytes(*blocks) <= crafted.len());
            let head = &mut crafted[at * BLOCK..];
            head[..8].copy_from_slice(&SALT);
            head[12..16].copy_from_slice(&u32::try_from(blocks.unwrap_or(0)).unwrap().to_le_bytes());
        }
        let mut checks = Checks::of(crafted.len());
        newest(SALT, &crafted, &mut checks);
        assert!(checks.exceeded, "it would be summed {BLOCKS} times over");
        let whole = half(&[(1, blocks(&[1], 1)), (2, blocks(&[2], 2))], BLOCKS);
        let behind = [&whole[..4 * BLOCK], &crafted[4 * BLOCK..]].concat();
        for halves in [[&crafted[..], &crafted], [&whole, &crafted], [&crafted, &whole], [&behind, &[]]] {
            assert_eq!(replay(SALT, halves), Err(Odd::Overlap));
        }
        let full: Vec<_> = (1..=BLOCKS as u64 / 2).map(|number| (number, blocks(&[number], 1))).collect();
        let full = half(&full, BLOCKS);
        let mut checks = Checks::of(2 * full.len());
        for half in [&full, &full] {
            run(SALT, half, &mut checks);
            newest(SALT, half, &mut checks);
        }
        assert!(checks.left >= 4 * full.len(), "half of what is allowed is left at least");
    }

    /// Goal: what only looks like a frame is none. Method: a good frame of another generation, as a
    /// page that an application has stored.
    #[test]
    fn a_frame_of_another_life_is_none() {
        let half = half(&[(1, blocks(&[1], 1))], 8);
        assert!(replay(*b"another!", [&half, &[]]).unwrap().is_empty());
        assert_eq!(replay(SALT, [&half, &[]]).unwrap().len(), 1);
    }
}
