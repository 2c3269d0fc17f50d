//! The steps of the workload, drawn from a seed, that touch everything the store keeps. A step makes one
//! commit at most. A group whose second write fails makes two: see [`Step::first_commit`].
//!
//! [`Step::draw`] needs nothing but the seed and the model before the step. So the steps after a crash
//! are the steps that would have followed without it.

use std::sync::Arc;
use std::time::Duration;

use redb::TableDefinition;

use super::disk::{Disk, Rng};
use super::model::{MESSAGE_SCOPE, Model, RELAYS};
use crate::delivery::types::{Change, Exception, ExceptionState};
use crate::error::{Error, ExpectedRevision, Result};
use crate::event::Event;
use crate::message::{HeaderValue, Message};
use crate::storage::file;
use crate::storage::tables::capture::CaptureMode;
use crate::store::open::recover;
use crate::store::settings::capture::Capture;
use crate::store::settings::{Retention, Settings, capture};
use crate::store::shared::write_wait::Purpose;
use crate::store::transaction::Transaction;
use crate::store::transaction::write::{Closure, Write};
use crate::store::writer::groups;
use crate::store::{StartAt, Store, StoreBuilder, WriteOnce};
use crate::time::{Clock, Deadline, Now};
use crate::{oneshot, wire};

pub(super) const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");
pub(super) const CAPTURED: TableDefinition<'_, u64, u64> = TableDefinition::new("captured");
pub(super) const COALESCED: TableDefinition<'_, u64, u64> = TableDefinition::new("coalesced");
pub(super) const SCOPE: &str = "requests of others";
const PATH: &str = "simulated.redb";
const KEYS: [&str; 3] = ["alice", "bob", "carol"];
const STREAMS: [&str; 3] = ["account-1", "account-2", "account-3"];
const SIZES: [usize; 10] = [0, 1, 60, 300, 900, 2000, 4040, 4096, 4200, 9000];

/// Time stands still: what depends on it (ages) is not simulated.
#[derive(Debug)]
struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Now {
        Now { mono_ms: 0, wall_ms: 1_700_000_000_000 }
    }
}

/// Bytes that say what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blob {
    pub(super) tag: u64,
    pub(super) len: usize,
}

impl Blob {
    pub(super) fn bytes(self) -> Vec<u8> {
        self.tag.to_le_bytes().into_iter().cycle().take(self.len).collect()
    }
}

#[derive(Debug, Clone)]
pub(super) struct NewEvent {
    pub(super) content: Blob,
    pub(super) key: Option<&'static str>,
    pub(super) id: Option<String>,
}

impl NewEvent {
    fn event(&self) -> Event {
        let event = Event::bytes(self.content.tag.to_string(), self.content.bytes()).to("exchange", "key");
        let event = match self.key {
            Some(key) => event.key(key),
            None => event,
        };
        match &self.id {
            Some(id) => event.id(id),
            None => event,
        }
    }
}

/// One thing that a transaction does.
#[derive(Debug, Clone)]
pub(super) enum Item {
    Row(u64, Blob),
    Event(NewEvent),
    Stream(&'static str, Vec<NewEvent>),
    Truncate(&'static str, u64),
    Tombstone(&'static str),
    Snapshot(&'static str, Blob),
    /// An id of others, and whether it is new.
    Id(u64, bool),
    /// The number of a delivery in the lane of another store, and whether it is new.
    Delivery(u64, bool),
    Captured(u64, u64),
    Coalesced(u64, u64),
}

/// One thing that is asked of the store.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Write(Vec<Item>),
    Once(String, Vec<Item>),
    Group(Vec<Vec<Item>>, usize),
    Exclusive(Vec<Item>, bool),
    Fails(Vec<Item>, bool),
    MakeRelay(usize),
    /// Progress that waits for the next commit.
    Progress(usize, u64, Vec<Change>),
    /// Progress gets a commit of its own, and trims.
    Flush,
    QuickRepair,
    Reopen,
}

impl Step {
    pub(super) fn draw(seed: u64, model: &Model) -> Self {
        let mut rng = Rng::of(&[seed, model.steps]);
        let rng = &mut rng;
        if let Some(relay) = model.relays.iter().position(|relay| relay.is_none()) {
            return Self::MakeRelay(relay);
        }
        // Now and then everything is done, and nothing is left in the log.
        match (model.steps % 16, rng.below(24)) {
            (12, _) => Self::Write(let_go(rng, model)),
            (at @ (13 | 14), _) => progress(rng, model, at as usize - 13, true),
            (15, _) => Self::Flush,
            (_, kind) => Self::draw_any(seed, kind, rng, model),
        }
    }

    fn draw_any(seed: u64, kind: u64, rng: &mut Rng, model: &Model) -> Self {
        match kind {
            0 => Self::Once(format!("request-{}", rng.below(6)), items(rng, model, 0)),
            1 | 2 => Self::Group((0..3).map(|at| items(rng, model, at)).collect(), rng.index(4)),
            3 => Self::Exclusive(items(rng, model, 0), true),
            4 => Self::Exclusive(items(rng, model, 0), false),
            5 => Self::Fails(items(rng, model, 0), rng.one_in(2)),
            6..=10 => {
                let at = rng.index(RELAYS.len());
                progress(rng, model, at, false)
            }
            11 | 12 => Self::Flush,
            13 if seed % 2 == 1 => Self::QuickRepair,
            13 => Self::Flush,
            14 if rng.one_in(2) => Self::Reopen,
            15 if rng.one_in(3) => Self::Write(burst(rng, model, if seed % 5 == 4 { 4100 } else { 280 })),
            _ => Self::Write(items(rng, model, 0)),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Write(_) => "write",
            Self::Once(..) => "once",
            Self::Group(..) => "group",
            Self::Exclusive(_, true) => "exclusive",
            Self::Exclusive(_, false) => "rolls back",
            Self::Fails(..) => "fails",
            Self::MakeRelay(_) => "relay",
            Self::Progress(..) => "progress waits",
            Self::Flush => "progress alone",
            Self::QuickRepair => "quick repair",
            Self::Reopen => "closes and opens",
        }
    }

    /// The first commit of a step that makes two: the writes of a group before a write that fails. The
    /// writes behind it were not tried yet, and are the second commit.
    pub(super) fn first_commit(&self) -> Option<Self> {
        match self {
            Self::Group(group, fails) if *fails > 0 && fails + 1 < group.len() => {
                Some(Self::Write(group[..*fails].concat()))
            }
            _ => None,
        }
    }

    /// One that commits.
    pub(super) fn draw_write(seed: u64, model: &Model) -> Self {
        Self::Write(items(&mut Rng::of(&[seed, model.steps]), model, 0))
    }
}

/// Enough events that trimming does not wait for an idle store, or that derived rows are written.
fn burst(rng: &mut Rng, model: &Model, events: u64) -> Vec<Item> {
    let tag = model.steps << 16;
    let event = |n, key| NewEvent { content: Blob { tag: tag + n, len: 8 }, key, id: None };
    let events = (0..events).map(|n| Item::Event(event(n, Some(KEYS[rng.index(3)]))));
    std::iter::once(Item::Row(0, Blob { tag, len: 8 })).chain(events).collect()
}

/// One write, the first or a later one of its commit: always a row, and some of everything else.
fn items(rng: &mut Rng, model: &Model, at: u64) -> Vec<Item> {
    let mut tag = (model.steps << 16) + (at << 8);
    let mut blob = |rng: &mut Rng| {
        tag += 1;
        let len = if rng.one_in(60) { 70_000 } else { SIZES[rng.index(SIZES.len())] };
        Blob { tag, len }
    };
    let mut items = vec![Item::Row(rng.below(12), blob(rng))];
    for _ in 0..rng.below(4) {
        let stream = STREAMS[rng.index(3)];
        let state = model.streams.get(stream).cloned().unwrap_or_default();
        let known = !state.seqs.is_empty() && !state.deleted;
        // What depends on what is there is done once in a commit.
        let fresh = items.len() == 1 && at == 0;
        items.push(match rng.below(12) {
            0..=3 => {
                let key = Some(KEYS[rng.index(3)]).filter(|_| !rng.one_in(3));
                let content = blob(rng);
                let id = rng.one_in(4).then(|| format!("event-{}", content.tag));
                Item::Event(NewEvent { content, key, id })
            }
            4..=6 if !state.deleted && fresh => {
                let key = Some(KEYS[rng.index(3)]).filter(|_| !rng.one_in(3));
                let events = (0..=rng.below(3)).map(|_| NewEvent { content: blob(rng), key, id: None });
                Item::Stream(stream, events.collect())
            }
            7 if known && fresh && rng.one_in(2) => {
                Item::Truncate(stream, rng.below(state.seqs.len() as u64 + 1))
            }
            7 if known && fresh && rng.one_in(4) => Item::Tombstone(stream),
            8 if known && fresh => Item::Snapshot(stream, blob(rng)),
            9 if fresh => {
                let id = rng.below(20);
                Item::Id(id, !model.seen_ids.contains(&id))
            }
            10 if fresh => {
                let number = rng.below(20);
                Item::Delivery(number, !model.deliveries.contains(&number))
            }
            11 if rng.one_in(2) => Item::Coalesced(rng.below(5), blob(rng).tag),
            _ => Item::Captured(rng.below(5), blob(rng).tag),
        });
    }
    items
}

/// No stream wants its events any more.
fn let_go(rng: &mut Rng, model: &Model) -> Vec<Item> {
    let live = model.streams.iter().filter(|(_, stream)| !stream.deleted);
    let truncate = live.map(|(name, stream)| Item::Truncate(name, stream.seqs.len() as u64));
    let row = Item::Row(rng.below(12), Blob { tag: model.steps << 16, len: 60 });
    std::iter::once(row).chain(truncate).collect()
}

/// A relay has come further. Some events that it passes become exceptions, and some exceptions are
/// settled; or all are settled.
fn progress(rng: &mut Rng, model: &Model, at: usize, all: bool) -> Step {
    let relay = model.relays[at].as_ref().expect("made first").with(model.waiting[at].as_ref());
    let left = model.events.len() as u64 - relay.position;
    let position = relay.position + if all { left } else { rng.below(left + 1) };
    let mut changes = Vec::new();
    for seq in (relay.position..position).filter(|_| !all) {
        let key = model.events[seq as usize].key;
        match (key, rng.below(12)) {
            (_, 0) => {
                let state = match rng.below(3) {
                    0 => ExceptionState::Retry { due_ms: 7 },
                    1 => ExceptionState::Scheduled { due_ms: 8 },
                    _ => ExceptionState::Quarantined { at_ms: 9, holds_key: true },
                };
                let exception = Exception { state, attempts: 1, destination_attempts: 0, fault: None };
                changes.push(Change::PutException { seq, key: key.map(Arc::from), exception });
            }
            (Some(key), 1) => changes.push(Change::Park { key: key.into(), seq }),
            _ => {}
        }
    }
    for seq in relay.exceptions.iter().copied().filter(|_| all || rng.one_in(3)) {
        changes.push(Change::DropException { seq });
    }
    for seq in relay.parked.iter().copied().filter(|_| all || rng.one_in(3)) {
        let key = model.events[seq as usize].key.expect("only keyed events are parked").into();
        changes.push(Change::Unpark { key, seq });
    }
    Step::Progress(at, position, changes)
}

fn do_all(tx: &Transaction, items: &[Item]) -> Result<()> {
    items.iter().try_for_each(|item| do_one(tx, item))
}

fn do_one(tx: &Transaction, item: &Item) -> Result<()> {
    let unexpected = |what: String| Err(Error::app(what));
    match item {
        Item::Row(key, blob) => drop(tx.open_table(ROWS)?.insert(key, blob.bytes().as_slice())?),
        Item::Event(event) => drop(tx.append(event.event())?),
        Item::Stream(name, events) => {
            drop(tx.stream(*name).append(events.iter().map(NewEvent::event), ExpectedRevision::Any)?);
        }
        Item::Truncate(name, revision) => tx.stream(*name).truncate_before(*revision)?,
        Item::Tombstone(name) => tx.stream(*name).tombstone()?,
        Item::Snapshot(name, blob) => tx.stream(*name).save_snapshot(1, &blob.bytes())?,
        Item::Id(id, is_new) => {
            if tx.first_time(SCOPE, id.to_be_bytes())? != *is_new {
                return unexpected(format!("id {id} is taken for what it is not"));
            }
        }
        Item::Delivery(number, is_new) => {
            if tx.first_delivery(MESSAGE_SCOPE, &message(*number))? != *is_new {
                return unexpected(format!("delivery {number} is taken for what it is not"));
            }
        }
        Item::Captured(key, value) => drop(tx.captured_table(CAPTURED)?.insert(key, value)?),
        Item::Coalesced(key, value) => drop(tx.captured_table(COALESCED)?.insert(key, value)?),
    }
    Ok(())
}

fn message(number: u64) -> Message {
    let int = |value: u64| HeaderValue::Int(value as i64);
    let store = HeaderValue::Text("01890a5d-ac96-774b-bcce-b302099a8057".into());
    let headers = [
        (wire::STORE, store),
        (wire::EPOCH, int(1)),
        (wire::LANE, int(3)),
        (wire::LANE_NUMBER, int(number)),
        (wire::CRC, int(number)),
    ];
    let headers = headers.map(|(name, value)| (name.into(), value)).into();
    Message { message_id: Some(number.to_string().into()), headers, ..Message::default() }
}

/// A store on a simulated disk.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) disk: Disk,
    pub(super) seed: u64,
    store: Option<Store>,
}

impl Subject {
    /// Makes a store, as far as the engine goes.
    pub(super) fn make(seed: u64, disk: &Disk) -> Result<()> {
        let initialise = |db: &redb::Database| recover::initialise(PATH.as_ref(), db);
        Ok(crate::storage::database::make_database(
            PATH.as_ref(),
            disk,
            settings(seed).cache_bytes,
            &initialise,
        )?)
    }

    /// Makes a database without a log, with one row.
    pub(super) fn make_plain(disk: &Disk, blob: Blob) {
        let db = redb::Database::builder().create_with_backend(disk.clone()).unwrap();
        let tx = db.begin_write().unwrap();
        tx.open_table(ROWS).unwrap().insert(0, blob.bytes().as_slice()).unwrap();
        tx.commit().unwrap();
        db.close().unwrap();
    }

    pub(super) fn open(seed: u64, disk: Disk) -> Result<Self> {
        Self::open_with(seed, disk, settings(seed))
    }

    /// Each read goes to the disk.
    pub(super) fn open_uncached(seed: u64, disk: Disk) -> Result<Self> {
        Self::open_with(seed, disk, Settings { cache_bytes: 0, ..settings(seed) })
    }

    /// Makes a store of a database that has none.
    pub(super) fn adopt(seed: u64, disk: Disk) -> Result<Self> {
        Self::open_with(seed, disk, Settings { adopt: true, ..settings(seed) })
    }

    fn open_with(seed: u64, disk: Disk, settings: Settings) -> Result<Self> {
        let opened = file::open_database(PATH.as_ref(), &disk, settings.cache_bytes)?;
        let store = Store::start(PATH.into(), opened, settings)?;
        Ok(Self { disk, seed, store: Some(store) })
    }

    pub(super) fn store(&self) -> &Store {
        self.store.as_ref().expect("it is open but for the moment of `reopen`")
    }

    /// Not after a reopening that has failed half-way.
    pub(super) fn is_open(&self) -> bool {
        self.store.is_some()
    }

    pub(super) fn close(mut self) -> Result<()> {
        self.store.take().expect("it is open").close()
    }

    pub(super) fn reopen(&mut self) -> Result<()> {
        self.store.take().expect("it is open").close()?;
        self.store = Self::open(self.seed, self.disk.clone())?.store;
        Ok(())
    }

    /// Takes one step; the model follows where it is acknowledged.
    pub(super) fn take(&mut self, step: &Step, model: &mut Model) -> Result<()> {
        self.take_and_report(step, model, |_, _| ())
    }

    /// The same. `between` sees the store, and the model that fits, after the first of two commits.
    pub(super) fn take_and_report(
        &mut self,
        step: &Step,
        model: &mut Model,
        mut between: impl FnMut(&Self, &Model),
    ) -> Result<()> {
        let store = self.store();
        match step {
            Step::Write(items) => drop(store.write(closure(items))?),
            Step::Once(id, items) => {
                let is_repeat = matches!(store.write_once(id, closure(items))?, WriteOnce::Repeated(_));
                if is_repeat != model.requests.contains(id) {
                    return Err(Error::app(format!("request `{id}`: a repeat is {is_repeat}")));
                }
            }
            Step::Group(group, fails) => {
                let first = step.first_commit();
                run_group(store, group, *fails, || {
                    // Where the first of all fails, nothing was committed yet.
                    let Some(first) = &first else { return };
                    let mut half = model.clone();
                    half.take(first);
                    between(self, &half);
                })?;
            }
            Step::Exclusive(items, commits) => {
                let tx = store.begin()?;
                do_all(&tx, items)?;
                if *commits { drop(tx.commit()?) } else { tx.rollback()? }
            }
            Step::Fails(items, panics) => match store.write(failing(items, *panics)) {
                Err(Error::App(_) | Error::Panicked { .. }) => {}
                Err(error) => return Err(error),
                Ok(_) => return Err(Error::app("a failing closure has succeeded")),
            },
            Step::MakeRelay(at) => store.cursor(RELAYS[*at], StartAt::Oldest).map(|_| ())?,
            Step::Progress(at, position, changes) => {
                let mut changes = changes.clone();
                changes.push(Change::Position(*position));
                store.core().progress().add(RELAYS[*at], &mut changes, 1);
            }
            Step::Flush => store.flush_progress(Deadline::Never)?,
            Step::QuickRepair => {
                let mut tx = Transaction::begin(store.core(), "a step")?;
                tx.set_quick_repair();
                tx.finish(0)?;
            }
            Step::Reopen => self.reopen()?,
        }
        model.take(step);
        Ok(())
    }
}

fn closure(items: &[Item]) -> impl FnMut(&Transaction) -> Result<()> + Send + 'static {
    let items = items.to_vec();
    move |tx| do_all(tx, &items)
}

fn failing(items: &[Item], panics: bool) -> impl FnMut(&Transaction) -> Result<()> + Send + 'static {
    let items = items.to_vec();
    move |tx| {
        do_all(tx, &items)?;
        // Not `panic!`: its hook would print what is no failure.
        if panics { std::panic::resume_unwind(Box::new("on purpose")) } else { Err(Error::app("on purpose")) }
    }
}

/// Several writes in one commit, as the writer thread does it; one of them may fail.
fn run_group(store: &Store, group: &[Vec<Item>], fails: usize, between: impl FnMut()) -> Result<()> {
    store.ready()?;
    let mut answers = Vec::new();
    let mut batch: Vec<Box<dyn Write>> = Vec::new();
    for (at, items) in group.iter().enumerate() {
        let (reply, answer) = oneshot::channel();
        batch.push(match at == fails {
            true => Box::new(Closure {
                f: failing(items, false),
                result: None,
                reply,
                purpose: Purpose::Own("a step"),
            }),
            false => {
                Box::new(Closure { f: closure(items), result: None, reply, purpose: Purpose::Own("a step") })
            }
        });
        answers.push(answer);
        store.core().queue.enter();
    }
    groups::run_all(store.core(), batch, between);
    for (at, answer) in answers.into_iter().enumerate() {
        match answer.wait().unwrap_or_else(|_| Err(Error::app("no answer"))) {
            Err(Error::App(_)) if at == fails => {}
            answer => drop(answer?),
        }
    }
    Ok(())
}

/// What the seed chooses: how much is cached, how much is kept.
fn settings(seed: u64) -> Settings {
    let encode = |change: &capture::Change<'_, u64, u64>| {
        let value = change.new.unwrap_or_default();
        Ok(Event::bytes(value.to_string(), value.to_le_bytes()).to("exchange", "key").key("captured"))
    };
    let builder = StoreBuilder::default()
        .cache_bytes([0, 16 << 10, 256 << 10, 32 << 20][seed as usize / 2 % 4])
        .retention(Retention::until_confirmed().keep_events([0, 20][seed as usize / 8 % 2]))
        .capture(Capture::with(CAPTURED, encode))
        .capture(Capture::with(COALESCED, encode).mode(CaptureMode::NewestValue))
        // Nothing is done at a time of its own choosing.
        .progress_delay(Duration::from_secs(100_000))
        .clock(Arc::new(NoTime));
    builder.settings
}
