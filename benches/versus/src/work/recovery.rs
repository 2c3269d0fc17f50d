//! Opening after `kill -9`: a process of its own writes until the file has its size, goes on writing, and is killed in the middle of it; then
//! the open is timed, and what had been reported as durable must be there. For the next round another process opens the file that is whole again, writes a
//! little more, and is killed too.
//!
//! One file at a time, all its rounds: of several that are large not all would stay in memory. What is judged is no ratio.
//!
//! Files are **warm**: what the killed process wrote is still in the operating system's memory, which an ordinary user cannot empty.
//! From a cold disk add the time it takes to read the file once.

use std::error::Error;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use onewrite::{Event, Store};
use redb::{Database, ReadableDatabase, ReadableTableMetadata, TableDefinition};

use crate::Setup;
use crate::child::{Process, report};
use crate::peer::Failure;
use crate::report::{Goal, Report, median, timed};
use crate::work::sides::CACHE_BYTES;

pub(crate) const CHILD: &str = "recovery";
const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");
/// What one commit writes at most: a hundredth of the file, so that writing on after each kill changes its size but little.
const COMMIT_BYTES_MAX: usize = 8 << 20;
/// With its frame just within 64 KiB: redb gives each such record some pages of its own, in powers of two.
const LARGE_PAYLOAD: usize = 60 << 10;
const SMALL_PAYLOAD: usize = 256;
const LARGE_FILE: u64 = 2_000_000_000;
/// Commits that each process makes at least before it may be killed.
const COMMITS_MIN: usize = 3;
/// Commits of one small event that say what a way to open costs while writing.
const SINGLES: u64 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours,
    /// Killed when it has been idle for a while, with `quick_repair_when_idle`.
    Idle,
    Redb,
    /// redb with `set_quick_repair(true)` in each commit: the allocator's state is in the file, at the price of a second sync and of writing it.
    Quick,
}

const KINDS: [Kind; 4] = [Kind::Ours, Kind::Idle, Kind::Redb, Kind::Quick];
/// After this long without a write a store is idle.
const IDLE: Duration = Duration::from_millis(300);

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Ours => "onewrite, default",
            Self::Idle => "onewrite, quick repair, idle",
            Self::Redb => "redb, default",
            Self::Quick => "redb, quick repair in each commit",
        }
    }

    fn from_word(word: &str) -> Result<Self, Failure> {
        let kind = KINDS.into_iter().find(|kind| format!("{kind:?}") == word);
        kind.ok_or_else(|| format!("no store is called {word}").into())
    }
}

enum Opened {
    Ours(Store),
    Redb { database: Database, quick: bool },
}

impl Opened {
    fn open(kind: Kind, path: &Path) -> Result<Self, Failure> {
        Ok(match kind {
            Kind::Ours => Self::Ours(Store::builder().cache_bytes(CACHE_BYTES).open(path)?),
            Kind::Idle => {
                let store = Store::builder().cache_bytes(CACHE_BYTES).quick_repair_when_idle(IDLE);
                Self::Ours(store.open(path)?)
            }
            Kind::Redb | Kind::Quick => Self::Redb {
                database: Database::builder().set_cache_size(CACHE_BYTES).create(path)?,
                quick: kind == Kind::Quick,
            },
        })
    }

    /// So many events in one durable commit.
    fn append(&self, first: u64, events: u64, payload: usize) -> Result<(), Failure> {
        let bytes = vec![8; payload];
        match self {
            Self::Ours(store) => {
                store.write(move |tx| {
                    for _ in 0..events {
                        let event = Event::bytes("payment.completed", bytes.clone());
                        tx.append(event.to("payments", "completed"))?;
                    }
                    Ok(())
                })?;
            }
            Self::Redb { database, quick } => {
                let mut transaction = database.begin_write()?;
                transaction.set_quick_repair(*quick);
                {
                    let mut outbox = transaction.open_table(OUTBOX)?;
                    for seq in first..first + events {
                        outbox.insert(seq, bytes.as_slice())?;
                    }
                }
                transaction.commit()?;
            }
        }
        Ok(())
    }

    fn events(&self) -> Result<u64, Failure> {
        match self {
            Self::Ours(store) => Ok(store.stats()?.next_seq),
            Self::Redb { database, .. } => match database.begin_read()?.open_table(OUTBOX) {
                Ok(outbox) => Ok(outbox.len()?),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(0),
                Err(error) => Err(error.into()),
            },
        }
    }
}

/// What the file takes on the disk: redb makes it longer ahead of time, by as much again.
fn allocated_bytes(path: &Path) -> Result<u64, Failure> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Writes on and on. After each commit it says how many events are durable, and whether the file is as large as it is to be.
pub(crate) fn child(path: &Path, arguments: &[String]) -> Result<(), Failure> {
    let [kind, bytes, payload] = arguments else { return Err("kind, bytes and payload are wanted".into()) };
    let (kind, bytes, payload): (_, u64, usize) = (Kind::from_word(kind)?, bytes.parse()?, payload.parse()?);
    let store = Opened::open(kind, path)?;
    let mut events = store.events()?;
    let batch = (COMMIT_BYTES_MAX as u64).min(bytes / 100) / payload as u64;
    for commits in 1.. {
        store.append(events, batch, payload)?;
        events += batch;
        let enough = allocated_bytes(path)? >= bytes;
        if kind == Kind::Idle && enough && commits >= COMMITS_MIN {
            std::thread::sleep(IDLE * 5);
            report(&[events as f64, 1.0])?;
            // Until it is killed.
            std::thread::park();
        }
        report(&[events as f64, f64::from(u8::from(enough))])?;
    }
    Ok(())
}

/// Lets a process write, and kills it a moment after the file is large enough. How many events were reported as durable.
fn write_and_kill(kind: Kind, path: &Path, case: Case, round: usize) -> Result<f64, Failure> {
    let arguments = [format!("{kind:?}"), case.bytes.to_string(), case.payload.to_string()];
    let mut process = Process::start(CHILD, path, &arguments)?;
    let (mut reported, mut enough, mut commits) = (0.0, 0.0, 0);
    while enough == 0.0 || commits < COMMITS_MIN {
        let [events, large] = process.hear()?[..] else { return Err("not two numbers".into()) };
        (reported, enough) = (events, large);
        commits += 1;
    }
    // In the middle of whatever it does then.
    std::thread::sleep(Duration::from_millis(7 + 13 * round as u64));
    for line in process.kill()? {
        // The last one may be cut; what it said then is not known.
        let events = line.split_once(' ').and_then(|(events, _)| events.parse().ok());
        reported = events.map_or(reported, |events: f64| events.max(reported));
    }
    Ok(reported)
}

#[derive(Debug, Clone, Copy)]
struct Case {
    bytes: u64,
    payload: usize,
}

/// Medians of one way with one file.
struct Row {
    open_ms: f64,
    commit_us: f64,
    file_bytes: u64,
}

fn measure(setup: &Setup, kind: Kind, case: Case) -> Result<Row, Failure> {
    let path = setup.folder.join("recovery.redb");
    let (mut open_ms, mut commit_us, mut file_bytes) = (Vec::new(), Vec::new(), 0);
    // A file of 10 GB takes minutes to write and half a minute to open.
    let rounds = setup.rounds.unwrap_or(if setup.quick || case.bytes > LARGE_FILE { 3 } else { 5 });
    for round in 0..rounds {
        let reported = write_and_kill(kind, &path, case, round)?;
        file_bytes = allocated_bytes(&path)?;
        let (time, store) = timed(|| Opened::open(kind, &path));
        let store = store?;
        open_ms.push(time.as_secs_f64() * 1000.0);
        let events = store.events()?;
        if (events as f64) < reported {
            return Err(format!("{}: {reported} events were durable, {events} are there", kind.name()).into());
        }
        let (time, written) =
            timed(|| (events..events + SINGLES).try_for_each(|seq| store.append(seq, 1, SMALL_PAYLOAD)));
        written?;
        commit_us.push(time.as_secs_f64() * 1e6 / SINGLES as f64);
    }
    std::fs::remove_file(&path)?;
    Ok(Row { open_ms: median(&open_ms), commit_us: median(&commit_us), file_bytes })
}

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    compare(setup).map_err(|failure| failure as Box<dyn Error>)
}

fn compare(setup: &Setup) -> Result<Report, Failure> {
    println!(
        "   after kill -9 while writing; warm; medians; a commit of one 256-byte event just after the open"
    );
    let sizes: &[u64] = setup.size(&[50, 200], &[100, 1000, 10_000]);
    let mut report = Report::default();
    let (mut ours, mut idle) = (Vec::new(), Vec::new());
    for &megabytes in sizes {
        for payload in [SMALL_PAYLOAD, LARGE_PAYLOAD] {
            let case = Case { bytes: megabytes * 1_000_000, payload };
            // What quick repair takes depends on how large the file is, not on what is in it: once is enough.
            for kind in KINDS
                .into_iter()
                .filter(|kind| !matches!(kind, Kind::Quick | Kind::Idle) || payload == LARGE_PAYLOAD)
            {
                let row = measure(setup, kind, case)?;
                println!(
                    "{:>6} MB of {payload:>5}-byte events   {:<34} open {:>8.1} ms   commit {:>6.0} µs",
                    row.file_bytes / 1_000_000,
                    kind.name(),
                    row.open_ms,
                    row.commit_us
                );
                match kind {
                    Kind::Ours => ours.push((megabytes, row.open_ms, payload)),
                    Kind::Idle => idle.push((megabytes, row.open_ms, payload)),
                    Kind::Redb | Kind::Quick => {}
                }
            }
        }
    }
    for (key, mut opens) in [("open_ms_largest", ours), ("open_ms_largest_idle", idle)] {
        // The largest size; of its two files the slower.
        opens.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let (megabytes, open_ms, payload) = opens.pop().ok_or("nothing was measured")?;
        let about = format!("{megabytes} MB of {payload}-byte events, warm");
        report.add(key, open_ms, Goal::AtMost(100.0), about);
    }
    Ok(report)
}
