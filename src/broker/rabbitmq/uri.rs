//! The address of a broker, and the credentials for it.
//!
//! **Invariants.** A password is in [`Credentials`] and nowhere else. No `Debug`, no `Display` and
//! no error text shows a password, and the URI that lapin gets holds none. lapin never sees the
//! text, because [`uri_text`] takes it apart. So lapin cannot read the text differently from this
//! library.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use lapin::auth::AuthProvider;
use lapin::types::{LongString, ShortString};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use zeroize::Zeroizing;

use crate::error::SettingError;
use crate::limits::{CONNECT_MS_MAX, FRAME_BYTES_MAX, SHORT_STRING_BYTES_MAX};
use crate::message::{Fault, FaultClass};

use super::uri_text::{self, Parts};

/// User and password. Shows neither.
#[derive(Clone)]
pub(super) struct Credentials {
    user: String,
    /// The memory is wiped when it is freed. The copy that lapin makes for a handshake belongs to
    /// lapin.
    password: Zeroizing<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// SASL PLAIN. lapin asks for it at each handshake.
impl AuthProvider for Credentials {
    fn mechanism(&self) -> ShortString {
        SASLMechanism::Plain.name().into()
    }

    fn auth_starter(&self) -> Result<LongString, String> {
        Ok(format!("\0{}\0{}", self.user, *self.password).into())
    }
}

/// A broker's address, its virtual host, and the credentials.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) vhost: String,
    pub(super) tls: bool,
    pub(super) credentials: Credentials,
    /// The `heartbeat` query parameter, the only parameter that is understood.
    pub(super) heartbeat_s: Option<u16>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("vhost", &self.vhost)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

/// Shows `host:port/vhost`, for logs and error texts.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{} vhost {:?}", self.host, self.port, self.vhost)
        } else {
            write!(f, "{}:{} vhost {:?}", self.host, self.port, self.vhost)
        }
    }
}

impl Target {
    /// Parses `amqp://user:password@host:port/vhost`. The error's text holds nothing of `url`.
    pub(super) fn parse(url: &str) -> Result<Self, SettingError> {
        let Parts { tls, user, password, host, port, vhost, heartbeat_s } = uri_text::parse(url)?;
        if tls && !cfg!(feature = "tls") {
            return Err(SettingError::new(
                "url",
                "amqps:// needs the cargo feature `tls` of onewrite; without it the connection would be plain text",
            ));
        }
        if vhost.len() > SHORT_STRING_BYTES_MAX {
            return Err(SettingError::new("url", "the virtual host is longer than 255 bytes"));
        }
        Ok(Self { host, port, vhost, tls, credentials: Credentials { user, password }, heartbeat_s })
    }

    /// Adds the broker's name to a fault, unless the fault has the name already or is about what
    /// was published.
    pub(super) fn naming(&self, mut fault: Fault) -> Fault {
        let name = self.to_string();
        if matches!(fault.class, FaultClass::Outage | FaultClass::Config) && !fault.text.contains(&name) {
            fault.text = format!("{name}: {}", fault.text);
        }
        fault
    }

    /// Whether the host is this machine, so that no machine between can read the traffic.
    pub(super) fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost")
            || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// The URI that lapin gets: everything but the credentials.
    pub(super) fn to_lapin(&self, heartbeat: Duration) -> AMQPUri {
        let heartbeat_s = u16::try_from(heartbeat.as_secs()).unwrap_or(u16::MAX).max(1);
        AMQPUri {
            scheme: if self.tls { AMQPScheme::AMQPS } else { AMQPScheme::AMQP },
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo { username: String::new(), password: String::new() },
                host: self.host.clone(),
                port: self.port,
            },
            vhost: self.vhost.clone(),
            query: AMQPQueryString {
                frame_max: Some(FRAME_BYTES_MAX),
                channel_max: None,
                heartbeat: Some(heartbeat_s),
                connection_timeout: Some(CONNECT_MS_MAX),
                auth_mechanism: Some(SASLMechanism::Plain),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_kept_as_written() {
        for (url, host, port) in [
            ("amqp://127.0.0.1:5673", "127.0.0.1", 5673),
            ("amqp://u:p@[::1]:5674/%2f", "::1", 5674),
            ("amqp://u:p@[2001:db8::7]/v", "2001:db8::7", 5672),
            ("amqp://10.1.2.3", "10.1.2.3", 5672),
            ("amqp://broker.example/%2f", "broker.example", 5672),
        ] {
            let target = Target::parse(url).unwrap();
            assert_eq!((target.host.as_str(), target.port), (host, port), "{url}");
            assert_eq!(target.to_lapin(Duration::from_secs(10)).authority.host, host);
        }
        assert!(Target::parse("amqp://[::1]").unwrap().is_loopback());
        assert!(Target::parse("amqp://127.8.9.1").unwrap().is_loopback());
        assert!(!Target::parse("amqp://10.1.2.3").unwrap().is_loopback());
        assert!(!Target::parse("amqp://[2001:db8::7]").unwrap().is_loopback());
        assert_eq!(Target::parse("amqp://localhost").unwrap().vhost, "/");
        assert_eq!(Target::parse("amqp://localhost/a%2fb").unwrap().vhost, "a/b");
    }

    /// Goal: no error text shows the password, for any mistake in the URI. Method: the same canary
    /// in many bad URIs.
    #[test]
    fn no_error_shows_the_password() {
        let canary = "s3cr3tCANARY";
        for url in [
            format!("amqp://user:{canary}@host:notaport/%2f"),
            format!("amqp:user:{canary}@host"),
            format!("http://user:{canary}@host"),
            format!("amqp://user:{canary}@host?frame_max=1&x={canary}"),
            format!("amqp://user:12?{canary}@host"),
            format!("amqp://user:12#{canary}@host"),
            format!("amqp://user:{canary}%00@host"),
            format!("amqp://user:{canary}@[{canary}]:1"),
            format!("amqp://user:{canary}@host/{}", "v".repeat(256)),
            format!("amqp://user:{canary}@host?heartbeat=0"),
            format!("amqp://user:{canary}@host?heartbeat=99999"),
        ] {
            let error = Target::parse(&url).expect_err(&url);
            assert!(!format!("{error} {error:?}").contains(canary), "{error}");
        }
        let target = Target::parse(&format!("amqp://user:{canary}@localhost")).unwrap();
        let shown =
            format!("{target} {target:?} {:?} {:?}", target.credentials, target.to_lapin(Duration::ZERO));
        assert!(!shown.contains(canary) && !shown.contains("user:"), "{shown}");
        assert_eq!(target.credentials.auth_starter().unwrap().as_bytes(), b"\0user\0s3cr3tCANARY");
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_is_refused_where_it_is_not_compiled_in() {
        let error = Target::parse("amqps://localhost").unwrap_err();
        assert!(error.to_string().contains("feature `tls`"), "{error}");
    }
}
