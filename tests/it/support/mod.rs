//! What the tests share.

#[cfg(feature = "rabbitmq")]
pub(crate) mod rabbit;
#[cfg(feature = "rabbitmq")]
pub(crate) mod tap;
