//! What the tests share.

#[cfg(feature = "tls")]
pub(crate) mod certs;
#[cfg(feature = "rabbitmq")]
pub(crate) mod fake_broker;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
pub(crate) mod netns;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
pub(crate) mod proxy;
#[cfg(feature = "rabbitmq")]
pub(crate) mod rabbit;
#[cfg(feature = "rabbitmq")]
pub(crate) mod raw_amqp;
#[cfg(feature = "rabbitmq")]
pub(crate) mod rig;
#[cfg(feature = "rabbitmq")]
pub(crate) mod scripted_broker;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
pub(crate) mod small_disk;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
pub(crate) mod standstill;
#[cfg(feature = "rabbitmq")]
pub(crate) mod tap;
/// The library's own file: tests go by its steps and paces, which are no part of its interface.
#[allow(dead_code, reason = "tests need some of it")]
#[path = "../../../src/tuning.rs"]
pub(crate) mod tuning;
