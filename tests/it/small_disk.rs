//! A disk that deliveries would fill: the consumer stops before that, and the application's writes are served.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::redb::TableDefinition;
use onewrite::{ConsumerWait, Error, Event, Message, Store};

use crate::lanes_inbox::{drained, quick, stop, until};
use crate::scratch::task;
use crate::support::small_disk::{enter, mount};

const BODIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("bodies");
const DISK_MB: u32 = 24;
/// Of more than the disk has.
const DELIVERIES: u64 = 500;
const BODY: usize = 64 << 10;

/// Goal: whatever deliveries write, and however it is written, the disk keeps what the application needs: its writes are served
/// before, while and after the consumer has stopped; the store is never lost; the consumer says what it waits for, goes on when
/// something was discarded, and a store that is opened again is whole. Method: a disk of 24 MiB, 31 MiB of deliveries, all defaults; the
/// handler rejects, fails (so that they are parked), or keeps the bodies; each with and without a journal.
#[test]
fn deliveries_do_not_fill_the_disk_of_the_application() {
    let name = "small_disk::deliveries_do_not_fill_the_disk_of_the_application";
    if let Some((folder, argument)) = task() {
        let (way, journal) = argument.split_once(' ').unwrap();
        fill(&folder, way, journal.parse().unwrap());
        println!("all well");
        return;
    }
    for way in ["reject", "fail", "keep"] {
        for journal in [0, 1 << 20] {
            let folder = tempfile::tempdir().unwrap();
            enter(name, folder.path(), &format!("{way} {journal}"));
        }
    }
}

fn message(n: u64) -> Message {
    let mut payload = vec![b'x'; BODY];
    payload[..8].copy_from_slice(&n.to_be_bytes());
    Message { message_id: Some(format!("m{n}").into()), payload, ..Message::default() }
}

fn write(store: &Store, n: u64) {
    let receipt = store.write(move |tx| {
        tx.open_table(BODIES)?.insert(u64::MAX - n % 64, &[7; 2_000][..])?;
        tx.append(Event::bytes("paid", n.to_string()).unpublished())
    });
    receipt.unwrap_or_else(|error| panic!("the application's write {n} failed: {error}"));
}

fn fill(folder: &Path, way: &str, journal: usize) {
    mount(folder, DISK_MB);
    let path = folder.join("a.redb");
    let open = || Store::builder().journal_bytes(journal).open(&path).unwrap();
    let store = open();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    (0..DELIVERIES).for_each(|n| broker.publish("", "q", message(n)).unwrap());
    let cured = Arc::new(AtomicBool::new(false));
    let handler = {
        let (way, cured) = (way.to_owned(), Arc::clone(&cured));
        move |delivery: &onewrite::broker::Delivery, tx: &onewrite::Transaction| {
            if cured.load(Relaxed) {
                return Ok(());
            }
            match &*way {
                "reject" => Err(Error::reject("no such account")),
                "fail" => Err(Error::app("not yet")),
                _ => {
                    let n = u64::from_be_bytes(delivery.message.payload[..8].try_into().unwrap());
                    tx.open_table(BODIES)?.insert(n, delivery.message.payload.as_slice())?;
                    Ok(())
                }
            }
        }
    };
    let later = Duration::from_secs(3600);
    let builder = if way == "fail" { quick(&store).backoff(later, later) } else { quick(&store) };
    let consumer = builder.spawn(broker.source("q"), handler).unwrap();
    let mut n = 0;
    until("the consumer waits for the disk", || {
        write(&store, n);
        n += 1;
        assert_eq!((consumer.status().failed, store.stats().unwrap().poisoned), (None, None), "write {n}");
        consumer.status().waits_for == Some(ConsumerWait::FreeSpace)
    });
    for _ in 0..2_000 {
        write(&store, n);
        n += 1;
    }
    assert_eq!(consumer.status().waits_for, Some(ConsumerWait::FreeSpace), "it still does");
    assert!(!drained(&broker), "the broker keeps the rest");
    let figures = store.stats().unwrap();
    assert_eq!(figures.poisoned, None);
    if way == "reject" {
        let rejected = store.rejected("service");
        let before = rejected.len().unwrap();
        assert!(before > 100, "{before}");
        for entry in rejected.list(None, 100).unwrap() {
            rejected.discard(entry.number).unwrap();
            write(&store, n);
            n += 1;
        }
        until("it goes on in the place of what was discarded", || rejected.len().unwrap() > before - 60);
        until("it waits again", || consumer.status().waits_for == Some(ConsumerWait::FreeSpace));
    }
    cured.store(true, Relaxed);
    for _ in 0..500 {
        write(&store, n);
        n += 1;
    }
    stop(consumer);
    assert_eq!(store.stats().unwrap().next_seq, n);
    store.close().unwrap();
    let store = open();
    assert!(store.verify().unwrap().findings.is_empty());
    write(&store, n);
    store.close().unwrap();
}
