//! redb over the journal, with the power cut.

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::*;

const STATE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("state");
const LOG: TableDefinition<'_, u64, u64> = TableDefinition::new("log");

/// Returns a row of so many bytes.
fn row(key: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (key * 31 + at) as u8).collect()
}

fn database(main: &Disk, side: &Disk, bytes: usize) -> Database {
    let mut builder = Database::builder();
    builder.set_cache_size(64 << 10).set_check_integrity_on_open(true);
    builder.create_with_backend(behind(main, side, bytes)).unwrap()
}

/// Makes commits 0 to `commits`. Returns the disk's operations, and how many had been done when
/// each commit was acknowledged. Some are committed twice, as quick repair does, and some are
/// aborted after the file has grown.
fn commit_all(draw: &Draw, side_bytes: usize, commits: u64) -> (Vec<(usize, Op)>, Vec<usize>) {
    let (main, side) = Disk::pair([Vec::new(), Vec::new()]);
    database(&main, &side, 0).close().unwrap();
    let db = database(&main, &side, side_bytes);
    let mut acknowledged = Vec::new();
    for commit in 0..commits {
        let len = if draw.below(12) == 0 { 200_000 } else { draw.below(3000) };
        if draw.below(8) == 0 {
            let tx = db.begin_write().unwrap();
            tx.open_table(STATE).unwrap().insert(1000, &row(1, 2_000_000)[..]).unwrap();
            tx.abort().unwrap();
        }
        let mut tx = db.begin_write().unwrap();
        tx.set_quick_repair(draw.below(5) == 0);
        tx.open_table(STATE).unwrap().insert(commit, &row(commit, len)[..]).unwrap();
        if draw.below(20) == 0 {
            tx.open_table(STATE).unwrap().retain(|key, _| key + 5 > commit).unwrap();
        }
        tx.open_table(LOG).unwrap().insert(commit, len).unwrap();
        tx.commit().unwrap();
        acknowledged.push(main.0.lock().unwrap().ops.len());
    }
    let ops = main.0.lock().unwrap().ops.clone();
    {
        let mut world = main.0.lock().unwrap();
        (world.fails_at, world.lasting) = (Some(0), true);
    }
    drop(db);
    (ops, acknowledged)
}

/// Goal: each commit of redb over the journal is there, wholly, after a power cut at any operation,
/// and one more commit works. Method: rows of all sizes, some larger than a frame. The image is
/// recovered, opened with verification and read; then written, closed and opened again.
#[test]
fn the_engine_finds_its_commits() {
    let full = std::env::var("ONEWRITE_MODEL").is_ok_and(|value| value == "full");
    let side_bytes = BLOCK + 2 * 64 * BLOCK;
    let mut images = 0;
    for seed in 0..if full { 40 } else { 2 } {
        let draw = Draw(AtomicU64::new(1000 + seed));
        let (ops, acknowledged) = commit_all(&draw, side_bytes, 40);
        let first = acknowledged[0];
        for cut in (first..=ops.len()).filter(|_| full || draw.below(8) == 0) {
            let pattern = draw.below(6);
            let about = format!("seed {seed}, cut {cut}, pattern {pattern}");
            let (main, side) = Disk::pair(image([Vec::new(), Vec::new()], &ops, cut, pattern, &draw));
            let db = database(&main, &side, if draw.below(2) == 0 { side_bytes } else { 0 });
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
            assert!(side.0.lock().unwrap().contents[1].is_empty());
            let db = database(&main, &side, side_bytes);
            let log = db.begin_read().unwrap().open_table(LOG).unwrap();
            assert_eq!(log.last().unwrap().map(|(key, _)| key.value()), Some(next), "{about}");
            images += 1;
        }
    }
    println!("{images} images");
}
