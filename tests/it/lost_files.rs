//! A store whose file, or journal, is deleted, moved or replaced while it is open: it says so soon and at its close, takes nothing more, and
//! touches nothing that has taken the name. What only looks like that changes nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use onewrite::{Error, Event, OpenError, Store};

use crate::scratch::{audit, child, put, task};

const JOURNAL: usize = 1 << 20;
/// Commits after which a store must have looked where its file is.
const COMMITS_MAX: u64 = 200;

fn open(path: &Path, journal: usize) -> Store {
    Store::builder().journal_bytes(journal).open(path).unwrap()
}

fn journal(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".journal");
    name.into()
}

fn assert_reported(error: Error, path: &Path, says: &str) {
    let text = error.to_string();
    assert!(matches!(error, Error::Poisoned { .. }), "{error:?}");
    assert!(text.contains(path.to_str().unwrap()) && text.contains(says), "{says}: {text}");
}

type Loss = fn(&Path);

/// What may happen to a name, and what is said of it.
fn losses() -> Vec<(&'static str, Loss, &'static str)> {
    fn aside(path: &Path) {
        fs::rename(path, path.with_extension("aside")).unwrap();
    }
    vec![
        ("deleted", |path| fs::remove_file(path).unwrap(), "nothing is there"),
        ("moved", aside, "nothing is there"),
        (
            "replaced by a rename",
            |path| {
                let other = path.with_extension("other");
                fs::write(&other, "other").unwrap();
                fs::rename(other, path).unwrap();
            },
            "another file is there",
        ),
        (
            "replaced by a link to itself",
            |path| {
                aside(path);
                std::os::unix::fs::symlink(path.with_extension("aside"), path).unwrap();
            },
            "another file is there",
        ),
        (
            "replaced by a folder",
            |path| {
                aside(path);
                fs::create_dir(path).unwrap();
            },
            "another file is there",
        ),
    ]
}

/// Goal: acknowledged writes do not go on into a file that no name leads to: an error names the path and says what is there, after a bounded number of
/// commits, and at the close. Method: each loss of the file and of the journal; one store writes on, one is closed at once.
#[test]
fn a_file_that_loses_its_name_poisons_its_store() {
    for with_journal in [0, JOURNAL] {
        for (name, lose, says) in losses() {
            for of_journal in [false, true] {
                if of_journal && with_journal == 0 {
                    continue;
                }
                for writes_on in [true, false] {
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("a.redb");
                    let store = open(&path, with_journal);
                    (0..3).for_each(|n| drop(put(&store, n).unwrap()));
                    let lost = if of_journal { journal(&path) } else { path.clone() };
                    lose(&lost);
                    println!("{name}, {}", lost.display());
                    if writes_on {
                        let error = (3..3 + COMMITS_MAX).find_map(|n| put(&store, n).err());
                        assert_reported(error.expect("it never says so"), &lost, says);
                        assert_reported(store.begin().unwrap_err(), &lost, says);
                    }
                    let other = store.clone();
                    assert_reported(store.close().unwrap_err(), &lost, says);
                    assert!(put(&other, 999).is_err());
                    if says.starts_with("another") {
                        assert!(fs::symlink_metadata(&lost).is_ok(), "what has taken the name was removed");
                    }
                }
            }
        }
    }
}

/// Goal: a close removes no journal of another store that has taken the path. It cost 34 of 1,000 acknowledged events once. Method: a store is
/// moved away with its journal, another is made at its path, the first is closed, the second crashes.
#[test]
fn a_close_leaves_the_journal_of_another_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let first = open(&path, JOURNAL);
    (0..10).for_each(|n| drop(put(&first, n).unwrap()));
    let aside = folder.path().join("aside");
    fs::create_dir(&aside).unwrap();
    fs::rename(&path, aside.join("a.redb")).unwrap();
    fs::rename(journal(&path), aside.join("a.redb.journal")).unwrap();
    let second = open(&path, JOURNAL);
    (0..34).for_each(|n| drop(put(&second, n).unwrap()));
    assert_reported(first.close().unwrap_err(), &path, "another file is there");
    assert!(journal(&path).exists(), "it was another store's");
    let crashed = folder.path().join("crashed.redb");
    fs::copy(&path, &crashed).unwrap();
    fs::copy(journal(&path), journal(&crashed)).unwrap();
    assert_eq!(audit(&Store::open(&crashed).unwrap()), (0..34).collect::<Vec<_>>());
    second.close().unwrap();
    assert_eq!(audit(&Store::open(aside.join("a.redb")).unwrap()), (0..10).collect::<Vec<_>>());
}

/// Goal: a journal in use is nobody else's, though its store's file has gone and it holds no commit yet. Method: another store at the same path asks
/// for it; the first goes on writing into it until it notices, and has all that it reported.
#[test]
fn a_journal_in_use_is_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let first = open(&path, JOURNAL);
    fs::rename(&path, folder.path().join("aside.redb")).unwrap();
    let refused = Store::builder().journal_bytes(JOURNAL).open(&path);
    match refused {
        Err(Error::Open(OpenError::Locked { path: locked })) => assert_eq!(locked, journal(&path)),
        other => panic!("{other:?}"),
    }
    let acknowledged = (0..COMMITS_MAX).take_while(|n| put(&first, *n).is_ok()).count() as u64;
    assert!(first.close().is_err());
    let moved = Store::open(folder.path().join("aside.redb")).unwrap();
    assert_eq!(audit(&moved), (0..acknowledged).collect::<Vec<_>>());
    // What the first has left free.
    drop(open(&path, JOURNAL));
}

/// Goal: nothing is taken for a loss that is none. Method: the process changes its folder, the link that its path goes through is turned elsewhere,
/// and the file gets another name beside its own, loses that, and is read and copied; thousands of commits, idle times and the close see nothing.
#[test]
fn what_is_no_loss_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for at in ["first", "second", "elsewhere"] {
        fs::create_dir(folder.path().join(at)).unwrap();
    }
    let output = child("lost_files::child_writes_through_changes", folder.path(), "").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn child_writes_through_changes() {
    let Some((folder, _)) = task() else { return };
    let link = folder.join("link");
    for with_journal in [0, JOURNAL] {
        std::env::set_current_dir(&folder).unwrap();
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink("first", &link).unwrap();
        let paths =
            [PathBuf::from("relative.redb"), "./first/../dotted.redb".into(), "link/linked.redb".into()];
        let stores = paths.map(|path| open(&path, with_journal));
        std::env::set_current_dir("elsewhere").unwrap();
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("second", &link).unwrap();
        let first = stores[0].stats().unwrap().next_seq;
        for n in first..first + COMMITS_MAX {
            stores.iter().for_each(|store| drop(put(store, n).unwrap()));
            if n % 50 == 7 {
                let (file, name) = (folder.join("relative.redb"), folder.join("backup.redb"));
                fs::hard_link(&file, &name).unwrap();
                fs::copy(&name, folder.join("copied.redb")).unwrap();
                fs::remove_file(name).unwrap();
                std::thread::sleep(Duration::from_millis(1_100));
            }
        }
        stores.into_iter().for_each(|store| store.close().unwrap());
    }
    for (place, names) in [("", ["relative.redb", "dotted.redb"].as_slice()), ("first", &["linked.redb"])] {
        for name in names {
            assert_eq!(
                audit(&Store::open(folder.join(place).join(name)).unwrap()).len() as u64,
                2 * COMMITS_MAX
            );
        }
    }
    let left = |at: &str| fs::read_dir(folder.join(at)).unwrap().count();
    assert_eq!((left("first"), left("second"), left("elsewhere")), (1, 0, 0));
}

/// Goal: a folder above that is renamed takes the file from its path: the store says so, and what it reported is in the file where that is now.
#[test]
fn a_renamed_folder_is_a_moved_file() {
    for with_journal in [0, JOURNAL] {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("above/below")).unwrap();
        let path = folder.path().join("above/below/a.redb");
        let store = open(&path, with_journal);
        fs::rename(folder.path().join("above"), folder.path().join("renamed")).unwrap();
        let acknowledged = (0..COMMITS_MAX).take_while(|n| put(&store, *n).is_ok()).count() as u64;
        assert_reported(store.close().unwrap_err(), &path, "nothing is there");
        let moved = Store::open(folder.path().join("renamed/below/a.redb")).unwrap();
        assert_eq!(audit(&moved), (0..acknowledged).collect::<Vec<_>>());
    }
}

/// Goal: a write that begins a second after the loss is refused, though none came before it. Method: a store that is idle when its file goes.
#[test]
fn the_first_write_after_a_pause_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    put(&store, 0).unwrap();
    std::thread::sleep(Duration::from_millis(1_100));
    fs::remove_file(&path).unwrap();
    std::thread::sleep(Duration::from_millis(1_100));
    assert_reported(
        store.write(|tx| tx.append(Event::bytes("t", "").unpublished())).unwrap_err(),
        &path,
        "nothing is there",
    );
    drop(store);
    put(&Store::open(&path).unwrap(), 0).unwrap();
}

/// Goal: an idle store notices too, with no call of the application, whoever made the last commit. Method: the file goes right after a commit on
/// the caller's thread, and after an exclusive transaction; then nothing is called.
#[test]
fn an_idle_store_notices() {
    for exclusive in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        let event = || Event::bytes("t", "").unpublished();
        store.write(move |tx| tx.append(event())).unwrap();
        if exclusive {
            let tx = store.begin().unwrap();
            tx.append(event()).unwrap();
            tx.commit().unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        let began = Instant::now();
        while store.stats().unwrap().poisoned.is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "it never looks");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
