//! Foreign text, made safe to show: reasons, ids and names that came over the network.
//!
//! **Invariant.** The printed text moves no cursor, begins no line, and never changes the order of
//! its letters. So a message cannot forge a log line or control a terminal.

use std::borrow::Cow;
use std::fmt::{self, Write};

/// A text whose unprintable characters are escaped, such as `\u{1b}`.
pub(crate) struct Printable<'a>(&'a str);

/// Wraps a foreign text for printing.
pub(crate) fn printable(text: &str) -> Printable<'_> {
    Printable(text)
}

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some((at, odd)) = rest.char_indices().find(|(_, char)| !is_plain(*char)) {
            let (plain, behind) = rest.split_at(at);
            f.write_str(plain)?;
            odd.escape_unicode().try_for_each(|char| f.write_char(char))?;
            rest = behind.get(odd.len_utf8()..).unwrap_or_default();
        }
        f.write_str(rest)
    }
}

/// Returns the escaped text as a string.
pub(crate) fn escaped(text: String) -> String {
    if text.chars().all(is_plain) { text } else { printable(&text).to_string() }
}

/// Returns the escaped text, borrowed if nothing needs escaping.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) { Cow::Borrowed(text) } else { Cow::Owned(printable(text).to_string()) }
}

/// Whether a character is harmless: no control character, no line end, no change of writing
/// direction.
fn is_plain(char: char) -> bool {
    let breaks = matches!(char, '\u{2028}' | '\u{2029}');
    let redirects = matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !char.is_control() && !breaks && !redirects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_for_the_eye_is_escaped() {
        for (text, shown) in [
            ("", ""),
            ("no such account: ünïcödé 💶 \\n \"q\"", "no such account: ünïcödé 💶 \\n \"q\""),
            ("a\nERROR forged", "a\\u{a}ERROR forged"),
            ("\u{1b}[31mred\u{1b}[0m", "\\u{1b}[31mred\\u{1b}[0m"),
            ("\u{9b}2J", "\\u{9b}2J"),
            ("tab\tnul\0del\u{7f}", "tab\\u{9}nul\\u{0}del\\u{7f}"),
            ("x\u{202e}cod.exe\u{2028}y", "x\\u{202e}cod.exe\\u{2028}y"),
        ] {
            assert_eq!(printable(text).to_string(), shown);
            assert_eq!(plain(text), shown);
            assert_eq!(escaped(text.to_owned()), shown);
            // Escaping is idempotent.
            assert_eq!(escaped(shown.to_owned()), shown);
        }
    }
}
