//! The link between a journal and its file, and the beginning and end of a store's generation.
//!
//! A *generation* is the time from opening to closing. Its random id is at the head of the journal.
//! While the journal may hold what the file does not, the id is in the file too. There it is in the
//! part of the first block that the storage engine does not use (it writes 320 bytes).
//!
//! So a journal is replayed over its own file and no other, whatever was copied, moved or put back.
//! A missing journal is noticed before anything is written.
//!
//! ```text
//! file, at 4,064    id of the generation that ended last 16 · id of the generation that may not have ended 16 (zeros: none)
//! journal, at 0     "1wjrnl01" · bytes of the journal u64 · id 16 · crc32 u32 · zeros to 4,096; then two halves of frames
//! ```
//!
//! **Invariants.** All this happens under the engine's lock of the file. A journal that holds
//! frames is removed only once the file says that its generation has ended. Each generation gets a
//! newly made journal, because other users may have an earlier file open.

use std::io::{ErrorKind, Result};
use std::path::Path;

use redb::StorageBackend;

use super::frame::{BLOCK, Odd, Salt, replay};
use super::{BLOCK_BYTES, JournalOptions};
use crate::error::OpenError;
use crate::event::fresh_uuid;
use crate::limits::JOURNAL_BYTES_MAX;
use crate::log::record::body_checksum;
use crate::storage::header::ENGINE;
use crate::tuning::JOURNAL_REACH_BYTES_MAX;

const GENERATIONS_AT: u64 = BLOCK_BYTES - 32;
const MAGIC: [u8; 8] = *b"1wjrnl01";
const HEAD: usize = 36;

pub(super) type Id = [u8; 16];
const NONE: Id = [0; 16];

/// A file's note of its generations behind a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Generations {
    pub(super) ended: Id,
    pub(super) current: Id,
}

impl Generations {
    /// Reads the generations; `None` if the file is not the storage engine's.
    pub(super) fn of(main: &impl StorageBackend) -> Result<Option<Self>> {
        if main.len()? < BLOCK_BYTES {
            return Ok(None);
        }
        let mut engine = ENGINE;
        main.read(0, &mut engine)?;
        let (mut ended, mut current) = (NONE, NONE);
        main.read(GENERATIONS_AT, &mut ended)?;
        main.read(GENERATIONS_AT + 16, &mut current)?;
        Ok((engine == ENGINE).then_some(Self { ended, current }))
    }

    pub(super) fn is_one_open(self) -> bool {
        self.current != NONE
    }

    fn write(self, main: &impl StorageBackend) -> Result<()> {
        main.write(GENERATIONS_AT, &[self.ended, self.current].concat())?;
        main.sync_data()
    }
}

/// Notes that the file holds all of that generation.
pub(super) fn end(main: &impl StorageBackend, id: Id) -> Result<()> {
    Generations { ended: id, current: NONE }.write(main)
}

pub(super) fn salt(id: Id) -> Salt {
    id.last_chunk().copied().unwrap_or_default()
}

/// The place of a journal.
pub(crate) trait Sides: std::fmt::Debug + Send + Sync + 'static {
    type Side: StorageBackend;

    /// Returns the path, for errors.
    fn path(&self) -> &Path;
    /// Fails if the engine will refuse the file, so that nothing is written to it.
    fn check_head(&self, _main: &impl StorageBackend) -> Result<()> {
        Ok(())
    }
    fn open(&self) -> std::result::Result<Option<Self::Side>, OpenError>;
    /// Creates an empty journal, which does not have its name yet.
    fn create(&self) -> std::result::Result<Self::Side, OpenError>;
    /// Gives the last created journal its name.
    fn put_in_place(&self) -> std::result::Result<(), OpenError>;
    /// Makes the journal's name durable, whichever process made it.
    fn sync_name(&self) -> Result<()>;
    /// Removes the journal that was opened or created last, if it is still there.
    fn remove(&self) -> Result<()>;
    /// Releases the opened journal to other processes.
    fn let_go(&self) {}
}

/// What is at a journal's place.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// Nothing, or a journal that was being made.
    Blank,
    /// The journal of this generation; `true` if it is whole, `false` if it was cut short.
    Of(Id, bool),
    Strange,
}

/// Whether a file begins as a journal does.
pub(super) fn is_headed(side: &impl StorageBackend) -> Result<bool> {
    let mut head = [0; MAGIC.len()];
    if side.len()? < head.len() as u64 {
        return Ok(false);
    }
    side.read(0, &mut head)?;
    Ok(head == MAGIC)
}

fn found(side: &impl StorageBackend) -> Result<Found> {
    let len = side.len()?;
    if len == 0 {
        return Ok(Found::Blank);
    }
    let mut head = vec![0; usize::try_from(len.min(BLOCK_BYTES)).unwrap_or(BLOCK)];
    side.read(0, &mut head)?;
    if head.iter().all(|byte| *byte == 0) {
        return Ok(Found::Blank);
    }
    let read = || {
        let (head, crc) = head.get(..HEAD)?.split_last_chunk::<4>()?;
        let (bytes, id) = head.strip_prefix(&MAGIC)?.split_first_chunk::<8>()?;
        let is_whole = u64::from_le_bytes(*bytes) == len && len <= JOURNAL_BYTES_MAX as u64;
        let id = Id::try_from(id).ok()?;
        (body_checksum(head) == u32::from_le_bytes(*crc)).then_some(Found::Of(id, is_whole))
    };
    Ok(read().unwrap_or(Found::Strange))
}

/// Returns the bytes of a half of a journal of so many bytes.
pub(super) fn half_bytes(side_bytes: u64) -> u64 {
    side_bytes.saturating_sub(BLOCK_BYTES) / 2 / BLOCK_BYTES * BLOCK_BYTES
}

/// Makes a blank journal of a new generation. The head is written last, so that it marks a complete
/// journal.
fn lay_out(side: &impl StorageBackend, bytes: usize, id: Id) -> Result<()> {
    side.set_len(0)?;
    let zeros = vec![0; bytes.min(1 << 20)];
    let mut at = 0;
    while at < bytes {
        // The bytes are written, not only reserved, so a full disk shows here.
        let part = zeros.get(..zeros.len().min(bytes - at)).unwrap_or_default();
        side.write(at as u64, part)?;
        at += part.len();
    }
    side.sync_data()?;
    let mut head = [&MAGIC[..], &(bytes as u64).to_le_bytes(), &id].concat();
    head.extend(body_checksum(&head).to_le_bytes());
    side.write(0, &head)?;
    side.sync_data()
}

/// Writes the blocks of a journal into its file.
fn bring(
    main: &impl StorageBackend,
    side: &impl StorageBackend,
    id: Id,
) -> Result<std::result::Result<usize, String>> {
    let mut bytes = vec![0; usize::try_from(side.len()?).unwrap_or_default()];
    side.read(0, &mut bytes)?;
    let half = usize::try_from(half_bytes(bytes.len() as u64)).unwrap_or_default();
    let (a, b) = bytes.get(BLOCK..).and_then(|bytes| bytes.split_at_checked(half)).unwrap_or_default();
    let blocks = match replay(salt(id), [a, b.get(..half).unwrap_or_default()]) {
        Ok(blocks) => blocks,
        Err(Odd::Gap { number }) => {
            return Ok(Err(format!("frame {number} does not match its checksum, and newer ones follow")));
        }
        Err(Odd::Overlap) => return Ok(Err("its frames lie over each other".into())),
    };
    let reach = main.len()?.saturating_add(JOURNAL_REACH_BYTES_MAX);
    if blocks.keys().any(|number| number.saturating_mul(BLOCK_BYTES) >= reach) {
        return Ok(Err("it has a block far behind the end of the store's file".into()));
    }
    for (number, block) in &blocks {
        main.write(number.checked_mul(BLOCK_BYTES).ok_or(ErrorKind::InvalidData)?, block)?;
    }
    main.sync_data()?;
    Ok(Ok(blocks.len()))
}

/// Why a generation cannot begin.
pub(super) enum Refusal {
    Open(OpenError),
    Io(std::io::Error),
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<OpenError> for Refusal {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

/// Ends the generation that a crash interrupted, and begins a new one if a journal is wanted. The
/// file is locked.
pub(super) fn begin<S: Sides>(
    main: &impl StorageBackend,
    sides: &S,
    options: JournalOptions,
) -> std::result::Result<Option<(S::Side, Id)>, Refusal> {
    let path = || sides.path().to_path_buf();
    let Some(mut generations) = Generations::of(main)? else { return Ok(None) };
    if !generations.is_one_open() && options.bytes == 0 {
        return Ok(None);
    }
    if !generations.is_one_open() {
        sides.check_head(main)?;
    }
    let side = sides.open()?;
    let (was_open, mut given_up) = (generations.is_one_open(), false);
    let at_place = side.as_ref().map_or(Ok(Found::Blank), found)?;
    if was_open {
        match (&side, &at_place) {
            (Some(side), Found::Of(id, true)) if *id == generations.current => {
                match bring(main, side, *id)? {
                    Ok(blocks) => {
                        tracing::warn!(path = %path().display(), blocks, "the store was not closed; its journal is brought into it");
                    }
                    Err(reason) => {
                        return Err(OpenError::Damaged { path: path(), reason }.into());
                    }
                }
            }
            (Some(_), Found::Of(id, false)) if *id == generations.current => {
                return Err(OpenError::Damaged {
                    path: path(),
                    reason: "it is not as long as it was".into(),
                }
                .into());
            }
            _ if options.abandon => given_up = true,
            _ => return Err(OpenError::JournalMissing { path: path() }.into()),
        }
        let ended = if given_up { generations.ended } else { generations.current };
        generations = Generations { ended, current: NONE };
    }
    let is_ours = match at_place {
        Found::Blank => true,
        Found::Of(id, _) => {
            id == generations.ended
                || side.as_ref().is_some_and(|side| has_no_frames(side, id).unwrap_or(false))
        }
        Found::Strange => false,
    };
    if !is_ours && options.bytes > 0 {
        return Err(OpenError::JournalInTheWay { path: path() }.into());
    }
    if given_up {
        tracing::error!(path = %path().display(), "the journal is missing; going on without its commits");
    }
    if was_open {
        generations.write(main)?;
    }
    if options.bytes == 0 {
        if is_ours && let Err(error) = sides.remove() {
            tracing::warn!(%error, path = %path().display(), "cannot remove a journal that is no longer used");
        }
        sides.let_go();
        return Ok(None);
    }
    if side.is_some() {
        sides.remove().map_err(|source| OpenError::Io { action: "remove", path: path(), cause: source })?;
    }
    let id = fresh_uuid();
    let side = make(sides, options.bytes, id)?;
    sides.sync_name()?;
    Generations { current: id, ..generations }.write(main)?;
    Ok(Some((side, id)))
}

/// Makes the journal of a generation that is about to begin.
fn make<S: Sides>(sides: &S, bytes: usize, id: Id) -> std::result::Result<S::Side, Refusal> {
    let side = sides.create()?;
    let laid_out = lay_out(&side, bytes, id).map_err(Refusal::from);
    if let Err(refusal) = laid_out.and_then(|()| Ok(sides.put_in_place()?)) {
        // The next creation removes what is left.
        let _ = sides.remove();
        return Err(refusal);
    }
    Ok(side)
}

/// Whether the journal was made and its generation never began.
fn has_no_frames(side: &impl StorageBackend, id: Id) -> Result<bool> {
    let mut bytes = vec![0; usize::try_from(side.len()?.min(JOURNAL_BYTES_MAX as u64)).unwrap_or_default()];
    side.read(0, &mut bytes)?;
    Ok(!bytes.chunks(BLOCK).any(|block| block.starts_with(&salt(id))))
}
