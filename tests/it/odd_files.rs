//! Odd files and odd surroundings. Each is refused by the name that the application gave, with a text that says what is there and
//! what to do; or the store goes on.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use onewrite::redb::Database;
use onewrite::{Error, Event, OpenError, Store, StoreBuilder};

use crate::scratch::{audit, can_run, child, child_under, put, task};

const JOURNAL: usize = 1 << 20;

fn refused(builder: StoreBuilder, path: &Path) -> (OpenError, String) {
    match builder.open(path) {
        Err(Error::Open(error)) => {
            let text = error.to_string();
            assert!(text.contains(&*path.to_string_lossy()), "the error must name {path:?}: {text}");
            assert!(!text.contains(".creating-"), "a temporary file is named: {text}");
            (error, text)
        }
        other => panic!("{path:?} must be refused, got {other:?}"),
    }
}

fn names(folder: &Path) -> Vec<OsString> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// A store that has been written to and crashed: its file, and its journal if it has one.
fn crashed(folder: &Path, name: &str, journal: usize) -> PathBuf {
    let live = folder.join(format!("live-{name}"));
    let store = Store::builder().journal_bytes(journal).open(&live).unwrap();
    (0..10).for_each(|n| drop(put(&store, n).unwrap()));
    let path = folder.join(name);
    std::fs::copy(&live, &path).unwrap();
    if journal > 0 {
        std::fs::copy(folder.join(format!("live-{name}.journal")), folder.join(format!("{name}.journal")))
            .unwrap();
    }
    store.close().unwrap();
    std::fs::remove_file(live).unwrap();
    path
}

/// Goal: an empty file is neither a new store nor a missing one. The error says that it is empty, and how to ask for a new store.
/// Method: each way of opening but the one that asks; the file stays as it is, and nothing is left beside it.
#[test]
fn an_empty_file_is_refused_unless_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    std::fs::write(&path, "").unwrap();
    let builders = [
        Store::builder(),
        Store::builder().create_if_missing(false),
        Store::builder().adopt_existing(true),
        Store::builder().journal_bytes(JOURNAL),
        Store::builder().journal_bytes(JOURNAL).abandon_missing_journal(true).create_if_missing(false),
    ];
    for builder in builders {
        let (error, text) = refused(builder, &path);
        assert!(matches!(error, OpenError::Empty { journal: None, .. }), "{error:?}");
        assert!(text.contains("is empty") && text.contains("overwrite_empty(true)"), "{text}");
        assert!(!text.contains("not found") && !text.contains("No such file"), "{text}");
    }
    assert_eq!(names(folder.path()), ["a.redb"]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);

    for journal in [0, JOURNAL] {
        let path = folder.path().join(format!("asked-{journal}.redb"));
        std::fs::write(&path, "").unwrap();
        let asking = Store::builder().overwrite_empty(true).create_if_missing(false).journal_bytes(journal);
        let store = asking.open(&path).unwrap();
        put(&store, 0).unwrap();
        store.close().unwrap();
        assert_eq!(audit(&Store::open(&path).unwrap()), [0]);
    }
    // What makes an empty file and hands it on.
    let temporary = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
    assert!(matches!(refused(Store::builder(), temporary.path()).0, OpenError::Empty { .. }));
    put(&Store::builder().overwrite_empty(true).open(temporary.path()).unwrap(), 0).unwrap();
}

/// Goal: where a journal lies beside a file that was lost, the error says that a store was here. Asking for a new store does not help. Method: a crashed store whose file is emptied, zeroed, or replaced by text.
#[test]
fn a_file_that_was_lost_beside_its_journal_is_reported_as_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = crashed(folder.path(), "b.redb", JOURNAL);
    let journal = folder.path().join("b.redb.journal");
    let (whole, held) = (std::fs::read(&path).unwrap(), std::fs::read(&journal).unwrap());
    for left in [vec![], vec![0; 7], vec![0; 65536], b"some text".repeat(1000)] {
        std::fs::write(&path, &left).unwrap();
        for builder in [Store::builder(), Store::builder().overwrite_empty(true).journal_bytes(JOURNAL)] {
            let (error, text) = refused(builder, &path);
            assert!(text.contains("b.redb.journal") && text.contains("has lost its file"), "{text}");
            assert_eq!(matches!(error, OpenError::Empty { journal: Some(_), .. }), left.is_empty());
        }
        assert!(std::fs::read(&path).unwrap() == left && std::fs::read(&journal).unwrap() == held);
    }
    std::fs::write(&path, whole).unwrap();
    assert_eq!(audit(&Store::open(&path).unwrap()), (0..10).collect::<Vec<_>>());
}

/// Goal: what a failed copy leaves is refused with what is wrong with it, and not written to. Method: files of zeros, and a store's file cut
/// at each kind of place.
#[test]
fn zeros_and_stumps_are_refused_for_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.redb");
    let store = Store::open(&path).unwrap();
    (0..10).for_each(|n| drop(put(&store, n).unwrap()));
    store.close().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let try_one = |bytes: &[u8], says: &str| {
        std::fs::write(&path, bytes).unwrap();
        for builder in [
            Store::builder(),
            Store::builder().journal_bytes(JOURNAL),
            Store::builder().overwrite_empty(true),
        ] {
            let (error, text) = refused(builder, &path);
            assert!(matches!(error, OpenError::NotAStore { .. } | OpenError::Damaged { .. }), "{error:?}");
            assert!(text.contains(says), "{} bytes: {text}", bytes.len());
        }
        assert!(std::fs::read(&path).unwrap() == bytes, "it was written to");
    };
    for len in [1, 8, 9, 100, 320, 4096, 1 << 20] {
        try_one(&vec![0; len], "zeros");
    }
    for len in [1, 8, 9, 64, 319] {
        try_one(&whole[..len], &format!("it is {len} bytes long"));
    }
    for len in [320, 4095, 4096, 8192, 70_000] {
        try_one(&whole[..len], "damaged");
    }
    try_one(b"#!/bin/sh\nexit 0\n", "not as a redb database does");
}

/// Goal: a folder, a pipe, a socket, a device and a link are refused by name at once: nothing is opened that may wait. Method: each, given as
/// the store's path and standing at its journal's place, in a child that is given 20 s.
#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("folder")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    Store::open(at("real")).unwrap().close().unwrap();
    std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
    for name in ["pipe", "real.journal", ".real2.creating-1"] {
        assert!(Command::new("mkfifo").arg(at(name)).status().unwrap().success());
        assert!(std::fs::metadata(at(name)).unwrap().file_type().is_fifo());
    }
    let mut child = child("odd_files::child_opens_odd_files", folder.path(), "").spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success());
}

#[test]
fn child_opens_odd_files() {
    let Some((folder, _)) = task() else { return };
    for journal in [0, JOURNAL] {
        let open = |path: &Path| refused(Store::builder().journal_bytes(journal), path);
        for (name, says) in [("folder", "a folder"), ("pipe", "a pipe"), ("socket", "a socket")] {
            let (error, text) = open(&folder.join(name));
            assert!(matches!(error, OpenError::NotAStore { .. }) && text.contains(says), "{text}");
        }
        for device in ["/dev/null", "/dev/zero", "/dev/full", "/dev/tty"] {
            assert!(open(Path::new(device)).1.contains("a device"));
        }
        assert!(matches!(open(&folder.join("link")).0, OpenError::Symlink { .. }));
    }
    let in_the_way = Store::builder().journal_bytes(JOURNAL).open(folder.join("real"));
    assert!(matches!(in_the_way, Err(Error::Open(OpenError::JournalInTheWay { .. }))), "{in_the_way:?}");
    // Such a name is no left-over of ours.
    Store::open(folder.join("real2")).unwrap();
    assert!(folder.join(".real2.creating-1").exists());
}

/// Goal: every length of name that the file system takes works, with a journal too, across a crash; what is longer is refused by its name.
/// Method: names of 1 to 255 bytes; two of one length that differ in their last byte keep their journals apart.
#[test]
fn names_as_long_as_the_file_system_takes() {
    let folder = tempfile::tempdir().unwrap();
    for len in [1, 199, 208, 209, 230, 247, 248, 254, 255] {
        for journal in [0, JOURNAL] {
            let name = "s".repeat(len - 1);
            let paths = ["1", "2"].map(|end| folder.path().join(format!("{name}{end}")));
            let stores =
                paths.clone().map(|path| Store::builder().journal_bytes(journal).open(path).unwrap());
            for (at, store) in stores.iter().enumerate() {
                (0..=at as u64).for_each(|n| drop(put(store, n).unwrap()));
            }
            let there = names(folder.path());
            assert_eq!(there.len(), if journal == 0 { 2 } else { 4 }, "{len}: {there:?}");
            let elsewhere = tempfile::tempdir().unwrap();
            for name in there {
                std::fs::copy(folder.path().join(&name), elsewhere.path().join(&name)).unwrap();
            }
            for (at, path) in paths.iter().enumerate() {
                let copy = elsewhere.path().join(path.file_name().unwrap());
                assert_eq!(audit(&Store::open(copy).unwrap()), (0..=at as u64).collect::<Vec<_>>());
            }
            stores.into_iter().for_each(|store| store.close().unwrap());
            assert_eq!(names(folder.path()).len(), 2, "{len}: something is left");
            paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
        }
    }
    let (error, text) = refused(Store::builder(), &folder.path().join("s".repeat(256)));
    assert!(matches!(error, OpenError::Io { .. }) && text.contains("too long"), "{text}");
    assert_eq!(names(folder.path()), [""; 0]);
}

/// Goal: names that are no text work, and what one store's creation clears away is never another's. Method: names that look alike as text; left-overs
/// of each, and files whose names only begin as a left-over's does.
#[test]
fn names_that_are_no_text_are_kept_apart() {
    let folder = tempfile::tempdir().unwrap();
    let name = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let left =
        [&b".\xff.creating-1"[..], b".\xfe.creating-1", b".\xff.creating-x", b".\xff.creating-a.creating-1"];
    for left in left {
        std::fs::write(folder.path().join(name(left)), "half").unwrap();
    }
    for journal in [0, JOURNAL] {
        let stores = [&b"\xff"[..], b"\xfe", b"\xc3("].map(|bytes| {
            Store::builder().journal_bytes(journal).open(folder.path().join(name(bytes))).unwrap()
        });
        stores.iter().for_each(|store| {
            drop(store.write(|tx| tx.append(Event::bytes("t", "").unpublished())).unwrap())
        });
        stores.into_iter().for_each(|store| store.close().unwrap());
        if journal == 0 {
            let left: Vec<_> = names(folder.path())
                .into_iter()
                .filter(|name| name.to_string_lossy().contains("creating"))
                .collect();
            assert_eq!(left, [name(b".\xff.creating-a.creating-1"), name(b".\xff.creating-x")]);
        }
    }
}

/// Goal: a path that is written as a folder's is refused as that, whether anything is there or not, and nothing is left behind.
#[test]
fn a_path_that_ends_as_a_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    Store::open(folder.path().join("there")).unwrap().close().unwrap();
    for path in ["new/", "new//", "new/.", "there/", "there/.", "./", "..", "new/.."] {
        let given = PathBuf::from(format!("{}/{path}", folder.path().display()));
        let (error, text) = refused(Store::builder(), &given);
        assert!(matches!(error, OpenError::NotAStore { .. }), "{path}: {text}");
        assert!(text.contains("folder") || text.contains("names no file"), "{path}: {text}");
    }
    for path in ["", "/", ".", ".."] {
        let error = Store::open(path).unwrap_err();
        assert!(matches!(&error, Error::Open(OpenError::NotAStore { .. })), "{path}: {error}");
    }
    assert_eq!(names(folder.path()), ["there"]);
}

/// Goal: a folder that is missing, is a file, or may not be written is named as it was given, never by a temporary file. Method: absolute and
/// relative paths; for root, to whom permissions mean nothing, `/sys`.
#[test]
fn a_folder_that_does_not_serve_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent");
    let (error, text) = refused(Store::builder(), &absent.join("a.redb"));
    assert!(matches!(&error, OpenError::Io { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound));
    assert!(text.contains(&format!("its folder {} does not exist", absent.display())), "{text}");
    let (_, text) = refused(Store::builder().create_if_missing(false), &absent.join("a.redb"));
    assert!(text.starts_with("cannot open"), "{text}");

    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (error, text) = refused(Store::builder(), &file.join("a.redb"));
    assert!(matches!(error, OpenError::Io { .. }) && text.contains("ot a directory"), "{text}");

    let closed = folder.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o555)).unwrap();
    let is_root = std::fs::write(closed.join("probe"), "").is_ok();
    let closed = if is_root { PathBuf::from("/sys") } else { closed };
    let (error, text) = refused(Store::builder(), &closed.join("a.redb"));
    assert!(matches!(error, OpenError::Io { action: "create", .. }), "{text}");
    assert!(text.contains(&format!("its folder {} is", closed.display())), "{text}");

    let reported = child("odd_files::child_opens_a_relative_path", folder.path(), "").output().unwrap();
    assert!(reported.status.success(), "{}", String::from_utf8_lossy(&reported.stdout));
}

#[test]
fn child_opens_a_relative_path() {
    let Some((folder, _)) = task() else { return };
    std::env::set_current_dir(&folder).unwrap();
    let text = Store::open("absent/a.redb").unwrap_err().to_string();
    assert!(text.starts_with("cannot create absent/a.redb: its folder "), "{text}");
    std::fs::write("empty", "").unwrap();
    let text = Store::open("empty").unwrap_err().to_string();
    assert!(text.starts_with("empty is empty"), "{text}");
    let store = Store::builder().journal_bytes(JOURNAL).open("relative").unwrap();
    assert_eq!(store.path(), std::env::current_dir().unwrap().join("relative"));
    assert!(Store::open("relative").unwrap_err().to_string().starts_with("relative is locked"));
}

/// Goal: a database of an older or newer redb is refused with its format and the way to bring it up. Method: a database whose newest states say
/// that they are of another version, which the engine looks at before all else.
#[test]
fn a_database_of_another_redb_is_refused_with_a_way_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.redb");
    drop(Database::create(&path).unwrap());
    let whole = std::fs::read(&path).unwrap();
    for (version, says) in [(1_u8, "redb 1"), (2, "Database::upgrade"), (4, "file format 4")] {
        let mut other = whole.clone();
        (other[64], other[192]) = (version, version);
        std::fs::write(&path, &other).unwrap();
        for journal in [0, JOURNAL] {
            let (error, text) = refused(Store::builder().journal_bytes(journal), &path);
            assert!(matches!(error, OpenError::NotAStore { .. }), "{error:?}");
            assert!(text.contains(says) && text.contains(&format!("file format {version}")), "{text}");
        }
        assert!(std::fs::read(&path).unwrap() == other, "it was written to");
    }
}

/// Goal: where folders cannot be synced a store is made, written, crashed, opened and closed, with a journal and without; where the sync fails, the error
/// names the folder. Method: `strace` answers every `fsync`, which is for folders alone, since files take `fdatasync`.
#[test]
fn a_folder_that_cannot_be_synced_ends_nothing() {
    if !can_run("strace", &["-o", "/dev/null", "true"]) {
        println!("strace cannot run here: only the test of `create` shows this");
        return;
    }
    for (error, is_real) in
        [("EINVAL", false), ("EOPNOTSUPP", false), ("EPERM", false), ("EIO", true), ("ENOSPC", true)]
    {
        let folder = tempfile::tempdir().unwrap();
        let inject = format!("inject=fsync:error={error}");
        let program = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", &inject];
        let argument = if is_real { "fails" } else { "" };
        let output =
            child_under(&program, "odd_files::child_lives_without_folder_syncs", folder.path(), argument)
                .output()
                .unwrap();
        assert!(output.status.success(), "{error}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn child_lives_without_folder_syncs() {
    let Some((folder, argument)) = task() else { return };
    for journal in [0, JOURNAL] {
        let path = folder.join(format!("{journal}.redb"));
        let open = || Store::builder().journal_bytes(journal).open(&path);
        if argument == "fails" {
            let text = open().unwrap_err().to_string();
            assert!(text.starts_with(&format!("cannot sync {}: ", folder.display())), "{text}");
            continue;
        }
        let store = open().unwrap();
        put(&store, 0).unwrap();
        store.close().unwrap();
        let store = open().unwrap();
        put(&store, 1).unwrap();
        store.close().unwrap();
        assert_eq!(audit(&open().unwrap()), [0, 1]);
        let copy = crashed(&folder, &format!("{journal}-copy.redb"), journal);
        assert_eq!(audit(&Store::open(copy).unwrap()), (0..10).collect::<Vec<_>>());
    }
}
