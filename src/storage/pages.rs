//! A walk over the storage engine's pages that checks each page by its checksum.
//!
//! redb keeps its pages as trees of checksums. A state in the file's head holds the checksum of the
//! first page, and each page holds those of the pages below. The engine checks them only when it
//! opens a file that was not closed. This walk reads the bytes from the file, not from redb's
//! cache, in the form of redb's design page (file format 3).
//!
//! **Invariants.** A page number is used only after the checksum of the page that holds it was
//! found right; the head has a checksum of its own. So the walk reads only what redb has written,
//! and a damaged page ends its own branch alone. The walk's memory is one page, and the unvisited
//! children of each page above.

use std::io;

use twox_hash::XxHash3_128;

use super::header::{ENGINE, HEAD_BYTES};

const PAGE_BYTES: u64 = 4096;
const FLAGS_AT: usize = 9;
const SECOND_STATE: u8 = 1;
const REGION_AT: usize = 16;
const STATES_AT: [usize; 2] = [64, 192];
const STATE_BYTES: usize = 128;
const SUM_BYTES: usize = 16;
const ROOT_AT: usize = 8;
/// The place of the root of the engine's own tables.
const OWN_ROOT_AT: usize = 40;
const VERSION: u8 = 3;
const LEAF: u8 = 1;
const BRANCH: u8 = 2;
const SUBTREE: u8 = 3;
const MULTIMAP: u8 = 4;
/// No tree is as deep, because each branch has at least two children.
const DEPTH_MAX: usize = 64;

/// What is wrong with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Checksum,
    Shape,
    Outside,
    Unreadable,
    /// More pages lead to one another than the file has.
    Twice,
}

/// The place of a page in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// The receiver of what the walk finds.
pub(crate) trait Visitor {
    /// Takes a whole page. Returning `false` ends the walk.
    fn right(&mut self, table: Option<&str>, place: Place) -> bool;
    /// Takes a damaged page. Returning `false` ends the walk.
    fn wrong(&mut self, table: Option<&str>, place: Place, fault: Fault) -> bool;
}

/// The places of a state's pages, and its first page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    before_bytes: u64,
    region_bytes: u64,
    file_bytes: u64,
    root: Option<Child>,
    /// The root of the engine's own tables.
    own_root: Option<Child>,
}

impl State {
    /// Returns the newest state that a head names; `None` if the head is damaged, or of another
    /// version.
    pub(crate) fn of(head: &[u8; HEAD_BYTES], file_bytes: u64) -> Option<Self> {
        Self::in_head(head, file_bytes, Self::newest(head))
    }

    /// Returns which of the two states is the newest, if the head is whole.
    pub(crate) fn newest(head: &[u8; HEAD_BYTES]) -> usize {
        usize::from(head.get(FLAGS_AT).is_some_and(|flags| flags & SECOND_STATE != 0))
    }

    /// Returns one of the two states.
    pub(crate) fn in_head(head: &[u8; HEAD_BYTES], file_bytes: u64, at: usize) -> Option<Self> {
        let number =
            |at: usize| head.get(at..)?.first_chunk().map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
        if !head.starts_with(&ENGINE) || number(12)? != PAGE_BYTES {
            return None;
        }
        let state = head.get(*STATES_AT.get(at)?..)?.get(..STATE_BYTES)?;
        let (summed, sum) = state.split_at_checked(STATE_BYTES - SUM_BYTES)?;
        if XxHash3_128::oneshot(summed) != u128::from_le_bytes(*sum.first_chunk()?)
            || *state.first()? != VERSION
        {
            return None;
        }
        let root_at = |flag_at: usize, at: usize| match *state.get(flag_at)? {
            0 => Some(None),
            _ => Child::read(state.get(at..)?).map(Some),
        };
        let (root, own_root) = (root_at(1, ROOT_AT)?, root_at(2, OWN_ROOT_AT)?);
        let before_bytes = number(REGION_AT)? * PAGE_BYTES;
        let region_bytes = before_bytes + number(REGION_AT + 4)? * PAGE_BYTES;
        Some(Self { before_bytes, region_bytes, file_bytes, root, own_root })
    }

    /// Returns the place of a page; `Err` if the place is outside the file.
    fn place(&self, page: u64) -> Result<Place, Place> {
        let order = page >> 59;
        let bytes = PAGE_BYTES << order.min(20);
        let index = page & (0x000f_ffff >> order);
        let region = (page >> 20) & 0x000f_ffff;
        // The head's sizes have no checksum.
        let before = region.saturating_mul(self.region_bytes).saturating_add(self.before_bytes);
        let offset = before.saturating_add(PAGE_BYTES + index * bytes);
        let place = Place { offset, bytes };
        let is_within_file = order <= 20 && offset.saturating_add(bytes) <= self.file_bytes;
        if is_within_file { Ok(place) } else { Err(place) }
    }
}

/// A child page, with its checksum.
#[derive(Debug, Clone, Copy)]
struct Child {
    page: u64,
    sum: u128,
}

impl Child {
    /// Reads the number and the checksum of a tree's root.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (page, rest) = bytes.split_first_chunk()?;
        Some(Self { page: u64::from_le_bytes(*page), sum: u128::from_le_bytes(*rest.first_chunk()?) })
    }
}

/// The fixed widths of a tree's keys and values, if they have any.
#[derive(Debug, Clone, Copy)]
struct Widths {
    key: Option<usize>,
    value: Option<usize>,
    /// The width of keys in the trees that its values may be.
    subtrees: Option<Option<usize>>,
}

/// The widths of the tree of all tables.
const OF_TABLES: Widths = Widths { key: None, value: None, subtrees: None };

/// A table: its name and its tree.
struct Table {
    name: String,
    root: Child,
    widths: Widths,
}

impl Table {
    /// Reads a table. A table without a row is `Ok(None)`; bytes that are no table are `Err`.
    fn read(name: &[u8], bytes: &[u8]) -> Result<Option<Self>, ()> {
        let read = || {
            let kind = *bytes.first()?;
            let (has_root, root) = bytes.get(9..)?.split_first()?;
            let (root, widths) = root.split_at_checked(32)?;
            let width = |at: usize| {
                let (is_fixed, width) = widths.get(at..)?.split_first()?;
                let width = u32::from_le_bytes(*width.first_chunk()?);
                Some(if *is_fixed == 0 { None } else { Some(usize::try_from(width).ok()?) })
            };
            let (key, value) = (width(0)?, width(5)?);
            let widths = match kind {
                MULTIMAP => Widths { key, value: None, subtrees: Some(value) },
                _ => Widths { key, value, subtrees: None },
            };
            let name = String::from_utf8_lossy(name).into_owned();
            Some(if *has_root == 0 { None } else { Some(Self { name, root: Child::read(root)?, widths }) })
        };
        read().ok_or(())
    }
}

/// The walk, which reads and checks pages.
pub(crate) struct Walk<'a, V> {
    pub(crate) state: State,
    pub(crate) read: &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>,
    pub(crate) visitor: V,
    bytes: u64,
}

impl<'a, V: Visitor> Walk<'a, V> {
    pub(crate) fn new(state: State, read: &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>, visitor: V) -> Self {
        Self { state, read, visitor, bytes: 0 }
    }

    /// Checks every page of the state except the engine's own tables. Returns `false` if the
    /// visitor ended the walk.
    pub(crate) fn all(&mut self) -> bool {
        self.below(self.state.root)
    }

    /// Checks every page of the engine's own tables, which above all say which pages are free.
    pub(crate) fn own(&mut self) -> bool {
        self.below(self.state.own_root)
    }

    fn below(&mut self, root: Option<Child>) -> bool {
        let Some(root) = root else { return true };
        let mut tables = Vec::new();
        let mut odd = 0;
        let whole = self.tree(None, root, OF_TABLES, &mut |name, bytes| match Table::read(name, bytes) {
            Ok(table) => tables.extend(table),
            Err(()) => odd += 1,
        });
        // The checksum is right and the row is not, so the row is of a version that this walk does
        // not know.
        let place = self.state.place(root.page).unwrap_or_else(|place| place);
        if !whole || (odd > 0 && !self.visitor.wrong(None, place, Fault::Shape)) {
            return false;
        }
        tables.iter().all(|table| self.tree(Some(&table.name), table.root, table.widths, &mut |_, _| {}))
    }

    fn tree(
        &mut self,
        table: Option<&str>,
        root: Child,
        widths: Widths,
        row: &mut dyn FnMut(&[u8], &[u8]),
    ) -> bool {
        let mut left = vec![(root, widths, 0)];
        let mut page = Vec::new();
        while let Some((child, widths, depth)) = left.pop() {
            let (place, fault) = match self.load(child, widths, &mut page) {
                Ok(place) if depth < DEPTH_MAX => (place, None),
                Ok(place) => (place, Some(Fault::Shape)),
                Err((place, fault)) => (place, Some(fault)),
            };
            // A page belongs to one branch alone. Forged pages that each lead to the next twice
            // would otherwise be visited for ever.
            let is_within_file = fault != Some(Fault::Outside);
            self.bytes = self.bytes.saturating_add(if is_within_file { place.bytes } else { 0 });
            if self.bytes > self.state.file_bytes {
                self.visitor.wrong(table, place, Fault::Twice);
                return false;
            }
            let goes_on = match fault {
                Some(fault) => self.visitor.wrong(table, place, fault),
                None => self.visitor.right(table, place),
            };
            if !goes_on {
                return false;
            }
            if fault.is_some() {
                continue;
            }
            let whole = match page.first() {
                Some(&BRANCH) => each_child(&page, |child| left.push((child, widths, depth + 1))),
                _ => each_row(&page, widths, &mut |key, value| {
                    row(key, value);
                    if let Some(width) = widths.subtrees
                        && value.first() == Some(&SUBTREE)
                        && let Some(root) = value.get(1..).and_then(Child::read)
                    {
                        let widths = Widths { key: width, value: Some(0), subtrees: None };
                        left.push((root, widths, depth + 1));
                    }
                }),
            };
            if whole.is_none() && !self.visitor.wrong(table, place, Fault::Shape) {
                return false;
            }
        }
        true
    }

    /// Reads a page and compares its checksum.
    fn load(&self, child: Child, widths: Widths, page: &mut Vec<u8>) -> Result<Place, (Place, Fault)> {
        let place = self.state.place(child.page).map_err(|place| (place, Fault::Outside))?;
        page.clear();
        page.resize(usize::try_from(place.bytes).map_err(|_| (place, Fault::Outside))?, 0);
        (self.read)(place.offset, page).map_err(|_| (place, Fault::Unreadable))?;
        // A page ends at its last value or key. The page itself says where that is, so damage there
        // changes the checksum.
        let end = match page.first() {
            Some(&LEAF) => leaf_end(page, widths),
            Some(&BRANCH) => branch_end(page, widths),
            _ => None,
        };
        let summed = end.and_then(|end| page.get(..end)).ok_or((place, Fault::Checksum))?;
        if XxHash3_128::oneshot(summed) == child.sum { Ok(place) } else { Err((place, Fault::Checksum)) }
    }
}

fn count(page: &[u8]) -> Option<usize> {
    page.get(2..)?
        .first_chunk()
        .map(|count| usize::from(u16::from_le_bytes(*count)))
        .filter(|count| *count > 0)
}

fn end_at(page: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(*page.get(at..)?.first_chunk()?)).ok()
}

/// Returns where the keys of a leaf begin, and where the key and the value of row `n` end.
fn keys_at(pairs: usize, widths: Widths) -> usize {
    4 + 4 * pairs * (usize::from(widths.key.is_none()) + usize::from(widths.value.is_none()))
}

fn key_end(page: &[u8], pairs: usize, widths: Widths, n: usize) -> Option<usize> {
    match widths.key {
        Some(width) => width.checked_mul(n + 1)?.checked_add(keys_at(pairs, widths)),
        None => end_at(page, 4 + 4 * n),
    }
}

fn value_end(page: &[u8], pairs: usize, widths: Widths, n: usize) -> Option<usize> {
    match widths.value {
        Some(width) => width.checked_mul(n + 1)?.checked_add(key_end(page, pairs, widths, pairs - 1)?),
        None => end_at(page, 4 + 4 * (n + if widths.key.is_none() { pairs } else { 0 })),
    }
}

fn leaf_end(page: &[u8], widths: Widths) -> Option<usize> {
    let pairs = count(page)?;
    value_end(page, pairs, widths, pairs - 1)
}

fn branch_end(page: &[u8], widths: Widths) -> Option<usize> {
    let keys = count(page)?;
    let ends_at = 8 + (SUM_BYTES + 8) * (keys + 1);
    match widths.key {
        Some(width) => width.checked_mul(keys)?.checked_add(ends_at),
        None => end_at(page, ends_at + 4 * (keys - 1)),
    }
}

fn each_child(page: &[u8], mut child: impl FnMut(Child)) -> Option<()> {
    let children = count(page)? + 1;
    for n in 0..children {
        let sum = page.get(8 + SUM_BYTES * n..)?.first_chunk()?;
        let number = page.get(8 + SUM_BYTES * children + 8 * n..)?.first_chunk()?;
        child(Child { page: u64::from_le_bytes(*number), sum: u128::from_le_bytes(*sum) });
    }
    Some(())
}

fn each_row(page: &[u8], widths: Widths, row: &mut dyn FnMut(&[u8], &[u8])) -> Option<()> {
    let pairs = count(page)?;
    let mut key_at = keys_at(pairs, widths);
    let mut value_at = key_end(page, pairs, widths, pairs - 1)?;
    for n in 0..pairs {
        let (key_ends, value_ends) = (key_end(page, pairs, widths, n)?, value_end(page, pairs, widths, n)?);
        row(page.get(key_at..key_ends)?, page.get(value_at..value_ends)?);
        (key_at, value_at) = (key_ends, value_ends);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// Goal: a file without tables is whole, because it has no page to look for. Method: a new
    /// database of the engine, and one with one table.
    #[test]
    fn a_file_without_tables_has_no_root() {
        let folder = tempfile::tempdir().unwrap();
        for (name, tables) in [("none", 0), ("one", 1)] {
            let path = folder.path().join(name);
            let database = redb::Database::create(&path).unwrap();
            let tx = database.begin_write().unwrap();
            if tables > 0 {
                let table = redb::TableDefinition::<u64, u64>::new("t");
                tx.open_table(table).unwrap().insert(1, 1).unwrap();
            }
            tx.commit().unwrap();
            drop(database);
            let mut file = std::fs::File::open(&path).unwrap();
            let mut head = [0; HEAD_BYTES];
            file.read_exact(&mut head).unwrap();
            let state = State::of(&head, file.metadata().unwrap().len()).expect("it is whole");
            assert_eq!(state.root.is_some(), tables > 0, "{name}: {state:?}");
        }
    }
}
