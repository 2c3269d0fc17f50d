//! How long the machine stood still, for tests that judge how soon something is reported.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_millis(10);
/// What a thread may be late on a busy machine that does not stand still.
const USUAL: Duration = Duration::from_millis(50);

/// A thread that asks to be woken every ten milliseconds, and adds up by how much it was late.
///
/// A host that takes the processors away, and comes back seconds later, is no fault of what is tested.
pub(crate) struct Standstill {
    meter: Arc<Mutex<Meter>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Meter {
    late: Duration,
    last_beat: Instant,
}

impl Meter {
    fn lateness(&self) -> Duration {
        let late = self.last_beat.elapsed().saturating_sub(STEP);
        if late > USUAL { late } else { Duration::ZERO }
    }
}

impl Standstill {
    pub(crate) fn watch() -> Self {
        let meter = Arc::new(Mutex::new(Meter { late: Duration::ZERO, last_beat: Instant::now() }));
        let over = Arc::new(AtomicBool::new(false));
        let thread = {
            let (meter, over) = (Arc::clone(&meter), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::thread::sleep(STEP);
                    let mut meter = meter.lock().unwrap();
                    let late = meter.late + meter.lateness();
                    *meter = Meter { late, last_beat: Instant::now() };
                }
            })
        };
        Self { meter, over, thread: Some(thread) }
    }

    /// All of it since [`watch`](Self::watch), what the thread has not woken up from yet too.
    pub(crate) fn so_far(&self) -> Duration {
        let meter = self.meter.lock().unwrap();
        meter.late + meter.lateness()
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
