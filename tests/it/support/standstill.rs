//! How long the machine stood still, for tests that judge how soon something is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_millis(10);
/// What a thread may be late on a busy machine that does not stand still.
const USUAL: Duration = Duration::from_millis(50);

/// A thread that asks to be woken every ten milliseconds, and adds up by how much it was late.
///
/// A host that takes the processors away, and comes back seconds later, is no fault of what is tested.
pub(crate) struct Standstill {
    late_us: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    meter: Option<JoinHandle<()>>,
}

impl Standstill {
    pub(crate) fn watch() -> Self {
        let late_us = Arc::new(AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let meter = {
            let (late_us, over) = (Arc::clone(&late_us), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    std::thread::sleep(STEP);
                    let late = began.elapsed().saturating_sub(STEP);
                    if late > USUAL {
                        late_us.fetch_add(u64::try_from(late.as_micros()).unwrap(), Ordering::Relaxed);
                    }
                }
            })
        };
        Self { late_us, over, meter: Some(meter) }
    }

    /// All of it since [`watch`](Self::watch), but for what the thread has not woken up from yet.
    pub(crate) fn so_far(&self) -> Duration {
        // Whoever asks was woken just now: so is the meter, within its step.
        std::thread::sleep(STEP * 2);
        Duration::from_micros(self.late_us.load(Ordering::Relaxed))
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(meter) = self.meter.take() {
            let _ = meter.join();
        }
    }
}
