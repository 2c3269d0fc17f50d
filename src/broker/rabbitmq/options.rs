//! The settings that a publisher and a source share.

use std::time::Duration;

#[cfg(feature = "tls")]
use super::tls::Tls;
use super::topology::Topology;
use super::uri::Target;
use crate::error::SettingError;
use crate::limits::{
    BROKERS_MAX, CONFIRM_MS_DEFAULT, HEARTBEAT_S_DEFAULT, PAYLOAD_BYTES_MAX, RECONNECT_MS_DEFAULT,
    SHORT_STRING_BYTES_MAX,
};

#[derive(Debug, Clone)]
pub(super) struct Options {
    /// At least one broker.
    pub(super) targets: Vec<Target>,
    /// If set, overrides the URIs' values for all brokers.
    pub(super) heartbeat: Option<Duration>,
    pub(super) confirm_deadline: Duration,
    /// Larger bodies are not taken in.
    pub(super) body_bytes_max: u64,
    /// While unsettled deliveries take more bytes, nothing is read.
    pub(super) prefetch_bytes: u64,
    pub(super) connection_name: String,
    pub(super) backoff: (Duration, Duration),
    pub(super) required_exchanges: Vec<String>,
    pub(super) topology: Topology,
    pub(super) plaintext_allowed: bool,
    #[cfg(feature = "tls")]
    pub(super) tls: Option<Tls>,
}

impl Options {
    pub(super) fn new(urls: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, SettingError> {
        let targets: Vec<_> =
            urls.into_iter().map(|url| Target::parse(url.as_ref())).collect::<Result<_, _>>()?;
        if targets.is_empty() || targets.len() > BROKERS_MAX {
            return Err(SettingError::new(
                "url",
                format!("1 to {BROKERS_MAX} brokers, not {}", targets.len()),
            ));
        }
        let (first_ms, max_ms) = RECONNECT_MS_DEFAULT;
        Ok(Self {
            targets,
            heartbeat: None,
            confirm_deadline: Duration::from_millis(CONFIRM_MS_DEFAULT),
            // A publisher gets back only its own messages; a source sets its own bound.
            body_bytes_max: PAYLOAD_BYTES_MAX as u64,
            prefetch_bytes: u64::MAX,
            connection_name: "onewrite".to_owned(),
            backoff: (Duration::from_millis(first_ms), Duration::from_millis(max_ms)),
            required_exchanges: Vec::new(),
            topology: Topology::default(),
            plaintext_allowed: false,
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    pub(super) fn heartbeat(&self, target: &Target) -> Duration {
        let own = || Duration::from_secs(target.heartbeat_s.unwrap_or(HEARTBEAT_S_DEFAULT).into());
        self.heartbeat.unwrap_or_else(own)
    }

    /// Checks the options when the publisher or source starts, once every setting is known.
    pub(super) fn check(&self) -> Result<(), SettingError> {
        let in_plain_text = |target: &&Target| !target.tls && !target.is_loopback();
        if let Some(target) = self.targets.iter().find(in_plain_text)
            && !self.plaintext_allowed
        {
            return Err(SettingError::new(
                "url",
                format!(
                    "amqp:// would send the credentials to {} in plain text; use amqps:// (feature `tls`), or call allow_plaintext_credentials() if the way there is private",
                    target.host
                ),
            ));
        }
        #[cfg(feature = "tls")]
        if self.tls.is_some() && !self.targets.iter().any(|target| target.tls) {
            return Err(SettingError::new("tls", "it is set, and no broker's URI begins with amqps://"));
        }
        for target in &self.targets {
            let heartbeat = self.heartbeat(target);
            let whole_s = heartbeat.subsec_nanos() == 0;
            if !whole_s || heartbeat.is_zero() || heartbeat.as_secs() > u64::from(u16::MAX) {
                return Err(SettingError::new("heartbeat", "must be whole seconds, 1 to 65535"));
            }
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
                let shown: String = name.chars().take(64).collect();
                let reason = format!("the name `{}…` is longer than 255 bytes", shown.escape_debug());
                return Err(SettingError::new("topology", reason));
            }
        }
        Ok(())
    }
}
