//! The conductor: a private broker, the processes, the faults, the end, the judge.

mod faults;
mod options;
mod processes;
mod proxy;
mod topology;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use onewrite_torture_checker::formats::Run;

use self::faults::{Scene, broker_track, locked, process_track};
use self::options::{Options, Timetable};
use self::processes::Process;
use self::proxy::Proxy;
use self::topology::Admin;
use crate::Result;
use crate::plan::{Plan, QUEUE, TAP_QUEUE};
use crate::support::rabbit::RabbitNode;

/// The applications. The first keeps its log, the second trims what was delivered.
const APPS: [&str; 2] = ["a0", "a1"];
const CONSUMER: &str = "c0";
/// What is left after the last fault must be delivered within this time, and as long again for each so many events that wait.
const DRAIN: Duration = Duration::from_secs(60);
const DRAIN_EVENTS: u64 = 30_000;
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Exit 0: every promise was kept. 1: one was broken, or the run itself failed.
pub(crate) fn main(arguments: Vec<String>) -> ExitCode {
    let options = match Options::parse(&arguments) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("torture: {error}");
            return ExitCode::from(2);
        }
    };
    let now_ms = now_ms();
    let times = options.timetable(now_ms % 1_000_000);
    let folder = match tempfile::Builder::new().prefix("onewrite-torture-").tempdir() {
        Ok(folder) => folder.keep(),
        Err(error) => {
            eprintln!("torture: no temporary folder: {error}");
            return ExitCode::from(2);
        }
    };
    println!("torture: seed {}, {times:?}, in {}", times.seed, folder.display());
    let clean = match conduct(&folder, &times).and_then(|()| judge(&folder)) {
        Ok(clean) => clean,
        Err(error) => {
            eprintln!("torture: {error}");
            false
        }
    };
    if !clean && !options.mistakes {
        eprintln!("torture: FAILED with seed {}; everything is kept in {}", times.seed, folder.display());
        return ExitCode::FAILURE;
    }
    if !options.keep
        && let Err(error) = std::fs::remove_dir_all(&folder)
    {
        eprintln!("torture: {} cannot be removed: {error}", folder.display());
    }
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}

fn conduct(folder: &Path, times: &Timetable) -> Result<()> {
    std::fs::create_dir(folder.join("hist"))?;
    let mut node = RabbitNode::start();
    Admin::connect(&node.url())?.declare_all()?;
    node.settle_declarations();
    let scene = set(folder, times, &node)?;
    let played = play(&scene, times, &mut node);
    let ended = played.and_then(|()| {
        eprintln!("torture: faults are over after {:.0} s; draining", scene.began.elapsed().as_secs_f64());
        end(&scene, &node)
    });
    let run = Run {
        seed: times.seed,
        apps: APPS.map(str::to_owned).to_vec(),
        keep_logs: APPS.iter().filter(|name| !trims(name)).map(|name| (*name).to_owned()).collect(),
        consumer: CONSUMER.to_owned(),
        app_kills: scene.app_kills.load(Ordering::SeqCst),
        broker_kills: scene.broker_kills.load(Ordering::SeqCst),
        faults: scene.faults.load(Ordering::SeqCst),
    };
    std::fs::write(folder.join("run.json"), serde_json::to_vec(&run)?)?;
    ended
}

/// The first application keeps its log.
fn trims(app: &str) -> bool {
    app != APPS[0]
}

/// Starts everything.
fn set(folder: &Path, times: &Timetable, node: &RabbitNode) -> Result<Scene> {
    let proxies = (0..=APPS.len()).map(|_| Proxy::start(node.port())).collect::<Result<Vec<_>>>()?;
    let began_ms = now_ms();
    let apps = APPS.len() as u64;
    let plan = |name: &str, url: String| Plan {
        folder: folder.to_owned(),
        name: name.to_owned(),
        url,
        seed: times.seed,
        life: 0,
        began_ms,
        rate: times.rate.div_ceil(apps),
        quota: times.events.map(|events| events.div_ceil(apps)),
        trims: trims(name),
    };
    let through = |proxy: &Proxy| format!("amqp://guest:guest@127.0.0.1:{}", proxy.port);
    let tap = Process::start("tap", plan("tap", format!("amqp://guest:guest@127.0.0.1:{}", node.port())))?;
    let consumer = Process::start("consume", plan(CONSUMER, through(&proxies[APPS.len()])))?;
    let apps = APPS
        .iter()
        .zip(&proxies)
        .map(|(name, proxy)| Ok(Mutex::new(Process::start("app", plan(name, through(proxy)))?)))
        .collect::<Result<_>>()?;
    Ok(Scene {
        began: Instant::now(),
        over: AtomicBool::new(false),
        app_kills: AtomicU64::new(0),
        broker_kills: AtomicU64::new(0),
        faults: AtomicU64::new(0),
        apps,
        consumer: Mutex::new(consumer),
        tap: Mutex::new(tap),
        proxies,
        log: Mutex::new(File::create(folder.join("faults.log"))?),
    })
}

/// Lets faults happen until the time is over and all quotas are reached.
fn play(scene: &Scene, times: &Timetable, node: &mut RabbitNode) -> Result<()> {
    std::thread::scope(|scope| {
        let tracks = [
            scope.spawn(|| ending(scene, || broker_track(scene, times, node))),
            scope.spawn(|| ending(scene, || process_track(scene, times))),
        ];
        let (mut reported, mut ran) = (Instant::now(), Ok(()));
        while !scene.over.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(100));
            if reported.elapsed() > REPORT_EVERY {
                reported = Instant::now();
                report(scene);
            }
            let alive = all_run(scene);
            if alive.is_err() || is_reached(scene, times) {
                scene.over.store(true, Ordering::SeqCst);
            }
            ran = alive;
        }
        let tracks =
            tracks.into_iter().map(|track| track.join().map_err(|_| "a track of faults panicked")?);
        tracks.collect::<Vec<_>>().into_iter().collect::<Result<()>>().and(ran)
    })
}

/// Fails if one has ended that nobody has killed. One that is just being killed is locked.
fn all_run(scene: &Scene) -> Result<()> {
    let processes = scene.apps.iter().chain([&scene.consumer, &scene.tap]);
    for process in processes {
        if let Ok(mut process) = process.try_lock() {
            process.still_runs()?;
        }
    }
    Ok(())
}

/// Whoever ends, ends the play.
fn ending(scene: &Scene, track: impl FnOnce() -> Result<()>) -> Result<()> {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let _over = Over(&scene.over);
    track()
}

fn is_reached(scene: &Scene, times: &Timetable) -> bool {
    let events: u64 = scene.apps.iter().map(|app| locked(app).progress().events).sum();
    scene.began.elapsed() >= times.time
        && scene.app_kills.load(Ordering::SeqCst) >= times.app_kills
        && scene.broker_kills.load(Ordering::SeqCst) >= times.broker_kills
        && times.events.is_none_or(|quota| events >= quota)
}

fn report(scene: &Scene) {
    let reported: Vec<_> = scene.apps.iter().map(|app| locked(app).progress()).collect();
    eprintln!(
        "torture: {:5.0} s, {} events in the log, {} wait for the broker, {} app kills, {} broker kills, {} faults",
        scene.began.elapsed().as_secs_f64(),
        reported.iter().map(|progress| progress.events).sum::<u64>(),
        reported.iter().map(|progress| progress.backlog).sum::<u64>(),
        scene.app_kills.load(Ordering::SeqCst),
        scene.broker_kills.load(Ordering::SeqCst),
        scene.faults.load(Ordering::SeqCst),
    );
}

/// Everything is healed: what waits is delivered and applied, then all end by themselves.
fn end(scene: &Scene, node: &RabbitNode) -> Result<()> {
    scene.proxies.iter().for_each(Proxy::heal);
    let backlog: u64 = scene.apps.iter().map(|app| locked(app).progress().backlog).sum();
    let timeout = DRAIN * u32::try_from(1 + backlog / DRAIN_EVENTS).unwrap_or(u32::MAX);
    let until = Instant::now() + timeout;
    for app in &scene.apps {
        locked(app).ask_to_end()?;
    }
    let mut reported = Instant::now();
    while Instant::now() < until && scene.apps.iter().any(|app| locked(app).still_runs().is_ok()) {
        std::thread::sleep(Duration::from_millis(100));
        if reported.elapsed() > REPORT_EVERY {
            reported = Instant::now();
            report(scene);
        }
    }
    for app in &scene.apps {
        let mut app = locked(app);
        match app.await_end(Duration::ZERO)? {
            Some(status) if status.success() => {}
            Some(status) => return Err(format!("{} ended with {status}", app.name()).into()),
            // The judge will say what is missing.
            None => {
                eprintln!("torture: {} still has {:?} after {timeout:?}", app.name(), app.progress());
                app.kill()?;
            }
        }
    }
    let admin = Admin::connect(&node.url())?;
    finish(&admin, &scene.consumer, QUEUE, until + DRAIN)?;
    finish(&admin, &scene.tap, TAP_QUEUE, until + DRAIN)
}

/// Ends one that reads a queue, once the queue is empty: also of what it had in hand when it ended.
fn finish(admin: &Admin, process: &Mutex<Process>, queue: &str, until: Instant) -> Result<()> {
    let mut process = locked(process);
    loop {
        while admin.ready(queue)? > 0 && Instant::now() < until {
            process.still_runs()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        process.ask_to_end()?;
        match process.await_end(DRAIN)? {
            Some(status) if status.success() => {}
            status => return Err(format!("{} did not end well: {status:?}", process.name()).into()),
        }
        let left = admin.ready(queue)?;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > until {
            // The judge will say what is missing.
            eprintln!("torture: {queue} still has {left} messages, though {} has ended well", process.name());
            return Ok(());
        }
        process.restart()?;
    }
}

/// Runs the checker, a program of its own, and lets it have the last line.
fn judge(folder: &Path) -> Result<bool> {
    let checker: PathBuf = std::env::current_exe()?.with_file_name("torture-check");
    let status = Command::new(&checker)
        .arg(folder)
        .status()
        .map_err(|error| format!("{}: {error}", checker.display()))?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(format!("the checker could not judge: {status}").into()),
    }
}
