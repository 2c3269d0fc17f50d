//! Many commands on one aggregate at once: each succeeds, within a bounded number of decisions, whatever the others do.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use onewrite::{Aggregate, Error, Event, ExpectedRevision, RecordedEvent, Result, Store, limits};

#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Count(u64);

impl Aggregate for Count {
    const CATEGORY: &'static str = "count";
    const SNAPSHOT_EVERY: u64 = 100;
    type Event = u64;

    fn encode(event: &u64) -> Result<Event> {
        Ok(Event::bytes("counted", event.to_le_bytes()).unpublished())
    }

    fn decode(recorded: &RecordedEvent) -> Result<u64> {
        Ok(u64::from_le_bytes(recorded.payload().try_into().map_err(Error::app)?))
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

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn count(store: &Store, id: &str) -> u64 {
    store.aggregate::<Count>(id).load().unwrap().state.0
}

/// Goal: of 64 threads with 50 commands each on one aggregate every command succeeds, within three decisions unless a loaded machine
/// keeps one from deciding for seconds; others go on meanwhile. Method: all begin at once; decisions are counted per command.
#[test]
fn every_command_succeeds_however_many_there_are() {
    let (_folder, store) = open();
    let (begin, most) = (Barrier::new(65), AtomicU32::new(0));
    let (over, others, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..64)
            .map(|_| {
                scope.spawn(|| {
                    begin.wait();
                    for _ in 0..50 {
                        let mut decisions = 0;
                        let executed = store.aggregate::<Count>("1").execute(|_| {
                            decisions += 1;
                            Ok(vec![1])
                        });
                        executed.unwrap();
                        over.fetch_add(u64::from(decisions > 3), Relaxed);
                        most.fetch_max(decisions, Relaxed);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            begin.wait();
            while !done.load(Relaxed) {
                let mut decisions = 0;
                let executed = store.aggregate::<Count>("2").execute(|_| {
                    decisions += 1;
                    Ok(vec![1])
                });
                executed.unwrap();
                assert_eq!(decisions, 1, "nobody else writes this one");
                others.fetch_add(1, Relaxed);
            }
        });
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        done.store(true, Relaxed);
    });
    assert_eq!(count(&store, "1"), 64 * 50);
    assert_eq!(count(&store, "2"), others.load(Relaxed));
    // Somebody who was passed, because the machine stood still, may need more.
    assert!(over.load(Relaxed) <= 64, "{} commands took more than 3 decisions", over.load(Relaxed));
    assert!(most.load(Relaxed) <= limits::CONFLICT_ATTEMPTS_DEFAULT, "{most:?}");
    assert!(store.verify().unwrap().is_whole());
}

/// Goal: a command that decides slowly is not outrun by quick ones. Method: four commands that take 20 ms to decide, beside eight
/// threads that decide at once and never pause.
#[test]
fn a_slow_decision_is_not_starved_by_quick_ones() {
    let (_folder, store) = open();
    let (done, quick) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    store.aggregate::<Count>("1").execute(|_| Ok(vec![1])).unwrap();
                    quick.fetch_add(1, Relaxed);
                }
            });
        }
        let slow = scope.spawn(|| {
            for _ in 0..4 {
                let executed = store.aggregate::<Count>("1").execute(|_| {
                    std::thread::sleep(Duration::from_millis(20));
                    Ok(vec![1])
                });
                executed.unwrap();
            }
        });
        let slow = slow.join();
        done.store(true, Relaxed);
        slow.unwrap();
    });
    assert_eq!(count(&store, "1"), quick.load(Relaxed) + 4);
}

/// Goal: `decide` may do as it likes while others stand behind it: execute on the same aggregate and on others, in any order; wait for
/// a thread that stands behind it; panic, fail, decide on nothing. Nobody waits for ever, and nothing is counted twice. Method: all of
/// them at once, on two aggregates, in opposite orders.
#[test]
fn decisions_that_nest_wait_and_panic() {
    let (_folder, store) = open();
    let expected = [AtomicU64::new(0), AtomicU64::new(0)];
    let add = |id: usize, by: u64| expected[id].fetch_add(by, Relaxed);
    let ids = ["1", "2"];
    std::thread::scope(|scope| {
        for thread in 0..12_usize {
            let (store, add) = (&store, &add);
            scope.spawn(move || {
                for round in 0..6 {
                    let (own, other) = (thread % 2, 1 - thread % 2);
                    let executed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        let mut decisions = 0;
                        store.aggregate::<Count>(ids[own]).attempts(1000).execute(|_| {
                            decisions += 1;
                            match round {
                                0 if decisions == 1 => {
                                    // The other one's command, while others wait for this one's.
                                    let nested = store.aggregate::<Count>(ids[other]).attempts(1000);
                                    nested.execute(|_| Ok(vec![1]))?;
                                    add(other, 1);
                                }
                                1 if decisions == 1 => {
                                    let nested = store.aggregate::<Count>(ids[own]).attempts(1000);
                                    nested.execute(|_| Ok(vec![1]))?;
                                    add(own, 1);
                                }
                                2 => std::panic::resume_unwind(Box::new("no decision")),
                                3 => return Err(Error::app("refused")),
                                4 => return Ok(Vec::new()),
                                5 if thread == 0 && decisions == 2 => {
                                    // It is the head now, and waits for one behind it: that one passes.
                                    let behind = || {
                                        store
                                            .aggregate::<Count>(ids[own])
                                            .attempts(1000)
                                            .execute(|_| Ok(vec![1]))
                                    };
                                    std::thread::scope(|scope| scope.spawn(behind).join().unwrap())?;
                                    add(own, 1);
                                }
                                _ => {}
                            }
                            Ok(vec![1])
                        })
                    }));
                    match executed {
                        Ok(Ok(receipt)) if !receipt.seqs().is_empty() => drop(add(own, 1)),
                        Ok(Ok(_)) => assert_eq!(round, 4),
                        Ok(Err(error)) => assert!(round == 3 && matches!(error, Error::App(_)), "{error}"),
                        Err(_) => assert_eq!(round, 2),
                    }
                }
            });
        }
    });
    assert_eq!(
        [count(&store, "1"), count(&store, "2")],
        [expected[0].load(Relaxed), expected[1].load(Relaxed)]
    );
}

/// Goal: inside a transaction a command is refused at once, also while there is a line: whoever stands in that may need this very
/// transaction to end. Method: a closure that executes, beside commands that never pause.
#[test]
fn inside_a_transaction_nobody_stands_in_line() {
    let (_folder, store) = open();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    store.aggregate::<Count>("1").execute(|_| Ok(vec![1])).unwrap();
                }
            });
        }
        for _ in 0..50 {
            let inner = store.clone();
            let refused =
                store.write(move |_| Ok(inner.aggregate::<Count>("1").execute(|_| Ok(vec![1])).is_err()));
            assert!(*refused.unwrap().value());
        }
        done.store(true, Relaxed);
    });
    assert!(store.stats().unwrap().poisoned.is_none());
}

/// Goal: where others append to the stream by themselves the bound is the setting, and the conflict is reported. Method: a writer that
/// appends during each decision.
#[test]
fn plain_appends_are_bounded_by_the_attempts() {
    let (_folder, store) = open();
    let mut decisions = 0;
    let outrun = store.aggregate::<Count>("1").execute(|_| {
        decisions += 1;
        let event = || [Event::bytes("counted", 1_u64.to_le_bytes()).unpublished()];
        std::thread::scope(|scope| {
            let append =
                || store.write(move |tx| tx.stream("count-1").append(event(), ExpectedRevision::Any));
            scope.spawn(append).join().unwrap()
        })?;
        Ok(vec![100])
    });
    assert!(matches!(outrun, Err(Error::WrongRevision { .. })), "{outrun:?}");
    assert_eq!(decisions, limits::CONFLICT_ATTEMPTS_DEFAULT);
    assert_eq!(count(&store, "1"), u64::from(decisions));
}

/// Goal: commands of tasks and of threads on one aggregate all succeed, within a bounded number of
/// decisions. Method: 32 tasks on three runtimes, four threads, 40 commands each, all at once.
#[test]
fn tasks_and_threads_share_an_aggregate() {
    let (_folder, store) = open();
    let (begin, most, over) = (Barrier::new(7), AtomicU32::new(0), AtomicU32::new(0));
    let note = |decisions: u32| {
        over.fetch_add(u32::from(decisions > 3), Relaxed);
        most.fetch_max(decisions, Relaxed);
    };
    let executes_tasks = || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let executes = |store: Store| async move {
            let mut all = Vec::new();
            for _ in 0..40 {
                let mut decisions = 0;
                let aggregate = store.aggregate::<Count>("1");
                let executed = aggregate.execute_async(|_| {
                    decisions += 1;
                    Ok(vec![1])
                });
                executed.await.unwrap();
                all.push(decisions);
            }
            all
        };
        let tasks: Vec<_> = (0..11).map(|_| runtime.spawn(executes(store.clone()))).collect();
        begin.wait();
        for task in tasks {
            runtime.block_on(task).unwrap().into_iter().for_each(note);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(executes_tasks);
        }
        for _ in 0..4 {
            scope.spawn(|| {
                begin.wait();
                for _ in 0..40 {
                    let mut decisions = 0;
                    let executed = store.aggregate::<Count>("1").execute(|_| {
                        decisions += 1;
                        Ok(vec![1])
                    });
                    executed.unwrap();
                    note(decisions);
                }
            });
        }
    });
    assert_eq!(count(&store, "1"), (33 + 4) * 40);
    assert!(over.load(Relaxed) <= 37, "{over:?} commands took more than 3 decisions");
    assert!(most.load(Relaxed) <= limits::CONFLICT_ATTEMPTS_DEFAULT, "{most:?}");
    assert!(store.verify().unwrap().is_whole());
}

/// Goal: a task at the head of the line that is not polled any more holds the others up for two seconds at
/// most. A task that was dropped while it waited holds nobody up. Method: a task meets a conflict, becomes
/// the head, and is left alone. One behind it is dropped, and a third one executes.
#[test]
fn a_task_that_is_not_polled_is_passed() {
    let (_folder, store) = open();
    let aggregate = store.aggregate::<Count>("1");
    let context = &mut Context::from_waker(Waker::noop());
    let decisions = AtomicU32::new(0);
    let mut head = Box::pin(aggregate.execute_async(|_| {
        if decisions.fetch_add(1, Relaxed) == 0 {
            aggregate.execute(|_| Ok(vec![1]))?;
        }
        Ok(vec![1])
    }));
    while decisions.load(Relaxed) < 2 {
        assert!(head.as_mut().poll(context).is_pending());
        std::thread::yield_now();
    }
    let mut dropped = Box::pin(aggregate.execute_async(|_| Ok(vec![1])));
    assert!(dropped.as_mut().poll(context).is_pending());
    drop(dropped);
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let last = aggregate.execute_async(|_| Ok(vec![1]));
        tokio::time::timeout(Duration::from_secs(20), last).await.expect("it passes the head").unwrap()
    });
    assert!(began.elapsed() >= Duration::from_millis(1_000), "it stood behind the head");
    assert_eq!(count(&store, "1"), 3);
    drop(head);
    let mut decisions = 0;
    aggregate
        .execute(|_| {
            decisions += 1;
            Ok(vec![1])
        })
        .unwrap();
    assert_eq!(decisions, 1);
    assert!(store.verify().unwrap().is_whole());
}
