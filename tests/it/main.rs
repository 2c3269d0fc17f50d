//! The integration tests: one binary, modules by theme.

mod floors;
mod relay;
