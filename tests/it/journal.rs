//! A store behind a journal: the second file, what it promises, what its absence and its damage get.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use onewrite::limits::{JOURNAL_BYTES_MAX, JOURNAL_BYTES_MIN};
use onewrite::redb::TableDefinition;
use onewrite::{Error, OpenError, Store};

use crate::scratch::{Random, audit, event, put};

const LARGE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("large");

fn open(path: &Path) -> Store {
    Store::builder().journal_bytes(JOURNAL_BYTES_MIN).open(path).unwrap()
}

fn journal(path: &Path) -> PathBuf {
    path.with_extension("redb.journal")
}

/// A file as this library makes it: for its owner alone.
fn write_closed(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
    #[cfg(unix)]
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

/// What a crash at this moment would leave: both files, elsewhere. Nobody writes meanwhile.
fn crashed(path: &Path, folder: &Path, name: &str) -> PathBuf {
    let copy = folder.join(name);
    fs::copy(path, &copy).unwrap();
    fs::copy(journal(path), journal(&copy)).unwrap();
    copy
}

/// Goal: after a crash everything acknowledged is there, opened with a journal or without; a clean end leaves one file. Method: images of both files
/// after writes of all sizes, up to transactions that no frame takes, while the journal turns over many times; state and events are compared.
#[test]
fn a_crash_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = open(&path);
    let mut random = Random(11);
    let mut large = Vec::new();
    for n in 0..150 {
        put(&store, n).unwrap();
        if random.below(6) == 0 {
            let bytes = vec![u8::try_from(n).unwrap(); usize::try_from(random.below(900_000)).unwrap()];
            let written = bytes.clone();
            store
                .write(move |tx| {
                    tx.open_table(LARGE)?.insert(n, &written[..])?;
                    Ok(())
                })
                .unwrap();

            large.push((n, bytes));
        }
        if n % 50 == 20 {
            // The file shrinks.
            store
                .write(move |tx| tx.open_table(LARGE)?.retain(|key, _| key + 10 > n).map_err(Error::from))
                .unwrap();
            large.retain(|(key, _)| key + 10 > n);
        }
        if random.below(4) > 0 {
            continue;
        }
        let copy = crashed(&path, folder.path(), &format!("{n}.redb"));
        let opened = if random.below(2) == 0 { open(&copy) } else { Store::open(&copy).unwrap() };
        assert!(opened.stats().unwrap().verified_at_open);
        assert_eq!(audit(&opened), (0..=n).collect::<Vec<_>>(), "after {n}");
        let snapshot = opened.read().unwrap();
        for (key, bytes) in &large {
            let row = snapshot.open_table(LARGE).unwrap().get(key).unwrap().map(|row| row.value().to_vec());
            assert!(row.as_ref() == Some(bytes), "after {n}: row {key}");
        }
        drop(snapshot);
        put(&opened, n + 1).unwrap();
        opened.close().unwrap();
        assert!(!journal(&copy).exists());
        let again = Store::open(&copy).unwrap();
        assert!(!again.stats().unwrap().verified_at_open);
        assert_eq!(audit(&again), (0..=n + 1).collect::<Vec<_>>());
        again.close().unwrap();
        fs::remove_file(&copy).unwrap();
    }
    store.close().unwrap();
    assert!(!journal(&path).exists());
}

/// Goal: a commit with a journal is one write in one piece and one sync; pages that each commit writes go to the file once for many.
#[test]
fn a_commit_is_one_write() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().journal_bytes(8 << 20).open(folder.path().join("a.redb")).unwrap();
    (0..20).for_each(|n| drop(put(&store, n).unwrap()));
    let before = store.stats().unwrap().io;
    (20..40).for_each(|n| drop(put(&store, n).unwrap()));
    let after = store.stats().unwrap().io;
    assert_eq!((after.writes - before.writes, after.syncs - before.syncs), (20, 20));
}

/// Goal: a journal that is lost after a crash is missed, by name, and nothing is written, neither by whoever wants a journal nor by who wants none; given up, what is there is whole. One that
/// is not needed is not asked for. Method: a first generation, a later one, and one that died idle after a commit with quick repair.
#[test]
fn a_lost_journal_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let mut there = 0;
    for (generation, idle) in [None, None, Some(Duration::from_millis(30))].into_iter().enumerate() {
        let builder = Store::builder().journal_bytes(8 << 20);
        let builder = if let Some(idle) = idle { builder.quick_repair_when_idle(idle) } else { builder };
        let store = builder.open(&path).unwrap();
        (there..there + 20).for_each(|n| drop(put(&store, n).unwrap()));
        if let Some(idle) = idle {
            std::thread::sleep(idle * 10);
        }
        let copy = crashed(&path, folder.path(), &format!("{generation}.redb"));
        store.close().unwrap();

        let aside = folder.path().join("aside");
        fs::rename(journal(&copy), &aside).unwrap();
        let before = fs::read(&copy).unwrap();
        for with in [0, JOURNAL_BYTES_MIN] {
            match Store::builder().journal_bytes(with).open(&copy) {
                Err(Error::Open(OpenError::JournalMissing { path })) => assert_eq!(path, journal(&copy)),
                other => panic!("generation {generation}: {other:?}"),
            }
            assert!(!journal(&copy).exists());
        }
        assert!(fs::read(&copy).unwrap() == before, "generation {generation}: it was written to");
        let given_up = folder.path().join(format!("given-up-{generation}.redb"));
        fs::copy(&copy, &given_up).unwrap();
        let older = Store::builder().abandon_missing_journal(true).open(&given_up).unwrap();
        let left = audit(&older);
        assert_eq!(left, (0..left.len() as u64).collect::<Vec<_>>());
        assert!(
            (there..there + 20).contains(&(left.len() as u64)),
            "generation {generation}: {}",
            left.len()
        );
        older.close().unwrap();

        fs::rename(&aside, journal(&copy)).unwrap();
        there += 20;
        assert_eq!(
            audit(&open(&copy)),
            (0..there).collect::<Vec<_>>(),
            "generation {generation}: back in its place"
        );
        let store = Store::open(&path).unwrap();
        assert!(!store.stats().unwrap().verified_at_open);
        assert_eq!(audit(&store), (0..there).collect::<Vec<_>>());
        store.close().unwrap();
    }
}

/// Goal: a journal that is given up when the crash came while pages went to their places is no reason to show what never was: the file is verified, and whole or refused. Method: files of two moments
/// of one generation, mixed page by page.
#[test]
fn what_is_given_up_by_half_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    open(&path).close().unwrap();
    let store = open(&path);
    let mut random = Random(17);
    let (mut whole, mut refused) = (0, 0);
    let mut earlier = fs::read(&path).unwrap();
    for n in 0..120 {
        put(&store, n).unwrap();
        let later = fs::read(&path).unwrap();
        if later == earlier {
            continue;
        }
        for _ in 0..3 {
            let mut mixed = later.clone();
            let pages = mixed.chunks_mut(4096).zip(earlier.chunks(4096));
            pages.for_each(|(page, earlier)| {
                if random.below(2) == 0 {
                    page.copy_from_slice(earlier)
                }
            });
            let image = folder.path().join("mixed.redb");
            fs::write(&image, mixed).unwrap();
            match Store::builder().abandon_missing_journal(true).open(&image) {
                Ok(store) => {
                    let there = audit(&store);
                    assert_eq!(there, (0..there.len() as u64).collect::<Vec<_>>());
                    whole += 1;
                }
                Err(Error::Open(OpenError::Damaged { .. } | OpenError::Storage { .. })) => refused += 1,
                Err(other) => panic!("{other:?}"),
            }
            fs::remove_file(&image).unwrap();
        }
        earlier = later;
    }
    println!("{whole} were whole, {refused} refused");
    assert!(whole + refused > 10 && refused > 0);
}

/// Goal: what a user does to files after a crash never brings one store's journal into another's file. Method: the file removed, replaced by an older copy, moved away.
#[test]
fn a_journal_stays_with_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let backup = folder.path().join("backup.redb");
    let store = open(&path);
    put(&store, 0).unwrap();
    store.close().unwrap();
    fs::copy(&path, &backup).unwrap();
    let store = open(&path);
    put(&store, 1).unwrap();
    let hot = crashed(&path, folder.path(), "hot.redb");
    let held = fs::read(journal(&hot)).unwrap();

    // Put back from a backup: without a journal it is opened, with one it reports what is in the way.
    fs::copy(&backup, &hot).unwrap();
    assert_eq!(audit(&Store::open(&hot).unwrap()), [0]);
    for _ in 0..2 {
        let refused = Store::builder().journal_bytes(JOURNAL_BYTES_MIN).open(&hot).unwrap_err();
        assert!(
            matches!(&refused, Error::Open(OpenError::JournalInTheWay { path }) if *path == journal(&hot))
        );
        // Removed, and made anew.
        fs::remove_file(&hot).unwrap();
        assert_eq!(audit(&Store::open(&hot).unwrap()), [0_u64; 0]);
    }
    assert!(fs::read(journal(&hot)).unwrap() == held, "left as it is");
    // Its own file again.
    fs::copy(&path, &hot).unwrap();
    assert_eq!(audit(&open(&hot)), [0, 1]);
}

/// Goal: a frame that is not as it was written, with newer ones behind, is an error that names the journal; both files stay as they are.
/// Method: each of some bytes of the first half changed.
#[test]
fn a_damaged_journal_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::builder().journal_bytes(8 << 20).open(&path).unwrap();
    (0..40).for_each(|n| drop(put(&store, n).unwrap()));
    let copy = crashed(&path, folder.path(), "b.redb");
    let (main, side) = (fs::read(&copy).unwrap(), fs::read(journal(&copy)).unwrap());
    for at in [5000, 60_000, 200_000] {
        let mut damaged = side.clone();
        damaged[at] ^= 0x40;
        fs::write(journal(&copy), &damaged).unwrap();
        match Store::open(&copy) {
            Err(Error::Open(OpenError::Damaged { path, reason })) => {
                assert_eq!(path, journal(&copy));
                assert!(reason.contains("does not match its checksum"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        assert!(fs::read(&copy).unwrap() == main && fs::read(journal(&copy)).unwrap() == damaged);
    }
    fs::write(journal(&copy), &side).unwrap();
    assert_eq!(audit(&Store::open(&copy).unwrap()), (0..40).collect::<Vec<_>>());
}

/// Goal: what is no journal is in the way, and left as it is; who wants no journal does not mind.
#[test]
fn noise_is_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    put(&Store::open(&path).unwrap(), 0).unwrap();
    let mut random = Random(5);
    let noise: Vec<u8> = (0..30_001).map(|_| random.below(256) as u8).collect();
    write_closed(&journal(&path), &noise);
    let refused = Store::builder().journal_bytes(JOURNAL_BYTES_MIN).open(&path);
    assert!(matches!(refused, Err(Error::Open(OpenError::JournalInTheWay { .. }))));
    assert_eq!(audit(&Store::open(&path).unwrap()), [0]);
    assert!(fs::read(journal(&path)).unwrap() == noise);
    // One that was being made when the power went.
    for blank in [vec![], vec![0; 100_000]] {
        write_closed(&journal(&path), &blank);
        assert_eq!(audit(&open(&path)), [0]);
    }
}

/// Goal: one owner, also of the journal; no links; the owner alone may read it; sizes that cannot be are refused.
#[test]
fn it_is_one_owners() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = open(&path);
    for with in [0, JOURNAL_BYTES_MIN] {
        let other = Store::builder().journal_bytes(with).open(&path);
        assert!(matches!(other, Err(Error::Open(OpenError::Locked { path: locked })) if locked == path));
    }
    put(&store, 0).unwrap();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(journal(&path)).unwrap().permissions().mode() & 0o777, 0o600);
        let linked = folder.path().join("b.redb");
        Store::open(&linked).unwrap().close().unwrap();
        std::os::unix::fs::symlink(&path, journal(&linked)).unwrap();
        let refused = Store::builder().journal_bytes(JOURNAL_BYTES_MIN).open(&linked);
        assert!(matches!(refused, Err(Error::Open(OpenError::Symlink { .. }))));
    }
    store.close().unwrap();
    // Who has none keeps those away who want one.
    let plain = Store::open(&path).unwrap();
    let other = Store::builder().journal_bytes(JOURNAL_BYTES_MIN).open(&path);
    assert!(matches!(other, Err(Error::Open(OpenError::Locked { .. }))));
    assert!(!journal(&path).exists());
    plain.write(|tx| tx.append(event(1))).unwrap();
    for bytes in [1, JOURNAL_BYTES_MIN - 1, JOURNAL_BYTES_MAX + 1] {
        let refused = Store::builder().journal_bytes(bytes).open(folder.path().join("c.redb"));
        assert!(refused.unwrap_err().to_string().contains("journal_bytes"));
    }
}
