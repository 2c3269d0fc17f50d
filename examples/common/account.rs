//! The account at the end: line by line, each right or not.

use std::fmt;

/// Lines of an account, in order.
#[derive(Debug)]
pub(crate) struct Account {
    title: &'static str,
    lines: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    name: &'static str,
    value: String,
    right: bool,
}

impl Account {
    pub(crate) fn new(title: &'static str) -> Self {
        Self { title, lines: Vec::new() }
    }

    pub(crate) fn line(&mut self, name: &'static str, value: impl fmt::Display, right: bool) {
        self.lines.push(Line { name, value: value.to_string(), right });
    }

    /// Whether every line is right.
    pub(crate) fn is_right(&self) -> bool {
        self.lines.iter().all(|line| line.right)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}", self.title)?;
        for Line { name, value, right } in &self.lines {
            writeln!(f, "  {} {name:<38}{value}", if *right { '✓' } else { '✗' })?;
        }
        let verdict = if self.is_right() { "Every line is right." } else { "A LINE IS WRONG." };
        write!(f, "{verdict}")
    }
}
