//! What a consumer had marked before there was a keyed hash: it still recognises repeats.

use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::{Error, Message, Result, Store};

use crate::lanes_inbox::{BANK, numbered, set};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("onewrite.meta");
const DEDUP: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.seen");
const INBOX: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.inbox");

fn named(payload: &str) -> Message {
    Message { message_id: Some("m-1".into()), payload: payload.into(), ..Message::default() }
}

/// The high-water row of a lane as format 4 wrote it: numbers 0 to 2 had come, with these contents, none later than 2023.
fn old_high_water(key: &[u8]) -> Vec<u8> {
    let mut row = Vec::new();
    for number in [3_u64, 1_700_000_000_999, 0] {
        row.extend_from_slice(&number.to_le_bytes());
    }
    for number in 0..16 {
        let message = numbered(0, number, "old");
        let mut hasher = crc32fast::Hasher::new();
        for text in [message.message_id.as_deref(), message.event_type.as_deref()] {
            let text = text.unwrap_or_default();
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(&message.payload);
        let checksum = if number < 3 { hasher.finalize() } else { 0 };
        row.extend_from_slice(&checksum.to_le_bytes());
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(&row);
    row.extend_from_slice(&hasher.finalize().to_le_bytes());
    row
}

/// Makes the file one of before: rows of the old form, no secret.
fn make_older(path: &std::path::Path, format: u32) {
    let db = Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    {
        let mut meta = tx.open_table(META).unwrap();
        meta.insert("format", &format.to_le_bytes()[..]).unwrap();
        assert!(meta.remove("content_key").unwrap().is_some());
        let mut dedup = tx.open_table(DEDUP).unwrap();
        let keys: Vec<Vec<u8>> = dedup.iter().unwrap().map(|row| row.unwrap().0.value().to_vec()).collect();
        // Ids were not counted.
        let (counts, high_waters): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key == b"\x07service");
        assert_eq!((counts.len(), high_waters.len()), (1, 1));
        dedup.remove(&*counts[0]).unwrap();
        dedup.insert(&*high_waters[0], &*old_high_water(&high_waters[0])).unwrap();
        let mut inbox = tx.open_table(INBOX).unwrap();
        let (key, mut row) = {
            let (key, row) = inbox.iter().unwrap().next().unwrap().unwrap();
            (key.value().to_vec(), row.value().to_vec())
        };
        row[8..12].copy_from_slice(&crc32fast::hash(b"old").to_le_bytes());
        row[16..24].copy_from_slice(&3_u64.to_le_bytes());
        inbox.insert(&*key, &*row).unwrap();
    }
    tx.commit().unwrap();
}

fn secret(store: &Store) -> Vec<u8> {
    let meta = store.read().unwrap().open_table(META).unwrap();
    meta.get("content_key").unwrap().unwrap().value().to_vec()
}

/// Goal: a file of format 4 opens, and so does one that was made as 5 before there was a secret in it. What was seen then is distinguished from
/// what was not; what comes now is recognised by all of its content; the secret is made once. Method: the rows of a closed store get the
/// old form by plain redb.
#[test]
fn a_file_without_a_secret_still_recognises_repeats() {
    for format in [4, 5] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        let first = |store: &Store, message: &Message| -> Result<bool> {
            let message = message.clone();
            store.write(move |tx| tx.first_delivery("service", &message)).map(onewrite::Receipt::into_value)
        };
        assert!(first(&store, &numbered(0, 0, "old")).unwrap());
        assert!(first(&store, &named("old")).unwrap());
        store.close().unwrap();
        make_older(&path, format);

        let store = Store::open(&path).unwrap();
        let before = secret(&store);
        let is_conflict = |message: &Message| {
            matches!(first(&store, message), Err(Error::LaneConflict { .. } | Error::IdConflict { .. }))
        };
        for number in 0..3 {
            assert!(!first(&store, &numbered(0, number, "old")).unwrap(), "{number} was seen");
            assert!(is_conflict(&numbered(0, number, "other")), "{number} with another content");
        }
        assert!(!first(&store, &named("old")).unwrap());
        assert!(is_conflict(&named("other")));
        let mut later = numbered(0, 0, "old");
        later.timestamp_s = Some(1_700_000_001);
        assert!(is_conflict(&later), "it is newer than all that was seen");
        assert!(first(&store, &numbered(0, 3, "new")).unwrap());
        store.close().unwrap();

        let store = Store::open(&path).unwrap();
        assert_eq!(secret(&store), before, "the secret is made once");
        assert!(!first(&store, &numbered(0, 3, "new")).unwrap());
        let mut other = numbered(0, 3, "new");
        set(&mut other, "region", "eu");
        assert!(
            matches!(first(&store, &other), Err(Error::LaneConflict { producer, .. }) if producer == BANK)
        );
    }
}
