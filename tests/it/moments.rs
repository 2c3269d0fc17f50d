//! One place computes when a wait ends: `src/time/deadline.rs`.
//!
//! Goal: no moment is moved by a duration anywhere else in `src/`, where a duration of the caller's might be too long
//! and panic. Method: read the code, without comments, strings and tests; collect the names that hold an `Instant` or a
//! `SystemTime`, and look for `+`, `-`, `+=`, `-=` and `checked_add` behind one of them, or behind a reading of a
//! clock. The difference of two moments does not panic, and is allowed where both are named.

use std::collections::BTreeSet;

use crate::floors::{code_only, files, is_word, without_tests};

/// The files that may.
const HERE_ALONE: &[&str] = &["time/deadline.rs", "time/manual.rs", "time/mod.rs"];

/// What reads a clock, or is a moment itself.
const READINGS: &[&str] = &["Instant::now()", "SystemTime::now()", "UNIX_EPOCH"];

#[test]
fn a_moment_is_moved_in_one_place_alone() {
    let mut wrong = Vec::new();
    for (file, source) in files("src").into_iter().filter(|(file, _)| !is_test(file)) {
        if !HERE_ALONE.contains(&&*file) {
            wrong.extend(moved(&source).into_iter().map(|what| format!("src/{file}: {what}")));
        }
    }
    assert!(wrong.is_empty(), "use `Deadline`, or a helper of `time`:\n{}", wrong.join("\n"));
}

/// Goal: an unsigned number of milliseconds that may be the caller's is added with care. Method: where a deadline in
/// milliseconds is computed, a plain `+` stands behind none of these names.
#[test]
fn milliseconds_of_a_clock_are_added_with_care() {
    let mut wrong = Vec::new();
    for (file, source) in files("src").into_iter().filter(|(file, _)| !is_test(file)) {
        let code = without_tests(&code_only(&source));
        for name in ["mono_ms", "wall_ms", "now_ms", "due_ms", "since_ms", "time_ms"] {
            for (at, _) in code.match_indices(name).filter(|(at, _)| is_whole_word(&code, *at, name)) {
                let rest = code[at + name.len()..].trim_start();
                if rest.starts_with("+ ") || rest.starts_with("+=") || rest.starts_with("* ") {
                    wrong.push(format!("src/{file}: `{}`", line_at(&code, at)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "use `saturating_add`:\n{}", wrong.join("\n"));
}

fn is_test(file: &str) -> bool {
    file.split('/').any(|part| part.trim_end_matches(".rs").ends_with("tests"))
}

/// Where a moment is moved.
fn moved(source: &str) -> Vec<String> {
    let code = without_tests(&code_only(source));
    let names = moments(&code);
    let named = names.iter().map(String::as_str).chain(READINGS.iter().copied());
    let mut wrong = Vec::new();
    for name in named {
        for (at, _) in code.match_indices(name).filter(|(at, _)| is_whole_word(&code, *at, name)) {
            // A method that hands the moment on, and the end of a call: `Some(since)`, `since.unwrap_or_else(Instant::now)`.
            let rest = code[at + name.len()..].trim_start_matches(')').trim_start();
            let added = ["+ ", "+= ", "-= ", ".checked_add(", ".checked_sub(", ".add(", ".sub("];
            let is_moved = added.iter().any(|operator| rest.starts_with(operator));
            let less = rest
                .strip_prefix("- ")
                .map(|rest| rest.split(|char| !is_word(char)).next().unwrap_or_default());
            // Two moments apart from each other.
            let is_less =
                less.is_some_and(|other| !names.contains(other) && !rest.starts_with("- Instant::now()"));
            if is_moved || is_less {
                wrong.push(format!("`{}`", line_at(&code, at)));
            }
        }
    }
    wrong
}

/// Names of what holds a moment: `name: Instant`, `name: Option<Instant>`, `let name = Instant::now()`.
fn moments(code: &str) -> BTreeSet<String> {
    let patterns = [
        ": Instant",
        ": Option<Instant>",
        ": &Instant",
        ": SystemTime",
        ": Option<SystemTime>",
        " = Instant::now()",
        " = SystemTime::now()",
        " = tokio::time::Instant::now()",
    ];
    let names = patterns.iter().flat_map(|pattern| code.match_indices(pattern)).filter_map(|(at, _)| {
        let before = code[..at].trim_end();
        let name = before.rsplit(|char| !is_word(char)).next().filter(|name| !name.is_empty());
        name.map(str::to_owned)
    });
    names.collect()
}

fn is_whole_word(code: &str, at: usize, name: &str) -> bool {
    let is_end = |char: Option<char>| char.is_none_or(|char| !is_word(char));
    is_end(code[..at].chars().next_back()) && is_end(code[at + name.len()..].chars().next())
}

fn line_at(code: &str, at: usize) -> &str {
    let begin = code[..at].rfind('\n').map_or(0, |newline| newline + 1);
    code[begin..].lines().next().unwrap_or_default().trim()
}

/// The check is checked: what it must flag, and what it must let pass.
#[test]
fn the_check_sees_a_moment_that_is_moved() {
    for wrong in [
        "let until = Instant::now() + timeout;",
        "let until = tokio::time::Instant::now() + timeout;",
        "fn f(now: Instant) { let until = now + timeout; }",
        "struct S { since: Option<Instant> } fn f(s: S) { s.since.map(|since| since + delay); }",
        "let began = Instant::now(); began.checked_add(timeout)",
        "let mut began = Instant::now(); began += timeout;",
        "let until = Instant::now() - margin;",
        "let time = UNIX_EPOCH + Duration::from_millis(ms);",
        "fn f(at: SystemTime) { at + age }",
        "fn f(since: Instant) { Some(since) + delay }",
    ] {
        assert!(!moved(wrong).is_empty(), "{wrong}");
    }
    for right in [
        "let until = Deadline::after(timeout);",
        "// Instant::now() + timeout",
        "fn f(now: Instant, since: Instant) { now - since }",
        "let at = Instant::now(); at.elapsed() + longer",
        "#[cfg(test)] mod tests { fn f() { Instant::now() + timeout } }",
        "fn f(now: Instant) -> u64 { known + now_known }",
    ] {
        assert_eq!(moved(right), Vec::<String>::new(), "{right}");
    }
}
