//! The disk itself: one page written into a file whose pages are all there, and `fdatasync`. Nothing that is durable can be faster with one writer;
//! a state row and an event are 356 bytes, and the file system writes a page for them. No tree, no index, no way to read it back by key.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE_BYTES: usize = 4096;
const PAGES: u64 = 4 << 10;

pub(crate) struct Disk {
    file: File,
    written: AtomicU64,
}

impl Disk {
    /// Makes the file, with each page written: no later write has to find it a place.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        for page in 0..PAGES {
            file.write_all_at(&[0; PAGE_BYTES], page * PAGE_BYTES as u64)?;
        }
        file.sync_all()?;
        Ok(Self { file, written: AtomicU64::new(0) })
    }

    /// Row and event on the next page, durable when this returns.
    pub(crate) fn write(&self, id: u64, row: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut page = [0; PAGE_BYTES];
        let record = [&id.to_le_bytes()[..], row, payload].concat();
        page.get_mut(..record.len()).ok_or(ErrorKind::InvalidInput)?.copy_from_slice(&record);
        let at = self.written.fetch_add(1, Ordering::Relaxed) % PAGES;
        self.file.write_all_at(&page, at * PAGE_BYTES as u64)?;
        self.file.sync_data()
    }

    /// What was written.
    pub(crate) fn count(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}
