//! x
pub(crate) mod machine;
