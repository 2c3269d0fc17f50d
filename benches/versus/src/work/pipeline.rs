//! 16 writers as fast as they can, who publishes, and a consumer, all at once: events per second that reach the consumer in order over
//! a steady stretch. At most 10,000 events are under way: writers who are faster than the rest wait, on every side.
//!
//! And what the relay costs the disk meanwhile: fsyncs beyond the writers' own, per 1,000 commits that carry writes.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use onewrite::Stats;

use crate::Setup;
use crate::flow::{Flow, Pace, Sharing, Side, WRITERS};
use crate::node::Node;
use crate::report::{Goal, Report, median};

const WARM_UP: Duration = Duration::from_secs(1);
/// The intervals of those who poll.
pub(super) const OFTEN: Duration = Duration::from_millis(10);
pub(super) const SELDOM: Duration = Duration::from_millis(100);

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    let node = Node::start(&setup.folder)?;
    let rounds = setup.rounds.unwrap_or(setup.size(3, 7));
    let stretch = Duration::from_secs(setup.size(3, 10));
    let sharing = better_sharing(&node, &setup.folder)?;
    let sides = [Side::Ours, Side::Polled(OFTEN, sharing), Side::Polled(SELDOM, sharing)];
    let mut rates = [const { Vec::new() }; 3];
    let mut syncs = Vec::new();
    let mut rests = [0; 3];
    for round in 0..rounds {
        for index in (0..sides.len()).map(|index| (index + round) % sides.len()) {
            let measured = sustained(sides[index], &node, &setup.folder, stretch)?;
            if measured.rate == 0.0 {
                return Err(format!("{}: nothing was delivered in {stretch:?}", sides[index]).into());
            }
            print!("round {round}: {:<16} {:>8.0} events/s to the consumer", sides[index], measured.rate);
            println!("{}", measured.rests.map(|rests| format!(", {rests} rests")).unwrap_or_default());
            rates[index].push(measured.rate);
            rests[index] += measured.rests.unwrap_or_default();
            syncs.extend(measured.syncs);
        }
    }
    let full = syncs.into_iter().fold(Syncs::default(), Syncs::and);
    let slow = slow_syncs(&node, &setup.folder, stretch)?;
    println!("onewrite, {WRITERS} writers at full speed: {full}");
    println!("onewrite, a write every 20 ms: {slow}");
    let [ours, often, seldom] = rates.map(|rates| median(&rates));
    let mut report = Report::default();
    let polled =
        [("pipeline_vs_poll10", often, rests[1], 2.0), ("pipeline_vs_poll100", seldom, rests[2], 3.0)];
    for (key, peer, rests, goal) in polled {
        let looked = stretch * u32::try_from(rounds)?;
        let about = format!(
            "{ours:.0} events/s over {peer:.0} of SQLite ({sharing:?}), polled, which waited for its interval {rests} times in {looked:?}, and lapin"
        );
        report.add(key, ours / peer, Goal::AtLeast(goal), about);
    }
    let most = full.per_1000().max(slow.per_1000());
    report.add("relay_fsyncs_per_1000_commits", most, Goal::AtMost(0.0), format!("{full}; slowly: {slow}"));
    Ok(report)
}

/// SQLite's writers share it in the way that is quicker here.
pub(super) fn better_sharing(node: &Node, folder: &Path) -> Result<Sharing, Box<dyn Error>> {
    let mut best = (0.0, Sharing::Mutex);
    for sharing in [Sharing::Mutex, Sharing::Each] {
        let rate = sustained(Side::Polled(OFTEN, sharing), node, folder, Duration::from_secs(2))?.rate;
        println!("SQLite, {WRITERS} threads, {sharing:?}: {rate:.0} events/s to the consumer");
        if rate > best.0 {
            best = (rate, sharing);
        }
    }
    Ok(best.1)
}

pub(super) struct Sustained {
    /// Deliveries per second.
    pub(super) rate: f64,
    /// If it is ours.
    syncs: Option<Syncs>,
    /// How often whoever polls found nothing meanwhile, and waited.
    rests: Option<u64>,
}

/// All writers at full speed.
pub(super) fn sustained(
    side: Side,
    node: &Node,
    folder: &Path,
    stretch: Duration,
) -> Result<Sustained, Box<dyn Error>> {
    Flow::start(side, WRITERS, node, folder)?.run(Pace::Full, |flow| watch(flow, stretch))
}

/// One writer, so slowly that each write is a commit of its own.
fn slow_syncs(node: &Node, folder: &Path, stretch: Duration) -> Result<Syncs, Box<dyn Error>> {
    let pace = Pace::Every(Duration::from_millis(20));
    let slow = Flow::start(Side::Ours, 1, node, folder)?.run(pace, |flow| watch(flow, stretch))?;
    Ok(slow.syncs.unwrap_or_default())
}

fn watch(flow: &Flow, stretch: Duration) -> Result<Sustained, Box<dyn Error>> {
    std::thread::sleep(WARM_UP);
    let stats = || flow.store().map(onewrite::Store::stats).transpose();
    let (before, rested) = (stats()?, flow.rests());
    let (start, first) = (Instant::now(), flow.tap.delivered());
    std::thread::sleep(stretch);
    let rate = (flow.tap.delivered() - first) as f64 / start.elapsed().as_secs_f64();
    let syncs = before.zip(stats()?).map(|(before, after)| Syncs::between(&before, &after));
    let rests = rested.zip(flow.rests()).map(|(before, after)| after - before);
    Ok(Sustained { rate, syncs, rests })
}

/// What a stretch has asked of the disk.
#[derive(Debug, Clone, Copy, Default)]
struct Syncs {
    /// Commits that carried writes of the application.
    written: u64,
    /// Syncs of the file beyond one for each of those, and one for each time the file has grown: the engine makes a new length durable
    /// before it uses it.
    more: u64,
}

impl Syncs {
    /// The store counts commits without a write of the application apart. That a commit is one sync is not taken on trust.
    fn between(before: &Stats, after: &Stats) -> Self {
        let alone = after.commits_alone - before.commits_alone;
        let written = after.commits - before.commits - alone;
        let syncs = after.io.syncs - before.io.syncs;
        let growths = after.io.growths - before.io.growths;
        // One commit may be between its sync and its count when either is read.
        Self { written, more: alone.max(syncs.saturating_sub(written + growths + 1)) }
    }

    fn and(self, other: Self) -> Self {
        Self { written: self.written + other.written, more: self.more + other.more }
    }

    fn per_1000(self) -> f64 {
        self.more as f64 * 1000.0 / self.written.max(1) as f64
    }
}

impl std::fmt::Display for Syncs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} fsyncs of the relay's own beside {} commits", self.more, self.written)
    }
}
