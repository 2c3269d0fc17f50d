//! A look at a file's first bytes before the storage engine takes it: whether it is a redb file,
//! its format, and whether its end is missing. redb's design page draws the bytes. The results
//! serve only to refuse a file.

use std::io::Result;

use redb::StorageBackend;

/// The first bytes of every redb file.
pub(crate) const ENGINE: [u8; 9] = *b"redb\x1a\x0a\xa9\x0d\x0a";

/// The bytes of the storage engine's head, at the beginning of its file.
pub(crate) const HEAD_BYTES: usize = 320;
/// The place of the flags, and the flag of a file that is open or was not closed.
const FLAGS_AT: usize = 9;
const UNCLOSED: u8 = 2;
/// The place of a page's size. Behind it are the number of pages before each region, the number in
/// each region, and the number of regions.
const PAGE_BYTES_AT: usize = 12;
/// The places of the format versions of the two newest states.
const VERSIONS_AT: [usize; 2] = [64, 192];
const VERSION: u8 = 3;

/// What is wrong with a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Odd {
    /// The file begins as a database does, and then ends.
    Short(String),
    /// The file is something else, or of another version.
    Foreign(String),
}

/// Returns what is visibly wrong with a file.
pub(crate) fn odd_head(file: &impl StorageBackend) -> Result<Option<Odd>> {
    let len = file.len()?;
    let mut head = [0; HEAD_BYTES];
    let there = head.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    if let Some(there) = head.get_mut(..there) {
        file.read(0, there)?;
    }
    Ok(judge(&head, there, len))
}

fn judge(head: &[u8; HEAD_BYTES], there: usize, len: u64) -> Option<Odd> {
    let seen = head.get(..there).unwrap_or_default();
    let magic = ENGINE.get(..ENGINE.len().min(there)).unwrap_or_default();
    if !seen.starts_with(magic) {
        let is_blank = seen.iter().all(|byte| *byte == 0);
        let begins = if is_blank { "it begins with zeros" } else { "it begins with other bytes" };
        return Some(Odd::Foreign(format!("{begins}, not as a redb database does")));
    }
    if there < HEAD_BYTES {
        return Some(Odd::Short(format!("it is {len} bytes long, and the rest is missing")));
    }
    let byte = |at: usize| head.get(at).copied().unwrap_or_default();
    let [first, second] = VERSIONS_AT.map(byte);
    if first == second && first > VERSION {
        let text =
            format!("it is a redb database of file format {first}, and this version reads format {VERSION}");
        return Some(Odd::Foreign(text));
    }
    // The engine looks at both versions, and at nothing else before.
    if let Some(version) = [first, second].into_iter().find(|version| [1, 2].contains(version)) {
        return Some(Odd::Foreign(older_text(version)));
    }
    // A file that was not closed has changed its length since its head was written.
    let closed_len = layout_bytes(head).filter(|_| byte(FLAGS_AT) & UNCLOSED == 0);
    closed_len.filter(|closed_len| len < *closed_len).map(|closed_len| {
        Odd::Short(format!(
            "it is {len} bytes long, and was {closed_len} when it was closed; the rest is missing"
        ))
    })
}

/// Returns the file's length according to the head.
fn layout_bytes(head: &[u8; HEAD_BYTES]) -> Option<u64> {
    let numbers = head.get(PAGE_BYTES_AT..)?.as_chunks::<4>().0;
    let mut numbers = numbers.iter().map(|number| u64::from(u32::from_le_bytes(*number)));
    let mut next = || numbers.next();
    let (page, before, in_full, full, in_last) = (next()?, next()?, next()?, next()?, next()?);
    let last = if in_last > 0 { before + in_last } else { 0 };
    full.checked_mul(before + in_full)?.checked_add(last)?.checked_add(1)?.checked_mul(page)
}

/// Explains how to make a database of an older redb readable here.
pub(crate) fn older_text(version: u8) -> String {
    let how = match version {
        1 => "copy its tables into a new database: read them with redb 1, write them with redb 2.6 or newer",
        _ => "open it once with redb 2.6 and call `Database::upgrade`",
    };
    format!(
        "it is a redb database of file format {version}, as redb {version} writes it, and this version reads format {VERSION}; {how}, \
         then open it here, with `adopt_existing(true)` if it has no log yet"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(version: u8, flags: u8, layout: [u32; 5]) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[..ENGINE.len()].copy_from_slice(&ENGINE);
        head[FLAGS_AT] = flags;
        for (at, number) in layout.iter().enumerate() {
            head[PAGE_BYTES_AT + 4 * at..][..4].copy_from_slice(&number.to_le_bytes());
        }
        VERSIONS_AT.into_iter().for_each(|at| head[at] = version);
        head
    }

    /// Goal: only what is certain is reported. Method: heads of each version, closed and not, with
    /// lengths around what they say; numbers that overflow.
    #[test]
    fn only_what_is_certain_is_reported() {
        let layout = [4096, 0, 1000, 1, 10];
        let len = 4096 * 1011;
        for flags in 0..16 {
            let head = head(3, flags, layout);
            assert_eq!(judge(&head, HEAD_BYTES, len), None);
            assert_eq!(judge(&head, HEAD_BYTES, len + 4096), None);
            let is_short = matches!(judge(&head, HEAD_BYTES, len - 1), Some(Odd::Short(_)));
            assert_eq!(is_short, flags & UNCLOSED == 0, "{flags}");
        }
        assert_eq!(judge(&head(3, 0, [u32::MAX; 5]), HEAD_BYTES, len), None);
        for version in [1, 2, 4, 200] {
            assert!(matches!(judge(&head(version, 0, layout), HEAD_BYTES, len), Some(Odd::Foreign(_))));
        }
        let mut torn = head(3, 0, layout);
        torn[VERSIONS_AT[1]] = 77;
        assert_eq!(judge(&torn, HEAD_BYTES, len), None, "one state of two is no version");
        for there in 1..HEAD_BYTES {
            assert!(
                matches!(judge(&head(3, 0, layout), there, there as u64), Some(Odd::Short(_))),
                "{there}"
            );
        }
    }
}
