//! The faults, drawn by seed on two tracks at once: what happens to the broker and to what is declared there, and what happens to
//! processes and their connections. Each fault ends what it began before its track goes on.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use onewrite_torture_checker::formats::EXCHANGES;

use super::options::Timetable;
use super::processes::Process;
use super::proxy::Proxy;
use super::topology::Admin;
use crate::Result;
use crate::random::Random;
use crate::support::rabbit::RabbitNode;

/// What the tracks share with the conductor.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) began: Instant,
    pub(super) over: AtomicBool,
    pub(super) app_kills: AtomicU64,
    pub(super) broker_kills: AtomicU64,
    /// All faults, kills included.
    pub(super) faults: AtomicU64,
    pub(super) apps: Vec<Mutex<Process>>,
    pub(super) consumer: Mutex<Process>,
    pub(super) tap: Mutex<Process>,
    /// One for each application, and the consumer's.
    pub(super) proxies: Vec<Proxy>,
    pub(super) log: Mutex<File>,
}

impl Scene {
    pub(super) fn note(&self, what: &str) -> Result<()> {
        self.faults.fetch_add(1, Ordering::SeqCst);
        let at = self.began.elapsed().as_secs_f64();
        Ok(writeln!(self.log.lock().unwrap_or_else(PoisonError::into_inner), "{at:9.3} {what}")?)
    }

    /// Sleeps, but not beyond the end.
    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.is_over() && Instant::now() < until {
            std::thread::sleep(pause.min(Duration::from_millis(20)));
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills, evenly over the time.
struct Schedule {
    every: Duration,
    left: u64,
    next: Duration,
}

impl Schedule {
    fn new(time: Duration, kills: u64) -> Self {
        let every = time / u32::try_from(kills.max(1)).unwrap_or(u32::MAX);
        Self { every, left: kills, next: every / 2 }
    }

    fn is_due(&mut self, scene: &Scene, random: &mut Random) -> bool {
        if self.left == 0 || scene.began.elapsed() < self.next {
            return false;
        }
        self.left -= 1;
        // A little early or late: the next slot does not move with it.
        let jitter = self.every.as_millis() as u64 / 4;
        self.next += self.every;
        scene.pause(Duration::from_millis(random.below(jitter.max(1))));
        true
    }
}

/// The broker's track.
pub(super) fn broker_track(scene: &Scene, times: &Timetable, node: &mut RabbitNode) -> Result<()> {
    let mut random = Random::new(times.seed, "broker");
    let mut kills = Schedule::new(times.time, times.broker_kills);
    let mut unsettled = true;
    while !scene.is_over() {
        if kills.is_due(scene, &mut random) {
            if std::mem::take(&mut unsettled) {
                node.settle_declarations();
            }
            kill_broker(scene, node, &mut random)?;
            continue;
        }
        scene.pause(random.ms(200, 2500));
        match random.below(100) {
            0..20 => freeze(scene, node, random.ms(200, 6000))?,
            20..25 => alarm(scene, node, random.ms(200, 3000))?,
            25..50 => {
                unsettled = true;
                unroutable(scene, node, &mut random)?;
            }
            50..70 => {
                unsettled = true;
                missing(scene, node, &mut random)?;
            }
            70..85 => full(scene, random.ms(500, 4000))?,
            _ => {}
        }
    }
    Ok(())
}

fn kill_broker(scene: &Scene, node: &mut RabbitNode, random: &mut Random) -> Result<()> {
    let away = random.ms(0, 2000);
    scene.note(&format!("broker: kill -9, away {away:?} and its start"))?;
    node.kill9();
    std::thread::sleep(away);
    node.restart();
    scene.broker_kills.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

fn freeze(scene: &Scene, node: &RabbitNode, time: Duration) -> Result<()> {
    scene.note(&format!("broker: frozen for {time:?}"))?;
    node.freeze();
    std::thread::sleep(time);
    node.thaw();
    Ok(())
}

fn alarm(scene: &Scene, node: &RabbitNode, time: Duration) -> Result<()> {
    scene.note(&format!("broker: memory alarm for {time:?}"))?;
    // One call: where the machine is busy, a second would come late, and nothing flows until then.
    let (low, high) =
        [0.0001, 0.4].map(|mark| format!("vm_memory_monitor:set_vm_memory_high_watermark({mark})")).into();
    let sleep = format!("timer:sleep({})", time.as_millis());
    node.ctl(&["eval", &format!("{low}, {sleep}, {high}.")]);
    Ok(())
}

fn unroutable(scene: &Scene, node: &RabbitNode, random: &mut Random) -> Result<()> {
    let (to, time) = (random.below(u64::from(EXCHANGES)) as u8, random.ms(100, 4000));
    scene.note(&format!("broker: x.{to} leads nowhere for {time:?}"))?;
    Admin::connect(&node.url())?.unbind(to)?;
    std::thread::sleep(time);
    Admin::connect(&node.url())?.bind(to)
}

fn missing(scene: &Scene, node: &RabbitNode, random: &mut Random) -> Result<()> {
    let (to, time) = (random.below(u64::from(EXCHANGES)) as u8, random.ms(100, 3000));
    scene.note(&format!("broker: x.{to} is deleted for {time:?}"))?;
    Admin::connect(&node.url())?.delete(to)?;
    std::thread::sleep(time);
    Admin::connect(&node.url())?.create(to)
}

/// The tap stops reading, so that its queue fills up and refuses.
fn full(scene: &Scene, time: Duration) -> Result<()> {
    scene.note(&format!("broker: the tap's queue fills for {time:?}"))?;
    locked(&scene.tap).signal("-STOP")?;
    std::thread::sleep(time);
    locked(&scene.tap).signal("-CONT")
}

/// The track of processes and their connections.
pub(super) fn process_track(scene: &Scene, times: &Timetable) -> Result<()> {
    let mut random = Random::new(times.seed, "processes");
    let mut kills = Schedule::new(times.time, times.app_kills);
    while !scene.is_over() {
        if kills.is_due(scene, &mut random) {
            let app = &scene.apps[random.below(scene.apps.len() as u64) as usize];
            kill(scene, app, &mut random)?;
            scene.app_kills.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        scene.pause(random.ms(100, 1500));
        let proxy = &scene.proxies[random.below(scene.proxies.len() as u64) as usize];
        connection_fault(scene, proxy, &mut random)?;
    }
    Ok(())
}

fn kill(scene: &Scene, process: &Mutex<Process>, random: &mut Random) -> Result<()> {
    let away = random.ms(0, 400);
    let mut process = locked(process);
    scene.note(&format!("{}: kill -9, away {away:?}", process.name()))?;
    process.kill()?;
    std::thread::sleep(away);
    process.restart()
}

fn connection_fault(scene: &Scene, proxy: &Proxy, random: &mut Random) -> Result<()> {
    let port = proxy.port;
    match random.below(100) {
        0..20 => kill(scene, &scene.consumer, random)?,
        20..28 => {
            scene.note(&format!("proxy {port}: cut"))?;
            proxy.cut();
        }
        28..36 => {
            scene.note(&format!("proxy {port}: reset"))?;
            proxy.reset()?;
        }
        36..45 => {
            scene.note(&format!("proxy {port}: silent, and no FIN"))?;
            proxy.silence();
        }
        45..55 => {
            let to_process = random.one_in(2);
            scene.note(&format!(
                "proxy {port}: a frame {} is damaged",
                if to_process { "to the process" } else { "to the broker" }
            ))?;
            proxy.corrupt(to_process);
        }
        55..65 => {
            let time = random.ms(100, 5000);
            scene.note(&format!("proxy {port}: stalled for {time:?}"))?;
            proxy.stall(true);
            scene.pause(time);
            proxy.stall(false);
        }
        65..75 => {
            let (delay, time) = (random.ms(1, 60), random.ms(500, 3000));
            scene.note(&format!("proxy {port}: {delay:?} slower for {time:?}"))?;
            proxy.delay(delay);
            scene.pause(time);
            proxy.delay(Duration::ZERO);
        }
        75..82 => {
            let time = random.ms(100, 2000);
            scene.note(&format!("proxy {port}: refuses for {time:?}"))?;
            proxy.refuse(true);
            scene.pause(time);
            proxy.refuse(false);
        }
        _ => {}
    }
    Ok(())
}
