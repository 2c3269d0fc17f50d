//! The Markdown pages: each link between them leads to a page, a heading or a folder that exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Goal: no link of a page is dead. Method: each relative link of each page is followed, to its file and to
/// the heading that it names.
#[test]
fn every_link_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = pages(root);
    assert!(pages.len() >= 10, "{} pages", pages.len());
    let headings: BTreeMap<&PathBuf, BTreeSet<String>> =
        pages.iter().map(|(page, text)| (page, anchors(text))).collect();
    let mut dead = Vec::new();
    for (page, text) in &pages {
        for link in links(text) {
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, at)| (file, Some(at)));
            let target = if file.is_empty() { page.clone() } else { resolved(page, file) };
            let is_there = root.join(&target).exists();
            let has_anchor = |at: &str| headings.get(&target).is_none_or(|known| known.contains(at));
            if !is_there || !anchor.is_none_or(has_anchor) {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

/// Goal: the check itself finds what it must. Method: a page with links and headings of every kind.
#[test]
fn links_and_headings_are_found() {
    let text = "# A `b` (c), d\n\n[x](y.md#z) [w](https://example.org)\n```text\n[no](no.md)\n# no\n```\n## A `b` (c), d\n[`u`](v)";
    assert_eq!(links(text), ["y.md#z", "v"]);
    assert_eq!(anchors(text), ["a-b-c-d", "a-b-c-d-1"].map(str::to_owned).into());
    assert_eq!(resolved(Path::new("docs/decisions/a.md"), "../b.md"), Path::new("docs/b.md"));
}

/// All pages, by their path from the root. What is built or fetched holds none of ours.
fn pages(root: &Path) -> Vec<(PathBuf, String)> {
    let (mut folders, mut found) = (vec![PathBuf::new()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name();
            let path = folder.join(&name);
            let is_ours = !["target", ".git", "artifacts", "corpus"].iter().any(|other| name == *other);
            if root.join(&path).is_dir() && is_ours {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(root.join(&path)).expect("a page");
                found.push((path, text));
            }
        }
    }
    found.sort();
    found
}

/// The lines of a page that are no code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    text.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// The targets of links within the project.
fn links(text: &str) -> Vec<&str> {
    let all = prose(text).flat_map(|line| line.split("](").skip(1));
    let targets = all.filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    targets.filter(|target| !target.contains("://") && !target.starts_with("crate::")).collect()
}

/// The names that headings have as targets: lower case, words joined by hyphens, repeated ones numbered.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut known = BTreeMap::<String, usize>::new();
    let mut all = BTreeSet::new();
    for heading in prose(text).filter(|line| line.starts_with('#')) {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|char| char.is_alphanumeric() || [' ', '-', '_'].contains(char));
        let name: String = kept.map(|char| if char == ' ' { '-' } else { char }).collect();
        let times = known.entry(name.clone()).or_default();
        all.insert(if *times == 0 { name } else { format!("{name}-{times}") });
        *times += 1;
    }
    all
}

/// The path from the root that a link on a page means.
fn resolved(page: &Path, link: &str) -> PathBuf {
    let mut path = PathBuf::new();
    for part in page.parent().unwrap_or(Path::new("")).join(link).components() {
        match part {
            Component::ParentDir => _ = path.pop(),
            Component::Normal(name) => path.push(name),
            _ => {}
        }
    }
    path
}
