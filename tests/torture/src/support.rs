//! The tests' own private node, and their plain AMQP client.

#[path = "../../it/support/rabbit.rs"]
pub(crate) mod rabbit;
#[path = "../../it/support/tap.rs"]
pub(crate) mod tap;
