//! Starts the payment service, kills it at a third of its work, takes the broker away at two thirds, and tells how
//! it goes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use onewrite::{BoxError, Consumer, ConsumerStats};

use crate::broker::Broker;
use crate::payment_service::{PLAN, Plan, Progress};
use crate::{DEADLINE, TRANSFERS};

/// How long the broker is away.
const OUTAGE: Duration = Duration::from_secs(2);
/// Between two lines of progress.
const LINE: Duration = Duration::from_millis(500);

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) kills: u32,
    pub(crate) outages: u32,
    /// Requests that were asked for again after the kill, and recognised.
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
    let mut service = PaymentService::start(plan)?;
    let mut events = Events::default();
    let (started, writing) = (Instant::now(), Duration::from_secs(plan.seconds));
    let mut back_at = None;
    let mut next_line = Instant::now();
    let mut told_to_finish = false;
    // The child's figures are a moment old. Ours are shown as they were a moment before, so that none runs ahead.
    let (mut shown, mut credit, mut next_credit) = (Progress::default(), consumer.stats(), consumer.stats());
    let say = |text: &str| println!("{:5.1} s  {text}", begin.elapsed().as_secs_f64());
    loop {
        let progress = service.progress();
        if progress != shown {
            credit = std::mem::replace(&mut next_credit, consumer.stats());
            shown = progress.clone();
        }
        // On a disk that cannot keep the pace, time decides.
        let passed = |thirds: u32| {
            progress.committed >= u64::from(TRANSFERS * thirds / 3)
                || started.elapsed() > writing * thirds / 2
        };
        if events.kills == 0 && passed(1) {
            say("kill -9 of the payment service, which is started again at once");
            service.kill()?;
            service = PaymentService::start(plan)?;
            events.kills += 1;
        } else if events.outages == 0 && passed(2) {
            say("the broker goes away");
            broker.go_away();
            events.outages += 1;
            back_at = Some(Instant::now() + OUTAGE);
        } else if !told_to_finish && started.elapsed() > writing * 2 {
            say("this disk is slow: no more transfers are asked for");
            service.finish();
            told_to_finish = true;
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
            say(&line(&service.progress(), &consumer.stats()));
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

fn line(progress: &Progress, credit: &ConsumerStats) -> String {
    let Progress { committed, confirmed, connected, .. } = progress;
    let broker = if *connected { "" } else { "   (no broker)" };
    format!(
        "committed {committed:>6}   confirmed {confirmed:>6}   offers updated {:>6}   repeats dropped {:>4}{broker}",
        credit.applied, credit.repeated
    )
}

/// The child process. Dropping it kills it.
struct PaymentService {
    child: Child,
    orders: ChildStdin,
    progress: Arc<Mutex<Progress>>,
    /// Reads the child's output to its end.
    reader: Option<thread::JoinHandle<()>>,
}

impl PaymentService {
    fn start(plan: &Plan) -> Result<Self, BoxError> {
        let mut child = Command::new(std::env::current_exe()?)
            .env(PLAN, serde_json::to_string(plan)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (orders, output) = child.stdin.take().zip(child.stdout.take()).ok_or("the child has no pipes")?;
        let progress = Arc::<Mutex<Progress>>::default();
        let newest = Arc::clone(&progress);
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(line) = serde_json::from_str(&line) {
                    *newest.lock().unwrap_or_else(PoisonError::into_inner) = line;
                }
            }
        });
        Ok(Self { child, orders, progress, reader: Some(reader) })
    }

    fn progress(&self) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `SIGKILL`, and waits until it is gone: its file is free then.
    fn kill(&mut self) -> std::io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    fn finish(&mut self) {
        // It fails only if the child is gone, which is noticed elsewhere.
        let _ = self.orders.write_all(b"finish\n");
    }

    fn ended(&mut self) -> std::io::Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some()
            && let Some(reader) = self.reader.take()
        {
            let _ = reader.join();
        }
        Ok(status)
    }
}

impl Drop for PaymentService {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
