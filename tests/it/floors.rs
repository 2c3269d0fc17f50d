//! The house rules of `src/`, held.
//!
//! Goal: a file imports only from lower floors or from its own room; each outside crate is named in its rooms only;
//! nothing is left undone or ignored. Method: read the code, without comments and strings, and look at every
//! `crate::`, `super::` and `some_crate::` path. A room's own door (`mod.rs`) may re-export its children.
//! Test modules are held to the floors, but may name what outside crates they like.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each room and its floor. A path belongs to the longest entry that it begins with; the empty one is `lib.rs`.
const FLOORS: &[(u8, &[&str])] = &[
    (0, &["printable", "tuning"]),
    (1, &["limits", "time", "error", "text", "say", "process", "mutations"]),
    (2, &["message", "codec"]),
    (3, &["event", "broker"]),
    (4, &["filter", "quarantine_filter", "upcast", "log", "delivery", "oneshot", "wire"]),
    (5, &["storage", "broker::rabbitmq"]),
    // The store's own floors. Its door, `store`, stands above them.
    (6, &["store::settings"]),
    (7, &["store::shared"]),
    (8, &["store::read"]),
    (9, &["store::transaction"]),
    (10, &["store::streams", "store::capture"]),
    (11, &["store::writer"]),
    (12, &["store::handle"]),
    (13, &["store::open"]),
    (14, &["store"]),
    (15, &["aggregate", "relay", "projection", "subscription", "consumer"]),
    (16, &["inspect"]),
    (TOP, &["", "security", "guide", "crash_tests"]),
];

const TOP: u8 = 17;

/// Each outside crate and the rooms that may name it. The empty one is `lib.rs`: `pub use redb`.
const CRATES: &[(&str, &[&str])] = &[
    ("redb", &["storage", "store", "relay", "projection", "consumer", "inspect", "crash_tests", ""]),
    ("libc", &["storage"]),
    ("rustix", &["storage"]),
    ("twox_hash", &["storage"]),
    ("crc32fast", &["log", "broker::rabbitmq"]),
    ("lapin", &["broker::rabbitmq"]),
    ("tokio", &["broker::rabbitmq"]),
    ("futures_util", &["broker::rabbitmq"]),
    ("async_rs", &["broker::rabbitmq"]),
    ("futures_io", &["broker::rabbitmq"]),
    ("percent_encoding", &["broker::rabbitmq"]),
    ("zeroize", &["broker::rabbitmq"]),
    ("rustls", &["broker::rabbitmq"]),
    ("tokio_rustls", &["broker::rabbitmq"]),
    ("rustls_native_certs", &["broker::rabbitmq"]),
    // `Capture::json` says in its signature what the types of its table must be.
    ("serde", &["codec", "event", "wire", "store"]),
    ("serde_json", &["codec"]),
    ("base64", &["codec"]),
    ("bincode", &["codec"]),
    ("uuid", &["event"]),
    ("humantime", &["wire"]),
    ("hmac", &["wire"]),
    ("sha2", &["wire"]),
    ("futures_core", &["subscription"]),
    ("rustc_hash", &["relay", "delivery", "broker::rabbitmq"]),
    ("crossbeam_channel", &["store", "broker", "broker::rabbitmq", "relay", "consumer"]),
];

/// Files that import each other within their folder. The methods of the memory broker's state stand in
/// several files. The tests of a record read it in both ways.
const CIRCLES: &[&str] = &[
    "broker::memory::connections",
    "broker::memory::consumers",
    "broker::memory::state",
    "log::record",
    "log::view",
];

/// Crates that any room may name.
const ANYWHERE: &[&str] = &["thiserror", "tracing"];

/// Lines of a file, without its tests.
const LINES_MAX: usize = 600;

/// What no file holds.
const UNDONE: &[&str] = &["todo!", "unimplemented!", "#[ignore"];

#[test]
fn every_file_keeps_to_its_floor_and_its_crates() {
    let mut wrong = Vec::new();
    for (file, source) in files("src") {
        wrong.extend(violations(&file, &source).into_iter().map(|what| format!("src/{file}: {what}")));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_undone_or_ignored() {
    for folder in ["src", "tests", "examples", "benches"] {
        for (file, source) in files(folder) {
            let code = code_only(&source);
            for undone in UNDONE {
                assert!(!code.contains(undone), "{folder}/{file} holds `{undone}`");
            }
        }
    }
}

/// Goal: a file can be read at one sitting, and no room is crowded. Method: lines of code and documentation, without tests.
#[test]
fn no_file_is_long_and_no_room_is_crowded() {
    let is_test = |file: &str| {
        let folders = ["tests/", "crash_tests/", "story_tests/", "exhaustive_tests/"];
        folders.iter().any(|folder| file.contains(folder)) || file.ends_with("tests.rs")
    };
    let lines = |source: &str| {
        let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        code.lines().count()
    };
    let sources = files("src");
    let counted =
        sources.iter().filter(|(file, _)| !is_test(file)).map(|(file, source)| (file, lines(source)));
    let (mut rooms, mut all) = (BTreeMap::<&str, usize>::new(), 0);
    for (file, lines) in counted {
        assert!(lines <= LINES_MAX, "src/{file} has {lines} lines");
        all += lines;
        *rooms.entry(file.rsplit_once('/').map_or("", |(room, _)| room)).or_default() += lines;
    }
    for (room, lines) in rooms {
        assert!(lines * 5 <= all, "src/{room} has {lines} of {all} lines");
    }
}

/// Goal: a file can be read without those that read it. Method: a circle of imports is looked for among the files of each folder. A
/// folder's own door may take in what stands behind it, and what stands behind it may look at its door.
#[test]
fn no_files_import_each_other_in_a_circle() {
    let sources = files("src");
    let sources: Vec<_> = sources.into_iter().filter(|(file, _)| !file.starts_with("crash_tests/")).collect();
    let modules: BTreeSet<Vec<String>> = sources.iter().map(|(file, _)| module_of(file)).collect();
    let mut imports: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
    for (file, source) in &sources {
        let module = module_of(file);
        let code = without_tests(&code_only(source));
        let paths = paths_from(&code, "crate", &[]).into_iter().chain(paths_from(&code, "super", &module));
        for path in paths {
            let target =
                (0..=path.len()).rev().map(|len| path[..len].to_vec()).find(|path| modules.contains(path));
            let is_door = |target: &Vec<String>| module.starts_with(target) || target.starts_with(&module);
            let target = target.filter(|target| !target.is_empty() && !is_door(target));
            imports.entry(module.clone()).or_default().extend(target);
        }
    }
    let mut circles = Vec::new();
    for module in imports.keys() {
        let (mut reached, mut left) = (BTreeSet::new(), vec![module]);
        while let Some(from) = left.pop() {
            left.extend(imports.get(from).into_iter().flatten().filter(|to| reached.insert((*to).clone())));
        }
        if reached.contains(module) {
            circles.push(module.join("::"));
        }
    }
    assert_eq!(circles, CIRCLES);
}

/// The counting allocator cannot be written without it. `src/lib.rs` forbids it for all of the library.
#[test]
fn unsafe_code_stands_in_the_counting_allocator_alone() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs");
    assert!(code_only(&lib).contains("#![forbid(unsafe_code)]"));
    for folder in ["src", "tests", "examples", "benches"] {
        for (file, source) in files(folder) {
            let is_unsafe = code_only(&source).split(|char| !is_word(char)).any(|word| word == "unsafe");
            assert_eq!(
                is_unsafe,
                (folder, &*file) == ("tests", "allocations/counting.rs"),
                "{folder}/{file}"
            );
        }
    }
}

#[test]
fn every_dependency_has_its_rooms() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("Cargo.toml");
    let mut section = "";
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        } else if section.ends_with("dependencies]") && !section.contains("dev-") {
            let Some((name, _)) = line.split_once('=').filter(|_| !line.starts_with('#')) else { continue };
            let name = name.trim().replace('-', "_");
            let known = ANYWHERE.contains(&&*name) || CRATES.iter().any(|(known, _)| *known == name);
            assert!(known, "give `{name}` a room in CRATES");
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files of a folder but those that a build makes, by their path in it. None if there is no such folder yet.
pub(crate) fn files(folder: &str) -> Vec<(String, String)> {
    let base = root().join(folder);
    let (mut folders, mut found) = (vec![base.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path: PathBuf = entry.expect("a folder entry").path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name =
                    path.strip_prefix(&base).expect("below the folder").to_string_lossy().replace('\\', "/");
                found.push((name, fs::read_to_string(&path).expect("a readable file")));
            }
        }
    }
    found.sort();
    found
}

/// What is wrong with one file of `src/`.
fn violations(file: &str, source: &str) -> Vec<String> {
    let module = module_of(file);
    let Some((floor, room)) = place(&module) else {
        return vec!["has no floor: add it to FLOORS".to_owned()];
    };
    let code = code_only(source);
    let tested = without_tests(&code);
    let test_file = module.iter().any(|name| name == "tests");
    let mut wrong = Vec::new();

    // A test may come in by the door of the house that its file stands in.
    let in_house = |path: &Vec<String>| place(path).is_some_and(|(_, to)| is_within(room, to));
    let mut paths = paths_from(&code, "crate", &[]);
    let outside_tests = paths_from(&tested, "crate", &[]);
    paths.retain(|path| outside_tests.contains(path) || !in_house(path));
    paths.extend(paths_from(&tested, "super", &module));
    for path in paths {
        // What the root re-exports lives on the top floor, as far as this can see.
        let (to_floor, to_room) = place(&path).unwrap_or((TOP, ""));
        if to_room != room && to_floor >= floor {
            let path = path.join("::");
            wrong.push(format!("`{room}` is on floor {floor} and imports `{path}` from floor {to_floor}"));
        }
    }
    for (name, rooms) in CRATES {
        let may = rooms.iter().any(|of| is_within(room, of));
        if !test_file && !may && names_crate(&tested, name) {
            wrong.push(format!("`{room}` names the crate `{name}`, which belongs to {rooms:?}"));
        }
    }
    wrong
}

/// Whether the room is this one or stands within it.
fn is_within(room: &str, house: &str) -> bool {
    room == house
        || (!house.is_empty() && room.strip_prefix(house).is_some_and(|rest| rest.starts_with("::")))
}

/// `log/record.rs` is `log::record`, `log/mod.rs` is `log`, `lib.rs` is the root.
fn module_of(file: &str) -> Vec<String> {
    let mut module: Vec<String> = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
        module.pop();
    }
    module
}

/// The floor and the room of a path. Only the root itself is in the room `""`: a file that no entry names has no place.
fn place(path: &[String]) -> Option<(u8, &'static str)> {
    let begins_with = |room: &str| {
        if room.is_empty() {
            return path.is_empty();
        }
        let mut words = path.iter();
        room.split("::").all(|word| words.next().is_some_and(|other| other == word))
    };
    let rooms = FLOORS.iter().flat_map(|(floor, rooms)| rooms.iter().map(|room| (*floor, *room)));
    rooms.filter(|(_, room)| begins_with(room)).max_by_key(|(_, room)| room.len())
}

/// All paths in the code that begin with `head` (`crate` or `super`), groups spread out, as paths from the root.
/// `module` is where the code stands.
fn paths_from(code: &str, head: &str, module: &[String]) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices(head) {
        let before = code.get(..at).and_then(|before| before.chars().next_back());
        // `super::super`: the first one counts for both.
        // `pub(in crate::store)` says who may import, and imports nothing.
        let is_visibility = code.get(..at).is_some_and(|before| before.trim_end().ends_with("(in"));
        if is_visibility || before.is_some_and(|char| is_word(char) || char == ':') {
            continue;
        }
        let Some(mut rest) = code.get(at..).and_then(|rest| rest.strip_prefix(head)) else { continue };
        let mut base = module.to_vec();
        if head == "super" {
            base.pop();
            while let Some(upper) =
                rest.trim_start().strip_prefix("::").and_then(|r| r.trim_start().strip_prefix("super"))
            {
                base.pop();
                rest = upper;
            }
        }
        if let Some(tail) = rest.trim_start().strip_prefix("::") {
            spread(tail, &base, &mut paths);
        }
    }
    paths
}

/// Reads `a::b`, `a::{b, c::d}` or `*` from the start of `tail`; returns what is left.
fn spread<'a>(tail: &'a str, base: &[String], paths: &mut Vec<Vec<String>>) -> &'a str {
    let mut path = base.to_vec();
    let mut tail = tail.trim_start();
    loop {
        if let Some(mut group) = tail.strip_prefix('{') {
            loop {
                group = spread(group, &path, paths).trim_start();
                match group.strip_prefix(',') {
                    Some(next) if next.trim_start().starts_with('}') => group = next.trim_start(),
                    Some(next) => {
                        group = next;
                        continue;
                    }
                    None => {}
                }
                return group.strip_prefix('}').unwrap_or(group);
            }
        }
        let end = tail.find(|char| !is_word(char)).unwrap_or(tail.len());
        let (word, rest) = tail.split_at(end);
        if !word.is_empty() && word != "self" {
            path.push(word.to_owned());
        }
        tail = rest.strip_prefix('*').unwrap_or(rest).trim_start();
        let Some(next) = tail.strip_prefix("::").filter(|next| !next.trim_start().starts_with('<')) else {
            // ` as other`
            let renamed = tail.strip_prefix("as ").map(|name| name.trim_start().trim_start_matches(is_word));
            paths.push(path);
            return renamed.unwrap_or(tail);
        };
        tail = next.trim_start();
    }
}

/// Whether the code names an outside crate: `name::`, `use name;` or `use name as`.
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = code.split_at(at);
        let after = after.strip_prefix(name).unwrap_or_default();
        if after.starts_with(is_word) || before.ends_with(|char| is_word(char) || char == '.') {
            return false;
        }
        let (before, after) = (before.trim_end(), after.trim_start());
        let in_path = after.starts_with("::");
        let absolute =
            before.strip_suffix("::").is_none_or(|head| !head.ends_with(|char| is_word(char) || char == '>'));
        let imported = before.ends_with("use") || before.ends_with("extern crate");
        absolute && (in_path || imported)
    })
}

pub(crate) fn is_word(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// The code with every comment, string and character literal blanked out. Line breaks stay.
pub(crate) fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(char) = rest.chars().next() {
        let literal = if code.ends_with(is_word) && !rest.starts_with('"') { 0 } else { literal_len(rest) };
        let len = literal.max(comment_len(rest));
        let (skipped, left) = rest.split_at(if len == 0 { char.len_utf8() } else { len });
        if len == 0 {
            code.push(char);
        } else {
            code.push(' ');
            code.extend(skipped.chars().filter(|char| *char == '\n'));
        }
        rest = left;
    }
    code
}

/// How long the comment is that the text begins with; 0 if it does not.
fn comment_len(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if !text.starts_with("/*") {
        return 0;
    }
    let (mut depth, mut at) = (0_usize, 0);
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// How long the string or character literal is that the text begins with; 0 if it does not.
fn literal_len(text: &str) -> usize {
    let body = text.strip_prefix(['b', 'c']).unwrap_or(text);
    let prefix = text.len() - body.len();
    if let Some(raw) = body.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw.trim_start_matches('#').starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = prefix + 1 + hashes + 1;
            let end = text.get(open..).and_then(|inside| inside.find(&close));
            return end.map_or(text.len(), |end| open + end + close.len());
        }
    }
    if body.starts_with('"') {
        return prefix + quoted_len(body, '"');
    }
    // A lifetime is a quote and a word without a second quote right after its first letter.
    let mut chars = body.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('\''), Some('\\'), _) => prefix + quoted_len(body, '\''),
        (Some('\''), Some(char), Some('\'')) => prefix + char.len_utf8() + 2,
        _ => 0,
    }
}

fn quoted_len(text: &str, quote: char) -> usize {
    let mut escaped = true; // the opening quote
    for (at, char) in text.char_indices() {
        match char {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if char == quote => return at + char.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// The code without the items that stand under `#[cfg(test)]`.
pub(crate) fn without_tests(code: &str) -> String {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let mut kept = String::with_capacity(code.len());
    let mut rest = code;
    while let Some((before, item)) = rest.split_once(ATTRIBUTE) {
        kept.push_str(before);
        let mut depth = 0_usize;
        let end = item.char_indices().find(|(_, char)| {
            match char {
                '{' | '[' | '(' => depth += 1,
                '}' | ']' | ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && matches!(char, ';' | '}')
        });
        rest = end.and_then(|(at, _)| item.get(at + 1..)).unwrap_or_default();
    }
    kept + rest
}

mod itself {
    //! The check is checked: what it must flag, and what it must let pass.

    use super::*;

    fn flags(file: &str, source: &str) -> usize {
        violations(file, source).len()
    }

    #[test]
    fn lower_floors_and_the_own_room_are_free() {
        assert_eq!(flags("store/mod.rs", "use crate::{error::Error, log::{self, Record}};"), 0);
        assert_eq!(
            flags(
                "store/writer/groups.rs",
                "use super::thread::Writer; use crate::store::shared::core::Core;"
            ),
            0
        );
        assert_eq!(
            flags("store/read/stream.rs", "pub(in crate::store) struct View;"),
            0,
            "it imports nothing"
        );
        assert_eq!(flags("store/read/stream.rs", "#[cfg(test)]\nmod tests { use crate::store::Store; }"), 0);
        assert_eq!(flags("lib.rs", "pub use crate::store::Store; pub use redb;"), 0);
        assert_eq!(flags("relay/mod.rs", "use crate::delivery::Machine; use super::store::Core;"), 0);
    }

    #[test]
    fn a_higher_or_an_equal_floor_is_flagged() {
        assert_eq!(flags("event.rs", "use crate::store::Store;"), 1);
        assert_eq!(flags("event.rs", "fn f() -> crate::broker::Epoch { todo() }"), 1);
        assert_eq!(flags("log/mod.rs", "use crate::{\n  limits::A,\n  store::{B, C},\n};"), 2);
        assert_eq!(flags("log/mod.rs", "use crate::{limits::A, store as s, relay::*,};"), 2);
        assert_eq!(flags("delivery/mod.rs", "use crate::relay::Worker;"), 1);
        assert_eq!(flags("store/read/stream.rs", "use crate::store::transaction::Transaction;"), 1);
        assert_eq!(flags("store/capture/piece.rs", "use crate::store::streams::EventStream;"), 1);
        assert_eq!(flags("store/read/stream.rs", "use crate::store::Store;"), 1, "the door stands above");
        assert_eq!(flags("broker/mod.rs", "use crate::broker::rabbitmq::Connection;"), 1);
        assert_eq!(flags("error.rs", "use crate::Store;"), 1, "the root is the top floor");
    }

    #[test]
    fn super_is_followed_upwards() {
        assert_eq!(flags("delivery/keys.rs", "use super::types::Key;"), 0);
        assert_eq!(flags("delivery/keys.rs", "use super::super::relay::Worker;"), 1);
        assert_eq!(flags("delivery/keys.rs", "use super::super::{store::Core, limits::A};"), 1);
        assert_eq!(flags("event.rs", "use super::store::Core;"), 1);
        assert_eq!(flags("event.rs", "#[cfg(test)] mod tests { use super::*; }"), 0);
    }

    #[test]
    fn an_outside_crate_stays_in_its_room() {
        assert_eq!(flags("log/mod.rs", "use redb::Database;"), 1);
        assert_eq!(flags("log/mod.rs", "fn f() { ::redb :: Database::open() }"), 1);
        assert_eq!(flags("log/mod.rs", "use redb;"), 1);
        assert_eq!(flags("delivery/mod.rs", "use crossbeam_channel::Sender;"), 1);
        assert_eq!(flags("broker/memory/mod.rs", "use tokio::sync::mpsc;"), 1);
        assert_eq!(flags("broker/rabbitmq/link.rs", "use tokio::sync::mpsc; use lapin::Channel;"), 0);
        assert_eq!(
            flags("event.rs", "Event::bincode(x); self.bincode::<T>(); my_redb::x(); redb_path::y();"),
            0
        );
    }

    #[test]
    fn a_test_module_obeys_the_floors_but_names_what_it_likes() {
        let test = "use redb::X; use crate::relay::Y;";
        assert_eq!(
            flags("log/mod.rs", &format!("#[cfg(test)]\nmod tests {{ fn f() {{ {{}} }} {test} }}")),
            1
        );
        assert_eq!(flags("log/tests.rs", test), 1);
        assert_eq!(
            flags("log/mod.rs", "#[cfg(test)]\n#[allow(x)]\nmod tests; use redb::X;"),
            1,
            "the item ends there"
        );
    }

    #[test]
    fn comments_and_strings_are_no_code() {
        let source = r##"
            //! [`x`](crate::store::Store)
            /* redb::X /* nested */ crate::relay::Y */
            const A: &str = "crate::store::Z \" redb::X";
            const B: &str = r#"crate::store::Z " redb::X"#;
            const C: (char, char, &'static [u8]) = ('"', '\'', b"redb::X");
        "##;
        assert_eq!(flags("error.rs", source), 0);
        assert_eq!(flags("error.rs", "const Q: char = '\"'; use crate::store::X; const R: char = '\"';"), 1);
        assert_eq!(flags("error.rs", "fn f<'a>(x: &'a str) { crate::store::x() }"), 1);
    }

    #[test]
    fn a_file_without_a_floor_is_flagged() {
        assert_eq!(violations("surprise.rs", ""), ["has no floor: add it to FLOORS"]);
        assert_eq!(flags("relay/surprise.rs", ""), 0, "a room may grow");
    }
}
