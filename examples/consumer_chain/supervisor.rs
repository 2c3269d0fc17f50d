//! Starts the three services, kills each of them at random moments while clients ask for orders, starts them again,
//! waits until everything has drained, and stops them in good order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use onewrite::BoxError;

use crate::DEADLINE;
use crate::broker::Broker;
use crate::child::Child;
use crate::clients::{self, Desk, REQUESTS};
use crate::dice::Dice;
use crate::plan::{PLAN, Plan, Progress, Role};

/// How often each service is killed.
pub(crate) const KILLS: u32 = 3;
/// How long a killed one stays away at most, in milliseconds.
const AWAY_MS_MAX: u64 = 400;
/// Between two lines of progress.
const LINE: Duration = Duration::from_millis(500);
/// Nothing more has come for so long: everything has drained. Late repeats come right behind.
const QUIET: Duration = Duration::from_millis(500);

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) seed: u64,
    pub(crate) services: Vec<Happened>,
    pub(crate) answered: u64,
    pub(crate) asked_again: u64,
    pub(crate) recognised: u64,
    /// Why the story did not come to its end.
    pub(crate) problem: Option<String>,
}

/// To one service.
#[derive(Debug)]
pub(crate) struct Happened {
    pub(crate) role: Role,
    pub(crate) kills: u32,
    /// Deliveries that it recognised as repeats, as far as it had told before each kill.
    pub(crate) repeated: u64,
    pub(crate) rejected: u64,
}

/// Runs the services to their end.
pub(crate) fn run(plans: &[Plan], broker: &Broker, seed: u64, begin: Instant) -> Result<Events, BoxError> {
    let desk = Arc::<Desk>::default();
    let mut services = Vec::new();
    for plan in plans {
        services.push(Service::start(plan, kills(seed, plan.role, broker.writing()))?);
    }
    let clients = clients::start(&desk, seed, broker.writing());
    let mut story = Story { services, desk: Arc::clone(&desk), begin, started: Instant::now() };
    let problem = story.tell(broker.patience())?;
    desk.close();
    for client in clients {
        client.join().map_err(|_| "a client panicked")?;
    }
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Ok(Events {
        seed,
        services: story.services.into_iter().map(|service| service.happened).collect(),
        answered: count(&desk.answered),
        asked_again: count(&desk.asked_again),
        recognised: count(&desk.recognised),
        problem,
    })
}

/// A kill to come: when, and how long the service stays away.
#[derive(Debug, Clone, Copy)]
struct Kill {
    at: Duration,
    away: Duration,
}

/// One in each stretch of the time in which orders are asked for, anywhere in it.
fn kills(seed: u64, role: Role, writing: Duration) -> VecDeque<Kill> {
    let mut dice = Dice::new(seed.wrapping_mul(3).wrapping_add(role as u64));
    let stretch = writing / KILLS;
    let kill = |number| Kill {
        at: stretch * number + stretch * dice.roll(1_000) as u32 / 1_000,
        away: Duration::from_millis(dice.roll(AWAY_MS_MAX)),
    };
    (0..KILLS).map(kill).collect()
}

struct Story {
    services: Vec<Service>,
    desk: Arc<Desk>,
    begin: Instant,
    started: Instant,
}

impl Story {
    /// Until everything has drained and the services have ended. Returns what went wrong, if anything did.
    fn tell(&mut self, patience: Duration) -> Result<Option<String>, BoxError> {
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
                if service.plan.role == Role::Orders {
                    self.desk.move_to(service.progress().desk);
                }
            }
            let now: Vec<Progress> = self.services.iter().map(Service::progress).collect();
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
            let killed = self.services.iter().all(|service| service.kills.is_empty());
            if killed && ((self.has_drained() && since.elapsed() > QUIET) || since.elapsed() > patience) {
                self.say();
                return self.end();
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn has_drained(&self) -> bool {
        let drained = |service: &Service| {
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
                _ if service.child.is_none() => format!("   {}  dead", service.plan.role),
                // It has not told anything yet.
                Progress { orders: 0, .. } => format!("   {}     .", service.plan.role),
                Progress { orders, .. } => format!("   {} {orders:>5}", service.plan.role),
            };
        }
        println!("{line}");
    }

    /// In the order of the row, so that what one sends on while it ends is still taken in by the next.
    fn end(&mut self) -> Result<Option<String>, BoxError> {
        for service in &mut self.services {
            if !service.end()? {
                return Ok(Some(format!("{} did not end when told to", service.plan.role)));
            }
        }
        Ok(None)
    }
}

struct Service {
    plan: Plan,
    /// `None` while it is dead.
    child: Option<Child<Progress>>,
    kills: VecDeque<Kill>,
    back_at: Duration,
    happened: Happened,
    problem: Option<String>,
}

impl Service {
    fn start(plan: &Plan, kills: VecDeque<Kill>) -> Result<Self, BoxError> {
        Ok(Self {
            plan: plan.clone(),
            child: Some(Child::start(PLAN, plan)?),
            kills,
            back_at: Duration::ZERO,
            happened: Happened { role: plan.role, kills: 0, repeated: 0, rejected: 0 },
            problem: None,
        })
    }

    fn progress(&self) -> Progress {
        self.child.as_ref().map(Child::progress).unwrap_or_default()
    }

    /// Does to it what is due; returns what is worth telling.
    fn attend(&mut self, now: Duration) -> Result<Option<String>, BoxError> {
        let role = self.plan.role;
        let Some(child) = &mut self.child else {
            if now < self.back_at {
                return Ok(None);
            }
            self.child = Some(Child::start(PLAN, &self.plan)?);
            return Ok(Some(format!("{role} is started again")));
        };
        if let Some(status) = child.ended()? {
            self.problem = Some(format!("{role} ended by itself: {status}"));
            return Ok(None);
        }
        // A kill waits while there is nothing to lose yet.
        let at_work = child.progress().orders > 0;
        let Some(kill) = self.kills.front().copied().filter(|kill| kill.at <= now && at_work) else {
            return Ok(None);
        };
        self.kills.pop_front();
        child.kill()?;
        self.bury();
        self.happened.kills += 1;
        self.back_at = now + kill.away;
        Ok(Some(format!("kill -9 of {role}, which stays away for {} ms", kill.away.as_millis())))
    }

    /// Keeps what it told last.
    fn bury(&mut self) {
        let last = self.progress();
        self.happened.repeated += last.repeated;
        self.happened.rejected += last.rejected;
        self.child = None;
    }

    /// Tells it to finish. `false` if it does not, or not well.
    fn end(&mut self) -> Result<bool, BoxError> {
        let Some(child) = &mut self.child else { return Ok(false) };
        child.finish();
        let told = Instant::now();
        let status = loop {
            match child.ended()? {
                Some(status) => break status,
                None if told.elapsed() > Duration::from_secs(15) => return Ok(false),
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        self.bury();
        Ok(status.success())
    }
}
