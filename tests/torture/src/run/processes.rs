//! The processes of a run: started, killed, started again.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Result;
use crate::plan::{Plan, Progress};

/// A process, over all its lives.
#[derive(Debug)]
pub(super) struct Process {
    command: &'static str,
    plan: Plan,
    child: Child,
    progress: Arc<Mutex<Progress>>,
}

impl Process {
    pub(super) fn start(command: &'static str, plan: Plan) -> Result<Self> {
        let progress = Arc::default();
        let child = spawn(command, &plan, &progress)?;
        Ok(Self { command, plan, child, progress })
    }

    pub(super) fn name(&self) -> &str {
        &self.plan.name
    }

    pub(super) fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SIGKILL, and its end.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.still_runs()?;
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Another life.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.plan.life += 1;
        self.child = spawn(self.command, &self.plan, &self.progress)?;
        Ok(())
    }

    /// Nobody ends but by our hand.
    pub(super) fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                Err(format!("{} has ended by itself: {status}; see its log", self.plan.name).into())
            }
        }
    }

    pub(super) fn signal(&self, signal: &str) -> Result<()> {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status()?;
        if status.success() { Ok(()) } else { Err(format!("kill {signal}: {status}").into()) }
    }

    /// Asks it to finish and to end.
    pub(super) fn ask_to_end(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().ok_or("its stdin is piped")?;
        Ok(stdin.write_all(b"end\n")?)
    }

    /// Its end, if it comes in time.
    pub(super) fn await_end(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() > until {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &str, plan: &Plan, progress: &Arc<Mutex<Progress>>) -> Result<Child> {
    let log =
        File::options().create(true).append(true).open(plan.folder.join(format!("{}.log", plan.name)))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([command, &serde_json::to_string(plan)?])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()?;
    let stdout = child.stdout.take().ok_or("its stdout is piped")?;
    let progress = Arc::clone(progress);
    std::thread::spawn(move || {
        // Ends with the process; a line that a kill has cut is no news.
        for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
            if let Ok(reported) = serde_json::from_str(&line) {
                *progress.lock().unwrap_or_else(PoisonError::into_inner) = reported;
            }
        }
    });
    Ok(child)
}
