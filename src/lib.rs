//! x
#![allow(missing_docs)]
pub mod codec;
mod consumer;
mod error;
mod event;
pub mod limits;
mod log;
mod message;
mod oneshot;
pub mod publish;
mod relay;
mod store;
pub mod time;
mod wire;
pub use error::*;
pub use event::*;
pub use message::*;
pub use redb;
pub use store::*;
