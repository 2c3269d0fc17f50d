//! Starts the payment service, kills it at a third of its work, takes the broker away at two
//! thirds, and prints the progress.

use std::thread;
use std::time::{Duration, Instant};

use onewrite::{BoxError, Consumer, ConsumerStatus};

use crate::broker::Broker;
use crate::child::Child;
use crate::payment_service::{PLAN, Plan, Progress};
use crate::{DEADLINE, TRANSFERS};

/// How long the broker is away.
const OUTAGE: Duration = Duration::from_secs(2);
/// Between two lines of progress.
const LINE: Duration = Duration::from_millis(500);

/// The events of a run.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) kills: u32,
    pub(crate) outages: u32,
    /// Requests that tellers repeated after the kill, and the store recognised.
    pub(crate) asked_again: u64,
    /// Why the payment service did not come to its end.
    pub(crate) problem: Option<String>,
}

/// Runs the payment service to its end.
pub(crate) fn run(
    plan: &Plan,
    broker: &Broker,
    consumer: &Consumer,
    begin: Instant,
) -> Result<Events, BoxError> {
    let mut service = Child::<Progress>::start(PLAN, plan)?;
    let mut events = Events::default();
    let (started, writing) = (Instant::now(), Duration::from_secs(plan.seconds));
    let mut back_at = None;
    let mut next_line = Instant::now();
    let mut asked_to_finish = false;
    // The figures of the child are a moment old. So this process shows its own figures of a moment
    // before.
    let (mut shown, mut credit, mut next_credit) =
        (Progress::default(), consumer.status(), consumer.status());
    let say = |text: &str| println!("{:5.1} s  {text}", begin.elapsed().as_secs_f64());
    loop {
        let progress = service.progress();
        if progress != shown {
            credit = std::mem::replace(&mut next_credit, consumer.status());
            shown = progress.clone();
        }
        // On a disk that cannot keep the pace, the time decides.
        let passed = |thirds: u32| {
            progress.committed >= u64::from(TRANSFERS * thirds / 3)
                || started.elapsed() > writing * thirds / 2
        };
        if events.kills == 0 && passed(1) {
            say("kill -9 of the payment service, which is started again at once");
            service.kill()?;
            service = Child::start(PLAN, plan)?;
            events.kills += 1;
        } else if events.outages == 0 && passed(2) {
            say("the broker goes away");
            broker.go_away();
            events.outages += 1;
            back_at = Some(Instant::now() + OUTAGE);
        } else if !asked_to_finish && started.elapsed() > writing * 2 {
            say("this disk is slow: no more transfers are asked for");
            service.finish();
            asked_to_finish = true;
        }
        if back_at.is_some_and(|at| at <= Instant::now()) {
            say("the broker is back");
            broker.come_back();
            back_at = None;
        }
        if Instant::now() >= next_line {
            say(&line(&progress, &credit));
            next_line = Instant::now() + LINE;
        }
        events.asked_again = progress.asked_again;
        if back_at.is_none()
            && let Some(status) = service.ended()?
        {
            say(&line(&service.progress(), &consumer.status()));
            events.problem = (!status.success()).then(|| format!("it ended by itself: {status}"));
            return Ok(events);
        }
        if begin.elapsed() > DEADLINE {
            service.kill()?;
            events.problem = Some(format!("it was not done after {} s", DEADLINE.as_secs()));
            return Ok(events);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn line(progress: &Progress, credit: &ConsumerStatus) -> String {
    let Progress { committed, confirmed, connected, .. } = progress;
    let broker = if *connected { "" } else { "   (no broker)" };
    format!(
        "committed {committed:>6}   confirmed {confirmed:>6}   offers updated {:>6}   repeats dropped {:>4}{broker}",
        credit.applied, credit.repeated
    )
}
