//! [`Tls`]: the trusted authorities, and the client certificate.
//!
//! **Invariants.**
//! - The peer's certificate and its name are always verified: no setting skips the verification.
//! - A private key is only in `Pem` and in what rustls makes of it. No `Debug` and no error text
//!   shows anything of a file's content.
//! - The crypto provider is named, so that no other crate of the process chooses it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, version};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::SettingError;
use crate::message::{Fault, FaultClass};

use super::refusal::is_refusal;
use super::uri::Target;

const CA: &str = "tls ca";
const CHAIN: &str = "tls client certificate";
const KEY: &str = "tls client key";

/// How `amqps://` connections are secured: TLS 1.2 or 1.3, the broker's certificate and its name
/// always verified.
///
/// By default the operating system's certificate authorities are trusted, and the name in the
/// certificate must be the host of the URI. There is no way to skip the verification.
///
/// PEM is given as bytes or as files. A setting reads its file at once, so that a mistake is
/// reported at once. Files are read **again at each connection attempt**: certificates that are
/// renewed in place need no restart. If a file cannot be used then, a fault of class
/// [`Config`](FaultClass::Config) names the file. No error shows anything of the content.
///
/// ```no_run
/// use onewrite::broker::{RabbitMq, Tls};
/// let tls = Tls::new()
///     .ca_file("/etc/ledger/ca.pem")?                                                // trust this one, and no other
///     .client_certificate_files("/etc/ledger/cert.pem", "/etc/ledger/key.pem")?;     // if the broker asks who we are
/// let publisher = RabbitMq::new("amqps://app:secret@rabbit.internal")?.tls(tls);
/// # let _ = publisher;
/// # Ok::<(), onewrite::SettingError>(())
/// ```
#[derive(Clone, Default)]
pub struct Tls {
    /// Empty means the operating system's authorities.
    authorities: Vec<Pem>,
    /// Certificate chain and key.
    identity: Option<(Pem, Pem)>,
    server_name: Option<ServerName<'static>>,
}

impl Tls {
    /// Returns settings with the operating system's authorities and no client certificate.
    ///
    /// ```
    /// use onewrite::broker::Tls;
    /// assert!(format!("{:?}", Tls::new()).contains("system"));
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the certificate authorities in this PEM instead of the operating system's.
    ///
    /// After several calls all given authorities are trusted. This helps while one authority
    /// replaces another.
    ///
    /// # Errors
    /// The PEM holds no certificate, or a certificate that cannot be read.
    ///
    /// ```
    /// use onewrite::broker::Tls;
    /// let error = Tls::new().ca_pem("no certificate").unwrap_err();
    /// assert_eq!(error.setting, "tls ca");
    /// ```
    pub fn ca_pem(self, pem: impl Into<Vec<u8>>) -> Result<Self, SettingError> {
        self.ca(Pem::Given(pem.into().into()))
    }

    /// Trusts authorities as [`ca_pem`](Self::ca_pem) does, from a file that is read again at each
    /// connection attempt.
    ///
    /// # Errors
    /// The file cannot be read, or as for [`ca_pem`](Self::ca_pem).
    ///
    /// ```
    /// use onewrite::broker::Tls;
    /// let error = Tls::new().ca_file("/nowhere/ca.pem").unwrap_err();
    /// assert!(error.to_string().contains("/nowhere/ca.pem"));
    /// ```
    pub fn ca_file(self, path: impl Into<PathBuf>) -> Result<Self, SettingError> {
        self.ca(Pem::File(path.into()))
    }

    fn ca(mut self, pem: Pem) -> Result<Self, SettingError> {
        self.authorities.push(pem);
        self.roots()?;
        Ok(self)
    }

    /// Shows the broker this certificate when the broker asks for one.
    ///
    /// `chain` is the certificate and the certificates that lead to its authority. `key` is its
    /// private key, not encrypted: PKCS #8, PKCS #1 or SEC 1.
    ///
    /// # Errors
    /// The chain or the key cannot be read, or the key does not belong to the certificate.
    ///
    /// ```
    /// use onewrite::broker::Tls;
    /// let error = Tls::new().client_certificate_pem("no chain", "no key").unwrap_err();
    /// assert_eq!(error.setting, "tls client certificate");
    /// ```
    pub fn client_certificate_pem(
        self,
        chain: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
    ) -> Result<Self, SettingError> {
        self.identity(Pem::Given(chain.into().into()), Pem::Given(key.into().into()))
    }

    /// Shows a certificate as [`client_certificate_pem`](Self::client_certificate_pem) does, from
    /// files that are read again at each connection attempt.
    ///
    /// # Errors
    /// A file cannot be read, or as for [`client_certificate_pem`](Self::client_certificate_pem).
    ///
    /// ```
    /// use onewrite::broker::Tls;
    /// let error = Tls::new().client_certificate_files("/nowhere/cert.pem", "/nowhere/key.pem").unwrap_err();
    /// assert!(error.to_string().contains("/nowhere/cert.pem"));
    /// ```
    pub fn client_certificate_files(
        self,
        chain: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Result<Self, SettingError> {
        self.identity(Pem::File(chain.into()), Pem::File(key.into()))
    }

    fn identity(mut self, chain: Pem, key: Pem) -> Result<Self, SettingError> {
        self.identity = Some((chain, key));
        self.config_with(RootCertStore::empty())?;
        Ok(self)
    }

    /// The name that the broker's certificate must carry, if that is not the host of the URI.
    ///
    /// Examples are a tunnel, a load balancer, or one certificate for all nodes of a cluster. The
    /// TLS client asks for the name (SNI) and verifies it.
    ///
    /// # Errors
    /// The name is neither a DNS name nor an IP address.
    ///
    /// ```
    /// use onewrite::broker::Tls;
    /// assert!(Tls::new().server_name("rabbit.internal").is_ok());
    /// assert!(Tls::new().server_name("no name").is_err());
    /// ```
    pub fn server_name(mut self, name: impl Into<String>) -> Result<Self, SettingError> {
        let refused = |_| SettingError::new("tls server name", "it is neither a DNS name nor an IP address");
        self.server_name = Some(ServerName::try_from(name.into()).map_err(refused)?);
        Ok(self)
    }

    /// Does the handshake. The files are read on another thread.
    pub(super) async fn secure(
        &self,
        stream: TcpStream,
        target: &Target,
    ) -> Result<TlsStream<TcpStream>, Fault> {
        let config_fault = |error: SettingError| Fault::new(FaultClass::Config, error.to_string());
        let settings = self.clone();
        let config = tokio::task::spawn_blocking(move || settings.config_with(settings.roots()?))
            .await
            .map_err(|_| Fault::new(FaultClass::Outage, "the reading of the TLS settings did not end"))?
            .map_err(config_fault)?;
        let name = match &self.server_name {
            Some(name) => name.clone(),
            None => ServerName::try_from(target.host.clone()).map_err(|_| {
                Fault::new(FaultClass::Config, format!("{target}: no certificate can carry this name"))
            })?,
        };
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| handshake_fault(&error, target))
    }

    fn config_with(&self, roots: RootCertStore) -> Result<ClientConfig, SettingError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])
            .map_err(|error| SettingError::new("tls", error.to_string()))?
            .with_root_certificates(roots);
        let Some((chain, key)) = &self.identity else { return Ok(config.with_no_client_auth()) };
        let (certificates, private) = (chain.certificates(CHAIN)?, key.private_key()?);
        config.with_client_auth_cert(certificates, private).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => key.refuse(KEY, "is not the key of the certificate"),
            rustls::Error::InvalidCertificate(_) => chain.refuse(CHAIN, "begins with no X.509 certificate"),
            _ => key.refuse(KEY, "is not of a kind that is understood: RSA, ECDSA or Ed25519"),
        })
    }

    fn roots(&self) -> Result<RootCertStore, SettingError> {
        let mut roots = RootCertStore::empty();
        for pem in &self.authorities {
            for certificate in pem.certificates(CA)? {
                roots.add(certificate).map_err(|_| pem.refuse(CA, "holds what is no X.509 certificate"))?;
            }
        }
        if self.authorities.is_empty() {
            // Certificates that cannot be read do no harm: they are not trusted.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(SettingError::new(
                    CA,
                    "the operating system has no certificate authorities; name one with ca_pem or ca_file",
                ));
            }
        }
        Ok(roots)
    }
}

/// Shows where the settings come from, and nothing of their content.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Tls");
        if self.authorities.is_empty() {
            shown.field("ca", &"system");
        } else {
            shown.field("ca", &self.authorities);
        }
        shown.field("client_certificate", &self.identity).field("server_name", &self.server_name).finish()
    }
}

/// PEM, or the path of its file.
#[derive(Clone)]
enum Pem {
    Given(Arc<[u8]>),
    File(PathBuf),
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl Pem {
    fn name(&self) -> String {
        match self {
            Self::Given(_) => "the PEM".to_owned(),
            Self::File(path) => path.display().to_string(),
        }
    }

    fn refuse(&self, setting: &'static str, reason: &str) -> SettingError {
        SettingError::new(setting, format!("{} {reason}", self.name()))
    }

    fn bytes(&self, setting: &'static str) -> Result<Arc<[u8]>, SettingError> {
        match self {
            Self::Given(bytes) => Ok(Arc::clone(bytes)),
            Self::File(path) => read(path)
                .map(Arc::from)
                .map_err(|error| self.refuse(setting, &format!("cannot be read: {error}"))),
        }
    }

    fn certificates(&self, setting: &'static str) -> Result<Vec<CertificateDer<'static>>, SettingError> {
        // The errors of the PEM reader quote lines.
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&self.bytes(setting)?)
            .collect::<Result<_, _>>()
            .map_err(|_| self.refuse(setting, "is damaged PEM"))?;
        if certificates.is_empty() {
            return Err(self.refuse(setting, "holds no certificate in PEM"));
        }
        Ok(certificates)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, SettingError> {
        PrivateKeyDer::from_pem_slice(&self.bytes(KEY)?)
            .map_err(|_| self.refuse(KEY, "holds no private key in PEM, or an encrypted one"))
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(PEM_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Far above any bundle of authorities: a path to an endless file must not fill the memory.
const PEM_BYTES_MAX: u64 = 16 << 20;

fn handshake_fault(error: &io::Error, target: &Target) -> Fault {
    let class = if is_refusal(error) { FaultClass::Config } else { FaultClass::Outage };
    Fault::new(class, format!("TLS with {target}: {error}"))
}
