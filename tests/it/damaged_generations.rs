//! Crashes that damage the newest records, again and again: no state of an aggregate holds an event that is lost.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use onewrite::redb::{Database, ReadableTable, TableDefinition};
use onewrite::{Aggregate, Error, Event, ExpectedRevision, OpenError, RecordedEvent, Result, Store};
use proptest::prelude::*;

use crate::scratch::crash_copy;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");

/// An account whose events are sums; each second append saves a snapshot.
#[derive(Debug, Default, PartialEq, Clone, Copy)]
struct Account(u64);

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT_EVERY: u64 = 2;
    type Event = u64;

    fn encode(event: &u64) -> Result<Event> {
        Ok(deposit(*event))
    }

    fn decode(recorded: &RecordedEvent) -> Result<u64> {
        String::from_utf8_lossy(recorded.payload()).parse().map_err(Error::app)
    }

    fn apply(&mut self, event: &u64) {
        self.0 += event;
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some(self.0.to_le_bytes().to_vec())
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        Some(Self(u64::from_le_bytes(snapshot.try_into().ok()?)))
    }
}

fn deposit(by: u64) -> Event {
    Event::bytes("deposited", by.to_string()).unpublished()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// On this account.
    Deposit(u8),
    /// So many events that the index is written in bulk.
    Fill,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Close,
    Crash,
    /// A crash that flips a byte of the newest record, or loses so many; with or without the flag of a clean end.
    Flip {
        unclean: bool,
    },
    Lose {
        records: u8,
        unclean: bool,
    },
}

fn generation() -> impl Strategy<Value = (Vec<Step>, End)> {
    let step = prop_oneof![8 => (0..2_u8).prop_map(Step::Deposit), 1 => Just(Step::Fill)];
    let end = prop_oneof![
        1 => Just(End::Close),
        1 => Just(End::Crash),
        2 => any::<bool>().prop_map(|unclean| End::Flip { unclean }),
        3 => (1..4_u8, any::<bool>()).prop_map(|(records, unclean)| End::Lose { records, unclean }),
    ];
    (prop::collection::vec(step, 0..7), end)
}

/// What was acknowledged and is not lost: amounts by account and revision, and where the log has them.
#[derive(Debug, Default)]
struct Model {
    amounts: BTreeMap<(u8, u64), u64>,
    at: BTreeMap<u64, (u8, u64)>,
    next_amount: u64,
}

impl Model {
    fn deposit(&mut self, store: &Store, account: u8) {
        // No two sums are the same.
        self.next_amount += 1;
        let by = 3_u64.pow(self.next_amount.try_into().unwrap());
        let executed = store.aggregate::<Account>(&account.to_string()).execute(|_| Ok(vec![by]));
        let (seq, revision) = match executed {
            Ok(executed) => {
                let seq = executed.seqs()[0];
                (seq, store.read().unwrap().event(seq).unwrap().unwrap().revision().unwrap())
            }
            // An event that is lost before the newest: no state is made without it.
            Err(Error::MissingRevision { .. } | Error::Corrupt(_)) => {
                let name = format!("account-{account}");
                let append =
                    store.write(move |tx| tx.stream(&name).append([deposit(by)], ExpectedRevision::Any));
                let appended = append.unwrap().into_value();
                (appended.seqs[0], appended.revisions.start)
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(self.amounts.insert((account, revision), by), None, "revision {revision} was given twice");
        assert_eq!(self.at.insert(seq, (account, revision)), None, "number {seq} was given twice");
    }

    fn lose(&mut self, seqs: &[u64]) {
        for seq in seqs {
            if let Some(lost) = self.at.remove(seq) {
                self.amounts.remove(&lost);
            }
        }
    }

    /// Each account is the sum of what is not lost, or says that something is.
    fn agree(&self, store: &Store) {
        for account in 0..2 {
            match store.aggregate::<Account>(&account.to_string()).load() {
                Ok(loaded) => {
                    let of_account = self.amounts.range((account, 0)..=(account, u64::MAX));
                    let sum: u64 = of_account.map(|(_, by)| by).sum();
                    assert_eq!(loaded.state.0, sum, "account {account}: {loaded:?}");
                }
                Err(Error::MissingRevision { .. } | Error::Corrupt(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// The newest records, by plain redb. The copy of a file that was open is repaired by that, so that it looks as if it had been closed
/// cleanly; `unclean` leaves it as a crash would.
fn damage(path: &Path, records: usize, flips: bool, unclean: bool) -> Vec<u64> {
    let db = Database::open(path).unwrap();
    let tx = db.begin_write().unwrap();
    let newest: Vec<u64> = {
        let mut log = tx.open_table(LOG).unwrap();
        let newest: Vec<u64> =
            log.iter().unwrap().rev().take(records).map(|row| row.unwrap().0.value()).collect();
        for seq in &newest {
            if flips {
                let mut frame = log.get(*seq).unwrap().unwrap().value().to_vec();
                *frame.last_mut().unwrap() ^= 1;
                log.insert(*seq, frame.as_slice()).unwrap();
            } else {
                log.remove(*seq).unwrap();
            }
        }
        newest
    };
    tx.commit().unwrap();
    if unclean {
        let copy = path.with_extension("copy");
        std::fs::copy(path, &copy).unwrap();
        drop(db);
        std::fs::rename(&copy, path).unwrap();
    }
    newest
}

fn live(folder: &Path, generations: &[(Vec<Step>, End)]) {
    let mut path: PathBuf = folder.join("a.redb");
    let mut model = Model::default();
    for (steps, end) in generations {
        let store = match Store::open(&path) {
            Ok(store) => store,
            // The index knows more than the log has: that is reported, and the file stays as it is.
            Err(Error::Open(OpenError::Damaged { .. })) => return,
            Err(error) => panic!("{error}"),
        };
        model.agree(&store);
        for step in steps {
            match step {
                Step::Deposit(account) => model.deposit(&store, *account),
                Step::Fill => {
                    let fill = |tx: &onewrite::Transaction| {
                        let event = || Event::bytes("f", "").unpublished();
                        (0..crate::support::tuning::DERIVED_FLUSH_EVENTS)
                            .try_for_each(|_| tx.append(event()).map(drop))
                    };
                    store.write(fill).unwrap();
                }
            }
            model.agree(&store);
        }
        let (records, flips, unclean) = match end {
            End::Close => {
                store.close().unwrap();
                continue;
            }
            End::Crash => (0, false, true),
            End::Flip { unclean } => (1, true, *unclean),
            End::Lose { records, unclean } => (usize::from(*records), false, *unclean),
        };
        path = crash_copy(&store, folder);
        model.lose(&damage(&path, records, flips, unclean));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: whatever is lost, a state is the sum of what is not, and no number is given twice to events that stand. Method: generations of
    /// two accounts that end cleanly, by a crash, or by a crash that damages or loses the newest records.
    #[test]
    fn no_state_holds_a_lost_event(generations in prop::collection::vec(generation(), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        live(folder.path(), &generations);
    }
}
