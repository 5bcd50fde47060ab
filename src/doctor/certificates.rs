//! Server certificates: recorded while the real verifier checks them, and described in one line.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate, X509Name},
};

use crate::{
    config::Roots,
    net::tls::{self, TlsError},
};

/// Names of a certificate that are shown.
const MAX_NAMES: usize = 5;

/// Verifies with the proxy's own verifier, so that `doctor` accepts what the proxy accepts, and records the chain.
#[derive(Debug)]
pub(super) struct Recorder {
    inner: Arc<dyn ServerCertVerifier>,
    shown: Mutex<Vec<CertificateDer<'static>>>,
}

impl Recorder {
    /// A client configuration, and the recorder of its last handshake.
    pub(super) fn client_config(
        roots: &Roots,
        alpn: &[u8],
    ) -> Result<(Arc<ClientConfig>, Arc<Self>), TlsError> {
        let recorder = Arc::new(Self {
            inner: tls::verifier(roots)?,
            shown: Mutex::default(),
        });
        let config = tls::client_config_with(Arc::clone(&recorder) as _, alpn)?;
        Ok((config, recorder))
    }

    /// The certificate that the server sent, also if it was refused; `None` if it cannot be parsed.
    pub(super) fn certificate(&self) -> Option<Certificate> {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        Certificate::parse(shown.first()?, shown.last()?)
    }
}

impl ServerCertVerifier for Recorder {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = std::iter::once(end_entity)
            .chain(intermediates)
            .map(|certificate| certificate.clone().into_owned())
            .collect();
        // Before the check, since a refused chain is what a diagnosis needs.
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = chain;
        self.inner
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// The parts of a server's certificate that help in diagnosis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Certificate {
    subject: String,
    issuer: String,
    /// The issuer of the last certificate in the chain.
    pub(super) authority: String,
    pub(super) names: Vec<String>,
    pub(super) expires_at: Timestamp,
}

impl Certificate {
    pub(super) fn parse(leaf: &CertificateDer<'_>, last: &CertificateDer<'_>) -> Option<Self> {
        let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
        let (_, last) = X509Certificate::from_der(last).ok()?;
        let names = leaf.subject_alternative_name().ok().flatten();
        let names = names.iter().flat_map(|it| &it.value.general_names);
        let names = names.filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(clean(name)),
            _ => None,
        });
        Some(Self {
            subject: name(leaf.subject()),
            issuer: name(leaf.issuer()),
            // The root to trust, which a server may leave out of its chain (RFC 8446 section 4.4.2).
            authority: name(last.issuer()),
            names: names.take(MAX_NAMES).collect(),
            expires_at: Timestamp::from_second(leaf.validity().not_after.timestamp()).ok()?,
        })
    }

    /// Whether it is for this host.
    pub(super) fn is_for(&self, host: &str) -> bool {
        let zone = host.split_once('.').map(|(_, zone)| zone);
        self.names.iter().any(|name| {
            // A wildcard stands for exactly one label (RFC 9525 section 6.3).
            let wildcard = name.strip_prefix("*.");
            name.eq_ignore_ascii_case(host) || wildcard.is_some_and(|it| Some(it) == zone)
        })
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` issued by `{}`", self.subject, self.issuer)?;
        if self.authority != self.issuer {
            write!(f, " under `{}`", self.authority)?;
        }
        if !self.names.is_empty() {
            write!(f, ", for {}", self.names.join(", "))?;
        }
        let date = self.expires_at.strftime("%Y-%m-%d");
        write!(f, ", valid until {date}")
    }
}

/// The common name, else the whole name.
fn name(name: &X509Name<'_>) -> String {
    let common = name.iter_common_name().next();
    match common.and_then(|attribute| attribute.as_str().ok()) {
        Some(common) => clean(common),
        None => clean(&name.to_string()),
    }
}

/// One line of bounded length.
fn clean(text: &str) -> String {
    // The server chooses these texts, which are printed to a terminal.
    text.chars()
        .filter(|character| !character.is_control())
        .take(100)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_described_in_one_line() {
        let mut parameters =
            rcgen::CertificateParams::new(vec!["a.example".to_owned(), "b.example".to_owned()])
                .unwrap();
        parameters.not_after = rcgen::date_time_ymd(2033, 5, 18);
        parameters
            .distinguished_name
            .push(rcgen::DnType::CommonName, "the\nedge");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let parsed = Certificate::parse(certificate.der(), certificate.der()).unwrap();
        assert_eq!(
            parsed.to_string(),
            "`theedge` issued by `theedge`, for a.example, b.example, valid until 2033-05-18"
        );
        assert_eq!(
            Certificate::parse(&CertificateDer::from(&b"no"[..]), certificate.der()),
            None
        );
    }
}
