//! What a long backlog costs: per event appended, per event drained, and in memory.
//!
//! Two processes of their own, one with a short backlog and one with a long one, each with a relay that is paused. In each round both run one after the other, in
//! small steps: some events are appended (one thread, 100 a transaction, keyed), then the relay drains as many of the oldest, so that the backlog stays what it
//! is. The broker confirms at once: what is measured is the library. In the end all is drained, and as many must have been confirmed as were appended. Memory is the
//! process's peak (`VmHWM`) over all of it: filling, rounds, draining.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use onewrite::broker::{Epoch, Publisher, PublisherEvent, PublisherEvents};
use onewrite::{Event, Outcome, Outgoing, Relay, SettingError, Store};

use crate::Setup;
use crate::child::{Process, report};
use crate::peer::Failure;
use crate::report::{Goal, Report, median};
use crate::work::sides::{CACHE_BYTES, PAYLOAD};

pub(crate) const CHILD: &str = "scale";
const SHORT: u64 = 10_000;
const KEYS: u64 = 1000;
const FILL_BATCH: u64 = 5000;
const BATCH: u64 = 100;
/// Events of one step: half of the short backlog.
const STEP: u64 = 5000;
/// Without any progress for so long something is wrong.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Confirms at once, and counts.
#[derive(Debug, Default)]
struct Confirming {
    events: Option<PublisherEvents>,
    confirmed: Arc<AtomicU64>,
}

impl Publisher for Confirming {
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
        events.send(PublisherEvent::Up { epoch: Epoch(1) });
        self.events = Some(events);
        Ok(())
    }

    fn publish(&mut self, _: Epoch, outgoing: Outgoing) {
        if let Some(events) = &self.events {
            events.send(PublisherEvent::Outcomes(vec![(outgoing.ticket, Outcome::Confirmed)]));
            self.confirmed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn stop(&mut self, _: Duration) {}
}

struct Service {
    store: Store,
    relay: Relay,
    confirmed: Arc<AtomicU64>,
    appended: u64,
}

impl Service {
    fn open(path: &Path) -> Result<Self, Failure> {
        let store = Store::builder().cache_bytes(CACHE_BYTES).open(path)?;
        let publisher = Confirming::default();
        let confirmed = Arc::clone(&publisher.confirmed);
        let relay = store.relay("rabbit").spawn(publisher)?;
        relay.pause();
        Ok(Self { store, relay, confirmed, appended: 0 })
    }

    fn append(&mut self, events: u64, batch: u64) -> Result<(), Failure> {
        let end = self.appended + events;
        while self.appended < end {
            let (first, last) = (self.appended, (self.appended + batch).min(end));
            self.store.write(move |tx| {
                for n in first..last {
                    let event = Event::bytes("payment.completed", PAYLOAD).key((n % KEYS).to_string());
                    tx.append(event.to("payments", "completed"))?;
                }
                Ok(())
            })?;
            self.appended = last;
        }
        Ok(())
    }

    fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// Lets the relay go until so many are confirmed. A little more may be, before it hears that it is to pause.
    fn drain_to(&self, wanted: u64) -> Result<(), Failure> {
        self.relay.resume();
        let (mut seen, mut since) = (self.confirmed(), Instant::now());
        while seen < wanted {
            std::thread::sleep(Duration::from_micros(100));
            let now = self.confirmed();
            if now > seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > TIMEOUT {
                return Err(format!("the relay stands still at {seen} of {wanted}").into());
            }
        }
        self.relay.pause();
        Ok(())
    }

    /// Microseconds per event appended, and per event drained, with so many waiting.
    fn round(&mut self, steps: u64, backlog: u64) -> Result<[f64; 2], Failure> {
        let (mut appending, mut appended) = (Duration::ZERO, 0);
        let (mut draining, mut drained) = (Duration::ZERO, 0);
        for _ in 0..steps {
            // What was drained beyond the last step's end is made up for.
            let missing = backlog + STEP - (self.appended - self.confirmed());
            let start = Instant::now();
            self.append(missing, BATCH)?;
            appending += start.elapsed();
            appended += missing;
            let (start, before) = (Instant::now(), self.confirmed());
            self.drain_to(before + STEP)?;
            draining += start.elapsed();
            drained += self.confirmed() - before;
        }
        let each = |time: Duration, events: u64| time.as_secs_f64() * 1e6 / events as f64;
        Ok([each(appending, appended), each(draining, drained)])
    }

    /// Drains what is left; events in all, and microseconds for each that was left.
    fn finish(self) -> Result<[f64; 2], Failure> {
        let (start, before) = (Instant::now(), self.confirmed());
        self.drain_to(self.appended)?;
        let each = start.elapsed().as_secs_f64() * 1e6 / (self.appended - before) as f64;
        let report = self.relay.stop(Duration::from_secs(30));
        let (confirmed, appended) = (self.confirmed.load(Ordering::Relaxed), self.appended);
        if confirmed != appended || report.backlog_events != 0 || self.store.stats()?.next_seq != appended {
            return Err(format!("{appended} appended, {confirmed} confirmed, then {report:?}").into());
        }
        Ok([appended as f64, each])
    }
}

/// The peak of this process's memory, in MiB.
fn peak_mib() -> Result<f64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    let kib: f64 = peak.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// Fills its backlog, then does as it is asked: so many steps, or the end.
pub(crate) fn child(path: &Path, arguments: &[String]) -> Result<(), Failure> {
    let [backlog] = arguments else { return Err("a backlog is wanted".into()) };
    let mut service = Service::open(path)?;
    let backlog = backlog.parse()?;
    service.append(backlog, FILL_BATCH)?;
    report(&[peak_mib()?])?;
    let mut line = String::new();
    while std::io::stdin().read_line(&mut line)? > 0 {
        if line.trim() == "end" {
            let [events, drain_us] = service.finish()?;
            return report(&[events, drain_us, peak_mib()?]);
        }
        report(&service.round(line.trim().parse()?, backlog)?)?;
        line.clear();
    }
    Err("nobody asks for the end".into())
}

struct Seat {
    backlog: u64,
    process: Process,
    append_us: Vec<f64>,
    drain_us: Vec<f64>,
}

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    compare(setup).map_err(|failure| failure as Box<dyn Error>)
}

fn compare(setup: &Setup) -> Result<Report, Failure> {
    let backlogs = [SHORT, setup.size(300_000, 10_000_000)];
    let rounds = setup.rounds.unwrap_or(setup.size(3, 7));
    println!("   256-byte events over {KEYS} keys, {BATCH} a transaction; medians of {rounds} rounds");
    let mut seats = Vec::new();
    for backlog in backlogs {
        let path = setup.folder.join(format!("scale-{backlog}.redb"));
        let mut process = Process::start(CHILD, &path, &[backlog.to_string()])?;
        process.hear()?;
        seats.push(Seat { backlog, process, append_us: Vec::new(), drain_us: Vec::new() });
    }
    let steps = setup.size(5, 20).to_string();
    for round in 0..rounds {
        seats.reverse();
        for seat in &mut seats {
            seat.process.say(&steps)?;
            let [append_us, drain_us] = seat.process.hear()?[..] else { return Err("not two".into()) };
            // What a first round meets for the first time is no figure.
            if round > 0 || rounds == 1 {
                seat.append_us.push(append_us);
                seat.drain_us.push(drain_us);
            }
        }
    }
    seats.sort_by_key(|seat| seat.backlog);
    let mut reported = Vec::new();
    for seat in &mut seats {
        seat.process.say("end")?;
        let [events, whole_us, peak_mib] = seat.process.hear()?[..] else { return Err("not three".into()) };
        let (append_us, drain_us) = (median(&seat.append_us), median(&seat.drain_us));
        println!(
            "{:>9} pending   append {append_us:>6.2} µs   drain {drain_us:>6.2} µs   all {events:.0} drained at {whole_us:.2} µs   peak {peak_mib:.1} MiB",
            seat.backlog
        );
        reported.push((append_us, drain_us, peak_mib));
    }
    let [short, long] = reported[..] else { return Err("there are two".into()) };
    let mut report = Report::default();
    let about = |short: f64, long: f64| format!("{long:.2} µs per event against {short:.2}");
    report.add("enqueue_cost_growth", long.0 / short.0, Goal::AtMost(1.2), about(short.0, long.0));
    report.add("drain_cost_growth", long.1 / short.1, Goal::AtMost(1.2), about(short.1, long.1));
    let cache_mib = (CACHE_BYTES >> 20) as f64;
    let about = format!("peak {:.1} MiB with {} pending, cache of {cache_mib:.0} MiB", long.2, backlogs[1]);
    report.add("rss_over_cache_mib", long.2 - cache_mib, Goal::AtMost(64.0), about);
    Ok(report)
}
