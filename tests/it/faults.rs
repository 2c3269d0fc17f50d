//! Faults of the disk and of the process, real ones, in child processes: no room, a write or a sync that fails, `kill -9`.
//! What was acknowledged is there after, what failed says so, nothing is there by half.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use onewrite::limits::JOURNAL_BYTES_MIN;
use onewrite::{Error, Store, StoreBuilder};

use crate::scratch::{Random, STATE, audit, can_run, child, child_under, event, put, task};

/// Ignored `SIGXFSZ`: a write beyond the limit then fails with `EFBIG` instead of ending the process.
const IGNORING_XFSZ: [&str; 3] = ["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""];

/// A write of `n` with a page of ballast.
fn put_large(store: &Store, n: u64) -> onewrite::Result<()> {
    store
        .write(move |tx| {
            tx.open_table(STATE)?.insert(n, n)?;
            tx.open_table(BALLAST)?.insert(n, &[n as u8; 16 << 10][..])?;
            tx.append(event(n))?;
            Ok(())
        })
        .map(drop)
}

const BALLAST: onewrite::redb::TableDefinition<'_, u64, &[u8]> =
    onewrite::redb::TableDefinition::new("ballast");

fn name_of(error: &Error) -> String {
    match error {
        Error::Storage(_) => format!("storage: {error}"),
        Error::CommitUnknown { .. } => format!("unknown: {error}"),
        Error::Poisoned { cause, .. } => format!("poisoned: {cause}"),
        other => format!("other: {other:?}"),
    }
}

/// Writes until it fails, then tries on in every way. Reports each step on stdout.
#[test]
fn child_writes_until_it_fails() {
    let Some((path, limit)) = task() else { return };
    let store = Store::open(&path).unwrap();
    let first = store.stats().unwrap().next_seq;
    let limit: u64 = limit.parse().unwrap();
    let mut failed = None;
    for n in first..first + limit {
        match put_large(&store, n) {
            Ok(()) => println!("acknowledged {n}"),
            Err(error) => {
                println!("failed {}", name_of(&error));
                failed = Some(n);
                break;
            }
        }
    }
    let failed = failed.expect("the fault never came");
    println!("then {}", name_of(&put(&store, failed + 1).unwrap_err()));
    println!("then {}", name_of(&store.begin().unwrap_err()));
    println!("then {}", name_of(&store.write_once("a", |_| Ok(())).unwrap_err()));
    println!("stats {}", store.stats().unwrap().poisoned.unwrap());
    // Reading what is there is still allowed, and shows nothing that was not acknowledged.
    if let Ok(snapshot) = store.read()
        && let Ok(mut events) = snapshot.events(0)
    {
        assert!(events.all(|event| event.map_or(true, |event| event.seq() < failed)));
    }
    drop(store);
    println!("ended");
}

/// Reads what such a child has reported: the acknowledged, and that everything after the failure named the first cause.
fn reported_failures(reported: &str) -> Vec<u64> {
    let lines = |prefix: &'static str| reported.lines().filter_map(move |line| line.strip_prefix(prefix));
    let failed: Vec<_> = lines("failed ").collect();
    assert!(
        matches!(failed[..], [line] if line.starts_with("storage: ") || line.starts_with("unknown: ")),
        "{reported}"
    );
    let cause = lines("stats ").next().unwrap_or_else(|| panic!("{reported}"));
    assert!(failed[0].contains(cause), "the cause is what failed first: {reported}");
    let then: Vec<_> = lines("then ").collect();
    assert_eq!(
        then,
        [&*format!("poisoned: {cause}"); 3],
        "each later call reports the first cause: {reported}"
    );
    assert!(reported.contains("\nended"), "{reported}");
    lines("acknowledged ").map(|n| n.parse().unwrap()).collect()
}

/// After a fault: it opens, has everything acknowledged and nothing by half, and goes on.
fn recovers(path: &Path, acknowledged: &[u64]) {
    let store = Store::open(path).unwrap_or_else(|error| panic!("{error}"));
    let there = audit(&store);
    assert!(there.starts_with(acknowledged), "acknowledged {acknowledged:?}, there is {there:?}");
    assert!(there.len() <= acknowledged.len() + 1, "what was refused is there: {there:?}");
    let next = there.len() as u64;
    put_large(&store, next).unwrap();
    assert_eq!(audit(&store).last(), Some(&next));
    store.close().unwrap();
}

/// Goal: P9 and S4: where the file cannot grow the write gets a typed error, the store is poisoned and keeps the cause,
/// and after reopening with room everything acknowledged is there and it goes on. Method: children under several limits
/// on the size of files.
#[test]
fn a_file_that_cannot_grow_poisons_the_store() {
    assert!(can_run("prlimit", &["--version"]), "prlimit (util-linux) is needed");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    drop(Store::open(&path).unwrap());
    let mut acknowledged = Vec::new();
    for more_bytes in [100 << 10, 700 << 10, 3 << 20] {
        let limit = std::fs::metadata(&path).unwrap().len() + more_bytes;
        let script = format!("trap '' XFSZ; exec prlimit --fsize={limit}:unlimited \"$0\" \"$@\"");
        let mut limited =
            child_under(&["sh", "-c", &script], "faults::child_writes_until_it_fails", &path, "5000");
        let output = limited.output().unwrap();
        let reported = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{reported}\n{}", String::from_utf8_lossy(&output.stderr));
        let now = reported_failures(&reported);
        assert!(!now.is_empty() || more_bytes < 1 << 20, "nothing fitted: {reported}");
        acknowledged.extend(now);
        recovers(&path, &acknowledged);
        acknowledged = audit(&Store::open(&path).unwrap());
    }
}

/// Goal: the same on a disk that is really full. Method: a small tmpfs, where this user may mount one.
#[test]
fn a_full_disk_poisons_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=3m", "none"])
        .arg(folder.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("no mount here: the limit on file sizes stands in for a full disk");
        return;
    }
    let path = folder.path().join("a.redb");
    let output = child("faults::child_writes_until_it_fails", &path, "5000").output().unwrap();
    let reported = String::from_utf8(output.stdout).unwrap();
    let enlarged = Command::new("mount").args(["-o", "remount,size=64m"]).arg(folder.path()).status();
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert!(output.status.success(), "{reported}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(enlarged.unwrap().success());
        recovers(&path, &reported_failures(&reported));
    }));
    assert!(Command::new("umount").arg(folder.path()).status().unwrap().success());
    checked.unwrap();
}

/// Goal: S3: a sync that fails is not tried again; the commit's outcome is unknown, the store poisoned. Method: `strace`
/// lets the Nth `fdatasync` of a child fail with EIO, where it can run.
#[test]
fn a_failed_sync_poisons_the_store() {
    if !can_run("strace", &["-o", "/dev/null", "true"]) {
        println!("strace cannot run here: a failing write stands in for a failing sync");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut in_commits = 0;
    for nth in 2..8 {
        let path = folder.path().join(format!("{nth}.redb"));
        drop(Store::open(&path).unwrap());
        let inject = format!("inject=fdatasync:error=EIO:when={nth}");
        let strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", &inject];
        let output =
            child_under(&strace, "faults::child_writes_until_it_fails", &path, "100").output().unwrap();
        let reported = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{reported}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(reported.contains("os error 5"), "{reported}");
        // The engine syncs when the file grows, in a closure, too; in a commit the outcome is open.
        in_commits += u32::from(reported.contains("failed unknown: "));
        recovers(&path, &reported_failures(&reported));
    }
    assert!(in_commits > 0, "no commit's own sync was hit");
}

/// Goal: P1 for a whole group: where its one commit fails, each of the group learns that its outcome is unknown; that
/// nothing of it is there (`Poisoned`) is reported only to those whose closure was in no commit. Method: the child takes
/// away its own right to write beyond the first pages; writers gather while the write lock is held.
#[test]
fn one_failed_commit_has_one_outcome_for_its_group() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let task = "faults::child_loses_the_right_to_write";
    let output = child_under(&IGNORING_XFSZ, task, &path, "").output().unwrap();
    let reported = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && reported.contains("distinguished"),
        "{reported}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(audit(&Store::open(&path).unwrap()), [0]);
}

#[test]
fn child_loses_the_right_to_write() {
    let Some((path, _)) = task() else { return };
    let store = Store::open(&path).unwrap();
    put(&store, 0).unwrap();
    let tx = store.begin().unwrap();
    let writers: Vec<_> = (1..=24_u64)
        .map(|n| {
            let store = store.clone();
            std::thread::spawn(move || {
                let ran = std::sync::Arc::new(AtomicBool::new(false));
                let in_closure = std::sync::Arc::clone(&ran);
                let written = store.write(move |tx| {
                    in_closure.store(true, Ordering::SeqCst);
                    tx.open_table(STATE)?.insert(n, n)?;
                    tx.append(event(n))?;
                    Ok(())
                });
                (ran.load(Ordering::SeqCst), written.unwrap_err())
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(150));
    let me = std::process::id().to_string();
    assert!(can_run("prlimit", &["--pid", &me, "--fsize=4096:unlimited"]));
    drop(tx);
    let mut unknown = 0;
    for writer in writers {
        match writer.join().unwrap() {
            (true, Error::CommitUnknown { .. }) => unknown += 1,
            (false, Error::Poisoned { .. }) => {}
            (ran, other) => panic!("ran: {ran}, reported: {other:?}"),
        }
    }
    println!("{unknown} of 24 were in the failed commit");
    assert!(unknown >= 1);
    drop(store);
    assert!(can_run("prlimit", &["--pid", &me, "--fsize=unlimited:unlimited"]));
    println!("distinguished");
}

const KILLS: u64 = 32;

fn journaled(with: bool) -> StoreBuilder {
    Store::builder().journal_bytes(if with { JOURNAL_BYTES_MIN } else { 0 })
}

/// Goal: S7: P1 under `kill -9`. Method: a child writes from four threads and notes each acknowledged write in a file of
/// its own that it syncs; it is killed at a random moment, 32 times over the same store. Each time everything noted is
/// there with its event, nothing is there by half, no number is missing. Every second generation has a journal that turns over every dozen commits; what it
/// leaves is opened with one or without.
#[test]
fn killed_at_any_moment_nothing_acknowledged_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let mut random = Random(3);
    let mut last = 0;
    let mut grew = 0;
    for round in 0..KILLS {
        let mut writing = child("faults::child_writes_until_killed", &path, round.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writing.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("writing")), "it died by itself");
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        writing.kill().unwrap();
        writing.wait().unwrap();

        let store =
            journaled(round % 4 == 1).open(&path).unwrap_or_else(|error| panic!("round {round}: {error}"));
        let there = audit(&store);
        let noted = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        for note in noted.filter(|path| path.extension().is_some_and(|is| is == "noted")) {
            // A last line may be cut; only whole ones were synced.
            let text = std::fs::read_to_string(note).unwrap();
            for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
                let n: u64 = line.trim().parse().unwrap();
                assert!(there.binary_search(&n).is_ok(), "round {round}: {n} was acknowledged and is gone");
            }
        }
        grew += u64::from(there.len() > last);
        last = there.len();
        if round % 2 == 0 {
            store.close().unwrap();
        } else {
            drop(store);
        }
    }
    println!("{last} writes over {KILLS} kills");
    assert!(grew > KILLS / 2, "most children were killed before they wrote: the test shows little");
}

#[test]
fn child_writes_until_killed() {
    let Some((path, round)) = task() else { return };
    let round: u64 = round.parse().unwrap();
    let store = journaled(round % 2 == 1).open(&path).unwrap();
    println!("writing");
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (store, path) = (&store, &path);
            scope.spawn(move || {
                let note = path.with_extension(format!("{round}-{thread}.noted"));
                let mut note = std::fs::File::create(note).unwrap();
                for n in (0..).map(|at| (round * 4 + thread) * 1_000_000 + at) {
                    put(store, n).unwrap();
                    writeln!(note, "{n}").unwrap();
                    note.sync_data().unwrap();
                }
            });
        }
    });
}

/// Goal: an owner that dies gives the lock free by dying, and a store that was poisoned gives it free by being dropped.
/// Method: a map of who could open, in order.
#[test]
fn a_dead_owner_owns_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let mut owner =
        child("faults::child_writes_until_killed", &path, "0").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("writing")));
    let mut opened = BTreeMap::new();
    opened.insert("while it lives", Store::open(&path).is_ok());
    owner.kill().unwrap();
    owner.wait().unwrap();
    opened.insert("when it is dead", Store::open(&path).is_ok());
    assert_eq!(opened, BTreeMap::from([("while it lives", false), ("when it is dead", true)]));
}
