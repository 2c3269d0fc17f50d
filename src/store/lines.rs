//! Lines: commands on one aggregate take turns once they have met a conflict.
//!
//! A command decides outside any transaction, so another one may be faster. Alone that is rare, and costs nothing here. Once a
//! command has met a conflict it stands in the line of its stream, and while there is a line every other command joins it: the
//! newcomers before they decide, and those that had decided when the line began, before they append. So the decision of the
//! line's head is disturbed only by what was in the write group already when the line began: once at most.
//!
//! **Invariants.** A line exists only while somebody stands in it; it has one place per waiting thread. No lock is held while
//! anybody decides. A thread that stands at the head of one line, or is inside a transaction, waits in no line: it decides as it
//! comes. The head that keeps the others waiting for longer than [`LINE_MS_MAX`] is passed: it may wait for one of them.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::tuning::LINE_MS_MAX;

const PATIENCE: Duration = Duration::from_millis(LINE_MS_MAX);

thread_local! {
    /// Heads of lines that this thread is.
    static HEADS: Cell<usize> = const { Cell::new(0) };
}

/// One thread's place.
#[derive(Debug)]
struct Place {
    thread: Thread,
    is_head: AtomicBool,
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
    /// How many there are: what meets no line looks no further.
    count: AtomicUsize,
}

/// The head of a line, until dropped.
#[derive(Debug)]
pub(crate) struct Head<'a> {
    lines: &'a Lines,
    stream: &'a str,
    place: Arc<Place>,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a line for this stream.
    pub(crate) fn is_there(&self, stream: &str) -> bool {
        self.count.load(Ordering::SeqCst) > 0 && self.lock().contains_key(stream)
    }

    /// Whether this thread may wait in a line. At the head of another one it would keep that waiting, and two such threads could
    /// wait for each other.
    pub(crate) fn may_wait() -> bool {
        HEADS.try_with(Cell::get).is_ok_and(|heads| heads == 0)
    }

    /// Waits in the stream's line, which begins here if there is none.
    pub(crate) fn stand<'a>(&'a self, stream: &'a str) -> Head<'a> {
        let place = Arc::new(Place { thread: thread::current(), is_head: AtomicBool::new(false) });
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
        while !place.is_head.load(Ordering::Acquire) {
            let Some(line) = lines.get_mut(stream) else { break };
            let left = PATIENCE.saturating_sub(line.since.elapsed());
            if left.is_zero() {
                line.advance();
                drop(lines);
                // The logger is the application's: not under the lock.
                tracing::warn!(
                    stream,
                    waited_ms = LINE_MS_MAX,
                    "a command takes long to decide; others go on without it"
                );
                lines = self.lock();
                continue;
            }
            drop(lines);
            thread::park_timeout(left);
            lines = self.lock();
        }
        drop(lines);
        // Where the thread ends already, it nests nothing any more.
        let _ = HEADS.try_with(|heads| heads.set(heads.get() + 1));
        Head { lines: self, stream, place }
    }
}

impl Line {
    /// The next one is the head; `false` if nobody waits.
    fn advance(&mut self) -> bool {
        let Some(next) = self.waiting.pop_front() else { return false };
        next.is_head.store(true, Ordering::Release);
        next.thread.unpark();
        (self.head, self.since) = (next, Instant::now());
        true
    }
}

impl Head<'_> {
    /// Nobody has passed it.
    pub(crate) fn is_first(&self) -> bool {
        self.lines.lock().get(self.stream).is_some_and(|line| Arc::ptr_eq(&line.head, &self.place))
    }
}

impl Drop for Head<'_> {
    fn drop(&mut self) {
        let _ = HEADS.try_with(|heads| heads.set(heads.get().saturating_sub(1)));
        let mut lines = self.lines.lock();
        let Some(line) = lines.get_mut(self.stream) else { return };
        // One that was passed is the head no longer.
        if Arc::ptr_eq(&line.head, &self.place) && !line.advance() {
            lines.remove(self.stream);
            self.lines.count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a line serves in the order of arrival, a newcomer sees it, and nothing of it is left. Method: five threads behind a
    /// head; the order in which they are served.
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

    /// Goal: a head that waits for somebody in its own line does not wait for ever. Method: it joins a thread that stands behind it.
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
}
