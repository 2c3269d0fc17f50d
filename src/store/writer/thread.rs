//! The writer thread: group commit.
//!
//! A group is what has queued up while the last commit was in its fsync; no time window is waited for. Its closures run in
//! one redb transaction, and one commit makes them durable: `groups.rs`. A write that finds nobody else writing skips the
//! queue and is a group of one on its caller's thread ([`Queue`](crate::store::shared::write_queue::Queue)).

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

/// What the writer thread is sent.
pub(crate) enum Job {
    Write(Box<dyn Write>),
    /// Progress waits that did not before: look at the clock again.
    Progress,
    /// Write the waiting progress now.
    Flush(oneshot::Sender<Result<()>>),
    /// Finish what is queued, write the waiting progress, end.
    Stop,
}

/// The thread's whole life.
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
                // A backfill that goes on never waits for the queue: that the last handle is gone shows only here.
                Err(TryRecvError::Disconnected) => state.stop = true,
            }
        }
        core.announce_queue_room();
        state.work();
        if state.forked {
            return;
        }
    }
    // Whoever got into the queue before the door closed is served too.
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

/// The next job, or a nudge, which is a [`Job::Progress`].
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
        // Whoever nudges lives as long as this thread.
        let _ = ready.recv(nudges);
        Ok(Job::Progress)
    }
}

struct Writer<'a> {
    core: &'a Arc<Core>,
    backlog: Backlog,
    /// After how many passes the one in the backlog was put there.
    pass_after: Option<u64>,
    flushes: Vec<oneshot::Sender<Result<()>>>,
    stop: bool,
    /// The last thing done was a commit while idle.
    trimming: bool,
    /// A closure has forked, and this is the forked process: it ends with this thread, which is its only one.
    forked: bool,
    /// Those of the last group who are still to be woken.
    wake_chain: Option<Arc<WakeChain>>,
    opened: Instant,
    /// After how many commits the newest quick-repair commit was the last.
    saved_at: Option<u64>,
    /// When a holder of the log may be worth a warning.
    look_at: Deadline,
    /// After how many commits it was looked at last.
    looked_at: Option<u64>,
}

impl Writer<'_> {
    /// Waits for a job, or until waiting progress has waited long enough.
    fn wait(&mut self, jobs: &Receiver<Job>) {
        // Who asks sets this first and sends a job then.
        if self.core.passes.is_asked() {
            return;
        }
        if self.core.look_due_at().is_some_and(Deadline::is_over) {
            self.core.look();
        }
        if self.wake_chain.as_ref().is_some_and(|chain| !chain.is_done()) {
            // Those who are woken are about to write again.
            match jobs.recv_timeout(WAKE_CHAIN_TIMEOUT) {
                Ok(job) => {
                    // A job that is no write begins no group, after which they would be woken.
                    if !matches!(job, Job::Write(_)) {
                        self.wake_the_rest();
                    }
                    return self.take(job);
                }
                Err(_) => self.wake_the_rest(),
            }
        }
        // What no running relay asks for, nobody else does.
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
        // After the word that this thread waits: a commit that asks later than this nudges it.
        self.look_for_holders();
        let progress_due = match due_at {
            // In the middle of trimming: go on, unless something else is to be done.
            _ if trim_left && self.trimming => Some(Deadline::after(Duration::from_millis(1))),
            Some(due_at) => Some(due_at),
            // What is left was left by a commit, so no waking moves this. A commit does: it has looked at the bounds of trimming.
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
            // Only the backfill, the look or a piece of clean-up is due: all come next.
            Err(RecvTimeoutError::Timeout) if !progress_due.is_some_and(Deadline::is_over) => {}
            Err(RecvTimeoutError::Timeout) => {
                // A commit on another thread may have taken the progress along meanwhile; how it ended is known once it
                // has released the write lock.
                self.core.await_write_lock("the writer thread's own work");
                let idle = self.core.counters.commits.load(Ordering::Relaxed) == commits;
                let trim_left = self.core.tail().trim_left;
                let overdue = self.core.progress().due_at(delay).is_some_and(Deadline::is_over);
                if overdue || (idle && trim_left) {
                    self.commit_progress();
                    self.trimming = true;
                }
                // While others commit it needs no commit of its own: one of them does it, within the bounds of trimming.
            }
            Err(RecvTimeoutError::Disconnected) => self.stop = true,
        }
    }

    fn look_for_holders(&mut self) {
        let Looked::Next(wait_ms) = holders::look(self.core, self.look_at.is_over()) else { return };
        let commits = self.core.counters.commits.load(Ordering::Relaxed);
        // The last commits before a rest may not have asked: one more look finds what they have left.
        let again_ms = (self.looked_at != Some(commits)).then(|| self.core.holders.interval_ms());
        self.looked_at = Some(commits);
        let wait_ms = wait_ms.into_iter().chain(again_ms).min();
        let wake = |ms| wake_after(&*self.core.settings.clock, Duration::from_millis(ms));
        self.look_at = wait_ms.map_or(Deadline::Never, wake);
    }

    /// After a jump of the clock: what waits for a commit gets one, and what has grown old enough by
    /// the clock is trimmed.
    fn catch_up(&mut self) {
        self.look_at = Deadline::now();
        // A commit on another thread may be taking it along.
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

    /// When the next open is to be made quick, if nobody writes before.
    fn save_due(&self) -> Option<Deadline> {
        let idle = self.core.settings.quick_repair_idle?;
        let (commits, last) = {
            // Both change under its lock.
            let progress = self.core.progress();
            (self.core.counters.commits.load(Ordering::Relaxed), progress.last_commit())
        };
        if self.saved_at == Some(commits) || self.core.poisoned().is_some() {
            return None;
        }
        Some(Deadline::from(last.map_or(self.opened, |last| last.max(self.opened)), idle))
    }

    /// Commits with quick repair, unless somebody has written meanwhile.
    fn save_if_idle(&mut self) {
        let is_due = |due: Option<Deadline>| due.is_some_and(Deadline::is_over);
        if !is_due(self.save_due()) {
            return;
        }
        let saved = or_poison(self.core, || {
            // It waits for the write lock: an exclusive transaction may be at work.
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
            // As if opened in a while: after as long a time as then.
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
            // Whoever holds the write lock may keep it for long, and may even wait for one of them.
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
            // Nobody is left for longer than one more group.
            self.wake_the_rest();
            if let Some(wake_chain) = &wake_chain {
                wake_chain.wake(1);
            }
            self.wake_chain = wake_chain;
        }
        if !self.flushes.is_empty() {
            // An exclusive transaction may have taken it and be in its fsync: it must have released the write lock too.
            self.core.await_write_lock("the writer thread's own work");
            let flushed =
                if self.core.progress().is_empty() { self.core.check() } else { self.try_commit_progress() };
            for reply in self.flushes.drain(..) {
                reply.send(flushed.as_ref().copied().map_err(same));
            }
        }
    }

    /// One is in the backlog.
    fn has_pass(&self) -> bool {
        self.pass_after == Some(self.core.passes.ended())
    }

    fn commit_progress(&mut self) {
        if let Err(error) = self.try_commit_progress() {
            // It waits on; without a pause a failing disk would be asked again at once.
            let mut progress = self.core.progress();
            progress.wait_anew(self.core.poisoned().is_none().then(Instant::now));
            self.core.tail().trim_left = false;
            tracing::warn!(%error, "writing a relay's progress failed; it will be repeated");
        }
    }

    /// What waits for a commit gets the last one; so does the store age, unless it is nearly as written.
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

/// Whether those of a group are woken by a wake chain ([`WakeChain`]): the next group begins at once, with those who came while this one was
/// committed, and two groups alternate where there was one. That saves the waking, and costs one more commit each time round.
fn wake_chain_pays(company: usize, sync: Duration) -> bool {
    COMMIT_COSTS + sync < WAKE_COSTS * u32::try_from(company).unwrap_or(u32::MAX)
}

/// A commit of few pages, but for its sync.
const COMMIT_COSTS: Duration = Duration::from_micros(150);
/// A writer's share of a round that the next group would wait for. Both are measured: docs/benchmarks.md.
const WAKE_COSTS: Duration = Duration::from_micros(8);
/// How long a wake chain may take while there is nothing else to do.
const WAKE_CHAIN_TIMEOUT: Duration = Duration::from_millis(1);
/// A quick-repair commit that has failed is not tried again sooner.
const SAVE_RETRY: Duration = Duration::from_secs(1);
