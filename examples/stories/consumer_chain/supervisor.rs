//! Runs the three services while clients send requests, waits until everything has drained, and
//! stops the services in good order. `mortal` decides when each of them dies on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use onewrite::BoxError;

use crate::DEADLINE;
use crate::broker::Broker;
use crate::clients::{self, Desk, REQUESTS};
use crate::mortal::{Happened, Mortal};
use crate::plan::{Plan, Progress, Role};

/// Between two lines of progress.
const LINE: Duration = Duration::from_millis(500);
/// After this time without news everything has drained. Late repeats come soon after the last
/// delivery.
const QUIET: Duration = Duration::from_millis(500);

/// The events of a run.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) seed: u64,
    pub(crate) services: Vec<Happened>,
    pub(crate) answered: u64,
    pub(crate) asked_again: u64,
    pub(crate) recognised: u64,
    /// Why the story did not reach its end.
    pub(crate) problem: Option<String>,
}

/// Runs the services to their end.
pub(crate) fn run(plans: &[Plan], broker: &Broker, seed: u64, begin: Instant) -> Result<Events, BoxError> {
    let desk = Arc::<Desk>::default();
    let mut services = Vec::new();
    for plan in plans {
        services.push(Mortal::start(plan, seed, broker.writing())?);
    }
    let clients = clients::start(&desk, seed, broker.writing());
    let mut story = Story { services, desk: Arc::clone(&desk), begin, started: Instant::now() };
    let problem = story.tell(broker.timeout())?;
    desk.close();
    for client in clients {
        client.join().map_err(|_| "a client panicked")?;
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Ok(Events {
        seed,
        services: story.services.into_iter().map(|service| service.happened).collect(),
        answered: count(&desk.answered),
        asked_again: count(&desk.asked_again),
        recognised: count(&desk.recognised),
        problem,
    })
}

struct Story {
    services: Vec<Mortal>,
    desk: Arc<Desk>,
    begin: Instant,
    started: Instant,
}

impl Story {
    /// Waits until everything has drained and the services have ended. Returns the problem, if any.
    fn tell(&mut self, timeout: Duration) -> Result<Option<String>, BoxError> {
        let mut before = Vec::new();
        let mut since = Instant::now();
        let mut next_line = Instant::now();
        loop {
            for service in &mut self.services {
                if let Some(news) = service.attend(self.started.elapsed())? {
                    println!("{:5.1} s  {news}", self.begin.elapsed().as_secs_f64());
                }
                if let Some(problem) = &service.problem {
                    return Ok(Some(problem.clone()));
                }
                if service.role() == Role::Orders {
                    self.desk.move_to(service.progress().desk);
                }
            }
            let now: Vec<Progress> = self.services.iter().map(Mortal::progress).collect();
            if now != before {
                (before, since) = (now, Instant::now());
            }
            if Instant::now() >= next_line {
                self.say();
                next_line = Instant::now() + LINE;
            }
            if self.begin.elapsed() > DEADLINE {
                return Ok(Some(format!("it was not done after {} s", DEADLINE.as_secs())));
            }
            let done = self.services.iter().all(Mortal::has_lived) && self.has_drained();
            if since.elapsed() > if done { QUIET } else { timeout } {
                self.say();
                return self.end();
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn has_drained(&self) -> bool {
        let drained = |service: &Mortal| {
            let Progress { orders, backlog, .. } = service.progress();
            orders == u64::from(REQUESTS) && backlog == 0
        };
        self.desk.answered.load(Ordering::Relaxed) == u64::from(REQUESTS) && self.services.iter().all(drained)
    }

    fn say(&self) {
        let mut line = format!(
            "{:5.1} s  answered {:>5}",
            self.begin.elapsed().as_secs_f64(),
            self.desk.answered.load(Ordering::Relaxed)
        );
        for service in &self.services {
            line += &match service.progress() {
                _ if service.is_dead() => format!("   {}  dead", service.role()),
                // The service has printed nothing yet.
                Progress { orders: 0, .. } => format!("   {}     .", service.role()),
                Progress { orders, .. } => format!("   {} {orders:>5}", service.role()),
            };
        }
        println!("{line}");
    }

    /// Ends the services in their order, so that the next one still takes in the last events.
    fn end(&mut self) -> Result<Option<String>, BoxError> {
        for service in &mut self.services {
            if !service.end()? {
                return Ok(Some(format!("{} did not end when asked to", service.role())));
            }
        }
        Ok(None)
    }
}
