//! What was wrong with a message, for the consumer and for a person.

use std::fmt;

/// Notes beyond this many are counted only: a sender may have put a thousand faults into one message.
const NOTES_MAX: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Notes {
    texts: Vec<String>,
    more: usize,
    lost: bool,
}

impl Notes {
    /// Something is given in another form.
    pub(super) fn changed(&mut self, text: fmt::Arguments<'_>) {
        if self.texts.len() < NOTES_MAX {
            self.texts.push(text.to_string());
        } else {
            self.more += 1;
        }
    }

    /// Something is missing, or what the message is known by is not what it was. It stands first: there is always room.
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
