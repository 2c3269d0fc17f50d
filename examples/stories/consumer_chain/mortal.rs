//! A service as the supervisor sees it: started, killed at its time, started again, stopped.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use onewrite::BoxError;

use crate::child::Child;
use crate::dice::Dice;
use crate::plan::{PLAN, Plan, Progress, Role};

/// How often each service is killed.
pub(crate) const KILLS: u32 = 3;
/// The longest time that a killed service stays away, in milliseconds.
const AWAY_MS_MAX: u64 = 400;
/// The longest time that a service may take to end.
const TIMEOUT: Duration = Duration::from_secs(15);

pub(crate) struct Mortal {
    plan: Plan,
    /// `None` while it is dead.
    child: Option<Child<Progress>>,
    kills: VecDeque<Kill>,
    back_at: Duration,
    pub(crate) happened: Happened,
    /// Why the service could not go on.
    pub(crate) problem: Option<String>,
}

impl Mortal {
    /// Starts it. The same seed kills it at the same moments.
    pub(crate) fn start(plan: &Plan, seed: u64, writing: Duration) -> Result<Self, BoxError> {
        Ok(Self {
            plan: plan.clone(),
            child: Some(Child::start(PLAN, plan)?),
            kills: kills(seed, plan.role, writing),
            back_at: Duration::ZERO,
            happened: Happened { role: plan.role, kills: 0, repeated: 0, rejected: 0 },
            problem: None,
        })
    }

    pub(crate) fn role(&self) -> Role {
        self.plan.role
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.child.is_none()
    }

    /// Whether it was killed as often as it had to be.
    pub(crate) fn has_lived(&self) -> bool {
        self.kills.is_empty()
    }

    /// The newest line of this life.
    pub(crate) fn progress(&self) -> Progress {
        self.child.as_ref().map(Child::progress).unwrap_or_default()
    }

    /// Kills or starts the service if that is due. Returns a line for the reader.
    pub(crate) fn attend(&mut self, now: Duration) -> Result<Option<String>, BoxError> {
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

    /// Keeps the newest line: the figures of a life end with that life.
    fn bury(&mut self) {
        let last = self.progress();
        self.happened.repeated += last.repeated;
        self.happened.rejected += last.rejected;
        self.child = None;
    }

    /// Asks the service to finish. Returns `false` if it does not, or not well.
    pub(crate) fn end(&mut self) -> Result<bool, BoxError> {
        let Some(child) = &mut self.child else { return Ok(false) };
        child.finish();
        let asked = Instant::now();
        let status = loop {
            match child.ended()? {
                Some(status) => break status,
                None if asked.elapsed() > TIMEOUT => return Ok(false),
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        self.bury();
        Ok(status.success())
    }
}

/// The figures of a service over all its lives.
#[derive(Debug)]
pub(crate) struct Happened {
    pub(crate) role: Role,
    pub(crate) kills: u32,
    /// Deliveries that the service recognised as repeats, as of its newest line before each kill.
    pub(crate) repeated: u64,
    pub(crate) rejected: u64,
}

/// A kill to come: when, and how long the service stays away.
#[derive(Debug, Clone, Copy)]
struct Kill {
    at: Duration,
    away: Duration,
}

/// One kill in each stretch of the time of the requests, at a random moment of the stretch.
fn kills(seed: u64, role: Role, writing: Duration) -> VecDeque<Kill> {
    let mut dice = Dice::new(seed.wrapping_mul(3).wrapping_add(role as u64));
    let stretch = writing / KILLS;
    let kill = |number| Kill {
        at: stretch * number + stretch * dice.roll(1_000) as u32 / 1_000,
        away: Duration::from_millis(dice.roll(AWAY_MS_MAX)),
    };
    (0..KILLS).map(kill).collect()
}
