//! Checking every page of a store that is in use: no changed byte of any row passes, nothing whole is called damaged, and writers go on.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use onewrite::redb::{
    Database, MultimapTableDefinition, ReadableDatabase, ReadableMultimapTable, ReadableTable,
    TableDefinition,
};
use onewrite::{Error, Finding, PageVerification, Store};

use crate::scratch::{Random, put};

const ACCOUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("accounts");
const BLOBS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("blobs");
const FIXED: TableDefinition<'_, u64, (u32, u64)> = TableDefinition::new("fixed");
const TAGS: MultimapTableDefinition<'_, &str, u64> = MultimapTableDefinition::new("tags");
const LONG_TAGS: MultimapTableDefinition<'_, u64, &str> = MultimapTableDefinition::new("long-tags");
const EMPTY: TableDefinition<'_, u64, ()> = TableDefinition::new("empty");

/// Tables of each shape, in trees of one page and of many.
fn fill(store: &Store, rows: u64) {
    store
        .write(move |tx| {
            let mut accounts = tx.open_table(ACCOUNTS)?;
            let mut blobs = tx.open_table(BLOBS)?;
            let mut fixed = tx.open_table(FIXED)?;
            tx.open_table(EMPTY)?;
            for n in 0..rows {
                accounts.insert(&*format!("account-{n:06}"), n)?;
                fixed.insert(n, (7, n))?;
                if n % 50 == 0 {
                    blobs.insert(n, &*vec![n as u8 ^ 0x5a; 40 + n as usize * 23])?;
                }
            }
            Ok(())
        })
        .unwrap();
    let tx = store.begin().unwrap();
    {
        let mut tags = tx.open_multimap_table(TAGS).unwrap();
        let mut long = tx.open_multimap_table(LONG_TAGS).unwrap();
        for n in 0..rows {
            tags.insert("few", n % 3).unwrap();
            tags.insert("many", n).unwrap();
            long.insert(n % 5, &*format!("tag-{n:040}")).unwrap();
        }
    }
    tx.commit().unwrap();
    (0..40).for_each(|n| drop(put(store, n).unwrap()));
}

/// What every table says; panics where redb does.
fn contents(path: &Path) -> Option<BTreeMap<String, Vec<String>>> {
    let db = Database::open(path).ok()?;
    let tx = db.begin_read().ok()?;
    let mut all = BTreeMap::new();
    macro_rules! rows {
        ($definition:expr, $name:expr) => {
            let table = tx.open_table($definition).ok()?;
            let rows = table
                .iter()
                .ok()?
                .map(|row| row.map(|(k, v)| format!("{:?} {:?}", k.value(), v.value())).ok());
            all.insert($name.to_owned(), rows.collect::<Option<Vec<_>>>()?);
        };
    }
    rows!(ACCOUNTS, "accounts");
    rows!(BLOBS, "blobs");
    rows!(FIXED, "fixed");
    rows!(EMPTY, "empty");
    rows!(TableDefinition::<u64, &[u8]>::new("onewrite.log"), "log");
    rows!(TableDefinition::<&str, &[u8]>::new("onewrite.meta"), "meta");
    macro_rules! values {
        ($definition:expr, $name:expr) => {
            let table = tx.open_multimap_table($definition).ok()?;
            let mut rows = Vec::new();
            for row in table.iter().ok()? {
                let (key, values) = row.ok()?;
                for value in values {
                    rows.push(format!("{:?} {:?}", key.value(), value.ok()?.value()));
                }
            }
            all.insert($name.to_owned(), rows);
        };
    }
    values!(TAGS, "tags");
    values!(LONG_TAGS, "long-tags");
    Some(all)
}

fn quietly<T>(f: impl FnOnce() -> Option<T>) -> Option<T> {
    catch_unwind(AssertUnwindSafe(f)).ok().flatten()
}

/// Goal: no changed byte passes that changes what a table says, and none is reported where the engine finds nothing either. Method: copies of a file
/// that was closed, one bit flipped in each, all over what is in use; each is opened and checked, read as a whole, and given to the engine's own check.
#[test]
fn no_changed_byte_of_a_row_passes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    fill(&store, 600);
    store.close().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let before = contents(&path).unwrap();
    let whole_again = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole).unwrap();
    drop(whole_again);
    let used: Vec<usize> = (4096..whole.len()).filter(|at| whole[*at] != 0).collect();
    let mut random = Random(3);
    let copy = folder.path().join("copy.redb");
    let (mut found, mut refused, mut unseen, mut silent) = (0, 0, 0, 0);
    for _ in 0..150 {
        let at = used[random.below(used.len() as u64) as usize];
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << random.below(8);
        std::fs::write(&copy, &flipped).unwrap();
        let verified = quietly(|| {
            let store = Store::open(&copy).ok()?;
            Some(store.verify_pages().unwrap())
        });
        std::fs::write(&copy, &flipped).unwrap();
        let says = quietly(|| contents(&copy));
        std::fs::write(&copy, &flipped).unwrap();
        let engine = quietly(|| Database::open(&copy).ok()?.check_integrity().ok());
        match verified {
            None => refused += 1,
            Some(verified) if !verified.is_whole() => {
                assert_ne!(
                    engine,
                    Some(true),
                    "byte {at}: reported, and the engine finds nothing: {verified:?}"
                );
                let here = verified.findings.iter().any(|finding| {
                    matches!(finding, Finding::Page { offset, bytes, .. } if (*offset..offset + bytes).contains(&(at as u64)))
                });
                assert!(here, "byte {at}: reported for another place: {verified:?}");
                found += 1;
            }
            Some(_) => {
                assert_eq!(says.as_ref(), Some(&before), "byte {at} passes, and changes what a table says");
                if engine == Some(true) { silent += 1 } else { unseen += 1 }
            }
        }
    }
    println!(
        "{found} found, {refused} refused at opening, {unseen} in the engine's own tables, {silent} in free pages"
    );
    assert!(found >= 50, "{found}");
}

/// Goal: damage is reported by its table and place, each damaged page of it, and `verify`, which says that it does not look there, passes. Method: one bit of a
/// row of each table that an application may have.
#[test]
fn damage_is_reported_by_table_and_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    fill(&store, 600);
    assert!(store.verify_pages().unwrap().is_whole());
    store.close().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let flip = |bytes: &mut [u8], text: &[u8]| {
        let found = bytes.windows(text.len()).enumerate().filter(|(_, window)| *window == text);
        let places: Vec<usize> = found.map(|(at, _)| at).collect();
        places.iter().for_each(|at| bytes[at + text.len() - 1] ^= 1);
        places
    };
    let mut all = whole.clone();
    let samples: [(&str, Vec<u8>); 3] = [
        ("accounts", b"account-000333".to_vec()),
        ("blobs", vec![(550_u64 as u8) ^ 0x5a; 3000]),
        ("long-tags", b"tag-0000000000000000000000000000000000000123".to_vec()),
    ];
    for (table, text) in &samples {
        let mut bytes = whole.clone();
        assert!(!flip(&mut bytes, text).is_empty() && !flip(&mut all, text).is_empty());
        std::fs::write(&path, &bytes).unwrap();
        let store = Store::open(&path).unwrap();
        assert!(
            store.verify().unwrap().is_whole(),
            "it says that it does not look at rows of the application"
        );
        let verified = store.verify_pages().unwrap();
        assert_eq!(verified.findings_total, 1, "{verified:?}");
        assert!(verified.is_complete && !verified.is_whole());
        let finding = &verified.findings[0];
        assert!(matches!(finding, Finding::Page { table: Some(of), .. } if of == table), "{finding:?}");
        assert!(finding.to_string().contains(&format!("of table `{table}` is damaged")), "{finding}");
    }
    std::fs::write(&path, &all).unwrap();
    let verified = Store::open(&path).unwrap().verify_pages().unwrap();
    assert_eq!(verified.findings_total, 3, "one of several is not all: {verified:?}");
}

/// Goal: nothing that is whole is called damaged while writers go on, and they do. Method: two threads write rows of all sizes, and remove them, while
/// the check runs again and again, whose progress writes too; with a journal and without.
#[test]
fn writers_go_on_and_nothing_whole_is_called_damaged() {
    for journal in [0, 1 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::builder()
            .cache_bytes(1 << 20)
            .journal_bytes(journal)
            .open(folder.path().join("a.redb"))
            .unwrap();
        fill(&store, 600);
        let ends = AtomicBool::new(false);
        let mut written = 0;
        std::thread::scope(|scope| {
            for thread in 0..2_u64 {
                let (store, ends) = (&store, &ends);
                scope.spawn(move || {
                    let mut random = Random(thread);
                    while !ends.load(Ordering::Relaxed) {
                        let (key, len, go) =
                            (random.below(200), random.below(9000) as usize, random.below(3) == 0);
                        let change = move |tx: &onewrite::Transaction| {
                            let mut blobs = tx.open_table(BLOBS)?;
                            drop(if go {
                                blobs.remove(key)?
                            } else {
                                blobs.insert(key, &*vec![key as u8; len])?
                            });
                            Ok(())
                        };
                        store.write(change).unwrap();
                    }
                });
            }
            for round in 0..12 {
                let commits = store.stats().unwrap().commits;
                let verified = store.verify_pages_with(|progress| {
                    assert!(progress.bytes <= progress.bytes_max);
                    put(&store, 1000 + written).unwrap();
                    written += 1;
                    ControlFlow::Continue(())
                });
                let verified = verified.unwrap();
                assert!(verified.is_whole(), "round {round}: {verified:?}");
                assert!(verified.pages > 20 && store.stats().unwrap().commits > commits);
            }
            ends.store(true, Ordering::Relaxed);
        });
        assert!(written >= 12);
        store.close().unwrap();
    }
}

/// Goal: it ends when the application says so, when the store is closed in the middle, and is refused where it would wait for itself; a callback that
/// panics hurts nothing.
#[test]
fn it_can_be_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let store = Store::open(&path).unwrap();
    fill(&store, 3000);
    let full: PageVerification = store.verify_pages().unwrap();
    let ended = store.verify_pages_with(|_| ControlFlow::Break(())).unwrap();
    assert!(!ended.is_complete && !ended.is_whole() && ended.findings.is_empty());
    assert!(ended.pages < full.pages, "{} of {}", ended.pages, full.pages);

    let reentrant = store.clone();
    let refused = store.write(move |_| reentrant.verify_pages().map(drop)).unwrap_err();
    assert!(matches!(refused, Error::InsideTransaction { .. }), "{refused}");

    let panicked =
        catch_unwind(AssertUnwindSafe(|| store.verify_pages_with(|_| panic!("the application's own"))));
    assert!(panicked.is_err());
    put(&store, 5000).unwrap();

    let mut other = Some(store.clone());
    let closed = store.verify_pages_with(|_| {
        if let Some(other) = other.take() {
            other.close().unwrap();
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(closed, Err(Error::Closed { .. })), "{closed:?}");
    assert!(matches!(store.verify_pages(), Err(Error::Closed { .. })));
    assert!(Store::open(&path).unwrap().verify_pages().unwrap().is_whole());
}
