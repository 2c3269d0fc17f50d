//! What the conductor sends a process, and how a process hears that it shall end.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::Result;

/// Writer threads of an application.
pub(crate) const WRITERS: u64 = 4;
/// The relay's name.
pub(crate) const RELAY: &str = "torture";
/// The consumer's queue.
pub(crate) const QUEUE: &str = "applied";
/// The tap's queue.
pub(crate) const TAP_QUEUE: &str = "tap";

/// One process, in one of its lives.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) folder: PathBuf,
    pub(crate) name: String,
    /// The broker; but for the tap, through a proxy.
    pub(crate) url: String,
    pub(crate) seed: u64,
    pub(crate) life: u64,
    /// When the run began, Unix milliseconds.
    pub(crate) began_ms: u64,
    /// Events per second that this application is to write.
    pub(crate) rate: u64,
    /// Events that are to be in its log; none: it writes until it is asked to stop.
    pub(crate) quota: Option<u64>,
    /// Whether delivered records are trimmed.
    pub(crate) trims: bool,
}

impl Plan {
    pub(crate) fn store(&self) -> PathBuf {
        self.folder.join(format!("{}.redb", self.name))
    }

    pub(crate) fn history(&self, writer: u64, life: u64) -> PathBuf {
        self.folder.join("hist").join(format!("{}-w{writer}-{life:05}.hist", self.name))
    }
}

pub(crate) fn from(argument: Option<String>) -> Result<Plan> {
    Ok(serde_json::from_str(&argument.ok_or("the plan is missing")?)?)
}

/// What an application reports from time to time, a line of JSON each.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Events in the log, over all lives.
    pub(crate) events: u64,
    /// Events that wait for the broker.
    pub(crate) backlog: u64,
}

/// Raised when a line has come on stdin: finish, and end. The end of stdin means that the conductor is gone: end at once.
pub(crate) fn closing() -> Arc<AtomicBool> {
    let closing = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&closing);
    std::thread::spawn(move || {
        let mut lines = std::io::stdin().lock().lines();
        while let Some(Ok(_)) = lines.next() {
            raised.store(true, Ordering::SeqCst);
        }
        std::process::exit(4);
    });
    closing
}
