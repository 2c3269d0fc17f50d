//! What the judge says.

use std::fmt;

use crate::formats::Run;

/// Sentences that are kept; violations beyond are only counted.
const SENTENCES_MAX: usize = 200;

/// How a promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// An event, or a row, that was committed is not where it must have come to.
    Lost,
    /// Something is there that nobody has committed, or other than it was meant.
    Phantom,
    /// Order was not kept.
    Disordered,
    /// An effect is there more than once.
    AppliedTwice,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost",
            Self::Phantom => "phantom",
            Self::Disordered => "disordered",
            Self::AppliedTwice => "applied twice",
        })
    }
}

/// Counts, and sentences that name events.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    pub events: u64,
    pub repeats: u64,
    pub lost: u64,
    pub phantom: u64,
    pub disordered: u64,
    pub applied_twice: u64,
    pub sentences: Vec<String>,
}

impl Verdict {
    pub(crate) fn says(&mut self, violation: Violation, sentence: impl fmt::Display) {
        *match violation {
            Violation::Lost => &mut self.lost,
            Violation::Phantom => &mut self.phantom,
            Violation::Disordered => &mut self.disordered,
            Violation::AppliedTwice => &mut self.applied_twice,
        } += 1;
        if self.sentences.len() < SENTENCES_MAX {
            self.sentences.push(format!("{violation}: {sentence}"));
        }
    }

    /// Whether no promise was broken.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.lost + self.phantom + self.disordered + self.applied_twice == 0
    }

    /// How often it was broken in this way.
    #[must_use]
    pub fn count(&self, violation: Violation) -> u64 {
        match violation {
            Violation::Lost => self.lost,
            Violation::Phantom => self.phantom,
            Violation::Disordered => self.disordered,
            Violation::AppliedTwice => self.applied_twice,
        }
    }

    /// The last line of a run.
    #[must_use]
    pub fn last_line(&self, run: &Run) -> String {
        let Self { events, repeats, lost, phantom, disordered, applied_twice, .. } = self;
        let Run { app_kills, broker_kills, faults, .. } = run;
        format!(
            "{{\"events\":{events},\"app_kills\":{app_kills},\"broker_kills\":{broker_kills},\"faults\":{faults},\
             \"repeats\":{repeats},\"lost\":{lost},\"phantom\":{phantom},\"disordered\":{disordered},\
             \"applied_twice\":{applied_twice}}}"
        )
    }
}
