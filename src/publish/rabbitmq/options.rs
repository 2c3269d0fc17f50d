//! The settings that a publisher and a source share.

use std::time::Duration;

use crate::error::SettingError;
use crate::limits::{CONFIRM_MS_DEFAULT, HEARTBEAT_S_DEFAULT, RECONNECT_MS_DEFAULT, SHORT_STRING_BYTES_MAX};

use super::topology::Topology;
use super::uri::Target;

#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) target: Target,
    pub(super) heartbeat: Duration,
    pub(super) confirm_deadline: Duration,
    pub(super) connection_name: String,
    pub(super) backoff: (Duration, Duration),
    pub(super) required_exchanges: Vec<String>,
    pub(super) topology: Topology,
    pub(super) plaintext_allowed: bool,
}

impl Options {
    pub(super) fn new(url: &str) -> Result<Self, SettingError> {
        let target = Target::parse(url)?;
        let heartbeat = Duration::from_secs(target.heartbeat_s.unwrap_or(HEARTBEAT_S_DEFAULT).into());
        let (first_ms, max_ms) = RECONNECT_MS_DEFAULT;
        Ok(Self {
            target,
            heartbeat,
            confirm_deadline: Duration::from_millis(CONFIRM_MS_DEFAULT),
            connection_name: "onewrite".to_owned(),
            backoff: (Duration::from_millis(first_ms), Duration::from_millis(max_ms)),
            required_exchanges: Vec::new(),
            topology: Topology::default(),
            plaintext_allowed: false,
        })
    }

    /// Checked when the publisher or source starts, once every setting is known.
    pub(super) fn check(&self) -> Result<(), SettingError> {
        if !self.target.tls && !self.target.is_loopback() && !self.plaintext_allowed {
            return Err(SettingError::new(
                "url",
                format!(
                    "amqp:// would send the credentials to {} in plain text; use amqps:// (feature `tls`), or call allow_plaintext_credentials() if the way there is private",
                    self.target.host
                ),
            ));
        }
        let heartbeat_s = self.heartbeat.as_secs();
        if self.heartbeat.subsec_nanos() != 0 || heartbeat_s == 0 || heartbeat_s > u64::from(u16::MAX) {
            return Err(SettingError::new("heartbeat", "must be whole seconds, 1 to 65535"));
        }
        if self.confirm_deadline < Duration::from_millis(1) {
            return Err(SettingError::new("confirm_deadline", "must be at least a millisecond"));
        }
        let (first, max) = self.backoff;
        if first < Duration::from_millis(1) || first > max {
            return Err(SettingError::new("reconnect_backoff", "the first wait must be 1 ms to the longest"));
        }
        for name in self.required_exchanges.iter().chain(self.topology.names()) {
            if name.len() > SHORT_STRING_BYTES_MAX {
                return Err(SettingError::new("topology", "a name is longer than 255 bytes"));
            }
        }
        Ok(())
    }
}
