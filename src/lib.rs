//! x
#![allow(missing_docs, dead_code, unused)]
pub mod error;
pub mod limits;
pub mod message;
pub mod publish;
pub mod time;
mod relay {
    pub(crate) mod machine { pub(crate) mod types; }
}
pub use error::*;
pub use message::*;
