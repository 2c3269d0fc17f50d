//! Lines: commands on one aggregate take turns after a conflict.
//!
//! A command decides outside any transaction, so another command may append first. While that is
//! rare, this module costs nothing. A command that has met a conflict joins the line of its stream.
//! While a stream has a line, every other command on the stream joins the line. New commands join
//! before they decide. Commands that had decided when the line began join before they append. So
//! only writes that were already in the write group when the line began disturb the decision of the
//! head. That happens once at most.
//!
//! **Invariants.** A line exists only while a command is in the line. A line has one place per
//! waiting thread or task. No lock is held while a command decides, or while a waker is called. A
//! thread that is the head of one line, or is inside a transaction, waits in no line: its command
//! decides at once. A head that keeps the line waiting for longer than [`LINE_MS_MAX`] is passed,
//! since the head may wait for a command in its own line.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::store::shared::alarms::Alarm;
use crate::store::shared::timed::Waking;
use crate::time::Deadline;
use crate::tuning::LINE_MS_MAX;

const LINE_TIMEOUT: Duration = Duration::from_millis(LINE_MS_MAX);

thread_local! {
    /// The number of lines whose head is this thread.
    static HEADS: Cell<usize> = const { Cell::new(0) };
}

/// The thread or task that waits in a place.
#[derive(Debug)]
enum Waits {
    Thread(Thread),
    /// The waker is foreign code: the waker is cloned, called and dropped without a lock.
    Task(Mutex<Option<Waker>>),
}

/// The place of one thread or task.
#[derive(Debug)]
struct Place {
    waits: Waits,
    is_head: AtomicBool,
}

impl Place {
    fn new(waits: Waits) -> Arc<Self> {
        Arc::new(Self { waits, is_head: AtomicBool::new(false) })
    }

    /// Tells the thread or task that its place is the head now.
    fn notify(&self) {
        match &self.waits {
            Waits::Thread(thread) => thread.unpark(),
            Waits::Task(waker) => {
                let waker = waker.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(waker) = waker
                    && catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err()
                {
                    tracing::error!("a waker panicked; its command may wait for longer");
                }
            }
        }
    }
}

#[derive(Debug)]
struct Line {
    head: Arc<Place>,
    since: Instant,
    waiting: VecDeque<Arc<Place>>,
}

/// The lines of one store, by stream.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    lines: Mutex<HashMap<String, Line>>,
    /// The number of lines. At 0, a command takes no lock to look for a line.
    count: AtomicUsize,
}

/// The head of a line, until dropped.
#[derive(Debug)]
pub(crate) struct Head<'a> {
    lines: &'a Lines,
    stream: &'a str,
    place: Arc<Place>,
    _decides: Decides,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a line for this stream.
    pub(crate) fn is_there(&self, stream: &str) -> bool {
        self.count.load(Ordering::SeqCst) > 0 && self.lock().contains_key(stream)
    }

    /// Whether this thread may wait in a line. The head of one line must not wait in a second line.
    /// It would keep its own line waiting, and two such threads could wait for each other.
    pub(crate) fn may_wait() -> bool {
        HEADS.try_with(Cell::get).is_ok_and(|heads| heads == 0)
    }

    /// Takes a place in the stream's line. Begins the line if the stream has none.
    fn join(&self, stream: &str, waits: Waits) -> Arc<Place> {
        let place = Place::new(waits);
        let mut lines = self.lock();
        match lines.get_mut(stream) {
            Some(line) => line.waiting.push_back(Arc::clone(&place)),
            None => {
                place.is_head.store(true, Ordering::Release);
                let line = Line { head: Arc::clone(&place), since: Instant::now(), waiting: VecDeque::new() };
                lines.insert(stream.to_owned(), line);
                self.count.fetch_add(1, Ordering::SeqCst);
            }
        }
        place
    }

    /// Returns how long this place must wait before it looks again; `None` once the place is the
    /// head. Passes a head that takes too long.
    fn waits(&self, stream: &str, place: &Arc<Place>) -> Option<Duration> {
        loop {
            let mut lines = self.lock();
            if place.is_head.load(Ordering::Acquire) {
                return None;
            }
            let line = lines.get_mut(stream)?;
            let left = LINE_TIMEOUT.saturating_sub(line.since.elapsed());
            if !left.is_zero() {
                return Some(left);
            }
            let next = line.advance();
            drop(lines);
            // Wakers and the logger are the application's code: they run without the lock.
            if let Some(next) = next {
                next.notify();
            }
            tracing::warn!(
                stream,
                waited_ms = LINE_MS_MAX,
                "a command takes long to decide; others go on without it"
            );
        }
    }

    fn is_first(&self, stream: &str, place: &Arc<Place>) -> bool {
        self.lock().get(stream).is_some_and(|line| Arc::ptr_eq(&line.head, place))
    }

    /// Gives a place up. If the place was the head, the next place becomes the head. A head that
    /// was passed leaves nothing behind.
    fn leave(&self, stream: &str, place: &Arc<Place>) {
        let mut lines = self.lock();
        let Some(line) = lines.get_mut(stream) else { return };
        if !Arc::ptr_eq(&line.head, place) {
            line.waiting.retain(|waiting| !Arc::ptr_eq(waiting, place));
            return;
        }
        let next = line.advance();
        if next.is_none() {
            lines.remove(stream);
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
        drop(lines);
        if let Some(next) = next {
            next.notify();
        }
    }

    /// Waits in the stream's line until this thread is the head.
    pub(crate) fn stand<'a>(&'a self, stream: &'a str) -> Head<'a> {
        let place = self.join(stream, Waits::Thread(thread::current()));
        while let Some(left) = self.waits(stream, &place) {
            thread::park_timeout(left);
        }
        Head { lines: self, stream, place, _decides: Decides::new() }
    }

    /// Takes a place in the stream's line for a task.
    pub(crate) fn join_as_task<'a>(&'a self, stream: &'a str, waking: Waking) -> TaskPlace<'a> {
        let place = self.join(stream, Waits::Task(Mutex::new(None)));
        TaskPlace { lines: self, stream, place, waking, alarm: None }
    }
}

impl Line {
    /// Makes the next place the head; the caller notifies that place without the lock. `None` if no
    /// place waits.
    fn advance(&mut self) -> Option<Arc<Place>> {
        let next = self.waiting.pop_front()?;
        next.is_head.store(true, Ordering::Release);
        (self.head, self.since) = (Arc::clone(&next), Instant::now());
        Some(next)
    }
}

/// Marks this thread as the head of a line, until dropped. Meanwhile this thread waits in no other
/// line.
#[derive(Debug)]
pub(crate) struct Decides(());

impl Decides {
    fn new() -> Self {
        // A thread whose thread-locals are already destroyed nests no more commands.
        let _ = HEADS.try_with(|heads| heads.set(heads.get() + 1));
        Self(())
    }
}

impl Drop for Decides {
    fn drop(&mut self) {
        let _ = HEADS.try_with(|heads| heads.set(heads.get().saturating_sub(1)));
    }
}

impl Head<'_> {
    /// Whether no other command has passed this head.
    pub(crate) fn is_first(&self) -> bool {
        self.lines.is_first(self.stream, &self.place)
    }
}

impl Drop for Head<'_> {
    fn drop(&mut self) {
        self.lines.leave(self.stream, &self.place);
    }
}

/// A task's place in a line, until dropped. A task that is not polled keeps the line waiting for
/// [`LINE_MS_MAX`] at most, as a thread does.
#[derive(Debug)]
pub(crate) struct TaskPlace<'a> {
    lines: &'a Lines,
    stream: &'a str,
    place: Arc<Place>,
    waking: Waking,
    alarm: Option<Alarm>,
}

impl TaskPlace<'_> {
    /// Ready once the task is the head. Also ready where no alarm can wake the task: its command
    /// then decides at once.
    pub(crate) fn poll_head(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.waking.is_elsewhere() {
            return Poll::Ready(());
        }
        // The waker is set before the look, so that no notification is lost between the two.
        if let Waits::Task(waker) = &self.place.waits {
            let new = Some(context.waker().clone());
            let old = std::mem::replace(&mut *waker.lock().unwrap_or_else(PoisonError::into_inner), new);
            drop(old);
        }
        let Some(left) = self.lines.waits(self.stream, &self.place) else { return Poll::Ready(()) };
        let at = Deadline::after(left);
        match self.waking.set(&mut self.alarm, at, context.waker().clone()) {
            Ok(()) => Poll::Pending,
            Err(error) => {
                tracing::error!(%error, "the thread of the alarms cannot be started; a command does not wait");
                Poll::Ready(())
            }
        }
    }

    /// Whether no other command has passed this task.
    pub(crate) fn is_first(&self) -> bool {
        self.lines.is_first(self.stream, &self.place)
    }

    /// Marks this thread as a head while the task decides on the thread.
    pub(crate) fn decides(&self) -> Decides {
        Decides::new()
    }
}

impl Drop for TaskPlace<'_> {
    fn drop(&mut self) {
        if !self.waking.is_elsewhere() {
            self.waking.cancel(self.alarm.take());
            self.lines.leave(self.stream, &self.place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a line serves in the order of arrival, a newcomer sees the line, and nothing of the
    /// line is left. Method: five threads behind a head; the order in which they are served.
    #[test]
    fn first_come_first_served() {
        let (lines, order) = (Lines::default(), Mutex::new(Vec::new()));
        assert!(!lines.is_there("a"));
        let head = lines.stand("a");
        assert!(head.is_first() && lines.is_there("a") && !lines.is_there("b") && !Lines::may_wait());
        thread::scope(|scope| {
            for n in 0..5 {
                let (lines, order) = (&lines, &order);
                scope.spawn(move || {
                    assert!(Lines::may_wait());
                    let _head = lines.stand("a");
                    order.lock().unwrap().push(n);
                });
                while lines.lock().get("a").map(|line| line.waiting.len()) != Some(n + 1) {
                    thread::yield_now();
                }
            }
            assert!(order.lock().unwrap().is_empty());
            drop(head);
        });
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4]);
        assert!(lines.lock().is_empty() && !lines.is_there("a") && Lines::may_wait());
    }

    /// Goal: a head that waits for a thread in its own line does not wait for ever. Method: the
    /// head joins a thread that is behind it.
    #[test]
    fn a_head_that_waits_for_its_line_is_passed() {
        let lines = Lines::default();
        let head = lines.stand("a");
        thread::scope(|scope| scope.spawn(|| drop(lines.stand("a"))).join().unwrap());
        assert!(!lines.is_there("a"), "the one behind was the last head");
        let next = lines.stand("a");
        assert!(next.is_first() && !head.is_first());
        drop(head);
        assert!(lines.is_there("a"), "the passed one ends no line of others");
        drop(next);
        assert!(!lines.is_there("a") && Lines::may_wait());
    }

    /// Goal: a task serves its place as a thread does: in order, notified once, and gone when
    /// dropped. Method: tasks behind a thread, one of which is dropped; wakers that count.
    #[test]
    fn tasks_stand_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(folder.path().join("a.redb")).unwrap();
        let (lines, waking) = (Lines::default(), store.core().waking());
        let (counts, wakers): (Vec<_>, Vec<_>) = (0..3).map(|_| counter()).unzip();
        let head = lines.stand("a");
        let mut tasks: Vec<_> = (0..3).map(|_| lines.join_as_task("a", waking.clone())).collect();
        for (task, waker) in tasks.iter_mut().zip(&wakers) {
            assert!(task.poll_head(&mut Context::from_waker(waker)).is_pending());
        }
        drop(tasks.remove(0));
        drop(head);
        let woken = || counts.iter().map(|count| count.0.load(Ordering::SeqCst)).collect::<Vec<_>>();
        assert_eq!(woken(), [0, 1, 0]);
        assert!(tasks[0].poll_head(&mut Context::from_waker(&wakers[1])).is_ready() && tasks[0].is_first());
        assert!(tasks[1].poll_head(&mut Context::from_waker(&wakers[2])).is_pending());
        let decides = tasks[0].decides();
        assert!(!Lines::may_wait());
        drop(decides);
        assert!(Lines::may_wait());
        drop(tasks.remove(0));
        assert_eq!(woken(), [0, 1, 1]);
        drop(tasks);
        assert!(lines.lock().is_empty() && !lines.is_there("a"));
    }

    struct Count(AtomicUsize);

    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn counter() -> (Arc<Count>, Waker) {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        (Arc::clone(&count), Waker::from(count))
    }
}
