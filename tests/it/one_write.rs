//! P1, one write: state and events together or not at all, whatever the neighbours in the group do; requests and events
//! of one id once; what would wait for itself fails at once.

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use onewrite::redb::{TableDefinition, TableHandle};
use onewrite::{ConfirmError, Error, Event, EventError, Receipt, Store, Transaction, WriteOnce, limits};

use crate::scratch::{Random, STATE, audit, event, events, payload, put, state};

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

/// Panics without a word on stderr.
fn panic_quietly() -> ! {
    resume_unwind(Box::new("on purpose"))
}

/// Runs `f` on a thread of its own; panics if it hangs.
fn in_time<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || drop(sender.send(f())));
    let answer =
        receiver.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{what}: it hangs"));
    thread.join().unwrap();
    answer
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Good,
    Fails,
    Panics,
}

/// Goal: P1 under a storm. Method: 16 threads write; half of the closures fail or panic after they opened a table,
/// appended, or both. State, log and receipts must hold exactly those that returned `Ok`, without a gap.
#[test]
fn failing_closures_leave_no_trace_and_hurt_nobody() {
    let (_folder, store) = open();
    let threads: Vec<_> = (0..16_u64)
        .map(|thread| {
            let store = store.clone();
            std::thread::spawn(move || {
                let mut random = Random(thread);
                let mut good = Vec::new();
                for n in (0..40).map(|at| thread * 1000 + at) {
                    let end = [End::Good, End::Good, End::Fails, End::Panics][random.below(4) as usize];
                    // A good one always does both: that is what is checked for halves.
                    let (table, append) = (random.below(2) == 0, random.below(2) == 0);
                    let written = store.write(move |tx| {
                        if table || end == End::Good {
                            tx.open_table(STATE)?.insert(n, n)?;
                        }
                        if append || end == End::Good {
                            tx.append(event(n))?;
                        }
                        match end {
                            End::Good => Ok(n),
                            End::Fails => Err(Error::app(format!("on purpose: {n}"))),
                            End::Panics => panic_quietly(),
                        }
                    });
                    match (end, written) {
                        (End::Good, Ok(receipt)) => {
                            assert_eq!(*receipt.value(), n);
                            good.push((n, receipt.seqs().to_vec()));
                        }
                        (End::Fails, Err(Error::App(text))) => {
                            assert_eq!(text.to_string(), format!("on purpose: {n}"));
                        }
                        (End::Panics, Err(Error::Panicked { message })) => assert_eq!(message, "on purpose"),
                        (end, other) => panic!("{end:?} became {other:?}"),
                    }
                }
                good
            })
        })
        .collect();
    let good: BTreeMap<u64, Vec<u64>> =
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    assert_eq!(audit(&store), good.keys().copied().collect::<Vec<_>>());
    let snapshot = store.read().unwrap();
    for (n, seqs) in &good {
        let [seq] = seqs[..] else { panic!("{n}: {seqs:?}") };
        let recorded = snapshot.event(seq).unwrap().unwrap();
        assert_eq!(recorded.payload(), payload(*n), "the receipt shows another's event");
    }
    let stats = store.stats().unwrap();
    assert!(stats.reruns > 0, "no group was ever rolled back: the test shows nothing");
    assert_eq!(stats.writes, good.len() as u64);
}

/// Goal: closures are run again when another of their group fails, and have effect once. Method: hold the write lock so that a
/// group gathers, in it one that fails after opening a table; count the runs.
#[test]
fn a_closure_may_run_again_and_has_effect_once() {
    let (_folder, store) = open();
    let runs: Arc<Vec<AtomicU32>> = Arc::new((0..10).map(|_| AtomicU32::new(0)).collect());
    let holding = store.begin().unwrap();
    let writers: Vec<_> = (0..10_u64)
        .map(|n| {
            let (store, runs) = (store.clone(), Arc::clone(&runs));
            std::thread::spawn(move || {
                store.write(move |tx| {
                    runs[n as usize].fetch_add(1, Ordering::Relaxed);
                    tx.open_table(STATE)?.insert(n, n)?;
                    tx.append(event(n))?;
                    if n % 3 == 2 { Err(Error::app("no")) } else { Ok(()) }
                })
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    drop(holding);
    let results: Vec<bool> = writers.into_iter().map(|writer| writer.join().unwrap().is_ok()).collect();
    assert_eq!(results, (0..10).map(|n| n % 3 != 2).collect::<Vec<_>>());
    assert_eq!(audit(&store), [0, 1, 3, 4, 6, 7, 9]);
    let total: u32 = runs.iter().map(|runs| runs.load(Ordering::Relaxed)).sum();
    assert!(total > 10, "none was run again");
}

/// Goal: a failure in a group takes back lanes, ids and requests too, not only records. Method: in one group, a closure
/// fails after using them, without touching a table, before one that uses the same; each has its proper first.
#[test]
fn what_gathers_in_memory_is_rolled_back_in_place() {
    let (_folder, store) = open();
    let tx = store.begin().unwrap();
    let futures = std::thread::spawn({
        let store = store.clone();
        move || {
            let use_all = |fails: bool| {
                move |tx: &Transaction| {
                    assert!(tx.first_time("scope", "delivery")?);
                    let appended = tx.append(event(3).id("given"))?;
                    assert!(!appended.repeated);
                    if fails { Err(Error::app("no")) } else { Ok(appended.seq) }
                }
            };
            let mut futures: Vec<_> =
                [true, true, false].map(|fails| Box::pin(store.write_async(use_all(fails)))).into();
            for future in &mut futures {
                assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            }
            futures
        }
    })
    .join()
    .unwrap();
    drop(tx);
    let results: Vec<_> = futures.into_iter().map(run).collect();
    assert!(matches!(&results[..], [Err(Error::App(_)), Err(Error::App(_)), Ok(_)]), "{results:?}");
    let written = events(&store.read().unwrap());
    assert_eq!(written.len(), 1);
    assert_eq!((written[0].seq(), written[0].lane().unwrap().number), (0, 0));
    assert_eq!(store.stats().unwrap().reruns, 0, "nothing was opened: no need to run again");
}

/// Goal: the exclusive transaction: commit does all, rollback, drop and a panic nothing, and the store goes on.
#[test]
fn an_exclusive_transaction_commits_all_or_nothing() {
    let (folder, store) = open();
    let fill = |tx: &Transaction, n| {
        tx.open_table(STATE).unwrap().insert(n, n).unwrap();
        tx.append(event(n)).unwrap();
    };
    let tx = store.begin().unwrap();
    fill(&tx, 0);
    assert_eq!(tx.event(0).unwrap().unwrap().payload(), payload(0), "it sees its own events");
    assert_eq!(state(&store.read().unwrap()), [0; 0], "others see nothing before the commit");
    assert_eq!(tx.commit().unwrap().seqs(), [0]);

    let tx = store.begin().unwrap();
    fill(&tx, 7);
    tx.rollback().unwrap();
    let tx = store.begin().unwrap();
    fill(&tx, 8);
    drop(tx);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let tx = store.begin().unwrap();
        fill(&tx, 9);
        panic_quietly();
    }));
    assert!(panicked.is_err());
    put(&store, 1).unwrap();
    assert_eq!(audit(&store), [0, 1]);
    store.close().unwrap();
    assert_eq!(audit(&Store::open(folder.path().join("a.redb")).unwrap()), [0, 1]);
}

/// Goal: `write_once` does a request once: a repeat does nothing and shows its events, also after reopening; a failed
/// one counts as never made; of 16 at the same time exactly one does it.
#[test]
fn a_request_is_done_once() {
    let (folder, store) = open();
    let request = |store: &Store, id: &str, n: u64, fails: bool| {
        store.write_once(id, move |tx| {
            tx.open_table(STATE)?.insert(n, n)?;
            tx.append(event(n))?;
            if fails { Err(Error::app("no")) } else { Ok(n) }
        })
    };
    put(&store, 0).unwrap();
    assert!(matches!(request(&store, "r", 1, true), Err(Error::App(_))));
    assert!(matches!(request(&store, "r", 1, false), Ok(WriteOnce::Done(receipt)) if receipt.seqs() == [1]));
    let repeated = |store: &Store| match request(store, "r", 99, false).unwrap() {
        WriteOnce::Repeated(receipt) => receipt.seqs().to_vec(),
        WriteOnce::Done(_) => panic!("done twice"),
        _ => unreachable!(),
    };
    assert_eq!(repeated(&store), [1]);
    store.close().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    assert_eq!(repeated(&store), [1]);

    let start = Arc::new(Barrier::new(16));
    let threads: Vec<_> = (0..16)
        .map(|_| {
            let (store, start) = (store.clone(), Arc::clone(&start));
            std::thread::spawn(move || {
                start.wait();
                let once = request(&store, "crowd", 2, false).unwrap();
                let (done, receipt_seqs) = match once {
                    WriteOnce::Done(receipt) => (true, receipt.seqs().to_vec()),
                    WriteOnce::Repeated(receipt) => (false, receipt.seqs().to_vec()),
                    _ => unreachable!(),
                };
                assert_eq!(receipt_seqs, [2]);
                done
            })
        })
        .collect();
    let done = threads.into_iter().filter(|_| true).map(|thread| thread.join().unwrap());
    assert_eq!(done.filter(|done| *done).count(), 1);
    assert_eq!(audit(&store), [0, 1, 2]);
    for bad in [vec![], vec![b'x'; limits::INBOX_ID_BYTES_MAX + 1]] {
        let refused = store.write_once(bad, |_| Ok(()));
        assert!(matches!(refused, Err(Error::BadId { .. })));
    }
    assert!(store.write_once(vec![b'x'; limits::INBOX_ID_BYTES_MAX], |_| Ok(())).is_ok());
}

/// Goal: an event id that the application gave names one content for ever: the same again is the first one, another is
/// a conflict and fails its whole write. Within a transaction, in later ones, after reopening.
#[test]
fn an_event_id_names_one_content() {
    let (folder, store) = open();
    let named = |n: u64| event(n).id("order-17");
    let tx = store.begin().unwrap();
    let first = tx.append(named(0)).unwrap();
    let again = tx.append(named(0)).unwrap();
    assert_eq!((first.seq, first.repeated, again.seq, again.repeated), (0, false, 0, true));
    assert_eq!(tx.commit().unwrap().seqs(), [0, 0]);
    let store = {
        store.close().unwrap();
        Store::open(folder.path().join("a.redb")).unwrap()
    };
    let receipt = store.write(move |tx| tx.append(named(0))).unwrap();
    assert_eq!((receipt.seqs(), receipt.value().repeated), (&[0][..], true));
    for other in [named(1), named(0).header("h", 1), named(0).to("", "elsewhere"), named(0).key("other")] {
        let conflict = store.write(move |tx| {
            tx.open_table(STATE)?.insert(5, 5)?;
            tx.append(other.clone())
        });
        assert!(matches!(&conflict, Err(Error::Conflict { id, seq: 0 }) if id == "order-17"), "{conflict:?}");
    }
    let snapshot = store.read().unwrap();
    assert_eq!((events(&snapshot).len(), state(&snapshot)), (1, vec![]));
    assert_eq!(events(&snapshot)[0].id(), "order-17");
}

/// Goal: what AMQP or the limits refuse is refused at append, naming the field, and nothing of it stays.
#[test]
fn limits_are_reported_at_append_by_field() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().payload_bytes_max(100).open(folder.path().join("a.redb")).unwrap();
    let long = "x".repeat(256);
    let plain = || Event::bytes("t", b"1".to_vec()).to("e", "r");
    let mut many = plain();
    for n in 0..=limits::HEADERS_MAX {
        many = many.header(format!("h{n}"), 1);
    }
    let refused: Vec<(Event, &str)> = vec![
        (Event::bytes(&*long, vec![]).to("e", "r"), "`type`"),
        (Event::bytes("", vec![]).to("e", "r"), "`type`"),
        (plain().key(&*long), "`key`"),
        (plain().key(""), "`key`"),
        (plain().id(&*long), "`id`"),
        (plain().to(&*long, "r"), "`exchange`"),
        (plain().to("e", &*long), "`routing_key`"),
        (plain().content_type(&*long), "`content_type`"),
        (plain().correlation_id(&*long), "`correlation_id`"),
        (plain().subject(&*long), "`subject`"),
        (plain().header("onewrite-epoch", 1), "`onewrite-epoch`"),
        (plain().header("h", 1).header("h", 2), "`h` is given twice"),
        (plain().header("h", "x".repeat(limits::HEADERS_BYTES_MAX)), "headers"),
        (many, "headers"),
        (plain().to("e\n", "r"), "`exchange`"),
        (Event::bytes("t", vec![0; 101]).to("e", "r"), "101 bytes"),
        (Event::bytes("t", vec![]), "no destination"),
    ];
    for (event, names) in refused {
        let error = store.write(move |tx| tx.append(event.clone())).unwrap_err();
        assert!(matches!(error, Error::Event(_)), "{error:?}");
        assert!(error.to_string().contains(names), "`{error}` should name {names}");
    }
    assert!(matches!(
        store.write(|tx| tx.append(Event::bytes("t", vec![0; 101]).unpublished())),
        Err(Error::Event(EventError::PayloadTooLarge { len: 101, max: 100 }))
    ));
    assert_eq!(store.stats().unwrap().next_seq, 0);
    let longest = "x".repeat(255);
    let fits = Event::bytes(&*longest, vec![0; 100]).key(&*longest).id(&*longest).to(&*longest, &*longest);
    assert_eq!(store.write(move |tx| tx.append(fits.clone())).unwrap().seqs(), [0]);
}

/// Goal: the library's own tables cannot be written to by an application, under whatever type.
#[test]
fn reserved_tables_are_refused() {
    const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
    let (_folder, store) = open();
    put(&store, 0).unwrap();
    let tx = store.begin().unwrap();
    let name = LOG.name().to_owned();
    assert!(matches!(tx.open_table(LOG), Err(Error::ReservedTable { name: n }) if n == name));
    assert!(matches!(tx.delete_table(LOG), Err(Error::ReservedTable { .. })));
    let multimap = onewrite::redb::MultimapTableDefinition::<u64, u64>::new("onewrite.mine");
    assert!(matches!(tx.open_multimap_table(multimap), Err(Error::ReservedTable { .. })));
    drop(tx);
    assert_eq!(audit(&store), [0]);
}

/// Every call that would wait for the transaction of its own thread.
fn calls_that_wait(store: &Store, receipt: &Receipt) {
    let refused = |what: &str, error: Option<Error>| {
        assert!(matches!(error, Some(Error::InsideTransaction { .. })), "{what}: {error:?}");
    };
    refused("write", store.write(|_| Ok(())).err());
    refused("begin", store.begin().err());
    refused("write_once", store.write_once("id", |_| Ok(())).err());
    refused("close", store.clone().close().err());
    refused("forget_relay", store.forget_relay("relay").err());
    let broker = onewrite::broker::MemoryBroker::new();
    refused("publish_to", store.relay("another").spawn(broker.publisher()).err());
    let mut future = Box::pin(store.write_async(|_| Ok(())));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => refused("write_async", result.err()),
        Poll::Pending => panic!("write_async waits"),
    }
    for confirmed in
        [receipt.wait_confirmed(Duration::MAX / 4), receipt.wait_confirmed_by("relay", Duration::MAX / 4)]
    {
        let Err(ConfirmError::Store(error)) = confirmed else { panic!("{confirmed:?}") };
        refused("confirmed", Some(error));
    }
    let quarantine = store.quarantine("relay").unwrap();
    refused("list", quarantine.list(None, 1).err());
    refused("show", quarantine.get(0).err());
    refused("redrive", quarantine.redrive(0).err());
    refused("discard", quarantine.discard(0).err());
}

/// Goal: waiting inside a transaction for what needs that transaction to end fails at once. (It cannot be kept from
/// compiling: the store is a handle that anyone may hold.) Method: every such call, in a closure and in an exclusive
/// transaction; the same calls' stores work after.
#[test]
fn waiting_for_oneself_fails_at_once() {
    let (_folder, store) = open();
    let broker = onewrite::broker::MemoryBroker::new();
    let relay = store.relay("relay").spawn(broker.publisher()).unwrap();
    let receipt = Arc::new(store.write(|_| Ok(())).unwrap());
    let in_closure = {
        let (store, receipt) = (store.clone(), Arc::clone(&receipt));
        move || {
            let inner = store.clone();
            let receipt = Arc::clone(&receipt);
            store.write(move |_| {
                calls_that_wait(&inner, &receipt);
                inner.read()?; // reading waits for nobody
                Ok(())
            })
        }
    };
    in_time("in a closure", in_closure).unwrap();
    let in_exclusive = {
        let store = store.clone();
        move || {
            let tx = store.begin().unwrap();
            calls_that_wait(&store, &receipt);
            tx.append(event(0)).unwrap();
            tx.open_table(STATE).unwrap().insert(0, 0).unwrap();
            drop(tx.commit().unwrap());
            put(&store, 1).unwrap();
        }
    };
    in_time("in an exclusive transaction", in_exclusive);
    drop(relay);
    assert_eq!(audit(&store), [0, 1]);
    // Another store's transaction is no obstacle.
    let (_other_folder, other) = open();
    let tx = store.begin().unwrap();
    put(&other, 0).unwrap();
    drop(tx);
}

/// A runtime of ten lines: polls until ready, sleeping in between.
fn run<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park_timeout(Duration::from_secs(20)),
        }
    }
}

/// Goal: `write_async` needs no runtime, keeps the queue's bound by waiting instead of blocking, and loses nobody.
/// Method: 3,000 futures polled by one thread while the write lock is held, more than the queue takes; each must be woken
/// when there is room, and again when it is done. Some are dropped half-way: those queued are written all the same.
#[test]
fn futures_beyond_the_queue_wait_and_are_woken() {
    struct Flag(AtomicBool, std::thread::Thread);
    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
            self.1.unpark();
        }
    }
    const FUTURES: u64 = 3000;
    assert!(FUTURES as usize > 2 * limits::WRITE_QUEUE_MAX);
    let (_folder, store) = open();
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let holder = std::thread::spawn({
        let store = store.clone();
        move || {
            let tx = store.begin().unwrap();
            ready.send(()).unwrap();
            let _ = held.recv();
            drop(tx);
        }
    });
    is_ready.recv().unwrap();
    let mut futures: Vec<_> = (0..FUTURES)
        .map(|n| {
            let written = store.write_async(move |tx| {
                tx.open_table(STATE)?.insert(n, n)?;
                tx.append(event(n))?;
                Ok(())
            });
            let flag = Arc::new(Flag(AtomicBool::new(true), std::thread::current()));
            Some((Box::pin(written), flag))
        })
        .collect();
    let mut hold = Some(hold);
    let mut left = FUTURES;
    let mut rounds = 0;
    while left > 0 {
        let mut woken = 0;
        for (n, slot) in futures.iter_mut().enumerate() {
            let Some((future, flag)) = slot else { continue };
            if !flag.0.swap(false, Ordering::SeqCst) {
                continue;
            }
            woken += 1;
            let waker = Waker::from(Arc::clone(flag));
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(result) => {
                    result.unwrap();
                    left -= 1;
                    *slot = None;
                }
                // Queued in the first round, surely: the queue was empty.
                Poll::Pending if rounds == 0 && n < 100 => {
                    left -= 1;
                    *slot = None;
                }
                Poll::Pending => {}
            }
        }
        rounds += 1;
        drop(hold.take());
        if woken == 0 {
            let before = std::time::Instant::now();
            std::thread::park_timeout(Duration::from_secs(20));
            assert!(before.elapsed() < Duration::from_secs(20), "{left} futures are never woken");
        }
    }
    holder.join().unwrap();
    assert_eq!(audit(&store), (0..FUTURES).collect::<Vec<_>>());
    let error = {
        let late = store.write_async(|_| Ok(()));
        store.close().unwrap();
        run(late).unwrap_err()
    };
    assert!(matches!(error, Error::Closed { .. }), "{error:?}");
}

/// Goal: a closed store says so, whatever is asked of it.
#[test]
fn a_closed_store_says_so() {
    let (_folder, store) = open();
    let receipt = put(&store, 0).unwrap();
    let kept = store.clone();
    store.close().unwrap();
    assert!(matches!(put(&kept, 1), Err(Error::Closed { path }) if path == kept.path()));
    assert!(matches!(kept.begin(), Err(Error::Closed { .. })));
    assert!(matches!(kept.read(), Err(Error::Closed { .. })));
    assert!(matches!(kept.write_once("a", |_| Ok(())), Err(Error::Closed { .. })));
    assert!(matches!(run(kept.write_async(|_| Ok(()))), Err(Error::Closed { .. })));
    assert!(matches!(receipt.wait_confirmed(Duration::from_secs(1)), Err(ConfirmError::NoRelay(_))));
    kept.close().unwrap();
}

/// Goal: group commit: many writers share fsyncs. Method: 64 threads at once; far fewer commits than writes, and one
/// writer alone still gets a commit per write at once.
#[test]
fn many_writers_share_commits() {
    let (_folder, store) = open();
    let threads: Vec<_> = (0..64_u64)
        .map(|thread| {
            let store = store.clone();
            std::thread::spawn(move || (0..20).for_each(|n| drop(put(&store, thread * 100 + n).unwrap())))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let stats = store.stats().unwrap();
    assert_eq!(stats.writes, 64 * 20);
    assert!(stats.commits * 8 < stats.writes, "{} commits for {} writes", stats.commits, stats.writes);
    assert_eq!(audit(&store).len(), 64 * 20);
    (0..5).for_each(|n| drop(put(&store, 10_000 + n).unwrap()));
    assert_eq!(store.stats().unwrap().commits, stats.commits + 5);
}

/// Goal: with so many writers that those of a group are woken in a chain, each gets its own answer, in time, also when others of its
/// group fail. Method: 400 threads, ten writes each, one in seven of which fails.
#[test]
fn hundreds_of_writers_are_all_answered() {
    let (_folder, store) = open();
    let threads: Vec<_> = (0..400_u64)
        .map(|thread| {
            let store = store.clone();
            let write = move |n: u64| {
                let number = thread * 100 + n;
                let answer = store.write(move |tx| {
                    let appended = tx.append(Event::bytes("counted", payload(number)).to("", "q"))?;
                    if number % 7 == 3 { Err(Error::app("on purpose")) } else { Ok((number, appended)) }
                });
                match answer {
                    Ok(receipt) => assert_eq!(receipt.value().0, number),
                    Err(error) => assert!(number % 7 == 3 && matches!(error, Error::App(_)), "{error}"),
                }
            };
            std::thread::spawn(move || (0..10).for_each(write))
        })
        .collect();
    in_time("a writer", move || threads.into_iter().for_each(|thread| thread.join().unwrap()));
    let kept = (0..400_u64).flat_map(|thread| (0..10).map(move |n| thread * 100 + n));
    assert_eq!(events(&store.read().unwrap()).len(), kept.filter(|number| number % 7 != 3).count());
}

/// What panics when it is dropped.
struct Thorn(Arc<Mutex<u32>>);

impl Drop for Thorn {
    fn drop(&mut self) {
        *self.0.lock().unwrap() += 1;
        if !std::thread::panicking() {
            panic_quietly();
        }
    }
}

/// Goal: S9: also a closure, or a value of one, that panics while it is *dropped* hurts nobody else: the writer thread
/// drops them. Method: such closures among good ones, in groups that run again; the store goes on.
#[test]
fn a_panic_while_dropping_hurts_nobody() {
    let (_folder, store) = open();
    let dropped = Arc::new(Mutex::new(0));
    let tx = store.begin().unwrap();
    let writers: Vec<_> = (0..6_u64)
        .map(|n| {
            let (store, dropped) = (store.clone(), Arc::clone(&dropped));
            std::thread::spawn(move || {
                let thorn = (n < 2).then(|| Thorn(Arc::clone(&dropped)));
                catch_unwind(AssertUnwindSafe(|| {
                    store
                        .write(move |tx| {
                            let _ = &thorn;
                            tx.open_table(STATE)?.insert(n, n)?;
                            tx.append(event(n))?;
                            match n {
                                3 => Err(Error::app("run again without me")),
                                4 => Ok(Some(Thorn(Arc::clone(&dropped)))),
                                _ => Ok(None),
                            }
                        })
                        .map(std::mem::forget)
                }))
                .expect("it is the writer thread that drops")
                .is_ok()
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    drop(tx);
    let good: Vec<bool> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
    assert_eq!(good, [true, true, true, false, true, true]);
    assert!(*dropped.lock().unwrap() >= 2);
    put(&store, 6).expect("the writer thread lives");
    assert_eq!(audit(&store), [0, 1, 2, 4, 5, 6]);
}

/// Goal: the last handle may go anywhere without a hang: inside a closure, or while its own thread holds an exclusive
/// transaction and others wait in the queue. The transaction can still commit.
#[test]
fn the_last_handle_may_go_anywhere() {
    let (folder, store) = open();
    let path = store.path().to_owned();
    in_time("in a closure", move || {
        let mut last = Some(store.clone());
        let written = store.write_async(move |tx| {
            drop(last.take());
            tx.open_table(STATE)?.insert(0, 0)?;
            tx.append(event(0))?;
            Ok(())
        });
        drop(store);
        let mut written = Box::pin(written);
        let _ = written.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        drop(written);
    });
    let reopen = || {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            match Store::open(&path) {
                Ok(store) => return store,
                Err(error) if std::time::Instant::now() > until => panic!("never let go of: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    };
    let store = reopen();
    assert_eq!(audit(&store), [0]);
    in_time("with an exclusive transaction open", move || {
        let tx = store.begin().unwrap();
        let queued = store.clone();
        std::thread::spawn(move || {
            let mut queued = Box::pin(queued.write_async(|_| Ok(())));
            let _ = queued.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        })
        .join()
        .unwrap();
        drop(store);
        tx.open_table(STATE).unwrap().insert(1, 1).unwrap();
        tx.append(event(1)).unwrap();
        tx.commit().unwrap();
    });
    assert_eq!(audit(&reopen()), [0, 1]);
    drop(folder);
}

/// Goal: state that several tables make is one with its event, and `delete_table` and multimap tables roll back too.
#[test]
fn other_kinds_of_tables_are_part_of_the_write() {
    const TAGS: onewrite::redb::MultimapTableDefinition<'_, u64, &str> =
        onewrite::redb::MultimapTableDefinition::new("tags");
    let (_folder, store) = open();
    put(&store, 0).unwrap();
    let failed = store.write(|tx| {
        tx.open_multimap_table(TAGS)?.insert(0, "paid")?;
        assert!(tx.delete_table(STATE)?);
        tx.append(event(9))?;
        Err::<(), _>(Error::app("no"))
    });
    assert!(failed.is_err());
    assert_eq!(audit(&store), [0]);
    assert!(store.read().unwrap().open_multimap_table(TAGS).is_err(), "the table was never made");
    store
        .write(|tx| {
            tx.open_multimap_table(TAGS)?.insert(0, "paid")?;
            Ok(())
        })
        .unwrap();
    let snapshot = store.read().unwrap();
    let tags = snapshot.open_multimap_table(TAGS).unwrap();
    assert_eq!(tags.get(0).unwrap().count(), 1);
    assert!(snapshot.open_table(STATE).unwrap().get(0).unwrap().is_some());
}

/// Goal: a write that finds nobody else writing commits on its caller's thread, and overtakes nothing that was queued
/// before it. Method: look at the thread; queue one behind an exclusive transaction, then write.
#[test]
fn a_lone_write_skips_the_queue_and_overtakes_nothing() {
    let (_folder, store) = open();
    let here = std::thread::current().id();
    let ran_on = store.write(|_| Ok(std::thread::current().id())).unwrap().into_value();
    assert_eq!(ran_on, here);

    for _ in 0..50 {
        let (held, hold) = std::sync::mpsc::channel();
        let holder = std::thread::spawn({
            let store = store.clone();
            move || {
                let exclusive = store.begin().unwrap();
                held.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(5));
                drop(exclusive);
            }
        });
        hold.recv().unwrap();
        let mut first = std::pin::pin!(store.write_async(|tx| tx.append(event(1))));
        assert!(first.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let second = store.write(|tx| tx.append(event(2))).unwrap();
        let Poll::Ready(first) = first.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("the first was queued before the second");
        };
        assert_eq!(first.unwrap().seqs()[0] + 1, second.seqs()[0]);
        holder.join().unwrap();
    }
}

/// Goal: closing waits for a write that has skipped the queue. Method: close from another thread while its closure runs.
#[test]
fn closing_waits_for_a_write_that_skips_the_queue() {
    let (folder, store) = open();
    let (began, has_begun) = std::sync::mpsc::channel();
    let writer = std::thread::spawn({
        let store = store.clone();
        move || {
            let write = move |tx: &Transaction| {
                began.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(200));
                tx.append(event(1))
            };
            store.write(write).map(|receipt| receipt.seqs().to_vec())
        }
    });
    has_begun.recv().unwrap();
    in_time("close", move || store.close()).unwrap();
    assert_eq!(writer.join().unwrap().unwrap(), [0]);
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    assert_eq!(store.stats().unwrap().next_seq, 1);
}
