//! A wait for the write transaction has a diagnosis, and a limit if one is set.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions};
use onewrite::{BacklogQuota, Error, Event, QuotaPolicy, Store};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::scratch::{Count, Warnings, child, task};

const LIMIT: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_secs(60);

fn limited(folder: &tempfile::TempDir, name: &str) -> Store {
    Store::builder().write_wait_max(LIMIT).open(folder.path().join(name)).unwrap()
}

fn holder_of(error: Error) -> String {
    match error {
        Error::WriteTimeout { holder, waited_ms, .. } => {
            assert!(waited_ms >= 300, "{waited_ms}");
            holder
        }
        other => panic!("{other:?}"),
    }
}

/// Goal: two stores whose closures write into each other do not hang for ever, and harm no third. Method: both closures have begun
/// before either writes on. Only one store has a short limit, so that its holder still stands when the other gives up: exactly one ends
/// in the error, which names the thread that holds the transaction and the place of its call.
#[test]
fn stores_that_wait_for_each_other_end_in_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let a = limited(&folder, "a.redb");
    let b = Store::builder().write_wait_max(SOON).open(folder.path().join("b.redb")).unwrap();
    let both = Arc::new(Barrier::new(2));
    let cross = |name: &str, outer: Store, inner: Store| {
        let both = Arc::clone(&both);
        let thread = std::thread::Builder::new().name(name.into());
        let work = move || {
            let mut first = true;
            outer
                .write(move |_| {
                    if std::mem::take(&mut first) {
                        both.wait();
                    }
                    inner.write(|_| Ok(())).map(drop)
                })
                .map(drop)
        };
        thread.spawn(work).unwrap()
    };
    let one = cross("one", a.clone(), b.clone());
    let two = cross("two", b.clone(), a.clone());
    one.join().unwrap().unwrap();
    let holder = holder_of(two.join().unwrap().unwrap_err());
    assert!(holder.contains("`one`") && holder.contains("`Store::write` at"), "{holder}");
    assert!(holder.contains("write_waits.rs"), "{holder}");
    a.write(|_| Ok(())).unwrap();
    b.write(|_| Ok(())).unwrap();
}

/// Goal: through every door the limit ends the wait, what has given up never runs, and those behind it are served. Method: a
/// transaction is held; each door is tried from a thread of its own; then it is let go.
#[test]
fn what_has_given_up_never_runs_through_any_door() {
    let folder = tempfile::tempdir().unwrap();
    let store = limited(&folder, "a.redb");
    let held = store.begin().unwrap();
    let ran = Arc::new(AtomicU32::new(0));
    let mut doors = Vec::new();
    for door in 0..5 {
        let (store, ran) = (store.clone(), Arc::clone(&ran));
        doors.push(std::thread::spawn(move || {
            let note = move |_: &onewrite::Transaction| {
                ran.fetch_add(1, Ordering::SeqCst);
                Ok(())
            };
            match door {
                0 => store.write(note).map(drop),
                1 => store.write_once("id", note).map(drop),
                2 => store.begin().map(drop),
                3 => {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(store.write_async(note)).map(drop)
                }
                _ => store.aggregate::<Count>("a").execute(|_| Ok(vec![()])).map(drop),
            }
        }));
    }
    for (door, ended) in doors.into_iter().enumerate() {
        let holder = holder_of(ended.join().unwrap().expect_err("the transaction is held"));
        assert!(
            holder.contains("`Store::begin` at") && holder.contains("write_waits.rs"),
            "{door}: {holder}"
        );
    }
    drop(held);
    let receipt = store.write(|tx| tx.append(Event::bytes("t", "").unpublished())).unwrap();
    assert_eq!((receipt.seqs(), ran.load(Ordering::SeqCst)), (&[0][..], 0));
}

/// Goal: once a closure runs, its call waits for the outcome: the limit never leaves it unknown. Method: a closure that takes three
/// times the limit.
#[test]
fn a_closure_that_runs_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = limited(&folder, "a.redb");
    let slow = |tx: &onewrite::Transaction| {
        std::thread::sleep(LIMIT * 3);
        tx.append(Event::bytes("t", "").unpublished())
    };
    assert_eq!(store.write(slow).unwrap().seqs(), [0]);
}

/// Goal: a relay, a consumer or a projection that is dropped inside a closure blocks no writer. Method: each is dropped there; the
/// closure goes on at once, though each waits for the very transaction.
#[test]
fn what_waits_for_the_closure_is_let_go_inside_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let relay = store.relay("r").spawn(broker.publisher()).unwrap();
    store.write(|tx| tx.append(Event::bytes("t", "").to("", "q"))).unwrap().wait_confirmed(SOON).unwrap();
    let consumer = store.consumer("c").spawn(broker.source("q"), |_, _| Ok(())).unwrap();
    let projection = store.projection("p").spawn(|_, _| Ok(())).unwrap();
    let handles = Mutex::new(Some((relay, consumer, projection)));
    let took = store.write(move |tx| {
        tx.append(Event::bytes("t", "").unpublished())?;
        let began = Instant::now();
        drop(handles.lock().unwrap().take());
        Ok(began.elapsed())
    });
    let took = took.unwrap().into_value();
    assert!(took < Duration::from_secs(1), "{took:?}");
    store.write(|_| Ok(())).unwrap();
}

/// The value of a field.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let (_, value) = line.split_once(&format!(" {name}=")).unwrap();
    value.split(' ').next().unwrap()
}

/// Goal: a hang has a diagnosis without a debugger. Method: a process whose closure joins a thread that writes; it collects what is
/// logged: after a second the thread that holds the transaction is named, with the place of its call, and after
/// two again.
#[test]
fn a_long_wait_names_what_holds_it() {
    let folder = tempfile::tempdir().unwrap();
    let output = child("write_waits::child_that_waits_for_itself", folder.path(), "").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("all well"), "{out}{err}");
}

#[test]
fn child_that_waits_for_itself() {
    let Some((folder, _)) = task() else { return };
    let warnings = Warnings::default();
    tracing_subscriber::registry().with(warnings.clone()).init();
    let store = Store::open(folder.join("a.redb")).unwrap();
    let (inner, goes_on) = (store.clone(), Arc::new(AtomicBool::new(false)));
    let waits = Arc::clone(&goes_on);
    let (sender, began) = mpsc::channel();
    let holder = std::thread::Builder::new().name("the-holder".into());
    let outer = holder.spawn(move || {
        store.write(move |_| {
            sender.send(()).unwrap();
            while !waits.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
    });
    began.recv().unwrap();
    let waiter = std::thread::spawn(move || inner.write(|_| Ok(())).map(drop));
    let about = |line: &String| {
        line.contains("waits long for the write transaction")
            && line.contains("`the-holder`")
            && line.contains("`Store::write` at")
            && line.contains("write_waits.rs")
    };
    let waited_ms = || -> Vec<u64> {
        let lines = warnings.0.lock().unwrap();
        let waits = lines.iter().filter(|line| about(line));
        waits.map(|line| field(line, "waited_ms").parse().unwrap()).collect()
    };
    let began = Instant::now();
    while waited_ms().iter().all(|waited_ms| *waited_ms < 2_000) {
        assert!(began.elapsed() < SOON, "{:?}", warnings.0.lock().unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
    // The caller and the writer thread wait, after one second and after two each; not at each look.
    assert!(waited_ms().len() <= 4, "{:?}", warnings.0.lock().unwrap());
    goes_on.store(true, Ordering::SeqCst);
    waiter.join().unwrap().unwrap();
    outer.unwrap().join().unwrap().unwrap();
    println!("all well");
}

/// Goal: a write that waits for room says for what, again and again. Method: a process whose relay does not run, is paused, has
/// a broker that is away, or is missing altogether; it collects what is logged, and fills the backlog each time.
#[test]
fn a_wait_for_room_names_what_makes_it() {
    let folder = tempfile::tempdir().unwrap();
    let output = child("write_waits::child_that_waits_for_room", folder.path(), "").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("all well"), "{out}{err}");
}

#[test]
fn child_that_waits_for_room() {
    let Some((folder, _)) = task() else { return };
    let warnings = Warnings::default();
    tracing_subscriber::registry().with(warnings.clone()).init();
    let policy = QuotaPolicy::Wait(Duration::from_millis(2_500));
    let quota = BacklogQuota::events(1).policy(policy);
    let open = |name: &str| Store::builder().backlog_quota(quota).open(folder.join(name)).unwrap();
    let pay = |store: &Store| store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "q"))).map(drop);
    // The second write waits for 2.5 s: warned of after one second and after two.
    let waits = |store: &Store, waits_for: &str| {
        let seen = warnings.0.lock().unwrap().len();
        assert!(matches!(pay(store), Err(Error::BacklogFull { .. })), "{waits_for}");
        let lines = warnings.0.lock().unwrap();
        let about = lines.iter().skip(seen).filter(|line| {
            line.contains("waits long for room under the backlog quota") && line.contains(waits_for)
        });
        assert_eq!(about.count(), 2, "{waits_for}: {lines:?}");
    };
    let store = open("none.redb");
    pay(&store).unwrap();
    waits(&store, "a relay: the store has none");
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let store = open("a.redb");
    let relay = store.relay("rabbit").spawn(broker.publisher()).unwrap();
    relay.stop(SOON);
    pay(&store).unwrap();
    waits(&store, "relay `rabbit`, which does not run in this process");
    broker.go_down();
    let relay = store.relay("rabbit").spawn(broker.publisher()).unwrap();
    waits(&store, "relay `rabbit`, whose broker is away or takes nothing");
    relay.stop(SOON);
    drop(store);
    let store = open("b.redb");
    broker.come_up();
    let relay = store.relay("rabbit").spawn(broker.publisher()).unwrap();
    relay.pause();
    let began = Instant::now();
    while relay.status().state != onewrite::RelayState::Paused {
        assert!(began.elapsed() < SOON);
        std::thread::sleep(Duration::from_millis(5));
    }
    pay(&store).unwrap();
    waits(&store, "relay `rabbit`, which is paused");
    println!("all well");
}
