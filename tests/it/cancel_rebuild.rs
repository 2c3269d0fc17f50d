//! A rebuild can be cancelled: the old tables stay, nothing of the new ones is left, and the log no longer waits.

use std::time::Duration;

use onewrite::redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableHandle};
use onewrite::{Error, Event, FailurePolicy, Projection, ProjectionState, Store};

const TIMEOUT: Duration = Duration::from_secs(30);
const ROWS: TableDefinition<'_, u64, u64> = TableDefinition::new("rows");

fn run(store: &Store, version: u32, poison: Option<u64>) -> Projection {
    let policy = FailurePolicy::Stop { attempts: 1 };
    let builder = store.projection("p").table(ROWS).version(version).batch(2).on_failure(policy);
    builder
        .spawn(move |event, tx| {
            if Some(event.seq()) == poison {
                return Err(Error::app("it cannot be applied"));
            }
            tx.open_table(ROWS)?.insert(event.seq(), u64::from(version))?;
            Ok(())
        })
        .unwrap()
}

fn rows(store: &Store) -> Vec<u64> {
    let table = store.read().unwrap().open_table(ROWS).unwrap();
    table.iter().unwrap().map(|row| row.unwrap().1.value()).collect()
}

/// Goal: a rebuild that stands at a poison event has a way back, while the projection runs and while it does not. Method: cancel;
/// the old tables are whole, the same version stays cancelled over a restart, and an asked or a newer rebuild begins anew.
#[test]
fn a_rebuild_at_a_poison_event_can_be_cancelled() {
    for by_handle in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let store = Store::open(&path).unwrap();
        let append = |tx: &onewrite::Transaction| {
            (0..9).try_for_each(|_| tx.append(Event::bytes("counted", "").unpublished()).map(drop))
        };
        store.write(append).unwrap();
        run(&store, 1, None).wait_until_live(TIMEOUT).unwrap();
        let second = run(&store, 2, Some(7));
        assert!(second.wait_until_live(TIMEOUT).is_err());
        assert!(second.status().rebuild_stopped.is_some_and(|reported| reported.contains("event 7")));
        if by_handle {
            assert!(second.cancel_rebuild().unwrap());
            let reported = second.wait_until_live(TIMEOUT).unwrap_err().to_string();
            assert!(reported.contains("cancelled") || reported.contains("event 7"), "{reported}");
            second.stop(TIMEOUT);
        } else {
            second.stop(TIMEOUT);
            assert!(store.cancel_rebuild("p").unwrap());
        }
        assert!(!store.cancel_rebuild("p").unwrap(), "there is none any more");
        let stats = store.stats().unwrap().projections["p"].clone();
        assert_eq!((stats.version, stats.rebuilding, stats.cancelled), (1, None, Some(2)));
        assert_eq!(rows(&store), [1; 9]);
        store.close().unwrap();
        let db = Database::open(&path).unwrap();
        let tables: Vec<_> =
            db.begin_read().unwrap().list_tables().unwrap().map(|it| it.name().to_owned()).collect();
        assert!(!tables.iter().any(|name| name.starts_with("onewrite.rebuild.")), "{tables:?}");
        drop(db);
        let store = Store::open(&path).unwrap();
        let again = run(&store, 2, None);
        assert_eq!(again.status().state, ProjectionState::Cancelled);
        assert!(matches!(again.wait_until_live(TIMEOUT), Err(Error::ProjectionStopped { .. })));
        if by_handle {
            again.rebuild();
            again.wait_until_live(TIMEOUT).unwrap();
            assert_eq!(rows(&store), [2; 9]);
        } else {
            again.stop(TIMEOUT);
            let third = run(&store, 3, None);
            third.wait_until_live(TIMEOUT).unwrap();
            assert_eq!(rows(&store), [3; 9]);
        }
        assert_eq!(store.stats().unwrap().projections["p"].cancelled, None);
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    assert!(matches!(store.cancel_rebuild("none"), Err(Error::NoSuchProjection { .. })));
}
