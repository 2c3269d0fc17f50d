//! Files of other users at the names that a store opens: none is waited for, adopted, or passed over in silence.

use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use onewrite::limits::JOURNAL_BYTES_MIN;
use onewrite::{Error, OpenError, Store, StoreBuilder};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::scratch::{Warnings, audit, child, put, task};

fn journaled() -> StoreBuilder {
    Store::builder().journal_bytes(JOURNAL_BYTES_MIN)
}

fn journal(path: &Path) -> PathBuf {
    path.with_extension("redb.journal")
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn made_with_mode(path: &Path, content: &[u8], mode: u32) {
    fs::write(path, content).unwrap();
    set_mode(path, mode);
}

/// A store with ten events that has crashed behind its journal.
fn crashed(folder: &Path) -> PathBuf {
    let (live, path) = (folder.join("live.redb"), folder.join("a.redb"));
    let store = journaled().open(&live).unwrap();
    (0..10).for_each(|n| drop(put(&store, n).unwrap()));
    fs::copy(&live, &path).unwrap();
    fs::copy(journal(&live), journal(&path)).unwrap();
    store.close().unwrap();
    path
}

#[track_caller]
fn not_private(builder: StoreBuilder, path: &Path, says: &str) {
    match builder.open(path) {
        Err(Error::Open(OpenError::JournalNotPrivate { path: named, reason })) => {
            assert_eq!(named, journal(path));
            assert!(reason.contains(says), "{reason}");
        }
        other => panic!("it must be refused for {says}: {other:?}"),
    }
}

/// Goal: a journal that another user can have made, read or changed is not used, and nothing is written; closed again, it is. Method: the journal of a
/// crash, and one without content, with modes, names and (as root) an owner that let others in; opened with a journal wanted and without.
#[test]
fn a_journal_that_others_can_have_prepared_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = crashed(folder.path());
    let side = journal(&path);
    let before = (fs::read(&path).unwrap(), fs::read(&side).unwrap());
    let refused = |says: &str| {
        not_private(journaled(), &path, says);
        not_private(Store::builder(), &path, says);
        not_private(Store::builder().abandon_missing_journal(true), &path, says);
        assert!(
            before == (fs::read(&path).unwrap(), fs::read(&side).unwrap()),
            "{says}: something is written"
        );
    };
    for mode in [0o666, 0o644, 0o660, 0o640, 0o604, 0o602, 0o601] {
        set_mode(&side, mode);
        refused(&format!("{mode:04o}"));
    }
    set_mode(&side, 0o600);
    fs::hard_link(&side, folder.path().join("another-name")).unwrap();
    refused("2 names");
    fs::remove_file(folder.path().join("another-name")).unwrap();
    let is_root = chown(&side, Some(65_534), None).is_ok();
    if is_root {
        refused("user 65534");
        // Of a file that is the same user's, it has no more power than the file.
        chown(&path, Some(65_534), None).unwrap();
    }
    assert_eq!(audit(&Store::open(&path).unwrap()), (0..10).collect::<Vec<_>>());
    assert!(!side.exists());

    // What was prepared for a generation that is to begin.
    for content in [&b""[..], &[0; 5000]] {
        made_with_mode(&side, content, 0o666);
        not_private(journaled(), &path, "0666");
        fs::remove_file(&side).unwrap();
    }
    let store = journaled().open(&path).unwrap();
    assert_eq!(fs::metadata(&side).unwrap().mode() & 0o7777, 0o600);
    store.close().unwrap();
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// Goal: a process that opened the journal's place before sees nothing of a commit. Method: a blank file of our own at its place, held open by a spy;
/// and the journal of a crash, held the same way, while the store is opened again.
#[test]
fn a_journal_is_made_as_a_temporary_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = crashed(folder.path());
    let spied = |written: bool| {
        let mut spy = File::open(journal(&path)).unwrap();
        let length = spy.metadata().unwrap().len();
        let store = journaled().open(&path).unwrap();
        let inode = |meta: fs::Metadata| meta.ino();
        assert_ne!(inode(spy.metadata().unwrap()), inode(fs::metadata(journal(&path)).unwrap()));
        put(&store, 100).unwrap();
        let mut seen = Vec::new();
        spy.seek(SeekFrom::Start(0)).unwrap();
        spy.read_to_end(&mut seen).unwrap();
        assert_eq!((seen.len() as u64, seen.iter().any(|byte| *byte != 0)), (length, written));
        store.close().unwrap();
    };
    spied(true);
    made_with_mode(&journal(&path), &[0; 100], 0o600);
    spied(false);
}

/// Goal: nothing at a name that looks like a left-over of ours, or like the journal's, is waited for. Method: pipes, sockets, links and folders at such
/// names, in a child that is given a minute; stores are made and opened, with a journal and without.
#[test]
fn no_name_makes_open_wait() {
    let folder = tempfile::tempdir().unwrap();
    let mut sockets = Vec::new();
    for file in ["new.redb", "new.redb.journal", "old.redb.journal"] {
        for (at, kind) in ["pipe", "socket", "link", "folder"].into_iter().enumerate() {
            let name = format!(".{file}.creating-018f0000-0000-7000-8000-00000000000{at}");
            let path = folder.path().join(&name);
            match kind {
                "pipe" => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
                "socket" => {
                    // A socket's path is short.
                    let short = folder.path().join("s");
                    sockets.push(UnixListener::bind(&short).unwrap());
                    fs::rename(short, &path).unwrap();
                }
                "link" => symlink(folder.path().join("nowhere"), &path).unwrap(),
                _ => fs::create_dir(&path).unwrap(),
            }
        }
    }
    Store::open(folder.path().join("old.redb")).unwrap().close().unwrap();
    let mut child = child("hostile_files::child_opens_beside_odd_names", folder.path(), "").spawn().unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success());
}

#[test]
fn child_opens_beside_odd_names() {
    let Some((folder, _)) = task() else { return };
    for name in ["new.redb", "old.redb"] {
        for builder in [Store::builder(), journaled()] {
            let store = builder.open(folder.join(name)).unwrap();
            drop(store.write(|_| Ok(())).unwrap());
            store.close().unwrap();
        }
    }
    let names = fs::read_dir(&folder)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains(".creating-"));
    assert_eq!(names.count(), 12, "only what is ours is removed");
}

/// Goal: a lock of a whole file that is no store's is reported as that, with a way out, and a store's as a store's. Method: a reader holds a shared and an exclusive
/// `flock`, on the file of a store that is closed and of one that has crashed, with a journal and without; then it lets go.
#[test]
fn a_readers_lock_is_reported_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain.redb");
    Store::open(&plain).unwrap().close().unwrap();
    let path = crashed(folder.path());
    for path in [&plain, &path] {
        for builder in [Store::builder(), journaled()] {
            for exclusive in [false, true] {
                let reader = File::open(path).unwrap();
                if exclusive {
                    reader.lock().unwrap()
                } else {
                    reader.lock_shared().unwrap()
                }
                match builder.clone().open(path) {
                    Err(Error::Open(error @ OpenError::LockedByReader { .. })) => {
                        let text = error.to_string();
                        assert!(text.contains(path.to_str().unwrap()) && text.contains("lslocks"), "{text}");
                    }
                    other => panic!("{other:?}"),
                }
                reader.unlock().unwrap();
            }
        }
        let store = Store::open(path).unwrap();
        let other = journaled().open(path);
        assert!(matches!(other, Err(Error::Open(OpenError::Locked { .. }))), "{other:?}");
        // Beside a store, a reader gets no lock of the whole file.
        assert!(File::open(path).unwrap().try_lock_shared().is_err());
        store.close().unwrap();
    }
}

/// Goal: a store's file that others may read or change, or that has two names, is opened with one warning, which names file and mode; others with none.
/// Method: a process that collects what is logged while it opens a file of each mode, writes, and lets a second pass.
#[test]
fn a_loose_file_is_warned_of_once() {
    let folder = tempfile::tempdir().unwrap();
    let output = child("hostile_files::child_opens_loose_files", folder.path(), "").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("all well"), "{out}{err}");
}

#[test]
fn child_opens_loose_files() {
    let Some((folder, _)) = task() else { return };
    let warnings = Warnings::default();
    tracing_subscriber::registry().with(warnings.clone()).init();
    let path = folder.join("a.redb");
    let warned = |mode: u32| -> Vec<String> {
        for builder in [Store::builder(), journaled()] {
            set_mode(&path, mode);
            let store = builder.open(&path).unwrap();
            (0..70).for_each(|_| drop(store.write(|_| Ok(())).unwrap()));
            store.close().unwrap();
        }
        std::mem::take(&mut *warnings.0.lock().unwrap())
    };
    Store::open(&path).unwrap().close().unwrap();
    for mode in [0o600, 0o700] {
        assert_eq!(warned(mode), [""; 0]);
    }
    for mode in [0o644, 0o640, 0o666, 0o604, 0o602, 0o660] {
        let lines = warned(mode);
        assert_eq!(lines.len(), 2, "one for each opening: {lines:?}");
        let reported = |line: &String| line.contains(&format!("{mode:04o}")) && line.contains("a.redb");
        assert!(lines.iter().all(reported), "{lines:?}");
    }
    fs::hard_link(&path, folder.join("b.redb")).unwrap();
    let lines = warned(0o600);
    assert!(lines.len() == 2 && lines.iter().all(|line| line.contains("names=2")), "{lines:?}");
    println!("all well");
}
