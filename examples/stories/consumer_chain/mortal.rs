//! A service, as the supervisor has it: started, killed when its time has come, started again, and stopped at last.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use onewrite::BoxError;

use crate::child::Child;
use crate::dice::Dice;
use crate::plan::{PLAN, Plan, Progress, Role};

/// How often each service is killed.
pub(crate) const KILLS: u32 = 3;
/// How long a killed one stays away at most, in milliseconds.
const AWAY_MS_MAX: u64 = 400;
/// How long one may take to end when told to.
const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) struct Mortal {
    plan: Plan,
    /// `None` while it is dead.
    child: Option<Child<Progress>>,
    kills: VecDeque<Kill>,
    back_at: Duration,
    pub(crate) happened: Happened,
    /// Why it did not live on.
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

    /// What it told last in this life.
    pub(crate) fn progress(&self) -> Progress {
        self.child.as_ref().map(Child::progress).unwrap_or_default()
    }

    /// Does to it what is due; returns what is worth telling.
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

    /// Keeps what it told last: the figures of a life end with it.
    fn bury(&mut self) {
        let last = self.progress();
        self.happened.repeated += last.repeated;
        self.happened.rejected += last.rejected;
        self.child = None;
    }

    /// Tells it to finish. `false` if it does not, or not well.
    pub(crate) fn end(&mut self) -> Result<bool, BoxError> {
        let Some(child) = &mut self.child else { return Ok(false) };
        child.finish();
        let told = Instant::now();
        let status = loop {
            match child.ended()? {
                Some(status) => break status,
                None if told.elapsed() > PATIENCE => return Ok(false),
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        self.bury();
        Ok(status.success())
    }
}

/// What happened to it, over all its lives.
#[derive(Debug)]
pub(crate) struct Happened {
    pub(crate) role: Role,
    pub(crate) kills: u32,
    /// Deliveries that it recognised as repeats, as far as it had told before each kill.
    pub(crate) repeated: u64,
    pub(crate) rejected: u64,
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
