//! Draining a backlog into RabbitMQ, beside a bare lapin loop that has no store and sends, over and over, a message that the
//! relay has sent (the ratio counts against this one) or one without our headers (what the wire form costs).

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use onewrite::broker::RabbitMq;
use onewrite::{Event, Store, Transaction};

use crate::Setup;
use crate::node::Node;
use crate::peer::lapin::{Client, Kind, plain};
use crate::report::{Goal, Report, median, timed};

const PAYLOAD: [u8; 256] = [8; 256];
const QUEUE: &str = "versus.drain";
const WINDOWS: [(usize, &str); 3] =
    [(64, "drain_vs_lapin_64"), (512, "drain_vs_lapin_512"), (4096, "drain_vs_lapin_4096")];
const COMMIT_EVENTS: u64 = 1000;
/// What a rate of a few hundred per second would need for the whole.
const TIMEOUT: Duration = Duration::from_secs(300);

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    let events = setup.size(10_000, 100_000);
    let rounds = setup.rounds.unwrap_or(setup.size(3, 5));
    let node = Node::start(&setup.folder)?;
    let mut bench = Bench { folder: &setup.folder, node: &node, events, same: None };
    bench.warm_up()?;
    println!(
        "events per second, medians of {rounds} interleaved rounds of {events} x {} bytes",
        PAYLOAD.len()
    );
    println!(
        "{:>8} {:>8} {:>10} {:>14} {:>7} {:>12} {:>7}",
        "queue", "window", "onewrite", "same message", "ratio", "no headers", "ratio"
    );
    let mut lowest = [f64::INFINITY; WINDOWS.len()];
    let mut about = [const { String::new() }; WINDOWS.len()];
    for kind in Kind::ALL {
        for (index, (window, _)) in WINDOWS.into_iter().enumerate() {
            let rates = bench.rounds(kind, window, rounds)?;
            let [ours, same, bare] = rates.map(|rates| median(&rates));
            println!(
                "{kind:>8} {window:>8} {ours:>10.0} {same:>14.0} {:>7.3} {bare:>12.0} {:>7.3}",
                ours / same,
                ours / bare
            );
            if ours / same < lowest[index] {
                lowest[index] = ours / same;
                about[index] =
                    format!("{ours:.0} events/s over {same:.0} of a bare lapin loop, {kind} queue");
            }
        }
    }
    let mut report = Report::default();
    for ((value, (_, key)), about) in lowest.into_iter().zip(WINDOWS).zip(about) {
        report.add(key, value, Goal::AtLeast(0.95), about);
    }
    Ok(report)
}

/// Who sends.
#[derive(Debug, Clone, Copy)]
enum Side {
    Ours,
    Same,
    Bare,
}

struct Bench<'a> {
    folder: &'a Path,
    node: &'a Node,
    events: u64,
    /// What a message that the relay has sent carries.
    same: Option<BasicProperties>,
}

impl Bench<'_> {
    /// The node's first messages cost it more. And a message of ours is kept, to be sent again.
    fn warm_up(&mut self) -> Result<(), Box<dyn Error>> {
        for kind in Kind::ALL {
            self.ours(kind, 512, 2 * COMMIT_EVENTS)?;
            let client = Client::connect(&self.node.url)?;
            self.same = Some(client.take_properties(QUEUE)?);
            client.close()?;
        }
        Ok(())
    }

    /// The rates of each side. Each begins one round in three.
    fn rounds(&self, kind: Kind, window: usize, rounds: usize) -> Result<[Vec<f64>; 3], Box<dyn Error>> {
        let mut rates = [const { Vec::new() }; 3];
        for round in 0..rounds {
            let mut sides = [Side::Ours, Side::Same, Side::Bare];
            sides.rotate_left(round % 3);
            // What is reported only beside costs no more than it must.
            for side in sides.into_iter().filter(|side| !matches!(side, Side::Bare) || round % 2 == 0) {
                let time = match (side, &self.same) {
                    (Side::Ours, _) => self.ours(kind, window, self.events)?,
                    (Side::Same, Some(properties)) => self.bare(kind, window, properties)?,
                    (Side::Same, None) => return Err("no message of ours is known yet".into()),
                    (Side::Bare, _) => self.bare(kind, window, &plain())?,
                };
                rates[side as usize].push(self.events as f64 / time.as_secs_f64());
            }
        }
        Ok(rates)
    }

    /// From the first publish possible to the last confirm.
    fn ours(&self, kind: Kind, window: usize, events: u64) -> Result<Duration, Box<dyn Error>> {
        self.renew(kind)?;
        let folder = tempfile::tempdir_in(self.folder)?;
        let store = backlog(folder.path(), events)?;
        let publisher = RabbitMq::new(&self.node.url)?;
        let relay = store.relay("versus").window_events(window).spawn(publisher)?;
        let began = Instant::now();
        let mut start = began;
        loop {
            let status = relay.status();
            // Connecting is not draining.
            if status.confirmed == 0 && status.in_flight == 0 {
                start = Instant::now();
            }
            if status.confirmed >= events {
                break;
            }
            if began.elapsed() > TIMEOUT {
                return Err(format!("not drained in {TIMEOUT:?}: {status:?}").into());
            }
            // More often would take from the cores that the drain needs: 4 µs of each event at 0.5 ms.
            std::thread::sleep(Duration::from_millis(5));
        }
        let time = start.elapsed();
        relay.stop(Duration::from_secs(10));
        self.check_count(events)?;
        Ok(time)
    }

    fn bare(
        &self,
        kind: Kind,
        window: usize,
        properties: &BasicProperties,
    ) -> Result<Duration, Box<dyn Error>> {
        self.renew(kind)?;
        let client = Client::connect(&self.node.url)?;
        let payloads = (0..self.events).map(|_| &PAYLOAD[..]);
        let (time, sent) = timed(|| client.publish_all(QUEUE, properties, window, payloads));
        sent?;
        client.close()?;
        self.check_count(self.events)?;
        Ok(time)
    }

    fn renew(&self, kind: Kind) -> Result<(), Box<dyn Error>> {
        let client = Client::connect(&self.node.url)?;
        client.renew(QUEUE, kind)?;
        client.close()
    }

    /// A quorum queue reports its count a little late.
    fn check_count(&self, events: u64) -> Result<(), Box<dyn Error>> {
        let client = Client::connect(&self.node.url)?;
        let mut count = 0;
        for _ in 0..50 {
            count = client.count(QUEUE)?;
            if count == events {
                return client.close();
            }
            client.idle(Duration::from_millis(100));
        }
        Err(format!("{count} messages in the queue, not {events}").into())
    }
}

/// A store with so many keyless events that nobody has published.
fn backlog(folder: &Path, events: u64) -> onewrite::Result<Store> {
    let store = Store::open(folder.join("drain.redb"))?;
    for first in (0..events).step_by(COMMIT_EVENTS as usize) {
        let count = COMMIT_EVENTS.min(events - first);
        store.write(move |tx: &Transaction| {
            (0..count).try_for_each(|_| {
                tx.append(Event::bytes("payment.completed", PAYLOAD).to("", QUEUE)).map(drop)
            })
        })?;
    }
    Ok(store)
}
