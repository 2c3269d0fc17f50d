//! Deliberate mistakes, switched on one at a time in a build with `--cfg onewrite_mutations`. Each
//! mistake breaks a promise, and `scripts/torture --mutations` demands that the torture test
//! notices. No other build contains any of this.

use std::sync::OnceLock;

/// The environment variable that names the mistake.
const VARIABLE: &str = "ONEWRITE_MUTATION";

/// Whether this mistake is switched on.
pub(crate) fn mutated(name: &str) -> bool {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok()).as_deref() == Some(name)
}
