//! The integration tests: one binary, modules by theme.

mod consumer;
mod floors;
mod relay;
