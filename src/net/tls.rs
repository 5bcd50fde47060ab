//! TLS towards the endpoint and the workspace: always verified, TLS 1.2 or newer, one crypto provider named explicitly.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ::aws_lc_rs::digest;
use rustls::{
    ClientConfig, RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{
        CertificateDer,
        pem::{self, PemObject},
    },
};
use rustls_platform_verifier::Verifier;

use super::file;
use crate::config::Roots;

/// Longest file of certificates or keys that is read, in bytes; the roots of a whole system take a quarter of a million.
pub(crate) const MAX_PEM: u64 = 4 * 1024 * 1024;
/// ALPN of the Postgres protocol; an edge that knows no ALPN ignores it, as it does for libpq 17.
pub const ALPN_POSTGRESQL: &[u8] = b"postgresql";
/// ALPN of HTTP/1.1.
pub const ALPN_HTTP_1_1: &[u8] = b"http/1.1";

/// What a file of roots held when it was last looked at.
pub type Fingerprint = [u8; 32];

/// Digest of the file's content; `None` for the system's roots and for a file that cannot be read. Blocks.
pub(crate) fn fingerprint(roots: &Roots) -> Option<Fingerprint> {
    let Roots::File(path) = roots else {
        return None;
    };
    let bytes = file::read(path, MAX_PEM).ok()?;
    let digest = digest::digest(&digest::SHA256, &bytes);
    digest.as_ref().try_into().ok()
}

/// Why no TLS configuration could be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of roots cannot be read or holds no certificate.
    #[error("cannot read certificates from `{}`", path.display())]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// A root that cannot be one, or no usable system roots.
    #[error("the trusted root certificates cannot be used")]
    Unusable(#[source] rustls::Error),
}

/// The crypto provider of the whole process.
pub fn provider() -> Arc<CryptoProvider> {
    // Not rustls's process default, which depends on the features that all crates together enable.
    Arc::new(aws_lc_rs::default_provider())
}

/// A configuration that verifies chain and name against `roots` and offers `alpn`.
pub fn client_config(roots: &Roots, alpn: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
    client_config_with(verifier(roots)?, alpn)
}

/// The same with a verifier that does at least what [`verifier`]'s does.
pub(crate) fn client_config_with(
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unusable)?
        .dangerous() // the platform's own verifier and rustls's with other roots: neither is less strict
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

/// A configuration that trusts no server, for machines without roots that speak to none.
pub(crate) fn client_config_without_roots(alpn: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unusable)?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

/// Verifies chain and name against `roots`.
pub(crate) fn verifier(roots: &Roots) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    Ok(match roots {
        Roots::System => Arc::new(Verifier::new(provider()).map_err(TlsError::Unusable)?),
        Roots::File(path) => {
            let store = Arc::new(read_roots(path)?);
            WebPkiServerVerifier::builder_with_provider(store, provider())
                // The roots of the file only: with a private authority the system's must not be accepted as well.
                .build()
                .map_err(|error| TlsError::Unusable(rustls::Error::General(error.to_string())))?
        }
    })
}

fn read_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let certificates = read_certificates(path).map_err(|source| TlsError::Roots {
        path: path.to_owned(),
        source,
    })?;
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store.add(certificate).map_err(TlsError::Unusable)?;
    }
    Ok(store)
}

/// The certificates of a PEM file, of which there must be one. Blocks.
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    let bytes = file::read(path, MAX_PEM).map_err(pem::Error::Io)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>()?;
    if certificates.is_empty() {
        return Err(pem::Error::NoItemsFound);
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error =
            client_config(&Roots::File(file.path().to_owned()), ALPN_POSTGRESQL).unwrap_err();
        assert!(
            matches!(error, TlsError::Roots { source, .. } if source.to_string() == "no items found")
        );
        let missing =
            client_config(&Roots::File("/nowhere/ca.pem".into()), ALPN_POSTGRESQL).unwrap_err();
        assert!(matches!(missing, TlsError::Roots { .. }));
    }
}
