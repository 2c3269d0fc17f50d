//! Simulated power cuts, at every operation on the disk.
//!
//! A seeded workload uses everything that the store keeps. Its disk is in memory and records each
//! operation (`disk`). The workload runs once (`record`). Each operation is then a place for a cut,
//! and each cut gives several images of what the disk could hold.
//!
//! The judge (`judge`) opens an image as the library opens a file. The image must show exactly the
//! acknowledged writes, perhaps with the write under way. That holds for every table, and for what
//! memory derives from the tables. Work must be able to go on from there. A plain model (`model`)
//! says what the store must hold, at every step of the recording too.
//!
//! `cargo test` uses short recordings. In a release build, `ONEWRITE_CRASH=seconds` draws seed after
//! seed for that time, from `ONEWRITE_CRASH_SEED` on, in each test. A failure reports the seed, the
//! cut, the damage, and the path of the image. The places of pages differ a little from run to run:
//! ids are drawn, and redb writes the entries of a hash map in its order.

mod disk;
mod faults;
mod judge;
mod model;
mod record;
mod workload;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use self::disk::{Damage, Disk, Fault, Op, Rng};
use self::model::Model;
use self::record::{Cut, Recording};
use self::workload::{Blob, Subject};
use crate::storage::errors::panic_text;

/// So many failures are reported, and their images kept.
const REPORTED_MAX: usize = 3;

/// Where a failure can be found again.
#[derive(Debug, Clone, Copy)]
struct Case {
    seed: u64,
    steps: usize,
    cut: usize,
    damage: Damage,
}

/// What was tried, and what failed.
#[derive(Debug)]
struct Tally {
    /// When a long run ends.
    ends: Option<Instant>,
    images: AtomicUsize,
    refused: AtomicUsize,
    failed: AtomicUsize,
    reported: Mutex<Vec<String>>,
}

impl Default for Tally {
    fn default() -> Self {
        let ends = long_run().map(|duration| Instant::now() + duration);
        let (images, refused, failed) = Default::default();
        Self { ends, images, refused, failed, reported: Mutex::default() }
    }
}

impl Tally {
    fn is_over(&self) -> bool {
        self.ends.is_some_and(|ends| ends < Instant::now())
    }

    /// The seeds, each with the steps of its recording: these, and then others while there is time.
    fn seeds(
        &self,
        short: &'static [(u64, usize)],
        steps: usize,
    ) -> impl Iterator<Item = (u64, usize)> + use<> {
        let first =
            std::env::var("ONEWRITE_CRASH_SEED").map_or(100, |seed| seed.parse().expect("it is a number"));
        let ends = self.ends;
        let is_time = move |_: &u64| ends.is_some_and(|ends| Instant::now() < ends);
        short.iter().copied().chain((first..).take_while(is_time).map(move |seed| (seed, steps)))
    }

    /// Judges one image; a panic is a failure too.
    fn judge<T>(&self, case: Case, image: &[u8], judge: impl FnOnce() -> Result<T, String>) -> Option<T> {
        self.images.fetch_add(1, Ordering::Relaxed);
        let judged = catch_unwind(AssertUnwindSafe(judge));
        let judged = judged.unwrap_or_else(|panic| Err(format!("panicked: {}", panic_text(&*panic))));
        judged.map_err(|what| self.failed(case, image, &what)).ok()
    }

    fn failed(&self, case: Case, image: &[u8], what: &str) {
        if self.failed.fetch_add(1, Ordering::Relaxed) < REPORTED_MAX {
            let Case { seed, steps, cut, damage } = case;
            let name = format!("onewrite-crash-{seed}-{steps}-{cut}-{damage:?}.redb");
            let path = std::env::temp_dir().join(name);
            let kept = std::fs::write(&path, image);
            let text = format!("{case:?}, image {} ({kept:?}): {what}", path.display());
            eprintln!("{text}");
            self.reported.lock().unwrap().push(text);
        }
    }

    fn end(self, name: &str) {
        let [images, refused, failed] = [self.images, self.refused, self.failed].map(AtomicUsize::into_inner);
        eprintln!("{name}: {images} images, {refused} refused by a typed error, {failed} failures");
        assert!(failed == 0, "{failed} of {images} failed: {:#?}", self.reported.into_inner().unwrap());
        assert!(images > 0, "nothing was tried");
    }
}

/// Which images are made of a cut: where nothing is unsynced there is one.
fn damages(cut: &Cut<'_>, seed: u64, per_cut: usize) -> Vec<Damage> {
    if cut.unsynced.is_empty() {
        return vec![Damage::Nothing];
    }
    if per_cut >= Damage::ALL.len() {
        return Damage::ALL.to_vec();
    }
    let mut rng = Rng::of(&[seed, cut.at as u64, 1]);
    (0..per_cut).map(|_| Damage::ALL[rng.index(Damage::ALL.len())]).collect()
}

/// Judges `per_cut` images of each cut, on two threads.
fn cut_everywhere(tally: &Tally, recording: &Recording, per_cut: usize) {
    let half = |thread: usize| {
        for cut in recording.cuts(0).filter(|cut| cut.at % 2 == thread).take_while(|_| !tally.is_over()) {
            for damage in damages(&cut, recording.seed, per_cut) {
                let image = cut.image(recording.seed, damage);
                judge_one(tally, recording, &cut, damage, image);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| half(1));
        half(0);
    });
}

/// Returns the moment that the image shows.
fn judge_one(
    tally: &Tally,
    recording: &Recording,
    cut: &Cut<'_>,
    damage: Damage,
    image: Vec<u8>,
) -> Option<usize> {
    let case = Case { seed: recording.seed, steps: recording.steps(), cut: cut.at, damage };
    let from = recording.acknowledged(cut.at);
    let to = (from + 1).min(recording.moments.len() - 1);
    let kept = image.clone();
    tally.judge(case, &kept, || judge::judge(image, recording, from, to))
}

/// For how long seeds are drawn; `None` in `cargo test`.
fn long_run() -> Option<Duration> {
    let seconds = std::env::var("ONEWRITE_CRASH").ok()?;
    Some(Duration::from_secs(seconds.parse().expect("ONEWRITE_CRASH is a number of seconds")))
}

/// S1. Goal: the acknowledged writes survive a power cut, whatever the cut leaves of unsynced bytes.
/// The write under way is there wholly or not at all, and the work goes on. Method: every cut of the
/// recording.
#[test]
fn a_power_cut_at_every_operation() {
    let (tally, mut gone_through) = (Tally::default(), BTreeSet::new());
    for (seed, steps) in tally.seeds(&[(0, 30), (3, 30), (5, 30), (6, 30)], 60) {
        let recording = Recording::of_new(seed, steps);
        gone_through.extend(recording.gone_through());
        let per_cut = if long_run().is_some() { 4 } else { 1 };
        cut_everywhere(&tally, &recording, per_cut);
    }
    // A workload that has become poor would prove little.
    assert_eq!(gone_through.into_iter().collect::<Vec<_>>(), record::EVERYTHING);
    tally.end("power cuts");
}

/// S2. Goal: a second cut, while a crashed file is opened or soon after, costs no more than the first.
/// Method: images of a recording are opened and worked on. That work is recorded too, and cut everywhere.
#[test]
fn a_power_cut_in_a_recovery() {
    let tally = Tally::default();
    for (seed, steps) in tally.seeds(&[(1, 24), (11, 24)], 40) {
        let recording = Recording::of_new(seed, steps);
        let per_cut = if long_run().is_some() { 4 } else { 1 };
        let cuts: Vec<Cut<'_>> = recording.cuts(0).filter(|cut| !cut.unsynced.is_empty()).collect();
        let mut rng = Rng::of(&[seed, 2]);
        for _ in 0..4 {
            let cut = &cuts[rng.index(cuts.len())];
            let damage = Damage::ALL[rng.index(Damage::ALL.len())];
            let image = cut.image(seed, damage);
            let Some(moment) = judge_one(&tally, &recording, cut, damage, image.clone()) else { continue };
            let model = &recording.moments[moment].moment.model;
            cut_everywhere(&tally, &Recording::of(seed, image, model, 2), per_cut);
        }
    }
    tally.end("power cuts in recoveries");
}

/// S8. Goal: a cut during the creation of a store leaves nothing, a store, or a file that an error
/// refuses. A database that was to become a store is still that database, or is a store. Method: every
/// cut of the engine's part of both. The file system's part is tested with killed processes: a new
/// file gets its name once all of it is synced.
#[test]
fn a_power_cut_in_a_creation() {
    let tally = Tally::default();
    for (seed, _) in tally.seeds(&[(0, 0), (4, 0)], 0) {
        let disk = Disk::default();
        Subject::make(seed, &disk).unwrap();
        let open = |image: Vec<u8>| Subject::open(seed, Disk::of(image));
        each_image(&tally, seed, &[], &disk.take_log(), |image| {
            match (!image.is_empty()).then(|| open(image)) {
                Some(Ok(subject)) => judge::go_on(subject, Model::default()),
                _ => Ok(()),
            }
        });

        let disk = Disk::default();
        let blob = Blob { tag: 7, len: 9000 };
        Subject::make_plain(&disk, blob);
        let (plain, _) = (disk.bytes(), disk.take_log());
        Subject::adopt(seed, disk.clone()).unwrap().close().unwrap();
        each_image(&tally, seed, &plain, &disk.take_log(), |image| {
            let subject = Subject::adopt(seed, Disk::of(image)).map_err(|error| format!("open: {error}"))?;
            let model = Model { rows: [(0, blob)].into(), ..Model::default() };
            judge::compare(subject.store(), &model)?;
            judge::go_on(subject, model)
        });
    }
    tally.end("power cuts in creations");
}

/// Judges an image of each cut.
fn each_image(
    tally: &Tally,
    seed: u64,
    start: &[u8],
    ops: &[Op],
    judge: impl Fn(Vec<u8>) -> Result<(), String>,
) {
    for cut in record::cuts(start, ops, 0) {
        for damage in damages(&cut, seed, 1) {
            let image = cut.image(seed, damage);
            tally.judge(Case { seed, steps: 0, cut: cut.at, damage }, &image, || judge(image.clone()));
        }
    }
}

/// S5. Goal: after a disk that lied about a sync, the store shows an older moment, or an error says what
/// is wrong. No event is another, and nothing panics. Method: the newest one to three syncs before a
/// cut are taken back.
#[test]
fn a_power_cut_on_a_disk_that_lies() {
    let tally = Tally::default();
    for (seed, steps) in tally.seeds(&[(7, 20), (8, 20)], 60) {
        let recording = Recording::of_new(seed, steps);
        let every = if long_run().is_some() { 1 } else { 4 };
        for lies in 1..=3 {
            let cuts = recording.cuts(lies).filter(|cut| cut.at % every == 0 && !cut.unsynced.is_empty());
            for cut in cuts.take_while(|_| !tally.is_over()) {
                let damage =
                    Damage::ALL[Rng::of(&[seed, cut.at as u64, lies as u64]).index(Damage::ALL.len())];
                let image = cut.image(seed, damage);
                let case = Case { seed, steps, cut: cut.at, damage };
                let to = (recording.acknowledged(cut.at) + 1).min(recording.moments.len() - 1);
                let judged = tally.judge(case, &image, || judge::judge_lie(image.clone(), &recording, to));
                tally.refused.fetch_add(usize::from(judged == Some(false)), Ordering::Relaxed);
            }
        }
    }
    tally.end("power cuts on a lying disk");
}

/// S3. Goal: an I/O error is reported as such, and a failed write poisons the store. No sync is tried
/// again, and the next open finds the acknowledged writes. Method: each call to the disk fails in turn,
/// reads too, once or from then on.
#[test]
fn an_error_at_every_call() {
    let tally = Tally::default();
    for (seed, steps) in tally.seeds(&[(0, 16), (3, 16)], 30) {
        let start = Recording::of_new(seed, 0).start;
        let calls = faults::calls(seed, &start, steps);
        let every = if long_run().is_some() { 1 } else { (calls / 150).max(1) };
        for at in (0..calls).step_by(every).take_while(|_| !tally.is_over()) {
            let (lasting, all) = (at / every % 2 == 0, at / every % 4 < 2);
            let damage = if all { Damage::Everything } else { Damage::Nothing };
            let case = Case { seed, steps, cut: at, damage };
            tally.judge(case, &start, || {
                faults::run(seed, &start, steps, Some(Fault { at, lasting }))?.reopened(seed, all)
            });
        }
    }
    tally.end("errors");
}
