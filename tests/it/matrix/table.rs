//! The tables of docs/failure-modes.md name tests that exist; and every row of the matrix is in them.

use std::fs;
use std::path::Path;

/// The rows of all tables of the page, without their heads.
fn rows(page: &str) -> Vec<&str> {
    let is_row =
        |line: &&str| line.starts_with("| ") && !line.starts_with("| when") && !line.starts_with("| #");
    page.lines().filter(is_row).collect()
}

/// What stands in backticks in the last column, as far as it is the path of a test.
fn named(row: &str) -> Vec<&str> {
    let column = row.trim_end().trim_end_matches('|').rsplit(" | ").next().unwrap_or("");
    column.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect()
}

/// Whether `module::test` is a test of this binary, or of the library itself, in a file of its own or within another module's; or a
/// scenario of `tests/process`.
fn exists(root: &Path, name: &str) -> bool {
    let (module, test) = name.rsplit_once("::").expect("a path");
    let read = |file: String| fs::read_to_string(root.join(file)).unwrap_or_default();
    if let Some(module) = module.strip_prefix("process::") {
        return read(format!("tests/process/{module}.rs")).contains(&format!("\nfn {test}("));
    }
    let outer = module.rsplit_once("::").map(|(outer, _)| outer);
    [Some(module), outer].into_iter().flatten().any(|module| {
        let module = module.replace("::", "/");
        let files =
            [format!("tests/it/{module}.rs"), format!("src/{module}.rs"), format!("src/{module}/mod.rs")];
        files.into_iter().any(|file| has_test(&read(file), test))
    })
}

fn has_test(source: &str, test: &str) -> bool {
    let Some((before, _)) = source.split_once(&format!("fn {test}(")) else { return false };
    // `proptest!` makes tests of the functions in it, which stand indented.
    // Other attributes may stand below `#[test]`.
    let mut above = before.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let is_test = above.find(|line| *line == "#[test]" || !line.starts_with("#[")) == Some("#[test]");
    is_test || (before.ends_with("\n    ") && before.contains("proptest! {"))
}

/// Goal: the tables cannot rot. Method: each row names a test, or says why there is none; each named test is there; each test of the matrix
/// whose name begins with a row's number is named; B1 to B22 and C1 to C9 are all there.
#[test]
fn the_page_on_failure_modes_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/failure-modes.md")).unwrap();
    let rows = rows(&page);
    assert!(rows.len() > 200, "{} rows", rows.len());
    let mut all = Vec::new();
    for row in &rows {
        let names = named(row);
        assert!(!names.is_empty() || row.contains("cannot"), "names no test, and does not say why: {row}");
        for name in names {
            assert!(exists(root, name), "no such test: {name}");
            all.push(name);
        }
    }
    for entry in fs::read_dir(root.join("tests/it/matrix")).unwrap() {
        let source = fs::read_to_string(entry.unwrap().path()).unwrap();
        for line in source.lines().filter_map(|line| line.strip_prefix("fn ")) {
            let test = line.split('(').next().unwrap();
            let numbered =
                test.starts_with(['b', 'c']) && test[1..].starts_with(|c: char| c.is_ascii_digit());
            let is_named = || all.iter().any(|name| name.ends_with(&format!("::{test}")));
            assert!(!numbered || is_named(), "docs/failure-modes.md does not name {test}");
        }
    }
    let number = |row: &&str| row.split('|').nth(1).unwrap_or("").trim().replace('–', ", ");
    let numbers: Vec<_> = rows.iter().map(number).collect();
    let has = |id: String| numbers.iter().any(|row| row.split(", ").any(|in_row| in_row == id));
    for n in (1..=22).filter(|n| *n != 15) {
        assert!(has(format!("B{n}")), "B{n} has no row");
    }
    (1..=9).for_each(|n| assert!(has(format!("C{n}")), "C{n} has no row"));
}

/// Goal: the page on security cannot rot. Method: each promise, a row of a table with the head *held by*, names tests, and all are there.
#[test]
fn the_page_on_security_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("src/security.rs")).unwrap();
    let lines: Vec<_> = page.lines().map(|line| line.trim_start_matches("//!").trim()).collect();
    let tables: Vec<_> = lines.split(|line| *line == "| promise | held by |").skip(1).collect();
    assert_eq!(tables.len(), 5, "a table for each attacker");
    for table in tables {
        let rows: Vec<_> = table.iter().skip(1).take_while(|line| line.starts_with('|')).collect();
        assert!(!rows.is_empty());
        for row in rows {
            let names = named(row);
            assert!(!names.is_empty(), "names no test: {row}");
            for name in names {
                assert!(exists(root, name), "no such test: {name}");
            }
        }
    }
}

/// Goal: the check can fail. Method: rows that name nothing, something that is not there, and something that is.
#[test]
fn a_row_that_rots_is_seen() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert!(exists(root, "matrix::table::a_row_that_rots_is_seen"));
    assert!(!exists(root, "matrix::table::exists"), "no test");
    assert!(!exists(root, "matrix::nowhere::x"));
    assert!(exists(root, "crash_tests::a_power_cut_in_a_recovery"));
    assert!(!exists(root, "crash_tests::cut_everywhere"), "no test");
    assert!(exists(root, "store::shared::age::tests::the_store_age_never_goes_back"));
    assert!(exists(root, "process::forked::a_daemon") && !exists(root, "process::forked::a_dream"));
    let text = "# x\n| when | then | test |\n|---|---|---|\n| a | `b::c` | `d::e`, `f` |\n\n| # | when | then | test |\n|---|---|---|---|\n";
    assert_eq!(rows(text), ["| a | `b::c` | `d::e`, `f` |"]);
    assert_eq!(named(rows(text)[0]), ["d::e"]);
}
