//! One run of the workload, with each of its operations on the disk. A test cuts the recording
//! anywhere afterwards, and does not run the workload again.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::disk::{self, Damage, Disk, Op, Rng};
use super::judge::{Moment, compare, observe};
use super::model::Model;
use super::workload::{Step, Subject};

/// After so many operations on the disk this was acknowledged.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) ops: usize,
    pub(super) moment: Moment,
}

#[derive(Debug)]
pub(super) struct Recording {
    pub(super) seed: u64,
    /// The disk before the first operation, all of it durable.
    pub(super) start: Vec<u8>,
    pub(super) ops: Vec<Op>,
    /// In order; the first is from before the first operation.
    pub(super) moments: Vec<Checkpoint>,
    kinds: BTreeSet<&'static str>,
}

/// What a good set of recordings goes through.
pub(super) const EVERYTHING: &[&str] = &[
    "closes and opens",
    "empties the log",
    "exclusive",
    "fails",
    "group",
    "grows",
    "once",
    "progress alone",
    "progress waits",
    "quick repair",
    "relay",
    "rolls back",
    "trims",
    "write",
    "writes what is derived",
];

impl Recording {
    /// Makes a store, opens it, and takes that number of steps.
    pub(super) fn of_new(seed: u64, steps: usize) -> Self {
        let disk = Disk::default();
        Subject::make(seed, &disk).unwrap();
        // The first to open it notes what is captured.
        Subject::open(seed, disk.clone()).unwrap().close().unwrap();
        Self::of(seed, disk.bytes(), &Model::default(), steps)
    }

    /// Opens the store on the disk, which is as the model says. Takes that number of steps, and closes.
    pub(super) fn of(seed: u64, start: Vec<u8>, model: &Model, steps: usize) -> Self {
        let disk = Disk::of(start.clone());
        let mut model = model.after_crash();
        let mut subject = Subject::open(seed, disk.clone()).unwrap();
        let mut recording =
            Self { seed, start, ops: Vec::new(), moments: Vec::new(), kinds: BTreeSet::new() };
        recording.checkpoint(0, &subject, &model);
        for _ in 0..steps {
            let step = Step::draw(seed, &model);
            recording.step(&mut subject, &mut model, &step);
        }
        recording.step(&mut subject, &mut model, &Step::Reopen);
        subject.close().unwrap();
        recording.ops = disk.take_log();
        recording
    }

    fn step(&mut self, subject: &mut Subject, model: &mut Model, step: &Step) {
        self.kinds.insert(step.name());
        let taken = subject.take_and_report(step, model, |subject, model| {
            self.checkpoint(subject.disk.ops(), subject, model);
        });
        taken.unwrap_or_else(|error| panic!("seed {}, step {}: {step:?}: {error}", self.seed, model.steps));
        self.checkpoint(subject.disk.ops(), subject, model);
    }

    fn checkpoint(&mut self, ops: usize, subject: &Subject, model: &Model) {
        let whole = compare(subject.store(), model);
        let observed = whole.and_then(|()| observe(subject.store(), model));
        let observed =
            observed.unwrap_or_else(|what| panic!("seed {}, step {}: {what}", self.seed, model.steps));
        self.moments.push(Checkpoint { ops, moment: Moment { model: model.clone(), observed } });
    }

    /// What it went through, of [`EVERYTHING`].
    pub(super) fn gone_through(&self) -> BTreeSet<&'static str> {
        let mut through: BTreeSet<_> = self.kinds.clone();
        let newest = self.moments.last().map(|checkpoint| &checkpoint.moment.observed);
        let [_, _, trimmed_to, _, derived_through, _] = newest.map_or([0; 6], |observed| observed.ends);
        let has_set_len = self.ops.iter().any(|op| matches!(op, Op::SetLen(_)));
        let is_empty = |checkpoint: &Checkpoint| {
            checkpoint.moment.observed.has_empty_log() && !checkpoint.moment.model.events.is_empty()
        };
        let facts = [
            (self.moments.iter().any(is_empty), "empties the log"),
            (trimmed_to > 0, "trims"),
            (derived_through > 0, "writes what is derived"),
            (has_set_len, "grows"),
        ];
        through.extend(facts.iter().filter(|(holds, _)| *holds).map(|(_, name)| *name));
        through
    }

    /// Steps taken in all, those before its start too.
    pub(super) fn steps(&self) -> usize {
        self.moments.last().map_or(0, |checkpoint| checkpoint.moment.model.steps as usize)
    }

    /// The newest moment that was acknowledged before this operation.
    pub(super) fn acknowledged(&self, cut: usize) -> usize {
        self.moments.partition_point(|checkpoint| checkpoint.ops <= cut) - 1
    }

    /// Cuts the power before each operation, and after the last. That number of newest syncs were lies.
    pub(super) fn cuts(&self, lies: usize) -> impl Iterator<Item = Cut<'_>> {
        cuts(&self.start, &self.ops, lies)
    }
}

pub(super) fn cuts<'a>(start: &[u8], ops: &'a [Op], lies: usize) -> impl Iterator<Item = Cut<'a>> {
    let mut durable = Arc::new(start.to_vec());
    let (mut synced, mut syncs) = (0, Vec::new());
    (0..=ops.len()).map(move |at| {
        if let Some(Op::Sync) = at.checked_sub(1).and_then(|newest| ops.get(newest)) {
            syncs.push(at);
            let honest = syncs.len().checked_sub(lies + 1).map_or(0, |newest| syncs[newest]);
            disk::apply_all(Arc::make_mut(&mut durable), &ops[synced..honest]);
            synced = honest;
        }
        Cut { at, durable: Arc::clone(&durable), unsynced: &ops[synced..at] }
    })
}

/// What is durable at a cut, and what is only written.
#[derive(Debug, Clone)]
pub(super) struct Cut<'a> {
    pub(super) at: usize,
    pub(super) durable: Arc<Vec<u8>>,
    pub(super) unsynced: &'a [Op],
}

impl Cut<'_> {
    pub(super) fn image(&self, seed: u64, damage: Damage) -> Vec<u8> {
        disk::image(&self.durable, self.unsynced, damage, &mut Rng::of(&[seed, self.at as u64]))
    }
}
