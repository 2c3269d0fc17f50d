//! Errors of a stream that waiting does not heal: the two sides disagree on protocol or identity.

use std::borrow::Cow;
use std::io;

/// An error about a peer that waiting does not heal, wrapped in an I/O error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) Cow<'static, str>);

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        Self::new(io::ErrorKind::InvalidData, refusal)
    }
}

/// Whether a stream's error is about the two sides and not the network: the peer speaks another
/// protocol, or refuses the client certificate (with TLS 1.3 after the handshake).
pub(super) fn is_refusal(error: &io::Error) -> bool {
    let Some(inner) = error.get_ref() else { return false };
    #[cfg(feature = "tls")]
    if let Some(error) = inner.downcast_ref::<rustls::Error>() {
        return is_tls_refusal(error);
    }
    inner.is::<Refusal>()
}

/// Whether the error is about the identity or the protocol of the two sides: waiting does not heal
/// such an error.
#[cfg(feature = "tls")]
fn is_tls_refusal(error: &rustls::Error) -> bool {
    use rustls::AlertDescription as Alert;
    match error {
        // Alerts of a broker that is ending, or whose record was damaged on the way.
        rustls::Error::AlertReceived(
            Alert::CloseNotify
            | Alert::InternalError
            | Alert::UserCanceled
            | Alert::BadRecordMac
            | Alert::DecryptError
            | Alert::RecordOverflow
            | Alert::UnexpectedMessage,
        )
        | rustls::Error::DecryptError
        | rustls::Error::PeerSentOversizedRecord
        | rustls::Error::FailedToGetCurrentTime
        | rustls::Error::FailedToGetRandomBytes => false,
        // Unknown authority, wrong name, expired, plain text, too old a protocol, a missing or
        // wrong client certificate.
        _ => true,
    }
}
