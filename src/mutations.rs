//! Mistakes that can be switched on, one at a time, in a build with `--cfg onewrite_mutations`: each breaks a promise, and
//! `scripts/torture --mutations` demands that the torture test notices. No other build holds a trace of this.

use std::sync::OnceLock;

/// Names the mistake, in the environment.
const VARIABLE: &str = "ONEWRITE_MUTATION";

/// Whether this mistake is switched on.
pub(crate) fn mutated(name: &str) -> bool {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok()).as_deref() == Some(name)
}
