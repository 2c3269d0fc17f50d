//! A writer thread: says on disk what it is about to write, writes it, says what it was answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use onewrite::{Error, Event, ExpectedRevision, Receipt, Store, Transaction, WriteOnce};
use onewrite_torture_checker::formats::{
    EXCHANGES, History, Line, Planned, ROUTING_KEY, exchange, payload, read_history,
};

use crate::Result;
use crate::app::{BATCHES, CAPTURED, CAPTURED_TO, POISON_BYTES};
use crate::plan::{Plan, WRITERS};
use crate::random::Random;

/// Keys of an application. All its writers write to all of them.
const KEYS: u64 = 256;
/// Streams of a writer, which alone writes to them.
const STREAMS: u64 = 3;
const BATCH_EVENTS_MAX: u64 = 24;
/// Batches among which one is poison.
const POISON_ONE_IN: u64 = 6000;
/// What panics on purpose says this.
const ON_PURPOSE: &str = "on purpose";

/// How a batch is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `Store::write`.
    Write,
    /// `Store::begin` … `commit`.
    Begin,
    /// `Store::write_once`, and sometimes once more.
    Once,
    /// To a stream, with its expected revision.
    Stream,
    /// Rows of a captured table.
    Capture,
    /// An error after everything was appended: nothing may be there.
    Fail,
    /// A panic then.
    Panic,
    /// To a stream, with a wrong expected revision.
    WrongRevision,
}

/// Panics on purpose are not worth a page in the log each.
pub(crate) fn quiet_panics() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload().downcast_ref::<&str>() != Some(&ON_PURPOSE) {
            hook(info);
        }
    }));
}

#[derive(Debug, Clone)]
struct Batch {
    number: u64,
    kind: Kind,
    row: bool,
    stream: Option<String>,
    events: Vec<Planned>,
}

pub(crate) struct Writer<'a> {
    plan: &'a Plan,
    store: &'a Store,
    number: u64,
    history: History,
    random: Random,
    next_batch: u64,
    next_event: u64,
    /// The last batch of an earlier life, if it got no answer and may be asked for again.
    unanswered: Option<Batch>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(plan: &'a Plan, store: &'a Store, number: u64) -> Result<Self> {
        let mut writer = Self {
            plan,
            store,
            number,
            history: History::create(&plan.history(number, plan.life))?,
            random: Random::new(plan.seed, &format!("{}-{number}-{}", plan.name, plan.life)),
            next_batch: 0,
            next_event: 0,
            unanswered: None,
        };
        writer.remember()?;
        Ok(writer)
    }

    /// Reads in the latest of its histories that says anything how far it had come.
    fn remember(&mut self) -> Result<()> {
        for life in (0..self.plan.life).rev() {
            let path = self.plan.history(self.number, life);
            if !path.exists() {
                continue;
            }
            let mut seen = false;
            read_history(&path, |line| {
                seen = true;
                if let Line::Intent { batch, kind, row, events, .. } = line {
                    self.next_batch = batch / WRITERS + 1;
                    self.next_event = events.last().map_or(self.next_event, |event| event.n / WRITERS + 1);
                    let again = kind == format!("{:?}", Kind::Once);
                    let batch = Batch { number: batch, kind: Kind::Once, row, stream: None, events };
                    self.unanswered = again.then_some(batch);
                } else {
                    self.unanswered = None;
                }
            })?;
            if seen {
                break;
            }
        }
        Ok(())
    }

    /// Writes until there is enough. Fails if the store takes nothing more.
    pub(crate) fn run(mut self, enough: &AtomicBool) -> Result<()> {
        if let Some(batch) = self.unanswered.take() {
            self.write(&batch)?;
        }
        while !enough.load(Ordering::SeqCst) {
            // What failed is counted too.
            if self.next_event >= self.due() {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            let batch = self.draw();
            self.write(&batch)?;
        }
        Ok(())
    }

    /// Events that should have been written by now.
    fn due(&self) -> u64 {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64);
        now_ms.saturating_sub(self.plan.began_ms) * self.plan.rate / 1000 / WRITERS
    }

    fn draw(&mut self) -> Batch {
        let kind = match self.random.below(100) {
            0..45 => Kind::Write,
            45..50 => Kind::Begin,
            50..70 => Kind::Once,
            70..80 => Kind::Stream,
            80..90 => Kind::Capture,
            90..95 => Kind::Fail,
            95..97 => Kind::Panic,
            _ => Kind::WrongRevision,
        };
        let number = self.next_batch * WRITERS + self.number;
        self.next_batch += 1;
        let of_stream = matches!(kind, Kind::Stream | Kind::WrongRevision);
        let stream = of_stream.then(|| format!("stream-{}-{}", self.number, self.random.below(STREAMS)));
        let poison = kind == Kind::Write && self.random.one_in(POISON_ONE_IN);
        let count = if poison { 1 } else { 1 + self.random.below(BATCH_EVENTS_MAX) };
        let events = (0..count).map(|_| self.draw_event(kind, stream.as_deref(), poison)).collect();
        Batch { number, kind, row: self.random.one_in(2), stream, events }
    }

    fn draw_event(&mut self, kind: Kind, stream: Option<&str>, poison: bool) -> Planned {
        let n = self.next_event * WRITERS + self.number;
        self.next_event += 1;
        let keyless = poison || (kind != Kind::Capture && stream.is_none() && self.random.one_in(5));
        let drawn = format!("k{}", self.random.below(KEYS));
        let key = if keyless { None } else { Some(stream.map_or(drawn, str::to_owned)) };
        let drawn = u8::try_from(self.random.below(u64::from(EXCHANGES))).unwrap_or_default();
        let to = if kind == Kind::Capture { CAPTURED_TO } else { drawn };
        let len = if poison { POISON_BYTES } else { 24 + self.random.below(200) as u32 };
        let crc = crc32(&payload(&self.plan.name, n, len));
        let len = payload(&self.plan.name, n, len).len() as u32;
        Planned { n, key, to, len, crc, poison }
    }

    /// Intent, write, answer.
    fn write(&mut self, batch: &Batch) -> Result<()> {
        self.history.line(&Line::Intent {
            batch: batch.number,
            kind: format!("{:?}", batch.kind),
            row: batch.row,
            stream: batch.stream.clone(),
            events: batch.events.clone(),
        })?;
        // With it goes the answer to the one before.
        self.history.sync()?;
        let answer = self.ask(batch);
        let number = batch.number;
        match answer {
            Ok(seqs) => Ok(self.history.line(&Line::Ok { batch: number, seqs })?),
            Err(error @ (Error::CommitUnknown { .. } | Error::Poisoned { .. } | Error::Closed { .. })) => {
                self.history.line(&Line::Unknown { batch: number, why: error.to_string() })?;
                self.history.sync()?;
                Err(error.into())
            }
            Err(error) => {
                self.history.line(&Line::No { batch: number, why: error.to_string() })?;
                let meant = matches!(batch.kind, Kind::Fail | Kind::Panic | Kind::WrongRevision);
                if meant { Ok(()) } else { Err(error.into()) }
            }
        }
    }

    fn ask(&mut self, batch: &Batch) -> onewrite::Result<Vec<u64>> {
        let work = Arc::new(Work {
            app: self.plan.name.clone(),
            batch: batch.clone(),
            expected: self.expected(batch)?,
        });
        match batch.kind {
            Kind::Begin => {
                let tx = self.store.begin()?;
                work.run(&tx)?;
                Ok(tx.commit()?.seqs().to_vec())
            }
            Kind::Once => {
                let request = format!("request-{}", batch.number);
                let again = Arc::clone(&work);
                let first = once(self.store.write_once(&request, move |tx| work.run(tx))?);
                if self.random.one_in(4) {
                    let second = once(self.store.write_once(&request, move |tx| again.run(tx))?);
                    if first != second {
                        return Err(Error::app(format!("once reported {first:?}, once {second:?}")));
                    }
                }
                Ok(first)
            }
            _ => Ok(self.store.write(move |tx| work.run(tx))?.seqs().to_vec()),
        }
    }

    /// The revision that the stream of the batch is to have.
    fn expected(&self, batch: &Batch) -> onewrite::Result<ExpectedRevision> {
        let Some(stream) = &batch.stream else { return Ok(ExpectedRevision::Any) };
        let newest = self.store.read()?.stream(stream)?.revision();
        let right = newest.map_or(ExpectedRevision::NoStream, ExpectedRevision::Exact);
        let wrong = ExpectedRevision::Exact(newest.map_or(7, |newest| newest + 1));
        Ok(if batch.kind == Kind::WrongRevision { wrong } else { right })
    }
}

fn once<T>(once: WriteOnce<T>) -> Vec<u64> {
    match once {
        WriteOnce::Done(receipt) => receipt.seqs().to_vec(),
        WriteOnce::Repeated(receipt) => Receipt::seqs(&receipt).to_vec(),
        _ => Vec::new(),
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// What a batch does in its transaction. It may run more than once.
struct Work {
    app: String,
    batch: Batch,
    expected: ExpectedRevision,
}

impl Work {
    fn run(&self, tx: &Transaction) -> onewrite::Result<()> {
        let Batch { number, kind, row, stream, events } = &self.batch;
        if *row {
            tx.open_table(BATCHES)?.insert(number, events.len() as u64)?;
        }
        match stream {
            Some(stream) => {
                let events: Vec<_> = events.iter().map(|planned| self.event(planned)).collect();
                tx.stream(stream).append(events, self.expected)?;
            }
            None if *kind == Kind::Capture => {
                let mut table = tx.captured_table(CAPTURED)?;
                for planned in events {
                    let value = payload(&self.app, planned.n, planned.len);
                    table.insert(planned.key.as_deref().unwrap_or_default(), &value[..])?;
                }
            }
            None => {
                for planned in events {
                    tx.append(self.event(planned))?;
                }
            }
        }
        match kind {
            Kind::Fail => Err(Error::app(ON_PURPOSE)),
            Kind::Panic => std::panic::panic_any(ON_PURPOSE),
            _ => Ok(()),
        }
    }

    fn event(&self, planned: &Planned) -> Event {
        let bytes = payload(&self.app, planned.n, planned.len);
        let event = Event::bytes("torture", bytes).to(exchange(planned.to), ROUTING_KEY);
        let event = match &planned.key {
            Some(key) => event.key(key),
            None => event,
        };
        // Every fourth has an id of the application's own.
        if (planned.n / WRITERS).is_multiple_of(4) {
            event.id(format!("{}-{}", self.app, planned.n))
        } else {
            event
        }
    }
}
