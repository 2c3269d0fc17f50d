//! A disk that fails while the process lives.

use super::disk::{self, Disk, Fault};
use super::judge::{compare, go_on};
use super::model::Model;
use super::workload::{Step, Subject};
use crate::error::Error;
use crate::event::Event;

/// What came of one run on a disk that failed.
pub(super) struct Failed {
    model: Model,
    /// The step that has met the failure, if one has.
    in_flight: Option<Step>,
    start: Vec<u8>,
    disk: Disk,
}

/// So many calls the disk gets in this run when nothing fails.
pub(super) fn calls(seed: u64, start: &[u8], steps: usize) -> usize {
    run(seed, start, steps, None).expect("nothing fails").disk.calls()
}

/// Takes that number of steps on a disk that fails at this call, or until a step fails. Then looks at
/// the answers of the store.
pub(super) fn run(seed: u64, start: &[u8], steps: usize, fault: Option<Fault>) -> Result<Failed, String> {
    let disk = Disk::of(start.to_vec());
    if let Some(fault) = fault {
        disk.fail(fault);
    }
    let mut failed =
        Failed { model: Model::default(), in_flight: None, start: start.to_vec(), disk: disk.clone() };
    let Ok(mut subject) = Subject::open(seed, disk.clone()) else { return failed.checked() };
    for _ in 0..steps {
        let step = Step::draw(seed, &failed.model);
        let Err(error) = subject.take(&step, &mut failed.model) else { continue };
        failed.in_flight = Some(step);
        if disk.failed().is_empty() {
            return Err(format!("without a failure of the disk: {error}"));
        }
        if subject.is_open() {
            is_poisoned(&subject, &error, &disk)?;
        }
        return failed.checked();
    }
    let close = subject.close();
    if close.is_err() && disk.failed().is_empty() {
        return Err("closing fails though the disk does not".into());
    }
    failed.checked()
}

/// After a write that has failed nothing is accepted any more; what was unknown is said so.
fn is_poisoned(subject: &Subject, error: &Error, disk: &Disk) -> Result<(), String> {
    let store = subject.store();
    let failed = disk.failed();
    let again = store.write(|tx| tx.append(Event::bytes("again", "").unpublished()));
    match (error, again) {
        (Error::CommitUnknown { .. } | Error::Poisoned { .. }, Err(Error::Poisoned { .. })) => Ok(()),
        (Error::Storage(failure), Err(Error::Poisoned { .. })) if failure.fatal => Ok(()),
        (_, again) => Err(format!("{failed:?} gives {error:?}, and then {again:?}")),
    }
}

impl Failed {
    fn checked(self) -> Result<Self, String> {
        match self.disk.after_failed_sync() {
            0 => Ok(self),
            calls => Err(format!("{calls} calls that write, after a sync that has failed")),
        }
    }

    /// The disk as the next open finds it: all that was written, or nothing that was not synced.
    fn image(&self, all: bool) -> Vec<u8> {
        if all {
            return self.disk.bytes();
        }
        let log = self.disk.take_log();
        let synced = log.iter().rposition(|op| matches!(op, disk::Op::Sync)).map_or(0, |at| at + 1);
        let mut bytes = self.start.clone();
        disk::apply_all(&mut bytes, &log[..synced]);
        bytes
    }

    /// Opens the store on a disk that works again: acknowledged writes are there, failed ones may be.
    pub(super) fn reopened(self, seed: u64, all: bool) -> Result<(), String> {
        let subject =
            Subject::open(seed, Disk::of(self.image(all))).map_err(|error| format!("reopen: {error}"))?;
        // The acknowledged writes; the same with the pending progress that a close writes; and the same
        // with the write under way.
        let mut closed = self.model.clone();
        closed.take(&Step::Reopen);
        let mut may_be = vec![self.model.after_crash(), closed];
        let first = self.in_flight.as_ref().and_then(Step::first_commit);
        may_be.extend(self.in_flight.iter().chain(&first).map(|step| {
            let mut after = self.model.clone();
            after.take(step);
            after.after_crash()
        }));
        let mut differs = Vec::new();
        for model in may_be {
            match compare(subject.store(), &model) {
                Ok(()) => return go_on(subject, model),
                Err(what) => differs.push(what),
            }
        }
        Err(format!(
            "{:?} failed at {:?}; it is none of what it may be: {differs:?}",
            self.disk.failed(),
            self.in_flight
        ))
    }
}
