//! Text that is cheap to pass on.
//!
//! On an event's way to the broker, each text is in several places. The id is a property and a
//! header; the key is a header and is in the delivery machine. So a text from the log is kept once
//! and shared, and a constant text is not copied at all.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// UTF-8 text, used as a `&str`: static, shared by its clones, or the `String` that it was made of.
///
/// ```
/// use onewrite::Text;
/// let id = Text::from("m-1");
/// assert_eq!(id, "m-1");
/// assert_eq!(id.clone().len(), 3); // the clone shares it
/// assert_eq!(Text::from_static("1.0").as_str(), "1.0");
/// assert_eq!(String::from(id), "m-1");
/// ```
#[derive(Clone)]
pub struct Text(Kept);

#[derive(Clone)]
enum Kept {
    Static(&'static str),
    Shared(Arc<str>),
    /// A clone copies it, like a `String`.
    Owned(String),
}

impl Text {
    /// Makes a text that is part of the program.
    ///
    /// ```
    /// const VERSION: onewrite::Text = onewrite::Text::from_static("1.0");
    /// assert_eq!(VERSION, "1.0");
    /// ```
    #[must_use]
    pub const fn from_static(text: &'static str) -> Self {
        Self(Kept::Static(text))
    }

    /// Returns the text.
    ///
    /// ```
    /// assert_eq!(onewrite::Text::from("eu").as_str(), "eu");
    /// ```
    #[must_use]
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Kept::Static(text) => text,
            Kept::Shared(text) => text,
            Kept::Owned(text) => text,
        }
    }

    /// Returns the same text, copied only if it is not shared yet.
    pub(crate) fn shared(&self) -> Arc<str> {
        match &self.0 {
            Kept::Shared(text) => Arc::clone(text),
            _ => self.as_str().into(),
        }
    }
}

impl Default for Text {
    fn default() -> Self {
        Self::from_static("")
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(Kept::Shared(text.into()))
    }
}
impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(Kept::Owned(text))
    }
}
impl From<Arc<str>> for Text {
    fn from(text: Arc<str>) -> Self {
        Self(Kept::Shared(text))
    }
}
impl From<Text> for String {
    fn from(text: Text) -> Self {
        match text.0 {
            Kept::Owned(text) => text,
            _ => text.as_str().to_owned(),
        }
    }
}

impl Deref for Text {
    type Target = str;
    fn deref(&self) -> &str {
        self.as_str()
    }
}
impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}
impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

/// Formats the text as a string.
impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.as_str(), f)
    }
}

// Texts compare by content, however they are kept.
impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}
impl Eq for Text {}
impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}
impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}
impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}
impl PartialOrd for Text {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Text {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_str().cmp(other.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn it_is_the_same_text_however_it_is_kept() {
        let all = [Text::from_static("eu"), Text::from("eu"), Text::from("eu".to_owned())];
        assert!(all.iter().all(|text| *text == all[0] && *text == "eu" && text.cmp(&all[0]).is_eq()));
        assert_eq!(all.iter().cloned().collect::<HashSet<_>>().len(), 1);
        assert!(all.iter().all(|text| HashSet::from([text.clone()]).contains("eu")));
        assert!(all.iter().all(|text| format!("{text} {text:?}") == "eu \"eu\"" && &*text.shared() == "eu"));
        assert_eq!(Text::default(), "");
    }
}
