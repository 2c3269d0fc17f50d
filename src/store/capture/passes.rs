//! Coalescing passes: they turn waiting changes into events, a bounded piece at a time.
//!
//! A coalescing pass is one closure on the writer thread. It publishes the oldest dirty keys in
//! their order, from where the last pass ended. So a key that changes all the time cannot starve
//! the others. The pass also backfills a piece of a table that was switched on. Relays ask for
//! passes when they have little left to do, so dirty keys coalesce while the broker is away. The
//! writer thread asks for work that no running relay holds ([`pace`](super::pace)).
//!
//! **Invariants.** One pass runs at a time, since only the writer thread runs passes. The results
//! of a pass are noted in memory once its commit is known; a result that is lost is only tried
//! again. A key whose codec fails stays dirty and holds up no other key.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, Result, caught};
use crate::oneshot::WakeChain;
use crate::store::capture::piece::Piece;
use crate::store::shared::capture_schedule::{CoalescingPasses, Outcome};
use crate::store::shared::core::Core;
use crate::store::shared::write_wait::Purpose;
use crate::store::transaction::Transaction;
use crate::store::transaction::write::Write;
use crate::tuning::{CAPTURE_OWN_MS, CAPTURE_RETRY_MS};

/// One pass, as the writer thread runs it.
pub(crate) struct CoalescingPass {
    core: Arc<Core>,
    outcome: Option<Result<Outcome>>,
}

impl CoalescingPass {
    pub(crate) fn new(core: &Arc<Core>) -> Self {
        Self { core: Arc::clone(core), outcome: None }
    }
}

impl Write for CoalescingPass {
    fn purpose(&self) -> &Purpose {
        static PASS: Purpose = Purpose::Own("a coalescing pass");
        &PASS
    }

    fn run(&mut self, tx: &Transaction) -> bool {
        let run = || Piece::new(tx, tx.core.passes.asked()).run();
        let outcome = tx.within_own_bounds(|| caught(run));
        // No caller waits for the pass's events.
        tx.take_seqs();
        let outcome = outcome.unwrap_or_else(|_| Err(Error::app("it panicked")));
        tx.note_pass();
        tx.core.passes.lock().tried =
            outcome.iter().flat_map(|outcome| outcome.failed.iter().cloned()).collect();
        if let Err(error) = &outcome {
            tx.core.suspect(error);
        }
        let good = outcome.is_ok();
        self.outcome = Some(outcome);
        good
    }

    fn done(self: Box<Self>, _: &Arc<Core>, _: Option<&Arc<WakeChain>>) {
        let Self { core, outcome } = *self;
        note(&core, outcome.unwrap_or_else(|| Err(Error::Closed { path: core.path.clone() })));
    }

    fn failed(self: Box<Self>, error: Error) {
        note(&self.core, Err(error));
    }
}

/// Notes how a pass has ended, and allows the next request for a pass.
fn note(core: &Core, outcome: Result<Outcome>) {
    let now_ms = core.settings.clock.now().mono_ms;
    {
        let asked = core.passes.asked();
        let mut state = core.passes.lock();
        if asked.own {
            state.own_after_ms = now_ms.saturating_add(CAPTURE_OWN_MS);
        }
        match outcome {
            Ok(outcome) => state.note(outcome, now_ms),
            Err(error) => {
                state.tried.clear();
                tracing::error!(%error, "what captured tables have left to publish was not read; it is tried again");
                state.not_before_ms = now_ms.saturating_add(CAPTURE_RETRY_MS.0);
            }
        }
    }
    core.passes.ended.fetch_add(1, Ordering::SeqCst);
    core.passes.asked.store(0, Ordering::SeqCst);
    // Relays look again, even if nothing was committed.
    core.relays.notify_all();
}

impl CoalescingPasses {
    /// Returns when the next pass has something to do, by the monotonic clock. Returns `None` if
    /// nothing waits.
    pub(crate) fn due_ms(core: &Core) -> Option<u64> {
        if core.settings.captures.is_empty() {
            return None;
        }
        let (waiting, backfills) = {
            let tail = core.tail();
            let known = core.settings.captures.iter().filter_map(|capture| tail.captures.get(capture.name()));
            let (waiting, backfills): (Vec<_>, Vec<_>) = known
                .map(|known| (known.waiting, known.row.snapshot.is_open().then_some(known.row.id)))
                .unzip();
            (waiting.into_iter().sum::<u64>(), backfills)
        };
        let state = core.passes.lock();
        let dirty_due = match waiting {
            0 => None,
            _ if waiting > state.failed.len() as u64 => Some(0),
            _ => state.failed.values().map(|failed| failed.due_ms).min(),
        };
        let backfill_due = state.backfill_due_ms(backfills.into_iter().flatten());
        Some(dirty_due.into_iter().chain(backfill_due).min()?.max(state.not_before_ms))
    }
}

#[cfg(test)]
mod tests {
    use redb::TableDefinition;

    use super::*;
    use crate::event::Event;
    use crate::storage::tables::capture::{CaptureMode, CaptureRow, DirtyKind, SnapshotState, dirty_key};
    use crate::store::Store;
    use crate::store::settings::capture::Capture;
    use crate::store::shared::capture_schedule::{Asked, State};
    use crate::store::shared::captures::PendingCaptures;
    use crate::tuning::{CAPTURE_FAILED_MAX, CAPTURE_PASS_KEYS};

    const TABLE: TableDefinition<'_, u16, u64> = TableDefinition::new("table");

    fn open(folder: &tempfile::TempDir, mode: CaptureMode) -> Store {
        let codec = |change: &crate::store::settings::capture::Change<'_, u16, u64>| {
            if change.new == Some(13) {
                return Err(Error::app("unlucky"));
            }
            Ok(Event::bytes(change.operation.name(), change.key.to_string()).unpublished())
        };
        let capture = Capture::with(TABLE, codec).mode(mode);
        Store::builder().capture(capture).open(folder.path().join("a.redb")).unwrap()
    }

    /// Runs one pass in a transaction of its own, as if there were a relay. `before` runs first, in
    /// the same transaction.
    fn pass(store: &Store, before: impl FnOnce(&Transaction)) -> Vec<String> {
        let core = store.core();
        let mut tx = Transaction::begin(core, "a test").unwrap();
        before(&tx);
        let piece = Piece::new(&tx, Asked { keys: CAPTURE_PASS_KEYS, own: false });
        let outcome = piece.run().unwrap();
        core.passes.lock().tried = outcome.failed.iter().cloned().collect();
        let published = (core.tail().next_seq..tx.next_seq()).map(|seq| {
            let event = tx.event(seq).unwrap().unwrap();
            format!("{} {}", event.event_type(), String::from_utf8_lossy(event.payload()))
        });
        let published = published.collect();
        tx.finish(1).unwrap();
        drop(tx);
        note(core, Ok(outcome));
        published
    }

    fn waiting(store: &Store) -> u64 {
        store.stats().unwrap().captures["table"].waiting
    }

    /// Goal: a pass and the writes of its group see each other. Method: a dirty key of a row that
    /// was there at switch-on. An earlier write of the same transaction removes the row: the remove
    /// is published. A later write makes a key dirty again that the pass has published.
    #[test]
    fn a_pass_counts_what_its_own_transaction_has_done() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder, CaptureMode::NewestValue);
        store.write(|tx| tx.captured_table(TABLE)?.insert(1, 1).map(drop)).unwrap();
        let id = store.core().tail().captures.get("table").unwrap().row.id;
        let dirty = dirty_key(id, &1_u16.to_le_bytes());
        let tx = store.begin().unwrap();
        tx.touch();
        tx.note_dirty_key(dirty, DirtyKind::Snapshot).unwrap();
        tx.commit().unwrap();
        assert_eq!(waiting(&store), 1);
        let published = pass(&store, |tx| drop(tx.captured_table(TABLE).unwrap().remove(1).unwrap()));
        assert_eq!(published, ["remove 1"]);
        assert_eq!(waiting(&store), 0);

        store.write(|tx| tx.captured_table(TABLE)?.insert(2, 2).map(drop)).unwrap();
        let mut tx = Transaction::begin(store.core(), "a test").unwrap();
        let outcome = Piece::new(&tx, Asked { keys: CAPTURE_PASS_KEYS, own: false }).run().unwrap();
        tx.captured_table(TABLE).unwrap().insert(2, 3).unwrap();
        tx.finish(1).unwrap();
        drop(tx);
        note(store.core(), Ok(outcome));
        assert_eq!(waiting(&store), 1);
        assert_eq!(pass(&store, |_| ()), ["update 2"]);
        assert_eq!(waiting(&store), 0);
    }

    /// Goal: failures take bounded memory, and slow passes down instead. Method: more failing keys
    /// than are remembered, then look at when the next pass may come.
    #[test]
    fn failures_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder, CaptureMode::NewestValue);
        let keys = u16::try_from(CAPTURE_FAILED_MAX + 2 * CAPTURE_PASS_KEYS).unwrap();
        store
            .write(move |tx| {
                let mut table = tx.captured_table(TABLE)?;
                (0..keys).try_for_each(|key| table.insert(key, 13).map(drop))
            })
            .unwrap();
        let now_ms = || store.core().settings.clock.now().mono_ms;
        for _ in 0..CAPTURE_FAILED_MAX / CAPTURE_PASS_KEYS {
            assert_eq!(pass(&store, |_| ()), Vec::<String>::new());
            assert!(CoalescingPasses::due_ms(store.core()).unwrap() <= now_ms());
        }
        assert_eq!(store.stats().unwrap().captures["table"].failed, CAPTURE_FAILED_MAX as u64);
        pass(&store, |_| ());
        assert_eq!(store.stats().unwrap().captures["table"].failed, CAPTURE_FAILED_MAX as u64);
        assert!(CoalescingPasses::due_ms(store.core()).unwrap() > now_ms());
        assert_eq!(waiting(&store), u64::from(keys));
        // The keys that failed first are met again when their time has come, not before.
        let due = |store: &Store| store.core().passes.lock().failed.values().map(|f| f.due_ms).min().unwrap();
        assert!(due(&store) >= CAPTURE_RETRY_MS.0);
    }

    /// Goal: a pass that finds nothing delays the next pass only if something is due. Method: a
    /// pass where nothing waits; a pass of the writer thread for a table that a relay now
    /// backfills. Then a pass for a dirty key that only memory knows.
    #[test]
    fn a_pass_that_comes_too_late_delays_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder, CaptureMode::NewestValue);
        let is_stuck = |own| {
            let tx = Transaction::begin(store.core(), "a test").unwrap();
            let mut piece = Piece::new(&tx, Asked { keys: CAPTURE_PASS_KEYS, own });
            piece.relay_runs = true;
            piece.run().unwrap().stuck
        };
        assert!(!is_stuck(true) && !is_stuck(false));
        let row = store.core().tail().captures.get("table").unwrap().row.clone();
        let settle = |snapshot, dirty| {
            let row = CaptureRow { snapshot, ..row.clone() };
            let pending = PendingCaptures { rows: [("table".to_owned(), row)].into(), ..Default::default() };
            store.core().tail().captures.settle(&pending, &[(pending.rows["table"].id, dirty)].into());
        };
        settle(SnapshotState::ToBegin, 0);
        assert!(!is_stuck(true));
        settle(SnapshotState::None, 1);
        assert!(is_stuck(false));
    }

    /// Goal: the delay doubles up to its limit.
    #[test]
    fn the_delay_of_a_failing_key_grows() {
        let mut state = State::default();
        let mut delays = Vec::new();
        for _ in 0..8 {
            state.tried.insert(vec![1]);
            state.note(Outcome { failed: vec![vec![1]], ..Outcome::default() }, 100);
            delays.push(state.failed[&vec![1]].due_ms - 100);
        }
        assert_eq!(delays, [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
        state.note(Outcome { settled: vec![vec![1]], ..Outcome::default() }, 100);
        assert!(state.failed.is_empty());
    }
}
