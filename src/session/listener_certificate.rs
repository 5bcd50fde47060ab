//! The server certificate for TLS with clients, and its renewal: files are checked at a handshake, not in between.

use std::{
    fmt,
    future::ready,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::{
    ServerConfig,
    pki_types::{
        CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer,
        pem::{self, PemObject},
    },
};
use tokio::sync::OnceCell;

use crate::{
    config::ClientTls,
    net::{
        FileWatch, blocking, file,
        tls::{ALPN_POSTGRESQL, MAX_PEM, provider, read_certificates},
    },
    telemetry::chain,
};

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum ClientTlsError {
    /// A file cannot be read, or holds something else.
    #[error("cannot read a {what} from `{}` (--client-tls-{flag})", path.display())]
    File {
        /// What it should hold.
        what: &'static str,
        /// The end of its flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// Key and certificate do not belong together, or cannot be used.
    #[error("certificate and key for clients cannot be used (--client-tls-cert, --client-tls-key)")]
    Unusable(#[source] rustls::Error),
    /// No certificate could be made.
    #[error("cannot make a certificate for clients (--client-tls)")]
    SelfSigned(#[source] rcgen::Error),
}

impl ClientTlsError {
    /// How to fix it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::File { .. } => Some("both are PEM files that the proxy's user may read"),
            Self::Unusable(_) => Some("the key must be the one that the certificate was made for"),
            Self::SelfSigned(_) => None,
        }
    }
}

/// The certificate in use.
pub(crate) enum ListenerCertificate {
    /// Made for the first client that requests TLS, so that it costs others neither time nor memory.
    SelfSigned(OnceCell<Arc<ServerConfig>>),
    /// Of files.
    Files {
        // Handshakes take it without a lock, also while another one renews it.
        current: ArcSwap<ServerConfig>,
        files: Files,
    },
}

/// The files of a certificate that may be renewed.
pub(crate) struct Files {
    certificate: PathBuf,
    key: PathBuf,
    watch: FileWatch,
    /// Whether a failed renewal has been logged.
    failure_logged: AtomicBool,
}

impl fmt::Debug for ListenerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenerCertificate")
            .finish_non_exhaustive()
    }
}

impl ListenerCertificate {
    /// The certificate of the settings; `None` when TLS is off. Blocks.
    pub(crate) fn new(settings: &ClientTls) -> Result<Option<Self>, ClientTlsError> {
        Ok(match settings {
            ClientTls::Off => None,
            ClientTls::SelfSigned => Some(Self::SelfSigned(OnceCell::new())),
            ClientTls::Files { certificate, key } => {
                // Before the files are read, so that a change in between is noticed later.
                let watch = FileWatch::marked(vec![certificate.clone(), key.clone()]);
                Some(Self::Files {
                    current: ArcSwap::new(read(certificate, key)?),
                    files: Files {
                        certificate: certificate.clone(),
                        key: key.clone(),
                        watch,
                        failure_logged: AtomicBool::new(false),
                    },
                })
            }
        })
    }

    /// The configuration for a handshake, from new files if they have changed and are valid.
    pub(super) async fn config(&self) -> Result<Arc<ServerConfig>, ClientTlsError> {
        match self {
            Self::SelfSigned(made) => {
                let config = made.get_or_try_init(|| ready(self_signed())).await?;
                Ok(Arc::clone(config))
            }
            Self::Files { current, files } => {
                if files.watch.is_changed().await {
                    files.renew(current).await;
                }
                Ok(current.load_full())
            }
        }
    }
}

impl Files {
    async fn renew(&self, current: &ArcSwap<ServerConfig>) {
        // Before the read, and also for files that turn out invalid: these are read again only after another change.
        self.watch.mark().await;
        let (certificate, key) = (self.certificate.clone(), self.key.clone());
        // Another thread reads, as a disk may be slow. Other handshakes meanwhile get the certificate in use.
        match blocking(move || read(&certificate, &key)).await {
            Ok(config) => {
                current.store(config);
                self.failure_logged.store(false, Ordering::Relaxed);
                tracing::info!(
                    certificate = %self.certificate.display(),
                    "new certificate for clients in use"
                );
            }
            // Also while only one of the two files has been replaced: the next change is read again.
            Err(error) => {
                if !self.failure_logged.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        error = %chain(&error),
                        hint = error.hint(),
                        "new certificate for clients cannot be used; the old one stays"
                    );
                }
            }
        }
    }
}

fn read(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, ClientTlsError> {
    let chain = read_certificates(certificate).map_err(|source| ClientTlsError::File {
        what: "certificate",
        flag: "cert",
        path: certificate.to_owned(),
        source,
    })?;
    let key = file::read(key, MAX_PEM)
        .map_err(pem::Error::Io)
        .and_then(|bytes| PrivateKeyDer::from_pem_slice(&bytes))
        .map_err(|source| ClientTlsError::File {
            what: "private key",
            flag: "key",
            path: key.to_owned(),
            source,
        })?;
    config(chain, key)
}

fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, ClientTlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(ClientTlsError::Unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(ClientTlsError::Unusable)?;
    config.alpn_protocols = vec![ALPN_POSTGRESQL.to_vec()];
    // No session resumption, as with PostgreSQL: no ticket can be stolen, and none costs 200 bytes.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A self-signed certificate for the names that a client on this machine uses.
fn self_signed() -> Result<Arc<ServerConfig>, ClientTlsError> {
    let mut params =
        CertificateParams::new(vec!["localhost".to_owned()]).map_err(ClientTlsError::SelfSigned)?;
    let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    params
        .subject_alt_names
        .extend(addresses.map(SanType::IpAddress));
    params
        .distinguished_name
        .push(DnType::CommonName, "lakebase-proxy (self-signed)");
    let key = KeyPair::generate().map_err(ClientTlsError::SelfSigned)?;
    let certificate = params
        .self_signed(&key)
        .map_err(ClientTlsError::SelfSigned)?;
    tracing::info!(
        sha256 = fingerprint(certificate.der()),
        "made a certificate for clients"
    );
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    config(vec![certificate.der().clone()], key)
}

/// As `openssl x509 -fingerprint -sha256` prints it.
fn fingerprint(certificate: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    let bytes: Vec<_> = digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02X}"))
        .collect();
    bytes.join(":")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;
    use tokio::time::advance;

    use super::*;
    use crate::net::watch::INTERVAL;

    /// A pair as files; returns the settings that name them.
    fn write(directory: &TempDir) -> ClientTls {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (certificate, key) = (directory.path().join("cert"), directory.path().join("key"));
        fs::write(&certificate, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        ClientTls::Files { certificate, key }
    }

    fn is_same(one: &Arc<ServerConfig>, other: &Arc<ServerConfig>) -> bool {
        Arc::ptr_eq(one, other)
    }

    #[tokio::test(start_paused = true)]
    async fn changed_files_are_used_unless_they_are_invalid() {
        let directory = TempDir::new().unwrap();
        let settings = write(&directory);
        let certificate = Arc::new(ListenerCertificate::new(&settings).unwrap().unwrap());
        let first = certificate.config().await.unwrap();
        advance(INTERVAL).await;
        assert!(
            is_same(&first, &certificate.config().await.unwrap()),
            "nothing has changed"
        );

        write(&directory);
        assert!(
            is_same(&first, &certificate.config().await.unwrap()),
            "not looked at again yet"
        );
        advance(INTERVAL).await;
        let second = certificate.config().await.unwrap();
        assert!(!is_same(&first, &second));

        // Another key than the certificate's, then no file at all.
        let key = directory.path().join("key");
        fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        advance(INTERVAL).await;
        assert!(is_same(&second, &certificate.config().await.unwrap()));
        fs::remove_file(&key).unwrap();
        advance(INTERVAL).await;
        assert!(is_same(&second, &certificate.config().await.unwrap()));

        write(&directory);
        advance(INTERVAL).await;
        assert!(!is_same(&second, &certificate.config().await.unwrap()));
    }

    #[tokio::test]
    async fn an_unusable_certificate_at_the_start_is_an_error() {
        let directory = TempDir::new().unwrap();
        assert!(ListenerCertificate::new(&ClientTls::Off).unwrap().is_none());
        let ClientTls::Files { certificate, key } = write(&directory) else {
            panic!("files");
        };
        let error = |certificate: &PathBuf, key: &PathBuf| {
            let settings = ClientTls::Files {
                certificate: certificate.clone(),
                key: key.clone(),
            };
            ListenerCertificate::new(&settings).unwrap_err()
        };
        let missing = directory.path().join("missing");
        assert!(matches!(
            error(&missing, &key),
            ClientTlsError::File { flag: "cert", .. }
        ));
        assert!(matches!(
            error(&certificate, &missing),
            ClientTlsError::File { flag: "key", .. }
        ));
        assert!(matches!(
            error(&key, &key),
            ClientTlsError::File {
                source: pem::Error::NoItemsFound,
                ..
            }
        ));
        fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(matches!(
            error(&certificate, &key),
            ClientTlsError::Unusable(_)
        ));
    }

    #[test]
    fn a_fingerprint_reads_as_openssl_prints_it() {
        assert!(fingerprint(b"").starts_with("E3:B0:C4:42:98:FC:1C:14:"));
        assert_eq!(fingerprint(b"x").len(), 32 * 3 - 1);
    }
}
