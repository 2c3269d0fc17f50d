//! The store against a model that a page of code can hold: a map, a list, and what was seen. Random programs of writes,
//! groups, requests, exclusive transactions, clean and unclean ends.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Error, Event, Result, Store, Transaction, WriteFuture, WriteOnce};
use proptest::prelude::*;

use crate::scratch::{crash_copy, events};

const TABLE: TableDefinition<'_, u8, u8> = TableDefinition::new("app");

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Remove(u8),
    Append { key: Option<u8>, id: Option<u8>, content: u8, published: bool },
    FirstTime(u8),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Good,
    Fails,
    Panics,
}

#[derive(Debug, Clone)]
struct Body {
    steps: Vec<Step>,
    end: End,
}

#[derive(Debug, Clone)]
enum Op {
    Write(Body),
    /// All in one group, in this order.
    Group(Vec<Body>),
    Once(u8, Body),
    Exclusive(Body),
    Reopen,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..6_u8, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
        1 => (0..6_u8).prop_map(Step::Remove),
        4 => (prop::option::of(0..3_u8), prop::option::weighted(0.3, 0..3_u8), 0..3_u8, prop::bool::weighted(0.8))
            .prop_map(|(key, id, content, published)| Step::Append { key, id, content, published }),
        1 => (0..4_u8).prop_map(Step::FirstTime),
    ]
}

fn body() -> impl Strategy<Value = Body> {
    let end = prop_oneof![5 => Just(End::Good), 1 => Just(End::Fails), 1 => Just(End::Panics)];
    (prop::collection::vec(step(), 0..5), end).prop_map(|(steps, end)| Body { steps, end })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => body().prop_map(Op::Write),
        3 => prop::collection::vec(body(), 2..6).prop_map(Op::Group),
        2 => (0..3_u8, body()).prop_map(|(id, body)| Op::Once(id, body)),
        2 => body().prop_map(Op::Exclusive),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
    ]
}

fn event_of(key: Option<u8>, id: Option<u8>, content: u8, published: bool) -> Event {
    let mut event = Event::bytes("t", vec![content; 3]);
    event = if published { event.to("exchange", "r") } else { event.unpublished() };
    if let Some(key) = key {
        event = event.key(format!("k{key}"));
    }
    if let Some(id) = id {
        event = event.id(format!("id{id}"));
    }
    event
}

// --- the real one ---------------------------------------------------------------------------------------------------------

/// What one body answered: what each step saw, or that it failed, in words that the model can say too.
type Answer = std::result::Result<Vec<u64>, &'static str>;

fn take_steps(tx: &Transaction, body: &Body) -> Result<Vec<u64>> {
    let mut saw = Vec::new();
    for step in &body.steps {
        match step {
            Step::Put(key, value) => {
                let old = tx.open_table(TABLE)?.insert(key, value)?.map_or(999, |old| u64::from(old.value()));
                saw.push(old);
            }
            Step::Remove(key) => {
                let old = tx.open_table(TABLE)?.remove(key)?.map_or(999, |old| u64::from(old.value()));
                saw.push(old);
            }
            Step::Append { key, id, content, published } => {
                let appended = tx.append(event_of(*key, *id, *content, *published))?;
                saw.push(appended.seq * 2 + u64::from(appended.repeated));
            }
            Step::FirstTime(id) => saw.push(u64::from(tx.first_time("scope", [*id])?)),
        }
    }
    match body.end {
        End::Good => Ok(saw),
        End::Fails => Err(Error::app("fails")),
        End::Panics => std::panic::resume_unwind(Box::new("panics")),
    }
}

fn in_words(error: &Error) -> &'static str {
    match error {
        Error::App(_) => "fails",
        Error::Panicked { .. } => "panics",
        Error::Conflict { .. } => "conflict",
        other => panic!("unexpected: {other:?}"),
    }
}

struct Real {
    folder: tempfile::TempDir,
    store: Option<Store>,
}

impl Real {
    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn write(&self, body: &Body) -> Answer {
        let body = body.clone();
        let written = self.store().write(move |tx| take_steps(tx, &body));
        written.map(onewrite::Receipt::into_value).map_err(|error| in_words(&error))
    }

    /// Queues all while the write lock is held, so that one batch has them all.
    fn group(&self, bodies: &[Body]) -> Vec<Answer> {
        let tx = self.store().begin().unwrap();
        let store = self.store().clone();
        let bodies = bodies.to_vec();
        let queue = move || {
            let mut futures: Vec<Pin<Box<WriteFuture<Vec<u64>>>>> = Vec::new();
            for body in bodies {
                let mut future = Box::pin(store.write_async(move |tx| take_steps(tx, &body)));
                assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
                futures.push(future);
            }
            futures
        };
        let futures = std::thread::spawn(queue).join().unwrap();
        drop(tx);
        futures
            .into_iter()
            .map(|future| wait(future).map(onewrite::Receipt::into_value))
            .map(|answer| answer.map_err(|error| in_words(&error)))
            .collect()
    }

    /// The answer, or the events of the first time.
    fn once(&self, id: u8, body: &Body) -> std::result::Result<Answer, Vec<u64>> {
        let body = body.clone();
        match self.store().write_once([id], move |tx| take_steps(tx, &body)) {
            Ok(WriteOnce::Done(receipt)) => Ok(Ok(receipt.into_value())),
            Ok(WriteOnce::Repeated(receipt)) => Err(receipt.seqs().to_vec()),
            Ok(_) => unreachable!(),
            Err(error) => Ok(Err(in_words(&error))),
        }
    }

    fn exclusive(&self, body: &Body) -> Answer {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let tx = self.store().begin().unwrap();
            match take_steps(&tx, body) {
                Ok(saw) => {
                    tx.commit().unwrap();
                    Ok(saw)
                }
                Err(error) if body.steps.len().is_multiple_of(2) => {
                    tx.rollback().unwrap();
                    Err(in_words(&error))
                }
                Err(error) => Err(in_words(&error)),
            }
        }));
        outcome.unwrap_or(Err("panics"))
    }

    fn reopen(&mut self, crash: bool) {
        let store = self.store.take().unwrap();
        let path: PathBuf = if crash {
            crash_copy(&store, self.folder.path())
        } else {
            let path = store.path().to_owned();
            store.close().unwrap();
            path
        };
        self.store = Some(Store::open(path).unwrap());
    }
}

fn wait<T>(mut future: Pin<Box<WriteFuture<T>>>) -> Result<onewrite::Receipt<T>> {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(written) => return written,
            Poll::Pending => std::thread::park(),
        }
    }
}

// --- the model ------------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, PartialEq)]
struct Logged {
    event: (Option<u8>, Option<u8>, u8, bool),
    lane: Option<(u64, u64)>,
}

#[derive(Debug, Clone, Default)]
struct Model {
    table: BTreeMap<u8, u8>,
    log: Vec<Logged>,
    ids: BTreeMap<u8, u64>,
    requests: BTreeMap<u8, Vec<u64>>,
    seen: BTreeSet<u8>,
    lanes: BTreeMap<Option<u8>, (u64, u64)>,
}

impl Model {
    /// All of the body, or nothing.
    fn run(&mut self, body: &Body) -> Answer {
        let mut after = self.clone();
        let answer = after.take_steps(body);
        if answer.is_ok() {
            *self = after;
        }
        answer
    }

    fn take_steps(&mut self, body: &Body) -> Answer {
        let mut saw = Vec::new();
        for step in &body.steps {
            saw.push(match step {
                Step::Put(key, value) => self.table.insert(*key, *value).map_or(999, u64::from),
                Step::Remove(key) => self.table.remove(key).map_or(999, u64::from),
                Step::Append { key, id, content, published } => {
                    self.append((*key, *id, *content, *published))?
                }
                Step::FirstTime(id) => u64::from(self.seen.insert(*id)),
            });
        }
        match body.end {
            End::Good => Ok(saw),
            End::Fails => Err("fails"),
            End::Panics => Err("panics"),
        }
    }

    fn append(
        &mut self,
        event: (Option<u8>, Option<u8>, u8, bool),
    ) -> std::result::Result<u64, &'static str> {
        let seq = self.log.len() as u64;
        if let Some(id) = event.1 {
            if let Some(first) = self.ids.get(&id) {
                let same = self.log[*first as usize].event == event;
                return if same { Ok(first * 2 + 1) } else { Err("conflict") };
            }
            self.ids.insert(id, seq);
        }
        let lane = event.3.then(|| {
            let lane = self.lanes.entry(event.0).or_insert((seq, 0));
            lane.1 += 1;
            (lane.0, lane.1 - 1)
        });
        self.log.push(Logged { event, lane });
        Ok(seq * 2)
    }

    fn once(&mut self, id: u8, body: &Body) -> std::result::Result<Answer, Vec<u64>> {
        if let Some(seqs) = self.requests.get(&id) {
            return Err(seqs.clone());
        }
        let first = self.log.len() as u64;
        let answer = self.run(body);
        if answer.is_ok() {
            self.requests.insert(id, (first..self.log.len() as u64).collect());
        }
        Ok(answer)
    }
}

/// The store holds what the model holds, in every table.
fn agree(real: &Real, model: &Model) {
    let snapshot = real.store().read().unwrap();
    let table: BTreeMap<u8, u8> = match snapshot.open_table(TABLE) {
        Ok(table) => {
            table.iter().unwrap().map(|row| row.unwrap()).map(|(k, v)| (k.value(), v.value())).collect()
        }
        Err(_) => BTreeMap::new(),
    };
    assert_eq!(table, model.table);
    let log = events(&snapshot);
    assert_eq!(log.len(), model.log.len());
    for (seq, (recorded, logged)) in log.iter().zip(&model.log).enumerate() {
        let (key, id, content, published) = logged.event;
        assert_eq!(recorded.seq(), seq as u64);
        assert_eq!(recorded.payload(), [content; 3]);
        assert_eq!(recorded.key().map(str::to_owned), key.map(|key| format!("k{key}")));
        assert_eq!(recorded.lane().map(|lane| (lane.id, lane.number)), logged.lane, "event {seq}");
        assert_eq!(recorded.lane().is_some(), published);
        assert!(id.is_none_or(|id| recorded.id() == format!("id{id}")));
    }
}

fn play(ops: &[Op]) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::builder().cache_bytes(1 << 20).open(folder.path().join("a.redb")).unwrap();
    let mut real = Real { folder, store: Some(store) };
    let mut model = Model::default();
    for op in ops {
        match op {
            Op::Write(body) => assert_eq!(real.write(body), model.run(body), "{op:?}"),
            Op::Group(bodies) => {
                let expected: Vec<_> = bodies.iter().map(|body| model.run(body)).collect();
                assert_eq!(real.group(bodies), expected, "{op:?}");
            }
            Op::Once(id, body) => assert_eq!(real.once(*id, body), model.once(*id, body), "{op:?}"),
            Op::Exclusive(body) => assert_eq!(real.exclusive(body), model.run(body), "{op:?}"),
            Op::Reopen => real.reopen(false),
            Op::Crash => real.reopen(true),
        }
    }
    agree(&real, &model);
    real.reopen(true);
    agree(&real, &model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: P1, ids, requests, numbers and lanes in every mixture. Method: the same program on the store and on the
    /// model; every answer is the same, and at the end, and after an unclean end, so is everything stored.
    #[test]
    fn the_store_does_what_the_model_does(ops in prop::collection::vec(op(), 1..16)) {
        play(&ops);
    }
}
