//! The pace of passes, and the reason why a captured table waits.
//!
//! **The rule.** Only a running relay sets a pace. A relay asks for passes when it has little left
//! to do: for the dirty keys and the first snapshots of all tables. The writer thread asks for the
//! rest:
//!
//! - for the first snapshot of a published table, while no relay runs;
//! - for dirty keys and snapshots of tables whose events stay in the log, always.
//!
//! Dirty keys of a published table wait for a relay, since they coalesce until a relay publishes
//! them. A relay that only has a row in the file sets no pace. That row bounds trimming and counts
//! under the backlog quota; the quota bounds a snapshot without a relay.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::storage::tables::capture::CaptureId;
use crate::store::settings::capture_types::Captured;
use crate::store::shared::capture_schedule::{CaptureWait, CoalescingPasses, State};
use crate::store::shared::captures::{Known, PendingCaptures};
use crate::store::shared::core::Core;
use crate::store::shared::relays::Pace;
use crate::tuning::CAPTURE_OWN_MS;

/// Returns the reason why a captured table waits. Returns `None` if nothing waits, or if the events
/// are on their way.
pub(in crate::store) fn wait_of(
    capture: Option<&dyn Captured>,
    known: &Known,
    pace: Pace,
    state: &State,
) -> Option<CaptureWait> {
    let backfills = known.row.snapshot.is_open();
    if known.waiting == 0 && !backfills {
        return None;
    }
    let Some(capture) = capture else { return Some(CaptureWait::Registration) };
    if !capture.is_unpublished() {
        match pace {
            Pace::None if backfills => {}
            Pace::None => return Some(CaptureWait::Relay),
            Pace::Paused => return Some(CaptureWait::PausedRelay),
            Pace::Away => return Some(CaptureWait::Broker),
            Pace::Flows => {}
        }
    }
    if state.has_no_room() {
        return Some(CaptureWait::Quota);
    }
    let retries =
        if backfills { state.rests(known.row.id) } else { state.failed_of(known.row.id) >= known.waiting };
    retries.then_some(CaptureWait::Retry)
}

impl CoalescingPasses {
    /// Returns the reasons, by table.
    pub(crate) fn waits(core: &Core) -> BTreeMap<String, CaptureWait> {
        let pace = core.relays.pace();
        let tail = core.tail();
        let state = core.passes.lock();
        let waits = tail.captures.iter().filter_map(|(name, known)| {
            let capture = core.settings.captures.get(name).map(|capture| &**capture);
            Some((name.clone(), wait_of(capture, known, pace, &state)?))
        });
        waits.collect()
    }

    /// Returns the time until the writer thread has to ask for a pass itself. `None` means never,
    /// as things are now. The function logs once what a table waits for outside of the store.
    pub(crate) fn look(core: &Core) -> Option<Duration> {
        if core.settings.captures.is_empty() || core.is_closing() || core.poisoned().is_some() {
            return None;
        }
        // From here on, a commit that begins something notifies the writer thread.
        core.passes.looks_soon.store(false, Ordering::SeqCst);
        let runs = core.relays.pace() != Pace::None;
        let own = |capture: &dyn Captured| capture.is_unpublished();
        let has_own = core.settings.captures.iter().any(|capture| own(&**capture));
        let (mut backfills, mut dirty) = (Vec::new(), Vec::new());
        let mut waits = false;
        {
            let tail = core.tail();
            for capture in core.settings.captures.iter() {
                let Some(known) = tail.captures.get(capture.name()) else { continue };
                let own = own(&**capture);
                waits |= known.waiting > 0;
                if known.row.snapshot.is_open() && (own || !runs) {
                    backfills.push(known.row.id);
                }
                if own && known.waiting > 0 {
                    dirty.push((known.row.id, known.waiting));
                }
            }
        }
        core.passes.say(&Self::waits(core));
        let due_ms = {
            let state = core.passes.lock();
            let dirty_due = dirty.iter().filter_map(|(id, waiting)| state.dirty_due_ms(*id, *waiting)).min();
            let dirty_due = dirty_due.map(|due| due.max(state.own_after_ms));
            let due = dirty_due.into_iter().chain(state.backfill_due_ms(backfills)).min();
            due.map(|due| due.max(state.not_before_ms))
        };
        // No lock of the store is held while the application's clock runs.
        let wait =
            due_ms.map(|due| Duration::from_millis(due.saturating_sub(core.settings.clock.now().mono_ms)));
        let soon = wait.is_some_and(|wait| wait <= Duration::from_millis(CAPTURE_OWN_MS));
        core.passes.looks_soon.store(soon || (!has_own && (runs || waits)), Ordering::SeqCst);
        wait
    }

    /// Logs the tables of the file that this process has not registered, if dirty keys of theirs
    /// wait.
    pub(crate) fn say_at_open(core: &Core) {
        let waits = Self::waits(core);
        for (table, waits_for) in waits.iter().filter(|(_, wait)| **wait == CaptureWait::Registration) {
            tracing::info!(table, %waits_for, "a captured table waits");
        }
    }

    /// Whether the writer thread must look, after a commit that has written captured rows.
    pub(crate) fn begins(&self, pending: &PendingCaptures) -> bool {
        pending.written().next().is_some() && !self.looks_soon.load(Ordering::SeqCst)
    }

    /// Logs what tables wait for. A reason is logged once, until nothing of the table waits.
    fn say(&self, waits: &BTreeMap<String, CaptureWait>) {
        let news: Vec<_> = {
            let mut state = self.lock();
            state.said.retain(|name, _| waits.contains_key(name));
            let outside = waits
                .iter()
                .filter(|(_, wait)| !matches!(wait, CaptureWait::Retry | CaptureWait::Registration));
            let news = outside.filter(|(name, wait)| state.said.get(*name) != Some(wait));
            let news: Vec<_> = news.map(|(name, wait)| (name.clone(), *wait)).collect();
            state.said.extend(news.iter().cloned());
            news
        };
        for (table, waits_for) in news {
            tracing::info!(table, %waits_for, "a captured table waits");
        }
    }
}

impl State {
    /// Returns the time of the next try of a dirty key of this table.
    fn dirty_due_ms(&self, id: CaptureId, waiting: u64) -> Option<u64> {
        if waiting > self.failed_of(id) { Some(0) } else { self.retry_ms(id) }
    }
}
