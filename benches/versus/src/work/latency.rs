//! From the begin of a durable write to the delivery of its event to a consumer, in one process with one clock. Idle: one writer, about
//! every 20 ms. Half load: 16 writers, each side at half of what it sustains itself.

use std::error::Error;
use std::time::Duration;

use super::pipeline::{OFTEN, SELDOM, better_sharing, sustained};
use crate::Setup;
use crate::flow::{Flow, Pace, Side, WRITERS};
use crate::node::Node;
use crate::report::{Goal, Report, median, percentile};

const IDLE: Duration = Duration::from_millis(20);
/// A new file grows at first.
const WARM_UP: Duration = Duration::from_secs(1);

pub(crate) fn run(setup: &Setup) -> Result<Report, Box<dyn Error>> {
    let node = Node::start(&setup.folder)?;
    let bench = Bench {
        setup,
        node: &node,
        rounds: setup.rounds.unwrap_or(setup.size(3, 5)),
        idle_stretch: Duration::from_secs(setup.size(3, 10)),
        half_stretch: Duration::from_secs(setup.size(1, 5)),
    };
    let sharing = better_sharing(&node, &setup.folder)?;
    let sides = [Side::Ours, Side::Limit, Side::Polled(OFTEN, sharing), Side::Polled(SELDOM, sharing)];
    let half = bench.half_loads(sides)?;
    println!("{:<10} {:<16} {:>9} {:>9} {:>9}", "load", "", "events/s", "p50, ms", "p99, ms");
    let idle = bench.rounds("idle", 1, bench.idle_stretch, sides.map(|side| (side, Pace::Every(IDLE))))?;
    bench.rounds("half", WRITERS, bench.half_stretch, half)?;
    let [ours, limit, often, _] = idle;
    let reported = |ours: f64, peer: f64, what: &str| {
        format!("{:.2} ms over {:.2} of {what}, idle", ours * 1e3, peer * 1e3)
    };
    let mut report = Report::default();
    let about = reported(ours.p50, limit.p50, "fdatasync and a bare publish");
    report.add("latency_p50_vs_limit", ours.p50 / limit.p50, Goal::AtMost(1.3), about);
    let about = reported(ours.p99, limit.p99, "fdatasync and a bare publish");
    report.add("latency_p99_vs_limit", ours.p99 / limit.p99, Goal::AtMost(3.0), about);
    let about = reported(ours.p50, often.p50, "SQLite polled every 10 ms");
    report.add("latency_p50_vs_poll10", ours.p50 / often.p50, Goal::None, about);
    Ok(report)
}

struct Bench<'a> {
    setup: &'a Setup,
    node: &'a Node,
    rounds: usize,
    /// Longer, since fewer events come in it.
    idle_stretch: Duration,
    half_stretch: Duration,
}

/// In seconds.
#[derive(Debug, Clone, Copy)]
struct Latency {
    p50: f64,
    p99: f64,
    /// Events per second.
    rate: f64,
}

impl Latency {
    /// Of each figure the median over the rounds.
    fn median(rounds: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
        Self { p50: of(|round| round.p50), p99: of(|round| round.p99), rate: of(|round| round.rate) }
    }
}

impl Bench<'_> {
    fn half_loads(&self, sides: [Side; 4]) -> Result<[(Side, Pace); 4], Box<dyn Error>> {
        let mut loads = sides.map(|side| (side, Pace::Full));
        for (side, pace) in &mut loads {
            let sustained = sustained(*side, self.node, &self.setup.folder, self.half_stretch)?;
            *pace = Pace::per_second(sustained.rate / 2.0, WRITERS);
        }
        Ok(loads)
    }

    fn rounds<const N: usize>(
        &self,
        load: &str,
        writers: usize,
        stretch: Duration,
        sides: [(Side, Pace); N],
    ) -> Result<[Latency; N], Box<dyn Error>> {
        let mut latencies = [const { Vec::new() }; N];
        for round in 0..self.rounds {
            for index in (0..N).map(|index| (index + round) % N) {
                let (side, pace) = sides[index];
                latencies[index].push(self.measure(side, writers, stretch, pace)?);
            }
        }
        let latencies = latencies.map(|rounds| Latency::median(&rounds));
        for ((side, _), Latency { p50, p99, rate }) in sides.iter().zip(latencies) {
            println!("{load:<10} {side:<16} {rate:>9.0} {:>9.2} {:>9.2}", p50 * 1e3, p99 * 1e3);
        }
        Ok(latencies)
    }

    fn measure(
        &self,
        side: Side,
        writers: usize,
        stretch: Duration,
        pace: Pace,
    ) -> Result<Latency, Box<dyn Error>> {
        let flow = Flow::start(side, writers, self.node, &self.setup.folder)?;
        flow.run(pace, |flow| {
            std::thread::sleep(WARM_UP);
            drop(flow.tap.take_latencies());
            std::thread::sleep(stretch);
            let latencies = flow.tap.take_latencies();
            if latencies.is_empty() {
                return Err(format!("{side}: nothing was delivered").into());
            }
            Ok(Latency {
                p50: percentile(&latencies, 0.5),
                p99: percentile(&latencies, 0.99),
                rate: latencies.len() as f64 / stretch.as_secs_f64(),
            })
        })
    }
}
