//! A journal between redb and its file: what a commit writes goes to a second file in one piece, and is synced there; the pages go to
//! their places many commits at a time.
//!
//! A commit writes a dozen pages all over the file. In the journal they are one stretch of bytes (a *frame*), and a page that each
//! commit writes anew (the header, the roots) goes to its place once for hundreds of commits.
//!
//! **Invariants.**
//! - A sync returns when its frame is durable. What it covers is then in the journal, or in the file and synced there.
//! - The journal has two halves. A half is written over only once all it holds is in the file, and synced there; and the other half, which is
//!   newer, stays whole until the first frame after that is durable. So a torn frame is always the newest there is.
//! - What is too large for a frame goes to its place at once (*direct*): the file then keeps the promise of a sync by itself, and a frame
//!   without blocks says that what stands before it must not be replayed.
//! - Nothing goes to its place before its frame is durable, unless it is direct; so after a crash the file is as the last frame says, once
//!   that is replayed: pages written directly by a transaction that was not committed are free pages of that state.
//! - After an error nothing is written any more, and the journal stays for the next open.

mod frame;
pub(crate) mod side;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::io::{Error, ErrorKind, Result};
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::{BackendError, StorageBackend};

use frame::{BLOCK, Blocks, encode, frame_bytes};

const BLOCK_BYTES: u64 = BLOCK as u64;
/// Blocks that are written to their places in one call at most, if they touch.
const JOINED_MAX: usize = 64;

/// redb's file, behind a journal.
#[derive(Debug)]
pub(crate) struct Journal<D> {
    main: D,
    side: D,
    /// Removed when the file is closed, if it was made use of.
    side_path: Option<PathBuf>,
    half_bytes: u64,
    blocks_max: usize,
    overlay: RwLock<Overlay>,
    log: Mutex<Log>,
    /// The file holds what the next sync must make durable there.
    main_dirty: AtomicBool,
    failed: AtomicBool,
    /// Before that all is direct.
    started: Start,
}

/// Set once the store's file says that it is written through a journal, so that it is missed if it is not there after a crash.
pub(crate) type Start = Arc<AtomicBool>;

/// What is newer than the file. Locked after the log, where both are.
#[derive(Debug, Default)]
struct Overlay {
    /// Written since the last sync.
    pending: Blocks,
    /// In the journal, or in the frame that is being written.
    logged: Blocks,
    /// What is written goes to the file.
    direct: bool,
}

impl Overlay {
    fn block(&self, number: u64) -> Option<&[u8]> {
        self.pending.get(&number).or_else(|| self.logged.get(&number)).map(|block| &**block)
    }
}

/// Where the next frame goes.
#[derive(Debug)]
struct Log {
    next_number: u64,
    half: u64,
    at: u64,
    frame: Vec<u8>,
    /// There are frames that would be replayed.
    replayed: bool,
}

impl<D: StorageBackend> Journal<D> {
    /// `side` is a fresh journal, all zeros, and nobody else's. Everything goes to the file itself until `started` is set, and a sync has been made.
    ///
    /// # Errors
    /// If the file does not end at a block's end, or the journal is too small.
    pub(crate) fn new(main: D, side: D, side_path: Option<PathBuf>, started: Start) -> Result<Self> {
        let half_bytes = side.len()? / 2 / BLOCK_BYTES * BLOCK_BYTES;
        // Half of a half, so that there are two frames at least before the next checkpoint.
        let blocks_max = usize::try_from(half_bytes / 2 / BLOCK_BYTES).unwrap_or(usize::MAX);
        let blocks_max = (1..=blocks_max).rev().find(|blocks| frame_bytes(*blocks) as u64 <= half_bytes / 2);
        let blocks_max =
            blocks_max.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the journal is too small"))?;
        let overlay = RwLock::new(Overlay { direct: true, ..Overlay::default() });
        let log = Mutex::new(Log { next_number: 1, half: 0, at: 0, frame: Vec::new(), replayed: false });
        let (main_dirty, failed) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { main, side, side_path, half_bytes, blocks_max, overlay, log, main_dirty, failed, started })
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

    /// Runs what must not be done again, or gone on from, if it fails.
    fn once<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::other("writing to this file or its journal has failed before"));
        }
        let result = act();
        self.failed.fetch_or(result.is_err(), Ordering::AcqRel);
        result
    }

    /// Writes blocks to their places, those that touch together.
    fn place(&self, blocks: &Blocks) -> Result<()> {
        if !blocks.is_empty() {
            self.main_dirty.store(true, Ordering::Release);
        }
        let mut joined: Vec<u8> = Vec::new();
        let mut start = 0;
        for (number, block) in blocks {
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

    /// Brings all that is in the journal to its place, durably.
    fn checkpoint(&self) -> Result<()> {
        self.place(&self.shown().logged)?;
        self.sync_main()?;
        self.changed().logged.clear();
        Ok(())
    }

    /// Makes the frame that has been encoded durable.
    fn append(&self, log: &mut Log, is_reset: bool) -> Result<()> {
        let bytes = log.frame.len() as u64;
        debug_assert!(bytes <= self.half_bytes);
        self.side.write(log.half * self.half_bytes + log.at, &log.frame)?;
        self.side.sync_data()?;
        log.replayed = !is_reset;
        log.at += bytes;
        log.next_number += 1;
        Ok(())
    }

    fn has_room(&self, log: &Log, blocks: usize) -> bool {
        log.at + frame_bytes(blocks) as u64 <= self.half_bytes
    }

    /// Goes on in the other half.
    fn turn_over(&self, log: &mut Log) -> Result<()> {
        self.checkpoint()?;
        log.half = 1 - log.half;
        log.at = 0;
        Ok(())
    }

    /// Says that all before is in the file.
    fn reset(&self, log: &mut Log) -> Result<()> {
        if !log.replayed {
            return Ok(());
        }
        if !self.has_room(log, 0) {
            self.turn_over(log)?;
        }
        encode(log.next_number, &Blocks::new(), &mut log.frame);
        self.append(log, true)
    }

    /// If what is pending is too large for a frame: from here on what is written goes to the file, until the next sync. The log is held.
    fn go_direct_if_large(&self, overlay: &mut Overlay) -> Result<()> {
        if overlay.pending.len() > self.blocks_max {
            // What the frames say goes first. It need not be synced: they stand until the sync that ends this.
            self.place(&overlay.logged)?;
            self.place(&overlay.pending)?;
            *overlay = Overlay { direct: true, ..Overlay::default() };
        }
        Ok(())
    }

    /// Puts what is written into the overlay; `true` if that has become too large for a frame.
    fn put(&self, overlay: &mut Overlay, offset: u64, data: &[u8]) -> Result<bool> {
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
        Ok(overlay.pending.len() > self.blocks_max)
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

impl<D: StorageBackend> StorageBackend for Journal<D> {
    fn len(&self) -> Result<u64> {
        self.main.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        // Held while the file is read: what is not in the overlay must be there.
        self.read_through(&self.shown(), offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.once(|| {
            let mut overlay = self.changed();
            if overlay.direct {
                self.main_dirty.store(true, Ordering::Release);
                return self.main.write(offset, data);
            }
            if self.put(&mut overlay, offset, data)? {
                drop(overlay);
                let _log = self.log();
                self.go_direct_if_large(&mut self.changed())?;
            }
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.once(|| {
            if len % BLOCK_BYTES != 0 {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("a length of {len} bytes ends within a block"),
                ));
            }
            let mut log = self.log();
            if len < self.main.len()? {
                // What is replayed would make it longer again.
                self.checkpoint()?;
                self.reset(&mut log)?;
                self.changed().pending.split_off(&(len / BLOCK_BYTES));
            }
            self.main.set_len(len)?;
            self.main_dirty.store(true, Ordering::Release);
            Ok(())
        })
    }

    fn sync_data(&self) -> Result<()> {
        self.once(|| {
            let mut log = self.log();
            let mut overlay = loop {
                let mut overlay = self.changed();
                self.go_direct_if_large(&mut overlay)?;
                if overlay.direct {
                    overlay.direct = !self.started.load(Ordering::Acquire);
                    drop(overlay);
                    self.sync_main()?;
                    return self.reset(&mut log);
                }
                if self.has_room(&log, overlay.pending.len()) {
                    break overlay;
                }
                drop(overlay);
                self.turn_over(&mut log)?;
            };
            let pending = std::mem::take(&mut overlay.pending);
            let some = !pending.is_empty();
            if some {
                encode(log.next_number, &pending, &mut log.frame);
                // Nobody brings it to its place before the log is free, and then its frame is durable.
                overlay.logged.extend(pending);
            }
            drop(overlay);
            // A new length, which what is in the frame may need.
            self.sync_main()?;
            if some { self.append(&mut log, false) } else { Ok(()) }
        })
    }

    fn close(&self) -> Result<()> {
        let emptied = self.once(|| {
            let _log = self.log();
            let pending = std::mem::take(&mut self.changed().pending);
            self.changed().logged.extend(pending);
            self.checkpoint()
        });
        let started = self.started.load(Ordering::Acquire);
        let path = self.side_path.as_deref().filter(|_| started);
        let emptied = emptied.and_then(|()| path.map_or(Ok(()), side::remove));
        // The locks go in any case.
        let closed = self.main.close();
        self.side.close()?;
        emptied.and(closed)
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
