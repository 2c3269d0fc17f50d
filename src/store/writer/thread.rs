//! The writer thread: group commit.
//!
//! A group is the writes that have queued up while the last commit was in its fsync. The writer
//! thread waits for no time window. The group's closures run in one redb transaction, and one
//! commit makes them durable: see `groups.rs`. A write that finds no other write at work skips the
//! queue, and is a group of one on its caller's thread
//! ([`Queue`](crate::store::shared::write_queue::Queue)).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Select, TryRecvError};

use crate::error::Result;
use crate::oneshot::{self, WakeChain};
use crate::store::capture::passes::CoalescingPass;
use crate::store::read::holders::{self, Looked};
use crate::store::shared::capture_schedule::CoalescingPasses;
use crate::store::shared::core::{Core, or_poison};
use crate::store::shared::write_queue::Waits;
use crate::store::transaction::Transaction;
use crate::store::transaction::write::Write;
use crate::store::writer::cleanup::CleanUp;
use crate::store::writer::groups::{self, Backlog, same};
use crate::time::{Deadline, wake_after};
use crate::tuning::AGE_SAVE_MS_MIN;

/// A job for the writer thread.
pub(crate) enum Job {
    Write(Box<dyn Write>),
    /// Progress begins to wait: look at the clock again.
    Progress,
    /// Write the waiting progress now.
    Flush(oneshot::Sender<Result<()>>),
    /// Finish the queued writes, write the waiting progress, and end.
    Stop,
}

/// Runs the thread, from its start to its end.
pub(crate) fn run(core: &Arc<Core>, jobs: &Receiver<Job>) {
    core.write_lock.set_writer();
    core.queue.begin_writer();
    let mut state = Writer {
        core,
        backlog: Backlog::default(),
        pass_after: None,
        flushes: Vec::new(),
        stop: false,
        trimming: false,
        forked: false,
        wake_chain: None,
        opened: Instant::now(),
        saved_at: None,
        look_at: Deadline::Never,
        looked_at: None,
    };
    CoalescingPasses::say_at_open(core);
    while !state.stop {
        if state.backlog.is_empty() {
            state.wait(jobs);
        }
        while state.backlog.has_room() && !state.stop {
            match jobs.try_recv() {
                Ok(job) => state.take(job),
                Err(TryRecvError::Empty) => break,
                // A backfill in progress never waits for the queue. Only here does it show that the
                // last handle is gone.
                Err(TryRecvError::Disconnected) => state.stop = true,
            }
        }
        core.announce_queue_room();
        state.work();
        if state.forked {
            return;
        }
    }
    // Writes that got into the queue before the store began to close are served too.
    while let Ok(job) = jobs.try_recv() {
        state.take(job);
    }
    state.work();
    while !state.backlog.is_empty() && !state.forked {
        state.work();
    }
    if state.forked {
        return;
    }
    state.commit_last();
    state.wake_the_rest();
    // Futures that came too late for the queue find the store closed.
    core.announce_queue_room();
}

/// Returns the next job, or a nudge as a [`Job::Progress`].
fn receive(
    jobs: &Receiver<Job>,
    nudges: &Receiver<()>,
    deadline: Deadline,
) -> std::result::Result<Job, RecvTimeoutError> {
    let mut select = Select::new();
    let at_jobs = select.recv(jobs);
    select.recv(nudges);
    let ready = match deadline.instant() {
        Some(deadline) => select.select_deadline(deadline).map_err(|_| RecvTimeoutError::Timeout)?,
        None => select.select(),
    };
    if ready.index() == at_jobs {
        ready.recv(jobs).map_err(|_| RecvTimeoutError::Disconnected)
    } else {
        // The sender of nudges lives as long as this thread.
        let _ = ready.recv(nudges);
        Ok(Job::Progress)
    }
}

struct Writer<'a> {
    core: &'a Arc<Core>,
    backlog: Backlog,
    /// The count of ended passes when the pass in the backlog was put there.
    pass_after: Option<u64>,
    flushes: Vec<oneshot::Sender<Result<()>>>,
    stop: bool,
    /// The last action was a commit while the store was idle.
    trimming: bool,
    /// A closure has forked, and this is the forked process. The process ends with this thread,
    /// which is its only one.
    forked: bool,
    /// The callers of the last group that are still to be woken.
    wake_chain: Option<Arc<WakeChain>>,
    opened: Instant,
    /// The number of commits up to the newest quick-repair commit, that commit included.
    saved_at: Option<u64>,
    /// The time when a holder of the log may need a warning.
    look_at: Deadline,
    /// The number of commits at the last look at the holders.
    looked_at: Option<u64>,
}

impl Writer<'_> {
    /// Waits for a job, or until waiting progress has waited long enough.
    fn wait(&mut self, jobs: &Receiver<Job>) {
        // A thread that asks for a pass sets this first, and then sends a job.
        if self.core.passes.is_asked() {
            return;
        }
        if self.core.look_due_at().is_some_and(Deadline::is_over) {
            self.core.look();
        }
        if self.wake_chain.as_ref().is_some_and(|chain| !chain.is_done()) {
            // Woken callers are about to write again.
            match jobs.recv_timeout(WAKE_CHAIN_TIMEOUT) {
                Ok(job) => {
                    // A job that is not a write begins no group, and only after a group would the
                    // rest be woken.
                    if !matches!(job, Job::Write(_)) {
                        self.wake_the_rest();
                    }
                    return self.take(job);
                }
                Err(_) => self.wake_the_rest(),
            }
        }
        // Work that no running relay asks for is only asked for here.
        let pass_due = CoalescingPasses::look(self.core);
        if pass_due == Some(Duration::ZERO) {
            self.core.passes.ask_own();
            return;
        }
        let pass_due = pass_due.map(|wait| wake_after(&*self.core.settings.clock, wait));
        if self.core.jumped.take() {
            self.catch_up();
        }
        self.core.queue.awaits_look(false);
        self.core.queue.writer_waits(Waits::Untimed);
        let look_due = self.core.look_due_at();
        let clean_due = self.core.cleaning.due_at();
        self.core.queue.awaits_look(look_due.is_some());
        let commits = self.core.counters.commits.load(Ordering::Relaxed);
        let delay = Duration::from_millis(self.core.settings.progress_delay_ms);
        let (due_at, last_commit) = {
            let progress = self.core.progress();
            (progress.due_at(delay), progress.last_commit())
        };
        let trim_left = self.core.tail().trim_left;
        let save_due = self.save_due();
        self.core.queue.writer_waits(match save_due {
            _ if due_at.is_some() || trim_left => Waits::Timed,
            Some(_) => Waits::UntilIdle,
            None => Waits::Untimed,
        });
        // This look comes after the thread has noted that it waits: a commit that asks later nudges
        // the thread.
        self.look_for_holders();
        let progress_due = match due_at {
            // Trimming is in progress: it goes on, unless there is other work.
            _ if trim_left && self.trimming => Some(Deadline::after(Duration::from_millis(1))),
            Some(due_at) => Some(due_at),
            // A commit has left this rest, so waking up does not move the time. Only a commit moves
            // it, and that commit has checked the bounds of trimming.
            None if trim_left => Some(Deadline::from(last_commit.unwrap_or_else(Instant::now), delay)),
            None => None,
        };
        let deadline =
            progress_due.into_iter().chain(pass_due).chain(save_due).chain(look_due).chain(clean_due).min();
        let deadline = deadline.unwrap_or(Deadline::Never).min(self.look_at);
        let job = receive(jobs, self.core.queue.nudges(), deadline);
        self.core.queue.writer_waits(Waits::Timed);
        self.trimming = false;
        match job {
            Ok(job) => self.take(job),
            Err(RecvTimeoutError::Timeout) if save_due.is_some_and(Deadline::is_over) => {
                self.save_if_idle();
            }
            // Only the backfill, the look or a piece of clean-up is due: all of them come next.
            Err(RecvTimeoutError::Timeout) if !progress_due.is_some_and(Deadline::is_over) => {}
            Err(RecvTimeoutError::Timeout) => {
                // A commit on another thread may have carried the progress meanwhile. How that
                // commit ended is known once it has released the write lock.
                self.core.await_write_lock("the writer thread's own work");
                let idle = self.core.counters.commits.load(Ordering::Relaxed) == commits;
                let trim_left = self.core.tail().trim_left;
                let overdue = self.core.progress().due_at(delay).is_some_and(Deadline::is_over);
                if overdue || (idle && trim_left) {
                    self.commit_progress();
                    self.trimming = true;
                }
                // While other threads commit, no commit of this thread is needed: one of theirs
                // does the work, within the bounds of trimming.
            }
            Err(RecvTimeoutError::Disconnected) => self.stop = true,
        }
    }

    fn look_for_holders(&mut self) {
        let Looked::Next(wait_ms) = holders::look(self.core, self.look_at.is_over()) else { return };
        let commits = self.core.counters.commits.load(Ordering::Relaxed);
        // The last commits before a rest may not have asked. One more look finds what they have
        // left.
        let again_ms = (self.looked_at != Some(commits)).then(|| self.core.holders.interval_ms());
        self.looked_at = Some(commits);
        let wait_ms = wait_ms.into_iter().chain(again_ms).min();
        let wake = |ms| wake_after(&*self.core.settings.clock, Duration::from_millis(ms));
        self.look_at = wait_ms.map_or(Deadline::Never, wake);
    }

    /// Catches up after a jump of the clock. Waiting work gets a commit, and records that are now
    /// old enough are trimmed.
    fn catch_up(&mut self) {
        self.look_at = Deadline::now();
        // A commit on another thread may be carrying the progress.
        self.core.await_write_lock("the writer thread's own work");
        let retention = &self.core.settings.retention;
        let may_trim = {
            let tail = self.core.tail();
            let ages = retention.age_ms_min > 0 && !retention.forever && tail.trimmed_to < tail.next_seq;
            tail.trim_left || ages
        };
        if may_trim || !self.core.progress().is_empty() {
            self.commit_progress();
            self.trimming = true;
        }
    }

    /// Returns when the next open is to be made quick, if no write comes before.
    fn save_due(&self) -> Option<Deadline> {
        let idle = self.core.settings.quick_repair_idle?;
        let (commits, last) = {
            // Both values change under the lock of the progress.
            let progress = self.core.progress();
            (self.core.counters.commits.load(Ordering::Relaxed), progress.last_commit())
        };
        if self.saved_at == Some(commits) || self.core.poisoned().is_some() {
            return None;
        }
        Some(Deadline::from(last.map_or(self.opened, |last| last.max(self.opened)), idle))
    }

    /// Commits with quick repair, unless a write has come meanwhile.
    fn save_if_idle(&mut self) {
        let is_due = |due: Option<Deadline>| due.is_some_and(Deadline::is_over);
        if !is_due(self.save_due()) {
            return;
        }
        let saved = or_poison(self.core, || {
            // This waits for the write lock: an exclusive transaction may be at work.
            let mut tx = Transaction::begin(self.core, "making the next open quick")?;
            if !is_due(self.save_due()) {
                return tx.abort();
            }
            let commits = self.core.counters.commits.load(Ordering::Relaxed);
            tx.set_quick_repair();
            tx.finish(0)?;
            self.saved_at = Some(commits + 1);
            Ok(())
        });
        if let Err(error) = saved {
            // As if the store were opened `SAVE_RETRY` from now: the idle time counts from then.
            self.opened = Deadline::after(SAVE_RETRY).instant().unwrap_or_else(Instant::now);
            tracing::warn!(%error, "the commit that makes the next open quick has failed; it will be repeated");
        }
    }

    fn wake_the_rest(&mut self) {
        if let Some(wake_chain) = self.wake_chain.take() {
            wake_chain.wake_all();
        }
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Write(write) => self.backlog.push(write),
            Job::Progress => {}
            Job::Flush(reply) => self.flushes.push(reply),
            Job::Stop => self.stop = true,
        }
    }

    fn work(&mut self) {
        if self.core.passes.is_asked() && !self.stop && !self.has_pass() {
            self.core.queue.enter();
            self.pass_after = Some(self.core.passes.ended());
            self.backlog.push(Box::new(CoalescingPass::new(self.core)));
        }
        if !self.stop && self.core.cleaning.begin_if_due() {
            self.core.queue.enter();
            self.backlog.push(Box::new(CleanUp::new(self.core)));
        }
        let group = self.backlog.next_group();
        if !self.core.write_lock.is_free() {
            // The holder of the write lock may keep it for long, and may even wait for one of these
            // callers.
            self.wake_the_rest();
        }
        if !group.is_empty() {
            self.core.queue.note_group(group.len());
            let ran = groups::run(self.core, group, None, wake_chain_pays);
            self.forked = self.core.owner.is_elsewhere();
            if self.forked {
                return;
            }
            let wake_chain = self.backlog.take_back(ran);
            // No caller waits to be woken for longer than one more group.
            self.wake_the_rest();
            if let Some(wake_chain) = &wake_chain {
                wake_chain.wake(1);
            }
            self.wake_chain = wake_chain;
        }
        if !self.flushes.is_empty() {
            // An exclusive transaction may have taken the progress and be in its fsync. It must
            // have released the write lock too.
            self.core.await_write_lock("the writer thread's own work");
            let flushed =
                if self.core.progress().is_empty() { self.core.check() } else { self.try_commit_progress() };
            for reply in self.flushes.drain(..) {
                reply.send(flushed.as_ref().copied().map_err(same));
            }
        }
    }

    /// Whether a pass is in the backlog.
    fn has_pass(&self) -> bool {
        self.pass_after == Some(self.core.passes.ended())
    }

    fn commit_progress(&mut self) {
        if let Err(error) = self.try_commit_progress() {
            // The progress waits on. Without a pause, a failing disk would be asked again at once.
            let mut progress = self.core.progress();
            progress.wait_anew(self.core.poisoned().is_none().then(Instant::now));
            self.core.tail().trim_left = false;
            tracing::warn!(%error, "writing a relay's progress failed; it will be repeated");
        }
    }

    /// Makes the last commit if progress waits, or if the store age has grown by `AGE_SAVE_MS_MIN`
    /// since it was written.
    fn commit_last(&mut self) {
        let grown_ms = match self.core.now() {
            Ok(now) => self.core.age.at(now).saturating_sub(self.core.tail().ages.saved_ms()),
            Err(_) => 0,
        };
        let is_due = !self.core.progress().is_empty() || grown_ms >= AGE_SAVE_MS_MIN;
        if !is_due || self.core.poisoned().is_some() {
            return;
        }
        let last = or_poison(self.core, || {
            let mut tx = Transaction::begin(self.core, "closing the store")?;
            tx.set_closing();
            tx.finish(0)
        });
        if let Err(error) = last {
            tracing::warn!(%error, "the last progress was not written; it will be repeated");
        }
    }

    fn try_commit_progress(&self) -> Result<()> {
        or_poison(self.core, || Transaction::begin(self.core, "writing the progress of relays")?.finish(0))
    }
}

/// Whether a group's callers are woken by a wake chain ([`WakeChain`]). With a chain the next group
/// begins at once, with the writes that came during this group's commit. Then two groups alternate
/// where there was one. A chain saves the waking, and costs one more commit per round.
fn wake_chain_pays(company: usize, sync: Duration) -> bool {
    COMMIT_COSTS + sync < WAKE_COSTS * u32::try_from(company).unwrap_or(u32::MAX)
}

/// The cost of a commit of few pages, without its sync.
const COMMIT_COSTS: Duration = Duration::from_micros(150);
/// One writer's share of a round that the next group would wait for. Both values are measured:
/// docs/benchmarks.md.
const WAKE_COSTS: Duration = Duration::from_micros(8);
/// How long a wake chain may take while there is nothing else to do.
const WAKE_CHAIN_TIMEOUT: Duration = Duration::from_millis(1);
/// The pause after a failed quick-repair commit.
const SAVE_RETRY: Duration = Duration::from_secs(1);
