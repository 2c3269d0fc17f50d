//! Opening and creating: who owns the file, what is refused and how it is said, and what a crash may leave.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::{Database, ReadableDatabase, TableDefinition};
use onewrite::{Error, Event, ExpectedRevision, OpenError, RelayState, Snapshot, Store, Transaction};

use crate::scratch::{Random, STATE, audit, can_run, child, child_under, crash_copy, event, put, task};

const APP: TableDefinition<'_, &str, u64> = TableDefinition::new("app");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");

fn refusal(path: &Path) -> OpenError {
    match Store::open(path) {
        Err(Error::Open(error)) => {
            let text = error.to_string();
            assert!(text.contains(path.to_str().unwrap()), "the error must name the file: {text}");
            error
        }
        other => panic!("{path:?} must be refused, got {other:?}"),
    }
}

/// What files lie beside the store that should not.
fn left_over(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".creating-")).collect()
}

/// Goal: P10, one owner. A second open fails at once and names the file, in this process and from another; the refused
/// attempt does not loosen the owner's lock; dropping and closing both let go of it.
#[test]
fn a_second_opener_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("owned.redb");
    let store = Store::open(&path).unwrap();
    assert!(matches!(refusal(&path), OpenError::Locked { .. }));
    for _ in 0..2 {
        let output = child("store_open::child_reports_how_opening_went", &path, "").output().unwrap();
        let reported = String::from_utf8(output.stdout).unwrap();
        assert!(reported.contains("is locked") && reported.contains("owned.redb"), "{reported}");
    }
    put(&store, 0).unwrap();
    drop(store);
    let store = Store::open(&path).expect("dropped: free again");
    let other = store.clone();
    store.close().unwrap();
    let reported = child("store_open::child_reports_how_opening_went", &path, "").output().unwrap().stdout;
    assert!(
        String::from_utf8(reported).unwrap().contains("opened, 1 events"),
        "closed: free for another process"
    );
    assert!(matches!(put(&other, 1), Err(Error::Closed { .. })));
}

#[test]
fn child_reports_how_opening_went() {
    let Some((path, _)) = task() else { return };
    match Store::open(path) {
        Ok(store) => println!("opened, {} events", audit(&store).len()),
        Err(error) => println!("{error}"),
    }
}

/// Goal: what is no store is refused by name and not written to. Method: each kind of thing a path can name; where it
/// has bytes they are the same after.
#[test]
fn what_is_no_store_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);

    let real = at("real.redb");
    drop(Store::open(&real).unwrap());
    std::os::unix::fs::symlink(&real, at("link")).unwrap();
    std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
    assert!(matches!(refusal(&at("link")), OpenError::Symlink { .. }));
    assert!(matches!(refusal(&at("dangling")), OpenError::Symlink { .. }));
    assert!(!at("nowhere").exists(), "a dangling link is not followed to create a file");

    std::fs::create_dir(at("folder")).unwrap();
    assert!(matches!(refusal(&at("folder")), OpenError::NotAStore { .. }));
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    assert!(std::fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
    assert!(matches!(refusal(&at("pipe")), OpenError::NotAStore { .. }));
    assert!(matches!(refusal(Path::new("/dev/null")), OpenError::NotAStore { .. }));

    let mut random = Random(7);
    let mut samples: Vec<(&str, Vec<u8>)> = vec![
        ("one-byte", vec![0]),
        ("text", b"account,balance\nalice,100\n".repeat(300)),
        ("sqlite", [&b"SQLite format 3\0"[..], &[0; 8176]].concat()),
        ("zeroes", vec![0; 65536]),
        ("noise", (0..70_000).map(|_| random.next() as u8).collect()),
    ];
    let mut cut = std::fs::read(&real).unwrap();
    cut.truncate(100);
    samples.push(("cut", cut));
    for (name, bytes) in samples {
        std::fs::write(at(name), &bytes).unwrap();
        let error = refusal(&at(name));
        assert!(
            matches!(error, OpenError::NotAStore { .. } | OpenError::Damaged { .. }),
            "{name}: {error:?}"
        );
        assert_eq!(std::fs::read(at(name)).unwrap(), bytes, "{name} was written to");
    }
    assert_eq!(left_over(folder.path()), [""; 0]);
}

/// Goal: a redb database of the application's own is not made into a store by a wrong path, and is by `adopt_existing`,
/// its tables untouched.
#[test]
fn a_database_without_a_log_is_adopted_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.redb");
    let db = Database::create(&path).unwrap();
    let tx = db.begin_write().unwrap();
    tx.open_table(APP).unwrap().insert("alice", 100).unwrap();
    tx.commit().unwrap();
    drop(db);

    let error = refusal(&path);
    assert!(matches!(&error, OpenError::NotAStore { reason, .. } if reason.contains("adopt_existing")));
    let db = Database::open(&path).unwrap();
    assert_eq!(db.begin_read().unwrap().list_tables().unwrap().count(), 1, "refusing wrote to it");
    drop(db);

    let store = Store::builder().adopt_existing(true).open(&path).unwrap();
    put(&store, 0).unwrap();
    drop(store);
    let store = Store::open(&path).expect("it is a store now");
    assert_eq!(audit(&store), [0]);
    let snapshot = store.read().unwrap();
    assert_eq!(snapshot.open_table(APP).unwrap().get("alice").unwrap().unwrap().value(), 100);
}

/// Goal: a file of a later version is refused with both numbers; and one whose identity cannot be read as damaged.
/// Method: write the row by plain redb.
#[test]
fn a_newer_format_is_refused_by_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("newer.redb");
    drop(Store::open(&path).unwrap());
    let set = |name: &str, bytes: Option<&[u8]>| {
        let db = Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        match bytes {
            Some(bytes) => drop(tx.open_table(META).unwrap().insert(name, bytes).unwrap()),
            None => drop(tx.open_table(META).unwrap().remove(name).unwrap()),
        }
        tx.commit().unwrap();
    };
    set("format", Some(&7_u32.to_le_bytes()));
    assert!(matches!(refusal(&path), OpenError::NewerFormat { found: 7, supported: 6, .. }));
    let adopting = Store::builder().adopt_existing(true).open(&path);
    assert!(matches!(adopting, Err(Error::Open(OpenError::NewerFormat { .. }))), "adopting changes nothing");
    set("format", Some(&[1, 0]));
    assert!(matches!(refusal(&path), OpenError::Damaged { .. }));
    set("format", Some(&1_u32.to_le_bytes()));
    set("store_id", None);
    assert!(matches!(refusal(&path), OpenError::Damaged { .. }));
}

/// Goal: a file of an older format is brought up to date, with its events. Method: take away what it did not have.
#[test]
fn an_older_format_is_brought_up() {
    let since_3 = ["failures", "changes", "seen", "rejected"];
    bring_up(2, &since_3);
    bring_up(1, &[&["streams", "chunks", "snapshots"][..], &since_3].concat());
}

fn bring_up(format: u32, missing: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("older.redb");
    let store = Store::open(&path).unwrap();
    put(&store, 0).unwrap();
    store.close().unwrap();
    let db = Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    for name in missing.iter().map(|name| format!("onewrite.{name}")) {
        assert!(tx.delete_table(TableDefinition::<&[u8], &[u8]>::new(&name)).unwrap());
    }
    for name in ["onewrite.projections", "onewrite.captures"] {
        assert!(tx.delete_table(TableDefinition::<&str, &[u8]>::new(name)).unwrap());
    }
    tx.open_table(META).unwrap().insert("format", &format.to_le_bytes()[..]).unwrap();
    tx.commit().unwrap();
    drop(db);
    let store = Store::open(&path).unwrap();
    assert_eq!(audit(&store), [0]);
    let events = || [onewrite::Event::bytes("t", "").unpublished()];
    store.write(move |tx| tx.stream("a").append(events(), onewrite::ExpectedRevision::NoStream)).unwrap();
}

/// Goal: where the file cannot be made, the error says what and where. Method: a folder without write permission (for
/// root, to whom that means nothing, `/sys`), a folder that is not there, a file that must exist.
#[test]
fn what_cannot_be_created_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let closed = folder.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o555)).unwrap();
    let privileged = std::fs::write(closed.join("probe"), "").is_ok();
    let closed = if privileged { Path::new("/sys").to_owned() } else { closed };
    for folder in [closed, folder.path().join("absent")] {
        let Err(Error::Open(error)) = Store::open(folder.join("a.redb")) else { panic!("{folder:?} opened") };
        let text = error.to_string();
        assert!(matches!(error, OpenError::Io { .. }), "{error:?}");
        assert!(text.contains(folder.to_str().unwrap()) && text.contains("a.redb"), "{text}");
    }
    let missing = folder.path().join("missing.redb");
    let Err(Error::Open(error)) = Store::builder().create_if_missing(false).open(&missing) else { panic!() };
    assert!(matches!(&error, OpenError::Io { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound));
    assert!(error.to_string().contains("missing.redb"));
    assert!(!missing.exists());
}

/// Goal: a new file is its owner's alone, an empty file counts as none where that is said, and what a crashed creation left is cleared
/// away, but for what another process is making at this moment.
#[test]
fn creation_cleans_up_and_keeps_the_file_private() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new.redb");
    std::fs::write(&path, "").unwrap();
    for name in [".new.redb.creating-1", ".new.redb.creating-being-made", ".other.redb.creating-1"] {
        std::fs::write(folder.path().join(name), "half").unwrap();
    }
    let being_made = std::fs::File::open(folder.path().join(".new.redb.creating-being-made")).unwrap();
    being_made.lock().unwrap();
    let store = Store::builder().overwrite_empty(true).open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    put(&store, 0).unwrap();
    let mut left = left_over(folder.path());
    left.sort();
    assert_eq!(left, [".new.redb.creating-being-made", ".other.redb.creating-1"]);
}

/// Goal: of many who create the same store at once one wins and none destroys another's. Method: 8 threads open at one
/// moment, where there is no file and where there is an empty one; whoever got it writes; its writes are in the file.
#[test]
fn many_creators_leave_one_store() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..16_u64 {
        let path = folder.path().join(format!("{round}.redb"));
        if round % 2 == 0 {
            std::fs::write(&path, "").unwrap();
        }
        let start = Arc::new(Barrier::new(8));
        let openers = (0..8_u64).map(|n| {
            let (path, start) = (path.clone(), Arc::clone(&start));
            std::thread::spawn(move || {
                start.wait();
                match Store::builder().overwrite_empty(true).open(path) {
                    Ok(store) => {
                        put(&store, n).unwrap();
                        Some(n)
                    }
                    Err(Error::Open(OpenError::Locked { .. })) => None,
                    Err(other) => panic!("neither opened nor locked: {other}"),
                }
            })
        });
        let openers: Vec<_> = openers.collect();
        let mut won: Vec<u64> = openers.into_iter().filter_map(|opener| opener.join().unwrap()).collect();
        won.sort_unstable();
        assert!(!won.is_empty());
        assert_eq!(audit(&Store::open(&path).unwrap()), won, "round {round}: a store was replaced");
        assert_eq!(left_over(folder.path()), [""; 0]);
    }
}

/// Goal: of two that create over the same empty file the slower one does not replace the other's store. Method: `strace`
/// holds one child up while it makes its file and the other just before it puts its own in place, where it can run; who
/// says that it has written must be in the file.
#[test]
fn a_slow_creator_replaces_nothing() {
    if !can_run("strace", &["-o", "/dev/null", "true"]) {
        println!("strace cannot run here: only the race of many creators shows this");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    std::fs::write(&path, "").unwrap();
    let spawn = |calls: &str, inject: &str, n: &str| {
        let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:{inject}"));
        let program = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
        let mut child = child_under(&program, "store_open::child_opens_and_writes", &path, n);
        child.stdout(Stdio::piped()).spawn().unwrap()
    };
    let first = spawn("fdatasync", "delay_enter=500000:when=1", "0");
    let began = Instant::now();
    while left_over(folder.path()).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = spawn("rename,renameat,renameat2", "delay_enter=1500000", "1");
    let reported = [first, second].map(|child| child.wait_with_output().unwrap().stdout);
    let reported = reported.map(|reported| String::from_utf8(reported).unwrap());
    let wrote: Vec<u64> = (0..2).filter(|n| reported[*n as usize].contains("wrote")).collect();
    assert!(!wrote.is_empty(), "{reported:?}");
    assert_eq!(audit(&Store::open(&path).unwrap()), wrote, "a store that was in use was replaced");
}

#[test]
fn child_opens_and_writes() {
    let Some((path, n)) = task() else { return };
    match Store::builder().overwrite_empty(true).open(path) {
        Ok(store) => println!("wrote {:?}", put(&store, n.parse().unwrap()).unwrap().seqs()),
        Err(error) => println!("{error}"),
    }
}

/// Goal: P1 across an unclean end. Method: copy the file after each of many commits while the store is open, open the
/// copy; everything acknowledged is there, whole, and it takes writes.
#[test]
fn an_unclean_end_loses_nothing_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("live.redb")).unwrap();
    for n in 0..40 {
        put(&store, n).unwrap();
        if n % 5 == 0 {
            let copy = Store::open(crash_copy(&store, folder.path())).unwrap();
            assert_eq!(audit(&copy), (0..=n).collect::<Vec<_>>());
            put(&copy, n + 1).unwrap();
            assert_eq!(audit(&copy).len() as u64, n + 2);
        }
    }
}

fn open_idle(path: &Path, idle: Duration) -> Store {
    Store::builder().quick_repair_when_idle(idle).open(path).unwrap()
}

/// Waits until so many commits without a write are through.
fn until_saved(store: &Store, commits: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while store.stats().unwrap().commits_alone < commits {
        assert!(Instant::now() < deadline, "never idle: {:?}", store.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Goal: a crash while idle costs no verification, any other does, and none costs a write; idle is paid for once. Method: copies of the
/// file of a store that writes in both ways, on its caller's thread and in an exclusive transaction.
#[test]
fn a_store_that_dies_idle_opens_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_idle(&folder.path().join("live.redb"), Duration::from_millis(40));
    let died_idle = |count: u64| {
        let copy = Store::open(crash_copy(&store, folder.path())).unwrap();
        assert!(!copy.stats().unwrap().verified_at_open, "after {count}");
        assert_eq!(audit(&copy), (0..count).collect::<Vec<_>>());
        assert!(copy.verify().unwrap().is_whole());
        put(&copy, count).unwrap();
    };
    until_saved(&store, 1);
    for n in 0..6 {
        if n % 2 == 0 {
            put(&store, n).unwrap();
        } else {
            let tx = store.begin().unwrap();
            tx.open_table(STATE).unwrap().insert(n, n).unwrap();
            tx.append(event(n)).unwrap();
            tx.commit().unwrap();
        }
        until_saved(&store, n + 2);
        died_idle(n + 1);
    }
    // Long idle: once is enough.
    std::thread::sleep(Duration::from_millis(200));
    let stats = store.stats().unwrap();
    assert_eq!((stats.commits, stats.commits_alone), (6 + 7, 7));
    assert!(!stats.verified_at_open);

    let never = open_idle(&folder.path().join("never.redb"), Duration::MAX);
    put(&never, 0).unwrap();
    let copy = Store::open(crash_copy(&never, folder.path())).unwrap();
    assert!(copy.stats().unwrap().verified_at_open && audit(&copy) == [0]);

    let refused =
        Store::builder().quick_repair_when_idle(Duration::ZERO).open(folder.path().join("none.redb"));
    assert!(refused.unwrap_err().to_string().contains("quick_repair_when_idle"));
}

/// Goal: while writes flow there is no idle time, whatever the time since the store was opened. Method: writes for longer than the store is
/// to be idle for; again if the machine stood still for nearly as long.
#[test]
fn a_store_that_dies_busy_is_verified() {
    const IDLE: Duration = Duration::from_secs(2);
    let folder = tempfile::tempdir().unwrap();
    for attempt in 0.. {
        assert!(attempt < 5, "the machine stands still again and again");
        let store = open_idle(&folder.path().join(format!("{attempt}.redb")), IDLE);
        let (began, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
        let mut lap = || {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            longest
        };
        for n in 0.. {
            put(&store, n).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            lap();
            if began.elapsed() > IDLE * 3 / 2 {
                break;
            }
        }
        let saved = store.stats().unwrap().commits_alone;
        let copy = crash_copy(&store, folder.path());
        if lap() < IDLE / 2 {
            assert_eq!(saved, 0);
            assert!(Store::open(copy).unwrap().stats().unwrap().verified_at_open);
            return;
        }
    }
}

const IMAGES_PER_CHILD: u64 = 60;

/// Goal: P9 and S6: bytes that changed on the disk never come out as an event that was not appended, and do not bring
/// the process down. Method: 540 images of a store's file, a third of them of one that was not closed and a third of one that was not,
/// but had been idle (`quick_repair_when_idle`), each damaged in one way drawn from its seed; children open each and read every event, since the storage engine may panic where
/// nobody can catch it.
#[test]
fn damage_is_reported_and_never_read_as_an_event() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("live.redb")).unwrap();
    for n in 0..120 {
        put(&store, n).unwrap();
    }
    std::fs::copy(store.path(), folder.path().join("unclean")).unwrap();
    store.close().unwrap();
    std::fs::rename(folder.path().join("live.redb"), folder.path().join("clean")).unwrap();
    std::fs::copy(folder.path().join("clean"), folder.path().join("live.redb")).unwrap();
    let store = open_idle(&folder.path().join("live.redb"), Duration::from_millis(1));
    until_saved(&store, 1);
    std::fs::copy(store.path(), folder.path().join("idle")).unwrap();
    drop(store);
    let mut reported = String::new();
    for kind in ["unclean", "clean", "idle"] {
        for first in (0..180).step_by(IMAGES_PER_CHILD as usize) {
            let argument = format!("{kind} {first}");
            let output =
                child("store_open::child_reads_damaged_images", folder.path(), &argument).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.contains("all read"), "{argument}: {text}\n{errors}");
            reported.push_str(&text);
        }
    }
    let count = |what: &str| reported.lines().filter(|line| line.contains(what)).count();
    let (refused, whole, partly) = (count(": refused"), count(": whole"), count(": partly"));
    println!("{refused} refused, {whole} whole, {partly} with damaged records reported");
    assert_eq!(refused + whole + partly, 540);
    assert!(refused >= 20 && whole >= 20 && partly >= 20, "{reported}");
}

#[test]
fn child_reads_damaged_images() {
    let Some((folder, argument)) = task() else { return };
    let (kind, first) = argument.split_once(' ').unwrap();
    let image = std::fs::read(folder.join(kind)).unwrap();
    let first: u64 = first.parse().unwrap();
    for seed in first..first + IMAGES_PER_CHILD {
        let path = folder.join(format!("image-{kind}-{seed}.redb"));
        std::fs::write(&path, damage(&image, seed)).unwrap();
        println!("{kind} {seed}: {}", read_damaged(&path));
        std::fs::remove_file(&path).unwrap();
    }
    println!("all read");
}

fn damage(image: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = image.to_vec();
    // What is in use lies at the front; blind damage to the free end would show nothing.
    let used = 4096 * (1 + bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) as u64 / 4096);
    let page = (random.below(used) / 4096 * 4096) as usize;
    match seed % 6 {
        0..=2 => {
            // Somewhere that is not zero: most of a page is.
            let full: Vec<usize> = (0..used as usize).filter(|at| bytes[*at] != 0).collect();
            bytes[full[random.below(full.len() as u64) as usize]] ^= 1 << random.below(8);
        }
        3 => bytes[page..page + 4096].fill(0),
        4 => {
            let other = (random.below(used) / 4096 * 4096) as usize;
            let copied = bytes[other..other + 4096].to_vec();
            bytes[page..page + 4096].copy_from_slice(&copied);
        }
        _ => bytes.truncate(random.below(image.len() as u64) as usize),
    }
    bytes
}

/// Opens and reads everything; panics on an event that was not appended.
fn read_damaged(path: &Path) -> &'static str {
    let Ok(store) = Store::open(path) else { return "refused" };
    let Ok(snapshot) = store.read() else { return "refused at reading" };
    let Ok(events) = snapshot.events(0) else { return "refused at reading" };
    let mut seqs = Vec::new();
    let mut damaged = 0;
    for event in events.take(1000) {
        match event {
            Ok(recorded) => {
                assert_eq!(
                    crate::scratch::number_of(&recorded),
                    recorded.seq(),
                    "an event in another's place"
                );
                seqs.push(recorded.seq());
            }
            Err(_) => damaged += 1,
        }
    }
    read_in_place(&snapshot, &seqs);
    let unclean = path.file_name().unwrap().to_str().unwrap().contains("unclean");
    if unclean {
        // Every page was verified: what opens is one commit, whole, the application's tables too.
        assert!(audit(&store).len() <= 120);
    }
    // Whatever the damage does to a write, it is answered, and the process lives.
    let written = put(&store, 120);
    assert!(!matches!(written, Err(Error::Closed { .. })), "{written:?}");
    let next = put(&store, 121);
    assert!(!matches!(next, Err(Error::Closed { .. })), "{written:?}, then {next:?}");
    assert!(seqs.is_sorted_by(|a, b| a < b), "events repeated or out of order: {seqs:?}");
    if damaged == 0 && seqs.len() == 120 { "whole" } else { "partly" }
}

/// Goal: P9: a page on which the storage engine panics is an error to everybody who reads, and the relay says that it has failed. Method: in
/// the file of a store that died idle, whose open reads nothing of the log, each leaf that holds events says that its first value
/// ends far behind the page.
#[test]
fn a_page_that_makes_the_engine_panic_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("live.redb");
    let store = Store::open(&live).unwrap();
    for n in 0..40 {
        put(&store, n).unwrap();
    }
    store.close().unwrap();
    let idle = open_idle(&live, Duration::from_millis(1));
    until_saved(&idle, 1);
    let path = crash_copy(&idle, folder.path());
    drop(idle);
    let mut image = std::fs::read(&path).unwrap();
    let mut leaves = 0;
    for page in image.chunks_mut(4096) {
        // A leaf's first byte is 1; the ends of its values begin at its fifth.
        if page[0] == 1 && page.windows(8).any(|bytes| bytes == b"counted.") {
            page[6] = 0x7f;
            leaves += 1;
        }
    }
    assert!(leaves > 0, "no leaf was found");
    std::fs::write(&path, image).unwrap();

    let store = Store::open(&path).unwrap();
    let panicked = |error: Error| assert!(error.to_string().contains("panicked"), "{error}");
    let snapshot = store.read().unwrap();
    let mut events = snapshot.events(0).unwrap();
    panicked(events.next().unwrap().unwrap_err());
    assert!(events.next().is_none(), "it is reported once");
    let mut replay = snapshot.replay(0).unwrap();
    panicked(replay.next().unwrap().unwrap_err());
    assert!(replay.next().is_none());
    let mut reported = 0;
    let mut replay = snapshot.replay(0).unwrap();
    for _ in 0..2 {
        let visit = |event: onewrite::Result<onewrite::ReplayedEvent<&[u8]>>| {
            panicked(event.map(|event| event.seq()).unwrap_err());
            reported += 1;
            Ok::<(), Error>(())
        };
        replay.visit(visit).unwrap();
    }
    assert_eq!(reported, 1);
    panicked(snapshot.event(0).unwrap_err());

    let broker = MemoryBroker::new();
    broker.declare_queue("orders", QueueOptions::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !matches!(relay.status().state, RelayState::Failed(_)) {
        assert!(Instant::now() < deadline, "{:?}", relay.status());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(!relay.stop(Duration::from_secs(5)).clean);
}

/// Goal: P9: so is one of the tables that lead to a stream's events, and a verification ends with an error. It panicked once, on a disk that had
/// lied about its syncs. Method: as above, with the leaves that hold names of streams.
#[test]
fn a_page_of_an_index_that_makes_the_engine_panic_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("live.redb");
    let store = Store::open(&live).unwrap();
    for n in 0..40 {
        let append = move |tx: &Transaction| {
            let stream = tx.stream(format!("indexed-{n}"));
            stream.append([Event::bytes("opened", "").unpublished()], ExpectedRevision::NoStream)?;
            stream.save_snapshot(1, b"state")
        };
        store.write(append).unwrap();
    }
    store.close().unwrap();
    let idle = open_idle(&live, Duration::from_millis(1));
    until_saved(&idle, 1);
    let path = crash_copy(&idle, folder.path());
    drop(idle);
    let mut image = std::fs::read(&path).unwrap();
    let mut leaves = 0;
    for page in image.chunks_mut(4096) {
        // Those of the log hold the names too, in records.
        let holds = |text: &[u8]| page.windows(text.len()).any(|bytes| bytes == text);
        if page[0] == 1 && holds(b"indexed-") && !holds(b"opened") {
            page[6] = 0x7f;
            leaves += 1;
        }
    }
    assert!(leaves >= 3, "of states, chunks and snapshots: {leaves}");
    std::fs::write(&path, image).unwrap();

    let store = Store::open(&path).unwrap();
    let panicked = |error: Error| assert!(error.to_string().contains("panicked"), "{error}");
    panicked(store.verify().unwrap_err());
    let snapshot = store.read().unwrap();
    panicked(snapshot.stream("indexed-0").map(drop).unwrap_err());
    assert!(snapshot.event(7).unwrap().is_some(), "the log is whole");
}

/// The other ways to read say the same. Once a page has made the storage engine panic, that may be the end of them all.
fn read_in_place(snapshot: &Snapshot, seqs: &[u64]) {
    let Ok(replay) = snapshot.replay(0) else { return };
    let replayed: Vec<u64> = replay.take(1000).filter_map(|event| Some(event.ok()?.seq())).collect();
    assert_eq!(replayed, seqs, "replayed in place");
    let mut visited = Vec::new();
    let visit = |event: onewrite::Result<onewrite::ReplayedEvent<&[u8]>>| {
        visited.extend(event.map(|event| event.seq()));
        Ok::<(), Error>(())
    };
    snapshot.replay(0).unwrap().visit(visit).unwrap();
    assert_eq!(visited, seqs, "visited");
    for seq in 0..121 {
        let read = snapshot.event(seq);
        assert!(!matches!(read, Ok(Some(_))) || seqs.contains(&seq) || seqs.len() < 120, "{seq}: {read:?}");
    }
}

/// Goal: S8: a creation that is killed anywhere leaves nothing that cannot be opened. Method: `kill -9` a child at
/// random moments of its first open, then open the same path; where `strace` works also at each single system call.
#[test]
fn a_killed_creation_can_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let task = "store_open::child_reports_how_opening_went";
    child(task, &folder.path().join("timed.redb"), "").output().unwrap();
    let whole_us = began.elapsed().as_micros() as u64;
    let mut random = Random(11);
    let mut unfinished = 0;
    for round in 0..24 {
        let path = folder.path().join(format!("{round}.redb"));
        let mut creating =
            child(task, &path, "").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(whole_us)));
        creating.kill().unwrap();
        creating.wait().unwrap();
        unfinished += u64::from(!path.exists());
        opens_and_takes_writes(&path);
    }
    println!("{unfinished} of 24 were killed before the file had its name");
    if !can_run("strace", &["-o", "/dev/null", "true"]) {
        println!("strace cannot run here: not killed at each system call");
        return;
    }
    for call in ["ftruncate", "pwrite64", "fdatasync", "fsync", "link,linkat", "unlink"] {
        for nth in (1..=8).chain((9..=60).step_by(4)) {
            let path = folder.path().join(format!("{call}-{nth}.redb"));
            let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=KILL:when={nth}"));
            let program = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
            let output = child_under(&program, task, &path, "").output().unwrap();
            opens_and_takes_writes(&path);
            if output.status.success() {
                break;
            }
        }
    }
}

fn opens_and_takes_writes(path: &Path) {
    let store = Store::open(path).unwrap_or_else(|error| panic!("{error}"));
    put(&store, 0).unwrap();
    assert_eq!(audit(&store), [0]);
    store.close().unwrap();
}
