//! The journal over a simulated disk, which loses, tears and reorders unsynced writes.

mod engine;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::storage::metered::Counted;

const HALF_BLOCKS: usize = 16;
/// The blocks of the file at the beginning. The file grows and shrinks.
const BLOCKS: usize = 24;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

#[derive(Debug, Default)]
struct World {
    /// The file, and the operation on it.
    ops: Vec<(usize, Op)>,
    contents: [Vec<u8>; 2],
    /// The number of the failing call, from 0. With `lasting`, all later calls fail too.
    fails_at: Option<usize>,
    lasting: bool,
    calls: usize,
}

/// One of the two files of a world.
#[derive(Debug, Clone)]
struct Disk(Arc<Mutex<World>>, usize);

fn apply(content: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => {
            let offset = usize::try_from(*offset).unwrap();
            content.resize(content.len().max(offset + data.len()), 0);
            content[offset..offset + data.len()].copy_from_slice(data);
        }
        Op::SetLen(len) => content.resize(usize::try_from(*len).unwrap(), 0),
        Op::Sync => {}
    }
}

impl Disk {
    fn pair(contents: [Vec<u8>; 2]) -> (Self, Self) {
        let world = Arc::new(Mutex::new(World { contents, ..World::default() }));
        (Self(Arc::clone(&world), 0), Self(world, 1))
    }

    fn run(&self, op: Op) -> Result<()> {
        let mut world = self.0.lock().unwrap();
        let call = world.calls;
        world.calls += 1;
        if world.fails_at.is_some_and(|at| call == at || world.lasting && call > at) {
            return Err(Error::other("on purpose"));
        }
        apply(&mut world.contents[self.1], &op);
        world.ops.push((self.1, op));
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().contents[self.1].len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let world = self.0.lock().unwrap();
        let offset = usize::try_from(offset).unwrap();
        let content = world.contents[self.1].get(offset..offset + out.len());
        out.copy_from_slice(content.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.run(Op::SetLen(len))
    }

    fn sync_data(&self) -> Result<()> {
        self.run(Op::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.run(Op::Write(offset, data.to_vec()))
    }
}

/// The place of a journal, where there is always a file.
#[derive(Debug, Clone)]
struct Place(Disk);

impl Sides for Place {
    type Side = Disk;

    fn path(&self) -> &Path {
        Path::new("a.journal")
    }

    fn open(&self) -> std::result::Result<Option<Disk>, OpenError> {
        Ok(Some(self.0.clone()))
    }

    fn create(&self) -> std::result::Result<Disk, OpenError> {
        Ok(self.0.clone())
    }

    /// The simulated name is durable at once. That is harder than a real file, because a power cut
    /// shows a journal that is not whole yet.
    fn put_in_place(&self) -> std::result::Result<(), OpenError> {
        Ok(())
    }

    fn sync_name(&self) -> Result<()> {
        Ok(())
    }

    /// The removal is durable when it returns, as the removal of a name is.
    fn remove(&self) -> Result<()> {
        self.0.set_len(0)?;
        self.0.sync_data()
    }
}

const SIDE_BYTES: usize = BLOCK + 2 * HALF_BLOCKS * BLOCK;

/// Returns a file of so many blocks that the engine would take for its own.
fn empty(blocks: usize) -> Vec<u8> {
    let mut content = b"redb\x1a\x0a\xa9\x0d\x0a".to_vec();
    content.resize(blocks * BLOCK, 0);
    content
}

fn behind(main: &Disk, side: &Disk, bytes: usize) -> Journal<Disk, Place> {
    let options = JournalOptions { bytes, abandon: false };
    Journal::new(main.clone(), Place(side.clone()), options, JournalRefusal::default())
}

/// Does what the next open does first, whether a journal is wanted or not.
fn recover(main: &Disk, side: &Disk, bytes: usize) -> Result<()> {
    behind(main, side, bytes).len().map(drop)
}

/// Random numbers that are the same each time (splitmix64).
#[derive(Debug)]
struct Draw(AtomicU64);

impl Draw {
    fn below(&self, end: u64) -> u64 {
        let state = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Returns the disk after a power cut before operation `cut`: everything synced, and of the rest
/// what the pattern lets through.
fn image(before: [Vec<u8>; 2], ops: &[(usize, Op)], cut: usize, pattern: u64, draw: &Draw) -> [Vec<u8>; 2] {
    let mut contents = before;
    for (file, content) in contents.iter_mut().enumerate() {
        let of_file = |(index, (of, op)): (usize, &(usize, Op))| (*of == file).then_some((index, op.clone()));
        let done: Vec<(usize, Op)> = ops[..cut].iter().enumerate().filter_map(of_file).collect();
        let synced = done.iter().rposition(|(_, op)| matches!(op, Op::Sync)).map_or(0, |at| at + 1);
        done[..synced].iter().for_each(|(_, op)| apply(content, op));
        for (_, op) in &done[synced..] {
            match (pattern, op) {
                // Nothing arrived.
                (0, _) => {}
                // Everything arrived.
                (1, op) => apply(content, op),
                // Some writes arrived.
                (2, op) if draw.below(2) == 0 => apply(content, op),
                // Pieces arrived: sectors, pages, or a part that begins and ends anywhere.
                (3.., Op::Write(offset, data)) => {
                    let grain = [512, BLOCK, 1 + usize::try_from(draw.below(5000)).unwrap()]
                        [usize::try_from(pattern - 3).unwrap() % 3];
                    for (index, piece) in data.chunks(grain).enumerate() {
                        if draw.below(2) == 0 {
                            apply(content, &Op::Write(offset + (index * grain) as u64, piece.to_vec()));
                        }
                    }
                }
                (3.., op) if draw.below(2) == 0 => apply(content, op),
                _ => {}
            }
        }
    }
    contents
}

/// The knowledge of a user of the file at each moment.
#[derive(Debug, Clone)]
struct Known {
    /// The operations of the disk before this moment.
    ops: usize,
    /// The content after the last sync.
    synced: Vec<u8>,
    /// The blocks written, or cut off, since.
    touched: Vec<u64>,
    /// The content as it is seen.
    seen: Vec<u8>,
    /// Whether the writes since fit into a frame, and so arrive wholly or not at all.
    small: bool,
}

/// The disk before, the operations on it, and what is known at each moment.
type Worked = ([Vec<u8>; 2], Vec<(usize, Op)>, Vec<Known>);

/// Works at random: writes of pages, of parts of pages, and of more than a frame takes; syncs;
/// growth and shrinking, also in the middle of it; at last a close. Reads everything back after
/// each step.
fn work(draw: &Draw, steps: usize) -> Worked {
    let before = [empty(BLOCKS), Vec::new()];
    let (main, side) = Disk::pair(before.clone());
    let journal = behind(&main, &side, SIDE_BYTES);
    let seen = before[0].clone();
    let mut known = Known { ops: 0, synced: seen.clone(), touched: Vec::new(), seen, small: true };
    let mut history = vec![known.clone()];
    journal.len().unwrap();
    let frame_blocks = journal.journal().unwrap().blocks_max as u64;
    known.seen.clone_from(&main.0.lock().unwrap().contents[0]);
    known.synced.clone_from(&known.seen);
    known.ops = main.0.lock().unwrap().ops.len();
    history.push(known.clone());
    for step in 0..steps {
        let blocks = known.seen.len() as u64 / BLOCK_BYTES;
        match draw.below(20) {
            0..10 => {
                let run = if draw.below(15) == 0 { 1 + draw.below(12) } else { 1 };
                let first = 1 + draw.below(blocks.saturating_sub(run + 1).max(1));
                let run = run.min(blocks - first);
                let (offset, len) = match draw.below(6) {
                    // The engine's header.
                    0 => (9 + draw.below(200), 1 + draw.below(100)),
                    1 => (first * BLOCK_BYTES + draw.below(4000), 1 + draw.below(96)),
                    _ => (first * BLOCK_BYTES, run * BLOCK_BYTES),
                };
                let data = vec![u8::try_from(1 + step % 255).unwrap(); usize::try_from(len).unwrap()];
                journal.write(offset, &data).unwrap();
                apply(&mut known.seen, &Op::Write(offset, data));
                known.small &= known.touched.len() as u64 + len / BLOCK_BYTES + 2 <= frame_blocks;
                known.touched.extend(offset / BLOCK_BYTES..(offset + len).div_ceil(BLOCK_BYTES));
                known.touched.sort_unstable();
                known.touched.dedup();
            }
            10..16 => {
                journal.sync_data().unwrap();
                known.synced.clone_from(&known.seen);
                known.touched.clear();
                known.small = true;
            }
            16..18 => {
                let blocks = (blocks + 6).saturating_sub(draw.below(12)).clamp(4, 60);
                let len = blocks * BLOCK_BYTES;
                journal.set_len(len).unwrap();
                apply(&mut known.seen, &Op::SetLen(len));
                known.touched.extend(blocks.min(known.synced.len() as u64 / BLOCK_BYTES)..60);
                known.small = false;
            }
            _ => {
                let offset = draw.below(known.seen.len() as u64 - 1);
                let mut out =
                    vec![0; usize::try_from(1 + draw.below(known.seen.len() as u64 - offset)).unwrap()];
                journal.read(offset, &mut out).unwrap();
                let offset = usize::try_from(offset).unwrap();
                assert_eq!(out, known.seen[offset..offset + out.len()], "step {step}");
            }
        }
        let mut all = vec![0; known.seen.len()];
        journal.read(0, &mut all).unwrap();
        assert!(all == known.seen, "step {step}");
        known.ops = main.0.lock().unwrap().ops.len();
        history.push(known.clone());
    }
    journal.close().unwrap();
    let ops = main.0.lock().unwrap().ops.clone();
    history.push(Known { ops: ops.len(), ..known });
    (before, ops, history)
}

/// Returns a block; of the first block, the engine's part.
fn block(content: &[u8], number: u64) -> &[u8] {
    let at = usize::try_from(number * BLOCK_BYTES).unwrap();
    let block = content.get(at..at + BLOCK).unwrap_or_default();
    if number == 0 { &block[..BLOCK - 32] } else { block }
}

/// Checks `found`, the file after recovery. It must be as the last sync before the cut left it,
/// except later writes. If these fit into a frame, they are there wholly or not at all. The file is
/// no longer than it has been since that sync.
fn judge(found: &[u8], history: &[Known], cut: usize, about: &str) {
    let at = history.iter().rposition(|known| known.ops <= cut).unwrap();
    let (before, after) = (&history[at], history.get(at + 1).unwrap_or(&history[at]));
    let blocks = (before.synced.len() as u64 / BLOCK_BYTES).min(after.seen.len() as u64 / BLOCK_BYTES);
    let touched = |number: &u64| before.touched.contains(number) || after.touched.contains(number);
    for number in (0..blocks).filter(|number| !touched(number)) {
        assert!(block(found, number) == block(&before.synced, number), "{about}: block {number}");
    }
    // The cut may have hit the sync itself. Its frame then holds what was pending, or nothing of
    // it.
    let in_a_frame = before.small && (after.small || after.touched.is_empty());
    if in_a_frame && !before.touched.is_empty() {
        let is = |content: &[u8]| {
            before.touched.iter().all(|number| block(found, *number) == block(content, *number))
        };
        assert!(is(&before.synced) || is(&before.seen), "{about}: half of a frame");
    }
    let since = history[..=at].iter().rposition(|known| known.touched.is_empty()).unwrap_or(0);
    let lens = history[since..].iter().take(at + 2 - since).map(|known| known.seen.len());
    assert!(found.len() <= lens.max().unwrap(), "{about}: {} bytes", found.len());
}

/// Goal: after a crash at any operation the file is as the last sync left it. Method: random work
/// on a journal so small that it turns over every few syncs. The power goes off before each
/// operation, in six patterns of which unsynced writes arrived. Then recovery, also cut at each of
/// its own operations.
#[test]
fn nothing_that_was_synced_is_lost() {
    let seeds = if std::env::var("ONEWRITE_MODEL").is_ok_and(|value| value == "full") { 400 } else { 12 };
    let mut images = 0;
    for seed in 0..seeds {
        let draw = Draw(AtomicU64::new(seed));
        let (before, ops, history) = work(&draw, 120);
        for cut in 0..=ops.len() {
            for pattern in 0..6 {
                let about = format!("seed {seed}, cut {cut}, pattern {pattern}");
                let crashed = image(before.clone(), &ops, cut, pattern, &draw);
                let (main, side) = Disk::pair(crashed.clone());
                let bytes = [0, SIDE_BYTES][cut % 2];
                recover(&main, &side, bytes).unwrap_or_else(|error| panic!("{about}: {error}"));
                let recovery = {
                    let mut world = main.0.lock().unwrap();
                    judge(&world.contents[0], &history, cut, &about);
                    std::mem::take(&mut world.ops)
                };
                images += 1;
                if (cut + usize::try_from(pattern).unwrap()) % 5 != 0 {
                    continue;
                }
                for again in 0..recovery.len() {
                    let about = format!("{about}, recovery cut at {again}");
                    let crashed = image(crashed.clone(), &recovery, again, pattern, &draw);
                    let (main, side) = Disk::pair(crashed);
                    let bytes = [SIDE_BYTES, 0][again % 2];
                    recover(&main, &side, bytes).unwrap_or_else(|error| panic!("{about}: {error}"));
                    judge(&main.0.lock().unwrap().contents[0], &history, cut, &about);
                    images += 1;
                }
            }
        }
    }
    println!("{images} images");
}

/// Goal: after an error nothing is written, a sync is not tried again, and the next open finds what
/// was acknowledged. Method: each call fails, once or from then on.
#[test]
fn after_an_error_nothing_is_written() {
    let draw = Draw(AtomicU64::new(7));
    for (fails_at, lasting) in (0..70).flat_map(|at| [(at, false), (at, true)]) {
        let (main, side) = Disk::pair([empty(BLOCKS), Vec::new()]);
        let journal = behind(&main, &side, SIDE_BYTES);
        journal.len().unwrap();
        let mut seen = main.0.lock().unwrap().contents[0].clone();
        let mut synced = seen.clone();
        let fails_at = {
            let mut world = main.0.lock().unwrap();
            world.fails_at = Some(world.calls + fails_at);
            world.lasting = lasting;
            world.calls + fails_at
        };
        let mut failed = false;
        for step in 1..60_u8 {
            let offset = (1 + draw.below(BLOCKS as u64 - 1)) * BLOCK_BYTES;
            let result = journal.write(offset, &[step; BLOCK]).and_then(|()| {
                apply(&mut seen, &Op::Write(offset, vec![step; BLOCK]));
                journal.sync_data()
            });
            assert!(result.is_err() || !failed, "{fails_at}: a sync after a failed one");
            failed |= result.is_err();
            if !failed {
                synced.clone_from(&seen);
            }
            if failed {
                break;
            }
        }
        assert!(
            failed
                && journal.sync_data().is_err()
                && journal.write(0, &[1]).is_err()
                && journal.close().is_err()
        );
        {
            let mut world = main.0.lock().unwrap();
            assert_eq!(world.calls, fails_at + 1, "something was asked of the disk after the error");
            world.fails_at = None;
        }
        recover(&main, &side, 0).unwrap();
        let found = main.0.lock().unwrap().contents[0].clone();
        let is =
            |content: &[u8]| (0..BLOCKS as u64).all(|number| block(&found, number) == block(content, number));
        assert!(is(&synced) || is(&seen), "{fails_at}");
    }
}

/// Goal: a close brings the synced writes to their places, and unsynced writes nowhere.
#[test]
fn closing_leaves_nothing_in_the_journal() {
    let (main, side) = Disk::pair([empty(8), Vec::new()]);
    let journal = behind(&main, &side, 40 * BLOCK);
    journal.len().unwrap();
    journal.write(BLOCK_BYTES, &[1; BLOCK]).unwrap();
    journal.sync_data().unwrap();
    journal.write(2 * BLOCK_BYTES, &[2; BLOCK]).unwrap();
    let content = || main.0.lock().unwrap().contents[0].clone();
    assert_eq!(content()[BLOCK..], [0; BLOCK * 7], "not before");
    journal.close().unwrap();
    assert_eq!(content()[BLOCK..3 * BLOCK], [[1; BLOCK], [0; BLOCK]].concat());
    assert!(side.0.lock().unwrap().contents[1].is_empty());
    assert!(!generation::Generations::of(&main).unwrap().unwrap().is_one_open());
}

/// Goal: adjoining blocks go to their place in one write. Method: the close brings three adjoining
/// blocks and one apart to their places.
#[test]
fn blocks_that_touch_are_written_together() {
    let (main, side) = Disk::pair([empty(12), Vec::new()]);
    let journal = behind(&main, &side, 40 * BLOCK);
    journal.len().unwrap();
    for number in [3, 1, 2, 7] {
        journal.write(number * BLOCK_BYTES, &[9; BLOCK]).unwrap();
    }
    journal.sync_data().unwrap();
    let before = main.0.lock().unwrap().ops.len();
    journal.close().unwrap();
    let world = main.0.lock().unwrap();
    let blocks = |(file, op): &(usize, Op)| match op {
        Op::Write(at, data) if *file == 0 && data.iter().all(|byte| *byte == 9) => {
            Some((at / BLOCK_BYTES, data.len() / BLOCK))
        }
        _ => None,
    };
    let written: Vec<_> = world.ops[before..].iter().filter_map(blocks).collect();
    assert_eq!(written, [(1, 3), (7, 1)]);
}

/// Goal: no more than a frame is kept in memory, however much one call writes.
#[test]
fn memory_is_bounded() {
    let (main, side) = Disk::pair([empty(2000), Vec::new()]);
    let journal = behind(&main, &side, SIDE_BYTES);
    journal.len().unwrap();
    let frame_blocks = journal.journal().unwrap().blocks_max;
    for blocks in [1, 3, 1500, 1] {
        journal.write(BLOCK_BYTES, &vec![7; blocks * BLOCK]).unwrap();
        assert!(journal.shown().pending.len() <= frame_blocks);
    }
    journal.sync_data().unwrap();
    assert_eq!(main.0.lock().unwrap().contents[0][BLOCK..1501 * BLOCK], vec![7; 1500 * BLOCK]);
}

/// Returns why a file is not opened, or its content after the open.
fn opened(main: &Disk, side: &Disk, bytes: usize, abandon: bool) -> std::result::Result<(), String> {
    let refusal = JournalRefusal::default();
    let journal = Journal::new(
        main.clone(),
        Place(side.clone()),
        JournalOptions { bytes, abandon },
        Arc::clone(&refusal),
    );
    journal.len().map(drop).map_err(|error| {
        refusal.lock().unwrap().take().map_or(error.to_string(), |error| format!("{error:?}"))
    })
}

/// Goal: a journal is brought into its own file and no other, and a refused open has changed
/// nothing. Method: two files, each with what a crash has left in its journal; journals swapped,
/// missing, cut short, and of no store.
#[test]
fn a_journal_is_of_one_file() {
    let crashed = |fill: u8| {
        let (main, side) = Disk::pair([empty(8), Vec::new()]);
        let journal = behind(&main, &side, 40 * BLOCK);
        journal.len().unwrap();
        journal.write(BLOCK_BYTES, &[fill; BLOCK]).unwrap();
        journal.sync_data().unwrap();
        main.0.lock().unwrap().contents.clone()
    };
    let ([a, a_side], [b, b_side]) = (crashed(1), crashed(2));
    let cut = a_side[..20 * BLOCK].to_vec();
    let noise = vec![9; 3 * BLOCK];
    let cases = [
        (&a, &b_side, "JournalMissing"),
        (&a, &Vec::new(), "JournalMissing"),
        (&a, &noise, "JournalMissing"),
        (&a, &cut, "Damaged"),
        (&empty(8), &b_side, "JournalInTheWay"),
        (&empty(8), &noise, "JournalInTheWay"),
    ];
    for (main_bytes, side_bytes, expected) in cases {
        let (main, side) = Disk::pair([main_bytes.clone(), side_bytes.clone()]);
        let refused = opened(&main, &side, 40 * BLOCK, false).unwrap_err();
        assert!(refused.contains(expected), "{refused}");
        assert!(main.0.lock().unwrap().ops.is_empty(), "{expected}");
        if expected != "JournalMissing" {
            continue;
        }
        if !side_bytes.is_empty() {
            let refused = opened(&main, &side, 40 * BLOCK, true).unwrap_err();
            assert!(
                refused.contains("JournalInTheWay") && main.0.lock().unwrap().ops.is_empty(),
                "{refused}"
            );
        }
        opened(&main, &side, 0, true).unwrap();
        let given_up = main.0.lock().unwrap().contents.clone();
        assert_eq!(given_up[0][BLOCK..2 * BLOCK], [0; BLOCK], "given up");
        // Put back, the journal is not taken for one that has ended.
        let (main, side) = Disk::pair([given_up[0].clone(), a_side.clone()]);
        let refused = opened(&main, &side, 40 * BLOCK, false).unwrap_err();
        assert!(refused.contains("JournalInTheWay") && main.0.lock().unwrap().ops.is_empty(), "{refused}");
    }
    // Nor does an earlier look let the file be opened without it.
    let (main, _) = Disk::pair([a.clone(), Vec::new()]);
    let around =
        |unless_journaled| Counted { file: main.clone(), counters: Arc::default(), unless_journaled };
    assert_eq!(around(true).len().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(around(false).len().is_ok());
    // A file without a journal, opened without one, leaves foreign journals alone.
    let (main, side) = Disk::pair([empty(8), b_side.clone()]);
    opened(&main, &side, 0, false).unwrap();
    assert!(main.0.lock().unwrap().ops.is_empty());
    // A file that is not the engine's is left to the engine to refuse.
    let (main, side) = Disk::pair([vec![3; 8 * BLOCK], Vec::new()]);
    opened(&main, &side, 40 * BLOCK, false).unwrap();
    assert!(main.0.lock().unwrap().ops.is_empty());
    let (main, side) = Disk::pair([b, b_side]);
    opened(&main, &side, 40 * BLOCK, false).unwrap();
    assert_eq!(main.0.lock().unwrap().contents[0][BLOCK..2 * BLOCK], [2; BLOCK]);
}
