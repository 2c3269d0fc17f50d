//! Notes on what was wrong with a message, for the consumer and for an operator.

use std::fmt;

/// The most notes that are kept. Further notes are only counted: a message may have a thousand
/// faults.
const NOTES_MAX: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Notes {
    texts: Vec<String>,
    more: usize,
    lost: bool,
}

impl Notes {
    /// Notes that something was changed into another form.
    pub(super) fn changed(&mut self, text: fmt::Arguments<'_>) {
        if self.texts.len() < NOTES_MAX {
            self.texts.push(text.to_string());
        } else {
            self.more += 1;
        }
    }

    /// Notes that something is missing, or that the message's identity changed. The note comes
    /// first, so there is always room.
    pub(super) fn lost(&mut self, text: fmt::Arguments<'_>) {
        if self.texts.len() >= NOTES_MAX {
            self.texts.pop();
            self.more += 1;
        }
        self.texts.insert(0, text.to_string());
        self.lost = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }
}

impl fmt::Display for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.texts.join("; "))?;
        if self.more > 0 {
            write!(f, "; and {} more", self.more)?;
        }
        Ok(())
    }
}
