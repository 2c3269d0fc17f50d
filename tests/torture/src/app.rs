//! An application: it owns a store, so its writers and its relay are one process. It may be killed at any moment.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use onewrite::broker::RabbitMq;
use onewrite::limits::JOURNAL_BYTES_MIN;
use onewrite::redb::TableDefinition;
use onewrite::{Capture, Change, Event, FaultClass, Retention, Store};
use onewrite_torture_checker::formats::{ROUTING_KEY, exchange};

use crate::Result;
use crate::plan::{self, Plan, Progress, RELAY, WRITERS};
use crate::writer::{self, Writer};

/// Batch to number of events: the state that is written with them.
pub(crate) const BATCHES: TableDefinition<'_, u64, u64> = TableDefinition::new("batches");
/// The captured table: each change becomes an event with the row's key, and its value as payload.
pub(crate) const CAPTURED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("captured");
/// The exchange that captured changes go to.
pub(crate) const CAPTURED_TO: u8 = 0;

/// More than the node takes: such a message is refused, and takes its channel along.
pub(crate) const POISON_BYTES: u32 = (crate::support::rabbit::MESSAGE_BYTES_MAX as u32) + 1000;

pub(crate) fn run(plan: &Plan) -> Result<()> {
    writer::quiet_panics();
    let closing = plan::closing();
    let store = open(plan)?;
    let publisher = RabbitMq::new(&plan.url)?
        .connection_name(&plan.name)
        .heartbeat(Duration::from_secs(2))
        .confirm_deadline(Duration::from_secs(10))
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(500));
    let relay = store
        .relay(RELAY)
        .destination_attempts(2)
        .attempts(2)
        .backoff(Duration::from_millis(20), Duration::from_millis(500))
        .spawn(publisher)?;
    let (enough, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|number| {
                let writer = Writer::new(plan, &store, number)?;
                let enough = &enough;
                Ok(scope.spawn(move || writer.run(enough)))
            })
            .collect::<Result<_>>()?;
        scope.spawn(|| {
            if let Err(error) = redrive(&store, &ended) {
                eprintln!("{}, life {}: driving again failed: {error}", plan.name, plan.life);
                std::process::exit(5);
            }
        });
        while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            let there = report(&store)?.events;
            let is_enough = plan.quota.map_or(closing.load(Ordering::SeqCst), |quota| there >= quota);
            enough.store(is_enough, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(100));
        }
        for writer in writers {
            // A store that takes nothing more ends the process; its next life goes on.
            if let Err(error) = writer.join().map_err(|_| "a writer panicked")? {
                eprintln!("{}: {error}", plan.name);
                std::process::exit(5);
            }
        }
        while !closing.load(Ordering::SeqCst) || report(&store)?.backlog > 0 {
            report(&store)?;
            std::thread::sleep(Duration::from_millis(200));
        }
        ended.store(true, Ordering::SeqCst);
        Ok(())
    })?;
    relay.stop(Duration::from_secs(10));
    Ok(store.close()?)
}

fn open(plan: &Plan) -> Result<Store> {
    let retention = if plan.trims { Retention::until_confirmed() } else { Retention::forever() };
    let captured = Capture::with(CAPTURED, |change: &Change<'_, &str, &[u8]>| {
        Ok(Event::bytes("captured", change.new.unwrap_or_default()).key(change.key))
    });
    // Each other life has a journal, which turns over every dozen commits.
    let journal_bytes = if plan.life % 2 == 1 { JOURNAL_BYTES_MIN } else { 0 };
    Ok(Store::builder()
        .journal_bytes(journal_bytes)
        .retention(retention)
        .payload_bytes_max(POISON_BYTES as usize)
        .capture(captured.to(exchange(CAPTURED_TO), ROUTING_KEY))
        .open(plan.store())?)
}

/// Reports to the conductor how far it is.
fn report(store: &Store) -> Result<Progress> {
    let stats = store.stats()?;
    let relay = stats.relays.get(RELAY).cloned().unwrap_or_default();
    let waiting = relay.retrying + relay.scheduled + relay.parked + destination_faults(store)?.len() as u64;
    let progress = Progress { events: stats.next_seq, backlog: stats.next_seq - relay.position + waiting };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&progress)?)?;
    out.flush()?;
    Ok(progress)
}

/// Drives what is in quarantine for its destination's sake again. What the broker cannot take stays there.
fn redrive(store: &Store, ended: &AtomicBool) -> Result<()> {
    while !ended.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(700));
        for seq in destination_faults(store)? {
            store.quarantine(RELAY)?.redrive(seq)?;
        }
    }
    Ok(())
}

fn destination_faults(store: &Store) -> Result<Vec<u64>> {
    let (quarantine, mut seqs, mut after) = (store.quarantine(RELAY)?, Vec::new(), None);
    loop {
        let page = quarantine.list(after, 1000)?;
        let Some(last) = page.last() else { return Ok(seqs) };
        after = Some(last.seq);
        let of_destination = page.iter().filter(|entry| entry.fault.class != FaultClass::Message);
        seqs.extend(of_destination.map(|entry| entry.seq));
    }
}
