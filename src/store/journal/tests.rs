//! The journal over a simulated disk, which loses, tears and reorders what was not synced.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::*;

const HALF_BLOCKS: u64 = 16;
/// Blocks of the file at the beginning; it grows and shrinks.
const BLOCKS: u64 = 24;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

#[derive(Debug, Default)]
struct World {
    /// Which file, and what was asked of it.
    ops: Vec<(usize, Op)>,
    contents: [Vec<u8>; 2],
    /// From this operation on nothing works.
    dead_at: Option<usize>,
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
        if world.dead_at.is_some_and(|dead_at| world.ops.len() >= dead_at) {
            return Err(Error::other("the power is gone"));
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

/// Numbers that are the same each time (splitmix64).
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

/// What the disk holds after the power went off before operation `cut`: what was synced, and of the rest what the pattern lets through.
fn image(before: [Vec<u8>; 2], ops: &[(usize, Op)], cut: usize, pattern: u64, draw: &Draw) -> [Vec<u8>; 2] {
    let mut contents = before;
    for file in 0..2 {
        let of_file = |(index, (of, op)): (usize, &(usize, Op))| (*of == file).then_some((index, op.clone()));
        let done: Vec<(usize, Op)> = ops[..cut].iter().enumerate().filter_map(of_file).collect();
        let synced = done.iter().rposition(|(_, op)| matches!(op, Op::Sync)).map_or(0, |at| at + 1);
        done[..synced].iter().for_each(|(_, op)| apply(&mut contents[file], op));
        for (_, op) in &done[synced..] {
            match (pattern, op) {
                // Nothing arrived.
                (0, _) => {}
                // All of it did.
                (1, op) => apply(&mut contents[file], op),
                // Some did.
                (2, op) if draw.below(2) == 0 => apply(&mut contents[file], op),
                // Pieces did: sectors, pages, or a stretch that begins and ends anywhere.
                (3.., Op::Write(offset, data)) => {
                    let grain = [512, BLOCK, 1 + usize::try_from(draw.below(5000)).unwrap()]
                        [usize::try_from(pattern - 3).unwrap() % 3];
                    for (index, piece) in data.chunks(grain).enumerate() {
                        if draw.below(2) == 0 {
                            apply(
                                &mut contents[file],
                                &Op::Write(offset + (index * grain) as u64, piece.to_vec()),
                            );
                        }
                    }
                }
                (3.., op) if draw.below(2) == 0 => apply(&mut contents[file], op),
                _ => {}
            }
        }
    }
    contents
}

/// What a user of the file knows at each moment.
#[derive(Debug, Clone)]
struct Known {
    /// Operations of the disk before.
    ops: usize,
    /// As the last sync left it.
    synced: Vec<u8>,
    /// Blocks written, or cut off, since.
    touched: Vec<u64>,
    /// As it is seen.
    seen: Vec<u8>,
    /// Bytes of what is written since are a frame's at most, so it comes wholly or not at all.
    small: bool,
}

/// Writes at random: pages, parts of pages, more than a frame takes; syncs; growth and shrinking. Reads everything back after each step.
fn work(draw: &Draw, steps: usize) -> ([Vec<u8>; 2], Vec<(usize, Op)>, Vec<Known>) {
    let before =
        [vec![0; (BLOCKS * BLOCK_BYTES) as usize], vec![0; (2 * HALF_BLOCKS * BLOCK_BYTES) as usize]];
    let (main, side) = Disk::pair(before.clone());
    let started = Arc::new(AtomicBool::new(draw.below(4) > 0));
    let journal = Journal::new(main.clone(), side, None, Arc::clone(&started)).unwrap();
    let mut known = Known {
        ops: 0,
        synced: before[0].clone(),
        touched: Vec::new(),
        seen: before[0].clone(),
        small: false,
    };
    let mut history = vec![known.clone()];
    let mut written = 0;
    for step in 0..steps {
        let blocks = known.seen.len() as u64 / BLOCK_BYTES;
        match draw.below(20) {
            0..10 => {
                let run = if draw.below(15) == 0 { 1 + draw.below(12) } else { 1 };
                let first = draw.below(blocks.saturating_sub(run).max(1));
                let run = run.min(blocks - first);
                let (offset, len) = match draw.below(5) {
                    0 => (first * BLOCK_BYTES + draw.below(4000), 1 + draw.below(96)),
                    _ => (first * BLOCK_BYTES, run * BLOCK_BYTES),
                };
                let data = vec![u8::try_from(1 + step % 255).unwrap(); usize::try_from(len).unwrap()];
                journal.write(offset, &data).unwrap();
                apply(&mut known.seen, &Op::Write(offset, data));
                known.touched.extend(offset / BLOCK_BYTES..(offset + len).div_ceil(BLOCK_BYTES));
                written += run;
                known.small &= written <= 2;
            }
            10..17 => {
                journal.sync_data().unwrap();
                known.synced.clone_from(&known.seen);
                known.touched.clear();
                // Direct until it has started.
                known.small = started.swap(true, Ordering::Relaxed);
                written = 0;
            }
            17 if known.touched.is_empty() => {
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
    let ops = main.0.lock().unwrap().ops.clone();
    (before, ops, history)
}

fn block(content: &[u8], number: u64) -> &[u8] {
    let at = usize::try_from(number * BLOCK_BYTES).unwrap();
    content.get(at..at + BLOCK).unwrap_or_default()
}

/// `found` is the file after recovery: as the last sync before the cut left it, but for what was written since; and that wholly or not at all, if it
/// fits into a frame.
fn judge(found: &[u8], history: &[Known], cut: usize, about: &str) {
    let before = history.iter().rposition(|known| known.ops <= cut).unwrap();
    let (before, after) = (&history[before], history.get(before + 1).unwrap_or(&history[before]));
    let blocks = (before.synced.len() as u64 / BLOCK_BYTES).min(after.seen.len() as u64 / BLOCK_BYTES);
    let touched = |number: &u64| before.touched.contains(number) || after.touched.contains(number);
    for number in (0..blocks).filter(|number| !touched(number)) {
        assert!(block(found, number) == block(&before.synced, number), "{about}: block {number}");
    }
    // The sync itself may have been cut: it then holds what was pending, or nothing of it.
    let in_a_frame = before.small && (after.small || after.touched.is_empty());
    if in_a_frame && !before.touched.is_empty() {
        let is = |content: &[u8]| {
            before.touched.iter().all(|number| block(found, *number) == block(content, *number))
        };
        assert!(is(&before.synced) || is(&before.seen), "{about}: half of a frame");
    }
}

/// Goal: after a crash at any operation the file is as the last sync left it. Method: random work on a journal so small that it turns over every few syncs; the power
/// goes off before each operation, in six patterns of what of the unsynced has arrived; then recovery, also cut at each of its own operations.
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
                side::bring(&main, &side).unwrap().unwrap_or_else(|hole| panic!("{about}: {hole:?}"));
                let recovery = {
                    let mut world = main.0.lock().unwrap();
                    judge(&world.contents[0], &history, cut, &about);
                    assert!(world.contents[1].is_empty());
                    std::mem::take(&mut world.ops)
                };
                images += 1;
                if (cut + usize::try_from(pattern).unwrap()) % 5 != 0 {
                    continue;
                }
                for again in 0..recovery.len() {
                    let crashed = image(crashed.clone(), &recovery, again, pattern, &draw);
                    let (main, side) = Disk::pair(crashed);
                    side::bring(&main, &side)
                        .unwrap()
                        .unwrap_or_else(|hole| panic!("{about}, {again}: {hole:?}"));
                    judge(
                        &main.0.lock().unwrap().contents[0],
                        &history,
                        cut,
                        &format!("{about}, recovery cut at {again}"),
                    );
                    images += 1;
                }
            }
        }
    }
    println!("{images} images");
}

/// Goal: an error ends it: nothing is written after, a sync is not tried again, and the journal holds what was acknowledged. Method: the disk fails from each operation on.
#[test]
fn after_an_error_nothing_is_written() {
    let draw = Draw(AtomicU64::new(7));
    for dead_at in 0..60 {
        let contents =
            [vec![0; (BLOCKS * BLOCK_BYTES) as usize], vec![0; (2 * HALF_BLOCKS * BLOCK_BYTES) as usize]];
        let (main, side) = Disk::pair(contents);
        main.0.lock().unwrap().dead_at = Some(dead_at);
        let journal =
            Journal::new(main.clone(), side.clone(), None, Arc::new(AtomicBool::new(true))).unwrap();
        let mut synced = vec![0; (BLOCKS * BLOCK_BYTES) as usize];
        let mut seen = synced.clone();
        let mut failed = false;
        for step in 1..40_u8 {
            let offset = draw.below(BLOCKS) * BLOCK_BYTES;
            let result = journal.write(offset, &[step; BLOCK]).and_then(|()| {
                apply(&mut seen, &Op::Write(offset, vec![step; BLOCK]));
                journal.sync_data()
            });
            assert!(result.is_err() || !failed, "dead at {dead_at}: a sync after a failed one");
            failed |= result.is_err();
            if !failed {
                synced.clone_from(&seen);
            }
        }
        assert!(failed && journal.close().is_err(), "dead at {dead_at}");
        let ops = main.0.lock().unwrap().ops.len();
        assert_eq!(ops, dead_at);
        main.0.lock().unwrap().dead_at = None;
        side::bring(&main, &side).unwrap().unwrap();
        let found = main.0.lock().unwrap().contents[0].clone();
        assert!(found == synced || found == seen, "dead at {dead_at}");
    }
}

/// Goal: closing brings everything to its place.
#[test]
fn closing_leaves_nothing_in_the_journal() {
    let (main, side) = Disk::pair([vec![0; BLOCK * 8], vec![0; BLOCK * 32]]);
    let journal = Journal::new(main.clone(), side, None, Arc::new(AtomicBool::new(true))).unwrap();
    journal.sync_data().unwrap();
    journal.write(BLOCK_BYTES, &[1; BLOCK]).unwrap();
    journal.sync_data().unwrap();
    journal.write(2 * BLOCK_BYTES, &[2; BLOCK]).unwrap();
    assert_eq!(main.0.lock().unwrap().contents[0], [0; BLOCK * 8], "not before");
    journal.close().unwrap();
    let world = main.0.lock().unwrap();
    assert_eq!(world.contents[0][BLOCK..3 * BLOCK], [[1; BLOCK], [2; BLOCK]].concat());
    assert!(matches!(world.ops.last(), Some((0, Op::Sync))));
}

const STATE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("state");
const LOG: TableDefinition<'_, u64, u64> = TableDefinition::new("log");

/// What a row of so many bytes holds.
fn row(key: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (key * 31 + at) as u8).collect()
}

fn database(main: Disk, side: Disk) -> Database {
    let journal = Journal::new(main, side, None, Arc::new(AtomicBool::new(true))).unwrap();
    let mut builder = Database::builder();
    builder.set_cache_size(1 << 20).set_check_integrity_on_open(true).create_with_backend(journal).unwrap()
}

/// Commits of 0 to `commits`, and the operations of the disk that had been done when each was acknowledged.
fn commit_all(draw: &Draw, side_len: usize, commits: u64) -> (Vec<(usize, Op)>, Vec<usize>) {
    let (main, side) = Disk::pair([Vec::new(), vec![0; side_len]]);
    let db = database(main.clone(), side);
    let mut acknowledged = Vec::new();
    for commit in 0..commits {
        let len = if draw.below(12) == 0 { 200_000 } else { draw.below(3000) };
        let tx = db.begin_write().unwrap();
        tx.open_table(STATE).unwrap().insert(commit, &row(commit, len)[..]).unwrap();
        if draw.below(20) == 0 {
            tx.open_table(STATE).unwrap().retain(|key, _| key + 5 > commit).unwrap();
        }
        tx.open_table(LOG).unwrap().insert(commit, len).unwrap();
        tx.commit().unwrap();
        acknowledged.push(main.0.lock().unwrap().ops.len());
    }
    let ops = main.0.lock().unwrap().ops.clone();
    main.0.lock().unwrap().dead_at = Some(0);
    drop(db);
    (ops, acknowledged)
}

/// Goal: redb over the journal: what was committed is there, wholly, after a power cut at any operation, and one more commit works. Method: rows of
/// all sizes, some of them larger than a frame; the image is recovered, opened with verification and read; then written, closed and opened again.
#[test]
fn the_engine_finds_its_commits() {
    let full = std::env::var("ONEWRITE_MODEL").is_ok_and(|value| value == "full");
    let side_len = 2 * 64 * BLOCK;
    let mut images = 0;
    for seed in 0..if full { 40 } else { 2 } {
        let draw = Draw(AtomicU64::new(1000 + seed));
        let (ops, acknowledged) = commit_all(&draw, side_len, 40);
        let first = acknowledged[0];
        for cut in (first..=ops.len()).filter(|_| full || draw.below(3) == 0) {
            let pattern = draw.below(6);
            let about = format!("seed {seed}, cut {cut}, pattern {pattern}");
            let crashed = image([Vec::new(), vec![0; side_len]], &ops, cut, pattern, &draw);
            let (main, side) = Disk::pair(crashed);
            side::bring(&main, &side).unwrap().unwrap_or_else(|hole| panic!("{about}: {hole:?}"));
            let fresh = |main: &Disk| {
                let contents = main.0.lock().unwrap().contents[0].clone();
                let (main, side) = Disk::pair([contents, vec![0; side_len]]);
                (database(main.clone(), side), main)
            };
            let (db, main) = fresh(&main);
            let tx = db.begin_read().unwrap();
            let (state, log) = (tx.open_table(STATE).unwrap(), tx.open_table(LOG).unwrap());
            let lens: Vec<(u64, u64)> = log
                .iter()
                .unwrap()
                .map(|row| row.map(|(key, len)| (key.value(), len.value())).unwrap())
                .collect();
            let sure = acknowledged.iter().filter(|ops| **ops <= cut).count();
            assert!(lens.len() == sure || lens.len() == sure + 1, "{about}: {} of {sure}", lens.len());
            for (key, len) in &lens {
                let found = state.get(key).unwrap().map(|found| found.value().to_vec());
                let newest = key + 5 > lens.len() as u64;
                assert!(found.is_some() || !newest, "{about}: {key} is gone");
                assert!(found.is_none_or(|found| found == row(*key, *len)), "{about}: {key} is another");
            }
            let (next, len) = (lens.len() as u64, draw.below(3000));
            drop((state, log, tx));
            let tx = db.begin_write().unwrap();
            tx.open_table(LOG).unwrap().insert(next, len).unwrap();
            tx.commit().unwrap();
            db.close().unwrap();
            let (db, _) = fresh(&main);
            let log = db.begin_read().unwrap().open_table(LOG).unwrap();
            assert_eq!(log.last().unwrap().map(|(key, _)| key.value()), Some(next), "{about}");
            images += 1;
        }
    }
    println!("{images} images");
}
