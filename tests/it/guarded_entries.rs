//! Every way from a public call into the storage engine is guarded against its panics: the source says so.

use std::fs;
use std::path::{Path, PathBuf};

/// What catches a panic of the engine, or runs in what does.
const GUARDS: [&str; 6] = ["engine", "or_poison", "unless_it_panics", "reading", "guarded", "caught"];

/// Functions that use a transaction of the engine and are called within a guard alone: a file, its functions, and the guard.
const WITHIN: &[(&str, &[&str])] = &[
    // At the open, in `file::guarded`.
    (
        "store/open/recover.rs",
        &["write_schema", "identify", "make_newer_tables", "upgrade", "recover", "begin_epoch"],
    ),
    ("store/open/captures.rs", &["recover", "switch_on"]),
    ("store/open/cleanup.rs", &["recover"]),
    ("storage/tables", &[]),
    ("store/transaction/cleanup.rs", &["leave", "leave_revisions"]),
    // Begins alone, which `Core` guards; what is read by it has a guard of its own.
    ("store/shared/core.rs", &["begin_read"]),
    ("store/handle/mod.rs", &["read"]),
    // In `Store::stats`.
    ("inspect/stats.rs", &["all_stats"]),
    // In `Transaction::finish`, which is in `or_poison`.
    ("store/transaction/commit.rs", &[]),
    ("store/transaction/apply_progress.rs", &[]),
    ("store/transaction/captures.rs", &[]),
    ("store/transaction/trim.rs", &[]),
    ("store/transaction/stream_index.rs", &["write_streams", "wants"]),
    // In closures, whose panics are caught; or in an `engine` of their callers.
    ("store/transaction/cleanup_pieces.rs", &[]),
    ("store/transaction/projections.rs", &[]),
    ("store/writer/cleanup.rs", &[]),
    ("store/handle/cancelled.rs", &[]),
    ("consumer/in_hand.rs", &[]),
    ("consumer/rejected.rs", &[]),
    ("consumer/reject.rs", &[]),
    ("consumer/rejected_room.rs", &[]),
    ("consumer/dedup.rs", &["write_lane_update"]),
    ("projection/rows.rs", &[]),
    ("projection/transaction.rs", &[]),
    ("store/capture/passes.rs", &[]),
    ("store/capture/piece.rs", &[]),
    ("store/streams/mod.rs", &["forget_in"]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.extension() {
            _ if path.is_dir() => sources(&path, found),
            Some(extension) if extension == "rs" => found.push(path),
            _ => {}
        }
    }
}

/// The names of the calls whose arguments a place is in, and the function.
fn around(text: &str, place: usize) -> (Vec<&str>, &str) {
    let word_before = |at: usize| {
        let before = &text[..at];
        let start = before.rfind(|char: char| !char.is_alphanumeric() && char != '_').map_or(0, |at| at + 1);
        &before[start..]
    };
    let begin =
        text[..place].rfind("\n    fn ").into_iter().chain(text[..place].rfind("fn ")).max().unwrap_or(0);
    let mut open = Vec::new();
    for (at, char) in text[begin..place].char_indices() {
        match char {
            '(' => open.push(word_before(begin + at)),
            ')' => drop(open.pop()),
            _ => {}
        }
    }
    let name = text[begin..].split_once("fn ").map_or("", |(_, rest)| rest);
    let end = name.find(|char: char| !char.is_alphanumeric() && char != '_').unwrap_or(name.len());
    (open, &name[..end])
}

/// Goal: a new public call cannot read or write pages without a guard. Method: each place in the sources that begins a read of the engine, or uses a write
/// transaction of the engine, is in the arguments of a guard, or in a function that is listed here with its guard.
#[test]
fn every_way_into_the_engine_is_guarded() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut looked = 0;
    let mut bare = Vec::new();
    for path in files {
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        // Comments hold no calls, and tests are no public calls.
        let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
        let code = code.join("\n");
        let code = code.split("#[cfg(test)]\nmod tests").next().unwrap_or("");
        if name.contains("tests") {
            continue;
        }
        let listed =
            WITHIN.iter().find(|(place, _)| name.starts_with(place)).map(|(_, functions)| *functions);
        for call in [".begin_read()", ".redb()"] {
            for (place, _) in code.match_indices(call) {
                looked += 1;
                let (calls, function) = around(code, place);
                let is_guarded = calls.iter().any(|call| GUARDS.contains(call));
                let is_listed =
                    listed.is_some_and(|functions| functions.is_empty() || functions.contains(&function));
                if !is_guarded && !is_listed {
                    bare.push(format!("{name}: {function}: {call}"));
                }
            }
        }
    }
    assert!(looked > 60, "{looked}");
    assert!(bare.is_empty(), "{bare:#?}");
}
