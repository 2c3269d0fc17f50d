//! The account that an example ends with: lines that are right or wrong.

use std::fmt;
use std::time::Duration;

pub(crate) struct Account {
    from: &'static str,
    lines: Vec<Line>,
    time: Duration,
}

struct Line {
    name: String,
    value: String,
    right: bool,
}

impl Account {
    pub(crate) fn new(from: &'static str, time: Duration) -> Self {
        Self { from, lines: Vec::new(), time }
    }

    pub(crate) fn line(&mut self, name: impl Into<String>, value: String, right: bool) {
        self.lines.push(Line { name: name.into(), value, right });
    }

    /// Whether every line is right.
    pub(crate) fn is_right(&self) -> bool {
        self.lines.iter().all(|line| line.right)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nThe account, {}", self.from)?;
        for Line { name, value, right } in &self.lines {
            writeln!(f, "  {} {name:<32}{value}", if *right { '✓' } else { '✗' })?;
        }
        writeln!(f, "    {:<32}{:.1} s", "time", self.time.as_secs_f64())?;
        let verdict = if self.is_right() { "Every line is right." } else { "A LINE IS WRONG." };
        write!(f, "{verdict}")
    }
}

/// With commas between thousands.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
