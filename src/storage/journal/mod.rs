//! A journal between redb and its file. A commit writes its pages to the journal in one piece and
//! syncs them there. The pages go to their places many commits at a time.
//!
//! A commit writes a dozen pages all over the file. In the journal they are one contiguous piece (a
//! *frame*). A page that each commit rewrites (the header, the roots) goes to its place once for
//! hundreds of commits.
//!
//! **Invariants.**
//! - A sync returns when its frame is durable. Its writes are then in the journal, or in the file
//!   and synced there.
//! - The journal has two halves. A half is overwritten only once all it holds is in the file and
//!   synced there. The newer half stays whole until the first frame after that is durable. So a
//!   torn frame is always the newest there is.
//! - Writes that are too large for a frame go to their places at once (*direct*). The file then
//!   keeps the promise of a sync by itself. A frame without blocks says that earlier frames must
//!   not be replayed.
//! - Nothing goes to its place before its frame is durable, except direct writes. A direct write is
//!   of an uncommitted transaction or of the header. In the first case its pages are free in the
//!   last durable state, and the storage engine never overwrites that state. In the second case the
//!   header's last durable form is in a frame, or in the file if there is no frame. The header's
//!   own checksums there detect a torn header.
//! - After an error nothing is written any more, and the journal stays for the next open.
//! - `generation` decides which journal belongs to which file, and when it may be overwritten.

mod frame;
mod generation;
mod side;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::io::{Error, ErrorKind, Result};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::{BackendError, StorageBackend};

use self::frame::{BLOCK, Blocks, encode, frame_bytes};
pub(crate) use self::generation::Sides;
use self::generation::{Id, Refusal};
pub(crate) use self::side::{SideFile, is_journaled};

use crate::error::OpenError;

#[cfg(fuzzing)]
pub(crate) use self::frame::fuzzing_journal;

const BLOCK_BYTES: u64 = BLOCK as u64;
/// The most adjoining blocks that one call writes to their places.
const JOINED_MAX: usize = 64;

/// The options of a journal.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct JournalOptions {
    /// The size. With 0, an existing journal is brought into the file, and no journal remains.
    pub(crate) bytes: usize,
    /// Whether to give up a missing journal.
    pub(crate) abandon: bool,
}

/// Why a file could not be opened behind a journal. It is kept here because the storage engine
/// passes on errors of the operating system only.
pub(crate) type JournalRefusal = Arc<Mutex<Option<OpenError>>>;

/// redb's file, behind a journal. The journal begins once the engine has locked the file and asks
/// for its length.
#[derive(Debug)]
pub(crate) struct Journal<D, S: Sides> {
    main: D,
    sides: S,
    options: JournalOptions,
    refusal: JournalRefusal,
    begun: OnceLock<Option<Begun<S::Side>>>,
    overlay: RwLock<Overlay>,
    log: Mutex<Log>,
    /// Whether the file holds writes that the next sync must make durable there.
    main_dirty: AtomicBool,
    failed: AtomicBool,
}

/// A journal in use.
#[derive(Debug)]
struct Begun<F> {
    side: F,
    id: Id,
    half_bytes: u64,
    blocks_max: usize,
}

impl<F: StorageBackend> Begun<F> {
    fn new(side: F, id: Id) -> Result<Self> {
        let half_bytes = generation::half_bytes(side.len()?);
        // A frame takes at most half of a half, so that at least two frames fit before the next
        // checkpoint.
        let most = usize::try_from(half_bytes / 2 / BLOCK_BYTES).unwrap_or(usize::MAX);
        let blocks_max = (1..=most).rev().find(|blocks| frame_bytes(*blocks) as u64 <= half_bytes / 2);
        let blocks_max =
            blocks_max.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the journal is too small"))?;
        Ok(Self { side, id, half_bytes, blocks_max })
    }

    fn has_room(&self, log: &Log, blocks: usize) -> bool {
        log.at + frame_bytes(blocks) as u64 <= self.half_bytes
    }
}

/// The blocks that are newer than the file. Its lock is taken after the log's lock.
#[derive(Debug, Default)]
struct Overlay {
    /// Blocks written since the last sync.
    pending: Blocks,
    /// Blocks in the journal, or in the frame that is being written.
    logged: Blocks,
    /// Whether writes go to the file directly.
    direct: bool,
}

impl Overlay {
    fn block(&self, number: u64) -> Option<&[u8]> {
        self.pending.get(&number).or_else(|| self.logged.get(&number)).map(|block| &**block)
    }
}

/// The place of the next frame.
#[derive(Debug, Default)]
struct Log {
    /// The number of the last frame; the first is 1.
    number: u64,
    half: u64,
    at: u64,
    frame: Vec<u8>,
    /// Whether the journal has frames that would be replayed.
    replayed: bool,
}

impl<D: StorageBackend, S: Sides> Journal<D, S> {
    pub(crate) fn new(main: D, sides: S, options: JournalOptions, refusal: JournalRefusal) -> Self {
        let begun = OnceLock::new();
        let overlay = RwLock::new(Overlay { direct: true, ..Overlay::default() });
        // Writes of a killed process may not have reached the disk yet.
        let main_dirty = AtomicBool::new(true);
        let (log, failed) = (Mutex::default(), AtomicBool::new(false));
        Self { main, sides, options, refusal, begun, overlay, log, main_dirty, failed }
    }

    /// Begins a generation, unless it has begun.
    fn begin(&self) -> Result<()> {
        if self.begun.get().is_some() {
            return Ok(());
        }
        // Only one thread opens a file; the log's lock keeps out a second thread all the same.
        let _log = self.log();
        if self.begun.get().is_some() {
            return Ok(());
        }
        let begun = match generation::begin(&self.main, &self.sides, self.options) {
            Ok(begun) => begun.map(|(side, id)| Begun::new(side, id)).transpose()?,
            Err(Refusal::Io(error)) => return Err(error),
            Err(Refusal::Open(error)) => {
                *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return Err(Error::other("its journal does not let it be opened"));
            }
        };
        self.changed().direct = begun.is_none();
        let _ = self.begun.set(begun);
        Ok(())
    }

    fn journal(&self) -> Option<&Begun<S::Side>> {
        self.begun.get().and_then(Option::as_ref)
    }

    fn shown(&self) -> RwLockReadGuard<'_, Overlay> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) -> RwLockWriteGuard<'_, Overlay> {
        self.overlay.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an action that must be neither repeated nor continued after a failure.
    fn once<T>(&self, act: impl FnOnce(&mut Log) -> Result<T>) -> Result<T> {
        let mut log = self.log();
        // The thread that held the log before notes a failure before it releases the log.
        self.check()?;
        self.noted(act(&mut log))
    }

    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.failed.fetch_or(result.is_err(), Ordering::AcqRel);
        result
    }

    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::other("writing to this file or its journal has failed before"));
        }
        Ok(())
    }

    /// Writes blocks to their places, adjoining blocks together.
    fn place(&self, blocks: &Blocks) -> Result<()> {
        if !blocks.is_empty() {
            self.main_dirty.store(true, Ordering::Release);
        }
        let mut joined: Vec<u8> = Vec::new();
        let mut start = 0;
        // The engine's header goes last, because it describes the remaining blocks.
        for (number, block) in blocks.range(1..).chain(blocks.range(..1)) {
            let next = start + (joined.len() / BLOCK) as u64;
            if !joined.is_empty() && (*number != next || joined.len() >= JOINED_MAX * BLOCK) {
                self.main.write(start * BLOCK_BYTES, &joined)?;
                joined.clear();
            }
            if joined.is_empty() {
                start = *number;
            }
            joined.extend_from_slice(block);
        }
        if joined.is_empty() { Ok(()) } else { self.main.write(start * BLOCK_BYTES, &joined) }
    }

    fn sync_main(&self) -> Result<()> {
        if self.main_dirty.swap(false, Ordering::AcqRel) { self.main.sync_data() } else { Ok(()) }
    }

    /// Brings everything in the journal to its place, durably.
    fn checkpoint(&self) -> Result<()> {
        self.place(&self.shown().logged)?;
        self.sync_main()?;
        self.changed().logged.clear();
        Ok(())
    }

    /// Makes the encoded frame durable.
    fn append(&self, begun: &Begun<S::Side>, log: &mut Log, is_reset: bool) -> Result<()> {
        let bytes = log.frame.len() as u64;
        begun.side.write(BLOCK_BYTES + log.half * begun.half_bytes + log.at, &log.frame)?;
        begun.side.sync_data()?;
        log.replayed = !is_reset;
        log.at += bytes;
        log.number += 1;
        Ok(())
    }

    /// Continues in the second half of the journal.
    fn turn_over(&self, log: &mut Log) -> Result<()> {
        self.checkpoint()?;
        log.half = 1 - log.half;
        log.at = 0;
        Ok(())
    }

    /// Notes in the journal that everything before is in the file.
    fn reset(&self, begun: &Begun<S::Side>, log: &mut Log) -> Result<()> {
        if !log.replayed {
            return Ok(());
        }
        if !begun.has_room(log, 0) {
            self.turn_over(log)?;
        }
        encode(generation::salt(begun.id), log.number + 1, &Blocks::new(), &mut log.frame);
        self.append(begun, log, true)
    }

    /// Makes writes go to the file, until the next sync. The caller holds the log.
    fn go_direct(&self, overlay: &mut Overlay) -> Result<()> {
        // The blocks of the frames go first. They need no sync here, because the frames stay until
        // the sync that ends the direct mode.
        self.place(&overlay.logged)?;
        self.place(&overlay.pending)?;
        *overlay = Overlay { direct: true, ..Overlay::default() };
        Ok(())
    }

    /// Puts written bytes into the overlay.
    fn put(&self, overlay: &mut Overlay, offset: u64, data: &[u8]) -> Result<()> {
        let mut number = offset / BLOCK_BYTES;
        let mut from = usize::try_from(offset % BLOCK_BYTES).unwrap_or_default();
        let mut left = data;
        while !left.is_empty() {
            let (part, rest) = left.split_at(left.len().min(BLOCK - from));
            if part.len() == BLOCK {
                overlay.pending.insert(number, part.into());
            } else {
                let logged = &overlay.logged;
                let block = match overlay.pending.entry(number) {
                    Entry::Occupied(block) => block.into_mut(),
                    Entry::Vacant(place) => {
                        let mut block: Box<[u8]> = vec![0; BLOCK].into();
                        match logged.get(&number) {
                            Some(logged) => block.copy_from_slice(logged),
                            None => self.main.read(number * BLOCK_BYTES, &mut block)?,
                        }
                        place.insert(block)
                    }
                };
                if let Some(place) = block.get_mut(from..from + part.len()) {
                    place.copy_from_slice(part);
                }
            }
            (number, from, left) = (number + 1, 0, rest);
        }
        Ok(())
    }

    fn read_through(&self, overlay: &Overlay, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        let numbers = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        if overlay.pending.is_empty() && overlay.logged.is_empty() {
            return self.main.read(offset, out);
        }
        if !numbers.clone().all(|number| overlay.block(number).is_some()) {
            self.main.read(offset, out)?;
        }
        for number in numbers {
            let Some(block) = overlay.block(number) else { continue };
            let start = number * BLOCK_BYTES;
            let (from, to) = (start.max(offset), (start + BLOCK_BYTES).min(end));
            let of = |range: std::ops::Range<u64>, base: u64| {
                let at = |place: u64| usize::try_from(place - base).unwrap_or(usize::MAX);
                at(range.start)..at(range.end)
            };
            if let Some((out, block)) = out.get_mut(of(from..to, offset)).zip(block.get(of(from..to, start)))
            {
                out.copy_from_slice(block);
            }
        }
        Ok(())
    }
}

type Lock<T> = std::result::Result<T, BackendError>;

impl<D: StorageBackend, S: Sides> StorageBackend for Journal<D, S> {
    fn len(&self) -> Result<u64> {
        self.begin()?;
        self.main.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        // The lock is held while the file is read. So what is not in the overlay is in the file.
        self.read_through(&self.shown(), offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let blocks_max = self.journal().map_or(0, |begun| begun.blocks_max);
        // The most blocks, with a part of a block at either end.
        let blocks = data.len() / BLOCK + 2;
        let fits = |overlay: &Overlay| !overlay.direct && overlay.pending.len() + blocks <= blocks_max;
        let write_direct = |_: &Overlay| {
            self.main_dirty.store(true, Ordering::Release);
            self.main.write(offset, data)
        };
        self.check()?;
        let mut overlay = self.changed();
        if fits(&overlay) {
            return self.noted(self.put(&mut overlay, offset, data));
        }
        if overlay.direct {
            return self.noted(write_direct(&overlay));
        }
        drop(overlay);
        self.once(|_| {
            let mut overlay = self.changed();
            if fits(&overlay) {
                return self.put(&mut overlay, offset, data);
            }
            if !overlay.direct {
                self.go_direct(&mut overlay)?;
            }
            write_direct(&overlay)
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.once(|log| {
            if let Some(begun) = self.journal()
                && len < self.main.len()?
            {
                // A replay would make the file longer again.
                self.checkpoint()?;
                self.reset(begun, log)?;
                self.changed().pending.split_off(&len.div_ceil(BLOCK_BYTES));
            }
            self.main.set_len(len)?;
            self.main_dirty.store(true, Ordering::Release);
            Ok(())
        })
    }

    fn sync_data(&self) -> Result<()> {
        self.once(|log| {
            let Some(begun) = self.journal() else { return self.main.sync_data() };
            let mut overlay = loop {
                let mut overlay = self.changed();
                if std::mem::take(&mut overlay.direct) {
                    drop(overlay);
                    self.sync_main()?;
                    return self.reset(begun, log);
                }
                if begun.has_room(log, overlay.pending.len()) {
                    break overlay;
                }
                drop(overlay);
                self.turn_over(log)?;
            };
            let pending = std::mem::take(&mut overlay.pending);
            let some = !pending.is_empty();
            if some {
                encode(generation::salt(begun.id), log.number + 1, &pending, &mut log.frame);
                // No thread brings these blocks to their places before the log is free, and then
                // their frame is durable.
                overlay.logged.extend(pending);
            }
            drop(overlay);
            // The file has a new length, which the frame's blocks may need.
            self.sync_main()?;
            if some { self.append(begun, log, false) } else { Ok(()) }
        })
    }

    fn close(&self) -> Result<()> {
        let ended = self.journal().map_or(Ok(()), |begun| {
            self.once(|_| {
                // The pending writes were not synced, so no caller relies on them.
                self.checkpoint()?;
                generation::end(&self.main, begun.id)
            })?;
            if let Err(error) = self.sides.remove() {
                // The journal is of an ended generation, and the next generation overwrites it.
                tracing::warn!(%error, path = %self.sides.path().display(), "cannot remove the journal");
            }
            Ok(())
        });
        // The locks are released in any case.
        let closed = self.main.close();
        ended.and(closed)
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<bool> {
        self.main.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<bool> {
        self.main.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<()> {
        self.main.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<()> {
        self.main.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<()> {
        self.main.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Lock<bool> {
        self.main.query_lock_range(start, end)
    }
}
